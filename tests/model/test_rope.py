"""RoPE's periods against the formulas in float64 and against transformers' own tables."""

import copy
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.errors import WeightsError
from mlx_qlora.model.rope import RopeConfig, in_both_spellings, rope_from_hf, rope_periods

LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KNOWN = {  # published models -> (head size, v4 config)
    "llama 2": (128, {"rope_theta": 10000.0, "rope_scaling": None}),
    "llama 3": (128, {"rope_theta": 500000.0}),
    "llama 3.1": (128, {"rope_theta": 500000.0, "rope_scaling": LLAMA31 | {"rope_type": "llama3"}}),
    "llama 3.2": (
        64,
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA31 | {"rope_type": "llama3", "factor": 32.0},
        },
    ),
    "linear": (64, {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "smollm2": (64, {"rope_theta": 100000}),
}


def in_v5_spelling(config: dict[str, Any]) -> dict[str, Any]:
    scaling = dict(config.get("rope_scaling") or {})
    rope_type = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    theta = config["rope_theta"]
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


def exact_periods(head_dim: int, rope: RopeConfig) -> np.ndarray:
    """Pair by pair in float64, as Llama 3.1's reference code decides by wavelength."""
    periods = []
    for i in range(head_dim // 2):
        frequency = rope.theta ** (-2 * i / head_dim)
        if rope.rope_type == "linear":
            frequency /= rope.factor
        elif rope.rope_type == "llama3":
            old = rope.original_max_position_embeddings
            wavelength = 2 * math.pi / frequency
            if wavelength > old / rope.low_freq_factor:
                frequency /= rope.factor
            elif wavelength >= old / rope.high_freq_factor:
                smooth = (old / wavelength - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
        periods.append(1 / frequency)
    return np.array(periods)


def transformers_periods(head_dim: int, config: dict[str, Any]) -> np.ndarray:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    given = copy.deepcopy(in_v5_spelling(config))
    table = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, **given)
    )
    assert table.attention_scaling == 1.0
    return 1 / table.inv_freq.double().numpy()


# ---- periods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_periods_equal_the_float64_formula(name: str) -> None:
    head_dim, config = KNOWN[name]
    rope = rope_from_hf(config)
    ours = rope_periods(head_dim, rope)
    assert ours.dtype == mx.float32
    np.testing.assert_allclose(np.array(ours), exact_periods(head_dim, rope), rtol=3e-6)


@pytest.mark.parametrize("name", KNOWN)
def test_periods_equal_transformers(name: str) -> None:
    head_dim, config = KNOWN[name]
    ours = np.array(rope_periods(head_dim, rope_from_hf(config)))
    np.testing.assert_allclose(ours, transformers_periods(head_dim, config), rtol=3e-6)


@given(
    half=st.integers(1, 64),
    theta=st.floats(100.0, 1e6),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.25, 2.0),
    spread=st.floats(0.5, 8.0),
    old=st.integers(64, 16384),
)
@settings(max_examples=60, deadline=None)
def test_llama3_periods_equal_the_formula_for_any_parameters(
    half: int, theta: float, factor: float, low: float, spread: float, old: int
) -> None:
    rope = RopeConfig(theta, "llama3", factor, low, low + spread, old)
    ours = np.array(rope_periods(2 * half, rope))
    np.testing.assert_allclose(ours, exact_periods(2 * half, rope), rtol=5e-5)


# ---- the two spellings in config.json ----------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_both_spellings_give_the_same_rope(name: str) -> None:
    _, config = KNOWN[name]
    rope = rope_from_hf(config)
    assert rope_from_hf(in_v5_spelling(config)) == rope
    assert rope.theta == config["rope_theta"]
    assert rope.rope_type != "default" or name in ("llama 2", "llama 3", "smollm2")


def test_reading_a_config_changes_nothing_in_it() -> None:
    for _, config in KNOWN.values():
        for spelling in (config, in_v5_spelling(config)):
            before = copy.deepcopy(spelling)
            rope_from_hf(spelling)
            assert spelling == before


def test_llama_31_is_read_in_full() -> None:
    assert rope_from_hf(KNOWN["llama 3.1"][1]) == RopeConfig(
        500000.0, "llama3", 8.0, 1.0, 4.0, 8192
    )


