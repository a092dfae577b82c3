"""Rows on their way through a model's layers, in several versions of its weights at once.

Each layer is rounded by what training rows bring to its matrices: as the written model will have
it, its earlier layers being rounded already, while the results wanted are those of the merged one.
Held-out rows go along as the base, with the adapter, merged, rounded plainly and as written, and
what becomes of them is the verdict. One layer is in memory at a time.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.adapters.drift import ADAPTER, BASE, MERGED, PLAIN, VERSIONS, WRITTEN, Drift, measure
from mlx_qlora.adapters.requantize import Grid, Rounded, damped, round_matrix
from mlx_qlora.adapters.several import disabled
from mlx_qlora.data.batches import IGNORE, Batch, evaluation_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.linears import Linears
from mlx_qlora.model.llama import KEYS_OF, NO_KEYS, DecoderLayer, LlamaForCausalLM
from mlx_qlora.model.quantize import Linear

TOKENS = 4_096, 16_384  # of training rows: 3 for each column of the widest matrix, within these
HELD_OUT = 4_096  # tokens of rows that the result is measured on, each in five versions


class Flow:
    """Documents end to end, on their way through layers of one version of the weights."""

    def __init__(self, version: str, documents: Documents, x: mx.array) -> None:
        self.version, self._documents, self.x = version, documents, x

    def enter(self, layer: DecoderLayer) -> None:
        """Go to the first linears of a layer: `x` (N, d_in) is what they read."""
        self._running = layer.pieces(self.x, self._documents)
        self.x = next(self._running)[1]

    def go_on(self, linears: Linears) -> None:
        """Through these to the next ones, or to the layer's end: `x` (N, D) is its output."""
        try:
            self.x = self._running.send(linears(self.x, NO_KEYS))[1]
        except StopIteration as done:
            self.x = done.value
        mx.eval(self.x)


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
        self._train = [self._flows(b, (MERGED, WRITTEN)) for b in _batches(train, tokens)]
        self._labels = [*_batches(held_out, HELD_OUT)] if held_out is not None else []
        self._held_out = [self._flows(batch, VERSIONS) for batch in self._labels]

    def __getitem__(self, path: str) -> Rounded:
        while self._layer <= int(path.split(".")[2]):
            self._go_through(self._layer)
            self._layer += 1
        return self._rounded[path]

    def verdict(self, what: str) -> Drift | None:
        """What rounding cost on the held-out rows, once all layers are rounded."""
        if not self._held_out:
            return None
        hidden = [
            {flow.version: self.model.model.normalised(flow.x) for flow in flows}
            for flows in self._held_out
        ]
        return measure(self.model, hidden, [*map(_answers, self._labels)], what)

    def _flows(self, batch: Batch, versions: tuple[str, ...]) -> list[Flow]:
        tokens = mx.array(np.array(batch.tokens).reshape(-1)[batch.document_of >= 0])
        tree = self.model.model
        documents, x = Documents.of(batch.documents), tree.embed(tokens)
        return [Flow(version, documents, x) for version in versions]

    def _go_through(self, i: int) -> None:
        """Round a layer's matrices, and take all rows through it."""
        layer, reader = self.model.layers[i], self.model.model.reader
        flows = [*chain(*self._train, *self._held_out)]
        self._rounded = {}
        with nullcontext() if reader is None else reader.layer(i):
            with disabled(self.model):
                base = {name: layer.linears(name) for name in KEYS_OF}
            for flow in flows:
                flow.enter(layer)
            for name in KEYS_OF:
                linears = layer.linears(name)
                versions = {BASE: base[name], ADAPTER: linears, **self._versions(i, linears)}
                for flow in flows:
                    flow.go_on(versions[flow.version])
                mx.clear_cache()

    def _versions(self, i: int, linears: Linears) -> dict[str, Linears]:
        """Linears of a layer that read the same: merged, rounded plainly, and as written."""
        H = D = mx.zeros((1, 1))
        for exact, written in self._train:
            x = written.x.astype(mx.float32)
            H, D = mx.addmm(H, x.T, x), mx.addmm(D, x.T, exact.x.astype(mx.float32) - x)
            mx.eval(H, D)
        merged = {name: self.dense(f"model.layers.{i}.{name}") for name in linears.members}
        missing = {name: np.array(D @ W.T) for name, W in merged.items()} if D.any() else {}
        del D  # of 14336 columns each is 0.8 GB
        inputs = damped(np.array(H))
        del H
        mx.clear_cache()
        members: dict[str, dict[str, Any]] = {MERGED: {}, PLAIN: {}, WRITTEN: {}}
        for name, linear in linears.members.items():
            path = f"model.layers.{i}.{name}"
            W, grid = merged[name], self.grid(path)
            dense = dict.fromkeys(members, W) | {MERGED: W.astype(mx.bfloat16)}
            if grid is not None:
                begin = packed_on(linear.base_layer, grid)
                if begin is None or linear is not linear.base_layer:
                    wanted = np.array(W.T, order="C")
                    if missing:  # what brings the results of these inputs nearest to the merged
                        wanted += np.linalg.solve(inputs.H, missing[name])
                    begin = round_matrix(wanted, inputs, grid, begin)
                self._rounded[path] = begin
                dense[PLAIN] = self.plain(path, W)
                dense[WRITTEN] = mx.array(begin.dense).T
            for version, weight in dense.items():
                members[version][name] = dense_linear(weight, linear.base_layer)
        return {version: Linears(each, linears.cuts) for version, each in members.items()}


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
    levels = mx.dequantize(weight, ones, mx.zeros_like(ones), **how).astype(mx.float32)
    first = grid.levels[0]
    scales, biases = (np.array(x.astype(mx.float32)).T.copy() for x in (scales, biases))
    offsets = biases - first * scales
    if (scales == 0).any() or not (grid.offset or (offsets == 0).all()):
        return None
    levels = np.array(levels).T + first
    return Rounded(grid, np.ascontiguousarray(levels), grid.store(scales), grid.store(offsets))


def dense_linear(weight: mx.array, like: Linear) -> Linear:
    """A linear with a weight (d_out, d_in) in the dtype of another, and its bias; evaluated."""
    linear = Linear(0, 0)
    linear.weight, linear.dtype = mx.contiguous(weight.astype(like.dtype)), like.dtype
    if "bias" in like:
        linear.bias = like.bias
    mx.eval(linear.parameters())
    return linear


def _batches(examples: Examples, tokens: int) -> list[Batch]:
    """Batches of some rows, drawn at random, of so many tokens in all."""
    drawn = np.random.default_rng(0).permutation(len(examples))
    n = int(np.searchsorted(np.cumsum(examples.lengths[drawn]), tokens)) + 1
    return [*evaluation_batches(examples[drawn[:n]])]


def _answers(batch: Batch) -> np.ndarray:
    """(N,): the token of an answer that follows each position of a document, or IGNORE."""
    labels = np.array(batch.labels).reshape(-1)
    if batch.answers is not None:
        labels = np.where(batch.answers.reshape(-1), labels, IGNORE)
    return labels[batch.document_of >= 0]
