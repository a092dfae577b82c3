"""The hand-written derivative and the fast exponentials against float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.cpu.exponentials import exp, sigmoid
from mlx_qlora.model.swiglu import swiglu, swiglu_vjp


def ours(gate, up, dy, s=None, compiled=False):
    """The value, and the gradients by our own function."""
    return swiglu(gate, up, s, compiled), swiglu_vjp(gate, up, dy, s, compiled)


def mlx_s(gate, up, dy):
    """The value, and the gradients as MLX finds them by the derivative that we gave it."""
    (y,), gradients = mx.vjp(swiglu, [gate, up], [dy])
    return y, gradients


WAYS = {
    "plain": ours,
    "differentiated by MLX": mlx_s,
    "compiled": lambda *arrays: ours(*arrays, compiled=True),
    "with a sigmoid that was kept": lambda gate, *arrays: ours(gate, *arrays, sigmoid(gate)),
}


def inputs(spread: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return tuple(random.normal(size=(40, 33)).astype(np.float32) * s for s in (spread, 1.0, 1.0))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 300.0])
def test_value_and_gradients_equal_float64(spread, way):
    gate, up, dy = inputs(spread)
    g, u, d = (x.astype(np.float64) for x in (gate, up, dy))
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-g))
    y, (d_gate, d_up) = WAYS[way](mx.array(gate), mx.array(up), mx.array(dy))
    for array, exact in (
        (y, g * s * u),
        (d_gate, d * u * (s + g * s * (1 - s))),
        (d_up, d * g * s),
    ):
        np.testing.assert_allclose(np.array(array), exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_dtype_is_kept_and_mlx_agrees(dtype, way):
    gate, up, dy = (mx.array(x).astype(dtype) for x in inputs(3.0))
    y, gradients = WAYS[way](gate, up, dy)
    assert {array.dtype for array in (y, *gradients)} == {dtype}
    tolerance = {mx.float32: 1e-5, mx.bfloat16: 6e-2, mx.float16: 1e-2}[dtype]
    assert mx.abs(y - nn.silu(gate) * up).max().item() < tolerance


def test_sigmoid_saturates_without_overflow():
    x = mx.array([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4])
    y = sigmoid(x)
    assert mx.isfinite(y).all().item()
    np.testing.assert_allclose(np.array(y), [0, 0, 0, 0.5, 1, 1, 1], atol=1e-30)


def test_a_kept_sigmoid_is_used_and_its_share_is_counted_once():
    gate, up, dy = (mx.array(x) for x in inputs(2.0))
    kept = sigmoid(gate)
    found = mx.vjp(lambda gate, up: swiglu(gate, up, kept), [gate, up], [dy])[1]
    wanted = mx.vjp(lambda gate, up: nn.silu(gate) * up, [gate, up], [dy])[1]
    assert all(mx.allclose(a, b, atol=1e-5).item() for a, b in zip(found, wanted))
    assert mx.array_equal(swiglu(gate, up, mx.zeros_like(gate)), mx.zeros_like(gate)).item()


def test_exp_equals_float64_and_never_is_subnormal():
    x = np.linspace(-87, 88, 5001).astype(np.float32)
    y = np.array(exp(mx.array(x)))
    # x * log2(e) is rounded to some 1e-7 of itself, which the power makes an absolute error.
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=2e-5)
    near = np.abs(x) < 1
    np.testing.assert_allclose(y[near], np.exp(x[near].astype(np.float64)), rtol=1e-6)
    far = np.array(exp(mx.array([-88.0, -1e3, -1e30, -np.inf])))
    assert (far >= 0).all() and (far <= 2.0**-126).all()
    assert np.isnan(np.array(exp(mx.array(np.nan))))
    assert np.isposinf(np.array(exp(mx.array([100.0, np.inf])))).all()
