"""Causal attention of documents that stand one behind the other, and of tokens to a cache.

In training the positions of all documents are one axis N: nothing is padded, and each document
attends to itself as if it stood alone. Scores between documents are never computed, and memory
grows with N and not with its square (Dao et al. 2022, arXiv 2205.14135, for the idea):

    on a GPU  MLX's fused kernel, document by document;
    on a CPU  MLX has none, so here queries go block by block over the keys before them, and the
              backward makes the probabilities anew from each query's log-sum.

Axes: N positions of all documents, T of one, H heads, K key-value heads, G = H / K, Hd head size.
"""

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.backend import backend
from mlx_qlora.model.exponentials import exp

# Metal's fused attention has no gradient for fewer queries; cuDNN's wants multiples of 128.
FEWEST_FUSED_QUERIES, CUDA_MULTIPLE = 9, 128
# On a CPU: most and fewest queries of a block, and most scores of one (docs/log.md has speeds).
BLOCK, SMALLEST_BLOCK, MOST_SCORES = 128, 16, 1 << 21
# Documents share a group while little of it is padding and it is no larger than this.
MOST_PADDING, MOST_IN_BLOCKS, MOST_FUSED = 0.1, 1024, 16384


@dataclass(frozen=True)
class Note:
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
        """All that is noted, to be evaluated."""
        if self.weights is not None:
            return [self.total, *self.weights]
        return [] if self.log_sum is None else [self.log_sum]


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
        if _has_fused_kernel(x.dtype):
            return rope(x[:, :, None], self.positions, self.periods)[:, :, 0]
        cosine, sine = self.turns
        return _turn(x, cosine, sine)  # the kernel's stand-in would make all angles anew each time

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q (N, H, Hd), k and v (N, K, Hd), rotated -> (N, H, Hd)."""
        return self.attend_and_note(q, k, v)[0]

    def attend_and_note(
        self, q: mx.array, k: mx.array, v: mx.array, keep_weights: bool = False
    ) -> tuple[mx.array, list[Note]]:
        """As `attend`; and of each group what `pull` wants to know."""
        found = [
            attend_and_note(group.gather(q), group.gather(k), group.gather(v), keep_weights)
            for group in self.groups
        ]
        return self._scatter([out for out, _ in found]), [note for _, note in found]

    def pull(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        out: mx.array,
        notes: list[Note],
        dout: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Gradients of q, k and v, from what `attend_and_note` returned and its gradient."""
        grads = []
        for group, note in zip(self.groups, notes):
            dout1 = group.gather(dout)
            if group.real is not None:
                dout1 = dout1 * group.real.astype(dout.dtype)
            q1, k1, v1, out1 = map(group.gather, (q, k, v, out))
            grads.append(pull(q1, k1, v1, out1, note, dout1))
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
    fused = _has_fused_kernel()
    if backend().device == "cuda":  # each (n, T) would be a shape of its own to cuDNN's cache
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
    return longest + -longest % CUDA_MULTIPLE if backend().device == "cuda" else longest


# ---- documents of one length -------------------------------------------------------------------


def attend_and_note(
    q: mx.array, k: mx.array, v: mx.array, keep_weights: bool = False
) -> tuple[mx.array, Note]:
    """Causal attention of n documents.

    Args:
        q: (n, T, H, Hd).
        k: (n, T, K, Hd).
        v: (n, T, K, Hd).
        keep_weights: whether the backward shall find the scores' exponentials: T / 2 numbers for
            each position and head. Ignored where a fused kernel keeps none.

    Returns:
        (n, T, H, Hd); and a note for `pull`.
    """
    if _has_fused_kernel(q.dtype):
        return _fused(q, k, v), Note()
    if keep_weights:
        return _forward(q, k, v)
    out, log_sum = _by_blocks(q, k, v)
    return out, Note(log_sum)


def pull(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, note: Note, dout: mx.array
) -> tuple[mx.array, ...]:
    """Gradients of q, k and v."""
    if note.log_sum is None:  # the kernel notes its own, in a forward that is run again
        return tuple(mx.vjp(_fused, [q, k, v], [dout])[1])
    return _backward(q, k, v, out, note, dout)


def _has_fused_kernel(dtype: mx.Dtype = mx.float32) -> bool:
    return backend().device != "cpu" or dtype != mx.float32


def _fused(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    T, Hd = q.shape[1], q.shape[3]
    # The word "causal" where possible: an array would make the backward build T x T scores.
    mask: Any = "causal"
    if T < FEWEST_FUSED_QUERIES:
        mask = mx.tril(mx.ones((T, T), dtype=mx.bool_))
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=Hd**-0.5, mask=mask)
    return out.swapaxes(1, 2)


def _forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, Note]:
    """The output (n, T, H, Hd), and everything that can be noted."""
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
    note = Note(mx.concatenate(log_sums, axis=3), mx.concatenate(totals, axis=3), kept)
    return _by_token(mx.concatenate(outs, axis=3)), note


def _backward(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, note: Note, dout: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of q, k and v (Dao et al. 2022, appendix B.2)."""
    K, scale = k.shape[2], q.shape[3] ** -0.5
    queries, douts = _by_head(q, K) * scale, _by_head(dout, K)
    keys, values = k.swapaxes(1, 2), v.transpose(0, 2, 3, 1)
    if note.weights is not None:
        douts = douts / note.total  # in the place of the weights themselves, which are larger
    shares = (_by_head(out, K) * douts).sum(axis=-1, keepdims=True)  # (n, K, G, T, 1)
    dqs: list[mx.array] = []
    dk = dv = None
    for i, (start, end) in reversed(list(enumerate(_blocks(q)))):
        part = slice(start, end)
        block, dblock = _heads_joined(queries[..., part, :]), _heads_joined(douts[..., part, :])
        block = _chained(block, [*dqs[-1:], dk, dv] if dqs else [])
        if note.weights is not None:
            weights = note.weights[i]
        else:
            scores, seen = _hide_future(block @ keys[..., :end, :].swapaxes(2, 3), start, end)
            weights = exp(scores - note.log_sum[..., part, :]) * seen
        dweights = (dblock @ values[..., :end]).reshape(weights.shape)
        dscores = _heads_joined(weights * (dweights - shares[..., part, :]))
        dqs.append((dscores @ keys[..., :end, :]).reshape(queries[..., part, :].shape))
        dk = _add_to_head(dk, dscores.swapaxes(2, 3) @ block)
        dv = _add_to_head(dv, _heads_joined(weights).swapaxes(2, 3) @ dblock)
    assert dk is not None and dv is not None
    dq = _by_token(mx.concatenate(dqs[::-1], axis=3)) * scale
    return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _forward_plainly(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    out, note = _forward(q, k, v)
    return out, note.log_sum


def _backward_plainly(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
    out, log_sum = outputs
    q, k, v = primals
    return _backward(q, k, v, out, Note(log_sum), cotangents[0])


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
