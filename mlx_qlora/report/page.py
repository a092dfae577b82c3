"""The run on one page: `report.html`, self-contained, and its plots as files beside it.

The page has no script and fetches nothing; its own policy forbids both. Its sections come in the
order in which a person asks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_qlora._version import __version__
from mlx_qlora.adapters.files import staged
from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.data.summary import DataReport
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.planner import Plan
from mlx_qlora.report.answers import Answer, answers
from mlx_qlora.report.drawing import PNG_HINT, can_draw_png, svg, svg_file, write_png
from mlx_qlora.report.facts import Evaluation, Facts, evaluation_of, in_folder
from mlx_qlora.report.lines import Plot
from mlx_qlora.report.style import STYLE
from mlx_qlora.report.tables import (
    data_card,
    esc,
    evaluation_table,
    history_table,
    memory_table,
    record_tables,
)
from mlx_qlora.report.usage import usages
from mlx_qlora.train.result import TrainResult

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HEADINGS = {
    "prompt": "Prompt",
    "reference": "Reference",
    "before": "Before training",
    "after": "After training",
}


def write_report(
    result: TrainResult,
    config: RunConfig,
    scores: dict[str, Scores],
    samples: Sequence[dict[str, str]] = (),
    *,
    data: Sequence[DataReport] = (),
    rows: Mapping[str, int] | None = None,
    plan: Plan | None = None,
    evaluation: Evaluation | None = None,
) -> Path:
    """Writes `report.html` and `plots/` into the run's output folder, and tells the result.

    `plots/` gets SVG files, and PNG files too where matplotlib is installed. A notebook that shows
    the result shows what was written last.

    Args:
        result: the finished run.
        config: as it was resolved.
        scores: "before" and "after", of the test set, if there was one.
        samples: dicts of heading -> text: prompt, reference, before, after.
        data: what became of the rows of each source.
        rows: part (train, validation, test) -> how many rows it has.
        plan: the prediction, to compare with what was measured.
        evaluation: metric -> base, tuned, difference, and where known low and high (the interval
            of the difference) and n; made from `scores` if not given.

    Returns:
        The path of the report.
    """
    facts = Facts(
        result,
        config,
        scores,
        samples,
        data,
        rows or {},
        plan,
        evaluation_of(scores) if evaluation is None else evaluation,
        in_folder(result.output_dir, "training_args.json"),
        in_folder(result.output_dir, "adapter_config.json"),
    )
    with staged(result.output_dir) as staging:
        (staging / "plots").mkdir()
        for plot in facts.plots:
            file = staging / "plots" / f"{plot.name}.svg"
            file.write_text(svg_file(plot), encoding="utf-8")
            if can_draw_png():
                write_png(plot, file.with_suffix(".png"))
        (staging / "report.html").write_text(page(facts), encoding="utf-8")
    result.html = fragment(facts)
    return result.output_dir / "report.html"


def page(facts: Facts) -> str:
    """The whole page."""
    name = title(facts)
    sections = {
        "Loss and speed": _plots(facts),
        "Memory": memory_table(facts) and f'<div class="card">{memory_table(facts)}</div>',
        "Data": _data(facts),
        "Before and after": "".join(
            sample_card(number, sample) for number, sample in enumerate(facts.samples, 1)
        ),
        "Evaluation": _evaluation(facts),
        "Use the adapter": _usage(facts),
        "The full record": _record(facts),
    }
    sections = {head: body for head, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(head)}">{head}</a>' for head in sections)
    body = "".join(
        f'<section aria-labelledby="{_anchor(head)}"><h2 id="{_anchor(head)}">{head}</h2>{part}'
        "</section>"
        for head, part in sections.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{esc(name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<style>{STYLE}</style></head>
<body class="mq"><main><header><h1>{esc(name)}</h1><p class="quiet">{esc(subtitle(facts))}</p>
<nav aria-label="sections">{links}</nav></header>
{summary(facts)}
{body}</main>
<footer>Written by mlx-qlora {__version__}. {_png_note()}</footer></body></html>
"""


def fragment(facts: Facts) -> str:
    """Summary and plots, for a notebook's cell."""
    report = facts.result.output_dir / "report.html"
    return (
        f'<div class="mq"><style>{STYLE}</style><div style="padding:1rem">'
        f"<h3>{esc(title(facts))}</h3><p class='quiet'>{esc(subtitle(facts))}</p>"
        f"{summary(facts)}<div style='height:1rem'></div>{figures(facts.plots)}"
        f"<p class='quiet'>The whole report: {esc(report)}</p></div></div>"
    )


def title(facts: Facts) -> str:
    """What the run was, in a few words."""
    return f"{Path(facts.base).name}, fine-tuned"


