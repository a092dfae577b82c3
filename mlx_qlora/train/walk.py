"""One part's way up the layers and down again: what a layer keeps, and its backward.

What lies between a layer's four pieces is kept, or made again; the backward of a piece is then
MLX's own derivative of that piece.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_qlora.model.attention import Note
from mlx_qlora.model.llama import DecoderLayer
from mlx_qlora.model.swiglu import swiglu, swiglu_back
from mlx_qlora.train.memory import LAYER, MLP, NOTHING
from mlx_qlora.train.parts import Part
from mlx_qlora.train.slots import LayerSlots

Arrays = Sequence[mx.array]
Pieces = Iterator[Arrays]  # what is to be computed next


@dataclass
class Kept:
    """What the backward of a layer of a part starts from; None where it has to be made again."""

    x: mx.array
    qkv: Arrays | None = None
    heads: tuple[mx.array, list[Note]] | None = None
    h: mx.array | None = None
    wide: Arrays | None = None
    s: mx.array | None = None


def keep(level: int, x: Any, qkv: Any, heads: Any, h: Any, wide: Any, s: Any) -> Kept:
    """What of a layer's forward is kept."""
    if level == LAYER:
        return Kept(x)
    if level == MLP:
        return Kept(x, qkv, heads, h)
    return Kept(x, qkv, heads, h, wide, s if level == NOTHING else None)


def noted(notes: list[Note]) -> list[mx.array]:
    """The arrays of some notes."""
    return [array for note in notes for array in note.arrays()]


@dataclass
class Walk:
    """One part on its way up and down the layers."""

    part: Part
    x: mx.array
    dx: mx.array | None = None
    kept: list[Kept] = field(default_factory=list)


class Descent:
    """One layer's backward for one part; `grads` has the gradients of its LoRA weights after."""

    def __init__(
        self, layer: DecoderLayer, slots: LayerSlots, walk: Walk, i: int, compiled: bool
    ) -> None:
        self.layer, self.slots, self.walk, self.compiled = layer, slots, walk, compiled
        self.documents, self.keys = walk.part.documents, walk.part.keys[i]
        self.grads: dict[str, mx.array] = {}

    def pieces(self, wants_dx: bool) -> Pieces:
        """From the gradient of the layer's output, in the walk, to that of its input."""
        layer, keys, documents, kept = self.layer, self.keys, self.documents, self.walk.kept.pop()
        x, dy, compiled = kept.x, self.walk.dx, self.compiled
        assert dy is not None
        q, k, v = kept.qkv or layer.project(x, documents, keys)
        heads, notes = kept.heads or documents.attend_and_note(q, k, v)
        h = kept.h if kept.h is not None else layer.add_attention(x, heads, keys)
        gate, up = kept.wide or layer.widen(h, keys)
        s = kept.s
        del kept
        yield [q, k, v, heads, *noted(notes), h, gate, up]

        gated = swiglu(gate, up, s, compiled)
        dh, dgated = self.pull("add_mlp", partial(layer.add_mlp, keys=keys), [h, gated], [dy])
        dwide = swiglu_back(gate, up, dgated, s, compiled)
        del gate, up, s, gated, dgated
        yield [*dwide, *self.grads.values()]
        dh = dh + self.pull("widen", lambda h: layer.widen(h, keys), [h], dwide)[0]
        del dwide
        yield [dh, *self.grads.values()]
        dx, dheads = self.pull(
            "add_attention", partial(layer.add_attention, keys=keys), [x, heads], [dh]
        )
        yield [dheads, *self.grads.values()]
        dqkv = documents.pull(q, k, v, heads, notes, dheads)
        yield dqkv
        project: Any = lambda x: layer.project(x, documents, keys)  # noqa: E731
        dx = dx + self.pull("project", project, [x], dqkv)[0]
        self.walk.dx = dx if wants_dx else None
        yield [*self.grads.values(), *([dx] if wants_dx else [])]

    def pull(
        self, piece: str, forward: Callable[..., Any], inputs: Arrays, cotangents: Arrays
    ) -> Arrays:
        """Gradients of a piece's inputs; those of its weights go to `grads`."""
        slots = self.slots[piece]
        weights = [slot.module[slot.name] for slot in slots]
        n = len(inputs)

        def run(*arrays: mx.array) -> Any:
            for slot, weight in zip(slots, arrays[n:]):
                slot.module[slot.name] = weight
            out = forward(*arrays[:n])
            return list(out) if isinstance(out, tuple) else out

        try:
            _, gradients = mx.vjp(run, [*inputs, *weights], list(cotangents))
        finally:  # or tracers would stay in the modules
            for slot, weight in zip(slots, weights):
                slot.module[slot.name] = weight
        self.grads |= {slot.path: gradient for slot, gradient in zip(slots, gradients[n:])}
        return gradients[:n]
