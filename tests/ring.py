"""Processes on this machine that MLX's ring joins, as `mlx.launch` starts them on several."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


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
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLX_R")}
    kept |= {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OPENBLAS_NUM_THREADS": "1",
        **(environ or {}),
    }
    started = []
    for rank in range(n):
        env = dict(kept)
        if n > 1:
            env |= {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
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
            # MLX's ring says on standard error that it lost a connection; that is not ours.
            lines = itertools.filterfalse(lambda line: line.startswith("[ring]"), err.splitlines())
            found.append((process.returncode, out, "\n".join(lines)))
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"a process still runs after {seconds} s") from late
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
    return found
