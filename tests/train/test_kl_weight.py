"""KL(tuned || base) in the loss: torch's loss and gradient, however a step is divided."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.gradients import gap, packed_batch
from support.models import load_folder, randomise_lora
from support.training import at_step, fine_tune, recorded, stop

from mlx_qlora import device
from mlx_qlora.adapters.peft import save_adapter
from mlx_qlora.adapters.several import disabled
from mlx_qlora.config import build
from mlx_qlora.data.batches import IGNORE, Batch, halves
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.score import score_rows
from mlx_qlora.train.signals import Interrupted
from mlx_qlora.tree import flat, nested

CLOSE, WEIGHT = 1e-5, 0.7


def tuned(folder: Path, starts: bool = False, **lora: Any) -> tuple[Any, Any]:
    """A model with an adapter that was trained, and what makes its engine.

    `starts`: with an adapter that did something before its training already.
    """
    model = load_folder(folder)
    add_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, **lora}), seed=1)
    if starts:
        randomise_lora(model, seed=2)
    engines = {
        recompute: Engine(model, recompute, kl_weight=WEIGHT) for recompute in ("none", "all")
    }
    randomise_lora(model, seed=4, scale=0.1)
    return model, engines


def a_batch(weighed: bool) -> Batch:
    batch = packed_batch([[20, 7], [30], [9, 9, 9], [25]])
    labels: Any = np.array(batch.labels)
    weights = np.random.default_rng(0).uniform(0.1, 3, labels.shape).astype(np.float32)
    weights *= labels != IGNORE
    every = dataclasses.replace(batch, rows=(0, 1, 2, 3))
    return dataclasses.replace(every, weights=weights) if weighed else every


def computed(engine: Engine, batches: list[Batch], key: mx.array | None = None):
    """(loss, KL) sums, what they are divided by, and gradients of some micro-batches."""
    sums, n, grads = np.zeros(2), 0.0, {}
    for batch in batches:
        weights = flat(engine.model.trainable_parameters())
        keys = None if key is None else mx.stack([mx.random.key(row) for row in batch.rows])
        loss, m, grads = engine(weights, batch, keys, grads)
        sums, n = sums + np.array(loss, np.float64), n + m
    return sums, n, nested(grads)


def torch_s(model: Any, folder: Path, home: Path, batch: Batch):
    """(loss, KL) sums and gradients by torch, with PEFT's adapter on and off."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = save_adapter(model, home / "adapter", "org/base")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    theirs = PeftModel.from_pretrained(hf, adapter, is_trainable=True).double().eval()
    loss, divergence = torch.zeros(()), torch.zeros(())
    labels: Any = np.array(batch.labels)
    for row, start, end in batch.documents.tolist():
        tokens = torch.tensor(np.array(batch.tokens)[row, start:end][None].astype(np.int64))
        targets = torch.tensor(labels[row, start:end].astype(np.int64))
        here = targets != IGNORE
        p = theirs(tokens).logits[0][here].log_softmax(-1)
        with torch.no_grad(), theirs.disable_adapter():
            q = theirs(tokens).logits[0][here].log_softmax(-1)
        factors = torch.ones(int(here.sum()), dtype=torch.float64)
        if batch.weights is not None:
            factors = torch.tensor(batch.weights[row, start:end].astype(np.float64))[here]
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        nats = -p.gather(-1, targets[here][:, None])[:, 0]
        loss = loss + (factors * (nats + WEIGHT * kl)).sum()
        divergence = divergence + (factors * kl).sum()
    loss.backward()
    grads = {
        path.removeprefix("base_model.model.").replace(".default", ""): mx.array(
            weight.grad.float().numpy()
        )
        for path, weight in theirs.named_parameters()
        if weight.requires_grad
    }
    return [loss.item(), divergence.item()], grads


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("weighed", [False, True])
def test_loss_kl_and_gradient_are_those_of_torch(hf_tiny, tmp_path, weighed, recompute):
    model, engines = tuned(hf_tiny[1])
    batch = a_batch(weighed)
    sums, n, grads = computed(engines[recompute], [batch])
    wanted, of_torch = torch_s(model, hf_tiny[1], tmp_path, batch)
    assert sums == pytest.approx(wanted, rel=CLOSE) and wanted[1] > 0.01 * wanted[0]
    assert gap(grads, nested({path: of_torch[path] for path in flat(grads)})) < CLOSE
    labels: Any = np.array(batch.labels)
    weights = batch.weights if batch.weights is not None else labels != IGNORE
    assert n == pytest.approx(float(weights.sum()), rel=1e-6)


