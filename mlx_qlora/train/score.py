"""How well a model predicts some batches: sums over their supervised tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora.data.batches import Batch
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.loss import cross_entropy
from mlx_qlora.train.parts import cores_shared, parts_of


@dataclass
class Score:
    """Sums over the supervised tokens of some batches.

    Attributes:
        nats: of the targets.
        hits: targets that were the model's first choice.
        tokens: how many targets there are.
        pairs: targets whose predecessor is a target of the same document, too.
        repeated: pairs of which the model's first choices are the same token.
        repeated_targets: pairs that are the same token in the data.
    """

    nats: float = 0.0
    hits: int = 0
    tokens: int = 0
    pairs: int = 0
    repeated: int = 0
    repeated_targets: int = 0


def score(model: LlamaForCausalLM, batches: Iterable[Batch]) -> Score:
    """Scores a model on batches, without dropout."""
    total = Score()
    for batch in batches:
        for at, place, chosen, wanted, nats in _scored(model, batch):
            follows = (np.diff(at) == 1) & (place[1:] > 0)
            total.nats += float(nats.sum(dtype=np.float64))
            total.hits += int((chosen == wanted).sum())
            total.tokens += len(wanted)
            total.pairs += int(follows.sum())
            total.repeated += int((follows & (chosen[1:] == chosen[:-1])).sum())
            total.repeated_targets += int((follows & (wanted[1:] == wanted[:-1])).sum())
    return total


def _scored(model: LlamaForCausalLM, batch: Batch) -> list[tuple[np.ndarray, ...]]:
    """Of each part: its supervised positions, their places in their documents, the first choices
    there, the targets and the losses.
    """
    parts = parts_of(model, batch)
    with cores_shared(parts):
        found = []
        for part in parts:
            with mx.stream(part.stream):
                x = model.model.hidden(part.tokens, part.documents)
                found.append(cross_entropy(model.head, x[part.positions], part.targets, False))
        mx.eval([(losses.nats, losses.choices) for losses in found])
    return [
        (at := np.array(part.positions), np.array(part.documents.positions)[at])
        + tuple(map(np.array, (losses.choices, part.targets, losses.nats)))
        for part, losses in zip(parts, found)
    ]
