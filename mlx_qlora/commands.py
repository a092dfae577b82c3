"""What each command does: its arguments become a config, and it returns what `--json` prints."""

import argparse
import errno
import glob
import io
import os
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mlx_qlora import exports
from mlx_qlora.after.screen import shown
from mlx_qlora.config import (
    READ_BY,
    SECTIONS,
    RunConfig,
    build,
    read_yaml,
    set_override,
    to_dict,
    to_yaml,
)
from mlx_qlora.config import unused as unused_fields
from mlx_qlora.distributed import launched, processes
from mlx_qlora.errors import (
    AdapterWarning,
    ConfigError,
    DataError,
    UserError,
    require,
    say,
    size,
    waiting,
    warn,
    write_out,
)
from mlx_qlora.folders import CARD, is_merged, moved_into, remove, user_cache, user_path
from mlx_qlora.loading import form_of_rows, model_to_ask, recorded
from mlx_qlora.names import preset, whose
from mlx_qlora.readers import json_value, parse_json
from mlx_qlora.train.checkpoint import last_checkpoint
from mlx_qlora.train.signals import Stopped

if TYPE_CHECKING:
    from mlx_qlora.before.plan import Plan
    from mlx_qlora.data.rows import Message
    from mlx_qlora.run import Inputs

JsonObject = dict[str, Any] | None
OF_ROWS = ("seed", "objective", *READ_BY)  # fields of training that say how rows are read
RUN_LENGTH = "max_steps", "num_train_epochs"  # exclude each other
# Fields that a plan reads only if it has rows, besides those of `data`; and those it always reads.
OF_RUNS = *RUN_LENGTH, "warmup_ratio", "warmup_steps", "seed", "eval_steps"
ANY = "max_length", "train_on"


class Terminal(Console):
    """Rich's console, which would end the program with 1 where nobody reads what it prints."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command line."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads what is printed")


# ---- arguments -> config -------------------------------------------------------------------------


def config_of(args: argparse.Namespace, notes: list[str] | None = None) -> RunConfig:
    """Build the config: the file, then the flags, then the overrides; later ones win.

    A preset fills in what none of them says. The messages about names are appended to `notes`.
    """
    notes, words = [] if notes is None else notes, list[str]()
    try:
        file, assignments = getattr(args, "config", None), _assignments(args)
        values: dict[str, Any] = read_yaml(file, notes, words) if file else {}
        typed: dict[str, Any] = {}
        for assignment in assignments:
            set_override(typed, assignment, notes)
        _refuse_unread(args, typed)
        for one, other in (RUN_LENGTH, RUN_LENGTH[::-1]):
            given = typed.get("training", {})
            if one in given and other not in given and values.get("training", {}).pop(other, None):
                notes.append(f"training.{one} replaces training.{other} of {file}")
        values = {s: values.get(s, {}) | typed.get(s, {}) for s in (*values, *typed)}
        if getattr(args, "preset", None):
            fields, note = preset(args.preset, {f"{s}.{k}" for s in values for k in values[s]})
            notes.append(note)
            for field in fields:
                set_override(values, field)
        return build(_with_record(args, values))
    except ConfigError as error:
        raise ConfigError(f"{error}{whose(words)}") from None


def _refuse_unread(args: argparse.Namespace, typed: dict[str, Any]) -> None:
    """Raise a ConfigError for a field that could change nothing of what the command does."""
    for section in (name for name in typed if name in SECTIONS):
        read, known = args.about.fields(section), SECTIONS[section].__dataclass_fields__
        others = ", ".join(f"{section}.{name}" for name in read)
        others = others or f"fields of {', '.join(args.about.reads)}"
        for name in (name for name in typed[section] if name in known and name not in read):
            place = f"{section}.{name}={typed[section][name]}{args.about.flag(f'{section}.{name}')}"
            unread = f"{place}: {args.command} does not read it"
            raise ConfigError(f"{unread}; it reads {others}; leave it out")


def _assignments(args: argparse.Namespace) -> list[str]:
    """The words of a command that are not flags; `inspect` takes one of them for its FILE."""
    words, takes_file = [*args.overrides], hasattr(args, "file")
    if takes_file and args.file is not None:  # argparse has it from anywhere among the words
        words.insert(len(getattr(args, "named", ())), args.file)
    if cut := [word for word in words if word.count("{") > word.count("}")]:
        name = cut[0].partition("=")[0]
        raise ConfigError(f"{cut[0]!r} ends within braces; put quotes around it: {name}='{{...}}'")
    files = [word for word in words if "=" not in word or (takes_file and _is_path(word))]
    if files and not takes_file:
        can_read = "--data" in args.about.shorthands
        hint = f"; for a file of rows pass --data {files[0]}" if can_read else ""
        raise ConfigError(f"expected section.field=value; got {files[0]!r}{hint}")
    named = [word.partition("=")[2] for word in words if word.startswith("data.path=")]
    if files and len(sources := [*files, *named]) > 1:
        raise ConfigError(f"inspect reads one source of rows; got {' and '.join(sources)}")
    return [*(f"data.path={file}" for file in files), *(w for w in words if w not in files)]


def _is_path(word: str) -> bool:
    """Whether a word with an equals sign is a file (lang=en/rows.jsonl), not a field."""
    if re.match(r"\w+\.\w+=", word):
        return False
    path = os.path.expanduser(word)
    return "/" in word.partition("=")[0] or os.path.exists(path) or bool(glob.glob(path))


def _with_record(args: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """Fill unset fields by an adapter's record: it is used with its own model, as trained."""
    chosen = values.get("model", {})
    adapter, read, source = chosen.get("adapter"), args.about.reads, chosen.get("source")
    if args.command in ("generate", "chat", "evaluate") and isinstance(source, str) and not adapter:
        if is_merged(user_path(source) / CARD):  # all that was learned is in its full precision
            return values | {"model": {"bits": None} | chosen}
    if args.command in ("train", "plan", "inspect") and isinstance(adapter, str):
        if not values.get("data", {}).get("path"):
            return _with_rows(values, recorded(adapter, "data", "training"))
    if args.command in ("train", "sweep") or not isinstance(adapter, str) or source:
        return values
    record = recorded(adapter, *{"model", "generation"}.intersection(read))
    return values | {name: fields | values.get(name, {}) for name, fields in record.items()}


