"""The memory schedule: how much of a batch is computed at once, and what is computed again."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu import blas
from mlx_qlora.cpu.attention import BLOCK
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.device import Machine, this_machine
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.llama import Keys, LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.tree import flat

# How much of a layer the backward computes again; what is kept stands in `engine`.
NOTHING, EXPONENTIALS, MLP, LAYER = LEVELS = 0, 1, 2, 3


Recompute = int | str | list[int]  # how many layers, "none", "all", "auto", or each layer's level


# Positions of a wave that keep a device busy, and those that it takes at once if memory allows:
# beyond that speed gains nothing, and memory is better left to others.
ENOUGH = {"cpu": 512, "metal": 2048, "cuda": 4096}


AT_ONCE = {"cpu": 1024, "metal": 8192, "cuda": 16384}


@dataclass(frozen=True)
class Schedule:
    """How a batch is computed.

    Attributes:
        n_chunks: how many, one after the other.
        levels: what each layer computes again in the backward.
    """

    n_chunks: int
    levels: list[int]


def check_recompute(recompute: Recompute, n_layers: int) -> list[int] | str:
    """The level of each layer, or "auto".

    Raises:
        ConfigError: neither a known word nor a number of layers that exists.
    """
    if isinstance(recompute, list):
        assert len(recompute) == n_layers and set(recompute) <= set(LEVELS)
        return recompute
    words = {"none": 0, "all": n_layers}
    layers = words.get(recompute) if isinstance(recompute, str) else recompute
    if recompute == "auto":
        return "auto"
    if isinstance(layers, int) and 0 <= layers <= n_layers:
        return [LAYER] * layers + [NOTHING] * (n_layers - layers)
    raise ConfigError(
        f"recompute must be none, all, auto, or a number of layers from 0 to {n_layers}; "
        f"got {recompute!r}"
    )


def schedule(
    config: LlamaConfig,
    lengths: Sequence[int],
    itemsize: int,
    recompute: list[int] | str,
    budget: float,
    machine: Machine | None = None,
) -> Schedule:
    """The schedule that computes least again and keeps within a budget, if one does.

    Args:
        config: sizes of the model.
        lengths: of the batch's documents.
        itemsize: bytes of a number in the compute dtype.
        recompute: each layer's level, or "auto" to choose them.
        budget: bytes for what the forward keeps.
        machine: that computes; this one if not given.
    """
    machine = machine or this_machine()
    waves, n = default_chunks(lengths, machine), max(len(lengths), 1)
    most = max(waves, min(-(-sum(lengths) // ENOUGH[machine.device]), n))
    if not isinstance(recompute, str):
        asks_for_memory = all(level == LAYER for level in recompute)
        few = max(waves, min(most, n // machine.cores))
        return Schedule(few if asks_for_memory else waves, recompute)
    levels = [NOTHING] * config.num_hidden_layers
    while waves < most and kept_bytes(config, levels, lengths, waves, itemsize, machine) > budget:
        waves += 1
    # The MLP before the whole layer: its two matmuls free the most, and need no attention first.
    for level in LEVELS[1:]:
        for i in range(len(levels)):
            if kept_bytes(config, levels, lengths, waves, itemsize, machine) <= budget:
                return Schedule(waves, levels)
            levels[i] = level
    return Schedule(waves, levels)


def default_chunks(lengths: Sequence[int], machine: Machine | None = None) -> int:
    """How many waves a batch is computed in where memory is no matter."""
    machine = machine or this_machine()
    at_once, n = AT_ONCE[machine.device], max(len(lengths), 1)
    # A wave should have a document for each core, unless it gets far too large by that.
    most = max(n // machine.cores, -(-sum(lengths) // (4 * at_once)))
    return max(1, min(-(-sum(lengths) // at_once), most, n))


def kept_bytes(
    config: LlamaConfig,
    levels: list[int],
    lengths: Sequence[int],
    waves: int,
    itemsize: int,
    machine: Machine | None = None,
) -> int:
    """What the forward of the largest wave keeps for the backward, in bytes."""
    kind = (machine or this_machine()).device
    positions, typical = largest_chunk(lengths, waves)
    each = [layer_bytes(config, level, typical, itemsize, kind) for level in LEVELS]
    return positions * sum(each[level] for level in levels)


def largest_chunk(lengths: Sequence[int], waves: int) -> tuple[int, int]:
    """Positions of the largest wave, and the document length that most of them are in."""
    array = np.array(lengths, int)
    owner = shares(lengths, waves)
    loads = np.bincount(owner, weights=array, minlength=1)
    mine = array[owner == loads.argmax()]
    return int(mine.sum()), int((mine**2).sum() // max(mine.sum(), 1))


def shares(lengths: Sequence[int], n: int) -> np.ndarray:
    """For each document which of n shares of like size it belongs to."""
    owner, load = np.zeros(len(lengths), int), np.zeros(max(n, 1))
    for i in np.argsort(-np.array(lengths, int), kind="stable"):
        owner[i] = load.argmin()  # the longest first, to where there is least
        load[owner[i]] += lengths[i]
    return owner


def layer_bytes(config: LlamaConfig, level: int, T: int, itemsize: int, kind: str) -> int:
    """What a layer keeps of one position in a document of T, in bytes."""
    D, F, Hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    kept = D
    if level <= MLP:
        kept += 2 * H * Hd + 2 * K * Hd + D  # q and heads, k and v, h
    if level <= EXPONENTIALS:
        kept += 2 * F
    if level == NOTHING and kind == "cpu":
        kept += F + H * (T + min(T, BLOCK)) // 2  # the sigmoid, and weights up to the diagonal
    return kept * itemsize


# ---- what else there is -------------------------------------------------------------------------
FLOAT32 = 4


# How much of a machine's memory a plan may fill: a Mac and a desktop run other programs, too.
FILLED = {"cpu": 0.5, "metal": 0.85, "cuda": 0.92}


def adapter_bytes(trainable: int) -> int:
    """The LoRA weights and AdamW's two moments, float32."""
    return 3 * trainable * FLOAT32


