"""Next-token cross-entropy and its gradient, without ever holding the logits.

A sum and not a mean: sums of micro-batches, of packed documents and of processes add up to the
sum over all their tokens, so one division at the end of the step is exact.

The head is frozen, so the only gradient is that of the hidden states,

    d_hidden = softmax(hidden @ W.T) @ W - W[target],

and it is made in the forward: the vocabulary passes in slices, and what was summed is rescaled when
a larger logit turns up (Milakov & Gimelshein 2018, arXiv 1805.02867). A slice of the head is
dequantised once for all tokens, and memory is that of (S, slice), not of (S, V).

The divergence of these probabilities p from those of the base, q, is summed up on the same way:

    KL(p || q) = sum of p_i log(p_i / q_i),    d KL / d logit_i = p_i (log(p_i / q_i) - KL).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu.exponentials import exp
from mlx_qlora.data.batches import Batch
from mlx_qlora.model.linears import Running, result_of
from mlx_qlora.model.quantize import FrozenMatrix

NARROWEST = 1024  # rows of the head in a slice


@dataclass
class Losses:
    """What the head says of S tokens."""

    nats: mx.array  # (S,) float32, the loss of each target
    gradient: Any = None  # (S, D) float32, of the sum of the nats by the hidden states
    choices: Any = None  # (S,) uint32, the head's first choices
    kl: Any = None  # (S,) float32, KL(p || q), where the hidden states of q are given


def cross_entropy(*args: Any, **named: Any) -> Losses:
    """What `losses_by_slice` returns in the end."""
    return result_of(losses_by_slice(*args, **named))


def losses_by_slice(
    head: FrozenMatrix,
    hidden: mx.array,
    targets: mx.array,
    differentiate: bool = True,
    softcap: float | None = None,
    base: mx.array | None = None,
    kl_weight: float = 0.0,
) -> Running[Losses]:
    """The losses of some tokens, and their gradient, or else the head's first choices.

    Yields after each slice of the vocabulary what has to be computed before the next.

    Args:
        head: W (V, D), of whatever packing.
        hidden: (S, D), in the compute dtype.
        targets: (S,) int, from 0 to V - 1.
        differentiate: True for the gradient, False for the choices.
        softcap: logits z become softcap * tanh(z / softcap), as Gemma 2's do.
        base: (S, D), hidden states of a model to measure the divergence from.
        kl_weight: so much of the divergence is in the nats and in their gradient.
    """
    S, D = hidden.shape
    top, total, wanted = mx.full((S, 1), -mx.inf), mx.zeros((S, 1)), mx.zeros((S, 1))
    choices, mean_row = mx.zeros((S, 1), mx.uint32), mx.zeros((S, D))  # the latter not yet divided
    log_sum, apart, apart_row, shift = top, total, mean_row, total  # of the divergence
    of_base: list[mx.array] = []
    for start, end in vocabulary_slices(*head.shape, 2 * S if kl_weight else S):
        # Tied to all results of the slice before: one that waited would keep its logits alive.
        before = [total, wanted, mean_row if differentiate else choices, *of_base]
        rows = head.rows(start, end, before)
        logits = _logits(rows, mx.depends([hidden], before)[0], softcap)
        highest = logits.max(axis=-1, keepdims=True)
        is_here = (targets >= start) & (targets < end)
        index = mx.clip(targets - start, 0, end - start - 1)
        wanted = wanted + mx.take_along_axis(logits, index[:, None], -1) * is_here[:, None]

        old_top, top = top, mx.maximum(top, highest)
        weights, rescale = exp(logits - top), exp(old_top - top)
        total = total * rescale + weights.sum(axis=-1, keepdims=True)
        sloped = weights if softcap is None else weights * (1 - (logits / softcap).square())
        if base is not None:
            logits_of_base = _logits(rows, mx.depends([base], before)[0], softcap)
            most = logits_of_base.max(axis=-1, keepdims=True)
            summed = exp(logits_of_base - most).sum(axis=-1, keepdims=True)
            log_sum = mx.logaddexp(log_sum, most + mx.log(summed))
            distance = logits - logits_of_base
            if start == 0:  # what all logits moved by says nothing, and would swallow 16 bits
                shift = distance.mean(axis=-1, keepdims=True)
            distance = distance - shift
            apart = apart * rescale + (weights * distance).sum(axis=-1, keepdims=True)
            if differentiate:
                more = rows.multiply_back((sloped * distance).astype(hidden.dtype))
                apart_row = apart_row * rescale + more
            of_base = [log_sum, apart, apart_row]
        if differentiate:
            mean_row = mean_row * rescale + rows.multiply_back(sloped.astype(hidden.dtype))
        else:
            first = (mx.argmax(logits, -1, keepdims=True) + start).astype(mx.uint32)
            choices = mx.where(highest > old_top, first, choices)
        yield [top, total, wanted, mean_row if differentiate else choices, *of_base]
    log_total, kl = top + mx.log(total), None
    nats = (log_total - wanted)[:, 0]
    if base is not None:
        apart = apart / total
        kl = (apart + shift + (log_sum - log_total))[:, 0]
    if not differentiate:
        return Losses(nats, choices=choices[:, 0], kl=kl)
    rows_of_targets = head.lookup(targets).astype(mx.float32)
    if softcap is not None:
        rows_of_targets = rows_of_targets * (1 - (wanted / softcap).square())
    gradient = mean_row / total - rows_of_targets
    if kl is not None:
        nats = nats + kl_weight * kl
        gradient = gradient + kl_weight * (apart_row - apart * mean_row) / total
    return Losses(nats, gradient, kl=kl)


def _logits(rows: FrozenMatrix, hidden: mx.array, softcap: float | None) -> mx.array:
    """Hidden states (S, D) -> the logits of some rows of the head (S, n), float32."""
    logits = rows.multiply(hidden).astype(mx.float32)
    return logits if softcap is None else softcap * mx.tanh(logits / softcap)


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
