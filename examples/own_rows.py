# %% [markdown]
"""# Your own rows: from a file to an adapter that learned them.

A file of rows is read, looked at, trained on with the defaults, and scored on rows kept apart.
Put your own file in the place of the finance questions; nothing else has to change.
Takes two minutes on two CPU cores, with 64 of the rows.
"""

# %%
from pathlib import Path

import mlx_qlora as mq

MODEL = "smollm2-135m"  # from a PyPI package; or a name on the hub, such as Qwen/Qwen3-0.6B
HERE = Path(globals().get("__file__", "../own_rows.py")).parent  # a notebook runs in its folder
DATA = HERE / "finance.jsonl"  # your own: JSONL, JSON, CSV or Parquet
OUTPUT = "outputs/own_rows"
QUESTION = "What is the impact of a P/E compression from 30x to 24x?"

# %% [markdown]
# The names of the fields say what a row is. What cannot be used is counted, with the reason.

# %%
model, tokenizer = mq.load(MODEL, mq.QuantConfig(bits=4))
examples = mq.read_examples(DATA, tokenizer)
print(examples.report)
examples = examples[:64]  # for the time it takes; of your own rows take all

# %% [markdown]
# What a row is for the model: the prompt is context, and the marked part is learned.

# %%
example = examples[0]
print(tokenizer.decode(example.tokens[~example.learned].tolist()))
print("LEARNED:", tokenizer.decode(example.tokens[example.learned].tolist()))

# %% [markdown]
# A fifth of the rows is kept apart, to validate with. A row goes into a part by a hash of what it
# says, so a row that is added to the file later does not move the others.

# %%
train, validation = examples.split([0.8, 0.2])
print(f"{len(train)} rows to train, {len(validation)} to validate")
before = mq.evaluate(model, tokenizer, validation)

# %% [markdown]
# All settings are the defaults: how many rows there are decides about the steps.

# %%
config = mq.RunConfig(
    checkpointing=mq.CheckpointingConfig(output_dir=OUTPUT, resume_from_checkpoint="none")
)
result = mq.fine_tune(model, tokenizer, train, validation, config)
result

# %% [markdown]
# Did it help, on rows that were not trained?

# %%
after = mq.evaluate(model, tokenizer, validation)
print(f"validation loss {before.loss:.3f} -> {after.loss:.3f}")
print(f"perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}")

# %% [markdown]
# The answer has the manner of the rows. A model this small still gets the arithmetic wrong.

# %%
prompt = f"### Instruction:\n{QUESTION}\n\n### Response:\n"
answer = mq.generate(model, tokenizer, prompt, max_new_tokens=48, temperature=0.0)
print(answer)

# %%
assert not set(train.contents) & set(validation.contents)
assert after.loss < 0.95 * before.loss
assert answer.strip()
assert (result.output_dir / "report.html").is_file()
