"""Writes docs/reference/cli.md from the parser itself, and docs/reference/python.md from `mq`.

Run as: make docs        (or: python docs/make_reference.py)
"""

import argparse
from collections import Counter
from pathlib import Path

import mlx_qlora as mq
from mlx_qlora.cli import ALL, COMMANDS, make_parser

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
    shared = _shared()
    lines = [
        "# Command line",
        "",
        "After this page you know every command and option. Commands take fields besides:",
        "`section.field=value`, listed in [Fields](../fields.md), or by a field's name as a flag",
        "(`--lora-dropout 0`), and by its [names elsewhere](../migration.md). An option wins over",
        "the file that `--config` names, a field over both. What a command does not read is",
        "refused, except in that file. Made by `make docs` from the parser; do not edit.",
        "",
        *(f"- [`{name}`](#mlx-qlora-{name}): {helps[name]}" for name in commands()),
        "",
        "## Options of several commands",
        "",
        *shared,
    ]
    for name, parser in commands().items():
        lines += ["", f"## mlx-qlora {name}", "", parser.description or helps[name]]
        about = COMMANDS[name]
        if about.reads:
            read = [f"{'' if about.reads[s] == ALL else 'some of '}`{s}`" for s in about.reads]
            lines += ["", f"Reads the fields of {', '.join(read)}; `--help-all` lists them."]
        actions = [_row(action) for action in _actions(parser)]
        alone = [action for action in _actions(parser) if _row(action) not in shared]
        lines += ["", *map(_row, alone)] if alone else []
        if common := [_name(shared[row]) for row in actions if row in shared]:
            lines += ["", f"{'And' if alone else 'Takes'} {', '.join(common)}."]
        for group in parser._mutually_exclusive_groups:
            names = [f"`{action.option_strings[0]}`" for action in group._group_actions]
            lines += ["", f"At most one of {', '.join(names)}."]
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
        "After this page you know every public name of `import mlx_qlora as mq`. The arguments of",
        "each are in the built page, and in `help(mq.load)`.",
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


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a command, what must be given first."""
    actions = [a for a in parser._actions if a.dest != "help" and a.help != argparse.SUPPRESS]
    return sorted(actions, key=lambda action: bool(action.option_strings))


def _shared() -> dict[str, argparse.Action]:
    """What several commands take and mean alike, by its row, in the order of the commands."""
    rows = [(_row(action), action) for p in commands().values() for action in _actions(p)]
    counts = Counter(row for row, _ in rows)
    return {row: action for row, action in rows if counts[row] > 1}


def _name(action: argparse.Action) -> str:
    return ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{_metavar(action)}`"


def _row(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 or not action.option_strings else f" {_metavar(action)}"
    named = ", ".join(map(str, action.choices or ()))
    choices = f" ({named})" if named and named not in (action.help or "") else ""
    needed = " (required)" if action.required and action.option_strings else ""
    what = _field(action.dest) if "." in action.dest else (action.help or "").replace("[", "\\[")
    what = "any field" if action.dest == "overrides" else what
    return f"- `{_name(action).strip('`')}{value}`{choices}{needed}: {what}"


def _field(place: str) -> str:
    """The field that a flag is short for, with a link to what it means."""
    return f"[`{place}`](../fields.md#{place.split('.')[0]})"


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper().replace("_", "-"))


if __name__ == "__main__":
    for name, page in (("cli.md", cli_page()), ("python.md", python_page())):
        (FOLDER / name).write_text(page, encoding="utf-8")
        print(f"wrote {FOLDER / name}")
