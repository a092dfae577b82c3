"""How near generated answers are to the references, and how two models differ in it.

A metric compares words, characters and form of two texts, prediction and reference; none knows
whether an answer is right. ROUGE-L and chrF are `rouge-score`'s and `sacrebleu`'s (both
Apache-2.0), which papers report and the extra `evaluate` brings.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_qlora.after.bootstrap import FEWEST, Interval, ratio_interval
from mlx_qlora.data.encode import encode_prompt
from mlx_qlora.data.examples import Example
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.infer.evaluate import MOST_NATS, perplexity

# ---- questions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a model is asked, and the answer in the data."""

    prompt: str  # all text before the last answer, as the model saw it in training
    reference: str  # the last answer, without the token that ends it
    tokens: int  # of the reference
    place: str  # file and line of the row


def questions(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Question]:
    """The examples that can be asked, in order; of a pair the chosen answer is the reference.

    Rows that are learned from their first token on have nothing to ask; rows whose answer was cut,
    and bad answers, are left out, too.
    """
    return [asked for example in examples if (asked := _question(example, tokenizer))]


def _question(example: Example, tokenizer: Tokenizer) -> Question | None:
    if example.weights is not None and example.weights.min() < 0:
        return None  # a bad answer
    tokens, is_learned, _ = example.documents[-1]
    learned = is_learned.tolist()
    end = len(learned) - learned[::-1].index(True)
    start = end - 1
    while start and learned[start - 1]:
        start -= 1
    context, answer = tokens[:start].tolist(), tokens[start:end].tolist()
    if answer[-1] not in tokenizer.eos_ids or context in ([], [tokenizer.bos_id]):
        return None
    answer = answer[: next(i for i, token in enumerate(answer) if token in tokenizer.eos_ids)]
    prompt = tokenizer.decode(context)
    bos = tokenizer.decode([context[0]]) if context[0] == tokenizer.bos_id else ""
    without_bos = prompt.removeprefix(bos)
    # `encode_prompt` adds a BOS; a text that begins with one is not always encoded as one.
    with_bos = encode_prompt(tokenizer, prompt)
    if with_bos != context and encode_prompt(tokenizer, without_bos) == context:
        prompt = without_bos
    return Question(prompt, tokenizer.decode(answer), len(answer), example.place)


# ---- words and characters ------------------------------------------------------------------------

WORD = re.compile(r"[^\W_]+")


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same but for runs of white space, else 0 (SQuAD's, case kept)."""
    return float(prediction.split() == reference.split())


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, "ROUGE"), 0 to 1, by rouge-score.

    Words are runs of letters and digits of any script, in lower case: on ASCII the same as
    rouge-score's own, which drops all other letters. A script without spaces makes one word of a
    sentence; there chrF says more. Two texts without a word are alike: 1.
    """
    if not WORD.search(prediction) and not WORD.search(reference):
        return 1.0
    rouge, _ = scorers()
    return float(rouge.score(reference, prediction)["rougeL"].fmeasure)


def chrf(prediction: str, reference: str) -> float:
    """Character n-gram F2, n = 1 to 6 (Popović 2015, W15-3049), 0 to 1; 1 of two empty texts."""
    if not prediction.split() and not reference.split():
        return 1.0
    _, chrf_scorer = scorers()
    return chrf_scorer.sentence_score(prediction, [reference]).score / 100


def has_scorers() -> bool:
    """Whether what ROUGE-L and chrF need is installed."""
    with suppress(ConfigError):
        return bool(scorers())
    return False


@functools.cache
def scorers() -> tuple[Any, Any]:
    """rouge-score's scorer and sacrebleu's; a ConfigError if one is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ConfigError(
            f"ROUGE-L and chrF need rouge-score and sacrebleu ({error}); run: "
            "pip install 'mlx-qlora[evaluate]'"
        ) from None
    words = SimpleNamespace(tokenize=lambda text: WORD.findall(text.lower()))
    return RougeScorer(["rougeL"], tokenizer=words), CHRF()


# ---- form ----------------------------------------------------------------------------------------


def relative_length(prediction: str, reference: str) -> float:
    """Characters of the prediction over the reference's, white space at the ends not counted."""
    return len(prediction.strip()) / max(len(reference.strip()), 1)


