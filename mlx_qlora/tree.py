"""Trees of arrays as MLX modules hold them, and the same as a flat dict with dotted names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def flat(tree: Any) -> dict[str, mx.array]:
    """Dotted path -> array, in the tree's order."""
    return dict(tree_flatten(tree))  # pyright: ignore[reportArgumentType, reportReturnType]


def nested(named: Mapping[str, Any]) -> Any:
    """The inverse of `flat`; numbers in a path become places in a list."""
    return tree_unflatten(list(named.items()))


def number(scalar: mx.array) -> float:
    """The value of a real scalar, evaluated; MLX types it as if it might be complex."""
    return float(scalar.item())  # pyright: ignore[reportArgumentType]


@contextmanager
def bound(module: nn.Module, weights: Mapping[str, mx.array]) -> Iterator[None]:
    """Puts weights in their places, and what was there back afterwards, whatever happens.

    Within a VJP they are MLX's tracers: one that stayed in a module would break its next use.
    """
    before = flat(module.trainable_parameters())
    module.update(nested(weights))
    try:
        yield
    finally:
        module.update(nested({name: before[name] for name in weights}))
