"""On which cores tests run, and how threads take turns there.

Threads of a tiny model wait for each other's sums most of the time, and keep a core busy meanwhile:
on one core a short run takes a third of the CPU time that it takes on two. There the thread that
computes would interrupt the one that writes the graph at each operation; as a batch it waits until
that one does, and a short run has a fortieth of the switches, and takes two thirds of the time.
"""

import contextlib
import os
from collections.abc import Iterator

CAN_CHOOSE = hasattr(os, "sched_setaffinity")  # not on macOS
ALLOWED = sorted(os.sched_getaffinity(0)) if CAN_CHOOSE else []


def stay_on_core(number: int) -> None:
    """Keeps this process, and those it starts, on one core, counted around, as batches."""
    if CAN_CHOOSE:
        os.sched_setaffinity(0, {ALLOWED[number % len(ALLOWED)]})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """What is started within stays on this core, counted around."""
    before = os.sched_getaffinity(0) if CAN_CHOOSE else set()
    if CAN_CHOOSE:
        os.sched_setaffinity(0, {ALLOWED[number % len(ALLOWED)]})
    try:
        yield
    finally:
        if CAN_CHOOSE:
            os.sched_setaffinity(0, before)
