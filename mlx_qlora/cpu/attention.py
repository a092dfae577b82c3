"""Causal attention of documents of one length, in memory that grows with T and not its square.

Dao et al. 2022 (arXiv 2205.14135), for the idea:

    on a GPU  MLX's fused kernel;
    on a CPU  MLX has none, so here queries go block by block over the keys before them, and the
              backward makes the probabilities anew from each query's log-sum, unless it finds
              them kept.

Axes: n documents, T positions, H heads, K key-value heads, G = H / K, Hd head size.
"""

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu.exponentials import exp

FEWEST_FUSED_QUERIES = 9  # Metal's fused attention has no gradient for fewer


# On a CPU: most and fewest queries of a block, and most scores of one (docs/log.md has speeds).
BLOCK, SMALLEST_BLOCK, MOST_SCORES = 128, 16, 1 << 21


@dataclass(frozen=True)
class Residuals:
    """What the backward of an attention wants to know of its forward; None where it need not.

    Attributes:
        log_sum: (n, K, G, T, 1), of the exponentials of each query's scores.
        total: (n, K, G, T, 1), the sum of its weights.
        weights: the exponentials, less a common factor of each query; a block after the other.
    """

    log_sum: Any = None
    total: Any = None
    weights: list[mx.array] | None = None

    def arrays(self) -> list[mx.array]:
        """All that is kept, to be evaluated."""
        if self.weights is not None:
            return [self.total, *self.weights]
        return [] if self.log_sum is None else [self.log_sum]


def attend_with_residuals(
    q: mx.array, k: mx.array, v: mx.array, keep_weights: bool = False
) -> tuple[mx.array, Residuals]:
    """Causal attention of n documents.

    Args:
        q: (n, T, H, Hd).
        k: (n, T, K, Hd).
        v: (n, T, K, Hd).
        keep_weights: whether the backward shall find the scores' exponentials: T / 2 numbers for
            each position and head. Ignored where a fused kernel keeps none.

    Returns:
        (n, T, H, Hd); and residuals for `attend_vjp`.
    """
    if has_fused_kernel(q.dtype):
        return _fused(q, k, v), Residuals()
    if keep_weights:
        return _forward(q, k, v)
    out, log_sum = _by_blocks(q, k, v)
    return out, Residuals(log_sum)


def attend_vjp(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, residuals: Residuals, dout: mx.array
) -> tuple[mx.array, ...]:
    """Gradients of q, k and v."""
    if residuals.log_sum is None:  # the kernel keeps its own, in a forward that is run again
        return tuple(mx.vjp(_fused, [q, k, v], [dout])[1])
    return _backward(q, k, v, out, residuals, dout)


def has_fused_kernel(dtype: mx.Dtype = mx.float32) -> bool:
    """Whether MLX's own attention is used: on a GPU, and for 16-bit numbers on a CPU, too."""
    return device.current().kind != "cpu" or dtype != mx.float32


def _fused(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    T, Hd = q.shape[1], q.shape[3]
    # The word "causal" where possible: an array would make the backward build T x T scores.
    mask: Any = "causal"
    if T < FEWEST_FUSED_QUERIES:
        mask = mx.tril(mx.ones((T, T), dtype=mx.bool_))
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=Hd**-0.5, mask=mask)
    return out.swapaxes(1, 2)


def _forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, Residuals]:
    """The output (n, T, H, Hd), and everything that can be kept."""
    K, scale = k.shape[2], q.shape[3] ** -0.5
    queries, keys, values = _by_head(q, K) * scale, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    outs, log_sums, totals, kept = [], [], [], []
    for start, end in _blocks(q):
        block = _chained(queries[..., start:end, :], outs[-1:])
        scores, seen = _hide_future(_heads_joined(block) @ keys[..., :end], start, end)
        top = scores.max(axis=-1, keepdims=True)
        weights = exp(scores - top) * seen
        total = weights @ mx.ones((end, 1))  # a sum, as the product that a CPU does faster
        out = _heads_joined(weights) @ values[..., :end, :]
        outs.append(out.reshape(block.shape) / total)
        log_sums.append(top + mx.log(total))
        totals.append(total)
        kept.append(weights)
    residuals = Residuals(mx.concatenate(log_sums, axis=3), mx.concatenate(totals, axis=3), kept)
    return _by_token(mx.concatenate(outs, axis=3)), residuals


