"""`mlx-qlora evaluate`: a base, or an adapter against its base, on rows that were held out."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_qlora import __version__
from mlx_qlora.adapters.options import read_adapter_config
from mlx_qlora.adapters.several import disabled
from mlx_qlora.after import answer_metrics as metrics
from mlx_qlora.after.answer_metrics import HIGHER, LOWER, NEITHER, Question, Row, paired_row
from mlx_qlora.after.forgetting import forgetting, read_texts
from mlx_qlora.config import RunConfig
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.files import find_files
from mlx_qlora.data.preferences import PAIRS
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, DataError, UserError, require, say, warn
from mlx_qlora.folders import check_name, user_path, write_whole
from mlx_qlora.infer.evaluate import score_examples
from mlx_qlora.infer.generate import generate_batch
from mlx_qlora.loading import of_its_run, parts_of_run, recorded, with_model
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.run import open_inputs
from mlx_qlora.train.preferences import AVERAGED, good_answers
from mlx_qlora.train.score import Lend, RowScores

ANSWERS = 32  # questions: enough for an interval, few enough to wait for
# name -> which is better, and the function
ANSWER_METRICS: dict[str, tuple[str, Callable[[str, str], float]]] = {
    "exact_match": (HIGHER, metrics.exact_match),
    "rouge_l": (HIGHER, metrics.rouge_l),
    "chrf": (HIGHER, metrics.chrf),
    "relative_length": (NEITHER, metrics.relative_length),
    "style_similarity": (HIGHER, metrics.style_similarity),
    "excess_repetition": (LOWER, metrics.excess_repetition),
}

# ---- the command ---------------------------------------------------------------------------------


def evaluate_run(
    config: RunConfig,
    console: Console,
    limit: int | None = None,
    n_answers: int = ANSWERS,
    general_text: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Score a base, or an adapter against its base, on rows of a file.

    `limit` rows of them and `n_answers` questions are drawn by the config's seed. An adapter of
    ours brings its model and its template, the rows that its run held out where none are named, and
    is tried on general text, the built-in one if none is named. Returns everything found, as JSON
    has it; `output` is a file for it.
    """
    seed, is_own = config.training.seed, config.data.path is None
    config = of_its_run(with_model(config)) if is_own else config
    find_files(config.data.path)
    data = str(config.data.path)
    texts = _check_arguments(config, limit, n_answers, general_text, output)
    of_rows = Console(quiet=True) if is_own else console  # of which some are scored
    inputs = open_inputs(config, of_rows, writes=False, split=False)
    config, tokenizer, examples = inputs.config, inputs.tokenizer, inputs.train
    trained, validation, test = _parts(config, tokenizer, is_own)
    if is_own:
        if (held_out := test or validation) is None:
            raise DataError(f"the run held out no row of {data}; name others with --data FILE")
        examples, name = held_out, "test" if test else "validation"
        say(console, f"rows      {len(examples):,} {name} rows, on which its run did not train")
    elif copies := trained and np.isin(examples.contents, trained.contents).sum():
        share = f"{copies:,} of these {len(examples):,} rows"
        warn(console, f"the adapter was trained on {share}: it is better on them than on new ones")
    elif trained is None and _is_path_of_run(config):
        warn(console, f"the adapter was trained on rows of {data}: it is better on them")
    elif trained is None and config.model.adapter is not None:
        text = "which rows the adapter was trained on is not known here; it is better on those"
        say(console, f"rows      {text}")
    objective, n_rows = config.training.objective, len(examples)
    drawn = _drawn_examples(examples, limit, seed, console)
    rejected = good_answers(drawn, 0) if drawn.report.kind == PAIRS else None
    if (examples := good_answers(drawn)) is None:
        raise DataError(f"{data}: no answer is labelled true, so there is none to score")
    if rejected is not None:
        unit = "nats per token" if objective in AVERAGED else "nats"
        say(console, f"pairs     chosen answers are scored; their margin over the others in {unit}")
    elif len(examples) < len(drawn):
        say(console, f"answers   {len(examples):,} of {len(drawn):,} are labelled true and scored")
    asked = _drawn_questions(examples, tokenizer, n_answers, seed, console)
    if asked and not metrics.has_scorers():
        say(console, "answers   without ROUGE-L and chrF; run: pip install 'mlx-qlora[evaluate]'")
    # Twice the longest reference: an answer beyond that is wrong however it ends.
    longest = max((question.tokens for question in asked), default=0)
    max_new_tokens = min(config.generation.max_new_tokens, 2 * longest + 16)

    model = inputs.load()
    tuned = general = None
    with disabled(model):  # the adapter, if there is one
        base = measure(model, tokenizer, examples, asked, max_new_tokens, rejected=rejected)
    if config.model.adapter is not None:
        both: Any = {"base": partial(disabled, model), "rejected": rejected}
        tuned = measure(model, tokenizer, examples, asked, max_new_tokens, **both)
    comparison = compare(base, tuned, asked, objective)
    console.print(comparison)
    if tuned is not None:
        general = forgetting(model, tokenizer, texts, general_text or "the built-in texts")
        say(console, f"verdict   {comparison.sentence}")
        say(console, f"general   {general.sentence}")
    names = "place", "prompt", "reference"
    samples = [{name: getattr(question, name) for name in names} for question in asked]
    for key, model_of in {"base": base, "tuned": tuned}.items():
        for sample, answer in zip(samples, model_of.answers if model_of else ()):
            sample[key] = answer
    evaluation = {
        "mlx_qlora": __version__,
        "model": str(config.model.source),
        "adapter": config.model.adapter,
        "data": data,
        "seed": seed,
        "rows": n_rows,
        "rows_scored": len(examples),
        "objective": objective,
        "max_new_tokens": max_new_tokens,
        "comparison": comparison.to_dict(),
        "forgetting": general and general.to_dict(),
        "samples": samples,
    }
    if output is not None:
        file = user_path(output)
        record = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
        try:
            write_whole(file.absolute(), record + "\n")
        except OSError as error:
            raise ConfigError(f"--output: {file} cannot be written: {error}") from None
        say(console, f"written   {file}")
    return evaluation


