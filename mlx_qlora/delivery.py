"""`mlx-qlora merge`, `export` and `push`; and the model that a trained adapter belongs to."""

import dataclasses
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from mlx_qlora.adapters.gguf import MERGED_GGUF_COMMAND, save_gguf_adapter
from mlx_qlora.adapters.merge import Merged, save_merged
from mlx_qlora.adapters.merge_checks import check_target
from mlx_qlora.adapters.mlx_lm import FILES as MLX_LM_FILES
from mlx_qlora.adapters.mlx_lm import save_mlx_lm
from mlx_qlora.adapters.ownership import ADAPTER_FOLDER, check_names, check_place
from mlx_qlora.adapters.peft import save_adapter
from mlx_qlora.adapters.portable import check_replaceable, save_portable
from mlx_qlora.adapters.push import Pushed, push_to_hub
from mlx_qlora.config import RunConfig, build, read_yaml
from mlx_qlora.console import say
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.source import ModelConfig, load

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
    check_target(target.resolve(), [])
    model, tokenizer = with_adapter(config)
    with _disk_errors(target):
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
    if form == "portable":
        check_replaceable(target, OUTPUT)
    elif form != "gguf":
        check_names(target, MLX_LM_FILES if form == "mlx" else ADAPTER_FOLDER, OUTPUT)
    model, _ = with_adapter(config)
    original = config.model.base_model_name_or_path
    with _disk_errors(target):
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
    """Where a delivery goes, before anything is loaded for it.

    Raises:
        ConfigError: it cannot be written to.
    """
    if not folder:
        raise ConfigError(f"{OUTPUT} must name a folder; got nothing")
    target = Path(folder).expanduser()
    check_place(target, OUTPUT)
    return target


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turns what the system says while a delivery is written into an error with a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{OUTPUT}: cannot write to {getattr(error, 'filename', None) or target}: {reason}; "
            f"free some space, or choose another folder with {OUTPUT}"
        ) from None


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


def with_adapter(config: RunConfig) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model of a config with its adapter.

    Raises:
        UserError: no adapter is named, nothing says which model it is for, or one of both cannot
            be used.
    """
    if config.model.adapter is None:
        raise ConfigError("model.adapter is missing; name a PEFT folder with --adapter DIR")
    return loaded(with_model(config))


def model_to_ask(config: RunConfig) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model of a config, with the chat template that its adapter was taught with.

    Raises:
        UserError: nothing says which model it is, or it or its adapter cannot be used.
    """
    config = with_model(config)
    model, tokenizer = loaded(config)
    return model, as_taught(config, tokenizer)[1]


def with_model(config: RunConfig) -> RunConfig:
    """With the model that an adapter of ours was trained on, if none is named."""
    chosen = config.model
    if chosen.source is not None:
        return config
    if chosen.adapter is None:
        raise ConfigError("model.source is missing; name a model with --model SOURCE")
    if not Path(chosen.adapter).expanduser().is_dir():
        raise ConfigError(
            f"model.adapter: there is no folder {chosen.adapter}; name one that a run has left"
        )
    own, default = dataclasses.asdict(chosen), dataclasses.asdict(ModelConfig())
    changed = {name: value for name, value in own.items() if value != default[name]}
    chosen = dataclasses.replace(build(recorded(chosen.adapter)).model, **changed)
    if chosen.source is None:
        raise ConfigError(
            f"model.source is missing, and {chosen.adapter} has no run.yaml that names it; "
            "name the model with --model SOURCE"
        )
    return dataclasses.replace(config, model=chosen)


def recorded(adapter: str) -> dict[str, dict[str, Any]]:
    """What the run that made an adapter was told of model and generation.

    Section -> field -> value; empty for an adapter that no run of ours made.
    """
    record = Path(adapter).expanduser() / "run.yaml"
    if not record.is_file():
        return {}
    found = read_yaml(record)
    return {section: found[section] for section in ("model", "generation") if section in found}


def loaded(config: RunConfig) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model that a config names, with its adapter if it names one."""
    chosen = config.model
    assert chosen.source is not None
    return load(
        chosen.source,
        chosen.quantize(),
        chosen.adapter,
        chosen.revision,
        dtype=chosen.dtype,
        frozen_matmul=chosen.frozen_matmul,
    )


def as_taught(config: RunConfig, tokenizer: Tokenizer) -> tuple[RunConfig, Tokenizer]:
    """Rows are written as the run that made the adapter wrote them, unless the config says how."""
    if config.model.adapter is None or config.data.template != "auto":
        return config, tokenizer
    adapter = Path(config.model.adapter).expanduser()
    template = config.data.template
    if (adapter / "run.yaml").is_file():
        template = build({"data": read_yaml(adapter / "run.yaml").get("data", {})}).data.template
    if (adapter / "chat_template.jinja").is_file():
        own = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
        tokenizer = tokenizer.with_chat_template(own)
        if template not in ("auto", "alpaca", "chat"):
            template = "chat"  # the file that it was read from may be gone; this is its copy
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template=template)), (
        tokenizer
    )
