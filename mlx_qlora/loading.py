"""A source, or a config, becomes a model and its tokenizer."""

import contextlib
import filecmp
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from mlx_qlora import device
from mlx_qlora.adapters.options import is_mlx_lm, read_adapter_config
from mlx_qlora.adapters.origin import run_of
from mlx_qlora.adapters.peft import load_adapter
from mlx_qlora.config import ModelConfig, RunConfig, Values, build, read_yaml
from mlx_qlora.data.chats import ALPACA, NAMED, alpaca_template
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.preferences import KIND_OF
from mlx_qlora.data.read import DataConfig, own_template, train_validation_test
from mlx_qlora.data.tokenizer import SHIPPED, Tokenizer, load_tokenizer, read_configs
from mlx_qlora.errors import (
    AdapterWarning,
    ConfigError,
    DataError,
    StreamedWarning,
    UserError,
    say,
    size,
)
from mlx_qlora.fields import checked
from mlx_qlora.folders import RECORD, user_path
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import ALL_SEVEN, LoraConfig
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig
from mlx_qlora.model.streaming import streamed_bytes
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.readers import json_value, reading

T = TypeVar("T")


@checked
def load(
    source: str | Path | None = None,
    quantize: QuantConfig | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    frozen_matmul: str = "auto",
    residency: str = "auto",
) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Load a frozen model and its tokenizer.

    Args:
        source: a hub id (`org/name`), a folder of Hugging Face safetensors (dense, or quantised
            by MLX), a `*.gguf` file, or the built-in name `smollm2-135m`. Left out, the model that
            the adapter's run names.
        quantize: quantises dense weights while loading, tensor by tensor; None keeps the files'
            own precision. Weights that are quantised already stay as they are.
        adapter: a PEFT folder to attach.
        revision: branch, tag or commit of a hub repository.
        dtype: of the computation: `auto` (bfloat16 on a GPU, float32 on a CPU) or a name.
        frozen_matmul: how quantised weights are multiplied: `auto`, or `quantized`, `dequantize`
            or `resident` as explained in `mlx_qlora.device`.
        residency: `resident` keeps all weights in memory, `streamed` reads each layer from the disk
            when its turn comes, and `auto` streams what would fill the memory by itself. Dense
            weights that are quantised, and a GGUF, are streamed from a copy, which is made once.

    Raises:
        SourceError: the source cannot be found or fetched.
        WeightsError: its files are damaged, or of an unsupported architecture.
        TokenizerError: its tokenizer is missing or damaged.
        AdapterError: the adapter is damaged or belongs to another model.
        ConfigError: an unknown dtype, strategy or residency, a group size that does not fit, or
            no room on the disk for a copy.
    """
    # Unknown ones are refused before anything is read.
    ModelConfig(dtype=dtype, frozen_matmul=frozen_matmul, residency=residency)
    if adapter is not None:
        read_adapter_config(user_path(adapter))
    if source is None and adapter is None:
        raise ConfigError("load: neither a model nor an adapter is named; name one of them")
    if source is None:
        adapted = ModelConfig(adapter=None if adapter is None else str(adapter))
        named = with_model(RunConfig(model=adapted)).model
        source, revision = str(named.source), revision or named.revision
        quantize = quantize or named.quantize()
    checkpoint = open_checkpoint(resolve(source, revision))
    tokenizer = load_tokenizer(checkpoint.files.path, checkpoint.metadata)
    dtype_of_model = device.compute_dtype(dtype)
    model = load_model(checkpoint, quantize, dtype_of_model, frozen_matmul, residency)
    model.frozen_matmul = frozen_matmul
    if model.model.reader is not None:
        warnings.warn(
            f"{source} is streamed from the disk, so every generated token reads all of its "
            f"weights, {size(streamed_bytes(model))}, which is slow",
            StreamedWarning,
            stacklevel=3,  # above `checked`
        )
    packings = {m.quant for m in model.modules() if isinstance(m, FrozenMatrix)}
    if quantize not in (None, QuantConfig(), *packings):
        words = ", ".join(f"{name}={value}" for name, value in asdict(quantize).items())
        message = f"{words} is not used: the weights are quantised in the files"
        warnings.warn(message, AdapterWarning, stacklevel=3)
    if adapter is not None:
        is_dense = checkpoint.files.path.is_dir() and not checkpoint.packing  # a GGUF is packed
        if is_dense and quantize is None and not UserError.in_command:
            with contextlib.suppress(UserError):  # nothing depends on the record
                record = recorded(str(adapter), "model")
                packed = build(record).model.quantize() if record else None
                if packed is not None:
                    text = f"{adapter} was trained over weights of {packed.bits} bits, and these "
                    text += f"are not packed; quantize=mq.{packed} packs them"
                    warnings.warn(text, AdapterWarning, stacklevel=3)
        load_adapter(model, adapter)
    return model, with_tokenizer_of(adapter, tokenizer)


# ---- the model of a config and its adapter -------------------------------------------------------


def with_adapter(config: RunConfig) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Load the model of a config with its adapter; a ConfigError if it names none."""
    if config.model.adapter is None:
        raise ConfigError("model.adapter is missing; name a PEFT folder with --adapter DIR")
    return loaded(with_model(config))


