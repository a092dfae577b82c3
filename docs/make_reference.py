"""Writes docs/reference/cli.md from the parser itself, and docs/reference/python.md from `mq`.

Run as: make docs        (or: python docs/make_reference.py)
"""

import argparse
import dataclasses
from pathlib import Path

import mlx_qlora as mq
from mlx_qlora.cli import COMMANDS, make_parser
from mlx_qlora.config import SECTIONS

FOLDER = Path(__file__).parent / "reference"

# The public names in the order in which one meets them; whatever is missing here is refused.
CHAPTERS = {
    "Load": ("load", "add_lora", "QuantConfig", "LoraConfig", "ModelConfig"),
    "Data": ("read_examples", "Examples", "make_batches", "Batch", "DataConfig"),
    "Train": (
        *(
            "self_test",
            "plan",
            "fine_tune",
            "TrainResult",
            "loss_and_grads",
            "RunConfig",
            "TrainingConfig",
        ),
        *("CheckpointingConfig", "LoggingConfig"),
    ),
    "Ask": (
        *("generate", "stream", "generate_batch", "chat", "evaluate", "GenerationConfig"),
        *("PromptCache", "Speed"),
    ),
    "Adapters on disk": (
        *("save_adapter", "load_adapter", "merge", "save_merged", "save_portable"),
        *("save_gguf_adapter", "save_gguf_model", "push_to_hub"),
    ),
    "Several adapters": (
        *("attach", "switch", "active", "adapter_names", "disabled", "combine", "detach"),
    ),
    "Errors": (
        *("UserError", "ConfigError", "SourceError", "WeightsError", "TokenizerError"),
        *("DataError", "TrainingError", "ProcessError", "AdapterError"),
    ),
}


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by name, in the order of `--help`."""
    return _subparsers().choices


def cli_page() -> str:
    """The reference of the command line as Markdown."""
    helps = {action.dest: action.help or "" for action in _subparsers()._choices_actions}
    lines = [
        "# Command line",
        "",
        "Commands take fields besides their options: `section.field=value`, listed in",
        "[Fields](../fields.md). An option wins over the file that `--config` names, and a field",
        "wins over both. A field that a command does not read is refused, except in that file.",
        "`mlx-qlora COMMAND --help` prints what is on this page, `--help-all`",
        "all fields too; each field's name is a flag as well (`--lora-dropout 0`), and so are its",
        "names elsewhere ([migration](../migration.md)).",
        "Made by `make docs` from the parser; do not edit.",
        "",
        *(f"- [`{name}`](#mlx-qlora-{name}): {helps[name]}" for name in commands()),
    ]
    for name, parser in commands().items():
        lines += ["", f"## mlx-qlora {name}", "", parser.description or helps[name]]
        about = COMMANDS[name]
        if about.sections:
            own = {s: ", ".join(f"`{field}`" for field in about.fields(s)) for s in about.sections}
            read = [f"`{s}` ({own[s]})" if about.reads[s] else f"`{s}`" for s in own]
            lines += ["", f"Reads the fields of {', '.join(read)}."]
        lines += _table(parser)
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """The reference of the public names as Markdown, which mkdocstrings fills.

    Raises:
        ValueError: a public name has no chapter, or a chapter names what is not public.
    """
    told = [name for names in CHAPTERS.values() for name in names]
    public = set(mq.__all__) - {"__version__"}
    if wrong := sorted(public ^ set(told)) or [n for n in told if told.count(n) > 1]:
        raise ValueError(f"docs/make_reference.py: CHAPTERS is not the public API: {wrong}")
    lines = [
        "# Python",
        "",
        "`import mlx_qlora as mq` gives these names and no others that are public. Names load on",
        "first use, so the import itself costs next to nothing.",
        "Made by `make docs`; do not edit.",
    ]
    for chapter, names in CHAPTERS.items():
        lines += ["", f"## {chapter}"]
        for name in names:
            lines += ["", f"::: mlx_qlora.{name}"]
    return "\n".join(lines) + "\n"


def _subparsers() -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    parser = make_parser()
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return found[0]


def _table(parser: argparse.ArgumentParser) -> list[str]:
    """A row for each argument, what must be given first."""
    actions = [a for a in parser._actions if a.dest != "help" and a.help != argparse.SUPPRESS]
    actions.sort(key=lambda action: bool(action.option_strings))
    lines = ["", "| argument | value | default | |", "|---|---|---|---|"]
    lines += [_row(action) for action in actions]
    for group in parser._mutually_exclusive_groups:
        names = [f"`{action.option_strings[0]}`" for action in group._group_actions]
        lines += ["", f"At most one of {', '.join(names)}."]
    return lines if actions else []


def _row(action: argparse.Action) -> str:
    named = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{_metavar(action)}`"
    if action.choices is not None:
        value = ", ".join(map(str, action.choices))
    elif action.nargs == 0 or not action.option_strings:
        value = ""
    else:
        value = "a number" if action.type is int else _metavar(action)
    is_plain = action.default in (None, False, argparse.SUPPRESS) or action.default == []
    default = "" if is_plain or action.nargs == 0 else str(action.default)
    if action.required and action.option_strings:
        default = "required"
    what = _field(action.dest) if "." in action.dest else action.help or ""
    what = what.replace("[", "\\[")  # or Markdown sees a link
    what = "any field" if action.dest == "overrides" else what
    return " ".join(f"| {named} | {value} | {default} | {what} |".split())


def _field(place: str) -> str:
    """The field that a flag stands for, and its own line."""
    section, name = place.split(".")
    field = next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == name)
    return f"`{place}`: {field.metadata['help']}"


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper().replace("_", "-"))


if __name__ == "__main__":
    for name, page in (("cli.md", cli_page()), ("python.md", python_page())):
        (FOLDER / name).write_text(page, encoding="utf-8")
        print(f"wrote {FOLDER / name}")
