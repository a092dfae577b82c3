"""How well a model predicts some batches: sums over their supervised tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora.data.batches import Batch
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.loss import cross_entropy
from mlx_qlora.train.memory import chunks_of, cores_shared, default_chunks, supervised_documents


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
        for _, at, place, chosen, wanted, nats in _scored(model, batch):
            follows = (np.diff(at) == 1) & (place[1:] > 0)
            total.nats += float(nats.sum(dtype=np.float64))
            total.hits += int((chosen == wanted).sum())
            total.tokens += len(wanted)
            total.pairs += int(follows.sum())
            total.repeated += int((follows & (chosen[1:] == chosen[:-1])).sum())
            total.repeated_targets += int((follows & (wanted[1:] == wanted[:-1])).sum())
    return total


@dataclass(frozen=True)
class RowScores:
    """Sums over the supervised tokens of each row of a batch.

    Attributes:
        nats: (B,) float64, of the targets.
        hits: (B,) int64, targets that were the model's first choice.
        tokens: (B,) int64, how many targets there are; 0 where a row teaches nothing.
    """

    nats: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray


def score_rows(model: LlamaForCausalLM, batch: Batch) -> RowScores:
    """Scores each row of a batch by itself, without dropout."""
    B = batch.tokens.shape[0]
    total = RowScores(np.zeros(B), np.zeros(B, np.int64), np.zeros(B, np.int64))
    for row, _, _, chosen, wanted, nats in _scored(model, batch):
        np.add.at(total.nats, row, nats.astype(np.float64))
        np.add.at(total.hits, row, chosen == wanted)
        np.add.at(total.tokens, row, 1)
    return total


def _scored(model: LlamaForCausalLM, batch: Batch) -> Iterator[list[np.ndarray]]:
    """Of each part: rows of the batch, supervised positions, places in their documents.

    Then what is there: the first choices, the targets and the losses.
    """
    documents = supervised_documents(batch)
    lengths = (documents[:, 2] - documents[:, 1]).tolist()
    for parts in chunks_of(model, batch, documents, default_chunks(lengths)):
        found = []
        with cores_shared(parts):
            for part in parts:
                with mx.stream(part.stream):
                    x = model.model.hidden(part.tokens, part.documents)
                    found.append(cross_entropy(model.head, x[part.positions], part.targets, False))
            mx.eval([(losses.nats, losses.choices) for losses in found])
        for part, losses in zip(parts, found):
            at = np.array(part.positions)
            there = map(np.array, (losses.choices, part.targets, losses.nats))
            row, place = (np.array(a)[at] for a in (part.documents.row, part.documents.positions))
            yield [row, at, place, *there]
