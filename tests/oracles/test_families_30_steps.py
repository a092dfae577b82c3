"""Thirty steps of the command line on every family, against torch + transformers + PEFT."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.families import FAMILIES, make_family, write_family
from support.tiny_folder import write_rows, write_tokenizer
from support.training import recorded

import mlx_qlora as mq
from mlx_qlora.cli import main
from mlx_qlora.data.batches import IGNORE, make_batches
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.train.optim import learning_rate

STEPS, ROWS, PEAK, WARMUP, CLOSE = 30, 4, 3e-3, 6, 1e-5
# Dynamic RoPE of transformers depends on the longest text that it has seen before.
STEADY = [name for name in FAMILIES if name != "llama-dynamic"]


def torch_losses(hf: Any, adapter: Path, batches: Any) -> list[float]:
    """The mean loss of each step, as a user of PEFT trains."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(hf, adapter, is_trainable=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: learning_rate(done + 1, 1.0, WARMUP, STEPS, "cosine")
    )
    losses = []
    for step in range(STEPS):
        batch = batches[step]
        tokens, labels = (
            torch.from_numpy(np.array(x)).long() for x in (batch.tokens, batch.labels)
        )
        logits = model(tokens).logits  # padding is to the right, where nothing is learned
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        n = int((labels != IGNORE).sum())
        (nats / n).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(nats.item() / n)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", STEADY)
def test_thirty_steps_of_the_command_line_are_those_of_torch_and_peft(name, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_family(name, tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    words = ["train", "--model", tmp_path / "model", "--data", rows, "--output-dir"]
    common = ["model.bits=null", "lora.r=4", "lora.lora_dropout=0", f"--max-steps={STEPS}"]
    common += [f"--batch-size={ROWS}", f"training.learning_rate={PEAK}", "data.split=[1,0,0]"]
    common += [f"training.warmup_steps={WARMUP}", "logging.logging_steps=1", "--quiet"]
    common += ["model.base_model_name_or_path=org/base", "checkpointing.save_steps=30"]
    assert main([str(word) for word in [*words, tmp_path / "out", *common]]) == 0
    ours = [record["loss"] for record in recorded(tmp_path / "out") if "loss" in record]

    model, _ = mq.load(tmp_path / "model")
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["r"] == 4
    mq.add_lora(model, mq.LoraConfig(r=4, lora_dropout=0.0), seed=0)
    mq.save_adapter(model, tmp_path / "begin", "org/base")
    examples = mq.read_examples(rows, load_tokenizer(tmp_path / "model"))
    batches = make_batches(examples, ROWS, seed=0)
    theirs = torch_losses(make_family(name), tmp_path / "begin", batches)
    assert len(ours) == len(theirs) == STEPS
    assert theirs[-1] < theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=CLOSE)
