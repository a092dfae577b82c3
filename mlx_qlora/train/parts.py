"""A batch becomes the parts that the engine computes side by side, without padding.

On a GPU there is one part. A CPU gets one for each core, as most of what MLX does there besides
matmuls runs on one: documents are shared out, each part has a stream of its own, and the sums of
the parts are the sum over the batch.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora import blas
from mlx_qlora.backend import backend, cores
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


def teaching_documents(batch: Batch) -> np.ndarray:
    """(n, 3) of row, start and end: the documents of a batch in which anything is learned."""
    labels = np.array(batch.labels)
    documents = batch.documents
    if documents is None:  # each row is one
        B, T = labels.shape
        documents = np.array([(b, 0, T) for b in range(B)], np.int32)
    teaches = [bool((labels[row, start:end] != IGNORE).any()) for row, start, end in documents]
    return documents[np.array(teaches, bool)]


def waves_of(
    model: LlamaForCausalLM,
    batch: Batch,
    documents: np.ndarray,
    waves: int,
    dropout_key: mx.array | None = None,
) -> list[list[Part]]:
    """The parts of a batch: some to be computed side by side, then some more.

    Args:
        model: whose layers will draw dropout.
        batch: tokens and labels.
        documents: those of the batch's that are to be computed.
        waves: how many there may be at most.
        dropout_key: (2,) for the batch or (B, 2) for its rows; None turns dropout off.
    """
    tokens, labels = np.array(batch.tokens), np.array(batch.labels)
    lengths = documents[:, 2] - documents[:, 1]
    side_by_side = _side_by_side(lengths, waves)
    shares = shared_out(documents, min(side_by_side * waves, len(documents)))
    parts = []
    for share, stream in zip(shares, itertools.cycle(streams(side_by_side))):
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
                model.model.dropout_keys(dropout_key, len(tokens), context),
                mx.array(positions),
                mx.array(wanted[positions]),
                stream,
            )
        )
    return [parts[i : i + side_by_side] for i in range(0, len(parts), side_by_side)]


def _side_by_side(lengths: np.ndarray, waves: int) -> int:
    """How many parts of a wave are computed at the same time."""
    busy = int(lengths.sum()) // waves // FEWEST_POSITIONS
    return max(1, min(cores(), len(lengths) // waves, busy))


def shared_out(documents: np.ndarray, n: int) -> list[np.ndarray]:
    """Documents (m, 3) in n shares of like size."""
    lengths = documents[:, 2] - documents[:, 1]
    owner, load = np.zeros(len(documents), int), np.zeros(max(n, 1))
    for i in np.argsort(-lengths, kind="stable"):  # the longest first, to where there is least
        owner[i] = load.argmin()
        load[owner[i]] += lengths[i]
    return [documents[owner == share] for share in range(n)]


_more_streams: list[mx.Stream] = []


def streams(n: int) -> list[mx.Stream]:
    """The default stream and as many more of the same device as are wanted."""
    device = mx.default_device()
    while len(_more_streams) < n - 1:
        _more_streams.append(mx.new_stream(device))
    return [mx.default_stream(device), *_more_streams[: max(n - 1, 0)]]


@contextmanager
def cores_shared(parts: list[Part]) -> Iterator[None]:
    """While parts are computed side by side, each matmul has its share of the cores."""
    with blas.threads(max(1, cores() // max(len(parts), 1))):
        yield
