"""What the processes of a run share: gradients, validation sums, the state they begin from."""

import json
import math
import time
from dataclasses import asdict

import mlx.core as mx
import numpy as np

from mlx_qlora.distributed import Processes
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.optim import AdamW, unflatten
from mlx_qlora.train.score import Score
from mlx_qlora.train.signals import WATCHED

SMALLEST_BUCKET, MOST_BUCKETS = 4 << 20, 8  # bytes; messages of a step
FIXED = 1 << 20  # parts of a nat, or weight: sums of whole numbers do not depend on their order


class GradientAllReduce:
    """Sums the gradients of a step over the processes, while the backward goes on.

    The backward makes the last layer's gradients first. As soon as those of some layers are done
    they are sent as one bucket, in an order that is the same in every process. The `shapes` are
    those of the LoRA weights, by name, from the first layer to the last.
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

        What was sent stays sent if the step is computed again in smaller pieces: it is the same.
        """
        while len(self.sent) < len(self.buckets):
            bucket = self.buckets[len(self.sent)]
            if not done.issuperset(bucket):
                return
            flat = mx.concatenate([grads[name].reshape(-1) for name in bucket])
            self.sent.append(self.processes.all_sum(flat))

    def wait(
        self,
        grads: dict[str, mx.array],
        nats: mx.array,
        counts: tuple[float, int, int],
        received: int | None,
    ) -> tuple[dict[str, mx.array], mx.array, tuple[float, int, int], int | None]:
        """Waits for the sums over all processes, and returns them in the place of this one's.

        Args:
            grads: of which the rest is sent now.
            nats: the loss sum.
            counts: the weights of the supervised tokens, real tokens, and rows.
            received: a signal; the one returned is one that any process received.
        """
        self.reduce(grads, set(grads))
        counts = round(counts[0] * FIXED), *counts[1:]
        numbers = mx.array([*counts, *_one_hot(received)], mx.int64)
        numbers, nats = self.processes.all_sum(numbers), self.processes.all_sum(nats)
        self.processes.worked(time.perf_counter() - self.started)
        self.processes.wait(*self.sent, numbers, nats)
        total: dict[str, mx.array] = {}
        for bucket, flat in zip(self.buckets, self.sent):
            total |= unflatten(flat, {name: self.shapes[name] for name in bucket})
        self.sent = []
        supervised, tokens, rows, *signals = map(int, np.array(numbers))
        grads = {name: total[name] for name in self.shapes}
        return grads, nats, (supervised / FIXED, tokens, rows), _signal(signals)


def score_of_all(
    score: Score, processes: Processes, took: float, received: int | None
) -> tuple[Score, int | None]:
    """The sums over all processes of what each has scored, and a signal that any received.

    This process `took` so many seconds for its share of the score.
    """
    if processes.size == 1:
        return score, None
    nats, *counts, excess = asdict(score).values()
    counts.append(round(excess * FIXED))
    bits = np.zeros(processes.size)  # everyone's nats, which may be too large for whole numbers
    bits[processes.rank] = nats
    numbers = [*bits.view(np.int64).tolist(), *counts, *_one_hot(received)]
    sums = processes.all_sum(mx.array(numbers, mx.int64))
    if score.tokens:
        processes.worked(took)
    processes.wait(sums)
    bits, numbers = np.split(np.array(sums), [processes.size])
    every, n = bits.view(np.float64).tolist(), len(counts)
    are_finite = all(map(math.isfinite, every))
    nats = sum(round(x * FIXED) for x in every) / FIXED if are_finite else sum(every)
    *whole, excess = numbers[:n].tolist()
    return Score(nats, *whole, excess=excess / FIXED), _signal(numbers[n:].tolist())


def _one_hot(received: int | None) -> list[int]:
    return [int(received == number) for number in WATCHED]


def _signal(counts: list[int]) -> int | None:
    return next((number for number, n in zip(WATCHED, counts) if n), None)


def broadcast_state(state: RunState, optimizer: AdamW, processes: Processes) -> RunState:
    """Rank 0's state, with its weights and moments put into the optimizer.

    Only rank 0 need have the checkpoint; and whatever was drawn or decomposed on other machines,
    all begin with the same bits.
    """
    if processes.size == 1:
        return state
    text = processes.broadcast(json.dumps(asdict(state)).encode())
    if not processes.is_first:  # whose history is being shown
        state = RunState(**json.loads(text))
    for name in ("weights", "mean", "square"):
        setattr(optimizer, name, processes.broadcast_array(getattr(optimizer, name)))
    optimizer.step = state.updates
    return state
