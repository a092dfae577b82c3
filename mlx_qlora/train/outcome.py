"""What one optimiser step was."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What one step was.

    Attributes:
        loss: mean nats per supervised token.
        grad_norm: of the gradient, before clipping.
        tokens: real tokens that were gone through, by all processes.
        rows: of the stream that were gone through, by all processes.
        signum: of a signal that another process has had; None for none, or with one process.
        suspects: the rows of the micro-batches whose loss is not finite, or of all if each loss
            is but the gradient is not.
    """

    loss: float
    grad_norm: float
    tokens: int
    rows: int = 0
    signum: int | None = None
    suspects: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the weights have moved."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)
