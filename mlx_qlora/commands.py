"""What each command does: its arguments become a config, and it returns what `--json` prints."""

import argparse
import dataclasses
import glob
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora.adapters.export import MERGED_GGUF_COMMAND, save_gguf_adapter, save_portable
from mlx_qlora.adapters.merge import Merged, save_merged
from mlx_qlora.adapters.peft import save_adapter, save_mlx_lm
from mlx_qlora.adapters.push import Pushed, push_to_hub
from mlx_qlora.config import RunConfig
from mlx_qlora.distributed import launched, processes
from mlx_qlora.errors import ConfigError, Terminal, UserError, say
from mlx_qlora.folders import (
    ADAPTER_FOLDER,
    MERGED_FOLDER,
    MLX_LM,
    check_writable,
    disk_errors,
    is_merged,
)
from mlx_qlora.loading import with_adapter
from mlx_qlora.model.quantize import QuantConfig

Found = dict[str, Any] | None


# ---- arguments -> config -------------------------------------------------------------------------


def config_of(args: argparse.Namespace) -> RunConfig:
    """The file, then the shorthands, then the overrides; later ones win.

    Raises:
        ConfigError: a field that does not exist, that the command does not read, or a wrong value.
    """
    from mlx_qlora.config import SECTIONS, build, read_yaml, set_override

    words = _assignments(args)
    file = getattr(args, "config", None)
    values: dict[str, dict[str, Any]] = read_yaml(file) if file else {}
    for field in args.about.fields:
        if (value := getattr(args, field, None)) is not None:
            set_override(values, f"{field}={value}")
    read = args.about.sections
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
        can_read = "--data" in args.about.shorthands
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
    from mlx_qlora.loading import recorded

    chosen = values.get("model", {})
    adapter, read = chosen.get("adapter"), args.about.sections
    if args.command in ("train", "sweep") or not isinstance(adapter, str) or chosen.get("source"):
        return values
    told = recorded(adapter)
    merged = {section: {**told.get(section, {}), **values.get(section, {})} for section in told}
    return {**values, **{section: merged[section] for section in merged if section in read}}


# ---- the commands ------------------------------------------------------------


def run_command(args: argparse.Namespace) -> Found:
    """Runs the command that was asked for; returns what it found, for `--json`.

    Raises:
        UserError: any of its kinds.
    """
    about = args.about
    console = Terminal(stderr=about.json and args.json, quiet=about.quiet and args.quiet)
    if launched() and processes().size > 1:
        return _train_together(console, args)
    config = config_of(args)
    if getattr(args, "print_config", False):
        return _print_config(config, args)
    return RUN[args.command](config, console, args)


def _train_together(console: Console, args: argparse.Namespace) -> Found:
    """`train` as one of several processes: those behind the first one talk to a file."""
    from mlx_qlora.run import check_output

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


def _print_config(config: RunConfig, args: argparse.Namespace) -> Found:
    from mlx_qlora.config import to_dict, to_yaml

    if getattr(args, "json", False):
        return to_dict(config)
    print(to_yaml(config), end="")
    return None


