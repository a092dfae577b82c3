"""The checker of a GPU's contract: what the package does keeps it, and each break is found."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from support.gpu_route import MOST_SHAPES, ROUTES, Contract, Route
from support.gradients import packed_batch
from support.models import LLAMA_31_8B, randomise_lora

from mlx_qlora import device
from mlx_qlora.data.batches import Batch
from mlx_qlora.model import attention, lora_init, quantize
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.families import LlamaConfig
from mlx_qlora.model.llama import DecoderLayer, LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.engine import Engine, loss_and_grads
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.signals import StopSignal
from mlx_qlora.train.step import Step
from mlx_qlora.tree import flat

Patch = pytest.MonkeyPatch
# Some shorter than Metal's fused attention differentiates, and enough for what is kept to stand out
# from indices and the like.
DOCUMENTS = [[40, 30, 3], [60, 8], [33, 20, 9], [64], [12, 50]]


def rows_of(documents: list[list[int]], seed: int = 0) -> Batch:
    batch = packed_batch(documents, seed)
    return dataclasses.replace(batch, rows=tuple(range(len(documents))))


def take_steps(folder: Any, route: Route, compiled: bool = True, **lora: Any) -> None:
    """Two optimiser steps of two micro-batches."""
    model = route.load(folder)
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.2, **lora}
    add_lora(model, LoraConfig(**settings), seed=5)
    randomise_lora(model)
    engine, moves = Engine(model, "none", compiled), AdamW(model.trainable_parameters())
    step = Step(engine, moves, 3, StopSignal(), Console(file=io.StringIO()))
    for i in range(2):
        result = step([rows_of(DOCUMENTS, 2 * i), rows_of(DOCUMENTS[::-1], 2 * i + 1)], 1e-3)
        assert result is not None and result.finite


def broken(name: str, run: Callable[[Route], None]) -> str:
    """What a route's contract says of a run."""
    route = ROUTES[name]
    with device.use(route.device), Contract(route).watching() as contract:
        run(route)
    try:
        contract.check()
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ROUTES)
def test_steps_keep_the_contract(hf_tiny, name):
    assert broken(name, lambda route: take_steps(hf_tiny[1], route)) == ""


# ---- breaks on purpose -------------------------------------------------------------------------


def scales_left_float32(patch: Patch) -> None:
    patch.setattr(quantize, "cast", lambda array, dtype: array)


def masks_that_are_arrays(patch: Patch) -> None:
    patch.setattr(attention, "FEWEST_FUSED_QUERIES", 1000)


def no_guard_for_few_queries(patch: Patch) -> None:
    patch.setattr(attention, "FEWEST_FUSED_QUERIES", 0)


def lengths_as_they_are(patch: Patch) -> None:
    patch.setattr(device, "_in_use", dataclasses.replace(device.current(), attention_multiple=1))


def reading(read: Callable[[mx.array], Any]) -> Callable[[Patch], None]:
    """A layer that looks at what it has computed."""

    def change(patch: Patch) -> None:
        real = DecoderLayer.add_mlp

        def add_mlp(self: DecoderLayer, *args: Any) -> mx.array:
            y = real(self, *args)
            read(mx.stop_gradient(y).astype(mx.float32).sum())
            return y

        # In the forward alone: MLX itself refuses to read what is being differentiated.
        patch.setattr(DecoderLayer, "add_mlp", add_mlp)

    return change


def reading_what_was_started(patch: Patch) -> None:
    """A loss that is read while the device is still computing it."""
    real = Engine.__call__

    def call(*args: Any, **settings: Any) -> Any:
        loss, n, grads = real(*args, **settings)
        for value in (loss, next(iter(grads.values()))):
            mx.async_eval(value)
            np.array(value)
        return loss, n, grads

    patch.setattr(Engine, "__call__", call)


def in_float64(patch: Patch) -> None:
    def norm(_: AdamW, grad: mx.array) -> mx.array:
        return mx.sqrt(grad.astype(mx.float64).square().sum()).astype(mx.float32)

    patch.setattr(AdamW, "_norm", norm)


def svd_by_mlx(W: np.ndarray, r: int, *_: Any) -> tuple[np.ndarray, ...]:
    return tuple(map(np.array, mx.linalg.svd(mx.array(W))))


