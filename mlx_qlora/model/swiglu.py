"""SwiGLU (Shazeer 2020, arXiv 2002.05202), with SiLU or GELU, and its gradient."""

import functools
import math
from typing import Any

import mlx.core as mx

from mlx_qlora.cpu.exponentials import sigmoid
from mlx_qlora.device import Device, current


def swiglu(
    gate: mx.array,
    up: mx.array,
    s: mx.array | None = None,
    compiled: bool = False,
    act: str = "silu",
) -> mx.array:
    """gate, up (..., F) -> act(gate) * up (..., F), in their dtype.

    Both activations are gate * sigmoid(.): SiLU of the gate itself, GELU's approximation by tanh
    (Hendrycks & Gimpel 2016, arXiv 1606.08415) of a cubic in it. `s` is that sigmoid, if it is
    known; `compiled` computes in one kernel, whatever the shapes, and is for whoever takes the
    derivative by `swiglu_vjp`.
    """
    if compiled:
        return _compiled(current(), act)[0](gate, up)
    # The sigmoid's share of the derivative is in the gate's: its own would count twice, and is
    # not a number where an exponential has no end.
    s = mx.stop_gradient(gate_sigmoid(gate, act)) if s is None else s
    return _with_gradient(act)(gate, up, s)


def swiglu_vjp(
    gate: mx.array,
    up: mx.array,
    dy: mx.array,
    s: mx.array | None = None,
    compiled: bool = False,
    act: str = "silu",
) -> tuple[mx.array, mx.array]:
    """The gradients of gate and up; arguments as in `swiglu`.

    A function of its own because MLX compiles nothing within `mx.vjp`.
    """
    if compiled:
        return _compiled(current(), act)[1](gate, up, dy)
    return _backward(gate, up, dy, gate_sigmoid(gate, act) if s is None else s, act)


GELU, CUBIC = 2 * (2 / math.pi) ** 0.5, 0.044715  # x s(GELU (x + CUBIC x^3)) is GELU's tanh form


def gate_sigmoid(gate: mx.array, act: str) -> mx.array:
    """What the gate is multiplied with."""
    return sigmoid(gate if act == "silu" else GELU * (gate + CUBIC * gate * gate * gate))


def _forward(gate: mx.array, up: mx.array, s: mx.array) -> mx.array:
    return gate * s * up


def _backward(
    gate: mx.array, up: mx.array, dy: mx.array, s: mx.array, act: str
) -> tuple[mx.array, mx.array]:
    dys = dy * s
    inner = gate * (1 - s)
    if act != "silu":
        inner = inner * (GELU * (1 + 3 * CUBIC * gate * gate))
    return dys * up * (1 + inner), dys * gate


@functools.cache
def _with_gradient(act: str) -> Any:
    function: Any = mx.custom_function(_forward)
    function.vjp(lambda xs, dy, _: (*_backward(xs[0], xs[1], dy, xs[2], act), mx.zeros_like(xs[2])))
    return function


@functools.cache
def _compiled(here: Device, act: str) -> tuple[Any, Any]:
    """SwiGLU and its backward, compiled; a trace keeps the exponentials of the device it met."""

    def forward(gate: mx.array, up: mx.array) -> mx.array:
        return _forward(gate, up, gate_sigmoid(gate, act))

    def backward(gate: mx.array, up: mx.array, dy: mx.array) -> tuple[mx.array, mx.array]:
        return _backward(gate, up, dy, gate_sigmoid(gate, act), act)

    # A trace for any shape broadcasts at every step, and becomes several kernels.
    any_shape = not here.few_shapes
    return mx.compile(forward, shapeless=any_shape), mx.compile(backward, shapeless=any_shape)
