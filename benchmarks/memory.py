"""Peak memory: predicted against measured, growth with length and layers, and the loss alone.

Run as: python benchmarks/memory.py        (on a CPU some twenty minutes)

Models of random weights are trained for two steps each by `train`, as a run does, in a process of
its own; the plan is that of `mlx-qlora plan`. Peaks are MLX's own counter, and what the system says
of the process. Asserted: the planner is within 10 % of every measured peak, of MLX and of the
process, resident and streamed; memory grows at most 2.1 times when the length doubles (with
recompute), and the loss at 4,096 tokens and Llama 3's vocabulary takes at most 5 % of what logits
and their gradient take, without being slower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import mlx.core as mx
import numpy as np
import shapes
from rich.console import Console

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.before.plan import plan_checkpoint
from mlx_qlora.config import build, settle
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.quantize import Linear
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.loop import train
from mlx_qlora.train.loss import cross_entropy
from mlx_qlora.tree import flat

PLANNER_ERROR, DOUBLING, LOSS_SHARE = 0.10, 2.1, 0.05
# Hidden, layers, heads, key-value heads, head size, MLP, vocabulary.
SMALL = (256, 8, 8, 4, 32, 768, 8192)
WIDE = (512, 4, 8, 8, 64, 1024, 32000)
SMOL = (576, 6, 9, 3, 64, 1536, 49152)
ONE_B = (2048, 4, 32, 8, 64, 8192, 32000)  # Llama 3.2 1B's, with few layers and words
EIGHT_B = (4096, 3, 32, 8, 128, 14336, 8192)  # Llama 3.1 8B's


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    shape: tuple[int, ...]
    r: int
    T: int
    documents: int
    recompute: Any  # as training.gradient_checkpointing
    matmul: str = "dense"  # else 4 bits, and how they are multiplied
    residency: str = "resident"
    targets: list[str] = field(default_factory=list)  # all seven linears if empty

    def __str__(self) -> str:
        hidden, layers = self.shape[:2]
        words = f"{hidden} x {layers}, r={self.r}{' on q, v' * bool(self.targets)}, "
        return f"{words}{self.documents} x {self.T}, {self.recompute}, {self.matmul}"


RESIDENT = [
    Case(SMALL, 8, 128, 8, False),
    Case(SMALL, 8, 512, 4, False),
    Case(SMALL, 64, 512, 4, False),
    Case(SMALL, 8, 512, 4, True),
    Case(SMALL, 8, 2048, 1, True),
    Case(WIDE, 8, 256, 4, False),
    Case(WIDE, 8, 1024, 2, True),
    Case(WIDE, 16, 1024, 2, 2),
    Case(SMOL, 16, 128, 4, False),
    Case(SMOL, 16, 512, 4, False),
    Case(SMOL, 16, 512, 4, True),
    Case(SMOL, 16, 2048, 1, False),
    Case(SMOL, 64, 2048, 1, True),
    Case(SMOL, 16, 1024, 2, 3),
    Case(SMOL, 16, 512, 4, False, "resident"),
    Case(SMOL, 16, 512, 4, True, "dequantize"),
    Case(ONE_B, 16, 512, 1, True, "dequantize"),
    Case(ONE_B, 16, 512, 4, False, "dequantize"),
]
STREAMED = [
    Case(SMOL, 16, 512, 4, True, "dequantize", "streamed"),
    Case(SMOL, 16, 1024, 2, False, "dequantize", "streamed"),
    Case(ONE_B, 16, 512, 1, True, "dequantize", "streamed"),
    Case(ONE_B, 16, 512, 4, False, "dequantize", "streamed"),
    Case(EIGHT_B, 16, 512, 1, True, "dequantize", "streamed"),
    Case(EIGHT_B, 4, 512, 1, True, "dequantize", "streamed", ["q_proj", "v_proj"]),
]
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
S, D, V = 4096, 256, 128256


def main() -> None:
    """Measures, prints tables and a JSON line, and asserts the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", default=8192, type=int, help="of the lengths that are tried")
    parser.add_argument("--plans-only", action="store_true", help="only plans against peaks")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, case = args.worker
        print(json.dumps(against_plan(Path(folder), Case(**json.loads(case)))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        planned = [in_a_process(Path(temporary), case) for case in (*RESIDENT, *STREAMED)]
        measure.show(
            "planned and measured peaks, in MB",
            ["model", "base", "MLX", "measured", "error", "process", "measured", "error"],
            [shown(found) for found in planned],
        )
        if args.plans_only:
            check_plans(planned)
            return
        lengths = [T for T in LENGTHS if T <= args.longest]
        longer = {T: Case(SMOL, 16, T, 1, True) for T in lengths}
        deeper = {n: Case((*SMOL[:1], n, *SMOL[2:]), 16, 512, 2, True) for n in (2, 4, 8, 16)}
        by_length, by_layers = (
            {n: in_a_process(Path(temporary), case)["beyond_base"] for n, case in cases.items()}
            for cases in (longer, deeper)
        )
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
    check(by_length, loss)
    check_plans(planned)


# ---- plans against runs --------------------------------------------------------------------------


def shown(found: dict[str, Any]) -> list[str]:
    """Predicted, measured, and by how much they differ, of MLX and of the process."""
    cells = [found["case"], found["residency"]]
    for kind in ("mlx", "process"):
        sizes = [found[f"{kind}_{name}"] for name in ("planned", "measured")]
        cells += [f"{size / 1e6:,.0f}" for size in sizes] + [f"{sizes[0] / sizes[1] - 1:+.1%}"]
    return cells


def in_a_process(home: Path, case: Case) -> dict[str, Any]:
    """What `against_plan` returns of a case, in a process of its own."""
    packed = case.matmul != "dense"
    folder = home / f"{'x'.join(map(str, case.shape))}{'-packed' * packed}"
    if not folder.exists():
        write_model(folder, case.shape, packed)
    command = [sys.executable, __file__, "--worker", str(folder), json.dumps(asdict(case))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(" ".join(shown(found := json.loads(out.splitlines()[-1]))), flush=True)
    return found


def write_model(folder: Path, shape: tuple[int, ...], packed: bool) -> None:
    """A folder of random weights, dense in float32 or in 4 bits as MLX's converters write it."""
    names = (name for name in shapes.SIZES if name != "tie_word_embeddings")
    hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary = shape
    sizes = dict(zip(names, (hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary)))
    config = sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 1 << 17}
    if packed:
        config["quantization"] = vars(shapes.QUANT)
    config["tie_word_embeddings"] = True
    arrays = {}
    for name, zeros in flat(LlamaForCausalLM(LlamaConfig.from_hf(config)).parameters()).items():
        array = mx.random.normal(zeros.shape) * 0.02 if zeros.ndim == 2 else mx.ones(zeros.shape)
        parts = {"": array}
        if packed and zeros.ndim == 2:
            parts = dict(zip(("", "scales", "biases"), mx.quantize(array, **vars(shapes.QUANT))))
        for part, values in parts.items():
            arrays[f"{name.removesuffix('weight')}{part}" if part else name] = values
        mx.eval(arrays)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def against_plan(folder: Path, case: Case) -> dict[str, Any]:
    """Two steps of a case: the peaks, and what the plan says."""
    documents, T, draw = case.documents, case.T, np.random.default_rng(0)
    model: dict[str, Any] = {"residency": case.residency, "bits": None}
    lora: dict[str, Any] = {"r": case.r, "lora_dropout": 0.0}
    lora |= {"target_modules": case.targets} if case.targets else {}
    if case.matmul != "dense":
        model["frozen_matmul"] = case.matmul
    training = {"per_device_train_batch_size": documents, "gradient_accumulation_steps": 1}
    training |= {"max_steps": 2, "gradient_checkpointing": case.recompute}
    rows = [draw.integers(0, case.shape[-1], T + 1).astype(np.int32) for _ in range(2 * documents)]
    examples = Examples.of(Example(row, draw.random(T + 1) < 0.25) for row in rows)
    with tempfile.TemporaryDirectory() as output:
        config = build(
            {
                **{"model": model, "lora": lora, "training": training},
                "data": {"max_length": T + 1},
                "checkpointing": {"output_dir": output},
            }
        )
        files = ModelFiles(folder, None, None, str(folder))
        plan = plan_checkpoint(open_checkpoint(files), config, examples)
        loading = device.current().compute_dtype, config.model.frozen_matmul, case.residency
        with device.small_cache():
            loaded = load_model(open_checkpoint(files), None, *loading)
        base, config = mx.get_active_memory(), settle(config, loaded.config, examples)
        mq.add_lora(loaded, config.lora)
        inputs: Any = SimpleNamespace(train=examples, validation=None, base="", resumed=None)
        inputs.state, inputs.config = RunState(), config
        mx.reset_peak_memory()
        with open(os.devnull, "w") as nothing:
            result = train(loaded, inputs, Console(file=nothing))
    return {
        **{"case": str(case), "residency": case.residency, "parts": plan.parts},
        "mlx_planned": plan.total_bytes,
        "mlx_measured": result.peak_memory_bytes,
        # There is no tokenizer here.
        "process_planned": plan.process_bytes - device.TOKEN_BYTES * loaded.config.vocab_size,
        "process_measured": result.process_memory_bytes,
        "cache_planned": plan.cache_bytes,
        "beyond_base": result.peak_memory_bytes - base,
    }


# ---- the loss alone ------------------------------------------------------------------------------


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


def check(by_length: dict[int, float], loss: dict[str, float]) -> None:
    """Asserts the claims about growth and the loss."""
    assert loss["memory_share"] <= LOSS_SHARE, "the loss holds too much"
    assert loss["time_share"] <= 1, "the loss is slower than with all logits at once"
    (_, before), (longest, last) = sorted(by_length.items())[-2:]
    assert last / before <= DOUBLING, f"memory grows faster than the length, up to {longest}"


def check_plans(planned: list[dict[str, Any]]) -> None:
    """Asserts the claims about the planner."""
    for found in planned:
        for kind in ("mlx", "process"):
            error = found[f"{kind}_planned"] / found[f"{kind}_measured"] - 1
            assert abs(error) <= PLANNER_ERROR, f"the planner is off by {error:+.1%}: {found}"


if __name__ == "__main__":
    main()
