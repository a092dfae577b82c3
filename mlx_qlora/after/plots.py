"""Plots drawn: as SVG by ourselves, always; as PNG by matplotlib, where it is installed.

In the SVGs, everything stands at a percentage of the width and at pixels of the height, and the
lines lie in a box that is stretched: so a plot fills whatever width it has, and its text keeps
its size, on a phone as on a large screen.
"""

import html
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ---- what is drawn -------------------------------------------------------------------------------


Points = list[tuple[float, float]]


BUCKETS = 300  # of a line; more than a plot on a page has pixels to show


@dataclass(frozen=True)
class Line:
    """One figure over the steps.

    Attributes:
        label: what it is called in the legend.
        points: (step, value), by step; thinned.
    """

    label: str
    points: Points


@dataclass(frozen=True)
class Plot:
    """One plot, however it will be drawn.

    Attributes:
        name: of its file.
        title: for people.
        unit: of the values.
        lines: at most two.
        warmup: the last step of the warmup, 0 for none; shown as a shaded stretch.
        best: step of the best validation loss, if it is to be marked.
        level: (label, value) of a horizontal line to compare with.
    """

    name: str
    title: str
    unit: str
    lines: list[Line]
    warmup: int = 0
    best: int | None = None
    level: tuple[str, float] | None = None

    @property
    def x_range(self) -> tuple[float, float]:
        """From step 0 to the last one."""
        return 0, max((x for line in self.lines for x, _ in line.points), default=1) or 1

    @property
    def y_range(self) -> tuple[float, float]:
        """From the smallest to the largest value, with room for a line that is level."""
        ys = [y for line in self.lines for _, y in line.points]
        ys += [self.level[1]] if self.level else []
        low, high = min(ys, default=0), max(ys, default=1)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return (low if low == 0 else low - room), high + room

    def __str__(self) -> str:
        """The plot in words, for those who cannot see it."""
        told = [
            f"{line.label} from {number(line.points[0][1])} at step {line.points[0][0]:,.0f} to "
            f"{number(line.points[-1][1])} at step {line.points[-1][0]:,.0f}"
            for line in self.lines
            if line.points
        ]
        return f"{self.title}, {self.unit}: {'; '.join(told) or 'nothing was recorded'}"


def plots_of(
    history: list[dict[str, Any]],
    warmup: int = 0,
    best: int | None = None,
    planned_bytes: int | None = None,
) -> list[Plot]:
    """The plots of a history, the loss first.

    Args:
        history: the records of `metrics.jsonl`.
        warmup: steps of the warmup.
        best: step of the best validation loss.
        planned_bytes: the predicted peak of memory.
    """

    def line(key: str, label: str, scale: float = 1.0) -> Line:
        points = [(r["step"], r[key] * scale) for r in history if key in r]
        return Line(label, thin([point for point in points if math.isfinite(point[1])]))

    loss, held_out = line("loss", "training"), line("eval_loss", "validation")
    planned = ("planned", planned_bytes / 1e9) if planned_bytes else None
    losses = [loss, held_out] if held_out.points else [loss]
    rate = [line("learning_rate", "learning rate")]
    speed = [line("tokens_per_second", "tokens/s")]
    memory = [line("peak_memory_bytes", "measured peak", 1e-9)]
    norm = [line("grad_norm", "gradient norm")]
    return [
        Plot("loss", "Loss", "nats per token", losses, warmup, best),
        Plot("learning_rate", "Learning rate", "per step", rate, warmup),
        Plot("grad_norm", "Gradient norm", "before clipping", norm),
        Plot("tokens_per_second", "Speed", "real tokens per second", speed),
        Plot("peak_memory_bytes", "Memory", "GB", memory, level=planned),
    ]


