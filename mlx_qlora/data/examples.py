"""Tokenised rows: reported on, and cut into parts."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_qlora.data.formats import RowFile
from mlx_qlora.data.preferences import JUDGEMENTS
from mlx_qlora.data.store import TokenStore, hash64
from mlx_qlora.errors import listing, require

# ---- the report ----------------------------------------------------------------------------------

BARS = 10  # of the length histogram
SHOWN = 5  # refusals in a text


@dataclass
class FileReport:
    """What became of the rows of one file."""

    name: str
    format: str
    unit: str = "line"  # what lines are: "row" where many rows share a line of the file
    read: int = 0
    kept: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)  # (line, reason)
    unread: dict[str, int] = field(default_factory=dict)  # field that is not used -> rows with it


CUT = {"left-context": "before their answers", "right": "at their ends"}


@dataclass
class DataReport:
    """What became of the rows of one source."""

    source: str  # the path as it was given
    files: list[FileReport] = field(default_factory=list)
    template: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)  # our names of fields -> the rows'
    tokens: int = 0  # of the kept rows, as the figures below
    supervised: int = 0
    duplicates: int = 0  # rows that say the same as an earlier one
    leaked: int = 0  # rows of a validation or test file that are trained, too
    truncated: int = 0  # rows that were cut to `max_length`
    truncation: str = "left-context"
    longest: int = 0
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # shortest, longest, rows
    cached: bool = False  # whether the tokens came from the cache
    chat_template: str | None = field(default=None, repr=False)  # text of a template's file
    system: str | None = field(default=None, repr=False)  # for the others
    vocabulary: str = field(default="", repr=False)  # a hash of it
    own_systems: int = 0  # rows with a system message of their own
    shared_system: str | None = field(default=None, repr=False)  # the rows' own, all the same
    # Whether all prompts and answers meet without a space, though the model has a chat template.
    is_joined: bool = False
    kind: str = "answers"  # what the rows are: answers, pairs or labelled answers
    bad: int = 0  # kept rows whose answer has the label false

    @property
    def read(self) -> int:
        """Rows of all files."""
        return sum(file.read for file in self.files)

    @property
    def kept(self) -> int:
        """Rows of all files that are not refused."""
        return sum(file.kept for file in self.files)

    @property
    def refused(self) -> list[tuple[int, str]]:
        """(line, reason) of all others, file by file."""
        return [refusal for file in self.files for refusal in file.refused]

    @property
    def unread(self) -> dict[str, int]:
        """Field that nothing was made of -> kept rows in which it holds something."""
        return dict(sum((Counter(file.unread) for file in self.files), Counter()))

    def unread_fields(self) -> str:
        """The fields that are not used, in words."""
        fields = Counter(self.unread).most_common()
        shown = [f"field {name[:40]!r} in {n:,} rows" for name, n in fields[:SHOWN]]
        shown += [f"{len(fields) - SHOWN} fields more"] * (len(fields) > SHOWN)
        return f"not used: {', '.join(shown)}"

    @property
    def format(self) -> str:
        """The formats of the files, joined."""
        return ", ".join(dict.fromkeys(file.format for file in self.files)) or "auto"

    def measure(self, store: TokenStore) -> None:
        """Fills in the figures of the kept rows."""
        rows, lengths = store.rows, np.array(store.rows["length"])
        self.tokens = int(lengths.sum())
        self.supervised = int(rows["supervised"].sum())
        self.duplicates = len(rows) - len(np.unique(rows["said"]))
        self.truncated = int(np.count_nonzero(rows["cut"]))
        self.longest = int(lengths.max(initial=0))
        if self.kind == JUDGEMENTS:
            self.bad = int(np.count_nonzero(rows["bad"]))
        step = max(1, -(-self.longest // BARS))
        counts = np.bincount((lengths - 1) // step).tolist()
        self.histogram = [(i * step + 1, (i + 1) * step, n) for i, n in enumerate(counts)]

    def refusals(self, most: int = SHOWN) -> str:
        """The refused rows, a line for each reason, with the file's name if there are several."""
        lines = []
        for file in self.files:
            where = f"{file.name}, {file.unit}" if len(self.files) > 1 else file.unit
            rows: dict[str, list[int]] = {}
            for line, why in file.refused:
                rows.setdefault(why, []).append(line)
            for why, (first, *others) in rows.items():
                more = f" and {len(others):,} more" if others else ""
                lines.append(f"{where} {first}{more}: {why}")
        return listing(lines, most, "reasons")

    def __str__(self) -> str:
        refused, share = len(self.refused), self.supervised / max(self.tokens, 1)
        several = f", {len(self.files)} files" if len(self.files) > 1 else ""
        renamed = "".join(f", {column} as {ours}" for ours, column in self.columns.items())
        text = (
            f"{self.source} ({self.format}{renamed}{several}): {self.read:,} rows read, "
            f"{self.kept:,} kept, {refused:,} refused; {self.tokens:,} tokens, "
            f"{share:.0%} supervised"
        )
        if self.kind == JUDGEMENTS:
            text += f"; {self.kept - self.bad:,} labelled true, {self.bad:,} false"
        if self.truncated:
            text += f"; {self.truncated:,} cut to data.max_length, {CUT[self.truncation]}"
        if self.duplicates:
            text += f"; {self.duplicates:,} repeat an earlier row"
        if self.leaked:
            text += f"; {self.leaked:,} are also training rows"
        if self.unread:
            text += f"\n  {self.unread_fields()}"
        if 0 < self.own_systems < self.kept and not self.system:
            text += f"\n  with a system message: {self.own_systems:,} rows; the others have none, "
            text += "unless the chat template writes one; data.system gives them one"
        if self.is_joined:
            text += "\n  prompt and answer are joined as they are, without a space; "
            text += "for questions set data.template=chat"
        return f"{text}\n{self.refusals()}" if refused else text

    def as_dict(self) -> dict[str, Any]:
        """What a cache entry keeps of it; the figures are measured again."""
        return {"source": self.source, "files": [vars(file) for file in self.files]}

    def restore(self, about: dict[str, Any], files: list[RowFile]) -> None:
        """Fills in what `as_dict` returned, read from JSON; the files may have moved since."""
        for entry, file in zip(about["files"], files):
            refused = [(line, reason) for line, reason in entry["refused"]]
            self.files.append(FileReport(**{**entry, "name": file.name, "refused": refused}))


