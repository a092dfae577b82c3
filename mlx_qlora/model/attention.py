"""What the tokens of a forward attend to: their own document, or a cache.

In training the positions of all documents are one axis N, without padding: each document attends to
itself as if it stood alone, and scores between documents are never computed. Documents of similar
length are attended to at once.

Axes: N positions of all documents, n documents of a group, T positions of each, H heads,
K key-value heads, Hd head size.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu import attention as blocks
from mlx_qlora.cpu.attention import Reach, Residuals
from mlx_qlora.model.rope import Rope

FEWEST_FUSED_QUERIES = 9  # Metal's fused attention has no gradient for fewer
BLOCK = 512  # queries at once where a kernel cannot take a whole document

# ---- documents of one length ---------------------------------------------------------------------


def attend_with_residuals(
    q: mx.array, k: mx.array, v: mx.array, reach: Reach, keep_weights: bool = False
) -> tuple[mx.array, Residuals]:
    """Causal attention: q (n, T, H, Hd), k and v (n, T, K, Hd) -> (n, T, H, Hd).

    And what `attend_vjp` needs; with `keep_weights` the scores' exponentials are part of it, T / 2
    numbers for each position and head. A fused kernel keeps none.
    """
    if is_fused(q.dtype):
        return _fused(q, k, v, reach), Residuals()
    out, residuals = blocks.forward(q, k, v, reach)
    return out, residuals if keep_weights else Residuals(residuals.log_sum)


def attend_vjp(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    out: mx.array,
    residuals: Residuals,
    dout: mx.array,
    reach: Reach,
) -> tuple[mx.array, ...]:
    """Gradients of q, k and v."""
    if residuals.log_sum is None:  # the kernel keeps its own, in a forward that is run again
        return tuple(mx.vjp(functools.partial(_fused, reach=reach), [q, k, v], [dout])[1])
    return blocks.backward(q, k, v, out, residuals, dout, reach)


def is_fused(dtype: mx.Dtype) -> bool:
    """Whether MLX's own attention is used: on a GPU, and for 16-bit numbers everywhere."""
    return device.current().fused_attention or dtype != mx.float32


def _fused(q: mx.array, k: mx.array, v: mx.array, reach: Reach) -> mx.array:
    T = q.shape[1]
    if reach.softcap is not None or (reach.window is not None and T > reach.window):
        return _fused_in_blocks(q, k, v, reach)
    # The word "causal" where possible: an array would make the backward build T x T scores.
    mask: Any = "causal"
    if T < FEWEST_FUSED_QUERIES:
        mask = mx.tril(mx.ones((T, T), dtype=mx.bool_))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=reach.scale, mask=mask)
    return out.swapaxes(1, 2)


def _fused_in_blocks(q: mx.array, k: mx.array, v: mx.array, reach: Reach) -> mx.array:
    """As `_fused`, by blocks of queries: a mask of all scores would take T x T."""
    T, outs = q.shape[1], []
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    for start in range(0, T, BLOCK):
        end, first = min(start + BLOCK, T), 0
        back = mx.arange(start, end)[:, None]
        if reach.window is not None:
            first = max(0, start - reach.window + 1)
        back = back - mx.arange(first, end)
        mask = (back >= 0) & (back < (reach.window or T))
        keys, values = k[:, :, first:end], v[:, :, first:end]
        outs.append(attend_capped(q[:, :, start:end], keys, values, reach, mask))
    return mx.concatenate(outs, axis=2).swapaxes(1, 2)


