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

from collections.abc import Callable
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


@dataclass
class Rounded:
    """A matrix on a grid: levels (m, n), scales and offsets (G, n), all float32."""

    grid: Grid
    levels: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray

    @property
    def numbers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Levels, scales and offsets."""
        return self.levels, self.scales, self.offsets

    @property
    def dense(self) -> np.ndarray:
        """The matrix (m, n)."""
        m, n = self.levels.shape
        by_group = self.levels.reshape(-1, self.grid.group, n)
        return (by_group * self.scales[:, None] + self.offsets[:, None]).reshape(m, n)

    @property
    def codes(self) -> np.ndarray:
        """(n, m) uint8: the place of each level among the grid's."""
        return np.searchsorted(self.grid.levels, self.levels).astype(np.uint8).T


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
    codes = rounded.codes
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


@dataclass
class Inputs:
    """What matrices read: H = X^T X (m, m) float32, positive definite (`damped`)."""

    H: np.ndarray

    @cached_property
    def order(self) -> np.ndarray:
        """(m,): the smallest inputs first."""
        return np.argsort(np.diag(self.H), kind="stable")

    @cached_property
    def factor(self) -> np.ndarray:
        """L (m, m) float32, in this order: lower triangular, H = L diag(d) L^T, with ones in it.

        Beside H and L there are only blocks: those are in float64, because each of L's rounded
        numbers is off by its own 6e-8, but what many products add up to would be by much more.
        """
        H, order, m = self.H, self.order, len(self.H)
        L = np.zeros_like(H)

        def remaining(rows: slice, here: slice) -> np.ndarray:
            known = L[rows, : here.start] @ L[here, : here.start].astype(np.float64).T
            return H[np.ix_(order[rows], order[here])] - known

        for start in range(0, m, BLOCK):
            here = slice(start, start + BLOCK)
            L[here, here] = diagonal = np.linalg.cholesky(remaining(here, here))
            for below in range(start + BLOCK, m, BLOCK):
                rows = slice(below, below + BLOCK)
                L[rows, here] = np.linalg.solve(diagonal, remaining(rows, here).T).T
        L /= np.diag(L).copy()
        return L


def damped(H: np.ndarray) -> Inputs:
    """Of H, to whose diagonal a small multiple of its mean is added in place."""
    H[np.diag_indices_from(H)] += DAMPING * np.diag(H).mean() + 1e-12
    return Inputs(H)


def round_matrix(
    W: np.ndarray, inputs: Inputs, grid: Grid, begin: Rounded | None = None
) -> Rounded:
    """Round W (m, n) onto a grid so that its inputs feel little of it.

    `begin` is a matrix on the grid that W is near to, such as the one before training; None rounds
    with compensation first.
    """
    parts = []
    for start in range(0, W.shape[1], ROWS):
        rows = slice(start, start + ROWS)
        block = np.ascontiguousarray(W[:, rows])
        if begin is None:
            first = compensated(block, inputs, grid, *scales_of(block, grid))
        else:
            first = Rounded(grid, *(x[:, rows] for x in begin.numbers))
        parts.append(improved(first, block, inputs).numbers)
    return Rounded(grid, *(np.concatenate(x, axis=1) for x in zip(*parts)))


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


def compensated(
    W: np.ndarray, inputs: Inputs, grid: Grid, scales: np.ndarray, offsets: np.ndarray
) -> Rounded:
    """Round column after column, those with the largest inputs first; each takes over errors.

    With H = L d L^T, L lower triangular, a row's cost is that of L^T E. From the last column to the
    first each is rounded to what brings its own term of it nearest to 0.
    """
    order, L = inputs.order, inputs.factor
    levels, E = np.empty_like(W), np.zeros_like(W)  # E in this order
    for end in range(len(W), 0, -STEP):
        start = max(end - STEP, 0)
        carried = L[end:, start:end].T @ E[end:]
        A = L[start:end, start:end].T.copy()
        for i in range(end - 1, start - 1, -1):
            j, column = i - start, order[i]
            scale, offset = scales[column // grid.group], offsets[column // grid.group]
            wanted = W[column] + carried[j] + A[j, j + 1 :] @ E[i + 1 : end]
            levels[column] = grid.nearest((wanted - offset) / scale)
            E[i] = W[column] - (levels[column] * scale + offset)
    return Rounded(grid, levels, scales, offsets)


def improved(begin: Rounded, W: np.ndarray, inputs: Inputs, sweeps: int = SWEEPS) -> Rounded:
    """Coordinate descent from a matrix on a grid: no step makes a row's cost larger."""
    grid, levels, H = begin.grid, begin.levels.copy(), inputs.H
    scales, offsets, size = begin.scales.copy(), begin.offsets.copy(), begin.grid.group
    # What of the error the inputs of each column feel: half the cost's slope, with its sign.
    R = H @ (W - begin.dense)
    step = size * max(STEP // size, 1)
    added = np.empty((step, W.shape[1]), np.float32)
    for first in [*range(0, len(W), step)] * sweeps:
        last = min(first + step, len(W))
        for start in range(first, last, size):
            g, part, before = start // size, slice(start, start + size), slice(first, start)
            within, q = H[part, part], levels[part]
            r = R[part] - H[part, before] @ added[: start - first]
            old = q * scales[g] + offsets[g]
            change = _fitted(grid, r, within, q, scales[g], offsets[g])
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
    return Rounded(grid, levels, scales, offsets)


def _fitted(
    grid: Grid,
    r: np.ndarray,
    H: np.ndarray,
    q: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
) -> np.ndarray:
    """(2, n): what to add to scale and offset (n,) of a group, as the format can store them.

    The least squares of r (g, n) on the levels q (g, n) and 1, within H (g, g); 0 for a row where
    rounding to what can be stored leaves no gain.
    """
    Hq = H @ q
    qq, q1, rq = (Hq * q).sum(axis=0), Hq.sum(axis=0), (r * q).sum(axis=0)
    if grid.offset:
        ones, r1 = H.sum(), r.sum(axis=0)
        determinant = qq * ones - q1 * q1
        sound = determinant > 1e-6 * qq * ones
        determinant = np.where(sound, determinant, np.inf)
        wanted = (ones * rq - q1 * r1) / determinant, (qq * r1 - q1 * rq) / determinant
    else:
        wanted = rq / np.where(qq > 0, qq, np.inf), np.zeros_like(rq)
    new = grid.store(scale + wanted[0])
    change = np.stack([new - scale, grid.store(offset + wanted[1]) - offset])
    added = q * change[0] + change[1]
    gain = (added * (2 * r - H @ added)).sum(axis=0)
    return np.where((gain > 0) & (new != 0), change, 0)
