"""Metadata that changes the arithmetic: honoured, refused, or known to change nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import load_folder, our_logits, quantise_with_mlx_lm, random_tokens
from support.tiny_gguf import write_tiny_gguf

import mlx_qlora as mq
from mlx_qlora.errors import UserError
from mlx_qlora.model.gguf import read_gguf

TOKENS = random_tokens(1, 9)


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changes))


# ---- JSON ----------------------------------------------------------------------------------------

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
LINEAR = {"type": "linear", "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CONFIG, {"quantization_config": "bitsandbytes"}, "quantization_config must be an object"),
    (CONFIG, {"quantization_config": ["gptq"]}, "quantization_config must be an object"),
    (CONFIG, {"quantization_config": 4}, "quantization_config must be an object; got 4"),
    (CONFIG, {"quantization": "4bit"}, "quantization must be an object; got '4bit'"),
    (CONFIG, {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
    (CONFIG, {"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false"),
    (CONFIG, {"attention_bias": "false"}, "attention_bias must be true or false"),
    (CONFIG, {"mlp_bias": None}, "mlp_bias must be true or false"),
    (CONFIG, {"rope_scaling": [2.0]}, "rope_scaling must be an object"),
    (CONFIG, {"is_causal": False}, "is_causal is False; supported: True or None"),
    (CONFIG, {"rope_theta": "10000"}, "rope_theta must be a positive number"),
    (CONFIG, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "positions, must be at least"),
    (CONFIG, {"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, "'linear', and 'default' else"),
    (
        CONFIG,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_scaling": LINEAR},
        r"factor = 2\.0, and 4\.0 elsewhere",
    ),
    (
        CONFIG,
        {"rope_parameters": {"rope_type": "linear", "partial_rotary_factor": 0.5, "factor": 2.0}}
        | {"rope_scaling": LINEAR},
        "rope_scaling lacks partial_rotary_factor; add it",
    ),
    (CONFIG, {"eos_token_id": "1"}, r"config\.json: eos_token_id must be an id or a list of ids"),
    (CONFIG, {"eos_token_id": [1, "2"]}, r"config\.json: eos_token_id must be an id or a list"),
    (CONFIG, {"eos_token_id": True}, "eos_token_id must be an id or a list of ids"),
    (GENERATION, {"eos_token_id": 1.5}, r"generation_config\.json: eos_token_id must be an id"),
    (TOKENIZER, {"add_bos_token": "false"}, "add_bos_token must be bool | None; got 'false'"),
    (TOKENIZER, {"eos_token": 5}, r"eos_token must be str \| dict \| None; got 5"),
    (TOKENIZER, {"eos_token": {"text": "a"}}, "eos_token is .*, which is not in the vocabulary"),
    (TOKENIZER, {"added_tokens_decoder": ["a"]}, r"added_tokens_decoder must be dict \| None"),
    (TOKENIZER, {"additional_special_tokens": "abc"}, "additional_special_tokens must be list"),
    (TOKENIZER, {"chat_template": 5}, r"chat_template must be str \| list \| None; got 5"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=lambda x: str(x)[:50])
def test_a_value_that_is_no_value_of_its_key_or_contradicts_another_is_refused(
    name: str, changes: dict[str, Any], message: str, folder: Path
) -> None:
    change(folder, name, **changes)
    with pytest.raises(UserError, match=message.replace("bool |", r"bool \|")):
        mq.load(folder)


def test_an_answer_ends_with_the_tokens_of_all_three_files(folder: Path) -> None:
    change(folder, TOKENIZER, eos_token="<|eos|>")
    change(folder, GENERATION, eos_token_id=[7, 8])
    change(folder, CONFIG, eos_token_id=9)
    tokenizer = mq.load(folder)[1]
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (1, {1, 7, 8, 9})


# ---- two heads -----------------------------------------------------------------------------------


def other_row(embedding: np.ndarray) -> np.ndarray:
    return np.concatenate([embedding[:-1], embedding[-1:] + 1])


HEADS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
    "the same": (lambda embedding: embedding, True),
    "another": (lambda embedding: embedding[::-1].copy(), False),
    "another in its last row": (other_row, False),
    "rounded": (lambda embedding: embedding.astype(np.float16), False),
    "longer": (lambda embedding: np.concatenate([embedding, embedding[:1]]), False),
    "zeros": (np.zeros_like, False),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_beside_a_tied_embedding_is_the_embedding_or_refused(
    head: str, folder: Path
) -> None:
    make, is_same = HEADS[head]
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(folder, CONFIG, tie_word_embeddings=True)
    del weights["lm_head.weight"]
    save_file(weights, path)
    wanted = our_logits(mq.load(folder)[0], TOKENS)
    weights["lm_head.weight"] = make(weights["model.embed_tokens.weight"])
    save_file(weights, path)
    if is_same:
        np.testing.assert_array_equal(our_logits(mq.load(folder)[0], TOKENS), wanted)
        return
    with pytest.raises(UserError, match=r"lm_head.weight in .* set tie_word_embeddings to false"):
        mq.load(folder)


def test_a_packed_head_beside_a_tied_embedding_is_compared_too(plain: Path, tmp_path: Path) -> None:
    quantise_with_mlx_lm(plain, tmp_path, {"bits": 4, "group_size": 64})
    change(tmp_path, CONFIG, tie_word_embeddings=True)
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        load_folder(tmp_path)
    arrays: Any = mx.load(str(tmp_path / "model.safetensors"))
    weights = dict(arrays)
    for part in ("weight", "scales", "biases"):
        weights[f"lm_head.{part}"] = weights[f"model.embed_tokens.{part}"]
    mx.eval(list(weights.values()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    model = load_folder(tmp_path)
    assert model.head is model.model.embed_tokens


# ---- how matrices are packed ---------------------------------------------------------------------

MIXED = {"v_proj": 6, "down_proj": 6, "lm_head": 6}  # as `--quant-predicate mixed_3_6` has them


def mixed(path: str, _: Any) -> dict[str, Any]:
    bits = next((bits for name, bits in MIXED.items() if name in path), 3)
    return {"bits": bits, "group_size": 64}


@pytest.mark.parametrize(
    "left_out",
    [
        {"group_size": None},
        {"group_size": ...},
        {"group_size": None, "mode": None},
        {"group_size": None, "mode": "affine"},
        {"group_size": None, "quant_method": "mlx"},
    ],
    ids=str,
)
def test_a_group_size_that_is_null_or_left_out_is_the_modes_default(
    left_out: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    quantise_with_mlx_lm(plain, tmp_path, {"bits": 3, "group_size": 64, "quant_predicate": mixed})
    wanted = our_logits(load_folder(tmp_path), TOKENS)

    def edited(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        entry = {key: edited(value) for key, value in entry.items()} | left_out
        return {key: value for key, value in entry.items() if value is not ...}

    entry = json.loads((tmp_path / CONFIG).read_text())["quantization"]
    change(tmp_path, CONFIG, quantization=edited(entry), quantization_config=edited(entry))
    np.testing.assert_array_equal(our_logits(load_folder(tmp_path), TOKENS), wanted)


@pytest.mark.parametrize(("mode", "bits", "size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32)])
def test_a_mode_alone_says_its_bits_and_its_group_size(
    mode: str, bits: int, size: int, plain: Path, tmp_path: Path
) -> None:
    how = {"bits": bits, "group_size": size, "mode": mode}
    quantise_with_mlx_lm(plain, tmp_path, how)
    wanted = our_logits(load_folder(tmp_path), TOKENS)
    change(tmp_path, CONFIG, quantization={"mode": mode, "bits": None}, quantization_config=None)
    np.testing.assert_array_equal(our_logits(load_folder(tmp_path), TOKENS), wanted)


# ---- GGUF ----------------------------------------------------------------------------------------


def gguf_config(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """What a file with more keys is read as."""
    return read_gguf(write_tiny_gguf(folder / "m.gguf", keys))[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 320),
        ("attention.causal", True),
        ("attention.clamp_kqv", 0.0),
        ("attention.scale", 0.0),
        ("attention.sliding_window", 0),
        ("use_parallel_residual", False),
        ("expert_count", 0),
        ("expert_used_count", 0),
        ("logit_scale", 1.0),
        ("pooling_type", 1),
        ("tensor_data_layout", "Meta AI original pth"),
        ("rope.scaling.finetuned", True),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_beta_fast", 32.0),
        ("rope.scaling.original_context_length", 4096),
        ("rope.scaling.type", "none"),
        ("general.type", "model"),
    ],
)
def test_a_gguf_key_that_changes_nothing_is_passed_over(
    key: str, value: Any, tmp_path: Path
) -> None:
    assert gguf_config(tmp_path, {key: value}) == gguf_config(tmp_path, {})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.causal": False}, "attention.causal = False is not supported"),
        ({"attention.scale": 1.0}, "attention.scale = 1.0 is not supported"),
        ({"attention.clamp_kqv": 1.0}, "attention.clamp_kqv = 1.0 is not supported"),
        ({"attn_logit_softcapping": 1.0}, "attn_logit_softcapping = 1.0 is not supported"),
        ({"use_parallel_residual": True}, "use_parallel_residual = True is not supported"),
        ({"swin_norm": True}, "swin_norm = True is not supported"),
        ({"attention.temperature_scale": 0.5}, "attention.temperature_scale = 0.5 is not"),
        ({"attention.key_length_swa": 32}, "attention.key_length_swa = 32 is not supported"),
        ({"rope.dimension_sections": [8, 8, 0, 0]}, r"rope.dimension_sections = \[8, 8, 0, 0\] is"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers = 1 is not supported"),
        ({"a.key.of.next.year": "on"}, "a.key.of.next.year = 'on' is not supported"),
        (
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
            r"rope scaling 'none' \(by 4.0\) is not supported",
        ),
        ({"general.type": "mmproj"}, "is no model, but of type 'mmproj'"),
        ({"general.type": "adapter"}, "is no model, but of type 'adapter'"),
    ],
    ids=str,
)
def test_a_gguf_key_that_nobody_reads_is_refused(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        gguf_config(tmp_path, keys)
