"""Tokenised rows: kept on disk, reported on, and cut into parts."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora import __version__
from mlx_qlora.data.files import RowFile, raw_rows
from mlx_qlora.errors import ConfigError, DataError, listing
from mlx_qlora.model.llama import LlamaConfig

# ---- tokens on disk ------------------------------------------------------------------------------


# Of these files and of what a row is made into; part of every cache key.
VERSION = f"1, mlx-qlora {__version__}"


KEPT_DAYS = 30  # an entry that no run has used for so long is removed


ROW = np.dtype(
    [
        ("start", "<i8"),  # of its ids in tokens.bin
        ("length", "<i4"),
        ("supervised", "<i4"),
        ("cut", "<i4"),  # ids that truncation removed
        ("file", "<i4"),
        ("line", "<i8"),
        ("said", "<u8"),  # a hash of what the row says: for splitting, and for finding copies
        ("made", "<u8"),  # a hash of its ids and labels
    ]
)


def hash64(content: bytes) -> int:
    """A 64-bit hash, as ROW holds it."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class TokenFile:
    """`tokens.bin`, sliced like an array.

    It is read and not mapped: the pages of a mapping count as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, place: slice) -> np.ndarray:
        size = 4 * (place.stop - place.start)
        return np.frombuffer(os.pread(self._file, size, 4 * place.start), np.int32)


@dataclass
class TokenStore:
    """All rows of one source.

    Attributes:
        tokens: TokenFile or int32 array; a learned id is complemented.
        rows: (n,) of dtype ROW, mapped from disk if it lies there.
        about: what else was known when it was made, as JSON has it.
    """

    tokens: Any
    rows: np.ndarray
    about: dict[str, Any]

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids (n,) int32, learned (n,) bool) of one row."""
        start, n = int(self.rows["start"][row]), int(self.rows["length"][row])
        stored = self.tokens[slice(start, start + n)]
        learned = stored < 0
        return np.where(learned, ~stored, stored), learned


@dataclass
class Piece:
    """Some rows on their way into a store; `rows["start"]` counts from the piece's first id."""

    tokens: np.ndarray
    rows: np.ndarray


def in_memory(pieces: Iterable[Piece]) -> TokenStore:
    """A store without files, for rows that are in memory anyway."""
    tokens, rows, total = [np.zeros(0, np.int32)], [np.zeros(0, ROW)], 0
    for piece in pieces:
        piece.rows["start"] += total
        total += len(piece.tokens)
        tokens.append(piece.tokens)
        rows.append(piece.rows)
    return TokenStore(np.concatenate(tokens), np.concatenate(rows), {})


def on_disk(folder: Path | None, pieces: Iterable[Piece], about: dict[str, Any]) -> TokenStore:
    """Writes pieces as they come, and opens what was written.

    Args:
        folder: the cache entry to make; None keeps the files until the store is forgotten.
        pieces: in order; they may fill `about` while they are made.
        about: is written last.

    Raises:
        DataError: the disk is full, or cannot be written to.
    """
    try:
        if folder is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
        where = folder.parent if folder is not None else None
        staging = Path(tempfile.mkdtemp(prefix="staging-", dir=where))
        try:
            _write(staging, pieces, about)
            if folder is not None and (made := _move_into_place(staging, folder)):
                return made
            store = _open(staging)
            weakref.finalize(store, shutil.rmtree, staging, True)
            return store
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        place = error.filename or folder or tempfile.gettempdir()
        raise DataError(
            f"the tokens cannot be written to {place}: {error.strerror or error}; free some space "
            "there, or set data.cache_dir to another folder"
        ) from None


