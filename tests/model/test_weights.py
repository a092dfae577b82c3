"""Folders of safetensors: what MLX's own tools write, and everything that can be wrong."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.models import (
    LLAMA3_ROPE,
    load_folder,
    make_hf_model,
    our_logits,
    quantise_with_mlx_lm,
    random_tokens,
)
from support.models import save_hf as save

from mlx_qlora.errors import UserError, WeightsError
from mlx_qlora.model.quantize import QuantConfig

# ---- folders that mlx-lm has quantised ---------------------------------------------------------

WIDE = {"hidden_size": 128, "intermediate_size": 256, "rope_parameters": LLAMA3_ROPE}


def change_config(folder: Path, **changes: Any) -> None:
    """Changes entries of a config.json; `...` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def save_wide(folder: Path, **sizes: Any) -> Path:
    """A folder in v4's RoPE spelling: mlx-lm passes over v5's without a word."""
    save(make_hf_model(**WIDE, **sizes), folder)
    scaling = dict(LLAMA3_ROPE)
    theta = scaling.pop("rope_theta")
    change_config(folder, rope_parameters=..., rope_theta=theta, rope_scaling=scaling)
    return folder


def mixed_bits(path: str, _: Any) -> bool | dict[str, Any]:
    """Overrides as mlx-lm's mixed recipes make them, and one matrix left dense."""
    if path.endswith("v_proj"):
        return {"bits": 6, "group_size": 32}
    if path.endswith("down_proj"):
        return {"bits": 8, "group_size": 32, "mode": "mxfp8"}
    return not path.endswith("layers.1.mlp.gate_proj")


def affine(bits: int, group_size: int, predicate: Any = None) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "quant_predicate": predicate}


