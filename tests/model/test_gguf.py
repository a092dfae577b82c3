"""GGUF files, written here with the `gguf` package or real, against transformers."""

import re
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from support.families import make_family
from support.gguf_names import gguf_name, permuted, unpermuted
from support.models import (
    load_folder,
    make_hf_model,
    our_logits,
    random_tokens,
    randomise_lora,
    torch_logits,
)

from mlx_qlora.adapters.export import save_gguf_adapter
from mlx_qlora.adapters.merge import save_merged
from mlx_qlora.errors import ConfigError, WeightsError
from mlx_qlora.model.gguf import read_gguf, source_repository
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.model.quantize import PARTS, FrozenMatrix, QuantConfig
from mlx_qlora.model.stored import StoredTensor

# GGUF blocks have 32 weights, so the matrices' columns divide by it.
ROPE_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama_cpp_rope_factors(head_dim: int, rope: dict[str, Any]) -> np.ndarray:
    """`rope_freqs.weight`, as llama.cpp's converter derives it from a Llama 3.1 config."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        old = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_gguf(
    path: Path,
    model: Any,
    kinds: dict[str, Type] | Type = Type.F32,
    arch: str = "llama",
    metadata: dict[str, int | float] | None = None,
    rope_factors: bool = False,
    extra: Iterable[tuple[str, np.ndarray]] = (),
    repository: str | None = None,
) -> Path:
    """Writes a transformers model as llama.cpp's converter would.

    The transformers model is given the values that the file then holds, dequantised.

    Args:
        kinds: the type of all matrices, or of those whose name contains a key (the rest F32).
        metadata: more `llama.` entries.
        rope_factors: whether to write Llama 3.1's `rope_freqs.weight`.
        extra: further tensors.
        repository: where the model came from.
    """
    import torch

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.head_dim != config.hidden_size // heads:
        writer.add_key_length(config.head_dim)
    for key, value in (metadata or {}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"llama.{key}", value
        )
    if repository:
        writer.add_source_repo_url(f"https://huggingface.co/{repository}")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_custom_alignment(64)
    if rope_factors:
        writer.add_tensor(
            "rope_freqs.weight", llama_cpp_rope_factors(config.head_dim, config.rope_parameters)
        )
    state = model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight, turned = tensor.numpy(), 0
        if "q_proj" in name or "k_proj" in name:
            turned = heads if "q_proj" in name else kv_heads
            weight = permuted(weight, turned)
        kind = Type.F32
        if weight.ndim == 2:
            kind = (
                kinds
                if isinstance(kinds, Type)
                else next((kinds[key] for key in kinds if key in name), Type.F32)
            )
        if kind in (Type.F32, Type.F16):
            stored = weight.astype({Type.F32: np.float32, Type.F16: np.float16}[kind])
            writer.add_tensor(gguf_name(name), stored)
            held = stored.astype(np.float32)
        else:
            stored = gguf.quants.quantize(weight, kind)
            writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
            held = gguf.quants.dequantize(stored, kind)
        tensor.copy_(torch.from_numpy(unpermuted(held, turned) if turned else held))
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equals_transformers(path: Path, oracle: Any, T: int = 37) -> None:
    tokens = random_tokens(2, T)
    theirs = torch_logits(oracle, tokens)
    assert theirs.std() > 0.3
    for matmul in ("resident", "quantized"):
        ours = our_logits(load_folder(path, None, matmul), tokens)
        assert np.abs(ours - theirs).max() <= 1e-4, matmul


# ---- logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_transformers_with_the_dequantised_weights(
    kind: Type, tied: bool, tmp_path: Path
) -> None:
    oracle = make_hf_model(tie_word_embeddings=tied)
    exact = torch_logits(oracle, random_tokens(2, 37))
    path = write_gguf(tmp_path / "tiny.gguf", oracle, kind)
    if kind != Type.F32:  # the oracle has taken the file's values
        assert np.abs(torch_logits(oracle, random_tokens(2, 37)) - exact).max() > 1e-4
    assert_equals_transformers(path, oracle)


def test_types_may_differ_from_tensor_to_tensor(tmp_path: Path) -> None:
    oracle = make_hf_model()
    kinds = {"embed": Type.Q8_0, "lm_head": Type.F16, "q_proj": Type.Q4_1, "down": Type.Q4_0}
    path = write_gguf(tmp_path / "tiny.gguf", oracle, kinds)
    assert_equals_transformers(path, oracle)
    model = load_folder(path)
    assert model.model.embed_tokens.quant == QuantConfig(8, 32)
    assert model.layers[0].self_attn.q_proj.quant == QuantConfig(4, 32)
    assert model.layers[0].self_attn.k_proj.quant is None


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("kind", [Type.F16, Type.Q4_0])
def test_q_and_k_are_turned_back_head_by_head(kv_heads: int, kind: Type, tmp_path: Path) -> None:
    oracle = make_hf_model(num_key_value_heads=kv_heads, head_dim=24)
    assert_equals_transformers(write_gguf(tmp_path / "tiny.gguf", oracle, kind), oracle)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_31s_rope_factors_are_read(factor: float, tied: bool, tmp_path: Path) -> None:
    rope = {**ROPE_31, "factor": factor}
    oracle = make_hf_model(rope_parameters=rope, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "with.gguf", oracle, Type.F16, rope_factors=True)
    assert_equals_transformers(path, oracle, T=300)
    assert load_folder(path).config.rope.factor == factor

    without = write_gguf(tmp_path / "without.gguf", oracle, Type.F16)
    tokens = random_tokens(2, 300)
    difference = our_logits(load_folder(without), tokens) - torch_logits(oracle, tokens)
    assert np.abs(difference).max() > 1e-3  # the comparison above can see them


def test_the_norm_epsilon_and_theta_are_read(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 123456.0}
    oracle = make_hf_model(rope_parameters=rope, rms_norm_eps=1e-3)
    assert_equals_transformers(write_gguf(tmp_path / "tiny.gguf", oracle), oracle)


def test_dense_gguf_tensors_can_be_quantised_on_load(tmp_path: Path) -> None:
    oracle = make_hf_model()
    path = write_gguf(tmp_path / "tiny.gguf", oracle, {"mlp": Type.Q8_0})
    model = load_folder(path, QuantConfig(4, 64))
    assert model.layers[0].mlp.down_proj.quant == QuantConfig(8, 32)
    q_proj = model.layers[0].self_attn.q_proj
    weight = mx.array(oracle.state_dict()["model.layers.0.self_attn.q_proj.weight"].numpy())
    expected = mx.quantize(weight, group_size=64, bits=4)
    assert all(mx.array_equal(a, b) for a, b in zip(q_proj.packed(), expected, strict=True))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_what_mlx_can_pack_has_the_bits_that_mlx_reads(kind: Type, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_hf_model(), kind)
    theirs: Any = mx.load(str(path))
    for name, matrix in load_folder(path).named_modules():
        if not isinstance(matrix, FrozenMatrix) or name.endswith(("q_proj", "k_proj")):
            continue  # whose rows are permuted
        assert matrix.quant == QuantConfig(8 if kind == Type.Q8_0 else 4, 32)
        stem = gguf_name(f"{name}.weight").removesuffix(".weight")
        for part, ours in zip(PARTS, matrix.packed(), strict=True):
            assert mx.array_equal(ours, theirs[f"{stem}.{part}"].astype(ours.dtype)), (name, part)


@pytest.mark.parametrize("kind", [Type.F16, Type.Q4_0, Type.Q8_0])
def test_a_file_is_opened_without_its_matrices(
    kind: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_hf_model(), kind)
    read, sizes = StoredTensor.read, list[int]()

    def counted(tensor: StoredTensor, rows: np.ndarray | None = None) -> mx.array:
        sizes.append(tensor.nbytes)
        return read(tensor, rows)

    monkeypatch.setattr(StoredTensor, "read", counted)
    config, tensors, _ = read_gguf(path)
    assert sizes and max(sizes) == 4 * config["hidden_size"], "more than norms was read"
    shape = tensors["model.embed_tokens.weight"].shape
    assert shape == (config["vocab_size"], config["hidden_size"])


# ---- K-quants and other types ------------------------------------------------------------------

# Where a block of a type has its 16-bit factors: (first byte, one after the last).
FACTORS = {
    **{Type.Q4_K: (0, 4), Type.Q5_K: (0, 4), Type.Q6_K: (208, 210), Type.Q2_K: (80, 84)},
    **{Type.Q3_K: (108, 110), Type.Q5_0: (0, 2), Type.Q5_1: (0, 4), Type.Q8_0: (0, 2)},
    **{Type.IQ4_NL: (0, 2), Type.IQ4_XS: (0, 2), Type.IQ3_S: (0, 2), Type.IQ2_XXS: (0, 2)},
}
EXACT = {Type.Q4_K, Type.Q5_K, Type.Q5_0, Type.Q5_1, Type.Q8_0}  # whose groups are MLX's


def blocks(shape: tuple[int, int], kind: Type, seed: int) -> np.ndarray:
    """Random blocks of a type, as bytes (rows, bytes of a row): nothing here quantises to all."""
    n_weights, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    made = random.integers(0, 256, (shape[0], shape[1] // n_weights, n_bytes), np.uint8)
    first, last = FACTORS[kind]
    sizes = random.uniform(2e-5, 6e-5, (*made.shape[:2], (last - first) // 2)).astype(np.float16)
    made[..., first:last] = sizes.view(np.uint8)
    # Of one size, whatever a type's whole numbers reach to.
    factor = np.float16(0.06 / gguf.quants.dequantize(made.reshape(shape[0], -1), kind).std())
    made[..., first:last] = (sizes * factor).view(np.uint8)
    return made.reshape(shape[0], -1)


def write_blocks(path: Path, model: Any, kind: Type) -> Path:
    """As `write_gguf`, with random blocks in all matrices, whose values the model is given."""
    import torch

    config, seed = model.config, 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = model.state_dict()
    packed = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            packed[name] = blocks(tuple(tensor.shape), kind, seed := seed + 1)
            held = gguf.quants.dequantize(packed[name], kind)
            turned = heads.get(name.split(".")[-2])
            tensor.copy_(torch.from_numpy(unpermuted(held, turned) if turned else held))
    write = gguf.GGUFWriter.add_tensor

    def add(writer: Any, name: str, array: np.ndarray, **how: Any) -> None:
        stored = next((x for n, x in packed.items() if gguf_name(n) == name), None)
        if stored is None:
            write(writer, name, array, **how)
        else:
            write(writer, name, stored, raw_dtype=kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        return write_gguf(path, model)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # a K-quant has 256 weights


@pytest.mark.parametrize("kind", FACTORS)
def test_every_type_is_read_dense_as_the_gguf_package_reads_it(kind: Type, tmp_path: Path) -> None:
    oracle = make_hf_model(**WIDE)
    path = write_blocks(tmp_path / "k.gguf", oracle, kind)
    theirs = torch_logits(oracle, random_tokens(2, 37))
    ours = our_logits(load_folder(path), random_tokens(2, 37))
    assert np.abs(ours - theirs).max() < 1e-4 * max(theirs.std(), 1)


@pytest.mark.parametrize("kind", FACTORS)
def test_every_type_is_packed_while_it_is_loaded(kind: Type, tmp_path: Path) -> None:
    """Exactly where its groups are MLX's, else with a small part of the values as error."""
    oracle = make_hf_model(**WIDE)
    path = write_blocks(tmp_path / "k.gguf", oracle, kind)
    model = load_folder(path, QuantConfig(4, 64))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        matrix = dict(model.layers[1].named_modules())[name]
        exact = oracle.state_dict()[f"model.layers.1.{name}.weight"].numpy()
        assert matrix.quant is not None and matrix.quant.group_size == 32
        gap = np.linalg.norm(np.array(matrix.dense()) - exact) / np.linalg.norm(exact)
        assert gap < (1e-6 if kind in EXACT else 0.06), gap