def attend_capped(
    q: mx.array, k: mx.array, v: mx.array, reach: Reach, mask: mx.array | None
) -> mx.array:
    """q (B, H, c, Hd), k and v (B, K, L, Hd), a bool mask (..., c, L) -> (B, H, c, Hd).

    No kernel caps scores, so that those of a block are an array: on a GPU some three times the
    time of a fused attention.
    """
    if reach.softcap is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=reach.scale, mask=mask)
    B, H, c, Hd = q.shape
    queries = q.reshape(B, k.shape[1], -1, c, Hd) * reach.scale
    scores = (queries @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    scores = reach.softcap * mx.tanh(scores / reach.softcap)
    if mask is not None:
        mask = mask[:, :, None] if mask.ndim == 4 else mask
        scores = mx.where(mask, scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1).astype(q.dtype)
    return (weights @ v[:, :, None]).reshape(B, H, c, Hd)


# ---- documents of any length ---------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """n documents of similar length, attended to at once."""

    start: int  # of its n * T positions, group after group
    n: int
    T: int  # length of the longest, rounded up as the device's attention needs it

    def of(self, x: mx.array) -> mx.array:
        """(M, ...) -> (n, T, ...)."""
        end = self.start + self.n * self.T
        return x[self.start : end].reshape(self.n, self.T, *x.shape[1:])


@dataclass(frozen=True)
class Documents:
    """Which of N positions belong together.

    To attend to them, positions are put in the order of the groups: M of them, since a document is
    filled up to its group's length. Arrays are (N,) int32 but for those of M.
    """

    positions: mx.array  # of each token in its document, from 0
    row: mx.array  # the batch row that each position comes from
    column: mx.array  # its place in that row; with `row`, what dropout is drawn from
    groups: list[Group]
    order: mx.array  # (M,), which position; beyond a document's end it names any
    real: mx.array | None  # (M, 1, 1) float32, 0 beyond a document's end; None if there is no such
    place: mx.array  # among the M; padding is past their end
    lengths: np.ndarray  # of the document that each position is in
    _angles: dict[Rope, Any] = field(default_factory=dict)  # as far as they have been asked for

    @classmethod
    def of(cls, documents: np.ndarray, N: int | None = None, T: int | None = None) -> "Documents":
        """From documents (n, 3) of row, start and end, in order, which follow each other.

        Padding may follow them, up to `N` positions in all. With `T` the positions are those of
        whole rows of this width, padding and all.
        """
        rows, starts, ends = documents.T
        lengths = ends - starts
        firsts = np.cumsum(lengths) - lengths if T is None else rows * T + starts
        N = int(lengths.sum()) if N is None else N
        positions, row, column, length_of = np.zeros((4, N), np.int32)
        for first, (b, start, end) in zip(firsts.tolist(), documents.tolist()):
            span = slice(first, first + end - start)
            positions[span], row[span], column[span] = np.arange(end - start), b, range(start, end)
            length_of[span] = end - start
        multiple = device.current().attention_multiple
        groups, order, place, used = [], [], np.full(N, -1, np.int32), 0
        for members in _of_similar_length(lengths):
            width = int(lengths[members].max())
            width += -width % multiple
            groups.append(Group(used, len(members), width))
            for member in members:
                first, length = firsts[member], lengths[member]
                place[first : first + length] = range(used, used + length)
                order.append(np.zeros(width, np.int32))
                order[-1][:length] = range(first, first + length)
                used += width
        is_real = np.isin(np.arange(used), place)
        real = None if is_real.all() else mx.array(is_real[:, None, None].astype(np.float32))
        place[place < 0] = used
        arrays = positions, row, column, np.concatenate(order), place
        positions, row, column, order, place = map(mx.array, arrays)
        return cls(positions, row, column, groups, order, real, place, length_of)

    def rotate(self, x: mx.array, rope: Rope) -> mx.array:
        """RoPE of x (N, H, Hd), each document's positions from 0 on."""
        if is_fused(x.dtype) and not rope.config.by_length:
            return rope.by_kernel(x[:, :, None], self.positions)[:, :, 0]
        if rope not in self._angles:  # MLX's fallback on a CPU recomputes every angle
            self._angles[rope] = rope.angles(self.positions, self.lengths)
        return rope.rotate(x, self._angles[rope])

    def attend(self, q: mx.array, k: mx.array, v: mx.array, reach: Reach) -> mx.array:
        """q (N, H, Hd), k and v (N, K, Hd), rotated -> (N, H, Hd)."""
        return self.attend_with_residuals(q, k, v, reach)[0]

    def attend_with_residuals(
        self, q: mx.array, k: mx.array, v: mx.array, reach: Reach, keep_weights: bool = False
    ) -> tuple[mx.array, list[Residuals]]:
        """As `attend`; and what `attend_vjp` needs, for each group."""
        results = []
        q, k, v = q[self.order], k[self.order], v[self.order]
        for group in self.groups:
            q1, k1, v1 = map(group.of, (q, k, v))
            results.append(attend_with_residuals(q1, k1, v1, reach, keep_weights))
        return self._scatter([out for out, _ in results]), [residuals for _, residuals in results]

    def attend_vjp(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        out: mx.array,
        residuals: list[Residuals],
        dout: mx.array,
        reach: Reach,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Gradients of q, k and v, from what `attend_with_residuals` returned and its gradient."""
        grads = []
        q, k, v, out, dout = (x[self.order] for x in (q, k, v, out, dout))
        if self.real is not None:
            dout = dout * self.real.astype(dout.dtype)
        for group, of_group in zip(self.groups, residuals):
            q1, k1, v1, out1, dout1 = map(group.of, (q, k, v, out, dout))
            grads.append(attend_vjp(q1, k1, v1, out1, of_group, dout1, reach))
        dq, dk, dv = (self._scatter(list(by_group)) for by_group in zip(*grads))
        return dq, dk, dv

    def _scatter(self, by_group: list[mx.array]) -> mx.array:
        """Each group's (n, T, ...) -> (N, ...), zeros where there is padding."""
        shape = by_group[0].shape[2:]
        flat = [x.reshape(-1, *shape) for x in by_group]
        return mx.concatenate([*flat, mx.zeros((1, *shape), flat[0].dtype)])[self.place]


def _of_similar_length(lengths: np.ndarray) -> list[np.ndarray]:
    """The documents of each group: of similar length, and not too many at once."""
    here, groups = device.current(), list[list[int]]()
    multiple = here.attention_multiple
    for i in np.argsort(-lengths, kind="stable").tolist():
        longest = int(lengths[groups[-1][0]]) if groups else 0
        longest += -longest % multiple
        fits = groups and (len(groups[-1]) + 1) * longest <= here.attention_positions
        spare = max(longest * here.attention_padding, multiple - 1)
        if fits and longest - lengths[i] <= spare:
            groups[-1].append(i)
        else:
            groups.append([i])
    if multiple > 1:  # a kernel of its own for every shape: there are few if n is a power of two
        groups = [part for group in groups for part in _powers_of_two(group)]
    return [np.array(members) for members in groups]


def _powers_of_two(members: list[int]) -> Iterator[list[int]]:
    while members:
        n = 1 << (len(members).bit_length() - 1)
        yield members[:n]
        members = members[n:]


# ---- a cache -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """New tokens that follow those in a layer's key-value cache, while text is generated."""

    mask: Any  # what mlx-lm's cache made for them
    cache: Any  # of one layer

    def rotate(self, x: mx.array, rope: Rope) -> mx.array:
        """RoPE of x (B, T, H, Hd), positions from the cache's end on."""
        offset, length = self.cache.offset, 0
        if rope.config.by_length:  # of a batch the longest text's: all share a kernel
            length = x.shape[1] + int(offset if isinstance(offset, int) else offset.max().item())
        return rope.by_kernel(x.swapaxes(1, 2), offset, length).swapaxes(1, 2)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, reach: Reach) -> mx.array:
        """q (B, T, H, Hd), k and v (B, T, K, Hd), rotated -> (B, T, H, Hd)."""
        base = device.mlx_lm("models.base")
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        k, v = self.cache.update_and_fetch(k, v)
        if reach.softcap is not None:
            out = attend_capped(q, k, v, reach, self.mask)
        else:
            out = base.scaled_dot_product_attention(q, k, v, self.cache, reach.scale, self.mask)
        return out.swapaxes(1, 2)
