"""Dropout masks, drawn for each position of a row from a key of its own.

A row then has the same mask in whatever batch it stands, however wide that is padded: the same
rows give the same gradients as one batch, as several micro-batches and on several processes, and
a layer that is computed again in the backward drops what it dropped before. Keys are split, never
used twice (Salmon et al. 2011; the scheme of JAX).
"""

import math

import mlx.core as mx

RANGE = 1 << 16


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


def threshold(dropout: float) -> int:
    """A number of 16 random bits below it is dropped; so dropout is a multiple of 1 / 65,536."""
    return min(round(dropout * RANGE), RANGE - 1)


def kept(keys: mx.array, dropout: float, shape: tuple[int, ...]) -> mx.array:
    """Which inputs are kept: bool of `shape`.

    Args:
        keys: (2,) for one draw, or one for each position (N, 2).
        dropout: probability that an input is dropped, in [0, 1).
        shape: (N, d) with keys (N, 2); any with a single key.
    """
    if keys.ndim == 1:
        return kept(keys[None], dropout, (1, math.prod(shape))).reshape(shape)
    # Splitting a key is how MLX hands out bare random bits: of eight bytes, four numbers of 16
    # bits. That is a third of what `bernoulli` costs on a CPU, which compares 32 as floats.
    d = shape[1]
    words = mx.vmap(lambda key: mx.random.split(key, -(-d // 4)))(keys)
    numbers = words.reshape(len(keys), -1).view(mx.uint16)[:, :d]
    return numbers >= mx.array(threshold(dropout), mx.uint16)
