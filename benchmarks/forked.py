"""Commands in processes that are forked from one that has imported everything.

Each is a process of its own, as a user's is, without the seconds that imports take. The parent
must compute nothing: MLX's threads do not live on in a child.
"""

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
warmed = False  # whether `warm` was called


def warm() -> None:
    """Imports all that a command may import, with one thread for each matmul."""
    global warmed
    warmed = True
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.modules.setdefault("torch", None)  # transformers, which mlx-lm imports, would load it
    sys.path.insert(0, str(ROOT))
    import mlx_qlora

    for module in pkgutil.walk_packages(mlx_qlora.__path__, "mlx_qlora."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("gguf", "gguf.quants", "rich.table", "jinja2", "huggingface_hub"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    mlx_qlora.device.mlx_lm("generate")
    # How fast the machine is decides nothing but what is said, and takes a third of a short run.
    mlx_qlora.device._median_seconds = lambda compute: 1e-3
    threads = Path("/proc/self/task")
    assert not threads.is_dir() or len([*threads.iterdir()]) == 1, "a thread would not be forked"


@dataclass
class Done:
    """How a command ended."""

    code: int  # negative: the signal that killed it
    out: str
    err: str


class Forked:
    """The command line in a process of its own.

    Args:
        words: of the command.
        prepare: called in it before the command; what it returns, if anything, is called after.
        environ: set in it besides.
    """

    def __init__(
        self,
        words: Sequence[str],
        prepare: Callable[[], Callable[[], None] | None] | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number, file in enumerate(self.files, 1):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ.update(environ or {})
                after = prepare() if prepare else None
                code = _main([*words])
                if after:
                    after()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends it a signal, unless it has ended."""
        if not self.ended():
            os.kill(self.pid, signum)

    def said(self) -> str:
        """What it has written to standard error so far; the place where it writes stays."""
        return os.pread(self.files[1].fileno(), 1 << 20, 0).decode()

    def wait(self, seconds: float = 300) -> Done:
        """Waits for its end; after so many seconds it is killed, with an AssertionError."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"it still ran after {seconds:.0f} s: {self._texts()}")
            time.sleep(0.002)
        assert self.code is not None
        return Done(self.code, *self._texts())

    def _texts(self) -> list[str]:
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
        return texts


def _main(words: list[str]) -> int:
    main: Any = importlib.import_module("mlx_qlora.cli").main
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)
