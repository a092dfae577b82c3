"""Loss and gradients of the LoRA weights: a tape of the pieces of each layer.

The documents in which something is learned lie end to end on one axis of N positions. They are
split into chunks that fit into memory (`train.memory`), on a CPU each into a shard for every core.
A layer is eleven pieces (`PIECES`) with named values between them. The forward runs them and keeps
the values that the layer's level names in `memory.KEPT`. The head computes loss and gradient of the
supervised positions (`train.loss`); where labels are weighed, or answers compared, each position's
gradient is then multiplied by a number. The backward takes the VJP of each piece in reverse order,
adds gradients by name, and runs those pieces again whose values were not kept; a piece that runs
twice draws the same dropout mask. What is evaluated when decides the peak of memory: a layer is
finished before the next but one begins.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.adapters.several import untrained
from mlx_qlora.cpu.streams import cores_shared
from mlx_qlora.data.batches import Batch
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.linears import Running
from mlx_qlora.model.llama import KEYS_OF, DecoderLayer, Keys, LlamaForCausalLM
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.model.swiglu import gate_sigmoid, swiglu, swiglu_vjp
from mlx_qlora.train import memory
from mlx_qlora.train.allreduce import GradientAllReduce
from mlx_qlora.train.loss import Weigh, by_batch, losses_by_slice
from mlx_qlora.train.memory import EXPONENTIALS, KEPT, NOTHING, Recompute, Shard
from mlx_qlora.train.score import of_base
from mlx_qlora.tree import bound, flat, nested

# ---- the pieces of a layer -----------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One step of a layer, by the names of the values that it takes and gives.

    `residuals` are values beside its inputs that its VJP needs. Those that `llama.KEYS_OF` names
    are linears, the only ones that learn.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    residuals: tuple[str, ...] = ()


PIECES = (
    Piece("attention_norm", ("x",), ("n",)),
    Piece("qkv", ("n",), ("q0", "k0", "v0")),
    Piece("rotate", ("q0", "k0", "v0"), ("q", "k", "v")),
    Piece("attend", ("q", "k", "v"), ("heads",), residuals=("heads", "residuals")),
    Piece("o", ("heads",), ("o",)),
    Piece("add_attention", ("x", "o"), ("h",)),
    Piece("mlp_norm", ("h",), ("m",)),
    Piece("gate_up", ("m",), ("gate", "up")),
    Piece("swiglu", ("gate", "up"), ("gated",), residuals=("s",)),
    Piece("down", ("gated",), ("down",)),
    Piece("add_mlp", ("h", "down"), ("y",)),
)
MAKER = {name: piece for piece in PIECES for name in (*piece.outputs, *piece.residuals)}
# The values that the VJPs of all pieces before one take: what the backward still needs below it;
# and those that the pieces after one take.
NEEDED_BELOW = [
    {name for piece in PIECES[:i] for name in (*piece.inputs, *piece.residuals)}
    for i in range(len(PIECES))
]
NEEDED_ABOVE = [{name for p in PIECES[i + 1 :] for name in p.inputs} for i in range(len(PIECES))]
# What is kept at no level. Neither it nor its gradient is evaluated by itself, so that it exists
# only while what is made of it is computed.
FLEETING = {name for piece in PIECES[:-1] for name in piece.outputs}.difference(KEPT[NOTHING])

# ---- the tape of one layer -----------------------------------------------------------------------

Stages = Iterator[list[mx.array]]  # arrays to evaluate, and then the next ones
Ahead = Callable[[], None]  # begins to read the next layer


@dataclass
class Tape:
    """The forward of one layer for one shard, and then its backward.

    The forward starts from the value `x` and leaves `y` and what is kept; the backward starts from
    the gradient of `y` and leaves those of the LoRA weights, by their paths in the layer, and of x.
    """

    layer: DecoderLayer
    shard: Shard
    keys: Keys
    compiled: bool
    one_by_one: bool = False  # a matrix is multiplied when the one before it is done with
    values: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, mx.array] = field(default_factory=dict)

    def forward(self, kept: tuple[str, ...], ahead: Ahead = lambda: None) -> Stages:
        """Runs the pieces, and keeps the values of some names; `ahead` reads the next layer."""
        for piece, needed in zip(PIECES, NEEDED_ABOVE):
            outputs = yield from self._run(piece, kept)
            self._release(piece, ahead)
            self.values |= outputs
            self._drop_all_but({*kept, *needed, "y"})
            if FLEETING.isdisjoint(outputs):
                yield arrays_of(outputs)

    def backward(self, wants_dx: bool, ahead: Ahead = lambda: None) -> Stages:
        """Takes the VJPs in reverse; first, those values are made at once that a level may keep."""
        remade = {}
        for name in KEPT[EXPONENTIALS]:
            remade[name] = yield from self._value(name)
        self._drop_all_but({*KEPT[NOTHING]})
        yield arrays_of(remade)
        del remade  # or it would keep them to the end
        for piece, needed in zip(reversed(PIECES), reversed(NEEDED_BELOW)):
            yield from self._vjp(piece)
            self._release(piece, ahead)
            self._drop_all_but(needed)  # before the stage, or they would live through it
            if piece is PIECES[0] and not wants_dx:
                del self.gradients["x"]
            if FLEETING.isdisjoint(self.gradients):
                yield list(self.gradients.values())

    def _run(self, piece: Piece, kept: tuple[str, ...] = ()) -> Running[dict[str, Any]]:
        """The outputs of a piece, and what its VJP needs besides."""
        inputs = yield from self._values(piece.inputs)
        if piece.name == "attend":
            (q, k, v), reach = inputs, self.layer.self_attn.reach
            outputs = self.shard.documents.attend_with_residuals(q, k, v, reach, "weights" in kept)
            return dict(zip(piece.residuals, outputs))
        if piece.name == "swiglu":
            act = self.layer.act
            if self.compiled:
                return {"gated": swiglu(*inputs, compiled=True, act=act)}
            if self.one_by_one and "s" not in {*kept, *self.values}:
                return {"gated": swiglu(*inputs, act=act)}  # memory is short: the VJP has it again
            s = self.values["s"] if "s" in self.values else gate_sigmoid(inputs[0], act)
            return {"gated": swiglu(*inputs, s=s, act=act), "s": s}
        if piece.name in KEYS_OF:
            x = inputs[0].flatten(1)  # heads end to end
            linears, keys = self.layer.linears(piece.name), self.keys[KEYS_OF[piece.name]]
            outputs = (
                (yield from linears.one_by_one(x, keys)) if self.one_by_one else linears(x, keys)
            )
            return dict(zip(piece.outputs, outputs))
        outputs = self._between(piece)(*inputs)
        return dict(zip(piece.outputs, outputs if isinstance(outputs, tuple) else [outputs]))

    def _vjp(self, piece: Piece) -> Running[None]:
        """From the gradients of a piece's outputs to those of its inputs and LoRA weights."""
        one_by_one = self.one_by_one
        # Most pieces without matrices do not need what they were given: it stays uncomputed.
        self.one_by_one = one_by_one and (bool(piece.residuals) or piece.name in KEYS_OF)
        inputs = yield from self._values(piece.inputs)
        self.one_by_one = one_by_one
        gradients: Any = [self.gradients.pop(name) for name in piece.outputs]
        if piece.name == "attend":
            (q, k, v), reach = inputs, self.layer.self_attn.reach
            out, residuals = (self.values[name] for name in piece.residuals)
            vjp = self.shard.documents.attend_vjp
            gradients = vjp(q, k, v, out, residuals, gradients[0], reach)
        elif piece.name == "swiglu":
            known = {"s": self.values.get("s"), "compiled": self.compiled, "act": self.layer.act}
            gradients = swiglu_vjp(*inputs, *gradients, **known)
        elif piece.name in KEYS_OF:
            linears, x = self.layer.linears(piece.name), inputs[0]
            given = x.flatten(1), gradients, self.keys[KEYS_OF[piece.name]]
            dx, of_weights = yield from linears.vjp(*given, self.one_by_one)
            gradients = [dx.reshape(x.shape)]
            self.gradients |= of_weights
        else:
            gradients = mx.vjp(self._between(piece), inputs, gradients)[1]
        for name, gradient in zip(piece.inputs, gradients):
            earlier = self.gradients.get(name)
            self.gradients[name] = gradient if earlier is None else earlier + gradient

    def _release(self, piece: Piece, ahead: Ahead) -> None:
        """Streamed one by one, drops matrices after their last use.

        The next layer is read when the widest are gone: two whole layers would be there until then.
        """
        if self.one_by_one and piece.name in KEYS_OF:
            for linear in self.layer.linears(piece.name).members.values():
                if linear.base_layer.stored is not None:
                    linear.base_layer.drop()
            if piece.name == "gate_up":
                ahead()

    def _between(self, piece: Piece) -> Callable[..., Any]:
        """A piece without matrices, as a function of its inputs."""
        if piece.name == "rotate":
            return partial(self.layer.self_attn.rotate, context=self.shard.documents)
        return getattr(self.layer, piece.name)

    def _value(self, name: str) -> Running[Any]:
        """A value, made again if it was not kept."""
        if name not in self.values:
            self.values = (yield from self._run(MAKER[name])) | self.values
        return self.values[name]

    def _values(self, names: tuple[str, ...]) -> Running[list[Any]]:
        values = []
        for name in names:
            values.append((yield from self._value(name)))
        return values

    def _drop_all_but(self, names: set[str]) -> None:
        self.values = {name: value for name, value in self.values.items() if name in names}


