"""What the tokens of a forward attend to: their own document, or a cache.

In training the positions of all documents are one axis N: nothing is padded, each document attends
to itself as if it stood alone, and scores between documents are never computed. Documents of about
the same length are attended to at once.

Axes: N positions of all documents, H heads, K key-value heads, Hd head size.
"""

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu.attention import Residuals, attend_vjp, attend_with_residuals, has_fused_kernel

CUDA_MULTIPLE = 128  # cuDNN's fused attention has a gradient for such lengths alone


# Documents share a group while little of it is padding and it is no larger than this.
MOST_PADDING, MOST_IN_BLOCKS, MOST_FUSED = 0.1, 1024, 16384


@dataclass(frozen=True)
class Group:
    """Documents of about the same length, attended to at once.

    Attributes:
        index: (n * T,) int32 into N; behind a document's end it names any position.
        n: how many there are.
        T: length of the longest, or somewhat more.
        real: (n, T, 1, 1) float32, 0 behind a document's end; None if all fill T.
    """

    index: mx.array
    n: int
    T: int
    real: mx.array | None

    def gather(self, x: mx.array) -> mx.array:
        """(N, ...) -> (n, T, ...)."""
        return x[self.index].reshape(self.n, self.T, *x.shape[1:])


@dataclass(frozen=True)
class Documents:
    """Which of N positions belong together.

    Attributes:
        positions: (N,) int32, of each token in its document, from 0.
        row: (N,) int32, the batch row that each position comes from.
        column: (N,) int32, its place in that row; with `row`, what dropout is drawn from.
        periods: (Hd / 2,), of RoPE.
        groups: the documents.
        place: (N,) int32, of each position among those of all groups, one behind the other; of
            padding, behind all of them.
    """

    positions: mx.array
    row: mx.array
    column: mx.array
    periods: mx.array
    groups: list[Group]
    place: mx.array

    @classmethod
    def of(
        cls,
        documents: np.ndarray,
        periods: mx.array,
        N: int | None = None,
        T: int | None = None,
    ) -> "Documents":
        """From (n, 3) of row, start and end, in order.

        Args:
            documents: of the rows of a batch.
            periods: from `rope_periods`.
            N: positions in all, if there is padding behind the documents.
            T: given, the positions are those of whole rows of this width, padding and all;
                else the documents follow each other.
        """
        lengths = documents[:, 2] - documents[:, 1]
        firsts = (
            np.cumsum(lengths) - lengths if T is None else documents[:, 0] * T + documents[:, 1]
        )
        N = int(lengths.sum()) if N is None else N
        positions, row, column = np.zeros((3, N), np.int32)
        for first, (b, start, end) in zip(firsts.tolist(), documents.tolist()):
            span = slice(first, first + end - start)
            positions[span], row[span], column[span] = np.arange(end - start), b, range(start, end)
        groups, place, used = [], np.full(N, -1, np.int32), 0
        for members in _alike(lengths):
            width = _group_width(int(lengths[members].max()))
            index, real = np.zeros((2, len(members), width), np.int32)
            for line, member in enumerate(members):
                first, length = firsts[member], lengths[member]
                index[line, :length], real[line, :length] = range(first, first + length), 1
                place[first : first + length] = range(used, used + length)
                used += width
            mask = None if real.all() else mx.array(real[:, :, None, None].astype(np.float32))
            groups.append(Group(mx.array(index.reshape(-1)), len(members), width, mask))
        place[place < 0] = used
        positions, row, column, place = map(mx.array, (positions, row, column, place))
        return cls(positions, row, column, periods, groups, place)

    @functools.cached_property
    def turns(self) -> tuple[mx.array, mx.array]:
        """Cosine and signed sine (N, 1, Hd) of each position's angles, float32."""
        angles = self.positions[:, None, None] / self.periods
        cosine, sine = mx.cos(angles), mx.sin(angles)
        return mx.concatenate([cosine, cosine], -1), mx.concatenate([-sine, sine], -1)

    def rotate(self, x: mx.array) -> mx.array:
        """RoPE of x (N, H, Hd), each document's positions from 0 on."""
        if has_fused_kernel(x.dtype):
            return rope(x[:, :, None], self.positions, self.periods)[:, :, 0]
        cosine, sine = self.turns
        return _turn(x, cosine, sine)  # the kernel's stand-in would make all angles anew each time

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q (N, H, Hd), k and v (N, K, Hd), rotated -> (N, H, Hd)."""
        return self.attend_with_residuals(q, k, v)[0]

    def attend_with_residuals(
        self, q: mx.array, k: mx.array, v: mx.array, keep_weights: bool = False
    ) -> tuple[mx.array, list[Residuals]]:
        """As `attend`; and of each group what `attend_vjp` wants to know."""
        found = [
            attend_with_residuals(group.gather(q), group.gather(k), group.gather(v), keep_weights)
            for group in self.groups
        ]
        return self._scatter([out for out, _ in found]), [residuals for _, residuals in found]

    def attend_vjp(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        out: mx.array,
        residuals: list[Residuals],
        dout: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Gradients of q, k and v, from what `attend_with_residuals` returned and its gradient."""
        grads = []
        for group, of_group in zip(self.groups, residuals):
            dout1 = group.gather(dout)
            if group.real is not None:
                dout1 = dout1 * group.real.astype(dout.dtype)
            q1, k1, v1, out1 = map(group.gather, (q, k, v, out))
            grads.append(attend_vjp(q1, k1, v1, out1, of_group, dout1))
        dq, dk, dv = (self._scatter(list(parts)) for parts in zip(*grads))
        return dq, dk, dv

    def _scatter(self, parts: list[mx.array]) -> mx.array:
        """Each group's (n, T, ...) -> (N, ...), zeros where there is padding."""
        shape = parts[0].shape[2:]
        flat = [part.reshape(-1, *shape) for part in parts]
        return mx.concatenate([*flat, mx.zeros((1, *shape), flat[0].dtype)])[self.place]


