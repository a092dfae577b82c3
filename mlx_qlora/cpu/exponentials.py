"""Exponentials, as the device computes them fastest.

On a CPU MLX computes `exp` one number at a time, and `2 ** x` many at a time: three times faster,
and the same to the last digits (about 1e-6 of the value).
"""

import math

import mlx.core as mx

from mlx_qlora import device

LOG2_E = math.log2(math.e)
LOWEST = -126.0  # below it 2 ** x is no normal float32, and a CPU takes ten times as long


def exp(x: mx.array) -> mx.array:
    """e ** x; with fast exponentials never below 2 ** -126, which vanishes beside 1."""
    if _by_powers(x):
        return mx.power(2.0, mx.maximum(x * LOG2_E, LOWEST))
    return mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e ** -x)."""
    if _by_powers(x):
        return 1 / (1 + mx.power(2.0, x * -LOG2_E))
    return mx.sigmoid(x)


def _by_powers(x: mx.array) -> bool:
    return device.current().fast_exponentials and x.dtype == mx.float32
