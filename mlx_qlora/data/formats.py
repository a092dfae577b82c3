"""A file becomes rows, each with the line it begins on.

JSON lines, one JSON array, CSV with a header, Parquet, each of the first three also compressed by
gzip; or a data set on the Hugging Face hub. What a single row has wrong is yielded in its place,
so that one bad row does not hide the good ones.
"""

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from typing import IO, Any

from mlx_qlora.data.files import RowFile
from mlx_qlora.errors import DataError

BOM = b"\xef\xbb\xbf"
PIECE = 1 << 20  # characters of a JSON array that are read at a time

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

    Parquet and the hub have no lines: their rows are counted.
    """
    if file.kind == "hub":
        yield from enumerate(hub_dataset(file), 1)
    elif file.kind == "parquet":
        yield from _parquet_rows(file)
    else:
        opener: Any = gzip.open if file.compressed else open
        try:
            with opener(file.path, "rb") as stream:
                yield from _text_rows(file, stream)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"data file {file.name} is damaged: {error}") from None


def parse(raw: Any) -> Any:
    """The row of one JSON line; whatever is no bytes is a row already."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return _DECODER.decode(raw.decode("utf-8").rstrip("\r\n"))
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
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"field {twice!r} appears twice")
    return made


def _constant(name: str) -> None:
    raise DataError(f"not JSON: {name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _is_array(file: IO[bytes]) -> bool:
    """Whether the first sign of a file is `[`; the file is read from its start again."""
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    return start[:1] == b"["


def _array_rows(file: IO[bytes]) -> Rows:
    """The items of one JSON array, read piece by piece.

    After an item that is no JSON nothing more can be found.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, at, line, counted, ended = "", 0, 1, 0, False

    def more(size: int) -> None:
        nonlocal text, at, line, counted, ended
        line, counted = line + text.count("\n", counted, at), 0
        piece = file.read(size)
        ended = not piece
        text, at = text[at:] + decode(piece, ended), 0

    try:
        more(PIECE)
        at = text.index("[") + 1
        while True:
            while text[at : at + 1] in (" ", "\t", "\r", "\n", ",") or (at >= len(text)):
                if at < len(text):
                    at += 1
                elif ended:
                    break
                else:
                    more(PIECE)
            line, counted = line + text.count("\n", counted, at), at
            if text[at : at + 1] in ("]", ""):
                if at >= len(text):
                    yield line, DataError("the array is not closed: the file is cut short")
                return
            try:
                row, end = _DECODER.raw_decode(text, at)
                # The end of a piece may cut a number short; and an item may be longer than one.
                if end >= len(text) and not ended:
                    raise ValueError("cut")
            except DataError as reason:  # JSON, but not as we want it: its end can be found
                row, end = reason, json.JSONDecoder().raw_decode(text, at)[1]
            except (ValueError, RecursionError) as error:
                if not ended:
                    more(max(PIECE, len(text)))
                    continue
                yield line, DataError(f"not JSON, and all after it is lost: {error}")
                return
            yield line, row
            at = end
    except UnicodeDecodeError:
        yield line, DataError("not UTF-8: nothing after it can be read")


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


# ---- tables of other packages ------------------------------------------------------------------


def _parquet_rows(file: RowFile) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file.name} needs pyarrow: pip install 'mlx-qlora[parquet]'") from None
    number = 0
    try:
        with gzip.open(file.path) if file.compressed else open(file.path, "rb") as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(
            f"data {file.name} is no file, and the hub's data set of that name cannot be loaded: "
            f"{reason}"
        ) from None
