"""Dropout masks from a counter-based hash (Salmon et al. 2011, "Parallel Random Numbers").

Whether an input is dropped is a function of (seed, number of the example in the run's stream,
position in it, layer, linear, column) and of nothing else. So a backward draws a mask again instead
of keeping it, and an example has the same masks however examples are batched, cut into chunks or
shared among processes. Integer arithmetic alone: the same bits on every device.
"""

import functools
from typing import Any

import mlx.core as mx

from mlx_qlora.device import current

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
    """Two words (N, 2) uint32 for each of N positions, for each linear that drops inputs.

    The first is what columns draw from, the second draws how the position's threshold is rounded.
    The `keys` (B, 2) uint32 are the rows', and each of N positions has its row and place in it.
    """
    rows = mixed(mixed(keys[:, 0]) ^ keys[:, 1])
    positions = mixed(rows[row] + position.astype(mx.uint32))
    linears = mixed(mx.arange(1, n_linears + 1, dtype=mx.uint32))
    words = mixed(linears[:, None] ^ positions)
    words = mx.stack([words, mixed(words)], axis=-1)
    return [words[i] for i in range(n_linears)]


class Mask:
    """Which inputs are dropped, drawn from words (..., 2) uint32; without words none are.

    What is kept has to be divided by `share`, the part that is kept on average.
    """

    def __init__(self, words: mx.array | None, dropout: float) -> None:
        self._words = words if dropout else None
        self._dropout = min(dropout, MOST)
        self.share = 1.0 if self._words is None else 1 - self._dropout
        self._drawn: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., d) with zeros where an input is dropped."""
        words = self._words
        if words is None:
            return x
        if current().compiles:  # drawn in the kernel that uses it, which stores no mask
            return _compiled(self._dropout)[0](x, *_halves(words), *_columns(x.shape[-1]))
        return x * self._mask(x)

    def add_to(self, total: mx.array, x: mx.array) -> mx.array:
        """total + x (..., d) with zeros where an input is dropped."""
        if self._words is None or not current().compiles:
            return self(x) + total
        columns = _columns(x.shape[-1])
        return _compiled(self._dropout)[1](total, x, *_halves(self._words), *columns)

    def _mask(self, x: mx.array) -> mx.array:
        if self._drawn is None:
            self._drawn = mask(self._words, self._dropout, x.shape[-1], x.dtype)
        return self._drawn


def mask(words: mx.array | None, dropout: float, d: int, dtype: mx.Dtype) -> mx.array:
    """(..., d) of a dtype: 1 where an input is kept, 0 where it is dropped; words (..., 2).

    An input is dropped where its number is below a threshold. That is dropout * 256, rounded up or
    down for each position by chance, so that each input is dropped with probability `dropout`; two
    columns of a position are dropped together more often by 4e-6 at most.
    """
    assert words is not None
    of_columns, of_threshold = _halves(words)
    kept = draws(of_columns, d) >= _threshold(of_threshold, dropout).astype(mx.uint8)
    return kept.view(mx.uint8).astype(dtype)  # a CPU converts bytes four times as fast as bools


def _halves(words: mx.array) -> tuple[mx.array, mx.array]:
    return words[..., :1], words[..., 1:]


def _threshold(words: mx.array, dropout: float) -> mx.array:
    """The number (..., 1) uint32 below which an input is dropped."""
    lower, rest = divmod(min(dropout, MOST) * RANGE, 1)
    upward = words < mx.array(int(rest * (1 << 32)), mx.uint32)
    return upward.astype(mx.uint32) + mx.array(int(lower), mx.uint32)


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


# ---- in one kernel -------------------------------------------------------------------------------


@functools.cache
def _columns(d: int) -> tuple[mx.array, mx.array]:
    """For each column its word, and by how many bits its byte is below the highest, (d,) uint32."""
    column = mx.arange(d, dtype=mx.uint32)
    columns = _column_words(-(-d // 4))[column // 4], 24 - 8 * (column % 4)
    mx.eval(columns)
    return columns


@functools.cache
def _compiled(dropout: float) -> tuple[Any, Any]:
    """`Mask.__call__` and `Mask.add_to`, each one kernel."""

    # A byte is compared where it is the highest of its word: what is below decides nothing, and
    # MLX fuses no more than eleven operations in a row. Not shapeless, which makes them more.
    def dropped(
        x: mx.array, words: mx.array, rounding: mx.array, columns: mx.array, shifts: mx.array
    ) -> mx.array:
        drawn = _rounds(words ^ columns) << shifts
        least = _threshold(rounding, dropout) << 24
        return mx.where(drawn >= least, x, mx.array(0, x.dtype))

    return mx.compile(dropped), mx.compile(lambda total, *others: total + dropped(*others))
