"""How much of its speed does training keep while other processes take the cores?

Run as: python benchmarks/beside_others.py        (some five minutes)

SmolLM2-135M with LoRA (r=16 on all seven linears) takes steps on micro-batches of one to four short
or long documents, alone and beside as many busy processes as there are cores. Both take turns,
round by round, in one process. Who shares its cores fairly with as many others keeps half of its
speed; threads that wait for each other in a loop keep far less, and take the others' time for it.
Asserted: no micro-batch falls below a third of its speed alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import measure
import mlx.core as mx
import numpy as np
from matmul_floor import our_step
from trainers import ALPHA, MODEL, RANK, own_rows

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.cpu import blas

LEAST = 1 / 3  # of the speed alone
SHORT, LONG = 48, 320  # positions of a document
BATCHES = {f"{n} of {T}": (n, T) for T in (SHORT, LONG) for n in (1, 2, 4)}
SETTLE = 1.0  # seconds after others began, or ended


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--seconds", default=4.0, type=float, help="of steps, at least")
    parser.add_argument("--others", default=os.cpu_count(), type=int, help="busy processes")
    args = parser.parse_args()

    model, _ = mq.load(MODEL)
    mq.add_lora(model, mq.LoraConfig(r=RANK, lora_alpha=ALPHA))
    draw = np.random.default_rng(0)
    documents = {
        name: [(draw.integers(49_000, size=T + 1).tolist(), [True] * (T + 1))] * n
        for name, (n, T) in BATCHES.items()
    }
    batches = {name: own_rows([rows])[0] for name, rows in documents.items()}
    rates: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "beside": []} for name in batches
    }
    with blas.threads(1):  # as around a run of the training loop
        step = our_step(model, [*batches.values()])
        for batch in batches.values():
            step(batch)
        for _ in range(args.rounds):
            for way, others in (("alone", nullcontext()), ("beside", busy(args.others))):
                with others:
                    time.sleep(SETTLE)
                    for name, batch in batches.items():
                        rates[name][way].append(rate(step, batch, args.seconds))
                        print(f"{way}, {name}: {rates[name][way][-1]:.0f} tokens/s", flush=True)

    results = {name: figures(of["alone"], of["beside"]) for name, of in rates.items()}
    columns = ["micro-batch", "tokens/s alone", f"beside {args.others} others", "share kept"]
    rows = [
        [name, *(measure.shown(of[key], digits) for key, digits in COLUMNS.items())]
        for name, of in results.items()
    ]
    measure.show(f"{MODEL}, LoRA r={RANK}", columns, rows)
    shares = {name: of["kept"]["median"] for name, of in results.items()}
    plot = measure.bars("beside_others", "Beside busy processes", "share of the speed", shares)
    measure.finish("beside_others", vars(args), results, plot)
    worst = min(shares, key=lambda name: shares[name])
    print(f"least: {worst} documents keep {shares[worst]:.2f}")
    assert shares[worst] >= LEAST, f"{worst} documents keep {shares[worst]:.2f} of their speed"


COLUMNS = {"alone": 0, "beside": 0, "kept": 2}


def figures(alone: list[float], beside: list[float]) -> dict[str, Any]:
    """Tokens a second of each round, and the share that is kept."""
    kept = [b / statistics.median(alone) for b in beside]
    return {name: measure.spread(v) for name, v in zip(COLUMNS, (alone, beside, kept))}


def rate(step: Callable[[Any], None], batch: Any, seconds: float) -> float:
    """Real tokens a second, of at least two steps."""
    n, start = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - start < seconds:
        step(batch)
        n += 1
    mx.synchronize()
    return n * batch.real_tokens / (time.perf_counter() - start)


@contextmanager
def busy(n: int) -> Iterator[None]:
    """While so many processes do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    assert device.current().kind == "cpu", "on a GPU others do not take its cores"
    main()
