# %% [markdown]
"""# Dialogues: what is learned of a chat.

The rows are `messages`, as for OpenAI's fine-tuning; the model's chat template writes them.
Only what the assistant says is learned, in every turn; the rest is context.
Takes two minutes on two CPU cores.
"""

# %%
import json
from pathlib import Path

import numpy as np

import mlx_qlora as mq

MODEL = "smollm2-135m"
OUTPUT = "outputs/chat_data"
HERE = Path(globals().get("__file__", "../chat_data.py")).parent  # a notebook runs in its folder
ROWS = [json.loads(line) for line in (HERE / "chat_rows.jsonl").read_text("utf-8").splitlines()]
HELD_OUT = 4

# %% [markdown]
# A captain answers household questions, always in two lines. Some dialogues have two turns.

# %%
model, tokenizer = mq.load(MODEL)
examples = mq.read_examples(ROWS, tokenizer)
print(examples.report)
print(json.dumps(ROWS[0], indent=2))

# %% [markdown]
# A batch holds tokens and labels. A label is the token to predict next, or -100 where nothing is
# learned. Below, the supervised stretches of each row are decoded.


# %%
def supervised(batch: mq.Batch, row: int) -> list[str]:
    """The stretches of a row that are learned, as text."""
    stretches, previous = [], -100
    for label in np.array(batch.labels[row]).tolist():
        if label != -100:
            stretches = stretches if previous != -100 else [*stretches, []]
            stretches[-1].append(label)
        previous = label
    return [tokenizer.decode(ids) for ids in stretches]


batches = mq.make_batches(examples, batch_size=1, shuffle=False, epochs=1)
learned = [supervised(batch, 0) for batch in batches]
print(learned[0])

# %% [markdown]
# Now the run, on the defaults. The last dialogues are kept apart, to see whether the manner
# carries over to questions that were not trained.

# %%
config = mq.RunConfig(
    checkpointing=mq.CheckpointingConfig(output_dir=OUTPUT, resume_from_checkpoint="none")
)
train, unseen = examples[:-HELD_OUT], examples[-HELD_OUT:]
before = mq.evaluate(model, tokenizer, unseen)
result = mq.fine_tune(model, tokenizer, train, config=config)
result

# %%
after = mq.evaluate(model, tokenizer, unseen)
question = ROWS[-1]["messages"][:2]
answer = mq.generate(model, tokenizer, question, max_new_tokens=40, temperature=0.0)
print(f"loss on unseen dialogues {before.loss:.3f} -> {after.loss:.3f}\n{answer}")

# %% [markdown]
# What was learned is exactly what the assistant said, each turn with the token that ends it.

# %%
for row, stretches in zip(ROWS, learned, strict=True):
    said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    assert [text.removesuffix("<|im_end|>") for text in stretches] == said
assert after.loss < 0.8 * before.loss
assert answer.startswith("Aye!")
