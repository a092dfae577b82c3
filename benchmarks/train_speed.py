"""Training speed and memory of SmolLM2-135M on this machine, with and without recompute.

Run as: make bench        (or: python benchmarks/train_speed.py --steps 9)

The two settings take turns, step by step, on the same batches, so that a machine whose speed
drifts treats both alike. Tokens are real ones: padding does not count, and every step is
synchronised. Loading, tokenising and the first step of each setting are left out. The claim that
is asserted: recompute needs less memory, and gives the same loss.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import docstring_data

import mlx_qlora as mq
from mlx_qlora import backend
from mlx_qlora.train.optim import AdamW, learning_rate
from mlx_qlora.train.step import Engine

SETTINGS = ("none", "all")


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default=5, type=int, help="measured steps of each setting")
    parser.add_argument("--batch-size", default=4, type=int)
    parser.add_argument("--max-length", default=256, type=int)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "docstrings.jsonl"
        docstring_data.write(data)
        model, tokenizer = mq.load("smollm2-135m")
        examples = mq.read_examples(data, tokenizer, mq.DataConfig(max_length=args.max_length))
    mq.add_lora(model, mq.LoraConfig(lora_dropout=0.0))
    batches = mq.make_batches(examples, args.batch_size)
    compiled = backend.backend().device != "cpu"
    runs = {name: Run(model, name, compiled) for name in SETTINGS}
    for step in range(args.steps + 1):
        for run in runs.values():
            run.step(batches[step], step)

    results = {name: run.figures() for name, run in runs.items()}
    show(results)
    print(json.dumps({"benchmark": "train_speed", **vars(args), **backend.facts(), **results}))
    assert results["all"]["peak_bytes"] < results["none"]["peak_bytes"], "recompute saves memory"
    for plain, recomputed in zip(runs["none"].losses, runs["all"].losses):
        assert abs(plain - recomputed) < 1e-4, "recompute does not change the loss"


class Run:
    """One setting's weights, moments and measurements."""

    def __init__(self, model, recompute: str, compiled: bool) -> None:
        self.engine = Engine(model, recompute, compiled)
        self.optimizer = AdamW(model.trainable_parameters())
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def step(self, batch: mq.Batch, number: int) -> None:
        """One synchronised optimiser step; step 0 warms up."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        loss, n, grads = self.engine(self.optimizer.tree(), batch)
        norm = self.optimizer.update(grads, n, learning_rate(number + 1, 1e-4, 10, 1000))
        mx.eval(loss, norm, self.optimizer.weights, self.optimizer.mean, self.optimizer.square)
        mx.synchronize()
        seconds = time.perf_counter() - start
        self.losses.append(loss.item() / n)
        if number:
            self.rates.append(batch.real_tokens / seconds)
            self.peak = max(self.peak, mx.get_peak_memory())

    def figures(self) -> dict[str, float]:
        """Real tokens/s (median, lowest, highest) and peak bytes."""
        return {
            "tokens_per_second": round(statistics.median(self.rates), 1),
            "lowest": round(min(self.rates), 1),
            "highest": round(max(self.rates), 1),
            "peak_bytes": self.peak,
        }


def show(results: dict[str, dict[str, float]]) -> None:
    """Prints the table for a person."""
    table = Table(title="SmolLM2-135M, LoRA r=16 on all seven linears")
    for column in ("recompute", "real tokens/s (median)", "lowest .. highest", "peak"):
        table.add_column(column)
    for name, r in results.items():
        spread = f"{r['lowest']:.0f} .. {r['highest']:.0f}"
        peak = f"{r['peak_bytes'] / 1e9:.2f} GB"
        table.add_row(name, f"{r['tokens_per_second']:.0f}", spread, peak)
    Console().print(table)


if __name__ == "__main__":
    main()
