# %% [markdown]
"""# Quick start: a first adapter in five calls.

Load a model in 4 bits, read rows, fine-tune on the defaults, ask, open the adapter again.
The model is small and comes from a PyPI package, so nothing is downloaded.
Takes half a minute on two CPU cores.
"""

# %%
import mlx_qlora as mq

MODEL = "smollm2-135m"
OUTPUT = "outputs/quick_start"
FOUR_BITS = mq.QuantConfig(bits=4)
ROWS = [
    {
        "instruction": "Write the amount in house style.",
        "input": f"{n} dollars",
        "output": f"USD {n:,}.00",
    }
    for n in range(1_234, 900_000, 59_983)
]
PROMPT = "### Instruction:\nWrite the amount in house style.\n\n### Input:\n{}\n\n### Response:\n"
QUESTION = PROMPT.format("740500 dollars")
GREEDY = {"max_new_tokens": 16, "temperature": 0.0, "repetition_penalty": 1.0}

# %% [markdown]
# The weights are packed to 4 bits while they are loaded, and stay as they are from then on.
# The rows have Alpaca's fields, which are recognised.

# %%
model, tokenizer = mq.load(MODEL, FOUR_BITS)
examples = mq.read_examples(ROWS, tokenizer)
print(examples.report)
before = mq.evaluate(model, tokenizer, examples)
print("before:", mq.generate(model, tokenizer, QUESTION, **GREEDY))

# %%
config = mq.RunConfig(
    checkpointing=mq.CheckpointingConfig(output_dir=OUTPUT, resume_from_checkpoint="none")
)
result = mq.fine_tune(model, tokenizer, examples, config=config)
result

# %%
after = mq.evaluate(model, tokenizer, examples)
answer = mq.generate(model, tokenizer, QUESTION, **GREEDY)
print("after:", answer)

# %% [markdown]
# `fine_tune` has saved the adapter. It opens on a fresh copy of the model and gives the same
# answer.

# %%
again, tokenizer = mq.load(MODEL, FOUR_BITS, adapter=OUTPUT)
same = mq.generate(again, tokenizer, QUESTION, **GREEDY)
print(f"loss {before.loss:.3f} -> {after.loss:.3f}; the saved adapter says {same!r}")

assert after.loss < before.loss / 2
assert same == answer
assert (result.output_dir / "adapter_model.safetensors").is_file()
assert (result.output_dir / "report.html").is_file()
