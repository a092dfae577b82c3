"""The gradients of a step, summed over the processes of a run while the backward goes on."""

import math
import time
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_qlora.processes import Processes
from mlx_qlora.train.interruption import WATCHED

SMALLEST_BUCKET, MOST_BUCKETS = 4 << 20, 8  # bytes; messages of a step


@dataclass(frozen=True)
class Counts:
    """What all processes have gone through in a step.

    Attributes:
        supervised: tokens that are learned.
        tokens: real ones.
        rows: of the stream.
        signum: of a signal that any process has had; None if none has.
    """

    supervised: int
    tokens: int
    rows: int
    signum: int | None = None

    def with_more(self, supervised: int, tokens: int) -> "Counts":
        """With those of another batch."""
        return replace(self, supervised=self.supervised + supervised, tokens=self.tokens + tokens)


class GradientSum:
    """Sums the gradients of a step over the processes, while the backward goes on.

    The backward makes the last layer's gradients first. As soon as those of some layers are done
    they are sent as one bucket, in an order that is the same in every process.

    Args:
        shapes: of the LoRA weights, by name, from the first layer to the last.
        processes: of the run.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], processes: Processes) -> None:
        self.processes = processes
        self.shapes = shapes
        sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        least = max(SMALLEST_BUCKET, sum(sizes.values()) // MOST_BUCKETS)
        self.buckets: list[list[str]] = [[]]
        for name in reversed(shapes):
            if sum(sizes[other] for other in self.buckets[-1]) >= least:
                self.buckets.append([])
            self.buckets[-1].append(name)
        self.begin()

    def begin(self) -> None:
        """A new step: nothing of it is sent yet."""
        self.sent: list[mx.array] = []
        self.started = time.perf_counter()

    def take(self, grads: dict[str, mx.array], done: set[str]) -> None:
        """Sends the buckets whose gradients are all done.

        What was sent stays sent if the step is computed again in smaller parts: it is the same.
        """
        while len(self.sent) < len(self.buckets):
            bucket = self.buckets[len(self.sent)]
            if not done.issuperset(bucket):
                return
            parts = [grads[name].reshape(-1) for name in bucket]
            self.sent.append(self.processes.summed(mx.concatenate(parts)))

    def finish(
        self, grads: dict[str, mx.array], nats: mx.array, own: Counts
    ) -> tuple[dict[str, mx.array], mx.array, Counts]:
        """(gradients, loss sum, counts) of all processes, once they are all there.

        Raises:
            ProcessError: another process is gone, or has not come in time.
        """
        self.take(grads, set(grads))
        signals = [int(own.signum == number) for number in WATCHED]
        numbers = mx.array([own.supervised, own.tokens, own.rows, *signals], mx.int64)
        counts, nats = self.processes.summed(numbers), self.processes.summed(nats)
        self.processes.worked(time.perf_counter() - self.started)
        self.processes.wait(*self.sent, counts, nats)
        total: dict[str, mx.array] = {}
        for bucket, found in zip(self.buckets, self.sent):
            start = 0
            for name in bucket:
                size = math.prod(self.shapes[name])
                total[name] = found[start : start + size].reshape(self.shapes[name])
                start += size
        supervised, tokens, rows, *had = map(int, np.array(counts))
        signum = next((number for number, n in zip(WATCHED, had) if n), None)
        self.sent = []
        return (
            {name: total[name] for name in self.shapes},
            nats,
            Counts(supervised, tokens, rows, signum),
        )
