"""Plots drawn: as SVG by ourselves, always; as PNG by matplotlib, where it is installed.

In the SVGs, everything stands at a percentage of the width and at pixels of the height, and the
lines lie in a box that is stretched: so a plot fills whatever width it has, and its text keeps
its size, on a phone as on a large screen.
"""

import html
import importlib.util
from collections.abc import Callable
from pathlib import Path

from mlx_qlora.report.lines import Plot, number, ticks
from mlx_qlora.report.style import PLOT_STYLE

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
