"""What would be trained, without training it: `inspect`, and `train --dry-run`."""

import dataclasses
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from mlx_qlora.before.plan import Plan
from mlx_qlora.config import RunConfig
from mlx_qlora.data.batches import IGNORE, Batch, Batches
from mlx_qlora.data.examples import DataReport
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.distributed import processes
from mlx_qlora.errors import duration, say, warn
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.run import Inputs, open_inputs
from mlx_qlora.train.config import RunLength, batches_of
from mlx_qlora.train.score import score

# ---- views of the rows ---------------------------------------------------------------------------

BAR = 40  # characters of the longest bar
SUPERVISED, CONTEXT, PADDING, NOTE = "bold green", "default", "dim red", "dim cyan"
# Signs that a terminal would swallow or turn into spaces are shown as their Unicode pictures.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) != "\n"} | {127: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # some terminals act on these, too


def histogram(report: DataReport) -> str:
    """One line for each step of length, with a bar for how many rows have it."""
    most = max((n for _, _, n in report.histogram), default=1)
    shown = [(f"{low:,}-{high:,}", n) for low, high, n in report.histogram]
    wide = max((len(span) for span, _ in shown), default=0)
    return "\n".join(
        f"{span:>{wide}} {'█' * round(BAR * n / most) or '▏' * bool(n):<{BAR}} {n:>7,}"
        for span, n in shown
    )


def epoch(batches: Batches) -> str:
    """What one pass over the data is."""
    tokens = int((batches.examples.lengths - 1).sum())
    n = len(batches.examples)
    return f"{tokens:,} tokens in {n:,} examples, {batches.batch_size} to a batch"


def rows(batches: Batches, tokenizer: Tokenizer, count: int, colour: bool) -> RenderableType:
    """The first rows of the first batches, token by token as they are trained.

    Without `colour`, ⟦ ⟧ are around what is supervised.
    """
    shown: list[Text] = []
    for number, batch in enumerate(batches):
        for b in range(batch.tokens.shape[0]):
            if len(shown) == count:
                return Group(*shown)
            title = f"batch {number + 1}, row {b + 1}"
            shown.append(_row(batch, b, tokenizer, title, colour))
    return Group(*shown)


def _row(batch: Batch, b: int, tokenizer: Tokenizer, title: str, colour: bool) -> Text:
    assert batch.documents is not None
    tokens, labels = np.array(batch.tokens[b]), np.array(batch.labels[b])
    text = Text()
    documents = [(d, p) for d, p in zip(batch.documents.tolist(), batch.places) if d[0] == b]
    used = sum(end - start for (_, start, end), _ in documents)
    text.append(f"{title}: {used} of {len(tokens)} positions used\n", NOTE)
    for (_, start, end), place in documents:
        inside = labels[start:end]
        n_learned = int((inside != IGNORE).sum())
        text.append(f"{place}: {end - start + 1} tokens, {n_learned} supervised\n", NOTE)
        # A label is the token to predict next: the document's own tokens are its first token,
        # and behind each position either that label or, where none is learned, the next input.
        following = np.append(tokens[start + 1 : end], IGNORE)
        ids = [int(tokens[start]), *np.where(inside != IGNORE, inside, following).tolist()]
        learned = [False, *(inside != IGNORE).tolist()]
        if ids[-1] == IGNORE:  # not learned, and no input: the batch does not hold it
            ids, learned = ids[:-1], learned[:-1]
        # Neighbours that are both learned, or both not, together: a character may span tokens.
        pairs = zip(learned, ids)
        for is_learned, run in groupby(pairs, key=lambda pair: pair[0]):
            words = tokenizer.decode([token for _, token in run]).translate(PICTURES)
            marked = words if colour or not is_learned else f"⟦{words}⟧"
            text.append(marked, SUPERVISED if is_learned else CONTEXT)
        text.append("\n")
    if used < len(tokens):
        text.append(f"{len(tokens) - used} x padding\n", PADDING)
    return text


# ---- the commands --------------------------------------------------------------------------------


def inspect_data(config: RunConfig, console: Console, show: int = 0) -> dict[str, Any]:
    """Read the data of a run and print the report, the split, the lengths and the batches.

    Then `show` rows as the model will see them. No weight is loaded.

    Returns:
        Reports with every refusal, the split and the epoch, as JSON has it.
    """
    inputs = open_inputs(config, console, writes=False, weights=False)
    batches = batches_of(inputs.train, inputs.config.data, inputs.config.training)
    for report in inputs.reports:
        source = f" of {report.source}" if len(inputs.reports) > 1 else ""
        say(console, f"lengths{source}\n{histogram(report)}")
    say(console, f"epoch     {epoch(batches)}")
    if show:
        console.print()
        print_rows(batches, inputs.tokenizer, show, console)
    return {
        "sources": [
            {**dataclasses.asdict(report), "read": report.read, "kept": report.kept}
            for report in inputs.reports
        ],
        "rows": inputs.sizes,
        "tokens_per_epoch": int((inputs.train.lengths - 1).sum()),
    }


def print_rows(batches: Batches, tokenizer: Tokenizer, count: int, console: Console) -> None:
    """Print the first rows, with colour where there is some."""
    colour = console.color_system is not None and not console.no_color
    console.print(rows(batches, tokenizer, count, colour), soft_wrap=True)


def dry_run(inputs: Inputs, plan: Plan, console: Console) -> dict[str, Any]:
    """Do all that a run does before its first step, and score its first batch.

    Nothing is written but the cache of tokens.
    """
    model = inputs.load()
    inputs = inputs.prepare(model).to_resume(console)
    batches = batches_of(inputs.train, inputs.config.data, inputs.config.training)
    first = next(iter(batches))
    total = score(model, [first])
    figures = {
        "examples": len(first.places),
        "tokens": first.real_tokens,
        "supervised_tokens": total.tokens,
        "loss": total.nats / total.tokens,
    }
    print_rows(batches, inputs.tokenizer, 1, console)
    say(
        console,
        "first     {examples} examples, {tokens:,} tokens, {supervised_tokens:,} of them to learn; "
        "the model's loss on them is {loss:.4f}".format(**figures),
    )
    training = inputs.config.training
    length = RunLength.of(training, batches, len(inputs.train))
    tokens = length.passes * float((inputs.train.lengths - 1).sum())
    seconds = tokens / plan.tokens_per_second
    say(console, f"length    {length}, about {duration(seconds)} at the planned speed")
    for warning in length.warnings:
        warn(console, warning)
    resumed = None if inputs.resumed is None else str(inputs.resumed)
    onward = "" if resumed is None else f", going on from {resumed}"
    say(
        console,
        f"dry run   {trainable_count(model):,} parameters would be trained for {length.steps:,} "
        f"steps{onward}; nothing was trained, and nothing but the token cache was written",
    )
    return {
        "plan": plan.to_dict(),
        "rows": inputs.sizes,
        "first_batch": figures,
        "steps": length.steps,
        "passes": length.passes,
        "warmup_steps": length.warmup_steps,
        "examples_per_step": training.rows * training.accumulation * processes().size,
        "eta_seconds": seconds,
        "warnings": length.warnings,
        "resume_from_checkpoint": resumed,
    }