def arrays_of(values: dict[str, Any]) -> list[mx.array]:
    """The arrays of some values; an attention's residuals are those of each of its groups."""
    residuals = [array for group in values.get("residuals", ()) for array in group.arrays()]
    return [value for name, value in values.items() if name != "residuals"] + residuals


def side_by_side(
    tapes: list[Tape], computations: list[Stages], copied: Sequence[FrozenMatrix] = ()
) -> None:
    """Starts the computations of several shards, each in its stream, a stage of each at a time.

    Where matrices are `copied` each for a stage, the stage is finished before the next one begins.
    MLX hands at most some hundred operations to its streams in advance: all of one shard's first
    would leave the other streams without work. Those of one evaluation it hands over breadth first,
    so all shards' mixed.
    """
    running = list(zip(tapes, computations))
    while running:
        stages = []
        for tape, computation in running:
            with mx.stream(tape.shard.stream):
                stages.append(next(computation, None))
        arrays = [array for stage in stages for array in stage or ()]
        (mx.eval if copied else mx.async_eval)(arrays)
        for matrix in copied:
            matrix.drop_copy()
        running = [one for one, stage in zip(running, stages) if stage is not None]
        del stages, arrays  # while the next ones are made


# ---- the engine ----------------------------------------------------------------------------------


