"""How long a layer's activations take from one process to another, by a sum and by a plain send.

Run as: python benchmarks/collectives.py
On two machines: mlx.launch --hostfile hosts.json benchmarks/collectives.py

A model that is larger than one machine can be cut in two ways. Cut within its layers (tensor
split), two sums of a block (T, D) of activations follow each layer on the way up and two on the way
down. Cut between its layers (pipeline), one block is sent at each cut, and one comes back. Both are
timed here between two processes; without a launcher, both are started on this machine, and what is
measured is its loopback. docs/scaling.md has what follows from it.
"""

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import mlx.core as mx

from mlx_qlora.distributed import launched

# glibc maps a block above 32 MB anew each time, which can take longer than to send it.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "10000000000"}
KEEP_PAGES |= {"MALLOC_ARENA_MAX": "1"}
WARM = 3
LAYERS = 80  # of Llama 3.1 70B
SUMS = 4  # of a layer: behind attention and MLP, on the way up and on the way down
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def main() -> None:
    """Measures, and in the first process prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    if not launched():
        sys.exit(start_two(sys.argv[1:]))

    group = mx.distributed.init(strict=True)
    assert group.size() == 2, "between two processes"
    found: dict[str, Any] = {}
    for T, name in itertools.product(args.tokens, DTYPES):
        x = mx.random.normal((T, args.hidden)).astype(DTYPES[name])
        mx.eval(x)
        found[f"{T} {name}"] = {
            "all_sum": times(summed, x, args.rounds),
            "send": times(there_and_back, x, args.rounds, 0.5),
        }
    if group.rank() == 0:
        report(args, found)


def start_two(words: list[str]) -> int:
    """Starts this script twice, joined by a ring on this machine; returns the exit code."""
    ports = []
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
            ports.append(each.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        started = [
            subprocess.Popen(
                [sys.executable, __file__, *words],
                env={
                    **KEEP_PAGES,
                    **os.environ,
                    "MLX_HOSTFILE": str(hosts),
                    "MLX_RANK": str(rank),
                },
            )
            for rank in range(2)
        ]
        return max(abs(process.wait()) for process in started)


def summed(x: mx.array) -> mx.array:
    """The sum of both processes' blocks."""
    return mx.distributed.all_sum(x, stream=mx.cpu)


def there_and_back(x: mx.array) -> mx.array:
    """A block from the first process to the second one, and another one back."""
    if mx.distributed.init().rank() == 1:
        mx.eval(mx.distributed.recv_like(x, 0, stream=mx.cpu))
        return mx.distributed.send(x, 0, stream=mx.cpu)
    mx.eval(mx.distributed.send(x, 1, stream=mx.cpu))
    return mx.distributed.recv_like(x, 1, stream=mx.cpu)


def times(
    work: Callable[[mx.array], mx.array], x: mx.array, rounds: int, share: float = 1.0
) -> dict[str, float]:
    """Seconds of some work over the rounds, each begun by both at the same time.

    Args:
        work: makes the array that is waited for.
        x: the block, (T, D).
        rounds: how many count; WARM ones before them do not.
        share: of the time that is counted.
    """
    found = []
    for _ in range(rounds + WARM):
        mx.eval(mx.distributed.all_sum(mx.zeros(1), stream=mx.cpu))
        start = time.perf_counter()
        mx.eval(work(x))
        found.append(share * (time.perf_counter() - start))
    return measure.spread(found[WARM:])


def report(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """The table, the plot, the JSON line, and the claim.

    Rates and the cost of a micro-batch are from the fastest round: a sum needs both processes at
    once, so whatever else the machine does slows it more than it slows a send.
    """
    rows = []
    for name, each in found.items():
        dtype = name.split(" ")[1]
        each["bytes"] = int(name.split(" ")[0]) * args.hidden * DTYPES[dtype].size
        for way in ("all_sum", "send"):
            each[f"{way}_bytes_per_second"] = each["bytes"] / each[way]["lowest"]
        each["tensor_split_seconds"] = SUMS * LAYERS * each["all_sum"]["lowest"]
        each["pipeline_seconds"] = 2 * each["send"]["lowest"]
        rows.append(
            [
                name,
                f"{each['bytes'] / 1e6:.1f} MB",
                *(
                    measure.shown({k: 1e3 * v for k, v in each[way].items()}, 1)
                    for way in ("all_sum", "send")
                ),
                f"{each['tensor_split_seconds']:.2f} s",
                f"{each['pipeline_seconds']:.3f} s",
            ]
        )
    title = f"a block of T x {args.hidden} between two processes, milliseconds"
    ways = [f"{LAYERS} layers split: {SUMS * LAYERS} sums", "2 stages: 2 sends"]
    measure.show(title, ["T, dtype", "size", "all_sum", "send", *ways], rows)
    series = {
        f"{way}, {dtype}": {
            float(T): 1e3 * found[f"{T} {dtype}"][way]["median"] for T in args.tokens
        }
        for way, dtype in itertools.product(("all_sum", "send"), DTYPES)
    }
    plot = measure.lines("collectives", title, "tokens", "milliseconds", series)
    measure.finish("collectives", vars(args), found, plot)
    for name, each in found.items():
        assert each["pipeline_seconds"] * 20 < each["tensor_split_seconds"], name


if __name__ == "__main__":
    main()
