"""What an adapter does to text that has nothing to do with its data.

The perplexity of general text, without the adapter and with it, and KL(tuned || base) there: the
mean over positions of sum_v p_tuned log(p_tuned / p_base). It grows where the tuned model says what
the base never would; it is what `training.kl_weight` and reinforcement learning penalise, and so
the one that is shown. KL(base || tuned) is recorded beside it: it grows where the tuned model has
no probability left for what the base would have said, and predicts losses on earlier tasks
(Shenfeld et al. 2025, arXiv 2509.04259).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.adapters.drift import encode_texts, log_probabilities
from mlx_qlora.adapters.several import active, disabled
from mlx_qlora.after.answer_metrics import LOWER, Row, paired_row, perplexity_row
from mlx_qlora.after.bootstrap import Interval, ratio_interval
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.progress import each
from mlx_qlora.readers import read_text
from mlx_qlora.train.score import Lend

# How much a rise of perplexity is, by what people accept knowingly. Rounding Llama 2 7B to 4 bits
# takes WikiText-2 from 5.47 to 5.73, +5 %; from 13B (4.88) to 7B it is +12 % (Lin et al. 2023,
# arXiv 2306.00978, table 4). Up to the first, little was forgotten; beyond the second, the model
# is on such text no better than a smaller one.
LITTLE, MUCH = 0.05, 0.12
WINDOW = 512  # tokens of a text that are read at once
BLOCK = 32  # predictions that are drawn together: those of one sentence depend on each other
MOST_CHARACTERS = 400_000  # of a file; some 100,000 tokens give intervals of under a percent


@dataclass(frozen=True)
class Forgetting:
    """An adapter on general text.

    Intervals come from drawing blocks of BLOCK neighbouring predictions (Künsch 1989). Of the
    built-in texts there are some 16 of six subjects: they cover chance within them, not other kinds
    of text.
    """

    loss: Row  # nats per token, as in a comparison
    perplexity: Row
    kl: Interval  # KL(tuned || base), nats per token
    kl_reverse: Interval  # KL(base || tuned)
    tokens: int  # predictions that were compared
    source: str  # what the text was

    @property
    def figures(self) -> str:
        """Perplexities and divergence, in words."""
        change, tuned = self.perplexity.change, self.perplexity.tuned
        assert change is not None and tuned is not None
        moved = "rose" if change.estimate > 0 else "fell"
        ends = f"{100 * change.low:+.2g} to {100 * change.high:+.2g} %"
        interval = f", {100 * change.level:g} % interval {ends}" if change.known else ""
        kl = self.kl
        ends_of_kl = f", {kl.low:.3g} to {kl.high:.3g}" if kl.known else ""
        return (
            f"on {self.source} the perplexity {moved} from {self.perplexity.base.estimate:.4g} to "
            f"{tuned.estimate:.4g} ({100 * change.estimate:+.2g} %{interval}; {self.tokens:,} "
            f"tokens), KL(tuned || base) is {kl.estimate:.3g} nats per token{ends_of_kl}"
        )

    @property
    def sentence(self) -> str:
        """What happened to general text, in plain words."""
        return f"{self.figures}: {self.verdict}"

    @property
    def verdict(self) -> str:
        """How much was forgotten, in plain words."""
        change = self.perplexity.change
        assert change is not None
        low, high = degree(change.low), degree(change.high)  # without an interval both the same
        if low != high:
            longer = "a longer text would tell (evaluate --general FILE)"
            return f"{low}, perhaps {high}, was forgotten; {longer}"
        sure = "" if change.known else ", but the text is too short to be sure"
        return f"{low} was forgotten{sure}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "source": self.source,
            "tokens": self.tokens,
            "metrics": [self.loss.to_dict(), self.perplexity.to_dict()],
            "kl_tuned_base": self.kl.to_dict(),
            "kl_base_tuned": self.kl_reverse.to_dict(),
            "sentence": self.sentence,
        }


def degree(rise: float) -> str:
    """`little`, `something` or `much`, for a relative rise of perplexity; see LITTLE and MUCH."""
    return "little" if rise < LITTLE else "something" if rise < MUCH else "much"


def read_texts(path: Path) -> list[str]:
    """A text file's paragraphs, evenly spaced ones of many; a ConfigError if it has none."""
    try:
        text = read_text(path, most=1 << 30)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--general: {path} cannot be read as text: {error}") from None
    paragraphs = [part.strip()[:MOST_CHARACTERS] for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise ConfigError(f"--general: {path} holds no text; name a file of plain text")
    step = -(-sum(map(len, paragraphs)) // MOST_CHARACTERS)
    return paragraphs[::step]


def forgetting(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    texts: list[str] | None = None,
    source: str = "the built-in texts",
    base: Lend | None = None,
) -> Forgetting:
    """Compare a model with its adapter, which is on and stays on, and without it, or with a `base`.

    `texts` are the six built-in ones if not given; messages call them `source`. A ConfigError if no
    adapter is on, or no text has two tokens.
    """
    if active(model) is None:
        raise ConfigError("the model has no adapter that is on: attach one, or switch to it")
    window = min(WINDOW, model.config.max_position_embeddings)
    rows = [
        ids[start : start + window]
        for ids in encode_texts(tokenizer, texts)
        # Windows share a token: the last of one is the first of the next, which it predicts from.
        for start in range(0, len(ids) - 1, window - 1)
    ]
    lend = base or partial(disabled, model)
    blocks = [_blocks(model, ids, lend) for ids in each(rows, "reading", "texts")]
    before, tuned, kl, kl_reverse, n = np.concatenate(blocks).T
    loss = paired_row("loss", LOWER, [before, tuned], n)
    divergences = ratio_interval(kl, n), ratio_interval(kl_reverse, n)
    return Forgetting(loss, perplexity_row(loss), *divergences, int(n.sum()), source)


def _blocks(model: LlamaForCausalLM, ids: list[int], lend: Lend) -> np.ndarray:
    """(blocks, 5) float64 of one text: sums of two losses and two divergences, and how many."""
    tokens, labels = mx.array([ids[:-1]]), np.array(ids[1:])
    with lend():
        hidden_base = model.model(tokens)[0]
        mx.eval(hidden_base)
    hidden_tuned = model.model(tokens)[0]
    mx.eval(hidden_tuned)
    figures = np.empty((len(labels), 5))
    with model.head.dense_for_now():
        hidden = [hidden_base, hidden_tuned]
        for part, (base, tuned) in log_probabilities(model, hidden, np.arange(len(labels))):
            at = np.arange(len(part)), labels[part]
            difference = base - tuned
            kl = -(np.exp(tuned) * difference).sum(axis=1)
            kl_reverse = (np.exp(base) * difference).sum(axis=1)
            figures[part] = np.stack([-base[at], -tuned[at], kl, kl_reverse, 0 * kl + 1], axis=1)
    return np.add.reduceat(figures, range(0, len(figures), BLOCK), axis=0)
