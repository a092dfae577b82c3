"""`mlx-qlora evaluate`: what a model does on rows that it was not trained on, in figures.

Everything that can be wrong with the input is found before a weight is loaded.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_qlora import __version__
from mlx_qlora.adapters.peft import read_adapter_config
from mlx_qlora.adapters.several import active, disabled
from mlx_qlora.after import answer_metrics as on
from mlx_qlora.after.answer_metrics import (
    HIGHER,
    LOWER,
    NEITHER,
    Question,
    Row,
    Variety,
    check_installed,
    paired_row,
    perplexity_row,
    questions,
    variety,
)
from mlx_qlora.after.forgetting import Forgetting, forgetting, read_texts
from mlx_qlora.config import RunConfig, read_yaml
from mlx_qlora.data.examples import Examples, check_lengths
from mlx_qlora.data.files import find_files, user_path
from mlx_qlora.data.read import read_examples
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError, DataError, require, say, warn
from mlx_qlora.folders import staged
from mlx_qlora.infer.evaluate import ExampleScores, score_examples
from mlx_qlora.loading import as_taught, loaded, with_model
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.weights import open_checkpoint

# ---- with and without the adapter ----------------------------------------------------------------


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
    from mlx_qlora.infer.generate import generate_batch

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


# ---- the command ---------------------------------------------------------------------------------


ANSWERS = 32  # enough for an interval, few enough to wait for


@dataclass(frozen=True)
class Judgement:
    """What an evaluation found.

    Attributes:
        comparison: on the rows.
        forgetting: on general text; None if there is no adapter.
        samples: of each question: place, prompt, reference, base and, with an adapter, tuned.
        about: model, adapter, data, seed and how many rows of how many.
    """

    comparison: Comparison
    forgetting: Forgetting | None
    samples: tuple[dict[str, str], ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "mlx_qlora": __version__,
            **self.about,
            "comparison": self.comparison.to_dict(),
            "forgetting": self.forgetting.to_dict() if self.forgetting else None,
            "samples": list(self.samples),
        }


def evaluate_run(
    config: RunConfig,
    console: Console,
    data: str | None = None,
    limit: int | None = None,
    n_answers: int = ANSWERS,
    general_text: str | None = None,
    output: str | None = None,
) -> Judgement:
    """Scores a base, or an adapter against its base, on rows of a file.

    Args:
        config: its model and adapter, how data is read, the seed of the choice of rows, and
            `generation.max_new_tokens`. An adapter of ours brings its model and its template.
        console: where tables, and on a terminal progress bars, go.
        data: the rows, as `data.path` takes them, which stands for it if not given.
        limit: score so many rows, drawn by the seed; None scores all.
        n_answers: let the models answer so many questions, drawn too; 0 asks none.
        general_text: a text file for the check of what was forgotten; the built-in texts if not
            given. Needs an adapter.
        output: a JSON file for everything.

    Raises:
        UserError: any of its kinds, before a weight is loaded.
    """
    data = data if data is not None else config.data.path
    texts = _check(config, data, limit, n_answers, general_text, output)
    assert data is not None
    config = with_model(config)
    source = config.model.source
    assert source is not None
    checkpoint = open_checkpoint(resolve(source, config.model.revision))
    config, tokenizer = as_taught(
        config, load_tokenizer(checkpoint.files.path, checkpoint.metadata)
    )
    examples = read_examples(data, tokenizer, config.data, console=console)
    say(console, f"data      {examples.report}")
    check_lengths(LlamaConfig.from_hf(checkpoint.config), examples)
    _warn_of_training_rows(config, data, console)
    seed, n_rows = config.training.seed, len(examples)
    examples = _drawn(examples, limit, seed)
    if len(examples) < n_rows:
        say(console, f"rows      {len(examples):,} of {n_rows:,}, drawn with seed {seed}")
    asked = _asked(examples, tokenizer, n_answers, seed, console)

    model, _ = loaded(config)
    most = _longest_answer(config, asked)
    if config.model.adapter is None:
        base, tuned, lost = measure(model, tokenizer, examples, asked, most, console), None, None
        comparison = compare(base, None, asked)
    else:
        comparison, base, tuned = compare_adapter(model, tokenizer, examples, asked, most, console)
        name = "the built-in texts" if general_text is None else str(general_text)
        lost = forgetting(model, tokenizer, texts, name, console=console)
    about = {"model": str(source), "adapter": config.model.adapter, "data": str(data)}
    about |= {"seed": seed, "rows": n_rows, "rows_scored": len(examples), "max_new_tokens": most}
    judged = Judgement(comparison, lost, _samples(asked, base, tuned), about)
    _show(judged, console)
    if output is not None:
        _write(judged, Path(output).expanduser(), console)
    return judged


# ---- before anything is loaded -----------------------------------------------------------------
def _check(
    config: RunConfig,
    data: str | None,
    limit: int | None,
    n_answers: int,
    general_text: str | None,
    output: str | None,
) -> list[str] | None:
    """Refuses what cannot work; returns the paragraphs of the general text, if it is named."""
    if data is None:
        raise ConfigError("data.path is missing; name a file of rows with --data FILE")
    find_files(data)
    require(limit is None or limit >= 1, "--limit", "be at least 1", limit)
    require(n_answers >= 0, "n_answers", "be at least 0", n_answers)
    if config.model.adapter is not None:
        read_adapter_config(Path(config.model.adapter).expanduser())
    elif general_text is not None:
        raise ConfigError(
            "--general compares a model with its adapter and without it; name one with --adapter"
        )
    if output is not None:
        place = user_path(output, "--output")
        above = next(path for path in place.absolute().parents if path.exists())
        if place.is_dir() or not above.is_dir():
            raise ConfigError(f"--output: {place} cannot be a file there; name another")
    if n_answers:
        check_installed()
    return None if general_text is None else read_texts(user_path(general_text, "--general"))


def _warn_of_training_rows(config: RunConfig, data: str, console: Console) -> None:
    record = Path(config.model.adapter or "").expanduser() / "run.yaml"
    if config.model.adapter is None or not record.is_file():
        return
    trained = read_yaml(record).get("data", {}).get("path")
    if trained and Path(str(trained)).expanduser().absolute() == Path(data).expanduser().absolute():
        warn(
            console,
            f"the adapter was trained on rows of {data}: on those it is better than on new ones",
        )


def _drawn(examples: Examples, limit: int | None, seed: int) -> Examples:
    """So many of the examples, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng([seed, 0xE7A1]).choice(len(examples), limit, replace=False)
    drawn = Examples.of((examples[int(i)] for i in sorted(chosen)), examples.report.source)
    drawn.report.chat_template = examples.report.chat_template
    return drawn


