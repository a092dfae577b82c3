# %% [markdown]
"""# A training loop of your own.

`mq.loss_and_grads` gives the loss and the gradients of a batch; the rest may be yours.
Here that is a plain MLX loop with the AdamW of `mlx.optimizers`.
It takes the same batches as `mq.fine_tune`, so both have the same losses, step by step.
Takes half a minute on two CPU cores.
"""

# %%
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

import mlx_qlora as mq

MODEL = "smollm2-135m"
OUTPUT = Path("outputs/own_loop")
STEPS, BATCH_SIZE, ACCUMULATION, RATE, DECAY, SEED = 3, 2, 2, 1e-3, 0.01, 0
LORA = mq.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0)
ROWS = [
    {
        "instruction": "Write the amount in house style.",
        "input": f"{n} euros",
        "output": f"EUR {n:,}.00",
    }
    for n in range(1_000, 900_000, 41_000)
]

# %% [markdown]
# A frozen model with LoRA layers, and batches that can be reached by their number. A step takes
# two of them. Dropout is off, as its masks depend on where a batch is in the run.

# %%
model, tokenizer = mq.load(MODEL)
mq.add_lora(model, LORA, seed=SEED)
examples = mq.read_examples(ROWS, tokenizer)
batches = mq.make_batches(examples, BATCH_SIZE, SEED)

# %% [markdown]
# The loss is a sum of nats and not a mean. Sums over micro-batches add up, and one division by
# the tokens of the step makes the mean exact, however long the rows are.

# %%
adamw = optim.AdamW(RATE, weight_decay=DECAY, bias_correction=True)
losses = []
for step in range(STEPS):
    nats, tokens, grads = mx.array(0.0), 0, None
    for i in range(ACCUMULATION):
        loss, n, new = mq.loss_and_grads(model, batches[step * ACCUMULATION + i])
        nats, tokens = nats + loss, tokens + n
        grads = new if grads is None else tree_map(mx.add, grads, new)
    mean = tree_map(lambda grad, n=tokens: grad / n, grads)
    adamw.update(model, mean)
    mx.eval(model.trainable_parameters(), adamw.state, nats)
    losses.append(nats.item() / tokens)
    print(f"step {step + 1}  loss {losses[-1]:.5f}")

mq.save_adapter(model, OUTPUT / "by_hand")

# %% [markdown]
# The same by `mq.fine_tune`. The loop above has a constant rate and does not clip gradients, so
# neither does this run.

# %%
config = mq.RunConfig(
    lora=LORA,
    training=mq.TrainingConfig(
        learning_rate=RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=None,
        weight_decay=DECAY,
        seed=SEED,
    ),
    checkpointing=mq.CheckpointingConfig(
        output_dir=str(OUTPUT / "fine_tune"), resume_from_checkpoint="none"
    ),
    logging=mq.LoggingConfig(logging_steps=1),
)
fresh, _ = mq.load(MODEL)
result = mq.fine_tune(fresh, tokenizer, examples, config=config)
result

# %%
theirs = [record["loss"] for record in result.log_history if "loss" in record]
apart = [abs(a - b) / b for a, b in zip(losses, theirs)]
for step, (a, b) in enumerate(zip(losses, theirs), start=1):
    print(f"step {step}  by hand {a:.6f}  fine_tune {b:.6f}")
print(f"largest relative difference {max(apart):.1e}")

assert len(losses) == len(theirs) == STEPS
assert max(apart) < 1e-3
assert losses[-1] < 0.5 * losses[0]

# %% [markdown]
# The saved adapter is a PEFT folder like any other: opened on a fresh model it scores what the
# trained one scores.

# %%
reopened, _ = mq.load(MODEL, adapter=OUTPUT / "by_hand")
batch = batches[0]
logits, again = model(batch.tokens), reopened(batch.tokens)

assert mx.array_equal(logits, again)
