"""Whole runs on a tiny model: learning, resuming, and what is left on disk."""

import dataclasses
import io

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console
from support.training import FINGERPRINT, recorded, start, without_clocks

from mlx_qlora.errors import ConfigError
from mlx_qlora.train.checkpoint import (
    CheckpointingConfig,
    RunState,
    checkpoint_to_resume,
    checkpoints,
)
from mlx_qlora.train.config import TrainingConfig
from mlx_qlora.train.step import dropout_keys


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(w) for name, w in tree_flatten(model.trainable_parameters())}


def test_a_run_learns_and_says_so(hf_tiny, tmp_path):
    _, result = start(hf_tiny[1], tmp_path / "out", max_steps=45)
    losses = [r["loss"] for r in result.log_history if "loss" in r]
    assert result.steps == len(losses) == 45
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert result.eval_loss < 0.7 * losses[0]
    assert result.train_loss == losses[-1]
    assert result.tokens_per_second > 0


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stopped_after", [3, 6])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(
    hf_tiny, tmp_path, stopped_after, packing
):
    whole, whole_result = start(hf_tiny[1], tmp_path / "whole", packing=packing)
    start(hf_tiny[1], tmp_path / "parts", packing=packing)
    for path in checkpoints(tmp_path / "parts"):  # as if the run had died after this one
        if int(path.name.split("-")[1]) > stopped_after:
            (path / "resume_state.json").unlink()
    printed = io.StringIO()
    console = Console(file=printed)
    resumed, result = start(hf_tiny[1], tmp_path / "parts", console, packing=packing)
    assert f"checkpoint-{stopped_after}" in printed.getvalue()
    ours, theirs = weights_of(resumed), weights_of(whole)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)

    assert without_clocks(result.log_history) == without_clocks(whole_result.log_history)
    steps = [record["step"] for record in recorded(tmp_path / "parts")]
    assert steps == [r["step"] for r in whole_result.log_history], "each line once"
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        ours, theirs = (tmp_path / run / "checkpoint-8" / file for run in ("parts", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_checkpoint_of_another_run_is_refused_and_none_starts_anew(hf_tiny, tmp_path):
    start(hf_tiny[1], tmp_path / "out")
    config = CheckpointingConfig(output_dir=str(tmp_path / "out"))
    another = RunState(fingerprint={**FINGERPRINT, "data": "other"})
    with pytest.raises(ConfigError, match=r"made from another data.*resume_from_checkpoint=none"):
        checkpoint_to_resume(config, another)
    _, result = start(hf_tiny[1], tmp_path / "out", resume_from_checkpoint="none")
    assert result.log_history[0]["step"] == 1
    with pytest.raises(ConfigError, match="is no checkpoint"):
        start(hf_tiny[1], tmp_path / "out", resume_from_checkpoint=str(tmp_path))


def test_epochs_train_every_row_and_the_last_step_may_be_short(hf_tiny, tmp_path):
    """1.5 epochs of 22 rows are 33, in 11 micro-batches of 3 and 6 steps of 2."""
    _, result = start(hf_tiny[1], tmp_path / "a", max_steps=None, num_train_epochs=1.5)
    assert result.steps == 6
    assert result.log_history[-1]["epoch"] == 1.5
    _, result = start(hf_tiny[1], tmp_path / "b", max_steps=None, num_train_epochs=0.4)
    assert result.steps == 2  # 9 rows, 3 micro-batches: one step of 2, one of 1
    assert result.log_history[-1]["epoch"] == pytest.approx(9 / 22, abs=1e-4)


def test_plain_lines_replace_the_live_one_off_a_terminal(hf_tiny, tmp_path):
    printed = io.StringIO()
    start(hf_tiny[1], tmp_path / "out", Console(file=printed, width=200))
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("step 4/8")]
    assert len(lines) == 1
    for part in ("loss", "lr 7.50e-03", "grad", "tok/s", "GB"):
        assert part in lines[0], lines[0]
    assert "step 4: validation loss" in printed.getvalue()


def test_the_live_line_shows_eta_on_a_terminal(hf_tiny, tmp_path):
    printed = io.StringIO()
    start(hf_tiny[1], tmp_path / "out", Console(file=printed, force_terminal=True, width=140))
    assert "eta" in printed.getvalue() and "tok/s" in printed.getvalue()


def test_dropout_keys_depend_on_seed_and_row_alone():
    assert mx.array_equal(dropout_keys(3, (14, 15))[1:], dropout_keys(3, (15,)))
    keys = {np.array(dropout_keys(s, (r,))).tobytes() for s in range(5) for r in range(50)}
    assert len(keys) == 250


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", 0.0, "above 0"),
        ("warmup_steps", -1, "at least 0"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_train_batch_size", "most", "a number or auto"),
        ("adam_beta2", 1.0, r"in \[0, 1\)"),
        ("lr_scheduler_type", "cosin", "one of 'cosine', 'linear', 'constant_with_warmup'"),
        ("gradient_checkpointing", "sometimes", "true, false or auto"),
        ("num_train_epochs", -1.0, "above 0"),
    ],
)
def test_values_out_of_range_name_the_field(field, value, message):
    with pytest.raises(ConfigError, match=f"training.{field} must .*{message}"):
        TrainingConfig(**{field: value})


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(ConfigError, match=r"max_steps and training.num_train_epochs exclude"):
        TrainingConfig(max_steps=10, num_train_epochs=1.0)
    assert TrainingConfig().max_steps == 1000
    assert TrainingConfig(num_train_epochs=2.0).max_steps is None
    assert dataclasses.replace(TrainingConfig(), seed=1).max_steps == 1000


