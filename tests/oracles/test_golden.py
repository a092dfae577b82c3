"""Thirty optimiser steps against torch + transformers + PEFT, from the same adapter and batches.

The torch side is written as a user of PEFT would write it: AdamW, a LambdaLR, clip_grad_norm_,
and the masked loss summed over the micro-batches and divided by the tokens of the step.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.gpu_route import Route, routes
from support.gradients import add_grads
from support.models import LLAMA3_ROPE, TINY, load_folder, make_hf_model

from mlx_qlora.adapters.peft import load_adapter, save_adapter
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.optim import AdamW, learning_rate
from mlx_qlora.tree import flat

STEPS, ACCUMULATION, PEAK, WARMUP = 30, 4, 1e-2, 6


def uneven_batches() -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Per step four micro-batches (tokens, labels) whose supervised counts differ widely."""
    random = np.random.default_rng(7)
    steps = []
    for _ in range(STEPS):
        micro = []
        for _ in range(ACCUMULATION):
            B, T = int(random.integers(1, 4)), int(random.choice([12, 24, 40]))
            # A drifting pattern, not noise, so that there is something to learn.
            start = random.integers(0, 4, (B, 1))
            tokens = (start + 3 * np.arange(T + 1)) % TINY["vocab_size"]
            labels = tokens[:, 1:].copy()
            for row in labels:
                row[: random.integers(0, T - 1)] = IGNORE
                row[T - int(random.integers(0, 4)) :] = IGNORE
            micro.append((tokens[:, :-1].astype(np.int32), labels.astype(np.int32)))
        steps.append(micro)
    return steps


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The torch + PEFT run, and what it started from."""
    import torch
    from peft import PeftModel

    folder = tmp_path_factory.mktemp("golden")
    hf = make_hf_model(rope_parameters=LLAMA3_ROPE)
    hf.save_pretrained(folder / "base")
    ours = load_folder(folder / "base")
    add_lora(ours, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0), seed=3)
    save_adapter(ours, folder / "adapter")

    model = PeftModel.from_pretrained(hf, folder / "adapter", is_trainable=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: learning_rate(done + 1, 1.0, WARMUP, STEPS)
    )
    losses, norms = [], []
    for micro in uneven_batches():
        n_tokens = sum(int((labels != IGNORE).sum()) for _, labels in micro)
        total = 0.0
        for tokens, labels in micro:
            logits = model(torch.from_numpy(tokens).long()).logits
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(labels).long().flatten(), reduction="sum"
            )
            (nats / n_tokens).backward()
            total += nats.item()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, 1.0).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total / n_tokens)
    model.save_pretrained(folder / "trained")
    return {"folder": folder, "losses": np.array(losses), "norms": np.array(norms)}


def our_run(
    folder: Path, recompute: Any, compiled: bool, route: Route
) -> tuple[np.ndarray, np.ndarray, AdamW]:
    model = route.load(folder / "base", None)
    load_adapter(model, folder / "adapter")
    engine = Engine(model, recompute, compiled)
    optimizer = AdamW(model.trainable_parameters(), weight_decay=0.01, max_grad_norm=1.0)
    losses, norms = [], []
    for step, micro in enumerate(uneven_batches(), 1):
        grads, nats, n_tokens = None, 0.0, 0
        for tokens, labels in micro:
            batch = Batch(mx.array(tokens), mx.array(labels))
            loss, n, g = engine(optimizer.named(optimizer.weights), batch)
            grads, nats, n_tokens = add_grads(grads, g), nats + loss.item(), n_tokens + n
        rate = learning_rate(step, PEAK, WARMUP, STEPS)
        norms.append(optimizer.update(grads, n_tokens, rate).item())
        losses.append(nats / n_tokens)
    return np.array(losses), np.array(norms), optimizer


@pytest.mark.parametrize(
    ("gpu_route", "recompute", "compiled"),
    [
        *(("none", *how) for how in (("none", False), ("all", False), (1, False), ("none", True))),
        ("metal-float32", "none", True),
        ("cuda-float32", 1, True),
    ],
    indirect=["gpu_route"],
)
def test_thirty_steps_equal_those_of_torch_and_peft(golden, gpu_route, recompute, compiled):
    losses, norms, optimizer = our_run(golden["folder"], recompute, compiled, gpu_route)
    loss_gap = np.abs(losses - golden["losses"])
    norm_gap = np.abs(norms - golden["norms"])
    assert golden["losses"][-1] < 0.6 * golden["losses"][0], "the run must learn, to mean anything"
    assert golden["norms"].max() > 1.0 > golden["norms"].min(), "both sides of the clip"
    assert loss_gap.max() <= 1e-5
    assert loss_gap.mean() <= 1e-6
    assert norm_gap.max() <= 5e-4

    theirs = load_file(golden["folder"] / "trained" / "adapter_model.safetensors")
    for name, weight in optimizer.named(optimizer.weights).items():
        np.testing.assert_allclose(np.array(weight), theirs[f"base_model.model.{name}"], atol=2e-5)


@routes("metal-float16")
def test_thirty_steps_in_16_bits_follow_those_of_torch_and_peft(golden, gpu_route):
    losses, norms, _ = our_run(golden["folder"], "none", True, gpu_route)
    assert 0 < np.abs(losses / golden["losses"] - 1).max() < 2 * gpu_route.tolerance.loss
    assert np.abs(norms / golden["norms"] - 1).max() < gpu_route.tolerance.gradient


def test_a_mean_of_means_would_fail_this_trajectory(golden):
    """The control: weighting micro-batches equally is far outside the tolerance."""
    model = load_folder(golden["folder"] / "base")
    load_adapter(model, golden["folder"] / "adapter")
    engine = Engine(model, "none", compiled=False)
    means = []
    for tokens, labels in uneven_batches()[0]:
        batch = Batch(mx.array(tokens), mx.array(labels))
        loss, n, _ = engine(flat(model.trainable_parameters()), batch)
        means.append(loss.item() / n)
    assert abs(np.mean(means) - golden["losses"][0]) > 1e-3
