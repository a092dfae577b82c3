"""Two processes of one core each, against one process of one core: real tokens per second.

Run as: python benchmarks/processes.py --rounds 3      (two idle cores; Linux, which can pin)

Each round trains SmolLM2-135M by the real command on the rows of the demo, once with one process
and once with two that MLX's ring joins on the loopback device. Every process is pinned to a core of
its own, so that two stand for two machines. Both take the same rows in each step; the steps are the
same, and their losses are compared. Figures are of whole steps, as `metrics.jsonl` has them; the
first steps are left out.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import measure

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import docstring_data  # pyright: ignore[reportMissingImports]
import ring  # pyright: ignore[reportMissingImports]

LEAST, CLOSE = 1.7, 1e-4  # times the throughput; of losses of the same step
WARMUP = 2  # steps that are not counted
PINNED = """
import os, sys
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ.get("MLX_RANK", "0"))]})
from mlx_qlora.cli import main
sys.exit(main(sys.argv[1:]))
"""


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--steps", default=6, type=int, help="of each run")
    parser.add_argument("--rows", default=16, type=int, help="rows of a step, an even number")
    parser.add_argument("--max-length", default=256, type=int)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    assert cores >= 2, f"two processes want a core each; there is {cores}"

    speeds: dict[int, list[float]] = {1: [], 2: []}
    losses: dict[int, list[float]] = {}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        docstring_data.write(place / "rows.jsonl")
        for number in range(args.rounds):
            for n in speeds:
                speed, losses[n] = trained(n, place, f"{number}-{n}", args)
                speeds[n].append(speed)
    results = {f"{n} processes": measure.spread(found) for n, found in speeds.items()}
    ratios = [two / one for one, two in zip(speeds[1], speeds[2])]
    apart = max(abs(one - two) for one, two in zip(losses[1], losses[2]))
    measure.show(
        "SmolLM2-135M, one core for each process",
        ["processes", "real tokens/s"],
        [[name, measure.shown(found)] for name, found in results.items()],
    )
    print(f"times the throughput: {measure.shown(measure.spread(ratios), 2)}; load {before:.1f}")
    shown = {name: found["median"] for name, found in results.items()}
    plot = measure.bars("processes", "SmolLM2-135M, a core each", "real tokens/s", shown)
    found = {"ratio": measure.spread(ratios), "losses_apart": apart, "load": before}
    measure.finish("processes", vars(args), {**results, **found}, plot)
    assert apart < CLOSE, f"the losses differ by {apart}"
    ratio = statistics.median(ratios)
    assert ratio >= LEAST, f"two processes are {ratio:.2f} times as fast, not {LEAST}"


def trained(n: int, place: Path, name: str, args: argparse.Namespace) -> tuple[float, list[float]]:
    """(real tokens per second, losses) of one run with n processes."""
    output = place / name
    words = [
        *("train", "--model", "smollm2-135m", "--data", str(place / "rows.jsonl")),
        *("--output-dir", str(output), f"data.cache_dir={place / 'cache'}"),
        *("--batch-size", str(args.rows // 2), "--max-length", str(args.max_length)),
        *(f"training.gradient_accumulation_steps={2 // n}", f"training.max_steps={args.steps}"),
        *("training.warmup_steps=2", "data.split=[1.0, 0.0, 0.0]", "logging.logging_steps=1"),
        *("generation.max_new_tokens=1", "lora.lora_dropout=0.0"),
    ]
    ended = ring.ends(ring.start(n, lambda rank: ["-c", PINNED, *words], place), 1800)
    assert all(code == 0 for code, *_ in ended), ended
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    # The median of the steps' speeds: the last step has a checkpoint behind it, not in it.
    speeds = [record["tokens_per_second"] for record in steps[WARMUP:]]
    return statistics.median(speeds), [record["loss"] for record in steps]


if __name__ == "__main__":
    main()