def persistent_bytes(model: LlamaForCausalLM) -> int:
    """What a run keeps in memory from its first step to its last."""
    trainable = sum(weight.size for weight in flat(model.trainable_parameters()).values())
    held = sum(array.nbytes for array in flat(model.parameters()).values())
    matrices = (m for m in model.modules() if isinstance(m, FrozenMatrix))
    return held + sum(m.resident_bytes for m in matrices) + adapter_bytes(trainable)


def step_bytes(trainable: int, waves: int, accumulates: bool) -> int:
    """Gradients of what is being computed, and of the waves and micro-batches before it."""
    return (1 + 2 * (waves > 1) + accumulates) * trainable * FLOAT32


def update_bytes(trainable: int, machine: Machine) -> int:
    """What the optimiser's update needs besides the weights and moments: new ones, gradients.

    Measured on a CPU, where it goes slice by slice; on a GPU whole buffers are temporary.
    """
    parts = trainable * FLOAT32
    return 6 * parts + min(4 * parts, 8 << 20) if machine.device == "cpu" else 10 * parts


def activation_bytes(
    config: LlamaConfig, how: Schedule, lengths: Sequence[int], itemsize: int, machine: Machine
) -> tuple[int, int]:
    """What is kept and what is worked with at the highest moment of the way down the layers."""
    moments = []
    for i, level in enumerate(how.levels):
        kept = kept_bytes(config, how.levels[: i + 1], lengths, how.n_chunks, itemsize, machine)
        moments.append((kept, work_bytes(config, level, lengths, how.n_chunks, itemsize, machine)))
    return max(moments, key=sum)


def work_bytes(
    config: LlamaConfig,
    level: int,
    lengths: Sequence[int],
    waves: int,
    itemsize: int,
    machine: Machine,
) -> int:
    """Arrays that come and go while layers are computed, of about two layers at once.

    Fitted to measured peaks of models of many shapes (benchmarks/memory.py).
    """
    positions, typical = largest_chunk(lengths, waves)
    D, F, Hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    each = 11.0 * F
    if level >= MLP:
        each = 9 * F + 6 * D + 2 * (H + 2 * K) * Hd
        each += 1.2 * H * min(typical, BLOCK) if machine.device == "cpu" else 0
    return int(positions * each * itemsize)


