"""The GGUF adapter, read back with the `gguf` package and applied as llama.cpp would."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from support.adapters import adapted as adapted_by
from support.gguf_names import gguf_name, permuted, unpermuted
from support.models import randomise_lora

from mlx_qlora.adapters.export import save_gguf_adapter
from mlx_qlora.errors import AdapterError, ConfigError
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers
from mlx_qlora.model.weights import load_model, open_checkpoint

HEADS = {"q_proj": 4, "k_proj": 2}  # of the tiny model
KINDS = {"float32": Type.F32, "float16": Type.F16}
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=8),
    "float alpha": LoraConfig(r=3, lora_alpha=0.7),
    "rslora": LoraConfig(r=5, lora_alpha=6.5, use_rslora=True),
    "patterns": LoraConfig(
        r=4, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 3.5, "down_proj": 64}
    ),
    "one layer": LoraConfig(r=4, target_modules=["k_proj", "o_proj"], layers_to_transform=[1]),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", use_rslora=True),
}


adapted = partial(adapted_by, scale=0.1)


def field(reader: gguf.GGUFReader, key: str) -> Any:
    entry = reader.get_field(key)
    return None if entry is None else entry.contents()


def read(file: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """(metadata, tensors by name)."""
    reader = gguf.GGUFReader(file)
    pairs = {key: field(reader, key) for key in reader.fields if not key.startswith("GGUF.")}
    return pairs, {tensor.name: tensor for tensor in reader.tensors}


def factors(file: Path, path: str, heads: dict[str, int]) -> tuple[np.ndarray, np.ndarray, float]:
    """A, B in Hugging Face's row order, and the scale with which llama.cpp adds B A to a linear.

    Of src/llama-adapter.h, with an adapter scale of 1: alpha / b->ne[0], or 1 where alpha is 0.
    """
    pairs, tensors = read(file)
    name, kind = gguf_name(f"{path}.weight"), path.rpartition(".")[2]
    A, B = (np.array(tensors[f"{name}.lora_{x}"].data) for x in "ab")
    alpha, rank = pairs["adapter.lora.alpha"], int(tensors[f"{name}.lora_b"].shape[0])
    if kind in heads:
        assert not np.array_equal(unpermuted(B, heads[kind]), B)
        B = unpermuted(B, heads[kind])
    return A, B, alpha / rank if alpha else 1.0


# ---- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_names_shapes_types_and_metadata_are_the_converter_s(
    base: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    model = adapted(base, CONFIGS[name])
    file = save_gguf_adapter(model, tmp_path / "fine.gguf", "org/Base-1B", dtype=dtype)
    assert file == tmp_path / "fine.gguf"
    pairs, tensors = read(file)
    first = lora_layers(model)[0][1]
    alpha = first.scale * len(first.factors()[0])
    assert pairs == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": "fine",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Base-1B",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Base-1B",
        "adapter.lora.alpha": float(np.float32(alpha)),
        "general.quantization_version": 2,
    }
    entry = gguf.GGUFReader(file).get_field("adapter.lora.alpha")
    assert entry is not None and entry.types == [gguf.GGUFValueType.FLOAT32]
    expected = {}
    for path, layer in lora_layers(model):
        A, B = layer.factors()
        linear = gguf_name(f"{path}.weight")
        # ggml counts dimensions from the fastest.
        expected |= {f"{linear}.lora_a": A.shape[::-1], f"{linear}.lora_b": B.shape[::-1]}
    assert list(tensors) == list(expected)  # a and b side by side, as the converter has them
    assert {n: tuple(map(int, t.shape)) for n, t in tensors.items()} == expected
    assert {t.tensor_type for t in tensors.values()} == {KINDS[dtype]}
    assert all(len(n) < 64 for n in tensors)  # ggml's limit


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_arrays_are_ours_bit_for_bit_and_llama_cpp_s_formula_gives_our_update(
    base: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    model = adapted(base, CONFIGS[name])
    file = save_gguf_adapter(model, tmp_path / "a.gguf", dtype=dtype)
    for path, layer in lora_layers(model):
        a, b, scale = factors(file, path, HEADS)
        A, B = (np.array(w) for w in layer.factors())
        if name != "patterns":  # one alpha for all: B takes up what a linear's own scale is
            np.testing.assert_array_equal(a, A.astype(dtype))
            np.testing.assert_array_equal(b, B.astype(dtype))
        ours = layer.scale * (B.astype(np.float64) @ A)
        error = np.abs(scale * (b.astype(np.float64) @ a) - ours).max() / np.abs(ours).max()
        assert error < {"float32": 3e-7, "float16": 1e-3}[dtype], path


def test_on_the_real_gguf_base_it_gives_our_merged_matrices(
    smollm2_files: ModelFiles, tmp_path: Path
) -> None:
    model = load_model(open_checkpoint(smollm2_files), None, mx.float32, "resident")
    config = LoraConfig(
        r=4,
        use_rslora=True,
        layers_to_transform=[0, 29],
        rank_pattern={"q_proj": 6},
        alpha_pattern={"k_proj": 5},
    )
    add_lora(model, config)
    randomise_lora(model, scale=0.1)
    file = save_gguf_adapter(model, tmp_path / "a.gguf", dtype="float32")
    heads = {"q_proj": 9, "k_proj": 3}
    base = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_files.path).tensors}
    for path, layer in lora_layers(model):
        stored = base[gguf_name(f"{path}.weight")]
        kind = path.rpartition(".")[2]
        W = gguf.quants.dequantize(stored.data, stored.tensor_type).astype(np.float64)
        A, B, scale = factors(file, path, heads)
        change = scale * (B.astype(np.float64) @ A)
        # llama.cpp adds in its own order of rows; only the sum goes back into ours.
        W = W + (permuted(change, heads[kind]) if kind in heads else change)
        W = unpermuted(W, heads[kind]) if kind in heads else W
        assert np.abs(W - np.array(layer.merged())).max() < 2e-6, path
        assert np.abs(change).max() > 0.1


def test_the_same_adapter_is_the_same_file(base: Path, tmp_path: Path) -> None:
    model = adapted(base, CONFIGS["rslora"])
    one = save_gguf_adapter(model, tmp_path / "a.gguf", "org/base").read_bytes()
    assert save_gguf_adapter(model, tmp_path / "a.gguf", "org/base").read_bytes() == one
    assert sorted(os.listdir(tmp_path)) == ["Modelfile", "a.gguf"]


@pytest.mark.parametrize("base_name", [None, "/models/tiny-llama"])
def test_a_base_without_a_repository_has_no_url(
    base: Path, tmp_path: Path, base_name: str | None
) -> None:
    model = adapted(base, CONFIGS["plain"])
    model.source = None
    pairs = read(save_gguf_adapter(model, tmp_path / "a.gguf", base_name))[0]
    assert not [key for key in pairs if "url" in key or "organization" in key]
    assert pairs.get("general.base_model.0.name") == (base_name and "tiny-llama")


# ---- refused -----------------------------------------------------------------------------------


def test_dora_is_refused_with_the_remedy(base: Path, tmp_path: Path) -> None:
    model = adapted(base, replace(CONFIGS["plain"], use_dora=True))
    with pytest.raises(AdapterError, match=r"llama\.cpp does not support DoRA; merge"):
        save_gguf_adapter(model, tmp_path / "a.gguf")
    assert os.listdir(tmp_path) == []


def test_an_unknown_dtype_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of float16, float32; got 'q8_0'"):
        save_gguf_adapter(adapted(base, CONFIGS["plain"]), tmp_path / "a.gguf", dtype="q8_0")


@pytest.mark.parametrize("value", [1e5, np.nan, -np.inf])
def test_a_weight_that_float16_does_not_hold_is_refused(
    base: Path, tmp_path: Path, value: float
) -> None:
    model = adapted(base, CONFIGS["plain"])
    layer = lora_layers(model)[8][1]
    layer.lora_B.weight[3, 1] = value
    with pytest.raises(AdapterError, match=r"blk\.1\.attn_k\.weight\.lora_b .* dtype='float32'"):
        save_gguf_adapter(model, tmp_path / "a.gguf")
    assert os.listdir(tmp_path) == []
    if np.isfinite(value):
        assert save_gguf_adapter(model, tmp_path / "a.gguf", dtype="float32").exists()


def test_another_ending_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"must end in \.gguf"):
        save_gguf_adapter(adapted(base, CONFIGS["plain"]), tmp_path / "a")


@pytest.mark.parametrize("kind", ["model", "no GGUF file", "empty", "folder"])
def test_nothing_but_an_adapter_is_overwritten(base: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.gguf"
    if kind == "model":
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_type("model")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(b"" if kind == "empty" else b"my own notes" * 99)
    before = None if kind == "folder" else file.read_bytes()
    with pytest.raises(ConfigError, match=r"a\.gguf is not known to be from mlx-qlora"):
        save_gguf_adapter(adapted(base, CONFIGS["plain"]), file)
    assert os.listdir(tmp_path) == ["a.gguf"]
    assert before is None or file.read_bytes() == before


def test_the_package_is_missed_with_the_remedy(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"pip install 'mlx-qlora\[gguf\]'"):
        save_gguf_adapter(adapted(base, CONFIGS["plain"]), tmp_path / "a.gguf")
    assert os.listdir(tmp_path) == []


# ---- Ollama ------------------------------------------------------------------------------------


def instructions(folder: Path) -> list[str]:
    lines = (folder / "Modelfile").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_modelfile_begins_from_the_gguf_that_was_trained_on(base: Path, tmp_path: Path) -> None:
    model = adapted(base, CONFIGS["plain"])
    path = tmp_path / "my base.gguf"
    model.source = ModelFiles(path=path, hf_id="org/base", revision=None, source=str(path))
    save_gguf_adapter(model, tmp_path / "out" / "a.gguf")
    assert instructions(tmp_path / "out") == [f"FROM {path}", "ADAPTER ./a.gguf"]
    assert "A LoRA adapter of org/base." in (tmp_path / "out" / "Modelfile").read_text()
    save_gguf_adapter(model, tmp_path / "b" / "a.gguf", ollama_base="smollm2:135m")
    assert instructions(tmp_path / "b") == ["FROM smollm2:135m", "ADAPTER ./a.gguf"]


def test_an_unknown_gguf_base_is_said_to_be_unknown(base: Path, tmp_path: Path) -> None:
    save_gguf_adapter(adapted(base, CONFIGS["plain"]), tmp_path / "a.gguf")
    assert instructions(tmp_path) == ["FROM ./base.gguf", "ADAPTER ./a.gguf"]
    assert "Replace what FROM says" in (tmp_path / "Modelfile").read_text()


def test_a_modelfile_that_the_user_completed_is_kept(base: Path, tmp_path: Path) -> None:
    model = adapted(base, CONFIGS["plain"])
    file = save_gguf_adapter(model, tmp_path / "a.gguf")
    own = "FROM llama3.2:1b\nADAPTER ./a.gguf\nPARAMETER temperature 0\n"
    (tmp_path / "Modelfile").write_text(own)
    randomise_lora(model, seed=2)
    before = file.read_bytes()
    save_gguf_adapter(model, file)
    assert file.read_bytes() != before
    assert (tmp_path / "Modelfile").read_text() == own


@pytest.mark.parametrize(
    ("there", "ollama_base"),
    [("FROM x\nADAPTER ./b.gguf\n", None), ("FROM x\nADAPTER ./a.gguf\n", "y"), ("", None)],
)
def test_a_modelfile_that_says_something_else_is_refused_and_left_alone(
    base: Path, tmp_path: Path, there: str, ollama_base: str | None
) -> None:
    (tmp_path / "Modelfile").write_text(there)
    with pytest.raises(AdapterError, match=r"Modelfile exists, without .*ADAPTER \./a\.gguf"):
        model = adapted(base, CONFIGS["plain"])
        save_gguf_adapter(model, tmp_path / "a.gguf", ollama_base=ollama_base)
    assert (tmp_path / "Modelfile").read_text() == there
    assert os.listdir(tmp_path) == ["Modelfile"]
