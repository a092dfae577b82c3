"""Several adapters on one model: switching is exact, and sums are those of PEFT."""

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.adapters import largest, weights_of
from support.models import (
    LLAMA3_ROPE,
    load_folder,
    make_hf_model,
    our_logits,
    random_tokens,
    randomise_lora,
    torch_logits,
)
from support.tiny_folder import write_model, write_rows

import mlx_qlora as mq
from mlx_qlora.adapters.peft import load_adapter, save_adapter
from mlx_qlora.adapters.several import (
    active,
    adapter_names,
    attach,
    combine,
    detach,
    disabled,
    switch,
)
from mlx_qlora.errors import AdapterError, ConfigError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers, trainable_count
from mlx_qlora.model.quantize import QuantConfig

TOKENS = random_tokens(2, 17)

# Other ranks, scales, targets and layers, and one with DoRA's rows.
CONFIGS = {
    "all": LoraConfig(r=4, lora_alpha=6),
    "some": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "dora": LoraConfig(r=3, lora_alpha=4, use_dora=True),
}
# Three that PEFT can add up with `linear`: one rank.
SUMMANDS = {
    "a": LoraConfig(r=4, lora_alpha=6),
    "b": LoraConfig(r=4, lora_alpha=2.5),
    "c": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
}


@pytest.fixture(scope="module")
def folders(
    hf_tiny: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Name -> the folder of an adapter of that config, which does something."""
    home = tmp_path_factory.mktemp("adapters")
    configs = {**CONFIGS, **SUMMANDS, "rank 2": LoraConfig(r=2)}
    for seed, (name, config) in enumerate(configs.items(), 1):
        model = add_lora(load_folder(hf_tiny[1]), config)
        randomise_lora(model, seed)
        save_adapter(model, home / name)
    return lambda name: home / name


def with_all(base: Path, folders: Callable[[str], Path], names: Any) -> LlamaForCausalLM:
    model = load_folder(base)
    for name in names:
        attach(model, folders(name), name)
    return model


# ---- switching ---------------------------------------------------------------------------------


def test_each_of_three_computes_what_it_computes_alone_and_none_is_the_base(base, folders):
    alone = {n: our_logits(load_adapter(load_folder(base), folders(n)), TOKENS) for n in CONFIGS}
    bare = our_logits(load_folder(base), TOKENS)
    model = with_all(base, folders, CONFIGS)
    assert adapter_names(model) == list(CONFIGS) and active(model) == "dora"
    for name in ("some", "dora", None, "all", "all", "some", None):
        assert switch(model, name) is model and active(model) == name
        expected = alone[name] if name else bare
        np.testing.assert_array_equal(our_logits(model, TOKENS), expected)
    assert all(np.abs(logits - bare).max() > 0.01 for logits in alone.values())


def test_only_the_active_adapter_is_among_the_parameters(base, folders):
    model = with_all(base, folders, CONFIGS)
    names = {name for name, _ in tree_flatten(load_folder(base).parameters())}
    for name in CONFIGS:
        alone = load_adapter(load_folder(base), folders(name))
        switch(model, name)
        theirs = weights_of(alone)
        ours = weights_of(model)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].tobytes() == theirs[n].tobytes() for n in theirs)
        assert len(model.named_modules()) == len(alone.named_modules())
        assert model.lora_config == alone.lora_config
    switch(model, None)
    assert not weights_of(model) and trainable_count(model) == 0
    assert {name for name, _ in tree_flatten(model.parameters())} == names
    assert not hasattr(model, "lora_config")


def test_save_adapter_writes_the_active_one(base, folders, tmp_path):
    model = with_all(base, folders, CONFIGS)
    for name in CONFIGS:
        switch(model, name)
        save_adapter(model, tmp_path / name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (folders(name) / file).read_bytes()
    switch(model, None)
    with pytest.raises(AdapterError, match="no LoRA layers"):
        save_adapter(model, tmp_path / "none")


def test_disabled_lends_the_base_nested_and_after_an_error(base, folders):
    bare = our_logits(load_folder(base), TOKENS)
    model = with_all(base, folders, ["all", "some"])
    before = our_logits(model, TOKENS)
    with disabled(model) as lent:
        assert lent is model
        with disabled(model):
            assert active(model) is None
            np.testing.assert_array_equal(our_logits(model, TOKENS), bare)
        assert active(model) is None
    assert active(model) == "some"
    with pytest.raises(KeyError), disabled(model):
        switch(model, "all")
        raise KeyError
    assert active(model) == "some"
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)
    with disabled(model):
        detach(model, "some")
    assert active(model) is None and adapter_names(model) == ["all"]


def test_layers_that_have_no_name_yet_become_the_default(base, folders):
    model = add_lora(load_folder(base), LoraConfig(r=2))
    randomise_lora(model)
    alone = our_logits(model, TOKENS)
    assert (adapter_names(model), active(model)) == (["default"], "default")
    attach(model, folders("all"), "all")
    switch(model, None)
    add_lora(model, LoraConfig(r=1), seed=3)
    assert adapter_names(model) == ["default", "all", "default_2"]
    assert active(model) == "default_2"
    switch(model, "default")
    np.testing.assert_array_equal(our_logits(model, TOKENS), alone)


def test_a_quantised_base_is_itself_again(base, folders):
    quant = mq.QuantConfig(bits=4, group_size=32)
    bare = our_logits(load_folder(base, quant, "quantized"), TOKENS)
    alone = load_adapter(load_folder(base, quant, "quantized"), folders("dora"))
    model = load_folder(base, quant, "quantized")
    attach(attach(model, folders("dora"), "dora"), folders("all"), "all")
    switch(model, "dora")
    np.testing.assert_array_equal(our_logits(model, TOKENS), our_logits(alone, TOKENS))
    with disabled(model):
        np.testing.assert_array_equal(our_logits(model, TOKENS), bare)


# ---- training and generating -------------------------------------------------------------------


def test_a_run_trains_the_active_adapter_and_leaves_the_base_and_the_others(tmp_path):
    write_model(tmp_path / "model")
    model, tokenizer = mq.load(tmp_path / "model")
    bare = our_logits(model, TOKENS)
    said = mq.generate(model, tokenizer, "count", max_new_tokens=8, temperature=0.0)
    for seed, name in enumerate(("one", "two")):
        one = add_lora(mq.load(tmp_path / "model")[0], LoraConfig(r=2), seed)
        randomise_lora(one, seed)
        attach(model, save_adapter(one, tmp_path / name), name)
    alone = {name: our_logits(switch(model, name), TOKENS) for name in ("one", "two")}

    switch(model, "one")
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    examples = mq.read_examples(rows, tokenizer, mq.DataConfig(max_length=64))
    config = mq.RunConfig(
        lora=LoraConfig(loraplus_lr_ratio=2.0),
        training=mq.TrainingConfig(max_steps=3, warmup_steps=0, learning_rate=1e-2),
        checkpointing=mq.CheckpointingConfig(output_dir=str(tmp_path / "out")),
    )
    mq.fine_tune(model, tokenizer, examples, None, config)
    trained = our_logits(model, TOKENS)
    assert np.abs(trained - alone["one"]).max() > 1e-3

    np.testing.assert_array_equal(our_logits(switch(model, "two"), TOKENS), alone["two"])
    np.testing.assert_array_equal(our_logits(switch(model, None), TOKENS), bare)
    assert mq.generate(model, tokenizer, "count", max_new_tokens=8, temperature=0.0) == said
    np.testing.assert_array_equal(our_logits(switch(model, "one"), TOKENS), trained)
    assert model.lora_config.loraplus_lr_ratio == 2.0
    again = load_adapter(mq.load(tmp_path / "model")[0], tmp_path / "out")
    np.testing.assert_array_equal(our_logits(again, TOKENS), trained)


def test_detach_frees_the_memory(base, folders, tmp_path):
    big = add_lora(load_folder(base), LoraConfig(r=64))
    save_adapter(big, tmp_path / "big")
    size = 4 * trainable_count(big)
    del big
    model = with_all(base, folders, ["all"])

    def memory() -> int:
        gc.collect()
        mx.synchronize()
        return mx.get_active_memory()

    before = memory()
    attach(model, tmp_path / "big", "big")
    with_big = memory()
    assert with_big - before > 0.9 * size
    switch(model, "all")
    assert memory() - before > 0.9 * size  # kept while it is off
    detach(model, "big")
    assert memory() - before < 0.1 * size
    assert adapter_names(model) == ["all"] == [active(model)]
    detach(model, "all")
    assert active(model) is None and not lora_layers(model)


# ---- sums --------------------------------------------------------------------------------------


def peft_with(folders: Callable[[str], Path], names: Any) -> Any:
    from peft import PeftModel

    hf = make_hf_model(rope_parameters=LLAMA3_ROPE)
    first, *others = names
    model = PeftModel.from_pretrained(hf, folders(first), adapter_name=first)
    for name in others:
        model.load_adapter(folders(name), adapter_name=name)
    return model.eval()


def test_peft_switches_and_adds_up_to_the_same_logits(base, folders):
    theirs, model = peft_with(folders, SUMMANDS), with_all(base, folders, SUMMANDS)
    for name in SUMMANDS:
        theirs.set_adapter(name)
        switch(model, name)
        assert largest(our_logits(model, TOKENS), torch_logits(theirs, TOKENS)) < 1e-5
    with theirs.disable_adapter(), disabled(model):
        assert largest(our_logits(model, TOKENS), torch_logits(theirs, TOKENS)) < 1e-5
    bare = our_logits(switch(model, None), TOKENS)
    sums = [
        ("cat", {"a": 0.7, "b": 0.5, "c": 0.25}),
        ("cat", {"a": 1.0, "b": -0.6}),
        ("linear", {"a": 0.7, "b": 0.5, "c": 0.25}),
        ("linear", {"b": -0.6, "a": 1.0}),
        ("linear", {"c": -0.5, "a": 0.0}),
        ("cat", {"c": 0.3}),
        ("linear", {"b": -1.5}),
    ]
    seen = []
    for number, (kind, weights) in enumerate(sums):
        name = f"sum {number}"
        theirs.add_weighted_adapter(list(weights), list(weights.values()), f"sum{number}", kind)
        theirs.set_adapter(f"sum{number}")
        theirs.eval()  # the new adapter's dropout is in training mode
        assert active(combine(model, weights, name, kind)) == name
        logits = our_logits(model, TOKENS)
        assert largest(logits, torch_logits(theirs, TOKENS)) < 1e-5, (kind, weights)
        assert largest(logits, bare) > 0.01
        seen.append(logits)
    assert largest(seen[0], seen[2]) > 0.01  # the two kinds differ


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_a_sum_is_an_adapter_like_others_and_opens_in_peft(base, folders, tmp_path, kind):
    from peft import PeftModel

    model = with_all(base, folders, SUMMANDS)
    combine(model, {"c": 0.5, "a": -0.25}, "sum", kind)
    logits = our_logits(model, TOKENS)
    save_adapter(model, tmp_path / "sum")
    hf = make_hf_model(rope_parameters=LLAMA3_ROPE)
    theirs = PeftModel.from_pretrained(hf, tmp_path / "sum").eval()
    assert largest(torch_logits(theirs, TOKENS), logits) < 1e-5
    switch(model, "a")
    np.testing.assert_array_equal(our_logits(switch(model, "sum"), TOKENS), logits)


def test_cat_is_the_exact_sum_whatever_the_configs(base, tmp_path):
    """rsLoRA, patterns of ranks, and layers that only one has: against dense matrices."""
    configs = {
        "rs": LoraConfig(r=4, lora_alpha=3, use_rslora=True, rank_pattern={"q_proj": 7}),
        "one": LoraConfig(r=2, target_modules=["q_proj", "o_proj"], layers_to_transform=[1]),
    }
    model, updates = load_folder(base), {}
    for seed, (name, config) in enumerate(configs.items()):
        other = add_lora(load_folder(base), config)
        randomise_lora(other, seed)
        attach(model, save_adapter(other, tmp_path / name), name)
        updates[name] = {
            path: layer.scale * np.array(layer.lora_B.weight) @ np.array(layer.lora_A.weight)
            for path, layer in lora_layers(model)
        }
    weights = {"one": -0.75, "rs": 1.25}
    combine(model, weights, "sum")
    layers = dict(lora_layers(model))
    assert layers.keys() == updates["rs"].keys() | updates["one"].keys()
    for path, layer in layers.items():
        expected = sum(w * updates[n][path] for n, w in weights.items() if path in updates[n])
        got = layer.scale * np.array(layer.lora_B.weight) @ np.array(layer.lora_A.weight)
        assert layer.lora_A.weight.shape[0] == model.lora_config.r == 9
        np.testing.assert_allclose(got, expected, atol=1e-6)
    again = load_adapter(load_folder(base), save_adapter(model, tmp_path / "sum"))
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(model, TOKENS))


def test_peft_itself_multiplies_a_sum_with_rslora_once_more(base, tmp_path):
    """If this fails PEFT has changed, and `combine`'s docstring is out of date."""
    model = load_folder(base)
    for seed, name in enumerate(("x", "y")):
        other = add_lora(load_folder(base), LoraConfig(r=2, use_rslora=True))
        randomise_lora(other, seed)
        attach(model, save_adapter(other, tmp_path / name), name)
    theirs = peft_with(lambda name: tmp_path / name, ["x", "y"])
    weights = {"x": 0.5, "y": 0.5}
    theirs.add_weighted_adapter(["x", "y"], [0.5, 0.5], "sum", "cat")
    theirs.set_adapter("sum")
    theirs.eval()
    combine(model, {n: w * math.sqrt(4) for n, w in weights.items()}, "times root of the rank")
    assert largest(our_logits(model, TOKENS), torch_logits(theirs, TOKENS)) < 1e-5
    combine(model, weights, "sum")
    assert largest(our_logits(model, TOKENS), torch_logits(theirs, TOKENS)) > 0.01


# ---- what is refused ---------------------------------------------------------------------------


def test_names_that_are_unknown_or_taken(base, folders):
    model = with_all(base, folders, ["all", "some"])
    for call in (
        lambda: switch(model, "som"),
        lambda: detach(model, "som"),
        lambda: combine(model, {"all": 1.0, "som": 1.0}, "sum"),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert str(error.value) == (
            "the model has no adapter 'som'; did you mean 'some'?; it has 'all', 'some'"
        )
    for call in (
        lambda: attach(model, folders("all"), "some"),
        lambda: combine(model, {"all": 1.0}, "some"),
    ):
        with pytest.raises(ConfigError, match=r"already has an adapter 'some'; choose another"):
            call()
    with pytest.raises(ConfigError, match="must be text; got ''"):
        attach(model, folders("all"), "")
    with pytest.raises(ConfigError, match="no adapter 'x'; it has none"):
        switch(load_folder(base), "x")
    assert adapter_names(model) == ["all", "some"] and active(model) == "some"


def test_a_folder_that_is_no_adapter_leaves_the_model_as_it_was(base, folders, tmp_path):
    model = with_all(base, folders, ["all", "some"])
    before = our_logits(model, TOKENS)
    with pytest.raises(AdapterError, match="is no PEFT adapter"):
        attach(model, tmp_path / "nothing", "new")
    assert adapter_names(model) == ["all", "some"] and active(model) == "some"
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)


def test_sums_that_do_not_exist(base, folders):
    model = with_all(base, folders, ["all", "dora", "rank 2"])
    with pytest.raises(ConfigError, match=r"must be cat or linear; got 'liner'; did you mean"):
        combine(model, {"all": 1.0}, "sum", "liner")
    with pytest.raises(ConfigError, match="at least one"):
        combine(model, {}, "sum")
    with pytest.raises(ConfigError, match=r"weights\['all'\] must be a finite number; got nan"):
        combine(model, {"all": math.nan}, "sum")
    with pytest.raises(ConfigError, match="'dora' uses DoRA"):
        combine(model, {"all": 1.0, "dora": 1.0}, "sum")
    with pytest.raises(ConfigError, match=r"equal ranks; those of model.* are \[4, 2\]; use cat"):
        combine(model, {"all": 1.0, "rank 2": 1.0}, "sum", "linear")
    assert adapter_names(model) == ["all", "dora", "rank 2"] and active(model) == "rank 2"


@pytest.mark.parametrize("begin", ["pissa", "olora"])
def test_an_adapter_that_began_with_a_part_of_the_base_shares_it(base, folders, begin):
    def packed() -> LlamaForCausalLM:
        return load_folder(base, QuantConfig(4, 32))

    bare, alone = our_logits(packed(), TOKENS), attach(packed(), folders("all"), "all")
    model = add_lora(packed(), LoraConfig(r=2, init_lora_weights=begin))
    randomise_lora(model)
    begun = our_logits(model, TOKENS)
    with disabled(model):
        np.testing.assert_array_equal(our_logits(model, TOKENS), bare)
    attach(model, folders("all"), "all")
    np.testing.assert_array_equal(our_logits(model, TOKENS), our_logits(alone, TOKENS))
    np.testing.assert_array_equal(our_logits(switch(model, "default"), TOKENS), begun)
    for kind in ("cat", "linear"):
        combine(model, {"default": 1.0}, kind, kind)
        assert largest(our_logits(model, TOKENS), begun) < 1e-4


@pytest.mark.parametrize("begin", ["pissa", "olora"])
def test_a_dense_base_of_which_a_part_was_taken_off_is_not_shared(base, folders, tmp_path, begin):
    bare = our_logits(load_folder(base), TOKENS)
    model = add_lora(load_folder(base), LoraConfig(r=2, init_lora_weights=begin))
    randomise_lora(model)
    before = our_logits(model, TOKENS)
    for call in (
        lambda: attach(model, folders("all"), "all"),
        lambda: switch(model, None),
        lambda: detach(model, "default"),
        lambda: combine(model, {"default": 1.0}, "sum"),
    ):
        with pytest.raises(ConfigError, match=rf"'default' began with .*'{begin}'.*load the base"):
            call()
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)
    with disabled(model):
        assert largest(our_logits(model, TOKENS), bare) < 1e-4
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)

    # The remedy that the message names.
    save_adapter(model, tmp_path / "saved")
    again = attach(load_folder(base), tmp_path / "saved", "begun")
    attach(again, folders("all"), "all")
    assert largest(our_logits(switch(again, "begun"), TOKENS), before) < 1e-4


def test_a_base_whose_matrices_were_exchanged_is_refused(base, folders):
    model = with_all(base, folders, ["all"])
    switch(model, None)
    model.layers[0].self_attn.q_proj = load_folder(base).layers[0].self_attn.q_proj
    with pytest.raises(ConfigError, match=r"q_proj of the base was replaced since .* 'all'"):
        switch(model, "all")