# ---- what must not happen to a folder ----------------------------------------------------------


def test_a_run_that_starts_anew_keeps_its_own_checkpoints_not_the_abandoned_ones(hf_tiny, tmp_path):
    start(hf_tiny[1], tmp_path / "out", max_steps=12, save_steps=4)
    start(
        hf_tiny[1],
        tmp_path / "out",
        max_steps=3,
        save_steps=1,
        save_total_limit=2,
        resume_from_checkpoint="none",
    )
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]


def test_log_records_of_a_resumed_run_are_those_of_an_unbroken_one(hf_tiny, tmp_path):
    """Logged every 4 steps, stopped after 3: the mean at step 4 is over all four."""
    _, whole = start(hf_tiny[1], tmp_path / "whole", logging_steps=4)
    start(hf_tiny[1], tmp_path / "parts", logging_steps=4)
    for name in ("checkpoint-6", "checkpoint-8"):
        (tmp_path / "parts" / name / "resume_state.json").unlink()
    _, resumed = start(hf_tiny[1], tmp_path / "parts", logging_steps=4)
    pairs = [(r["step"], r["loss"]) for r in whole.log_history if "loss" in r]
    assert [(r["step"], r["loss"]) for r in resumed.log_history if "loss" in r] == pairs


def test_a_damaged_checkpoint_is_passed_over_and_lines_of_other_tools_are_dropped(
    hf_tiny, tmp_path
):
    start(hf_tiny[1], tmp_path / "out")
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\nnot json\n')
    (tmp_path / "out" / "checkpoint-8" / "resume_state.json").write_text("{")
    config = CheckpointingConfig(output_dir=str(tmp_path / "out"))
    path, _, damaged = checkpoint_to_resume(config, RunState(fingerprint=FINGERPRINT))
    assert path == tmp_path / "out" / "checkpoint-6"
    assert damaged == [f"{tmp_path / 'out' / 'checkpoint-8' / 'resume_state.json'} is damaged"]
    _, result = start(hf_tiny[1], tmp_path / "out")
    assert recorded(tmp_path / "out") == result.log_history


def test_a_home_folder_is_expanded_once_for_all_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CheckpointingConfig(output_dir="~/x").output_dir == str(tmp_path / "x")
