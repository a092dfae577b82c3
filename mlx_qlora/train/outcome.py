"""What one optimiser step was, or why there was none."""

import math
from dataclasses import dataclass

from mlx_qlora.errors import TrainingError


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


class StepError(TrainingError):
    """A step cannot be taken, or too many were in vain.

    Attributes:
        again: whether another attempt may succeed: it was the device's doing, not the numbers'.
    """

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again
