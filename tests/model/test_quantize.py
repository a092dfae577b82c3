"""Frozen matrices: the values that quantising gives, and three ways to multiply by them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.gpu_route import Route
from support.models import (
    load_folder,
    make_hf_model,
    our_logits,
    random_tokens,
    save_hf,
    torch_logits,
)

from mlx_qlora.errors import ConfigError
from mlx_qlora.model import quantize
from mlx_qlora.model.quantize import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    FLOAT_MODES,
    Embedding,
    Linear,
    QuantConfig,
    pack,
    unpack,
)

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
MATRICES = [
    "model.embed_tokens", "lm_head",
    *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
    *(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
]  # fmt: skip
FLOATS = [QuantConfig(bits, group, mode) for mode, (bits, group) in FLOAT_MODES.items()]
EVERY = [QuantConfig(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS] + FLOATS
EACH_FORMAT = [QuantConfig(bits, 64) for bits in AFFINE_BITS] + FLOATS
STRATEGIES = ("resident", "dequantize", "quantized")


def name_of(quant: QuantConfig) -> str:
    return f"{quant.mode}-{quant.bits}-{quant.group_size}"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, mx.array]]:
    """(transformers model, its folder, its float32 matrices by path)."""
    model = make_hf_model(**SIZES)
    folder = save_hf(model, tmp_path_factory.mktemp("quantize") / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    return model, folder, {path: weights[f"{path}.weight"] for path in MATRICES}


def mlx_quantize(weight: mx.array, quant: QuantConfig) -> list[mx.array]:
    return list(mx.quantize(weight, group_size=quant.group_size, bits=quant.bits, mode=quant.mode))


def mlx_dequantize(parts: list[mx.array], quant: QuantConfig) -> mx.array:
    return mx.dequantize(
        *parts, group_size=quant.group_size, bits=quant.bits, mode=quant.mode, dtype=mx.float32
    )


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", EVERY, ids=name_of)
def test_loading_packs_every_matrix_as_mlx_does(quant: QuantConfig, oracle: Any) -> None:
    _, folder, weights = oracle
    model = load_folder(folder, quant, "quantized")
    for path, matrix in model.named_modules():
        assert (path in weights) == isinstance(matrix, (Linear, Embedding))
        if path in weights:
            expected = mlx_quantize(weights[path], quant)
            assert len(matrix.packed()) == len(expected) == (3 if quant.mode == "affine" else 2)
            for ours, theirs in zip(matrix.packed(), expected, strict=True):
                assert ours.dtype == theirs.dtype
                assert mx.array_equal(ours, theirs)
            assert matrix.quant == quant
            assert matrix.shape == tuple(weights[path].shape)
            assert mx.array_equal(matrix.dense(), mlx_dequantize(expected, quant))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_affine_values_lie_on_a_grid_that_spans_the_group(bits: int) -> None:
    """The definition, in numpy: 2^bits levels, and no weight further than half a step away.

    MLX moves the grid so that zero falls on it, which may cost one more half step at an end.
    """
    dense = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    quant = QuantConfig(bits, 32)
    packed = pack(mx.array(dense), quant)
    values = np.array(unpack(packed, quant, mx.float32)).reshape(-1, 32)
    step = np.abs(np.array(packed[1])).reshape(-1, 1)
    level = (values - np.array(packed[2]).reshape(-1, 1)) / np.array(packed[1]).reshape(-1, 1)
    np.testing.assert_allclose(level, level.round(), atol=1e-3)
    assert level.round().min() == 0 and level.round().max() == 2**bits - 1
    assert (np.abs(values - dense.reshape(-1, 32)) <= step * 1.01).all()
    assert np.abs(values - dense.reshape(-1, 32)).mean() < 0.3 * step.mean()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_files_are_packed_in_float32(dtype: str, oracle: Any, tmp_path: Path) -> None:
    """Packing in half precision would find other scales."""
    _, folder, _ = oracle
    weights = mx.load(str(folder / "model.safetensors"))
    halves = {name: weight.astype(getattr(mx, dtype)) for name, weight in weights.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), halves)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    quant = QuantConfig(4, 64)
    model = load_folder(tmp_path, quant, "quantized")
    half = halves["model.layers.0.mlp.up_proj.weight"]
    expected = mlx_quantize(half.astype(mx.float32), quant)
    ours = model.layers[0].mlp.up_proj.packed()
    assert all(mx.array_equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not mx.array_equal(ours[1], mlx_quantize(half, quant)[1].astype(mx.float32))


@pytest.mark.parametrize("quant", EACH_FORMAT, ids=name_of)
def test_logits_equal_transformers_with_the_dequantised_weights(
    quant: QuantConfig, oracle: Any
) -> None:
    import torch

    hf, folder, weights = oracle
    tokens = random_tokens(2, 20)
    exact = torch_logits(hf, tokens)
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    rounded = {
        f"{path}.weight": torch.from_numpy(
            np.array(mlx_dequantize(mlx_quantize(weight, quant), quant))
        )
        for path, weight in weights.items()
    }
    hf.load_state_dict({**before, **rounded})
    try:
        theirs = torch_logits(hf, tokens)
    finally:
        hf.load_state_dict(before)
    assert np.abs(theirs - exact).max() > 1e-2  # quantising is visible at this tolerance
    for matmul in STRATEGIES:
        ours = our_logits(load_folder(folder, quant, matmul), tokens)
        assert np.abs(ours - theirs).max() <= 1e-4, matmul


# ---- the three strategies ----------------------------------------------------------------------


def frozen(kind: type, quant: QuantConfig | None, matmul: str, dtype: mx.Dtype = mx.float32) -> Any:
    """A matrix (192, 128), packed or dense."""
    dense = mx.random.normal((192, 128), key=mx.random.key(0))
    matrix = kind(128, 192) if kind is Linear else kind(192, 128)
    matrix.weight, matrix.dtype = dense.astype(dtype), dtype
    if quant is not None:
        for name, part in zip(("weight", "scales", "biases"), pack(dense, quant)):
            matrix[name] = part.astype(dtype) if part.dtype == mx.float32 else part
        matrix.quant, matrix.matmul = quant, matmul
    matrix.make_resident()
    return matrix


@pytest.mark.parametrize(
    ("gpu_route", "matmul"),
    [
        *(("none", matmul) for matmul in STRATEGIES),
        *(("metal-float32", matmul) for matmul in STRATEGIES),
        *((f"metal-{dtype}", "quantized") for dtype in ("float16", "bfloat16")),
        *((f"cuda-{dtype}", "dequantize") for dtype in ("float16", "bfloat16")),
    ],
    indirect=["gpu_route"],
)
@pytest.mark.parametrize("rows", [11, 50], ids=["few", "many"])  # 22 are multiplied packed
@pytest.mark.parametrize("quant", [None, *EACH_FORMAT], ids=lambda q: name_of(q) if q else "dense")
def test_products_and_their_gradients_are_those_of_the_dense_matrix(
    quant: QuantConfig | None, rows: int, matmul: str, gpu_route: Route
) -> None:
    dtype = gpu_route.dtype
    matrix = frozen(Linear, quant, matmul, dtype)
    x = mx.random.normal((2, rows, 128), key=mx.random.key(1)).astype(dtype)
    dy = mx.random.normal((2, rows, 192), key=mx.random.key(2)).astype(dtype)
    (y,), (dx,) = mx.vjp(lambda x: matrix.multiply(x), [x], [dy])
    assert y.dtype == dx.dtype == dtype
    dense = np.array(mx.random.normal((192, 128), key=mx.random.key(0)))
    if quant is not None:
        dense = np.array(mlx_dequantize(mlx_quantize(mx.array(dense), quant), quant))
    dense = dense.astype(np.float64)
    x, dy, y, dx = (np.array(array.astype(mx.float32)) for array in (x, dy, y, dx))
    tolerance = gpu_route.tolerance.product
    for found, wanted in ((y, x @ dense.T), (dx, dy @ dense)):
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("rows", [192, 4096], ids=["linear", "head"])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (1, 1, 128)], ids=str)
def test_one_row_has_the_product_and_the_gradient_of_many(
    shape: tuple[int, ...], rows: int
) -> None:
    matrix = Linear(128, rows)
    matrix.weight = mx.random.normal((rows, 128), key=mx.random.key(0))
    x = mx.random.normal(shape, key=mx.random.key(1))
    dy = mx.random.normal((*shape[:-1], rows), key=mx.random.key(2))
    (y,), (dx,) = mx.vjp(lambda x: matrix.multiply(x), [x], [dy])
    W = np.array(matrix.weight, np.float64)
    assert y.shape == dy.shape and dx.shape == x.shape
    np.testing.assert_allclose(np.array(y), np.array(x) @ W.T, atol=1e-4)
    np.testing.assert_allclose(np.array(dx), np.array(dy) @ W, atol=1e-3)


@pytest.mark.parametrize("matmul", STRATEGIES)
@pytest.mark.parametrize("quant", EACH_FORMAT, ids=name_of)
def test_products_keep_bfloat16(quant: QuantConfig, matmul: str) -> None:
    matrix = frozen(Linear, quant, matmul, mx.bfloat16)
    x = mx.random.normal((5, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    (y,), (dx,) = mx.vjp(lambda x: matrix.multiply(x), [x], [mx.ones((5, 192), mx.bfloat16)])
    assert y.dtype == dx.dtype == matrix.dense().dtype == mx.bfloat16
    reference = np.array(x.astype(mx.float32)) @ np.array(matrix.dense().astype(mx.float32)).T
    error = np.array(y.astype(mx.float32)) - reference
    assert error.std() < 0.03 * reference.std()  # MLX's quantised CPU kernel sums in bfloat16


@pytest.mark.parametrize("matmul", STRATEGIES)
@pytest.mark.parametrize("quant", EACH_FORMAT, ids=name_of)
def test_embedding_rows_are_those_of_the_dense_matrix(quant: QuantConfig, matmul: str) -> None:
    matrix = frozen(Embedding, quant, matmul)
    tokens = mx.array([[0, 191, 7], [7, 3, 3]])
    dense = mlx_dequantize(list(matrix.packed()), quant)
    assert mx.array_equal(matrix(tokens), dense[tokens])


def test_only_the_resident_strategy_keeps_a_dense_copy(oracle: Any) -> None:
    _, folder, _ = oracle
    for matmul in STRATEGIES:
        matrix = load_folder(folder, QuantConfig(4, 64), matmul).lm_head
        assert (matrix._resident is not None) == (matmul == "resident")
        assert set(matrix.parameters()) == {"weight", "scales", "biases"}  # what gets saved


def test_nothing_loaded_is_trainable(oracle: Any) -> None:
    for quant in (None, QuantConfig(4, 64)):
        assert "weight" not in str(load_folder(oracle[1], quant).trainable_parameters())


# ---- memory ------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
import mlx_qlora
import mlx.core as mx
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx.utils import tree_flatten

folder = sys.argv[1]
before = mx.get_active_memory()
mx.reset_peak_memory()
files = ModelFiles(path=Path(folder), hf_id=folder, revision=None, source=folder)
model = load_model(open_checkpoint(files), QuantConfig(4, 64), mx.bfloat16, "quantized")
print(json.dumps({
    "peak": mx.get_peak_memory() - before,
    "after": mx.get_active_memory() - before,
    "model": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
}))
"""