def _is_path_of_run(config: RunConfig) -> bool:
    """Whether `data.path` is that of the adapter's run."""
    record = recorded(config.model.adapter, "data") if config.model.adapter else {}
    path, theirs = config.data.path, record.get("data", {}).get("path")
    return bool(theirs) and user_path(str(theirs)).absolute() == user_path(path).absolute()


def _parts(
    config: RunConfig, tokenizer: Tokenizer, is_own: bool
) -> tuple[Examples | None, Examples | None, Examples | None]:
    """What the adapter's run trained, validated and tested on, if that is where it was."""
    if is_own:
        return parts_of_run(config, tokenizer)
    with suppress(UserError):
        run = of_its_run(RunConfig(model=config.model))
        kinds = {file.kind for files in find_files(run.data.path).values() for file in files}
        if "hub" not in kinds:
            return parts_of_run(run, tokenizer)
    return None, None, None


def _check_arguments(
    config: RunConfig,
    limit: int | None,
    n_answers: int,
    general_text: str | None,
    output: str | None,
) -> list[str] | None:
    """Refuses what cannot work; returns the paragraphs of the general text, if it is named."""
    require(limit is None or limit >= 1, "--limit", "be at least 1", limit)
    require(n_answers >= 0, "n_answers", "be at least 0", n_answers)
    if config.model.adapter is not None:
        read_adapter_config(user_path(config.model.adapter))
    elif general_text is not None:
        raise ConfigError(
            "--general compares a model with its adapter and without it; name one with --adapter"
        )
    if output is not None:
        file = user_path(output, "--output")
        check_name(file, "--output")
        above = next(path for path in file.absolute().parents if path.exists())
        if file.is_dir() or not above.is_dir():
            raise ConfigError(f"--output: {file} cannot be a file; name another")
    return None if general_text is None else read_texts(user_path(general_text, "--general"))