def _with_rows(values: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The rows of an adapter's run, divided and compared as there; what is typed counts."""
    if not record.get("data", {}).get("path"):
        return values
    rows = record["data"] | {"refused_path": None}
    training = {k: v for k, v in record.get("training", {}).items() if k in OF_ROWS}
    data, asked = values.get("data", {}), values.get("training", {})
    return values | {"data": rows | data, "training": training | asked}


# ---- a command runs ------------------------------------------------------------------------------


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show what is said of an adapter as all warnings are, beside what a command prints."""
    standard: Any = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, AdapterWarning):
            standard(message, category, *where)
        elif not launched() or processes().is_first:
            warn(Terminal(stderr=True), str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default", AdapterWarning)
        warnings.showwarning = show
        yield


@_warnings_in_a_line()
def run_command(args: argparse.Namespace) -> JsonObject:
    """Run the command that was asked for; return what `--json` prints."""
    about = args.about
    console = Terminal(stderr=about.json and args.json, quiet=about.quiet and args.quiet)
    if launched() and processes().size > 1:
        return _train_together(console, args)
    config = config_of(args, notes := [])
    if getattr(args, "print_config", False):
        if about.json and args.json:
            return to_dict(config)
        write_out("".join(f"# {note}\n" for note in notes) + to_yaml(config), end="")
        return None
    for note in notes:  # beside what the command prints, which may be an answer
        say(Terminal(stderr=True, quiet=console.quiet), f"note      {note}")
    moved_into.clear()
    try:
        with shown(console):
            return RUN[args.command](config, console, args)
    except KeyboardInterrupt as stop:
        _say_what_is_kept(stop, config, args)
        raise


def _say_what_is_kept(stop: KeyboardInterrupt, config: RunConfig, args: argparse.Namespace) -> None:
    """Let a signal say what there is of a command that writes, unless it does so already."""
    files = "nothing was written; what was there is as it was"
    if new := [folder for folder in moved_into if not folder.is_relative_to(user_cache())]:
        files = f"new files are in {new[-1]}; the same command completes them"
    kept = {
        "train": last_checkpoint(Path(config.checkpointing.output_dir)),
        "sweep": "what its trials have saved is kept, and the same command continues from it",
        "push": "nothing of it is in the repository unless all is; the same command continues",
        **dict.fromkeys(("merge", "export"), files),
    }
    if args.command in kept and not stop.args and processes().is_first:
        signum = getattr(stop, "signum", signal.SIGINT)
        stop.args = Stopped(signum, kept[args.command]).args


def _train_together(console: Console, args: argparse.Namespace) -> JsonObject:
    """`train` as one of several processes: all but the first print to a file."""
    from mlx_qlora.run import check_output

    if args.command != "train" or args.dry_run or args.print_config:
        extra = "--dry-run" if getattr(args, "dry_run", False) else "--print-config"
        what = f"train {extra}" if args.command == "train" else args.command
        error = ConfigError(f"{what} runs in one process; start it without mlx.launch")
        error.is_shared = True
        raise error
    everyone = processes()
    config = everyone.agree(lambda: config_of(args))
    output = Path(config.checkpointing.output_dir)
    everyone.agree(lambda: check_output(output) if everyone.is_first else None)
    console = everyone.agree(lambda: everyone.console(output, console))
    try:
        result = _train(config, console, args)
    except UserError as error:
        if not everyone.is_first:
            say(console, str(error))
        raise
    return result if everyone.is_first else None


# ---- one for each command ----------------------------------------------------------------------
def _train(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.before.inspect import dry_run
    from mlx_qlora.run import run

    if args.dry_run:  # the file of refused rows is the run's to write
        config = replace(config, data=replace(config.data, refused_path=None))
    inputs, plan = processes().agree(lambda: open_with_plan(config, console))
    if args.dry_run:
        return dry_run(inputs, plan, console)
    return run(inputs, console, plan).to_dict()


def open_with_plan(config: RunConfig, console: Console) -> "tuple[Inputs, Plan]":
    """Open the inputs of a run, and print what they are and what the run will need."""
    from mlx_qlora.before.plan import plan_inputs
    from mlx_qlora.run import open_inputs

    inputs = open_inputs(config, console)
    plan, config = plan_inputs(inputs), inputs.config
    say(console, f"plan\n{textwrap.indent(str(plan), ' ' * 10)}")
    model = config.model
    if model.residency == "auto" and plan.residency == "streamed":
        say(console, "streamed  weights from the disk, as the run would not fit into memory")
        way = "auto" if model.frozen_matmul == "resident" else model.frozen_matmul
        model = replace(model, residency="streamed", frozen_matmul=way)
        inputs = replace(inputs, config=replace(config, model=model))
    return inputs, plan


def _plan(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.before.plan import plan, plan_inputs
    from mlx_qlora.run import open_inputs, source_of

    where = args.machine, args.processes
    prediction = plan(source_of(config), config, *where)
    if config.data.path is not None:
        config = replace(config, data=replace(config.data, refused_path=None))  # it is the run's
        try:
            inputs = open_inputs(config, console, writes=False, weights=False)
        except DataError as error:
            raise DataError(f"{error}; data.path=null plans without rows") from None
        prediction = plan_inputs(replace(inputs, config=config), *where)
    else:
        fields = ((s, name) for s in args.about.reads for name in args.about.fields(s))
        of_rows = [f"{s}.{n}" for s, n in fields if (s == "data" or n in OF_RUNS) and n not in ANY]
        for line in unused_fields(config, dict.fromkeys(of_rows, "there are no rows; pass --data")):
            warn(console, line)
    if not args.json:
        write_out(str(prediction))
    return prediction.to_dict()


def _inspect(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.before.inspect import inspect_data

    require(args.show >= 0, "--show", "be at least 0", args.show)
    return inspect_data(config, console, args.show, args.html)


def _generate(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.data.chats import NAMED
    from mlx_qlora.infer.generate import stream

    if args.prompt is None and args.instruction is None:
        raise ConfigError("nothing to answer; pass --prompt TEXT, or --instruction TEXT")
    if args.input and args.instruction is None:
        raise ConfigError("--input needs --instruction")
    if args.prompt == "-":
        args.prompt = _standard_input()
    settings: dict[str, Any] = asdict(config.generation) | {"seed": args.seed}
    written = args.instruction is None and config.data.template in NAMED
    raw = "--raw gives the model the prompt alone" * (args.raw and bool(args.prompt))
    reasons = {
        "data.template": "it is how an --instruction is written" * written or raw,
        "data.system": raw,
    }
    for line in unused_fields(config, reasons):
        warn(Terminal(stderr=True), line)
    config, model, tokenizer = model_to_ask(config)
    prompt = _prompt(args, tokenizer.chat_template is not None, config)
    answer = stream(model, tokenizer, prompt, **settings)
    text = ""
    for piece in answer:
        text += piece
        if not args.json:
            write_out(piece, end="")
    if not args.json:
        print()
    return {"text": text, **asdict(answer.speed)}


def _chat(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.data.chats import ALPACA
    from mlx_qlora.infer.chat import chat

    if sys.stdin is None:
        raise ConfigError(
            "chat reads what you type from standard input, which is closed; run it in a terminal, "
            "or ask one question with mlx-qlora generate"
        )
    as_text = "a chat is written by the chat template" * (config.data.template in ALPACA)
    for line in unused_fields(config, {"data.template": as_text}):
        warn(console, line)
    config, model, tokenizer = model_to_ask(config)
    system = config.data.system if args.system is None else args.system
    read = input if sys.stdin.isatty() else lambda _: input()  # a pipe is not asked for a line
    chat(model, tokenizer, console, config.generation, system, args.seed, read)
    return None


def _evaluate(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.after.evaluation import ANSWERS, evaluate_run

    answers = ANSWERS if args.answers is None else args.answers
    return evaluate_run(config, console, args.limit, answers, args.general, args.output)


def _sweep(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.sweep.search import sweep

    lists = {"learning_rate": args.learning_rates, "r": args.ranks, "batch_size": args.batch_sizes}
    grid: dict[str, list[Any]] = {}
    for field, text in lists.items():
        kind = float if field == "learning_rate" else int
        try:
            grid |= {field: [kind(part) for part in text.split(",")]} if text is not None else {}
        except ValueError:
            raise ConfigError(f"{field} must be numbers between commas; got {text!r}") from None
    how = {"product": args.product, "repeat_best": args.repeat_best}
    return sweep(config, console, grid or None, args.steps, args.rungs, **how).record


def _doctor(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    from mlx_qlora.before.doctor import PlannedRun, doctor

    if args.report is not None and not args.self_test:
        raise ConfigError("--report needs --self-test")
    if args.self_test or args.tune:
        from mlx_qlora.before.self_test import PARTS, self_test

        parts = PARTS if args.self_test else PARTS[-1:]
        how: dict[str, Any] = {"parts": parts, "config": config, "keep": args.tune}
        return self_test(report=args.report, console=console, **how)
    findings = doctor(console, PlannedRun(config))
    fine = all(finding.state != "error" for finding in findings)
    return {"ok": fine, "findings": [asdict(finding) for finding in findings]}


def _prompt(args: argparse.Namespace, can_chat: bool, config: RunConfig) -> "str | list[Message]":
    """The question in the form that the model was taught."""
    from mlx_qlora.data.chats import ALPACA, alpaca_prompt
    from mlx_qlora.data.rows import chat_question, system_message

    if args.instruction is None and (args.raw or not can_chat):
        return args.prompt
    question, data = args.prompt, config.data
    if args.instruction is not None:
        asked = args.instruction, args.input or ""
        of_chats = can_chat and form_of_rows(config) in ("messages", "sharegpt")
        if data.template in ALPACA or (data.template == "auto" and not (data.system or of_chats)):
            return alpaca_prompt(*asked, data.template == ALPACA[1])
        question = chat_question(*asked)
    return [*system_message(data.system), {"role": "user", "content": question}]


def _standard_input() -> str:
    """All of it; a ConfigError if it is closed, or no text."""
    if sys.stdin is None:
        raise ConfigError("--prompt - reads standard input, which is closed; pass --prompt TEXT")
    try:
        # Not as text: in a C locale Python would take any bytes for it.
        with waiting("the prompt from standard input, whose end is Ctrl-D"):
            text = io.TextIOWrapper(sys.stdin.buffer, sys.stdin.encoding, errors="strict")
            return text.read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--prompt -: standard input is not {error.encoding} at byte {error.start}"
        ) from None


def _cache(config: RunConfig, console: Console, args: argparse.Namespace) -> JsonObject:
    entries: list[dict[str, Any]] = []
    for kind in ("tokens", "weights"):  # of rows, and packed to be streamed
        for folder in sorted((user_cache() / kind).glob("*")):
            sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
            about = json_value(folder / "about.json")
            with suppress(KeyError, TypeError, ValueError):  # of tokens it is text with a checksum
                about = dict(parse_json(about["about"]))
            of = about.get("source", folder.name)
            entries.append({"kind": kind, "folder": folder, "of": of, "bytes": sum(sizes)})
            say(console, f"{size(sum(sizes)):>13}  {kind:<9}{of}")
            if args.clear:
                remove(folder)
    total, done = sum(entry["bytes"] for entry in entries), "removed from" if args.clear else "in"
    say(console, f"cache     {size(total)} {done} {user_cache()}")
    return {"entries": entries, "bytes": total, "cleared": args.clear}


RUN: dict[str, Callable[[RunConfig, Console, argparse.Namespace], JsonObject]] = {
    "train": _train,
    "plan": _plan,
    "inspect": _inspect,
    "generate": _generate,
    "chat": _chat,
    "evaluate": _evaluate,
    "sweep": _sweep,
    "merge": exports.merge,
    "export": exports.export,
    "push": exports.push,
    "doctor": _doctor,
    "cache": _cache,
}
