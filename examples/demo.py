"""The demo: teach SmolLM2-135M (4-bit) to write docstrings, on the spot, and check that it did.

Run as: make demo        (or: python examples/demo.py --output-dir outputs/demo)

The model comes from a PyPI package, the data from this machine's own Python library. It takes a
few minutes on two CPU cores, and fails if the test loss did not fall by at least a quarter.
"""

import argparse
import math
import sys
from pathlib import Path

import docstring_data
from rich.console import Console

import mlx_qlora as mq
from mlx_qlora.after.report import Report, write_report
from mlx_qlora.data.read import train_validation_test

MODEL = "smollm2-135m"
LEAST_FALL = 0.25  # of the test loss
TEST_ROWS, VALIDATION_ROWS, SAMPLES = 96, 32, 3
BATCH_SIZE, MAX_NEW_TOKENS = 16, 40


def main() -> int:
    """Runs the demo; returns 1 if the model did not learn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="outputs/demo", type=Path)
    parser.add_argument("--max-steps", default=36, type=int)
    parser.add_argument("--least-fall", default=LEAST_FALL, type=float, help="of the test loss")
    args = parser.parse_args()
    console = Console()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = args.output_dir / "docstrings.jsonl"
    console.print(f"made      {docstring_data.write(data):,} rows from Python's own library")
    config = mq.RunConfig(
        model=mq.ModelConfig(source=MODEL),
        lora=mq.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0),
        data=mq.DataConfig(path=str(data), max_length=96, truncation="drop"),
        training=mq.TrainingConfig(
            learning_rate=2e-3,
            warmup_steps=5,
            max_steps=args.max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=1,
        ),
        checkpointing=mq.CheckpointingConfig(
            output_dir=str(args.output_dir),
            eval_steps=15,
            save_steps=15,
            resume_from_checkpoint="none",
        ),
        logging=mq.LoggingConfig(logging_steps=5),
    )
    model, tokenizer = mq.load(MODEL)
    train, validation, test = train_validation_test(config.data, tokenizer, config.training.seed)
    assert validation and test
    test = test[:TEST_ROWS]
    console.print(f"data      {train.report.kept:,} rows fit {config.data.max_length} tokens")
    plan = mq.plan(MODEL, config)
    tokens = args.max_steps * BATCH_SIZE * train.report.tokens / train.report.kept
    minutes = math.ceil(tokens / plan.tokens_per_second / 60)
    console.print(
        f"plan      {plan.total_bytes / 1e9:.2f} GB of {plan.memory_bytes / 1e9:.0f}; "
        f"{args.max_steps} steps in about {minutes} min, then scores and answers",
        highlight=False,
    )

    result = mq.fine_tune(model, tokenizer, train, validation[:VALIDATION_ROWS], config)
    after, texts_after = mq.evaluate(model, tokenizer, test), answers(model, tokenizer, test)
    with mq.disabled(model):  # the base is frozen: this is what it was before
        before, texts_before = mq.evaluate(model, tokenizer, test), answers(model, tokenizer, test)

    samples = []
    for example, old, new in zip(test, texts_before, texts_after):
        prompt, reference = prompt_and_reference(tokenizer, example)
        samples.append({"prompt": prompt, "before": old, "after": new, "reference": reference})
        console.rule(f"line {example.line} of {data.name}")
        console.print(prompt, markup=False, highlight=False)
        for name, text in (("before", old), ("after", new), ("reference", reference)):
            console.print(f"[bold]{name}:[/bold] ", end="")
            console.print(text.strip(), markup=False, highlight=False)
    console.rule()
    result.test_scores = {"before": before, "after": after}
    rows = {"train": len(train), "validation": VALIDATION_ROWS, "test": len(test)}
    report = write_report(Report(result, config, samples, [train.report], rows, plan))

    fall = 1 - after.loss / before.loss
    console.print(
        f"test loss {before.loss:.3f} -> {after.loss:.3f} ({fall:.0%} lower), perplexity "
        f"{before.perplexity:.1f} -> {after.perplexity:.1f}; see {report}"
    )
    if fall < args.least_fall:
        message = f"FAILED: the test loss fell by {fall:.1%}, not {args.least_fall:.0%}"
        print(message, file=sys.stderr)
        return 1
    return 0


def answers(model, tokenizer, test) -> list[str]:
    """Greedy answers to the first few test rows."""
    prompts = [prompt_and_reference(tokenizer, example)[0] for example in test[:SAMPLES]]
    greedy = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    return [mq.generate(model, tokenizer, prompt, **greedy) for prompt in prompts]


def prompt_and_reference(tokenizer, example) -> tuple[str, str]:
    """What stood before the learned tokens, and the learned tokens without the ending one."""
    start = int(example.learned.argmax())
    prompt, reference = example.tokens[:start].tolist(), example.tokens[start:-1].tolist()
    return tokenizer.decode(prompt), tokenizer.decode(reference)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command starts over")
