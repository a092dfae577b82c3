"""Two processes of one core each, against one process of one core: real tokens per second.

Run as: python benchmarks/processes.py --rounds 3      (two idle cores; Linux, which can pin)

Each round trains SmolLM2-135M by the real command on the rows of the demo, once with one process
and once with two that MLX's ring joins on the loopback device. Every process is pinned to a core of
its own, so that two stand for two machines. Both take the same rows in each step; the steps are the
same, and their losses are compared. Figures are of whole steps, as `metrics.jsonl` has them; the
first steps are left out.

The two cores share memory and cache, which two machines do not. What that costs is measured, too:
two runs side by side that share nothing but the machine, each with half the rows in a step. They
are the most that any two processes reach here.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import docstring_data  # pyright: ignore[reportMissingImports]
from support import ring  # pyright: ignore[reportMissingImports]

LEAST, CLOSE = 1.7, 1e-4  # times the throughput; of losses of the same step
LEAST_SHARE = 0.93  # of what two runs reach that share nothing
WARMUP = 2  # steps that are not counted
ONE, TWO, APART = "one process", "two processes", "two runs apart"
PINNED = """
import os, sys
os.sched_setaffinity(0, {{sorted(os.sched_getaffinity(0))[{core}]}})
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

    speeds: dict[str, list[float]] = {ONE: [], TWO: [], APART: []}
    losses: dict[str, list[float]] = {}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        docstring_data.write(place / "rows.jsonl")
        for number in range(args.rounds):
            for name in speeds:
                speed, losses[name] = trained(name, place / f"{number}", args)
                speeds[name].append(speed)
    results = {name: measure.spread(found) for name, found in speeds.items()}
    times, most = ([n / one for one, n in zip(speeds[ONE], speeds[n])] for n in (TWO, APART))
    share = [reached / possible for reached, possible in zip(times, most)]
    differ = max(abs(one - two) for one, two in zip(losses[ONE], losses[TWO]))
    measure.show(
        f"SmolLM2-135M, one core for each process; load {before:.1f}",
        ["processes", "real tokens/s", "times one", "share of the most"],
        [
            [name, measure.shown(results[name]), *map(shown, ratios)]
            for name, *ratios in ((ONE,), (TWO, times, share), (APART, most))
        ],
    )
    plot = {name: found["median"] for name, found in results.items()}
    title = "SmolLM2-135M, a core each"
    picture = measure.bars("processes", title, "real tokens/s", plot)
    found = {
        "ratio": measure.spread(times),
        "most": measure.spread(most),
        "share": measure.spread(share),
    }
    rest = {**found, "losses_apart": differ, "load": before}
    measure.finish("processes", vars(args), {**results, **rest}, picture)
    ratio, ceiling, reached = (statistics.median(r) for r in (times, most, share))
    assert differ < CLOSE, f"the losses differ by {differ}"
    assert reached >= LEAST_SHARE, f"two processes reach {reached:.2f} of what runs apart reach"
    why = f"; two runs that share nothing are {ceiling:.2f} times as fast on this machine"
    assert ratio >= LEAST, f"two processes are {ratio:.2f} times as fast, not {LEAST}{why}"


def shown(ratios: list[float]) -> str:
    """Median and spread of ratios."""
    return measure.shown(measure.spread(ratios), 2)


def trained(name: str, place: Path, args: argparse.Namespace) -> tuple[float, list[float]]:
    """(real tokens per second of all processes, losses of the first run) under a name."""
    place.mkdir(exist_ok=True)
    started = []
    if name == APART:
        outputs = [place / f"apart-{core}" for core in range(2)]
        for core, output in enumerate(outputs):
            words = ["-c", on_core(core), *command(output, 1, args)]
            started += ring.start(1, lambda _, words=words: words, place)
    else:
        outputs, n = [place / name], 1 if name == ONE else 2
        words = command(outputs[0], 2 // n, args)
        started += ring.start(n, lambda rank: ["-c", on_core(rank), *words], place)
    ended = ring.ends(started, 1800)
    assert all(code == 0 for code, *_ in ended), ended
    runs = [steps_of(output) for output in outputs]
    # The median of the steps' speeds: the last step has a checkpoint behind it, not in it.
    speeds = [statistics.median(s["tokens_per_second"] for s in steps[WARMUP:]) for steps in runs]
    return sum(speeds), [step["loss"] for step in runs[0]]


def command(output: Path, accumulation: int, args: argparse.Namespace) -> list[str]:
    """A run's words on the command line; the data lies beside the folders of the rounds."""
    place = output.parent.parent
    return [
        *("train", "--model", "smollm2-135m", "--data", str(place / "rows.jsonl")),
        *("--output-dir", str(output), f"data.cache_dir={place / 'cache'}"),
        *("--batch-size", str(args.rows // 2), "--max-length", str(args.max_length)),
        *(f"training.gradient_accumulation_steps={accumulation}", "lora.lora_dropout=0.0"),
        *("training.warmup_steps=2", "data.split=[1.0, 0.0, 0.0]", "logging.logging_steps=1"),
        *(f"training.max_steps={args.steps}", "generation.max_new_tokens=1"),
    ]


def on_core(core: int) -> str:
    """Python that runs the command line on one core."""
    return PINNED.format(core=core)


def steps_of(output: Path) -> list[dict[str, Any]]:
    """What a run has logged of each step."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


if __name__ == "__main__":
    main()
