"""Every write of every command that writes, failed once: a message, nothing lost, and again.

Run as: python benchmarks/faults.py

A library of a page in C (tests/support/failing_disk.c) counts the calls by which a command changes
the disk, whoever makes them: Python, Rust or MLX. Then the command is run once for each of them,
which fails: by turns alone, or with all later ones that need room, as on a disk that is full (with
`--both` in both ways). Linux and a C compiler are needed.

The claim that is asserted, of every fault: the command ends with exit code 2 and one message that
names the reason, or does what it would have done without the fault; a checkpoint or an older
export that was there is whole; and the same command, given again, ends byte for byte as one that
met no fault, and leaves no other files. With `--results FILE` what is in the file is not tried
again.
"""

import argparse
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import crash
import forked

SOURCE = forked.ROOT / "tests" / "support" / "failing_disk.c"
SHORT = ("--max-steps", "4", "checkpointing.save_steps=1", "checkpointing.eval_steps=2")
SHORT += ("training.warmup_steps=1",)
MODES = ("once", "full")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)  # in turn, where one call fails


def short(inputs: Path, place: Path) -> list[str]:
    """A run of four steps."""
    return [*crash.command(inputs, place), *SHORT]


def evaluate(inputs: Path, place: Path) -> list[str]:
    """Scores in a file."""
    opened = ["--model", str(inputs / "model"), "--adapter", str(inputs / "adapter")]
    rows = ["--data", str(inputs / "rows.jsonl"), "--limit", "5", "--answers", "0"]
    own = [f"data.cache_dir={place / 'cache'}", "--output", str(place / "out" / "scores.json")]
    return ["evaluate", *opened, *rows, *own]


def refuse(inputs: Path, place: Path) -> list[str]:
    """Rows that cannot be used, in a file."""
    (place / "out").mkdir(exist_ok=True)
    bad = place / "cache" / "bad.jsonl"
    bad.write_text((inputs / "rows.jsonl").read_text() + '{"text": 1}\n')
    own = [f"data.cache_dir={place / 'cache'}", "--refused", str(place / "out" / "refused.jsonl")]
    return ["inspect", "--model", str(inputs / "model"), "--data", str(bad), *own]


def push(inputs: Path, place: Path) -> list[str]:
    """What would be uploaded: nothing is written here."""
    return ["push", str(place / "out"), "me/merged", "--dry-run"]


CASES = {
    "train": crash.Case(short, on_adapter=False, is_run=True),
    "resume": crash.Case(short, short, False, is_run=True, killed_at="out/checkpoint-3"),
    **{name: crash.CASES[name] for name in ("sweep", "merge", "portable", "peft", "gguf")},
    "mlx": crash.Case(crash.adapter("export", "--mlx"), crash.adapter("export", "--mlx")),
    "evaluate": crash.Case(evaluate, evaluate),
    "refused": crash.Case(refuse),
    "push": crash.Case(push, crash.adapter("merge")),
}


