"""A terminal that shows what is under way: a line for each task, below all that is printed."""

import math
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mlx_qlora import progress
from mlx_qlora.after.plots import in_kernel
from mlx_qlora.errors import duration, visible, warn
from mlx_qlora.progress import Task

EVERY = 0.25  # seconds between two looks
BAR, LEAST_BAR = 30, 8  # characters
LABEL = 10  # characters of what a line is about
SILENCE, LONGEST_SILENCE = 30, 600  # seconds between two lines where there is no terminal
LONGEST = 1e5 * 86400  # seconds; a longer time left is shown as this
PLAIN = str.maketrans("━─▼▲", "=-v^")

# ---- lines ---------------------------------------------------------------------------------------


def task_line(task: Task, width: int) -> str:
    """What, a bar, how many, as many figures as there is room for, and how long."""
    seconds, kind = min(task.seconds_left, LONGEST), "left"
    if math.isnan(seconds):
        seconds, kind = progress.now() - task.began, "so far"
    when = f"{timedelta(seconds=round(seconds))} {kind}"
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
    return f"{task.what + ' ':<{LABEL}}{bar}  {'  '.join([*pieces, when])}"[: width - 1]


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


def drawn(line: str, console: Console) -> str:
    """A line with the bars and arrows that a console's encoding has."""
    return line if console.encoding.startswith("utf") else line.translate(PLAIN)


def folded(words: Sequence[str], width: int, indent: int = 0) -> str:
    """A command for a shell, over as many lines as its words need; a word stays as it is."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return f" \\\n{' ' * indent}".join(lines)


# ---- the thread ----------------------------------------------------------------------------------


class Screen:
    """Shows the tasks on a terminal, and calls a follower several times a second."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.follower: Callable[[], None] = lambda: None
        self._live: Live | None = None
        self._lock, self._failed = threading.Lock(), False
        self._silence, self._next = SILENCE, progress.now() + SILENCE

    def tick(self) -> None:
        """Look once: the follower first, then the lines of the tasks."""
        self._show(self._look)

    def clear(self) -> None:
        """Take the lines away: what is printed next may not go through the console."""
        self._show(self._erase)

    def _show(self, part: Callable[[], None]) -> None:
        """Do a part; one that fails is the last, and neither ends the run nor hides its end."""
        with self._lock:
            try:
                if not self._failed:
                    part()
            except Exception as error:
                self._failed = True
                with suppress(Exception):
                    self._erase()
                with suppress(Exception):
                    warn(self.console, f"progress is not shown any more: {error!r}")

    def _look(self) -> None:
        self.follower()
        console, under_way = self.console, progress.tasks()
        if not under_way or console.quiet:
            return
        if not console.is_terminal:
            if progress.now() >= self._next and not in_kernel():
                task = under_way[0]
                of, left = f" of {task.total:,.0f}" * bool(task.total), task.seconds_left
                count = f"{task.done:,.0f}{of} {task.unit}".rstrip()
                left = "" if math.isnan(left) else f", about {duration(left)} left"
                sys.stderr.write(visible(f"mlx-qlora: {task.what} {count}{left}\n"))
                self._silence = min(2 * self._silence, LONGEST_SILENCE)
                self._next = progress.now() + self._silence
            return
        lines = [drawn(task_line(task, console.width), console) for task in under_way]
        if self._live is None:
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(
            Group(*(Text(visible(line), no_wrap=True) for line in lines)), refresh=True
        )

    def _erase(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


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
