"""`mlx-qlora merge`, `export` and `push`: what becomes of an adapter once it is trained."""

import dataclasses
from pathlib import Path

from rich.console import Console

from mlx_qlora.adapters.gguf import MERGED_GGUF_COMMAND, save_gguf_adapter
from mlx_qlora.adapters.merge import save_merged
from mlx_qlora.adapters.mlx_lm import save_mlx_lm
from mlx_qlora.adapters.peft import save_adapter
from mlx_qlora.adapters.portable import save_portable
from mlx_qlora.adapters.push import push_to_hub
from mlx_qlora.config import RunConfig, build, read_yaml
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.source import load
from mlx_qlora.train.metrics import say

FORMATS = ("peft", "portable", "mlx", "gguf")


def merge_adapter(
    config: RunConfig,
    folder: str,
    console: Console,
    base: str | None = None,
    dtype: str = "bfloat16",
    bits: int | None = None,
) -> None:
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
    quantize = None if bits is None else QuantConfig(bits, config.model.group_size)
    model, tokenizer = with_adapter(config)
    made = save_merged(model, tokenizer, folder, dtype=dtype, base=base, quantize=quantize)
    say(console, f"merged    {made.bytes / 1e9:.2f} GB in {made.folder}")
    if made.drift is not None:
        say(console, str(made.drift))
    else:
        say(console, f"for llama.cpp: {MERGED_GGUF_COMMAND}")


def export_adapter(config: RunConfig, folder: str, console: Console, form: str = "peft") -> None:
    """Writes an adapter in another format.

    Args:
        config: its model and adapter.
        folder: where it goes.
        console: where it is said.
        form: `peft` (with `mlx/`), `portable`, `mlx` or `gguf`; see `mlx_qlora.adapters`.

    Raises:
        UserError: the adapter cannot be used, or has no such form.
    """
    model, _ = with_adapter(config)
    original = config.model.base_model_name_or_path
    if form == "gguf":
        made = save_gguf_adapter(model, Path(folder) / "adapter.gguf", original)
    elif form == "mlx":
        made = save_mlx_lm(model, folder)
    elif form == "portable":
        made = save_portable(model, folder, original)
    else:
        made = save_adapter(model, folder, original)
    say(console, f"exported  {made}")


def push_folder(
    folder: str, repo_id: str, console: Console, public: bool = False, dry_run: bool = False
) -> None:
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


def with_adapter(config: RunConfig) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model of a config with its adapter; an adapter of ours knows its model itself.

    Raises:
        UserError: no adapter is named, nothing says which model it is for, or one of both cannot
            be used.
    """
    chosen = config.model
    if chosen.adapter is None:
        raise ConfigError("model.adapter is missing; name a PEFT folder with --adapter DIR")
    record = Path(chosen.adapter).expanduser() / "run.yaml"
    if chosen.source is None and record.is_file():
        trained = build({"model": read_yaml(record).get("model", {})}).model
        chosen = dataclasses.replace(trained, adapter=chosen.adapter)
    if chosen.source is None:
        raise ConfigError(
            f"model.source is missing, and {chosen.adapter} has no run.yaml that names it; "
            "name the model with --model SOURCE"
        )
    return load(
        chosen.source,
        chosen.quantize(),
        chosen.adapter,
        chosen.revision,
        dtype=chosen.dtype,
        frozen_matmul=chosen.frozen_matmul,
    )
