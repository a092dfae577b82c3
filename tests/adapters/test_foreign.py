"""Adapters of other tools, with what they bring along: read as PEFT reads them, or refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.adapters import CONFIG, WEIGHTS, adapted, largest, moved_by_peft
from support.families import make_family
from support.models import (
    load_folder,
    make_hf_model,
    our_logits,
    quantise_with_mlx_lm,
    random_tokens,
    save_hf,
    torch_logits,
)

import mlx_qlora as mq
from mlx_qlora.adapters.peft import load_adapter, save_adapter
from mlx_qlora.errors import AdapterError, AdapterWarning, ConfigError
from mlx_qlora.model.lora import lora_layers
from mlx_qlora.model.quantize import QuantConfig

TOKENS = random_tokens(2, 21)


# ---- configs that were written for more than this model ------------------------------------------

GENERIC: dict[str, tuple[dict[str, Any], str]] = {
    "names that other models have": (
        {"target_modules": ["q_proj", "v_proj", "c_attn", "W_pack"]},
        "target_modules (W_pack, c_attn|c_attn, W_pack)",
    ),
    "a rank for a linear without an update": (
        {"target_modules": ["q_proj"], "rank_pattern": {"up_proj": 8, "q_proj": 2}},
        "rank_pattern up_proj",
    ),
    "an alpha for another model's linear": (
        {"target_modules": ["q_proj"], "alpha_pattern": {"w1": 3, "q_proj": 2}},
        "alpha_pattern w1",
    ),
    "layers beyond the last": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2, 3]},
        "layers_to_transform 2, 3",
    ),
    "exclude a module of no layer": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["lm_head"]},
        "",
    ),
    "exclude a linear": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        "",
    ),
    "exclude one path": (
        {
            "target_modules": ["q_proj"],
            "exclude_modules": ["model.layers.0.self_attn.q_proj"],
            "rank_pattern": {"q_proj": 3},
        },
        "",
    ),
    "exclude by a regex": (
        {"target_modules": "all-linear", "exclude_modules": r".*vision.*|.*layers\.1\.mlp.*"},
        "",
    ),
    "a regex of more than linears, the others excluded": (
        {"target_modules": r"model\..*(proj|norm)", "exclude_modules": r".*norm"},
        "",
    ),
    "a name for layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
        "",
    ),
    "names of several models' layers": (
        {
            "target_modules": ["q_proj", "query_key_value"],
            "layers_to_transform": [0, 9],
            "layers_pattern": ["h", "layers"],
        },
        "query_key_value; layers_to_transform 9",
    ),
    "a regex of what is excluded beside a name for layers": (
        {
            "target_modules": ["q_proj", "k_proj"],
            "exclude_modules": r".*k_proj|lm_head",
            "layers_to_transform": [0],
            "layers_pattern": ["blocks", "layers"],
        },
        "",
    ),
    "a name for layers and a whole path": (
        {
            "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
        },
        "",
    ),
}


@pytest.mark.parametrize("name", GENERIC)
def test_a_generic_config_is_read_as_peft_reads_it(
    hf_tiny: tuple[Any, Path], tmp_path: Path, name: str
) -> None:
    options, passed_over = GENERIC[name]
    theirs = moved_by_peft(hf_tiny[0], tmp_path / "a", r=4, lora_alpha=8, **options)
    model = load_folder(hf_tiny[1])
    if passed_over:
        with pytest.warns(AdapterWarning, match=f"none of these: .*{passed_over}"):
            load_adapter(model, tmp_path / "a")
    else:
        load_adapter(model, tmp_path / "a")
    ours = our_logits(model, TOKENS)
    assert largest(ours, torch_logits(theirs, TOKENS)) < 1e-5
    # What is written again needs nothing of that.
    save_adapter(model, tmp_path / "b")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*_pattern", AdapterWarning)
        again = load_adapter(load_folder(hf_tiny[1]), tmp_path / "b")
    np.testing.assert_array_equal(our_logits(again, TOKENS), ours)


def test_the_seven_names_mean_on_fused_linears_what_they_mean_to_peft(tmp_path: Path) -> None:
    hf = make_family("phi3")
    base = save_hf(hf, tmp_path / "model")
    names = [*mq.LoraConfig().target_modules]
    theirs = moved_by_peft(hf, tmp_path / "a", r=4, lora_alpha=8, target_modules=names)
    with pytest.warns(AdapterWarning, match="q_proj"):
        model = load_adapter(load_folder(base), tmp_path / "a")
    assert {path.rpartition(".")[2] for path, _ in lora_layers(model)} == {"o_proj", "down_proj"}
    assert largest(our_logits(model, TOKENS), torch_logits(theirs, TOKENS)) < 1e-4


def test_an_adapter_over_an_adapter_is_refused_and_the_message_names_the_ways(
    base: Path, tmp_path: Path
) -> None:
    save_adapter(adapted(base), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"attach\(model, folder, name\).*switch\(model, None\)"):
        load_adapter(adapted(base), tmp_path / "a")


# ---- embeddings beside the updates ---------------------------------------------------------------

NAMES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}


def carry(folder: Path, base: Path, names: list[str], change: Any, dtype: Any) -> None:
    """Adds matrices of the base to an adapter's file, as PEFT's `save_embedding_layers` does."""
    weights, arrays = load_file(base / "model.safetensors"), mx.load(str(folder / WEIGHTS))
    assert isinstance(arrays, dict)
    for name in names:
        array = weights.get(NAMES[name], weights[NAMES["embed_tokens"]])
        arrays[f"base_model.model.{NAMES[name]}"] = mx.array(change(array)).astype(dtype)
    mx.save_safetensors(str(folder / WEIGHTS), arrays)


def as_it_is(array: np.ndarray) -> np.ndarray:
    return array


def with_a_row_trained(array: np.ndarray) -> np.ndarray:
    array[5] += 0.2
    return array


def with_a_row_more(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array[:1]])


BASES: dict[str, tuple[QuantConfig | None, mx.Dtype]] = {
    "float32": (None, mx.float32),
    "bfloat16": (None, mx.bfloat16),
    "4 bits": (QuantConfig(4, 32), mx.float32),
    "mxfp4": (QuantConfig(4, 32, "mxfp4"), mx.float32),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_copies_of_the_base_s_embeddings_are_passed_over_and_others_are_refused(
    tmp_path: Path, kind: str, dtype: mx.Dtype, tied: bool
) -> None:
    base = save_hf(make_hf_model(tie_word_embeddings=tied), tmp_path / "model")
    quantize, compute = BASES[kind]
    model = adapted(base)
    save_adapter(model, tmp_path / "a")
    wanted = our_logits(load_adapter(bare(base, quantize, compute), tmp_path / "a"), TOKENS)
    for names in (["embed_tokens"], ["embed_tokens", "lm_head"]):
        carry(tmp_path / "a", base, names, as_it_is, dtype)
        said = f"also holds {' and '.join(names)}, equal to the base's, which are ignored"
        with pytest.warns(AdapterWarning, match=said):
            loaded = load_adapter(bare(base, quantize, compute), tmp_path / "a")
        np.testing.assert_array_equal(our_logits(loaded, TOKENS), wanted)
    for change in (with_a_row_trained, with_a_row_more):
        carry(tmp_path / "a", base, ["lm_head"], change, dtype)
        model = bare(base, quantize, compute)
        with pytest.raises(AdapterError, match=r"also holds embed_tokens and lm_head.*with PEFT"):
            load_adapter(model, tmp_path / "a")
        assert not lora_layers(model)


def bare(base: Path, quantize: QuantConfig | None, dtype: mx.Dtype) -> Any:
    return load_folder(base, quantize, "quantized", dtype)


def test_a_copy_is_known_beside_a_base_that_mlx_lm_packed(base: Path, tmp_path: Path) -> None:
    quantise_with_mlx_lm(base, tmp_path / "q", {"bits": 4, "group_size": 32})
    save_adapter(adapted(base), tmp_path / "a")
    carry(tmp_path / "a", base, ["embed_tokens", "lm_head"], as_it_is, mx.float32)
    with pytest.warns(AdapterWarning, match="equal to the base's"):
        load_adapter(load_folder(tmp_path / "q"), tmp_path / "a")


# ---- mlx-lm's configs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": "20"}, "lora_parameters.scale must be a number; got '20'"),
        ({"scale": True}, "lora_parameters.scale must be a number; got True"),
        ({"scale": None}, "lora_parameters.scale must be a number; got None"),
        ({"dropout": "0.1"}, "lora_parameters.dropout must be a number; got '0.1'"),
        ({"dropout": 1.5}, "lora_dropout must be in"),
    ],
)
def test_a_number_of_mlx_lm_s_config_that_is_none_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    mq.save_adapter(adapted(base), tmp_path / "a")
    path = tmp_path / "a" / "mlx" / CONFIG
    config = json.loads(path.read_text())
    config["lora_parameters"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=words):
        load_adapter(load_folder(base), path.parent)


def test_an_early_mlx_lm_config_says_dora_in_its_own_way(base: Path, tmp_path: Path) -> None:
    model = adapted(base, mq.LoraConfig(r=2, use_dora=True))
    mq.save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "mlx" / CONFIG
    config = json.loads(path.read_text())
    del config["fine_tune_type"]
    path.write_text(json.dumps({**config, "use_dora": True}))
    loaded = load_adapter(load_folder(base), path.parent)
    assert largest(our_logits(loaded, TOKENS), our_logits(model, TOKENS)) < 1e-5