@dataclass(frozen=True)
class Cached:
    """New tokens that follow those in a layer's key-value cache, while text is generated.

    Attributes:
        mask: what mlx-lm's cache made for them.
        cache: of one layer.
        periods: (Hd / 2,), of RoPE.
    """

    mask: Any
    cache: Any
    periods: mx.array

    def rotate(self, x: mx.array) -> mx.array:
        """RoPE of x (B, T, H, Hd), positions from the cache's end on."""
        return rope(x.swapaxes(1, 2), self.cache.offset, self.periods).swapaxes(1, 2)

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q (B, T, H, Hd), k and v (B, T, K, Hd), rotated -> (B, T, H, Hd)."""
        scale = q.shape[-1] ** -0.5
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
        k, v = self.cache.update_and_fetch(k, v)
        if hasattr(self.cache, "bits"):  # mlx-lm's quantised cache: k and v are packed triples
            from mlx_lm.models.base import scaled_dot_product_attention

            out = scaled_dot_product_attention(
                q, k, v, cache=self.cache, scale=scale, mask=self.mask
            )
        else:
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self.mask)
        return out.swapaxes(1, 2)


def rope(x: mx.array, offset: Any, periods: mx.array) -> mx.array:
    """RoPE in Hugging Face's layout: pair i is (i, i + Hd / 2), not (2i, 2i + 1).

    Args:
        x: (B, H, T, Hd).
        offset: position of the first token, one for all or one for each of B.
        periods: (Hd / 2,), from `rope_periods`.
    """
    Hd = x.shape[-1]
    return mx.fast.rope(
        x, Hd, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
    )


def _swapped(x: mx.array) -> mx.array:
    """The two halves of the last axis, in the other order."""
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([second, first], axis=-1)


def _turn_forth(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    return x * cosine + _swapped(x) * sine


def _turn_back(primals: Any, dy: mx.array, _: Any) -> tuple[mx.array, ...]:
    """The inverse of a rotation is its transpose; the angles are no one's to learn."""
    _, cosine, sine = primals
    return dy * cosine - _swapped(dy) * sine, mx.zeros_like(cosine), mx.zeros_like(sine)


_turn: Any = mx.custom_function(_turn_forth)


_turn.vjp(_turn_back)


def _alike(lengths: np.ndarray) -> list[np.ndarray]:
    """The documents of each group: of like lengths, and not too many at once."""
    fused = has_fused_kernel()
    if device.current().kind == "cuda":  # each (n, T) would be a shape of its own to cuDNN's cache
        return [np.array([i]) for i in range(len(lengths))]
    most = MOST_FUSED if fused else MOST_IN_BLOCKS
    groups: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        longest = lengths[groups[-1][0]] if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= most
        if fits and longest - lengths[i] <= longest * MOST_PADDING:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [np.array(members) for members in groups]


def _group_width(longest: int) -> int:
    """T of a group."""
    return longest + -longest % CUDA_MULTIPLE if device.current().kind == "cuda" else longest
