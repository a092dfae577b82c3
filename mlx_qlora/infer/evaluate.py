"""Scores of a model on examples: loss, perplexity and token accuracy."""

import math
from dataclasses import dataclass

import numpy as np

from mlx_qlora.data.batches import evaluation_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import check_examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.distributed import processes
from mlx_qlora.errors import DataError
from mlx_qlora.fields import checked
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.progress import doing
from mlx_qlora.train.score import Lend, RowScores, Score, score, score_rows

MOST_NATS = 700.0  # exp of more is not finite


@dataclass(frozen=True)
class Scores:
    """Means over all supervised tokens of a set."""

    loss: float  # nats per token
    perplexity: float
    token_accuracy: float  # share of tokens that were the model's first choice, 0 to 1
    n_tokens: int

    @classmethod
    def of(cls, sums: Score | RowScores) -> "Scores":
        """From sums over tokens, be they of all rows together or of each."""
        n = int(np.sum(sums.tokens))
        loss = sums.loss if isinstance(sums, Score) else float(np.sum(sums.nats)) / n
        return cls(loss, perplexity(loss), int(np.sum(sums.hits)) / n, n)


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return math.exp(min(loss, MOST_NATS))


@checked
def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples, batch_size: int | None = None
) -> Scores:
    """Scores a model on every example, without dropout; the same figures each time.

    Args:
        tokenizer: the one that made the examples.
        examples: from `read_examples`.
        batch_size: rows per forward; the scores depend on it by float32 rounding alone.

    Raises:
        DataError: no examples, or a token that the model's embedding has no row for.
    """
    _check(model, tokenizer, examples)
    return Scores.of(score(model, evaluation_batches(examples, batch_size)))


def score_examples(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Examples,
    base: Lend | None = None,
) -> RowScores:
    """Sums over the supervised tokens of each example, in order, without dropout.

    With a `base`, that the model is within it, the sums of KL(model || base) are among them.
    Of several processes each scores its share; all have to call it. A DataError without examples,
    or for one that teaches nothing, or has a token without an embedding.
    """
    _check(model, tokenizer, examples)
    sums, everyone = np.zeros((4, len(examples))), processes()
    share = np.arange(everyone.rank, len(examples), everyone.size)
    with doing("scoring", len(share), "rows") as task:
        for batch in evaluation_batches(examples[share]) if len(share) else ():
            rows = score_rows(model, batch, base)
            sums[:, share[list(batch.rows)]] = rows.nats, rows.hits, rows.tokens, rows.kl
            task.advance(len(batch.rows))
    sums = everyone.total(sums)
    nats, hits, tokens = sums[0], sums[1].astype(np.int64), sums[2].astype(np.int64)
    if not tokens.all():
        place = examples[int(tokens.argmin())].place
        raise DataError(f"{place} has no supervised token, and so no loss; leave it out")
    return RowScores(nats, hits, tokens, sums[3])


def _check(model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples) -> None:
    if not len(examples):
        raise DataError("there are no examples to evaluate")
    check_examples(tokenizer, model.config, examples)
