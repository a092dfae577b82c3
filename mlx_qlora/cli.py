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
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_qlora import __version__
from mlx_qlora.errors import visible

# ---- arguments -----------------------------------------------------------------------------------

# flag -> (field, what its value is called; None for a flag that says true)
SHORTHANDS = {
    "--model": ("model.source", "SOURCE"),
    "--adapter": ("model.adapter", "DIR"),
    "--data": ("data.path", "FILE"),
    "--output-dir": ("checkpointing.output_dir", "DIR"),
    "--epochs": ("training.num_train_epochs", "N"),
    "--max-steps": ("training.max_steps", "N"),
    "--learning-rate": ("training.learning_rate", "RATE"),
    "--warmup-ratio": ("training.warmup_ratio", "SHARE"),
    "--batch-size": ("training.per_device_train_batch_size", "N"),
    "--lora-r": ("lora.r", "N"),
    "--max-length": ("data.max_length", "N"),
    "--resume": ("checkpointing.resume_from_checkpoint", "WHICH"),
    "--strict": ("data.strict", None),
    "--refused": ("data.refused_path", "FILE"),
}
ASSIGNMENT = "section.field=value"
# What a value is called -> how shells complete it, as shtab reads it.
COMPLETED = {
    "FILE": {"bash": "_shtab_compgen_files", "zsh": "_files"},
    "DIR": {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"},
    "FOLDER": {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"},
    ASSIGNMENT: {"bash": "_mlx_qlora_fields", "zsh": "_mlx_qlora_fields"},
}
NOT_SWEPT = "--learning-rate", "--lora-r", "--adapter", "--resume"
ALL = ""
EVERY_SECTION = ("model", "lora", "data", "training", "checkpointing", "logging", "generation")
EVERY_FIELD: Mapping[str, str] = dict.fromkeys(EVERY_SECTION, ALL)
KEPT = "output_dir save_total_limit"
# Decide what is loaded.
LOADED = "source revision adapter bits group_size mode dtype frozen_matmul residency"
ROWS = "path format columns system template history train_on max_length truncation strict "
ROWS += "refused_path num_workers cache_dir"
SHAPES = "r target_modules layers_to_transform rank_pattern use_dora"  # of LoRA matrices
PARTS = "validation_path test_path split"
LENGTH = "num_train_epochs max_steps warmup_ratio warmup_steps"
STEPS = "per_device_train_batch_size gradient_accumulation_steps "
MEMORY = STEPS + "gradient_checkpointing"


@dataclasses.dataclass(frozen=True)
class Command:
    """What one command takes."""

    help: str
    shorthands: Sequence[str] = ()  # flags that stand for fields
    # Section -> its fields that change what the command does, or ALL; others are refused.
    reads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quiet: bool = False  # whether it can work without a word
    json: bool = True  # whether it can end in a JSON object

    @property
    def sections(self) -> Sequence[str]:
        """The sections of which it reads anything."""
        return tuple(self.reads)

    def fields(self, section: str) -> Sequence[str]:
        """The fields of a section that it reads."""
        from mlx_qlora.config import SECTIONS

        read = self.reads.get(section)
        return (
            tuple(SECTIONS[section].__dataclass_fields__) if read == ALL else (read or "").split()
        )


COMMANDS = {
    "train": Command(
        "fine-tune a model and leave a PEFT adapter", tuple(SHORTHANDS), EVERY_FIELD, quiet=True
    ),
    "plan": Command(
        "predict the memory and the speed of a run",
        ("--model", "--batch-size", "--lora-r", "--max-length"),
        {
            "model": LOADED,
            "lora": f"{SHAPES} alpha_pattern lora_dropout",
            "data": "max_length train_on",
            "training": f"{MEMORY} objective kl_weight",
        },
    ),
    "inspect": Command(
        "read rows as a run does, and show what would be trained",
        ("--model", "--data", "--epochs", "--batch-size", "--max-length", "--strict", "--refused"),
        {
            "model": "source revision adapter",
            "data": f"{ROWS} {PARTS} prompt_loss_weight shuffle max_refused",
            "training": f"{STEPS}{LENGTH} seed objective",
        },
    ),
    "generate": Command(
        "answer a prompt, with an adapter or without",
        ("--model", "--adapter"),
        {"model": LOADED, "data": "system template", "generation": ALL},
    ),
    "chat": Command(
        "chat with a model, with an adapter or without",
        ("--model", "--adapter"),
        {"model": LOADED, "data": "system template", "generation": ALL},
        json=False,
    ),
    "evaluate": Command(
        "score a model on rows, or its adapter against the base",
        ("--model", "--adapter", "--data", "--max-length"),
        {
            "model": LOADED,
            "data": ROWS,
            "training": "seed objective",
            "generation": "max_new_tokens",
        },
    ),
    "sweep": Command(
        "find a learning rate, rank and batch size by short runs",
        tuple(flag for flag in SHORTHANDS if flag not in NOT_SWEPT),
        EVERY_FIELD,
        quiet=True,
    ),
    "merge": Command(
        "merge an adapter into its model, as a folder that any tool opens",
        ("--model", "--adapter", "--data"),
        {"model": LOADED, "data": ROWS},
        quiet=True,
    ),
    "export": Command(
        "write an adapter in another format, or a copy in PEFT's if none is named",
        ("--model", "--adapter", "--data"),
        {"model": ALL, "data": ROWS},
        quiet=True,
    ),
    "push": Command("upload an adapter or a merged model to the Hugging Face hub", quiet=True),
    "doctor": Command(
        "check this machine, its packages and the hub, and say what to fix",
        ("--model", "--output-dir"),
        {"model": "source revision", "lora": SHAPES, "checkpointing": KEPT},
    ),
    "cache": Command("list or clear what is kept on this disk for later runs", quiet=True),
    "completion": Command("print a script that completes commands and fields", json=False),
}


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
        flags = _options_of(parser, args.command)
        hints = (
            f"{word.split('=')[0]}{_flag_meant(word, args.command, flags)}" for word in unknown
        )
        parser.error(f"unknown arguments: {', '.join(hints)}")
    if late and not COMMANDS[args.command].sections:
        parser.error(f"{args.command} takes no fields; leave out {' '.join(late)}")
    args.overrides = [*getattr(args, "named", []), *getattr(args, "overrides", []), *late]
    args.about = COMMANDS[args.command]
    return args


def _options_of(parser: argparse.ArgumentParser, command: str) -> list[str]:
    """The flags in a command's help."""
    assert parser._subparsers is not None
    (commands,) = parser._subparsers._group_actions
    assert isinstance(commands.choices, dict)
    actions = commands.choices[command]._actions
    shown = (action for action in actions if action.help != argparse.SUPPRESS)
    return [flag for action in shown for flag in action.option_strings if flag.startswith("--")]


def _flag_meant(flag: str, command: str, own: Sequence[str]) -> str:
    """The known flag that an unknown one is most like, or what to use in its place."""
    from mlx_qlora.config import field_words
    from mlx_qlora.errors import did_you_mean
    from mlx_qlora.names import COMPARE, INSTEAD

    about = COMMANDS[command]
    if about.sections and _as_word(flag) in ("set", "override", "config_override"):
        return "; fields are written without it, as training.max_steps=100"
    words = map(_as_word, (*own, *field_words(about.sections)))
    meant = {word: f"--{word.replace('_', '-')}" for word in words}
    if "training" in about.sections:
        meant |= {name: f"--objective {name}" for name in COMPARE}
    hint = did_you_mean(_as_word(flag), (), (INSTEAD if about.sections else {}) | meant)
    return hint or f"; see mlx-qlora {command} --help"


def _as_word(flag: str) -> str:
    return flag.split("=")[0].lstrip("-").replace("-", "_")


def make_parser(
    all_fields: bool = False, needed: Sequence[str] = tuple(COMMANDS)
) -> argparse.ArgumentParser:
    """The parser of all commands, of which those needed have their arguments.

    Args:
        all_fields: whether to have help on all of their fields.
        needed: words; commands that are not among them are only named, as flags take time.
    """
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
        _add_own_arguments(name, command)
        if about.quiet:
            quiet = "print only warnings and errors"
            command.add_argument("--quiet", action="store_true", help=quiet)
        if about.json:
            ends = "print one JSON object at the end, and all else to standard error"
            command.add_argument("--json", action="store_true", help=ends)
        if about.sections:
            _add_fields(about, command)
            if all_fields:
                texts = (_section_help(name, about.fields(name)) for name in about.sections)
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
    if {"lora", "training"} <= {*about.sections}:
        purpose = f"fields for a purpose: {', '.join(PRESETS)}"
        group.add_argument("--preset", choices=tuple(PRESETS), metavar="NAME", help=purpose)
    group.add_argument("--config", metavar="FILE", help="YAML file with fields")
    any_field = "any field; also as --FIELD VALUE, and by other trainers' names"
    group.add_argument("overrides", nargs="*", metavar=ASSIGNMENT, help=any_field)
    group.add_argument(
        "--print-config", action="store_true", help="print the resolved YAML and stop"
    )
    for word, field in field_words(about.sections).items():
        flags = {f"--{word}", f"--{word.replace('_', '-')}"} - {*command._option_string_actions}
        if flags:
            how: dict[str, Any] = {"nargs": "?", "const": "true", "dest": field.partition(".")[0]}
            hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            command.add_argument(*sorted(flags), action=_Field, **how, **hidden)


def _add_own_arguments(name: str, command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    if name == "train":
        dry = "load, read, plan and show the first batch, but train nothing"
        add("--dry-run", action="store_true", help=dry)
    if name == "inspect":
        add("file", nargs="?", metavar="FILE", help="the rows, as --data")
        show = "print N examples as the model sees them"
        add("--show", type=int, default=0, metavar="N", help=show)
        page = "write the examples in colour to a page (50, if --show is not given)"
        add("--html", metavar="FILE", help=page)
    if name == "plan":
        add("--machine", metavar="CHIP-GB", help="plan for another machine, like m4-max-64")
        several = "plan for N processes that train together, each on its own machine"
        add("--processes", type=int, metavar="N", help=several)
    if name == "generate":
        ask = command.add_mutually_exclusive_group()
        ask.add_argument("--prompt", metavar="TEXT", help="what to answer, or - for standard input")
        asked = "what to answer, written as an instruction row in training"
        ask.add_argument("--instruction", metavar="TEXT", help=asked)
        add("--input", metavar="TEXT", help="the input of that --instruction")
        add("--raw", action="store_true", help="leave out the chat template")
        add("--seed", type=int, help="the same seed gives the same text")
    if name == "chat":
        add("--system", metavar="TEXT", help="system message")
        add("--seed", type=int, help="the same seed gives the same answers")
    if name == "evaluate":
        add("--limit", type=int, metavar="N", help="score N rows, drawn by training.seed")
        asked = "compare answers to N questions (default 32); 0 asks none"
        add("--answers", type=int, metavar="N", help=asked)
        add("--general", metavar="FILE", help="text to measure on what was forgotten")
        add("--output", metavar="FILE", help="write everything to this JSON file")
    if name == "sweep":
        for flag, what in (("learning-rates", "1e-4,2e-4,5e-4"), ("ranks", "8,16,32")):
            add(f"--{flag}", metavar="LIST", help=f"values to try, such as {what}")
        add("--batch-sizes", metavar="LIST", help="examples in a step to try, such as 8,16")
        add("--steps", type=int, metavar="N", help="steps of a full trial")
        halved = "how often the worse half is dropped (default 3)"
        add("--rungs", type=int, default=3, metavar="N", help=halved)
        add("--product", action="store_true", help="all combinations, not one field at a time")
        add("--repeat-best", action="store_true", help="train the winner again, with another seed")
    if name == "doctor":
        tests = "compare kernels, losses, memory and speed with what they should be"
        add("--self-test", action="store_true", help=tests)
        add("--report", metavar="FILE", help="write FILE.json and FILE.md, for an issue")
        times = "time a layer in each way, so that model.frozen_matmul=auto chooses the fastest"
        add("--tune", action="store_true", help=times)
    if name in ("merge", "export"):
        needed = name == "merge"  # an export may go to LM Studio's folder
        add("--output-dir", dest="folder", required=needed, metavar="DIR", help="folder to write")
    if name == "merge":
        original = "original 16-bit weights to merge into, instead of the dequantised ones"
        add("--base", metavar="SOURCE", help=original)
        kinds = ("bfloat16", "float16", "float32")
        add("--save-dtype", default="bfloat16", choices=kinds, help="dtype of the written weights")
        again = "quantise to 4, 5, 6, 8 or mxfp4, with what the run's rows make up for"
        add("--requantize", metavar="BITS", help=again)
    if name == "export":
        form = command.add_mutually_exclusive_group()
        forms = {
            "portable": "with one rank and scale 1, for tools that ignore rsLoRA and patterns",
            "mlx": "for mlx-lm",
            "gguf": "the adapter for llama.cpp and Ollama, with a Modelfile",
            "gguf-model": "the whole model for llama.cpp, Ollama and LM Studio",
        }
        for name, meaning in forms.items():
            options: Any = {"action": "store_const", "const": name, "help": meaning}
            form.add_argument(f"--{name}", dest="form", **options)
        kinds = "of the model: q8_0 (default), q5_1, q5_0, q4_1, q4_0, bf16, f16; or q4_k_m "
        add("--type", metavar="TYPE", help=f"{kinds}and the like, by llama-quantize")
        add("--ollama", metavar="NAME", help="add the model to Ollama under this name")
        place = "write the model where LM Studio finds it, instead of --output-dir"
        add("--lmstudio", metavar="PUBLISHER/MODEL", help=place)
    if name == "push":
        add("folder", metavar="FOLDER", help="folder of a run, an export or a merged model")
        add("repo_id", metavar="OWNER/NAME", help="repository, created if missing")
        add("--public", action="store_true", help="create a public repository")
        add("--dry-run", action="store_true", help="list the files, but upload nothing")
    if name == "cache":
        add("--clear", action="store_true", help="remove it; the next run makes it again")
    if name == "completion":
        add("shell", choices=("bash", "zsh"), help="your shell")


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
    try:
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
        told = error if isinstance(error, UserError) else UserError(in_words(error))
        if prints(told):
            _tell(str(told))
        if as_json and prints(told):
            _print_json({"error": str(told), "kind": type(error).__name__})
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
