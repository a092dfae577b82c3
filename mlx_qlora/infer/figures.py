"""One metric of two models as one line: both figures, the change, and a plain sentence."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_qlora.infer.bootstrap import FEWEST, Interval, ratio_interval

LOWER, HIGHER, NEITHER = "lower", "higher", "neither"
MOST_NATS = 700.0  # exp of more is not finite


@dataclass(frozen=True)
class Row:
    """One metric of two models.

    Attributes:
        metric: its name.
        better: `lower`, `higher` or `neither`.
        base: the base's figure.
        tuned: the adapter's; None if there is no adapter.
        change: tuned minus base, paired by example; of perplexity, tuned over base minus 1.
        relative: whether `change` is a share of the base's figure.
    """

    metric: str
    better: str
    base: Interval
    tuned: Interval | None = None
    change: Interval | None = None
    relative: bool = False

    @property
    def name(self) -> str:
        """The metric, as a person reads it."""
        return self.metric.replace("_", " ")

    @property
    def sentence(self) -> str:
        """What can be said of the change, and what cannot."""
        if self.tuned is None or self.change is None:
            return f"{self.name}: {_span(self.base)}"
        before, after, n = self.base.estimate, self.tuned.estimate, self.change.n
        values = f"{self.name}: {before:.4g} without the adapter, {after:.4g} with it"
        if n < FEWEST:
            return f"{values}; {n} examples are too few to say how sure that is"
        if not self.change.known:
            return f"{values}; all {n} examples changed alike, which gives no interval"
        percent = f"{100 * self.change.level:g} %"
        change = f"{values} ({self._signed()}, {percent} interval {self._ends()}, n = {n})"
        if self.change.includes_zero:
            return f"{change}: the interval includes 0, so no change is shown"
        if self.better == NEITHER:
            return f"{change}: it {'rose' if self.change.estimate > 0 else 'fell'}"
        improved = (self.change.estimate < 0) == (self.better == LOWER)
        return f"{change}: {'better' if improved else 'worse'}"

    def _signed(self) -> str:
        assert self.change is not None
        return _signed(self.change.estimate, self.relative)

    def _ends(self) -> str:
        assert self.change is not None
        low, high = (_signed(end, self.relative) for end in (self.change.low, self.change.high))
        return f"{low} to {high}"

    def cells(self) -> list[str]:
        """As a line of the table."""
        if self.tuned is None or self.change is None:
            return [self.name, _span(self.base), str(self.base.n)]
        ends = self._ends() if self.change.known else "not known"
        figures = f"{self.base.estimate:.4g}", f"{self.tuned.estimate:.4g}"
        return [self.name, *figures, self._signed(), ends, str(self.change.n)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        parts = {"base": self.base, "tuned": self.tuned, "change": self.change}
        shown = {name: part.to_dict() if part else None for name, part in parts.items()}
        about = {"metric": self.metric, "better": self.better, "relative": self.relative}
        return about | shown | {"sentence": self.sentence}


def perplexity_row(metric: str, loss: Row) -> Row:
    """Perplexities of the losses in a line; exp keeps the order, so the intervals are its ends'."""
    tuned = loss.tuned.mapped(_exp) if loss.tuned else None
    change = loss.change.mapped(_rise) if loss.change else None
    return Row(metric, LOWER, loss.base.mapped(_exp), tuned, change, relative=True)


def paired_row(
    metric: str, better: str, values: list[np.ndarray], weights: np.ndarray | None, level: float
) -> Row:
    """A metric's line, from its sums over each example: of the base, and of the tuned model.

    Args:
        metric: its name.
        better: LOWER, HIGHER or NEITHER.
        values: (n,) of each model.
        weights: (n,) of both, tokens of each example; None counts examples alike.
        level: of confidence, in (0, 1).
    """
    figures = [ratio_interval(each, weights, level) for each in values]
    if len(values) == 1:
        return Row(metric, better, figures[0])
    change = ratio_interval(values[1] - values[0], weights, level)
    return Row(metric, better, figures[0], figures[1], change)


def _exp(nats: float) -> float:
    return math.exp(min(nats, MOST_NATS))


def _rise(nats: float) -> float:
    return math.expm1(min(nats, MOST_NATS))


def _signed(value: float, relative: bool) -> str:
    return f"{100 * value:+.3g} %" if relative else f"{value:+.3g}"


def _span(of: Interval) -> str:
    return f"{of.estimate:.4g}" + (f" ({of.low:.4g} to {of.high:.4g})" if of.known else "")