def _write(folder: Path, pieces: Iterable[Piece], about: dict[str, Any]) -> None:
    rows, total, checksum = [np.zeros(0, ROW)], 0, 0
    with open(folder / "tokens.bin", "wb") as file:
        for piece in pieces:
            piece.rows["start"] += total
            total += len(piece.tokens)
            content = piece.tokens.tobytes()
            checksum = zlib.crc32(content, checksum)
            file.write(content)
            rows.append(piece.rows)
    np.save(folder / "rows.npy", np.concatenate(rows))
    told = json.dumps(about)
    checksums = {
        "tokens.bin": checksum,
        "rows.npy": _checksum(folder / "rows.npy"),
        "about": zlib.crc32(told.encode()),
    }
    text = json.dumps({"version": VERSION, "checksums": checksums, "about": told})
    (folder / "about.json").write_text(text, encoding="utf-8")


def _move_into_place(staging: Path, folder: Path) -> TokenStore | None:
    """The store in its place; None if something that is no entry stands there and stays."""
    for _ in range(2):
        try:
            os.rename(staging, folder)
            return _open(folder)
        except OSError:
            if not folder.exists():
                raise
        if (theirs := cached(folder)) is not None:  # another run has made the same meanwhile
            shutil.rmtree(staging)
            return theirs
    return None


def cached(folder: Path) -> TokenStore | None:
    """The store of a cache entry; None if there is none. A damaged entry is removed.

    One that appears meanwhile is not: only what was read and found wrong is.
    """
    try:
        text = (folder / "about.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        if not folder.exists() or (folder / "about.json").exists():
            return None
    except (OSError, UnicodeDecodeError):
        pass
    else:
        if _is_whole(folder, text):
            _touch(folder)
            return _open(folder)
    aside = folder.with_name(f"staging-{folder.name}-{os.getpid()}-{time.time_ns()}")
    with contextlib.suppress(OSError):
        os.rename(folder, aside)  # at once: another run may make the entry anew
        if _is_whole(aside, _text_of(aside)):
            os.rename(aside, folder)  # it has, while the damaged one was read
            return cached(folder)
        shutil.rmtree(aside)
    return None


def _text_of(folder: Path) -> str:
    try:
        return (folder / "about.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _is_whole(folder: Path, text: str) -> bool:
    """Whether the files of an entry are those that its `about.json` tells of."""
    try:
        made = json.loads(text)
        checksums = {
            "tokens.bin": _checksum(folder / "tokens.bin"),
            "rows.npy": _checksum(folder / "rows.npy"),
            "about": zlib.crc32(made["about"].encode()),
        }
        return checksums == made["checksums"] and made["version"] == VERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _touch(folder: Path) -> None:
    """Notes that an entry was used; one that others own, or that is read-only, serves as well."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def forget_unused(folder: Path) -> None:
    """Removes what no run has used for KEPT_DAYS, and what a run that died has left."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        days = 1 if entry.name.startswith("staging-") else KEPT_DAYS
        try:
            if entry.is_dir() and time.time() - entry.stat().st_mtime > days * 86_400:
                shutil.rmtree(entry)
        except OSError:
            continue  # another run removes it, too


def _open(folder: Path) -> TokenStore:
    about = json.loads(json.loads((folder / "about.json").read_text(encoding="utf-8"))["about"])
    return TokenStore(
        TokenFile(folder / "tokens.bin"), np.load(folder / "rows.npy", mmap_mode="r"), about
    )


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while content := file.read(1 << 20):
            checksum = zlib.crc32(content, checksum)
    return checksum


# ---- the report ----------------------------------------------------------------------------------


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


# ---- examples ------------------------------------------------------------------------------------


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


def check_lengths(llama: LlamaConfig, *parts: Examples | None) -> None:
    """Refuses rows that are longer than the model has positions for.

    Raises:
        ConfigError: naming the length, the limit and the field that keeps such rows out.
    """
    longest = max(int(part.lengths.max()) for part in parts if part)
    most = llama.max_position_embeddings
    if longest > most:
        raise ConfigError(
            f"data.max_length lets in a row of {longest} tokens, and the model was made for "
            f"{most}; set data.max_length={most}"
        )
