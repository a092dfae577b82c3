"""The adapter folded into its base: in memory, or as a Hugging Face folder that any tool opens.

The checks come first (`merge_checks`), then the weights, one matrix at a time (`hf_weights`), then
what stands beside them; the drift is measured on what was written.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora._version import __version__
from mlx_qlora.adapters.drift import Drift, encode_texts, measure
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.hf_weights import DTYPES, Entry, Tensors, plan, size_of, write_shard
from mlx_qlora.adapters.merge_checks import GENERATION, MARK, check_base, check_disk, check_target
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import AdapterError
from mlx_qlora.fields import require
from mlx_qlora.model.hub import HUB_ID, ModelFiles, resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import lora_layers
from mlx_qlora.model.quantize import Linear, QuantConfig
from mlx_qlora.model.weights import (
    Checkpoint,
    load_model,
    open_checkpoint,
)
from mlx_qlora.tree import nested

# What is true of the files that were read, and not of those that are written.
DROPPED = ("quantization", "quantization_config", "_name_or_path")


@dataclass(frozen=True)
class Merged:
    """What an export left on disk.

    Attributes:
        folder: where.
        bytes: of all its files.
        drift: what the export changed; None if that was not measured.
    """

    folder: Path
    bytes: int
    drift: Drift | None


# ---- in memory ---------------------------------------------------------------------------------


def merge(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Folds the adapter into dense weights of the compute dtype, in place.

    Every LoRA layer becomes a plain frozen `Linear`; other matrices stay as they are, packed ones
    too. Matrices that were packed now take their dense size.

    Returns:
        The same model, without LoRA layers, `lora_config` or anything to train.

    Raises:
        AdapterError: the model has no LoRA layers.
    """
    _check_has_adapter(model)
    for path, layer in lora_layers(model):
        base = layer.base_layer
        d_out, d_in = base.shape
        linear = Linear(d_in, d_out)
        linear.weight = layer.merged().astype(base.dtype)
        if "bias" in base:
            linear.bias = base.bias
        linear.dtype, linear.matmul = base.dtype, base.matmul
        linear.freeze()
        mx.eval(linear.parameters())
        model.update_modules(nested({path: linear}))
    del model.lora_config
    return model


def _check_has_adapter(model: LlamaForCausalLM) -> None:
    if not lora_layers(model):
        raise AdapterError(
            "the model has no LoRA layers, so there is nothing to merge; attach an adapter with "
            "load_adapter(model, folder), and export with save_merged before merge, not after it"
        )


# ---- as a folder -------------------------------------------------------------------------------


