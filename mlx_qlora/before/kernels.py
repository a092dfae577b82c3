"""Every kernel that training needs, against its definition in float64 on the CPU.

The definitions are written out, and MLX differentiates them: they share no kernel with what they
are compared with, not even on a CPU.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.before.doctor import Finding
from mlx_qlora.cpu.attention import Reach
from mlx_qlora.model import dropout, llama, swiglu
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.families import LlamaConfig
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig
from mlx_qlora.model.rope import Rope, RopeConfig
from mlx_qlora.train.loss import cross_entropy

Case = tuple[str, list[mx.array], list[Any]]  # in words; arrays; what they should be
LENGTHS = 1, 8, 9, 33, 100, 1023, 1025, 2048  # of documents, around what kernels tell apart
SHORT = 128  # longer ones have fewer heads, and in 16 bits a CPU would take minutes for them
# Errors that rounding explains, by the largest number of a result; a wrong kernel is off by far
# more. A position of 700 is off by 700 / 2^24 radians.
ALLOWED = {"float32": 3e-5, "bfloat16": 6e-2, "RoPE, float32": 3e-4}


def kernels() -> Iterator[Finding]:
    """A line for each kernel and dtype."""
    for name, cases in KERNELS.items():
        for dtype in ("float32", "bfloat16"):
            allowed, errors = ALLOWED.get(f"{name}, {dtype}", ALLOWED[dtype]), dict[str, float]()
            try:
                for case, got, want in cases(getattr(mx, dtype)):
                    errors[case] = max(map(error, got, want))
            except Exception as cause:  # of MLX: the other kernels are tested all the same
                yield Finding("fail", name, f"{dtype}: {type(cause).__name__}: {cause}")
                continue
            text = f"{dtype}: {len(errors)} cases, error at most {max(errors.values()):.1e}"
            wrong = [f"{case}: {e:.1e}" for case, e in errors.items() if not e <= allowed]
            if wrong:
                text += f", allowed {allowed:.0e}; wrong in {len(wrong)}: {'; '.join(wrong[:4])}"
            yield Finding("fail" if wrong else "pass", name, text)


def error(got: mx.array, want: Any) -> float:
    """The largest difference by the largest number; infinite where something is no number."""
    ours, theirs = np.array(got.astype(mx.float32), float), np.array(want, float)
    worst = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 0.1)
    return float(worst) if np.isfinite(worst) else np.inf


def draw(*shape: int) -> np.ndarray:
    """Normal float32 numbers that bfloat16 holds exactly, and that follow from the shape."""
    x = np.random.RandomState(zlib.crc32(str(shape).encode())).standard_normal(shape)
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def both(function: Callable[..., mx.array], inputs: list[Any], dy: Any, dtype: Any) -> list[Any]:
    """A function's value, and the gradients of its inputs."""
    arrays = [mx.array(x, dtype) for x in inputs]
    outs, grads = mx.vjp(function, arrays, [mx.array(dy, dtype)])
    return [*outs, *grads]


def defined(function: Callable[..., mx.array], inputs: list[Any], dy: Any) -> list[Any]:
    """The same of its definition."""
    with mx.stream(mx.cpu):
        results = both(function, inputs, dy, mx.float64)
        mx.eval(results)
    return results


def matmul(dtype: mx.Dtype) -> Iterator[Case]:
    """x @ W.T and dy @ W of packed matrices, by MLX's kernel and dequantised."""
    for bits, group in [(bits, group) for bits in (4, 8) for group in (32, 64)]:
        dense, matrix, what = draw(192, 256), FrozenMatrix(192, 256), f"{bits} bits by {group}"
        matrix.dtype = dtype
        matrix.pack(mx.array(dense), QuantConfig(bits, group))
        words = np.array(matrix.weight)
        scales, biases = (np.array(part.astype(mx.float32)) for part in matrix.packed()[1:])
        codes = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & ((1 << bits) - 1)
        W = codes.reshape(192, -1, group) * scales[..., None] + biases[..., None]
        W, step = W.reshape(dense.shape), np.repeat(np.abs(scales), group, axis=1)
        yield f"packing, {what}", [mx.array(W)], [np.where(np.abs(W - dense) <= step, W, dense)]
        for way, rows in (("quantized", 1), ("quantized", 96), ("dequantize", 96)):
            matrix.matmul = way  # pyright: ignore
            x, dy = draw(rows, 256), draw(rows, 192)
            got = [matrix.multiply(mx.array(x, dtype)), matrix.multiply_back(mx.array(dy, dtype))]
            yield f"{way}, {rows} x {what}", got, [x @ W.T, dy @ W]


