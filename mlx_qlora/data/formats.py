"""A file becomes rows, each with the line it came from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_qlora.errors import DataError


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, row) for every line of a JSONL file that is not blank.

    A line that is not UTF-8 or not JSON yields the DataError that says so in place of its row, so
    that one bad line does not hide the good ones after it.

    Raises:
        DataError: no such file, or no line in it.
    """
    if path.is_dir() or not path.exists():
        kind = "a folder" if path.is_dir() else "missing"
        raise DataError(f"data file {path} is {kind}; give the path of a JSONL file")
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        raise DataError(f"data file {path}: expected JSONL, one JSON object per line")
    if not path.stat().st_size:
        raise DataError(f"data file {path} is empty")
    with path.open("rb") as file:  # bytes: only \n ends a line, whatever a string may hold
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
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
