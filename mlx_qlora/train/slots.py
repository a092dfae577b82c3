"""Where a model's trainable weights are, by layer and by piece of it; and other values in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.model.llama import DecoderLayer, LlamaForCausalLM

# Which linears a piece of a layer multiplies with.
PIECES = {
    "project": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "add_attention": ("self_attn.o_proj",),
    "widen": ("mlp.gate_proj", "mlp.up_proj"),
    "add_mlp": ("mlp.down_proj",),
}
LayerSlots = dict[str, list["Slot"]]  # by piece


@dataclass
class Slot:
    """Where a trainable weight lives."""

    path: str
    module: nn.Module
    name: str


def slots_of(model: LlamaForCausalLM, trainable: dict[str, mx.array]) -> list[LayerSlots]:
    """The slots of every layer; each trainable weight, by its path, is in one of them."""
    layers = [
        {piece: _slots_of(layer, i, PIECES[piece], trainable) for piece in PIECES}
        for i, layer in enumerate(model.layers)
    ]
    known = {slot.path for layer in layers for slots in layer.values() for slot in slots}
    assert known == set(trainable), f"no gradient for {sorted(set(trainable) - known)}"
    return layers


def _slots_of(
    layer: DecoderLayer, i: int, linears: tuple[str, ...], trainable: dict[str, mx.array]
) -> list[Slot]:
    """The trainable weights within some of a layer's linears."""
    slots = []
    for linear in linears:
        prefix = f"model.layers.{i}."
        for path in trainable:
            if path.startswith(f"{prefix}{linear}."):
                *owners, name = path.removeprefix(prefix).split(".")
                module: Any = layer
                for owner in owners:
                    module = module[owner]
                slots.append(Slot(path, module, name))
    return slots


@contextmanager
def lent(layers: list[LayerSlots], weights: dict[str, mx.array], dtype: mx.Dtype) -> Iterator[None]:
    """Lends a model other LoRA weights, in the compute dtype, and takes them back after."""
    slots = [slot for layer in layers for piece in layer.values() for slot in piece]
    before = [slot.module[slot.name] for slot in slots]
    for slot in slots:
        weight = weights[slot.path]
        # The lengths of DoRA stay float32: 16 bits would swallow what they have moved.
        slot.module[slot.name] = weight.astype(dtype) if weight.ndim > 1 else weight
    try:
        yield
    finally:
        for slot, array in zip(slots, before):
            slot.module[slot.name] = array
