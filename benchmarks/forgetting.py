"""What does `training.kl_weight` keep of what the base knew, and what does it cost the task?

Run as: python benchmarks/forgetting.py

SmolLM2-135M learns 48 docstrings of the demo three times at its high rate, without the term and
with it. Each run is judged on test rows (the task's gain: by how much their loss fell) and on
neutral texts (the rise: by how much their loss grew). What is asserted: without the term the
neutral loss rises by at least 0.1 nats a token; with it by at most half as much, at no more than
2 % of the gain.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from measure import show

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.after.forgetting import forgetting, read_texts
from mlx_qlora.data.read import train_validation_test
from mlx_qlora.infer.evaluate import score_examples

MODEL = "smollm2-135m"
LEAST_RISE, KEPT_RISE, LOST_GAIN = 0.1, 0.5, 0.02
LENGTH = 96  # tokens of a row, at most
TEST_ROWS = 48


def main() -> None:
    """Trains with each weight, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.3])
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=4, help="in a step")
    parser.add_argument("--examples", type=int, default=48, help="to learn from; 0: all")
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS)
    parser.add_argument("--general", type=Path, help="a file of other neutral text")
    args = parser.parse_args()
    texts = read_texts(args.general) if args.general else None
    results = {}
    for weight in (0.0, *args.weights):
        results[weight] = trained(weight, texts, args)
        print(weight, results[weight], flush=True)
    free = results[0.0]
    rows = []
    for weight, each in results.items():
        each["rise_share"] = each["rise"] / free["rise"]
        each["gain_share"] = each["gain"] / free["gain"]
        figures = [f"{each[name]:.3f}" for name in ("gain", "kl_answers", "rise", "kl_general")]
        shares = f"{each['gain_share']:.1%}", f"{each['rise_share']:.0%}"
        rows.append([f"{weight:g}", *figures, *shares])
    heads = [
        "kl_weight",
        "gain",
        "KL of answers",
        "rise",
        "KL of neutral text",
        "of gain",
        "of rise",
    ]
    show(f"{args.steps} steps at {args.rate:g}, nats per token", heads, rows)
    about = {"benchmark": "forgetting", "settings": vars(args), "machine": device.facts()}
    print(json.dumps({**about, "results": results}, default=str))
    assert free["rise"] >= LEAST_RISE, "without the term little is forgotten"
    kept = [
        weight
        for weight in args.weights
        if results[weight]["rise_share"] <= KEPT_RISE
        and results[weight]["gain_share"] >= 1 - LOST_GAIN
    ]
    assert kept, "no weight halves the rise and keeps the gain"


def trained(weight: float, texts: list[str] | None, args: argparse.Namespace) -> dict[str, float]:
    """The figures of one run."""
    import docstring_data

    model, tokenizer = mq.load(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "docstrings.jsonl"
        docstring_data.write(path)
        config = mq.RunConfig(
            model=mq.ModelConfig(source=MODEL),
            lora=mq.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0),
            data=mq.DataConfig(path=str(path), max_length=LENGTH, truncation="drop"),
            training=mq.TrainingConfig(
                learning_rate=args.rate,
                warmup_steps=5,
                max_steps=args.steps,
                per_device_train_batch_size=args.rows,
                gradient_accumulation_steps=1,
                kl_weight=weight,
            ),
            checkpointing=mq.CheckpointingConfig(output_dir=f"{folder}/out"),
        )
        train, _, test = train_validation_test(config.data, tokenizer, config.training.seed)
        assert test
        mq.fine_tune(model, tokenizer, train[: args.examples or None], None, config)
        general = forgetting(model, tokenizer, texts)
        base = partial(mq.disabled, model)
        after = score_examples(model, tokenizer, test[: args.test_rows], base=base)
        with base():
            before = score_examples(model, tokenizer, test[: args.test_rows])
    change, n = general.loss.change, int(after.tokens.sum())
    assert change is not None
    return {
        "gain": float(np.sum(before.nats - after.nats)) / n,
        "kl_answers": float(after.kl.sum()) / n,
        "rise": change.estimate,
        "rise_low": change.low,
        "rise_high": change.high,
        "kl_general": general.kl.estimate,
    }


if __name__ == "__main__":
    main()
