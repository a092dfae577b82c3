"""Preferences: losses and gradients of TRL, however a step is divided; runs that prefer."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.comparisons import make_judged, make_pairs, trl_loss
from support.gradients import gap
from support.models import load_folder, randomise_lora
from support.tiny_folder import write_model
from support.training import assert_same, at_step, fine_tune, recorded, stop

from mlx_qlora import device
from mlx_qlora.adapters.peft import save_adapter
from mlx_qlora.adapters.several import untrained
from mlx_qlora.cli import main
from mlx_qlora.config import build
from mlx_qlora.data.batches import Batch, Batches, evaluation_batches, halves, make_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import DataConfig
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.config import TrainingConfig, batches_of
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.preferences import Preferences
from mlx_qlora.train.score import log_probabilities
from mlx_qlora.train.signals import Interrupted
from mlx_qlora.tree import flat, nested

CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


# Fields of ours -> of TRL's trainers, and of our data.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "dpo": ("dpo", {"beta": 0.3}, {"beta": 0.3, "loss_types": ["sigmoid"], "loss_weights": [1]}, 0),
    "dpo with the answers' likelihood": (
        "dpo",
        {"rpo_alpha": 0.7},
        {"beta": 0.1, "loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        0,
    ),
    "orpo": ("orpo", {"beta": 0.4}, {"beta": 0.4}, 1.0),  # TRL learns the prompt, too
    "simpo": (
        "simpo",
        {"beta": 1.5, "simpo_gamma": 0.6},
        {"beta": 1.5, "simpo_gamma": 0.6, "label_smoothing": 0.0, "cpo_alpha": 0.0},
        0,
    ),
    "simpo, smoothed, with the answers' likelihood": (
        "simpo",
        {"label_smoothing": 0.2, "rpo_alpha": 0.5},
        {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.2, "cpo_alpha": 0.5},
        0,
    ),
    "kto": (
        "kto",
        {"desirable_weight": 1.3, "undesirable_weight": 0.8, "beta": 0.2},
        {"desirable_weight": 1.3, "undesirable_weight": 0.8, "beta": 0.2},
        0,
    ),
}


def whole(batches: Any) -> Any:
    """No batch in pieces."""
    return iter(batches)


class Compared:
    """A tiny model with LoRA layers that were trained, an objective, and one step of examples."""

    def __init__(self, folder, objective: str, n: int = 6, weight: float = 0.0, **fields: Any):
        self.model = load_folder(folder)
        add_lora(self.model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2), seed=1)
        size = {"per_device_train_batch_size": n, "gradient_accumulation_steps": 1, "max_steps": 1}
        self.config = TrainingConfig(objective=objective, **size, **fields)
        kto = objective == "kto"
        self.examples = make_judged(n) if kto else make_pairs(n, prompt_weight=weight)
        self.batches = batches_of(self.examples, DataConfig(shuffle=False), self.config)
        self.batch = self.batches[0]
        self.preferences = Preferences(self.config, self.model, self.batches, None)
        self.preferences.refer(whole)
        randomise_lora(self.model, seed=4, scale=0.1)

    def step(self, batches: list[Batch] | None = None, recompute: Any = "none"):
        """Mean loss, mean gradient and metrics of a step of some micro-batches."""
        batches, preferences = batches or [self.batch], self.preferences
        preferences.begin(preferences.count([self.batch], whole))
        weights, engine = flat(self.model.trainable_parameters()), Engine(self.model, recompute)
        grads: dict[str, mx.array] = {}
        loss, n = 0.0, 0.0
        for batch in batches:
            of_batch, m, grads = engine(weights, batch, None, grads, None, preferences.weigh)
            loss, n = loss + of_batch.item(), n + m
        assert n == len(self.examples)
        return loss / n, {k: v / n for k, v in grads.items()}, preferences.metrics()


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_metrics_are_those_of_trl(hf_tiny, tmp_path, name):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    objective, fields, theirs, weight = CASES[name]
    ours = Compared(hf_tiny[1], objective, weight=weight, **fields)
    folder = save_adapter(ours.model, tmp_path / "adapter", "org/base")
    hf = AutoModelForCausalLM.from_pretrained(hf_tiny[1], dtype=torch.float32)
    model = PeftModel.from_pretrained(hf, folder, is_trainable=True).eval()
    if objective == "simpo":
        theirs = {**theirs, "loss_type": "simpo", "alpha": 0.0}
    loss, metrics = trl_loss(objective, model, ours.batch, **theirs)
    loss.backward()
    wanted = {
        path.removeprefix("base_model.model.").replace(".default", ""): mx.array(
            weight.grad.numpy()
        )
        for path, weight in model.named_parameters()
        if weight.requires_grad
    }
    value, grads, named = ours.step()
    assert value == pytest.approx(loss.item(), rel=CLOSE)
    assert gap(nested(grads), nested({path: wanted[path] for path in grads})) < CLOSE
    for figure in ("chosen", "rejected"):
        for kind in ("rewards", "logps"):
            each = metrics[f"{kind}/{figure}"]
            each = each[-1] if isinstance(each, list) else each
            assert named[f"{kind}/{figure}"] == pytest.approx(each, rel=1e-4, abs=1e-5)
    if objective == "kto":
        assert named["kl"] == pytest.approx(metrics["kl"][-1], rel=1e-4)
        assert named["kl"] > 0
    else:
        each = metrics["rewards/accuracies"]
        each = each[-1] if isinstance(each, list) else each
        assert named["rewards/accuracies"] == pytest.approx(each)


def test_smoothed_labels_are_the_published_formula(hf_tiny):
    """Mitchell 2023: (1 - eps) and eps times the losses of both ways round."""
    ours = Compared(hf_tiny[1], "dpo", label_smoothing=0.2, beta=0.5)
    value, *_ = ours.step()
    logps = log_probabilities(ours.model, ours.batch).reshape(-1, 2) - ours.preferences.reference
    margin = 0.5 * (logps[:, 1] - logps[:, 0])
    wanted = 0.8 * np.log1p(np.exp(-margin)) + 0.2 * np.log1p(np.exp(margin))
    assert value == pytest.approx(wanted.mean(), rel=CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_same_however_it_is_divided(hf_tiny, name):
    objective, fields, _, weight = CASES[name]
    ours = Compared(hf_tiny[1], objective, weight=weight, **fields)
    value, grads, metrics = ours.step()
    thirds = [part for half in halves(ours.batch) for part in halves(half)]
    small = dataclasses.replace(device.current(), chunk_positions=8, busy_positions=8)
    divided = [ours.step(thirds), ours.step(recompute="all")]
    with device.use(small):
        divided.append(ours.step())
    for other, others, more in divided:
        assert other == pytest.approx(value, rel=1e-6)
        assert gap(nested(grads), nested(others)) < 2e-6
        assert more == pytest.approx(metrics, rel=1e-5, abs=2e-6)


def test_the_reference_is_the_base_bit_for_bit(hf_tiny):
    ours = Compared(hf_tiny[1], "dpo", n=9)
    base = load_folder(hf_tiny[1])
    wanted = [log_probabilities(base, batch) for batch in evaluation_batches(ours.examples)]
    assert np.array_equal(ours.preferences.reference.reshape(-1), np.concatenate(wanted))
    moved = [log_probabilities(ours.model, batch) for batch in evaluation_batches(ours.examples)]
    assert not np.array_equal(np.concatenate(moved), np.concatenate(wanted))


def test_an_adapter_that_is_trained_on_is_its_own_reference(hf_tiny):
    model = load_folder(hf_tiny[1])
    add_lora(model, LoraConfig(r=4), seed=1)
    randomise_lora(model)
    batch = next(iter(make_batches(make_pairs(4), 4, shuffle=False)))
    before, lend = log_probabilities(model, batch), untrained(model)
    randomise_lora(model, seed=7)
    now = log_probabilities(model, batch)
    with lend():
        assert np.array_equal(log_probabilities(model, batch), before)
    assert np.array_equal(log_probabilities(model, batch), now) and not np.array_equal(now, before)


def test_only_examples_that_a_run_sees_are_scored_before_it(hf_tiny):
    model = load_folder(hf_tiny[1])
    add_lora(model, LoraConfig(r=4), seed=1)
    config = TrainingConfig(objective="dpo", max_steps=2, per_device_train_batch_size=3)
    batches = batches_of(make_pairs(20), DataConfig(), config.for_examples(20))
    preferences = Preferences(config.for_examples(20), model, batches, None)
    preferences.refer(whole)
    seen = {i for batch in (batches[0], batches[1]) for i in batches.indices(batch.rows)}
    assert set(np.flatnonzero(preferences.reference[:, 0]).tolist()) == seen and len(seen) == 6


# ---- mismatched answers --------------------------------------------------------------------------


def test_each_prompt_gets_the_answer_before_it_in_its_step():
    rows = make_judged(10)

    def mismatched(size: int, world: int = 1) -> list[list[int]]:
        each = [Batches(rows, size, 0, True, 1.0, rank, world, 4) for rank in range(world)]
        found: dict[int, list[int]] = {}
        for batches in each:
            for i in range(batches.stop or 0):
                batch = batches[i]
                assert batch.mismatched is not None
                tokens: Any = np.array(batch.mismatched.tokens)
                for number, (row, start, end) in zip(
                    batch.rows, batch.mismatched.documents.tolist()
                ):
                    found[number] = tokens[row, start:end].tolist()
        return [found[number] for number in range(10)]

    wanted = []
    order = np.random.default_rng([0, 0]).permutation(10)
    for number in range(10):
        first, last = number - number % 4, min(number - number % 4 + 4, 10)
        other = rows[int(order[number - 1 if number > first else last - 1])]
        this = rows[int(order[number])]
        tokens = [*this.tokens[~this.learned], *other.tokens[other.learned]]
        wanted.append([int(t) for t in tokens[: max(len(this), len(other))][:-1]])
    assert mismatched(4) == mismatched(2) == mismatched(1, 2) == wanted


def test_kto_needs_two_examples_in_a_step():
    config = TrainingConfig(objective="kto", per_device_train_batch_size=1).for_examples(8)
    config = dataclasses.replace(config, gradient_accumulation_steps=1)
    with pytest.raises(ConfigError, match="a step has one example; set"):
        batches_of(make_judged(8), DataConfig(), config)


# ---- runs ----------------------------------------------------------------------------------------

RUN: dict[str, Any] = {"max_steps": 18, "eval_steps": 6, "learning_rate": 2e-2, "logging_steps": 1}


def held_out(objective: str) -> tuple[Examples, Examples]:
    make = make_judged if objective == "kto" else make_pairs
    return make(60), make(20, seed=9)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "kto"])
def test_a_run_learns_to_prefer(folder, tmp_path, objective):
    ran = fine_tune(folder, tmp_path, *held_out(objective), objective=objective, **RUN)
    records = recorded(tmp_path)
    evals = [record for record in records if "eval_loss" in record]
    margins = [record["eval_rewards/margins"] for record in evals]

    assert len(evals) == 3 and margins == sorted(margins) and margins[-1] > 0.05
    if objective != "kto":
        assert evals[-1]["eval_rewards/accuracies"] > 0.9
    trained = [record for record in records if "loss" in record]
    assert trained[-1]["rewards/margins"] > trained[0]["rewards/margins"]
    assert trained[-1]["loss"] < trained[0]["loss"]
    if objective == "dpo":
        assert trained[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    page = (tmp_path / "report.html").read_text()
    assert "Yes: it prefers the chosen answers" in page and "Rewards" in page
    assert (tmp_path / "plots" / "rewards.svg").exists()
    assert "margin" in ran.printed and f"objective {objective}, beta" in ran.printed


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, tmp_path, objective):
    fields = {"objective": objective, "logging_steps": 3, "rpo_alpha": 0.0}
    rows = held_out(objective)
    first = fine_tune(folder, tmp_path / "whole", *rows, **fields)
    with at_step(5, stop), pytest.raises(Interrupted):
        fine_tune(folder, tmp_path / "out", *rows, **fields)
    again = fine_tune(folder, tmp_path / "out", *rows, **fields)
    assert_same(again, first)


def test_micro_batches_do_not_change_a_run(folder, tmp_path):
    rows, ends = held_out("kto"), []
    for name, sizes in (("one", (6, 1)), ("six", (1, 6))):
        sizes = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), sizes))
        fields = {"objective": "kto", "max_steps": 3, **sizes}
        ran = fine_tune(folder, tmp_path / name, *rows, **fields)
        ends.append([record["loss"] for record in ran.result.log_history if "loss" in record])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


# ---- what is refused -----------------------------------------------------------------------------


def test_rows_of_another_objective_are_refused(folder, tmp_path):
    with pytest.raises(DataError) as caught:
        fine_tune(folder, tmp_path, make_pairs(), make_pairs(4))
    assert "the rows are pairs, for training.objective=dpo or orpo or simpo, not" in str(
        caught.value
    )
    with pytest.raises(DataError, match=r"the rows are answers, for .*sft, not kto"):
        fine_tune(folder, tmp_path, objective="kto")


def test_a_sweep_does_not_compare_losses_of_other_objectives(folder, tmp_path, capsys):
    words = ["sweep", "--model", str(folder), "--data", str(tmp_path / "rows.jsonl")]
    assert main([*words, "training.objective=dpo"]) == 2
    said = capsys.readouterr().err
    assert "sweep compares losses of training.objective=sft, and not those of dpo" in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"beta": 0}, "training.beta must be above 0 and finite"),
        ({"label_smoothing": 0.5}, r"training.label_smoothing must be in \[0, 0.5\)"),
        ({"rpo_alpha": -1}, "training.rpo_alpha must be at least 0"),
        ({"objective": "ppo"}, "training.objective must be one of 'sft', 'dpo'"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        build({"training": fields})
