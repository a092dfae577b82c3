"""Frozen weights, dense or packed: which matrices are quantised, and how they are multiplied.

MLX's affine quantisation stores a row in groups: w = scale * q + bias, q an unsigned integer of
`bits` bits. QLoRA (Dettmers et al. 2023, arXiv 2305.14314) keeps such weights frozen and sends
gradients through them to small trainable matrices.
"""

import itertools
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu.blas import row_product
from mlx_qlora.cpu.streams import streams
from mlx_qlora.device import FrozenMatmul
from mlx_qlora.errors import ConfigError, require
from mlx_qlora.model.stored import StoredMatrix

# What mx.quantize accepts. The floating-point modes each have exactly one shape.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
PARTS = ("weight", "scales", "biases")  # of a packed matrix; only affine has biases
BLOCK = 1 << 18  # numbers that a core dequantises at once, where memory is short
PACKED_AT_ONCE = 1 << 23  # numbers, which are in float32 meanwhile


@dataclass(frozen=True)
class QuantConfig:
    """How matrices are quantised: `bits` per weight in groups of `group_size` along a row.

    The fields are the keywords of MLX's functions; a ConfigError if it has no such kernel.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        bits, size, mode = self.bits, self.group_size, self.mode
        if mode == "affine":
            require(bits in AFFINE_BITS, "bits", f"be one of {AFFINE_BITS}", bits)
            require(size in AFFINE_GROUPS, "group_size", f"be one of {AFFINE_GROUPS}", size)
            return
        legal = ", ".join(("affine", *FLOAT_MODES))
        require(mode in FLOAT_MODES, "mode", f"be one of {legal}", mode)
        if (bits, size) != FLOAT_MODES[mode]:
            bits, size = FLOAT_MODES[mode]
            raise ConfigError(f"mode {mode} needs bits={bits} and group_size={size}; set them")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix of this shape divides into whole groups."""
        return len(shape) == 2 and shape[1] % self.group_size == 0