def test_a_config_without_rope_is_llama_1() -> None:
    assert rope_from_hf({}) == RopeConfig(10000.0, "default")


@pytest.mark.parametrize("rope_type", ["nonsense", "proportional", 3])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unsupported_rope_type_is_refused_by_name(rope_type: Any, key: str) -> None:
    with pytest.raises(WeightsError, match=f"config.json.*{rope_type}.*supported: default, linear"):
        rope_from_hf({"rope_theta": 1e4, key: {"rope_type": rope_type, "factor": 2.0}})


@pytest.mark.parametrize("name", LLAMA31)
def test_a_missing_llama3_parameter_is_refused_by_name(name: str) -> None:
    scaling = {key: value for key, value in LLAMA31.items() if key != name}
    if name == "original_max_position_embeddings":  # transformers takes the whole length for it
        config = {"max_position_embeddings": 16384, "rope_scaling": {"type": "llama3", **scaling}}
        assert rope_from_hf(config).original_max_position_embeddings == 16384
        return
    with pytest.raises(WeightsError, match=f"config.json: the llama3 rope scaling lacks {name}$"):
        rope_from_hf({"rope_scaling": {"rope_type": "llama3", **scaling}})


def test_an_unknown_scaling_parameter_is_refused_by_name() -> None:
    scaling = {"rope_type": "llama3", **LLAMA31, "attention_factor": 2.0}
    with pytest.raises(WeightsError, match=r"config.json.*llama3.*unknown attention_factor"):
        rope_from_hf({"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_parameters": [1, 2]}, "rope_parameters"),
        ({"rope_theta": "10k"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": "4x"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA31, "factor": None}}, "factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA31, "high_freq_factor": 1.0}},
            "high_freq_factor",
        ),
    ],
)
def test_a_malformed_value_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=f"config.json.*{named}"):
        rope_from_hf(config)


# ---- what a yarn may say besides ---------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
BESIDES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "attn_factor": {"attn_factor": 2.0},
    "attn_factor beside attention_factor": {"attn_factor": 2.0, "attention_factor": 1.5},
    "attention_factor of null": {"attention_factor": None},
    "mscale_all_dim of 0": {"mscale": 1.0, "mscale_all_dim": 0.0},
    "mscale_all_dim of 0 alone": {"mscale_all_dim": 0.0},
    "mscale of 0": {"mscale": 0, "mscale_all_dim": 0.7},
    "mscale without the other": {"mscale": 0.7},
    "both": {"mscale": 1.0, "mscale_all_dim": 0.7},
    "equal ones": {"mscale": 0.7, "mscale_all_dim": 0.7},
    "betas of 0": {"beta_fast": 0, "beta_slow": 0.0},
    "betas": {"beta_fast": 16, "beta_slow": 2},
    "finetuned": {"finetuned": True},
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", BESIDES)
def test_what_a_yarn_says_besides_means_what_it_means_in_transformers(name: str, key: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config: dict[str, Any] = {key: {**YARN, **BESIDES[name]}, "max_position_embeddings": 8192}
    config |= {"rope_theta": 1e4} if key == "rope_scaling" else {}
    config[key] |= {"rope_theta": 1e4} if key == "rope_parameters" else {}
    rope = rope_from_hf(copy.deepcopy(config))
    both: dict[str, Any] = in_both_spellings(config, rope) | {"max_position_embeddings": 8192}
    for each in (config, both):
        theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=64, **copy.deepcopy(each)))
        assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-7)
        periods = 1 / theirs.inv_freq.double().numpy()
        np.testing.assert_allclose(np.array(rope_periods(64, rope)), periods, rtol=3e-6)
        assert rope_from_hf(each) == rope


@pytest.mark.parametrize(
    "wrong", [{"mscale": -1}, {"mscale": True}, {"beta_fast": "0"}, {"attn": 1}]
)
def test_a_senseless_value_of_a_yarn_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=next(iter(wrong))):
        rope_from_hf({"rope_scaling": {**YARN, **wrong}, "max_position_embeddings": 8192})
