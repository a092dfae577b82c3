"""A file becomes rows, each with the line it begins on.

JSON lines, one JSON array, or CSV with a header; each of them also compressed by gzip. What a
single row has wrong is yielded in its place, so that one bad row does not hide the good ones.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlx_qlora.errors import DataError

KINDS = (".jsonl", ".ndjson", ".json", ".csv")
BOM = b"\xef\xbb\xbf"

Rows = Iterator[tuple[int, Any]]


def read_rows(path: Path) -> Rows:
    """Yields (line number from 1, row) for every row of a file.

    A row that is not UTF-8, or not JSON, yields the DataError that says so.

    Raises:
        DataError: no such file, an unknown kind of file, an empty one, or damaged compression.
    """
    if path.is_dir() or not path.exists():
        kind = "a folder" if path.is_dir() else "missing"
        raise DataError(f"data file {path} is {kind}; give the path of a JSONL file")
    kind = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    if kind.lower() not in KINDS:
        known = ", ".join(KINDS)
        raise DataError(f"data file {path}: {kind or 'no'} ending; known: {known}, each also .gz")
    if not path.stat().st_size:
        raise DataError(f"data file {path} is empty")

    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as file:
            if kind.lower() == ".csv":
                yield from _csv_rows(file)
            elif kind.lower() == ".json" and _is_array(file):
                yield from _array_rows(file)
            else:
                yield from _json_lines(file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"data file {path} is damaged: {error}") from None


def _json_lines(file: IO[bytes]) -> Rows:
    for number, line in enumerate(file, 1):  # bytes: only \n ends a line, whatever a string holds
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, _parse(text)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # Python refuses integers of thousands of digits
        return DataError(f"not JSON: {error}")
    except RecursionError:
        return DataError("not JSON: nested too deeply")


def _is_array(file: IO[bytes]) -> bool:
    """Whether the first sign of a file is `[`; the file is read from its start again."""
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    return start[:1] == b"["


def _array_rows(file: IO[bytes]) -> Rows:
    """The items of one JSON array; after an item that is no JSON nothing more can be found."""
    try:
        text = file.read().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield line, DataError("not UTF-8: nothing of this array can be read")
        return
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] in ("]", ""):
            if text[at : at + 1] == "":
                yield line, DataError("the array is not closed: the file is cut short")
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, DataError(f"not JSON, and all after it is lost: {error}")
            return
        yield line, row


def _csv_rows(file: IO[bytes]) -> Rows:
    """Rows of a CSV file as dicts by its header; a quoted field may hold line breaks."""
    csv.field_size_limit(sys.maxsize)
    # A generator of text and not a TextIOWrapper, which would close the file a second time.
    text = (line.decode("utf-8", "surrogateescape") for line in file)
    reader = csv.reader(text, strict=True)
    header = [name.removeprefix("\ufeff") for name in next(reader, [])]
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, DataError(f"not CSV: {error}")
            continue
        if not values:
            continue
        if len(values) != len(header):
            yield line, DataError(f"{len(values)} fields, where the header has {len(header)}")
        elif any("\udc80" <= sign <= "\udcff" for value in values for sign in value):
            yield line, DataError("not UTF-8")
        else:
            yield line, dict(zip(header, values))
