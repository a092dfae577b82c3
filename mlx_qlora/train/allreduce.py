"""What the processes of a run share: gradients, validation losses, decisions."""

import json
import math
import time
from dataclasses import asdict, dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_qlora.distributed import Processes
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.score import Score
from mlx_qlora.train.signals import WATCHED

# ---- gradients -----------------------------------------------------------------------------------


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


class GradientAllReduce:
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

    def reduce(self, grads: dict[str, mx.array], done: set[str]) -> None:
        """Sends the buckets whose gradients are all done.

        What was sent stays sent if the step is computed again in smaller parts: it is the same.
        """
        while len(self.sent) < len(self.buckets):
            bucket = self.buckets[len(self.sent)]
            if not done.issuperset(bucket):
                return
            parts = [grads[name].reshape(-1) for name in bucket]
            self.sent.append(self.processes.summed(mx.concatenate(parts)))

    def wait(
        self, grads: dict[str, mx.array], nats: mx.array, own: Counts
    ) -> tuple[dict[str, mx.array], mx.array, Counts]:
        """(gradients, loss sum, counts) of all processes, once they are all there.

        Raises:
            ProcessError: another process is gone, or has not come in time.
        """
        self.reduce(grads, set(grads))
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


# ---- everything else -----------------------------------------------------------------------------


FIXED = 1 << 20  # parts of a nat: sums of whole numbers do not depend on their order


def score_of_all(
    own: Score,
    processes: Processes,
    took: float,
    came: int | None = None,
    seconds: float | None = None,
) -> tuple[Score, int | None]:
    """The sums over all processes of what each has scored of a set.

    Args:
        own: of this process's share.
        processes: of the run.
        took: seconds that this needed.
        came: a signal that this process has had.
        seconds: how long to wait for the others; as `Processes.wait` if not given.

    Returns:
        The sums; and a signal that any process has had, or None.

    Raises:
        ProcessError: another process is gone, or has not come in time.
    """
    if processes.size == 1:
        return own, None
    nats, *counts = asdict(own).values()
    whole = [round(nats * FIXED), 0] if math.isfinite(nats) else [0, 1]
    signals = [int(came == number) for number in WATCHED]
    told = processes.summed(mx.array([*whole, *counts, *signals], mx.int64))
    if own.tokens:
        processes.worked(took)
    processes.wait(told, seconds=seconds)
    nats, spoilt, *numbers = map(int, np.array(told))
    counts, had = numbers[: len(counts)], numbers[len(counts) :]
    signum = next((number for number, n in zip(WATCHED, had) if n), None)
    return Score(math.nan if spoilt else nats / FIXED, *counts), signum


def from_first(state: RunState, optimizer: AdamW, processes: Processes) -> RunState:
    """Rank 0's state, with its weights and moments put into the optimizer.

    Only rank 0 need have the checkpoint; and whatever was drawn or decomposed on other machines,
    all begin with the same bits.
    """
    if processes.size == 1:
        return state
    state = RunState(**json.loads(processes.from_first(json.dumps(asdict(state)).encode())))
    weights_from_first(optimizer, processes)
    optimizer.mean = processes.array_from_first(optimizer.mean)
    optimizer.square = processes.array_from_first(optimizer.square)
    optimizer.step = state.updates
    return state


def weights_from_first(optimizer: AdamW, processes: Processes) -> None:
    """Rank 0's weights, in every process."""
    optimizer.weights = processes.array_from_first(optimizer.weights)
