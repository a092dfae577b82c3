"""The command line: the only place that parses arguments, prints errors and exits.

Every option but a handful of shorthands is a config field, made from its one declaration.
"""

import argparse
import dataclasses
import re
import signal
import sys
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_qlora._version import __version__
from mlx_qlora.errors import ConfigError, UserError

if TYPE_CHECKING:
    from mlx_qlora.config import RunConfig

# flag -> (field, what its value is called; None for a flag that says true)
SHORTHANDS = {
    "--model": ("model.source", "SOURCE"),
    "--adapter": ("model.adapter", "DIR"),
    "--data": ("data.path", "FILE"),
    "--output-dir": ("checkpointing.output_dir", "DIR"),
    "--max-steps": ("training.max_steps", "N"),
    "--batch-size": ("training.per_device_train_batch_size", "N"),
    "--learning-rate": ("training.learning_rate", "RATE"),
    "--max-length": ("data.max_length", "N"),
    "--strict": ("data.strict", None),
    "--refused": ("data.refused_path", "FILE"),
}
OF_COMMAND = {
    "train": tuple(SHORTHANDS),
    "plan": ("--model", "--batch-size", "--max-length"),
    "inspect": ("--model", "--data", "--max-length", "--strict", "--refused"),
    "generate": ("--model", "--adapter"),
    "chat": ("--model", "--adapter"),
    "evaluate": ("--model", "--adapter", "--data", "--max-length"),
    "sweep": tuple(flag for flag in SHORTHANDS if flag not in ("--learning-rate", "--adapter")),
    "merge": ("--model", "--adapter"),
    "export": ("--model", "--adapter"),
    "push": (),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 2 the user's input is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # argparse stops collecting section.field=value at the first flag that follows one.
    args, late = parser.parse_known_args(argv)
    if unknown := [word for word in late if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides += late
    try:
        return args.run(args)
    except UserError as error:
        print(f"mlx-qlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if str(stop):  # a run that saved what it had says so
            print(f"mlx-qlora: {stop}", file=sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)


def train_main() -> int:
    """`python -m mlx_qlora.train ...` is `mlx-qlora train ...`."""
    return main(["train", *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-qlora", description="Fine-tune Llama models with QLoRA, in pure MLX."
    )
    parser.add_argument("--version", action="version", version=f"mlx-qlora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help in (
        ("train", _train, "fine-tune a model and leave a PEFT adapter"),
        ("plan", _plan, "predict the memory and the speed of a run"),
        ("inspect", _inspect, "read data as a run would, and say what would be trained"),
        ("generate", _generate, "let a model, with or without an adapter, continue a prompt"),
        ("chat", _chat, "talk to a model, with its adapter or without"),
        ("evaluate", _evaluate, "score a model on rows, and its adapter against the base"),
        ("sweep", _sweep, "find a learning rate, a rank and a batch size by short runs"),
        ("merge", _merge, "fold an adapter into its model's weights, as a folder any tool opens"),
        ("export", _export, "write an adapter in another format"),
        ("push", _push, "upload an adapter or a merged model to the Hugging Face hub"),
    ):
        command = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=_fields_help(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--config", metavar="FILE", help="YAML with the fields below")
        for flag in OF_COMMAND[name]:
            field, value = SHORTHANDS[flag]
            how: dict[str, Any] = {"metavar": value, "help": f"short for {field}="}
            if value is None:
                how = {"action": "store_const", "const": "true", "help": f"short for {field}=true"}
            command.add_argument(flag, dest=field, **how)
        _add_own_arguments(name, command)
        command.add_argument(
            "overrides", nargs="*", metavar="section.field=value", help="any field below"
        )
        command.add_argument(
            "--print-config", action="store_true", help="print the resolved YAML and stop"
        )
    return parser


def _add_own_arguments(name: str, command: argparse.ArgumentParser) -> None:
    """What a command is told besides fields."""
    add = command.add_argument
    if name == "inspect":
        add("file", nargs="?", metavar="FILE", help="the rows; the same as --data")
        show = "print N rows as the model sees them"
        add("--show", type=int, default=0, metavar="N", help=show)
    if name == "plan":
        add("--machine", metavar="CHIP-GB", help="plan for another machine, like m4-max-64")
    if name == "generate":
        ask = command.add_mutually_exclusive_group()
        ask.add_argument("--prompt", metavar="TEXT", help="what to answer; - is standard input")
        asked = "asked as instruction rows are in training"
        ask.add_argument("--instruction", metavar="TEXT", help=asked)
        add("--input", metavar="TEXT", help="goes with --instruction")
        add("--raw", action="store_true", help="do not use the chat template")
        add("--seed", type=int, help="the same seed gives the same text")
    if name == "chat":
        add("--system", metavar="TEXT", help="what the model is told first")
        add("--seed", type=int, help="the same seed gives the same answers")
    if name == "evaluate":
        add("--limit", type=int, metavar="N", help="score N rows, drawn by training.seed")
        asked = "let the models answer N questions (default 32); 0 asks none"
        add("--answers", type=int, metavar="N", help=asked)
        add("--general", metavar="FILE", help="text to look for what was forgotten on")
        add("--output", metavar="FILE", help="JSON of everything")
    if name == "sweep":
        for flag, what in (("learning-rates", "1e-4,2e-4,5e-4"), ("ranks", "8,16,32")):
            add(f"--{flag}", metavar="LIST", help=f"to try, such as {what}")
        add("--batch-sizes", metavar="LIST", help="rows of a step to try, such as 8,16")
        add("--steps", type=int, metavar="N", help="full budget of a trial")
        halved = "how often the worse half is given up (default 3)"
        add("--rungs", type=int, default=3, metavar="N", help=halved)
        add("--product", action="store_true", help="all combinations, not field after field")
        add("--repeat-best", action="store_true", help="the winner with another seed, too")
    if name in ("merge", "export"):
        add("--output-dir", dest="folder", required=True, metavar="DIR", help="where it goes")
    if name == "merge":
        original = "original 16-bit weights to merge into, instead of the dequantised ones"
        add("--base", metavar="SOURCE", help=original)
        kinds = ("bfloat16", "float16", "float32")
        add("--save-dtype", default="bfloat16", choices=kinds, help="of the written weights")
        again = "quantise the result, and report what that loses"
        add("--requantize", type=int, metavar="BITS", help=again)
    if name == "export":
        form = command.add_mutually_exclusive_group()
        for flag, meaning in (
            ("portable", "one rank and scale 1, for tools that ignore rsLoRA and patterns"),
            ("mlx", "for mlx-lm"),
            ("gguf", "for llama.cpp and Ollama, with a Modelfile"),
        ):
            form.add_argument(
                f"--{flag}", dest="form", action="store_const", const=flag, help=meaning
            )
    if name == "push":
        add("folder", metavar="FOLDER", help="of a run, an export or a merged model")
        add("repo_id", metavar="OWNER/NAME", help="repository on the hub; made if need be")
        add("--public", action="store_true", help="let everybody read it")
        add("--dry-run", action="store_true", help="list the files, upload nothing")


def _fields_help() -> str:
    """Every field with its type, default and one line, by section."""
    from mlx_qlora.config import SECTIONS, type_name

    lines = []
    for section, config in SECTIONS.items():
        hints = typing.get_type_hints(config)
        lines += ["", f"{section}:"]
        for field in dataclasses.fields(config):
            default = getattr(config(), field.name)
            choices = field.metadata["choices"]
            kind = " | ".join(map(str, choices)) if choices else type_name(hints[field.name])
            shown = "null" if default is None else str(default)
            lines.append(f"  {section}.{field.name}  ({kind}; default {shown})")
            lines.append(f"      {field.metadata['help']}")
    return "fields:" + "\n".join(lines)


def _config(args: argparse.Namespace) -> "RunConfig":
    """The file, then the shorthands, then the overrides; later ones win."""
    from mlx_qlora.config import build, read_yaml, set_override

    values: dict[str, dict[str, Any]] = read_yaml(args.config) if args.config else {}
    for field, _ in SHORTHANDS.values():
        if (value := getattr(args, field, None)) is not None:
            set_override(values, f"{field}={value}")
    for assignment in args.overrides:
        set_override(values, assignment)
    return build(values)


def _train(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.run import run

    run(config, Console())
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from mlx_qlora.planner import plan

    print(plan(_source(config), config, args.machine))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    if args.file is not None and re.match(
        r"\w+\.\w+=", args.file
    ):  # argparse gives the first word to FILE
        args.overrides, args.file = [args.file, *args.overrides], None
    if args.file is not None:
        args.overrides = [f"data.path={args.file}", *args.overrides]
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.inspection import inspect_data

    if args.show < 0:
        raise ConfigError(f"--show must be at least 0; got {args.show}")
    inspect_data(config, Console(), args.show)
    return 0


def _generate(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from mlx_qlora.delivery import as_taught, loaded, with_model
    from mlx_qlora.infer.generate import generate

    if args.prompt is None and args.instruction is None:
        raise ConfigError("nothing to answer: pass --prompt TEXT, or --instruction TEXT")
    if args.input and args.instruction is None:
        raise ConfigError("--input goes with --instruction")
    how = config.generation
    config = with_model(config)
    llama, tokenizer = loaded(config)
    config, tokenizer = as_taught(config, tokenizer)
    template = config.data.template
    answer = generate(
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
    print(answer)
    return 0


def _chat(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.delivery import model_to_ask
    from mlx_qlora.infer.chat import chat

    model, tokenizer = model_to_ask(config)
    chat(model, tokenizer, Console(), config.generation, args.system, args.seed)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.judging import ANSWERS, evaluate_run

    answers = ANSWERS if args.answers is None else args.answers
    evaluate_run(config, Console(), None, args.limit, answers, args.general, args.output)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.sweep.search import sweep

    lists = {"learning_rate": args.learning_rates, "r": args.ranks, "batch_size": args.batch_sizes}
    grid = {field: _numbers(field, text) for field, text in lists.items() if text is not None}
    how = {"product": args.product, "repeat_best": args.repeat_best}
    sweep(config, Console(), grid or None, args.steps, args.rungs, **how)
    return 0


def _numbers(field: str, text: str) -> list[Any]:
    """The numbers of a list such as 8,16."""
    kind = float if field == "learning_rate" else int
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{field} must be numbers with commas between; got {text!r}") from None


def _merge(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.delivery import merge_adapter

    console, bits = Console(), args.requantize
    merge_adapter(config, args.folder, console, args.base, args.save_dtype, bits)
    return 0


def _export(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.delivery import export_adapter

    export_adapter(config, args.folder, Console(), args.form or "peft")
    return 0


def _push(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.print_config:
        return _print_config(config)
    from rich.console import Console

    from mlx_qlora.delivery import push_folder

    push_folder(args.folder, args.repo_id, Console(), args.public, args.dry_run)
    return 0


def _prompt(args: argparse.Namespace, can_chat: bool, template: str) -> str | list[dict[str, str]]:
    """The question in the form that the model was taught."""
    from mlx_qlora.data.template import alpaca_prompt, chat_question

    if args.instruction is not None:
        if template in ("auto", "alpaca"):
            return alpaca_prompt(args.instruction, args.input or "")
        question = chat_question(args.instruction, args.input or "")
        return [{"role": "user", "content": question}]
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    return [{"role": "user", "content": text}] if can_chat and not args.raw else text


def _source(config: "RunConfig") -> str:
    if config.model.source is None:
        raise ConfigError("model.source is missing; name a model with --model SOURCE")
    return config.model.source


def _print_config(config: "RunConfig") -> int:
    from mlx_qlora.config import to_yaml

    print(to_yaml(config), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
