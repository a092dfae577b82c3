"""A run on disk at its edges: killed between two renames, on a full disk, beside another run."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import test_checkpoint as t
from test_checkpoint import assert_same, at_step, copy, disk, folder, go, losses, whole  # noqa

from mlx_qlora import run
from mlx_qlora.errors import ConfigError, TrainingError
from mlx_qlora.folders import disk_errors, staged
from mlx_qlora.train import loop
from mlx_qlora.train.checkpoint import best_eval
from mlx_qlora.train.signals import Interrupted


def test_load_best_turned_on_where_the_best_was_not_saved(folder, tmp_path):
    with losses([1, 2, 3, 4]):
        go(folder, tmp_path / "out")
    go(folder, tmp_path / "out", load_best_model_at_end=True)


def test_best_checkpoint_damaged_when_the_run_ends(folder, tmp_path):
    def spoil(run):
        t.spoil(run.output / "checkpoint-2" / "adapter_model.safetensors")

    with losses([1, 2, 3, 4]), at_step(7, spoil):
        go(folder, tmp_path / "out", load_best_model_at_end=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_validation_loss_of_nan_is_never_the_best(folder, tmp_path):
    records = [{"step": 2, "eval_loss": math.nan}, {"step": 4, "eval_loss": 1.0}]
    assert best_eval(records) == (4, 1.0)
    with losses([math.nan, 3.0, 2.0, 2.5]):
        run = go(folder, tmp_path / "out", load_best_model_at_end=True)
    assert run.result.best_step == 6


def test_files_of_a_checkpoint_and_the_adapter_have_the_umask_modes(whole):
    umask = os.umask(0)
    os.umask(umask)
    wrong = {
        str(path.relative_to(whole.out)): oct(path.stat().st_mode & 0o777)
        for path in whole.out.rglob("*")
        if path.is_file() and path.stat().st_mode & 0o777 != 0o666 & ~umask
    }
    assert wrong == {}


def test_existing_folders_are_flushed_after_files_were_moved_into_them(tmp_path, monkeypatch):
    out, events, replace = tmp_path / "out", [], os.replace
    (out / "mlx").mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", lambda n: events.append(os.fstat(n).st_ino))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    with staged(out) as staging:
        (staging / "mlx").mkdir()
        (staging / "a").write_text("1")
        (staging / "mlx" / "b").write_text("1")
    after = events[len(events) - events[::-1].index("replace") :]
    assert {out.stat().st_ino, (out / "mlx").stat().st_ino} <= set(after)


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path):
    out, rename = tmp_path / "checkpoint-4", Path.rename
    out.mkdir()
    (out / "a").write_text("old")

    def fails(self, target):
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "rename", fails)
        with staged(out, replace=True) as staging:
            (staging / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_kill_between_the_two_renames_loses_no_checkpoint(folder, whole, copy):
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(copy / name)
    shutil.copytree(copy / "checkpoint-3", copy / ".checkpoint-3-x.tmp")
    (copy / "checkpoint-3").rename(copy / ".checkpoint-3-x.old")
    run = go(folder, copy)
    assert "continuing from" in run.printed


def test_grad_norm_of_a_log_window_survives_a_stop(folder, tmp_path):
    """Logged at step 6, which is skipped; stopped after step 5."""
    from dataclasses import replace

    def run(out, stops):
        note = loop.Run.note

        def noted(self, outcome, rate):
            if self.state.step == 5:
                outcome = replace(outcome, loss=math.nan)
            note(self, outcome, rate)
            if stops and self.state.step == 5:
                t.stop(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Run, "note", noted)
            return go(folder, out)

    unbroken = run(tmp_path / "whole", False)
    with pytest.raises(Interrupted):
        run(tmp_path / "out", True)
    resumed = run(tmp_path / "out", False)
    norms = [
        [r["grad_norm"] for r in made.result.log_history if "grad_norm" in r]
        for made in (resumed, unbroken)
    ]
    assert norms[0] == norms[1]


def test_trainer_state_names_no_best_checkpoint_that_does_not_exist(folder, tmp_path):
    with losses([1, 2, 3, 4]):
        run = go(folder, tmp_path / "out")
    state = json.loads((run.out / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None or Path(state["best_model_checkpoint"]).is_dir()


def test_the_checkpoint_to_resume_is_chosen_under_the_lock(folder, tmp_path):
    """Another run finishes between this one's choice of a checkpoint and its lock."""
    prepare, began = run.prepare, []

    def slow(*args):
        made = prepare(*args)
        if not began:
            began.append(True)
            go(folder, tmp_path / "out")
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prepare", slow)
        done = go(folder, tmp_path / "out")
    assert "continuing from" in done.printed


def test_a_pipe_that_breaks_is_no_disk_error(tmp_path):
    with pytest.raises(BrokenPipeError), disk_errors(tmp_path):
        raise BrokenPipeError(32, "Broken pipe")


def test_weights_replaced_in_the_same_folder_are_another_model(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    with at_step(3, t.stop), pytest.raises(Interrupted):
        go(model, tmp_path / "out")
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    other = t.write_model(tmp_path / "other", seed=5, **shape, **heads)
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    with pytest.raises(ConfigError, match="another model"):
        go(model, tmp_path / "out")


def test_a_start_on_a_full_disk_leaves_no_partial_metrics(folder, whole, disk):
    out = shutil.copytree(whole.out, disk / "out")
    shutil.rmtree(out / "checkpoint-8")
    with t.full(disk) as fill:
        fill(0)
        with pytest.raises(TrainingError):
            go(folder, out)
    assert t.hidden(out) == []


def test_a_start_without_space_keeps_the_old_record(folder, whole, copy):
    import resource

    before = (copy / "run.yaml").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(TrainingError):
            go(folder, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (copy / "run.yaml").read_bytes() == before
