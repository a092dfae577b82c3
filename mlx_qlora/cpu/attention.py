"""Causal attention on a CPU, of documents of one length, in memory that does not grow with T x T.

Queries go block by block over the keys before them, and the backward recomputes the probabilities
from each query's log-sum unless the forward kept them (Dao et al. 2022, arXiv 2205.14135, for the
idea). MLX has no such kernel for a CPU; float32 only.

Axes: n documents, T positions, H heads, K key-value heads, G = H / K, Hd head size.
"""

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.cpu.exponentials import exp

# Most and fewest queries of a block, and most scores of one (docs/log.md has speeds).
BLOCK, SMALLEST_BLOCK, MOST_SCORES = 128, 16, 1 << 21


@dataclass(frozen=True)
class Residuals:
    """What an attention's forward keeps for its backward; a fused kernel keeps nothing here."""

    log_sum: Any = None  # (n, K, G, T, 1), of the exponentials of each query's scores
    total: Any = None  # (n, K, G, T, 1), the sum of its weights
    weights: list[mx.array] | None = None  # a block's exponentials, but for a factor of each query

    def arrays(self) -> list[mx.array]:
        """All that the backward will read, to be evaluated."""
        if self.weights is not None:
            return [self.total, *self.weights]
        return [] if self.log_sum is None else [self.log_sum]


def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, Residuals]:
    """q (n, T, H, Hd), k and v (n, T, K, Hd) -> (n, T, H, Hd), and all that `backward` can use."""
    K, scale = k.shape[2], q.shape[3] ** -0.5
    queries, keys, values = _by_head(q, K) * scale, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    outs, log_sums, totals, exponentials = [], [], [], []
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
        exponentials.append(weights)
    out, log_sum, total = (mx.concatenate(x, axis=3) for x in (outs, log_sums, totals))
    return _by_token(out), Residuals(log_sum, total, exponentials)


def backward(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, residuals: Residuals, dout: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of q, k and v (appendix B.2 there)."""
    K, scale = k.shape[2], q.shape[3] ** -0.5
    queries, douts = _by_head(q, K) * scale, _by_head(dout, K)
    keys, values = k.swapaxes(1, 2), v.transpose(0, 2, 3, 1)
    if residuals.weights is not None:
        douts = douts / residuals.total  # instead of the weights, which are larger
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


def _blocks(q: mx.array) -> list[tuple[int, int]]:
    """First and last query of each block; the longer the documents, the fewer queries each has."""
    n, T, H, _ = q.shape
    most = min(BLOCK, max(SMALLEST_BLOCK, MOST_SCORES // (n * H * T)))
    size = -(-T // -(-T // most))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _by_head(x: mx.array, K: int) -> mx.array:
    """(n, T, H, Hd) -> (n, K, G, T, Hd): the G heads that share keys side by side."""
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
    """The block, to be computed after all results of the one before.

    Else the scores of many blocks exist at once: any result that waits keeps its scores alive.
    """
    return mx.depends([block], before)[0] if before else block


def _hide_future(scores: mx.array, start: int, end: int) -> tuple[mx.array, mx.array]:
    """Scores (n, K, G * c, end) of queries start .. end by head, and what they may see."""
    scores = scores.reshape(*scores.shape[:2], -1, end - start, end)
    hidden, seen = _masks(1 << (end - 1).bit_length())
    first = hidden.shape[1] - BLOCK - start
    part = slice(0, end - start), slice(first, first + end)
    # Added and multiplied, as `where` takes three times as long on a CPU. `exp` clamps -inf, so
    # what is not seen has to be multiplied by 0 afterwards.
    return scores + hidden[part], seen[part]


@functools.cache
def _masks(width: int) -> tuple[mx.array, mx.array]:
    """What a block of queries must not see: -inf to add, 0 to multiply; (BLOCK, width + BLOCK).

    They are those of the last block of so many keys; one further left slices from further right.
    """
    seen = np.tri(BLOCK, width + BLOCK, width, dtype=np.float32)
    return mx.array(np.where(seen, 0, -np.inf).astype(np.float32)), mx.array(seen)


def _add_to_head(total: mx.array | None, part: mx.array) -> mx.array:
    """total (n, K, T, Hd) + part (n, K, end, Hd) at the first positions."""
    if total is None:  # the last block, which reaches all keys, comes first
        return part
    end = part.shape[2]
    return mx.concatenate([total[:, :, :end] + part, total[:, :, end:]], axis=2)
