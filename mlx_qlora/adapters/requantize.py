"""Rounding that compensates: what one weight loses, the others of its row make up for.

Rounded plainly, W + s B A returns to the numbers that W was stored as, and what was learned is
gone. What counts is not each weight but what a matrix makes of its inputs X: the error E of a row
costs E H E^T, H = X^T X. So weights are rounded one after the other, and those that follow take
over the errors (Frantar et al. 2022, OPTQ, arXiv 2210.17323; in the form of Babai's nearest plane,
Chen et al. 2025, arXiv 2507.18553). Then scales, offsets and integers are improved in turn, each
the best beside all others: coordinate descent on the same cost.

A format is a `Grid`: levels, of which each group of a row has a scale and perhaps an offset.

Axes: n rows of a matrix, m columns, G groups of a row. Here matrices are (m, n): a column of
weights, which is rounded at once, is contiguous.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_qlora.model.quantize import QuantConfig

STEP = 128  # columns whose errors reach the others together, as one product
ROWS = 1024  # of a matrix at a time: what they need beside H has to be small
BLOCK = 512  # rows and columns of a triangular factor's that are computed at a time
DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that were not seen count, too
SWEEPS = 4  # of the coordinate descent
Blocks = Callable[[slice, slice], np.ndarray]  # of a matrix, by its rows and columns


@dataclass(frozen=True)
class Grid:
    """What numbers a format has: scale * level + offset, for each `group` of neighbours in a row.

    `levels` (L,) are in ascending order. Without `offset` it is 0. `store` rounds scales and
    offsets to what the format keeps of them.
    """

    levels: np.ndarray
    group: int
    offset: bool
    store: Callable[[np.ndarray], np.ndarray]

    @cached_property
    def _between(self) -> np.ndarray | None:
        """Where one level ends and the next begins; None if levels are neighbouring integers."""
        is_even = bool(np.all(np.diff(self.levels) == 1))
        return None if is_even else (self.levels[1:] + self.levels[:-1]) / 2

    def nearest(self, x: np.ndarray) -> np.ndarray:
        """The level nearest to each x, float32."""
        if self._between is None:
            return np.clip(np.rint(x), self.levels[0], self.levels[-1])
        return self.levels[np.searchsorted(self._between, x)]

    def codes(self, levels: np.ndarray) -> np.ndarray:
        """The places of some levels, uint8."""
        return np.searchsorted(self.levels, levels).astype(np.uint8)


@dataclass
class Rounded:
    """A matrix on a grid: the places of its levels (m, n) uint8; scales and offsets (G, n)."""

    grid: Grid
    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """(m, n) float32."""
        return self.grid.levels[self.codes]

    @property
    def dense(self) -> np.ndarray:
        """The matrix (m, n) float32."""
        m, n = self.codes.shape
        by_group = self.levels.reshape(-1, self.grid.group, n)
        by_group *= self.scales[:, None]
        by_group += self.offsets[:, None]
        return by_group.reshape(m, n)

    def of_rows(self, rows: slice) -> "Rounded":
        """Some of a matrix's rows, which are columns here; a view."""
        return Rounded(self.grid, self.codes[:, rows], self.scales[:, rows], self.offsets[:, rows])


# ---- MLX's formats -------------------------------------------------------------------------------

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # codes 0 to 7; with 8 added, negative


def grid_of(quant: QuantConfig, dtype: mx.Dtype) -> Grid:
    """The numbers of a packing whose scales and biases are in a dtype."""

    def nearest_power(numbers: np.ndarray) -> np.ndarray:  # by its logarithm, in 8 bits of exponent
        log = np.rint(np.log2(np.maximum(np.abs(numbers), 2.0**-126)))
        return np.exp2(np.minimum(log, 127)).astype(np.float32)

    if quant.mode == "mxfp4":
        return Grid(np.unique([-FP4, FP4]), quant.group_size, False, nearest_power)

    def store(numbers: np.ndarray) -> np.ndarray:
        return np.array(mx.array(numbers, mx.float32).astype(dtype).astype(mx.float32))

    return Grid(np.arange(2**quant.bits, dtype=np.float32), quant.group_size, True, store)


