"""Figures over steps as plots: SVG always, PNG where matplotlib is installed, live in a notebook.

In an SVG everything is placed at percentages of the width and pixels of the height, and the lines
lie in a box that is stretched: a plot fills whatever width it gets, and its text keeps its size,
on a phone as on a large screen.
"""

import functools
import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

# ---- what is drawn -------------------------------------------------------------------------------

Points = list[tuple[float, float]]
BUCKETS = 300  # of a line: more than a plot on a page has pixels to show


@dataclass(frozen=True)
class Line:
    """One figure over the steps, or over what else the axis shows."""

    label: str
    points: Points  # by x; thinned
    errors: Sequence[float] = ()  # of each point, half the height of its error bar, if it has one


@dataclass(frozen=True)
class Plot:
    """One plot, however it will be drawn."""

    name: str
    title: str
    unit: str
    lines: list[Line]
    warmup: int = 0  # its last step, shown as a shaded stretch; 0 for none
    best: int | None = None  # step of the best validation loss, if it is to be marked
    level: tuple[str, float] | None = None  # label and value of a line to compare with
    axis: str = "step"  # what x is
    log: bool = False  # whether x is on a logarithmic axis, whose ticks are the points' own x

    @property
    def xs(self) -> list[float]:
        """All x that have a point, in order."""
        return sorted({x for line in self.lines for x, _ in line.points})

    @property
    def x_range(self) -> tuple[float, float]:
        """From 0 to the last x; on a logarithmic axis the points' range with some room."""
        low, high = (self.xs[0], self.xs[-1]) if self.xs else (1, 1)
        if not self.log:
            return 0, high or 1
        room = (high / low) ** 0.06 if high > low else 10**0.5
        return low / room, high * room

    @property
    def y_range(self) -> tuple[float, float]:
        """From the smallest to the largest value, with room for a line that is level."""
        ys = [self.level[1]] if self.level else []
        for line in self.lines:
            for (_, y), error in zip(line.points, line.errors or [0.0] * len(line.points)):
                ys += [y - error, y + error]
        low, high = min(ys, default=0), max(ys, default=1)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return (low if low == 0 else low - room), high + room

    def __str__(self) -> str:
        """The plot in words, for those who cannot see it."""
        lines = [
            f"{line.label} from {number(line.points[0][1])} at {self.axis} "
            f"{number(line.points[0][0])} to {number(line.points[-1][1])} at {self.axis} "
            f"{number(line.points[-1][0])}"
            for line in self.lines
            if line.points
        ]
        return f"{self.title}, {self.unit}: {'; '.join(lines) or 'nothing was recorded'}"


