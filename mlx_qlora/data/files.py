"""A path becomes the files of rows behind it.

One file, a folder of files, a glob, or a data set on the Hugging Face hub. A folder that names its
parts (`train.jsonl`, `valid.jsonl`, `test.jsonl`: mlx-lm's layout and the hub's) is taken by them.
"""

import glob
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ConfigError, DataError, listing

KINDS = ("jsonl", "ndjson", "json", "csv", "parquet")
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.%\[\]:+-]+))?")


@dataclass(frozen=True)
class RowFile:
    """One file of rows, one split of a data set on the hub, or rows in memory.

    Attributes:
        name: what messages call it.
        kind: one of KINDS, "hub" or "memory".
        path: the file; for the hub, its id, config and split in one word; or the rows.
        compressed: whether gzip is around it.
    """

    name: str
    kind: str
    path: Any
    compressed: bool = False

    @property
    def size(self) -> int:
        """Bytes on disk; 0 where that is not known."""
        return Path(self.path).stat().st_size if self.kind in KINDS else 0

    def content_hash(self) -> str:
        """A hash of every byte, read in pieces, and of how they are read."""
        how = f"{self.kind} {self.compressed}".encode()
        hashed = hashlib.blake2b(how, digest_size=16)
        with readable(self.name), open(self.path, "rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
        return hashed.hexdigest()


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns what the system says of a file into an error of the user's input.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"data {name} cannot be read: {error.strerror or error}") from None


def user_path(text: str | Path, field: str) -> Path:
    """A path as a person writes it, `~` included.

    Raises:
        ConfigError: it is empty, or names the home of nobody.
    """
    if not str(text):
        raise ConfigError(f"{field} is empty; name a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{field}: there is no home folder for {text}") from None


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
    with readable(str(path)):
        return _find(str(path), user_path(path, "data.path"))


def _find(text: str, place: Path) -> dict[str, list[RowFile]]:
    if place.is_dir():
        return _by_part(place)
    if place.exists():
        return _all_train([_row_file(place, text)])
    named = HUB_ID.fullmatch(text)
    on_hub = named and not kind_of(place) and not Path(place.parts[0]).exists()
    if glob.has_magic(text) and not (on_hub and ":" in text):
        found = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
        files = [_row_file(match, str(match)) for match in found if match.is_file()]
        if not files:
            raise DataError(f"data {text} matches no file; correct the pattern")
        return _all_train(files)
    if named and on_hub:
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
        raise DataError(f"data file {name} is empty; write the rows to it again")
    return RowFile(name, kind, path, compressed)


def _by_part(folder: Path) -> dict[str, list[RowFile]]:
    paths = [path for path in _visible(folder) if kind_of(path)]
    if not paths:
        known = ", ".join(f".{kind}" for kind in KINDS)
        raise DataError(f"data folder {folder} holds no file of rows; known endings: {known}")
    files = [_row_file(path, str(path)) for path in paths]
    part_of = {file.name: _part(file.path.relative_to(folder)) for file in files}
    if not any(part_of.values()):
        return _all_train(files)
    parts = {name: [f for f in files if part_of[f.name] == name] for name in PART_NAMES}
    others = [file.name for file in files if part_of[file.name] is None]
    if others or not parts["train"]:
        problem = "others that are for nothing" if others else "none to train on"
        raise DataError(
            f"data folder {folder} has files whose names say what they are for, and {problem}:\n"
            f"{listing(others or [f.name for f in files], most=5)}\n"
            "rename or remove them, or name the files one by one (data.path, data.test_path, ...)"
        )
    return parts


def _part(path: Path) -> str | None:
    """The part that a name says a file is for: `train-00001.parquet`, or `test/rows.jsonl`."""
    words = {re.split(r"[._-]", name.lower())[0] for name in path.parts}
    named = [part for part, known in PART_NAMES.items() if words.intersection(known)]
    if len(named) > 1:
        raise DataError(f"data file {path} is for {' and for '.join(named)} by its name; rename it")
    return named[0] if named else None


def _visible(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in inside):
            yield path


def _all_train(files: list[RowFile]) -> dict[str, list[RowFile]]:
    return {"train": files, "validation": [], "test": []}
