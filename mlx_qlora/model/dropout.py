"""Dropout masks, drawn for each position of a row from a key of its own.

A row then has the same mask in whatever batch it stands, however wide that is padded: the same
rows give the same gradients as one batch, as several micro-batches and on several processes, and
a layer that is computed again in the backward drops what it dropped before. Keys are split, never
used twice (Salmon et al. 2011; the scheme of JAX).
"""

import mlx.core as mx


def row_keys(key: mx.array, rows: int) -> mx.array:
    """One key (2,) becomes a key for each row (B, 2); keys for rows stay what they are."""
    return mx.random.split(key, rows) if key.ndim == 1 else key


def split_keys(keys: mx.array, n: int) -> list[mx.array]:
    """Keys (B, 2) become n independent ones, each (B, 2)."""
    children = mx.vmap(lambda key: mx.random.split(key, n))(keys)  # (B, n, 2)
    return [children[:, i] for i in range(n)]


def position_keys(keys: mx.array, row: mx.array, column: mx.array) -> mx.array:
    """Keys of rows (B, 2) become keys of positions (N, 2).

    Args:
        keys: (B, 2) uint32.
        row: (N,) int, which of the rows a position comes from.
        column: (N,) int, its place in the row.
    """
    # One draw for a whole row would depend on its width, and with it on the batch's longest row.
    return keys[row] + mx.stack([mx.zeros_like(column), column], axis=1).astype(mx.uint32)


def kept(keys: mx.array, probability: float, shape: tuple[int, ...]) -> mx.array:
    """Which inputs are kept: bool of `shape`.

    Args:
        keys: (2,) for one draw, or one for each position (N, 2).
        probability: that an input is kept.
        shape: (N, d) with keys (N, 2); any with a single key.
    """
    if keys.ndim == 1:
        return mx.random.bernoulli(probability, shape, keys)
    return mx.vmap(lambda key: mx.random.bernoulli(probability, shape[1:], key))(keys)
