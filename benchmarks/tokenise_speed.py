"""Tokenising speed against the bare `tokenizers` batch encoder, and memory over a large file.

Run as: python benchmarks/tokenise_speed.py --megabytes 1000 --tokenizer FOLDER

The file is synthetic: rows of instruction, input and output, cut from this machine's own Python
library. The bare encoder gets the same texts, already rendered and in memory; ours reads, parses,
checks, renders, labels, hashes and stores them, too. The two take turns on parts of the file, so
that a machine whose speed drifts treats both alike. Then the whole file is read and iterated, in
a process of its own whose resident memory is watched. Asserted: at least 0.8 times the bare
encoder's speed, and less than 1 GB.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import mlx_qlora as mq
from mlx_qlora.data.chats import alpaca_prompt
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.weights import open_checkpoint

LEAST_SHARE, MOST_RESIDENT = 0.8, 1e9
PART_MEGABYTES = 64


def main() -> None:
    """Measures, prints a line for a person and a JSON line, and asserts the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", default=100, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--tokenizer", type=Path, help="model folder; SmolLM2's if not given")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ratios = [one_round(args.tokenizer, folder, i) for i in range(args.rounds)]
        whole = folder / "whole.jsonl"
        rows = write_rows(whole, args.megabytes << 20, seed=args.rounds)
        figures = in_own_process(args.tokenizer, whole, folder)
    share = statistics.median(ratios)
    print(
        f"{share:.2f} of the bare encoder's speed ({min(ratios):.2f} .. {max(ratios):.2f}); "
        f"{args.megabytes} MB, {rows:,} rows, {figures['tokens']:,} tokens: tokenised in "
        f"{figures['read_seconds']:.0f} s, opened again in {figures['cached_seconds']:.1f} s, "
        f"iterated in {figures['iterate_seconds']:.0f} s, at most "
        f"{figures['resident_bytes'] / 1e6:.0f} MB resident, workers included"
    )
    about = {"benchmark": "tokenise_speed", "cores": os.cpu_count(), "chip": platform.processor()}
    print(json.dumps({**about, "share_of_bare": share, "ratios": ratios, **figures}))
    assert share >= LEAST_SHARE, f"at least {LEAST_SHARE} of the bare encoder's speed"
    assert figures["resident_bytes"] < MOST_RESIDENT, "memory stays flat"


def open_tokenizer(folder: Path | None):
    """The tokenizer of a folder, or SmolLM2's."""
    if folder is not None:
        return load_tokenizer(folder)
    checkpoint = open_checkpoint(resolve("smollm2-135m"))
    return load_tokenizer(checkpoint.files.path, checkpoint.metadata)


def write_rows(path: Path, size: int, seed: int) -> int:
    """Writes rows of 300 to 3,000 characters until the file has `size` bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = itertools.cycle(p.read_text(encoding="utf-8", errors="replace") for p in sources)
    count, at, text = 0, 0, ""
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            n = 300 + (count * 7919 + seed * 104729) % 2700
            if at + n > len(text):
                text, at = next(texts), 0
                continue
            piece, at = text[at : at + n], at + n
            row = {"instruction": f"{seed}.{count} Go on.", "input": piece[: n // 2]}
            file.write(json.dumps({**row, "output": piece[n // 2 :] + "."}) + "\n")
            count += 1
    return count


def one_round(tokenizer_folder: Path | None, folder: Path, number: int) -> float:
    """Our speed over the bare encoder's, on a part of its own."""
    path = folder / f"part-{number}.jsonl"
    write_rows(path, PART_MEGABYTES << 20, number)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [alpaca_prompt(r["instruction"], r["input"]) + r["output"] for r in rows]
    tokenizer = open_tokenizer(tokenizer_folder)
    backend = tokenizer._codec._backend

    def bare() -> float:
        start = time.perf_counter()
        for i in range(0, len(texts), 1000):
            backend.encode_batch(texts[i : i + 1000], add_special_tokens=False)
        return time.perf_counter() - start

    def ours() -> float:
        start = time.perf_counter()
        mq.read_examples(path, tokenizer, mq.DataConfig(max_length=8192, cache_dir=None))
        return time.perf_counter() - start

    first = (bare, ours) if number % 2 else (ours, bare)
    seconds = {measure.__name__: measure() for measure in first}
    return seconds["bare"] / seconds["ours"]


def in_own_process(tokenizer: Path | None, path: Path, folder: Path) -> dict[str, float]:
    """Reads and iterates a file in a fresh process, and watches the memory of its whole family."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=read_and_iterate, args=(tokenizer, path, folder, results))
    process.start()
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            peak[0] = max(peak[0], resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    figures = results.get()
    stop.set()
    watcher.join()
    process.join()
    return {**figures, "resident_bytes": max(peak[0], figures.pop("own_peak_bytes"))}


def read_and_iterate(tokenizer_folder, path: Path, folder: Path, results) -> None:
    """Tokenises, opens from the cache, and walks through every batch of one epoch."""
    tokenizer = open_tokenizer(tokenizer_folder)
    config = mq.DataConfig(max_length=2048, cache_dir=str(folder / "cache"))
    start = time.perf_counter()
    mq.read_examples(path, tokenizer, config)
    read = time.perf_counter()
    examples = mq.read_examples(path, tokenizer, config)
    assert examples.report.cached
    opened = time.perf_counter()
    batches = mq.make_batches(examples, 18)
    seen = sum(batch.real_tokens for batch in batches.ahead(0, len(batches)))
    done = time.perf_counter()
    assert seen >= examples.report.tokens - len(examples), "every token of the epoch"
    unit = 1 if sys.platform == "darwin" else 1024
    figures = {
        "tokens": examples.report.tokens,
        "read_seconds": round(read - start, 2),
        "cached_seconds": round(opened - read, 2),
        "iterate_seconds": round(done - opened, 2),
        "own_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    results.put(figures)


def resident(pid: int | None) -> int:
    """Resident bytes of a process and all its descendants; 0 where /proc does not exist."""
    total, waiting = 0, [pid]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            status = (process / "status").read_text()
            total += next(int(x.split()[1]) for x in status.splitlines() if "VmRSS" in x) * 1024
            for task in (process / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, StopIteration):
            continue
    return total


if __name__ == "__main__":
    main()
