"""Examples: rows as token ids, read from disk when asked for, and split by their content."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_qlora.data.store import ROW, Piece, TokenStore, hash64, in_memory
from mlx_qlora.data.summary import DataReport, FileReport
from mlx_qlora.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Attributes:
        tokens: (n,) int32.
        learned: (n,) bool; whether a token is supervised when it stands as the next one.
        line: where the row came from, counted from 1.
        file: the name of its file.
    """

    tokens: np.ndarray
    learned: np.ndarray
    line: int = 0
    file: str = "rows"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def place(self) -> str:
        """Where the row came from, for messages."""
        return f"{self.file}:{self.line}"


class Examples(Sequence[Example]):
    """The kept rows of one source, in its order, with the report of how they were read.

    Rows are read from disk when they are asked for; slices and splits share one store.
    """

    def __init__(
        self, store: TokenStore, report: DataReport, rows: np.ndarray | None = None
    ) -> None:
        self.report = report
        self._store = store
        self._rows = np.arange(len(store.rows)) if rows is None else rows

    @classmethod
    def of(cls, examples: Iterable[Example], source: str = "rows") -> "Examples":
        """Examples that were made by hand."""
        pieces, files = [], {}
        for example in examples:
            stored = np.where(example.learned, ~example.tokens, example.tokens).astype(np.int32)
            file = files.setdefault(example.file, len(files))
            made = hash64(stored.tobytes())
            supervised = int(np.count_nonzero(example.learned))
            row = (0, len(stored), supervised, 0, file, example.line, made, made)
            pieces.append(Piece(stored, np.array([row], ROW)))
        store = in_memory(pieces)
        counts = np.bincount(store.rows["file"], minlength=len(files)).tolist()
        told = [FileReport(name, "made", read=n, kept=n) for name, n in zip(files, counts)]
        report = DataReport(source, told)
        report.measure(store)
        return cls(store, report)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self._store, self.report, self._rows[index])
        row = int(self._rows[index])
        tokens, learned = self._store[row]
        about = self._store.rows[row]
        return Example(tokens, learned, int(about["line"]), self.report.files[about["file"]].name)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int32: tokens of each row."""
        return self._store.rows["length"][self._rows]

    @property
    def contents(self) -> np.ndarray:
        """(n,) uint64: a hash of what each row says; copies have the same."""
        return self._store.rows["said"][self._rows]

    @property
    def digest(self) -> str:
        """A hash of what would be trained: all tokens and labels, in order."""
        made = self._store.rows["made"][self._rows]
        return hashlib.blake2b(made.tobytes(), digest_size=32).hexdigest()

    def split(self, shares: Sequence[float], seed: int = 0) -> list["Examples"]:
        """Divides by a hash of (seed, content) of each row.

        Adding rows to a file does not move the others between the parts, and copies of a row land
        in the same part; the shares are therefore met only on average.

        Raises:
            ConfigError: the shares do not sum to 1.
        """
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(f"shares of a split must sum to 1; got {list(shares)}")
        where = _uniform(self.contents, seed)
        parts = np.searchsorted(np.cumsum(shares)[:-1], where, "right")
        return [
            Examples(self._store, self.report, self._rows[parts == i]) for i in range(len(shares))
        ]


def _uniform(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each hash, another for each seed (the finaliser of SplitMix64)."""
    salt = hashlib.blake2b(f"split {seed}".encode(), digest_size=8).digest()
    x = np.array(hashes, np.uint64) ^ np.uint64(int.from_bytes(salt, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