def test_what_is_packed_is_no_original_to_merge_into(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "k.gguf", make_hf_model(), Type.Q5_0)
    model = add_lora(load_folder(path, QuantConfig(4, 32)), LoraConfig(r=1))
    tokenizer: Any = None  # nobody gets as far
    with pytest.raises(ConfigError, match="is quantised, too"):
        save_merged(model, tokenizer, tmp_path / "out", base=path)


def test_a_model_in_parts_is_the_whole_model(tmp_path: Path) -> None:
    oracle = make_hf_model(**WIDE)
    whole = write_blocks(tmp_path / "whole.gguf", oracle, Type.Q4_K)
    logits = our_logits(load_folder(whole), random_tokens(2, 9))
    reader, names = gguf.GGUFReader(whole), ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for part, name in enumerate(names):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_uint16("split.count", 2)
        writer.add_uint16("split.no", part)
        writer.add_custom_alignment(64)
        for key, field in reader.fields.items() if part == 0 else ():
            if not key.startswith("GGUF.") and not key.endswith(("architecture", "alignment")):
                kind = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], kind)
        for tensor in reader.tensors[part::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert np.array_equal(our_logits(load_folder(tmp_path / names[0]), random_tokens(2, 9)), logits)
    (tmp_path / names[1]).unlink()
    assert "2 parts; fetch the others: m-00002-of-00002.gguf" in refusal(tmp_path / names[0])


# ---- families ----------------------------------------------------------------------------------

ARCHITECTURES = {
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "seed_oss": gguf.MODEL_ARCH.SEED_OSS,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "phi3-long": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "glm4": gguf.MODEL_ARCH.GLM4,
}


def write_family_gguf(path: Path, model: Any, arch: Any) -> Path:
    """Writes a family's model as llama.cpp's converter does, in float32."""
    config, name = model.config, gguf.MODEL_ARCH_NAMES[arch]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, name)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if share := rope.get("partial_rotary_factor"):
        writer.add_rope_dimension_count(int(share * head_dim))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for key, value in {
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
        "attention.scale": getattr(config, "attention_multiplier", None),
        "logit_scale": getattr(config, "logits_scaling", None),
    }.items():
        if value is not None and name not in ("qwen2", "qwen3", "smollm3"):
            (writer.add_uint32 if "window" in key else writer.add_float32)(f"{name}.{key}", value)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for which in ("long", "short"):
            factors = np.array(rope[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for hf_name, tensor in model.state_dict().items():
        stem, _, leaf = hf_name.rpartition(".")
        weight, module = tensor.numpy(), stem.rpartition(".")[2]
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if name in ("llama", "granite", "smollm3") and module in heads:
            weight = permuted(weight, heads[module])
        if name.startswith("gemma") and stem.endswith("norm"):
            weight = weight + 1
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_family_s_file_is_the_model(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if name.startswith("gemma"):  # what llama.cpp has in its code
        changes = {"query_pre_attn_scalar": 16}
    if name == "gemma3_text":
        changes |= {"sliding_window_pattern": 6, "num_hidden_layers": 6}
    oracle = make_family(name, **changes)
    path = write_family_gguf(tmp_path / "f.gguf", oracle, ARCHITECTURES[name])
    tokens = random_tokens(2, 40)
    theirs = torch_logits(oracle, tokens)
    assert np.abs(our_logits(load_folder(path), tokens) - theirs).max() < 2e-5 * theirs.std()


def test_olmo_3_is_not_taken_for_olmo_2_which_has_its_architecture(tmp_path: Path) -> None:
    oracle = make_family("olmo3", rope_scaling=None)
    path = write_family_gguf(tmp_path / "f.gguf", oracle, gguf.MODEL_ARCH.OLMO2)
    tokens = random_tokens(2, 40)
    theirs = torch_logits(oracle, tokens)
    model = load_folder(path)
    assert model.config.windows == (7, 7, 7, None)
    assert np.abs(our_logits(model, tokens) - theirs).max() < 2e-5 * theirs.std()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5),
        ("logit_scale", 8.0),
        ("attention.clamp_kqv", 3.0),
        ("attention.sliding_window", 7),
        ("rope.scaling.attn_factor", 2.0),
        ("attn_logit_softcapping", 50.0),
        ("attention.value_length", 32),
    ],
)
def test_a_key_that_changes_the_arithmetic_and_is_not_read_is_refused(
    key: str, value: float, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "f.gguf", make_hf_model(), metadata={key: value})
    assert re.search(f"llama.{key} = .* is not supported|values of another size", refusal(path))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_of_a_family_fits_its_gguf_base(name: str, tmp_path: Path) -> None:
    """Its matrices, added to the base's in llama.cpp's own order, make our adapted model."""
    changes: dict[str, Any] = {"query_pre_attn_scalar": 16} if name.startswith("gemma") else {}
    if name == "gemma3_text":
        changes |= {"sliding_window_pattern": 6, "num_hidden_layers": 6}
    path = write_family_gguf(tmp_path / "f.gguf", make_family(name, **changes), ARCHITECTURES[name])
    model = add_lora(load_folder(path), LoraConfig(r=3, lora_alpha=6))
    randomise_lora(model)
    adapter = gguf.GGUFReader(save_gguf_adapter(model, tmp_path / "a.gguf", dtype="float32"))
    alpha = adapter.get_field("adapter.lora.alpha")
    assert alpha is not None
    parts = {tensor.name: tensor.data for tensor in adapter.tensors}
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", gguf.MODEL_ARCH_NAMES[ARCHITECTURES[name]])
    base = gguf.GGUFReader(path)
    for key, field in base.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], kind)
    used = 0
    for tensor in base.tensors:
        weight = np.array(tensor.data)
        if f"{tensor.name}.lora_a" in parts:
            A, B = (parts[f"{tensor.name}.lora_{x}"] for x in "ab")
            weight, used = weight + alpha.contents() / len(A) * B @ A, used + 2
        writer.add_tensor(tensor.name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert used == len(parts)
    logits = our_logits(model, random_tokens(2, 40))
    whole = our_logits(load_folder(tmp_path / "whole.gguf"), random_tokens(2, 40))
    assert np.abs(whole - logits).max() < 2e-5 * logits.std()


# ---- the real SmolLM2 --------------------------------------------------------------------------


def test_smollm2_is_read_as_what_it_is(smollm2: tuple[LlamaForCausalLM, Any]) -> None:
    model, _ = smollm2
    assert model.config.tie_word_embeddings
    assert model.model.embed_tokens.quant == QuantConfig(8, 32)
    assert model.layers[0].self_attn.q_proj.quant == QuantConfig(4, 32)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert model.config.rope.theta == 100000.0


# ---- bad files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small file whose matrices are quantised."""
    folder = tmp_path_factory.mktemp("whole")
    return write_gguf(folder / "tiny.gguf", make_hf_model(), Type.Q4_0).read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as raised:
        load_folder(path)
    message = str(raised.value)
    assert str(path) in message
    return message


@pytest.mark.parametrize("kind", [99, 24, 28, 9])
def test_a_type_that_nobody_reads_is_refused_by_name(
    kind: int, whole: bytes, tmp_path: Path
) -> None:
    """The header alone must stop the reader: no data is of that type."""
    changed = bytearray(whole)
    for name in (b"blk.0.attn_v.weight", b"blk.1.attn_v.weight"):
        at = whole.index(name) + len(name) + 4 + 2 * 8  # the name, the count and the two sizes
        assert whole[at : at + 4] == struct.pack("<I", Type.Q4_0)
        changed[at : at + 4] = struct.pack("<I", kind)
    (tmp_path / "tiny.gguf").write_bytes(changed)
    message = refusal(tmp_path / "tiny.gguf")
    assert f"blk.0.attn_v.weight: type {kind}" in message
    assert f"blk.1.attn_v.weight: type {kind}" in message
    assert "supported: F32, F16, Q4_0, Q4_1, Q8_0, Q5_0" in message
    assert "use another quantisation of the model, or its safetensors" in message


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.3, 0.6, 0.99, -1, -64])
def test_a_truncated_file_is_refused(share: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(share if share < 0 else share * len(whole))])
    message = refusal(path)
    assert "truncated" in message or "is not a GGUF file" in message
    assert "download it again" in message or share < 0.001


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html>" * 100,
        bytes(4096),
        b"GGUF",
        b"GGUF" + struct.pack("<I", 1) + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\xff" * 64,
        np.random.default_rng(0).bytes(4096),
        b"GGUF\x03\x00\x00\x00" + np.random.default_rng(1).bytes(4096),
        b"PK\x03\x04" + bytes(500),
    ],
    ids=range(9),
)
def test_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes(content)
    assert re.search("is not a GGUF file|is damaged or truncated", refusal(path))