def loss_and_grads(
    model: LlamaForCausalLM,
    batch: Batch,
    dropout_key: mx.array | None = None,
    recompute: Recompute = "auto",
) -> tuple[mx.array, float, dict[str, Any]]:
    """The loss of one batch and its gradients, for use in a loop of your own.

    Args:
        model: with LoRA layers.
        dropout_key: `mx.random.key(...)` that draws the dropout masks, or one key for each row
            (B, 2): rows with the same keys have the same gradients however they are batched.
            None turns dropout off.
        recompute: which layers are computed again in the backward instead of keeping their
            activations: "none", "all", "auto" (as memory asks), or how many. The result does not
            depend on it.

    Returns:
        loss_sum: float32 scalar, the sum of nats over supervised tokens, times their weights.
        n_tokens: how many tokens are supervised, or the sum of `batch.weights`; divide once, by the
            sum over the whole step.
        grads: tree of d(loss_sum) / d(LoRA weight), float32, shaped as
            `model.trainable_parameters()`.

    Raises:
        ConfigError: the model has nothing to train, or `recompute` is none of the above.
    """
    # As a run does, and as memory is planned: uncompiled, SwiGLU keeps a sigmoid on a GPU as well.
    engine = Engine(model, recompute, compiled=device.current().compiles)
    loss, n_tokens, grads = engine(flat(model.trainable_parameters()), batch, dropout_key)
    return loss, n_tokens, nested(grads)


