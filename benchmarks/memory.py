"""Peak memory: predicted against measured, growth with length and layers, and the loss alone.

Run as: python benchmarks/memory.py        (on a CPU some ten minutes)

Models of random weights are trained for two steps each; peaks are MLX's own counter. Asserted: the
planner is within 10 % of every measured peak, memory grows at most 2.1 times when the length
doubles (with recompute), and the loss at 4,096 tokens and Llama 3's vocabulary takes at most 5 %
of what logits and their gradient take, without being slower.
"""

import argparse
import statistics
import time
from typing import Any

import measure
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

import mlx_qlora as mq
from mlx_qlora.device import this_machine
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.quantize import Linear
from mlx_qlora.train import memory
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.loss import cross_entropy
from mlx_qlora.train.optim import AdamW

PLANNER_ERROR, DOUBLING, LOSS_SHARE = 0.10, 2.1, 0.05
# Hidden, layers, heads, key-value heads, head size, MLP, vocabulary.
SMALL = (256, 8, 8, 4, 32, 768, 8192)
WIDE = (512, 4, 8, 8, 64, 1024, 32000)
SMOL = (576, 6, 9, 3, 64, 1536, 49152)
# (shape, rank, length, documents, recompute)
CONFIGURATIONS = [
    (SMALL, 8, 128, 8, "none"),
    (SMALL, 8, 512, 4, "none"),
    (SMALL, 64, 512, 4, "none"),
    (SMALL, 8, 512, 4, "all"),
    (SMALL, 8, 2048, 1, "all"),
    (WIDE, 8, 256, 4, "none"),
    (WIDE, 8, 1024, 2, "all"),
    (WIDE, 16, 1024, 2, 2),
    (SMOL, 16, 128, 4, "none"),
    (SMOL, 16, 512, 4, "none"),
    (SMOL, 16, 512, 4, "all"),
    (SMOL, 16, 2048, 1, "none"),
    (SMOL, 64, 2048, 1, "all"),
    (SMOL, 16, 1024, 2, 3),
]
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
S, D, V = 4096, 256, 128256


def main() -> None:
    """Measures, prints tables and a JSON line, and asserts the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", default=8192, type=int, help="of the lengths that are tried")
    args = parser.parse_args()

    planned = [against_plan(*configuration) for configuration in CONFIGURATIONS]
    measure.show(
        "predicted and measured peak",
        ["model", "r", "T", "documents", "recompute", "predicted", "measured", "error"],
        [[*map(str, p["configuration"]), *shown(p)] for p in planned],
    )
    lengths = [T for T in LENGTHS if T <= args.longest]
    by_length = {T: against_plan(SMOL, 16, T, 1, "all")["beyond_base"] for T in lengths}
    by_layers = {
        n: against_plan((*SMOL[:1], n, *SMOL[2:]), 16, 512, 2, "all")["beyond_base"]
        for n in (2, 4, 8, 16)
    }
    loss = loss_alone()
    measure.show(
        "beyond the base, everything recomputed",
        ["", *map(str, by_length)],
        [["one document of T", *(f"{size / 1e6:,.0f} MB" for size in by_length.values())]],
    )
    print({name: round(value, 3) for name, value in loss.items()})
    plot = measure.lines(
        "memory",
        "memory beyond the base, everything recomputed",
        "tokens of the document",
        "bytes",
        {"peak": {float(T): float(size) for T, size in by_length.items()}},
    )
    results = {"plans": planned, "by_length": by_length, "by_layers": by_layers, "loss": loss}
    measure.finish("memory", vars(args), results, plot)
    check(planned, by_length, loss)


def shown(found: dict[str, Any]) -> list[str]:
    """Predicted, measured, and by how much they differ."""
    sizes = [f"{found[name] / 1e6:,.0f} MB" for name in ("predicted", "measured")]
    return [*sizes, f"{found['error']:+.1%}"]


def random_model(shape: tuple[int, ...]) -> LlamaForCausalLM:
    """A dense float32 model of random weights."""
    hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary = shape
    config = LlamaConfig(hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary)
    model = LlamaForCausalLM(config)
    model.update(
        tree_map(
            lambda a: mx.random.normal(a.shape) * 0.02 if a.ndim == 2 else mx.ones(a.shape),
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model


def against_plan(
    shape: tuple[int, ...], rank: int, T: int, documents: int, recompute: Any
) -> dict[str, Any]:
    """Two steps of a configuration: the peak, and what the planner's formulas say."""
    mx.clear_cache()
    before = mx.get_active_memory()
    model = random_model(shape)
    base = mx.get_active_memory() - before
    mq.add_lora(model, mq.LoraConfig(r=rank, lora_dropout=0.0))
    optimizer, engine = AdamW(model.trainable_parameters()), Engine(model, recompute, False)
    model.update(optimizer.tree())
    mx.eval(optimizer.weights, optimizer.mean, optimizer.square)

    random = np.random.default_rng(0)
    tokens = random.integers(0, shape[-1], (documents, T)).astype(np.int32)
    learned = random.random(tokens.shape) < 0.25
    batch = mq.Batch(mx.array(tokens), mx.array(np.where(learned, tokens, -100).astype(np.int32)))
    mx.reset_peak_memory()
    for _ in range(2):
        loss, n, grads = engine(optimizer.named(optimizer.weights), batch)
        norm = optimizer.update(grads, n, 1e-4, loss)
        mx.eval(norm, optimizer.weights, optimizer.mean, optimizer.square)
        model.update(optimizer.tree())
        del loss, grads, norm
    peak = mx.get_peak_memory() - before
    predicted = base + predicted_beyond(model, optimizer.weights.size, [T] * documents, recompute)
    return {
        "configuration": ["x".join(map(str, shape)), rank, T, documents, recompute],
        "predicted": predicted,
        "measured": peak,
        "beyond_base": peak - base,
        "error": predicted / peak - 1,
    }


