"""Adapters against PEFT itself: what it reads of ours, what we read of its, what we refuse."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from support.adapters import CONFIG, WEIGHTS, adapted, largest, silence
from support.command_line import contents
from support.models import (
    load_folder,
    make_hf_model,
    our_logits,
    random_tokens,
    randomise_lora,
    save_hf,
    torch_logits,
)
from support.tiny_folder import hf_smollm2

from mlx_qlora.adapters import options
from mlx_qlora.adapters.export import save_gguf_adapter, save_portable
from mlx_qlora.adapters.peft import load_adapter, save_adapter, save_mlx_lm
from mlx_qlora.errors import AdapterError, ConfigError
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers
from mlx_qlora.model.weights import load_model, open_checkpoint

TOKENS = random_tokens(2, 21)


# ---- ours, read by PEFT ------------------------------------------------------------------------


def test_peft_finds_the_base_by_the_name_in_our_config(base: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model = adapted(base)
    save_adapter(model, tmp_path / "a")
    with silence():
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert largest(torch_logits(theirs, TOKENS), our_logits(model, TOKENS)) < 1e-5


@pytest.mark.slow
def test_peft_on_transformers_smollm2_computes_our_logits(
    short_files: ModelFiles, tmp_path: Path
) -> None:
    from peft import PeftModel

    bare, ours = (
        load_model(open_checkpoint(short_files), None, mx.float32, "resident") for _ in range(2)
    )
    add_lora(ours, LoraConfig())
    randomise_lora(ours, scale=0.01)
    save_adapter(ours, tmp_path / "a")
    plain = hf_smollm2(short_files.path)
    tokens = random_tokens(1, 8, vocab=49152)
    without = torch_logits(plain, tokens)
    base = largest(our_logits(bare, tokens), without)
    with silence():
        theirs = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    logits = torch_logits(theirs, tokens)
    theirs.unload()
    assert largest(logits, without) > 0.5
    # SmolLM2 magnifies rounding: logits reach 30, and torch's own float32 is 1e-4 from float64.
    assert base < 5e-4
    assert largest(logits, our_logits(ours, tokens)) < 5e-4


def test_the_written_config_says_everything_that_peft_would_otherwise_guess(
    base: Path, tmp_path: Path
) -> None:
    save_adapter(adapted(base, LoraConfig(r=4, lora_alpha=8)), tmp_path / "a", "org/base")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert type(config["lora_alpha"]) is int  # Ollama reads it as an unsigned integer
    assert config["inference_mode"] is True
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft\n")
    assert "base_model:adapter:org/base" in card


# ---- PEFT's, read by us ------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_a_16_bit_adapter_becomes_float32_masters(
    base: Path, tmp_path: Path, dtype: str, error: float
) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    model = adapted(base)
    save_adapter(model, tmp_path / "a")
    half = getattr(torch, dtype)
    arrays = load_file(tmp_path / "a" / WEIGHTS)
    tensors = {n: torch.from_numpy(a).to(half) for n, a in arrays.items()}
    save_torch(tensors, tmp_path / "a" / WEIGHTS)
    again = load_adapter(load_folder(base), tmp_path / "a")
    for name, weight in tree_flatten(again.trainable_parameters()):
        assert weight.dtype == mx.float32
        rounded = tensors[f"base_model.model.{name}"].float().numpy()
        np.testing.assert_array_equal(np.array(weight), rounded)
    assert largest(our_logits(again, TOKENS), our_logits(model, TOKENS)) < error * 10


def test_a_loaded_adapter_is_trainable_and_remembers_its_config(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True)
    save_adapter(adapted(base, config), tmp_path / "a")
    model = load_adapter(load_folder(base), tmp_path / "a")
    assert model.lora_config == config
    assert {m.dropout for _, m in lora_layers(model)} == {0.25}
    assert len(tree_flatten(model.trainable_parameters())) == 28


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_adapter, save_mlx_lm, save_portable])
def test_the_same_adapter_is_the_same_bytes_each_time(
    base: Path, tmp_path: Path, save: Any
) -> None:
    model, written = adapted(base), set()
    for i in range(8):
        folder = save(model, tmp_path / str(i))
        written.add(b"".join(file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))))
    assert len(written) == 1


@pytest.mark.parametrize("save", [save_adapter, save_mlx_lm, save_portable, save_gguf_adapter])
def test_a_model_without_lora_layers_cannot_be_saved(base: Path, tmp_path: Path, save: Any) -> None:
    with pytest.raises(AdapterError, match="no LoRA layers"):
        save(load_folder(base), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_an_unknown_base_is_refused_and_the_message_names_the_field(
    base: Path, tmp_path: Path
) -> None:
    model = adapted(base)
    model.source = replace(model.source, hf_id=None)
    with pytest.raises(AdapterError, match=r"model\.base_model_name_or_path=org/name"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "a", base_model_name_or_path="org/base")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_a_model_that_has_an_adapter_takes_no_second_one(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    save_adapter(model, tmp_path / "a")
    before = our_logits(model, TOKENS)
    with pytest.raises(ConfigError, match="already has LoRA layers"):
        load_adapter(model, tmp_path / "a")
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrites adapter_config.json; a value of ... removes its key."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": "yes"}, ["use_dora must be true/false; got 'yes'"]),
        ({"use_dora": True}, ["lora_magnitude_vector is missing"]),
        ({"bias": "all"}, ["bias is 'all'; supported: 'none'"]),
        ({"rank_pattern": {"q_proj": 8}}, ["q_proj.lora_A.weight has shape"]),
        *(
            ({"rank_pattern": ranks}, ["rank_pattern must be a map of text to int"])
            for ranks in (["q_proj"], {"q_proj": "8"}, {"q_proj": 4.0})
        ),
        ({"rank_pattern": {"q_proj": 0}}, ["lora.rank_pattern.q_proj must be at least 1"]),
        ({"rank_pattern": {"(q_proj": 4}}, ["'(q_proj' is no regex"]),
        ({"alpha_pattern": [8]}, ["alpha_pattern must be a map of text to number; got [8]"]),
        *(({"alpha_pattern": {"q_proj": alpha}}, ["alpha_pattern"]) for alpha in ("x", None, -1)),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"layer_replication": [[0, 2], [0, 2]]}, ["layer_replication"]),
        ({"target_parameters": ["x"]}, ["target_parameters"]),
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'; supported: 'LORA'"]),
        # These write an adapter for a base that they have changed.
        ({"init_lora_weights": "pissa"}, ["init_lora_weights is 'pissa'"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["init_lora_weights is 'pissa_niter_16'"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights is 'olora'"]),
        ({"init_lora_weights": "loftq", "loftq_config": {"a": 1}}, ["init_lora_weights"]),
        ({"kasa_config": {"beta": 1}}, ["kasa_config"]),
        ({"peft_type": ...}, ["peft_type is missing"]),
        ({"r": ...}, ["r is missing"]),
        ({"lora_alpha": ...}, ["lora_alpha is missing"]),
        ({"target_modules": ...}, ["target_modules is missing"]),
        ({"r": "4"}, ["r must be an int; got '4'"]),
        ({"r": True}, ["r must be an int; got True"]),
        ({"lora_alpha": "16"}, ["lora_alpha must be a number; got '16'"]),
        ({"lora_dropout": "0.1"}, ["lora_dropout must be a number; got '0.1'"]),
        ({"use_rslora": "false"}, ["use_rslora must be true/false; got 'false'"]),
        ({"rank_pattern": {"q_proj": True}}, ["rank_pattern must be a map of text to int"]),
        ({"layers_to_transform": True}, ["layers_to_transform must be an int or list of int"]),
        ({"layers_to_transform": [True]}, ["layers_to_transform must be an int or list of int"]),
        ({"exclude_modules": [1]}, ["exclude_modules must be text or list of text; got [1]"]),
        ({"exclude_modules": ".*"}, ["exclude_modules and layers_pattern leave no linear"]),
        ({"exclude_modules": "(x"}, [CONFIG]),
        ({"layers_pattern": {"a": 1}}, ["layers_pattern must be text or list of text"]),
        *(({name: "false"}, [f"{name} is 'false'"]) for name in options.OFF),
        *(({name: "null"}, [f"{name} is 'null'"]) for name in options.ABSENT),
        ({"init_lora_weights": "false"}, ["init_lora_weights is 'false'"]),
        ({"use_newlora": True}, ["use_newlora is True, an unknown option"]),
        ({"scaling": 3.0}, ["scaling is 3.0, an unknown option"]),
        ({"r": 0}, ["lora.r must be at least 1; got 0"]),
        ({"lora_alpha": "x"}, [CONFIG]),
        ({"target_modules": 5}, [CONFIG]),
        ({"target_modules": [5]}, [CONFIG]),
        ({"layers_to_transform": "0"}, [CONFIG]),
        ({"layers_to_transform": [7]}, ["layers from 0 to 1"]),
        ({"target_modules": ["W_pack"]}, ["another model", "'W_pack' matches nothing"]),
        (
            {"lora_bias": True, "bias": "all", "modules_to_save": ["lm_head"], "r": ...},
            ["lora_bias", "bias", "modules_to_save", "r is missing"],
        ),
    ],
)
def test_a_config_that_we_would_compute_differently_is_refused_naming_every_reason(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    save_adapter(adapted(base), tmp_path / "a")
    change_config(tmp_path / "a", **changes)
    model = load_folder(base)
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, tmp_path / "a")
    for word in (str(tmp_path / "a"), *words):
        assert word in str(caught.value)
    assert not lora_layers(model)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", "null", '"text"', "\x00\xff", '{"peft_type": "LORA"', "[" * 100_000],
)
def test_a_config_that_is_no_object_is_refused(base: Path, tmp_path: Path, text: str) -> None:
    save_adapter(adapted(base), tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=CONFIG):
        load_adapter(load_folder(base), tmp_path / "a")


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS, "folder"])
def test_a_missing_file_is_named(base: Path, tmp_path: Path, missing: str) -> None:
    save_adapter(adapted(base), tmp_path / "a")
    if missing == "folder":
        shutil.rmtree(tmp_path / "a")
    else:
        (tmp_path / "a" / missing).unlink()
    with pytest.raises(AdapterError, match="no such folder" if missing == "folder" else missing):
        load_adapter(load_folder(base), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 32, "intermediate_size": 80}, "has shape [4, 64], not [4, 32]"),
        ({"num_hidden_layers": 1}, "belongs to no target of this model"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_key_value_heads": 4}, "has shape [32, 4], not [64, 4]"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    save_adapter(adapted(base), tmp_path / "a")
    other = load_folder(save_hf(make_hf_model(**change), tmp_path / "other"))
    with pytest.raises(AdapterError) as caught:
        load_adapter(other, tmp_path / "a")
    assert words in str(caught.value)
    assert "for another model" in str(caught.value)
    assert not lora_layers(other)


# ---- saving over something ---------------------------------------------------------------------


def test_saving_over_a_folder_keeps_other_files_and_leaves_no_traces(
    base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    save_adapter(adapted(base), folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "mlx" / "notes.txt").write_text("mine")
    newer = adapted(base, LoraConfig(r=2), seed=9)
    save_adapter(newer, folder)
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    adapter = {CONFIG, WEIGHTS, "README.md", f"mlx/{CONFIG}", "mlx/adapters.safetensors"}
    assert files == adapter | {"notes.txt", "mlx/notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    again = load_adapter(load_folder(base), folder)
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(newer, TOKENS))


@pytest.mark.parametrize("at", ["adapter_model.safetensors", "adapters.safetensors"])
def test_a_failure_while_saving_leaves_the_old_adapter_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    old = adapted(base)
    save_adapter(old, tmp_path / "a")
    before = contents(tmp_path)

    def full_disk(arrays: Any, path: Path, metadata: Any = None) -> None:
        save_file(arrays, path, metadata)
        if path.name == at:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_qlora.adapters.peft.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(base, LoraConfig(r=2), seed=9), tmp_path / "a")
    assert contents(tmp_path) == before
    again = load_adapter(load_folder(base), tmp_path / "a")
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(old, TOKENS))


@pytest.mark.parametrize("at", ["adapter_model.safetensors", "adapters.safetensors"])
def test_what_the_disk_garbles_is_noticed_before_it_replaces_anything(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def garble(arrays: dict[str, Any], path: Path, metadata: Any = None) -> None:
        first = next(iter(arrays))
        garbled = {first: arrays[first] + np.float32(1e-6)} if path.name == at else {}
        save_file({**arrays, **garbled}, path)

    monkeypatch.setattr("mlx_qlora.adapters.peft.save_file", garble)
    with pytest.raises(AdapterError, match="read back is not what was written"):
        save_adapter(adapted(base), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_every_option_of_peft_is_known_to_us() -> None:
    """A newer PEFT may add one: then it belongs to FIXED, RULES or HARMLESS."""
    from peft import LoraConfig as PeftConfig

    assert set(PeftConfig().to_dict()) <= options.KNOWN


def test_the_revision_is_the_bases_own_and_never_a_copys(tmp_path: Path) -> None:
    """AutoPeftModel loads the base at this revision, so a copy's commit would be a wrong one."""
    model = load_folder(save_hf(make_hf_model(), tmp_path / "model"))
    add_lora(model, LoraConfig(r=2))
    for source, revision in (("org/base", "c0ffee"), ("org/base-4bit", None)):
        model.source = ModelFiles(tmp_path / "model", "org/base", "c0ffee", source)
        save_adapter(model, tmp_path / "adapter")
        written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (written["base_model_name_or_path"], written["revision"]) == ("org/base", revision)


