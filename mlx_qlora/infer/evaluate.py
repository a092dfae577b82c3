"""Scores of a model on examples: loss, perplexity and token accuracy."""

import math
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
from rich.console import Console
from rich.progress import track

from mlx_qlora.data.batches import Batches, collate, make_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.distributed import TO_BEGIN, Processes
from mlx_qlora.errors import DataError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.allreduce import score_of_all
from mlx_qlora.train.score import Score, score, score_rows

BATCH = 8  # rows of a forward


WIDTH = 512  # tokens in a row of several examples


POSITIONS = 4096  # of the examples that are scored at once


@dataclass(frozen=True)
class Scores:
    """Means over all supervised tokens of a set.

    Attributes:
        loss: nats per token.
        perplexity: exp(loss).
        token_accuracy: share of tokens that were the model's first choice, 0 to 1.
        n_tokens: how many tokens were scored.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    n_tokens: int


def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples, batch_size: int = BATCH
) -> Scores:
    """Scores a model on every example, without dropout; the same figures each time.

    Args:
        model: base or tuned.
        tokenizer: the one that made the examples; a model of another vocabulary is refused.
        examples: from `read_examples`.
        batch_size: rows per forward; the scores depend on it by float32 rounding alone.

    Raises:
        DataError: no examples, or examples of another vocabulary.
    """
    _check(model, tokenizer, examples)
    return _means(score(model, _batches(examples, batch_size)))


def evaluate_together(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples, processes: Processes
) -> Scores:
    """`evaluate`, shared out over the processes of a run; every one of them has to call it.

    Raises:
        DataError: as `evaluate`.
        ProcessError: another process is gone, or has not come in time.
    """
    _check(model, tokenizer, examples)
    began = time.perf_counter()
    share = islice(_batches(examples, BATCH), processes.rank, None, processes.size)
    own = score(model, share)
    return _means(score_of_all(own, processes, time.perf_counter() - began, seconds=TO_BEGIN)[0])


def _batches(examples: Examples, batch_size: int) -> Batches:
    return make_batches(examples, batch_size, max_length=max(WIDTH, int(examples.lengths.max())))


def _means(total: Score) -> Scores:
    loss, n = total.nats / total.tokens, total.tokens
    return Scores(loss, math.exp(min(loss, 700)), total.hits / n, n)


@dataclass(frozen=True)
class ExampleScores:
    """Sums over the supervised tokens of each example of a set, in the set's order.

    Attributes:
        nats: (n,) float64, of the targets.
        hits: (n,) int64, targets that were the model's first choice.
        tokens: (n,) int64, how many targets there are, at least 1.
    """

    nats: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray

    @property
    def losses(self) -> np.ndarray:
        """(n,) float64: nats per token of each example."""
        return self.nats / self.tokens

    def total(self) -> Scores:
        """The means over all tokens of the set, as `evaluate` gives them."""
        n = int(self.tokens.sum())
        loss = float(self.nats.sum()) / n
        return Scores(loss, math.exp(min(loss, 700)), int(self.hits.sum()) / n, n)


def score_examples(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Examples,
    console: Console | None = None,
) -> ExampleScores:
    """Scores every example by itself, without dropout; the same figures each time.

    Args:
        model: base or tuned.
        tokenizer: the one that made the examples; a model of another vocabulary is refused.
        examples: from `read_examples`.
        console: where a progress bar goes if it is a terminal; none if not given.

    Raises:
        DataError: no examples, examples of another vocabulary, or one that teaches nothing.
    """
    _check(model, tokenizer, examples)
    n = len(examples)
    nats, hits, tokens = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, np.int64)
    quiet = console is None or not console.is_terminal
    for group in track(_groups(examples.lengths), "scores", console=console, disable=quiet):
        rows = score_rows(model, collate([[examples[i]] for i in group]))
        nats[group], hits[group], tokens[group] = rows.nats, rows.hits, rows.tokens
    if not tokens.all():
        place = examples[int(tokens.argmin())].place
        raise DataError(f"{place} has no supervised token, so it has no loss; leave it out")
    return ExampleScores(nats, hits, tokens)


def _groups(lengths: np.ndarray) -> list[list[int]]:
    """Examples of like length, together of about POSITIONS tokens."""
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order].astype(np.int64)) // POSITIONS
    cuts = np.flatnonzero(np.diff(ends)) + 1
    return [group.tolist() for group in np.split(order, cuts)]


def _check(model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples) -> None:
    if not len(examples):
        raise DataError("there are no examples to evaluate")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}"
        )
