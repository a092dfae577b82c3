"""Base against adapter, on the same examples: what changed, and how sure that is.

The two models see the same rows, so their differences are taken example by example: what makes an
example hard for both cancels, and the interval of the difference is narrower than those of the two
figures. Loss, perplexity and token accuracy are weighted by tokens, answers count one each.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_qlora.adapters.several import active, disabled
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.fields import require
from mlx_qlora.infer import answers as on
from mlx_qlora.infer.answers import Question, Variety, variety
from mlx_qlora.infer.evaluate import ExampleScores, score_examples
from mlx_qlora.infer.figures import HIGHER, LOWER, NEITHER, Row, paired_row, perplexity_row
from mlx_qlora.model.llama import LlamaForCausalLM

ROWS, ASKED_AT_ONCE = 8, 32  # prompts in a batch; where one ends the next takes its place

# name -> which is better, and the function
ANSWER_METRICS: dict[str, tuple[str, Callable[[str, str], float]]] = {
    "exact_match": (HIGHER, on.exact_match),
    "rouge_l": (HIGHER, on.rouge_l),
    "chrf": (HIGHER, on.chrf),
    "relative_length": (NEITHER, on.relative_length),
    "length_agreement": (HIGHER, on.length_agreement),
    "structure_agreement": (HIGHER, on.structure_agreement),
    "style_similarity": (HIGHER, on.style_similarity),
    "excess_repetition": (LOWER, on.excess_repetition),
}


# ---- what a model does -------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One model on a set.

    Attributes:
        scores: of every example.
        answers: the model's own, to each question.
    """

    scores: ExampleScores
    answers: tuple[str, ...] = ()


def measure(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Examples,
    asked: list[Question],
    max_new_tokens: int = 512,
    console: Console | None = None,
) -> Measured:
    """Scores a model on all examples, and lets it answer some questions.

    Args:
        model: as it is, base or tuned.
        tokenizer: the one that made the examples.
        examples: from `read_examples`.
        asked: from `answers.questions`; may be empty.
        max_new_tokens: most tokens of an answer.
        console: where progress bars go if it is a terminal.
    """
    scores = score_examples(model, tokenizer, examples, console)
    return Measured(scores, tuple(_answers(model, tokenizer, asked, max_new_tokens, console)))


def _answers(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    asked: list[Question],
    max_new_tokens: int,
    console: Console | None,
) -> list[str]:
    """The likeliest answers: no luck in them, and no penalty that would hide a repetition."""
    if not asked:
        return []
    from mlx_qlora.infer.batch import generate_batch

    quiet = console is None or not console.is_terminal
    starts = range(0, len(asked), ASKED_AT_ONCE)
    made: list[str] = []
    for start in track(starts, "answers", console=console, disable=quiet):
        made += generate_batch(
            model,
            tokenizer,
            [question.prompt for question in asked[start : start + ASKED_AT_ONCE]],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            seed=0,
            batch_size=ROWS,
        )
    return made


def compare_adapter(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Examples,
    asked: list[Question],
    max_new_tokens: int = 512,
    console: Console | None = None,
    level: float = 0.95,
) -> tuple["Comparison", Measured, Measured]:
    """Measures a model with its adapter and without it.

    Args:
        model: with an adapter that is on; it leaves as it came.
        tokenizer: the one that made the examples.
        examples: from `read_examples`.
        asked: from `answers.questions`; may be empty.
        max_new_tokens: most tokens of an answer.
        console: where progress bars go if it is a terminal.
        level: of confidence, in (0, 1).

    Returns:
        The comparison, and what the base and the tuned model did.

    Raises:
        ConfigError: no adapter is on, or it is not one that can be turned off.
        DataError: no examples, or examples of another vocabulary.
    """
    require(0 < level < 1, "level", "be in (0, 1)", level)
    if active(model) is None:
        raise ConfigError("the model has no adapter that is on: attach one, or switch to it")
    with disabled(model):
        base = measure(model, tokenizer, examples, asked, max_new_tokens, console)
    tuned = measure(model, tokenizer, examples, asked, max_new_tokens, console)
    return compare(base, tuned, asked, level), base, tuned


# ---- the figures -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What an adapter changed on a set, or with `adapter` false what a base does on it.

    Attributes:
        rows: one for each metric.
        n_examples: that were scored.
        n_tokens: supervised tokens in them.
        n_answers: questions that were answered.
        variety: of the answers of `base` and `tuned`, and of the `reference`s.
        adapter: whether there are two models.
    """

    rows: tuple[Row, ...]
    n_examples: int
    n_tokens: int
    n_answers: int
    variety: dict[str, Variety]
    adapter: bool

    def __getitem__(self, metric: str) -> Row:
        """The line of a metric, by its name."""
        return next(row for row in self.rows if row.metric == metric)

    @property
    def sentences(self) -> list[str]:
        """One for each metric, and one about how many there are."""
        said = [row.sentence for row in self.rows]
        if self.adapter and len(said) > 1:
            said.append(
                f"{len(said)} metrics were looked at: where nothing changed at all, about one "
                "interval in twenty would still leave out 0"
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "n_examples": self.n_examples,
            "n_tokens": self.n_tokens,
            "n_answers": self.n_answers,
            "adapter": self.adapter,
            "metrics": [row.to_dict() for row in self.rows],
            "variety": {who: asdict(each) for who, each in self.variety.items()},
            "sentences": self.sentences,
        }

    def __rich__(self) -> Table:
        """The table that a terminal shows."""
        title = f"{self.n_examples:,} examples, {self.n_tokens:,} tokens, {self.n_answers} answers"
        heads = ["figure", "n"]
        if self.adapter:
            heads = ["base", "adapter", "change", "interval of it", "n"]
        table = Table("metric", *heads, title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(*row.cells())
        return table


def compare(
    base: Measured, tuned: Measured | None, asked: list[Question], level: float = 0.95
) -> Comparison:
    """The figures of two models on the same set, or of one.

    Raises:
        DataError: the models were not measured on the same rows and questions.
    """
    for each in (base, tuned or base):
        same = np.array_equal(each.scores.tokens, base.scores.tokens)
        if not same or len(each.answers) != len(asked):
            raise DataError("the two models were not measured on the same examples and questions")
    rows = _token_rows(base.scores, tuned.scores if tuned else None, level)
    texts = {"base": base.answers, "tuned": tuned.answers if tuned else ()}
    texts["reference"] = tuple(question.reference for question in asked)
    if asked:
        for name, (better, function) in ANSWER_METRICS.items():
            values = [_each(function, each.answers, asked) for each in (base, tuned) if each]
            rows.append(paired_row(name, better, values, None, level))
    return Comparison(
        tuple(rows),
        len(base.scores.tokens),
        int(base.scores.tokens.sum()),
        len(asked),
        {who: variety([*said]) for who, said in texts.items() if said},
        tuned is not None,
    )


def _token_rows(base: ExampleScores, tuned: ExampleScores | None, level: float) -> list[Row]:
    both = [each for each in (base, tuned) if each is not None]
    loss = paired_row("loss", LOWER, [each.nats for each in both], base.tokens, level)
    hits = [each.hits for each in both]
    return [
        loss,
        perplexity_row("perplexity", loss),
        paired_row("token_accuracy", HIGHER, hits, base.tokens, level),
    ]


def _each(
    function: Callable[[str, str], float], answers: tuple[str, ...], asked: list[Question]
) -> np.ndarray:
    """(n,) float64: a metric of each answer."""
    return np.array([function(said, each.reference) for said, each in zip(answers, asked)])
