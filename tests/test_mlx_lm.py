"""mlx-lm itself opens the copy in `mlx/` and computes our logits."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import our_logits, random_tokens, randomise_lora
from safetensors.numpy import load_file
from tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.model.lora import lora_layers

TOKENS = random_tokens(2, 21)
CONFIGS = {
    "default": mq.LoraConfig(),
    "rslora": mq.LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "one layer": mq.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[0]),
    "one regex": mq.LoraConfig(r=4, target_modules=r"model\.layers\.1\..*(k|down)_proj"),
    "all-linear": mq.LoraConfig(r=2, lora_alpha=3.5, target_modules="all-linear"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mlx_lm") / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_lm_computes_our_logits(folder: Path, tmp_path: Path, name: str) -> None:
    import mlx_lm

    model, _ = mq.load(folder)
    without = our_logits(model, TOKENS)
    mq.add_lora(model, CONFIGS[name])
    randomise_lora(model)
    mq.save_adapter(model, tmp_path / "a")
    theirs = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "a" / "mlx"))[0]
    logits = np.array(theirs(mx.array(TOKENS)))
    assert np.abs(logits - our_logits(model, TOKENS)).max() < 1e-5
    assert np.abs(logits - without).max() > 0.01


def test_the_layout_is_the_transpose_of_peft_s_with_one_scale(folder: Path, tmp_path: Path) -> None:
    model, _ = mq.load(folder)
    mq.add_lora(model, mq.LoraConfig(r=4, lora_alpha=6, use_rslora=True))
    randomise_lora(model)
    mq.save_adapter(model, tmp_path / "a")
    arrays = load_file(tmp_path / "a" / "mlx" / "adapters.safetensors")
    layers = lora_layers(model)
    assert len(arrays) == 2 * len(layers) == 28
    for path, layer in layers:
        np.testing.assert_array_equal(arrays[f"{path}.lora_a"], np.array(layer.lora_A.weight).T)
        np.testing.assert_array_equal(arrays[f"{path}.lora_b"], np.array(layer.lora_B.weight).T)
    config = json.loads((tmp_path / "a" / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4
    assert config["lora_parameters"]["scale"] == 3.0


def test_the_copy_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    model, _ = mq.load(folder)
    mq.add_lora(model, mq.LoraConfig(r=2))
    mq.save_adapter(model, tmp_path / "a", mlx_lm=False)
    assert not (tmp_path / "a" / "mlx").exists()
