"""LoRA layers against numpy in float64 and against PEFT's own rules on the same tiny model."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.models import LLAMA_31_8B, load_folder, make_hf_model, our_logits, random_tokens

from mlx_qlora.errors import ConfigError
from mlx_qlora.model.dropout import position_words
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import (
    ALL_SEVEN,
    LoraConfig,
    LoRALinear,
    add_lora,
    lora_layers,
    target_paths,
    trainable_count,
)
from mlx_qlora.model.quantize import Linear


def words(seed: int, x: mx.array) -> mx.array:
    """What the dropout of a row x (n, d) is drawn from."""
    place = mx.arange(len(x), dtype=mx.int32)
    return position_words(mx.random.key(seed)[None], mx.zeros_like(place), place, 1)[0]


def layer(
    d_in: int = 48, d_out: int = 40, r: int = 4, scale: float = 1.5, dropout: float = 0.0
) -> LoRALinear:
    """One LoRALinear whose every matrix is random."""
    random = np.random.default_rng(0)
    base = Linear(d_in, d_out)
    base.weight = mx.array(random.normal(size=(d_out, d_in)).astype(np.float32))
    A = mx.array(random.normal(size=(r, d_in)).astype(np.float32))
    B = mx.array(random.normal(size=(d_out, r)).astype(np.float32))
    return LoRALinear(base, A, B, scale, dropout)


# ---- what add_lora makes -----------------------------------------------------------------------


def test_the_first_forward_is_the_base_model_bit_for_bit(hf_tiny: tuple[Any, Path]) -> None:
    tokens = random_tokens(2, 17)
    model = load_folder(hf_tiny[1])
    before = our_logits(model, tokens)
    add_lora(model, LoraConfig())
    np.testing.assert_array_equal(our_logits(model, tokens), before)
    with_dropout = np.array(model(mx.array(tokens), dropout_key=mx.random.key(1)))
    np.testing.assert_array_equal(with_dropout, before)


def test_a_seed_gives_one_adapter_and_another_seed_another(hf_tiny: tuple[Any, Path]) -> None:
    def adapter(seed: int) -> dict[str, np.ndarray]:
        mx.random.seed(int(np.random.default_rng().integers(1 << 30)))  # must not matter
        model = add_lora(load_folder(hf_tiny[1]), LoraConfig(r=2), seed)
        return {n: np.array(w) for n, w in tree_flatten(model.trainable_parameters())}

    one, same, other = adapter(3), adapter(3), adapter(4)
    for name, array in one.items():
        np.testing.assert_array_equal(array, same[name])
        if "lora_A" in name:
            assert not np.array_equal(array, other[name])


def test_llama_31_8b_at_rank_16_trains_exactly_41_943_040_numbers_and_costs_no_memory() -> None:
    before = mx.get_active_memory()
    model = LlamaForCausalLM(LlamaConfig.from_hf(LLAMA_31_8B))
    add_lora(model, LoraConfig())
    assert trainable_count(model) == 41_943_040
    assert len(lora_layers(model)) == 32 * 7
    assert mx.get_active_memory() - before < 10e6


def test_layers_come_in_reading_order() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    shape = {**LLAMA_31_8B, **sizes, "num_key_value_heads": 4, "num_hidden_layers": 12}
    model = LlamaForCausalLM(LlamaConfig.from_hf({**shape, "vocab_size": 8}))
    paths = target_paths(model, LoraConfig(target_modules=["down_proj", "q_proj"]))
    expected = []
    for i in range(12):
        expected += [f"model.layers.{i}.self_attn.q_proj", f"model.layers.{i}.mlp.down_proj"]
    assert paths == expected


def test_a_second_add_lora_is_refused_and_changes_nothing(hf_tiny: tuple[Any, Path]) -> None:
    model = add_lora(load_folder(hf_tiny[1]), LoraConfig(r=2))
    with pytest.raises(ConfigError, match="already has LoRA layers"):
        add_lora(model, LoraConfig(r=4))
    assert all(m.lora_A.weight.shape[0] == 2 for _, m in lora_layers(model))


# ---- the forward -------------------------------------------------------------------------------


def test_the_forward_is_the_papers_equation_in_float64() -> None:
    adapted = layer()
    x = np.random.default_rng(1).normal(size=(3, 5, 48)).astype(np.float32)
    W, A, B = (
        np.array(w).astype(np.float64)
        for w in (adapted.base_layer.weight, adapted.lora_A.weight, adapted.lora_B.weight)
    )
    wanted = x.astype(np.float64) @ W.T + 1.5 * (x.astype(np.float64) @ A.T) @ B.T
    got = np.array(adapted(mx.array(x)))
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(got - x @ W.T).max() > 1  # the update is not a rounding error


def test_the_scale_is_alpha_over_r_or_over_its_root() -> None:
    assert LoraConfig(r=16, lora_alpha=32).scale_of("q_proj") == 2
    assert LoraConfig(r=16, lora_alpha=8).scale_of("q_proj") == 0.5
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scale_of("q_proj") == 8
    assert LoraConfig(r=8, lora_alpha=16, use_rslora=True).scale_of("q_proj") == pytest.approx(
        16 / 8**0.5
    )


def test_a_16_bit_input_gives_a_16_bit_output_and_masters_stay_float32() -> None:
    for dtype in (mx.bfloat16, mx.float16):
        adapted = layer(scale=math.pi, dropout=0.3)
        adapted.base_layer.weight = adapted.base_layer.weight.astype(dtype)
        x = mx.random.normal((2, 48), key=mx.random.key(0)).astype(dtype)
        assert adapted(x).dtype == dtype
        assert adapted(x, words(1, x)).dtype == dtype
        assert adapted.lora_A.weight.dtype == adapted.lora_B.weight.dtype == mx.float32


# ---- dropout -----------------------------------------------------------------------------------


def test_a_dropout_key_gives_one_mask_and_another_key_another() -> None:
    adapted = layer(dropout=0.5)
    x = mx.random.normal((4, 48), key=mx.random.key(0))
    one = np.array(adapted(x, words(1, x)))
    mx.random.seed(99)  # the global state must not matter
    np.testing.assert_array_equal(np.array(adapted(x, words(1, x))), one)
    assert not np.array_equal(np.array(adapted(x, words(2, x))), one)


def test_no_key_or_no_probability_means_no_dropout() -> None:
    x = mx.random.normal((4, 48), key=mx.random.key(0))
    plain = np.array(layer(dropout=0.0)(x))
    np.testing.assert_array_equal(np.array(layer(dropout=0.5)(x)), plain)
    np.testing.assert_array_equal(np.array(layer(dropout=0.0)(x, words(1, x))), plain)


def test_dropout_zeroes_the_stated_share_of_inputs_and_scales_up_the_others() -> None:
    p, n = 0.3, 64
    adapted = layer(d_in=n, d_out=n, r=n, scale=1.0, dropout=p)
    adapted.base_layer.weight = mx.zeros((n, n))
    adapted.lora_A.weight = adapted.lora_B.weight = mx.eye(n)  # the output is the dropped input
    y = np.array(adapted(mx.ones((500, n)), words(5, mx.ones((500, n)))))
    assert np.allclose(y[y != 0], 1 / (1 - p))
    assert (y == 0).mean() == pytest.approx(p, abs=0.01)


def test_dropout_keeps_the_mean_and_spares_the_base() -> None:
    adapted = layer(dropout=0.4)
    x = mx.random.normal((2, 48), key=mx.random.key(0))
    keys = range(4000)
    runs = np.stack([np.array(adapted(x, words(key, x))) for key in keys])
    plain = np.array(adapted(x))
    error = runs.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(runs.mean(axis=0) - plain) < 5 * error).all()


# ---- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["q_proj"], None),
        (ALL_SEVEN, None),
        (["self_attn.q_proj", "mlp.down_proj"], None),
        (["0.self_attn.k_proj", "up_proj"], None),
        (["model.layers.1.mlp.gate_proj"], None),
        (r".*\.(q|v)_proj", None),
        (r"model\.layers\.0\..*_proj", None),
        (r"model\.layers\.\d+\.mlp\.(up|down)_proj", None),
        ("all-linear", None),
        (["q_proj", "up_proj"], [1]),
        (["v_proj"], [0, 1]),
        (["q_proj"], []),
        (["model.layers.0.self_attn.q_proj", "up_proj"], [1]),
    ],
)
def test_targets_select_what_peft_selects(
    hf_tiny: tuple[Any, Path], targets: Any, layers: list[int] | None
) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    config = PeftConfig(
        r=2, target_modules=targets, layers_to_transform=layers, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(make_hf_model(), config)
    wanted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, LoraLayer)
    }
    ours = LoraConfig(r=2, target_modules=targets, layers_to_transform=layers)
    paths = target_paths(load_folder(hf_tiny[1]), ours)
    assert set(paths) == wanted
    assert len(paths) == len(wanted) > 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["q_pro"]}, ["'q_pro' matches nothing", "did you mean 'q_proj'"]),
        ({"target_modules": ["q_proj", "W_pack"]}, ["'W_pack'", "mlp.down_proj", "self_attn"]),
        ({"target_modules": ["lm_head"]}, ["'lm_head' matches nothing"]),
        ({"target_modules": "model.nothing"}, ["no path matches 'model.nothing'", "mlp.up_proj"]),
        ({"target_modules": "q_proj"}, ["'q_proj': as a text it is a pattern", "write [q_proj]"]),
        ({"target_modules": "(q_proj"}, ["is no regex", "'(q_proj'"]),
        # PEFT would adapt these modules too, or refuse them: the file would not mean this model.
        ({"target_modules": ".*proj|lm_head"}, ["also matches lm_head"]),
        ({"target_modules": ".*"}, ["also matches model.norm"]),
        ({"layers_to_transform": [0, 2]}, ["layers from 0 to 1", "got 2"]),
        ({"layers_to_transform": [-1]}, ["layers from 0 to 1", "got -1"]),
    ],
)
def test_a_target_that_cannot_be_met_says_what_exists(
    hf_tiny: tuple[Any, Path], config: dict[str, Any], words: list[str]
) -> None:
    model = load_folder(hf_tiny[1])
    with pytest.raises(ConfigError) as caught:
        add_lora(model, LoraConfig(**config))
    for word in words:
        assert word in str(caught.value)
    assert not lora_layers(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 0}, "lora.r must be at least 1; got 0"),
        ({"r": -3}, "lora.r must be at least 1; got -3"),
        ({"r": 2**53 - 1}, "lora.r must be at most 65,536; got 9007199254740991"),
        ({"r": 2.5}, "lora.r must be an int; got 2.5"),
        *(
            ({"rank_pattern": {"q_proj": r}}, "lora.rank_pattern must be a map of text to int; got")
            for r in (2.5, "8")
        ),
        ({"lora_alpha": 0}, "lora.lora_alpha must be above 0 and finite; got 0"),
        ({"lora_alpha": math.nan}, "lora.lora_alpha must be above 0 and finite; got nan"),
        ({"lora_dropout": 1.0}, "lora.lora_dropout must be in [0, 1); got 1.0"),
        ({"lora_dropout": -0.1}, "lora.lora_dropout must be in [0, 1); got -0.1"),
        ({"target_modules": []}, "lora.target_modules must not be empty"),
        ({"target_modules": ""}, "lora.target_modules must not be empty"),
        ({"bias": "all"}, "lora.bias must be one of 'none'; got 'all'"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "list of names"),
        ({"lora_alpha": math.inf}, "lora.lora_alpha must be above 0 and finite"),
        ({"alpha_pattern": {"(v": 1}}, "'(v' is no regex"),
        *(
            ({"rank_pattern": {"q_proj": r}}, f"q_proj must be at least 1; got {r!r}")
            for r in (0, -2)
        ),
        *(
            ({"alpha_pattern": {"v_proj": alpha}}, "lora.alpha_pattern.v_proj must be above 0")
            for alpha in (0, -1, math.nan, math.inf)
        ),
        *(
            ({"init_lora_weights": name}, "lora.init_lora_weights must be true, gaussian, pissa")
            for name in ("pisa", "pissa_niter_0", "pissa_niter_", False, "eva")
        ),
        *(
            ({"init_lora_weights": name}, "lora.init_lora_weights must be true/false or text; got")
            for name in (1, None)
        ),
    ],
)
def test_a_value_out_of_range_is_named_with_its_rule(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**config)
    assert words in str(caught.value)
