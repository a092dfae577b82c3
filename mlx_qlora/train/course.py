"""What lies before a run: how often it goes through its rows, and whether that makes sense."""

import math
from dataclasses import dataclass

from mlx_qlora.data.batches import Batches
from mlx_qlora.train.config import TrainingConfig

MANY, USUAL = 20, 3  # passes that learn rows by heart, and that are a start


@dataclass(frozen=True)
class Course:
    """The length of a run.

    Attributes:
        steps: optimiser steps.
        examples: to learn from.
        passes: how often each of them is seen, as a fraction.
        warmup_steps: through which the rate rises.
        by_passes: whether the config says how many passes, and not how many steps.
    """

    steps: int
    examples: int
    passes: float
    warmup_steps: int
    by_passes: bool = False

    def __str__(self) -> str:
        passes = f"{self.passes:,.0f}" if self.passes >= 10 else f"{self.passes:.2f}"
        return f"{self.steps:,} steps: {passes} passes over {self.examples:,} examples"

    @property
    def warnings(self) -> list[str]:
        """What is most likely not meant, with the remedy."""
        found = []
        if self.warmup_steps >= self.steps > 1:
            found.append(
                f"training.warmup_steps={self.warmup_steps} is all of the run's {self.steps:,} "
                "steps, so the learning rate hardly gets where it should; set "
                f"training.warmup_steps={self.steps // 10}"
            )
        if self.passes > MANY:
            usual = math.ceil(self.steps / self.passes * USUAL)
            fewer = f"num_train_epochs={USUAL}" if self.by_passes else f"max_steps={usual}"
            found.append(
                f"{self.passes:,.0f} passes over {self.examples:,} examples learn them by heart; "
                f"set training.{fewer}, which is {USUAL} passes, or collect more rows"
            )
        return found


def course_of(training: TrainingConfig, batches: Batches, examples: int) -> Course:
    """How long a run on these batches is."""
    passes = batches.epoch(training.micro_batches(batches))
    by_passes = training.num_train_epochs is not None
    return Course(training.total_steps(batches), examples, passes, training.warmup_steps, by_passes)
