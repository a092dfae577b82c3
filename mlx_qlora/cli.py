"""The command line: arguments, the config that they make, and the exit code.

Errors are printed here and nowhere else.
"""

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import textwrap
import tomllib
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_qlora import __version__
from mlx_qlora.errors import visible

# ---- arguments -----------------------------------------------------------------------------------

ASSIGNMENT = "section.field=value"
# What a value is called -> how shells complete it, as shtab reads it.
COMPLETED = {
    "FILE": {"bash": "_shtab_compgen_files", "zsh": "_files"},
    "DIR": {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"},
    "FOLDER": {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"},
    ASSIGNMENT: {"bash": "_mlx_qlora_fields", "zsh": "_mlx_qlora_fields"},
}
ALL = "all"
EVERY_SECTION: Sequence[str] = "model lora data training checkpointing logging generation".split()
_TABLE = tomllib.loads(Path(__file__).with_name("commands.toml").read_text("utf-8"))
_GROUPS = _TABLE.pop("groups")
SHORTHANDS: dict[str, list[str]] = _TABLE.pop("flags")  # flag -> field, what its value is called


@dataclasses.dataclass
class Command:
    """What one command takes, by its table in commands.toml."""

    help: str
    shorthands: Any = ""  # flags, in one text; or ALL
    reads: Any = dataclasses.field(default_factory=dict)  # section -> fields and groups; or ALL
    quiet: bool = False  # whether it can work without a word
    json: bool = True  # whether it can end in a JSON object
    own: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shorthands = [*SHORTHANDS] if self.shorthands == ALL else self.shorthands.split()
        self.reads = dict.fromkeys(EVERY_SECTION, ALL) if self.reads == ALL else self.reads

    @staticmethod
    def flag(field: str) -> str:
        """The flag that a field has besides its own name, in brackets; empty without one."""
        return "".join(f" ({flag})" for flag, (name, _) in SHORTHANDS.items() if name == field)

    def fields(self, section: str) -> Sequence[str]:
        """The fields of a section that change what it does; others are refused."""
        from mlx_qlora.config import SECTIONS

        read = self.reads.get(section, "")
        if read == ALL:
            return [*SECTIONS[section].__dataclass_fields__]
        return [field for word in read.split() for field in _GROUPS.get(word, word).split()]


COMMANDS = {name: Command(**table) for name, table in _TABLE.items()}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; wrong ones exit with 2, as argparse does."""
    from mlx_qlora.errors import did_you_mean

    parser = make_parser("--help-all" in argv, argv)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = did_you_mean(argv[0], COMMANDS) or "; see mlx-qlora --help"
        parser.error(f"unknown command {argv[0]!r}{near}")
    # argparse stops collecting section.field=value at the first flag that follows one.
    args, late = parser.parse_known_args(argv)
    if unknown := [word for word in late if word.startswith("-")]:
        assert parser._subparsers is not None
        (commands,) = parser._subparsers._group_actions
        assert isinstance(commands.choices, dict)
        actions = commands.choices[args.command]._actions
        shown = [x.option_strings for x in actions if x.help != argparse.SUPPRESS]
        flags = [flag for flags in shown for flag in flags if flag.startswith("--")]
        hints = (
            f"{word.split('=')[0]}{_flag_meant(word, args.command, flags)}" for word in unknown
        )
        parser.error(f"unknown arguments: {', '.join(hints)}")
    if late and not COMMANDS[args.command].reads:
        parser.error(f"{args.command} takes no fields; leave out {' '.join(late)}")
    args.overrides = [*getattr(args, "named", []), *getattr(args, "overrides", []), *late]
    args.about = COMMANDS[args.command]
    return args


def _flag_meant(flag: str, command: str, own: Sequence[str]) -> str:
    """The known flag that an unknown one is most like, or what to use in its place."""
    from mlx_qlora.config import field_words
    from mlx_qlora.errors import did_you_mean
    from mlx_qlora.names import COMPARE, INSTEAD

    about = COMMANDS[command]
    if about.reads and _as_word(flag) in ("set", "override", "config_override"):
        return "; fields are written without it, as training.max_steps=100"
    words = map(_as_word, (*own, *field_words(about.reads)))
    meant = {word: f"--{word.replace('_', '-')}" for word in words}
    if "training" in about.reads:
        meant |= {name: f"--objective {name}" for name in COMPARE}
    hint = did_you_mean(_as_word(flag), (), (INSTEAD if about.reads else {}) | meant)
    return hint or f"; see mlx-qlora {command} --help"


def _as_word(flag: str) -> str:
    return flag.split("=")[0].lstrip("-").replace("-", "_")


def make_parser(
    all_fields: bool = False, needed: Sequence[str] = tuple(COMMANDS)
) -> argparse.ArgumentParser:
    """The parser of all commands; those not `needed` are only named, as flags take time."""
    parser = _Parser(
        prog="mlx-qlora",
        description="Fine-tune Llama, Qwen, Gemma and other decoders with QLoRA, in pure MLX.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-qlora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, about in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=about.help,
            description=about.help[0].upper() + about.help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # the names of all fields are flags
            usage=f"mlx-qlora {name} [options] [{ASSIGNMENT} ...]" if about.shorthands else None,
        )
        if name not in needed:
            continue
        _add_own_arguments(about, command)
        if about.quiet:
            quiet = "print only warnings and errors"
            command.add_argument("--quiet", action="store_true", help=quiet)
        if about.json:
            ends = "print one JSON object at the end, and all else to standard error"
            command.add_argument("--json", action="store_true", help=ends)
        if about.reads:
            _add_fields(about, command)
            if all_fields:
                texts = (_section_help(name, about.fields(name)) for name in about.reads)
                command.epilog = "fields:" + "\n".join(texts)
        for action in command._actions:
            if ways := COMPLETED.get(str(action.metavar)):
                action.complete = ways  # pyright: ignore[reportAttributeAccessIssue]
    return parser


class _Parser(argparse.ArgumentParser):
    # Python's neither spells out what it quotes nor says that it could not be written.
    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            print(visible(message), end="", file=file or sys.stderr, flush=True)
        except OSError:
            if file is sys.stdout:  # whose reader waits for an answer
                raise


class _Field(argparse.Action):
    """A flag for a field, the `dest`; if that is a section, the flag is a name of the field."""

    def __call__(self, parser: Any, args: argparse.Namespace, value: Any, flag: Any = None) -> None:
        place = self.dest if "." in self.dest else f"{self.dest}.{_as_word(flag)}"
        value = self.const if value == [] else value
        args.named = [*getattr(args, "named", []), f"{place}={value}"]


def _add_fields(about: Command, command: argparse.ArgumentParser) -> None:
    from mlx_qlora.config import SECTIONS, field_words
    from mlx_qlora.names import PRESETS

    command.add_argument("--help-all", action="help", help="this, and every field with its meaning")
    group = command.add_argument_group("fields")
    for flag in about.shorthands:
        field, value = SHORTHANDS[flag]
        section, _, key = field.partition(".")
        meaning = SECTIONS[section].__dataclass_fields__[key].metadata["help"]
        # The first sentence says what it is; the rest, when to change it, is in --help-all.
        options: dict[str, Any] = {"dest": field, "help": meaning.partition(". ")[0]}
        options |= {"metavar": value} if value else {"nargs": 0, "const": "true"}
        options |= {"nargs": "?", "const": "auto"} if flag == "--resume" else {}
        group.add_argument(flag, action=_Field, default=argparse.SUPPRESS, **options)
    if {"lora", "training"} <= {*about.reads}:
        purpose = f"fields for a purpose: {', '.join(PRESETS)}"
        group.add_argument("--preset", choices=tuple(PRESETS), metavar="NAME", help=purpose)
    group.add_argument("--config", metavar="FILE", help="YAML file with fields")
    any_field = "any field; also as --FIELD VALUE, and by other trainers' names"
    group.add_argument("overrides", nargs="*", metavar=ASSIGNMENT, help=any_field)
    group.add_argument(
        "--print-config", action="store_true", help="print the resolved YAML and stop"
    )
    for word, field in field_words(about.reads).items():
        flags = {f"--{word}", f"--{word.replace('_', '-')}"} - {*command._option_string_actions}
        if flags:
            how: dict[str, Any] = {"nargs": "?", "const": "true", "dest": field.partition(".")[0]}
            hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            command.add_argument(*sorted(flags), action=_Field, **how, **hidden)


def _add_own_arguments(about: Command, command: argparse.ArgumentParser) -> None:
    groups: dict[str, Any] = {}
    for key, given in about.own.items():
        flag, _, called = key.partition(" ")
        options = {"help": given} if isinstance(given, str) else {**given}
        options |= {"type": int} if called in ("N", "SEED") else {}
        place: Any = command
        if (group := options.pop("one_of", None)) is not None:
            if group not in groups:
                groups[group] = command.add_mutually_exclusive_group()
            place = groups[group]
        if called:
            options["metavar"] = called
        elif group:  # which of them it is
            options |= {"dest": group, "action": "store_const", "const": flag[2:]}
        elif "choices" not in options:
            options["action"] = "store_true"
        place.add_argument(flag, **options)


def _section_help(section: str, read: Sequence[str]) -> str:
    from mlx_qlora.config import SECTIONS
    from mlx_qlora.fields import type_name

    config, flags = SECTIONS[section], {field: flag for flag, (field, _) in SHORTHANDS.items()}
    hints, lines = typing.get_type_hints(config), [f"\n{section}:"]
    for field in (field for field in dataclasses.fields(config) if field.name in read):
        default = getattr(config(), field.name)
        choices = field.metadata["choices"]
        kind = " | ".join(map(str, choices)) if choices else type_name(hints[field.name])
        shown = "null" if default is None else str(default)
        name = f"{section}.{field.name}"
        flag = f", {flags[name]}" if name in flags else ""
        lines.append(f"  {name}{flag}  ({kind}; default {shown})")
        lines.append(textwrap.indent(textwrap.fill(field.metadata["help"], 72), " " * 6))
    return "\n".join(lines)


def completion_script(shell: str) -> str:
    """A script that lets a shell complete commands, flags, files and fields, made by shtab."""
    import shtab

    from mlx_qlora.config import SECTIONS

    words = " ".join(f"{s}.{field}=" for s in SECTIONS for field in SECTIONS[s].__annotations__)
    preamble = {
        # No space behind `field=`; words are compared from their beginning.
        "bash": "_mlx_qlora_fields() {\n"
        '  local found=$(compgen -W "' + words + '" -- "$1")\n'
        '  [ -n "$found" ] && compopt -o nospace 2>/dev/null\n'
        '  echo "$found"\n}\n',
        "zsh": f"_mlx_qlora_fields() {{\n  compadd -S '' -- {words}\n}}\n",
    }
    return shtab.complete(make_parser(), shell, preamble=preamble[shell])


# ---- exit codes ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0 is done, 2 the user's input is wrong, 1 `doctor` found an error, 128 + n signal n.
    """
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:  # or a file would be standard output
        os.set_inheritable(nowhere, True)
    os.close(nowhere)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that it cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    from mlx_qlora.errors import UserError
    from mlx_qlora.train.signals import raised

    before, UserError.in_command = UserError.in_command, True
    try:
        with raised():
            code = _command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, and not when Python ends: it may be a pipe that has broken
        return code
    except KeyboardInterrupt as stop:
        if str(stop):  # a run that saved what it had says so
            _tell(str(stop))
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except OSError as error:  # of what is printed: files have errors of their own
        if not _output_fails():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read us has seen enough, as `head` has
            return 128 + signal.SIGPIPE
        _tell(f"standard output cannot be written: {error.strerror}")
        return 1
    finally:
        UserError.in_command = before


def _tell(text: str) -> None:
    """On standard error, which may be a terminal that is gone, or a full disk."""
    with suppress(OSError):
        print(f"mlx-qlora: {text}", file=sys.stderr, flush=True)


def _output_fails() -> bool:
    try:
        print(flush=True)  # what could not be written is tried again first
    except OSError:
        return True
    return False


def _command(argv: Sequence[str]) -> int:
    # Imported here, where Ctrl-C is expected: it takes a moment, MLX's part of it above all.
    from mlx_qlora.errors import UserError

    try:
        args = parse(argv)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "mlx":
            raise
        fix = "pip install --upgrade --force-reinstall mlx mlx-lm"
        _tell(f"MLX cannot be loaded ({error}); run: {fix}")
        return 2
    as_json = getattr(args, "json", False)
    if args.command == "completion":
        print(completion_script(args.shell), end="")
        return 0
    from mlx_qlora.commands import run_command
    from mlx_qlora.distributed import prints
    from mlx_qlora.folders import in_words

    try:
        result = run_command(args)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        if getattr(error, "filename", "a user's") is None and _output_fails():
            raise
        # What the system refuses, wherever that is, is no fault of ours.
        shown = error if isinstance(error, UserError) else UserError(in_words(error))
        if prints(shown):
            _tell(str(shown))
        if as_json and prints(shown):
            _print_json({"error": str(shown), "kind": type(error).__name__})
        return 2
    if as_json and result is not None:
        _print_json(result)
    return 0 if result is None or result.get("ok", True) else 1


def _print_json(result: Any) -> None:
    """Print one object; NaN and infinity become null, as JSON cannot write them."""
    from mlx_qlora.errors import write_out

    write_out(json.dumps(_plain(result), ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value - value != 0:  # NaN or infinite
        return None
    return str(value) if isinstance(value, Path) else value
