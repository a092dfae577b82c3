"""What becomes of a trained adapter: merged into its model, exported, pushed."""

import argparse
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora.adapters import gguf_model
from mlx_qlora.adapters.export import modelfile, save_gguf_adapter, save_portable
from mlx_qlora.adapters.merge import like_base, save_merged
from mlx_qlora.adapters.peft import note_on_mlx_lm, save_adapter, save_mlx_lm
from mlx_qlora.adapters.push import push_to_hub
from mlx_qlora.config import RunConfig
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, UserError, require, say, size, waiting, warn
from mlx_qlora.folders import (
    ADAPTER_FOLDER,
    MERGED_FOLDER,
    MLX_LM,
    check_writable,
    disk_errors,
    is_merged,
    user_path,
)
from mlx_qlora.loading import in_form_of_rows, loaded, parts_of_run, with_adapter, with_model
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.quantize import FLOAT_MODES, QuantConfig

OUTPUT = "--output-dir"  # of merge and export


def merge(config: RunConfig, console: Console, args: argparse.Namespace) -> dict[str, Any]:
    """Merge an adapter into its base, packed again if asked for."""
    target = _target(args.folder)
    check_writable(target, MERGED_FOLDER, OUTPUT, whole=True, is_ours=is_merged)
    is_new = not target.exists()
    quantize = args.requantize and _packing(config, args.requantize)
    model, tokenizer = with_adapter(config)
    chats = in_form_of_rows(config, tokenizer, console)
    rows = None
    if quantize:
        if not any(word.startswith("model.group_size=") for word in args.overrides):
            quantize = like_base(model, quantize)
        rows = _rows_of_run(config, tokenizer, console)
    how = {"dtype": args.save_dtype, "base": args.base, "quantize": quantize, "rows": rows}
    with disk_errors(target):
        merged = save_merged(model, chats, target, **how)
    replaced = "" if is_new else ", replaces an older one"
    say(console, f"merged    {merged.bytes / 1e9:.2f} GB in {merged.folder}{replaced}")
    if merged.drift is not None:
        say(console, str(merged.drift))
    if not quantize:
        words = f"export --model {shlex.quote(str(merged.folder))} --output-dir gguf --gguf-model"
        say(console, f"for llama.cpp, Ollama and LM Studio: mlx-qlora {words}")
    return asdict(merged)


def _packing(config: RunConfig, text: str) -> QuantConfig:
    """What `--requantize` asks for."""
    if text in FLOAT_MODES:
        return QuantConfig(*FLOAT_MODES[text], text)
    require(text.isdecimal(), "--requantize", "be a number of bits, or mxfp4", text)
    return QuantConfig(int(text), config.model.group_size, config.model.mode)


def _rows_of_run(
    config: RunConfig, tokenizer: Tokenizer, console: Console
) -> tuple[Examples, Examples | None] | None:
    """The rows to calibrate a rounding with, and to measure it on; a line if there are none.

    Test rows go before validation rows, by which a run may have chosen its weights.
    """
    try:
        train, validation, test = parts_of_run(config, tokenizer)
    except UserError as error:
        if config.data.path:
            raise
        warn(console, f"rounded plainly, and not measured: the run's rows cannot be read ({error})")
        return None
    say(
        console,
        "rounding  layer by layer, so that the run's rows lose least, and measured on\n"
        "          held-out rows; on two CPU cores a minute for 100 million parameters",
    )
    return train, test or validation


