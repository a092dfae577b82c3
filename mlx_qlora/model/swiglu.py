"""silu(gate) * up, with its derivative written out (Shazeer 2020, arXiv 2002.05202).

By hand because each exponential counts on a CPU, where MLX computes them one by one: the sigmoid
is kept for the backward instead of being computed again.
"""

from typing import Any

import mlx.core as mx

from mlx_qlora.model.exponentials import sigmoid


def swiglu(gate: mx.array, up: mx.array, compiled: bool = False) -> mx.array:
    """gate, up (..., F) -> silu(gate) * up (..., F), in their dtype.

    Args:
        gate: (..., F).
        up: (..., F).
        compiled: as one kernel each for the forward and the backward, whatever the shapes.
    """
    return (_compiled if compiled else _plain)(gate, up)[0]


def _forward(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    s = sigmoid(gate)
    return gate * s * up, s  # the sigmoid is an output so that the backward finds it


def _backward(gate: mx.array, up: mx.array, dy: mx.array, s: mx.array) -> tuple[mx.array, mx.array]:
    dys = dy * s
    return dys * up * (1 + gate * (1 - s)), dys * gate


def _with_gradient(forward: Any, backward: Any) -> Any:
    function: Any = mx.custom_function(forward)

    def vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        return backward(*primals, cotangents[0], outputs[1])

    function.vjp(vjp)
    return function


_plain = _with_gradient(_forward, _backward)
# Shapeless is safe here and here alone: nothing but elementwise operations, no shape looked at.
_compiled = _with_gradient(
    mx.compile(_forward, shapeless=True), mx.compile(_backward, shapeless=True)
)