# ---- one for each command ----------------------------------------------------------------------
def _train(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.run import dry_run, run

    return dry_run(config, console) if args.dry_run else run(config, console).to_dict()


def _plan(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.before.plan import plan

    if config.model.source is None:
        raise ConfigError("model.source is missing; name a model with --model SOURCE")
    found = plan(config.model.source, config, args.machine, args.processes)
    if not args.json:
        print(found)
    return found.to_dict()


def _inspect(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.before.inspect import inspect_data

    if args.show < 0:
        raise ConfigError(f"--show must be at least 0; got {args.show}")
    return inspect_data(config, console, args.show).to_dict()


def _generate(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.infer.generate import stream
    from mlx_qlora.loading import as_taught, loaded, with_model

    if args.prompt is None and args.instruction is None:
        raise ConfigError("nothing to answer: pass --prompt TEXT, or --instruction TEXT")
    if args.input and args.instruction is None:
        raise ConfigError("--input goes with --instruction")
    if args.prompt == "-":
        args.prompt = _standard_input()
    settings: dict[str, Any] = dataclasses.asdict(config.generation) | {"seed": args.seed}
    config = with_model(config)
    llama, tokenizer = loaded(config)
    config, tokenizer = as_taught(config, tokenizer)
    prompt = _prompt(args, tokenizer.chat_template is not None, config.data.template)
    answer = stream(llama, tokenizer, prompt, **settings)
    text = ""
    for piece in answer:
        text += piece
        if not args.json:
            print(piece, end="", flush=True)
    if not args.json:
        print()
    return {"text": text, **dataclasses.asdict(answer.speed)}


def _chat(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.infer.chat import chat
    from mlx_qlora.loading import model_to_ask

    if sys.stdin is None:
        raise ConfigError(
            "chat reads what you type from standard input, which is closed; run it in a terminal, "
            "or ask one question with mlx-qlora generate"
        )
    model, tokenizer = model_to_ask(config)
    chat(model, tokenizer, console, config.generation, args.system, args.seed)
    return None


def _evaluate(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.after.evaluation import ANSWERS, evaluate_run

    answers = ANSWERS if args.answers is None else args.answers
    evaluation = evaluate_run(config, console, None, args.limit, answers, args.general, args.output)
    return evaluation.to_dict()


def _sweep(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.sweep.search import sweep

    lists = {"learning_rate": args.learning_rates, "r": args.ranks, "batch_size": args.batch_sizes}
    grid = {field: _numbers(field, text) for field, text in lists.items() if text is not None}
    how = {"product": args.product, "repeat_best": args.repeat_best}
    return sweep(config, console, grid or None, args.steps, args.rungs, **how).record


def _merge(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:

    merged = merge_adapter(
        config, args.folder, console, args.base, args.save_dtype, args.requantize
    )
    return dataclasses.asdict(merged)


def _export(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:

    form = args.form or "peft"
    return {"format": form, "path": export_adapter(config, args.folder, console, form)}


def _push(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:

    pushed = push_folder(args.folder, args.repo_id, console, args.public, args.dry_run)
    return dataclasses.asdict(pushed)


def _doctor(config: RunConfig, console: Console, args: argparse.Namespace) -> Found:
    from mlx_qlora.before.doctor import PlannedRun, doctor

    model, checkpointing = config.model, config.checkpointing
    run = PlannedRun(
        model.source,
        model.revision,
        checkpointing.output_dir,
        config.lora,
        checkpointing.save_total_limit,
    )
    findings = doctor(console, run)
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
    from mlx_qlora.data.rows import alpaca_prompt, chat_question

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


RUN: dict[str, Callable[[RunConfig, Console, argparse.Namespace], Found]] = {
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


# ---- merge, export and push ----------------------------------------------------------------------


FORMATS = ("peft", "portable", "mlx", "gguf")


OUTPUT = "--output-dir"


def merge_adapter(
    config: RunConfig,
    folder: str,
    console: Console,
    base: str | None = None,
    dtype: str = "bfloat16",
    bits: int | None = None,
) -> Merged:
    """Writes a model with its adapter folded in, and says what that cost.

    Args:
        config: its model and adapter.
        folder: where the merged model goes.
        console: where it is said.
        base: the original 16-bit weights; those of the model, dequantised, if not given.
        dtype: of the written weights.
        bits: quantise them again, to so many.

    Raises:
        UserError: the model, the adapter or the folder cannot be used.
    """
    quantize = (
        None if bits is None else QuantConfig(bits, config.model.group_size, config.model.mode)
    )
    target = _target(folder)
    check_writable(target, MERGED_FOLDER, OUTPUT, whole=True, is_ours=is_merged)
    model, tokenizer = with_adapter(config)
    with disk_errors(target):
        made = save_merged(model, tokenizer, target, dtype=dtype, base=base, quantize=quantize)
    say(console, f"merged    {made.bytes / 1e9:.2f} GB in {made.folder}")
    if made.drift is not None:
        say(console, str(made.drift))
    else:
        command = MERGED_GGUF_COMMAND.replace("MERGED_FOLDER", shlex.quote(str(made.folder)))
        say(console, f"for llama.cpp: {command}")
    return made


def export_adapter(config: RunConfig, folder: str, console: Console, form: str = "peft") -> Path:
    """Writes an adapter in another format.

    Args:
        config: its model and adapter.
        folder: where it goes.
        console: where it is said.
        form: `peft` (with `mlx/`), `portable`, `mlx` or `gguf`; see `mlx_qlora.adapters`.

    Raises:
        UserError: the adapter cannot be used, or has no such form.
    """
    target = _target(folder)
    names = {"peft": ADAPTER_FOLDER, "portable": ADAPTER_FOLDER, "mlx": MLX_LM, "gguf": ()}[form]
    check_writable(target, names, OUTPUT, whole=form == "portable")
    model, _ = with_adapter(config)
    original = config.model.base_model_name_or_path
    with disk_errors(target):
        if form == "gguf":
            made = save_gguf_adapter(model, target / "adapter.gguf", original)
        elif form == "mlx":
            made = save_mlx_lm(model, target)
        elif form == "portable":
            made = save_portable(model, target, original)
        else:
            made = save_adapter(model, target, original)
    say(console, f"exported  {made}")
    return made


def _target(folder: str) -> Path:
    if not folder:
        raise ConfigError(f"{OUTPUT} must name a folder; got nothing")
    return Path(folder).expanduser()


def push_folder(
    folder: str, repo_id: str, console: Console, public: bool = False, dry_run: bool = False
) -> Pushed:
    """Uploads an adapter or a merged model to the hub, or lists what would be.

    Args:
        folder: of a run, of an export, or of a merged model.
        repo_id: owner/name.
        console: where the files are listed.
        public: whether everybody may read it.
        dry_run: only list.

    Raises:
        UserError: there is nothing to upload, or the hub refuses it.
    """
    pushed = push_to_hub(folder, repo_id, private=not public, dry_run=dry_run)
    for path, size in pushed.files:
        say(console, f"{size / 1e6:10.2f} MB  {path}")
    say(console, f"would go to {repo_id}" if pushed.url is None else f"pushed    {pushed.url}")
    return pushed
