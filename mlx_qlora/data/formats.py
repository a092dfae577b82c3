"""A file of any format becomes rows; so do a table in memory and a data set on the hub."""

import codecs
import csv
import functools
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from mlx_qlora.errors import DataError, waiting
from mlx_qlora.folders import sha256
from mlx_qlora.model.hub import check_environment
from mlx_qlora.progress import doing

KINDS = ("jsonl", "ndjson", "json", "csv", "parquet", "arrow")
Rows = Iterator[tuple[int, Any]]
BOM = b"\xef\xbb\xbf"
PIECE = 1 << 20  # characters of a JSON array that are read at a time
FEW = 16  # rows of a table that are unpacked at a time: a small file may hold large ones
PACKED, MOST_GROUP = 1000, 1 << 28  # bytes of a group of which the disk has less than a thousandth
MOST_DICTIONARY = 1 << 26  # bytes; pyarrow's has up to 1,024 rows of whatever length
MOST_ROWS = 100  # for each byte of a table: no rows say so little
MOST_ROW = 1 << 24  # bytes; a text of JSON takes thirty times as much in memory at worst
SIGN = re.compile(r"[^ \t\r\n]")


@dataclass(frozen=True)
class RowFile:
    """One file of rows, one split of a data set on the hub, or rows in memory."""

    name: str  # what messages call it
    kind: str  # one of KINDS, "hub" or "memory"
    path: Any  # the file; for the hub (id, config or None, split or None); for memory the rows
    compressed: bool = False

    @property
    def size(self) -> int:
        """Bytes on disk; 0 where that is not known."""
        return self.path.stat().st_size if self.kind in KINDS else 0

    @property
    def unit(self) -> str:
        """What the numbers of its rows count: "line", or "row" where many share a line."""
        if self.kind in ("json", "jsonl", "ndjson"):
            with _opened(self) as stream:
                return "row" if _is_array(stream, self.kind) else "line"
        return "line" if self.kind == "csv" else "row"

    @functools.cached_property
    def data_set(self) -> Any:
        """Of the hub, loaded once."""
        return hub_dataset(self)

    def content_hash(self) -> str:
        """A hash of every byte, and of the kind that decides how they are read; the hub's own."""
        if self.kind == "hub":
            return str(getattr(self.data_set, "_fingerprint", self.path))
        with readable(self.name), doing("hashing", 1, "file"):
            return f"{self.kind} {self.compressed} {sha256(self.path)}"


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns the system's errors about a file into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data {name} cannot be read: {error.strerror or error}") from None


def raw_rows(file: RowFile) -> Rows:
    """Yields (line number from 1, raw row) for every row of a file; `parse` makes it a row.

    Only JSON lines are raw, bytes that a worker process can parse. Where rows have no lines of
    their own they are counted; see `RowFile.unit`.
    """
    if file.kind == "memory":
        yield from enumerate(file.path, 1)
    elif file.kind == "hub":
        yield from enumerate(file.data_set, 1)
    else:
        with _opened(file) as stream:
            if file.kind in ("parquet", "arrow"):
                yield from _table_rows(stream, file)
            elif file.kind == "csv":
                yield from _csv_rows(stream, file.name)
            elif _is_array(stream, file.kind):
                yield from _array_rows(stream)
            else:
                yield from _json_lines(stream, file.name)


@contextmanager
def _opened(file: RowFile) -> Iterator[Any]:
    try:
        with (
            readable(file.name),
            gzip.open(file.path) if file.compressed else open(file.path, "rb") as stream,
        ):
            yield stream
    except (EOFError, zlib.error) as error:
        raise DataError(f"data file {file.name} is damaged: {error}") from None


def parse(raw: Any) -> Any:
    """The row of one JSON line, or the DataError that says why there is none."""
    if not isinstance(raw, bytes):
        return raw  # of a file that is no JSON lines: a row already
    try:
        return parse_json(raw.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte {error.start})")


