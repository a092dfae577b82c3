"""Dropout masks from a counter-based hash (Salmon et al. 2011, "Parallel Random Numbers").

Whether an input is dropped is a function of (seed, number of the example in the run's stream,
position in it, layer, linear, column) and of nothing else. So a backward draws a mask again instead
of keeping it, and an example has the same masks however examples are batched, cut into chunks or
shared among processes. Integer arithmetic alone: the same bits on every device.
"""

import functools

import mlx.core as mx

RANGE = 1 << 8  # a number of 8 bits is drawn for each input, four from each hash of 32 bits
MOST = (RANGE - 1) / RANGE  # dropped at most, which is never asked for


def mixed(words: mx.array) -> mx.array:
    """A bijection of uint32 words in which every bit depends on every bit.

    `lowbias32` (Wellons, "Prospecting for Hash Functions", 2018).
    """
    return _rounds(words ^ (words >> 16))


def _rounds(words: mx.array) -> mx.array:
    words = words * mx.array(0x7FEB352D, mx.uint32)
    words = (words ^ (words >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return words ^ (words >> 16)


def position_words(
    keys: mx.array, row: mx.array, position: mx.array, n_linears: int
) -> list[mx.array]:
    """A word (N, 1) uint32 for each of N positions, for each linear that drops inputs.

    Args:
        keys: (B, 2) uint32, one of each row.
        row: (N,) int32, that each position is in.
        position: (N,) int32, its place in that row.
    """
    rows = mixed(mixed(keys[:, 0]) ^ keys[:, 1])
    positions = mixed(rows[row] + position.astype(mx.uint32))
    linears = mixed(mx.arange(1, n_linears + 1, dtype=mx.uint32))
    words = mixed(linears[:, None] ^ positions)
    return [words[i, :, None] for i in range(n_linears)]


def mask(words: mx.array, dropout: float, d: int, dtype: mx.Dtype) -> mx.array:
    """(..., d) of a dtype: 1 where an input is kept, 0 where it is dropped; words (..., 1).

    An input is dropped where its number is below a threshold. That is dropout * 256, rounded up or
    down for each position by chance, so that each input is dropped with probability `dropout`; two
    columns of a position are dropped together more often by 4e-6 at most.
    """
    lower, rest = divmod(min(dropout, MOST) * RANGE, 1)
    upward = mixed(words) < mx.array(int(rest * (1 << 32)), mx.uint32)
    kept = draws(words, d) >= upward.astype(mx.uint8) + mx.array(int(lower), mx.uint8)
    return kept.view(mx.uint8).astype(dtype)  # a CPU converts bytes four times as fast as bools


def draws(words: mx.array, d: int) -> mx.array:
    """Independent uint8 numbers (..., d) for words (..., 1)."""
    # Both sides are mixed already, so that `mixed`'s first round is not needed.
    return _rounds(words ^ _column_words(-(-d // 4))).view(mx.uint8)[..., :d]


@functools.cache
def _column_words(n: int) -> mx.array:
    """A word for every four columns, (n,) uint32; the same for all linears."""
    words = mixed(mx.arange(n, dtype=mx.uint32) + mx.array(0x9E3779B9, mx.uint32))
    mx.eval(words)  # a lazy array could only be computed in this thread
    return words
