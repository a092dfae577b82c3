"""What a run's parts come to: arithmetic, bytes and lengths, from shapes and headers alone."""

import numpy as np

from mlx_qlora import backend
from mlx_qlora.config import RunConfig
from mlx_qlora.data.batches import packed_width, padded_width
from mlx_qlora.data.examples import Examples
from mlx_qlora.errors import ConfigError
from mlx_qlora.machines import Machine
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, target_paths
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.model.weights import Checkpoint, packed_size
from mlx_qlora.train.memory import LAYER, MLP, Schedule, activation_bytes


def flops_per_token(
    llama: LlamaConfig, levels: list[int], lengths: list[int], supervised: float
) -> float:
    """Multiplications and additions of a step, per position.

    Two for each weight forward and two back, two more where the backward computes it again; the
    head at supervised positions alone; attention up to the diagonal.
    """
    attention, mlp = weights_of_layer(llama)
    typical = sum(n * n for n in lengths) / max(sum(lengths), 1)
    # q @ k and p @ v, half of T each
    scores = llama.num_attention_heads * llama.head_dim * typical
    total = 4.0 * llama.vocab_size * llama.hidden_size * supervised
    for level in levels:
        total += 4 * (attention + mlp) + 2 * scores * 3.5
        total += 2 * (2 / 3) * mlp if level >= MLP else 0
        total += 2 * attention + 2 * scores if level == LAYER else 0
    return total


def bytes_read(llama: LlamaConfig, levels: list[int], itemsize: int) -> int:
    """Bytes of dense weights that a micro-batch takes from memory, however many rows it has.

    All of them forward and back, those of a layer that is recomputed once more.
    """
    of_layer = sum(weights_of_layer(llama))
    passes = sum(3 if level == LAYER else 2 for level in levels)
    return itemsize * (passes * of_layer + 2 * llama.vocab_size * llama.hidden_size)


def weights_of_layer(llama: LlamaConfig) -> tuple[int, int]:
    """How many frozen weights the linears of one layer's attention have, and those of its MLP."""
    D, F = llama.hidden_size, llama.intermediate_size
    heads = 2 * llama.num_attention_heads + 2 * llama.num_key_value_heads
    return D * llama.head_dim * heads, 3 * D * F


def documents_of(
    config: RunConfig, examples: Examples | None
) -> tuple[list[int], list[int], float]:
    """Lengths of a micro-batch's documents, and which share of its positions is supervised.

    First those of the largest micro-batch, which decides memory, then those of a usual one, which
    decides speed.
    """
    rows = config.training.rows
    supervised = 1.0 if config.data.train_on == "all" else 0.25
    if examples is None:
        full = [padded_width(config.data.max_length - 1)] * rows
        return full, full, supervised
    lengths = np.sort(examples.lengths - 1)
    if not config.data.packing:
        return lengths[-rows:].tolist(), _standing_for(lengths, rows), supervised
    most = max(config.data.max_length, int(examples.lengths.max()))
    positions = rows * packed_width(examples.lengths, rows, most)
    # The longest document, and of the usual mixture as many as fill the rows beside it.
    longest, others = int(lengths[-1]), lengths[:-1]
    n = round(len(others) * (positions - longest) / max(int(others.sum()), 1))
    mixture = [*_standing_for(others, n), longest]
    return mixture, mixture, supervised


def _standing_for(lengths: np.ndarray, n: int) -> list[int]:
    """At most n lengths with the mean of all: each is that of an equal part of the sorted ones."""
    n = min(n, len(lengths))
    return [round(float(part.mean())) for part in np.array_split(lengths, n)] if n else []


def itemsize_of(config: RunConfig, where: Machine) -> int:
    """Bytes of a number in the dtype that the run computes in."""
    if config.model.dtype == "auto":
        return where.itemsize
    return backend.compute_dtype(config.model.dtype).size


def base_bytes(
    model: LlamaForCausalLM, checkpoint: Checkpoint, config: RunConfig, where: Machine
) -> tuple[int, int]:
    """Bytes of the frozen weights as they will be kept, and of dequantised copies of them."""
    itemsize, quantize = itemsize_of(config, where), config.model.quantize()
    dense = itemsize * packed_size(model, checkpoint, quantize)
    memory = where.device, where.working_set_bytes
    keeps_copy = backend.frozen_matmul(config.model.frozen_matmul, dense, *memory) == "resident"
    base = resident = 0
    for path, module in model.named_modules():
        if not isinstance(module, FrozenMatrix):
            continue
        quant = checkpoint.packing.get(path) or quantize
        size = module.weight.size
        if quant is None:
            base += size * itemsize
            continue
        scale_bytes = 2 * itemsize if quant.mode == "affine" else 1
        base += size * quant.bits // 8 + size // quant.group_size * scale_bytes
        resident += size * itemsize if keeps_copy else 0
    return base, resident


def trainable(model: LlamaForCausalLM, lora: LoraConfig) -> int:
    """How many numbers a run trains; the model may be one without weights.

    Raises:
        ConfigError: a target that matches nothing.
    """
    try:
        paths = target_paths(model, lora)
    except ConfigError as error:
        raise ConfigError(f"the plan cannot be made: {error}") from None
    modules = dict(model.named_modules())
    shapes = ((path, modules[path].shape) for path in paths)
    return sum(
        lora.rank_of(path) * (rows + columns) + (rows if lora.use_dora else 0)
        for path, (rows, columns) in shapes
    )


def longest_context(llama: LlamaConfig, itemsize: int, standing: int, where: Machine) -> int:
    """The longest document that fits alone, everything recomputed; a multiple of 64.

    Never longer than the model has positions for.
    """
    all_layers = Schedule(1, [LAYER] * llama.num_hidden_layers)
    low, high = 0, llama.max_position_embeddings // 64
    while low < high:  # the need grows with the length
        middle = (low + high + 1) // 2
        lengths = [64 * middle]
        need = standing + sum(activation_bytes(llama, all_layers, lengths, itemsize, where))
        low, high = (middle, high) if need <= where.working_set_bytes else (low, middle - 1)
    return 64 * low
