"""Tokenised rows on disk: ids, labels and their weights, in a cache that any run may use again."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora import __version__
from mlx_qlora.errors import DataError
from mlx_qlora.folders import TAG, new_staging, remove, remove_leftovers

# ---- tokens on disk ------------------------------------------------------------------------------

# Of these files and of how rows are encoded; part of every cache key.
VERSION = f"7, mlx-qlora {__version__}"
START = 1 << 30  # no vocabulary has so many tokens
FILES = ("tokens.bin", "weights.bin", "rows.npy")
KEPT_DAYS = 30  # an entry that no run has used for longer is removed
ROW = np.dtype(
    [
        ("start", "<i8"),  # of its ids in tokens.bin
        ("length", "<i4"),
        ("supervised", "<i4"),
        ("documents", "<i4"),  # that it became
        ("longest", "<i4"),  # ids of the longest of them
        ("cut", "<i4"),  # ids that truncation removed
        ("weights", "<i8"),  # where those of its labels start in weights.bin; -1: 1 if learned
        ("file", "<i4"),
        ("line", "<i8"),
        ("said", "<u8"),  # a hash of what the row says: for splitting, and for finding copies
        ("made", "<u8"),  # a hash of its ids and labels
    ]
)


def hash64(content: bytes) -> int:
    """A 64-bit hash, as ROW holds it."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# Ids, learned, cut, file, line, hash of what it says, starts, weights.
Stored = tuple[
    np.ndarray, np.ndarray, int, int, int, int | None, tuple[int, ...], np.ndarray | None
]


class TokenFile:
    """`tokens.bin`, sliced like an array; read, as mapped pages count as the process's memory."""

    def __init__(self, path: Path, dtype: type = np.int32) -> None:
        self._file, self._dtype = os.open(path, os.O_RDONLY), dtype
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, place: slice) -> np.ndarray:
        size = 4 * (place.stop - place.start)
        return np.frombuffer(os.pread(self._file, size, 4 * place.start), self._dtype)


@dataclass
class TokenStore:
    """All rows of one source, or a piece of them: `rows["start"]` counts from its first id."""

    # TokenFile or int32 array; a learned id is complemented, the first one of a further document
    # of the row has START added.
    tokens: Any
    rows: np.ndarray  # (n,) of dtype ROW, mapped if it is a file
    about: dict[str, Any] = field(default_factory=dict)  # what else was known, as JSON has it
    weights: Any = field(default_factory=lambda: np.zeros(0, np.float32))  # of labels; or a file

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """(ids (n,) int32, learned (n,) bool, starts of further documents) of one row."""
        start, n = int(self.rows["start"][row]), int(self.rows["length"][row])
        stored = self.tokens[slice(start, start + n)]
        learned = stored < 0
        ids = np.where(learned, ~stored, stored)
        return ids & ~START, learned, tuple(np.flatnonzero(ids & START).tolist())

    def weights_of(self, row: int) -> np.ndarray | None:
        """(n,) float32, of one row's ids as labels; None if those that are learned weigh 1."""
        start, n = int(self.rows["weights"][row]), int(self.rows["length"][row])
        return None if start < 0 else self.weights[slice(start, start + n)]

    def shift(self, n_tokens: int, n_weights: int) -> None:
        """Lets the rows count from ids and weights that come before these."""
        self.rows["start"] += n_tokens
        self.rows["weights"] += n_weights * (self.rows["weights"] >= 0)

    @classmethod
    def of(cls, rows: Iterable[Stored]) -> "TokenStore":
        """Rows to be stored.

        Without a hash of what they say it is of the ids; `starts` are those of documents after the
        first.
        """
        tokens, table, start = [np.zeros(0, np.int32)], [], 0
        of_labels, n_weights = [np.zeros(0, np.float32)], 0
        for ids, learned, cut, file, line, said, starts, weights in rows:
            if starts:
                ids = ids.copy()
                ids[list(starts)] += START
            stored = np.where(learned, ~ids, ids).astype(np.int32)
            labels, place = learned, -1
            if weights is not None:
                labels, place = weights, n_weights
                of_labels.append(weights.astype(np.float32))
                n_weights += len(weights)
            made = hash64(stored.tobytes() + of_labels[-1].tobytes() * (place >= 0))
            supervised, said = int(np.count_nonzero(labels)), made if said is None else said
            longest = int(np.diff([0, *starts, len(stored)]).max())
            figures = (len(stored), supervised, 1 + len(starts), longest, cut)
            table.append((start, *figures, place, file, line, said, made))
            tokens.append(stored)
            start += len(stored)
        rows_of = np.array(table, ROW)
        return cls(np.concatenate(tokens), rows_of, weights=np.concatenate(of_labels))