def _asked(
    examples: Examples, tokenizer: Tokenizer, n_answers: int, seed: int, console: Console
) -> list[Question]:
    """So many of the questions, in their order."""
    if not n_answers:
        return []
    possible = questions(examples, tokenizer)
    left_out = len(examples) - len(possible)
    if left_out:
        say(
            console,
            f"answers   {left_out:,} of {len(examples):,} rows have nothing to ask before what is "
            "learned, or an answer that was cut: they are scored, not asked",
        )
    n = min(n_answers, len(possible))
    chosen = np.random.default_rng([seed, 0xA5C]).choice(len(possible), n, replace=False)
    if 0 < n < len(possible):
        say(console, f"answers   {n:,} questions of {len(possible):,}, drawn with seed {seed}")
    return [possible[int(i)] for i in sorted(chosen)]


# ---- results ------------------------------------------------------------------------
def _longest_answer(config: RunConfig, asked: list[Question]) -> int:
    """Twice the longest reference: an answer beyond that is wrong however it ends."""
    longest = max((question.tokens for question in asked), default=0)
    return min(config.generation.max_new_tokens, 2 * longest + 16)


def _samples(
    asked: list[Question], base: Measured, tuned: Measured | None
) -> tuple[dict[str, str], ...]:
    made = []
    for i, question in enumerate(asked):
        sample = {"place": question.place, "prompt": question.prompt}
        sample |= {"reference": question.reference, "base": base.answers[i]}
        made.append(sample | ({"tuned": tuned.answers[i]} if tuned else {}))
    return tuple(made)


def _show(judged: Judgement, console: Console) -> None:
    console.print(judged.comparison)
    for sentence in judged.comparison.sentences:
        say(console, sentence)
    for who, found in judged.comparison.variety.items():
        say(
            console,
            f"answers   {who}: {found.distinct:.0%} distinct, {found.same_opening:.0%} open with "
            f"{found.opening!r}, {found.repetition:.1%} repeated, {found.empty:.0%} empty",
        )
    if judged.forgetting is not None:
        console.print(judged.forgetting)
        say(console, judged.forgetting.sentence)


def _write(judged: Judgement, place: Path, console: Console) -> None:
    text = json.dumps(judged.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with staged(place.absolute().parent) as staging:
            (staging / place.name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {place} cannot be written: {error}") from None
    say(console, f"written   {place}")
