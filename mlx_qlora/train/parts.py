"""A batch becomes the parts that the engine computes side by side, without padding.

On a GPU there is one part. A CPU gets one for each core, as most of what MLX does there besides
matmuls runs on one: documents are shared out, each part has a stream of its own, and the sums of
the parts are the sum over the batch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora import blas
from mlx_qlora.backend import backend
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.llama import Keys, LlamaForCausalLM

# Fewer positions than this do not keep a core busy enough to be worth a stream.
FEWEST_POSITIONS = 64
GPU_MULTIPLE = 64  # positions of a part there: few shapes, so that freed buffers can be used again


@dataclass(frozen=True)
class Part:
    """Some of a batch's documents, one behind the other.

    Attributes:
        tokens: (N,) int32.
        documents: which of the N positions belong together.
        keys: for each layer, the dropout keys of its seven linears.
        positions: (S,) int32 into N, of the supervised tokens, in order.
        targets: (S,) int32, the token to predict there.
        stream: where it is computed.
    """

    tokens: mx.array
    documents: Documents
    keys: list[Keys]
    positions: mx.array
    targets: mx.array
    stream: mx.Stream


def parts_of(
    model: LlamaForCausalLM, batch: Batch, dropout_key: mx.array | None = None
) -> list[Part]:
    """The parts of a batch; documents in which nothing is learned are in none of them.

    Args:
        model: whose layers will draw dropout.
        batch: tokens and labels.
        dropout_key: (2,) for the batch or (B, 2) for its rows; None turns dropout off.
    """
    tokens, labels = np.array(batch.tokens), np.array(batch.labels)
    B, T = tokens.shape
    documents = batch.documents
    if documents is None:  # each row is one
        documents = np.array([(b, 0, T) for b in range(B)], np.int32)
    teaches = [bool((labels[row, start:end] != IGNORE).any()) for row, start, end in documents]
    shares = shared_out(documents[np.array(teaches, bool)])
    streams = _streams(len(shares))
    parts = []
    for share, stream in zip(shares, streams):
        spans = [(row, slice(start, end)) for row, start, end in share.tolist()]
        ids = np.concatenate([tokens[row, span] for row, span in spans])
        wanted = np.concatenate([labels[row, span] for row, span in spans])
        N = len(ids)
        if backend().device != "cpu":
            N += -N % GPU_MULTIPLE
        context = model.model.documents(share, N)
        positions = np.flatnonzero(wanted != IGNORE).astype(np.int32)
        parts.append(
            Part(
                mx.array(np.pad(ids, (0, N - len(ids)))),
                context,
                model.model.dropout_keys(dropout_key, B, context),
                mx.array(positions),
                mx.array(wanted[positions]),
                stream,
            )
        )
    return parts


def shared_out(documents: np.ndarray) -> list[np.ndarray]:
    """Documents (n, 3) in as many shares of like size as there is use for."""
    if not len(documents):
        return []
    lengths = documents[:, 2] - documents[:, 1]
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n = 1
    if backend().device == "cpu":
        n = max(1, min(most, len(documents), int(lengths.sum()) // FEWEST_POSITIONS))
    owner, load = np.zeros(len(documents), int), np.zeros(n)
    for i in np.argsort(-lengths, kind="stable"):  # the longest first, to where there is least
        owner[i] = load.argmin()
        load[owner[i]] += lengths[i]
    return [documents[owner == share] for share in range(n)]


_own_streams: list[mx.Stream] = []


def _streams(n: int) -> list[mx.Stream]:
    """The default stream and as many more of the same device as are wanted."""
    default = mx.default_stream(mx.default_device())
    while len(_own_streams) < n - 1:
        _own_streams.append(mx.new_stream(mx.default_device()))
    return [default, *_own_streams[: max(n - 1, 0)]]


@contextmanager
def cores_shared(parts: list[Part]) -> Iterator[None]:
    """While several parts are computed, each matmul has its share of the cores."""
    if len(parts) < 2:
        yield
        return
    with blas.threads(max(1, (os.cpu_count() or 1) // len(parts))):
        yield
