"""DoRA (Liu et al. 2024, arXiv 2402.09353): each row has a low-rank direction and a free length.

    W' = m / |W + s B A| * (W + s B A)        row by row; no gradient through the norm (section 4.3)

The norm is made anew at each use, from the rows' squares, which never change, and two products with
A and B: no dense W + s B A ever exists.
"""

from typing import Any

import mlx.core as mx

from mlx_qlora.model.dropout import RANGE, kept, threshold
from mlx_qlora.model.lora_linear import LoRALinear
from mlx_qlora.model.quantize import Linear


class DoRALinear(LoRALinear):
    """A `LoRALinear` whose rows have a trainable length; arguments as there.

    Attributes:
        lora_magnitude_vector: (d_out,) float32; PEFT's name, without `.weight`.
    """

    def __init__(
        self, base_layer: Linear, lora_A: mx.array, lora_B: mx.array, scale: float, dropout: float
    ) -> None:
        super().__init__(base_layer, lora_A, lora_B, scale, dropout)
        self._squares = base_layer.dense().astype(mx.float32).square().sum(axis=1)
        self.lora_magnitude_vector = self.norm()
        mx.eval(self._squares, self.lora_magnitude_vector)

    def __call__(self, x: mx.array, dropout_key: mx.array | None = None) -> mx.array:
        """x (..., d_in) -> (..., d_out); the key as for `LoRALinear`.

        PEFT's formula: with dropout, what the new lengths change of the base's output is dropped
        as the update is, and the base's own output is not.
        """
        base, scale = self.base_layer, self.scale
        through_base = base.multiply(x)
        y = through_base + base.bias if "bias" in base else through_base
        if dropout_key is not None and self.dropout > 0:
            x = x * kept(dropout_key, self.dropout, x.shape).astype(x.dtype)
            x = x / (1 - threshold(self.dropout) / RANGE)
            through_base = base.multiply(x)
        A, B = self.lora_A.weight.astype(x.dtype), self.lora_B.weight.astype(x.dtype)
        # In float32: a length that has hardly moved yet is lost in 16 bits, what it adds is not.
        longer = self.lora_magnitude_vector.astype(mx.float32) / self.norm()
        update = (scale * (x @ A.T)) @ B.T
        return y + (longer - 1).astype(x.dtype) * through_base + longer.astype(x.dtype) * update

    def norm(self) -> mx.array:
        """(d_out,) float32: the length of each row of W + s B A, a constant to the gradient."""
        A = mx.stop_gradient(self.lora_A.weight).astype(mx.float32)
        B = mx.stop_gradient(self.lora_B.weight).astype(mx.float32)
        base: Any = self.base_layer
        crossed = base.multiply(A.astype(base.dtype)).astype(mx.float32).T  # W A^T (d_out, r)
        within = B @ (A @ A.T)
        squares = ((2 * self.scale) * crossed + self.scale**2 * within) * B
        return mx.sqrt(self._squares + squares.sum(axis=1))

    def merged(self) -> mx.array:
        """The dense matrix (d_out, d_in) float32 that computes the same."""
        longer = self.lora_magnitude_vector.astype(mx.float32) / self.norm()
        return longer[:, None] * super().merged()