def export(config: RunConfig, console: Console, args: argparse.Namespace) -> dict[str, Any]:
    """Write an adapter in another format, or the whole model as a GGUF."""
    flags = {"--type": args.type, "--ollama": args.ollama, "--lmstudio": args.lmstudio}
    given = [flag for flag, value in flags.items() if value is not None]
    if given and args.form not in (None, "gguf-model"):
        raise ConfigError(f"{given[0]} needs --gguf-model; got --{args.form}")
    if (args.folder is None) == (args.lmstudio is None):
        raise ConfigError(f"pass either {OUTPUT} DIR or --lmstudio PUBLISHER/MODEL")
    if args.form == "gguf-model" or given:
        return _export_model(config, console, args)
    form, target = args.form or "peft", _target(args.folder)
    names = {"peft": ADAPTER_FOLDER, "portable": ADAPTER_FOLDER, "mlx": MLX_LM, "gguf": ()}[form]
    check_writable(target, names, OUTPUT, whole=form == "portable")
    adapter = config.model.adapter
    if adapter is not None and target.resolve() == user_path(adapter).resolve():
        raise ConfigError(f"{OUTPUT}: {target} holds the adapter itself; choose another folder")
    base, file = config.model.base_model_name_or_path, target / "adapter.gguf"
    if form == "gguf" and config.model.adapter is not None:  # before a weight is read
        config = with_model(config)
        source, revision = str(config.model.source), config.model.revision
        modelfile(file, resolve(source, revision, weights=False), base)
    model, _ = with_adapter(config)
    with disk_errors(target):
        if form == "gguf":
            path = save_gguf_adapter(model, file, base)
        elif form == "mlx":
            path = save_mlx_lm(model, target)
            if note := note_on_mlx_lm(model):
                warn(console, note)
        elif form == "portable":
            path = save_portable(model, target, base)
        else:
            path = save_adapter(model, target, base)
    say(console, f"exported  {path} ({form})")
    return {"format": form, "path": path}


def _export_model(config: RunConfig, console: Console, args: argparse.Namespace) -> dict[str, Any]:
    gguf_model.check_type(kind := args.type or "q8_0")
    target = gguf_model.lm_studio_folder(args.lmstudio) if args.lmstudio else _target(args.folder)
    old, option = [*target.glob("model-*.gguf")], "--lmstudio" if args.lmstudio else OUTPUT
    check_writable(target, [f"model-{kind}.gguf"], option, is_ours=gguf_model.is_ours)
    if args.ollama is not None:
        gguf_model.find_ollama()  # before a weight is read
    if config.model.adapter is None:  # nothing was learned over packed weights
        config = replace(config, model=replace(config.model, bits=None))
    (model, tokenizer), base = loaded(with_model(config)), config.model.base_model_name_or_path
    chats = in_form_of_rows(config, tokenizer, console)
    rows = None
    # Of 8 bits plain rounding keeps all that was learned.
    if config.model.adapter is not None and kind in ("q4_0", "q4_1", "q5_0", "q5_1"):
        rows = _rows_of_run(config, tokenizer, console)
    with disk_errors(target):
        written = gguf_model.save_gguf_model(model, chats, target, base, type=kind, rows=rows)
    replaced = ", replaces an older one" if written.file in old else ""
    say(console, f"exported  {written.file}, {size(written.bytes)}{replaced}")
    if written.drift is not None:
        say(console, str(written.drift))
    if written.command is not None:
        say(console, f"for {kind}, with llama.cpp's program: {written.command}")
    if args.ollama is not None:
        gguf_model.create_in_ollama(target, args.ollama)
        say(console, f"ollama    has the model as {args.ollama}")
    onward = f"ollama create NAME -f {shlex.quote(str(target / 'Modelfile'))}"
    onward += "; for LM Studio export with --lmstudio PUBLISHER/MODEL"
    onward = f"open {args.lmstudio} in LM Studio" if args.lmstudio else onward
    say(console, f"next      {f'ollama run {args.ollama}' if args.ollama else onward}")
    return {"format": "gguf-model", **asdict(written)}


def _target(folder: str) -> Path:
    if not folder:
        raise ConfigError(f"{OUTPUT} must name a folder; got nothing")
    return user_path(folder)


def push(config: RunConfig, console: Console, args: argparse.Namespace) -> dict[str, Any]:
    """Upload an adapter or a merged model to the hub."""
    with waiting("the hub"):
        how = {"private": not args.public, "dry_run": args.dry_run}
        pushed = push_to_hub(args.folder, args.repo_id, **how)
    say(console, str(pushed) if pushed.url else f"{pushed}\nwould be pushed to {args.repo_id}")
    return asdict(pushed)