def test_the_first_of_two_patterns_counts_in_the_file_too(base: Path, tmp_path: Path) -> None:
    """Keys in another order would give some linears another rank."""
    ranks = {"q_proj": 3, "model.layers.0.self_attn.q_proj": 5}
    model = add_lora(load_folder(base), LoraConfig(r=2, rank_pattern=ranks))
    randomise_lora(model)
    save_adapter(model, tmp_path / "a", "org/base")
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert list(written["rank_pattern"]) == list(ranks)
    again = load_adapter(load_folder(base), tmp_path / "a")
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(model, TOKENS))


@pytest.mark.parametrize("moves", range(1, 5))
def test_an_adapter_over_another_is_never_half_of_each(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Same shapes, other scale: a reader could not tell that two files are of two adapters."""
    old = add_lora(load_folder(base), LoraConfig(r=2, lora_alpha=2))
    new = add_lora(load_folder(base), LoraConfig(r=2, lora_alpha=20))
    for model, seed in ((old, 1), (new, 2)):
        randomise_lora(model, seed)
    save_adapter(old, tmp_path / "a", "org/base")
    left, replace = [moves], os.replace

    def dies(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the power went out")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):
        patch.setattr(os, "replace", dies)
        save_adapter(new, tmp_path / "a", "org/base")
    for folder in (tmp_path / "a", tmp_path / "a" / "mlx"):
        if (folder / CONFIG).exists():  # then it is one adapter, whole
            found = our_logits(load_adapter(load_folder(base), folder), TOKENS)
            assert any(np.abs(found - our_logits(m, TOKENS)).max() < 1e-5 for m in (old, new))
        else:
            with pytest.raises(AdapterError):
                load_adapter(load_folder(base), folder)
    save_adapter(new, tmp_path / "a", "org/base")
    found = our_logits(load_adapter(load_folder(base), tmp_path / "a"), TOKENS)
    np.testing.assert_array_equal(found, our_logits(new, TOKENS))


def test_a_copy_for_mlx_lm_that_is_no_longer_written_does_not_stay(
    base: Path, tmp_path: Path
) -> None:
    model = adapted(base)
    save_adapter(model, tmp_path / "a", "org/base")
    (tmp_path / "a" / "mlx" / "mine.txt").write_text("kept")
    save_adapter(model, tmp_path / "a", "org/base", mlx_lm=False)
    assert [path.name for path in (tmp_path / "a" / "mlx").iterdir()] == ["mine.txt"]
