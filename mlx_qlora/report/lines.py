"""What the plots of a run show: lines over the optimiser steps, thinned, and their ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
