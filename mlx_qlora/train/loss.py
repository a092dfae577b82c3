"""Next-token cross-entropy, in float32, as a sum over the supervised tokens.

A sum and not a mean: sums of micro-batches, of packed documents and of processes add up to the
sum over all their tokens, so one division at the end of the step is exact.
"""

import mlx.core as mx
import numpy as np

from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.model.llama import LlamaForCausalLM


def supervised_targets(batch: Batch) -> tuple[mx.array, mx.array, int]:
    """Where a batch has something to learn, and what.

    The head is by far the widest matrix of a small model, and prompt tokens have no loss: logits
    are computed at these positions only.

    Returns:
        positions (S,) int32 into the flattened (B * T,); targets (S,) int32, IGNORE where S was
        rounded up so that few graphs are compiled; and how many targets are real.
    """
    labels = np.array(batch.labels).reshape(-1)
    positions = np.flatnonzero(labels != IGNORE)
    n = len(positions)
    S = padded_count(n)
    padded = np.zeros(S, np.int32)
    padded[:n] = positions
    targets = np.full(S, IGNORE, np.int32)
    targets[:n] = labels[positions]
    return mx.array(padded), mx.array(targets), n


def padded_count(n: int) -> int:
    """The smallest S >= n from a small fixed set: multiples of a quarter of the power of two."""
    step = max(16, (1 << max(n - 1, 1).bit_length()) // 4)
    return -(-max(n, 1) // step) * step


def token_losses(
    model: LlamaForCausalLM, hidden: mx.array, positions: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array]:
    """The loss of each supervised token, and the model's first choice there.

    Args:
        model: whose head is used.
        hidden: (B, T, D).
        positions: (S,) into the flattened (B * T,).
        targets: (S,), with IGNORE for none.

    Returns:
        nats (S,) float32, 0 where there is no target; first choices (S,) uint32.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])[positions]
    logits = model.logits(rows).astype(mx.float32)  # (S, V)
    real = targets != IGNORE
    # IGNORE is no row of the vocabulary: give the lookup a legal index, then drop its result.
    legal = mx.where(real, targets, 0)[:, None]
    chosen = mx.take_along_axis(logits, legal, axis=-1)[:, 0]
    nats = mx.where(real, mx.logsumexp(logits, axis=-1) - chosen, 0)
    return nats, mx.argmax(logits, axis=-1)