def write_sharded_llama(folder: Path) -> tuple[int, int]:
    """A bfloat16 Llama, a shard per layer; its (38 million) weights, and its largest tensor's."""
    D, F, V, layers = 512, 2048, 4096, 8
    shapes = {
        "input_layernorm": (D,), "post_attention_layernorm": (D,),
        **{f"self_attn.{x}_proj": (D, D) for x in "qkvo"},
        "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
    }  # fmt: skip
    shards = [
        {f"model.layers.{n}.{name}.weight": shape for name, shape in shapes.items()}
        for n in range(layers)
    ]
    shards.append(
        {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    )
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: mx.random.normal(s).astype(mx.bfloat16) for name, s in shard.items()}
        mx.save_safetensors(str(folder / file), arrays)
        index.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama", "hidden_size": D, "num_hidden_layers": layers,
        "num_attention_heads": 8, "intermediate_size": F, "vocab_size": V,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sizes = [int(np.prod(shape)) for shard in shards for shape in shard.values()]
    return sum(sizes), max(sizes)


def test_loading_peaks_at_the_packed_model_and_one_tensor(tmp_path: Path) -> None:
    weights, largest = write_sharded_llama(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    bound = 1.1 * (measured["model"] + largest * (2 + 4))
    assert measured["model"] < 0.6 * weights  # 4.5 bits a weight
    assert measured["after"] <= 1.02 * measured["model"]
    assert measured["peak"] <= bound
    assert bound < 0.5 * (2 * weights + measured["model"])  # what keeping the files' copy takes


def test_a_matrix_is_packed_by_blocks_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = (mx.random.normal((2100, 512), key=mx.random.key(0)) / 8).astype(mx.bfloat16)
    mx.eval(dense)
    packed, peaks = [], []
    for at_once in (1 << 23, 300 * 512):
        monkeypatch.setattr(quantize, "PACKED_AT_ONCE", at_once)
        matrix = Linear(512, 2100)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        matrix.pack(dense, QuantConfig())
        peaks.append(mx.get_peak_memory() - before)
        packed.append([np.array(part) for part in matrix.packed()])
    for parts in zip(*packed):
        assert np.array_equal(*parts)
    assert peaks[1] < dense.nbytes < peaks[0] / 2


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 7}, "bits must be one of (2, 3, 4, 5, 6, 8); got 7"),
        ({"bits": "4"}, "bits must be one of (2, 3, 4, 5, 6, 8); got '4'"),
        ({"group_size": 16}, "group_size must be one of (32, 64, 128); got 16"),
        ({"mode": "nf4"}, "mode must be one of affine, mxfp4, mxfp8, nvfp4; got 'nf4'"),
        ({"mode": "mxfp4"}, "mode mxfp4 needs bits=4 and group_size=32"),
        ({"mode": "mxfp8", "group_size": 32}, "mode mxfp8 needs bits=8 and group_size=32"),
        ({"mode": "nvfp4", "group_size": 32}, "mode nvfp4 needs bits=4 and group_size=16"),
    ],
)
def test_a_combination_without_a_kernel_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        QuantConfig(**wrong)


