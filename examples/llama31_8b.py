# %% [markdown]
"""# Llama 3.1 8B on a Mac: the settings, the plan, a trial.

`llama31_8b.yaml` holds the settings of a real run.
The plan says what it needs on three Macs, before anything is downloaded.
Then the same settings train a small model for three steps.
Takes a minute on two CPU cores, and downloads nothing.
"""

# %%
import json
import struct
from pathlib import Path

import mlx_qlora as mq
from mlx_qlora.config import build, read_yaml

HERE = Path(globals().get("__file__", "../llama31_8b.py")).parent  # a notebook runs in its folder
OUTPUT = Path("outputs/llama31_8b")
MACS = ("m4-16", "m4-pro-36", "m4-max-64")
LLAMA_31_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

# %% [markdown]
# The settings are those of the file, checked field by field.

# %%
settings = read_yaml(HERE / "llama31_8b.yaml")
config = build(settings)
print(config.lora)
print(config.training)

# %% [markdown]
# A plan needs the model's sizes alone, and no weight. With the model's name it would fetch the
# files; here a folder with its `config.json` and an empty file of weights stands for them.

# %%
stand_in = OUTPUT / "sizes_only"
stand_in.mkdir(parents=True, exist_ok=True)
(stand_in / "config.json").write_text(json.dumps(LLAMA_31_8B))
(stand_in / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
plans = {mac: mq.plan(str(stand_in), config, mac) for mac in MACS}
for mac, plan in plans.items():
    print(f"\n{mac}: {'fits' if plan.fits else 'does not fit'}\n{plan}")

# %% [markdown]
# For the trial another model is named, and three steps; everything else stays.

# %%
settings["model"]["source"] = "smollm2-135m"
settings["training"] |= {"num_train_epochs": None, "max_steps": 3}
settings["checkpointing"] |= {"output_dir": str(OUTPUT), "resume_from_checkpoint": "none"}
settings["logging"]["logging_steps"] = 1
trial = build(settings)

model, tokenizer = mq.load("smollm2-135m", trial.model.quantize())
examples = mq.read_examples(HERE / "finance.jsonl", tokenizer, trial.data)
train, validation, _ = examples.split([0.8, 0.1, 0.1])
result = mq.fine_tune(model, tokenizer, train, validation[:4], trial)
result

# %%
losses = [record["loss"] for record in result.log_history if "loss" in record]
print(losses)

# %%
assert all(plan.trainable == 41_943_040 for plan in plans.values())
assert plans["m4-max-64"].fits and plans["m4-pro-36"].fits
contexts = [plan.longest_context for plan in plans.values()]
assert contexts == sorted(contexts) and contexts[0] < contexts[-1]
assert build(read_yaml(HERE / "llama31_8b.yaml")).training.num_train_epochs == 3
assert result.steps == 3 and len(losses) == 3
adapter = json.loads((OUTPUT / "adapter_config.json").read_text())
assert (adapter["r"], adapter["lora_alpha"], len(adapter["target_modules"])) == (16, 32, 7)
