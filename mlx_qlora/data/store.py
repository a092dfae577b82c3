"""Token ids of many rows, in two files: read piece by piece, so memory stays flat.

`tokens.bin` holds all ids one behind the other, int32, a learned one as its complement (~id);
`rows.npy` says where each row lies and where it came from. A folder of them is a cache entry: it
is written beside its place and renamed into it, and carries checksums, so that runs at the same
time do not harm each other and a damaged one is found.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora._version import __version__
from mlx_qlora.errors import DataError

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