def _backward(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, residuals: Residuals, dout: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of q, k and v (Dao et al. 2022, appendix B.2)."""
    K, scale = k.shape[2], q.shape[3] ** -0.5
    queries, douts = _by_head(q, K) * scale, _by_head(dout, K)
    keys, values = k.swapaxes(1, 2), v.transpose(0, 2, 3, 1)
    if residuals.weights is not None:
        douts = douts / residuals.total  # in the place of the weights themselves, which are larger
    shares = (_by_head(out, K) * douts).sum(axis=-1, keepdims=True)  # (n, K, G, T, 1)
    dqs: list[mx.array] = []
    dk = dv = None
    for i, (start, end) in reversed(list(enumerate(_blocks(q)))):
        part = slice(start, end)
        block, dblock = _heads_joined(queries[..., part, :]), _heads_joined(douts[..., part, :])
        block = _chained(block, [*dqs[-1:], dk, dv] if dqs else [])
        if residuals.weights is not None:
            weights = residuals.weights[i]
        else:
            scores, seen = _hide_future(block @ keys[..., :end, :].swapaxes(2, 3), start, end)
            weights = exp(scores - residuals.log_sum[..., part, :]) * seen
        dweights = (dblock @ values[..., :end]).reshape(weights.shape)
        dscores = _heads_joined(weights * (dweights - shares[..., part, :]))
        dqs.append((dscores @ keys[..., :end, :]).reshape(queries[..., part, :].shape))
        dk = _add_to_head(dk, dscores.swapaxes(2, 3) @ block)
        dv = _add_to_head(dv, _heads_joined(weights).swapaxes(2, 3) @ dblock)
    assert dk is not None and dv is not None
    dq = _by_token(mx.concatenate(dqs[::-1], axis=3)) * scale
    return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _forward_plainly(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    out, residuals = _forward(q, k, v)
    return out, residuals.log_sum


def _backward_plainly(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
    out, log_sum = outputs
    q, k, v = primals
    return _backward(q, k, v, out, Residuals(log_sum), cotangents[0])


_by_blocks: Any = mx.custom_function(_forward_plainly)


_by_blocks.vjp(_backward_plainly)


def _blocks(q: mx.array) -> list[tuple[int, int]]:
    """First and last query of each block; blocks of about the same size.

    The longer the documents, the fewer queries: so memory does not grow with T at all.
    """
    n, T, H, _ = q.shape
    most = min(BLOCK, max(SMALLEST_BLOCK, MOST_SCORES // (n * H * T)))
    size = -(-T // -(-T // most))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _by_head(x: mx.array, K: int) -> mx.array:
    """(n, T, H, Hd) -> (n, K, G, T, Hd): the G heads that share keys stand together."""
    n, T, H, Hd = x.shape
    return x.reshape(n, T, K, H // K, Hd).transpose(0, 2, 3, 1, 4)


def _by_token(x: mx.array) -> mx.array:
    """(n, K, G, T, Hd) -> (n, T, H, Hd)."""
    n, K, G, T, Hd = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(n, T, K * G, Hd)


def _heads_joined(x: mx.array) -> mx.array:
    """(n, K, G, c, ...) -> (n, K, G * c, ...): one product for all heads that share keys."""
    return x.flatten(2, 3)


def _chained(block: mx.array, before: list[Any]) -> mx.array:
    """The block, to be computed after the one before: else the scores of many exist at once.

    All of that one's results count: what waits for its turn keeps its scores alive.
    """
    return mx.depends([block], before)[0] if before else block


def _hide_future(scores: mx.array, start: int, end: int) -> tuple[mx.array, mx.array]:
    """Scores (n, K, G * c, end) of queries start .. end by head, and what they may see."""
    scores = scores.reshape(*scores.shape[:2], -1, end - start, end)
    hidden, seen = _masks(1 << (end - 1).bit_length())
    first = hidden.shape[1] - BLOCK - start
    part = slice(0, end - start), slice(first, first + end)
    # Added and multiplied, as `where` costs three times as much there; `exp` cuts the exponent of
    # -inf off, so that what is not seen has to be multiplied away afterwards.
    return scores + hidden[part], seen[part]


@functools.cache
def _masks(width: int) -> tuple[mx.array, mx.array]:
    """What a block of queries must not see, as -inf to add and as 0 to multiply with.

    Both (BLOCK, width + BLOCK), for the last block of `width + BLOCK` keys; blocks further to the
    left find theirs by looking further to the right.
    """
    seen = np.tri(BLOCK, width + BLOCK, width, dtype=np.float32)
    return mx.array(np.where(seen, 0, -np.inf).astype(np.float32)), mx.array(seen)


def _add_to_head(total: mx.array | None, part: mx.array) -> mx.array:
    """total (n, K, T, Hd) + part (n, K, end, Hd) at the first positions."""
    if total is None:  # the last block comes first, and reaches all keys
        return part
    end = part.shape[2]
    return mx.concatenate([total[:, :, :end] + part, total[:, :, end:]], axis=2)