MLX_FORMATS: dict[str, dict[str, Any]] = {
    "4 bits": affine(4, 64),
    "2 bits": affine(2, 128),
    "3 bits": affine(3, 64),
    "5 bits": affine(5, 64),
    "6 bits": affine(6, 64),
    "8 bits, groups of 32": affine(8, 32),
    "mixed": affine(4, 64, mixed_bits),
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide") / "model")


@pytest.mark.parametrize("name", MLX_FORMATS)
def test_logits_of_a_folder_that_mlx_lm_quantised_equal_mlx_lms(
    name: str, wide: Path, tmp_path: Path
) -> None:
    theirs = quantise_with_mlx_lm(wide, tmp_path, MLX_FORMATS[name])
    tokens = random_tokens(2, 20)
    expected = np.array(theirs(mx.array(tokens)))
    assert np.abs(expected - our_logits(load_folder(wide), tokens)).max() > 1e-2
    for matmul in ("resident", "dequantize", "quantized"):
        ours = load_folder(tmp_path, None, matmul)
        assert np.abs(our_logits(ours, tokens) - expected).max() <= 1e-4, matmul


def test_overrides_and_dense_matrices_are_read_as_written(wide: Path, tmp_path: Path) -> None:
    quantise_with_mlx_lm(wide, tmp_path, MLX_FORMATS["mixed"])
    layer = load_folder(tmp_path).layers[1]
    assert layer.self_attn.q_proj.quant == QuantConfig(4, 64)
    assert layer.self_attn.v_proj.quant == QuantConfig(6, 32)
    assert layer.mlp.down_proj.quant == QuantConfig(8, 32, "mxfp8")
    assert layer.mlp.gate_proj.quant is None
    assert layer.self_attn.v_proj.shape == (64, 128)


def test_quantise_packs_what_the_file_left_dense_and_nothing_else(
    wide: Path, tmp_path: Path
) -> None:
    quantise_with_mlx_lm(wide, tmp_path, MLX_FORMATS["mixed"])
    kept, asked = load_folder(tmp_path), load_folder(tmp_path, QuantConfig(3, 32))
    assert asked.layers[1].mlp.gate_proj.quant == QuantConfig(3, 32)
    assert asked.layers[1].mlp.up_proj.quant == QuantConfig(4, 64)
    assert mx.array_equal(asked.layers[1].mlp.up_proj.weight, kept.layers[1].mlp.up_proj.weight)


def test_an_mlx_folder_with_tied_weights_and_biases_gives_mlx_lms_logits(tmp_path: Path) -> None:
    sizes = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    source = save_wide(tmp_path / "source", **sizes)
    theirs = quantise_with_mlx_lm(source, tmp_path / "mlx", MLX_FORMATS["4 bits"])
    tokens = random_tokens(2, 20)
    expected = np.array(theirs(mx.array(tokens)))
    for matmul in ("resident", "quantized"):
        ours = our_logits(load_folder(tmp_path / "mlx", None, matmul), tokens)
        assert np.abs(ours - expected).max() <= 1e-4


# ---- files that hold more than they must -------------------------------------------------------


def weights_of(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


def write_weights(folder: Path, weights: dict[str, mx.array]) -> None:
    mx.eval(list(weights.values()))  # before the file that they are read from changes
    mx.save_safetensors(str(folder / "new.safetensors"), weights)
    (folder / "new.safetensors").rename(folder / "model.safetensors")


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path: Path) -> None:
    folder = save(make_hf_model(tie_word_embeddings=True), tmp_path)
    tokens = random_tokens(1, 9)
    before = our_logits(load_folder(folder), tokens)
    weights = weights_of(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_weights(folder, weights)
    np.testing.assert_array_equal(our_logits(load_folder(folder), tokens), before)


def test_an_old_checkpoints_rotary_buffers_are_passed_over(folder: Path) -> None:
    tokens = random_tokens(1, 9)
    before = our_logits(load_folder(folder), tokens)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((8,))}
    write_weights(folder, weights_of(folder) | buffer)
    np.testing.assert_array_equal(our_logits(load_folder(folder), tokens), before)


# ---- what is wrong with the weights ------------------------------------------------------------


@pytest.fixture
def folder(hf_tiny: tuple[Any, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf_tiny[1], tmp_path / "model"))


def refusal(folder: Path, quantize: QuantConfig | None = None) -> str:
    """The message of the one error that loading raises."""
    with pytest.raises(WeightsError) as raised:
        load_folder(folder, quantize)
    assert type(raised.value) is WeightsError and isinstance(raised.value, UserError)
    return str(raised.value)


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -4000, -1])
def test_a_truncated_file_is_refused(kept: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    message = refusal(folder)
    assert str(path) in message and "fetch or write it again" in message
    if kept < 0:
        assert "file not fully covered" in message


GARBAGE = {
    "a length beyond the file": struct.pack("<Q", 10**15) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe{]" + bytes(64),
    "a list": struct.pack("<Q", 2) + b"[]" + bytes(64),
    "an empty entry": struct.pack("<Q", 8) + b'{"a":{}}' + bytes(64),
    "an entry that is no object": struct.pack("<Q", 7) + b'{"a":1}' + bytes(64),
    "a page of HTML": b"<!DOCTYPE html><html><body>404</body></html>" * 40,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=list(GARBAGE))
def test_a_file_with_a_garbage_header_is_refused(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    message = refusal(folder)
    assert re.search(r"model\.safetensors is damaged .*; fetch or write it again$", message)


def edited_header(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


@pytest.mark.parametrize("lost", ["shape", "dtype", "data_offsets"])
def test_a_header_entry_without_a_field_is_refused(lost: str, folder: Path) -> None:
    edited_header(folder, lambda header: header["lm_head.weight"].pop(lost))
    message = refusal(folder)
    assert re.search(r"model\.safetensors is damaged .*; fetch or write it again$", message)


def test_offsets_that_do_not_fit_the_shape_are_refused(folder: Path) -> None:
    """MLX would read the next tensor's bytes, or crash."""

    def halve(header: dict[str, Any]) -> None:
        header["lm_head.weight"]["data_offsets"][1] -= 4

    edited_header(folder, halve)
    message = refusal(folder)
    assert "model.safetensors is damaged" in message and "invalid shape" in message


@pytest.mark.parametrize(("dtype", "bytes_each"), [("F64", 8), ("F8_E4M3", 1)])
def test_floats_that_we_do_not_read_are_refused(dtype: str, bytes_each: int, folder: Path) -> None:
    def retype(header: dict[str, Any]) -> None:
        entry = header["lm_head.weight"]
        start, end = entry["data_offsets"]
        more = 320 * 64 * bytes_each - (end - start)
        for other in header.values():
            if other.get("data_offsets", [0])[0] >= end:
                other["data_offsets"] = [at + more for at in other["data_offsets"]]
        entry.update(dtype=dtype, data_offsets=[start, end + more])

    edited_header(folder, retype)
    path = folder / "model.safetensors"
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    ends = [entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry]
    os.truncate(path, 8 + length + max(ends))
    message = refusal(folder)
    assert "model.safetensors" in message and dtype in message


def test_shards_that_the_index_names_and_that_are_missing_are_listed(
    hf_tiny: tuple[Any, Path], tmp_path: Path
) -> None:
    save(hf_tiny[0], tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    shards[2].unlink()
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} is not a complete model; missing: ")
    assert message.count(".safetensors") == 2
    assert shards[1].name in message and shards[2].name in message


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(text: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(folder).startswith(f"{index} ")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert str(folder) in message and ".safetensors" in message


def test_all_problems_of_all_shards_are_reported_at_once(folder: Path) -> None:
    weights = weights_of(folder)
    del weights["model.norm.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = mx.zeros((160, 64))
    weights["lm_head.weight"] = mx.zeros((320, 63))
    weights["model.layers.0.self_attn.k_proj.bias"] = mx.zeros((32,))
    weights["model.layers.0.mlp.down_proj.weight"] = mx.zeros((64, 160), mx.int8)
    write_weights(folder, weights)
    head, *problems = refusal(folder).splitlines()
    assert head == f"{folder} does not hold this model:"
    where = "in model.safetensors"
    assert sorted(problem.strip() for problem in problems) == [
        f"lm_head.weight {where} has shape (320, 63); config.json asks for (320, 64)",
        f"model.layers.0.mlp.down_proj.weight {where} has dtype I8; supported: F32, F16, BF16",
        f"model.layers.0.self_attn.k_proj.bias {where} belongs to no module of this architecture",
        f"model.layers.2.mlp.up_proj.weight {where} belongs to no module of this architecture",
        "model.norm.weight is missing",
    ]


def test_a_wrong_shape_names_the_shard_it_lies_in(
    hf_tiny: tuple[Any, Path], tmp_path: Path
) -> None:
    save(hf_tiny[0], tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.self_attn.v_proj.weight"
    shard = tmp_path / index[name]
    weights = dict(mx.load(str(shard)))
    mx.eval(list(weights.values()))
    mx.save_safetensors(str(shard), weights | {name: mx.zeros((64, 64))})
    assert f"{name} in {shard.name} has shape (64, 64); config.json asks for (32, 64)" in refusal(
        tmp_path
    )


def test_a_quantised_matrix_of_the_wrong_shape_is_refused(wide: Path, tmp_path: Path) -> None:
    quantise_with_mlx_lm(wide, tmp_path, MLX_FORMATS["3 bits"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"]["bits"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(tmp_path)
    assert "lm_head.weight in model.safetensors has shape (320, 12)" in message
    assert "config.json asks for (320, 16)" in message


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_quantised_matrix_without_one_of_its_parts_is_refused(
    part: str, wide: Path, tmp_path: Path
) -> None:
    quantise_with_mlx_lm(wide, tmp_path, MLX_FORMATS["4 bits"])
    weights = weights_of(tmp_path)
    del weights[f"lm_head.{part}"]
    write_weights(tmp_path, weights)
    assert "lm_head." in refusal(tmp_path)


def test_packed_words_of_the_wrong_dtype_are_refused(wide: Path, tmp_path: Path) -> None:
    quantise_with_mlx_lm(wide, tmp_path, MLX_FORMATS["4 bits"])
    weights = weights_of(tmp_path)
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(mx.float32)
    write_weights(tmp_path, weights)
    assert "lm_head.weight in model.safetensors has dtype F32" in refusal(tmp_path)


# ---- what is wrong with config.json ------------------------------------------------------------


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mamba"}, "model_type is 'mamba', layers without attention; supported: "),
    ({"model_type": ...}, "model_type is None, an unknown architecture; supported"),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures is ['LlamaForSequenceClassification']; supported: ['LlamaForCausalLM']",
    ),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu', 'swish', 'gelu_pytorch"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1; supported: 0"),
    ({"hidden_size": ...}, "hidden_size must be a positive integer; got None"),
    ({"vocab_size": "320"}, "vocab_size must be a positive integer; got '320'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer; got 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads (4) must be a multiple of"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer; got '2'"),
    ({"num_key_value_heads": -2}, "num_key_value_heads must be a positive integer; got -2"),
    ({"head_dim": 16.0}, "head_dim must be a positive integer; got 16.0"),
    ({"head_dim": 15}, "head_dim must be even for RoPE; got 15"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number; got '1e-5'"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number; got -1.0"),
    (
        {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}},
        "rope_type 'axial' is not supported; supported: default, linear, dynamic",
    ),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "weights quantised by 'bitsandbytes' cannot be read; use the original 16-bit repository",
    ),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "weights quantised by 'gptq' cannot be read; use the original 16-bit repository",
    ),
]


@pytest.mark.parametrize(("changes", "named"), CONFIGS, ids=lambda x: str(x)[:40])
def test_a_config_that_we_would_compute_differently_is_refused(
    changes: dict[str, Any], named: str, folder: Path
) -> None:
    change_config(folder, **changes)
    message = refusal(folder)
    assert "config.json" in message and named in message, message


def test_all_problems_of_a_config_are_reported_at_once(folder: Path) -> None:
    change_config(folder, hidden_act="gelu", mlp_bias=1, vocab_size=None)
    head, *problems = refusal(folder).splitlines()
    assert "config.json" in head
    assert [problem.split()[0] for problem in problems] == [
        "vocab_size",
        "hidden_act",
        "mlp_bias",
    ]


@pytest.mark.parametrize("text", ["not JSON", '{"model_type": "llama"', "[1]", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(text: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(text.encode("latin-1"))
    assert refusal(folder).startswith(f"{path} cannot be read (")


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder / 'config.json'} cannot be read (No such file")


@pytest.mark.parametrize(
    "entry",
    [
        {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 64, "mode": "nf4"},
        {"bits": "4", "group_size": 64},
        {"bits": 4, "group_size": 64, "zero_point": 1},
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 4, "desc_act": "yes"}},
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 7, "group_size": 64}},
    ],
)
def test_a_quantization_entry_that_says_too_little_is_refused(
    entry: Any, wide: Path, tmp_path: Path
) -> None:
    quantise_with_mlx_lm(wide, tmp_path, MLX_FORMATS["4 bits"])
    change_config(tmp_path, quantization=entry, quantization_config=...)
    message = refusal(tmp_path)
    assert "config.json: `quantization` does not say how " in message