def subtitle(facts: Facts) -> str:
    """The settings that tell runs apart."""
    lora, model = facts.config.lora, facts.config.model
    kind = "DoRA" if lora.use_dora else "LoRA"
    weights = f"{model.bits}-bit weights" if model.bits else "the file's own precision"
    rate = f"learning rate {facts.config.training.learning_rate:g}"
    return f"{kind} of rank {lora.r} on {weights}, {facts.result.steps:,} steps, {rate}"


def summary(facts: Facts) -> str:
    """The five answers, and the advice."""
    cards = "".join(_answer_card(answer) for answer in answers(facts))
    advice = "".join(
        f'<div class="card advice"><h3>Advice: {esc(found.kind)}</h3>'
        f"<p>{esc(found.finding)}.</p><p><b>What to change:</b> {esc(found.remedy)}.</p></div>"
        for found in facts.advice
    )
    return f'<section class="answers" aria-label="summary">{cards}</section>{advice}'


def _answer_card(answer: Answer) -> str:
    code = f'<pre class="code">{esc(answer.code)}</pre>' if answer.code else ""
    return (
        f'<div class="card {answer.tone}"><h2 class="question">{esc(answer.question)}</h2>'
        f'<p class="verdict">{esc(answer.verdict)}</p>'
        f'<p class="quiet">{esc(answer.why)}</p>{code}</div>'
    )


def figures(plots: Sequence[Plot]) -> str:
    """The plots with their captions, the first one over the whole width."""
    first, *others = [_figure(plot) for plot in plots]
    return f'<div class="wide">{first}</div><div class="grid2">{"".join(others)}</div>'


def _figure(plot: Plot) -> str:
    names = [line.label for line in plot.lines] if len(plot.lines) > 1 else []
    legend = "".join(f'<span class="name{i}">{esc(n)}</span>' for i, n in enumerate(names))
    caption = f'<b>{esc(plot.title)}</b> <span class="quiet">{esc(plot.unit)}</span>{legend}'
    return f"<figure><figcaption>{caption}</figcaption>{svg(plot)}</figure>"


def _plots(facts: Facts) -> str:
    skipped, spikes = facts.count("skipped"), facts.count("spike")
    events = f"{skipped:,} steps were skipped, {spikes:,} had a loss far above the usual."
    note = f'<p class="quiet">{events}</p>' if skipped or spikes else ""
    return figures(facts.plots) + note + history_table(facts.result.log_history)


def _data(facts: Facts) -> str:
    if not facts.data:
        return ""
    parts = ", ".join(f"{count:,} {part}" for part, count in facts.rows.items())
    split = f'<p class="quiet">Rows: {esc(parts)}.</p>' if parts else ""
    return split + f'<div class="grid2">{"".join(map(data_card, facts.data))}</div>'


def sample_card(number: int, sample: dict[str, str]) -> str:
    """A prompt, and below it side by side what was and what should be said."""

    def said(key: str) -> str:
        head = HEADINGS.get(key, key)
        return (
            f'<div class="{key if key in HEADINGS else ""}"><h3>{esc(head)}</h3>'
            f'<pre class="said" tabindex="0">{esc(sample[key].strip())}</pre></div>'
        )

    order = [key for key in ("reference", "before", "after") if key in sample]
    order += [key for key in sample if key not in HEADINGS]
    prompt = said("prompt") if "prompt" in sample else ""
    columns = "".join(map(said, order))
    return (
        f'<article class="card sample" aria-label="sample {number}">{prompt}'
        f'<div class="grid3">{columns}</div></article>'
    )


def _evaluation(facts: Facts) -> str:
    if not facts.evaluation:
        return ""
    note = "On rows that were held out; before and after training, without dropout."
    return (
        f'<div class="card">{evaluation_table(facts.evaluation)}<p class="quiet">{note}</p></div>'
    )


def _usage(facts: Facts) -> str:
    cards = "".join(
        f'<div class="card"><h3>{esc(usage.tool)}</h3><p class="quiet">{esc(usage.note)}</p>'
        f'<pre class="code">{esc(usage.code)}</pre></div>'
        for usage in usages(facts)
    )
    return f'<div class="grid2">{cards}</div>'


def _record(facts: Facts) -> str:
    return (
        f'<div class="grid2">{record_tables(facts)}</div><details><summary>Configuration (run.yaml)'
        f'</summary><pre class="code">{esc(to_yaml(facts.config))}</pre></details>'
    )


def _png_note() -> str:
    return "" if can_draw_png() else esc(f"The {PNG_HINT}.")


def _anchor(head: str) -> str:
    return head.lower().replace(" ", "-")