def attention(dtype: mx.Dtype) -> Iterator[Case]:
    """Attention of documents, and the gradients of q, k and v."""
    longest = SHORT if device.current().kind == "cpu" and dtype != mx.float32 else max(LENGTHS)
    for T, d, n in [(T, d, n) for T in LENGTHS for d in (64, 128) for n in (1, 3) if T <= longest]:
        inputs, dout, want = attention_defined(T, d)
        q, k, v, dy = (mx.array(x[:n], dtype).flatten(0, 1) for x in (*inputs, dout))
        documents, reach = Documents.of(np.array([(i, 0, T) for i in range(n)])), Reach(d**-0.5)
        out, residuals = documents.attend_with_residuals(q, k, v, reach, keep_weights=n == 1)
        got = [out, *documents.attend_vjp(q, k, v, out, residuals, dy, reach)]
        want = [np.array(x[:n]).reshape(n * T, -1, d) for x in want]
        yield f"{n} x {T} positions, heads of {d}", got, want


@functools.lru_cache(maxsize=1)  # for both numbers of documents
def attention_defined(T: int, d: int) -> tuple[list[Any], Any, list[Any]]:
    """(q, k, v), dout, and (out, dq, dk, dv) of three documents; (3, T, heads, d) each."""
    H, K = (4, 2) if T <= SHORT else (2, 1)
    q, k, dout = draw(3, T, H, d), draw(3, T, K, d), draw(T, 3, H, d).swapaxes(0, 1)

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        q, k, v = (mx.repeat(x, H // x.shape[2], 2).swapaxes(1, 2) for x in (q, k, v))
        scores = mx.where(mx.tri(T, dtype=mx.bool_), q @ k.swapaxes(2, 3) * d**-0.5, -mx.inf)
        return (mx.softmax(scores, -1) @ v).swapaxes(1, 2)

    inputs = [q, k, k[:, ::-1].copy()]
    return inputs, dout, defined(attend, inputs, dout)


def rope(dtype: mx.Dtype) -> Iterator[Case]:
    """Heads that are rotated by their positions in documents, and back."""
    documents = Documents.of(np.array([(0, 0, 1), (0, 1, 34), (1, 0, 700)]))
    positions = np.concatenate([np.arange(n) for n in (1, 33, 700)])
    for d in (64, 128):
        angles = positions[:, None, None] * 5e5 ** (-np.arange(0, d, 2) / d)
        cos, sin = np.cos(angles), np.sin(angles)

        def turn(x: mx.array, cos: Any = cos, sin: Any = sin) -> mx.array:
            (a, b), c, s = mx.split(x, 2, -1), mx.array(cos, x.dtype), mx.array(sin, x.dtype)
            return mx.concatenate([a * c - b * s, a * s + b * c], -1)

        rotate = functools.partial(documents.rotate, rope=Rope(d, RopeConfig(theta=5e5)))
        x, dy = [draw(734, 4, d)], draw(734, 1, d).repeat(4, 1)
        yield f"heads of {d}", both(rotate, x, dy, dtype), defined(turn, x, dy)


def elementwise(dtype: mx.Dtype) -> Iterator[Case]:
    """RMSNorm, SwiGLU and rows taken by number, each with its gradient."""
    x, up, dy = draw(500, 576), draw(576, 500).T, draw(1000, 576)[::2]
    norm = llama.RMSNorm(576, LlamaConfig(576, 1, 9, 3, 64, 1536, 49152))
    norm.weight = mx.array(w := draw(576), dtype)
    root = lambda x: mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)  # noqa: E731
    want = defined(lambda x: x * root(x) * mx.array(w, x.dtype), [x], dy)
    yield "RMSNorm", both(norm, [x], dy, dtype), want
    arrays, compiled = [mx.array(a, dtype) for a in (x, up, dy)], device.current().compiles
    got = [swiglu.swiglu(*arrays[:2], compiled=compiled)]
    got += swiglu.swiglu_vjp(*arrays, compiled=compiled)
    yield "SwiGLU", got, defined(lambda x, up: x / (1 + mx.exp(-x)) * up, [x, up], dy)
    rows = np.arange(500) * 7 % 300
    want = defined(lambda x: mx.array(np.eye(500)[rows], x.dtype) @ x, [x], dy)
    take = functools.partial(taken, rows=mx.array(rows))
    yield "gather and scatter", both(take, [x], dy, dtype), want


def taken(x: mx.array, rows: mx.array) -> mx.array:
    """Some rows of x."""
    return x[rows]


def loss(dtype: mx.Dtype) -> Iterator[Case]:
    """The cross-entropy of tokens and its gradient, over five slices of a packed head."""
    head, hidden, targets = FrozenMatrix(5000, 256), draw(33, 256), np.arange(33) * 151
    head.dtype, head.matmul = dtype, device.frozen_matmul("auto")
    head.pack(mx.array(draw(5000, 256) / 8), QuantConfig())
    with device.use(replace(device.current(), head_bytes=1 << 20)):
        found = cross_entropy(head, mx.array(hidden, dtype), mx.array(targets))
    W = np.array(head.dense().astype(mx.float32))

    def nats(x: mx.array) -> mx.array:
        logits = x @ mx.array(W, x.dtype).T
        return mx.logsumexp(logits, -1) - logits[mx.arange(33), mx.array(targets)]

    yield "33 tokens", [found.nats, found.gradient], defined(nats, [hidden], np.ones(33))


def masks(dtype: mx.Dtype) -> Iterator[Case]:
    """Dropout's masks, which are the same bits everywhere."""
    keys = np.array([[1, 2], [3, 1 << 31]], np.uint32)
    row, column = np.arange(99, dtype=np.int32) % 2, np.arange(99, dtype=np.int32)

    def mixed(x: np.ndarray, first: bool = True) -> np.ndarray:
        x = (x ^ x >> 16 if first else x) * np.uint32(0x7FEB352D)
        x = (x ^ x >> 15) * np.uint32(0x846CA68B)
        return x ^ x >> 16

    place = mixed(mixed(mixed(keys[:, 0]) ^ keys[:, 1])[row] + column.astype(np.uint32))
    words = mixed(mixed(np.arange(1, 8, dtype=np.uint32))[:, None] ^ place)[..., None]
    columns = mixed(np.arange(250, dtype=np.uint32) + np.uint32(0x9E3779B9))
    drawn = mixed(words ^ columns, first=False).view(np.uint8)[..., :999]
    kept = drawn >= 25 + (mixed(words) < int(0.6 * 2**32))  # 0.1 of 256 is 25.6
    found = dropout.position_words(mx.array(keys), mx.array(row), mx.array(column), 7)
    got = [dropout.Mask(word, 0.1)(mx.ones((99, 999), dtype)) for word in found]
    wrong = [(of != mx.array(want)).sum() for of, want in zip(got, kept)]
    yield "99 x 999 bits, linear by linear", wrong, [np.zeros(())] * 7


KERNELS: dict[str, Callable[[mx.Dtype], Iterator[Case]]] = {
    **{"matmul": matmul, "attention": attention, "RoPE": rope, "elementwise": elementwise},
    **{"loss": loss, "dropout": masks},
}