@pytest.mark.parametrize("quant", EVERY, ids=name_of)
def test_every_combination_that_is_accepted_has_a_kernel(quant: QuantConfig) -> None:
    """Forward and backward run: `accepted` means more than `the constructor returns`."""
    matrix = frozen(Linear, quant, "quantized")
    gradient = mx.grad(lambda x: matrix.multiply(x).sum())(mx.ones((3, 128)))
    assert mx.isfinite(gradient).all() and mx.abs(gradient).max() > 0


@pytest.mark.parametrize(("group_size", "columns"), [(64, 96), (128, 64)])
def test_a_group_size_that_does_not_divide_is_refused_by_name(
    group_size: int, columns: int, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1}
    folder = save_hf(make_hf_model(**sizes, intermediate_size=96), tmp_path)
    path = r"model.layers.0.mlp.down_proj" if columns == 96 else r"[\w.]+"
    message = f"^group_size {group_size} does not divide the {columns} columns of {path}; "
    with pytest.raises(ConfigError, match=f"{message}choose a smaller group_size$"):
        load_folder(folder, QuantConfig(4, group_size))
    assert load_folder(folder, QuantConfig(4, 32)).lm_head.quant == QuantConfig(4, 32)


@pytest.mark.parametrize("compiled", [False, True])
def test_dequantised_copies_do_not_outlive_their_use(compiled: bool) -> None:
    """Sixteen matrices in a row need no more than a few dense ones, compiled or not."""
    side, dense_bytes = 512, 512 * 512 * 4
    matrices = []
    for i in range(16):
        matrix = Linear(side, side)
        matrix.quant, matrix.matmul, matrix.dtype = QuantConfig(), "dequantize", mx.float32
        w = mx.random.normal((side, side), key=mx.random.key(i)) / side**0.5
        for name, part in zip(("weight", "scales", "biases"), pack(w, matrix.quant)):
            matrix[name] = part
        mx.eval(matrix.packed())
        matrices.append(matrix)

    def loss(x: mx.array) -> mx.array:
        for matrix in matrices:
            x = matrix(x)
        return x.sum()

    x = mx.ones((8, side))
    gradient = mx.compile(mx.grad(loss)) if compiled else mx.grad(loss)
    mx.eval(gradient(x))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x))
    assert mx.get_peak_memory() - before < 9 * dense_bytes
