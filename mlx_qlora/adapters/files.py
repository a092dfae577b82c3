"""Writing a folder so that a reader never sees half of it."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(
    folder: Path,
    replace: bool = False,
    marks: tuple[str, ...] = (),
    gone: tuple[str, ...] = (),
) -> Iterator[Path]:
    """Lends an empty folder on the target's disk and, if the block succeeds, moves it into place.

    A folder that did not exist appears whole, by one rename. Into an existing one the files are
    moved one by one, each by a rename, and files of other names are left alone; or, with
    `replace`, the old folder is set aside, and removed once the new one stands in its place.
    If the block fails nothing has changed.

    Args:
        folder: where the files shall be; its parent is made if need be.
        replace: whether an existing folder makes way as a whole.
        marks: files without which a reader finds nothing: old ones go before anything else is
            moved, new ones come last, so that no reader ever has old and new files together.
        gone: files of an older export that are not written any more.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Inside an existing folder: its parent may be another disk, or not ours to write to.
    home = folder if folder.exists() and not replace else folder.parent
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".tmp", dir=home))
    staging.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would make the finished folder private
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            if path.is_file():  # safetensors makes files that only their owner may read
                path.chmod(0o666 & ~_umask())
            _flush(path)
        if replace and folder.exists():
            aside = staging.with_suffix(".old")
            folder.rename(aside)
            try:
                staging.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            shutil.rmtree(aside)
        elif not folder.exists():
            staging.rename(folder)
        else:
            for name in (*marks, *gone):
                (folder / name).unlink(missing_ok=True)
            files = sorted(file for file in staging.rglob("*") if file.is_file())
            for file in sorted(files, key=lambda f: f.relative_to(staging).as_posix() in marks):
                target = folder / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
            for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                _flush(place)
        _flush(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":  # where fsync alone leaves bytes in the drive's cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
