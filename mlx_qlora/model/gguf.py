"""A GGUF file -> a Hugging Face style config and tensors with Hugging Face names and layout.

Nothing but headers and vectors is read before it is used, tensor by tensor. Q4_0, Q4_1 and Q8_0
become MLX's affine 4 and 8 bit layout with groups of 32 bit by bit, as `mx.load` does it; in a file
with other types, K-quants and the like, all become groups of MLX as they are loaded, or dense
matrices. Three differences from a Hugging Face checkpoint remain, and are undone:

1. names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`;
2. for some architectures the rows of q and k are permuted for llama.cpp's RoPE, which turns pairs
   (2i, 2i + 1), and for Gemma's the norms have their 1 added;
3. Llama 3.1's RoPE scaling is a tensor of factors, `rope_freqs.weight`, instead of parameters.
"""

import importlib.util
import math
import os
import re
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import WeightsError, listing
from mlx_qlora.model.families import LlamaConfig
from mlx_qlora.model.gguf_terms import FACTORS, TOP_NAMES, config_of, module_names, permute
from mlx_qlora.model.hub import check_readable, weight_files
from mlx_qlora.model.quantize import QuantConfig, pack
from mlx_qlora.model.stored import StoredTensor, stamp_of

# ggml's type numbers -> (name, bytes per block, weights per block); the ones that MLX has, too.
MLX_TYPES = {0: ("F32", 4, 1), 1: ("F16", 2, 1), 2: ("Q4_0", 18, 32), 3: ("Q4_1", 20, 32)}
MLX_TYPES |= {8: ("Q8_0", 34, 32)}
# Those that the package gguf dequantises.
TYPES = MLX_TYPES | {
    6: ("Q5_0", 22, 32), 7: ("Q5_1", 24, 32), 10: ("Q2_K", 84, 256), 11: ("Q3_K", 110, 256),
    12: ("Q4_K", 144, 256), 13: ("Q5_K", 176, 256), 14: ("Q6_K", 210, 256),
    16: ("IQ2_XXS", 66, 256), 17: ("IQ2_XS", 74, 256), 18: ("IQ3_XXS", 98, 256),
    19: ("IQ1_S", 50, 256), 20: ("IQ4_NL", 18, 32), 21: ("IQ3_S", 110, 256),
    22: ("IQ2_S", 82, 256), 23: ("IQ4_XS", 136, 256), 29: ("IQ1_M", 56, 256), 30: ("BF16", 2, 1),
    34: ("TQ1_0", 54, 256), 35: ("TQ2_0", 66, 256), 39: ("MXFP4", 17, 32),
}  # fmt: skip
SIZES = {name: sizes for name, *sizes in TYPES.values()}  # bytes and weights of a block
# Bits that MLX's groups of 32 need to hold a type: as many where its own groups are such, two more
# where they are not, so that the error that is added is a small part of what is there.
BITS = {
    **{"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8},
    **{"Q6_K": 8, "Q3_K": 5, "Q2_K": 4, "MXFP4": 6, "IQ4_NL": 6, "IQ4_XS": 6},
    **dict.fromkeys(("IQ3_XXS", "IQ3_S"), 5),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"), 5),
}
# What pairs are, whoever reads them.
PAIRS: dict[str, type] = {
    **dict.fromkeys(("general.architecture", "general.type"), str),
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"), str),
    **dict.fromkeys(("general.alignment", "split.no", "split.count", "split.tensors.count"), int),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), list),
    **dict.fromkeys(("tokenizer.ggml.token_type", "tokenizer.ggml.scores"), np.ndarray),
}
MOST_DIMENSIONS, MOST_ITEMS = 4, 1 << 22  # ggml's; and of an array, which no vocabulary has
STRING, ARRAY = 8, 9  # metadata types; the scalars with their struct codes:
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip

BLOCK = 1 << 22  # weights that are packed at once
Parts = tuple[mx.array, ...]  # of a packed matrix


