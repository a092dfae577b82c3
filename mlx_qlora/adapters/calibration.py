"""Rows on their way through a model's layers, in several versions of its weights at once.

Each layer is rounded by what training rows bring to its matrices: as the written model will have
it, its earlier layers being rounded already, while the results wanted are those of the merged one.
Held-out rows go along as the base, with the adapter, merged, rounded plainly and as written, and
what becomes of them is the verdict. One layer is in memory at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.adapters.drift import ADAPTER, BASE, MERGED, PLAIN, VERSIONS, WRITTEN, Drift, measure
from mlx_qlora.adapters.requantize import Grid, Rounded, damped, products, round_matrix
from mlx_qlora.adapters.several import disabled
from mlx_qlora.data.batches import IGNORE, evaluation_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.linears import Linears
from mlx_qlora.model.llama import NO_KEYS, LlamaForCausalLM, go_through
from mlx_qlora.model.quantize import Linear

TOKENS = 4_096, 16_384  # of training rows: 3 for each column of the widest matrix, within these
HELD_OUT = 4_096  # tokens of rows that the result is measured on, each in five versions
HALVES = ("qkv", "o"), ("gate_up", "down")  # of a layer
AT_ONCE = 1_024  # tokens whose inputs of the widest matrix are in memory
# Of a batch what attends to what, the tokens (N,) of answers or IGNORE, and what each version of
# a half of a layer reads (N, D).
Rows = tuple[Documents, np.ndarray, dict[str, mx.array]]


@dataclass
class Calibrated:
    """The rounded matrices of a model's layers by their paths; ask for them in their order."""

    model: LlamaForCausalLM  # with an adapter, which it keeps
    dense: Callable[[str], mx.array]  # the merged matrix (n, m) float32 of a path
    grid: Callable[[str], Grid | None]  # onto which it is rounded; None if it is not
    plain: Callable[[str, mx.array], mx.array]  # a matrix rounded without rows, for the verdict
    rows: tuple[Examples, Examples | None]  # to calibrate with, and for the verdict

    def __post_init__(self) -> None:
        self._layer, self._rounded = 0, dict[str, Rounded]()
        train, held_out = self.rows
        tokens = int(np.clip(3 * self.model.config.intermediate_size, *TOKENS))
        self._train = self._drawn(train, tokens, (MERGED, WRITTEN))
        self._held_out = [] if held_out is None else self._drawn(held_out, HELD_OUT, VERSIONS)

    def __getitem__(self, path: str) -> Rounded:
        while self._layer <= int(path.split(".")[2]):
            self._go_through(self._layer)
            self._layer += 1
        return self._rounded[path]

    def verdict(self, what: str) -> Drift | None:
        """What rounding cost on the held-out rows, once all layers are rounded."""
        normalised = self.model.model.normalised
        hidden = (
            ({version: normalised(x) for version, x in states.items()}, labels)
            for _, labels, states in self._held_out
        )
        return measure(self.model, hidden, what)

    def _drawn(self, examples: Examples, tokens: int, versions: tuple[str, ...]) -> list[Rows]:
        """Batches of some rows, drawn at random, of so many tokens in all."""
        order = np.random.default_rng(0).permutation(len(examples))
        n = int(np.searchsorted(np.cumsum(examples.lengths[order]), tokens)) + 1
        rows, drawn = [], examples[order[:n]]
        for batch in evaluation_batches(drawn, max(1, AT_ONCE // int(drawn.lengths.mean()))):
            labels = np.array(batch.labels).reshape(-1)
            if batch.answers is not None:
                labels = np.where(batch.answers.reshape(-1), labels, IGNORE)
            real = batch.document_of >= 0
            x = self.model.model.embed(mx.array(np.array(batch.tokens).reshape(-1)[real]))
            rows.append((Documents.of(batch.documents), labels[real], dict.fromkeys(versions, x)))
        return rows

    def _go_through(self, i: int) -> None:
        """Round a layer's matrices, and take all rows through it, half by half.

        The rows' inputs of a half are kept, and what is between is computed again where it is read:
        of 16,384 tokens what 8B's `down` reads would be 0.9 GB, twice.
        """
        reader = self.model.model.reader
        self._rounded = {}
        with nullcontext() if reader is None else reader.layer(i):
            for half in HALVES:
                for name in half:
                    self._round(i, half, name)
                for version in VERSIONS:
                    batches = [x for x in (*self._train, *self._held_out) if version in x[2]]
                    for states, x in self._walk(i, half, version, batches) if batches else ():
                        states[version] = x

    def _walk(
        self, i: int, half: tuple[str, ...], version: str, batches: list[Rows], until: str = ""
    ) -> Iterator[tuple[dict[str, mx.array], mx.array]]:
        """Of each batch what a version of some linears reads, or what leaves the half (N, D)."""
        layer, names = self.model.layers[i], [*half, until]
        linears = {name: self._linears(i, name, version) for name in names[: names.index(until)]}
        for documents, _, states in batches:
            x = states[version]
            pieces = layer.attend(x, documents) if half is HALVES[0] else layer.mix(x)
            x = go_through(pieces, lambda name, x: linears[name](x, NO_KEYS), until)
            mx.eval(x)
            yield states, x
        mx.clear_cache()

    def _round(self, i: int, half: tuple[str, ...], name: str) -> None:
        """Round those linears that read the same by what training rows bring to them."""

        def read(version: str) -> Iterator[mx.array]:
            walk = self._walk(i, half, version, self._train, name)
            return (x.astype(mx.float32) for _, x in walk)

        members = self.model.layers[i].linears(name).members
        paths = {f"model.layers.{i}.{leaf}": linear for leaf, linear in members.items()}
        m = next(iter(members.values())).base_layer.shape[1]
        # What brings the results of these inputs nearest to the merged model's. Before H, as of
        # 14,336 inputs each has 0.8 GB.
        D = products(m, ((x, exact - x) for exact, x in zip(read(MERGED), read(WRITTEN))))
        rounded = [path for path in paths if self.grid(path)]
        missing = {path: D @ np.array(self.dense(path), copy=False).T for path in rounded}
        del D
        H = damped(products(m, ((x, x) for x in read(WRITTEN))))
        for path, linear in paths.items():
            if (grid := self.grid(path)) is not None:
                begin = packed_on(linear.base_layer, grid)
                if begin is None or linear is not linear.base_layer:
                    W = np.array(self.dense(path).T, order="C")
                    begin = round_matrix(W, H, missing.pop(path), grid, begin)
                self._rounded[path] = begin

    def _linears(self, i: int, name: str, version: str) -> Linears:
        """Linears of a layer that read the same, in a version of their weights."""
        with disabled(self.model) if version == BASE else nullcontext():
            linears = self.model.layers[i].linears(name)
        if version in (BASE, ADAPTER):
            return linears
        members = {}
        for leaf, linear in linears.members.items():
            path = f"model.layers.{i}.{leaf}"
            rounded = self._rounded.get(path)
            if version == WRITTEN and rounded is not None:
                W = mx.array(rounded.dense).T
            else:
                W = self.dense(path)
            if version == MERGED:
                W = W.astype(mx.bfloat16)
            if version == PLAIN and rounded is not None:
                W = self.plain(path, W)
            members[leaf] = dense_linear(W, linear.base_layer)
            del W
            mx.clear_cache()  # of what it was made from
        return Linears(members, linears.cuts)


def packed_on(base: Linear, grid: Grid) -> Rounded | None:
    """A packed matrix as it is on a grid; None if the grid has not all of its numbers."""
    quant = base.quant
    if quant is None or quant.mode != "affine" or quant.group_size != grid.group:
        return None
    if 2**quant.bits != len(grid.levels):
        return None
    weight, scales, biases = base.packed()
    ones = mx.ones_like(scales)
    how: dict[str, Any] = {"group_size": quant.group_size, "bits": quant.bits}
    codes = mx.dequantize(weight, ones, mx.zeros_like(ones), **how).astype(mx.uint8)
    scales, biases = (np.array(x.astype(mx.float32)).T.copy() for x in (scales, biases))
    offsets = biases - grid.levels[0] * scales
    if (scales == 0).any() or not (grid.offset or (offsets == 0).all()):
        return None
    return Rounded(grid, np.array(codes.T, order="C"), grid.store(scales), grid.store(offsets))


def dense_linear(weight: mx.array, like: Linear) -> Linear:
    """A linear with a weight (d_out, d_in) in the dtype of another, and its bias; evaluated."""
    linear = Linear(0, 0)
    linear.weight, linear.dtype = mx.contiguous(weight.astype(like.dtype)), like.dtype
    if "bias" in like:
        linear.bias = like.bias
    mx.eval(linear.parameters())
    return linear