def style_similarity(prediction: str, reference: str) -> float:
    """Cosine of the counts of character 3-grams, 0 to 1 (Damashek 1995, Science 267:843).

    Case counts, runs of white space are one space. Two texts without characters give 1, one gives
    0.
    """
    ours, theirs = _grams(prediction), _grams(reference)
    if not ours or not theirs:
        return float(not ours and not theirs)
    dot = sum(n * theirs[gram] for gram, n in ours.items())
    squares = [sum(n * n for n in counts.values()) for counts in (ours, theirs)]
    return min(dot / math.sqrt(squares[0] * squares[1]), 1.0)


def _grams(text: str) -> Counter[str]:
    text = " ".join(text.split())
    padded = f" {text} " if text else ""
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))


REPEATED_GRAM = 4  # words


def repetition(text: str, n: int = REPEATED_GRAM) -> float:
    """The share of a text's word n-grams that occurred in it before, 0 to 1.

    Seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319); a text of fewer words repeats nothing.
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def excess_repetition(prediction: str, reference: str) -> float:
    """`repetition` less the reference's, -1 to 1: that belongs to the task, as in a table."""
    return repetition(prediction) - repetition(reference)


# ---- one metric of two models --------------------------------------------------------------------

LOWER, HIGHER, NEITHER = "lower", "higher", "neither"
# What a person reads for a metric.
WORDS = {
    "loss": "loss per token",
    "token_accuracy": "tokens guessed right",
    "prefers_chosen": "chosen answer likelier",
    "margin": "margin of the chosen",
    "reward_accuracy": "reward of chosen higher",
    "kl": "KL from the base",
    "exact_match": "answers word for word",
    "rouge_l": "same words (ROUGE-L)",
    "chrf": "same letters (chrF)",
    "relative_length": "length (1: as long)",
    "style_similarity": "like in style",
    "excess_repetition": "repeats itself more",
}


@dataclass(frozen=True)
class Row:
    """One metric of two models, or of a base alone."""

    metric: str
    better: str  # LOWER, HIGHER or NEITHER
    base: Interval
    tuned: Interval | None = None
    change: Interval | None = None  # tuned minus base, paired by example
    relative: bool = False  # of perplexity: `change` is tuned over base minus 1

    @property
    def name(self) -> str:
        """The metric, as a person reads it."""
        return WORDS.get(self.metric, self.metric)

    @property
    def verdict(self) -> str:
        """Whether the change is a good one, or within chance."""
        if self.change is None:
            return ""
        if not self.change.known:
            same = "no difference" if self.change.estimate == 0 else "alike in all"
            return "too few rows" if self.change.n < FEWEST else same
        if self.change.includes_zero:
            return "no change shown"
        if self.better == NEITHER:
            return "rose" if self.change.estimate > 0 else "fell"
        return "better" if (self.change.estimate < 0) == (self.better == LOWER) else "worse"

    def cells(self) -> list[str]:
        """As a line of the table."""
        if self.tuned is None or self.change is None:
            return [self.name, f"{self.base.estimate:.4g}", _ends(self.base, ".4g")]
        ends = _ends(self.change, "+.3g", self.relative)
        figures = f"{self.base.estimate:.4g}", f"{self.tuned.estimate:.4g}"
        return [self.name, *figures, ends, self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        intervals = {"base": self.base, "tuned": self.tuned, "change": self.change}
        intervals = {name: each and each.to_dict() for name, each in intervals.items()}
        return asdict(self) | intervals | {"verdict": self.verdict}


def _ends(interval: Interval, form: str, percent: bool = False) -> str:
    scale, unit = (100, " %") if percent else (1, "")
    ends = (round(scale * value, 12) for value in (interval.low, interval.high))  # -1e-17 is 0
    low, high = (f"{value:{form}}" for value in ends)
    return f"{low} to {high}{unit}" if interval.known else ""


def paired_row(
    metric: str, better: str, values: list[np.ndarray], weights: np.ndarray | None = None
) -> Row:
    """The row of a metric, from sums over each example: (n,) of the base, and of the tuned model.

    `weights` (n,) are the tokens of each example; None counts examples alike.
    """
    changes = [tuned - values[0] for tuned in values[1:]]
    intervals: Any = [ratio_interval(each, weights) for each in (*values, *changes)]
    return Row(metric, better, *intervals)


def perplexity_row(loss: Row) -> Row:
    """The perplexities of a row of losses; exp keeps the order, so intervals keep their ends."""
    tuned = loss.tuned.mapped(perplexity) if loss.tuned else None
    rise = loss.change and loss.change.mapped(lambda nats: math.expm1(min(nats, MOST_NATS)))
    return Row("perplexity", LOWER, loss.base.mapped(perplexity), tuned, rise, relative=True)
