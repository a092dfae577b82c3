"""The adapter folded into its base: in memory, or as a Hugging Face folder that any tool opens.

The weights are written one matrix at a time: there is never a second dense model in memory.
"""

import json
import math
import shutil
import struct
import zlib
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import __version__
from mlx_qlora.adapters.calibration import Calibrated, dense_linear
from mlx_qlora.adapters.drift import Drift
from mlx_qlora.adapters.peft import layers_of
from mlx_qlora.adapters.push import render
from mlx_qlora.adapters.requantize import grid_of, packed
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, WeightsError, listing, require
from mlx_qlora.folders import (
    CARD,
    MERGED_FOLDER,
    MERGED_MARK,
    check_writable,
    is_merged,
    remove_leftovers,
    staged,
    user_path,
)
from mlx_qlora.model.families import FAMILIES
from mlx_qlora.model.hub import HUB_ID, ModelFiles, resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoRALinear
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig, cast, pack, unpack
from mlx_qlora.model.rope import RopeConfig, in_both_spellings
from mlx_qlora.model.stored import tensors_in
from mlx_qlora.model.weights import FLOATS, Checkpoint, as_array, open_checkpoint
from mlx_qlora.progress import Task, doing
from mlx_qlora.tree import flat, nested

# Name -> safetensors' name of it, and bytes of one number.
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
GENERATION = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# True of the files that were read, but not of those that are written.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "rms_norm_eps"),
    *("tie_word_embeddings", "max_position_embeddings"),
)
DROPPED = ("quantization", "quantization_config", "_name_or_path")

# ---- in memory -----------------------------------------------------------------------------------


