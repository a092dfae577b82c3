"""Processes on this machine that MLX's ring joins, as `mlx.launch` starts them on several.

Run as a script (by `start`) it is one of them: several runs of the command line one after the
other, so that a process has to start but once.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from support.cores import on_core

ROOT = Path(__file__).parents[2]


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def outside_a_ring() -> dict[str, str]:
    """An environment in which this checkout is found, and no ring."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLX_R")}
    return kept | {"OPENBLAS_NUM_THREADS": "1"}


def start(
    n: int,
    words: Callable[[int], Sequence[str]],
    folder: Path,
    environ: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> list[subprocess.Popen[str]]:
    """Starts `python *words(rank)` n times, joined in a ring.

    Args:
        n: how many.
        words: of each rank.
        folder: for the list of addresses.
        environ: set besides.
        prefix: before the interpreter.
    """
    hosts = folder / f"hosts-{n}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
    started = []
    for rank in range(n):
        env = {**outside_a_ring(), **(environ or {})}
        if n > 1:
            env |= {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
        with on_core(rank) if n > 1 else contextlib.nullcontext():
            started.append(
                subprocess.Popen(
                    [*prefix, sys.executable, *words(rank)],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
    return started


def ends(started: list[subprocess.Popen[str]], seconds: float = 120) -> list[Any]:
    """(exit code, standard output, standard error) of each; kills what takes longer.

    Raises:
        AssertionError: one did.
    """
    found = []
    try:
        for process in started:
            out, err = process.communicate(timeout=seconds)
            found.append((process.returncode, out, without_waits(err).rstrip("\n")))
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"a process still runs after {seconds} s") from late
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
    return found


def without_waits(err: str) -> str:
    """Standard error without what a busy machine adds, and the ring, where a peer has gone."""
    lines = err.splitlines(keepends=True)
    others = ("[ring]", "mlx-qlora: waiting for ")
    return "".join(line for line in lines if not line.startswith(others))


# ---- one of them -------------------------------------------------------------------------------


def prepare(n: int, runs: list[Any], folder: Path) -> list[str]:
    """Writes down what each of n processes runs, one command after the other.

    Args:
        n: how many processes.
        runs: keywords of `one`; or a list of such, one for each rank.
        folder: for the files.

    Returns:
        What Python is to run in each process; it leaves `pid-RANK` and `found-RANK.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(n):
        own = [run[rank] if isinstance(run, list) else run for run in runs]
        (folder / f"runs-{rank}.json").write_text(json.dumps(own))
    return [__file__, str(folder)]


def found_by(rank: int, folder: Path) -> list[dict[str, Any]]:
    """What a process found in each of its runs."""
    return json.loads((folder / f"found-{rank}.json").read_text())


def commands(n: int, runs: list[Any], folder: Path, seconds: float = 600) -> list[Any]:
    """Runs several commands, each in the same n processes; arguments as of `prepare`.

    Returns:
        [run][rank]: what `one` found there.
    """
    words = prepare(n, runs, folder)
    for code, out, err in ends(start(n, lambda rank: words, folder), seconds):
        assert (code, out, err) == (0, "", ""), (code, out, err)
    return [list(ranks) for ranks in zip(*(found_by(rank, folder) for rank in range(n)))]


def one(
    words: list[str],
    poison: int | None = None,
    pause: float = 0.0,
    version: str | None = None,
    starved: tuple[int, int] | None = None,
    slow_save: float = 0.0,
    patience: float | None = None,
    signalled: int | None = None,
    cores: int | None = None,
) -> dict[str, Any]:
    """One run of the command line in this process.

    Args:
        words: of the command.
        poison: a row of the stream whose forward gives NaN.
        pause: seconds before each step, for those who want to meet one in time.
        version: that this process says it has.
        starved: first and last attempt, from 1, for which there is no memory to move the weights.
        slow_save: seconds that the disk needs for a checkpoint besides.
        patience: seconds that others are waited for, whatever this process's own work took.
        signalled: a validation, from 1, within which SIGTERM comes.
        cores: that this process may use, whatever its share of the machine's is.

    Returns:
        code: the exit code; out, err: what was printed; sent: `Processes.sent_bytes` before the
        first step and after each; wire: bytes of this process that the other end of a TCP
        connection has acknowledged, at the same times; weights: the hash of what the model held
        after training; cores: that it could use; parts: most that were computed side by side.
    """
    from mlx_qlora import cli, device, run
    from mlx_qlora import distributed as room
    from mlx_qlora.distributed import processes
    from mlx_qlora.train import engine, loop, optim, step

    found: dict[str, Any] = {"sent": [], "wire": [], "parts": 0}
    out, err = io.StringIO(), io.StringIO()
    train, take, call = run.train, step.Step.__call__, engine.Engine.__call__
    steps = itertools.count()
    move, moves = optim.AdamW.update, itertools.count(1)
    save, score, scored = loop.save_checkpoint, loop.score, itertools.count(1)
    side_by_side = engine.side_by_side

    def count() -> None:
        found["sent"].append(processes().sent_bytes)
        found["wire"].append(acknowledged())

    def told_step(self: Any, *args: Any) -> Any:
        if next(steps) == 0:
            count()
        time.sleep(pause)
        result = take(self, *args)
        count()
        return result

    def told_train(model: Any, *args: Any) -> Any:
        result = train(model, *args)
        found["weights"] = hash_of(model)
        return result

    def poisoned_call(self: Any, weights: Any, batch: Any, *args: Any) -> Any:
        if poison in batch.rows:
            weights = {name: weight * float("nan") for name, weight in weights.items()}
        return call(self, weights, batch, *args)

    def starved_move(self: Any, *args: Any) -> Any:
        if starved and starved[0] <= next(moves) <= starved[1]:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return move(self, *args)

    def counted_side_by_side(tapes: Any, *args: Any) -> None:
        found["parts"] = max(found["parts"], len(tapes))
        side_by_side(tapes, *args)

    def slow_save_checkpoint(*args: Any) -> Any:
        time.sleep(slow_save)
        return save(*args)

    def signalled_score(*args: Any) -> Any:
        if next(scored) == signalled:
            signal.raise_signal(signal.SIGTERM)
        return score(*args)

    with contextlib.ExitStack() as patches:
        change = [(run, "train", told_train), (step.Step, "__call__", told_step)]
        change += [(engine, "side_by_side", counted_side_by_side)]
        if poison is not None:
            change += [(engine.Engine, "__call__", poisoned_call)]
        change += [(run, "__version__", version)] if version else []
        change += [(optim.AdamW, "update", starved_move)] if starved else []
        change += [(loop, "save_checkpoint", slow_save_checkpoint)] if slow_save else []
        change += [(loop, "score", signalled_score)] if signalled else []
        change += [(device, "cores", lambda: cores)] if cores else []
        if patience is not None:
            change += [(room, "AT_LEAST", patience), (room, "TIMES", 0.0)]
        for owner, name, new in change:
            patches.enter_context(mock.patch.object(owner, name, new))
        patches.enter_context(contextlib.redirect_stdout(out))
        patches.enter_context(contextlib.redirect_stderr(err))
        code = cli.main(words)
        found["cores"] = device.cores()
    return {**found, "code": code, "out": out.getvalue(), "err": without_waits(err.getvalue())}


def hash_of(model: Any) -> str:
    """Of a model's LoRA weights."""
    import numpy as np

    from mlx_qlora.tree import flat

    hashed = hashlib.sha256()
    for name, weight in sorted(flat(model.trainable_parameters()).items()):
        hashed.update(name.encode() + np.array(weight).tobytes())
    return hashed.hexdigest()


def acknowledged() -> int:
    """Bytes that were sent through this process's TCP sockets and have arrived; Linux counts them.

    What other programs send over the same device is not in it. 0 on other systems.
    """
    total = 0
    for connection in open_sockets():
        with contextlib.suppress(OSError):  # a listener
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total


def open_sockets() -> Iterator[socket.socket]:
    """This process's sockets, on Linux, each a copy that is closed when the next is taken."""
    for link in Path("/proc/self/fd").iterdir() if sys.platform.startswith("linux") else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(link).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(link.name))) as own:
                    yield own


def wait_in_the_kernel() -> None:
    """Lets MLX's ring sleep until something arrives, for at most 4 ms; else it asks all the time.

    Its sockets are set not to wait, and a thread of each asks again at once, on a core that others
    need. What is sent, and when, stays as it is.
    """
    init = mx.distributed.init

    def init_and_wait(*words: Any, **more: Any) -> Any:
        group = init(*words, **more)
        for connection in open_sockets():
            connection.setblocking(True)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, 4000))
        return group

    mx.distributed.init = init_and_wait


def main() -> None:
    """Runs what `prepare` has written down; what is found is written after each run."""
    wait_in_the_kernel()
    # A shell may have told the tests, and so their children, to ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, rank = Path(sys.argv[1]), os.environ.get("MLX_RANK", "0")
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    found: list[dict[str, Any]] = []
    for run in json.loads((folder / f"runs-{rank}.json").read_text()):
        found.append(one(**run))
        (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
