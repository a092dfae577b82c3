"""Linears that read the same input: q, k and v; gate and up; or one alone.

Forward their frozen matrices are one product where they are packed alike. The gradient is written
out, so that no framework decides what of it is computed, kept or fused.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from mlx_qlora import device
from mlx_qlora.model.quantize import Linear, stacked

T = TypeVar("T")
Running = Generator[list[mx.array], None, T]  # arrays to evaluate, and then the next; a result


def result_of(running: Running[T]) -> T:
    """The result, where nothing has to be evaluated on the way to it."""
    while True:
        try:
            next(running)
        except StopIteration as done:
            return done.value


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
        return self._cut(results)

    def one_by_one(self, x: mx.array, keys: Sequence[mx.array | None]) -> Running[list[mx.array]]:
        """As a call, but yields what has to be computed before the next matrix is multiplied.

        Whoever evaluates it then drops the matrix's dense copy (`FrozenMatrix.drop_copy`).
        """
        results = []
        for linear, key in zip(self.members.values(), keys):
            linear.base_layer.make_copy()
            results.append(linear(x, key))
            yield [results[-1]]
        return self._cut(results)

    def vjp(
        self, x: mx.array, dys: list[mx.array], keys: Sequence[mx.array | None], copies: bool
    ) -> Running[tuple[Any, dict[str, mx.array]]]:
        """From the results' gradients that of x (N, d_in), and those of weights by their paths.

        With `copies` it makes and yields as `one_by_one` does. It uses `dys` up.
        """
        if self.cuts is not None:
            dys = [mx.concatenate(dys, axis=-1)]
        dx, gradients = None, {}
        for (path, linear), key in reversed(list(zip(self.members.items(), keys))):
            if copies:
                linear.base_layer.make_copy()
            dx, of_weights = linear.vjp(x, dys.pop(), key, dx)
            gradients |= {f"{path}.{name}": gradient for name, gradient in of_weights.items()}
            if copies:
                yield [dx, *of_weights.values()]
        return dx, gradients

    def _cut(self, results: list[mx.array]) -> list[mx.array]:
        if self.cuts is None:
            return results
        *others, last = mx.split(results[0], self.cuts, axis=-1)
        # v is kept, and q and k are not: a view would keep all three in memory.
        return [*others, mx.contiguous(last) if len(others) > 1 else last]

    def _products(self, x: mx.array) -> list[mx.array]:
        matrices = [linear.base_layer for linear in self.members.values()]
        if len(matrices) > 1 and device.current().stacks_matrices:
            if (stack := stacked(matrices)) is not None:
                products = mx.split(stack.matrix.multiply(x), stack.ends, axis=-1)
                # One that is the result itself is copied: it would keep all of them in memory.
                pairs = zip(self.members.values(), products)
                return [mx.contiguous(y) if type(one) is Linear else y for one, y in pairs]
        return [matrix.multiply(x) for matrix in matrices]
