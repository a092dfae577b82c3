"""What was typed becomes a config: a file, flags and assignments, the later over the earlier."""

import argparse
import glob
import os
import re
from typing import TYPE_CHECKING, Any

from mlx_qlora.arguments import COMMANDS, SHORTHANDS
from mlx_qlora.errors import ConfigError

if TYPE_CHECKING:
    from mlx_qlora.config import RunConfig


def config_of(args: argparse.Namespace) -> "RunConfig":
    """The file, then the shorthands, then the overrides; later ones win.

    Raises:
        ConfigError: a field that does not exist, that the command does not read, or a wrong value.
    """
    from mlx_qlora.config import SECTIONS, build, read_yaml, set_override

    words = _assignments(args)
    file = getattr(args, "config", None)
    values: dict[str, dict[str, Any]] = read_yaml(file) if file else {}
    for field, _ in SHORTHANDS.values():
        if (value := getattr(args, field, None)) is not None:
            set_override(values, f"{field}={value}")
    read = COMMANDS[args.command].sections
    for assignment in words:
        set_override(values, assignment)
        section = assignment.partition(".")[0].strip()
        if section in SECTIONS and section not in read:
            raise ConfigError(
                f"{assignment}: {args.command} reads no field of {section}; it reads those of "
                f"{', '.join(read)}"
            )
    return build(_with_record(args, values))


def _assignments(args: argparse.Namespace) -> list[str]:
    """The words of a command that are no flags; `inspect` takes one of them for its FILE.

    Raises:
        ConfigError: a word that is no assignment, or a second source.
    """
    words, takes_file = [*args.overrides], hasattr(args, "file")
    if takes_file and args.file is not None:  # argparse has it from anywhere among the words
        words.insert(0, args.file)
    files = [word for word in words if "=" not in word or (takes_file and _is_path(word))]
    if files and not takes_file:
        can_read = "--data" in COMMANDS[args.command].shorthands
        hint = f"; for a file of rows pass --data {files[0]}" if can_read else ""
        raise ConfigError(f"expected section.field=value, got {files[0]!r}{hint}")
    named = [word.partition("=")[2] for word in words if word.startswith("data.path=")]
    flagged = getattr(args, "data.path", None)
    sources = [*files, *named, *([] if flagged is None else [flagged])]
    if files and len(sources) > 1:
        raise ConfigError(f"inspect reads one source of rows; got {' and '.join(sources)}")
    return [*(f"data.path={file}" for file in files), *(w for w in words if w not in files)]


def _is_path(word: str) -> bool:
    """Whether a word with an equals sign is yet a file (lang=en/rows.jsonl), and no field."""
    if re.match(r"\w+\.\w+=", word):
        return False
    path = os.path.expanduser(word)
    return "/" in word.partition("=")[0] or os.path.exists(path) or bool(glob.glob(path))


def _with_record(
    args: argparse.Namespace, values: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """With what the run that made the adapter was told, for fields that nobody has set now.

    An adapter is used with its own model, as it was trained: only a model that is named anew
    stands for itself.
    """
    from mlx_qlora.delivery import recorded

    chosen = values.get("model", {})
    adapter, read = chosen.get("adapter"), COMMANDS[args.command].sections
    if args.command in ("train", "sweep") or not isinstance(adapter, str) or chosen.get("source"):
        return values
    told = recorded(adapter)
    merged = {section: {**told.get(section, {}), **values.get(section, {})} for section in told}
    return {**values, **{section: merged[section] for section in merged if section in read}}
