"""Scores of a model on examples: loss, perplexity and token accuracy."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from mlx_qlora.data.batches import collate, evaluation_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.distributed import TO_BEGIN, Processes
from mlx_qlora.errors import DataError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.allreduce import score_of_all
from mlx_qlora.train.score import RowScores, score, score_rows

T = TypeVar("T")
BATCH = 8  # rows of a forward
POSITIONS = 4096  # of the examples that are scored at once
MOST_NATS = 700.0  # exp of more is not finite


@dataclass(frozen=True)
class Scores:
    """Means over all supervised tokens of a set."""

    loss: float  # nats per token
    perplexity: float
    token_accuracy: float  # share of tokens that were the model's first choice, 0 to 1
    n_tokens: int

    @classmethod
    def of(cls, nats: float, hits: int, n: int) -> "Scores":
        """From sums over n tokens."""
        return cls(nats / n, perplexity(nats / n), hits / n, n)


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return math.exp(min(loss, MOST_NATS))


def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples, batch_size: int | None = None
) -> Scores:
    """Scores a model on every example, without dropout; the same figures each time.

    Args:
        tokenizer: the one that made the examples.
        examples: from `read_examples`.
        batch_size: rows per forward; the scores depend on it by float32 rounding alone.

    Raises:
        DataError: no examples, or examples of another vocabulary.
    """
    _check(model, tokenizer, examples)
    total = score(model, evaluation_batches(examples, batch_size))
    return Scores.of(total.nats, total.hits, total.tokens)


def evaluate_distributed(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples, processes: Processes
) -> Scores:
    """`evaluate` by all processes of a run, a share of the batches each; all have to call it.

    Raises:
        DataError: as `evaluate`.
        ProcessError: another process is gone, or did not finish in time.
    """
    _check(model, tokenizer, examples)
    start = time.perf_counter()
    share = score(model, islice(evaluation_batches(examples), processes.rank, None, processes.size))
    total, _ = score_of_all(share, processes, time.perf_counter() - start, seconds=TO_BEGIN)
    return Scores.of(total.nats, total.hits, total.tokens)


def score_examples(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Examples,
    console: Console | None = None,
) -> RowScores:
    """Sums over the supervised tokens of each example, in order, without dropout.

    On a terminal, `console` shows a progress bar.

    Raises:
        DataError: no examples, examples of another vocabulary, or one that teaches nothing.
    """
    _check(model, tokenizer, examples)
    n = len(examples)
    nats, hits, tokens = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, np.int64)
    for group in progress(_groups(examples.lengths), "scores", console):
        rows = score_rows(model, collate([[examples[i]] for i in group]))
        nats[group], hits[group], tokens[group] = rows.nats, rows.hits, rows.tokens
    if not tokens.all():
        place = examples[int(tokens.argmin())].place
        raise DataError(f"{place} has no supervised token, so it has no loss; leave it out")
    return RowScores(nats, hits, tokens)


def progress(work: Sequence[T], label: str, console: Console | None) -> Iterable[T]:
    """The same, one by one, with a progress bar if the console is a terminal."""
    shown = console is not None and console.is_terminal
    return track(work, label, console=console, disable=not shown)


def _groups(lengths: np.ndarray) -> list[list[int]]:
    """Numbers of examples of similar length, about POSITIONS tokens in each group."""
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
