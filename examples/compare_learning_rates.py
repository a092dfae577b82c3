# %% [markdown]
"""# Which learning rate?

Three runs on the defaults differ in nothing but the learning rate, and are scored on the same
rows. Their differences are taken row by row, with 95 % intervals: what is hard for all cancels.
`mlx-qlora sweep` does this with many runs, and stops the bad ones early.
Takes a minute on two CPU cores.
"""

# %%
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mlx_qlora as mq
from mlx_qlora.infer.evaluate import score_examples
from mlx_qlora.sweep.trial import Measured, difference, in_words, is_clear

MODEL = "smollm2-135m"
OUTPUT = Path("outputs/compare_learning_rates")
RATES = {"1e-6": 1e-6, "2e-4": 2e-4, "2e-3": 2e-3}
ROWS = [
    {
        "instruction": "Write the amount in house style.",
        "input": f"{n} euros",
        "output": f"EUR {n:,}.00",
    }
    for n in range(1_000, 900_000, 40_000)
]

# %% [markdown]
# Every second row is kept for validation. The rule is the same, the amounts are new.

# %%
_, tokenizer = mq.load(MODEL)
train = mq.read_examples(ROWS[::2], tokenizer)
validation = mq.read_examples(ROWS[1::2], tokenizer)
print(f"{len(train)} rows to learn from, {len(validation)} to compare by")


# %%
def run(name: str) -> tuple[mq.TrainResult, Measured]:
    """Trains at a rate; returns the run and what each validation row costs the model."""
    model, _ = mq.load(MODEL)
    config = mq.RunConfig(
        training=mq.TrainingConfig(learning_rate=RATES[name]),
        checkpointing=mq.CheckpointingConfig(
            output_dir=str(OUTPUT / name), resume_from_checkpoint="none"
        ),
    )
    result = mq.fine_tune(model, tokenizer, train, config=config)
    scores = score_examples(model, tokenizer, validation)
    nats, tokens = scores.nats.tolist(), scores.tokens.tolist()
    return result, Measured(name, result.steps, result.train_loss, nats, tokens)


found = {name: run(name) for name in RATES}

# %% [markdown]
# The best run, and how far behind the others are. An interval that leaves out 0 says that the
# choice of validation rows does not explain the difference. Of the seed it knows nothing.

# %%
best = min(found, key=lambda name: found[name][1].validation_loss)
behind = {name: difference(losses, found[best][1]) for name, (_, losses) in found.items()}
table = Table("learning rate", "train loss", "validation loss", f"behind {best}", "95 % interval")
for name, (result, losses) in found.items():
    low, high = behind[name].low, behind[name].high
    interval = f"{low:.3f} to {high:.3f}" if name != best else ""
    table.add_row(
        name,
        f"{result.train_loss:.3f}",
        f"{losses.validation_loss:.3f}",
        f"{behind[name].estimate:.3f}",
        interval,
    )
Console().print(table)
for name in (name for name in RATES if name != best):
    print(in_words(best, name, difference(found[best][1], found[name][1])))

# %%
found[best][0]

# %% [markdown]
# At 1e-6 next to nothing was learned: it is the worst rate, and clearly so.

# %%
worst = max(found, key=lambda name: found[name][1].validation_loss)

assert worst == "1e-6"
assert is_clear(behind[worst]) and behind[worst].low > 0.2
assert is_clear(difference(found[worst][1], found["2e-4"][1]))
