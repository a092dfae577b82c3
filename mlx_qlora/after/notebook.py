"""Plots that move while a notebook trains.

Training is not touched for it: a thread reads the lines that it adds to `metrics.jsonl`, and
redraws at most once a second. Without a Jupyter kernel nothing is started.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_qlora.after.plots import STYLE, figures, plots_of

# ---- in a notebook -------------------------------------------------------------------------------


EVERY = 1.0  # seconds


@contextmanager
def live_plots(metrics: Path, warmup: int = 0) -> Iterator[None]:
    """Shows the plots of a growing `metrics.jsonl` below the cell that trains, if there is one.

    Args:
        metrics: the file; it need not exist yet, and may be written anew.
        warmup: steps of the warmup, to be marked.
    """
    if not in_kernel():
        yield
        return
    from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

    tail, done = Tail(metrics), threading.Event()
    shown: Any = display(HTML(_drawn(tail.records, warmup)), display_id=True)

    def watch() -> None:
        while not done.wait(EVERY):
            if tail.read():
                shown.update(HTML(_drawn(tail.records, warmup)))

    thread = threading.Thread(target=watch, name="live plots", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if tail.read():
            shown.update(HTML(_drawn(tail.records, warmup)))


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel; IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Tail:
    """The whole lines of a JSONL file that grows, or begins anew.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, list[dict[str, Any]]()
        self._at, self._file = 0, 0

    def read(self) -> bool:
        """Takes what was added since the last call; returns whether that was anything."""
        try:
            with open(self.path, "rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self._file or about.st_size < self._at:
                    self.records, self._at, self._file = [], 0, about.st_ino
                file.seek(self._at)
                added = file.read()
        except FileNotFoundError:
            return False
        whole = added[: added.rfind(b"\n") + 1]
        self._at += len(whole)
        self.records += [json.loads(line) for line in whole.splitlines()]
        return bool(whole)


def _drawn(history: list[dict[str, Any]], warmup: int) -> str:
    steps = [record["step"] for record in history]
    told = f"step {steps[-1]:,}" if steps else "waiting for the first figures"
    return (
        f'<div class="mq"><style>{STYLE}</style><div style="padding:1rem">'
        f'<p class="quiet">{told}</p>{figures(plots_of(history, warmup))}</div></div>'
    )
