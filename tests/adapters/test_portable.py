"""The portable PEFT folder: read by PEFT, and by readers that know only r and lora_alpha."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.adapters import CONFIG, WEIGHTS, largest, silence
from support.adapters import adapted as adapted_by
from support.models import (
    LLAMA3_ROPE,
    load_folder,
    make_hf_model,
    our_logits,
    random_tokens,
    torch_logits,
)

from mlx_qlora.adapters.export import save_portable
from mlx_qlora.adapters.peft import PREFIX, load_adapter, save_adapter
from mlx_qlora.errors import AdapterError, ConfigError
from mlx_qlora.model.lora import LoraConfig, lora_layers

FILES = [CONFIG, WEIGHTS, "README.md"]
TOKENS = random_tokens(2, 21)

CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=8),
    "rslora": LoraConfig(r=4, lora_alpha=6.5, use_rslora=True),
    "patterns": LoraConfig(
        r=4,
        rank_pattern={"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
        alpha_pattern={"v_proj": 3.5, "down_proj": 64},
    ),
    "rslora patterns": LoraConfig(
        r=3, use_rslora=True, rank_pattern={"o_proj": 5}, alpha_pattern={"k_proj": 1}
    ),
    "one layer": LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], lora_alpha=3
    ),
    "whole path": LoraConfig(
        r=4,
        target_modules=["v_proj", "model.layers.0.mlp.up_proj"],
        layers_to_transform=[1],
    ),
    "regex": LoraConfig(r=3, target_modules=r"model\.layers\.0\..*_proj|.*1.*up_proj"),
    "all-linear": LoraConfig(r=2, target_modules="all-linear"),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
    "pissa patterns": LoraConfig(r=4, init_lora_weights="pissa", rank_pattern={"k_proj": 2}),
    "pissa rslora": LoraConfig(r=4, init_lora_weights="pissa", use_rslora=True),
    "olora": LoraConfig(r=4, init_lora_weights="olora", target_modules=["q_proj", "up_proj"]),
}
SCALE_IS_NOT_ALPHA_OVER_R = [name for name in CONFIGS if "rslora" in name or "patterns" in name]


adapted = partial(adapted_by, scale=0.1)


def naive_reader(folder: Path) -> Any:
    """The base plus lora_alpha / r * B A, from r and lora_alpha alone."""
    import torch

    config = json.loads((folder / CONFIG).read_text())
    factor = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / WEIGHTS)
    hf = make_hf_model(rope_parameters=LLAMA3_ROPE)
    weights = hf.state_dict()
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            B = tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            weights[f"{path}.weight"] += torch.from_numpy(factor * (B @ A))
    return hf


# ---- what others compute from it ---------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_without_a_warning_and_we_open_it_and_compute_the_same_logits(
    base: Path, tmp_path: Path, name: str
) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = adapted(base, CONFIGS[name])
    save_portable(model, tmp_path / "a")
    plain = make_hf_model(rope_parameters=LLAMA3_ROPE)
    without = torch_logits(plain, TOKENS)
    with silence():
        theirs: Any = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    logits = torch_logits(theirs, TOKENS)
    # By what the adapter changes, some 3.6: CPUs differ in the last digits of float32 products.
    assert largest(logits, our_logits(model, TOKENS)) < 1e-5 * max(1.0, largest(logits, without))
    assert largest(logits, without) > 0.05  # the adapter does something
    modules = theirs.base_model.model.named_modules()
    found = {path: m for path, m in modules if isinstance(m, LoraLayer)}
    assert found.keys() == {path for path, _ in lora_layers(model)}
    assert {m.scaling["default"] for m in found.values()} == {1.0}
    again = load_adapter(load_folder(base), tmp_path / "a")
    # The sums of A and B are in another order now.
    assert largest(our_logits(again, TOKENS), our_logits(model, TOKENS)) < 3e-5
    assert [p for p, _ in lora_layers(again)] == [p for p, _ in lora_layers(model)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reader_of_r_and_lora_alpha_alone_computes_our_logits(
    base: Path, tmp_path: Path, name: str
) -> None:
    model = adapted(base, CONFIGS[name])
    save_portable(model, tmp_path / "portable")
    ours = our_logits(model, TOKENS)
    assert largest(torch_logits(naive_reader(tmp_path / "portable"), TOKENS), ours) < 2e-5
    # What the folder is for: the same reader gets our own format wrong.
    save_adapter(model, tmp_path / "ours")
    error = largest(torch_logits(naive_reader(tmp_path / "ours"), TOKENS), ours)
    assert (error > 0.01) == (name in SCALE_IS_NOT_ALPHA_OVER_R)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_one_rank_and_the_config_names_nothing_else(
    base: Path, tmp_path: Path, name: str
) -> None:
    model = adapted(base, CONFIGS[name])
    assert save_portable(model, tmp_path / "a", "org/base") == tmp_path / "a"
    assert sorted(os.listdir(tmp_path / "a")) == sorted(FILES)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    r = max(len(layer.factors()[0]) for _, layer in lora_layers(model))
    assert config["r"] == config["lora_alpha"] == r
    assert type(config["r"]) is type(config["lora_alpha"]) is int
    assert config["use_rslora"] is config["use_dora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True and config["base_model_name_or_path"] == "org/base"
    assert isinstance(config["target_modules"], list)
    assert config["layers_to_transform"] == CONFIGS[name].layers_to_transform
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert len(tensors) == 2 * len(lora_layers(model))
    for key, tensor in tensors.items():
        assert tensor.dtype == np.float32
        assert tensor.shape[0 if "lora_A" in key else 1] == r


def test_what_needs_no_folding_is_written_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model = adapted(base, LoraConfig(r=4, lora_alpha=4))
    save_portable(model, tmp_path / "portable")
    save_adapter(model, tmp_path / "ours", mlx_lm=False)
    for file in FILES:
        ours, portable = ((tmp_path / kind / file).read_bytes() for kind in ("ours", "portable"))
        assert ours == portable


# ---- the folder --------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced_with_its_copy_for_mlx_lm(base: Path, tmp_path: Path) -> None:
    model = adapted(base, CONFIGS["rslora"])
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\0")
    assert (tmp_path / "a" / "mlx" / CONFIG).exists()
    save_portable(model, tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == sorted(FILES)
    before = {file: (tmp_path / "a" / file).read_bytes() for file in FILES}
    save_portable(model, tmp_path / "a")
    assert {file: (tmp_path / "a" / file).read_bytes() for file in FILES} == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("other", ["model.safetensors", "checkpoint-1/x", ".git/HEAD", "mlx/b"])
def test_a_folder_with_other_files_is_refused_and_left_alone(
    base: Path, tmp_path: Path, other: str
) -> None:
    model = adapted(base, CONFIGS["rslora"])
    folder = save_adapter(model, tmp_path / "a")
    (folder / other).parent.mkdir(exist_ok=True)
    (folder / other).write_text("mine")
    before = {f: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    with pytest.raises(ConfigError, match="would be deleted, as the whole folder is") as caught:
        save_portable(model, folder)
    assert other in str(caught.value)
    assert {f: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()} == before


def test_dora_is_refused_with_the_remedy(base: Path, tmp_path: Path) -> None:
    model = adapted(base, replace(CONFIGS["plain"], use_dora=True))
    with pytest.raises(AdapterError, match=r"vLLM and llama\.cpp do not support DoRA; merge"):
        save_portable(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_model_of_unknown_origin_is_refused(base: Path, tmp_path: Path) -> None:
    model = adapted(base, CONFIGS["plain"])
    model.source = None
    with pytest.raises(AdapterError, match="base_model_name_or_path"):
        save_portable(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []
