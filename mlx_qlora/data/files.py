"""A path becomes files, and files become rows."""

import codecs
import csv
import glob
import gzip
import hashlib
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_qlora.errors import ConfigError, DataError, listing

# ---- a path -> files -----------------------------------------------------------------------------


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


# ---- a file -> rows ------------------------------------------------------------------------------


BOM = b"\xef\xbb\xbf"


PIECE = 1 << 20  # characters of a JSON array that are read at a time


LONGEST_ITEM = 1 << 28  # characters; beyond this an item is taken for one that never ends


Rows = Iterator[tuple[int, Any]]


def read_rows(file: RowFile) -> Rows:
    """Yields (line number from 1, row) for every row of a file.

    A row that cannot be read yields the DataError that says why.

    Raises:
        DataError: damaged compression, or a package that this kind of file needs is missing.
    """
    for line, raw in raw_rows(file):
        yield line, parse(raw)


def raw_rows(file: RowFile) -> Rows:
    """As `read_rows`, but JSON lines stay bytes, for `parse` to read where there is time.

    Where rows have no lines of their own they are counted; see `unit_of`.
    """
    if file.kind == "memory":
        yield from enumerate(file.path, 1)
    elif file.kind == "hub":
        yield from ((n, _without_nulls(row)) for n, row in enumerate(hub_dataset(file), 1))
    elif file.kind == "parquet":
        yield from _parquet_rows(file)
    else:
        try:
            with readable(file.name), _open(file) as stream:
                yield from _text_rows(file, stream)
        except (EOFError, zlib.error) as error:
            raise DataError(f"data file {file.name} is damaged: {error}") from None
        except csv.Error as error:
            raise DataError(f"data file {file.name}, line 1: {error}") from None


def unit_of(file: RowFile) -> str:
    """What the numbers of a file's rows count: "line", or "row" where many share a line."""
    if file.kind in ("jsonl", "ndjson", "csv"):
        return "line"
    if file.kind != "json":
        return "row"
    try:
        with readable(file.name), _open(file) as stream:
            return "row" if _is_array(stream) else "line"
    except (EOFError, zlib.error) as error:
        raise DataError(f"data file {file.name} is damaged: {error}") from None


def _open(file: RowFile) -> Any:
    return gzip.open(file.path) if file.compressed else open(file.path, "rb")


def _without_nulls(value: Any) -> Any:
    """A row of a table without the fields that were null because another row has them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parse(raw: Any) -> Any:
    """The row of one JSON line; whatever is no bytes is a row already."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return _STRICT.decode(raw.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return DataError("not JSON: nested too deeply")
    except ValueError as error:  # `_object`, `_constant`, or an integer of thousands of digits
        return error if isinstance(error, DataError) else DataError(f"not JSON: {error}")


# ---- JSON and CSV ------------------------------------------------------------------------------
def _text_rows(file: RowFile, stream: IO[bytes]) -> Rows:
    if file.kind == "csv":
        return _csv_rows(stream)
    if file.kind == "json" and _is_array(stream):
        return _array_rows(stream)
    return _json_lines(stream)


def _json_lines(file: IO[bytes]) -> Rows:
    for number, line in enumerate(file, 1):  # bytes: only \n ends a line, whatever a string holds
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a name twice and Python keeps the last: half of such a row would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise DataError(f"field {twice[:40]!r} appears twice")
    return made


def _constant(name: str) -> None:
    raise DataError(f"not JSON: {name} is no JSON number")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _is_array(file: IO[bytes]) -> bool:
    """Whether the first sign of a file is `[`; the file is read from its start again."""
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    return start[:1] == b"["


def _array_rows(file: IO[bytes]) -> Rows:
    """The items of one JSON array, counted from 1 and read piece by piece.

    After an item that is no JSON nothing more can be found.
    """
    text = Pieces(file)
    number = 1
    text.skip(" \t\r\n")
    text.at += 1  # the bracket
    while True:
        text.skip(" \t\r\n")
        if text.here() == "]":
            break
        item = text.item()
        yield number, item if isinstance(item, DataError) else parse(item.encode())
        if isinstance(item, DataError):
            return
        number += 1
        text.skip(" \t\r\n")
        if text.here() not in (",", "]"):
            cut = "a comma is missing" if text.here() else text.end
            yield number, DataError(f"not JSON, and all after it is lost: {cut}")
            return
        text.at += text.here() == ","
    text.at += 1
    text.skip(" \t\r\n")
    if text.here():
        yield number, DataError("what stands behind the end of the array is lost")


