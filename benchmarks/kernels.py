"""How many kernels does a GPU run for one layer of a training step?

Run as: python benchmarks/kernels.py --device metal --rows 3

The graphs of a layer's forward and backward are built by a GPU's route, on whatever machine this
is, and counted without being computed: an operation is a kernel unless it only looks at its input
in another way (a reshape, a slice), a copy of arrays end to end is one for each of them. MLX's
fused attention is a kernel forward. Backward it runs forward again for its log-sum, and is as many
kernels as `ATTENTION_VJP` says (read in MLX 0.32's source).
"""

import argparse
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import shapes

from mlx_qlora import device
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train import memory
from mlx_qlora.train.engine import Engine, Tape
from mlx_qlora.tree import bound, flat

# What takes no kernel of its own: the same numbers, looked at in another way.
VIEWS = {
    *("Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice"),
    *("Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View", "CustomTransforms"),
}
# What stands for MLX's fused functions here: the model has no such operations.
ATTENTION = "attention"
MARKERS = {"ErfInv": ATTENTION, "ArcCosh": "RMSNorm", "ArcTanh": "RoPE"}
ATTENTION_VJP = 12
MOST = {"metal": (70, 240)}  # kernels of a layer, forward and backward: what is asserted
# Examples of a data set of chats: half of them shorter than 80 tokens.
MEDIAN, SIGMA = 80, 0.7


def main() -> None:
    """Prints a table and a JSON line, and asserts that there are not more than `MOST`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("metal", "cuda"), default="metal")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-3.1-8b")
    parser.add_argument("--rows", default=3, type=int, help="packed rows of 2,048 tokens")
    parser.add_argument("--dropout", default=0.1, type=float)
    args = parser.parse_args()
    here = {"metal": device.METAL, "cuda": device.CUDA}[args.device]
    batch = packed(args.rows)
    found = counted(args.shape, here, batch, args.dropout)
    names = sorted({name for counts in found.values() for name in counts})
    for name in names:
        print(f"{name[:60]:60} {found['forward'][name]:6} {found['backward'][name]:6}")
    totals = {way: sum(counts.values()) for way, counts in found.items()}
    print(f"{'kernels of a layer':60} {totals['forward']:6} {totals['backward']:6}")
    documents = len(batch.documents)
    print(json.dumps({"benchmark": "kernels", **vars(args), "documents": documents, **totals}))
    for total, most in zip(totals.values(), MOST.get(args.device, ())):
        assert total <= most, f"{total} kernels, more than {most}"


def packed(rows: int, T: int = 2048, seed: int = 0) -> Batch:
    """Rows filled with documents of chats' lengths, of which a part is learned."""
    random, documents = np.random.default_rng(seed), []
    for row in range(rows):
        start = 0
        while start < T:
            length = int(np.clip(random.lognormal(np.log(MEDIAN), SIGMA), 8, T - start))
            length = T - start if T - start - length < 8 else length
            documents.append((row, start, start + length))
            start += length
    labels = np.full((rows, T), IGNORE, np.int32)
    labels[:, ::4] = 1
    for row, _, end in documents:
        labels[row, end - 1] = 1
    return Batch(mx.zeros((rows, T), mx.int32), mx.array(labels), np.array(documents, np.int32))


def counted(shape: str, here: device.Device, batch: Batch, dropout: float) -> dict[str, Counter]:
    """Kernels of the second of two layers, by name: `forward` and `backward`."""
    # A small embedding: a graph has the same operations whatever their sizes.
    config = replace(shapes.config(shape, 2), vocab_size=1024)
    with device.use(here):
        model = shapes.build_from(config, "quantized" if here.packed_matmul else "resident")
        add_lora(model, LoraConfig(r=16, lora_dropout=dropout))
        with ExitStack() as stack:
            for name, function in stand_ins().items():
                stack.enter_context(mock.patch.object(mx.fast, name, function))
            return _counted(model, batch)


def _counted(model: Any, batch: Batch) -> dict[str, Counter]:
    trainable = flat(model.trainable_parameters())
    mx.eval(model.parameters())
    engine = Engine(model, "none", compiled=True)
    documents = memory.supervised_documents(batch)
    [[shard]] = memory.chunks_of(model, batch, [documents], mx.random.key(0))
    mx.eval(shard.tokens, shard.keys, shard.documents.positions)
    with bound(model, {path: leaf(w.astype(engine.dtype)) for path, w in trainable.items()}):
        tape = Tape(model.layers[1], shard, shard.keys[1], engine.compiled)
        x = leaf(mx.zeros((shard.tokens.size, model.config.hidden_size), engine.dtype))
        tape.values["x"] = x
        stages = tape.forward(memory.KEPT[memory.NOTHING])
        forward = [array for stage in stages for array in stage]
        counts = {"forward": kernels([*forward, tape.values["y"]])}
        for name, value in tape.values.items():
            if isinstance(value, mx.array):
                tape.values[name] = leaf(value)
        tape.gradients["y"] = leaf(x)
        backward = [array for stage in tape.backward(wants_dx=True) for array in stage]
    counts["backward"] = kernels(backward)
    counts["backward"][ATTENTION] *= ATTENTION_VJP // 3  # three gradients stand for all
    return counts


def leaf(array: mx.array) -> mx.array:
    """Numbers of the same shape and dtype that are there already."""
    made = mx.zeros(array.shape, array.dtype)
    mx.eval(made)
    return made


def stand_ins() -> dict[str, Any]:
    """MLX's fused functions, each with one operation forward and one for each gradient.

    Where MLX computes on a CPU it builds their graphs from many.
    """

    def fused(marker: Any, n: int) -> Any:
        made: Any = mx.custom_function(lambda *arrays: marker(arrays[0]))

        @made.vjp
        def gradients(arrays: Any, dy: mx.array, _: mx.array) -> Any:
            if n == 1:
                return marker(dy)
            return tuple(marker(dy if x.shape == dy.shape else x) for x in arrays)

        return lambda *arrays, **_: made(*arrays[:n])

    return {
        "scaled_dot_product_attention": fused(mx.erfinv, 3),
        "rms_norm": fused(mx.arccosh, 1),
        "rope": fused(mx.arctanh, 1),
    }


def kernels(outputs: Sequence[mx.array]) -> Counter:
    """The kernels of a graph that has not been computed, by name."""
    dot = io.StringIO()
    mx.export_to_dot(dot, **{f"out{i}": array for i, array in enumerate(outputs)})
    text = dot.getvalue()
    into = Counter(re.findall(r"-> (\d+)$", text, re.MULTILINE))
    counts: Counter = Counter()
    for node, name in re.findall(r'(\d+) \[label ="(\w+)"', text):
        if name not in VIEWS:
            counts[MARKERS.get(name, name)] += into[node] if name == "Concatenate" else 1
    return counts


if __name__ == "__main__":
    main()