def model_to_ask(config: RunConfig) -> tuple[RunConfig, LlamaForCausalLM, Tokenizer]:
    """Load the model of a config, which then writes rows as its adapter was taught with."""
    config = with_model(config)
    own = own_template(config.data)  # before a weight is read
    model, tokenizer = loaded(config)
    config = as_taught(config)
    if own:
        return config, model, tokenizer.with_chat_template(own)
    return config, model, in_form_of_rows(config, tokenizer)


def with_model(config: RunConfig) -> RunConfig:
    """Fill in the model that an adapter was trained on; a ConfigError if nothing names it."""
    chosen = config.model
    if chosen.source is not None:
        return config
    if chosen.adapter is None:
        fix = "name a model with --model SOURCE, or an adapter with --adapter DIR"
        raise ConfigError(f"model.source is missing; {fix}")
    if not user_path(chosen.adapter).is_dir():
        read_adapter_config(user_path(chosen.adapter))  # which says what is near
    default = asdict(ModelConfig())
    given = {k: v for k, v in asdict(chosen).items() if v != default[k]}
    chosen = replace(build(recorded(chosen.adapter, "model")).model, **given)
    if chosen.source is None:
        raise ConfigError(
            f"model.source is missing, and {chosen.adapter} has no run.yaml that names it; "
            "name the model with --model SOURCE"
        )
    return replace(config, model=chosen)


def recorded(adapter: str, *sections: str) -> Values:
    """Section -> field -> value of some sections, from the record of our run, if there is one."""
    record = run_of(user_path(adapter)) / "run.yaml"
    values = read_yaml(record) if record.is_file() else {}
    return {section: values[section] for section in sections if section in values}


def loaded(config: RunConfig) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Load the model that a config names, with its adapter if it names one."""
    chosen = config.model
    assert chosen.source is not None
    asked, names = chosen.quantize(), ("dtype", "frozen_matmul", "residency")
    settings = {name: getattr(chosen, name) for name in names}
    return load(chosen.source, asked, chosen.adapter, chosen.revision, **settings)


def as_taught(config: RunConfig) -> RunConfig:
    """Read and write rows as the run that made the adapter did, unless the config says how."""
    data, training = config.data, config.training
    if config.model.adapter is None:
        return config
    taught = build(recorded(config.model.adapter, "data")).data
    history = taught.history if data.history == "auto" else data.history
    system = taught.system if data.system is None else data.system
    template = taught.template if data.template == "auto" else data.template
    copy = run_of(user_path(config.model.adapter)) / "chat_template.jinja"
    if template == taught.template not in NAMED and copy.is_file():
        template = "chat"  # the file that it was read from may be gone; the tokenizer has its copy
    if training.objective == "sft":
        record = recorded(config.model.adapter, "training").get("training", {})
        training = replace(training, objective=record.get("objective", "sft"))
    data = replace(data, system=system, history=history, template=template)
    return replace(config, data=data, training=training)


def by_taught_columns(config: RunConfig, read: Callable[[DataConfig], T]) -> T:
    """What is read by the names that the adapter's own rows had, else by the usual ones."""
    if config.model.adapter is not None and not config.data.columns:
        taught = build(recorded(config.model.adapter, "data")).data.columns
        with contextlib.suppress(DataError):
            if taught:
                return read(replace(config.data, columns=taught))
    return read(config.data)


def of_its_run(config: RunConfig) -> RunConfig:
    """With the rows of the run that made the adapter, if none are named, and divided as they were.

    A ConfigError if no record of ours names rows.
    """
    adapter, data, objective = config.model.adapter, config.data, config.training.objective
    taught = build(recorded(adapter, "data", "training") if adapter else {})
    if data.path is None:
        if taught.data.path is None:
            of = f", and no run.yaml of {adapter} names rows, as after a run in Python"
            raise ConfigError(
                f"data.path is missing{of * bool(adapter)}; name rows with --data FILE"
            )
        default = asdict(DataConfig())
        given = {name: value for name, value in asdict(data).items() if value != default[name]}
        data = replace(taught.data, refused_path=None, **given)  # the file is the run's
    objective = taught.training.objective if objective == "sft" else objective
    return replace(config, data=data, training=replace(taught.training, objective=objective))


