"""Whose files a folder holds: where we write, nobody's work is lost.

A file is ours if we can show that we wrote it: beside the record of a run everything that a run
writes, beside a card of ours the adapter that the card is about. A bare name shows nothing.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_qlora.adapters.card import is_our_card
from mlx_qlora.errors import ConfigError

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