def packed(rounded: Rounded, quant: QuantConfig) -> tuple[mx.array, ...]:
    """As `mx.quantize` packs it: weight, scales and, for affine, biases; exactly these numbers."""
    codes = rounded.codes.T
    if quant.mode == "mxfp4":
        value = rounded.grid.levels
        codes = (np.searchsorted(FP4, np.abs(value)) + 8 * (value < 0)).astype(np.uint8)[codes]
        others = [(np.log2(rounded.scales) + 127).astype(np.uint8)]
    else:
        others = [rounded.scales, rounded.offsets]
    bits = codes[..., None] >> np.arange(quant.bits, dtype=np.uint8) & 1
    words = np.packbits(bits.reshape(len(codes), -1), axis=1, bitorder="little").view(np.uint32)
    return mx.array(words), *(mx.array(np.ascontiguousarray(x.T)) for x in others)


# ---- rounding ------------------------------------------------------------------------------------


@contextmanager
def factored(H: np.ndarray) -> Iterator[tuple[np.ndarray, Blocks]]:
    """Lend an order of inputs, the smallest first, and blocks of C, lower triangular: H = C C^T.

    C is in H's place, as of two equal numbers of H one can make room: another matrix of this size
    would be 0.8 GB for 14,336 inputs. Afterwards H is back. Blocks are computed in float64: each
    of C's rounded numbers is off by its own 6e-8, what many products add up to by much more.
    """
    order, diagonal = np.argsort(np.diag(H), kind="stable"), np.diag(H).copy()
    parts = [slice(start, min(start + BLOCK, len(H))) for start in range(0, len(H), BLOCK)]

    def block(rows: slice, columns: slice) -> np.ndarray:  # with what C has on its diagonal
        found = H[np.ix_(order[rows], order[columns])]
        if rows == columns:
            np.fill_diagonal(found, diagonal[order[rows]])
        return found

    for i, here in enumerate(parts):
        before, symmetric = slice(here.start), block(here, here)
        known = block(here, before).astype(np.float64).T
        factor = np.linalg.cholesky(symmetric - block(here, before) @ known)
        H[np.ix_(order[here], order[here])] = np.triu(symmetric) + np.tril(factor, -1)
        diagonal[order[here]] = np.diag(factor)
        for rows in parts[i + 1 :]:
            remaining = block(rows, here) - block(rows, before) @ known
            H[np.ix_(order[rows], order[here])] = np.linalg.solve(factor, remaining.T).T
    yield order, block
    for i, here in enumerate(parts):
        upper = np.triu(H[np.ix_(order[here], order[here])])
        H[np.ix_(order[here], order[here])] = upper + np.triu(upper, 1).T
        for rows in parts[i + 1 :]:
            H[np.ix_(order[rows], order[here])] = block(here, rows).T


def products(m: int, pairs: Iterable[tuple[mx.array, mx.array]]) -> np.ndarray:
    """The sum of X^T Y (m, m) float32, of pairs of X and Y (N, m)."""
    total = np.zeros((m, m), np.float32)
    for x, y in pairs:
        for start in range(0, m, BLOCK):  # in place: all at once there would be two of them
            rows = slice(start, start + BLOCK)
            total[rows] = np.array(mx.addmm(mx.array(total[rows]), x[:, rows].T, y))
    return total


def damped(H: np.ndarray) -> np.ndarray:
    """H, to whose diagonal a small multiple of its mean is added in place: positive definite."""
    H[np.diag_indices_from(H)] += DAMPING * np.diag(H).mean() + 1e-12
    return H


def round_matrix(
    W: np.ndarray, H: np.ndarray, missing: np.ndarray, grid: Grid, begin: Rounded | None = None
) -> Rounded:
    """Round W (m, n) onto a grid so that its inputs, of H (m, m), feel little of it.

    What is wanted is W and H^-1 `missing` (m, n). `begin` is a matrix on the grid that W is near
    to, such as the one before training, and is used up; None rounds with compensation first.
    """
    every = [slice(start, start + ROWS) for start in range(0, W.shape[1], ROWS)]
    if begin is None:
        begin = Rounded(grid, np.empty(W.shape, np.uint8), *scales_of(W, grid))
        with factored(H) as (order, C):
            for rows in every:
                compensate(begin.of_rows(rows), W[:, rows], missing[:, rows], order, C)
    for rows in every:
        improve(begin.of_rows(rows), W[:, rows], missing[:, rows], H)
    return begin


