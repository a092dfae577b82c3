"""AdamW and the schedule against float64 written from the papers, and against torch."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora import device
from mlx_qlora.train.optim import SCHEDULES, AdamW, flatten, learning_rate

RATES = [1e-2, 3e-3, 0.0, 5e-2]


def adamw_float64(weights, gradients, n_tokens, beta1, beta2, epsilon, decay, max_norm):
    """Loshchilov & Hutter 2019, algorithm 2, after clipping by the global norm."""
    w, m, v = weights.astype(np.float64), 0.0, 0.0
    norms = []
    for t, (gradient, tokens, rate) in enumerate(zip(gradients, n_tokens, RATES), 1):
        g = gradient.astype(np.float64) / tokens
        norms.append(math.sqrt((g**2).sum()))
        if max_norm is not None:
            g = g * min(1.0, max_norm / (norms[-1] + 1e-6))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        w = w - rate * decay * w - rate * m_hat / (np.sqrt(v_hat) + epsilon)
    return w, norms


@pytest.mark.parametrize(
    ("gpu_route", "slice_size"),
    [("none", 1), ("none", 7), ("none", 10**6), ("metal-bfloat16", None), ("cuda-float16", 7)],
    indirect=["gpu_route"],
)
@pytest.mark.parametrize("max_norm", [1.0, None, 1e-3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_four_steps_equal_the_paper_in_float64_however_they_are_sliced(
    gpu_route, max_norm, decay, slice_size, use_device
):
    """And in float32, whatever the dtype of activations."""
    use_device(adamw_slice=slice_size or device.current().adamw_slice)
    random = np.random.default_rng(0)
    tree = {"a": {"weight": mx.array(random.normal(size=(3, 5)).astype(np.float32))}}
    tree["b"] = {"weight": mx.array(random.normal(size=(4,)).astype(np.float32))}
    optimizer = AdamW(tree, 0.8, 0.95, 1e-6, decay, max_norm)
    gradients = [random.normal(size=19).astype(np.float32) * 50 for _ in RATES]
    n_tokens = [7, 1, 100, 13]
    expected, norms = adamw_float64(
        np.array(flatten(tree)), gradients, n_tokens, 0.8, 0.95, 1e-6, decay, max_norm
    )
    for gradient, tokens, rate, norm in zip(gradients, n_tokens, RATES, norms):
        grads = optimizer.named(mx.array(gradient))
        measured = optimizer.update(grads, tokens, rate)
        assert measured.item() == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(np.array(optimizer.weights), expected, rtol=2e-5, atol=1e-7)


def test_state_stays_float32_whatever_the_gradients_are():
    optimizer = AdamW({"w": mx.ones(4)})
    optimizer.update({"w": mx.ones(4, dtype=mx.bfloat16)}, 1, 1e-3)
    for state in (optimizer.weights, optimizer.mean, optimizer.square):
        assert state.dtype == mx.float32


def test_small_steps_are_not_lost_to_rounding():
    """A bfloat16 weight of 1 would not move under a hundred steps of 1e-4 and decay."""
    optimizer = AdamW({"w": mx.ones(1)}, weight_decay=0.1)
    for _ in range(100):
        optimizer.update({"w": mx.ones(1)}, 1, 1e-4)
    assert optimizer.weights.item() == pytest.approx(1 - 100 * 1e-4 * 1.1, abs=2e-4)


def test_tree_and_named_give_the_same_weights_back():
    tree = {"x": [{"weight": mx.arange(6.0).reshape(2, 3)}, {"weight": mx.arange(4.0)}]}
    optimizer = AdamW(tree)
    again = optimizer.tree()
    assert mx.array_equal(again["x"][0]["weight"], tree["x"][0]["weight"])
    assert mx.array_equal(again["x"][1]["weight"], tree["x"][1]["weight"])
    assert list(optimizer.named(optimizer.weights)) == ["x.0.weight", "x.1.weight"]


# ---- schedule ----------------------------------------------------------------------------------


def test_warmup_step_k_of_n_trains_at_k_nths_and_the_rates_fall_after_it():
    rates = [learning_rate(k, 2.0, 4, 11) for k in range(1, 12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx(1.0)  # half of the way from 4 to 12
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[3:]))


def test_linear_and_constant_schedules():
    assert learning_rate(8, 2.0, 4, 11, "linear") == pytest.approx(1.0)
    assert learning_rate(11, 2.0, 4, 11, "linear") == pytest.approx(2.0 / 8)
    assert learning_rate(12, 2.0, 4, 12, "constant_with_warmup") == 2.0
    assert learning_rate(2, 2.0, 4, 12, "constant_with_warmup") == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_no_step_of_any_run_trains_at_a_rate_of_zero_or_above_the_peak(schedule, total):
    for warmup in {0, 1, total // 10, total}:
        rates = [learning_rate(k, 2.0, warmup, total, schedule) for k in range(1, total + 1)]
        assert all(0 < rate <= 2.0 for rate in rates) and max(rates) == 2.0


def test_schedule_is_that_of_transformers_one_step_ahead():
    """Hugging Face trains its first step at rate 0; ours begins where its second does.

    With a step more than there is, so that ours ends before the rate is 0.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, 13)
    for k in range(1, 13):
        optimizer.step()
        schedule.step()
        assert learning_rate(k, 2.0, 4, 12) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)