def thin(points: Points, buckets: int = BUCKETS) -> Points:
    """At most about two points for each bucket of steps: its lowest and its highest.

    Every extreme of the line stays, so that a spike of one step in 100,000 is still seen; so do
    the first point and the last.

    Args:
        points: (step, value), by step, finite.
        buckets: how many stretches of equal length the steps are cut into.
    """
    if len(points) <= 2 * buckets:
        return points
    first, last = points[0][0], points[-1][0]
    kept: dict[int, list[int]] = {}
    for i, (x, y) in enumerate(points):
        bucket = min(int((x - first) / (last - first) * buckets), buckets - 1)
        low, high = kept.setdefault(bucket, [i, i])
        kept[bucket] = [i if y < points[low][1] else low, i if y > points[high][1] else high]
    chosen = {0, len(points) - 1, *(i for pair in kept.values() for i in pair)}
    return [points[i] for i in sorted(chosen)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two others: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A figure as it stands beside an axis."""
    if value and math.isfinite(value) and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def sampled(records: Sequence[Any], most: int) -> list[Any]:
    """Every n-th record, so that at most so many are left; the last one always is."""
    every = max(1, math.ceil(len(records) / most))
    return list(records[::-1][::every][::-1])


# ---- how a page looks ------------------------------------------------------------

# Text has a contrast of at least 4.5 with what it stands on, in both themes (WCAG 2.2, 1.4.3).
LIGHT = """--ink: #1b1c1f; --quiet: #565a63; --page: #fafaf8; --card: #ffffff; --line: #dcdcd8;
  --a: #0a5bb5; --b: #b4430a; --good: #1a6e36; --bad: #b3261e; --note: #7a5b00; --wash: #eceae4;"""


DARK = """--ink: #e9e9ec; --quiet: #a9adb6; --page: #131416; --card: #1c1e21; --line: #34373c;
  --a: #7ab8ff; --b: #ffab7a; --good: #79d492; --bad: #ff8f87; --note: #e7c35c; --wash: #26292d;"""


_DRAWN = """
{root} .ground {{ fill: var(--card); }} {root} .grid {{ stroke: var(--line); }}
{root} .line {{ fill: none; stroke-width: 2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }}
{root} .line0 {{ stroke: var(--a); }} {root} .line1 {{ stroke: var(--b); stroke-dasharray: 6 3; }}
{root} .dot0, {root} .name0 {{ fill: var(--a); }}
{root} .dot1, {root} .name1 {{ fill: var(--b); }}
{root} .warmup {{ fill: var(--wash); }}
{root} .level {{ stroke: var(--quiet); stroke-dasharray: 5 4; }}
{root} .best {{ stroke: var(--good); stroke-dasharray: 4 3; stroke-width: 1.5; }}
{root} text {{ font: 12px system-ui, sans-serif; fill: var(--quiet); }}
{root} text.title {{ font-weight: 600; fill: var(--ink); }}
{root} text.name0 {{ fill: var(--a); }} {root} text.name1 {{ fill: var(--b); }}
{root} .end {{ text-anchor: end; }} {root} .mid {{ text-anchor: middle; }}
"""


_THEMES = """
{root} {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ {root} {{ {dark} }} }}
"""


PLOT_STYLE = _THEMES.format(root="svg", light=LIGHT, dark=DARK) + _DRAWN.format(root="svg")


STYLE = (
    _THEMES.format(root=".mq", light=LIGHT, dark=DARK)
    + _DRAWN.format(root=".mq .plot")
    + """
.mq { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--page); -webkit-text-size-adjust: 100%; }
body.mq { margin: 0; } .mq * { box-sizing: border-box; }
.mq main, .mq footer { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
.mq header { padding: 2.2rem 0 .6rem; }
.mq h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: 0 0 .3rem;
  overflow-wrap: anywhere; letter-spacing: -.01em; color: var(--ink); }
.mq h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; color: var(--ink); }
.mq h3 { font-size: 1rem; margin: 0 0 .35rem; color: var(--ink); }
.mq p { margin: .3rem 0; } .mq .quiet { color: var(--quiet); font-size: .9rem; }
.mq a { color: var(--a); }
.mq nav { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-top: .5rem; }
.mq .grid2 { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.mq .answers { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
.mq .answers .card { flex: 1 1 17rem; }
.mq .card, .mq figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem 1rem; margin: 0; min-width: 0; }
.mq .question { color: var(--quiet); font-size: .85rem; font-weight: 600; margin: 0 0 .2rem; }
.mq .verdict { font-size: 1.18rem; font-weight: 650; line-height: 1.3; margin: 0 0 .3rem; }
.mq .verdict::before { display: inline-block; width: 1.3em; }
.mq .good .verdict::before { content: "✓"; color: var(--good); }
.mq .bad .verdict::before { content: "✕"; color: var(--bad); }
.mq .note .verdict::before { content: "!"; color: var(--note); }
.mq .advice { border-left: 4px solid var(--note); margin-top: 1rem; }
.mq figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline; }
.mq figcaption b { font-size: 1rem; }
.mq .name0, .mq .name1 { font-size: .9rem; font-weight: 600; }
.mq .name0 { color: var(--a); } .mq .name1 { color: var(--b); }
.mq .plot { display: block; overflow: visible; }
.mq .wide { margin-bottom: 1rem; }
.mq .scroll { overflow-x: auto; }
.mq table { border-collapse: collapse; width: 100%; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
.mq th, .mq td { text-align: left; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; background: none; color: var(--ink); }
.mq th { font-weight: 600; } .mq thead th { color: var(--quiet); font-size: .85rem; }
.mq .num { text-align: right; white-space: nowrap; }
.mq tr.sum > * { font-weight: 700; }
.mq .facts td, .mq .facts th { overflow-wrap: anywhere; } .mq .facts th { width: 38%; }
.mq .bar { display: block; height: .8rem; min-width: 1px; border-radius: 3px;
  background: var(--a); }
.mq .bar.other { background: var(--b); } .mq td.bars { width: 45%; vertical-align: middle; }
.mq pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: .3rem 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere; background: none; color: var(--ink); }
.mq pre.code { background: var(--wash); border-radius: 6px; padding: .6rem .8rem; }
.mq .sample { margin-bottom: 1rem; }
.mq .sample .grid3 { display: grid; gap: .9rem 1.4rem; margin-top: .8rem;
  border-top: 1px solid var(--line); padding-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.mq .said { max-height: 18rem; overflow-y: auto; }
.mq .after h3 { color: var(--good); } .mq .sample h3 { font-size: .85rem; }
.mq details { margin-top: .8rem; }
.mq summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
.mq footer { color: var(--quiet); font-size: .85rem; padding-top: 2rem; padding-bottom: 2.5rem; }
@media print { .mq .card, .mq figure { break-inside: avoid; } }
"""
)


# ---- how it is drawn -----------------------------------------------------------------------------


Place = Callable[[float], float]  # a step -> percent, or a value -> pixels


LEFT, RIGHT = 11.0, 98.5  # percent of the width


TOP, BOTTOM, HEIGHT = 30, 214, 240  # pixels


BOX = 1000  # units of the stretched box


DOTTED = 40  # points of a line, up to which each has a dot with its figures


FILE_SIZE = 720  # pixels, width of a plot that is a file of its own


PNG_HINT = "plots are SVG files; for PNG files too: pip install 'mlx-qlora[plots]'"


def svg(plot: Plot) -> str:
    """An `<svg>` element, as wide as what it stands in and HEIGHT pixels high."""
    (x0, x1), (y0, y1) = plot.x_range, plot.y_range
    if not any(line.points for line in plot.lines):
        return '<p class="quiet">Nothing was recorded.</p>'

    def across(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (RIGHT - LEFT)

    def down(y: float) -> float:
        return BOTTOM - (y - y0) / (y1 - y0) * (BOTTOM - TOP)

    drawn = [*_grid(plot, across, down), *_marks(plot, across, down)]
    for i, line in enumerate(plot.lines):
        path = " ".join(
            f"{(x - x0) / (x1 - x0) * BOX:.1f},{BOX - (y - y0) / (y1 - y0) * BOX:.1f}"
            for x, y in line.points
        )
        drawn.append(
            f'<svg x="{LEFT}%" y="{TOP}" width="{RIGHT - LEFT}%" height="{BOTTOM - TOP}" '
            f'viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none" overflow="visible">'
            f'<polyline class="line line{i}" points="{path}"/></svg>'
        )
        for x, y in line.points if len(line.points) <= DOTTED else []:
            told = f"step {x:,.0f}: {line.label} {y:.5g}"
            place = f'cx="{across(x):.2f}%" cy="{down(y):.1f}"'
            dot = f'<circle class="dot{i}" {place} r="3"><title>{_esc(told)}</title></circle>'
            drawn.append(dot)
    return (
        f'<svg class="plot" role="img" aria-label="{_esc(str(plot))}" '
        f'width="100%" height="{HEIGHT}">{"".join(drawn)}</svg>'
    )


def _grid(plot: Plot, across: Place, down: Place) -> list[str]:
    drawn = []
    for y in ticks(*plot.y_range):
        at = f"{down(y):.1f}"
        drawn.append(f'<line class="grid" x1="{LEFT}%" x2="{RIGHT}%" y1="{at}" y2="{at}"/>')
        x, low = LEFT - 1.2, down(y) + 4
        drawn.append(f'<text class="end" x="{x:.1f}%" y="{low:.1f}">{number(y)}</text>')
    steps = [x for x in ticks(*plot.x_range) if x == int(x)]
    for x in steps:
        side = "end" if across(x) > 95 else "mid"
        drawn.append(
            f'<text class="{side}" x="{across(x):.2f}%" y="{BOTTOM + 20}">{number(x)}</text>'
        )
    return drawn


def _marks(plot: Plot, across: Place, down: Place) -> list[str]:
    """The warmup's stretch, the level to compare with, and the best step."""
    drawn, last = [], plot.x_range[1]
    if plot.warmup:
        end = across(min(plot.warmup, last))
        drawn.append(
            f'<rect class="warmup" x="{LEFT}%" y="{TOP}" width="{end - LEFT:.2f}%" '
            f'height="{BOTTOM - TOP}"/><text x="{LEFT + 0.8}%" y="{BOTTOM - 6}">warmup</text>'
        )
    if plot.level:
        label, value = plot.level
        y = down(value)
        drawn.append(
            f'<line class="level" x1="{LEFT}%" x2="{RIGHT}%" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT + 1}%" y="{y - 5:.1f}">{_esc(label)} {number(value)}</text>'
        )
    if plot.best is not None and plot.best <= last:
        x = across(plot.best)
        side, at = ("end", x - 0.8) if x > 55 else ("", x + 0.8)
        drawn.append(
            f'<line class="best" x1="{x:.2f}%" x2="{x:.2f}%" y1="{TOP}" y2="{BOTTOM}"/>'
            f'<text class="{side}" x="{at:.2f}%" y="{TOP + 10}">best: step {plot.best:,}</text>'
        )
    return drawn


def svg_file(plot: Plot) -> str:
    """A plot as an SVG document of its own, with its title, its legend and its colours."""
    drawn = svg(plot)
    if not drawn.startswith("<svg"):
        text = f'<text x="2%" y="60">{_esc(str(plot))}</text>'
        drawn = f'<svg width="100%" height="{HEIGHT}">{text}</svg>'
    names = [line.label for line in plot.lines] if len(plot.lines) > 1 else []
    legend = "".join(
        f'<text class="name{i} end" x="{RIGHT - 14 * (len(names) - 1 - i)}%" y="18">'
        f"{_esc(name)}</text>"
        for i, name in enumerate(names)
    )
    head = f'<text class="title" x="1.5%" y="18">{_esc(plot.title)}, {_esc(plot.unit)}</text>'
    opening, body = drawn.split(">", 1)
    opening = opening.replace('width="100%"', f'width="{FILE_SIZE}"')
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return f"{opening}><style>{PLOT_STYLE}</style>{ground}{head}{legend}{body}"


def can_draw_png() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_png(plot: Plot, path: Path) -> None:
    """Draws a plot with matplotlib, 1440 pixels wide."""
    # Not pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.8), dpi=200, layout="constrained")
    axes = figure.subplots()
    for line, colour, dots in zip(plot.lines, ("#0a5bb5", "#b4430a"), ("", "o")):
        few = len(line.points) <= DOTTED
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        axes.plot(xs, ys, color=colour, label=line.label, marker="o" if few else dots, markersize=3)
    if plot.warmup:
        end = min(plot.warmup, plot.x_range[1])
        axes.axvspan(0, end, color="#888888", alpha=0.15, linewidth=0, label="warmup")
    if plot.best is not None:
        label = f"best: step {plot.best:,}"
        axes.axvline(plot.best, color="#1a6e36", linestyle="--", linewidth=1, label=label)
    if plot.level:
        axes.axhline(plot.level[1], color="#666666", linestyle="--", label=plot.level[0])
    axes.set_xlim(*plot.x_range)
    axes.set_ylim(*plot.y_range)
    axes.set_title(f"{plot.title}, {plot.unit}", loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _esc(text: str) -> str:
    return html.escape(text)


def figures(plots: Sequence[Plot]) -> str:
    """The plots with their captions, the first one over the whole width."""
    first, *others = [_figure(plot) for plot in plots]
    return f'<div class="wide">{first}</div><div class="grid2">{"".join(others)}</div>'


def _figure(plot: Plot) -> str:
    names = [line.label for line in plot.lines] if len(plot.lines) > 1 else []
    legend = "".join(f'<span class="name{i}">{_esc(n)}</span>' for i, n in enumerate(names))
    caption = f'<b>{_esc(plot.title)}</b> <span class="quiet">{_esc(plot.unit)}</span>{legend}'
    return f"<figure><figcaption>{caption}</figcaption>{svg(plot)}</figure>"
