"""How well a model predicts some batches: sums over their supervised tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora.cpu.streams import cores_shared
from mlx_qlora.data.batches import Batch
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.loss import Losses, cross_entropy
from mlx_qlora.train.memory import Shard, chunks_of, default_chunks, supervised_documents


@dataclass
class Score:
    """Sums over the supervised tokens of some batches."""

    nats: float = 0.0
    hits: int = 0  # targets that were the model's first choice
    tokens: int = 0
    pairs: int = 0  # targets whose predecessor is a target of the same document, too
    repeated: int = 0  # pairs for which the model's first choices are the same token
    repeated_targets: int = 0  # pairs that are the same token in the data


def score(model: LlamaForCausalLM, batches: Iterable[Batch]) -> Score:
    """Scores a model on batches, without dropout."""
    total = Score()
    for batch in batches:
        for _, position, place, choice, target, nats in _scored(model, batch):
            follows = (np.diff(position) == 1) & (place[1:] > 0)
            total.nats += float(nats.sum(dtype=np.float64))
            total.hits += int((choice == target).sum())
            total.tokens += len(target)
            total.pairs += int(follows.sum())
            total.repeated += int((follows & (choice[1:] == choice[:-1])).sum())
            total.repeated_targets += int((follows & (target[1:] == target[:-1])).sum())
    return total


@dataclass(frozen=True)
class RowScores:
    """Sums over the supervised tokens of each of a batch's B rows."""

    nats: np.ndarray  # (B,) float64
    hits: np.ndarray  # (B,) int64, targets that were the model's first choice
    tokens: np.ndarray  # (B,) int64; 0 where nothing of a row is learned


def score_rows(model: LlamaForCausalLM, batch: Batch) -> RowScores:
    """Scores each row of a batch by itself, without dropout."""
    B = batch.tokens.shape[0]
    total = RowScores(np.zeros(B), np.zeros(B, np.int64), np.zeros(B, np.int64))
    for row, _, _, choice, target, nats in _scored(model, batch):
        np.add.at(total.nats, row, nats.astype(np.float64))
        np.add.at(total.hits, row, choice == target)
        np.add.at(total.tokens, row, 1)
    return total


def _scored(model: LlamaForCausalLM, batch: Batch) -> Iterator[list[np.ndarray]]:
    """Of each shard's supervised tokens, rows (S,) of what the head says and where they are.

    The row of the batch, the position in the shard, the place in the document, the model's first
    choice, the target, the loss.
    """
    documents = supervised_documents(batch)
    n_chunks = default_chunks((documents[:, 2] - documents[:, 1]).tolist())
    for shards in chunks_of(model, batch, documents, n_chunks):
        with cores_shared(shards):
            results = _losses(model, shards)
            mx.eval([(losses.nats, losses.choices) for losses in results])
        for shard, losses in zip(shards, results):
            position = np.array(shard.positions)
            row, place = np.array(shard.documents.row), np.array(shard.documents.positions)
            of_head = map(np.array, (losses.choices, shard.targets, losses.nats))
            yield [row[position], position, place[position], *of_head]


def _losses(model: LlamaForCausalLM, shards: list[Shard]) -> list[Losses]:
    """What the head says of each shard's supervised tokens."""
    tree, cap = model.model, model.config.logits_softcap

    def step(i: int, xs: list[mx.array]) -> list[mx.array]:
        pairs = zip(_in_streams(shards), xs)
        return [tree.layers[i](x, shard.documents) for shard, x in pairs]

    xs = tree.through(step, [tree.embed(shard.tokens) for shard in _in_streams(shards)])
    pairs = zip(_in_streams(shards), xs)
    hidden = [tree.normalised(x)[shard.positions] for shard, x in pairs]
    pairs = zip(_in_streams(shards), hidden)
    return [cross_entropy(model.head, x, shard.targets, False, cap) for shard, x in pairs]


def _in_streams(shards: list[Shard]) -> Iterator[Shard]:
    """Each shard, and for so long its stream is the default one."""
    for shard in shards:
        with mx.stream(shard.stream):
            yield shard
