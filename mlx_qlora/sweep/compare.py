"""Is one trial better than another, or does it only look so on these validation examples?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlx_qlora.infer.bootstrap import ratio_interval

# Nats per token. Trials of one seed see the same rows and masks, so that even learning rates of
# 1.0e-7 and 1.1e-7 differ alike on all examples: clear of 0, and of no use to anybody.
WORTH = 1e-3


@dataclass(frozen=True)
class Losses:
    """What each validation example costs a model.

    Attributes:
        nats: (n,) float64, summed over the example's supervised tokens.
        tokens: (n,) int64, how many these are.
    """

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token of all examples, as the validation loss of a run is."""
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Difference:
    """Of two validation losses, in nats per token.

    Attributes:
        mean: the first minus the second.
        low: where its 95 % interval begins.
        high: where that ends.
        leaves_out_zero: whether it does; never if the examples allow no interval.
    """

    mean: float
    low: float
    high: float
    leaves_out_zero: bool

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0, and the difference is at least WORTH."""
        return self.leaves_out_zero and abs(self.mean) >= WORTH


def difference(first: Losses, second: Losses) -> Difference:
    """The difference of two losses on the same examples, with its bootstrap interval.

    Examples are drawn again, the same ones for both, so that what both find hard or easy cancels
    (paired: Koehn 2004, W04-3250). The interval is about the choice of validation examples. Of
    the chance in training, the seed, it knows nothing.
    """
    found = ratio_interval(first.nats - second.nats, first.tokens)
    return Difference(found.estimate, found.low, found.high, not found.includes_zero)


def standard_error(losses: Losses) -> float:
    """Of the mean, over the choice of validation examples; nats per token.

    That of a ratio of sums, to first order (Cochran 1977, Sampling Techniques, section 6.4).
    """
    n = len(losses.nats)
    rest = losses.nats - losses.mean * losses.tokens
    return float(np.sqrt(n / (n - 1) * (rest**2).sum()) / losses.tokens.sum())


def ties(found: Mapping[str, Losses]) -> list[str]:
    """The best of some models, and those that cannot be told from it."""
    best = min(found, key=lambda name: found[name].mean)
    others = {name: difference(losses, found[best]) for name, losses in found.items()}
    return [name for name in found if name == best or not others[name].is_clear]


def in_words(first: str, second: str, found: Difference) -> str:
    """One sentence: which one is better and by how much, or that this cannot be told."""
    better, worse = (first, second) if found.mean < 0 else (second, first)
    # Both ends: the interval reaches farther to the side where single examples differ much.
    ends = sorted((-found.low, -found.high) if found.mean < 0 else (found.low, found.high))
    interval = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends[0] < ends[1] else "not known"
    if not found.is_clear:
        shown = f"difference {abs(found.mean):.4f}, interval {interval}"
        return f"{first} and {second} are indistinguishable here ({shown})"
    return f"{better} is better than {worse} by {abs(found.mean):.4f} ({interval}) nats per token"