def merge(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Fold the adapter into dense weights of the compute dtype, in place.

    Every LoRA layer becomes a plain frozen `Linear` of a dense one's size; other matrices stay as
    they are. The model then has no LoRA layers, no `lora_config` and nothing to train.

    Raises:
        AdapterError: the model has no LoRA layers.
    """
    for path, layer in layers_of(model):
        linear = dense_linear(layer.merged(), layer.base_layer)
        linear.matmul = layer.base_layer.matmul
        linear.freeze()
        model.update_modules(nested({path: linear}))
    del model.lora_config
    model.is_merged = True
    return model


# ---- as a folder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """What an export left on disk."""

    folder: Path
    bytes: int  # of all files in the folder
    drift: Drift | None  # what the export changed; None if that was not measured


def save_merged(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    base: str | Path | ModelFiles | None = None,
    quantize: QuantConfig | None = None,
    max_shard_bytes: int = 5_000_000_000,
    rows: tuple[Examples, Examples | None] | None = None,
) -> Merged:
    """Write the model with its adapter folded in as a Hugging Face folder.

    The model keeps its LoRA layers. The folder appears whole, after what was written has been read
    back, or not at all. It replaces an older export.

    Args:
        tokenizer: the model's; its files are written too.
        folder: does not exist, is empty, or holds an older export and nothing else.
        dtype: of the weights, or of the scales of quantised ones: bfloat16, float16 or float32.
        base: where the original 16-bit weights lie: a source as `load` takes it, or its files.
            Only the update is then the model's own. None takes its weights, dequantised.
        quantize: packs every matrix in MLX's format. Packed ones of the base are copied as they
            are if the adapter does not touch them.
        max_shard_bytes: most bytes of tensors in one file; a larger matrix has a file of its own.
        rows: of training, for `quantize` to make up for its errors on, and held out, to measure
            the drift on (`read_examples` reads them). None rounds plainly.

    Raises:
        AdapterError: the model has no LoRA layers.
        ConfigError: a value or base that cannot be used; a folder that holds anything but an older
            export, or that the weights are read from; too little disk.
        WeightsError: a base that is another model, or a number that `dtype` cannot hold.
        SourceError: the base cannot be found.
    """
    layers_of(model)
    require(dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", dtype)
    require(max_shard_bytes >= 1, "max_shard_bytes", "be at least 1", max_shard_bytes)
    target = user_path(folder).resolve()
    original = None
    if base is not None:
        original = open_checkpoint(base if isinstance(base, ModelFiles) else resolve(base))
        _check_base(model, original)
    sources: list[ModelFiles] = [original.files] if original else []
    sources += [model.source] if model.source else []
    if any(target == files.path.resolve() for files in sources):
        raise ConfigError(f"{target} holds the weights that are read; choose another folder")
    check_writable(target, MERGED_FOLDER, whole=True, is_ours=is_merged)
    shards = _layout(model, dtype, quantize, max_shard_bytes)
    check_disk(target, sum(map(_size_of, shards.values())))

    drift = None
    with staged(target, replace=True) as staging:
        originals = original and original.tensors
        tensors = Tensors(dict(model.named_modules()), originals, quantize, getattr(mx, dtype))
        if quantize is not None and rows is not None:
            tensors.calibrate(model, rows)
        with doing("writing", len(shapes_of(model)), "weights") as task:
            for name, shard in shards.items():
                _write_shard(staging / name, shard, tensors, task)
        if len(shards) > 1:
            places = {entry.name: name for name, shard in shards.items() for entry in shard}
            index = {
                "metadata": {"total_size": sum(map(_size_of, shards.values()))},
                "weight_map": dict(sorted(places.items())),
            }
            _write_json(staging / "model.safetensors.index.json", index)
        config = original.config if original else model.hf_config
        config = _hf_config(config, tokenizer, dtype, _packings(model, quantize))
        _write_json(staging / "config.json", config)
        for path in (files.path / GENERATION for files in sources[::-1]):  # the last one counts
            if path.is_file():
                shutil.copyfile(path, staging / GENERATION)
        if sources[:1] and sources[0].path.is_file():  # a GGUF has it in the tokenizer's part
            ids = {name: config[name] for name in IDS if config.get(name) is not None}
            _write_json(staging / GENERATION, ids)
        tokenizer.save(staging)
        if quantize is not None and tensors.calibrated is not None:
            drift = tensors.calibrated.verdict(f"{quantize.bits} bits")
        repo = (sources[0].hf_id if sources else None) or ""
        card = render(
            "adapters/merged_card.md.jinja",
            repo=repo if HUB_ID.fullmatch(repo) else None,
            mark=MERGED_MARK,
            version=__version__,
            dtype=dtype,
            quantize=quantize,
            drift=drift,
        )
        (staging / CARD).write_text(card)
        size = sum(path.stat().st_size for path in staging.iterdir())
    return Merged(user_path(folder), size, drift)


# ---- checks --------------------------------------------------------------------------------------


def check_disk(target: Path, needed: int) -> None:
    """Remove what a killed process left; a ConfigError unless so many bytes are free."""
    remove_leftovers(target)
    disk = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise ConfigError(
            f"the merged model needs {needed:,} bytes, and {disk} has {free:,} free (an older "
            "export stays until the end); free some space, or choose a folder on a larger disk"
        )


def _check_base(model: LlamaForCausalLM, original: Checkpoint) -> None:
    """Refuse original weights that are quantised or another model's, listing all differences."""
    where = original.files.path
    if original.packing or any(getattr(x, "is_packed", False) for x in original.tensors.values()):
        raise ConfigError(
            f"base: {where} is quantised, too; give the original 16-bit model, or no base"
        )
    theirs, ours = LlamaConfig.from_hf(original.config), model.config
    problems = [
        f"config.json: {field} is {getattr(theirs, field)!r}; the model's is {value!r}"
        for field, value in vars(ours).items()
        # How long a context is allowed does not show in the weights.
        if field != "max_position_embeddings" and not same_value(getattr(theirs, field), value)
    ]
    if not problems:
        for name, shape in shapes_of(model).items():
            info = original.found.get(name)
            if info is None:
                problems.append(f"{name} is missing")
            elif info.shape != shape or info.kind not in FLOATS:
                problems.append(f"{name} is {info.kind} {info.shape}; the model's is {shape}")
    problems = problems or _different_norms(model, original)
    if problems:
        raise WeightsError(f"base: {where} is another model:\n{listing(problems)}")


def same_value(theirs: Any, ours: Any) -> bool:
    """Whether two values of a config are equal; a GGUF has its numbers in float32."""
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return abs(theirs - ours) <= 1e-6 * abs(ours)
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(same_value, theirs, ours))
    if isinstance(ours, RopeConfig) and isinstance(theirs, RopeConfig):
        return all(same_value(getattr(theirs, field), value) for field, value in vars(ours).items())
    return theirs == ours


def _different_norms(model: LlamaForCausalLM, original: Checkpoint) -> list[str]:
    """Norms are never quantised, so they tell two models of the same sizes apart."""
    theirs = original.tensors
    norms = {n: w for n, w in flat(model.parameters()).items() if n.endswith("norm.weight")}
    return [
        f"{name} has other values"
        for name, ours in norms.items()
        if not mx.allclose(ours.astype(mx.float32), as_array(theirs[name]), 1e-2, 1e-3)
    ]


