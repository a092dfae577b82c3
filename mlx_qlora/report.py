"""The run on one page: `report.html`, self-contained, and its plots as SVG files."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_qlora._version import __version__
from mlx_qlora.adapters.files import staged
from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.train.loop import TrainResult

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 240, 64, 32, 16, 12  # pixels

# name of the plot -> the recorded figures that it draws over the steps
PLOTS = {
    "loss": ("loss", "eval_loss"),
    "learning_rate": ("learning_rate",),
    "grad_norm": ("grad_norm",),
    "tokens_per_second": ("tokens_per_second",),
    "peak_memory_bytes": ("peak_memory_bytes",),
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --page: #fff; --line: #d0d0d5; --a: #0a66c2;
  --b: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --page: #17171a; --line: #3a3a40; --a: #6cb2ff; --b: #ff9d6b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 45rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .7rem; white-space: pre-wrap; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.axis { stroke: var(--line); } .series0 { stroke: var(--a); } .series1 { stroke: var(--b); }
.series0, .series1 { fill: none; stroke-width: 2; } text.series0 { fill: var(--a); stroke: none; }
text.series1 { fill: var(--b); stroke: none; }
"""


def write_report(
    result: TrainResult,
    config: RunConfig,
    scores: dict[str, Scores],
    samples: Sequence[dict[str, str]] = (),
) -> Path:
    """Writes `report.html` and `plots/*.svg` into the run's output folder.

    Args:
        result: the finished run.
        config: as it was resolved.
        scores: "before" and "after", of the test set, if there was one.
        samples: dicts of heading -> text, for example prompt, before, after, reference.

    Returns:
        The path of the report.
    """
    plots = {name: plot(result.log_history, series) for name, series in PLOTS.items()}
    with staged(result.output_dir) as staging:
        (staging / "plots").mkdir()
        for name, svg in plots.items():
            standalone = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
            standalone = standalone.replace(">", f"><style>{STYLE}</style>", 1)
            (staging / "plots" / f"{name}.svg").write_text(standalone, encoding="utf-8")
        page = _page(result, config, scores, samples, plots)
        (staging / "report.html").write_text(page, encoding="utf-8")
    return result.output_dir / "report.html"


def _page(
    result: TrainResult,
    config: RunConfig,
    scores: dict[str, Scores],
    samples: Sequence[dict[str, str]],
    plots: dict[str, str],
) -> str:
    facts = {
        "model": config.model.source or "",
        "optimiser steps": f"{result.steps:,}",
        "training loss at the end": f"{result.train_loss:.4f} nats per token",
        "validation loss at the end": f"{result.eval_loss:.4f}" if result.eval_loss else "none",
        "time": f"{result.seconds / 60:.1f} minutes",
        "speed": f"{result.tokens_per_second:,.0f} real tokens per second",
        "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB",
    }
    for when, score in scores.items():
        facts[f"test {when} training"] = (
            f"loss {score.loss:.4f}, perplexity {score.perplexity:.2f}, token accuracy "
            f"{score.token_accuracy:.1%}, {score.n_tokens:,} tokens"
        )
    rows = "".join(f"<tr><th>{_esc(k)}</th><td>{_esc(v)}</td></tr>" for k, v in facts.items())
    drawn = "".join(f"<h3>{_esc(n.replace('_', ' '))}</h3>{svg}" for n, svg in plots.items())
    shown = "".join(
        "".join(f"<h4>{_esc(head)}</h4><pre>{_esc(text)}</pre>" for head, text in sample.items())
        for sample in samples
    )
    samples_part = f"<h2>Before and after</h2>{shown}" if shown else ""
    folder = _esc(str(result.output_dir))
    use = (
        "PEFT:    PeftModel.from_pretrained(base, "
        f'"{folder}")\nmlx-lm:  mlx_lm.generate --model BASE --adapter-path {folder}/mlx\n'
        f"here:    mlx-qlora generate --model {_esc(facts['model'])} --adapter {folder} "
        '--prompt "..."'
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mlx-qlora run</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>mlx-qlora run</h1><table>{rows}</table>
<h2>History</h2>{drawn}{samples_part}
<h2>Use the adapter</h2><pre>{use}</pre>
<h2>Configuration</h2><pre>{_esc(to_yaml(config))}</pre>
<p>mlx-qlora {__version__}</p></body></html>
"""


def plot(history: list[dict[str, Any]], names: Sequence[str]) -> str:
    """An SVG line plot of recorded figures over the optimiser steps."""
    series = {n: [(r["step"], r[n]) for r in history if n in r] for n in names}
    points = [point for line in series.values() for point in line]
    if not points:
        return "<p>nothing was recorded</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + (abs(y0) or 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    drawn = []
    for y in (y0, (y0 + y1) / 2, y1):
        _, down = place(x0, y)
        drawn.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{down}" y2="{down}"/>')
        drawn.append(f'<text x="0" y="{down + 4}">{y:.3g}</text>')
    for x in (x0, x1):
        drawn.append(f'<text x="{place(x, y0)[0] - 12}" y="{HEIGHT - 8}">{x}</text>')
    for i, (name, line) in enumerate(series.items()):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        drawn.append(f'<polyline class="series{i}" points="{path}"/>')
        drawn.append(f'<text class="series{i}" x="{LEFT + 120 * i}" y="12">{name}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _esc(text: str) -> str:
    return html.escape(str(text))
