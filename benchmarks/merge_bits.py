"""How much of what was learned is in a merged model of 4 bits? Share of the gain, and bytes.

Run as: python benchmarks/merge_bits.py --score 12        (on two CPU cores about an hour)

SmolLM2-135M, whose matrices are in 4 bits, learns the demo's docstrings at a rate of 2e-4, with
three seeds. Each adapter is merged into MLX's and llama.cpp's formats, rounded plainly and with
what the run's training rows make up for, and measured on the run's held-out rows: of the fall of
the loss from the base to the tuned model, the share that is left. `--score` has llama.cpp measure
that of the GGUF files, too, on some rows and with its own losses of the base and of the model
merged in 16 bits. Asserted: in 4 bits and the base's own groups, in no more bytes than the base
has, the share is at least KEPT.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import mlx.core as mx
import numpy as np

import mlx_qlora as mq
from mlx_qlora.adapters.drift import PLAIN, WRITTEN
from mlx_qlora.adapters.gguf_model import save_gguf_model
from mlx_qlora.data.read import train_validation_test
from mlx_qlora.model.llama import RMSNorm
from mlx_qlora.model.quantize import FrozenMatrix

MODEL = "smollm2-135m"
KEPT = 0.95  # of the gain in loss, by 4 bits in the base's groups, mean over the seeds
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 95 %, two-sided, by number of seeds
MLX = {
    "4 bits, groups of 64": mq.QuantConfig(4, 64),
    "4 bits, groups of 32": mq.QuantConfig(4, 32),
    "mxfp4": mq.QuantConfig(4, 32, "mxfp4"),
    "5 bits": mq.QuantConfig(5, 64),
    "6 bits": mq.QuantConfig(6, 64),
    "8 bits": mq.QuantConfig(8, 64),
}
GGUF = ("q4_0", "q4_1", "q5_0", "q8_0")
SHARES = "kept", "plain", "kept_by_llama_cpp"
BASE_S_OWN = "4 bits, groups of 32"


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, choices=STUDENT)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--formats", nargs="+", default=[*MLX, *GGUF], choices=[*MLX, *GGUF])
    parser.add_argument("--score", type=int, default=0, help="rows that llama.cpp scores as well")
    parser.add_argument("--runs", type=Path, help="folder of trained adapters, to take or to fill")
    args = parser.parse_args()
    base_bytes = 0
    results: dict[str, Any] = {name: {"kept": [], "plain": []} for name in args.formats}
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        for seed in range(args.seeds):
            model, tokenizer, rows = trained(args.runs or home, seed, args)
            base_bytes = packed_bytes(model)
            ends = None
            if args.score:
                tuned = save_gguf_model(model, tokenizer, home / "gguf", type="f16").file
                ends = [by_llama_cpp(f, rows[1][: args.score]) for f in (model.source.path, tuned)]
                print(f"seed {seed}: by llama.cpp the base {ends[0]:.4f}, tuned {ends[1]:.4f}")
            for name, figures in results.items():
                started = time.process_time()
                drift, figures["bytes"], file = merged(name, model, tokenizer, rows, home)
                print(f"seed {seed}, {name}: {time.process_time() - started:.0f} s of CPU time")
                print(drift, flush=True)
                for key, version in (("kept", WRITTEN), ("plain", PLAIN)):
                    figures[key].append(drift.figures[version].kept)
                if ends is not None and file is not None:
                    loss = by_llama_cpp(file, rows[1][: args.score])
                    share = (ends[0] - loss) / (ends[0] - ends[1])
                    figures.setdefault("kept_by_llama_cpp", []).append(share)
                    print(f"by llama.cpp {loss:.4f}, {share:.1%} kept", flush=True)
    table = []
    for name, figures in results.items():
        means = {key: interval(figures[key]) for key in SHARES if key in figures}
        shares = [shown(means[key]) if key in means else "" for key in SHARES]
        table.append([name, f"{figures['bytes'] / 1e6:.1f}", *shares])
        figures |= {f"{key}_mean": mean for key, mean in means.items()}
    heads = ["written in", "MB", "gain kept", "rounded plainly", "kept, by llama.cpp"]
    measure.show(f"Merged; the base's weights take {base_bytes / 1e6:.1f} MB", heads, table)
    plot = measure.bars(
        "merge_bits",
        "Share of the gain in loss that a merged model keeps",
        "%",
        {name: 100 * figures["kept_mean"][0] for name, figures in results.items()},
    )
    settings = vars(args) | {"runs": None}
    measure.finish("merge_bits", settings, results | {"base_bytes": base_bytes}, plot)
    if BASE_S_OWN in results:
        own = results[BASE_S_OWN]
        assert own["bytes"] <= base_bytes, (own["bytes"], base_bytes)
        assert own["kept_mean"][0] >= KEPT, own


def trained(runs: Path, seed: int, args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A model with an adapter, its tokenizer, and the rows of training and those held out."""
    import docstring_data

    runs.mkdir(parents=True, exist_ok=True)
    data, folder = runs / "docstrings.jsonl", runs / f"run{seed}"
    if not data.exists():
        docstring_data.write(data)
    config = mq.RunConfig(
        model=mq.ModelConfig(source=MODEL),
        lora=mq.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0),
        data=mq.DataConfig(path=str(data), max_length=96, truncation="drop"),
        training=mq.TrainingConfig(
            learning_rate=args.learning_rate,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            seed=seed,
        ),
        checkpointing=mq.CheckpointingConfig(output_dir=str(folder), eval_steps=args.steps),
    )
    if not (folder / "adapter_config.json").exists():
        model, tokenizer = mq.load(MODEL)
        train, validation, _ = train_validation_test(config.data, tokenizer, seed)
        mq.fine_tune(model, tokenizer, train, validation and validation[:32], config)
    model, tokenizer = mq.load(MODEL, adapter=folder)
    train, _, test = train_validation_test(config.data, tokenizer, seed)
    assert test
    return model, tokenizer, (train, test)


