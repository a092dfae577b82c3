"""What became of the rows: the figures of a source, and every refusal with its line and reason."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.data.files import RowFile
from mlx_qlora.data.formats import raw_rows
from mlx_qlora.data.store import TokenStore
from mlx_qlora.errors import DataError, listing

BARS = 10  # of the length histogram
SHOWN = 5  # refusals in a text


@dataclass
class FileReport:
    """One file: its format, how many rows were read and kept, and (line, reason) of the others.

    `unit` is what the numbers count: "line", or "row" where many rows share a line.
    """

    name: str
    format: str
    unit: str = "line"
    read: int = 0
    kept: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class DataReport:
    """What became of the rows of one source.

    Attributes:
        source: the path as it was given.
        files: one report for each file, in order.
        template: how rows were written.
        tokens: of the kept rows.
        supervised: tokens that are learned.
        duplicates: kept rows that say the same as an earlier one.
        leaked: kept rows of a validation or test file that are trained, too.
        truncated: kept rows that were cut to `max_length`.
        longest: tokens of the longest kept row.
        histogram: (shortest, longest, rows) of lengths in equal steps.
        cached: whether the tokens came from the cache.
        chat_template: source of the template file that rows were written by; None for none.
    """

    source: str
    files: list[FileReport] = field(default_factory=list)
    template: str = "auto"
    tokens: int = 0
    supervised: int = 0
    duplicates: int = 0
    leaked: int = 0
    truncated: int = 0
    longest: int = 0
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    cached: bool = False
    chat_template: str | None = field(default=None, repr=False)

    @property
    def read(self) -> int:
        """Rows of all files."""
        return sum(file.read for file in self.files)

    @property
    def kept(self) -> int:
        """Rows that are trained as intended."""
        return sum(file.kept for file in self.files)

    @property
    def refused(self) -> list[tuple[int, str]]:
        """(line, reason) of all others, file by file."""
        return [refusal for file in self.files for refusal in file.refused]

    @property
    def format(self) -> str:
        """The format of the files; several are joined."""
        return ", ".join(dict.fromkeys(file.format for file in self.files)) or "auto"

    def measure(self, store: TokenStore) -> None:
        """Takes the figures of the kept rows."""
        rows = store.rows
        lengths = np.array(rows["length"])
        self.tokens = int(lengths.sum())
        self.supervised = int(rows["supervised"].sum())
        self.duplicates = len(rows) - len(np.unique(np.array(rows["said"])))
        self.truncated = int(np.count_nonzero(rows["cut"]))
        self.longest = int(lengths.max(initial=0))
        self.histogram = _histogram(lengths)

    def refusals(self, most: int = SHOWN) -> str:
        """The refused rows, one to a line, with the file's name if there are several."""
        lines = []
        for file in self.files:
            where = f"{file.name}, {file.unit}" if len(self.files) > 1 else file.unit
            lines += [f"{where} {line}: {why}" for line, why in file.refused]
        return listing(lines, most)

    def __str__(self) -> str:
        refused = len(self.refused)
        share = self.supervised / max(self.tokens, 1)
        several = f", {len(self.files)} files" if len(self.files) > 1 else ""
        text = (
            f"{self.source} ({self.format}{several}): {self.read:,} rows read, {self.kept:,} kept, "
            f"{refused:,} refused; {self.tokens:,} tokens, {share:.0%} supervised"
        )
        if self.truncated:
            text += f"; {self.truncated:,} cut to max_length"
        if self.duplicates:
            text += f"; {self.duplicates:,} say the same as an earlier row"
        if self.leaked:
            text += f"; {self.leaked:,} are among the training rows, too"
        return f"{text}\n{self.refusals()}" if refused else text

    def as_dict(self) -> dict[str, Any]:
        """What a cache entry must keep of it; the other figures are measured again."""
        return {"files": [vars(file) for file in self.files]}

    def restore(self, about: dict[str, Any]) -> None:
        """Takes back what `as_dict` gave, after a way through JSON."""
        self.files = [
            FileReport(**{**file, "refused": [(line, why) for line, why in file["refused"]]})
            for file in about["files"]
        ]


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    if not len(lengths):
        return []
    step = max(1, -(-int(lengths.max()) // BARS))
    counts = np.bincount((lengths - 1) // step)
    return [(i * step + 1, (i + 1) * step, int(n)) for i, n in enumerate(counts)]


def write_refused(path: Path, read: list[tuple[DataReport, list[RowFile]]]) -> None:
    """Writes every refused row to a JSONL file: where it stood, why, and what it was.

    Args:
        path: of the file to write; it appears whole or not at all.
        read: the reports, and the files that each is of. The files are read once more, as nobody
            keeps rows that cannot be used.

    Raises:
        DataError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as out:
            for report, files in read:
                for told, file in zip(report.files, files):
                    for row in _refused(told, file):
                        out.write(json.dumps(row) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"data.refused_path: {path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _refused(told: FileReport, file: RowFile) -> Iterator[dict[str, Any]]:
    reasons = dict(told.refused)
    for line, raw in raw_rows(file) if reasons else ():
        if line in reasons:
            where = {"file": file.name, "line": line}
            yield {**where, "reason": reasons[line], "row": _text(raw)}


def _text(raw: Any) -> Any:
    """A raw row as JSON can hold it; bytes that are no UTF-8 are escaped."""
    if isinstance(raw, bytes):
        return raw.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    if isinstance(raw, DataError):
        return None
    try:
        return json.loads(json.dumps(raw, default=str, allow_nan=False))
    except (TypeError, ValueError, RecursionError):  # what JSON cannot hold
        return repr(raw)[:10_000]
