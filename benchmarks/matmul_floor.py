"""How near our training step comes to its own matmuls: the step's time over that of them, bare.

Run as: python benchmarks/matmul_floor.py --rounds 5
        python benchmarks/matmul_floor.py --shape llama-3.1-8b

The floor is every matmul that a step must do which computes nothing twice, with its real shapes
and transpositions, on random data: the frozen linears forward and for the gradient of their input
(the first layer's q, k and v have none to hand on), LoRA's two forward and four backward, each
document's attention with the queries of the heads that share keys in one product, and the head
for the supervised tokens. Attention is counted as Flash attention does it, with two products
forward and five backward, over all T x T scores; a kernel that is causal could do with half of
that, and one that keeps its weights with six products. Nothing else is in the floor: no norm,
softmax, SwiGLU, loss, dequantising, or optimiser.

The matmuls run back to back, one evaluation a layer. On a CPU they do so in two ways: one document
behind the other with all of BLAS's threads, or as our engine shares documents out over cores, one
thread each; of each batch the faster way is the floor. The step is our engine and AdamW, whatever
its memory planner chooses. Floor and step take turns, batch by batch and round by round, in one
process; a first round is left out.

SmolLM2-135M is the real model, on the batches of `train_speed.py`. Another shape has random 4-bit
weights and documents of random tokens, all of them supervised; on a CPU, a few layers and short
documents, unless told otherwise. Asserted: the step takes at most so many times the floor.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import mlx.core as mx
import numpy as np
import shapes
import train_speed
from trainers import ALPHA, MODEL, RANK, RATE, own_rows

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.cpu import blas
from mlx_qlora.cpu.streams import streams
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.model.lora import lora_layers
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.memory import (
    chunks_of,
    default_chunks,
    split_evenly,
    supervised_documents,
)
from mlx_qlora.train.optim import AdamW

MOST_TIMES_FLOOR = 1.8
REST = 0.1  # seconds between timings: OpenBLAS's threads spin for a while after a change
IN_ADVANCE = 8  # products that a stream gets at a time; MLX takes some hundred in all
DISTINCT_BYTES = 1e9  # of random weights, so that few layers' stay in a cache; at least two layers'

Product = tuple[mx.array, mx.array]
NO_DX = ("q_proj", "k_proj", "v_proj")  # of the first layer: nothing below it learns


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--batches", type=int, help=f"default: 6 of {MODEL}, 1 of other shapes")
    parser.add_argument("--batch-size", type=int, help=f"default: 4 of {MODEL}, 1 of other shapes")
    parser.add_argument("--max-length", default=512, type=int, help=f"tokens, of {MODEL}'s data")
    parser.add_argument("--shape", default=MODEL, choices=list(shapes.SHAPES))
    parser.add_argument("--layers", type=int, help="of another shape; default: 2 on a CPU, or all")
    parser.add_argument("--tokens", type=int, help="of its documents; default: 256 on a CPU, 2048")
    args = parser.parse_args()
    on_cpu = device.current().kind == "cpu"
    mx.random.seed(0)

    if args.shape == MODEL:
        model = mq.load(MODEL)[0]
        batches = train_speed.choose(args.batches or 6, args.batch_size or 4, args.max_length)
    else:
        args.layers = args.layers or (2 if on_cpu else None)
        args.tokens = args.tokens or (256 if on_cpu else 2048)
        model = shapes.build(args.shape, args.layers)
        ids = np.random.default_rng(0).integers(model.config.vocab_size, size=args.tokens + 1)
        document = ids.tolist(), [True] * len(ids)
        batches = [[document] * (args.batch_size or 1)] * (args.batches or 1)
    mq.add_lora(model, mq.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0))

    made = own_rows(batches)
    with blas.threads(1):  # as around a run of the training loop
        maker = Maker(model)
        floors = [maker.floors(batch) for batch in made]
        step = our_step(model, made)
        rounds = [one_round(floors, step, made) for _ in range(args.rounds + 1)][1:]
    results = summary(rounds, floors, made)
    show(args.shape, results)
    total = results["total"]
    speeds = {"matmuls, bare": total["floor_tokens"], "our step": total["step_tokens"]}
    speeds = {name: speed["median"] for name, speed in speeds.items()}
    name = "matmul_floor" if args.shape == MODEL else f"matmul_floor-{args.shape}"
    plot = measure.bars(name, f"{args.shape}, LoRA r={RANK}", "real tokens/s", speeds)
    measure.finish("matmul_floor", vars(args), results, plot)
    check(results)


# ---- the floor ---------------------------------------------------------------------------------


@dataclass
class Share:
    """The matmuls of some documents, computed in a stream of their own.

    Attributes:
        stream: where.
        stages: each layer's forward, the head's, each layer's backward from the last one on.
    """

    stream: mx.Stream
    stages: list[list[Product]]


@dataclass
class Floor:
    """The matmuls of a batch, and how they may be computed.

    Attributes:
        flops: of all of them.
        ways: name -> chunks of shares that are computed side by side.
    """

    flops: int
    ways: dict[str, list[list[Share]]]


class Maker:
    """Makes floors of a model's shapes.

    Args:
        model: with LoRA layers.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.dtype = device.current().compute_dtype
        first = [(p, layer) for p, layer in lora_layers(model) if p.startswith("model.layers.0.")]
        sizes = {path.rpartition(".")[2]: layer.base_layer.shape for path, layer in first}
        layer_bytes = sum(out * into for out, into in sizes.values()) * self.dtype.size
        n = min(max(2, int(DISTINCT_BYTES // layer_bytes)), self.config.num_hidden_layers)
        self.weights = [
            {
                name: (self.new(out, into), self.new(RANK, into), self.new(out, RANK))
                for name, (out, into) in sizes.items()
            }
            for _ in range(n)
        ]
        self.head = self.new(self.config.vocab_size, self.config.hidden_size)
        self.known: dict[tuple[int, ...], mx.array] = {}

    def new(self, *shape: int) -> mx.array:
        """A random matrix of its own."""
        array = mx.random.normal(shape).astype(self.dtype)
        mx.eval(array)
        return array

    def some(self, *shape: int) -> mx.array:
        """A random matrix, the same one for each use of a shape: activations."""
        if shape not in self.known:
            self.known[shape] = self.new(*shape)
        return self.known[shape]

    def floors(self, batch: Batch) -> Floor:
        """A batch's floor."""
        documents = supervised_documents(batch)
        chunks = default_chunks((documents[:, 2] - documents[:, 1]).tolist())
        groups = split_evenly(documents, chunks)
        sizes = [len(chunk) for chunk in chunks_of(self.model, batch, groups)]
        labels, lanes = np.array(batch.labels), streams(sizes[0])
        shares = [
            self.share(part, labels, lanes[i % sizes[0]])
            for i, part in enumerate(split_evenly(documents, sum(sizes)))
        ]
        shared = [shares[i : i + sizes[0]] for i in range(0, len(shares), sizes[0])]
        whole = self.share(documents, labels, lanes[0])
        ways = {"at once": [[whole]], f"{len(shares)} parts, {sizes[0]} at a time": shared}
        flops = sum(2 * a.size * b.shape[-1] for stage in whole.stages for a, b in stage)
        return Floor(flops, ways)

    def share(self, documents: np.ndarray, labels: np.ndarray, stream: mx.Stream) -> Share:
        """The matmuls of some of a batch's documents, (n, 3) of row, start and end."""
        spans = [(row, slice(start, end)) for row, start, end in documents.tolist()]
        lengths = [span.stop - span.start for _, span in spans]
        S = int(sum((labels[row, span] != IGNORE).sum() for row, span in spans))
        D, V = self.config.hidden_size, self.config.vocab_size
        head = [(self.some(S, D), self.head.T), (self.some(S, V), self.head)]
        layers = range(self.config.num_hidden_layers)
        up = [self.forward(i, lengths) for i in layers]
        return Share(stream, [*up, head, *(self.backward(i, lengths) for i in reversed(layers))])

    def forward(self, layer: int, lengths: Sequence[int]) -> list[Product]:
        """A layer's products on the way up."""
        N, products = sum(lengths), []
        for W, A, B in self.weights[layer % len(self.weights)].values():
            x, z = self.some(N, W.shape[1]), self.some(N, RANK)
            products += [(x, W.T), (x, A.T), (z, B.T)]
        for T in lengths:
            q, k, p = self.attention(T)
            products += [(q, k.swapaxes(1, 2)), (p, k)]
        return products

    def backward(self, layer: int, lengths: Sequence[int]) -> list[Product]:
        """A layer's products on the way down."""
        N, products = sum(lengths), []
        for T in lengths:
            q, k, p = self.attention(T)
            back = k.swapaxes(1, 2)  # scores made again, dp; dq; dk and dv
            products += [(q, back), (q, back), (p, k), *[(p.swapaxes(1, 2), q)] * 2]
        for name, (W, A, B) in self.weights[layer % len(self.weights)].items():
            x, z, dy = self.some(N, W.shape[1]), self.some(N, RANK), self.some(N, W.shape[0])
            products += [(dy, B), (dy.T, z), (z.T, x)]
            if layer > 0 or name not in NO_DX:
                products += [(dy, W), (z, A)]
        return products

    def attention(self, T: int) -> tuple[mx.array, mx.array, mx.array]:
        """Queries (K, G * T, Hd), keys or values (K, T, Hd), and weights (K, G * T, T)."""
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        Hd, rows = self.config.head_dim, H // K * T
        return self.some(K, rows, Hd), self.some(K, T, Hd), self.some(K, rows, T)


def multiply(chunks: list[list[Share]]) -> None:
    """Computes a floor."""
    for shares in chunks:
        with blas.threads(max(1, device.cores() // len(shares))):
            before: list[mx.array] = []
            for stages in zip(*(share.stages for share in shares)):
                now: list[mx.array] = []
                for i in range(0, max(map(len, stages)), IN_ADVANCE):
                    for share, products in zip(shares, stages):
                        with mx.stream(share.stream):
                            outs = [a @ b for a, b in products[i : i + IN_ADVANCE]]
                            mx.async_eval(outs)
                            now += outs
                mx.eval(before)  # of the layer before this one, as in our engine
                before = now
            mx.eval(before)


# ---- rounds ------------------------------------------------------------------------------------


def our_step(model: Any, batches: Sequence[Batch]) -> Callable[[Batch], None]:
    """Our engine and optimiser, as the training loop sets them up."""
    engine = Engine(model, "auto", compiled=device.current().compiles)
    engine.limit_memory(max(map(lengths_of, batches), key=sum))
    optimizer = AdamW(model.trainable_parameters())

    def step(batch: Batch) -> None:
        loss, n, grads = engine(optimizer.named(optimizer.weights), batch)
        norm = optimizer.update(grads, n, RATE)
        mx.eval(loss, norm, optimizer.weights, optimizer.mean, optimizer.square)

    return step


def lengths_of(batch: Batch) -> list[int]:
    """Positions of its documents."""
    documents = supervised_documents(batch)
    return (documents[:, 2] - documents[:, 1]).tolist()


def one_round(
    floors: list[Floor], step: Callable[[Batch], None], batches: list[Batch]
) -> list[dict[str, float]]:
    """For each batch, seconds of each way to compute its floor, and of our step."""
    return [
        {name: seconds(multiply, chunks) for name, chunks in floor.ways.items()}
        | {"step": seconds(step, batch)}
        for floor, batch in zip(floors, batches)
    ]


def seconds(run: Callable[[Any], None], argument: Any) -> float:
    """Wall time of a call, after a rest."""
    time.sleep(REST)
    start = time.perf_counter()
    run(argument)
    mx.synchronize()
    return time.perf_counter() - start


def summary(
    rounds: list[list[dict[str, float]]], floors: list[Floor], batches: list[Batch]
) -> dict[str, Any]:
    """The figures of each batch, and of all of them together."""
    found, floor_sums, step_sums = [], [0.0] * len(rounds), [0.0] * len(rounds)
    for i, (floor, batch) in enumerate(zip(floors, batches)):
        own = [round_[i] for round_ in rounds]
        way = min(floor.ways, key=lambda name: statistics.median(times[name] for times in own))
        bare, steps = [times[way] for times in own], [times["step"] for times in own]
        found.append({"way": way, **figures(bare, steps, floor.flops, batch.real_tokens)})
        floor_sums = [a + b for a, b in zip(floor_sums, bare)]
        step_sums = [a + b for a, b in zip(step_sums, steps)]
    flops, tokens = sum(f.flops for f in floors), sum(batch.real_tokens for batch in batches)
    return {"batches": found, "total": figures(floor_sums, step_sums, flops, tokens)}


def figures(bare: list[float], steps: list[float], flops: int, tokens: int) -> dict[str, Any]:
    """What is told of some seconds of the floor and of the step, round by round."""
    return {
        "tokens": tokens,
        "floor_seconds": measure.spread(bare),
        "step_seconds": measure.spread(steps),
        "ratio": measure.spread([step / floor for floor, step in zip(bare, steps)]),
        "floor_gflops": flops / 1e9 / statistics.median(bare),
        "floor_tokens": measure.spread([tokens / second for second in bare]),
        "step_tokens": measure.spread([tokens / second for second in steps]),
    }


def show(shape: str, results: dict[str, Any]) -> None:
    """Prints the table for a person."""
    columns = ["tokens", "floor ms", "step ms", "step / floor", "floor GFLOP/s"]
    columns += ["floor tokens/s", "step tokens/s", "fastest floor"]
    rows = [
        [
            f"{found['tokens']:,}",
            f"{found['floor_seconds']['median'] * 1e3:,.0f}",
            f"{found['step_seconds']['median'] * 1e3:,.0f}",
            measure.shown(found["ratio"], 2),
            f"{found['floor_gflops']:,.0f}",
            f"{found['floor_tokens']['median']:,.0f}",
            f"{found['step_tokens']['median']:,.0f}",
            found.get("way", "all batches"),
        ]
        for found in [*results["batches"], results["total"]]
    ]
    measure.show(f"{shape}, LoRA r={RANK} on all seven linears", columns, rows)


def check(results: dict[str, Any]) -> None:
    """Asserts the claim."""
    ratio = results["total"]["ratio"]["median"]
    print(f"our step / its matmuls: {ratio:.2f}")
    assert ratio <= MOST_TIMES_FLOOR, f"a step takes more than {MOST_TIMES_FLOOR} times its matmuls"


if __name__ == "__main__":
    main()
