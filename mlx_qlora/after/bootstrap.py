"""How sure a mean over examples is: bootstrap confidence intervals, all of one form.

Every figure of an evaluation is a ratio of two sums over examples, r = sum(y) / sum(x): a mean has
x = 1, a loss has nats over tokens, a paired difference has the difference of two models' sums. So
examples are drawn again with replacement, and both sums are taken anew (Efron & Tibshirani 1993,
"An Introduction to the Bootstrap"). Tokens are not drawn: those of one answer hang together.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from mlx_qlora.errors import DataError, require

RESAMPLES = 4000  # the ends of an interval then vary by a few percent of its width with the seed


FEWEST = 8  # examples; below this quantiles of resamples say hardly anything


AT_ONCE = 1 << 21  # draws that exist at once


# The least error of a resample over the greatest, for studentised intervals. Where a few examples
# carry the change, a resample without them has hardly any spread, and what is divided by that
# reaches far beyond every example. In 2,000 sets each of n = 20, 6 % of log-normal ones are below
# and lose no coverage.
LEAST_SPREAD = 0.05


STUDENTISED, BCA, NONE = "studentised", "bca", "none"


@dataclass(frozen=True)
class Interval:
    """An estimate and how far it may be off.

    In simulations with skewed examples, log-normal among them, intervals of level 0.95 held the
    true value in 94 to 95.5 % of 6,000 sets, of n = 20, 50 and 200 alike. For figures of 0 and 1
    that seldom differ, n = 20 gives some 90 %. Where one example in ten changes and the rest hardly
    move, n = 20 gives 85 %, n = 50 96 %; if such changes go either way, 80 % of both: what was not
    seen, no resample knows.

    Attributes:
        estimate: sum(y) / sum(x) of the examples.
        low: lower end; `estimate` where nothing could be said.
        high: upper end.
        n: examples.
        level: the share of such intervals that hold the true value, 0 to 1.
        method: `studentised`; `bca` where most examples are equal or nearly so, and a resample may
            have hardly any spread to divide by; `none` where all are equal or there are fewer than
            FEWEST.
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float
    method: str

    @property
    def known(self) -> bool:
        """Whether the examples allow an interval at all."""
        return self.method != NONE

    @property
    def includes_zero(self) -> bool:
        """Whether 0 is as good a value as the estimate; true where no interval is known."""
        return not self.known or self.low <= 0 <= self.high

    def mapped(self, function: Callable[[float], float]) -> "Interval":
        """The same interval of an increasing function of the figure (exp of a loss)."""
        estimate, low, high = (function(x) for x in (self.estimate, self.low, self.high))
        return Interval(estimate, low, high, self.n, self.level, self.method)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; the ends are null where no interval is known."""
        known = {} if self.known else {"low": None, "high": None}
        return asdict(self) | known


def ratio_interval(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The interval of sum(values) / sum(weights), examples resampled.

    Studentised (Efron & Tibshirani 1993, ch. 12): of each resample (r* - r) / se*, with the
    linearised standard error of a ratio, so that the skew of the data moves both ends; the error
    of r itself is the jackknife's, which sees single examples of great weight. Where some resample
    has hardly any spread (all but a few examples are nearly equal) it is BCa (ch. 14), which
    divides by nothing, and stays within the range of the examples. Both take wider tails than asked
    for, as resamples of few examples are too narrow (Hesterberg 2015, arXiv 1411.5279, "expanded"
    intervals).

    Args:
        values: (n,) y of each example, for a paired difference tuned minus base.
        weights: (n,) x of each example, above 0; None for a mean.
        level: of confidence, in (0, 1).
        seed: of the resamples; the same seed gives the same interval.
        resamples: how many.

    Raises:
        DataError: no examples, or values that are not finite.
        ConfigError: a level or a number of resamples that makes no sense.
    """
    require(0 < level < 1, "level", "be in (0, 1)", level)
    require(resamples >= 100, "resamples", "be at least 100", resamples)
    y = np.asarray(values, np.float64)
    x = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    if not len(y):
        raise DataError("there are no examples to draw an interval from")
    if not (np.isfinite(y).all() and np.isfinite(x).all() and x.min() > 0):
        raise DataError("a score of an example is not finite, or its weight is not above 0")
    n, ratio = len(y), float(y.sum() / x.sum())
    # What is left of an example: 0 in all means that every one has the same ratio.
    rest = y - ratio * x
    if n < FEWEST or np.abs(rest).max() <= 1e-12 * max(1.0, np.abs(y).max()):
        return Interval(ratio, ratio, ratio, n, level, NONE)

    moved, errors = _resampled(rest, x, resamples, np.random.default_rng(seed))
    tail = _expanded((1 - level) / 2, n)
    without = -rest / (x.sum() - x)  # r of all but one example, less r
    if errors.min() > LEAST_SPREAD * errors.max():
        error = math.sqrt(((without - without.mean()) ** 2).sum() * (n - 1) / n)
        ends = np.quantile(moved / errors, (tail, 1 - tail))
        low, high = ratio - ends[1] * error, ratio - ends[0] * error
        return Interval(ratio, float(low), float(high), n, level, STUDENTISED)
    low, high = np.quantile(moved, _bca_tails(moved, without, (tail, 1 - tail))) + ratio
    return Interval(ratio, float(low), float(high), n, level, BCA)


def _resampled(
    rest: np.ndarray, x: np.ndarray, resamples: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Of each resample r* - r and the standard error of r*, both (resamples,)."""
    n = len(rest)
    columns = np.stack([rest, x, rest**2, rest * x, x**2], axis=1)
    sums = []
    size = max(1, AT_ONCE // n)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = random.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums.append(counts.astype(np.float64) @ columns)
    e, w, ee, ew, ww = np.concatenate(sums).T
    moved = e / w
    squares = np.maximum(ee - 2 * moved * ew + moved**2 * ww, 0)
    return moved, np.sqrt(squares * n / (n - 1)) / w


def _expanded(tail: float, n: int) -> float:
    """The tail to take of resamples of n, so that they are as wide as Student's t is."""
    normal, f = NormalDist(), n - 1
    z = -normal.inv_cdf(tail)
    # Student's quantile for f degrees of freedom, by Cornish and Fisher's series.
    t = z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
    return normal.cdf(-t * math.sqrt(n / f))


def _bca_tails(moved: np.ndarray, without: np.ndarray, tails: tuple[float, float]) -> list[float]:
    """The quantiles to take instead of `tails`, corrected for bias and skew.

    Args:
        moved: (resamples,) r* - r.
        without: (n,) r without each example, less r.
        tails: as they would be of a symmetric figure.
    """
    normal = NormalDist()
    share = float((moved < 0).mean() + (moved == 0).mean() / 2)
    bias = normal.inv_cdf(min(max(share, 1e-6), 1 - 1e-6))
    skew = without.mean() - without
    acceleration = float((skew**3).sum() / (6 * (skew**2).sum() ** 1.5))
    found = []
    for tail in tails:
        z = bias + normal.inv_cdf(tail)
        found.append(normal.cdf(bias + z / (1 - acceleration * z)))
    return found
