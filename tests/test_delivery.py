"""`merge`, `export` and `push` on the command line, from nothing but a run's own folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import our_logits, random_tokens, randomise_lora
from tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.cli import main
from mlx_qlora.config import build, to_yaml

TOKENS = random_tokens(2, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("delivery") / "model")


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """(the folder that a run leaves, logits of its model)."""
    out = tmp_path_factory.mktemp("run") / "outputs"
    model, tokenizer = mq.load(folder, mq.QuantConfig(8, 32))
    mq.add_lora(model, mq.LoraConfig(r=4, lora_alpha=6, use_rslora=True))
    randomise_lora(model)
    mq.save_adapter(model, out, base_model_name_or_path="org/base")
    tokenizer.save(out)
    config = build({"model": {"source": str(folder), "bits": 8, "group_size": 32}})
    (out / "run.yaml").write_text(to_yaml(config))
    return out, our_logits(model, TOKENS)


def call(*words: Any) -> int:
    return main([str(word) for word in words])


def test_merge_needs_the_run_s_folder_alone(
    run: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, logits = run
    merged = tmp_path / "merged"
    assert call("merge", "--adapter", out, "--output-dir", merged, "--save-dtype", "float32") == 0
    assert "merged" in capsys.readouterr().out
    model, _ = mq.load(merged)
    assert np.abs(our_logits(model, TOKENS) - logits).max() < 1e-4


def test_merge_into_the_original_weights_is_another_model(
    run: tuple[Path, np.ndarray], folder: Path, tmp_path: Path
) -> None:
    out, logits = run
    words = ["merge", "--adapter", out, "--output-dir", tmp_path / "m", "--save-dtype", "float32"]
    assert call(*words, "--base", folder) == 0
    wanted, _ = mq.load(folder, adapter=out)
    found = our_logits(mq.load(tmp_path / "m")[0], TOKENS)
    assert np.abs(found - our_logits(wanted, TOKENS)).max() < 1e-4
    assert np.abs(found - logits).max() > 1e-3  # 8 bits are not 32


def test_requantising_reports_what_it_loses(
    run: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "--adapter", run[0], "--output-dir", tmp_path / "m", "--requantize", "4"]
    assert call(*words, "model.group_size=32") == 0
    assert "%" in capsys.readouterr().out
    model, _ = mq.load(tmp_path / "m")
    assert model.layers[0].mlp.up_proj.quant == mq.QuantConfig(4, 32)


@pytest.mark.parametrize(
    ("flags", "files"),
    [
        ([], {"adapter_config.json", "adapter_model.safetensors", "README.md", "mlx"}),
        (["--portable"], {"adapter_config.json", "adapter_model.safetensors", "README.md"}),
        (["--mlx"], {"adapter_config.json", "adapters.safetensors"}),
        (["--gguf"], {"adapter.gguf", "Modelfile"}),
    ],
)
def test_export_writes_each_form_and_ours_read_it_back(
    run: tuple[Path, np.ndarray], folder: Path, tmp_path: Path, flags: list[str], files: set[str]
) -> None:
    out, logits = run
    made = tmp_path / "made"
    original = "model.base_model_name_or_path=org/base"
    assert call("export", "--adapter", out, "--output-dir", made, original, *flags) == 0
    assert {path.name for path in made.iterdir()} == files
    if "--gguf" not in flags:
        model, _ = mq.load(folder, mq.QuantConfig(8, 32), adapter=made)
        assert np.abs(our_logits(model, TOKENS) - logits).max() < 1e-5


def test_push_lists_what_it_would_upload(
    run: tuple[Path, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("push", run[0], "me/adapter", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("adapter_model.safetensors", "README.md", "me/adapter"))
    assert "resume_state" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "--output-dir", "m"], "model.adapter is missing"),
        (["export", "--output-dir", "m", "--adapter", "nowhere"], "there is no folder nowhere"),
        (["push", "nowhere", "me/x", "--dry-run"], "nowhere"),
        (["merge", "--output-dir", "m", "--adapter", "a", "--model", "no/such/place"], "no/such"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_form_at_a_time(run: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        call("export", "--adapter", run[0], "--output-dir", tmp_path / "m", "--gguf", "--mlx")
    assert caught.value.code == 2