def _drawn_examples(examples: Examples, limit: int | None, seed: int, console: Console) -> Examples:
    """`limit` of the examples, drawn by the seed, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng([seed, 0xE7A1]).choice(len(examples), limit, replace=False)
    say(console, f"rows      {limit:,} of {len(examples):,}, drawn with seed {seed}")
    return examples[np.sort(chosen)]


def _drawn_questions(
    examples: Examples, tokenizer: Tokenizer, n_answers: int, seed: int, console: Console
) -> list[Question]:
    """`n_answers` of the questions, drawn by the seed, in their order."""
    if not n_answers:
        return []
    possible = metrics.questions(examples, tokenizer)
    if left_out := len(examples) - len(possible):
        say(
            console,
            f"answers   {left_out:,} of {len(examples):,} rows have no prompt, or an answer that "
            "was cut; they are scored, but not asked",
        )
    n = min(n_answers, len(possible))
    chosen = np.random.default_rng([seed, 0xA5C]).choice(len(possible), n, replace=False)
    if 0 < n < len(possible):
        say(console, f"answers   {n:,} questions of {len(possible):,}, drawn with seed {seed}")
    return [possible[int(i)] for i in sorted(chosen)]


# ---- one model, and two -----------------------------------------------------------------------


@dataclass(frozen=True)
class Performance:
    """What one model did: its score on every example, and its answer to every question."""

    scores: RowScores
    answers: tuple[str, ...] = ()
    rejected: RowScores | None = None  # scores of the other answer of each pair


def measure(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Examples,
    asked: list[Question],
    max_new_tokens: int = 512,
    base: Lend | None = None,
    rejected: Examples | None = None,
) -> Performance:
    """Score a model on all examples, and let it answer questions, if there are any.

    Answers are the likeliest ones: no luck in them, and no penalty that would hide a repetition. Of
    several processes each scores its share. The scores have the divergence from a `base`;
    `rejected` are the other answers of pairs.
    """
    scores = score_examples(model, tokenizer, examples, base)
    others = score_examples(model, tokenizer, rejected) if rejected else None
    if not asked:
        return Performance(scores, (), others)
    prompts = [question.prompt for question in asked]
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 0}
    settings: Any = {"max_new_tokens": max_new_tokens, **greedy}
    answers = generate_batch(model, tokenizer, prompts, **settings)
    return Performance(scores, tuple(answers), others)


@dataclass(frozen=True)
class Comparison:
    """What an adapter changed on a set."""

    rows: tuple[Row, ...]  # one for each metric
    n_examples: int
    n_tokens: int  # supervised ones
    n_answers: int
    adapter: bool  # False: what a base does on the set

    def __getitem__(self, metric: str) -> Row:
        """The row of a metric, by its name."""
        return next(row for row in self.rows if row.metric == metric)

    @property
    def sentence(self) -> str:
        """Whether the adapter is better on these rows, by their loss."""
        loss = self["loss"]
        assert loss.tuned is not None
        before, after = loss.base.estimate, loss.tuned.estimate
        share = f"{abs(after / before - 1):.1%} " if before > 0 else ""
        figure = f"its loss is {share}{'higher' if after > before else 'lower'}"
        figure = "its loss is the same" if after == before else figure
        if loss.verdict in ("better", "worse"):
            return f"on these rows the adapter is {loss.verdict} than its base: {figure}"
        return f"no difference shown on these {self.n_examples:,} rows: {figure}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        counts = {name: value for name, value in vars(self).items() if name != "rows"}
        return counts | {"metrics": [row.to_dict() for row in self.rows]}

    def __rich__(self) -> Table:
        """The table that a terminal shows; 80 columns hold it."""
        title = f"{self.n_examples:,} examples, {self.n_tokens:,} tokens, {self.n_answers} answers"
        heads = ["adapter", "change, 95 % sure", ""] if self.adapter else ["95 % sure"]
        first = "base" if self.adapter else "model"
        table = Table("", first, *heads, title=title, title_justify="left", box=None)
        for row in self.rows:
            table.add_row(*row.cells())
        return table


def compare(
    base: Performance, tuned: Performance | None, asked: list[Question], objective: str = "sft"
) -> Comparison:
    """The figures of two models on the same rows and questions, or of one.

    Of pairs the margin is the log-probability of the chosen answer above the other's, per token if
    the `objective` compares so; for dpo the chosen reward is higher where the margin has risen.
    """
    models = [base] if tuned is None else [base, tuned]
    tokens = base.scores.tokens
    loss = paired_row("loss", LOWER, [each.scores.nats for each in models], tokens)
    hits = [each.scores.hits for each in models]
    rows = [loss, metrics.perplexity_row(loss)]
    rows.append(paired_row("token_accuracy", HIGHER, hits, tokens))
    pairs = [(each.rejected, each.scores) for each in models if each.rejected]
    if pairs:
        each = ([x.nats / (x.tokens if objective in AVERAGED else 1) for x in p] for p in pairs)
        margins = [rejected - chosen for rejected, chosen in each]
        rows.append(paired_row("prefers_chosen", HIGHER, [1.0 * (each > 0) for each in margins]))
        rows.append(paired_row("margin", HIGHER, margins))
        if objective == "dpo" and tuned is not None:
            rises = [1.0 * (each > margins[0]) for each in margins]
            rows.append(paired_row("reward_accuracy", HIGHER, rises))
    if tuned is not None:
        rows.append(kl_row(tuned.scores))
    references = [question.reference for question in asked]
    if asked:
        missing = () if metrics.has_scorers() else ("rouge_l", "chrf")
        for name in (name for name in ANSWER_METRICS if name not in missing):
            better, metric = ANSWER_METRICS[name]
            values = [np.array([*map(metric, each.answers, references)]) for each in models]
            rows.append(paired_row(name, better, values))
    return Comparison(tuple(rows), len(tokens), int(tokens.sum()), len(asked), tuned is not None)


def kl_row(scores: RowScores) -> Row:
    """KL(tuned || base) of rows' answers, nats per token; that of the base is 0."""
    return paired_row("kl", NEITHER, [0 * scores.kl, scores.kl], scores.tokens)