def test_a_header_with_any_one_byte_wrong_never_crashes(whole: bytes, tmp_path: Path) -> None:
    """In one subprocess: a crash would take the tests along."""
    (tmp_path / "whole.gguf").write_bytes(whole)
    script = """
import random, sys
from pathlib import Path
import mlx_qlora
from mlx_qlora.adapters.export import save_gguf_adapter
from mlx_qlora.adapters.merge import save_merged
from mlx_qlora.errors import ConfigError, WeightsError
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.weights import load_model, open_checkpoint
import mlx.core as mx

whole = Path(sys.argv[1]).read_bytes()
header = whole.index(b"blk.1.ffn_norm.weight") + 60
keys = [whole.index(key) for key in (b"general.architecture", b"tokenizer.ggml.tokens")]
rng = random.Random(0)
path = Path(sys.argv[1]).with_name("damaged.gguf")
refused = 0
tensors = whole.index(b"token_embd.weight")
starts = [4, 8, 16, *range(24, keys[1] + 60, 7)]
places = starts + [rng.randrange(tensors - 8, header) for _ in range(150)]
for at in places:
    for value in (0, 255, rng.randrange(256)):
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1:])
        print(at, value, flush=True)
        files = ModelFiles(path=path, hf_id="x", revision=None, source=str(path))
        try:
            load_model(open_checkpoint(files), None, mx.float32, "quantized")
        except WeightsError as error:
            assert len(str(error)) > 20
            refused += 1
print("refused", refused)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "whole.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-80:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 200


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not supported; supported: llama, granite"),
        ({"metadata": {"expert_count": 8}}, "mixture-of-experts models are not supported"),
        (
            {"metadata": {"attention.key_length": 8}},
            "model.layers.0.self_attn.v_proj.weight in tiny.gguf has shape (32, 64)",
        ),
        (
            {"extra": [("blk.0.ssm_a.weight", np.ones(16, np.float32))]},
            "tensor 'blk.0.ssm_a.weight' belongs to no llama model",
        ),
        (
            {"extra": [("rope_freqs.weight", np.linspace(1, 5, 8).astype(np.float32))]},
            "the scaling in rope_freqs.weight is not supported",
        ),
    ],
)
def test_a_model_that_is_no_llama_is_refused(
    how: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(write_gguf(tmp_path / "tiny.gguf", make_hf_model(), **how))


def test_metadata_that_lacks_a_key_is_refused_by_name(whole: bytes, tmp_path: Path) -> None:
    for key in ("llama.block_count", "llama.embedding_length", "tokenizer.ggml.tokens"):
        path = tmp_path / f"{key}.gguf"
        other = key[:-1].encode() + b"X"  # a key of the same length that nobody asks for
        path.write_bytes(whole.replace(key.encode(), other))
        assert f"{key} is missing in the metadata" in refusal(path)


def test_the_original_repository_is_read_from_the_metadata(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_hf_model(), repository="someone/tiny-llama")
    _, _, metadata = read_gguf(path)
    assert source_repository(metadata) == "someone/tiny-llama"
