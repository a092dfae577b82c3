"""Scores of a model on examples: loss, perplexity and token accuracy."""

import math
from dataclasses import dataclass

from mlx_qlora.data.batches import make_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.score import score

WIDTH = 512  # tokens in a row of several examples


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
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Examples, batch_size: int = 8
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
    if not len(examples):
        raise DataError("there are no examples to evaluate")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}"
        )
    width = max(WIDTH, int(examples.lengths.max()))
    total = score(model, make_batches(examples, batch_size, max_length=width))
    loss, n = total.nats / total.tokens, total.tokens
    return Scores(loss, math.exp(min(loss, 700)), total.hits / n, n)