@dataclass
class GgufMatrix:
    """A matrix of a GGUF file as ggml stores it; nothing is read before it is used."""

    stored: StoredTensor  # (rows, bytes of a row) uint8
    kind: str  # ggml's name of the type
    is_mlx: bool  # whether MLX has all types of the file
    order: np.ndarray | None = None  # of the rows, where llama.cpp has permuted them

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        (rows, length), (n_bytes, n_weights) = self.stored.shape, SIZES[self.kind]
        return rows, length // n_bytes * n_weights

    @property
    def is_packed(self) -> bool:
        """Whether it is quantised."""
        return self.kind in BITS

    def _read(self, rows: slice) -> np.ndarray:
        numbers = np.arange(self.shape[0]) if self.order is None else self.order
        return np.array(self.stored.read(numbers[rows]), copy=False)

    def dense(self, rows: slice = slice(None)) -> np.ndarray:
        """The matrix, or some of its rows, in float32."""
        data = self._read(rows)
        if self.kind == "BF16":
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if not self.is_packed:
            return data.view({"F32": np.float32, "F16": np.float16}[self.kind]).astype(np.float32)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(data, GGMLQuantizationType[self.kind])

    def pack(self) -> tuple[Parts, QuantConfig]:
        """Weight, scales and biases in MLX's affine layout, and what it is.

        Exact where ggml's groups are MLX's; else rounded again. Some rows at a time: what is made
        on the way is several times as large.
        """
        (rows, columns), quant = self.shape, QuantConfig(BITS[self.kind], 32)
        height = max(1, BLOCK // columns)
        parts = (slice(i, min(i + height, rows)) for i in range(0, rows, height))
        blocks = [self._pack(part, quant) for part in parts]
        return tuple(mx.concatenate([*parts]) for parts in zip(*blocks)), quant

    def _pack(self, rows: slice, quant: QuantConfig) -> Parts:
        data = self._read(rows)
        groups = self._groups(data)
        if groups is None:
            return pack(mx.array(self.dense(rows)), quant)
        scales, biases = groups
        codes = data.reshape(*scales.shape, -1)[..., -quant.bits * 4 :]
        if self.kind == "Q8_0":  # signed
            weight = codes ^ 128
        elif self.kind in ("Q4_0", "Q4_1"):  # of 32 weights the first 16, and the others above them
            codes = np.ascontiguousarray(codes).view(np.uint16)
            first, others = codes & 0xF | codes >> 4 & 0xF0, codes >> 4 & 0xF | codes >> 8 & 0xF0
            weight = np.concatenate([first, others], -1).astype(np.uint8)
        else:
            steps = np.where(scales == 0, 1, scales)[..., None]
            dense = self.dense(rows).reshape(*scales.shape, 32)
            whole = np.clip(np.rint((dense - biases[..., None]) / steps), 0, 2**quant.bits - 1)
            bits = whole.astype(np.uint8)[..., None] >> np.arange(quant.bits, dtype=np.uint8) & 1
            weight = np.packbits(bits.reshape(len(data), -1), axis=1, bitorder="little")
        weight = np.ascontiguousarray(weight.reshape(len(data), -1)).view(np.uint32)
        return mx.array(weight), mx.array(scales), mx.array(biases)

    def _groups(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Scale and bias (rows, groups) float32 of each 32 weights, if ggml's groups are such."""
        blocks = data.reshape(len(data), -1, SIZES[self.kind][0])
        half = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
        if self.kind in ("Q4_K", "Q5_K"):  # of 256 weights: 8 groups with 6 bits for each of two
            from gguf.quants import Q4_K

            wanted = np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12)
            scale, least = (x.reshape(len(data), -1, 8) for x in Q4_K.get_scale_min(wanted))
            shape = len(data), -1
            return (half[..., :1] * scale).reshape(shape), -(half[..., 1:] * least).reshape(shape)
        zero = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -128}.get(self.kind)
        if zero is not None:
            return half[..., 0], zero * half[..., 0]
        return (half[..., 0], half[..., 1]) if self.kind in ("Q4_1", "Q5_1") else None


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read a GGUF file, or the first of several parts that make one.

    Returns what its `config.json` would say; the tensors, matrices as `GgufMatrix`; and the file's
    own key-value pairs, tokenizer included. A WeightsError names what nobody can read.
    """
    parts = weight_files(path)
    headers = [read_header(part) for part in parts]
    for i, (part, (_, pairs, _)) in enumerate(zip(parts, headers)):
        no, count = pairs.get("split.no", i), pairs.get("split.count") or len(parts)
        if (no, count) != (i, len(parts)):
            raise WeightsError(
                f"{part} says that it is part {no + 1} of {count}, and its name does not; join the "
                "parts (llama-gguf-split --merge FIRST-PART OUTPUT), or restore their names"
            )
    names = [name for tensors, _, _ in headers for name, *_ in tensors]
    if not len({*names}) == len(names) == headers[0][1].get("split.tensors.count", len(names)):
        raise WeightsError(f"{path} lacks tensors, or holds some twice; download it again")
    kinds = {kind for tensors, _, _ in headers for _, _, kind, _ in tensors}
    is_mlx = kinds <= {*MLX_TYPES}
    if not is_mlx and importlib.util.find_spec("gguf") is None:
        raise WeightsError(
            f"{path} holds K-quants, and needs the package gguf; run: pip install 'mlx-qlora[gguf]'"
        )
    metadata, loaded = headers[0][1], {}
    for part, (tensors, _, start) in zip(parts, headers):
        stamp = stamp_of(part)
        for name, shape, kind, offset in tensors:
            type_name, n_bytes, n_weights = TYPES[kind]
            size = math.prod(shape[1:]), shape[0] // n_weights * n_bytes
            stored = StoredTensor(part, start + offset, size, "U8", stamp)
            matrix = GgufMatrix(stored, type_name, is_mlx)
            is_vector = len(shape) == 1 and not matrix.is_packed
            loaded[name] = mx.array(matrix.dense()[0]) if is_vector else matrix
    vectors = {name for name, x in loaded.items() if isinstance(x, mx.array)}
    factors = {n: loaded.pop(f"{n}.weight") if f"{n}.weight" in vectors else None for n in FACTORS}
    config = config_of(path, metadata, loaded.keys(), factors)
    llama = LlamaConfig.from_hf(config)
    last = f"blk.{llama.num_hidden_layers - 1}.attn_output.weight"
    if last not in loaded:
        raise WeightsError(f"{path} is incomplete: {last} is missing; download it again")

    tensors = {}
    for name in list(loaded):
        hf_name, array = _hf_name(path, name, llama), loaded.pop(name)
        order = np.argsort(permute(np.arange(array.shape[0]), hf_name, llama))
        if isinstance(array, GgufMatrix):
            array.order = order
        elif name.endswith(".bias"):
            array = array[mx.array(order)]
        elif llama.norm_offset and hf_name.endswith("norm.weight"):
            array = array - llama.norm_offset
        tensors[hf_name] = array
    return config, tensors, metadata


# ---- the header: types and sizes, before anything is loaded --------------------------------------

Tensors = list[tuple[str, list[int], int, int]]  # name, shape, type, offset


def read_header(path: Path) -> tuple[Tensors, dict[str, Any], int]:
    """Read every tensor's name, shape, type and offset, the pairs, and where the data begins.

    Refuses damaged files, and unknown types.
    """
    check_readable(path, WeightsError)
    try:
        with path.open("rb") as file:
            tensors, pairs, data_start = _read_header(file)
    except (struct.error, ValueError, TypeError, OverflowError, LookupError, EOFError, OSError):
        raise WeightsError(f"{path} is damaged or truncated; download it again") from None
    if tensors is None:
        raise WeightsError(f"{path} is not a GGUF file (version 2 or 3)")
    for key, value in pairs.items():
        if not isinstance(value, kind := PAIRS.get(key, object)):
            said = f"{key} must be of the type {kind.__name__}; got {reprlib.repr(value)}"
            raise WeightsError(f"{path}: {said}; download it again")
    problems = [f"{name}: type {kind}" for name, _, kind, _ in tensors if kind not in TYPES]
    if problems:
        supported = ", ".join(name for name, _, _ in TYPES.values())
        raise WeightsError(
            f"{path} has tensors of unsupported types (supported: {supported}); use another "
            f"quantisation of the model, or its safetensors:\n{listing(problems, most=5)}"
        )
    size, again, end = path.stat().st_size, "download it again", data_start
    for name, shape, kind, offset in sorted(tensors, key=lambda tensor: tensor[3]):
        _, block_bytes, block_weights = TYPES[kind]
        if not 0 < len(shape) <= MOST_DIMENSIONS or not all(shape) or shape[0] % block_weights:
            raise WeightsError(f"{path} is damaged: {name} has shape {shape}; {again}")
        if data_start + offset < end:
            raise WeightsError(f"{path} is damaged: {name} overlaps another tensor; {again}")
        end = data_start + offset + math.prod(shape) // block_weights * block_bytes
        if end > size:
            raise WeightsError(f"{path} is truncated: {name} ends at byte {end} of {size}; {again}")
    return tensors, pairs, data_start


def _read_header(file: BinaryIO) -> tuple[Tensors | None, dict[str, Any], int]:
    # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    size = os.fstat(file.fileno()).st_size

    def take(n: int) -> bytes:
        if n > 4096 and n > size - file.tell():  # or so much memory would be asked for
            raise EOFError
        return file.read(n)

    def number(code: str) -> Any:
        return struct.unpack("<" + code, take(struct.calcsize(code)))[0]

    def text() -> str:
        return take(number("Q")).decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            inner, length = number("I"), number("Q")
            if length > MOST_ITEMS:
                raise ValueError
            if inner == STRING:
                return [text() for _ in range(length)]
            dtype = np.dtype("<" + SCALARS[inner].replace("q", "i8").replace("Q", "u8"))
            return np.frombuffer(take(dtype.itemsize * length), dtype, length)
        return number(SCALARS[kind])

    if file.read(4) != b"GGUF" or number("I") not in (2, 3):
        return None, {}, 0
    tensor_count, pair_count = number("Q"), number("Q")
    pairs = {}
    for _ in range(pair_count):
        key = text()
        if key in pairs:
            raise ValueError
        pairs[key] = value(number("I"))
    tensors = []
    for _ in range(tensor_count):
        name = text()
        shape = [number("Q") for _ in range(min(number("I"), MOST_DIMENSIONS + 1))]
        tensors.append((name, shape, number("I"), number("Q")))
    alignment = pairs.get("general.alignment") or 32
    if alignment < 1:
        raise ValueError
    return tensors, pairs, -(-file.tell() // alignment) * alignment


# ---- names and order -----------------------------------------------------------------------------


def _hf_name(path: Path, name: str, llama: LlamaConfig) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{leaf}"
    layer, names = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem), module_names(llama)
    if layer and layer[2] in names:
        return f"model.layers.{layer[1]}.{names[layer[2]]}.{leaf}"
    raise WeightsError(f"{path}: tensor {name!r} belongs to no {llama.model_type} model")


def source_repository(metadata: dict[str, Any]) -> str | None:
    """The repository that a file was made from, where its metadata says so."""
    keys = ("general.base_model.0.repo_url", "general.source.repo_url", "general.source.url")
    urls = " ".join(str(metadata.get(key)) for key in keys)
    found = re.search(r"huggingface\.co/([\w.-]+/[\w.-]+)", urls)
    return found[1] if found else None