class FrozenMatrix(nn.Module):
    """A matrix W that is never trained: dense, or packed by `mx.quantize`.

    `weight` is (rows, columns), or uint32 with `scales` (and, for affine, `biases`) beside it. A
    streamed matrix has none of them but while a layer is computed (`streaming.LayerReader`), and
    reads what it is asked for from its file. `Linear` and `Embedding` below are its two uses.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = mx.zeros((rows, columns))
        self.quant: QuantConfig | None = None  # how `weight` is packed, or None if it is dense
        self.dtype = mx.float32
        self.matmul: FrozenMatmul = "quantized"  # how a packed matrix is multiplied
        self._resident: mx.array | None = None  # W, dequantised
        self.stack: Stack | None = None  # of this one and others, as `stacked` made it
        self.stored: StoredMatrix | None = None  # where it is, if it is streamed
        self._before: list[mx.array] = []  # what the rows read last wait for

    @property
    def dtype(self) -> mx.Dtype:
        """What `weight` has, or has once dequantised."""
        return getattr(mx, self._dtype)

    @dtype.setter
    def dtype(self, dtype: mx.Dtype) -> None:
        # By its name: MLX's object can be neither copied nor pickled.
        self._dtype = str(dtype).rpartition(".")[2]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of W, whatever its packing."""
        arrays: Any = self.stored.tensors if self.stored is not None else self
        rows, columns = arrays["weight"].shape
        if self.quant is not None:
            # 32 // bits would be wrong for 3, 5 and 6 bits; the scales know.
            columns = arrays["scales"].shape[-1] * self.quant.group_size
        return rows, columns

    def _extra_repr(self) -> str:
        quant = self.quant
        packing = f", {quant.bits} bits, groups of {quant.group_size}" if quant else ""
        return f"{self.shape[0]} x {self.shape[1]}, {self._dtype}{packing}"

    @property
    def is_away(self) -> bool:
        """Whether its arrays are in their file, and not in memory."""
        return self.stored is not None and "weight" not in self

    def packed(self) -> tuple[Any, ...]:
        """The arrays that `mx.quantize` made: weight, scales and, for affine, biases.

        Those that are away are read, for this use alone.
        """
        return self.read() if self.is_away else tuple(self[name] for name in PARTS if name in self)

    def read(self, rows: np.ndarray | None = None) -> tuple[mx.array, ...]:
        """The arrays in its file, or some of their rows."""
        assert self.stored is not None
        return self.as_computed(self.stored.read(rows))

    def as_computed(self, read: list[mx.array]) -> tuple[mx.array, ...]:
        """What `stored` has read, in the dtypes that it is computed with."""
        assert self.stored is not None
        pairs = zip(self.stored.tensors.values(), read)
        arrays = (x.view(mx.bfloat16) if tensor.kind == "BF16" else x for tensor, x in pairs)
        return tuple(cast(array, self.dtype) for array in arrays)

    def drop(self) -> None:
        """Forget the arrays, which are in a file, or will be."""
        self._resident = self.stack = None
        for name in PARTS:
            self.pop(name, None)

    def stream_from(self, stored: StoredMatrix) -> None:
        """Leave the arrays in their file from now on."""
        self.drop()
        self.stored = stored
        self._no_grad.update(PARTS)  # which `freeze` would do only for what is there

    def pack(self, dense: mx.array, quant: QuantConfig) -> None:
        """Put W, given dense in any float dtype, in its place, packed; floats in `self.dtype`."""
        # Scales and biases are found in float32: half precision would cost accuracy. By blocks of
        # rows, as an embedding is the largest matrix, and twice as large in float32.
        height, blocks = max(1, PACKED_AT_ONCE // dense.shape[1]), []
        for start in range(0, len(dense), height):
            blocks.append(pack(dense[start : start + height].astype(mx.float32), quant))
            mx.eval(blocks[-1])
        alone = len(blocks) == 1
        whole = blocks[0] if alone else [mx.concatenate([*parts]) for parts in zip(*blocks)]
        self.put(tuple(whole), quant)

    def put(self, parts: tuple[mx.array, ...], quant: QuantConfig) -> None:
        """Put W in its place as `mx.quantize` packs it."""
        for name, part in zip(PARTS, parts):
            self[name] = cast(part, self.dtype)
        self.quant = quant
        mx.eval(self.packed())

    def dense(self) -> mx.array:
        """W as a dense matrix in the compute dtype."""
        if self._resident is not None:
            return self._resident
        if self.quant is None:
            return self.packed()[0]
        if self.is_away:
            return self.unpacked_by_blocks()
        return unpack(self.packed(), self.quant, self.dtype)

    @property
    def resident_bytes(self) -> int:
        """Size of the dequantised copy, if there is one."""
        return 0 if self._resident is None else self._resident.nbytes

    def make_resident(self) -> None:
        """Keep a dequantised copy, if the strategy asks for one."""
        self._resident = self.stack = None
        if self.matmul == "resident":
            self.make_copy()

    def multiply(self, x: mx.array) -> mx.array:
        """x (..., columns) -> x @ W.T (..., rows), in x's dtype."""
        if self.quant is None:
            return _dense_product(x, self.dense())
        here = device.current()
        few = x.size <= here.few_rows * x.shape[-1]  # a word at a time, while text is generated
        if few and here.row_as_column:
            few = self._resident is None  # a dense column product is faster still
        if self.matmul == "quantized" or few:
            return mx.quantized_matmul(x, *self.packed(), transpose=True, **vars(self.quant))
        if self._resident is not None:
            return _dense_product(x, self._resident)
        return _dequantize_and_multiply(x, self.packed(), self.quant)

    def multiply_back(self, dy: mx.array) -> mx.array:
        """dy (..., rows) -> dy @ W (..., columns): the gradient of `multiply`."""
        if self.quant is not None and self._resident is None and self.matmul == "quantized":
            return mx.quantized_matmul(dy, *self.packed(), transpose=False, **vars(self.quant))
        return dy @ self.dense()

    def lookup(self, indices: mx.array) -> mx.array:
        """Some rows of W, dense: indices (...) int -> (..., columns)."""
        if self.is_away:
            numbers, places = np.unique(np.array(indices), return_inverse=True)
            places = mx.array(places.reshape(indices.shape))
            rows = tuple(part[places] for part in self.read(numbers))
            return rows[0] if self.quant is None else unpack(rows, self.quant, self.dtype)
        if self.quant is None or self._resident is not None:
            return self.dense()[indices]
        return unpack(tuple(part[indices] for part in self.packed()), self.quant, self.dtype)

    def rows(self, start: int, end: int, after: list[mx.array]) -> "FrozenMatrix":
        """The matrix of rows start .. end; dense from then on, unless the kernel reads packed.

        For the output head: the widest matrix of a small model, of which no dense copy may exist
        as a whole. Nothing is dequantised before the arrays in `after` are computed. What is away
        is read at once, while the rows of the call before are computed with.
        """
        part = FrozenMatrix(0, 0)
        part.quant, part.dtype, part.matmul = self.quant, self.dtype, self.matmul
        if not self.is_away and (self.quant is None or self._resident is not None):
            part.quant, part.weight = None, self.dense()[start:end]
            return part
        if self.is_away:
            mx.eval(self._before)  # or all slices might be in memory, waiting for their turn
            self._before = after if end < self.shape[0] else []
            parts = [*self.read(np.arange(start, end))]
        else:
            parts = [array[start:end] for array in self.packed()]
        rows = mx.depends(parts, after)
        for name, array in zip(PARTS, rows):
            part[name] = array
        if self.quant is not None and self.matmul != "quantized":
            part._resident = part.dense()
        return part

    @contextmanager
    def dense_for_now(self) -> Iterator[None]:
        """Share one dequantised copy among the graphs that are built within."""
        is_lent = self._resident is None
        self.make_copy()
        try:
            yield
        finally:
            if is_lent:
                self.drop_copy()

    def make_copy(self) -> None:
        """Dequantise W now, in little memory, for all until `drop_copy`."""
        if self._resident is None and self.quant is not None and self.matmul != "quantized":
            self._resident = self.unpacked_by_blocks()

    def drop_copy(self) -> None:
        """Forget what `make_copy` made."""
        self._resident = None

    def unpacked_by_blocks(self) -> mx.array:
        """W, dequantised and evaluated; on a CPU a block on each core at a time.

        MLX's temporary arrays are as large as its result there.
        """
        assert self.quant is not None
        packed, (rows, columns) = self.packed(), self.shape
        if not device.current().side_by_side:
            mx.eval(W := unpack(packed, self.quant, self.dtype))
            return W
        cores, W = streams(device.cores()), mx.zeros((rows, columns), self.dtype)
        height = max(1, BLOCK // columns)
        for first in range(0, rows, height * len(cores)):
            starts = [*range(first, min(first + height * len(cores), rows), height)]
            blocks = []
            for start, stream in zip(starts, cores):
                with mx.stream(stream):
                    part = tuple(array[start : start + height] for array in packed)
                    blocks.append(unpack(part, self.quant, self.dtype))
            mx.async_eval(blocks)
            for start in starts:
                W[start : start + height] = blocks.pop(0)
            mx.eval(W)  # in its place
        return W


@dataclass(frozen=True)
class Stack:
    """Matrices of the same width, one above the other; they are slices of `matrix` since."""

    matrix: FrozenMatrix
    ends: list[int]  # the rows after each but the last
    slices: list[mx.array]  # what the matrices have as long as this is their stack

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the matrices is no slice of it


_stacking = threading.Lock()  # a lazy slice that another thread met could never be computed


def stacked(matrices: list[Any]) -> Stack | None:
    """The matrices as one, of which they become slices; None if they are packed differently."""
    with _stacking:
        first = matrices[0]
        names = [name for name in (*PARTS, "_resident") if first.get(name) is not None]
        arrays = [matrix.get(name) for matrix in matrices for name in names]
        alike = {(m.quant, m._dtype, m.matmul, m.weight.shape[1]) for m in matrices}
        fits = len(alike) == 1 and all(array is not None for array in arrays)
        made: Stack | None = first.stack
        if made is not None and fits and made.matrix.matmul == first.matmul:
            if len(arrays) == len(made.slices) and all(map(operator.is_, arrays, made.slices)):
                return made
        first.stack = None  # before the next is made: it would keep the rows in memory
        if not fits or first.matmul == "dequantize":
            return None
        whole = FrozenMatrix(0, 0)
        whole.quant, whole.dtype, whole.matmul = first.quant, first.dtype, first.matmul
        ends = list(itertools.accumulate(len(matrix.weight) for matrix in matrices))
        slices = dict[tuple[int, str], mx.array]()
        for name in names:
            rows = mx.concatenate([matrix[name] for matrix in matrices])
            setattr(whole, name, rows)
            for i, (start, end) in enumerate(zip([0, *ends], ends)):
                slices[i, name] = rows[start:end]  # of rows that are there: no memory
        # Before others see them. Nobody waits: layers may be under way.
        mx.async_eval(whole.packed(), list(slices.values()))
        for (i, name), part in slices.items():
            setattr(matrices[i], name, part)
        in_order = [slices[i, name] for i in range(len(matrices)) for name in names]
        first.stack = Stack(whole, ends[:-1], in_order)
        return first.stack


Given = mx.array | None
Gradients = tuple[mx.array, dict[str, mx.array]]  # of x, and of weights by their names


class Linear(FrozenMatrix):
    """y = x @ W.T + bias (d_out,), frozen."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(d_out, d_in)
        if bias:
            self.bias = mx.zeros((d_out,))

    @property
    def base_layer(self) -> "Linear":
        """Itself, as it has no update; `LoRALinear` takes its place, and has one."""
        return self

    def __call__(self, x: mx.array, dropout_key: mx.array | None = None) -> mx.array:
        """x (..., d_in) -> (..., d_out). The key is for `LoRALinear`."""
        return self.complete(self.multiply(x), x)

    def complete(self, product: mx.array, x: mx.array, key: Given = None) -> mx.array:
        """The result for x (..., d_in), from its product with W (..., d_out)."""
        return product + self.bias if "bias" in self else product

    def vjp(self, x: mx.array, dy: mx.array, key: Given, others: Given) -> Gradients:
        """From the result's gradient (N, d_out) those of x (N, d_in) and of weights by their names.

        `others` is what other linears add to the gradient of x.
        """
        return plus(others, self.multiply_back(dy)), {}


class Embedding(FrozenMatrix):
    """Rows of W by token id; with tied weights, W also is the output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens (...) int -> (..., D)."""
        return self.lookup(tokens)


def plus(others: mx.array | None, term: mx.array) -> mx.array:
    """The sum, where there are others."""
    return term if others is None else others + term


def pack(dense: mx.array, quant: QuantConfig) -> tuple[mx.array, ...]:
    """Quantise a dense matrix; the inverse of `unpack` up to rounding."""
    return tuple(mx.quantize(dense, **vars(quant)))


def unpack(packed: tuple[Any, ...], quant: QuantConfig, dtype: mx.Dtype) -> mx.array:
    """Dequantise to `dtype`."""
    return mx.dequantize(*packed, **vars(quant), dtype=dtype)


def cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Floats take the compute dtype, once: one float32 scale would widen every activation."""
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _dense_product(x: mx.array, W: mx.array) -> mx.array:
    is_row = x.size == x.shape[-1]
    return row_product(x, W) if is_row and device.current().row_as_column else x @ W.T


def _dequantize_and_multiply(
    x: mx.array, packed: tuple[mx.array, ...], quant: QuantConfig
) -> mx.array:
    """x @ W.T that dequantises again in the backward, so that no dense copy outlives its use."""

    def dense_after(array: mx.array) -> mx.array:
        # Tied to the array, or a compiler would see two equal dequantisations and keep the first
        # one's result for the second: a dense copy of every matrix at once.
        return unpack(tuple(mx.depends(list(packed), [array])), quant, array.dtype)

    def forward(x: mx.array) -> mx.array:
        return x @ dense_after(x).T

    def backward(x: mx.array, dy: mx.array, y: mx.array) -> mx.array:
        return dy @ dense_after(dy)

    multiply: Any = mx.custom_function(forward)
    multiply.vjp(backward)
    return multiply(x)
