"""Sums of gradients, as a loop over micro-batches makes them."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def add_grads(total: Any, grads: Any) -> Any:
    """The sum of two trees; plain addition, because gradients are of sums; `total` may be empty."""
    return tree_map(mx.add, total, grads) if total else grads