def predicted_beyond(
    model: LlamaForCausalLM, trainable: int, lengths: list[int], recompute: Any
) -> int:
    """What the planner adds to the base."""
    here, config = this_machine(), model.config
    levels = memory.check_recompute(recompute, config.num_hidden_layers)
    footprint = memory.Footprint(config, lengths, 4, here)
    schedule = footprint.schedule(levels, 0)
    step = sum(footprint.highest(schedule)) + memory.step_bytes(trainable, schedule.n_chunks, False)
    update = memory.update_bytes(trainable, here)
    return memory.adapter_bytes(trainable) + max(step, update)


def loss_alone() -> dict[str, float]:
    """Memory and time of our loss with its gradient, against logits and autodiff."""
    head = Linear(D, V)
    head.weight = mx.random.normal((V, D)) * 0.05
    hidden, targets = mx.random.normal((S, D)), mx.random.randint(0, V, (S,))
    mx.eval(head.weight, hidden, targets)

    def naive(x: mx.array) -> mx.array:
        logits = head.multiply(x)
        chosen = mx.take_along_axis(logits, targets[:, None], -1)[:, 0]
        return (mx.logsumexp(logits, axis=-1) - chosen).sum()

    def ours() -> Any:
        found = cross_entropy(head, hidden, targets)
        return found.nats, found.gradient

    times: dict[str, list[float]] = {"naive": [], "ours": []}
    peaks: dict[str, int] = {}
    for _ in range(3):
        for name, run in (("naive", lambda: mx.grad(naive)(hidden)), ("ours", ours)):
            mx.clear_cache()
            mx.reset_peak_memory()
            start, before = time.perf_counter(), mx.get_active_memory()
            mx.eval(run())
            times[name].append(time.perf_counter() - start)
            peaks[name] = mx.get_peak_memory() - before
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "naive_gb": peaks["naive"] / 1e9,
        "ours_gb": peaks["ours"] / 1e9,
        "memory_share": peaks["ours"] / peaks["naive"],
        "time_share": seconds["ours"] / seconds["naive"],
    }


def check(
    planned: list[dict[str, Any]], by_length: dict[int, float], loss: dict[str, float]
) -> None:
    """Asserts the claims."""
    assert loss["memory_share"] <= LOSS_SHARE, "the loss holds too much"
    assert loss["time_share"] <= 1, "the loss is slower than with all logits at once"
    (_, before), (longest, last) = sorted(by_length.items())[-2:]
    assert last / before <= DOUBLING, f"memory grows faster than the length, up to {longest}"
    worst = max(planned, key=lambda found: abs(found["error"]))
    assert abs(worst["error"]) <= PLANNER_ERROR, f"the planner is off: {worst}"


if __name__ == "__main__":
    main()
