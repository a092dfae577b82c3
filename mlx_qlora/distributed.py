"""Several processes that train one model, by MLX's own collectives (`mx.distributed`).

`mlx.launch` starts them; nothing here opens a connection. Rank 0 alone writes, prints and decides
what to go on from, and sends what it decides to the others, so that all hold the same bits. Every
process goes through the same collectives in the same order: otherwise they would wait for each
other in vain. Where one is lost or too slow, the others give up with a message.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_qlora import device
from mlx_qlora.errors import PATIENCE, ConfigError, ProcessError, UserError, listing, waiting
from mlx_qlora.folders import in_words

# What launchers leave in the environment: mlx.launch, Open MPI, MPICH.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
LOCALLY = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")  # processes on the same machine

# Seconds that others are waited for: while all prepare or the first one writes, and in a run beyond
# ten times what this process's own longest piece of work took (machines may differ).
TO_BEGIN, AT_LEAST, TIMES = 1800.0, 20.0, 10.0
RING_PADS = 1024  # bytes: MLX's ring takes an array of fewer elements than processes up to here
WORDS = 2048  # bytes of a message that a process sends to the others
T = TypeVar("T")


class Processes:
    """The processes of a run."""

    def __init__(self, group: mx.distributed.Group | None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()  # of this process
        self.size = 1 if group is None else group.size()
        self.sent_bytes = 0  # of all arrays that were handed to the collectives so far
        self.longest = 0.0  # seconds of this process's longest piece of work
        # A stream of its own: sums travel while the device computes, and one that never arrives
        # holds up nothing else.
        device = mx.gpu if "NCCL_HOST_IP" in os.environ else mx.cpu  # as mlx.launch sets it
        self._stream = mx.cpu if group is None else mx.new_stream(device)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    # ---- collectives ---------------------------------------------------------------------------

    def all_sum(self, array: mx.array) -> mx.array:
        """The sum over all processes, started but not waited for.

        The ring sends from the CPU, whatever the device, and unified memory needs nothing else;
        NCCL sends from the GPU. All processes add in the same order, and so get the same bits. A
        ProcessError if another process is gone; without memory a RuntimeError, and nothing is sent.
        """
        if self._group is None:
            return array
        if array.size < self.size and array.itemsize * self.size > RING_PADS:
            rest = mx.zeros(self.size - array.size, array.dtype)
            return self.all_sum(mx.concatenate([array.reshape(-1), rest]))[: array.size].reshape(
                array.shape
            )
        mx.async_eval(array)  # what fails here is this process's own
        try:
            total = mx.distributed.all_sum(array, group=self._group, stream=self._stream)
            mx.async_eval(total)
        except RuntimeError as error:
            if device.is_out_of_memory(str(error)):
                raise
            # The sum before this one has failed by now.
            self._give_up(f"another process is gone ({error})")
        self.sent_bytes += array.nbytes
        return total

    def wait(self, *arrays: mx.array, seconds: float | None = None) -> None:
        """Waits for sums: so many seconds, else as long as this process's own work suggests.

        A ProcessError if another process is gone, or does not answer in time.
        """
        limit = seconds or (AT_LEAST + TIMES * self.longest if self.longest else TO_BEGIN)
        who = f"another process, says {self.rank} of {self.size}, for at most {limit:.0f} s"
        try:  # MLX itself waits without an end, and without letting signals through
            in_time(lambda: mx.eval(arrays), limit, who)
        except TimeoutError:
            self._give_up(f"another process did not answer within {limit:.0f} s")
        except Exception as error:
            self._give_up(f"another process is gone ({error})")

    def worked(self, seconds: float) -> None:
        """Remembers how long this process worked between two collectives."""
        self.longest = max(self.longest, seconds)

    def _give_up(self, reason: str) -> NoReturn:
        atexit.register(_leave)
        raise ProcessError(f"process {self.rank} of {self.size}: {reason}") from None

    # ---- agreement -----------------------------------------------------------------------------

    def agree(self, work: Callable[[], T]) -> T:
        """Does some work in every process; an error in any of them is one in all."""
        if self._group is None:
            return work()
        error, result = None, None
        try:
            result = work()
        except (UserError, OSError) as raised:
            error = raised if isinstance(raised, UserError) else ProcessError(in_words(raised))
        messages = self.gather("" if error is None else str(error))
        if error is not None:
            error.is_shared = True  # rank 0 prints it
            raise error
        if failed := [rank for rank, message in enumerate(messages) if message]:
            raise ProcessError(f"process {failed[0]}: {messages[failed[0]]}", is_shared=True)
        return result  # pyright: ignore[reportReturnType]

    def gather(self, message: str) -> list[str]:
        """Every process's message, by rank; cut to `WORDS` bytes."""
        page = np.zeros((self.size, WORDS), np.uint8)
        line = message.encode()[:WORDS]
        page[self.rank, : len(line)] = np.frombuffer(line, np.uint8)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in self._sum_now(page)]

    def must_equal(self, facts: dict[str, Any]) -> None:
        """Refuses processes whose facts (name -> value, as JSON has it) differ, naming them."""
        if self._group is None:
            return
        text = json.dumps(facts).encode()
        ours, firsts = json.loads(text), json.loads(self.broadcast(text))
        names = [name for name in {**firsts, **ours} if ours.get(name) != firsts.get(name)]
        unlike = [f"{n} is {ours.get(n)}, in process 0 {firsts.get(n)}" for n in names]
        messages = self.gather("; ".join(unlike))
        if any(messages):
            lines = [f"in process {rank} {words}" for rank, words in enumerate(messages) if words]
            raise ProcessError(
                f"the processes differ: {listing(lines)}\n"
                "every process needs the same settings, rows, model and versions",
                is_shared=True,
            )

    def broadcast(self, content: bytes) -> bytes:
        """Rank 0's bytes, in every process."""
        if self._group is None:
            return content
        size = self._sum_now(np.array([len(content) if self.is_first else 0], np.int64))
        page = np.zeros(size[0], np.uint8)
        if self.is_first:
            page[:] = np.frombuffer(content, np.uint8)
        return bytes(self._sum_now(page))

    def broadcast_array(self, array: mx.array) -> mx.array:
        """Rank 0's float32 array, bit for bit, in every process; all have one of that shape."""
        if self._group is None:
            return array
        bits = array.view(mx.uint32)  # as numbers, -0.0 would become 0.0
        bits = self.all_sum(bits if self.is_first else mx.zeros_like(bits))
        self.wait(bits, seconds=TO_BEGIN)
        return bits.view(array.dtype)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums of float64 over all processes; as two float32 each, as there may be no float64."""
        if self._group is None:
            return values
        with np.errstate(over="ignore"):
            high = values.astype(np.float32)
        rest = np.subtract(values, high, where=np.isfinite(high), out=np.zeros_like(values))
        pair = np.stack([high, rest.astype(np.float32)])
        return self._sum_now(pair).astype(np.float64).sum(axis=0)

    def _sum_now(self, numbers: np.ndarray) -> np.ndarray:
        total = self.all_sum(mx.array(numbers))
        self.wait(total, seconds=TO_BEGIN)
        return np.array(total)

    # ---- lines ---------------------------------------------------------------------------------

    def console(self, output: Path, console: Console) -> Console:
        """Where this process prints: rank 0 as asked, the others into their own file."""
        if self.is_first:
            return console
        place = output / f"rank-{self.rank}.log"
        try:
            output.mkdir(parents=True, exist_ok=True)
            if place.is_symlink():  # which is not ours to write through
                place.unlink()
            return Console(file=place.open("a", encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"checkpointing.output_dir: {place} cannot be made ({error.strerror}); choose a "
                "folder that every machine can write to with --output-dir"
            ) from None


def in_time(work: Callable[[], T], seconds: float, who: str) -> T:
    """What some work in a thread of its own returns, or a `TimeoutError`.

    The thread then goes on, and ends with the process; that of an executor would be waited for. A
    wait that takes long says `who` is waited for.
    """
    future: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as cause:
            future.set_exception(cause)

    threading.Thread(target=run, daemon=True).start()
    with waiting(who):
        return future.result(seconds)


def _leave() -> None:
    """Ends this process although MLX still waits for what another one will never send."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def launched() -> bool:
    """Whether a launcher says that this process is one of several."""
    return any(name in os.environ for name in LAUNCHED)