def test_a_run_shorter_than_its_warmup_is_possible():
    assert learning_rate(3, 2.0, 10, 3) == pytest.approx(0.6)


def test_slices_have_the_ratios_of_their_own_weights(use_device):
    """LoRA+: the rate of each number goes with it, wherever a slice begins."""
    random = np.random.default_rng(0)
    tree = {
        f"layer{i}": {
            name: {"weight": mx.array(random.normal(size=(3, 5)).astype(np.float32))}
            for name in ("lora_A", "lora_B")
        }
        for i in range(3)
    }
    moved = []
    for slice_size in (7, 10**6):
        use_device(adamw_slice=slice_size)
        optimizer = AdamW(tree, lr_ratio=16.0, weight_decay=0.0, max_grad_norm=None)
        optimizer.update(optimizer.named(mx.ones(90)), 1, 1e-3)
        moved.append(np.array(optimizer.weights - flatten(tree)))
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5)
    by_matrix = moved[0].reshape(6, 15)
    np.testing.assert_allclose(by_matrix[0::2], -1e-3, rtol=1e-3)
    np.testing.assert_allclose(by_matrix[1::2], -16e-3, rtol=1e-3)


def test_a_step_that_is_not_finite_moves_no_slice(use_device):
    use_device(adamw_slice=4)
    optimizer = AdamW({"w": mx.ones(12)})
    before = buffers_of(optimizer)
    norm = optimizer.update({"w": mx.array([1.0] * 11 + [mx.nan])}, 1, 1e-3)
    assert not mx.isfinite(norm).item()
    assert buffers_of(optimizer) == before


def test_an_update_that_fails_halfway_has_not_been(monkeypatch, use_device):
    """Memory may end when two of three slices are moved."""
    use_device(adamw_slice=4)
    optimizer, calls = AdamW({"w": mx.ones(12)}), []
    optimizer.update({"w": mx.ones(12)}, 1, 1e-3)
    before, move = buffers_of(optimizer), optimizer._move

    def fails(*arrays):
        calls.append(arrays)
        if len(calls) == 3:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return move(*arrays)

    monkeypatch.setattr(optimizer, "_move", fails)
    with pytest.raises(RuntimeError):
        optimizer.update({"w": mx.ones(12)}, 1, 1e-3)
    assert buffers_of(optimizer) == before
    optimizer.update({"w": mx.ones(12)}, 1, 1e-3)
    assert buffers_of(optimizer) != before and optimizer.step == 2


def buffers_of(optimizer):
    buffers = (optimizer.weights, optimizer.mean, optimizer.square)
    return [np.array(buffer).tobytes() for buffer in buffers], optimizer.step
