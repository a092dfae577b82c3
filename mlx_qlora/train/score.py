"""How well a model predicts some batches: sums over their supervised tokens."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.cpu.streams import cores_shared
from mlx_qlora.data.batches import Batch
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.loss import cross_entropy
from mlx_qlora.train.memory import (
    Shard,
    chunks_of,
    default_chunks,
    split_evenly,
    supervised_documents,
)


@dataclass
class Score:
    """Sums over the supervised tokens of some batches, weighted ones alone where that is said."""

    nats: float = 0.0  # weighted, of all labels
    hits: int = 0  # targets that were the model's first choice
    tokens: int = 0  # of answers
    pairs: int = 0  # targets whose predecessor is a target of the same document, too
    repeated: int = 0  # pairs for which the model's first choices are the same token
    repeated_targets: int = 0  # pairs that are the same token in the data
    excess: float = 0.0  # by which the sum of all weights is above the number of tokens

    @property
    def loss(self) -> float:
        """Mean nats of the labels, by their weights."""
        return self.nats / ((self.tokens + self.excess) or 1)

    @property
    def metrics(self) -> dict[str, float]:
        """What a validation records besides, by its name there."""
        pairs = max(self.pairs, 1)
        repetition = {"repetition": self.repeated, "reference_repetition": self.repeated_targets}
        shares = {name: n / pairs for name, n in repetition.items()}
        return {"token_accuracy": self.hits / max(self.tokens, 1), **shares}


def score(model: LlamaForCausalLM, batches: Iterable[Batch]) -> Score:
    """Scores a model on batches, without dropout."""
    total = Score()
    for batch in batches:
        for shard, choice, target, nats, _ in _scored(model, batch):
            position, place = np.array(shard.positions), np.array(shard.documents.positions)
            if batch.weights is not None and batch.answers is not None:
                weights = batch.weights.reshape(-1)[shard.labels].astype(np.float64)
                answers = batch.answers.reshape(-1)[shard.labels]
                total.excess += float(weights.sum()) - int(answers.sum())
                nats = nats * weights
                position, choice, target = position[answers], choice[answers], target[answers]
            follows = (np.diff(position) == 1) & (place[position][1:] > 0)
            total.nats += float(nats.sum(dtype=np.float64))
            total.hits += int((choice == target).sum())
            total.tokens += len(target)
            total.pairs += int(follows.sum())
            total.repeated += int((follows & (choice[1:] == choice[:-1])).sum())
            total.repeated_targets += int((follows & (target[1:] == target[:-1])).sum())
    return total


@dataclass(frozen=True)
class RowScores:
    """Sums over the answers' tokens of each of a batch's B rows, whatever their weights."""

    nats: np.ndarray  # (B,) float64
    hits: np.ndarray  # (B,) int64, targets that were the model's first choice
    tokens: np.ndarray  # (B,) int64; 0 where nothing of a row is learned
    kl: np.ndarray  # (B,) float64, KL(model || base) in nats; 0 where no base was given


# Makes a model another one, for a while.
Lend = Callable[[], AbstractContextManager[Any]]


def score_rows(model: LlamaForCausalLM, batch: Batch, base: Lend | None = None) -> RowScores:
    """Scores each row of a batch by itself, without dropout."""
    B = batch.tokens.shape[0]
    total = RowScores(np.zeros(B), np.zeros(B, np.int64), np.zeros(B, np.int64), np.zeros(B))
    answers = np.ones(batch.tokens.size, bool) if batch.answers is None else batch.answers
    for shard, choice, target, nats, kl in _scored(model, batch, base):
        row, is_answer = np.array(shard.documents.row), answers.reshape(-1)[shard.labels]
        row = row[np.array(shard.positions)]
        np.add.at(total.nats, row, nats.astype(np.float64) * is_answer)
        np.add.at(total.hits, row, (choice == target) & is_answer)
        np.add.at(total.tokens, row, is_answer)
        np.add.at(total.kl, row, kl.astype(np.float64) * is_answer)
    return total


def log_probabilities(model: LlamaForCausalLM, batch: Batch) -> np.ndarray:
    """(N,) float64: of each document of a batch, the log-probability of its answer."""
    return -answers_of_documents(batch, *nats_of_labels(model, batch))


def nats_of_labels(model: LlamaForCausalLM, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """All labels of a batch (S,), as places in its rows end to end, and their nats (S,) float32."""
    found = [(shard.labels, nats) for shard, _, _, nats, _ in _scored(model, batch)]
    labels, nats = zip(*found) if found else ([np.zeros(0, int)], [np.zeros(0, np.float32)])
    return np.concatenate(labels), np.concatenate(nats)


def answers_of_documents(batch: Batch, labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) float64: sums over the answer of each document, of values at some labels (S,)."""
    if batch.answers is not None:
        values = values * batch.answers.reshape(-1)[labels]
    return np.bincount(batch.document_of[labels], values, minlength=len(batch.documents))


def _scored(
    model: LlamaForCausalLM, batch: Batch, base: Lend | None = None
) -> Iterator[tuple[Shard, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each shard's supervised tokens (S,) the first choice, the target, the loss, the KL."""
    documents = supervised_documents(batch)
    n_chunks = default_chunks((documents[:, 2] - documents[:, 1]).tolist())
    for shards in chunks_of(model, batch, split_evenly(documents, n_chunks)):
        with cores_shared(shards):
            bases = of_base(model, shards, base)
            triples = zip(_in_streams(shards), hidden_states(model, shards), bases)
            cap = model.config.logits_softcap
            results = [
                cross_entropy(model.head, x, shard.targets, False, cap, base_x)
                for shard, x, base_x in triples
            ]
            mx.eval([(losses.nats, losses.choices, losses.kl) for losses in results])
        for shard, losses in zip(shards, results):
            kl = np.zeros(len(shard.labels)) if losses.kl is None else np.array(losses.kl)
            target, nats = np.array(shard.targets), np.array(losses.nats)
            yield shard, np.array(losses.choices), target, nats, kl


def of_base(
    model: LlamaForCausalLM, shards: list[Shard], base: Lend | None
) -> list[mx.array | None]:
    """As `hidden_states`, of the base; None for each shard where there is none."""
    if base is None:
        return [None] * len(shards)
    with base():
        hidden = hidden_states(model, shards)
        mx.eval(hidden)
    return [*hidden]


def hidden_states(model: LlamaForCausalLM, shards: list[Shard]) -> list[mx.array]:
    """What the head reads of each shard's supervised tokens (S, D), without dropout."""
    tree = model.model

    def step(i: int, xs: list[mx.array]) -> list[mx.array]:
        pairs = zip(_in_streams(shards), xs)
        return [tree.layers[i](x, shard.documents) for shard, x in pairs]

    xs = tree.through(step, [tree.embed(shard.tokens) for shard in _in_streams(shards)])
    pairs = zip(_in_streams(shards), xs)
    return [tree.normalised(x)[shard.positions] for shard, x in pairs]


def _in_streams(shards: list[Shard]) -> Iterator[Shard]:
    """Each shard, and for so long its stream is the default one."""
    for shard in shards:
        with mx.stream(shard.stream):
            yield shard
