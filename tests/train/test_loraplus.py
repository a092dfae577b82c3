"""LoRA+ (arXiv 2402.12354): lora_B at a rate of its own, as PEFT's optimiser has it."""

import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from support.models import load_folder, randomise_lora
from support.training import inputs, make_examples, settings

from mlx_qlora.adapters.peft import load_adapter, save_adapter
from mlx_qlora.config import build
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.run import Inputs
from mlx_qlora.train.loop import train
from mlx_qlora.train.optim import AdamW
from mlx_qlora.tree import flat

RATIO = 8.0


def adapted(folder: Path, ratio: float = RATIO):
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, loraplus_lr_ratio=ratio)
    return add_lora(load_folder(folder), lora, seed=3)


def test_ten_steps_equal_those_of_pefts_optimizer(hf_tiny, tmp_path):
    import torch
    from peft import PeftModel
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    ours = adapted(hf_tiny[1])
    randomise_lora(ours)
    folder = save_adapter(ours, tmp_path / "adapter", "org/base")
    hf = AutoModelForCausalLM.from_pretrained(hf_tiny[1], dtype=torch.float32)
    model = PeftModel.from_pretrained(hf, folder, is_trainable=True)
    how = {"lr": 1.0, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1, **how
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    adamw, plain = (
        AdamW(ours.trainable_parameters(), 0.8, 0.95, 1e-6, 0.1, None, ratio)
        for ratio in (RATIO, 1.0)
    )
    assert theirs.keys() == adamw.shapes.keys()
    random = np.random.default_rng(0)
    for step in range(1, 11):
        rate = 1e-3 * step
        grads = random.normal(size=adamw.weights.size).astype(np.float32)
        tree = adamw.named(mx.array(grads))
        for name, weight in theirs.items():
            weight.grad = torch.from_numpy(np.array(tree[name]))
        for group, relative in zip(optimizer.param_groups, rates):
            group["lr"] = rate * relative
        optimizer.step()
        adamw.update(adamw.named(mx.array(grads)), 1, rate)
        plain.update(adamw.named(mx.array(grads)), 1, rate)
    without = plain.named(plain.weights)
    for name, weight in adamw.named(adamw.weights).items():
        expected = theirs[name].detach().numpy()
        np.testing.assert_allclose(np.array(weight), expected, rtol=1e-5, atol=2e-6, err_msg=name)
        same_without = np.allclose(np.array(without[name]), expected, atol=1e-3)
        assert same_without == (".lora_A." in name)


def test_a_run_moves_lora_b_at_its_own_rate(hf_tiny, tmp_path):
    """Adam's first step is as long as the rate; lora_A stays, as the first lora_B is zero."""
    model, rate = adapted(hf_tiny[1]), 2e-3
    how = {"max_steps": 1, "learning_rate": rate, "warmup_steps": 0, "weight_decay": 0.0}
    config = settings(tmp_path, lr_scheduler_type="constant_with_warmup", **how)
    train(model, inputs(make_examples(), config=config), Console(file=io.StringIO()))
    moved = [weight for name, weight in flat(model.trainable_parameters()).items() if "_B." in name]
    assert len(moved) == 2 * 7
    for weight in moved:
        assert mx.abs(weight).max().item() == pytest.approx(RATIO * rate, rel=1e-2)


# ---- ratio 1, and files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "same"), [(1.0, True), (1, True), (1 + 1e-12, True), (2.0, False)]
)
def test_a_ratio_of_one_is_no_ratio_to_the_bit(ratio, same):
    random = np.random.default_rng(0)
    weights = {
        f"q_proj.lora_{side}.weight": mx.array(random.normal(size=(3, 5)).astype(np.float32))
        for side in "AB"
    }
    optimizers = AdamW(weights), AdamW(weights, lr_ratio=ratio)
    for _ in range(5):
        grads = mx.array(random.normal(size=30).astype(np.float32))
        for optimizer in optimizers:
            optimizer.update(optimizer.named(grads), 3, 1e-2)
    plain, with_ratio = (np.array(optimizer.weights).tobytes() for optimizer in optimizers)
    assert (plain == with_ratio) == same


def test_the_adapters_files_do_not_know_of_the_ratio(hf_tiny, tmp_path):
    for name, ratio in (("with", RATIO), ("without", 1.0)):
        save_adapter(adapted(hf_tiny[1], ratio), tmp_path / name, "org/base")
    files = sorted(path for path in (tmp_path / "with").rglob("*") if path.is_file())
    assert len(files) == 5
    for path in files:
        twin = tmp_path / "without" / path.relative_to(tmp_path / "with")
        assert path.read_bytes() == twin.read_bytes()
        assert b"loraplus" not in path.read_bytes()
    from peft import LoraConfig as PeftConfig

    known = set(PeftConfig().to_dict())
    assert set(json.loads((tmp_path / "with" / "adapter_config.json").read_text())) <= known
    loaded = load_adapter(load_folder(hf_tiny[1]), tmp_path / "with")
    assert loaded.lora_config.loraplus_lr_ratio == 1.0


def test_an_attached_adapter_is_trained_and_recorded_with_the_ratio_that_is_asked_for(
    hf_tiny, tmp_path
):
    save_adapter(adapted(hf_tiny[1]), tmp_path / "adapter", "org/base")
    ours = load_adapter(load_folder(hf_tiny[1]), tmp_path / "adapter")
    asked = {"lora": {"loraplus_lr_ratio": 8.0}, "model": {"base_model_name_or_path": "org/base"}}
    tokenizer: Any = None
    prepared = Inputs(build(asked), tokenizer, ours.config, make_examples()).prepare(ours)
    assert prepared.config.lora.loraplus_lr_ratio == ours.lora_config.loraplus_lr_ratio == 8.0
