"""How long one waits: for an import, for help, for a model, and for the first training step.

Run as: python benchmarks/startup.py --rounds 5

Every figure is of a process of its own, and they take turns, round by round; a first round, which
fills the file cache, is left out. Imports and `--help` are the wall time of the whole process,
Python's own start included (it has a row of its own). Loading, the first and the second training
step are timed one after the other in one process: SmolLM2-135M in 4 bits as `load` does it, LoRA
r=16 on all seven linears, four docstrings of up to 256 tokens. Beside them stand the imports that
mlx-lm's trainer and a loop with torch and PEFT begin with. Asserted: how long importing us takes.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
from trainers import ALPHA, MODEL, RANK, RATE, own_rows

MOST_IMPORT_SECONDS = 0.3
IMPORT = "import mlx_qlora"
PROCESSES = {
    "python alone": ["-c", "pass"],
    IMPORT: ["-c", IMPORT],
    "mlx-qlora --help": ["-m", "mlx_qlora", "--help"],
    "import mlx_lm.tuner.trainer": ["-c", "import mlx_lm.tuner.trainer"],
    "import torch, transformers, peft": ["-c", "import torch, transformers, peft"],
}


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # what a process of ours does
    args = parser.parse_args()
    if args.train:
        print(json.dumps(load_and_train(json.loads(args.train.read_text()))))
        return

    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
    processes = {n: words for n, words in PROCESSES.items() if has_torch or "torch" not in n}
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batch.json"
        file.write_text(json.dumps(batch_of_docstrings()))
        for _ in range(args.rounds + 1):
            rounds.append({name: wall_time(words) for name, words in processes.items()})
            _, out = run([__file__, "--train", str(file)])
            rounds[-1] |= json.loads(out.splitlines()[-1])
    results = {name: measure.spread([found[name] for found in rounds[1:]]) for name in rounds[0]}
    rows = [[name, measure.shown(found, 2)] for name, found in results.items()]
    measure.show("Seconds to wait, each in a fresh process", ["what", "s"], rows)
    medians = {name: found["median"] for name, found in results.items()}
    plot = measure.bars("startup", "Time to wait, in fresh processes", "s", medians)
    measure.finish("startup", {"rounds": args.rounds}, results, plot)
    seconds = medians[IMPORT]
    assert seconds < MOST_IMPORT_SECONDS, f"{IMPORT} takes {seconds:.2f} s"


def batch_of_docstrings() -> Any:
    """The one batch that is trained on."""
    import train_speed

    return train_speed.choose(1, 4, 256)


def wall_time(words: list[str]) -> float:
    """Seconds of a Python process."""
    return run(words)[0]


def run(words: list[str]) -> tuple[float, str]:
    """Seconds and output of a Python process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return seconds, done.stdout


def load_and_train(batch: Any) -> dict[str, float]:
    """Seconds to load SmolLM2, and of the first two steps after it."""
    start = time.perf_counter()
    import mlx_qlora as mq

    model, _ = mq.load(MODEL)
    times = [start, time.perf_counter()]

    import mlx.core as mx

    from mlx_qlora import device
    from mlx_qlora.cpu import blas
    from mlx_qlora.train.engine import Engine
    from mlx_qlora.train.optim import AdamW

    mq.add_lora(model, mq.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0))
    engine = Engine(model, "auto", compiled=device.current().compiles)
    optimizer = AdamW(model.trainable_parameters())
    (rows,) = own_rows([batch[0]])
    with blas.threads(1):  # as around a run of the training loop
        for _ in range(2):
            loss, n, grads = engine(optimizer.named(optimizer.weights), rows)
            norm = optimizer.update(grads, n, RATE)
            mx.eval(loss, norm, optimizer.weights, optimizer.mean, optimizer.square)
            times.append(time.perf_counter())
    names = (f"load {MODEL}", "first training step", "second training step")
    return {name: end - begin for name, begin, end in zip(names, times, times[1:])}


if __name__ == "__main__":
    main()