def parse_json(text: str) -> Any:
    """A JSON value, or the DataError that says why there is none; stricter than Python's."""
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return DataError("not JSON: nested too deeply")
    except ValueError as error:  # `_object`, `_constant`, or an integer of thousands of digits
        return error if isinstance(error, DataError) else DataError(f"not JSON: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a name twice and Python keeps the last: half of such a row would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise DataError(f"field {repeated(name for name, _ in pairs)[0][:40]!r} appears twice")
    return fields


def _constant(name: str) -> None:
    raise DataError(f"not JSON: {name} is no JSON number")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The lines of a file; a DataError for one that is no row, such as an unpacked gigabyte."""
    lines = iter(lambda: file.readline(MOST_ROW + 1), b"")  # only \n ends one, whatever it holds
    for number, line in enumerate(lines, 1):
        if len(line) > MOST_ROW:
            raise DataError(f"data file {name}, line {number}: longer than {MOST_ROW:,} bytes")
        yield line


def _json_lines(file: IO[bytes], name: str) -> Rows:
    for number, line in enumerate(_lines(file, name), 1):
        text = line.removeprefix(BOM) if number == 1 else line
        if number == 1 and text.strip() == b"{":
            raise DataError(
                f"data file {name}, line 1: a JSON object continues on the next line; write each "
                "row on one line (jq -c .), or all of them as one array [...]"
            )
        if text.strip():
            yield number, text


def _is_array(file: IO[bytes], kind: str) -> bool:
    """Whether a file holds one JSON array; it is read from its start again.

    Where each line should be a row, a line that is an array is a row that is refused.
    """
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    if start[:1] != b"[" or kind == "json":
        return start[:1] == b"["
    line, more = file.readline(PIECE), file.read(1)
    file.seek(0)
    return not more or isinstance(parse(line.removeprefix(BOM)), DataError)


# Only finds where a value ends. It takes what _STRICT refuses (numbers of any length, NaN, a name
# twice), so that a refused item does not hide the ones after it, as a streaming parser would.
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)


def _array_rows(file: IO[bytes]) -> Rows:
    """The items of one JSON array, counted from 1; after text that is no JSON all is lost.

    Of its text only the part from the current item on is in memory.
    """
    # A byte that is no UTF-8 becomes a lone surrogate here, and that byte again in an item.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    text, at, has_ended, number = "", 0, False, 0

    def read(size: int) -> None:
        nonlocal text, at, has_ended
        piece = file.read(size)
        has_ended = not piece
        text, at = text[at:] + decode(piece, has_ended), 0

    def sign() -> str:
        """The next character that is no space; empty at the end of the file."""
        nonlocal at
        while not (found := SIGN.search(text, at)) and not has_ended:
            at = len(text)
            read(PIECE)
        at = found.start() if found else len(text)
        return found[0] if found else ""

    def item() -> bytes | DataError:
        nonlocal at
        while True:
            try:
                first, (_, at) = at, _LENIENT.raw_decode(text, at)
                # A number may go on with what is not read yet: "-7" of "-7.5" or of "-7e+5".
                if text[at - 1] in '}]"' or at + 2 < len(text) or has_ended:
                    return text[first:at].encode("utf-8", "surrogateescape")
                at = first
            except RecursionError:
                return DataError("not JSON, so the rest of the file is lost: nested too deeply")
            except json.JSONDecodeError as error:
                if has_ended or len(text) > MOST_ROW:  # it may never end
                    return DataError(f"not JSON, so the rest of the file is lost: {error.msg}")
            read(max(PIECE, len(text)))

    sign()
    at += 1  # the bracket
    while sign() != "]":
        value, number = item(), number + 1
        yield number, parse(value)
        if isinstance(value, DataError):
            return
        if (after := sign()) == ",":
            at += 1
        elif after != "]":
            reason = "a comma is missing" if after else "the file is cut short"
            yield number + 1, DataError(f"not JSON, so the rest of the file is lost: {reason}")
            return
    at += 1
    if sign():
        yield number + 1, DataError("not JSON: text after the end of the array, which is ignored")


def _csv_rows(file: IO[bytes], name: str) -> Rows:
    """Rows of a CSV file as dicts by its header; a quoted field may hold line breaks.

    Columns are between commas, or between semicolons or tabs if the header has these alone, as
    spreadsheets write them where a comma is in numbers.
    """
    csv.field_size_limit(MOST_ROW)
    # A generator of text and not a TextIOWrapper, which would close the file a second time.
    lines = _lines(file, name)
    first = next(lines, b"").removeprefix(BOM)
    others = [mark for mark in (";", "\t") if mark.encode() in first and b"," not in first]
    text = (x.decode("utf-8", "surrogateescape") for x in itertools.chain([first], lines))
    reader = csv.reader(text, delimiter=[*others, ","][0], strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"data file {name}, line 1: no header: {error}") from None
    if twice := repeated(header):
        raise DataError(f"data file {name}, line 1: the header has {twice[0]!r} twice; rename one")
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
        if values and len(values) != len(header):
            yield line, DataError(f"{len(values)} fields, where the header has {len(header)}")
        elif any("\udc80" <= character <= "\udcff" for value in values for character in value):
            yield line, DataError("not UTF-8; save it as CSV UTF-8")
        elif values:
            yield line, dict(zip(header, values))


def repeated(names: Iterable[str]) -> list[str]:
    """The names that are there twice, of which a dict would lose one."""
    return [name for name, n in Counter(names).items() if n > 1]


def _table_rows(file: IO[bytes], about: RowFile) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError:
        needs = f"{about.name} needs pyarrow"
        raise DataError(f"{needs}; run: pip install 'mlx-qlora[parquet]'") from None
    number, most = 0, MOST_ROWS * about.size
    try:
        if about.kind == "parquet":
            opened = pyarrow.parquet.ParquetFile(file)
            longest = _longest_dictionary(file, opened.metadata)
            batches = opened.iter_batches(batch_size=FEW if longest <= MOST_ROW else 1)
        elif file.read(6) == b"ARROW1":  # the format with an index at its end, Feather's
            opened = pyarrow.ipc.open_file(file)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            if about.kind == "arrow":
                batch.validate(full=True)  # or an offset beyond its end would be followed
            if twice := repeated(batch.schema.names):
                raise ValueError(f"it names column {twice[0]!r} twice")
            start = 0
            while piece := batch.slice(start, FEW):
                # Then one is unpacked at a time: each may say what a dictionary holds once.
                if is_long := piece.nbytes > MOST_ROW // FEW:
                    piece = piece.slice(0, 1)
                start += len(piece)
                for row in piece.to_pylist():
                    number += 1
                    if number > most:
                        raise ValueError(f"more than {MOST_ROWS} rows a byte; write it as JSONL")
                    if is_long and sum(len(repr(value)) for value in row.values()) > MOST_ROW:
                        raise ValueError(f"row {number} is longer than {MOST_ROW:,} bytes")
                    yield number, row
    except Exception as error:  # pyarrow's, and Python's for a day or a text that it cannot hold
        after = f" after row {number}" if number else ""
        said = str(error) or repr(error)
        raise DataError(f"data file {about.name} is damaged{after}: {said}") from None


def _longest_dictionary(file: IO[bytes], about: Any) -> int:
    """The bytes of a Parquet file's longest dictionary, of which each row may repeat a value.

    A ValueError if it is too long, or for a group of rows that takes far more memory than disk: its
    pages are unpacked as a whole.
    """
    longest = 0
    groups = map(about.row_group, range(about.num_row_groups))
    packed = 0  # bytes of the columns of a group that takes far more memory than disk
    for group, column in itertools.product(groups, range(about.num_columns)):
        chunk, packed = group.column(column), packed * (column > 0)
        if (size := chunk.total_uncompressed_size) > PACKED * chunk.total_compressed_size:
            packed += size
        if packed > MOST_GROUP:
            raise ValueError(f"{packed:,} bytes are packed {PACKED}-fold; write smaller row groups")
        pages = chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset
        file.seek(min(pages))
        # The page's kind, of which 2 is a dictionary, and its size unpacked, as Thrift writes them.
        head, size = file.read(16), 0
        for i, byte in enumerate(head[3:] if head[:3] == b"\x15\4\x15" else b""):
            size |= (byte & 127) << 7 * i
            if byte < 128:
                break
        if (longest := max(longest, size // 2)) > MOST_DICTIONARY:
            raise ValueError(f"it has a dictionary of {longest:,} bytes; write it without any")
    return longest


def without_nulls(value: Any) -> Any:
    """A row without the fields that are null: in a table they are there because others have them.

    Wherever rows come from: the same rows as JSON, Parquet or a DataFrame say the same. A null
    within text, such as the JSON of a call's arguments, is what somebody wrote, and stays.
    """
    if hasattr(value, "tolist"):  # numpy's, of a DataFrame
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def object_of(row: Any) -> Mapping[str, Any]:
    """A row without what is null; a DataError for what is none, or was none when it was parsed."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"not an object but {type(row).__name__}")
    return without_nulls(row)


def in_memory(rows: Any) -> RowFile:
    """Rows that are dicts, columns of equal length, or a table of pyarrow, pandas or polars."""
    if hasattr(rows, "to_pylist"):  # pyarrow
        rows = rows.to_pylist()
    elif hasattr(rows, "to_dicts"):  # polars
        rows = rows.to_dicts()
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    elif isinstance(rows, Mapping):
        columns = {str(name): column for name, column in rows.items()}
        if not all(isinstance(column, (list, tuple)) for column in columns.values()):
            raise DataError(
                f"rows must be a list or a table, not one object of {', '.join(columns)[:80]}; "
                "put a single row into a list, or name one of the parts"
            )
        if len(set(map(len, columns.values()))) > 1:
            raise DataError("rows given as columns must be lists of the same length")
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    if not isinstance(rows, Iterable):
        raise DataError(f"rows must be a list or a table, not {type(rows).__name__}")
    return RowFile("rows", "memory", list(rows))


def hub_dataset(file: RowFile) -> Any:
    """A `datasets.Dataset`, from its cache or the hub, or a DataError that says why not."""
    check_environment()
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data {file.name} is neither a file nor a folder; if it is a data set on the hub, "
            "run: pip install 'mlx-qlora[datasets]'"
        ) from None
    repository, config, split = file.path
    datasets.disable_progress_bars()
    try:
        with waiting(f"the hub, for the data set {repository}"):
            return datasets.load_dataset(repository, config, split=split or "train")
    except Exception as error:  # its own kinds, and those of the packages below it
        cause = error.__cause__ or error  # "An error occurred while generating the dataset"
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        raise DataError(
            f"data {file.name} is no file, and the data set of that name on the hub cannot be "
            f"loaded: {reason}"
        ) from None
