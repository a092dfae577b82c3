"""What each command of the command line does; `arguments` says what it can be told.

Each takes the parsed arguments and a console, and returns what `--json` prints.
"""

import argparse
import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mlx_qlora.arguments import COMMANDS, completion_script
from mlx_qlora.console import Terminal, say
from mlx_qlora.errors import ConfigError, UserError
from mlx_qlora.processes import launched, processes
from mlx_qlora.typed import config_of

if TYPE_CHECKING:
    from mlx_qlora.config import RunConfig

Found = dict[str, Any] | None


def run_command(args: argparse.Namespace) -> Found:
    """Runs the command that was asked for; returns what it found, for `--json`.

    Raises:
        UserError: any of its kinds.
    """
    about = COMMANDS[args.command]
    if args.command == "completion":
        print(completion_script(args.shell), end="")
        return None
    console = Terminal(stderr=about.json and args.json, quiet=about.quiet and args.quiet)
    if launched() and processes().size > 1:
        return _train_together(console, args)
    config = config_of(args)
    if getattr(args, "print_config", False):
        return _print_config(config, args)
    return RUN[args.command](config, console, args)


def _train_together(console: Console, args: argparse.Namespace) -> Found:
    """`train` as one of several processes: those behind the first one talk to a file."""
    from mlx_qlora.opening import check_output

    if args.command != "train" or args.dry_run or args.print_config:
        extra = "--dry-run" if getattr(args, "dry_run", False) else "--print-config"
        what = f"train {extra}" if args.command == "train" else args.command
        error = ConfigError(f"{what} runs in one process; only train runs in several")
        error.is_shared = True
        raise error
    everyone = processes()
    config = everyone.agree(lambda: config_of(args))
    output = Path(config.checkpointing.output_dir)
    everyone.agree(lambda: check_output(output) if everyone.is_first else None)
    console = everyone.agree(lambda: everyone.console(output, console))
    try:
        found = _train(config, console, args)
    except UserError as error:
        if not everyone.is_first:
            say(console, str(error))
        raise
    return found if everyone.is_first else None


def _print_config(config: "RunConfig", args: argparse.Namespace) -> Found:
    from mlx_qlora.config import to_dict, to_yaml

    if getattr(args, "json", False):
        return to_dict(config)
    print(to_yaml(config), end="")
    return None


# ---- one for each command ----------------------------------------------------------------------


def _train(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.dry_run import dry_run
    from mlx_qlora.run import run

    return dry_run(config, console) if args.dry_run else run(config, console).to_dict()


def _plan(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.planner import plan

    if config.model.source is None:
        raise ConfigError("model.source is missing; name a model with --model SOURCE")
    found = plan(config.model.source, config, args.machine, args.processes)
    if not args.json:
        print(found)
    return found.to_dict()


def _inspect(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.inspection import inspect_data

    if args.show < 0:
        raise ConfigError(f"--show must be at least 0; got {args.show}")
    return inspect_data(config, console, args.show).to_dict()


def _generate(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.delivery import as_taught, loaded, with_model
    from mlx_qlora.infer.generate import stream

    if args.prompt is None and args.instruction is None:
        raise ConfigError("nothing to answer: pass --prompt TEXT, or --instruction TEXT")
    if args.input and args.instruction is None:
        raise ConfigError("--input goes with --instruction")
    if args.prompt == "-":
        args.prompt = _standard_input()
    how = config.generation
    config = with_model(config)
    llama, tokenizer = loaded(config)
    config, tokenizer = as_taught(config, tokenizer)
    template = config.data.template
    made = stream(
        llama,
        tokenizer,
        _prompt(args, tokenizer.chat_template is not None, template),
        how.max_new_tokens,
        how.temperature,
        how.top_p,
        how.top_k,
        how.repetition_penalty,
        args.seed,
    )
    text = ""
    for piece in made:
        text += piece
        if not args.json:
            print(piece, end="", flush=True)
    if not args.json:
        print()
    return {"text": text, **dataclasses.asdict(made.speed)}


def _chat(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.delivery import model_to_ask
    from mlx_qlora.infer.chat import chat

    if sys.stdin is None:
        raise ConfigError(
            "chat reads what you type from standard input, which is closed; run it in a terminal, "
            "or ask one question with mlx-qlora generate"
        )
    model, tokenizer = model_to_ask(config)
    chat(model, tokenizer, console, config.generation, args.system, args.seed)
    return None


def _evaluate(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.judging import ANSWERS, evaluate_run

    answers = ANSWERS if args.answers is None else args.answers
    judged = evaluate_run(config, console, None, args.limit, answers, args.general, args.output)
    return judged.to_dict()


def _sweep(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.sweep.search import sweep

    lists = {"learning_rate": args.learning_rates, "r": args.ranks, "batch_size": args.batch_sizes}
    grid = {field: _numbers(field, text) for field, text in lists.items() if text is not None}
    how = {"product": args.product, "repeat_best": args.repeat_best}
    return sweep(config, console, grid or None, args.steps, args.rungs, **how).record


def _merge(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.delivery import merge_adapter

    merged = merge_adapter(
        config, args.folder, console, args.base, args.save_dtype, args.requantize
    )
    return dataclasses.asdict(merged)


def _export(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.delivery import export_adapter

    form = args.form or "peft"
    return {"format": form, "path": export_adapter(config, args.folder, console, form)}


def _push(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.delivery import push_folder

    pushed = push_folder(args.folder, args.repo_id, console, args.public, args.dry_run)
    return dataclasses.asdict(pushed)


def _doctor(config: "RunConfig", console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.doctor import doctor

    model, checkpointing = config.model, config.checkpointing
    findings = doctor(
        console,
        model.source,
        model.revision,
        checkpointing.output_dir,
        config.lora,
        checkpointing.save_total_limit,
    )
    fine = all(finding.state != "error" for finding in findings)
    return {"ok": fine, "findings": [dataclasses.asdict(finding) for finding in findings]}


def _numbers(field: str, text: str) -> list[Any]:
    """The numbers of a list such as 8,16."""
    kind = float if field == "learning_rate" else int
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{field} must be numbers with commas between; got {text!r}") from None


def _prompt(args: argparse.Namespace, can_chat: bool, template: str) -> str | list[dict[str, str]]:
    """The question in the form that the model was taught."""
    from mlx_qlora.data.template import alpaca_prompt, chat_question

    if args.instruction is not None:
        if template in ("auto", "alpaca"):
            return alpaca_prompt(args.instruction, args.input or "")
        question = chat_question(args.instruction, args.input or "")
        return [{"role": "user", "content": question}]
    talks = can_chat and not args.raw
    return [{"role": "user", "content": args.prompt}] if talks else args.prompt


def _standard_input() -> str:
    """All of it.

    Raises:
        ConfigError: it is closed, or no text.
    """
    if sys.stdin is None:
        raise ConfigError("--prompt - reads standard input, which is closed; pass --prompt TEXT")
    try:
        # Not as text: in a C locale Python would take any bytes for it.
        return io.TextIOWrapper(sys.stdin.buffer, sys.stdin.encoding, errors="strict").read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--prompt -: standard input is no {error.encoding} at byte {error.start}; convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from None


RUN: dict[str, Callable[["RunConfig", Console, argparse.Namespace], Found]] = {
    "train": _train,
    "plan": _plan,
    "inspect": _inspect,
    "generate": _generate,
    "chat": _chat,
    "evaluate": _evaluate,
    "sweep": _sweep,
    "merge": _merge,
    "export": _export,
    "push": _push,
    "doctor": _doctor,
}
