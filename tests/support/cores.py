"""On which cores tests run.

Threads of a tiny model wait for each other's sums most of the time, and keep a core busy meanwhile:
on one core a short run takes a third of the CPU time that it takes on two.
"""

import contextlib
import os
from collections.abc import Iterator

CAN_CHOOSE = hasattr(os, "sched_setaffinity")  # not on macOS
ALLOWED = sorted(os.sched_getaffinity(0)) if CAN_CHOOSE else []


def stay_on_core(number: int) -> None:
    """Keeps this process, and those it starts, on one core, counted around."""
    if CAN_CHOOSE:
        os.sched_setaffinity(0, {ALLOWED[number % len(ALLOWED)]})


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """What is started within stays on this core, counted around."""
    before = os.sched_getaffinity(0) if CAN_CHOOSE else set()
    stay_on_core(number)
    try:
        yield
    finally:
        if CAN_CHOOSE:
            os.sched_setaffinity(0, before)
