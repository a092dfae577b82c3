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


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees, and how its scores are made.

    Attributes:
        scale: of the scores; 1 / sqrt(Hd) in most models.
        window: how many keys a query sees, its own included; None for all before it.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


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


def forward(q: mx.array, k: mx.array, v: mx.array, reach: Reach) -> tuple[mx.array, Residuals]:
    """q (n, T, H, Hd), k and v (n, T, K, Hd) -> (n, T, H, Hd), and all that `backward` can use."""
    queries = _by_head(q, k.shape[2]) * reach.scale
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    outs, log_sums, totals, exponentials = [], [], [], []
    for start, end in _blocks(q):
        first = _first_key(start, reach.window)
        block = _chained(queries[..., start:end, :], outs[-1:])
        scores = _capped(_heads_joined(block) @ keys[..., first:end], reach.softcap)[0]
        scores, seen = _hide_unseen(scores, start - first, end - first, reach.window)
        top = scores.max(axis=-1, keepdims=True)
        weights = exp(scores - top) * seen
        total = weights @ mx.ones((end - first, 1))  # a sum, as the product that a CPU does faster
        out = _heads_joined(weights) @ values[..., first:end, :]
        outs.append(out.reshape(block.shape) / total)
        log_sums.append(top + mx.log(total))
        totals.append(total)
        exponentials.append(weights)
    out, log_sum, total = (mx.concatenate(x, axis=3) for x in (outs, log_sums, totals))
    # The slope of a capped score is not in its exponential: the backward makes both again.
    return _by_token(out), Residuals(log_sum, total, None if reach.softcap else exponentials)


def backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    out: mx.array,
    residuals: Residuals,
    dout: mx.array,
    reach: Reach,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of q, k and v (appendix B.2 there)."""
    K = k.shape[2]
    queries, douts = _by_head(q, K) * reach.scale, _by_head(dout, K)
    keys, values = k.swapaxes(1, 2), v.transpose(0, 2, 3, 1)
    if residuals.weights is not None:
        douts = douts / residuals.total  # instead of the weights, which are larger
    shares = (_by_head(out, K) * douts).sum(axis=-1, keepdims=True)  # (n, K, G, T, 1)
    dqs: list[mx.array] = []
    dk = dv = None
    for i, (start, end) in reversed(list(enumerate(_blocks(q)))):
        part, first = slice(start, end), _first_key(start, reach.window)
        slope = None
        block, dblock = _heads_joined(queries[..., part, :]), _heads_joined(douts[..., part, :])
        block = _chained(block, [*dqs[-1:], dk, dv] if dqs else [])
        if residuals.weights is not None:
            weights = residuals.weights[i]
        else:
            scores = block @ keys[..., first:end, :].swapaxes(2, 3)
            scores, slope = _capped(scores, reach.softcap)
            scores, seen = _hide_unseen(scores, start - first, end - first, reach.window)
            weights = exp(scores - residuals.log_sum[..., part, :]) * seen
        dweights = (dblock @ values[..., first:end]).reshape(weights.shape)
        dscores = _heads_joined(weights * (dweights - shares[..., part, :]))
        dscores = dscores if slope is None else dscores * slope
        dqs.append((dscores @ keys[..., first:end, :]).reshape(queries[..., part, :].shape))
        dk = _add_at(first, dk, dscores.swapaxes(2, 3) @ block)
        dv = _add_at(first, dv, _heads_joined(weights).swapaxes(2, 3) @ dblock)
    assert dk is not None and dv is not None
    dq = _by_token(mx.concatenate(dqs[::-1], axis=3)) * reach.scale
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


def _first_key(start: int, window: int | None) -> int:
    return 0 if window is None else max(0, start - window + 1)


def _capped(scores: mx.array, softcap: float | None) -> tuple[mx.array, mx.array | None]:
    """Scores, and their slope by what they were; None is 1."""
    if softcap is None:
        return scores, None
    tanh = mx.tanh(scores / softcap)
    return softcap * tanh, 1 - tanh.square()


def _hide_unseen(
    scores: mx.array, start: int, end: int, window: int | None
) -> tuple[mx.array, mx.array]:
    """Scores (n, K, G * c, end) of queries start .. end by head, and what they may see."""
    scores = scores.reshape(*scores.shape[:2], -1, end - start, end)
    hidden, seen = _masks(1 << (end - 1).bit_length(), window)
    first = hidden.shape[1] - BLOCK - start
    part = slice(0, end - start), slice(first, first + end)
    # Added and multiplied, as `where` takes three times as long on a CPU. `exp` clamps -inf, so
    # what is not seen has to be multiplied by 0 afterwards.
    return scores + hidden[part], seen[part]


@functools.cache
def _masks(width: int, window: int | None) -> tuple[mx.array, mx.array]:
    """What a block of queries must not see: -inf to add, 0 to multiply; (BLOCK, width + BLOCK).

    They are those of the last block of so many keys; one further left slices from further right.
    """
    seen = np.tri(BLOCK, width + BLOCK, width, dtype=np.float32)
    if window is not None:
        seen -= np.tri(BLOCK, width + BLOCK, width - window, dtype=np.float32)
    return mx.array(np.where(seen, 0, -np.inf).astype(np.float32)), mx.array(seen)


def _add_at(first: int, total: mx.array | None, part: mx.array) -> mx.array:
    """total (n, K, T, Hd) + part (n, K, c, Hd) at positions first .. first + c."""
    n, K, c, Hd = part.shape
    if total is None:  # the last block comes first, and ends where the keys do
        return mx.concatenate([mx.zeros((n, K, first, Hd)), part], axis=2) if first else part
    end = first + c
    joined = [total[:, :, first:end] + part, total[:, :, end:]]
    return mx.concatenate([total[:, :, :first], *joined] if first else joined, axis=2)
