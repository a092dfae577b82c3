"""Folders: written whole, by one run at a time, and never over files that are not ours."""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
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
    """Lend an empty folder on the target's disk and, if the block succeeds, move it into place.

    A folder that did not exist appears whole, by one rename. Into an existing one the files are
    moved one by one, each by a rename, and files of other names are left alone; or, with
    `replace`, the old folder is set aside, and removed once the new one is in place.
    If the block fails, nothing has changed.

    Args:
        folder: where the files will be; missing parents are made.
        replace: whether an existing folder is replaced as a whole.
        marks: files without which a reader finds nothing: old ones are removed before anything
            else is moved, new ones come last, so no reader ever has old and new files together.
        gone: files of an older export that are no longer written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Inside an existing folder: its parent may be another disk, or not writable.
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
            for changed in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                _flush(changed)
        _flush(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, of which a reader finds all or what was there before."""
    with staged(path.parent) as staging:
        (staging / path.name).write_text(text, "utf-8", "backslashreplace")  # names of files


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def user_cache() -> Path:
    """The folder for what this user's runs keep for later ones; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-qlora"


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
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
    """Turn what the system says about a folder into a TrainingError with a remedy.

    `hint` makes the end of the message, and is called only when there is one.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed: the disk has nothing to do with it
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        place = getattr(error, "filename", None) or folder
        full = re.search("space|quota|too large", reason)
        remedy = f"{'free some space or ' if full else ''}choose another --output-dir"
        message = f"cannot write to {place}: {reason}; {remedy}. {hint()}"
        raise TrainingError(message.rstrip(". ")) from None


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder; the system gives the lock back if a run dies.

    Where another one is there, this is a ConfigError, or it is waited for.
    """
    with disk_errors(folder):
        lock = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(
                f"another run is writing to {folder}; choose another --output-dir, or wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(lock)


# ---- whose files a folder holds ------------------------------------------------------------------

CARD, RECORD = "README.md", "training_args.json"
PEFT = ("adapter_config.json", "adapter_model.safetensors")
MLX_LM = ("adapter_config.json", "adapters.safetensors")
MLX_COPY = tuple(f"mlx/{name}" for name in MLX_LM)
ADAPTER_FOLDER = (CARD, *PEFT, *MLX_COPY)
MERGED_FOLDER = (  # shell patterns
    *(CARD, "config.json", "generation_config.json", "model*.safetensors"),
    *("model.safetensors.index.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.*"),
)
TAG = "mlx-qlora"
ADAPTER_SENTENCE = re.compile(r"^A (?:LoRA|DoRA) adapter of rank .*, trained with mlx-qlora ", re.M)
MERGED_MARK = "merged by mlx-qlora"
NOTE = "note"  # on the base, for whoever reads that config; mlx-lm passes it over
OUR_MLX_LM_CONFIG = {"fine_tune_type", "num_layers", "lora_parameters"}


def check_writable(
    folder: Path,
    names: Iterable[str],
    field: str = "folder",
    *,
    whole: bool = False,
    is_ours: Callable[[Path], bool] | None = None,
) -> None:
    """Refuse a folder that cannot be written to, or in which a file of others would be lost.

    Args:
        folder: that will be written to; it need not exist.
        names: of the files that will be written, relative to it; shell patterns with `whole`.
        field: what the user named the folder with.
        whole: whether the folder will be replaced as a whole: then all that is in it must be ours
            and have one of the names, and the shell must not be in it.
        is_ours: whether a file may be overwritten; by default our record or our card says so.

    Raises:
        ConfigError: naming what is in the way.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        reason = "may not be written to" if os.path.isdir(above) else "is a file"
        raise ConfigError(
            f"{field}: {folder} cannot be made: {above} {reason}; choose another with --output-dir"
        )
    is_ours = is_ours or functools.partial(_is_vouched_for, folder)
    allowed = list(names)
    present = [name for name in allowed if os.path.lexists(folder / name)]
    if whole:  # macOS puts a .DS_Store into every folder that its file browser shows
        below = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        files = (path for path in below if path.name != ".DS_Store")
        present = sorted(path.relative_to(folder).as_posix() for path in files)
    foreign = [
        name
        for name in present
        if not is_ours(folder / name) or (whole and not any(fnmatch(name, x) for x in allowed))
    ]
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        fate = "deleted, as the whole folder is replaced" if whole else "overwritten"
        raise ConfigError(
            f"{field}: {folder / foreign[0]}{more} is not known to be from mlx-qlora and would be "
            f"{fate}; choose another folder with {field if field[:2] == '--' else '--output-dir'}"
        )
    if whole and Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{field}: {folder} is the current folder or holds it, and would be replaced as a "
            "whole; choose another folder with --output-dir"
        )


def is_run(folder: Path) -> bool:
    """Whether the record of one of our runs is in a folder."""
    versions = json_object(folder / RECORD).get("versions")
    return isinstance(versions, dict) and "mlx-qlora" in versions


def is_merged(path: Path) -> bool:
    """Whether the card of a merged model lies beside a file."""
    card = path.parent / CARD
    return card.is_file() and MERGED_MARK in card.read_text(encoding="utf-8", errors="replace")


def _is_vouched_for(folder: Path, path: Path) -> bool:
    name = path.relative_to(folder).as_posix()
    if name == CARD:  # people write one by hand into the folder of a run, too
        return _is_our_card(folder / CARD)
    if is_run(folder) or (name in ADAPTER_FOLDER and _is_our_card(folder / CARD)):
        return True
    # mlx-lm's own trainer adds every argument that it had.
    return name in MLX_LM and json_object(folder / MLX_LM[0]).keys() - {NOTE} == OUR_MLX_LM_CONFIG


def _is_our_card(path: Path) -> bool:
    """By its tag and its sentence: a card of others may mention us."""
    tags = card_header(path).get("tags")
    if not isinstance(tags, list) or TAG not in tags:
        return False
    return ADAPTER_SENTENCE.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def card_header(path: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty if there is none that can be read."""
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        return dict(yaml.safe_load(text[3:].split("\n---", 1)[0])) if text[:3] == "---" else {}
    except (TypeError, ValueError, yaml.YAMLError):  # people write it by hand
        return {}


def parse_json(text: str | bytes) -> Any:
    """What a file of a stranger holds; a ValueError if that is no JSON, or nests too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged."""
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}
