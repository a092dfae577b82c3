"""silu(gate) * up, with its derivative written out (Shazeer 2020, arXiv 2002.05202).

By hand because each exponential counts on a CPU: the sigmoid is an argument, so that who keeps it
for the backward need not compute it again. Compiled, it never leaves the kernel.
"""

from typing import Any

import mlx.core as mx

from mlx_qlora.model.exponentials import sigmoid


def swiglu(
    gate: mx.array, up: mx.array, s: mx.array | None = None, compiled: bool = False
) -> mx.array:
    """gate, up (..., F) -> silu(gate) * up (..., F), in their dtype.

    Args:
        gate: (..., F).
        up: (..., F).
        s: sigmoid(gate), if it is known.
        compiled: as one kernel, whatever the shapes.
    """
    if compiled:
        return _fused(gate, up)
    # The sigmoid's share of the derivative is in the gate's: its own would count twice, and is
    # not a number where an exponential has no end.
    return _with_gradient(gate, up, mx.stop_gradient(sigmoid(gate)) if s is None else s)


def swiglu_back(
    gate: mx.array,
    up: mx.array,
    dy: mx.array,
    s: mx.array | None = None,
    compiled: bool = False,
) -> tuple[mx.array, mx.array]:
    """The gradients of gate and up; arguments as in `swiglu`.

    A function of its own because MLX compiles nothing within `mx.vjp`.
    """
    if compiled:
        return _compiled_back(gate, up, dy)
    return _backward(gate, up, dy, sigmoid(gate) if s is None else s)


def _forward(gate: mx.array, up: mx.array, s: mx.array) -> mx.array:
    return gate * s * up


def _backward(gate: mx.array, up: mx.array, dy: mx.array, s: mx.array) -> tuple[mx.array, mx.array]:
    dys = dy * s
    return dys * up * (1 + gate * (1 - s)), dys * gate


def _vjp(primals: Any, dy: mx.array, _: Any) -> tuple[mx.array, ...]:
    gate, up, s = primals
    return *_backward(gate, up, dy, s), mx.zeros_like(s)


_with_gradient: Any = mx.custom_function(_forward)
_with_gradient.vjp(_vjp)

# Shapeless is safe here: nothing but elementwise operations, and no shape is looked at.
_compiled: Any = mx.compile(lambda gate, up: _forward(gate, up, sigmoid(gate)), shapeless=True)
_compiled_back: Any = mx.compile(
    lambda gate, up, dy: _backward(gate, up, dy, sigmoid(gate)), shapeless=True
)
_fused: Any = mx.custom_function(lambda gate, up: _compiled(gate, up))
_fused.vjp(lambda primals, dy, _: _compiled_back(*primals, dy))