BREAKS = {
    "float32 scales": ("metal-bfloat16", scales_left_float32, "float32 activations"),
    "array masks": ("metal-bfloat16", masks_that_are_arrays, "an array as the mask"),
    "few queries": ("metal-float32", no_guard_for_few_queries, "fewer than 9 queries"),
    "lengths": ("cuda-bfloat16", lengths_as_they_are, "not whole 128s"),
    "float64": ("metal-float32", in_float64, "an array of float64"),
    "item": ("metal-float32", reading(lambda y: y.item()), "host synchronisations in Step"),
    "tolist": ("cuda-float32", reading(lambda y: y.tolist()), "host synchronisations in Step"),
    "float": ("metal-float32", reading(float), "host synchronisations in Step"),
    "bool": ("metal-float32", reading(bool), "host synchronisations in Step"),
    "numpy": ("metal-float32", reading(lambda y: np.asarray(y)), "host synchronisations in Step"),
    "too early": ("metal-float32", reading_what_was_started, "host synchronisations in Step"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_on_purpose_is_found(hf_tiny, monkeypatch, name):
    of_route, change, found = BREAKS[name]

    def run(route: Route) -> None:
        with monkeypatch.context() as patch:
            change(patch)
            take_steps(hf_tiny[1], route)

    assert found in broken(of_route, run)


def test_a_sigmoid_that_an_uncompiled_forward_keeps_is_found(hf_tiny):
    found = broken("metal-bfloat16", lambda route: take_steps(hf_tiny[1], route, compiled=False))
    assert "bytes kept by a forward" in found


@pytest.mark.parametrize("name", ["metal-bfloat16", "cuda-bfloat16"])
def test_loss_and_grads_keeps_the_contract(hf_tiny, name):
    """The public call keeps no more than a run does."""

    def run(route: Route) -> None:
        model = route.load(hf_tiny[1])
        add_lora(model, LoraConfig(r=4, lora_dropout=0.2), seed=5)
        mx.eval(loss_and_grads(model, rows_of(DOCUMENTS), mx.random.key(1))[2])

    assert broken(name, run) == ""


def test_a_factorisation_on_the_gpu_s_stream_is_found(hf_tiny, monkeypatch):
    monkeypatch.setattr(lora_init, "_randomised_svd", svd_by_mlx)
    init = {"init_lora_weights": "pissa_niter_2"}

    def run(route: Route) -> None:
        add_lora(route.load(hf_tiny[1], None), LoraConfig(r=4, **init))

    def on_cpu(route: Route) -> None:
        with mx.stream(mx.cpu):
            run(route)

    assert "mx.linalg.svd without the CPU's stream" in broken("metal-float32", run)
    assert broken("metal-float32", on_cpu) == ""


@pytest.mark.parametrize("few_shapes", [True, False])
def test_a_length_of_its_own_for_every_batch_is_found(hf_tiny, few_shapes):
    """A run of batches of many lengths."""

    def run(route: Route) -> None:
        model = route.load(hf_tiny[1], None)
        add_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
        here = dataclasses.replace(device.current(), few_shapes=few_shapes)
        engine, weights = Engine(model), flat(model.trainable_parameters())
        with device.use(here):
            for n in range(1, MOST_SHAPES + 3):
                mx.eval(engine(weights, packed_batch([[10, n]], n))[2])

    found = broken("metal-float32", run)
    if few_shapes:
        assert found == ""
    else:
        assert "lengths of the axis of positions" in found


@pytest.mark.parametrize(
    ("name", "lengths", "found"),
    [
        ("metal-bfloat16", [2048] * 4, ""),
        ("cuda-bfloat16", [2048] * 8, ""),
        ("metal-bfloat16", [8192], ""),
        ("metal-bfloat16", [100] * 81, ""),
        ("metal-bfloat16", [65536], "s of attention of 65536 queries in one dispatch on m1-8"),
        ("metal-bfloat16", [512] * 256, "s of product of (131072, 4096) in one dispatch"),
    ],
    ids=lambda value: f"{len(value)} x {value[0]}" if isinstance(value, list) else value[:20],
)
def test_no_dispatch_of_a_layer_of_8b_keeps_a_display_waiting(name, lengths, found):
    """Built and never computed: as many positions as a chunk has, and far more."""

    def run(route: Route) -> None:
        config = dataclasses.replace(LlamaConfig.from_hf(LLAMA_31_8B), num_hidden_layers=1)
        model, N = LlamaForCausalLM(config), sum(lengths)
        table = np.array([(0, end - n, end) for n, end in zip(lengths, np.cumsum(lengths))])
        context = Documents.of(table.astype(np.int32), N)
        model.layers[0](mx.zeros((N, 4096), route.dtype), context)

    assert found in broken(name, run) if found else broken(name, run) == ""