def save_merged(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    base: str | Path | ModelFiles | None = None,
    quantize: QuantConfig | None = None,
    max_shard_bytes: int = 5_000_000_000,
    texts: list[str] | None = None,
) -> Merged:
    """Writes the model with its adapter folded in as a Hugging Face folder.

    The model keeps its LoRA layers. The folder appears whole, after what was written has been read
    back, or not at all. An older export in its place makes way for it.

    Args:
        model: with LoRA layers.
        tokenizer: the model's; its files are written too.
        folder: does not exist, is empty, or holds an older export and nothing else.
        dtype: of the weights, or of the scales of quantised ones: bfloat16, float16 or float32.
        base: where the original weights lie, not quantised: a source as `load` takes it, or its
            files. Then all weights, config.json and generation_config.json come from there, and
            only the update from the model. None takes the model's own, dequantised.
        quantize: packs every matrix in MLX's format, embedding and head included; matrices
            that the adapter does not touch and that are packed so already are copied as they are.
        max_shard_bytes: most bytes of tensors in one file; a larger matrix has a file of its own.
        texts: what the drift is measured on. None means a few built-in paragraphs if `quantize`
            is given, and otherwise no measurement. It loads the written model beside this one.

    Returns:
        Where it is, its size, and the drift.

    Raises:
        AdapterError: the model has no LoRA layers.
        ConfigError: a dtype, size, group size or base that does not do; a folder that holds
            anything but an older export, or that the weights are read from; too little disk.
        WeightsError: a base that is another model, or a number that `dtype` cannot hold.
        SourceError: the base cannot be found.
    """
    _check_has_adapter(model)
    require(dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", dtype)
    require(max_shard_bytes >= 1, "max_shard_bytes", "be at least 1", max_shard_bytes)
    target = Path(folder).expanduser().resolve()
    original = None
    if base is not None:
        original = open_checkpoint(base if isinstance(base, ModelFiles) else resolve(base))
        check_base(model, original)
    sources = [getattr(model, "source", None), original.files if original else None]
    check_target(target, [files for files in sources if files is not None])
    rows = None
    if quantize is not None or texts is not None:
        rows = encode_texts(tokenizer, texts)
    shards = plan(model, dtype, quantize, max_shard_bytes)
    check_disk(target, sum(map(size_of, shards.values())))

    drift = None
    with staged(target, replace=True) as staging:
        tensors = Tensors(model, original, quantize, getattr(mx, dtype))
        for name, shard in shards.items():
            write_shard(staging / name, shard, tensors)
        _write_rest(staging, model, tokenizer, original, dtype, quantize, shards)
        if rows is not None:
            files = ModelFiles(staging, None, None, str(staging))
            embedding = model.model.embed_tokens
            # Never resident: that would be a dense copy of the whole model.
            matmul = "quantized" if embedding.matmul == "quantized" else "dequantize"
            written = load_model(open_checkpoint(files), None, embedding.dtype, matmul)
            drift = measure(model, written, rows, None if quantize is None else quantize.bits)
        (staging / "README.md").write_text(_card(model, original, dtype, quantize, drift))
        size = sum(path.stat().st_size for path in staging.iterdir())
    return Merged(Path(folder).expanduser(), size, drift)


# ---- beside the weights ------------------------------------------------------------------------


def _write_rest(
    staging: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    original: Checkpoint | None,
    dtype: str,
    quantize: QuantConfig | None,
    shards: dict[str, list[Entry]],
) -> None:
    """Writes the index, `config.json`, `generation_config.json` and the tokenizer's files."""
    if len(shards) > 1:
        places = {entry.name: name for name, shard in shards.items() for entry in shard}
        size = sum(map(size_of, shards.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        _write_json(staging / "model.safetensors.index.json", index)
    config = model.hf_config if original is None else original.config
    _write_json(staging / "config.json", _hf_config(config, tokenizer, dtype, quantize))
    for files in (original.files if original else None, getattr(model, "source", None)):
        if files is not None and (files.path / GENERATION).is_file():
            shutil.copyfile(files.path / GENERATION, staging / GENERATION)
            break
    tokenizer.save(staging)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _hf_config(
    config: dict[str, Any], tokenizer: Tokenizer, dtype: str, quantize: QuantConfig | None
) -> dict[str, Any]:
    """The source's config in the words of every reader.

    mlx-lm and old transformers read `rope_theta` and `rope_scaling` and pass over v5's
    `rope_parameters`; without the former they would compute with theta 10000 and not say so.
    """
    read = LlamaConfig.from_hf(config)
    rope, kind = read.rope, read.rope.rope_type
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = float(rope.factor)
    if kind == "llama3":
        scaling["low_freq_factor"] = float(rope.low_freq_factor)
        scaling["high_freq_factor"] = float(rope.high_freq_factor)
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    full = {name: value for name, value in config.items() if name not in DROPPED}
    full |= {name: value for name, value in vars(read).items() if name != "rope"}
    full |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    full |= {"torch_dtype": dtype, "dtype": dtype, "rope_theta": rope.theta}
    full |= {"rope_scaling": None if kind == "default" else scaling}
    full |= {"rope_parameters": {**scaling, "rope_theta": rope.theta}}
    ends = [tokenizer.eos_id, *sorted(tokenizer.eos_ids - {tokenizer.eos_id})]
    # A GGUF's metadata has these in the tokenizer's part.
    for name, ids in (("bos_token_id", [tokenizer.bos_id]), ("eos_token_id", ends)):
        if full.get(name) is None:
            full[name] = ids[0] if len(ids) == 1 else ids
    if quantize is not None:
        packing = {name: getattr(quantize, name) for name in ("group_size", "bits", "mode")}
        full |= {"quantization": packing, "quantization_config": packing}
    return full


def _card(
    model: LlamaForCausalLM,
    original: Checkpoint | None,
    dtype: str,
    quantize: QuantConfig | None,
    drift: Drift | None,
) -> str:
    files = original.files if original else getattr(model, "source", None)
    named = (files and files.hf_id) or ""
    is_hub = HUB_ID.fullmatch(named) is not None
    packed = f", quantised to {quantize.bits} bits ({quantize.mode})" if quantize else ""
    lines = ["---"]
    if is_hub:
        lines += [f"base_model: {named}", "base_model_relation: finetune"]
    lines += [f"library_name: {'mlx' if quantize else 'transformers'}"]
    lines += ["pipeline_tag: text-generation", "tags:", "- mlx-qlora", "---", ""]
    what = f"`{named}`" if is_hub else "its base model"
    lines += [f"A LoRA adapter and {what}, {MARK} {__version__} in {dtype}{packed}."]
    return "\n".join([*lines, *(["", str(drift)] if drift else [])]) + "\n"