def _hosts() -> list[list[str]] | None:
    """The ring's list of addresses, by rank, as `mlx.launch` writes it; None if there is none.

    That of `mlx.launch -n 1` is an empty file.
    """
    file = Path(os.environ.get("MLX_HOSTFILE", os.devnull))
    try:
        return json.loads(file.read_text().strip() or "[]") if file.is_file() else None
    except (OSError, ValueError):
        return None  # MLX says what is wrong with it


def _on_this_machine(rank: int) -> int:
    """How many processes the launcher has started on this one's machine, as far as it says so."""
    if hosts := _hosts():
        ours = {address.rpartition(":")[0] for address in hosts[rank]}
        return sum(not ours.isdisjoint(a.rpartition(":")[0] for a in others) for others in hosts)
    return int(next((os.environ[name] for name in LOCALLY if name in os.environ), 1))


@contextmanager
def _said_by_another() -> Iterator[None]:
    """As `errors.waiting`, of work that holds Python's lock: no thread of ours, and no handler.

    A signal has its usual effect within.
    """
    words = "mlx-qlora: waiting for the other processes to begin; if one of them has ended with an "
    words += "error, end this one and correct it"
    script = f'sleep {PATIENCE}; kill -0 {os.getpid()} && echo "{words}" >&2'
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}
    speaker = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(speaker.pid, signal.SIGKILL)  # and its `sleep`, which has our standard error
        speaker.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def processes() -> Processes:
    """The processes that this one was started with: itself alone, unless a launcher says more."""
    if not launched() or _hosts() == []:
        return Processes(None)
    try:
        with _said_by_another():
            group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the other processes cannot be reached: {error}") from None
    if group.size() == 1:
        return Processes(None)
    device.share_cores(_on_this_machine(group.rank()))
    return Processes(group)


def prints(error: UserError) -> bool:
    """Whether this process is the one to print an error that ends it.

    The first process prints what all know; the first and the second print that another is gone,
    since either may be that one; anything else is printed by the process that it happened to.
    """
    rank = processes().rank if processes.cache_info().currsize else 0
    return rank == 0 or not (error.is_shared or (isinstance(error, ProcessError) and rank > 1))