class Engine:
    """Differentiates a model's loss with respect to its LoRA weights.

    `recompute` is as in `loss_and_grads`, or the level of each layer; if `compiled`, elementwise
    operations are fused with `mx.compile`. To the loss `kl_weight` times the divergence from what
    the model is when this is made is added, without that model's dropout.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        recompute: Recompute = "auto",
        compiled: bool = True,
        kl_weight: float = 0.0,
    ) -> None:
        trainable = flat(model.trainable_parameters())
        if not trainable:
            raise ConfigError("the model has nothing to train; call add_lora(model, ...) first")
        self.model, self.compiled, self.kl_weight = model, compiled, kl_weight
        self.base = untrained(model) if kl_weight else None
        self.dtype = model.model.embed_tokens.dtype
        self.recompute = memory.check_recompute(recompute, len(model.layers))
        self.matrices = [
            [module for module in layer.modules() if isinstance(module, FrozenMatrix)]
            for layer in model.layers
        ]
        self.trainable = trainable_count(model)
        self.persistent, self.reader = memory.persistent_bytes(model), model.model.reader
        self._read_ahead = self.reader.ahead if self.reader else lambda i: None
        self.one_by_one = any(
            m.quant and m.matmul == "dequantize" for layer in self.matrices for m in layer
        )
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        differentiated = {f"{path}.{name}" for path, _ in model.linears for name in names}
        if missing := sorted(trainable.keys() - differentiated):
            raise ConfigError(
                f"{missing[0]} is trainable, but only LoRA weights can be trained; freeze the "
                "others (model.freeze(), then add_lora)"
            )
        # Below the first layer that learns nothing is kept, and there is no backward.
        self.first = min(int(path.split(".")[2]) for path in trainable)

    def __call__(
        self,
        weights: dict[str, mx.array],
        batch: Batch,
        dropout_key: mx.array | None = None,
        before: dict[str, mx.array] | None = None,
        all_reduce: GradientAllReduce | None = None,
        compare: Weigh | None = None,
    ) -> tuple[mx.array, float, dict[str, mx.array]]:
        """(loss_sum, n_tokens, grads) at the given LoRA weights; both by their paths.

        With a `kl_weight`, loss_sum is (2,): the sum of the loss and, within it, of the divergence.
        The gradients are added to those `before`, of earlier micro-batches. `all_reduce` gets each
        layer's as soon as they are complete; it is for the last batch of a step. `compare` weighs
        the labels of whole rows, whose documents are then in one chunk.
        """
        documents = memory.supervised_documents(batch)
        unit_of = np.arange(len(documents))  # what must not be cut: a document, or a row
        if compare is not None:
            unit_of = np.unique(documents[:, 0], return_inverse=True)[1]
        lengths = np.bincount(unit_of, documents[:, 2] - documents[:, 1]).astype(int).tolist()
        plan = self.planned(lengths)[1]
        grads, n_tokens, loss = dict(before or {}), 0, mx.zeros([2] if self.kl_weight else [])
        weigh = by_batch if compare is None and batch.weights is not None else compare
        # Cast once, not in each linear of each chunk. DoRA's magnitudes stay float32: 16 bits would
        # swallow what they have moved.
        cast = {path: w.astype(self.dtype) if w.ndim > 1 else w for path, w in weights.items()}
        group_of = memory.spread(lengths, plan.n_chunks)[unit_of]
        groups = [documents[group_of == group] for group in np.unique(group_of)]
        with bound(self.model, cast), device.small_cache() if self.reader else nullcontext():
            chunks = memory.chunks_of(self.model, batch, groups, dropout_key)
            for shards in chunks:
                with cores_shared(shards):
                    hook = all_reduce if shards is chunks[-1] else None
                    of_chunk, n = self._chunk(shards, plan.levels, grads, hook, batch, weigh)
                loss, n_tokens = loss + of_chunk, n_tokens + n
        # In the weights' order, and none left out.
        return loss, n_tokens, {p: grads.get(p, mx.zeros(w.shape)) for p, w in weights.items()}

    def planned(self, lengths: list[int]) -> tuple[memory.Footprint, memory.Schedule]:
        """What a batch of documents of these lengths takes, and how it is computed.

        By nothing but the lengths, so that the same batch is always computed the same way.
        """
        sizes = self.model.config, lengths, self.dtype.size
        more: Any = {"one_by_one": self.one_by_one, "has_base": self.base is not None}
        footprint = memory.Footprint(*sizes, streamed=self.reader is not None, **more)
        budget = footprint.budget(self.persistent)
        return footprint, footprint.schedule(self.recompute, budget, self.trainable)

    def limit_memory(self, lengths: list[int]) -> None:
        """Keep MLX's memory where the plan of the largest batch says, of documents that long."""
        footprint, schedule = self.planned(lengths)
        device.limit_memory(sum(footprint.highest(schedule)))

    def _chunk(
        self,
        shards: list[Shard],
        levels: list[int],
        grads: dict[str, mx.array],
        all_reduce: GradientAllReduce | None,
        batch: Batch,
        weigh: Weigh | None,
    ) -> tuple[mx.array, float]:
        """The loss sum of a chunk and its tokens; its gradients are added to `grads`."""
        bases = of_base(self.model, shards, self.base)
        tapes = [
            [Tape(layer, shard, shard.keys[i], self.compiled, self.one_by_one) for shard in shards]
            for i, layer in enumerate(self.model.layers)
        ]
        self._read_ahead(0)
        for tape in tapes[0]:
            with mx.stream(tape.shard.stream):
                tape.values["x"] = self.model.model.embed(tape.shard.tokens)
        for i, layer in enumerate(tapes):
            kept = KEPT[levels[i]] if i >= self.first else ()
            x = [tape.values["x"] for tape in layer]
            ahead = partial(self._read_ahead, min(i + 1, len(tapes) - 1))  # the last one: twice
            self._start(i, layer, [tape.forward(kept, ahead) for tape in layer])
            # The layer before this one is finished before the next one begins: the device always
            # has work at hand, and at most two layers' temporary arrays exist (docs/log.md).
            mx.eval(x)
            ahead()
            for tape, above in zip(layer, tapes[i + 1] if i + 1 < len(tapes) else []):
                above.values["x"] = tape.values.pop("y")

        for tape in tapes[-1] if self.base else ():
            tape.values["base"] = bases.pop(0)  # and nowhere else: it goes when the head has it
        losses: list[mx.array] = []
        if weigh is None:
            n: float = sum(shard.targets.size for shard in shards)
            side_by_side(tapes[-1], [self._loss(tape, losses) for tape in tapes[-1]])
        else:
            n = self._weighed_loss(tapes[-1], losses, batch, weigh)
        complete: set[str] = set()
        for i in reversed(range(self.first, len(tapes))):
            layer = tapes.pop()
            dy = [tape.gradients["y"] for tape in layer]
            ahead = partial(self._read_ahead, i - 1 if i > self.first else -1)
            self._start(i, layer, [tape.backward(i > self.first, ahead) for tape in layer])
            mx.eval(dy)
            ahead()
            for tape, below in zip(layer, tapes[-1] if i > self.first else []):
                below.gradients["y"] = tape.gradients.pop("x")
            for name in layer[0].gradients:
                path = f"model.layers.{i}.{name}"
                terms = [tape.gradients[name].astype(mx.float32) for tape in layer]
                grads[path] = reduce(mx.add, [*terms, grads[path]] if path in grads else terms)
                complete.add(path)
            if all_reduce is not None:
                all_reduce.reduce(grads, complete)
        return mx.stack(losses).sum(0), n

    def _start(self, i: int, layer: list[Tape], computations: list[Stages]) -> None:
        """Starts a layer's computations.

        Of matrices that are dequantised there is one dense copy at a time: how many there would be
        otherwise, at most all seven of the layer, depends on which core is ahead.
        """
        copied = self.matrices[i] if self.one_by_one else ()
        with self.reader.layer(i) if self.reader else nullcontext():
            try:
                side_by_side(layer, computations, copied)
            finally:
                for matrix in copied:
                    matrix.drop_copy()

    def _loss(self, tape: Tape, losses: list[mx.array]) -> Stages:
        """From the last layer's output of a shard to its loss sum and gradient."""
        yield from self._head(tape)
        scored = tape.values.pop("losses")
        losses.append(scored.nats.sum())
        if scored.kl is not None:
            losses[-1] = mx.stack([losses[-1], scored.kl.sum()])
        yield from self._from_head(tape, scored.gradient, losses[-1:])

    def _weighed_loss(
        self, tapes: list[Tape], losses: list[mx.array], batch: Batch, weigh: Weigh
    ) -> float:
        """As `_loss` for all shards of a chunk, whose labels are weighed when all are scored."""
        side_by_side(tapes, [self._head(tape) for tape in tapes])
        scored = [tape.values.pop("losses") for tape in tapes]
        labels = np.concatenate([tape.shard.labels for tape in tapes])
        weighed = weigh(batch, labels, np.concatenate([each.nats for each in scored]))
        losses.append(mx.array(weighed.loss, mx.float32))
        if self.kl_weight:
            kl = weighed.weights @ np.concatenate([each.kl for each in scored])
            losses[-1] = mx.array([weighed.loss, kl], mx.float32)
        ends = np.cumsum([each.nats.size for each in scored])[:-1]
        stages = []
        for tape, weights in zip(tapes, np.split(weighed.weights, ends)):
            gradient = scored.pop(0).gradient * mx.array(weights, mx.float32)[:, None]
            stages.append(self._from_head(tape, gradient, []))
        side_by_side(tapes, stages)
        return weighed.n

    def _head(self, tape: Tape) -> Stages:
        """Leaves what the head says of the last layer's output of a shard."""
        x, softcap = tape.values["y"], self.model.config.logits_softcap
        hidden = self.model.model.normalised(x[tape.shard.positions])
        yield [hidden]
        more = tape.shard.targets, True, softcap, tape.values.pop("base", None), self.kl_weight
        tape.values["losses"] = yield from losses_by_slice(self.model.head, hidden, *more)

    def _from_head(self, tape: Tape, gradient: mx.array, more: list[mx.array]) -> Stages:
        """From the gradient of the supervised positions to that of the last layer's output."""
        x, shard = tape.values.pop("y"), tape.shard

        def supervised(x: mx.array) -> mx.array:
            return self.model.model.normalised(x[shard.positions])

        tape.gradients["y"] = mx.vjp(supervised, [x], [gradient.astype(x.dtype)])[1][0]
        yield [tape.gradients["y"], *more]
