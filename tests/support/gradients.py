"""Gradients: what they are compared with, on models and packed rows of random numbers."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from support.models import load_folder, random_tokens, randomise_lora

from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.model.lora import LoraConfig, add_lora


def tuned(folder, seed: int = 5, **changes: Any):
    """The tiny model with LoRA layers, dropout 0.2."""
    return with_lora(load_folder(folder), seed, **changes)


def with_lora(model: Any, seed: int = 5, **changes: Any) -> Any:
    """The model, which has LoRA layers then whose update is not zero."""
    add_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, **changes}), seed)
    randomise_lora(model)
    return model


def packed_batch(rows: list[list[int]], seed: int = 0, width: int | None = None) -> Batch:
    """Rows of documents of so many positions, half of them learned; padding behind."""
    width = width or max(map(sum, rows))
    random = np.random.default_rng(seed)
    tokens = random_tokens(len(rows), width + 1, seed=seed)
    labels = np.full((len(rows), width), IGNORE, np.int32)
    documents = []
    for row, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            learned = random.random(n) < 0.5
            learned[n // 2] = True
            span = slice(start, start + n)
            labels[row, span] = np.where(learned, tokens[row, 1:][span], IGNORE)
            documents.append((row, start, start + n))
            start += n
    return Batch(mx.array(tokens[:, :-1]), mx.array(labels), np.array(documents, np.int32))


def add_grads(total: Any, grads: Any) -> Any:
    """The sum of two trees; plain addition, because gradients are of sums; `total` may be empty."""
    return tree_map(mx.add, total, grads) if total else grads


def gap(first, second) -> float:
    """The largest difference of two gradient trees, relative to the largest gradient."""
    pairs = list(zip(tree_flatten(first), tree_flatten(second)))
    assert all(a[0] == b[0] for a, b in pairs)
    largest = max(mx.abs(a).max().item() for (_, a), _ in pairs)
    return max(mx.abs(a - b).max().item() for (_, a), (_, b) in pairs) / largest


def autodiff(model, batch: Batch, key: mx.array | None = None) -> tuple[float, Any]:
    """Loss and gradients as MLX finds them, of all logits of all rows."""
    weights = model.trainable_parameters()
    learned = batch.labels != IGNORE
    factors = 1.0 if batch.weights is None else mx.array(batch.weights)

    def loss(weights):
        model.update(weights)
        logits = model(batch.tokens, documents=batch.documents, dropout_key=key)
        logits = logits.astype(mx.float32)
        targets = mx.where(learned, batch.labels, 0)[..., None]
        nats = mx.logsumexp(logits, -1) - mx.take_along_axis(logits, targets, -1)[..., 0]
        return (mx.where(learned, nats, 0) * factors).sum()

    value, grads = mx.value_and_grad(loss)(weights)
    model.update(weights)
    mx.eval(value, grads)
    return value.item(), grads


def drawn_here(N: int) -> list[mx.array]:
    """Dropout words from the global state: other ones whenever they are asked for."""
    return [mx.random.randint(0, 2**31 - 1, (N, 2)).astype(mx.uint32) for _ in range(7)]