# ---- examples ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    tokens: np.ndarray  # (n,) int32
    learned: np.ndarray  # (n,) bool; whether a token is supervised as the next token
    line: int = 0  # where the row came from, counted from 1
    file: str = "rows"
    starts: tuple[int, ...] = ()  # of documents after the first; each attends to itself alone
    # (n,) float32, of the tokens as labels; None: 1 for what is learned. Of a bad answer, for KTO,
    # they are negative.
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, learned, float32 weights as labels) of each document: most rows are one."""
        weights = self.learned.astype(np.float32) if self.weights is None else self.weights
        arrays = self.tokens, self.learned, weights
        return list(zip(*(np.split(array, self.starts) for array in arrays)))

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
    def of(
        cls, examples: Iterable[Example], source: str = "rows", kind: str = "answers"
    ) -> "Examples":
        """Examples that are not rows of a file; `kind` as `DataReport` has it."""
        files: dict[str, int] = {}
        store = TokenStore.of(
            (
                *(e.tokens, e.learned, e.learned if e.weights is None else e.weights, e.starts),
                *(0, files.setdefault(e.file, len(files)), e.line, None),
            )
            for e in examples
        )
        counts = np.bincount(store.rows["file"], minlength=len(files)).tolist()
        reports = [FileReport(name, "made", read=n, kept=n) for name, n in zip(files, counts)]
        report = DataReport(source, reports, kind=kind)
        report.measure(store)
        return cls(store, report)

    def __repr__(self) -> str:
        tokens, supervised = self.lengths.sum(), self._store.rows["supervised"][self._rows].sum()
        share = f"{supervised / max(tokens, 1):.0%}"
        n_refused = len(self.report.refused)
        refused = f", {n_refused:,} of the source refused" * bool(n_refused)
        about = f"{tokens:,} tokens, {share} learned{refused}"
        return f"Examples({len(self):,} of {self.report.source}, {about})"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (slice, np.ndarray)):
            return Examples(self._store, self.report, self._rows[index])
        row = int(self._rows[index])
        tokens, learned, weights, starts = self._store[row]
        about = self._store.rows[row]
        name = self.report.files[about["file"]].name
        unusual = None if np.array_equal(weights, learned) else weights
        return Example(tokens, learned, int(about["line"]), name, starts, unusual)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int32: tokens of each row."""
        return self._store.rows["length"][self._rows]

    @property
    def positions(self) -> int:
        """Positions of one pass: the last token of a document is only a label."""
        rows = self._store.rows
        return int((rows["length"][self._rows] - rows["documents"][self._rows]).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self._store.rows["longest"][self._rows].max(initial=0))

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each row's documents, were they of one length: (n, 2) of how many, length."""
        rows = self._store.rows[self._rows]
        return np.stack([rows["documents"], rows["length"] // rows["documents"]], axis=1)

    @property
    def contents(self) -> np.ndarray:
        """(n,) uint64: a hash of what each row says; copies have the same."""
        return self._store.rows["said"][self._rows]

    @property
    def digest(self) -> str:
        """A hash of what would be trained: all tokens and labels, in order."""
        hashes = self._store.rows["made"][self._rows]
        return hashlib.blake2b(hashes.tobytes(), digest_size=32).hexdigest()

    def split(
        self, shares: Sequence[float], seed: int = 0, most_copies: int | None = None
    ) -> list["Examples"]:
        """Divides by a hash of (seed, content) of each row.

        Adding rows to a file does not move the others between the parts, and copies of a row are
        in the same part, the first one if there are more than `most_copies`; the shares, which sum
        to 1, are therefore met only on average.
        """
        rule, numbers = "be a list that sums to 1, such as [0.8, 0.1, 0.1]", [-1.0]
        with suppress(TypeError, ValueError):
            numbers = [float(share) for share in shares]
        require(min(numbers) >= 0 and abs(sum(numbers) - 1) <= 1e-6, "shares", rule, shares)
        places, copies = self._places(seed)
        if most_copies is not None:
            places = np.where(copies > most_copies, 0.0, places)
        parts = np.searchsorted(np.cumsum(shares)[:-1], places, "right")
        return [self[parts == i] for i in range(len(shares))]

    def hold_out(self, number: int, seed: int = 0) -> list["Examples"]:
        """What is left, and at most `number` rows, copies of a row together; as `split` hashes."""
        places, copies = self._places(seed)
        held, taken = [], 0
        for place, n in sorted(set(zip(places.tolist(), copies.tolist())), reverse=True):
            if taken + n <= number:
                held.append(place)
                taken += n
        is_held = np.isin(places, held)
        return [self[~is_held], self[is_held]]

    def _places(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row a hash with the seed, in [0, 1), and how many rows say the same."""
        x = np.array(self.contents, np.uint64) ^ np.uint64(hash64(f"split {seed}".encode()))
        # The finaliser of SplitMix64.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        places = ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        _, which, counts = np.unique(places, return_inverse=True, return_counts=True)
        return places, counts[which]
