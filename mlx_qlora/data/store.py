"""Tokenised rows on disk: ids, and what they weigh as labels, in a cache for any run."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora import __version__
from mlx_qlora.errors import DataError
from mlx_qlora.folders import TAG, new_staging, remove, remove_leftovers, sha256

# Of these files and of how rows are encoded; part of every cache key.
VERSION = f"9, mlx-qlora {__version__}"
START = 1 << 30  # no vocabulary has so many tokens
FILES = ("tokens.bin", "rows.npy")
KEPT_DAYS = 30  # an entry that no run has used for longer is removed
TOKEN = np.dtype([("id", "<i4"), ("weight", "<f4")])  # the latter as a label
ROW = np.dtype(
    [
        ("start", "<i8"),  # of its ids in tokens.bin
        ("length", "<i4"),
        ("supervised", "<i4"),
        ("documents", "<i4"),  # that it became
        ("longest", "<i4"),  # ids of the longest of them
        ("cut", "<i4"),  # ids that truncation removed
        ("bad", "?"),  # whether it is an answer that is judged to be bad: weights are negative
        ("file", "<i4"),
        ("line", "<i8"),
        ("said", "<u8"),  # a hash of what the row says: for splitting, and for finding copies
        ("made", "<u8"),  # a hash of its ids and labels
    ]
)


def hash64(content: bytes) -> int:
    """A 64-bit hash, as ROW holds it."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# Ids, learned, weights, starts, cut, file, line, hash of what it says.
Stored = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...], int, int, int, int | None]


class TokenFile:
    """`tokens.bin`, sliced like an array; read, as mapped pages count as the process's memory."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, place: slice) -> np.ndarray:
        first, last = TOKEN.itemsize * place.start, TOKEN.itemsize * place.stop
        return np.frombuffer(os.pread(self._file, last - first, first), TOKEN)


@dataclass
class TokenStore:
    """All rows of one source, or a piece of them: `rows["start"]` counts from its first id."""

    # TokenFile or array of TOKEN; a learned id is complemented, the first one of a further document
    # of the row has START added.
    tokens: Any
    rows: np.ndarray  # (n,) of dtype ROW, mapped if it is a file
    about: dict[str, Any] = field(default_factory=dict)  # what else was known, as JSON has it

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
        """(ids int32, learned bool, weights float32; starts of further documents) of one row."""
        start, n = int(self.rows["start"][row]), int(self.rows["length"][row])
        stored = self.tokens[slice(start, start + n)]
        learned = stored["id"] < 0
        ids = np.where(learned, ~stored["id"], stored["id"])
        starts = tuple(np.flatnonzero(ids & START).tolist())
        return ids & ~START, learned, stored["weight"].copy(), starts

    @classmethod
    def of(cls, rows: Iterable[Stored]) -> "TokenStore":
        """Rows to be stored.

        Without a hash of what they say it is of the ids; `starts` are those of documents after the
        first.
        """
        tokens, table, start = [np.zeros(0, TOKEN)], [], 0
        for ids, learned, weights, starts, cut, file, line, said in rows:
            stored = np.zeros(len(ids), TOKEN)
            stored["id"], stored["weight"] = ids, weights
            stored["id"][list(starts)] += START
            stored["id"] = np.where(learned, ~stored["id"], stored["id"])
            is_usual = np.array_equal(weights, learned)
            made = hash64(stored["id"].tobytes() + stored["weight"].tobytes() * (not is_usual))
            supervised, said = int(np.count_nonzero(weights)), made if said is None else said
            longest = int(np.diff([0, *starts, len(stored)]).max())
            figures = (len(stored), supervised, 1 + len(starts), longest, cut)
            table.append((start, *figures, (weights < 0).any(), file, line, said, made))
            tokens.append(stored)
            start += len(stored)
        return cls(np.concatenate(tokens), np.array(table, ROW))


def on_disk(
    folder: Path | None, pieces: Iterable[TokenStore], about: Callable[[], dict[str, Any]]
) -> TokenStore:
    """Writes pieces as they come, then what `about` returns, and opens what was written.

    `folder` is the cache entry to write; None keeps the files as long as the store, without names.
    A DataError if the disk is full, or cannot be written to.
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
    with open(folder / "tokens.bin", "wb") as file:
        for piece in pieces:
            piece.rows["start"] += file.tell() // TOKEN.itemsize
            file.write(piece.tokens.tobytes())
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
    return TokenStore(TokenFile(folder / "tokens.bin"), rows, about)


def _checksums(folder: Path, about: str) -> dict[str, str]:
    checksums = {name: sha256(folder / name) for name in FILES}
    return checksums | {"about": hashlib.sha256(about.encode()).hexdigest()}
