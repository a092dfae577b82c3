"""What is being done and how far it is: the work counts, and who started it may show that.

Nothing is printed here. `after/screen.py` shows the tasks on a terminal.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
now = time.monotonic  # seconds of a clock that never goes back
RECENT = 200  # units that a pace is measured over: a machine may get slower, or faster


@dataclass(eq=False)
class Task:
    """Something under way."""

    what: str  # in a word or two: "validating"
    total: float  # units; 0 if that is not known
    unit: str = ""  # "rows"
    done: float = 0.0
    figures: Sequence[str] = ()  # of the last unit, the most important first
    beyond: Callable[[], float] = float  # seconds of what comes besides, as validations of a run
    began: float = field(default_factory=lambda: now())
    elsewhere: float = 0.0  # seconds that tasks within this one took
    paused: float | None = None  # since when one of them is under way
    _paces: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def __post_init__(self) -> None:
        self._paces.append((0.0, self.done))

    def advance(self, units: float = 1) -> None:
        """Count units that were done."""
        self.done += units
        self._paces.append((self._busy(), self.done))

    @property
    def pace(self) -> float:
        """Seconds of a unit, without the tasks within it; NaN before there is any."""
        (start, first), (end, last) = self._paces[0], self._paces[-1]
        return (end - start) / (last - first) if last > first else math.nan

    @property
    def seconds_left(self) -> float:
        """Until all is done, with what comes besides; NaN if that is not known yet."""
        since_last = self._busy() - self._paces[-1][0]
        own = self.pace * (self.total - self.done) - since_last
        return max(own, 0.0) + self.beyond() if self.total and own == own else math.nan

    def _busy(self) -> float:
        return (now() if self.paused is None else self.paused) - self.began - self.elsewhere


_under_way: list[Task] = []
latest: dict[str, Task] = {}  # by what they are; a short one is over before anybody looks
idle: list[Callable[[], None]] = []  # called when nothing is under way any more


def tasks() -> list[Task]:
    """What is under way, each within the one before it."""
    return [*_under_way]


@contextmanager
def doing(what: str, total: float = 0, unit: str = "", done: float = 0) -> Iterator[Task]:
    """Say that something is under way, and lend the task to count on."""
    around, task = _under_way[-1:], Task(what, total, unit, done)
    for outer in around:
        outer.paused = task.began
    _under_way.append(task)
    latest[what] = task
    try:
        yield task
    finally:
        _under_way.remove(task)
        for outer in around:
            outer.elsewhere += now() - task.began
            outer.paused = None
        for listener in [*idle] if not _under_way else []:
            listener()


def each(work: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """The same, one by one, as a task."""
    with doing(what, len(work), unit) as task:
        for item in work:
            yield item
            task.advance()
