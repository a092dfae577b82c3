"""A source, or a config, becomes a model and its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

from mlx_qlora import device
from mlx_qlora.adapters.peft import load_adapter
from mlx_qlora.config import ModelConfig, RunConfig, build, read_yaml
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.model.weights import load_model, open_checkpoint


def load(
    source: str | Path,
    quantize: QuantConfig | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    frozen_matmul: str = "auto",
) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Loads a frozen model and its tokenizer.

    Args:
        source: a hub id (`org/name`), a folder of Hugging Face safetensors (dense, or quantised
            by MLX), a `*.gguf` file, or the built-in name `smollm2-135m`.
        quantize: quantises dense weights while loading, tensor by tensor; None keeps the files'
            own precision. Weights that are quantised already stay as they are.
        adapter: a PEFT folder to attach.
        revision: branch, tag or commit of a hub repository.
        dtype: of the computation: `auto` (bfloat16 on a GPU, float32 on a CPU) or a name.
        frozen_matmul: how quantised weights are multiplied: `auto`, or `quantized`, `dequantize`
            or `resident` as explained in `mlx_qlora.device`.

    Returns:
        The model, evaluated, and the tokenizer.

    Raises:
        SourceError: the source cannot be found or fetched.
        WeightsError: its files are damaged, or of an unsupported architecture.
        TokenizerError: its tokenizer is missing or damaged.
        AdapterError: the adapter is damaged or belongs to another model.
        ConfigError: an unknown dtype or strategy, or a group size that does not fit.
    """
    chosen_dtype = device.compute_dtype(dtype)
    device.frozen_matmul(frozen_matmul)  # an unknown one is refused before anything is read
    checkpoint = open_checkpoint(resolve(source, revision))
    tokenizer = load_tokenizer(checkpoint.files.path, checkpoint.metadata)
    model = load_model(checkpoint, quantize, chosen_dtype, frozen_matmul)
    if adapter is not None:
        load_adapter(model, adapter)
    return model, tokenizer


# ---- the model of a config and its adapter -------------------------------------------------------


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
