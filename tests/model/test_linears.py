"""Linears that read the same input: their VJP is autodiff's, and stacking them changes nothing."""

import copy
import dataclasses
import sys
from concurrent import futures
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.gradients import gap

from mlx_qlora import device
from mlx_qlora.model.dropout import Mask, mask, position_words
from mlx_qlora.model.linears import Linears, result_of
from mlx_qlora.model.lora import DoRALinear, LoRALinear
from mlx_qlora.model.quantize import Linear, QuantConfig, stacked
from mlx_qlora.tree import bound, flat, nested

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernels

D, R, N = 64, 4, 40
GPU = dataclasses.replace(device.METAL, dtype="float32")
FOUR_BITS = QuantConfig(4, 32)


def linear(seed: int, d_out: int, bias: bool, quant: QuantConfig | None = FOUR_BITS) -> Linear:
    made = Linear(D, d_out, bias)
    dense = mx.random.normal((d_out, D), key=mx.random.key(seed)) / 8
    if quant is None:
        made.weight = dense
    else:
        made.pack(dense, quant)
    if bias:
        made.bias = mx.random.normal((d_out,), key=mx.random.key(seed + 1))
    made.freeze()
    return made


def updated(kind: type, seed: int, d_out: int, dropout: float, bias: bool = True):
    A, B = (
        mx.random.normal(shape, key=mx.random.key(seed + i)) / 4
        for i, shape in enumerate(((R, D), (d_out, R)))
    )
    return kind(linear(seed + 2, d_out, bias), A, B, 1.5, dropout)


def members(kind: str, dropout: float) -> dict:
    if kind == "plain":
        return {f"p{i}": linear(10 * i, 96, bool(i)) for i in range(3)}
    if kind == "mixed":
        return {
            "q": updated(LoRALinear, 1, 96, dropout),
            "k": linear(2, 32, False),
            "v": updated(DoRALinear, 3, 32, dropout),
        }
    return {name: updated(LoRALinear, 5 * i, 32 + 32 * i, dropout) for i, name in enumerate("qkv")}


def words(n: int) -> list[mx.array]:
    position = mx.arange(N, dtype=mx.int32)
    return position_words(mx.random.key(3)[None], mx.zeros_like(position), position, n)