def budget_for(
    config: LlamaConfig, lengths: Sequence[int], itemsize: int, standing: int, machine: Machine
) -> float:
    """Bytes that the forward may keep, beside what stands in memory and comes and goes."""
    waves = default_chunks(lengths, machine)
    work = work_bytes(config, LAYER, lengths, waves, itemsize, machine)
    return FILLED[machine.device] * machine.working_set_bytes - standing - work


# ---- shares of a batch ---------------------------------------------------------------------------


# Fewer positions than this do not keep a core busy enough to be worth a stream.
FEWEST_POSITIONS = 64


GPU_MULTIPLE = 64  # positions of a part there: few shapes, so that freed buffers can be used again


@dataclass(frozen=True)
class Shard:
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


def supervised_documents(batch: Batch) -> np.ndarray:
    """(n, 3) of row, start and end: the documents of a batch in which anything is learned."""
    labels = np.array(batch.labels)
    documents = batch.documents
    if documents is None:  # each row is one
        B, T = labels.shape
        documents = np.array([(b, 0, T) for b in range(B)], np.int32)
    teaches = [bool((labels[row, start:end] != IGNORE).any()) for row, start, end in documents]
    return documents[np.array(teaches, bool)]


def chunks_of(
    model: LlamaForCausalLM,
    batch: Batch,
    documents: np.ndarray,
    waves: int,
    dropout_key: mx.array | None = None,
) -> list[list[Shard]]:
    """The parts of a batch: some to be computed side by side, then some more.

    Args:
        model: whose layers will draw dropout.
        batch: tokens and labels.
        documents: those of the batch's that are to be computed.
        waves: how many there may be at most.
        dropout_key: (2,) for the batch or (B, 2) for its rows; None turns dropout off.
    """
    made = []
    for wave in split_evenly(documents, waves):
        lengths = wave[:, 2] - wave[:, 1]
        busy = int(lengths.sum()) // FEWEST_POSITIONS
        side_by_side = max(1, min(device.cores(), len(wave), busy))
        some = zip(split_evenly(wave, side_by_side), streams(side_by_side))
        made.append([_part(model, batch, share, dropout_key, stream) for share, stream in some])
    return made


def _part(
    model: LlamaForCausalLM,
    batch: Batch,
    documents: np.ndarray,
    dropout_key: mx.array | None,
    stream: mx.Stream,
) -> Shard:
    tokens, labels = np.array(batch.tokens), np.array(batch.labels)
    spans = [(row, slice(start, end)) for row, start, end in documents.tolist()]
    ids = np.concatenate([tokens[row, span] for row, span in spans])
    wanted = np.concatenate([labels[row, span] for row, span in spans])
    N = len(ids)
    if device.current().kind != "cpu":
        N += -N % GPU_MULTIPLE
    context = model.model.documents(documents, N)
    positions = np.flatnonzero(wanted != IGNORE).astype(np.int32)
    return Shard(
        mx.array(np.pad(ids, (0, N - len(ids)))),
        context,
        model.model.dropout_keys(dropout_key, len(tokens), context),
        mx.array(positions),
        mx.array(wanted[positions]),
        stream,
    )


def split_evenly(documents: np.ndarray, n: int) -> list[np.ndarray]:
    """Documents (m, 3) in at most n shares of like size."""
    owner = shares((documents[:, 2] - documents[:, 1]).tolist(), n)
    found = [documents[owner == share] for share in range(n)]
    return [share for share in found if len(share)]


_own = threading.local()  # a stream belongs to the thread that made it


def streams(n: int) -> list[mx.Stream]:
    """The default stream and as many more of the same device as are wanted."""
    default = mx.default_device()
    more = _own.__dict__.setdefault("streams", [])
    while len(more) < n - 1:
        more.append(mx.new_stream(default))
    return [mx.default_stream(default), *more[: max(n - 1, 0)]]


@contextmanager
def cores_shared(parts: list[Shard]) -> Iterator[None]:
    """While parts are computed side by side, each matmul has its share of the cores."""
    with blas.threads(max(1, device.cores() // max(len(parts), 1))):
        yield
