# %% [markdown]
"""# One adapter for every tool.

A run leaves a PEFT folder, and in it the same adapter for mlx-lm.
A GGUF file for llama.cpp and a dense model with the adapter folded in are one call each.
Every one of them is opened here again, by the tool it is for where that is installed.
Takes half a minute on two CPU cores.
"""

# %%
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from gguf import GGUFReader  # pip install "mlx-qlora[gguf]"
from safetensors import safe_open

import mlx_qlora as mq

MODEL = "smollm2-135m"
OUTPUT = Path("outputs/export")
LORA = mq.LoraConfig()  # the defaults
ROWS = [
    {
        "instruction": "Write the amount in house style.",
        "input": f"{n} euros",
        "output": f"EUR {n:,}.00",
    }
    for n in range(1_000, 900_000, 120_000)
]
PROMPT = (
    "### Instruction:\nWrite the amount in house style.\n\n"
    "### Input:\n5000 euros\n\n### Response:\n"
)

# %% [markdown]
# A run on the defaults, so that there is an adapter to export, and one question to compare with.

# %%
model, tokenizer = mq.load(MODEL)
config = mq.RunConfig(
    checkpointing=mq.CheckpointingConfig(
        output_dir=str(OUTPUT / "run"), resume_from_checkpoint="none"
    )
)
result = mq.fine_tune(model, tokenizer, mq.read_examples(ROWS, tokenizer), config=config)
result

# %%
tokens = mx.array([tokenizer.encode(PROMPT)])
ours = np.array(model(tokens))  # (1, T, V), with the adapter
with mq.disabled(model):
    base = np.array(model(tokens))
learned = np.abs(ours - base).max()
print(f"the adapter moves logits by up to {learned:.2f}")

assert learned > 1

# %% [markdown]
# ## PEFT
# `peft.PeftModel.from_pretrained` opens the output folder, and so does every tool that reads
# PEFT's format. The file of weights holds an A and a B for each of the seven linears of a layer.

# %%
folder = result.output_dir
about = json.loads((folder / "adapter_config.json").read_text())
with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
    names = list(file.keys())
    first = file.get_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
reopened, _ = mq.load(MODEL, adapter=folder)

assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", LORA.r, LORA.lora_alpha)
assert len(names) == 2 * 7 * model.config.num_hidden_layers
assert first.shape == (LORA.r, model.config.hidden_size)
assert np.array_equal(np.array(reopened(tokens)), ours)
del reopened

# %% [markdown]
# ## A dense folder
# `mq.save_merged` folds the adapter into the weights: a Hugging Face folder without an adapter.
# Weights of 32 bits keep the logits as they are; the default, bfloat16, takes half of the disk.

# %%
merged = mq.save_merged(model, tokenizer, OUTPUT / "merged", dtype="float32")
dense, _ = mq.load(merged.folder)
apart = np.abs(np.array(dense(tokens)) - ours).max()
print(f"{merged.bytes / 1e6:.0f} MB; logits differ by {apart:.1e}")

assert apart < 1e-3 * learned
del dense

# %% [markdown]
# ## mlx-lm
# `mlx/` in the output folder goes to `mlx_lm.load(..., adapter_path=...)`. mlx-lm opens no GGUF
# file as a base, so it gets the base as a folder: a merge with an adapter that changes nothing.

# %%
plain, _ = mq.load(MODEL)
mq.add_lora(plain, mq.LoraConfig(r=1))  # a new adapter's B is zero
mq.save_merged(plain, tokenizer, OUTPUT / "base", dtype="float32")
del plain
loaded = mlx_lm.load(str(OUTPUT / "base"), adapter_path=str(folder / "mlx"))
theirs, their_tokenizer = loaded[0], loaded[1]
their_answer = mlx_lm.generate(theirs, their_tokenizer, prompt=PROMPT, max_tokens=8)
our_answer = mq.generate(
    model, tokenizer, PROMPT, max_new_tokens=8, temperature=0, repetition_penalty=1.0
)
print(f"mlx-lm     {their_answer!r}\nmlx-qlora  {our_answer!r}")
apart = np.abs(np.array(theirs(tokens)) - ours).max()
print(f"logits differ by {apart:.1e}")

assert apart < 1e-3 * learned
assert their_answer == our_answer

# %% [markdown]
# ## llama.cpp
# The GGUF file goes to `llama-cli -m base.gguf --lora adapter.gguf`, and the Modelfile beside it
# to Ollama. Here `gguf`, llama.cpp's own package, reads it.

# %%
path = mq.save_gguf_adapter(model, OUTPUT / "gguf" / "adapter.gguf")
reader = GGUFReader(path)
fields = {name: field.contents() for name, field in reader.fields.items()}
tensors = {tensor.name: tensor.data for tensor in reader.tensors}
print((path.parent / "Modelfile").read_text())

assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
assert fields["general.architecture"] == "llama"
assert fields["adapter.lora.alpha"] == LORA.lora_alpha
assert len(tensors) == len(names)
assert np.allclose(tensors["blk.0.attn_q.weight.lora_a"], first, rtol=1e-3, atol=1e-6)
