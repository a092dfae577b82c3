"""Several streams: on a CPU each core computes a shard of its own.

On a GPU `device.cores()` is 1, and all that is asked for here is the default stream.
"""

import os
import threading
import time
from collections.abc import Sized
from contextlib import AbstractContextManager

import mlx.core as mx

from mlx_qlora import device
from mlx_qlora.cpu import blas

SHORTEST = 5  # ticks of a core, hundredths of a second: of less a share means nothing
_of_thread = threading.local()  # a stream belongs to the thread that made it


def streams(n: int) -> list[mx.Stream]:
    """The default stream and n - 1 more of the same device."""
    default = mx.default_device()
    more = _of_thread.__dict__.setdefault("streams", [])
    while len(more) < n - 1:
        more.append(mx.new_stream(default))
    return [mx.default_stream(default), *more[: max(n - 1, 0)]]


def cores_shared(shards: Sized) -> AbstractContextManager[None]:
    """While shards are computed side by side, each matmul has its share of the cores.

    OpenBLAS's threads wait for each other in a loop. Where another process has the core of one,
    the others burn theirs: a single document of 48 tokens kept 0.05 of its speed beside two busy
    processes (benchmarks/beside_others.py). So a matmul has no more threads than cores are idle,
    which changes no bit of it: each number is summed by one thread.
    """
    left = cores_left()  # even where it decides nothing: what was long ago is not known
    return blas.threads(max(1, min(device.cores() // max(len(shards), 1), left)))


STAT = "/proc/stat"  # Linux's count of what all cores did, in ticks
_since: tuple[tuple[float, ...], float] = (0.0, 0.0, 0.0), 0.0  # ticks, and cores others used


def cores_left() -> int:
    """Cores that other processes have left since this was last asked; all if nobody counts."""
    global _since
    n, (before, used) = os.cpu_count() or 1, _since
    try:
        with open(STAT, encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        idle = ticks[3] + ticks[4]  # which may wait for a disk
    except (OSError, ValueError, IndexError):
        return n
    now = sum(ticks), sum(ticks) - idle, time.process_time() * os.sysconf("SC_CLK_TCK")
    everything, busy, own = (a - b for a, b in zip(now, before))
    if everything >= SHORTEST * n:
        used = n * (busy - own) / everything
        _since = now, used
    return max(1, min(n, round(n - used)))
