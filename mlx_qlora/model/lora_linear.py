"""One linear with a trainable low-rank update (Hu et al. 2021, arXiv 2106.09685).

The class and attribute names are PEFT's. A LoRA weight's path in the tree,
`model.layers.0.self_attn.q_proj.lora_A.weight`, is its key in an adapter file after the prefix
`base_model.model.`, and its shape there is its shape here.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.model.dropout import RANGE, kept, threshold
from mlx_qlora.model.quantize import Linear


class LowRank(nn.Module):
    """One trainable factor of an update, float32; it is called `lora_A` or `lora_B`."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight


class LoRALinear(nn.Module):
    """y = base(x) + scale * B(A(dropout(x))), after Hu et al., equation 3 and section 4.1.

    A and B are float32 masters; the forward casts them to x's dtype, so that the output's dtype
    is the input's and nothing downstream widens.

    Args:
        base_layer: the frozen linear of weight (d_out, d_in).
        lora_A: (r, d_in) float32.
        lora_B: (d_out, r) float32.
        scale: factor of the update; applied to the rank-r tensor, which is the smallest.
        dropout: probability of dropping an input of A. Acts only where a key is given.
    """

    def __init__(
        self, base_layer: Linear, lora_A: mx.array, lora_B: mx.array, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = LowRank(lora_A)
        self.lora_B = LowRank(lora_B)
        self.scale = scale
        self.dropout = dropout
        # A and B that were taken from the base at the beginning; None if it is as it was.
        self._begun: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array, dropout_key: mx.array | None = None) -> mx.array:
        """x (..., d_in) -> (..., d_out); the key draws the dropout mask, None means no dropout.

        One key (2,) draws for all of x, keys (N, 2) for each of x's N rows.
        """
        y = self.base_layer(x)
        A = self.lora_A.weight.astype(x.dtype)
        B = self.lora_B.weight.astype(x.dtype)
        scale = self.scale
        if dropout_key is not None and self.dropout > 0:
            x = x * kept(dropout_key, self.dropout, x.shape).astype(x.dtype)
            scale /= 1 - threshold(self.dropout) / RANGE  # what is kept stands for what is not
        return mx.addmm(y, scale * (x @ A.T), B.T)

    def update_of_the_base(self) -> tuple[mx.array, mx.array]:
        """A (r, d_in) and B (d_out, r) of the update to the base as it was before training.

        Where the base made way for the update (PiSSA, OLoRA), B A - B0 A0 is [B, -B0] [A; A0], of
        twice the rank; its first half is what is trained.
        """
        A, B = self.lora_A.weight, self.lora_B.weight
        if self._begun is None:
            return A, B
        A0, B0 = self._begun
        return mx.concatenate([A, A0]), mx.concatenate([B, -B0], axis=1)

    def merged(self) -> mx.array:
        """The dense matrix (d_out, d_in) float32 that computes the same."""
        A, B = self.lora_A.weight.astype(mx.float32), self.lora_B.weight.astype(mx.float32)
        return self.base_layer.dense().astype(mx.float32) + self.scale * (B @ A)