def merged(
    name: str, model: Any, tokenizer: Any, rows: Any, home: Path
) -> tuple[Any, int, Path | None]:
    """What rounding changed, bytes of the weights, and the file if llama.cpp can read it."""
    if name in MLX:
        folder = home / "merged"
        drift = mq.save_merged(
            model, tokenizer, folder, dtype="float16", quantize=MLX[name], rows=rows
        ).drift
        arrays = [
            array for file in folder.glob("*.safetensors") for array in mx.load(file).values()
        ]
        return drift, sum(array.nbytes for array in arrays), None
    written = save_gguf_model(model, tokenizer, home / "gguf", type=name, rows=rows)
    return written.drift, written.bytes, written.file


def by_llama_cpp(file: Path, examples: Any) -> float:
    """Mean loss in nats of the learned tokens."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.llama_cpp import llama_cpp

    prompts, targets = [], []
    for example in examples:
        for i in np.flatnonzero(example.learned).tolist():
            prompts.append(example.tokens[:i].tolist())
            targets.append(int(example.tokens[i]))
    likeliest = llama_cpp(file, prompts, top=49152)
    return -statistics.fmean(found[target] for found, target in zip(likeliest, targets))


def packed_bytes(model: Any) -> int:
    """Of the base's weights as they are packed, norms, scales and biases in 16 bits."""
    total = 0
    for module in model.modules():
        if isinstance(module, FrozenMatrix):
            weight, *others = module.packed()
            total += weight.nbytes + sum(2 * array.size for array in others)
        elif isinstance(module, RMSNorm):
            total += 2 * module.weight.size
    return total


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), half


def shown(share: tuple[float, float]) -> str:
    """A share in a cell."""
    return f"{share[0]:.1%} ± {share[1]:.1%}"


if __name__ == "__main__":
    main()
