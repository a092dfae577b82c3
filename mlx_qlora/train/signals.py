"""Ctrl-C, SIGTERM and a closed terminal end a run after a checkpoint; a second Ctrl-C at once."""

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STOPPING = b"\nstopping: what is under way is finished and saved; a second Ctrl-C would lose it\n"
WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ends a command; what it says, if anything, is what was kept."""

    def __init__(self, signum: int, kept: str = "") -> None:
        self.signum = signum  # the exit code is 128 + signum
        super().__init__(*([f"stopped by {signal.Signals(signum).name}; {kept}"] if kept else []))


class Interrupted(Stopped):
    """A run was stopped by a signal, and has saved what it had if a step was done."""

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        saved = f"saved {checkpoint}" if checkpoint else "no step was finished"
        super().__init__(signum, f"{saved}. The same command continues from there")


def _stop(signum: int, _: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # the next one ends the process at once
    raise Stopped(signum)


@contextmanager
def raised() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP are exceptions, as Ctrl-C is: nothing half-written is left.

    An exception that Python swallows, as in a `__del__`, is raised again a moment later. As long as
    the command line has not begun, Ctrl-C ends the process; so it does after its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _stop, signal.SIGHUP: _stop}
    # And not what `nohup` ignores.
    before = [number for number in usual if signal.getsignal(number) is signal.SIG_DFL]

    def again(lost: Any) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            return ignored(lost)
        number = getattr(lost.exc_value, "signum", signal.SIGINT)
        if number in before:
            signal.signal(number, usual[number])
        threading.Timer(0.01, signal.pthread_kill, [threading.get_ident(), number]).start()

    ignored, sys.unraisablehook = sys.unraisablehook, again
    for number in before:
        signal.signal(number, usual[number])
    try:
        yield
    finally:
        sys.unraisablehook = ignored
        for number in before:
            signal.signal(number, signal.SIG_DFL)


class StopSignal:
    """Within it the first signal is only remembered, and the next one has its usual effect.

    A terminal that is closed (SIGHUP) counts as Ctrl-C, but is not followed by another one.
    Only the main thread may set handlers: elsewhere (a run in a thread of a notebook) signals
    keep their usual effect.
    """

    def __init__(self, agreed: bool = False) -> None:
        self.received: int | None = None  # the signal that came to this process
        # The one that ends the run. A single process stops for its own; several stop for what all
        # have `agreed` on, since none may leave the others waiting.
        self.signum: int | None = None
        self._agreed = agreed
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._open = [descriptor for descriptor in (1, 2) if not _is_file(descriptor)]
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as `command &` leaves SIGINT
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.received = self.received or signum
        if not self._agreed:
            self.signum = self.received
        if signum != signal.SIGHUP:
            self._restore(but=signal.SIGHUP)
            if os.isatty(2):  # somebody waits; as bytes, since a handler may come within a print
                os.write(2, STOPPING)
            return
        # The terminal is gone, or who read our pipe: writing there would fail before the
        # checkpoint is written. What ssh and launchers send after it is no second Ctrl-C.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._open:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _restore(self, but: int | None = None) -> None:
        kept = {number: self._before.pop(number) for number in (but,) if number in self._before}
        for number, handler in self._before.items():
            # None: the handler was set by code that is not Python's, and cannot be put back. And
            # the second SIGTERM ends the process at once.
            is_default = handler is None or (handler is _stop and self.received)
            signal.signal(number, signal.SIG_DFL if is_default else handler)
        self._before = kept


def _is_file(descriptor: int) -> bool:
    """Whether it stays when a terminal is closed; true where there is none, too."""
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return True