# ---- which tensor goes into which file -----------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: the weight that it is a part of, and what the header says of it."""

    name: str
    weight: str
    dtype: str
    shape: tuple[int, ...]
    width: int  # bytes of one number

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.width


def _size_of(entries: list[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def shapes_of(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    """Weight -> shape, of the model without an adapter and with nothing packed, in its order."""
    plain = LlamaForCausalLM(model.config)  # zeros that are never computed
    return {name: tuple(array.shape) for name, array in flat(plain.parameters()).items()}


def _layout(
    model: LlamaForCausalLM, dtype: str, quantize: QuantConfig | None, max_bytes: int
) -> dict[str, list[Entry]]:
    """File name -> its tensors. What one matrix is packed into stays in one file."""
    shards: list[list[Entry]] = [[]]
    packings = _packings(model, quantize)
    for name, shape in shapes_of(model).items():
        entries = _entries_of(name, shape, dtype, packings.get(name.removesuffix(".weight")))
        if shards[-1] and _size_of(shards[-1]) + _size_of(entries) > max_bytes:
            shards.append([])
        shards[-1] += entries
    n = len(shards)
    if n == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{n:05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def like_base(model: LlamaForCausalLM, quantize: QuantConfig) -> QuantConfig:
    """With the base's groups, unless others were asked for, if it has as many bits: no larger."""
    own = model.layers[0].linears("o").members["self_attn.o_proj"].base_layer.quant
    if own is None or (own.bits, own.mode) != (quantize.bits, quantize.mode):
        return quantize
    return own if quantize.group_size == QuantConfig().group_size else quantize


def _packings(model: LlamaForCausalLM, quantize: QuantConfig | None) -> dict[str, QuantConfig]:
    """How each matrix is packed, by its path: embedding and head as in the base, if they are."""
    if quantize is None:
        return {}
    matrices = [(path, m) for path, m in model.named_modules() if isinstance(m, FrozenMatrix)]
    own = {path.removesuffix(".base_layer"): m.quant for path, m in matrices}
    return {
        path: (None if path.startswith("model.layers.") else quant) or quantize
        for path, quant in own.items()
    }


def _entries_of(
    name: str, shape: tuple[int, ...], dtype: str, quantize: QuantConfig | None
) -> list[Entry]:
    """What a weight becomes: itself, or what it is packed into."""
    kind, width = DTYPES[dtype]
    if quantize is None or len(shape) != 2:
        return [Entry(name, name, kind, shape, width)]
    path, (rows, columns) = name.removesuffix(".weight"), shape
    if not quantize.fits(shape):
        raise ConfigError(
            f"group_size {quantize.group_size} does not divide the {columns} columns of {path}; "
            "choose a smaller group_size"
        )
    groups = rows, columns // quantize.group_size
    packed = Entry(name, name, "U32", (rows, columns * quantize.bits // 32), 4)
    if quantize.mode != "affine":
        return [packed, Entry(f"{path}.scales", name, "U8", groups, 1)]
    rest = [Entry(f"{path}.{leaf}", name, kind, groups, width) for leaf in ("scales", "biases")]
    return [packed, *rest]


# ---- the weights, one at a time ------------------------------------------------------------------


@dataclass
class Tensors:
    """Makes the weights of the merged model, each when it is asked for."""

    modules: dict[str, Any]  # of the model with LoRA layers
    originals: dict[str, Any] | None  # where W comes from. None: the model itself
    quantize: QuantConfig | None  # how matrices are packed
    dtype: mx.Dtype  # of everything that is not packed

    calibrated: Calibrated | None = None

    def calibrate(self, model: LlamaForCausalLM, rows: tuple[Examples, Examples | None]) -> None:
        """Round the layers' matrices from now on by what training rows bring to them."""
        quantize = self.quantize
        assert quantize is not None
        grid, whole = grid_of(quantize, self.dtype), replace(self, quantize=None, dtype=mx.float32)

        def plain(path: str, W: mx.array) -> mx.array:
            parts = tuple(cast(part, self.dtype) for part in pack(W, quantize))
            return unpack(parts, quantize, mx.float32)

        self.calibrated = Calibrated(model, whole.matrix, lambda path: grid, plain, rows)

    def matrix(self, path: str) -> mx.array:
        """The merged matrix of a path, not packed."""
        return self.make(f"{path}.weight")[0]

    def make(self, name: str) -> tuple[mx.array, ...]:
        """The tensors that a weight becomes, evaluated; a WeightsError if one cannot be held."""
        path = name.rpartition(".")[0]
        module, quantize = self.modules[path], self.quantize
        is_matrix = name.endswith(".weight") and isinstance(module, (LoRALinear, FrozenMatrix))
        in_layer = path.startswith("model.layers.")
        dense: tuple[mx.array, ...] = ()
        if quantize is None or not is_matrix:
            tensors = (self._dense(name, module),)
        elif isinstance(module, FrozenMatrix) and (
            module.quant is not None
            and ((module.quant == quantize and self.originals is None) or not in_layer)
        ):
            tensors = module.packed()  # packing again what was packed would lose a little more
        elif self.calibrated is not None and in_layer:
            tensors = packed(self.calibrated[path], quantize)
        else:  # scales and biases are found in float32, as they are while loading
            dense = (self._dense(name, module).astype(mx.float32),)
            tensors = pack(dense[0], quantize)
        tensors = tuple(cast(array, self.dtype) for array in tensors)
        if not all(mx.isfinite(array).all().item() for array in (*dense, *tensors)):
            raise WeightsError(
                f"{name} of the merged model has numbers that {self.dtype} cannot hold, or NaN; "
                "export as bfloat16, or train again if the loss was NaN"
            )
        return tensors

    def _dense(self, name: str, module: Any) -> mx.array:
        """The merged weight, or another tensor of the base as it is."""
        is_weight = name.endswith(".weight")
        original = None if self.originals is None else as_array(self.originals[name])
        if isinstance(module, LoRALinear) and is_weight:
            return module.merged(original)
        if original is not None:
            return original
        if isinstance(module, LoRALinear):
            module = module.base_layer
        if isinstance(module, FrozenMatrix) and is_weight:
            return module.dense()
        return module[name.rpartition(".")[2]]


def _write_shard(path: Path, entries: list[Entry], tensors: Tensors, task: Task) -> None:
    """Write one safetensors file, tensor by tensor, and read it back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide numbers first, as safetensors itself does: readers map them, and want them aligned.
    for entry in sorted(entries, key=lambda entry: -entry.width):
        offsets = [offset, offset := offset + entry.nbytes]
        header[entry.name] = dict(dtype=entry.dtype, shape=entry.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight, parts in groupby(entries, key=lambda entry: entry.weight):
            for entry, array in zip(parts, tensors.make(weight), strict=True):
                assert tuple(array.shape) == entry.shape and array.nbytes == entry.nbytes
                content = np.array(array.reshape(-1).view(mx.uint8), copy=False).data
                file.seek(8 + len(text) + header[entry.name]["data_offsets"][0])
                file.write(content)
                checksums[entry.name] = zlib.crc32(content)
            mx.clear_cache()
            task.advance()
    read = tensors_in(path, WeightsError)
    with path.open("rb") as file:
        for name, checksum in checksums.items():
            file.seek(read[name].start)
            if zlib.crc32(file.read(read[name].nbytes)) != checksum:
                raise WeightsError(f"{path}: what was read back of {name} is not what was written")


# ---- beside the weights --------------------------------------------------------------------------


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _hf_config(
    config: dict[str, Any], tokenizer: Tokenizer, dtype: str, packings: dict[str, QuantConfig]
) -> dict[str, Any]:
    """The source's config in every reader's spelling.

    mlx-lm and old transformers ignore v5's `rope_parameters`; without the names before them they
    would silently compute with theta 10000.
    """
    read = LlamaConfig.from_hf(config)
    family = FAMILIES[read.model_type]
    full = {name: value for name, value in config.items() if name not in DROPPED}
    full |= {name: getattr(read, name) for name in SIZES}
    if read.model_type == "llama":
        full |= {name: getattr(read, name) for name in ("attention_bias", "mlp_bias")}
    full |= {"architectures": [family.model_class], "model_type": read.model_type}
    full |= {family.activation: config.get(family.activation, family.act)}
    full |= {"torch_dtype": dtype, "dtype": dtype, **in_both_spellings(config, read.rope)}
    ends = [tokenizer.eos_id, *sorted(tokenizer.eos_ids - {tokenizer.eos_id})]
    pad = tokenizer.encode(tokenizer.special_tokens.get("pad_token", ""))
    pad = pad if len(pad) == 1 and pad[0] < read.vocab_size else [None]
    # A GGUF's metadata has these in the tokenizer's part.
    for name, ids in zip(IDS, ([tokenizer.bos_id], ends, pad)):
        if full.get(name) is None:
            full[name] = ids[0] if len(ids) == 1 else ids
    if packings:
        most = packings["model.layers.0.self_attn.o_proj"]
        packing = vars(most) | {path: vars(own) for path, own in packings.items() if own != most}
        full |= {"quantization": packing, "quantization_config": packing}
    return full
