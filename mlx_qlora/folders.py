"""Folders: written whole, by one run at a time, and never over files that are not ours."""

import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mlx_qlora.errors import ConfigError, TrainingError, waiting
from mlx_qlora.readers import card_header, card_text, json_value

TAG = "mlx-qlora"
BASE = "base"  # the name of its hash, in a file's metadata and in a run's record

# ---- written whole -------------------------------------------------------------------------------

moved_into: list[Path] = []  # folders that have new files, for whom a signal stops


@contextmanager
def staged(
    folder: Path,
    replace: bool = False,
    marks: tuple[str, ...] = (),
    gone: tuple[str, ...] = (),
) -> Iterator[Path]:
    """Lend an empty folder on the target's disk and, if the block succeeds, move it into place.

    A folder that did not exist appears whole, by one rename. Into an existing one the files are
    moved one by one, each by a rename, and files of other names are left alone; or, with `replace`,
    the old folder is set aside, and removed once the new one is in place. No link in the folder is
    followed. If the block fails, nothing has changed; the next process that writes this folder
    removes what a killed one has left.

    Args:
        marks: files without which a reader finds nothing: old ones are removed before anything
            else is moved, new ones come last, so no reader ever has old and new files together.
        gone: files of an older export that are no longer written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Inside an existing folder: its parent may be another disk, or not writable.
    is_inside = folder.exists() and not replace
    remove_leftovers(folder)
    staging, lock = new_staging(*((folder, TAG) if is_inside else (folder.parent, folder.name)))
    try:
        staging.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would make the finished folder private
        yield staging
        for path in (*staging.rglob("*"), staging):
            if path.is_file():  # safetensors makes files that only their owner may read
                path.chmod(0o666 & ~_umask())
            _flush(path)
        moved_into.append(folder)
        if replace and folder.exists():
            aside = staging.with_suffix(".old")
            folder.rename(aside)
            try:
                staging.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            remove(aside)
        elif not folder.exists():
            staging.rename(folder)
        else:
            for name in (*marks, *gone):
                (folder / name).unlink(missing_ok=True)
            paths = sorted(path.relative_to(staging) for path in staging.rglob("*"))
            for place in (folder / path for path in paths if (staging / path).is_dir()):
                if place.is_symlink():
                    place.unlink()
                place.mkdir(exist_ok=True)
            files = [path for path in paths if (staging / path).is_file()]
            for path in sorted(files, key=lambda path: path.as_posix() in marks):
                os.replace(staging / path, folder / path)
            for changed in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                _flush(changed)
        _flush(folder.parent)
    finally:
        remove(staging)
        os.close(lock)


LEFTOVER = re.compile(r"\.(.*)-[a-z0-9_]{8}\.(tmp|old)")


def new_staging(home: Path, name: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that locks it as long as this process lives."""
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".tmp", dir=home))
    # Another process takes it for a dead one's, and removes it, before it is locked.
    with suppress(FileNotFoundError):
        lock = os.open(staging, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if staging.exists():
            return staging, lock
        os.close(lock)
    return new_staging(home, name)


def remove_leftovers(folder: Path, parts: str = TAG) -> None:
    """Remove what killed processes left of a folder, beside and within it.

    One that was set aside for one that never came is put back. `parts` is a pattern of the names of
    folders within that are staged by themselves.
    """
    beside = [(path, re.escape(folder.name)) for path in folder.parent.glob(".*-*.*")]
    within = [(path, f"{TAG}|{parts}") for path in folder.glob(".*-*.*")]
    for path, names in sorted([*beside, *within]):  # .old comes before .tmp
        match = LEFTOVER.fullmatch(path.name)
        if match is None or not re.fullmatch(names, match[1]):
            continue
        with _dead(path.with_suffix(".tmp")) as is_dead:
            if is_dead and path.suffix == ".old" and not os.path.lexists(path.with_name(match[1])):
                path.rename(path.with_name(match[1]))
            elif is_dead:
                remove(path)


@contextmanager
def _dead(staging: Path) -> Iterator[bool]:
    """Whether the process that made it is dead; it may live where there are no locks.

    Within, the lock is held: who has just made the folder waits for it, and finds it gone.
    """
    lock, is_dead = None, True
    try:
        if staging.is_dir():
            try:
                lock = os.open(staging, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # a living one's, or another user's in a folder of all
                is_dead = False
        yield is_dead
    finally:
        if lock is not None:
            os.close(lock)


def remove(path: Path) -> None:
    """Remove a folder or file, or a link and not what it points to, as far as we may."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, of which a reader finds all or what was there before."""
    with staged(path.parent) as staging:
        (staging / path.name).write_text(text, "utf-8", "backslashreplace")  # names of files


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex; an OSError if it is missing, or a pipe."""
    if not path.is_file() and path.exists():
        raise OSError(22, "it is no file", str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """The folder for what this user's runs keep for later ones; it need not exist."""
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / TAG


def user_path(text: str | Path | None, field: str = "it") -> Path:
    """A path as a person writes it, `~` included; a ConfigError if it is none or has no home."""
    if text is None or not str(text):
        raise ConfigError(f"{field} is missing; name a file or folder")
    if (place := os.path.expanduser(text)).startswith("~"):
        raise ConfigError(f"there is no home folder for {text}; set {field} to a whole path")
    return Path(place)


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
    """Turn what the system says of a folder into a TrainingError, which ends in `hint()`."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed: the disk has nothing to do with it
        raise
    except (OSError, SafetensorError) as error:
        message = f"cannot write to {in_words(error, folder)}. {hint()}"
        raise TrainingError(message.rstrip(". ")) from None


SPACE = "free some space or choose another --output-dir"
REMEDIES = {
    errno.EMFILE: "raise this shell's limit of open files, as with `ulimit -n 4096`",
    errno.ENFILE: "close other programs: the whole system has too many files open",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "remove the file that is in its place"),
    errno.ENAMETOOLONG: "choose a shorter name or path",
    errno.ENOENT: "put it back, or start from a folder that is there",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose another --output-dir"),
}


def in_words(error: Exception, place: str | Path = "") -> str:
    """What the system says: the file, the reason and a remedy; a `place` where it names no file."""
    number = getattr(error, "errno", None)
    place = getattr(error, "filename", None) or place
    if not place and number == errno.ENOENT:  # which nothing else has no name for
        place = "the current folder"
    reason = getattr(error, "strerror", None) or str(error)
    return f"{place}{': ' * bool(place)}{reason}; {REMEDIES.get(number or 0, SPACE)}"


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder, or wait for them; the system unlocks it if a run dies."""
    with disk_errors(folder):
        lock = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        try:
            with waiting(f"another process that writes to {folder}"):
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
ADAPTER_SENTENCE = re.compile(r"^A (?:LoRA|DoRA) adapter of rank .*, trained with mlx-qlora ", re.M)
MERGED_MARK = "merged by mlx-qlora"
BELOW = "x/" * 100
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
        names: of the files that will be written, relative to it; shell patterns with `whole`.
        field: what the user named the folder with.
        whole: whether the folder will be replaced as a whole: then all that is in it must be ours
            and have one of the names, and the shell must not be in it.
        is_ours: whether a file may be overwritten; by default our record or our card says so.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    check_name(folder, field)
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        reason = "may not be written to" if os.path.isdir(above) else "is a file"
        raise ConfigError(
            f"{field}: {folder} cannot be made: {above} {reason}; choose another with --output-dir"
        )
    is_ours = is_ours or functools.partial(_is_vouched_for, folder)
    allowed = list(names)
    present = [name for name in allowed if os.path.lexists(folder / name)]
    if whole:  # macOS puts a .DS_Store into every folder that its file browser shows
        remove_leftovers(folder)  # of another kind of export
        below = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        files = (path for path in below if path.name != ".DS_Store")
        present = sorted(path.relative_to(folder).as_posix() for path in files)
    foreign = [
        name
        for name in present
        if not is_ours(folder / name) or (whole and not any(fnmatch(name, x) for x in allowed))
    ]
    if not whole:  # files in the place of folders that are needed
        above_files = {folder / name for name in map(os.path.dirname, allowed) if name}
        foreign += [p.name for p in above_files if p.is_file() and not p.is_symlink()]
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


def check_name(folder: Path, field: str) -> None:
    """Raise a ConfigError for what the system cannot name, or without room for names below it."""
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    parts = folder.absolute().relative_to(above).parts
    # A folder is staged beside its place. What we write in it is at most so long.
    reason = ""
    for place in (*(above / f".{part}-xxxxxxxx.tmp" for part in parts), folder.absolute() / BELOW):
        try:
            str(place).encode()  # MLX opens no other
            os.lstat(place)
        except ValueError as error:
            reason = "it is no UTF-8" if isinstance(error, UnicodeError) else str(error)
        except OSError as error:
            reason = reason or (str(error.strerror) if error.errno == errno.ENAMETOOLONG else "")
    if reason:
        raise ConfigError(
            f"{field}: {folder} cannot be made: {reason}; choose another name or place"
        )


def written_by(folder: Path) -> str:
    """The version that a run's record in a folder names; empty if there is no record of ours."""
    return str(json_value(folder / RECORD, "versions", "mlx-qlora") or "")


def is_merged(path: Path) -> bool:
    """Whether the card of a merged model lies beside a file."""
    return MERGED_MARK in card_text(path.parent / CARD)


def _is_vouched_for(folder: Path, path: Path) -> bool:
    name = path.relative_to(folder).as_posix()
    if path.is_dir() and not path.is_symlink():  # in the place of a file
        return False
    if name == CARD:  # people write one by hand into the folder of a run, too
        return _is_our_card(folder / CARD)
    if written_by(folder) or (name in ADAPTER_FOLDER and _is_our_card(folder / CARD)):
        return True
    if name == MLX_LM[1] and not os.path.lexists(folder / MLX_LM[0]):  # an export was killed
        with suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
            return BASE in (file.metadata() or {})
    # mlx-lm's own trainer adds every argument that it had.
    return name in MLX_LM and json_value(folder / MLX_LM[0]).keys() - {NOTE} == OUR_MLX_LM_CONFIG


def _is_our_card(path: Path) -> bool:
    """By its tag and its sentence: a card of others may mention us."""
    tags = card_header(path).get("tags")
    if not isinstance(tags, list) or TAG not in tags:
        return False
    return ADAPTER_SENTENCE.search(card_text(path)) is not None