@pytest.mark.parametrize("weighed", [False, True])
def test_a_step_is_the_same_however_it_is_divided(hf_tiny, weighed):
    """With dropout, in the model that learns and not in the one that it is compared with."""
    _, engines = tuned(hf_tiny[1])
    batch, key = a_batch(weighed), mx.random.key(0)
    sums, n, grads = computed(engines["none"], [batch], key)
    parts = [part for half in halves(batch) for part in halves(half)]
    divided = [computed(engines["none"], parts, key), computed(engines["all"], [batch], key)]
    small = dataclasses.replace(device.current(), chunk_positions=8, busy_positions=8)
    with device.use(small):
        divided.append(computed(engines["none"], [batch], key))
    for others, m, more in divided:
        assert [*others, m] == pytest.approx([*sums, n], rel=2e-6)
        assert gap(grads, more) < 3e-6


def test_nothing_to_learn_has_the_same_shape(hf_tiny):
    _, engines = tuned(hf_tiny[1])
    batch = a_batch(False)
    empty = dataclasses.replace(batch, labels=mx.full(batch.labels.shape, IGNORE))
    sums, n, _ = computed(engines["none"], [empty])
    assert sums.tolist() == [0, 0] and n == 0


@pytest.mark.parametrize("starts", [False, True])
def test_a_model_that_was_not_moved_is_no_distance_from_itself(hf_tiny, starts):
    """An adapter that training goes on from is what it is compared with, as with preferences."""
    model, engines = tuned(hf_tiny[1], starts)
    batch = a_batch(False)
    (_, moved), *_ = computed(engines["none"], [batch])
    lend = engines["none"].base
    assert lend is not None
    _, *start = lend.args
    assert len(start) == starts
    if starts:
        model.update(nested(start[0]))
    else:
        weights = flat(model.trainable_parameters())
        model.update(nested({path: 0 * w for path, w in weights.items() if "lora_B" in path}))
    (loss, kl), _, grads = computed(engines["none"], [batch])
    assert abs(kl) < 1e-6 * loss and moved > 1e-2
    plain, _, of_plain = Engine(model, "none")(flat(model.trainable_parameters()), batch)
    assert plain.item() == pytest.approx(loss, rel=1e-6)
    assert gap(grads, nested(of_plain)) < CLOSE


def test_a_score_measures_the_same_divergence(hf_tiny):
    model, engines = tuned(hf_tiny[1])
    batch = a_batch(False)
    (_, kl), *_ = computed(engines["none"], [batch])
    rows = score_rows(model, batch, partial(disabled, model))
    assert rows.kl.sum() == pytest.approx(kl, rel=1e-4) and (rows.kl > 0).all()
    plain = score_rows(model, batch)
    assert not plain.kl.any() and np.array_equal(plain.nats, rows.nats)


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_says_its_kl_and_a_stop_changes_no_bit(chat_folder, tmp_path):
    fields = {"kl_weight": 0.5, "logging_steps": 1}
    whole = fine_tune(chat_folder, tmp_path / "whole", **fields)
    with at_step(5, stop), pytest.raises(Interrupted):
        fine_tune(chat_folder, tmp_path / "out", **fields)
    again = fine_tune(chat_folder, tmp_path / "out", **fields)
    assert again.adapter == whole.adapter
    free = fine_tune(chat_folder, tmp_path / "free", logging_steps=1)
    kls, losses = ([r[key] for r in recorded(whole.out) if key in r] for key in ("kl", "loss"))
    assert len(kls) == len(losses) == 8 and abs(kls[0]) < 0.5 < 1000 * kls[-1]
    assert kls == [r["kl"] for r in recorded(again.out) if "kl" in r]
    assert "KL 0.0" in whole.printed and not any("kl" in r for r in recorded(free.out))
    # A strong pull leaves the model nearer to what it was.
    strong = fine_tune(chat_folder, tmp_path / "strong", **{**fields, "kl_weight": 5.0})
    assert [r["kl"] for r in recorded(strong.out) if "kl" in r][-1] < kls[-1]


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "simpo"])
def test_other_objectives_have_no_such_term(objective):
    build({"training": {"objective": objective, "kl_weight": 0}})
    with pytest.raises(ConfigError, match=f"kl_weight must be left out: .*objective={objective} "):
        build({"training": {"objective": objective, "kl_weight": 0.1}})


@pytest.mark.parametrize("value", [-1, float("inf")])
def test_a_weight_is_at_least_0_and_finite(value):
    with pytest.raises(ConfigError, match=r"training\.kl_weight must be at least 0, and"):
        build({"training": {"kl_weight": value}})