def scales_of(W: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets (G, n) by which a grid covers the range of each group."""
    groups = W.reshape(-1, grid.group, W.shape[1])
    low, high = groups.min(axis=1), groups.max(axis=1)
    if grid.offset:
        scale = grid.store((high - low) / (grid.levels[-1] - grid.levels[0]))
        offset = grid.store((high + low) / 2 - scale * grid.levels.mean())
    else:  # the number farthest from 0 on the level farthest from it
        scale = grid.store(np.where(high > -low, high, low) / grid.levels[0])
        offset = np.zeros_like(low)
    return np.where(scale == 0, 1, scale), offset


def compensate(
    rounded: Rounded, W: np.ndarray, missing: np.ndarray, order: np.ndarray, C: Blocks
) -> None:
    """Round column after column, those with the largest inputs first; each takes over errors.

    With H = C C^T, C lower triangular, a row's cost is that of C^T E. From the last column to the
    first each is rounded to what brings its own term of it nearest to 0.
    """
    grid, scales, offsets, m = rounded.grid, rounded.scales, rounded.offsets, len(W)
    lacks = missing[order]  # becomes C^T (wanted - W)
    for start in range(0, m, STEP):
        here = slice(start, min(start + STEP, m))
        rest = lacks[here] - C(here, slice(start)) @ lacks[:start]
        lacks[here] = np.linalg.solve(np.tril(C(here, here)), rest)
    levels, E = np.empty_like(W), np.zeros_like(W)  # E in this order
    for end in range(m, 0, -STEP):
        start = max(end - STEP, 0)
        here = slice(start, end)
        A = C(here, here).T
        length = np.diag(A).copy()[:, None]
        carried = (C(slice(end, m), here).T @ E[end:] + lacks[here]) / length
        A = A / length
        for i in range(end - 1, start - 1, -1):
            j, column = i - start, order[i]
            scale, offset = scales[column // grid.group], offsets[column // grid.group]
            wanted = W[column] + carried[j] + A[j, j + 1 :] @ E[i + 1 : end]
            levels[column] = grid.nearest((wanted - offset) / scale)
            E[i] = W[column] - (levels[column] * scale + offset)
    rounded.codes[:] = grid.codes(levels)


def improve(
    rounded: Rounded, W: np.ndarray, missing: np.ndarray, H: np.ndarray, sweeps: int = SWEEPS
) -> None:
    """Coordinate descent from a matrix on a grid: no step makes a row's cost larger."""
    grid, levels, size = rounded.grid, rounded.levels, rounded.grid.group
    scales, offsets = rounded.scales, rounded.offsets
    # What of the error the inputs of each column feel: half the cost's slope, with its sign.
    R = H @ (W - rounded.dense)
    R += missing
    step = size * max(STEP // size, 1)
    added = np.empty((step, W.shape[1]), np.float32)
    for first in [*range(0, len(W), step)] * sweeps:
        last = min(first + step, len(W))
        for start in range(first, last, size):
            g, part, before = start // size, slice(start, start + size), slice(first, start)
            within, q = H[part, part], levels[part]
            r = R[part] - H[part, before] @ added[: start - first]
            old = q * scales[g] + offsets[g]
            change = _fitted(rounded, g, r, within, q)
            scales[g] += change[0]
            offsets[g] += change[1]
            r -= within @ (q * change[0] + change[1])
            moved = np.zeros_like(q)
            for i in range(size):
                wanted = (r[i] - within[i, :i] @ moved[:i]) / (within[i, i] * scales[g])
                new = grid.nearest(q[i] + wanted)
                moved[i] = (new - q[i]) * scales[g]
                q[i] = new
            added[start - first :][:size] = q * scales[g] + offsets[g] - old
        R -= H[:, first:last] @ added[: last - first]
    rounded.codes[:] = grid.codes(levels)


def _fitted(rounded: Rounded, g: int, r: np.ndarray, H: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(2, n): what to add to scale and offset (n,) of a group, as the format can store them.

    The least squares of r (g, n) on the levels q (g, n) and 1, within H (g, g); 0 for a row where
    rounding to what can be stored leaves no gain.
    """
    grid, scale, offset = rounded.grid, rounded.scales[g], rounded.offsets[g]
    Hq, ones = H @ q, H.sum()
    qq, rq = (Hq * q).sum(axis=0), (r * q).sum(axis=0)
    q1, r1 = (Hq.sum(axis=0), r.sum(axis=0)) if grid.offset else (0 * qq, 0 * qq)
    determinant = qq * ones - q1 * q1
    determinant = np.where(determinant > 1e-6 * qq * ones, determinant, np.inf)
    wanted = (ones * rq - q1 * r1) / determinant, (qq * r1 - q1 * rq) / determinant
    new = grid.store(scale + wanted[0])
    change = np.stack([new - scale, grid.store(offset + wanted[1]) - offset])
    added = q * change[0] + change[1]
    gain = (added * (2 * r - H @ added)).sum(axis=0)
    return np.where((gain > 0) & (new != 0), change, 0)
