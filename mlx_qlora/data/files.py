"""A path becomes the files of rows behind it.

One file, a folder of files, a glob, or a data set on the Hugging Face hub. A folder that names its
parts (`train.jsonl`, `valid.jsonl`, `test.jsonl`: mlx-lm's layout and the hub's) is taken by them.
"""

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_qlora.errors import DataError, listing

KINDS = ("jsonl", "ndjson", "json", "csv", "parquet")
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.%\[\]:+-]+))?")


@dataclass(frozen=True)
class RowFile:
    """One file of rows, or one split of a data set on the hub.

    Attributes:
        name: what messages call it.
        kind: one of KINDS, or "hub".
        path: the file; for the hub, its id, config and split in one word.
        compressed: whether gzip is around it.
    """

    name: str
    kind: str
    path: Path | str
    compressed: bool = False

    @property
    def size(self) -> int:
        """Bytes on disk; 0 where that is not known."""
        return Path(self.path).stat().st_size if self.kind != "hub" else 0

    def content_hash(self) -> str:
        """A hash of every byte, read in pieces."""
        hashed = hashlib.blake2b(self.kind.encode(), digest_size=16)
        with open(self.path, "rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
        return hashed.hexdigest()


def find_files(path: str | Path) -> dict[str, list[RowFile]]:
    """The files behind a path, by the part of a run that they are for.

    Args:
        path: a file, a folder (searched through, hidden files left out), a glob, or a data set on
            the hub as `owner/name`, `owner/name/config` or `owner/name/config:split`.

    Returns:
        "train", "validation" and "test" -> files in the order of their names. All are "train",
        but in a folder whose files say otherwise.

    Raises:
        DataError: nothing is there, or nothing that holds rows.
    """
    text = str(path)
    place = Path(text).expanduser()
    if place.is_dir():
        return _by_part(place)
    if place.exists():
        return _all_train([_row_file(place, text)])
    if glob.has_magic(text):
        found = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
        files = [_row_file(match, str(match)) for match in found if match.is_file()]
        if not files:
            raise DataError(f"data {text} matches no file; correct the pattern")
        return _all_train(files)
    if (named := HUB_ID.fullmatch(text)) and not kind_of(place):
        return _all_train([RowFile(text, "hub", "|".join(part or "" for part in named.groups()))])
    raise DataError(f"data file {text} is missing; give the path of a file or folder of rows")


def kind_of(path: Path) -> str | None:
    """One of KINDS by a file's ending, also behind `.gz`; None for any other file."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    kind = suffix.lower().removeprefix(".")
    return kind if kind in KINDS else None


def _row_file(path: Path, name: str) -> RowFile:
    kind = kind_of(path)
    if kind is None:
        known = ", ".join(f".{kind}" for kind in KINDS)
        ending = "".join(path.suffixes[-2:]) or "no"
        raise DataError(f"data file {name}: {ending} ending; known: {known}, each also .gz")
    compressed = path.suffix.lower() == ".gz"
    if not path.stat().st_size:
        raise DataError(f"data file {name} is empty")
    return RowFile(name, kind, path, compressed)


def _by_part(folder: Path) -> dict[str, list[RowFile]]:
    paths = [path for path in _visible(folder) if kind_of(path)]
    if not paths:
        known = ", ".join(f".{kind}" for kind in KINDS)
        raise DataError(f"data folder {folder} holds no file of rows; known endings: {known}")
    files = [_row_file(path, str(path)) for path in paths]
    parts = {name: [f for f in files if _part(f.path) == name] for name in PART_NAMES}
    if not parts["train"]:
        return _all_train(files)
    if others := [f.name for f in files if _part(f.path) is None]:
        raise DataError(
            f"data folder {folder} has files for training by name, and others that are for "
            f"nothing:\n{listing(others, most=5)}\nrename or remove them, or name one file"
        )
    return parts


def _part(path: Path | str) -> str | None:
    """The part that a file's name says it is for: `train-00001.parquet` is for training."""
    word = re.split(r"[._-]", Path(path).name.lower())[0]
    return next((part for part, words in PART_NAMES.items() if word in words), None)


def _visible(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in inside):
            yield path


def _all_train(files: list[RowFile]) -> dict[str, list[RowFile]]:
    return {"train": files, "validation": [], "test": []}
