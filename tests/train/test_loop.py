"""Whole runs on a tiny model: learning, resuming, and what is left on disk."""

import io

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from support.training import start

from mlx_qlora.train.checkpoint import (
    CheckpointingConfig,
    checkpoints,
)
from mlx_qlora.train.step import dropout_keys


def test_a_run_learns_and_says_so_line_by_line_off_a_terminal(hf_tiny, tmp_path):
    printed = io.StringIO()
    _, result = start(hf_tiny[1], tmp_path / "out", Console(file=printed, width=200), max_steps=45)
    losses = [r["loss"] for r in result.log_history if "loss" in r]
    assert result.steps == len(losses) == 45
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert result.eval_loss < 0.7 * losses[0]
    assert result.train_loss == losses[-1]
    assert result.tokens_per_second > 0
    (line,) = (line for line in printed.getvalue().splitlines() if line.startswith("step 4/45"))
    assert all(part in line for part in ("loss", "lr 9.95e-03", "grad", "tok/s", "GB")), line
    assert "step 4: validation loss" in printed.getvalue()
    assert "warning" not in printed.getvalue(), "of a spike, or of anything"


def test_epochs_train_every_row_and_the_last_step_may_be_short(hf_tiny, tmp_path):
    """1.5 epochs of 22 rows are 33, in 11 micro-batches of 3 and 6 steps of 2."""
    _, result = start(hf_tiny[1], tmp_path / "a", max_steps=None, num_train_epochs=1.5)
    assert result.steps == 6
    assert result.log_history[-1]["epoch"] == 1.5
    _, result = start(hf_tiny[1], tmp_path / "b", max_steps=None, num_train_epochs=0.4)
    assert result.steps == 2  # 9 rows, 3 micro-batches: one step of 2, one of 1
    assert result.log_history[-1]["epoch"] == pytest.approx(9 / 22, abs=1e-4)


def test_dropout_keys_depend_on_seed_and_row_alone():
    assert mx.array_equal(dropout_keys(3, (14, 15))[1:], dropout_keys(3, (15,)))
    keys = {np.array(dropout_keys(s, (r,))).tobytes() for s in range(5) for r in range(50)}
    assert len(keys) == 250


# ---- what must not happen to a folder ----------------------------------------------------------


def test_a_run_that_starts_anew_keeps_its_own_checkpoints_not_the_abandoned_ones(hf_tiny, tmp_path):
    start(hf_tiny[1], tmp_path / "out", max_steps=12, save_steps=4)
    anew = {"save_steps": 1, "save_total_limit": 2, "resume_from_checkpoint": "none"}
    start(hf_tiny[1], tmp_path / "out", max_steps=3, **anew)
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]


def test_a_home_folder_is_expanded_once_for_all_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CheckpointingConfig(output_dir="~/x").output_dir == str(tmp_path / "x")
