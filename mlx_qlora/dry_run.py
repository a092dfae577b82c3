"""`mlx-qlora train --dry-run`: all that a run does before its first step."""

import dataclasses
from typing import Any

from rich.console import Console

from mlx_qlora.config import RunConfig
from mlx_qlora.console import say, warn
from mlx_qlora.data import view
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.opening import open_run
from mlx_qlora.preparation import prepare
from mlx_qlora.train.config import batches_of
from mlx_qlora.train.course import course_of
from mlx_qlora.train.score import score


def dry_run(config: RunConfig, console: Console) -> dict[str, Any]:
    """All that `run` does before its first step, and the first batch; only tokens are cached.

    Returns:
        The plan, how many rows there are, the first batch's figures, and where a run would go
        on from.

    Raises:
        UserError: any of its kinds.
    """
    unrefused = dataclasses.replace(config.data, refused_path=None)  # which is the run's to write
    opened = open_run(dataclasses.replace(config, data=unrefused), console)
    model = opened.load()
    prepared = prepare(model, opened.train, opened.validation, opened.config)
    config = prepared.config
    for damage in prepared.damaged:
        warn(console, f"{damage}: the checkpoint before it is used")
    batches = batches_of(opened.train, config.data, config.training)
    first = next(iter(batches))
    found = score(model, [first])
    figures = {
        "rows": first.tokens.shape[0],
        "positions": first.tokens.shape[1],
        "documents": len(first.places),
        "supervised_tokens": found.tokens,
        "loss": found.nats / found.tokens,
    }
    colour = console.color_system is not None and not console.no_color
    console.print(view.rows(batches, opened.tokenizer, 1, colour), soft_wrap=True)
    say(
        console,
        "batch     {rows} rows of {positions:,} positions, {documents} documents, "
        "{supervised_tokens:,} tokens to learn; the model's loss on them is {loss:.4f}".format(
            **figures
        ),
    )
    course = course_of(config.training, batches, len(opened.train))
    seconds = (
        course.passes * float((opened.train.lengths - 1).sum()) / opened.plan.tokens_per_second
    )
    say(console, f"course    {course}, about {seconds / 60:,.0f} min at the planned speed")
    for warning in course.warnings:
        warn(console, warning)
    resumed = None if prepared.resumed is None else str(prepared.resumed)
    onward = "" if resumed is None else f", going on from {resumed}"
    say(
        console,
        f"dry run   {trainable_count(model):,} parameters would be trained for {course.steps:,} "
        f"steps{onward}; nothing was trained, and nothing but the token cache was written",
    )
    about = {"plan": opened.plan.to_dict(), "rows": opened.sizes, "first_batch": figures}
    return {
        **about,
        "steps": course.steps,
        "passes": course.passes,
        "warnings": course.warnings,
        "resume_from_checkpoint": resumed,
    }
