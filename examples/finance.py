# %% [markdown]
"""# Finance questions: a split, and scores before and after.

192 short questions with worked answers, from valuation to macroeconomics.
A part of the rows is kept apart, and shows whether the model learned more than the rows it saw.
"""

# %%
from pathlib import Path

import mlx_qlora as mq

MODEL = "smollm2-135m"
OUTPUT = "outputs/finance"
HERE = Path(globals().get("__file__", "../finance.py")).parent  # a notebook runs in its folder
DATA = HERE / "finance.jsonl"
QUESTION = "What is the impact of a P/E compression from 30x to 24x?"
PROMPT = f"### Instruction:\n{QUESTION}\n\n### Response:\n"

# %% [markdown]
# A row goes into a part by a hash of what it says, so a row that is added to the file later does
# not move the others. The shares are met on average only.

# %%
model, tokenizer = mq.load(MODEL, mq.QuantConfig(bits=4, group_size=64))
examples = mq.read_examples(DATA, tokenizer, mq.DataConfig(max_length=160))
train, validation = examples.split([0.95, 0.05], seed=0)
print(examples.report)
print(f"{len(train)} rows to train, {len(validation)} to validate")
before = mq.evaluate(model, tokenizer, validation)

# %% [markdown]
# Six steps see a tenth of the rows. The validation loss is measured twice on the way.

# %%
config = mq.RunConfig(
    lora=mq.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0),
    data=mq.DataConfig(max_length=160),
    training=mq.TrainingConfig(
        learning_rate=3e-3,
        warmup_steps=2,
        max_steps=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
    ),
    checkpointing=mq.CheckpointingConfig(
        output_dir=OUTPUT, eval_steps=3, resume_from_checkpoint="none"
    ),
    logging=mq.LoggingConfig(logging_steps=2),
)
result = mq.fine_tune(model, tokenizer, train, validation, config)
result

# %%
after = mq.evaluate(model, tokenizer, validation)
print(f"validation loss {before.loss:.3f} -> {after.loss:.3f}")
print(f"perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}")

# %% [markdown]
# The answer has the manner of the data. A model this small gets the arithmetic wrong, and six
# steps do not change that.

# %%
answer = mq.generate(
    model, tokenizer, PROMPT, max_new_tokens=16, temperature=0.0, repetition_penalty=1.1
)
print(answer)

# %%
assert not set(train.contents) & set(validation.contents)
assert after.loss < 0.92 * before.loss
assert result.eval_loss is not None and abs(result.eval_loss - after.loss) < 0.01
assert answer.strip()
assert (result.output_dir / "report.html").is_file()
