"""Merged weights on their way to the disk: one matrix at a time, in files of a stated size.

W + s B A exists for one linear, is cast or quantised, and is written where the file's header says.
So neither a second model nor even one shard is ever held.
"""

import json
import math
import struct
import zlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import ConfigError, WeightsError
from mlx_qlora.model.dora import DoRALinear
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora_linear import LoRALinear
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig, pack
from mlx_qlora.model.weights import Checkpoint, read_safetensors_header
from mlx_qlora.tree import flat

# Name -> safetensors' name of it, and bytes of one number.
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
FLOAT = mx.floating


# ---- which tensor goes where -------------------------------------------------------------------


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


def shapes(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    """Weight -> shape, of the model without an adapter and with nothing packed, in its order."""
    plain = LlamaForCausalLM(model.config)  # zeros that are never computed
    return {name: tuple(array.shape) for name, array in flat(plain.parameters()).items()}


def plan(
    model: LlamaForCausalLM, dtype: str, quantize: QuantConfig | None, most: int
) -> dict[str, list[Entry]]:
    """File name -> its tensors. What one matrix is packed into stays together."""
    shards: list[list[Entry]] = [[]]
    for name, shape in shapes(model).items():
        entries = entries_of(name, shape, dtype, quantize)
        if shards[-1] and size_of(shards[-1]) + size_of(entries) > most:
            shards.append([])
        shards[-1] += entries
    n = len(shards)
    if n == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{n:05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def size_of(entries: list[Entry]) -> int:
    """Bytes of some tensors."""
    return sum(entry.nbytes for entry in entries)


def entries_of(
    name: str, shape: tuple[int, ...], dtype: str, quantize: QuantConfig | None
) -> list[Entry]:
    """What a weight becomes: itself, or what it is packed into.

    Raises:
        ConfigError: its columns do not divide into groups.
    """
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


# ---- from the model to the disk ----------------------------------------------------------------


class Tensors:
    """Makes the weights of the merged model, each when it is asked for.

    Args:
        model: with LoRA layers.
        original: where W comes from, or None for the model itself; used up.
        quantize: how matrices are packed, or None.
        dtype: of everything that is not packed.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        original: Checkpoint | None,
        quantize: QuantConfig | None,
        dtype: mx.Dtype,
    ) -> None:
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.originals: dict[str, mx.array] | None = None
        if original is not None:
            shards = original.shards
            self.originals = {name: a for shard in shards for name, a in shard.items()}
            shards.clear()  # or every tensor that was read would stay
        self.quantize, self.dtype = quantize, dtype

    def make(self, name: str) -> tuple[mx.array, ...]:
        """The tensors that a weight becomes: itself, or what it is packed into; evaluated.

        Raises:
            WeightsError: a number that the dtype cannot hold.
        """
        module = self.modules[name.rpartition(".")[0]]
        is_matrix = name.endswith(".weight") and isinstance(module, (LoRALinear, FrozenMatrix))
        dense: tuple[mx.array, ...] = ()
        if self.quantize is None or not is_matrix:
            made = (self.dense(name, module),)
        elif (
            self.originals is None
            and isinstance(module, FrozenMatrix)
            and module.quant == self.quantize
        ):
            made = module.packed()  # packing again what was packed would lose a little more
        else:  # scales and biases are found in float32, as they are while loading
            dense = (self.dense(name, module).astype(mx.float32),)
            made = pack(dense[0], self.quantize)
        made = tuple(a.astype(self.dtype) if mx.issubdtype(a.dtype, FLOAT) else a for a in made)
        floats = [a for a in (*dense, *made) if mx.issubdtype(a.dtype, FLOAT)]
        if not all(mx.isfinite(a).all().item() for a in floats):
            raise WeightsError(
                f"{name} of the merged model has numbers that {self.dtype} cannot hold, or NaN: "
                "export as bfloat16, or train again if the loss was NaN"
            )
        return made

    def dense(self, name: str, module: Any) -> mx.array:
        """The merged weight, or another tensor of the base as it is."""
        is_weight = name.endswith(".weight")
        if isinstance(module, LoRALinear) and is_weight:
            return module.merged() if self.originals is None else self._onto_original(name, module)
        if self.originals is not None:
            return self.originals.pop(name)
        if isinstance(module, LoRALinear):
            module = module.base_layer
        if isinstance(module, FrozenMatrix) and is_weight:
            return module.dense()
        return module[name.rpartition(".")[2]]

    def _onto_original(self, name: str, layer: LoRALinear) -> mx.array:
        assert self.originals is not None
        A, B = (factor.astype(mx.float32) for factor in layer.update_of_the_base())
        W = self.originals.pop(name).astype(mx.float32) + layer.scale * (B @ A)
        if isinstance(layer, DoRALinear):
            lengths = mx.sqrt(W.square().sum(axis=1))
            W = (layer.lora_magnitude_vector.astype(mx.float32) / lengths)[:, None] * W
        return W


def write_shard(path: Path, entries: list[Entry], tensors: Tensors) -> None:
    """Writes one safetensors file, tensor by tensor, and reads it back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide numbers first, as safetensors itself does: readers map them, and want them aligned.
    for entry in sorted(entries, key=lambda entry: -entry.width):
        offsets = [offset, offset := offset + entry.nbytes]
        header[entry.name] = dict(dtype=entry.dtype, shape=entry.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sums = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight, parts in groupby(entries, key=lambda entry: entry.weight):
            for entry, array in zip(parts, tensors.make(weight), strict=True):
                assert tuple(array.shape) == entry.shape and array.nbytes == entry.nbytes
                content = np.array(array.reshape(-1).view(mx.uint8), copy=False).data
                file.seek(8 + len(text) + header[entry.name]["data_offsets"][0])
                file.write(content)
                sums[entry.name] = zlib.crc32(content)
            mx.clear_cache()
    read = read_safetensors_header(path, WeightsError)
    with path.open("rb") as file:
        for name, checksum in sums.items():
            start, end = read[name]["data_offsets"]
            file.seek(8 + len(text) + start)
            if zlib.crc32(file.read(end - start)) != checksum:
                raise WeightsError(f"{path}: {name} reads back otherwise than it was written")
