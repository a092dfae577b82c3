"""Next-token cross-entropy and its gradient, without ever holding the logits.

A sum and not a mean: sums of micro-batches, of packed documents and of processes add up to the
sum over all their tokens, so one division at the end of the step is exact.

The head is frozen, so the only gradient is that of the hidden states,

    d_hidden = softmax(hidden @ W.T) @ W - W[target],

and it is made in the forward: the vocabulary goes by in pieces, whose weights are scaled anew
when a larger logit turns up (Milakov & Gimelshein 2018, arXiv 1805.02867). A piece of the head is
dequantised once for all tokens, and memory is that of (S, piece), not of (S, V).
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_qlora import device
from mlx_qlora.cpu.exponentials import exp
from mlx_qlora.model.quantize import FrozenMatrix

# Bytes that a piece's logits, and its rows of W, may take. On a CPU they shall stay near its
# caches; on a GPU there shall be few and large matmuls.
CPU_PIECE, GPU_PIECE, NARROWEST = 8 << 20, 256 << 20, 1024


@dataclass
class Losses:
    """What the head says of S tokens.

    Attributes:
        nats: (S,) float32, the loss of each target.
        gradient: (S, D) float32, of the sum of the nats with respect to the hidden states.
        choices: (S,) uint32, the head's first choices.
    """

    nats: mx.array
    gradient: Any = None
    choices: Any = None


def cross_entropy(
    head: FrozenMatrix, hidden: mx.array, targets: mx.array, differentiate: bool = True
) -> Losses:
    """The losses of some tokens.

    Args:
        head: W (V, D), of whatever packing.
        hidden: (S, D), in the compute dtype.
        targets: (S,) int, from 0 to V - 1.
        differentiate: True for the gradient, False for the first choices.
    """
    going = losses_by_piece(head, hidden, targets, differentiate)
    while True:
        try:
            next(going)
        except StopIteration as done:
            return done.value


def losses_by_piece(
    head: FrozenMatrix, hidden: mx.array, targets: mx.array, differentiate: bool
) -> Generator[list[mx.array], None, Losses]:
    """As `cross_entropy`; yields after each piece what has to be computed before the next."""
    S, D = hidden.shape
    top, total, wanted = mx.full((S, 1), -mx.inf), mx.zeros((S, 1)), mx.zeros((S, 1))
    choices, mean_row = mx.zeros((S, 1), mx.uint32), mx.zeros((S, D))  # the latter not yet divided
    for start, end in pieces(*head.shape, S):
        # Tied to all that the piece before has to give: what waits would keep its logits alive.
        last = [total, wanted, mean_row if differentiate else choices]
        part = head.rows(start, end, last)
        logits = part.multiply(mx.depends([hidden], last)[0]).astype(mx.float32)
        highest = logits.max(axis=-1, keepdims=True)
        here = (targets >= start) & (targets < end)
        legal = mx.clip(targets - start, 0, end - start - 1)
        wanted = wanted + mx.take_along_axis(logits, legal[:, None], -1) * here[:, None]

        before, top = top, mx.maximum(top, highest)
        weights, keep = exp(logits - top), exp(before - top)
        total = total * keep + weights.sum(axis=-1, keepdims=True)
        if differentiate:
            mean_row = mean_row * keep + part.multiply_back(weights.astype(hidden.dtype))
        else:
            first = (mx.argmax(logits, -1, keepdims=True) + start).astype(mx.uint32)
            choices = mx.where(highest > before, first, choices)
        yield [top, total, wanted, mean_row if differentiate else choices]
    nats = (top + mx.log(total) - wanted)[:, 0]
    if not differentiate:
        return Losses(nats, choices=choices[:, 0])
    return Losses(nats, mean_row / total - head.lookup(targets).astype(mx.float32))


def pieces(V: int, D: int, S: int) -> list[tuple[int, int]]:
    """First and last row of each piece of a head (V, D), for S tokens."""
    budget = CPU_PIECE if device.current().kind == "cpu" else GPU_PIECE
    width = max(NARROWEST, budget // (4 * max(S, D)) // NARROWEST * NARROWEST)
    return [(start, min(start + width, V)) for start in range(0, V, width)]
