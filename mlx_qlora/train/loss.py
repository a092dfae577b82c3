"""Next-token cross-entropy and its gradient, without ever holding the logits.

A sum and not a mean: sums of micro-batches, of packed documents and of processes add up to the
sum over all their tokens, so one division at the end of the step is exact.

The head is frozen, so the only gradient is that of the hidden states,

    d_hidden = softmax(hidden @ W.T) @ W - W[target],

and it is made in the forward: the vocabulary passes in slices, and what was summed is rescaled when
a larger logit turns up (Milakov & Gimelshein 2018, arXiv 1805.02867). A slice of the head is
dequantised once for all tokens, and memory is that of (S, slice), not of (S, V).
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu.exponentials import exp
from mlx_qlora.data.batches import Batch
from mlx_qlora.model.quantize import FrozenMatrix

NARROWEST = 1024  # rows of the head in a slice


@dataclass
class Losses:
    """What the head says of S tokens."""

    nats: mx.array  # (S,) float32, the loss of each target
    gradient: Any = None  # (S, D) float32, of the sum of the nats by the hidden states
    choices: Any = None  # (S,) uint32, the head's first choices


def cross_entropy(
    head: FrozenMatrix,
    hidden: mx.array,
    targets: mx.array,
    differentiate: bool = True,
    softcap: float | None = None,
) -> Losses:
    """The losses of some tokens, and their gradient, or else the head's first choices.

    Args:
        head: W (V, D), of whatever packing.
        hidden: (S, D), in the compute dtype.
        targets: (S,) int, from 0 to V - 1.
        differentiate: True for the gradient, False for the choices.
        softcap: logits z become softcap * tanh(z / softcap), as Gemma 2's do.
    """
    slices = losses_by_slice(head, hidden, targets, differentiate, softcap)
    while True:
        try:
            next(slices)
        except StopIteration as done:
            return done.value


def losses_by_slice(
    head: FrozenMatrix,
    hidden: mx.array,
    targets: mx.array,
    differentiate: bool,
    softcap: float | None = None,
) -> Generator[list[mx.array], None, Losses]:
    """As `cross_entropy`; yields after each slice what has to be computed before the next."""
    S, D = hidden.shape
    top, total, wanted = mx.full((S, 1), -mx.inf), mx.zeros((S, 1)), mx.zeros((S, 1))
    choices, mean_row = mx.zeros((S, 1), mx.uint32), mx.zeros((S, D))  # the latter not yet divided
    for start, end in vocabulary_slices(*head.shape, S):
        # Tied to all results of the slice before: one that waited would keep its logits alive.
        before = [total, wanted, mean_row if differentiate else choices]
        rows = head.rows(start, end, before)
        logits = rows.multiply(mx.depends([hidden], before)[0]).astype(mx.float32)
        if softcap is not None:
            logits = softcap * mx.tanh(logits / softcap)
        highest = logits.max(axis=-1, keepdims=True)
        is_here = (targets >= start) & (targets < end)
        index = mx.clip(targets - start, 0, end - start - 1)
        wanted = wanted + mx.take_along_axis(logits, index[:, None], -1) * is_here[:, None]

        old_top, top = top, mx.maximum(top, highest)
        weights, rescale = exp(logits - top), exp(old_top - top)
        total = total * rescale + weights.sum(axis=-1, keepdims=True)
        if differentiate:
            sloped = weights if softcap is None else weights * (1 - (logits / softcap).square())
            mean_row = mean_row * rescale + rows.multiply_back(sloped.astype(hidden.dtype))
        else:
            first = (mx.argmax(logits, -1, keepdims=True) + start).astype(mx.uint32)
            choices = mx.where(highest > old_top, first, choices)
        yield [top, total, wanted, mean_row if differentiate else choices]
    nats = (top + mx.log(total) - wanted)[:, 0]
    if not differentiate:
        return Losses(nats, choices=choices[:, 0])
    rows_of_targets = head.lookup(targets).astype(mx.float32)
    if softcap is not None:
        rows_of_targets = rows_of_targets * (1 - (wanted / softcap).square())
    return Losses(nats, mean_row / total - rows_of_targets)


def vocabulary_slices(V: int, D: int, S: int) -> list[tuple[int, int]]:
    """First row, and the one after the last, of each slice of a head (V, D), for S tokens."""
    width = max(NARROWEST, device.current().head_bytes // (4 * max(S, D)) // NARROWEST * NARROWEST)
    return [(start, min(start + width, V)) for start in range(0, V, width)]


# ---- what labels weigh ---------------------------------------------------------------------------


class Weighed(NamedTuple):
    """The loss of some labels, and how much of the gradient of each one's nats is in its own."""

    loss: float
    n: float  # what these labels add to the number that the loss of a step is divided by
    weights: np.ndarray  # (S,) float64, d loss / d nats


# Of labels (S,), places in the rows of a batch end to end, that cost so many nats (S,) float32.
Weigh = Callable[[Batch, np.ndarray, np.ndarray], Weighed]


def by_batch(batch: Batch, labels: np.ndarray, nats: np.ndarray) -> Weighed:
    """Weigh labels as their batch says."""
    assert batch.weights is not None
    weights = batch.weights.reshape(-1)[labels].astype(np.float64)
    return Weighed(float(weights @ nats), float(weights.sum()), weights)
