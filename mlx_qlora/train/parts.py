"""A batch becomes the parts that the engine computes side by side, without padding.

On a GPU there is one part. A CPU gets one for each core, as most of what MLX does there besides
matmuls runs on one: documents are shared out, each part has a stream of its own, and the sums of
the parts are the sum over the batch.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora import blas
from mlx_qlora.backend import backend, cores
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.model.documents import Documents
from mlx_qlora.model.llama import Keys, LlamaForCausalLM
from mlx_qlora.train.memory import shares

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
    made = []
    for wave in shared_out(documents, waves):
        lengths = wave[:, 2] - wave[:, 1]
        busy = int(lengths.sum()) // FEWEST_POSITIONS
        side_by_side = max(1, min(cores(), len(wave), busy))
        some = zip(shared_out(wave, side_by_side), streams(side_by_side))
        made.append([_part(model, batch, share, dropout_key, stream) for share, stream in some])
    return made


def _part(
    model: LlamaForCausalLM,
    batch: Batch,
    documents: np.ndarray,
    dropout_key: mx.array | None,
    stream: mx.Stream,
) -> Part:
    tokens, labels = np.array(batch.tokens), np.array(batch.labels)
    spans = [(row, slice(start, end)) for row, start, end in documents.tolist()]
    ids = np.concatenate([tokens[row, span] for row, span in spans])
    wanted = np.concatenate([labels[row, span] for row, span in spans])
    N = len(ids)
    if backend().device != "cpu":
        N += -N % GPU_MULTIPLE
    context = model.model.documents(documents, N)
    positions = np.flatnonzero(wanted != IGNORE).astype(np.int32)
    return Part(
        mx.array(np.pad(ids, (0, N - len(ids)))),
        context,
        model.model.dropout_keys(dropout_key, len(tokens), context),
        mx.array(positions),
        mx.array(wanted[positions]),
        stream,
    )


def shared_out(documents: np.ndarray, n: int) -> list[np.ndarray]:
    """Documents (m, 3) in at most n shares of like size."""
    owner = shares((documents[:, 2] - documents[:, 1]).tolist(), n)
    found = [documents[owner == share] for share in range(n)]
    return [share for share in found if len(share)]


_own = threading.local()  # a stream belongs to the thread that made it


def streams(n: int) -> list[mx.Stream]:
    """The default stream and as many more of the same device as are wanted."""
    device = mx.default_device()
    more = _own.__dict__.setdefault("streams", [])
    while len(more) < n - 1:
        more.append(mx.new_stream(device))
    return [mx.default_stream(device), *more[: max(n - 1, 0)]]


@contextmanager
def cores_shared(parts: list[Part]) -> Iterator[None]:
    """While parts are computed side by side, each matmul has its share of the cores."""
    with blas.threads(max(1, cores() // max(len(parts), 1))):
        yield
