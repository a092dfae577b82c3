"""Weights of labels: in the loss, its gradient and its division, however a step is divided."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.gradients import add_grads, autodiff, gap, packed_batch, tuned
from support.tiny_folder import write_model
from support.training import fine_tune, make_examples

from mlx_qlora import device
from mlx_qlora.data.batches import IGNORE, Batch, evaluation_batches, halves
from mlx_qlora.data.examples import Examples
from mlx_qlora.train.engine import loss_and_grads
from mlx_qlora.train.score import nats_of_labels, score, score_rows


@pytest.fixture
def model(hf_tiny):
    return tuned(hf_tiny[1], lora_dropout=0.3)


def weighed(batch: Batch, seed: int = 0) -> Batch:
    """A batch whose labels weigh between 0.1 and 3, those of its first half as answers."""
    labels: Any = np.array(batch.labels)
    weights = np.random.default_rng(seed).uniform(0.1, 3, labels.shape).astype(np.float32)
    weights *= labels != IGNORE
    answers = (labels != IGNORE) & (np.arange(labels.shape[1]) >= labels.shape[1] // 3)
    rows = tuple(range(len(labels)))
    return dataclasses.replace(batch, weights=weights, answers=answers, rows=rows)


def weighed_examples(n: int = 22, seed: int = 0) -> Examples:
    """Examples whose prompts weigh 0.2, and every third row 2.5 times as much."""
    rows = []
    for i, example in enumerate(make_examples(n, seed)):
        weights = np.where(example.learned, 1, 0.2) * (2.5 if i % 3 == 0 else 1)
        weights[0] = 0
        rows.append(dataclasses.replace(example, weights=weights.astype(np.float32)))
    return Examples.of(rows)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_a_weighted_loss_and_its_gradient_are_those_of_all_logits(model, recompute):
    batch = weighed(packed_batch([[20, 7], [30], [9, 9, 9]]))
    loss, n, grads = loss_and_grads(model, batch, recompute=recompute)
    wanted, exact = autodiff(model, batch)
    assert loss.item() == pytest.approx(wanted, rel=1e-6) and gap(grads, exact) < 5e-6
    assert n == pytest.approx(float(batch.weights.sum()), rel=1e-7)


def test_weights_of_one_change_no_bit_of_the_gradient(model):
    batch = packed_batch([[20, 7], [30]])
    labels: Any = np.array(batch.labels)
    ones = dataclasses.replace(batch, weights=(labels != IGNORE).astype(np.float32))
    key = mx.random.key(3)
    (loss, n, grads), (same, m, others) = (loss_and_grads(model, b, key) for b in (batch, ones))
    assert gap(grads, others) == 0 and n == m
    assert loss.item() == pytest.approx(same.item(), rel=1e-6)


def test_parts_of_a_weighted_batch_add_up(model):
    batch = weighed(packed_batch([[20, 7], [30], [9, 9, 9], [25]]))
    loss, n, grads = loss_and_grads(model, batch)
    parts = [part for half in halves(batch) for part in halves(half)]
    total, sums, m = 0.0, {}, 0.0
    for part in parts:
        of_part, n_part, of_grads = loss_and_grads(model, part)
        total, m, sums = total + of_part.item(), m + n_part, add_grads(sums, of_grads)
    assert (total, m) == pytest.approx((loss.item(), n), rel=1e-6) and gap(grads, sums) < 2e-6
    small = dataclasses.replace(device.current(), chunk_positions=8, busy_positions=8)
    with device.use(small):
        chunked, n_chunked, of_chunks = loss_and_grads(model, batch)
    assert (chunked.item(), n_chunked) == pytest.approx((loss.item(), n), rel=1e-6)
    assert gap(grads, of_chunks) < 2e-6


def test_a_score_weighs_the_loss_and_counts_answers(model):
    batch = weighed(packed_batch([[20, 7], [30]]))
    total, rows = score(model, [batch]), score_rows(model, batch)
    labels, nats = nats_of_labels(model, batch)
    weights, answers = (x.reshape(-1)[labels] for x in (batch.weights, batch.answers))
    assert total.loss == pytest.approx(float(weights @ nats) / float(weights.sum()), rel=1e-5)
    assert total.tokens == int(answers.sum()) == rows.tokens.sum()
    assert rows.nats.sum() == pytest.approx(float(nats[answers].sum()), rel=1e-6)
    assert total.hits == rows.hits.sum()


def test_a_weighted_run_is_the_same_in_micro_batches_of_one(tmp_path: Path):
    folder, runs = write_model(tmp_path / "model"), []
    for size, accumulation in ((6, 1), (1, 6)):
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        fields |= {"max_steps": 4, "lora_dropout": 0.0}
        out, rows = tmp_path / str(size), (weighed_examples(), weighed_examples(6, seed=9))
        runs.append(fine_tune(folder, out, *rows, logging_steps=1, **fields))
    for key in ("loss", "eval_loss"):
        each = [[r[key] for r in run.result.log_history if key in r] for run in runs]
        assert len(each[0]) > 1 and each[0] == pytest.approx(each[1], rel=1e-5)
    held_out = evaluation_batches(weighed_examples(6, seed=9))
    assert runs[0].result.eval_loss == pytest.approx(score(runs[0].model, held_out).loss, rel=1e-6)
    plain = fine_tune(folder, tmp_path / "plain", make_examples(), logging_steps=1, **fields)
    first = [
        next(record["loss"] for record in run.result.log_history if "loss" in record)
        for run in (plain, runs[0])
    ]
    assert abs(first[0] - first[1]) > 1e-3