def plots_of(
    history: list[dict[str, Any]],
    warmup: int = 0,
    best: int | None = None,
    planned_bytes: int | None = None,
) -> list[Plot]:
    """Make the plots of a history (the records of `metrics.jsonl`), the loss first.

    The last step of the warmup and that of the best validation are marked, and the predicted peak
    of memory is drawn beside the measured one.
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
    """Keep the lowest and the highest finite point of each bucket of steps, and both ends.

    So every extreme of the line stays: a spike of one step in 100,000 is still seen.
    """
    if len(points) <= 2 * buckets:
        return points
    first, last = points[0][0], points[-1][0]
    extremes: dict[int, list[int]] = {}
    for i, (x, y) in enumerate(points):
        bucket = min(int((x - first) / (last - first) * buckets), buckets - 1)
        low, high = extremes.setdefault(bucket, [i, i])
        extremes[bucket] = [i if y < points[low][1] else low, i if y > points[high][1] else high]
    chosen = {0, len(points) - 1, *(i for pair in extremes.values() for i in pair)}
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


# ---- SVG -----------------------------------------------------------------------------------------

LEFT, RIGHT = 11.0, 98.5  # percent of the width
TOP, BOTTOM, HEIGHT = 30, 214, 240  # pixels
BOX = 1000  # units of the stretched box
DOTTED = 40  # points of a line, up to which each has a dot with its figures
COLOURS = 6  # that plot.css has; a seventh line has the first one's
FILE_WIDTH, LEGEND = 720, 16  # pixels: a plot that is a file of its own, a line of its legend
Scale = Callable[[float], float]  # a value -> percent, pixels or units of the box


def svg(plot: Plot) -> str:
    """Draw an `<svg>` element as wide as what it stands in and HEIGHT pixels high.

    It takes its colours from plot.css, below an element of class `mq`.
    """
    return ElementTree.tostring(_chart(plot), encoding="unicode")


def svg_file(plot: Plot) -> str:
    """Draw a document of its own, with title, legend and colours."""
    legend = plot.lines if len(plot.lines) > 1 else []
    height = HEIGHT + LEGEND * len(legend)
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "mq"})
    root.attrib |= {"width": str(FILE_WIDTH), "height": str(height)}
    SubElement(root, "style").text = css("plot.css")
    _add(root, "rect", class_="ground", width="100%", height="100%")
    _add(root, "text", f"{plot.title}, {plot.unit}", class_="title", x="1.5%", y=18)
    root.append(_chart(plot))
    for i, line in enumerate(legend):
        y = HEIGHT + LEGEND * (i + 1) - 5
        _add(root, "text", line.label, class_=f"fill{i % COLOURS}", x=_percent(LEFT), y=y)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


@functools.cache
def css(name: str) -> str:
    """A style sheet of this package."""
    return (files("mlx_qlora.after") / name).read_text(encoding="utf-8")


def _chart(plot: Plot) -> Element:
    named = {"class": "plot", "role": "img", "aria-label": str(plot)}
    chart = Element("svg", {**named, "width": "100%", "height": str(HEIGHT)})
    if not plot.xs:
        _add(chart, "text", "Nothing was recorded.", x="2%", y=60)
        return chart
    across = _scale(plot.x_range, LEFT, RIGHT, plot.log)
    down = _scale(plot.y_range, BOTTOM, TOP)
    _draw_grid(chart, plot, across, down)
    _draw_marks(chart, plot, across, down)
    x, width = _percent(LEFT), _percent(RIGHT - LEFT)
    box = _add(chart, "svg", x=x, y=TOP, width=width, height=BOTTOM - TOP, overflow="visible")
    box.attrib |= {"viewBox": f"0 0 {BOX} {BOX}", "preserveAspectRatio": "none"}
    box_x, box_y = _scale(plot.x_range, 0, BOX, plot.log), _scale(plot.y_range, BOX, 0)
    for i, line in enumerate(plot.lines):
        path = " ".join(f"{box_x(x):.1f},{box_y(y):.1f}" for x, y in line.points)
        colour = i % COLOURS
        _add(box, "polyline", class_=f"line stroke{colour}", points=path)
        for (x, y), error in zip(line.points, line.errors):
            ends = {"y1": down(y - error), "y2": down(y + error)}
            at = _percent(across(x))
            _add(chart, "line", class_=f"stroke{colour}", x1=at, x2=at, **ends)
        for x, y in line.points if len(line.points) <= DOTTED else []:
            place = {"cx": _percent(across(x)), "cy": down(y)}
            dot = _add(chart, "circle", class_=f"fill{colour}", r=3, **place)
            _add(dot, "title", f"{plot.axis} {number(x)}: {line.label} {y:.5g}")
    return chart


def _draw_grid(chart: Element, plot: Plot, across: Scale, down: Scale) -> None:
    for value in ticks(*plot.y_range):
        y = down(value)
        _add(chart, "line", class_="grid", x1=_percent(LEFT), x2=_percent(RIGHT), y1=y, y2=y)
        _add(chart, "text", number(value), class_="end", x=_percent(LEFT - 1.2), y=y + 4)
    steps = plot.xs if plot.log else [x for x in ticks(*plot.x_range) if x == int(x)]
    for step in steps:
        x = across(step)
        side = "end" if x > 95 else "mid"
        _add(chart, "text", number(step), class_=side, x=_percent(x), y=BOTTOM + 20)


def _draw_marks(chart: Element, plot: Plot, across: Scale, down: Scale) -> None:
    """The stretch of the warmup, the level to compare with, and the best step."""
    last, left = plot.x_range[1], _percent(LEFT)
    if plot.warmup:
        size = {"width": _percent(across(min(plot.warmup, last)) - LEFT), "height": BOTTOM - TOP}
        _add(chart, "rect", class_="warmup", x=left, y=TOP, **size)
        _add(chart, "text", "warmup", x=_percent(LEFT + 0.8), y=BOTTOM - 6)
    if plot.level:
        label, value = plot.level
        y = down(value)
        _add(chart, "line", class_="level", x1=left, x2=_percent(RIGHT), y1=y, y2=y)
        _add(chart, "text", f"{label} {number(value)}", x=_percent(LEFT + 1), y=y - 5)
    if plot.best is not None and plot.best <= last:
        x = across(plot.best)
        side, beside = ("end", x - 0.8) if x > 55 else ("", x + 0.8)
        _add(chart, "line", class_="best", x1=_percent(x), x2=_percent(x), y1=TOP, y2=BOTTOM)
        label = f"best: step {plot.best:,}"
        _add(chart, "text", label, class_=side, x=_percent(beside), y=TOP + 10)


def _scale(ends: tuple[float, float], start: float, end: float, log: bool = False) -> Scale:
    position = math.log10 if log else float
    low, high = map(position, ends)
    return lambda value: start + (position(value) - low) / (high - low) * (end - start)


def _percent(share: float) -> str:
    return f"{share:.4g}%"


def _add(parent: Element, tag: str, text: str = "", /, **attributes: str | float) -> Element:
    """Add an element, whose text and attributes the serialiser escapes."""
    child = SubElement(parent, tag)
    for name, value in attributes.items():
        child.set(name.rstrip("_"), value if isinstance(value, str) else f"{value:.4g}")
    child.text = text
    return child


# ---- PNG -----------------------------------------------------------------------------------------

PNG_HINT = "plots are SVG files; for PNG files too: pip install 'mlx-qlora[plots]'"


def can_draw_png() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_png(plot: Plot, path: Path) -> None:
    """Draw a run's plot with matplotlib, 1440 pixels wide."""
    # Not pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.8), dpi=200, layout="constrained")
    axes = figure.subplots()
    for line, colour, dots in zip(plot.lines, ("#0a5bb5", "#b4430a"), ("", "o")):
        marker = "o" if len(line.points) <= DOTTED else dots
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        axes.plot(xs, ys, color=colour, label=line.label, marker=marker, markersize=3)
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


# ---- in a page and in a notebook -----------------------------------------------------------------


@functools.cache
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlx_qlora.after", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"svg": svg, "style": css("plot.css") + css("page.css")}
    environment.globals |= {"quote": shlex.quote, "to_json": json.dumps}
    return environment


def render(template: str, **values: Any) -> str:
    """Fill a template of this package, and escape every value."""
    return _templates().get_template(template).render(values)


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel; IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