def main() -> None:
    """Tries every fault, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="calls of each command, and not all of them")
    parser.add_argument("--both", action="store_true", help="try each call in both ways")
    parser.add_argument("--only", default=",".join(CASES), help="commands, with commas between")
    parser.add_argument("--jobs", default=2, type=int, help="at the same time")
    parser.add_argument("--results", type=Path, help="file of what was tried, to go on from")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=crash.in_memory()) as folder:
        if "failing_disk" not in os.environ.get("LD_PRELOAD", ""):
            library = Path(folder) / "failing_disk.so"
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
            again = [sys.executable, *sys.argv]
            code = subprocess.run(again, env={**os.environ, "LD_PRELOAD": str(library)}).returncode
            sys.exit(code)
        began = time.perf_counter()
        forked.warm()
        counts, wrong = try_all(Path(folder), args)
    for name, count in counts.items():
        print(f"{name:10} {', '.join(f'{n:,} {what}' for what, n in count.items())}")
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({"benchmark": "faults", "counts": counts, "wrong": wrong, "seconds": seconds}))
    assert not wrong, f"{wrong} faults did harm"


def try_all(folder: Path, args: Any) -> tuple[dict[str, dict[str, int]], int]:
    """Command -> how many calls it makes, and how what was tried ended; and how much was wrong."""
    known: dict[tuple[str, int, str], dict[str, Any]] = {}
    if args.results is not None and args.results.is_file():
        for record in map(json.loads, args.results.read_text().splitlines()):
            if not record["problems"]:
                known[record["case"], record["call"], record["mode"]] = record
    counts, wrong = {}, 0
    for name in args.only.split(","):
        alone = crash.LeftAlone(folder, name, CASES[name])
        calls = calls_of(alone)
        step = max(1, calls // args.sample) if args.sample else 1
        tried = range(1, calls + 1, step)
        asked = [(call, MODES[i % 2]) for i, call in enumerate(tried)]
        if args.both:
            asked = [(call, mode) for call in tried for mode in MODES]
        records = [known[key] for each in asked if (key := (name, *each)) in known]
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(args.jobs, context) as pool:
            left = [each for each in asked if (name, *each) not in known]
            for future in as_completed([pool.submit(fault, alone, *each) for each in left]):
                records.append(future.result())
                if records[-1]["problems"]:
                    print(json.dumps(records[-1]), flush=True)
                if args.results is not None:
                    with args.results.open("a") as file:
                        file.write(json.dumps(records[-1]) + "\n")
        ends = [record["end"] for record in records]
        counts[name] = {"calls": calls, "faults": len(records)}
        counts[name] |= {end: ends.count(end) for end in sorted({*ends})}
        wrong += sum(bool(record["problems"]) for record in records)
        shutil.rmtree(alone.folder)
    return counts, wrong


def calls_of(alone: crash.LeftAlone) -> int:
    """How often a command changes the disk."""
    place, log = alone.begin("counted"), alone.folder / "calls.log"
    log.write_text("")
    done = run(alone, place, {"CALLS": str(log)})
    assert done.code == 0, done
    shutil.rmtree(place)
    return len(log.read_text().splitlines())


def run(alone: crash.LeftAlone, place: Path, environ: dict[str, str]) -> forked.Done:
    """The command on a disk that fails as the environment says."""
    words = alone.case.words(alone.inputs, place)
    return forked.Forked(words, None, {"DISK": str(place), **environ}).wait()


def fault(alone: crash.LeftAlone, call: int, mode: str) -> dict[str, Any]:
    """One fault, and the same command again."""
    place = alone.begin(f"fault-{call}-{mode}")
    number = ERRORS[call % len(ERRORS)] if mode == "once" else errno.ENOSPC
    log = alone.folder / f"{place.name}.log"
    environ = {"FAILS_AT": str(call), "FAILURE": str(number), "CALLS": str(log)}
    done = run(alone, place, environ | ({"FOREVER": "1"} if mode == "full" else {}))
    problems, out = [], place / "out"
    messages = [line for line in done.err.splitlines() if line.startswith("mlx-qlora: ")]
    # MLX and Rust may have only words for it.
    is_told = any(word in done.err for word in (os.strerror(number), f"os error {number}"))
    if done.code == 2 and not (len(messages) == 1 and is_told):
        problems.append(f"one message was expected: {done.err}")
    if done.code not in (0, 2) or "Traceback" in done.err + done.out:
        problems.append(f"exit code {done.code}: {done.err}")
    if done.code == 0:
        problems += crash.differences(alone.out, out)
    if alone.case.is_whole and not crash.is_old_or_new(alone, place):
        problems.append("neither the old nor the new export is there")
    if alone.case.is_run:
        problems += damaged(out)
    made = log.read_text().splitlines()
    again = run(alone, place, {})
    if again.code != 0:
        problems.append(f"again: exit code {again.code}: {again.err}")
    else:
        problems += [f"again: {problem}" for problem in crash.differences(alone.out, out)]
        left = crash.litter(place) - crash.litter(alone.place)
        problems += [f"again: {name} is left behind" for name in sorted(left)]
    shutil.rmtree(place)
    log.unlink()
    end = {0: "were harmless", 2: "ended in a message"}.get(done.code, "ended otherwise")
    about = {"case": alone.name, "call": call, "mode": mode, "end": end, "problems": problems}
    return {**about, "what": made[call - 1] if len(made) >= call else "", "said": messages}


def damaged(out: Path) -> list[str]:
    """Checkpoints that a run could not go on from."""
    from mlx_qlora.errors import ConfigError
    from mlx_qlora.train.checkpoint import checkpoints, read_state

    problems = []
    for path in checkpoints(out):
        try:
            read_state(path)
        except ConfigError as error:
            problems.append(str(error))
    return problems


if __name__ == "__main__":
    main()
