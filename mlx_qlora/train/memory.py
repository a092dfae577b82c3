"""The memory schedule: what each layer keeps for its backward, and how much is computed at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.cpu.attention import BLOCK
from mlx_qlora.cpu.streams import streams
from mlx_qlora.data.batches import IGNORE, Batch, padded_width
from mlx_qlora.data.examples import Examples
from mlx_qlora.device import Device, Machine, this_machine
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.llama import Keys, LlamaConfig, LlamaForCausalLM, check_ids
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.tree import flat

# ---- what a layer keeps --------------------------------------------------------------------------

# The recompute levels, named after what of a layer the backward computes again; each keeps less.
NOTHING, EXPONENTIALS, MLP, LAYER = LEVELS = 0, 1, 2, 3
# The values that a layer keeps at each level: the engine's tape and the plan both read this table.
KEPT = {
    NOTHING: ("x", "q", "k", "v", "heads", "residuals", "weights", "h", "gate", "up", "s"),
    EXPONENTIALS: ("x", "q", "k", "v", "heads", "residuals", "h", "gate", "up"),
    MLP: ("x", "q", "k", "v", "heads", "residuals", "h"),
    LAYER: ("x",),
}
Recompute = int | str | list[int]  # how many layers, "none", "all", "auto", or each layer's level
FLOAT32 = 4  # bytes
FUSED_BLOCK = 1024  # positions of a document that MLX's attention backward takes at once


def layer_bytes(config: LlamaConfig, level: int, T: int, itemsize: int, device: Device) -> int:
    """What a layer keeps of one position in a document of T, in bytes."""
    D, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, k = H * config.head_dim, config.num_key_value_heads * config.head_dim
    on_cpu = not device.fused_attention  # a GPU's fused kernels keep no exponentials
    numbers = {"x": D, "q": q, "k": k, "v": k, "heads": q, "h": D, "gate": F, "up": F}
    numbers["residuals"] = 0  # the log-sums, one number for a head: too few to count
    kept = on_cpu and not config.attention_softcap
    numbers["weights"] = kept * H * (T + min(T, BLOCK)) // 2  # by blocks, up to the diagonal
    numbers["s"] = on_cpu * F
    return itemsize * sum(numbers[name] for name in KEPT[level])


@dataclass(frozen=True)
class Schedule:
    """How a batch is computed: in how many chunks, and at which level each layer."""

    n_chunks: int
    levels: list[int]


@dataclass(frozen=True)
class Footprint:
    """The memory that a batch takes while it is computed, in bytes."""

    config: LlamaConfig
    lengths: Sequence[int]  # of the batch's documents
    itemsize: int  # bytes of a number in the compute dtype
    machine: Machine = field(default_factory=lambda: this_machine())
    streamed: bool = False  # whether each chunk reads the layers' weights from the disk
    one_by_one: bool = False  # whether one matrix at a time is dequantised and multiplied
    has_base: bool = False  # whether the head compares with hidden states of another model

    def kept(self, levels: list[int], n_chunks: int) -> int:
        """What the forward of the largest chunk keeps for the backward."""
        positions, T = largest_chunk(self.lengths, n_chunks)
        here = self.machine.device
        each = [layer_bytes(self.config, level, T, self.itemsize, here) for level in LEVELS]
        # The hidden states, and a gradient beside that of the loss; at most all are supervised.
        of_base = self.has_base * self.config.hidden_size * (self.itemsize + FLOAT32)
        return positions * (sum(each[level] for level in levels) + of_base)

    def working(self, level: int, n_chunks: int) -> int:
        """Arrays that come and go while layers are computed, of about two layers at once.

        Fitted to measured peaks of models of many shapes (benchmarks/memory.py).
        """
        positions, T = largest_chunk(self.lengths, n_chunks)
        D, F, Hd = self.config.hidden_size, self.config.intermediate_size, self.config.head_dim
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        of_mlp = 4.0 if self.one_by_one else 11 if level < MLP else 9
        numbers = of_mlp * F
        if level >= MLP:
            numbers += 6 * D + 2 * (H + 2 * K) * Hd
            numbers += 0 if self.machine.device.fused_attention else 1.2 * H * min(T, BLOCK)
        return int(positions * numbers * self.itemsize) + self.scratch(n_chunks)

    def scratch(self, n_chunks: int) -> int:
        """Scores that MLX's attention backward holds of the largest group of documents."""
        positions, T = largest_chunk(self.lengths, n_chunks)
        here, H = self.machine.device, self.config.num_attention_heads
        n = max(1, min(positions, here.attention_positions) / max(T, 1))
        return int(here.attention_scratch * H * n * min(T, FUSED_BLOCK) ** 2)

    def highest(self, schedule: Schedule) -> tuple[int, int]:
        """What is kept and what comes and goes at the highest moment of the backward."""
        levels, n_chunks = schedule.levels, schedule.n_chunks
        moments = [
            (self.kept(levels[: i + 1], n_chunks), self.working(level, n_chunks))
            for i, level in enumerate(levels)
        ]
        return max(moments, key=sum)

    def budget(self, persistent: int) -> float:
        """What the forward may keep, beside what is persistent and what comes and goes."""
        work = self.working(LAYER, default_chunks(self.lengths, self.machine))
        return self.machine.device.memory_share * self.machine.working_set_bytes - persistent - work

    def schedule(self, recompute: list[int] | str, budget: float, trainable: int = 0) -> Schedule:
        """The schedule that recomputes least and keeps at most `budget` bytes, if one does.

        `recompute` is each layer's level, or "auto" to choose them; `trainable` numbers have
        gradients, which lie beside what is kept.
        """
        lengths, machine = self.lengths, self.machine
        n_chunks, n = default_chunks(lengths, machine), max(len(lengths), 1)
        most_chunks = max(n_chunks, min(-(-sum(lengths) // machine.device.busy_positions), n))
        if not isinstance(recompute, str):
            if all(level == LAYER for level in recompute):  # whoever asks for it is short of memory
                n_chunks = max(n_chunks, min(most_chunks, n // machine.cores))
            return Schedule(n_chunks, recompute)
        # Chunks before levels: they cost nothing as long as each keeps the device busy. Streamed,
        # each reads all weights once more.
        levels, room = [NOTHING] * self.config.num_hidden_layers, budget + self.scratch(n_chunks)
        budget, least = room - self.scratch(n_chunks), LAYER if self.streamed else NOTHING
        recomputed = [least] * len(levels)
        while n_chunks < most_chunks and self.kept(recomputed, n_chunks) > budget:
            n_chunks += 1
            budget = room - self.scratch(n_chunks)
        # Not before the chunks, whose number changes the last bits of sums.
        budget -= step_bytes(trainable, n_chunks, accumulates=True)
        # The MLP before the whole layer: its two matmuls free the most, and need no attention.
        for level in LEVELS[1:]:
            for i in range(len(levels)):
                if self.kept(levels, n_chunks) <= budget:
                    return Schedule(n_chunks, levels)
                levels[i] = level
        return Schedule(n_chunks, levels)


def check_recompute(recompute: Recompute, n_layers: int) -> list[int] | str:
    """The level of each layer, or "auto"; a ConfigError for what is no such word or number."""
    if isinstance(recompute, list):
        assert len(recompute) == n_layers and set(recompute) <= set(LEVELS)
        return recompute
    if recompute == "auto":
        return "auto"
    words = {"none": 0, "all": n_layers}
    layers = words.get(recompute) if isinstance(recompute, str) else recompute
    if isinstance(layers, int) and 0 <= layers <= n_layers:
        return [LAYER] * layers + [NOTHING] * (n_layers - layers)
    raise ConfigError(
        f"recompute must be none, all, auto, or a number of layers from 0 to {n_layers}; "
        f"got {recompute!r}"
    )


def largest_micro_batch(examples: Examples, rows: int) -> list[int]:
    """Positions of each document in the largest micro-batch of so many rows."""
    documents = examples.document_lengths
    documents = documents[np.argsort(documents[:, 0] * documents[:, 1], kind="stable")]
    return [length - 1 for n, length in documents[-rows:].tolist() for _ in range(n)]


def default_chunks(lengths: Sequence[int], machine: Machine | None = None) -> int:
    """How many chunks a batch is computed in where memory is plentiful."""
    machine = machine or this_machine()
    at_once, n = machine.device.chunk_positions, max(len(lengths), 1)
    # A chunk should have a document for each core, unless it gets far too large by that.
    most = max(n // machine.cores, -(-sum(lengths) // (4 * at_once)))
    return max(1, min(-(-sum(lengths) // at_once), most, n))


def largest_chunk(lengths: Sequence[int], n_chunks: int) -> tuple[int, int]:
    """Positions of the largest chunk, and the document length that most of them are in."""
    array, chunk_of = np.array(lengths, int), spread(lengths, n_chunks)
    largest = array[chunk_of == np.bincount(chunk_of, weights=array, minlength=1).argmax()]
    return int(largest.sum()), int((largest**2).sum() // max(largest.sum(), 1))


# ---- what else needs memory ----------------------------------------------------------------------


def adapter_bytes(trainable: int) -> int:
    """The LoRA weights and AdamW's two moments, float32."""
    return 3 * trainable * FLOAT32


def persistent_bytes(model: LlamaForCausalLM) -> int:
    """What a run keeps in memory from its first step to its last."""
    parameters = sum(array.nbytes for array in flat(model.parameters()).values())
    matrices = (m for m in model.modules() if isinstance(m, FrozenMatrix))
    parameters += sum(m.resident_bytes for m in matrices)
    if (reader := model.model.reader) is not None:
        parameters += reader.resident_bytes
    return parameters + adapter_bytes(trainable_count(model))


def step_bytes(trainable: int, n_chunks: int, accumulates: bool) -> int:
    """Gradients of what is being computed, and of earlier chunks and micro-batches."""
    return (1 + 2 * (n_chunks > 1) + accumulates) * trainable * FLOAT32


def update_bytes(trainable: int, machine: Machine) -> int:
    """What the optimiser's update needs besides the weights and moments: new ones, gradients.

    Measured on a CPU, where it goes slice by slice; on a GPU whole buffers are temporary.
    """
    buffer = trainable * FLOAT32
    temporary = machine.device.adamw_bytes
    return 6 * buffer + (4 * buffer if temporary is None else min(4 * buffer, temporary))


# ---- chunks and shards of a batch ----------------------------------------------------------------

# Fewer positions than this do not keep a core busy enough to be worth a stream.
FEWEST_POSITIONS = 64


@dataclass(frozen=True)
class Shard:
    """Documents of a chunk, end to end on one axis of N positions, computed on one stream."""

    tokens: mx.array  # (N,) int32
    documents: Documents  # which positions belong together
    keys: list[Keys]  # for each layer, the dropout keys of its seven linears
    positions: mx.array  # (S,) int32 into N, of the supervised tokens, in order
    targets: mx.array  # (S,) int32, the token to predict there
    labels: np.ndarray  # (S,) int, the places of the targets in the batch's rows, end to end
    stream: mx.Stream


def supervised_documents(batch: Batch) -> np.ndarray:
    """(n, 3) of row, start and end: the documents of a batch in which something is learned."""
    labels, documents = np.array(batch.labels), batch.documents
    learned = [bool((labels[row, start:end] != IGNORE).any()) for row, start, end in documents]
    return documents[np.array(learned, bool)]


def chunks_of(
    model: LlamaForCausalLM,
    batch: Batch,
    groups: list[np.ndarray],
    dropout_key: mx.array | None = None,
) -> list[list[Shard]]:
    """Chunks of a batch, each as the shards that are computed side by side.

    `groups` are the documents (n, 3), row, start and end, of each chunk. `dropout_key` is (2,) for
    the batch or (B, 2) for its rows; None turns dropout off.
    """
    tokens, labels = np.array(batch.tokens), np.array(batch.labels)
    for ids in (tokens, labels[labels != IGNORE]):
        check_ids(ids, model.config.vocab_size, "the batch")

    def shard(documents: np.ndarray, stream: mx.Stream) -> Shard:
        spans = [(row, slice(start, end)) for row, start, end in documents.tolist()]
        ids = np.concatenate([tokens[row, span] for row, span in spans])
        targets = np.concatenate([labels[row, span] for row, span in spans])
        places = np.concatenate([row * tokens.shape[1] + np.r_[span] for row, span in spans])
        padding = padded_width(len(ids)) - len(ids) if device.current().few_shapes else 0
        context = Documents.of(documents, len(ids) + padding)
        keys = model.model.dropout_keys(dropout_key, len(tokens), context)
        positions = np.flatnonzero(targets != IGNORE).astype(np.int32)
        ids, targets = mx.array(np.pad(ids, (0, padding))), mx.array(targets[positions])
        of_targets = mx.array(positions), targets, places[positions]
        return Shard(ids, context, keys, *of_targets, stream)

    chunks = []
    for chunk in groups:
        n_positions = int((chunk[:, 2] - chunk[:, 1]).sum())
        n_shards = max(1, min(device.cores(), len(chunk), n_positions // FEWEST_POSITIONS))
        shards = zip(split_evenly(chunk, n_shards), streams(n_shards))
        chunks.append([shard(some, stream) for some, stream in shards])
    return chunks


def split_evenly(documents: np.ndarray, n: int) -> list[np.ndarray]:
    """Documents (m, 3) in at most n groups of similar size, each in the documents' order."""
    group_of = spread((documents[:, 2] - documents[:, 1]).tolist(), n)
    groups = [documents[group_of == group] for group in range(n)]
    return [group for group in groups if len(group)]


def spread(lengths: Sequence[int], n: int) -> np.ndarray:
    """For each document to which of n groups of similar size it belongs."""
    group_of, load = np.zeros(len(lengths), int), np.zeros(max(n, 1))
    for i in np.argsort(-np.array(lengths, int), kind="stable"):
        group_of[i] = load.argmin()  # the longest first, to where there is least
        load[group_of[i]] += lengths[i]
    return group_of