class Pieces:
    """The text of a file, of which only the part around `at` is in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._ended = self._broken = False
        self.text, self.at = "", 0

    def _read(self, size: int) -> None:
        piece = self._file.read(size)
        self._ended = not piece
        try:
            more = self._decode(piece, self._ended)
        except UnicodeDecodeError as error:  # what stands before it is good
            more = error.object[: error.start].decode("utf-8", "ignore")
            self._ended = self._broken = True
        self.text, self.at = self.text[self.at :] + more, 0

    @property
    def end(self) -> str:
        """Why there is no more text."""
        return "not UTF-8" if self._broken else "the file is cut short"

    def here(self) -> str:
        """The character at `at`; empty at the end of the file."""
        while self.at >= len(self.text) and not self._ended:
            self._read(PIECE)
        return self.text[self.at : self.at + 1]

    def skip(self, signs: str) -> None:
        """Moves behind all of some signs."""
        while (sign := self.here()) and sign in signs:
            self.at += 1

    def item(self) -> "str | DataError":
        """The text of the JSON value at `at`, which moves behind it."""
        while True:
            try:
                _, end = _LENIENT.raw_decode(self.text, self.at)
                # The end of a piece may cut a number short: "-7" of "-7.5".
                behind = self.text[end : end + 1]
                whole = self.text[end - 1] in '}]"' or (behind and behind in ",] \t\r\n")
                if whole or self._ended:
                    found, self.at = self.text[self.at : end], end
                    return found
            except RecursionError:
                return DataError("not JSON, and all after it is lost: nested too deeply")
            except ValueError as error:
                if self._ended or len(self.text) > LONGEST_ITEM:
                    reason = self.end if self._broken else getattr(error, "msg", error)
                    return DataError(f"not JSON, and all after it is lost: {reason}")
            self._read(max(PIECE, len(self.text)))


_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)  # only to find where a value ends


def _csv_rows(file: IO[bytes]) -> Rows:
    """Rows of a CSV file as dicts by its header; a quoted field may hold line breaks."""
    csv.field_size_limit(sys.maxsize)
    # A generator of text and not a TextIOWrapper, which would close the file a second time.
    lines = itertools.chain([file.readline().removeprefix(BOM)], file)
    text = (line.decode("utf-8", "surrogateescape") for line in lines)
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise csv.Error(f"no header: {error}") from None
    if twice := [name for name in header if header.count(name) > 1]:
        raise csv.Error(f"the header names {twice[0]!r} twice; give each column its own name")
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lost = f"; lines {line} to {reader.line_num} are lost" * (reader.line_num > line)
            yield line, DataError(f"not CSV: {error}{lost}")
            continue
        if not values:
            continue
        if len(values) != len(header):
            yield line, DataError(f"{len(values)} fields, where the header has {len(header)}")
        elif any("\udc80" <= sign <= "\udcff" for value in values for sign in value):
            yield line, DataError("not UTF-8")
        else:
            yield line, dict(zip(header, values))


# ---- tables of other packages ------------------------------------------------------------------
def _parquet_rows(file: RowFile) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file.name} needs pyarrow: pip install 'mlx-qlora[parquet]'") from None
    number = 0
    try:
        with _open(file) as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        after = f" after row {number}" if number else ""
        raise DataError(f"data file {file.name} is damaged{after}: {error}") from None


def hub_dataset(file: RowFile) -> Any:
    """A `datasets.Dataset`, from the cache or the hub; its rows come as dicts.

    Raises:
        DataError: the package is missing, or there is no such data set, config or split.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data {file.name} is neither a file nor a folder. If it is a data set on the hub: "
            "pip install 'mlx-qlora[datasets]'"
        ) from None
    repository, config, split = str(file.path).split("|")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(repository, config or None, split=split or "train")
    except Exception as error:  # its own kinds, and those of the packages below it
        told = error.__cause__ or error  # "An error occurred while generating the dataset"
        reason = (str(told).strip() or repr(told)).splitlines()[0]
        raise DataError(
            f"data {file.name} is no file, and the hub's data set of that name cannot be loaded: "
            f"{reason}"
        ) from None
