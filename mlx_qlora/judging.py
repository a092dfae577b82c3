"""`mlx-qlora evaluate`: what a model does on rows that it was not trained on, in figures.

Everything that can be wrong with the input is found before a weight is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mlx_qlora._version import __version__
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.load import read_adapter_config
from mlx_qlora.config import RunConfig, read_yaml
from mlx_qlora.console import say, warn
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.files import find_files, user_path
from mlx_qlora.data.read import read_examples
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.delivery import as_taught, loaded, with_model
from mlx_qlora.errors import ConfigError
from mlx_qlora.fields import require
from mlx_qlora.infer.answers import Question, check_installed, questions
from mlx_qlora.infer.compare import Comparison, Measured, compare, compare_adapter, measure
from mlx_qlora.infer.forgetting import Forgetting, forgetting, read_texts
from mlx_qlora.inspection import check_lengths
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.weights import open_checkpoint

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