def store_in_memory(pieces: Iterable[TokenStore]) -> TokenStore:
    """A store without files, for rows that are in memory anyway."""
    tokens, rows, weights = [np.zeros(0, np.int32)], [np.zeros(0, ROW)], [np.zeros(0, np.float32)]
    for piece in pieces:
        piece.shift(sum(map(len, tokens)), sum(map(len, weights)))
        tokens.append(piece.tokens)
        rows.append(piece.rows)
        weights.append(piece.weights)
    arrays = np.concatenate(tokens), np.concatenate(rows)
    return TokenStore(*arrays, weights=np.concatenate(weights))


def on_disk(
    folder: Path | None, pieces: Iterable[TokenStore], about: Callable[[], dict[str, Any]]
) -> TokenStore:
    """Writes pieces as they come, then what `about` returns, and opens what was written.

    `folder` is the cache entry to write; None keeps the files as long as the store, without names.

    Raises:
        DataError: the disk is full, or cannot be written to.
    """
    try:
        home = folder.parent if folder else Path(tempfile.gettempdir())
        home.mkdir(parents=True, exist_ok=True)
        remove_leftovers(home)  # of killed processes
        staging, lock = new_staging(home, TAG)
        try:
            _write(staging, pieces, about)
            if folder is not None and (store := _move_into_place(staging, folder)):
                return store
            return _open(staging)  # whose files live on without names
        finally:
            os.close(lock)
            remove(staging)
    except OSError as error:
        place = error.filename or folder or tempfile.gettempdir()
        raise DataError(
            f"the tokens cannot be written to {place}: {error.strerror or error}; free some space "
            "there, or set data.cache_dir to another folder"
        ) from None


def _write(folder: Path, pieces: Iterable[TokenStore], about: Callable[[], dict[str, Any]]) -> None:
    rows = [np.zeros(0, ROW)]
    with open(folder / "tokens.bin", "wb") as file, open(folder / "weights.bin", "wb") as weights:
        for piece in pieces:
            piece.shift(file.tell() // 4, weights.tell() // 4)
            file.write(piece.tokens.tobytes())
            weights.write(piece.weights.tobytes())
            rows.append(piece.rows)
    np.save(folder / "rows.npy", np.concatenate(rows))
    text = json.dumps(about())
    entry = {"version": VERSION, "checksums": _checksums(folder, text), "about": text}
    (folder / "about.json").write_text(json.dumps(entry), encoding="utf-8")


def _move_into_place(staging: Path, folder: Path) -> TokenStore | None:
    """The store in its place; None if something that is not an entry is there and stays."""
    for _ in range(2):
        try:
            os.rename(staging, folder)
            return _open(folder)
        except OSError:
            if not folder.exists():
                raise
        if (theirs := cached(folder)) is not None:  # another run has written it meanwhile
            return theirs
    return None


def cached(folder: Path) -> TokenStore | None:
    """The store of a cache entry; None if there is none. A damaged entry is removed."""
    if not folder.exists():
        return None
    if _is_whole(folder):
        with contextlib.suppress(OSError):  # one that others own, or that is read-only, serves too
            os.utime(folder)
        return _open(folder)
    aside = folder.with_name(f".{TAG}-{os.getpid():08}.tmp")  # which others may remove
    with contextlib.suppress(OSError):
        os.rename(folder, aside)  # at once: another run may write the entry again
        if _is_whole(aside):
            os.rename(aside, folder)  # it has, while the damaged one was read
            return cached(folder)
        remove(aside)
    return None


def _is_whole(folder: Path) -> bool:
    """Whether the files of an entry are those that its `about.json` names."""
    try:
        if not all((folder / name).is_file() for name in (*FILES, "about.json")):
            return False
        entry = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        checksums = _checksums(folder, entry["about"])
        return checksums == entry["checksums"] and entry["version"] == VERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def forget_unused(folder: Path) -> None:
    """Removes entries that no run has used for KEPT_DAYS."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another run removes it too
            if entry.is_dir() and time.time() - entry.stat().st_mtime > KEPT_DAYS * 86_400:
                remove(entry)


def _open(folder: Path) -> TokenStore:
    about = json.loads(json.loads((folder / "about.json").read_text(encoding="utf-8"))["about"])
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    weights = TokenFile(folder / "weights.bin", np.float32)
    return TokenStore(TokenFile(folder / "tokens.bin"), rows, about, weights)


def _checksums(folder: Path, about: str) -> dict[str, int]:
    checksums = dict.fromkeys(FILES, 0)
    for name in checksums:
        with open(folder / name, "rb") as file:
            while content := file.read(1 << 20):
                checksums[name] = zlib.crc32(content, checksums[name])
    return checksums | {"about": zlib.crc32(about.encode())}
