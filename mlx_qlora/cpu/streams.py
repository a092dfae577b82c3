"""Several streams: on a CPU each core computes a shard of its own.

On a GPU `device.cores()` is 1, and all that is asked for here is the default stream.
"""

import threading
from collections.abc import Sized
from contextlib import AbstractContextManager

import mlx.core as mx

from mlx_qlora import device
from mlx_qlora.cpu import blas

_of_thread = threading.local()  # a stream belongs to the thread that made it


def streams(n: int) -> list[mx.Stream]:
    """The default stream and n - 1 more of the same device."""
    default = mx.default_device()
    more = _of_thread.__dict__.setdefault("streams", [])
    while len(more) < n - 1:
        more.append(mx.new_stream(default))
    return [mx.default_stream(default), *more[: max(n - 1, 0)]]


def cores_shared(shards: Sized) -> AbstractContextManager[None]:
    """While shards are computed side by side, each matmul has its share of the cores."""
    return blas.threads(max(1, device.cores() // max(len(shards), 1)))
