"""Linears that read the same input: q, k and v; gate and up; or one alone.

Forward their frozen matrices are one product where they are packed alike. The gradient is written
out, so that no framework decides what of it is computed, kept or fused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_qlora import device
from mlx_qlora.model.quantize import Linear, stacked


@dataclass(frozen=True)
class Linears:
    """Some linears by their paths in a layer; each may have an update (`lora.LoRALinear`).

    `cuts` are the ends, or the number, of the parts of a single linear that stands for several.
    """

    members: dict[str, Any]
    cuts: list[int] | int | None = None

    def __call__(self, x: mx.array, keys: Sequence[mx.array | None]) -> list[mx.array]:
        """x (..., d_in) -> a result (..., d_out) for each; the keys are those of `LoRALinear`."""
        each = zip(self.members.values(), self._products(x), keys)
        results = [linear.complete(product, x, key) for linear, product, key in each]
        if self.cuts is None:
            return results
        *others, last = mx.split(results[0], self.cuts, axis=-1)
        # v is kept, and q and k are not: a view would keep all three in memory.
        return [*others, mx.contiguous(last) if len(others) > 1 else last]

    def vjp(
        self, x: mx.array, dys: list[mx.array], keys: Sequence[mx.array | None]
    ) -> tuple[Any, dict[str, mx.array]]:
        """From the results' gradients that of x (N, d_in), and those of weights by their paths."""
        if self.cuts is not None:
            dys = [mx.concatenate(dys, axis=-1)]
        dx, gradients = None, {}
        for (path, linear), dy, key in reversed(list(zip(self.members.items(), dys, keys))):
            dx, of_weights = linear.vjp(x, dy, key, dx)
            gradients |= {f"{path}.{name}": gradient for name, gradient in of_weights.items()}
        return dx, gradients

    def _products(self, x: mx.array) -> list[mx.array]:
        """x times each frozen matrix."""
        matrices = [linear.base_layer for linear in self.members.values()]
        if len(matrices) > 1 and device.current().stacks_matrices:
            if (stack := stacked(matrices)) is not None:
                products = mx.split(stack.matrix.multiply(x), stack.ends, axis=-1)
                # One that is the result itself is copied: it would keep all of them in memory.
                pairs = zip(self.members.values(), products)
                return [mx.contiguous(y) if type(one) is Linear else y for one, y in pairs]
        return [matrix.multiply(x) for matrix in matrices]
