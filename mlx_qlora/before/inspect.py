"""What would be trained, without training it: `inspect`, and `train --dry-run`."""

import dataclasses
import io
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mlx_qlora.before.plan import Plan
from mlx_qlora.config import RunConfig
from mlx_qlora.data.batches import IGNORE, Batches
from mlx_qlora.data.examples import DataReport
from mlx_qlora.data.preferences import JUDGEMENTS, PAIRS
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.distributed import processes
from mlx_qlora.errors import ConfigError, duration, say, visible, warn
from mlx_qlora.folders import user_path, write_whole
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.readers import card_text
from mlx_qlora.run import Inputs, open_inputs
from mlx_qlora.train.config import RunLength, batches_of
from mlx_qlora.train.score import score

# ---- views of the rows ---------------------------------------------------------------------------

BAR = 40  # characters of the longest bar
EXAMPLES_OF_A_DRY_RUN, EXAMPLES_OF_A_PAGE = 2, 50
SUPERVISED, CONTEXT, NOTE = "bold green", "default", "cyan"
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


def print_rows(batches: Batches, tokenizer: Tokenizer, count: int, console: Console) -> None:
    """Print the first examples of the first batches, token by token as they are trained.

    Without colour, ⟦ ⟧ are around what is supervised. Of a pair the chosen answer comes first.
    """
    kind = batches.examples.report.kind
    colour = console.color_system is not None and not console.no_color
    each = ((batch, b) for batch in batches for b in range(len(batch.rows)))
    for batch, b in islice(each, count):
        tokens: Any = np.array(batch.tokens)
        labels: Any = np.array(batch.labels)
        documents = [*zip(batch.places, batch.documents.tolist())]
        of_row = [i for i, (_, (row, _, _)) in enumerate(documents) if row == b]
        for i in range(len(documents)):
            place, (row, start, end) = documents[i ^ 1 if kind == PAIRS else i]
            if row == b:  # a row of several answers may be several documents
                if len(of_row) > 1 and kind not in (PAIRS, JUDGEMENTS):
                    place += f", answer {of_row.index(i) + 1} of {len(of_row)}"
                here = b, slice(start, end)
                weights = np.ones(1) if batch.weights is None else batch.weights[here]
                weights = weights[weights != 0].tolist()
                if kind == PAIRS:
                    place += " rejected" if i % 2 else " chosen"
                elif kind == JUDGEMENTS:
                    place += f" labelled {'false' if weights[0] < 0 else 'true'}"
                weighs = sorted({*map(abs, weights)})
                place += f", weight {', '.join(map('{:g}'.format, weighs))}" * (weighs != [1])
                of_document = tokens[here], labels[here]
                console.print(_text_of(place, *of_document, tokenizer, colour), soft_wrap=True)


def _text_of(
    place: str, tokens: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, colour: bool
) -> Text:
    end = len(tokens)
    # A label is the token to predict next: the example's own tokens are its first token, and behind
    # each position either that label or, where none is learned, the next input.
    learned = [False, *(labels != IGNORE).tolist()]
    following = np.append(tokens[1:], IGNORE)
    ids = [int(tokens[0]), *np.where(labels != IGNORE, labels, following).tolist()]
    text = Text()
    text.append(f"{visible(place)}: {end + 1} tokens, {sum(learned)} supervised\n", NOTE)
    # Neighbours that are both learned, or both not, together: a character may span tokens. What is
    # not learned at the end is no input, and the batch does not hold it.
    pairs = [(is_learned, token) for is_learned, token in zip(learned, ids) if token != IGNORE]
    for is_learned, run in groupby(pairs, key=lambda pair: pair[0]):
        words = tokenizer.decode([token for _, token in run]).translate(PICTURES)
        words = visible(words)
        marked = words if colour or not is_learned else f"⟦{words}⟧"
        text.append(marked, SUPERVISED if is_learned else CONTEXT)
    return text.append("\n")


# ---- the commands --------------------------------------------------------------------------------


def inspect_data(
    config: RunConfig, console: Console, show: int = 0, html: str | None = None
) -> dict[str, Any]:
    """Read the data of a run and print the report, the split, the lengths and the run's length.

    Then `show` examples as the model will see them; `html` is a page with the same in colour. No
    weight is loaded.
    """
    inputs = open_inputs(config, console, writes=False, weights=False)
    training = inputs.config.training
    batches = batches_of(inputs.train, inputs.config.data, training)
    tokens = inputs.train.positions
    length = RunLength.of(training, batches)

    def describe(console: Console, show: int) -> None:
        for report in inputs.reports:
            source = f" of {report.source}" if len(inputs.reports) > 1 else ""
            say(console, f"lengths{source}\n{histogram(report)}")
        say(console, f"cost      {length}, {round(length.passes * tokens):,} tokens")
        if show:
            console.print()
            print_rows(batches, inputs.tokenizer, show, console)

    describe(console, show)
    if html is not None:
        page = Console(
            record=True, file=io.StringIO(), width=100, color_system="truecolor", no_color=False
        )
        for report in inputs.reports:
            say(page, f"data      {report}")
        describe(page, show or EXAMPLES_OF_A_PAGE)
        text = page.export_html().replace('<pre style="', '<pre style="white-space:pre-wrap;')
        place = user_path(html, "--html")
        if place.is_file() and not card_text(place)[:15].lower().startswith("<!doctype html"):
            raise ConfigError(f"--html: {html} exists and is no HTML page; name another file")
        try:
            write_whole(place, text)
        except OSError as error:
            raise ConfigError(f"--html: {html} cannot be written: {error.strerror}") from None
    return {
        "sources": [
            {**dataclasses.asdict(report), "read": report.read, "kept": report.kept}
            for report in inputs.reports
        ],
        "rows": inputs.sizes,
        "tokens_per_epoch": tokens,
        "steps": length.steps,
        "passes": length.passes,
    }


def dry_run(inputs: Inputs, plan: Plan, console: Console) -> dict[str, Any]:
    """All that a run does before its first step, and the first batch scored; writes only tokens."""
    model = inputs.load()
    inputs = inputs.prepare(model).to_resume(console)
    batches = batches_of(inputs.train, inputs.config.data, inputs.config.training)
    first = next(iter(batches))
    total = score(model, [first])
    figures = {
        "examples": len(first.rows),
        "tokens": first.real_tokens,
        "supervised_tokens": total.tokens,
        "loss": total.loss,
    }
    say(
        console,
        "first     {examples} examples, {tokens:,} tokens, {supervised_tokens:,} of them to learn; "
        "the model's loss on them is {loss:.4f}".format(**figures),
    )
    training = inputs.config.training
    length = RunLength.of(training, batches)
    seconds = plan.run_seconds or 0.0
    say(console, f"length    {length}, about {duration(seconds)} at the planned speed")
    for warning in length.warnings:
        warn(console, warning)
    print_rows(batches, inputs.tokenizer, EXAMPLES_OF_A_DRY_RUN, console)
    resumed = None if inputs.resumed is None else str(inputs.resumed)
    onward = "" if resumed is None else f", continuing from {resumed}"
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