@pytest.mark.parametrize("here", [device.CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["plain", "mixed", "lora"])
def test_the_vjp_is_autodiff_s(here, dropout, kind):
    x = mx.random.normal((N, D), key=mx.random.key(0))
    with device.use(here):
        group = Linears(members(kind, dropout))
        keys = words(3)
        results = group(x, keys)
        dys = [mx.random.normal(y.shape, key=mx.random.key(i)) for i, y in enumerate(results)]
        weights = {
            f"{path}.{name}": weight
            for path, module in group.members.items()
            for name, weight in flat(module.trainable_parameters()).items()
        }

        def run(x: mx.array, *now: mx.array) -> list[mx.array]:
            copies = {path: copy.deepcopy(module) for path, module in group.members.items()}
            for path, module in copies.items():
                of_module = {
                    name.removeprefix(f"{path}."): w
                    for name, w in zip(weights, now)
                    if name.startswith(f"{path}.")
                }
                module.update(nested(of_module))
            return Linears(copies)(x, keys)

        wanted, (dx, *gradients) = mx.vjp(run, [x, *weights.values()], dys)
        found_dx, found = result_of(group.vjp(x, [*dys], keys, False))
    assert all(mx.allclose(a, b, atol=1e-5).item() for a, b in zip(results, wanted))
    assert found.keys() == weights.keys()
    assert mx.abs(dx - found_dx).max().item() < 1e-5 * mx.abs(dx).max().item()
    if weights:
        assert gap(dict(zip(weights, gradients)), {name: found[name] for name in weights}) < 1e-5


def test_one_linear_that_stands_for_several_is_cut():
    whole = updated(LoRALinear, 1, 96, 0.1)
    x, keys = mx.random.normal((N, D)), words(1)
    q, k, v = Linears({"qkv": whole}, [32, 64])(x, keys)
    y = whole(x, keys[0])
    assert mx.array_equal(mx.concatenate([q, k, v], axis=-1), y).item()
    dx, found = result_of(Linears({"qkv": whole}, [32, 64]).vjp(x, [q, k, v], keys, False))
    wanted_dx, wanted = whole.vjp(x, y, keys[0], None)
    assert mx.array_equal(dx, wanted_dx).item()
    assert found.keys() == {f"qkv.{name}" for name in wanted}


@pytest.mark.parametrize("strategy", ["quantized", "resident"])
def test_stacked_matrices_are_slices_of_one_and_multiply_to_the_same(strategy):
    parts = [linear(i, 64 * (i + 1), False) for i in range(3)]
    for part in parts:
        part.matmul = strategy
        part.make_resident()
    x = mx.random.normal((N, D))
    mx.eval(x)
    alone = [part.multiply(x) for part in parts]
    mx.eval(alone)
    before = mx.get_active_memory()
    with device.use(GPU):
        together = Linears(dict(zip("qkv", parts)))(x, [None] * 3)
        mx.eval(together)
    assert all(mx.allclose(a, b, atol=1e-6).item() for a, b in zip(alone, together))
    del together
    assert mx.get_active_memory() - before < 3 * 4096, "the rows are there once"
    made = stacked(parts)
    assert made is stacked(parts), "made once"
    assert made.matrix.shape == (384, D)
    parts[1].put(parts[1].packed(), FOUR_BITS)
    parts[1].weight = parts[1].weight + 0
    assert stacked(parts) is not made, "another matrix makes another stack"


def test_threads_that_meet_a_model_first_find_one_stack():
    """A slice that one of them made lazily could be computed by no other."""
    x = mx.random.normal((N, D))
    mx.eval(x)
    for _ in range(5):
        parts = [linear(i, 64, False) for i in range(3)]
        with device.use(GPU), futures.ThreadPoolExecutor(4) as pool:

            def run(group: Linears) -> None:
                mx.eval(group(x + 0, [None] * 3))

            list(pool.map(run, [Linears(dict(zip("qkv", parts)))] * 8))
        mx.eval(parts[1].multiply(x))


@pytest.mark.parametrize("strategy", ["quantized", "dequantize", "resident"])
def test_a_stack_is_of_how_its_matrices_are_multiplied(strategy):
    parts = [linear(i, 64, False) for i in range(2)]
    stacked(parts)
    for part in parts:
        part.matmul = strategy
        part.make_resident()
    made = stacked(parts)
    assert (made and made.matrix.matmul) == (None if strategy == "dequantize" else strategy)
    if made is None:
        assert parts[0].stack is None, "it would keep the rows"


def test_a_resident_copy_is_stacked_once_in_many_steps():
    parts = [linear(i, 64, False) for i in range(2)]
    for part in parts:
        part.matmul = "resident"
        part.make_resident()
    made = []
    for _ in range(2):
        with parts[0].dense_for_now(), parts[1].dense_for_now():
            made.append(stacked(parts))
    assert made[0] is made[1] is stacked(parts)


def test_the_last_part_of_a_linear_that_is_cut_keeps_no_others_in_memory():
    whole, x = linear(0, 6400, False), mx.random.normal((N, D))
    mx.eval(x)
    before = mx.get_active_memory()
    v = Linears({"qkv": whole}, [3000, 6000])(x, [None])[-1]
    mx.eval(v)
    assert mx.get_active_memory() - before < 2 * v.nbytes


def test_a_copy_of_stacked_matrices_is_a_stack_of_its_own():
    parts = [linear(i, 64, False) for i in range(2)]
    made = stacked(parts)
    copied = copy.deepcopy(parts)
    assert copied[0].stack is None and made is parts[0].stack
    assert mx.array_equal(stacked(copied).matrix.weight, made.matrix.weight).item()


@pytest.mark.parametrize(
    "others",
    [
        linear(1, 64, False, QuantConfig(8, 32)),
        linear(1, 64, False, QuantConfig(4, 64)),
        linear(1, 64, False, None),
        linear(1, 64, False, QuantConfig(4, 32, "mxfp4")),
    ],
    ids=["bits", "groups", "dense", "mode"],
)
def test_matrices_that_are_packed_differently_are_not_stacked(others):
    first = linear(0, 64, False)
    assert stacked([first, others]) is None
    x = mx.random.normal((N, D))
    with device.use(GPU):
        a, b = Linears({"q": first, "k": others})(x, [None, None])
    assert mx.array_equal(a, first(x)).item() and mx.array_equal(b, others(x)).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("dropout", [0.1, 0.999])
@pytest.mark.parametrize("d", [5, 257])
def test_a_kernel_that_draws_its_mask_drops_what_the_mask_drops(dtype, dropout, d):
    (key,) = words(1)
    x = (mx.random.normal((N, d)) + 8).astype(dtype)
    kept = mask(key, dropout, d, mx.uint8)
    with device.use(device.METAL):
        dropped, added = Mask(key, dropout)(x), Mask(key, dropout).add_to(x, x)
    assert dropped.dtype == added.dtype == dtype
    assert np.array_equal(np.array(dropped != 0), np.array(kept == 1))
    assert mx.array_equal(dropped, x * kept.astype(dtype)).item()
    assert mx.array_equal(added, x + dropped).item()


def test_bound_weights_go_back_whatever_happens():
    module = updated(LoRALinear, 1, 32, 0.0)
    before = flat(module.parameters())
    with pytest.raises(RuntimeError), bound(module, {"lora_A.weight": mx.zeros((R, D))}):
        assert not module.lora_A.weight.any().item()
        raise RuntimeError
    assert all(array is before[name] for name, array in flat(module.parameters()).items())


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "rows", "forward", "backward"),
    [(device.METAL, 3, 70, 240), (device.CUDA, 6, 80, 290)],
    ids=["metal", "cuda"],
)
def test_a_gpu_runs_few_kernels_for_a_layer(here, rows, forward, backward):
    """62 documents in 6,144 positions, 120 in 12,288; `benchmarks/kernels.py` lists the kernels."""
    found = kernels.counted("smollm2-135m", here, kernels.packed(rows), 0.1)
    assert sum(found["forward"].values()) <= forward
    assert sum(found["backward"].values()) <= backward


def test_a_kernel_more_is_counted(monkeypatch):
    """The control: a mask that is stored, and a swiglu that is not compiled."""
    batch, here = kernels.packed(1), device.METAL
    usual = kernels.counted("smollm2-135m", here, batch, 0.1)["forward"]
    monkeypatch.setattr(Mask, "__call__", lambda self, x: x * self._mask(x))
    more = kernels.counted("smollm2-135m", here, batch, 0.1)["forward"]
    assert sum(more.values()) >= sum(usual.values()) + 7 * 4
