"""A path becomes files of rows, and the names of files say which part of a run they are for."""

import glob
import re
from pathlib import Path

from mlx_qlora.data.formats import KINDS, RowFile, readable
from mlx_qlora.errors import DataError, did_you_mean, listing
from mlx_qlora.folders import user_path
from mlx_qlora.model.hub import check_readable

# What `datasets` writes about the rows beside them.
DATASETS_RECORDS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
ENDINGS = ", ".join(f".{kind}" for kind in KINDS)
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("valid", "validation", "val", "dev", "eval", "holdout"),
    "test": ("test",),
}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.%\[\]:+-]+))?")


def find_files(path: str | Path | None) -> dict[str, list[RowFile]]:
    """The files behind a path, in the order of their names: part of a run -> files.

    All are "train" except in a folder whose file names say otherwise. A path is a file, a folder
    (searched through, hidden files left out), a glob, or a data set on the hub as `owner/name`,
    `owner/name/config` or `owner/name/config:split`; for anything else there is a DataError.
    """
    text, place = str(path), user_path(path, "data.path")
    with readable(text):
        if place.is_dir():
            return _by_part(place)
        if place.exists():
            return {"train": [_row_file(place, text)]}
        is_local = kind_of(place) or Path(place.parts[0]).exists()
        hub_id = None if is_local else HUB_ID.fullmatch(text)
        if glob.has_magic(text) and not (hub_id and ":" in text):  # a split may be "train[:10%]"
            matches = map(Path, sorted(glob.glob(str(place), recursive=True)))
            files = [_row_file(match, str(match)) for match in matches if match.is_file()]
            if not files:
                raise DataError(f"data {text} matches no file; correct the pattern")
            return {"train": files}
        if hub_id:
            return {"train": [RowFile(text, "hub", hub_id.groups())]}
        beside = place.parent.iterdir() if place.parent.is_dir() else ()
        near = did_you_mean(place.stem, (), {each.stem: repr(each.name) for each in beside})
        remedy = near or "; give the path of a file or folder of rows"
        raise DataError(f"data file {text} is missing{remedy}")


def kind_of(path: Path) -> str | None:
    """One of KINDS by a file's ending, with or without `.gz`; None for any other file."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    kind = suffix.lower().removeprefix(".")
    return kind if kind in KINDS else None


def _row_file(path: Path, name: str) -> RowFile:
    kind = kind_of(path)
    if kind is None:
        ending = "".join(path.suffixes[-2:]) or "no"
        raise DataError(f"data file {name}: {ending} ending; supported: {ENDINGS}, each also .gz")
    check_readable(path, DataError)
    return RowFile(name, kind, path, compressed=path.suffix.lower() == ".gz")


def _by_part(folder: Path) -> dict[str, list[RowFile]]:
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
        # What its `map` and `filter` leave beside the rows are copies of them.
        hidden |= path.name in DATASETS_RECORDS or path.match("cache-*.arrow")
        if kind_of(path) and not hidden and path.is_file():
            files.append(_row_file(path, str(path)))
    if not files:
        raise DataError(f"data folder {folder} holds no file of rows; supported: {ENDINGS}")
    part_of = {file.name: _part(file.path.relative_to(folder)) for file in files}
    if not any(part_of.values()):
        part_of = _parts_by_last_words([file.name for file in files])
    if not any(part_of.values()):
        return {"train": files}
    parts = {name: [f for f in files if part_of[f.name] == name] for name in PART_NAMES}
    others = [file.name for file in files if part_of[file.name] is None]
    if others or not parts["train"]:
        problem = "others whose names do not" if others else "none for training"
        raise DataError(
            f"data folder {folder} has files whose names say what they are for, and {problem}:\n"
            f"{listing(others or [f.name for f in files], most=5)}\n"
            "rename or remove them, or name the files one by one (data.path, data.test_path, ...)"
        )
    for part, of_part in parts.items():
        # The configs of a hub data set, for instance: often the same rows, written another way.
        if len(sets := sorted({_data_set(file.path, folder) for file in of_part})) > 1:
            raise DataError(
                f"data folder {folder} holds several data sets, each with {part} files of its "
                f"own:\n{listing(sets, most=5)}\n"
                f"name one of them (data.path={sets[-1]}), or the files to train on by a pattern "
                f"(such as data.path='{folder}/*/train*')"
            )
    return parts


def _data_set(path: Path, folder: Path) -> str:
    """The folder whose parts a file is one of: that above `train/`, or that of `train.jsonl`."""
    names = path.relative_to(folder).parts
    n_above = next((i for i, name in enumerate(names) if _part(Path(name))), len(names) - 1)
    return str(folder.joinpath(*names[:n_above]))


def _part(path: Path) -> str | None:
    """The part that a file is for by its name: `train-00001.parquet`, or `test/rows.jsonl`."""
    words = {re.split(r"[._-]", name.lower())[0] for name in path.parts}
    named = [part for part, names in PART_NAMES.items() if words.intersection(names)]
    if len(named) > 1:
        raise DataError(f"the name of data file {path} says {' and '.join(named)}; rename it")
    return named[0] if named else None


def _parts_by_last_words(names: list[str]) -> dict[str, str | None]:
    """The parts of files such as `a_train.csv` and `a_test.csv`, or `a.csv` and `a_test.csv`.

    A topic may end so, too (`web-dev`): all files have to, or one has the rest of the name.
    """
    kinds = "|".join(KINDS)
    stems = {name: re.split(rf"\.(?:{kinds})\b", name.lower())[0] for name in names}
    ends = {name: re.fullmatch(r"(.*)[._-]([a-z]+)", stem, re.S) for name, stem in stems.items()}
    part_of: dict[str, str | None] = dict.fromkeys(names)
    for name, end in ends.items():
        for part, words in PART_NAMES.items():
            if end and end[2] in words and (all(ends.values()) or end[1] in stems.values()):
                part_of[name] = part
    with_parts = {end[1] for name, end in ends.items() if end and part_of[name]}
    part_of |= {name: "train" for name, stem in stems.items() if stem in with_parts}
    is_whole = all(part_of.values()) and "train" in part_of.values()
    return part_of if is_whole else dict.fromkeys(names)
