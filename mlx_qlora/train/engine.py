"""Gradients of the LoRA weights, layer by layer.

The forward keeps, of each layer, what lies between its four pieces (`DecoderLayer`): then the
backward of a piece is MLX's own derivative of that piece, and because MLX computes only what is
asked for, no frozen matrix is multiplied a second time. What a layer keeps is chosen by memory:

    level          kept of a layer                      computed again in the backward
    NOTHING        the rest, and all exponentials       norms
    EXPONENTIALS   x, q, k, v, heads, h, gate, up       attention weights and sigmoid
    MLP            x, q, k, v, heads, h                 and gate and up
    LAYER          x                                    and everything else

A layer is evaluated before the next but one begins, so that at most two layers' temporary arrays
exist at once (docs/log.md has the figures).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.cpu.attention import Residuals
from mlx_qlora.cpu.exponentials import sigmoid
from mlx_qlora.data.batches import Batch
from mlx_qlora.device import this_machine
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import DecoderLayer, LlamaForCausalLM, swiglu, swiglu_back
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.train.allreduce import GradientAllReduce
from mlx_qlora.train.loss import losses_by_piece
from mlx_qlora.train.memory import (
    LAYER,
    MLP,
    NOTHING,
    Recompute,
    Schedule,
    Shard,
    budget_for,
    check_recompute,
    chunks_of,
    cores_shared,
    persistent_bytes,
    schedule,
    supervised_documents,
)
from mlx_qlora.tree import flat, nested

# ---- LoRA weights --------------------------------------------------------------------------------


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


# ---- one layer -----------------------------------------------------------------------------------


Arrays = Sequence[mx.array]


Pieces = Iterator[Arrays]  # what is to be computed next


@dataclass
class Kept:
    """What the backward of a layer of a part starts from; None where it has to be made again."""

    x: mx.array
    qkv: Arrays | None = None
    heads: tuple[mx.array, list[Residuals]] | None = None
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


def noted(notes: list[Residuals]) -> list[mx.array]:
    """The arrays of some notes."""
    return [array for note in notes for array in note.arrays()]


@dataclass
class Walk:
    """One part on its way up and down the layers."""

    part: Shard
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
        heads, notes = kept.heads or documents.attend_with_residuals(q, k, v)
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
        dqkv = documents.attend_vjp(q, k, v, heads, notes, dheads)
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


# ---- the engine ----------------------------------------------------------------------------------


def loss_and_grads(
    model: LlamaForCausalLM,
    batch: Batch,
    dropout_key: mx.array | None = None,
    recompute: Recompute = "auto",
) -> tuple[mx.array, int, dict[str, Any]]:
    """The loss of one batch and its gradients, for use in a loop of your own.

    Args:
        model: with LoRA layers.
        batch: tokens and labels.
        dropout_key: `mx.random.key(...)` that draws the dropout masks, or one key for each row
            (B, 2): rows with the same keys have the same gradients however they are batched.
            None turns dropout off.
        recompute: which layers are computed again in the backward instead of keeping their
            activations: "none", "all", "auto" (as memory asks), or how many. The result does not
            depend on it.

    Returns:
        loss_sum: float32 scalar, the sum of nats over supervised tokens.
        n_tokens: how many tokens are supervised; divide once, by the sum over the whole step.
        grads: tree of d(loss_sum) / d(LoRA weight), float32, shaped as
            `model.trainable_parameters()`.

    Raises:
        ConfigError: the model has nothing to train, or `recompute` is none of the above.
    """
    engine = Engine(model, recompute, compiled=False)
    loss, n_tokens, grads = engine(flat(model.trainable_parameters()), batch, dropout_key)
    return loss, n_tokens, nested(grads)


class Engine:
    """Differentiates a model's loss with respect to its LoRA weights.

    Args:
        model: with LoRA layers.
        recompute: as in `loss_and_grads`, or the level of each layer.
        compiled: fuse elementwise operations with `mx.compile`.

    Raises:
        ConfigError: the model has nothing to train, or `recompute` is none of its words.
    """

    def __init__(
        self, model: LlamaForCausalLM, recompute: Recompute = "auto", compiled: bool = True
    ) -> None:
        trainable = flat(model.trainable_parameters())
        if not trainable:
            raise ConfigError("the model has nothing to train; call add_lora(model, ...) first")
        self.model, self.compiled = model, compiled
        self.recompute = check_recompute(recompute, len(model.layers))
        self.standing = persistent_bytes(model)
        self.slots = slots_of(model, trainable)
        self.matrices = [
            [module for module in layer.modules() if isinstance(module, FrozenMatrix)]
            for layer in model.layers
        ]
        # Below the first layer that learns there is no backward at all.
        self.first = next(i for i, layer in enumerate(self.slots) if any(layer.values()))

    def __call__(
        self,
        weights: dict[str, mx.array],
        batch: Batch,
        dropout_key: mx.array | None = None,
        before: dict[str, mx.array] | None = None,
        all_reduce: GradientAllReduce | None = None,
    ) -> tuple[mx.array, int, dict[str, mx.array]]:
        """(loss_sum, n_tokens, grads) at the given LoRA weights; both by their paths.

        Args:
            weights: by path.
            batch: tokens and labels.
            dropout_key: as in `loss_and_grads`.
            before: gradients of the micro-batches before, which these are added to.
            all_reduce: told of each layer whose gradients are done; for a step's last batch.
        """
        documents = supervised_documents(batch)
        grads = dict(before or {})
        loss, n_tokens = mx.array(0.0), 0
        with lent(self.slots, weights, self.model.model.embed_tokens.dtype):
            how = self._schedule(documents)
            waves = list(chunks_of(self.model, batch, documents, how.n_chunks, dropout_key))
            for parts in waves:
                told = all_reduce if parts is waves[-1] else None
                with cores_shared(parts):
                    loss = loss + self._wave(parts, how.levels, grads, told)
                n_tokens += sum(part.targets.size for part in parts)
        # In the weights' order, and none left out.
        return loss, n_tokens, {p: grads.get(p, mx.zeros(w.shape)) for p, w in weights.items()}

    def _schedule(self, documents: np.ndarray) -> Schedule:
        """How the documents are computed: as memory asks, and always the same for the same ones."""
        lengths = (documents[:, 2] - documents[:, 1]).tolist()
        config, itemsize = self.model.config, self.model.model.embed_tokens.dtype.size
        budget = budget_for(config, lengths, itemsize, self.standing, this_machine())
        return schedule(config, lengths, itemsize, self.recompute, budget)

    def _wave(
        self,
        parts: list[Shard],
        levels: list[int],
        grads: dict[str, mx.array],
        all_reduce: GradientAllReduce | None,
    ) -> mx.array:
        """The loss sum of some parts; their gradients are added to `grads`."""
        walks = [Walk(part, self._embed(part)) for part in parts]
        self._forward(walks, levels)
        loss = self._losses(walks)
        self._backward(walks, grads, all_reduce)
        return loss

    def _embed(self, part: Shard) -> mx.array:
        with mx.stream(part.stream):
            return self.model.model.embed_tokens(part.tokens)

    # ---- up --------------------------------------------------------------------------------------

    def _forward(self, walks: list[Walk], levels: list[int]) -> None:
        before: list[mx.array] = []
        for i, layer in enumerate(self.model.layers):
            with dense_for_now(self.matrices[i]):
                side_by_side(walks, [self._climb(layer, walk, i, levels[i]) for walk in walks])
            mx.eval(before)  # of the layer before this one: the device always has some at hand
            before = [walk.x for walk in walks]

    def _climb(self, layer: DecoderLayer, walk: Walk, i: int, level: int) -> Pieces:
        """One layer's forward; what is kept of it goes to the walk."""
        x, keys, documents = walk.x, walk.part.keys[i], walk.part.documents
        q, k, v = qkv = layer.project(x, documents, keys)
        yield qkv
        learns = i >= self.first
        heads = documents.attend_with_residuals(q, k, v, learns and level == NOTHING)
        yield [heads[0], *noted(heads[1])]
        h = layer.add_attention(x, heads[0], keys)
        wide = layer.widen(h, keys)
        s = None if self.compiled else sigmoid(wide[0])
        yield [h, *wide]
        walk.x = layer.add_mlp(h, swiglu(*wide, s, self.compiled), keys)
        if learns:
            walk.kept.append(keep(level, x, qkv, heads, h, wide, s))
        yield [walk.x]

    def _losses(self, walks: list[Walk]) -> mx.array:
        """The loss sum; and each walk's gradient at the last layer's output."""
        losses: list[mx.array] = []
        side_by_side(walks, [self._lose(walk, losses) for walk in walks])
        return mx.stack(losses).sum() if losses else mx.array(0.0)

    def _lose(self, walk: Walk, losses: list[mx.array]) -> Pieces:
        def supervised(x: mx.array) -> mx.array:
            return self.model.model.norm(x[walk.part.positions])

        hidden, targets = supervised(walk.x), walk.part.targets
        yield [hidden]
        found = yield from losses_by_piece(self.model.head, hidden, targets, differentiate=True)
        gradient = found.gradient.astype(walk.x.dtype)
        walk.dx = mx.vjp(supervised, [walk.x], [gradient])[1][0]
        losses.append(found.nats.sum())
        yield [walk.dx, losses[-1]]

    # ---- down ------------------------------------------------------------------------------------

    def _backward(
        self, walks: list[Walk], grads: dict[str, mx.array], all_reduce: GradientAllReduce | None
    ) -> None:
        before: list[Any] = []
        done: set[str] = set()
        for i in reversed(range(self.first, len(self.model.layers))):
            layer, slots = self.model.layers[i], self.slots[i]
            descents = [Descent(layer, slots, walk, i, self.compiled) for walk in walks]
            with dense_for_now(self.matrices[i]):
                side_by_side(
                    walks, [descent.pieces(wants_dx=i > self.first) for descent in descents]
                )
            mx.eval(before)
            for path in descents[0].grads if descents else ():
                own = [descent.grads[path].astype(mx.float32) for descent in descents]
                own += [grads[path]] if path in grads else []
                grads[path] = reduce(mx.add, own)
                done.add(path)
            if all_reduce is not None:
                all_reduce.reduce(grads, done)
            before = [walk.dx for walk in walks] if i > self.first else []


@contextmanager
def dense_for_now(matrices: list[FrozenMatrix]) -> Iterator[None]:
    """One dequantised copy of each of a layer's matrices, for all graphs built within."""
    with ExitStack() as stack:
        for matrix in matrices:
            stack.enter_context(matrix.dense_for_now())
        yield


def side_by_side(walks: list[Walk], pieces: list[Pieces]) -> None:
    """Starts the pieces of several walks, each in its stream, one of each at a time.

    MLX hands at most some hundred operations to its streams in advance: all of one walk's first
    would leave the other streams without work. Of one graph it hands over those of all walks mixed.
    """
    going = list(zip(walks, pieces))
    while going:
        found = []
        for walk, own in going:
            with mx.stream(walk.part.stream):
                found.append(next(own, None))
        going = [one for one, arrays in zip(going, found) if arrays is not None]
        mx.async_eval([array for arrays in found for array in arrays or ()])
