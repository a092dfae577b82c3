"""What else the processes of a run share: a validation, and where the run goes on."""

import json
import math
from dataclasses import asdict

import mlx.core as mx
import numpy as np

from mlx_qlora.processes import Processes
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.interruption import WATCHED
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.score import Score

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
