"""Next-token cross-entropy and its gradient, without ever holding the logits.

A sum and not a mean: sums of micro-batches, of packed documents and of processes add up to the
sum over all their tokens, so one division at the end of the step is exact.

The head is frozen, so the only gradient is that of the hidden states,

    d_hidden = softmax(hidden @ W.T) @ W - W[target],

and it is made in the forward: the vocabulary goes by in pieces, whose weights are scaled anew
when a larger logit turns up (Milakov & Gimelshein 2018, arXiv 1805.02867). A piece of the head is
dequantised once for all tokens, and memory is that of (S, piece), not of (S, V).
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_qlora.backend import backend
from mlx_qlora.model.exponentials import exp
from mlx_qlora.model.quantize import FrozenMatrix

# Bytes that a piece's logits, and its rows of W, may take. On a CPU they shall stay near its
# caches; on a GPU there shall be few and large matmuls.
CPU_PIECE, GPU_PIECE, NARROWEST = 8 << 20, 256 << 20, 1024


@dataclass
class Losses:
    """What the head says of S tokens; what is not asked for is not computed.

    Attributes:
        nats: (S,) float32, the loss of each target.
        choices: (S,) uint32, the head's first choices.
        gradient: (S, D) float32, of the sum of the nats with respect to the hidden states.
    """

    nats: mx.array
    choices: mx.array
    gradient: mx.array


def cross_entropy(
    head: FrozenMatrix, hidden: mx.array, targets: mx.array, differentiate: bool = True
) -> Losses:
    """The losses of some tokens.

    Args:
        head: W (V, D), of whatever packing.
        hidden: (S, D), in the compute dtype.
        targets: (S,) int, from 0 to V - 1.
        differentiate: whether the gradient will be asked for.
    """
    S = hidden.shape[0]
    top, total = mx.full((S, 1), -mx.inf), mx.zeros((S, 1))
    wanted, choices = mx.zeros((S,)), mx.zeros((S,), mx.uint32)
    mean_row = mx.zeros((S, head.shape[1]))  # of W, weighted; not yet divided by `total`
    for start, end in pieces(*head.shape, S):
        # Tied to the piece before: else the logits of all pieces could exist at once.
        last = [total, mean_row] if differentiate else [total]
        part = head.rows(start, end, last)
        logits = part.multiply(mx.depends([hidden], last)[0]).astype(mx.float32)
        highest = logits.max(axis=-1, keepdims=True)
        choices = mx.where(
            highest > top, mx.argmax(logits, -1, keepdims=True) + start, choices[:, None]
        )[:, 0]
        here = (targets >= start) & (targets < end)
        legal = mx.clip(targets - start, 0, end - start - 1)
        wanted = wanted + mx.take_along_axis(logits, legal[:, None], -1)[:, 0] * here

        before, top = top, mx.maximum(top, highest)
        weights, keep = exp(logits - top), exp(before - top)
        total = total * keep + weights.sum(axis=-1, keepdims=True)
        mean_row = mean_row * keep + part.multiply_back(weights.astype(hidden.dtype))
    nats = (top + mx.log(total))[:, 0] - wanted
    return Losses(nats, choices, mean_row / total - rows_of(head, targets))


def pieces(V: int, D: int, S: int) -> list[tuple[int, int]]:
    """First and last row of each piece of a head (V, D), for S tokens."""
    budget = CPU_PIECE if backend().device == "cpu" else GPU_PIECE
    width = max(NARROWEST, budget // (4 * max(S, D)) // NARROWEST * NARROWEST)
    return [(start, min(start + width, V)) for start in range(0, V, width)]


def rows_of(head: FrozenMatrix, targets: mx.array) -> mx.array:
    """The rows of W (S, D) that belong to some tokens, float32."""
    return head.lookup(targets).astype(mx.float32)
