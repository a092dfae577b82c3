"""Folders: written whole, and never over files that are not ours."""

import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mlx_qlora.errors import ConfigError, TrainingError

# ---- written whole -------------------------------------------------------------------------------


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


# ---- the disk, and other runs --------------------------------------------------------------------


@contextmanager
def disk_errors(folder: Path, hint: Callable[[], str] = str) -> Iterator[None]:
    """Turns what the system says about a folder into an error with a remedy.

    Args:
        folder: that is written to.
        hint: what to add to the message, asked for only when there is one.

    Raises:
        TrainingError: naming the folder, the reason and the hint.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed: the disk has nothing to do with it
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        place = getattr(error, "filename", None) or folder
        message = (
            f"cannot write to {place}: {reason}; free some space or choose another --output-dir. "
        )
        raise TrainingError(f"{message}{hint()}".rstrip(". ")) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the system gives the lock back if a run dies.

    Raises:
        ConfigError: another run holds it.
        TrainingError: the folder cannot be opened.
    """
    with disk_errors(folder):
        lock = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run is writing to {folder}; choose another --output-dir, or wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(lock)


# ---- our model card ------------------------------------------------------------------------------


TAG = "mlx-qlora"


OUR_SENTENCE = re.compile(r"^A (?:LoRA|DoRA) adapter of rank .*, trained with mlx-qlora ", re.M)


def is_our_card(path: Path) -> bool:
    """Whether a file is a card that `model_card` made: by its tag and its sentence, not a word."""
    tags = _header(path).get("tags")
    if not isinstance(tags, list) or TAG not in tags:
        return False
    return OUR_SENTENCE.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def _header(path: Path) -> dict[str, Any]:
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        return dict(yaml.safe_load(text[3:].split("\n---", 1)[0])) if text[:3] == "---" else {}
    except (TypeError, ValueError, yaml.YAMLError):  # people write it by hand
        return {}


# ---- whose files a folder holds ------------------------------------------------------------------


CARD, RECORD = "README.md", "training_args.json"


# An adapter's files: the card in its folder is about them, too.
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


MLX_LM = ("adapter_config.json", "adapters.safetensors")


ADAPTER_FOLDER = (CARD, *ADAPTER, *(f"mlx/{name}" for name in MLX_LM))


# mlx-lm's own trainer adds every argument that it had.
OUR_MLX_LM_CONFIG = {"fine_tune_type", "num_layers", "lora_parameters"}


def check_place(folder: Path, field: str) -> None:
    """Refuses a folder that cannot be made or written to.

    Args:
        folder: that will be written to.
        field: what the user named it with.

    Raises:
        ConfigError: naming the file or folder in the way.
    """
    places = (folder, *folder.absolute().parents)
    there = next(path for path in places if os.path.lexists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if os.path.isdir(there) else "is a file"
        raise ConfigError(
            f"{field}: {folder} cannot be made: {there} {reason}; choose another with --output-dir"
        )


def check_names(folder: Path, names: Iterable[str], field: str = "folder") -> None:
    """Refuses a folder in which files of others have names that will be written.

    Args:
        folder: that will be written to; it need not exist.
        names: of the files that will be written, relative to it.
        field: what the user named the folder with.

    Raises:
        ConfigError: naming the first such file.
    """
    there = [name for name in names if os.path.lexists(folder / name)]
    if foreign := [name for name in there if not _is_ours(folder, name)]:
        raise not_ours(folder / foreign[0], field)


def not_ours(path: Path, field: str) -> ConfigError:
    """The error about one file or folder of others."""
    return ConfigError(
        f"{field}: {path} is not known to be from mlx-qlora and would be overwritten; choose "
        "another folder with --output-dir"
    )


def check_not_here(folder: Path, field: str) -> None:
    """Refuses to replace the current folder, or one around it, as a whole.

    Raises:
        ConfigError: a shell that stands there would be left in a folder that is gone.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{field}: {folder} is the current folder or holds it, and would be replaced as a "
            "whole; choose another folder with --output-dir"
        )


def is_run(folder: Path) -> bool:
    """Whether a run of ours has left its record there."""
    versions = _object(folder / RECORD).get("versions")
    return isinstance(versions, dict) and "mlx-qlora" in versions


def _is_ours(folder: Path, name: str) -> bool:
    if name == CARD:
        return is_our_card(folder / CARD)
    if is_run(folder):
        return True
    if name in ADAPTER_FOLDER and is_our_card(folder / CARD):
        return True
    if name in MLX_LM and _object(folder / MLX_LM[0]).keys() == OUR_MLX_LM_CONFIG:
        return True
    return False


def _object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError):  # whatever it is, not ours
        return {}
