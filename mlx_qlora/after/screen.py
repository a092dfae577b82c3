"""A terminal that shows what is under way: a line for each task, below all that is printed.

One thread does it, and whatever else follows a run: the table, the report, the notebook.
"""

import math
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mlx_qlora import progress
from mlx_qlora.progress import Task

EVERY = 0.25  # seconds between two looks
BAR, LEAST_BAR = 30, 8  # characters
LABEL = 10  # characters of what a line is about

# ---- lines ---------------------------------------------------------------------------------------


def task_line(task: Task, width: int) -> str:
    """What, a bar, how many, as many figures as there is room for, and how long."""
    left = task.seconds_left
    known, so_far = left == left, progress.now() - task.began
    when = f"{timedelta(seconds=round(left if known else so_far))} {'left' if known else 'so far'}"
    count = f"{task.done:,.0f}"
    if task.total:
        count = f"{count}/{task.total:,.0f}"
    pieces = [f"{count} {task.unit}".rstrip()]
    room = width - 1 - max(LABEL, cell_len(task.what) + 1) - LEAST_BAR - len(pieces[0] + when) - 4
    for figure in task.figures:
        if len(figure) + 2 > room:
            break
        pieces.append(figure)
        room -= len(figure) + 2
    size = min(BAR, LEAST_BAR + max(room, 0))
    full = round(size * min(task.done / task.total, 1)) if task.total else 0
    bar = "━" * full + "─" * (size - full)
    line = f"{task.what + ' ':<{LABEL}}{bar}  {'  '.join([*pieces, when])}"
    return line[: width - 1]


COLUMNS = {"step": 8, "epoch": 6, "examples": 9, "train loss": 10, "val loss": 9}
COLUMNS |= {"lr": 9, "tok/s": 7, "memory": 9}
HEAD = " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def table_row(record: dict[str, Any], before: float = math.nan) -> str:
    """A record of `metrics.jsonl` below HEAD; `before` is the validation loss before this one."""
    cells = {"step": f"{record['step']:,}", "epoch": f"{record['epoch']:.2f}"}
    if "loss" in record:
        cells["examples"] = f"{record['examples']:,}"
        cells["train loss"] = f"{record['loss']:.4f}"
        cells["lr"] = f"{record['learning_rate']:.2e}"
        cells["tok/s"] = f"{record['tokens_per_second']:,.0f}"
        cells["memory"] = f"{record['peak_memory_bytes'] / 1e9:.2f} GB"
    if "eval_loss" in record:
        loss = record["eval_loss"]
        arrow = "▼" if loss < before else "▲" if loss > before else " "
        cells["val loss"] = f"{loss:.4f} {arrow}"
    return " ".join(f"{cells.get(name, ''):>{width}}" for name, width in COLUMNS.items()).rstrip()


def folded(words: Sequence[str], width: int) -> str:
    """A command for a shell, over as many lines as its words need."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


# ---- the thread ----------------------------------------------------------------------------------


class Screen:
    """Shows the tasks on a terminal, and calls a follower several times a second."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._follower: Callable[[], None] = lambda: None
        self._live: Live | None = None
        self._lock = threading.Lock()

    def tick(self) -> None:
        """Look once: the follower first, then the lines of the tasks."""
        with self._lock:
            self._follower()
            if not (under_way := progress.tasks()) or not self.console.is_terminal:
                return
            width = self.console.width
            lines = [Text(task_line(task, width), no_wrap=True) for task in under_way]
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Group(*lines), refresh=True)

    @contextmanager
    def following(self, follower: Callable[[], None]) -> Iterator[None]:
        """Call a function at each look, and once more at the end."""
        self._follower = follower
        try:
            yield
        finally:
            self.tick()
            with self._lock:
                self._follower = lambda: None

    def clear(self) -> None:
        """Take the lines away: what is printed next may not go through the console."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None


_shown: list[Screen] = []


@contextmanager
def shown(console: Console) -> Iterator[Screen]:
    """A screen whose thread runs; the one that there is already, if there is one."""
    if _shown:
        yield _shown[0]
        return
    screen, ended = Screen(console), threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY):
            screen.tick()

    thread = threading.Thread(target=watch, name="screen", daemon=True)
    _shown.append(screen)
    progress.idle.append(screen.clear)
    thread.start()
    try:
        yield screen
    finally:
        ended.set()
        thread.join()
        screen.clear()
        progress.idle.remove(screen.clear)
        _shown.remove(screen)
