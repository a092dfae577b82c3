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
        compiled: as one kernel each for the forward and the backward, whatever the shapes.
    """
    if compiled:
        return _compiled(gate, up)
    return _plain(gate, up, sigmoid(gate) if s is None else s)


def _forward(gate: mx.array, up: mx.array, s: mx.array) -> mx.array:
    return gate * s * up


def _backward(gate: mx.array, up: mx.array, s: mx.array, dy: mx.array) -> tuple[mx.array, mx.array]:
    dys = dy * s
    return dys * up * (1 + gate * (1 - s)), dys * gate


def _plain_back(primals: Any, dy: mx.array, _: Any) -> tuple[mx.array, ...]:
    gate, up, s = primals
    # The sigmoid's own share is in the gate's: to ask for it separately would count it twice.
    return *_backward(gate, up, s, dy), mx.zeros_like(s)


_plain: Any = mx.custom_function(_forward)
_plain.vjp(_plain_back)

# Shapeless is safe here: nothing but elementwise operations, and no shape is looked at.
_fused_forward: Any = mx.compile(lambda gate, up: _forward(gate, up, sigmoid(gate)), shapeless=True)
_fused_backward: Any = mx.compile(
    lambda gate, up, dy: _backward(gate, up, sigmoid(gate), dy), shapeless=True
)


def _compiled_forth(gate: mx.array, up: mx.array) -> mx.array:
    return _fused_forward(gate, up)


def _compiled_back(primals: Any, dy: mx.array, _: Any) -> tuple[mx.array, ...]:
    gate, up = primals
    return _fused_backward(gate, up, dy)


_compiled: Any = mx.custom_function(_compiled_forth)
_compiled.vjp(_compiled_back)
