"""Training speed and memory: ours, mlx-lm's trainer, and torch + PEFT, on the same batches.

Run as: make bench        (or: python benchmarks/train_speed.py --rounds 3)

Everybody trains the same model (SmolLM2-135M, dequantised to float32), the same LoRA (r=16 on all
seven linears, no dropout) and the same batches of four documents of at most 512 tokens, padded as
each trainer pads them; one more row shows ours with the same documents packed into rows. Each
trainer runs in processes of its own, round after round in turn, so that a machine whose speed
drifts treats all alike. Tokens are real ones: padding does not count. A first pass over the
batches, in which graphs are compiled, is left out, as are loading and tokenising; every step is
synchronised.

Memory is MLX's own peak (of torch: the process's resident set), less the frozen weights that were
resident before. Asserted: memory and the first loss. How much faster ours is than the others
depends on the machine, so that is printed, round by round, and not asserted: what holds on every
machine is how near a step comes to its own matmuls (`matmul_floor.py`).
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
from trainers import TRAINERS, Batches

import mlx_qlora as mq

# At most so much of mlx-lm's memory, and what is enough where only the 4-bit base is resident.
MEMORY_SHARE, LOW_MEMORY = 0.5, 0.4e9
OTHERS = "mlx-lm", "torch + PEFT"
MOST_LOSS_DIFFERENCE = 2e-3  # of the same batches at the same weights, but for rounding


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", default=3, type=int, help="processes of each trainer")
    parser.add_argument("--batches", default=6, type=int, help="batches of a pass")
    parser.add_argument("--batch-size", default=4, type=int)
    parser.add_argument("--max-length", default=512, type=int)
    parser.add_argument("--only", nargs="*", choices=list(TRAINERS), help="default: all")
    args = parser.parse_args()

    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))
    names = args.only or [name for name in TRAINERS if has_torch or "torch" not in name]
    batches = choose(args.batches, args.batch_size, args.max_length)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batches.json"
        file.write_text(json.dumps(batches))
        for _ in range(args.rounds):
            for name in names:
                rounds[name].append(in_own_process(name, file))

    results = {name: summary(found, batches) for name, found in rounds.items()}
    show(results)
    speeds = {name: found["tokens_per_second"]["median"] for name, found in results.items()}
    plot = measure.bars("train_speed", "SmolLM2-135M, LoRA r=16", "real tokens/s", speeds)
    real = {name: [1 / each["seconds"] for each in of] for name, of in rounds.items()}
    ratios = {
        name: measure.spread([mine / other for mine, other in zip(real["ours"], real[name])])
        for name in OTHERS
        if {"ours", name} <= real.keys()
    }
    for name, ratio in ratios.items():
        print(f"ours / {name}: {measure.shown(ratio, 2)} times the real tokens/s")
    measure.finish("train_speed", vars(args), results | {"times": ratios}, plot)
    check(results)


def choose(batches: int, batch_size: int, max_length: int) -> Batches:
    """Batches of documents of like length, spread evenly over all lengths; the longest last."""
    _, tokenizer = mq.load("smollm2-135m")
    examples = measure.docstrings(tokenizer, max_length)
    by_length = np.argsort(examples.lengths, kind="stable")
    starts = np.linspace(0, len(by_length) - batch_size, batches + 1).astype(int)[1:]
    groups = [[examples[int(i)] for i in by_length[start : start + batch_size]] for start in starts]
    return [[(one.tokens.tolist(), one.learned.tolist()) for one in group] for group in groups]


def in_own_process(name: str, file: Path) -> dict[str, Any]:
    """What a trainer found, in a process that nothing else has warmed or filled."""
    script = Path(__file__).with_name("trainers.py")
    done = subprocess.run(
        [sys.executable, str(script), name, str(file)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(rounds: list[dict[str, Any]], batches: Batches) -> dict[str, Any]:
    """One trainer's figures over its rounds."""
    real = sum(len(ids) - 1 for batch in batches for ids, _ in batch)
    supervised = sum(sum(learned[1:]) for batch in batches for _, learned in batch)
    speeds = [real / found["seconds"] for found in rounds]
    return {
        "tokens_per_second": measure.spread(speeds),
        "supervised_per_second": statistics.median(speeds) * supervised / real,
        "useful_share": real / rounds[0]["positions"],
        "peak_bytes": max(found["peak_bytes"] for found in rounds),
        "beyond_base_bytes": max(found["peak_bytes"] - found["base_bytes"] for found in rounds),
        "losses": rounds[0]["losses"],
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table for a person."""
    names = ["trainer", "real tokens/s", "supervised/s", "useful share", "peak", "beyond the base"]
    rows = [
        [
            name,
            measure.shown(found["tokens_per_second"]),
            f"{found['supervised_per_second']:.1f}",
            f"{found['useful_share']:.2f}",
            measure.gigabytes(found["peak_bytes"]),
            measure.gigabytes(found["beyond_base_bytes"]),
        ]
        for name, found in results.items()
    ]
    measure.show("SmolLM2-135M, LoRA r=16 on all seven linears, batches of 4", names, rows)


def check(results: dict[str, dict[str, Any]]) -> None:
    """Asserts the claims, of those trainers that ran."""
    beyond = {name: found["beyond_base_bytes"] for name, found in results.items()}
    if {"ours", "torch + PEFT"} <= results.keys():
        # The first batch is trained at the same weights: B is zero. mlx-lm's loss is left out, as
        # it learns one pad token of each row, too.
        mine, theirs = (results[name]["losses"][0] for name in ("ours", "torch + PEFT"))
        assert abs(mine - theirs) < MOST_LOSS_DIFFERENCE, f"torch computes another loss: {theirs}"
    for suffix in ("", ", recompute"):
        mine, other = f"ours{suffix}", f"mlx-lm{suffix}"
        if {mine, other} <= results.keys():
            share = beyond[mine] / beyond[other]
            print(f"{mine} / {other}: {share:.2f} of the memory beyond the base")
            assert share <= MEMORY_SHARE, f"{mine} needs more than {MEMORY_SHARE} of {other}"
    if low := results.get("ours, 4-bit base only"):
        assert low["peak_bytes"] < LOW_MEMORY, "the low-memory setting needs too much"


if __name__ == "__main__":
    main()
