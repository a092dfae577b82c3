"""Figures over steps as plots, which plot.html draws for files, pages and notebooks."""

import functools
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qlora.adapters.push import templates
from mlx_qlora.errors import duration, size

# ---- what is drawn -------------------------------------------------------------------------------

Points = list[tuple[float, float]]
BUCKETS = 300  # of a line: more than a plot on a page has pixels to show
DOTTED = 40  # points of a line, up to which each has a dot with its figures


@dataclass(frozen=True)
class Line:
    """One figure over the steps, or over what else the axis shows."""

    label: str
    points: Points  # by x; thinned
    errors: Sequence[float] = ()  # of each point, half the height of its error bar, if it has one

    @property
    def has_dots(self) -> bool:
        """Whether each point is marked."""
        return len(self.points) <= DOTTED


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


def plots_of(
    history: list[dict[str, Any]],
    warmup: int = 0,
    best: int | None = None,
    planned_bytes: int | None = None,
) -> list[Plot]:
    """The plots of a history (the records of `metrics.jsonl`), with warmup, best step and plan."""

    def line(key: str, label: str, scale: float = 1.0) -> Line:
        points = [(r["step"], r[key] * scale) for r in history if key in r]
        return Line(label, thin([point for point in points if math.isfinite(point[1])]))

    loss, held_out = line("loss", "training"), line("eval_loss", "validation")
    planned = ("planned", planned_bytes / 1e9) if planned_bytes else None
    losses = [loss, held_out] if held_out.points else [loss]
    rate = [line("learning_rate", "learning rate")]
    speed = [line("tokens_per_second", "tokens/s")]
    memory = [line("peak_memory_bytes", "measured peak", 1e-9)]
    rewards = [line(f"rewards/{name}", name) for name in ("chosen", "rejected")]
    compares = any(each.points for each in rewards)
    unit = "per example" if compares else "nats per token"
    return [
        Plot("loss", "Loss", unit, losses, warmup, best),
        *[Plot("rewards", "Rewards", "of answers in training", rewards)] * compares,
        Plot("learning_rate", "Learning rate", "per step", rate, warmup),
        Plot("grad_norm", "Gradient norm", "before clipping", [line("grad_norm", "gradient norm")]),
        Plot("tokens_per_second", "Speed", "real tokens per second", speed),
        Plot("peak_memory_bytes", "Memory", "GB", memory, level=planned),
    ]


def thin(points: Points, buckets: int = BUCKETS) -> Points:
    """Keep the lowest and the highest point of each bucket of steps, and both ends.

    So a spike of one step in 100,000 is still seen.
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


def scale(
    ends: tuple[float, float], start: float, end: float, log: bool = False
) -> Callable[[float], float]:
    """From values between two ends to percent, pixels or units between two others."""
    position = math.log10 if log else float
    low, high = map(position, ends)
    return lambda value: start + (position(value) - low) / (high - low) * (end - start)


def number(value: float) -> str:
    """A figure as it stands beside an axis."""
    if value and math.isfinite(value) and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- in a page and in a notebook -----------------------------------------------------------------


@functools.cache
def _pages() -> Any:
    """The package's templates, with what a page draws with."""
    environment = templates()
    environment.globals |= {"scale": scale, "ticks": ticks, "number": number}
    environment.globals |= {"quote": shlex.quote, "to_json": json.dumps}
    environment.globals |= {"size": size, "duration": duration}
    environment.filters |= {"percent": "{:.4g}%".format, "short": "{:.4g}".format}
    return environment


def svg_file(plot: Plot) -> str:
    """Draw a document of its own, with title, legend and colours."""
    return _pages().get_template("after/plot.html").module.document(plot)


def render(template: str, **values: Any) -> str:
    """Fill a page beside this file, and escape every value."""
    return _pages().get_template(f"after/{template}").render(values)


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel; IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