def parts_of_run(
    config: RunConfig, tokenizer: Tokenizer
) -> tuple[Examples, Examples | None, Examples | None]:
    """The rows of `of_its_run` in parts: trained on, to validate and to test; errors as of both."""
    config = as_taught(of_its_run(config))
    kind, seed = KIND_OF[config.training.objective], config.training.seed
    return by_taught_columns(
        config, lambda data: train_validation_test(data, tokenizer, seed, kind)
    )


def form_of_rows(config: RunConfig) -> str:
    """The format of the rows that an adapter of ours was trained on; empty if it is not known."""
    if config.model.adapter is None:
        return ""
    record = run_of(user_path(config.model.adapter)) / RECORD
    return str(json_value(record, "data", "format") or "")


def in_form_of_rows(
    config: RunConfig, tokenizer: Tokenizer, console: Console | None = None
) -> Tokenizer:
    """A tokenizer that writes a chat as an adapter's rows were, if all were instructions.

    The model has never seen what it was taught in the form of its own chats.
    """
    data = as_taught(config).data
    if form_of_rows(config) != "alpaca" or data.system or data.template not in ("auto", *ALPACA):
        return tokenizer
    if console is not None:
        say(console, "template  chats are written as the rows were: '### Instruction:' and so on")
    return tokenizer.with_chat_template(alpaca_template(tokenizer.adds_bos, data.template))


def with_tokenizer_of(adapter: str | Path | None, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, template or end token of its own that an adapter was trained with, if any."""
    if adapter is None:
        return tokenizer
    folder = run_of(user_path(adapter))
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place))
        pairs = [(folder / name, Path(place, name)) for name in SHIPPED if (folder / name).exists()]
        if all(base.exists() and filecmp.cmp(own, base, False) for own, base in pairs):
            return tokenizer
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        with reading(folder, UserError):
            template = read_configs(folder)["chat_template"]
        return tokenizer.with_chat_template(template) if template else tokenizer
    theirs = load_tokenizer(folder)
    theirs = replace(theirs, eos_ids=theirs.eos_ids | tokenizer.eos_ids)
    if theirs.chat_template is not None or tokenizer.chat_template is None:
        return theirs
    of_base = theirs.with_chat_template(tokenizer.chat_template)
    return replace(of_base, tool_template=tokenizer.tool_template)


def check_lora(asked: LoraConfig, trained: LoraConfig, adapter: str | None = None) -> None:
    """Refuse values for an adapter's shape that are not those of the adapter to train on.

    That is one in a folder, or the one that the model has. A value that is the default may be there
    because nobody set it, so it is passed over.
    """
    default, unsaid = LoraConfig(), {"loraplus_lr_ratio", "init_lora_weights"}  # in no file
    where, instead = "that the model has", "load the model again"
    if adapter is not None:
        where, instead = adapter, "train a new adapter without --adapter"
        if is_mlx_lm(user_path(adapter)):  # which lists every matrix, and scale x rank
            unsaid |= {"target_modules", "layers_to_transform", "lora_alpha"}
    for name in (each.name for each in fields(LoraConfig)):
        wanted, has = getattr(asked, name), getattr(trained, name)
        if name in unsaid or wanted == getattr(default, name):
            continue
        if _meaning(wanted) != _meaning(has):
            raise ConfigError(
                f"lora.{name} is {has!r} in the adapter {where}, and cannot be changed to "
                f"{wanted!r}; leave lora.{name} out, or {instead}"
            )


def _meaning(value: Any) -> Any:
    """A value in one spelling: targets have no order, and an empty list of layers means all."""
    if value == "all-linear":
        value = ALL_SEVEN
    return set(value) if isinstance(value, list) and value else value or None


def as_loaded(chosen: ModelConfig, model: LlamaForCausalLM) -> ModelConfig:
    """With the arguments that a model was loaded with, so that the record opens the same one."""
    files, quant, dtype = model.source, model.quantized_to, model.model.norm.weight.dtype
    packing = {"bits": None} if quant is None else asdict(quant)
    auto = dtype == device.compute_dtype("auto")
    return replace(
        chosen,
        source=str(files.source),
        revision=files.revision,
        residency="resident" if model.model.reader is None else "streamed",
        dtype="auto" if auto else str(dtype).rpartition(".")[2],
        **packing,
    )
