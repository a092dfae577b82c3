"""A run that is stopped, damaged or out of disk loses nothing: what checkpoints promise."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.gpu_route import routes
from support.limits import files_of_at_most
from support.tiny_folder import write_model
from support.training import (
    SETTINGS,
    Finished,
    assert_same,
    at_step,
    fine_tune,
    losses,
    make_examples,
    recorded,
    stop,
    without_clocks,
)

import mlx_qlora as mq
from mlx_qlora.errors import ConfigError, TrainingError
from mlx_qlora.folders import disk_errors, staged
from mlx_qlora.run import Inputs
from mlx_qlora.train import checkpoint, loop
from mlx_qlora.train.checkpoint import (
    CheckpointingConfig,
    RunState,
    best_eval,
    checkpoint_to_resume,
    checkpoints,
    read_state,
)
from mlx_qlora.train.loop import Run
from mlx_qlora.train.score import Score
from mlx_qlora.train.signals import Interrupted

pytestmark = pytest.mark.usefixtures("usual_signals")
SHAPE = {
    **{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}
FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "resume_state.json",
    "trainer_state.json",
]


def steps_in(out: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints(out)]


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> (time of the last change, content) of all that is in a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", **SHAPE)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing happened to; tests must not change its files."""
    return fine_tune(folder, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def worsening(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run whose first validation, at step 2, is the best; tests must not change its files."""
    with losses([1, 2, 3, 4]):
        return fine_tune(folder, tmp_path_factory.mktemp("worsening") / "out")


@pytest.fixture
def copy(whole: Finished, tmp_path: Path) -> Path:
    """The files of the whole run, to be damaged."""
    return shutil.copytree(whole.out, tmp_path / "out")


def asked(out: Path, wanted: str = "auto") -> tuple[Path | None, list[str]]:
    """What the run whose files these are would resume."""
    saved = read_state(out / "checkpoint-3")
    state = RunState(fingerprint=saved["fingerprint"], config=saved["config"])
    config = CheckpointingConfig(output_dir=str(out), resume_from_checkpoint=wanted)
    path, _, damaged = checkpoint_to_resume(config, state, {})
    return path, damaged


# ---- damage ------------------------------------------------------------------------------------


def flipped(content: bytes, draw: random.Random) -> Iterator[bytes]:
    """Copies of a file with one bit turned over: in its first 90 bytes, in 40 regions, at its end.

    The first bytes hold the checksum of the state, and the length of a safetensors header.
    """
    edges = np.linspace(0, len(content), 41).astype(int)
    places = [draw.randrange(a, max(b, a + 1)) for a, b in pairwise(edges)]
    for place in (*range(90), *places, len(content) - 1):
        bad = bytearray(content)
        bad[place] ^= 1 << draw.randrange(8)
        yield bytes(bad)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found_and_the_file_is_named(copy, name):
    path = copy / "checkpoint-8" / name
    whole = path.read_bytes()
    read_state(path.parent)
    cut = [whole[:at] for at in (0, 1, len(whole) // 2, len(whole) - 1)]
    for bad in (*flipped(whole, random.Random(name)), *cut, whole + b"\0", whole + b"\n"):
        path.write_bytes(bad)
        with pytest.raises(ConfigError) as error:
            read_state(path.parent)
        assert str(error.value).startswith(f"{path} "), error.value
    path.unlink()
    with pytest.raises(ConfigError) as error:
        read_state(path.parent)
    assert str(error.value) == f"{path} is missing"
    path.mkdir()
    with pytest.raises(ConfigError, match=name):
        read_state(path.parent)


def spoil(path: Path) -> str:
    """Turns over one bit in the middle; returns how that is reported."""
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 2] ^= 1
    path.write_bytes(bad)
    return f"{path} is damaged"


def test_auto_uses_the_checkpoint_before_a_damaged_one_and_says_so(folder, whole, copy):
    lost = copy / "checkpoint-6" / "adapter_config.json"
    lost.unlink()
    damage = [spoil(copy / "checkpoint-8" / "optimizer.safetensors"), f"{lost} is missing"]
    assert asked(copy) == (copy / "checkpoint-3", damage)
    again = fine_tune(folder, copy)
    for line in damage:
        assert f"warning   {line}; the checkpoint before it is used\n" in again.printed
    assert f"continuing from {copy / 'checkpoint-3'}\n" in again.printed
    assert_same(again, whole)
    for n in (3, 6, 8):
        read_state(copy / f"checkpoint-{n}")


def test_a_named_checkpoint_must_be_whole(folder, whole, copy):
    named = str(copy / "checkpoint-6")
    assert asked(copy, named) == (copy / "checkpoint-6", [])
    damage = spoil(copy / "checkpoint-6" / "adapter_config.json")
    before = everything(copy)
    with pytest.raises(ConfigError) as error:
        fine_tune(folder, copy, resume_from_checkpoint=named)
    assert str(error.value) == damage
    with pytest.raises(ConfigError, match=r"checkpoint-5 is no checkpoint"):
        fine_tune(folder, copy, resume_from_checkpoint=str(copy / "checkpoint-5"))
    assert everything(copy) == before
    assert_same(fine_tune(folder, copy, resume_from_checkpoint=str(copy / "checkpoint-3")), whole)


def test_with_no_whole_checkpoint_a_run_does_not_silently_start_anew(folder, whole, copy):
    damage = [spoil(copy / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (8, 6, 3)]
    before = everything(copy)
    with pytest.raises(ConfigError) as error:
        fine_tune(folder, copy)
    assert str(error.value) == (
        f"every checkpoint of {copy} is damaged:\n"
        + "".join(f"  {line}\n" for line in damage)
        + "to start from the beginning pass checkpointing.resume_from_checkpoint=none"
    )
    assert everything(copy) == before
    assert_same(fine_tune(folder, copy, resume_from_checkpoint="none"), whole)


# ---- which checkpoints are kept ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "limit", "values", "kept"),
    [
        (1, 2, [5, 4, 1, 3, 3, 3, 3, 3], [3, 7, 8]),
        (1, 2, [8, 7, 6, 5, 4, 3, 2, 1], [7, 8]),
        (1, 1, [2, 3, 3, 3, 1, 1, 3, 3], [5, 8]),
        (1, 3, [1, 1, 1, 1, 1, 1, 1, 1], [1, 6, 7, 8]),
        (3, 1, [9, 1, 4, 9, 9, 5, 9, 9], [3, 8]),  # the best of all was not saved
    ],
)
def test_the_newest_checkpoints_and_the_best_of_those_on_disk_are_kept(
    folder, tmp_path, every, limit, values, kept
):
    how = {"save_steps": every, "eval_steps": 1, "save_total_limit": limit}
    with losses(values):
        fine_tune(folder, tmp_path / "out", **how)
    assert steps_in(tmp_path / "out") == kept
    for n in kept:
        read_state(tmp_path / "out" / f"checkpoint-{n}")
    assert hidden(tmp_path / "out") == []


def test_a_run_may_end_with_its_best_weights(folder, tmp_path):
    """The best at step 5 is saved though save_steps is 3, and so is each best before it.

    A loss of NaN, which compares as nothing else does, is never the best.
    """
    records = [{"step": 2, "eval_loss": math.nan}, {"step": 4, "eval_loss": 1.0}]
    assert best_eval(records) == (4, 1.0)
    best = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 3}
    with losses([math.nan, 8, 6, 6, 2, 4, 3, 9]):
        run = fine_tune(folder, tmp_path / "out", **best)
    assert steps_in(run.out) == [2, 3, 5, 6, 8]
    result = run.result
    assert (result.steps, result.best_step, result.eval_loss) == (8, 5, 2.0)
    assert not result.stopped_early
    assert "best      step 5, validation loss 2.0000\n" in run.printed
    saved = run.out / "checkpoint-5" / "adapter_model.safetensors"
    assert run.adapter == saved.read_bytes()
    assert run.adapter != (run.out / "checkpoint-8" / "adapter_model.safetensors").read_bytes()
    weights = load_file(saved)
    for name, weight in tree_flatten(run.model.trainable_parameters()):
        assert np.array(weight).tobytes() == weights[f"base_model.model.{name}"].tobytes()
    assert len(weights) == len(tree_flatten(run.model.trainable_parameters()))

    with losses([]):
        again = fine_tune(folder, run.out, **best)
    assert again.adapter == run.adapter
    assert (again.result.best_step, again.result.eval_loss) == (5, 2.0)


def test_where_the_best_weights_cannot_be_read_a_run_ends_with_the_last(
    folder, worsening, tmp_path
):
    """The best was not saved, as nobody asked for it then; or it is damaged at the end."""
    out = shutil.copytree(worsening.out, tmp_path / "out")
    late = fine_tune(folder, out, load_best_model_at_end=True)
    assert "checkpoint-2/resume_state.json is missing; the last weights are kept" in late.printed

    def damage(run: Run) -> None:
        spoil(run.output / "checkpoint-2" / "adapter_model.safetensors")

    with losses([1, 2, 3, 4]), at_step(7, damage):
        run = fine_tune(folder, tmp_path / "damaged", load_best_model_at_end=True)
    assert "adapter_model.safetensors is damaged; the last weights are kept" in run.printed
    assert late.adapter == run.adapter == worsening.adapter


def test_without_it_a_run_ends_with_its_last_weights(worsening):
    run = worsening
    assert (run.result.best_step, run.result.eval_loss) == (2, 4.0)
    assert run.adapter == (run.out / "checkpoint-8" / "adapter_model.safetensors").read_bytes()
    assert steps_in(run.out) == [3, 6, 8]
    state = json.loads((run.out / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2 and state["best_model_checkpoint"] is None, "not saved"


@pytest.mark.parametrize("load_best", [False, True])
def test_patience_ends_a_run_and_starting_it_again_does_nothing_more(folder, tmp_path, load_best):
    fields = {
        "eval_steps": 1,
        "early_stopping_patience": 3,
        "load_best_model_at_end": load_best,
        "save_total_limit": 1,
    }
    with losses([4, 3, 3, 5, 4]):  # an equal loss is no better one
        run = fine_tune(folder, tmp_path / "out", **fields)
    result = run.result
    assert (result.steps, result.best_step, result.stopped_early) == (5, 2, True)
    assert "stopped early at step 5: no better validation loss\n" in run.printed
    assert steps_in(run.out) == ([2, 5] if load_best else [3, 5])
    end = "checkpoint-2" if load_best else "checkpoint-5"
    assert run.adapter == (run.out / end / "adapter_model.safetensors").read_bytes()

    kept = {name: everything(run.out / name) for name in ("checkpoint-5", end)}
    with losses([]):
        again = fine_tune(folder, run.out, **fields)
    assert again.adapter == run.adapter
    assert again.result.log_history == result.log_history == recorded(run.out)
    assert (again.result.steps, again.result.best_step) == (5, 2)
    assert again.result.stopped_early
    assert {name: everything(run.out / name) for name in kept} == kept


def test_a_better_loss_renews_the_patience(folder, tmp_path):
    with losses([4, 5, 3, 5, 2, 5, 1, 5]):
        run = fine_tune(folder, tmp_path / "out", eval_steps=1, early_stopping_patience=2)
    assert (run.result.steps, run.result.best_step) == (8, 7)
    assert not run.result.stopped_early


def test_more_patience_lets_a_run_that_stopped_early_go_on(folder, worsening, tmp_path):
    with losses([1, 2]):
        early = fine_tune(folder, tmp_path / "out", early_stopping_patience=1)
    assert early.result.stopped_early
    with losses([3, 4]):
        assert_same(fine_tune(folder, tmp_path / "out", early_stopping_patience=3), worsening)


def test_patience_and_best_weights_survive_a_stop(folder, tmp_path):
    fields = {"eval_steps": 1, "early_stopping_patience": 3, "load_best_model_at_end": True}
    values = [4.0, 3.0, 5.0, 5.0, 5.0]
    with losses(values):
        unbroken = fine_tune(folder, tmp_path / "whole", **fields)
    history = without_clocks(unbroken.result.log_history)
    for step in (3, 4, 5):
        out = tmp_path / f"stopped after {step}"
        with losses(values[:step]), at_step(step, stop), pytest.raises(Interrupted):
            fine_tune(folder, out, **fields)
        with losses(values[step - 1 :]):
            run = fine_tune(folder, out, **fields)
        assert run.adapter == unbroken.adapter
        assert without_clocks(run.result.log_history) == history
        assert (run.result.steps, run.result.best_step, run.result.stopped_early) == (5, 2, True)


# ---- trainer_state.json ------------------------------------------------------------------------


def test_transformers_reads_the_trainer_state(folder, tmp_path):
    from transformers import TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    with losses([3, 1, 2, 4]):
        run = fine_tune(folder, tmp_path / "out", load_best_model_at_end=True, logging_steps=1)
    assert get_last_checkpoint(str(run.out)) == str(run.out / "checkpoint-8")
    path = run.out / "checkpoint-8" / "trainer_state.json"
    state = TrainerState.load_from_json(str(path))
    assert json.loads(path.read_text()).keys() == dataclasses.asdict(TrainerState()).keys()
    assert (state.best_global_step, state.best_metric) == (4, 1.0)
    assert state.best_model_checkpoint == str(run.out / "checkpoint-4")
    assert Path(state.best_model_checkpoint).is_dir()
    assert (state.global_step, state.max_steps, state.train_batch_size) == (8, 8, 3)
    assert (state.eval_steps, state.save_steps, state.logging_steps) == (2, 3, 1)
    assert state.epoch == pytest.approx(8 * 6 / 22)
    assert state.num_train_epochs == 3
    trained = [record for record in state.log_history if "loss" in record]
    evaluated = [record for record in state.log_history if "eval_loss" in record]
    assert [record["step"] for record in trained] == list(range(1, 9))
    assert [(r["step"], r["eval_loss"]) for r in evaluated] == [(2, 3), (4, 1), (6, 2), (8, 4)]
    for record in trained:
        assert set(record) == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    for record in evaluated:
        assert set(record) == {"eval_loss", "eval_runtime", "epoch", "step"}
    assert len(trained) + len(evaluated) == len(state.log_history)
    early = TrainerState.load_from_json(str(run.out / "checkpoint-2" / "trainer_state.json"))
    assert (early.best_global_step, early.best_metric, early.global_step) == (2, 3.0, 2)


# ---- going on ----------------------------------------------------------------------------------


def test_stops_within_every_validation_and_after_every_step_change_no_bit(folder, whole, tmp_path):
    out, score = tmp_path / "out", loop.score

    def interrupted(model: Any, batches: Any) -> Score:
        signal.raise_signal(signal.SIGINT)
        return score(model, batches)

    for step in range(1, SETTINGS["max_steps"] + 1):
        with at_step(step, stop), pytest.raises(Interrupted) as stopped:
            fine_tune(folder, out)
        assert stopped.value.checkpoint == out / f"checkpoint-{step}"
        assert steps_in(out)[-1] == step
        if step % 2 == 0:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
                patch.setattr(loop, "score", interrupted)
                fine_tune(folder, out)
    assert_same(fine_tune(folder, out), whole)


@routes("metal-bfloat16", "cuda-float32")
def test_a_stop_on_a_gpu_s_route_changes_no_bit(folder, gpu_route, tmp_path):
    fields = {"max_steps": 8, "eval_steps": 4}
    unbroken = fine_tune(folder, tmp_path / "whole", **fields)
    with at_step(5, stop), pytest.raises(Interrupted):
        fine_tune(folder, tmp_path / "out", **fields)
    assert_same(fine_tune(folder, tmp_path / "out", **fields), unbroken)


def test_a_run_from_an_earlier_checkpoint_removes_the_later_ones_it_leaves_behind(
    folder, whole, copy
):
    with at_step(4, stop), pytest.raises(Interrupted):
        fine_tune(folder, copy, resume_from_checkpoint=str(copy / "checkpoint-3"))
    assert steps_in(copy) == [3, 4]
    assert_same(fine_tune(folder, copy), whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_its_halves_are_removed(
    folder, whole, copy
):
    for n in (6, 8):
        shutil.rmtree(copy / f"checkpoint-{n}")
    shutil.copytree(whole.out / "checkpoint-6", copy / ".checkpoint-6-abcdefgh.tmp")
    (copy / ".checkpoint-6-abcdefgh.tmp" / "resume_state.json").unlink()
    shutil.copytree(whole.out / "checkpoint-3", copy / ".checkpoint-3-01234567.old")
    (copy / "adapter_model.safetensors").unlink()
    run = fine_tune(folder, copy)
    assert f"continuing from {copy / 'checkpoint-3'}\n" in run.printed
    assert_same(run, whole)
    assert hidden(copy) == []
    assert steps_in(copy) == [3, 6, 8]


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: None,
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text[: text.index("\n") + 9],
        lambda text: text + text,
        lambda text: text + '{"step": 7, "loss": 1.0}\n{"step',
        lambda text: text + '{"epoch": 3}\nnot json\n',
        lambda text: "\0" * 400,
        lambda text: "".join(reversed(text.splitlines(keepends=True))),
    ],
    ids=[
        "lost",
        "empty",
        "cut",
        "cut in a line",
        "twice",
        "too long",
        "foreign",
        "zeros",
        "shuffled",
    ],
)
def test_the_metrics_file_is_made_what_it_was(folder, whole, copy, harm):
    path = copy / "metrics.jsonl"
    harmed = harm(path.read_text())
    path.unlink()
    if harmed is not None:
        path.write_text(harmed)
    shutil.rmtree(copy / "checkpoint-8")
    assert_same(fine_tune(folder, copy), whole)


# ---- another run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "change", "what", "shown"),
    [
        ("auto", {"learning_rate": 0.001}, "config", ["training.learning_rate: 0.01 -> 0.001"]),
        (
            "checkpoint-6",
            {"seed": 7, "lora_dropout": 0.0, "r": 4},
            "config and model",
            ["lora.r: 2 -> 4", "lora.lora_dropout: 0.3 -> 0.0", "training.seed: 0 -> 7"],
        ),
        ("auto", {"max_steps": 9}, "config", ["training.max_steps: 8 -> 9"]),
        (  # the reason first, and what it may have changed by itself
            "auto",
            {"max_steps": 9, "warmup_steps": 1},
            "config",
            [
                "training.max_steps: 8 -> 9",
                "training.warmup_steps: 2 -> 1, which follows unless it was set",
            ],
        ),
        ("auto", {"warmup_steps": 1}, "config", ["training.warmup_steps: 2 -> 1"]),
        ("auto", {"examples": make_examples(23)}, "data", []),
        ("checkpoint-6", {"held_out": make_examples(6, seed=8)}, "data", []),
    ],
)
def test_another_config_or_data_is_refused_and_nothing_is_touched(
    folder, copy, wanted, change, what, shown
):
    named = "auto" if wanted == "auto" else str(copy / wanted)
    path = copy / ("checkpoint-8" if wanted == "auto" else wanted)
    before = everything(copy)
    with pytest.raises(ConfigError) as error:
        fine_tune(folder, copy, resume_from_checkpoint=named, **change)
    text = str(error.value)
    assert text.startswith(f"{path} was made from another {what}{':' if shown else '.'}")
    assert [line[2:] for line in text.splitlines() if line.startswith("  ")] == shown
    # Of another model, or other rows, they are not enough.
    assert ("To continue it, give the values at the left." in text) == (what == "config")
    on = f"With another output_dir a new run begins, or, with mq.load(adapter='{copy}') besides,"
    assert on in text and text.endswith("resume_from_checkpoint=none begins again here")
    assert everything(copy) == before


def rewrite_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a checkpoint's state holds, as another version would have written it."""
    saved = json.loads((path / "resume_state.json").read_text())
    del saved["sha256"], saved["checksums"]
    change(saved)
    (path / "resume_state.json").unlink()
    theirs: Any = dataclasses.make_dataclass("RunState", saved)
    checkpoint._write_state(path, theirs(**saved))


def test_a_checkpoint_that_lacks_a_later_field_is_continued(folder, whole, copy):
    """As an older version wrote it: its config is hashed over fewer fields."""

    def older(saved: dict[str, Any]) -> None:
        assert saved["config"]["lora"].pop("use_dora") is False  # the default
        saved["fingerprint"]["config"] = "of fewer fields"

    shutil.rmtree(copy / "checkpoint-8")
    rewrite_state(copy / "checkpoint-6", older)
    run = fine_tune(folder, copy)
    assert f"continuing from {copy / 'checkpoint-6'}\n" in run.printed
    assert_same(run, whole)
    new, theirs = (read_state(r.out / "checkpoint-8") for r in (run, whole))
    assert (new["fingerprint"], new["config"]) == (theirs["fingerprint"], theirs["config"])


def test_a_later_field_with_another_value_than_then_is_refused(folder, copy):
    def older(saved: dict[str, Any]) -> None:
        del saved["config"]["lora"]["lora_dropout"]  # 0.3 now, and 0.1 by default
        saved["fingerprint"]["config"] = "of fewer fields"

    rewrite_state(copy / "checkpoint-8", older)
    with pytest.raises(ConfigError, match=r"another config:\n  lora\.lora_dropout: 0\.1 -> 0\.3\n"):
        fine_tune(folder, copy)


def test_a_run_of_a_hundred_thousand_records_goes_on(copy, monkeypatch):
    """They are more than a stranger's file may hold; here it may hold less."""
    monkeypatch.setattr("mlx_qlora.readers.BYTES_PER_VALUE", 1 << 14)
    records = {"step": 8} | {f"figure {i}": 0 for i in range(1 << 10)}
    rewrite_state(copy / "checkpoint-8", lambda saved: saved["log_history"].append(records))
    assert asked(copy) == (copy / "checkpoint-8", [])
    assert checkpoint.values_before(CheckpointingConfig(output_dir=str(copy)), "model")


# What a stranger's checkpoint says, with right checksums.
WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a step by a word": lambda saved: saved.update(step="x"),
    "a list as its config": lambda saved: saved.update(config=[1]),
    "a section that is none": lambda saved: saved["config"].update(model=[1]),
    "no object as fingerprint": lambda saved: saved.update(fingerprint="x"),
    "a record without a step": lambda saved: saved.update(log_history=[{"eval_loss": 1.0}]),
    "a loss by a word": lambda saved: saved["log_history"].append({"eval_loss": "x", "step": 1}),
    "no loss": lambda saved: saved["log_history"].append({"loss": None, "step": 1}),
    "a record of no step": lambda saved: saved["log_history"].append({"loss": 1.0}),
    "a record of a later step": lambda saved: saved["log_history"].append({"step": 9}),
    "another step than its folder's": lambda saved: saved.update(step=9),
    "fewer updates than none": lambda saved: saved.update(updates=-1),
    "a metric without a value": lambda saved: saved.update(open_metrics={"kl": []}),
    "losses that are none": lambda saved: saved.update(recent_losses=[None]),
    "a pipe among its files": lambda saved: saved["checksums"].update(pipe="x"),
    "a file elsewhere": lambda saved: saved["checksums"].update({"/proc/self/mem": "x"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_strangers_checkpoint_says_is_not_believed(folder, copy, name):
    path = copy / "checkpoint-8"
    saved = json.loads((path / "resume_state.json").read_text())
    del saved["sha256"]
    WRONG[name](saved)
    body = json.dumps(saved, indent=2)[1:]
    first = hashlib.sha256(body.encode()).hexdigest()
    (path / "resume_state.json").write_text(f'{{"sha256": "{first}",{body}')
    os.mkfifo(path / "pipe")
    with pytest.raises(ConfigError, match=r"json (cannot be read|is damaged): |/mem is"):
        fine_tune(folder, copy, resume_from_checkpoint=str(path))


WRONG_TENSORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "of other shapes": lambda x: x[..., :1],
    "as many, in another shape": lambda x: np.ascontiguousarray(x.T),
    "no numbers": lambda x: x * np.float32(np.nan),
    "squares below zero": lambda x: x - 1,
    "rounded": lambda x: x.astype(np.float16),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_tensors_that_no_run_keeps_in_a_strangers_checkpoint_are_refused(folder, copy, what):
    path, change = copy / "checkpoint-8", WRONG_TENSORS[what]
    moments = load_file(path / "optimizer.safetensors")
    save_file({k: change(v) for k, v in moments.items()}, path / "optimizer.safetensors")
    rewrite_state(path, lambda saved: None)
    with pytest.raises(ConfigError, match=r"checkpoint-8 cannot be read"):
        fine_tune(folder, copy)


OTHER_NUMERICS = "was trained with version {} of the numerics, and this mlx-qlora has version 2, "
OTHER_NUMERICS += "whose results differ"
LATER = f"is of a later mlx-qlora: {mq.__version__} does not know its "
# How another version's state differs from ours, and what is said of it.
VERSIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "without a number": (lambda s: s["fingerprint"].pop("numerics"), OTHER_NUMERICS.format(1)),
    "7": (lambda s: s["fingerprint"].update(numerics="7"), OTHER_NUMERICS.format(7)),
    "a field": (lambda s: s.update(ema=[1]), LATER + "ema"),
    "a setting": (lambda s: s["config"]["lora"].update(rings=3), LATER + "lora.rings"),
    "a section": (lambda s: s["config"].update(ema={"rate": 1}), LATER + "ema.rate"),
}


@pytest.mark.parametrize("what", VERSIONS)
def test_another_versions_checkpoint_is_refused_with_the_ways_out(folder, copy, what):
    """It is not passed over for an older one, which would lose what was done since."""
    path = copy / "checkpoint-8"
    change, reason = VERSIONS[what]
    rewrite_state(path, change)
    record = json.loads((copy / "training_args.json").read_text())
    record["versions"]["mlx-qlora"] = "9.9.9"
    (copy / "training_args.json").write_text(json.dumps(record))
    before = everything(copy)
    with pytest.raises(ConfigError) as error:
        fine_tune(folder, copy)
    assert str(error.value) == (
        f"{path} {reason}; finish the run with the mlx-qlora that began it "
        f"(9.9.9 in {copy}/training_args.json), or begin a new run with its adapter: mq.load("
        f"adapter='{path}') and another output_dir"
    )
    assert everything(copy) == before
    model, _ = mq.load(folder, adapter=path)
    assert model.lora_config.r == 2, "the second way out is open"


def test_a_model_elsewhere_and_other_weights_in_its_place_are_refused_and_nothing_is_touched(
    folder, copy, tmp_path
):
    """Here the very same weights are in another folder, there others are in the same one."""
    model, out = shutil.copytree(folder, tmp_path / "model"), tmp_path / "mine"
    with at_step(1, stop), pytest.raises(Interrupted):
        fine_tune(model, out)
    before = everything(copy), everything(out)
    with pytest.raises(ConfigError, match=r"made from another (config and )?model"):
        fine_tune(model, copy)
    other = write_model(tmp_path / "other", seed=5, **SHAPE)
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    with pytest.raises(ConfigError, match="another model"):
        fine_tune(model, out)
    assert (everything(copy), everything(out)) == before


def test_what_does_not_decide_the_weights_may_change_and_every_file_is_hashed_once(
    folder, whole, copy, monkeypatch
):
    hashed, sha256 = [], checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda path: hashed.append(path) or sha256(path))
    shutil.rmtree(copy / "checkpoint-8")
    run = fine_tune(folder, copy, save_steps=1, save_total_limit=2)
    assert f"continuing from {copy / 'checkpoint-6'}\n" in run.printed
    assert_same(run, whole)
    assert steps_in(copy)[-2:] == [7, 8]
    old = sorted(path.name for path in hashed if path.parent == copy / "checkpoint-6")
    assert old == [name for name in FILES if name != "resume_state.json"]
    assert len(hashed) == 3 * len(old), "and those of the two new checkpoints"


def test_recomputing_may_change_and_decides_nothing_but_the_last_digits(folder, whole, copy):
    """Attention weights that are made anew come from the log-sum, and are rounded otherwise."""
    shutil.rmtree(copy / "checkpoint-8")
    run = fine_tune(folder, copy, gradient_checkpointing=True)
    assert f"continuing from {copy / 'checkpoint-6'}\n" in run.printed
    ours, theirs = (load_file(r.out / "adapter_model.safetensors") for r in (run, whole))
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert abs(ours[name] - wanted).max() <= 1e-5 * abs(wanted).max(), name
    losses = [
        [h.get("loss", h.get("eval_loss")) for h in r.result.log_history] for r in (run, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---- the disk ----------------------------------------------------------------------------------


def mounted(*words: str) -> bool:
    """Whether this machine let us mount something; a user's own machine does not."""
    try:
        return subprocess.run(["mount", *words], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that may be filled: a disk of its own where that can be had."""
    path = tmp_path / "disk"
    path.mkdir()
    here = mounted("-t", "tmpfs", "-o", "size=2m", "none", str(path))
    yield path
    if here:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[Callable[[int], None]]:
    """Lends what fills the disk but for some KiB; without a disk of its own, no file may grow."""
    ballast, limits = disk / "ballast", ExitStack()

    def fill(room: int) -> None:
        if not os.path.ismount(disk):
            limits.enter_context(files_of_at_most(room * 256))
            return
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(file.tell() - room * 1024, 0))

    try:
        with limits:
            yield fill
    finally:
        ballast.unlink(missing_ok=True)


def assert_explained(error: str, out: Path, reason: str, last: int) -> None:
    assert error.startswith(f"cannot write to {out}"), error
    assert error.count(reason) == 1, error
    full = "free some space or " * (reason not in ("Permission denied", "Read-only file system"))
    remedy = f"{full}choose another output_dir. "
    assert error.endswith(
        f"; {remedy}{out / f'checkpoint-{last}'} is complete, and the same command continues "
        "from it"
    ), error
    assert steps_in(out)[-1] == last
    read_state(out / f"checkpoint-{last}")
    assert hidden(out) == []


@pytest.mark.parametrize("room", [0, 4, 8, 16, 24, 32])
def test_a_full_disk_costs_no_finished_step(folder, whole, disk, room):
    out = disk / "out"
    with full(disk) as fill:
        with pytest.raises(TrainingError) as error, at_step(4, lambda _: fill(room)):
            fine_tune(folder, out)
        reason = "No space left on device" if os.path.ismount(disk) else "File too large"
        assert_explained(str(error.value), out, reason, 3)
    assert_same(fine_tune(folder, out), whole)


def test_a_disk_that_fills_up_at_the_very_end_leaves_the_last_checkpoint(
    folder, whole, disk, monkeypatch
):
    out = disk / "out"
    with full(disk) as fill:
        monkeypatch.setattr(Run, "end", lambda _: fill(4))
        with pytest.raises(TrainingError) as error:
            fine_tune(folder, out)
        monkeypatch.undo()
        reason = "No space left on device" if os.path.ismount(disk) else "File too large"
        assert_explained(str(error.value), out, reason, 8)
        assert not (out / "adapter_model.safetensors").exists()
    assert_same(fine_tune(folder, out), whole)


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_file(tensors: Any, path: Path, **_: Any) -> None:
    path.write_bytes(b"\x08\0\0\0")
    no_space()


@pytest.mark.parametrize(
    ("owner", "name", "fails"),
    [
        (checkpoint, "save_file", half_a_file),
        (checkpoint, "_write_state", no_space),
        (os, "fsync", no_space),
        (Path, "rename", no_space),
        (tempfile, "mkdtemp", no_space),
    ],
)
def test_whatever_write_fails_costs_no_finished_step(folder, whole, tmp_path, owner, name, fails):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as error:
        with at_step(4, lambda _: patch.setattr(owner, name, fails)):
            fine_tune(folder, out)
    assert_explained(str(error.value), out, "No space left on device", 3)
    assert_same(fine_tune(folder, out), whole)


def test_a_folder_that_becomes_read_only_costs_no_finished_step(folder, whole, tmp_path):
    """Modes do not bind root: for root the folder is mounted anew, or the system is played."""
    out, mounts = tmp_path / "out", []

    def close(run: Run) -> None:
        run.output.chmod(0o555)
        if not os.access(run.output, os.W_OK):
            return
        if mounted("--bind", str(out), str(out)):
            mounts.append(out)
            assert mounted("-o", "remount,bind,ro", str(out))
            return
        denied = OSError(errno.EROFS, os.strerror(errno.EROFS), str(out))
        patch.setattr(tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(denied))

    try:
        with pytest.MonkeyPatch.context() as patch, at_step(4, close):
            with pytest.raises(TrainingError) as error:
                fine_tune(folder, out)
        reason = "Permission denied" if os.geteuid() else "Read-only file system"
        assert_explained(str(error.value), out, reason, 3)
        if not os.access(out, os.W_OK):
            before = everything(out)
            with pytest.raises(ConfigError, match=r"out cannot be made: .*may not be written to"):
                fine_tune(folder, out)
            assert everything(out) == before
    finally:
        for path in mounts:
            subprocess.run(["umount", "-l", str(path)], check=True)
        out.chmod(0o755)
    assert_same(fine_tune(folder, out), whole)


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_folder_that_is_removed_during_the_run_is_missed(folder, tmp_path, step):
    out = tmp_path / "out"
    with at_step(step, lambda _: shutil.rmtree(out)), pytest.raises(TrainingError) as error:
        fine_tune(folder, out)
    assert str(error.value).startswith(f"cannot write to {out}: it was removed during the run; ")
    assert str(error.value).endswith("No checkpoint was written yet")
    assert not out.exists()


@pytest.mark.parametrize("size", [0, 512])
def test_a_start_without_space_keeps_the_old_record_and_leaves_no_partial_file(folder, copy, size):
    before = (copy / "run.yaml").read_bytes()
    shutil.rmtree(copy / "checkpoint-8")
    with files_of_at_most(size), pytest.raises(TrainingError):
        fine_tune(folder, copy)
    assert (copy / "run.yaml").read_bytes() == before
    assert hidden(copy) == []


def test_a_pipe_that_breaks_is_no_disk_error(tmp_path):
    with pytest.raises(BrokenPipeError), disk_errors(tmp_path):
        raise BrokenPipeError(32, "Broken pipe")


# ---- two runs, one folder ----------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(folder, whole, tmp_path):
    out, refusals = tmp_path / "out", []

    def rest() -> Any:  # without the page, which the first run keeps up to date
        return {
            k: v for k, v in everything(out).items() if k not in (str(out), f"{out}/report.html")
        }

    def second(_: Run) -> None:
        before = rest()
        for wanted in ("auto", "none"):
            with pytest.raises(ConfigError) as error:
                fine_tune(folder, out, resume_from_checkpoint=wanted)
            refusals.append(str(error.value))
        assert rest() == before

    with at_step(5, second):
        run = fine_tune(folder, out)
    expected = f"another run is writing to {out}; choose another output_dir, or wait for it"
    assert refusals == [expected] * 2
    assert_same(run, whole)


def test_the_checkpoint_to_resume_is_chosen_under_the_lock(folder, tmp_path):
    """Another run finishes after this one's model is prepared and before it takes the folder."""
    prepare, prepared = Inputs.prepare, []

    def slow(self: Inputs, model: Any) -> Inputs:
        inputs = prepare(self, model)
        if not prepared:
            prepared.append(inputs)
            fine_tune(folder, tmp_path / "out")
        return inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inputs, "prepare", slow)
        run = fine_tune(folder, tmp_path / "out")
    assert f"continuing from {tmp_path / 'out' / 'checkpoint-8'}\n" in run.printed


HOLD = """
import sys, time
from pathlib import Path
from mlx_qlora.folders import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_ends_with_its_process(folder, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match="another run is writing to"):
                fine_tune(folder, out)
            assert list(out.iterdir()) == []
        finally:
            holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert_same(fine_tune(folder, out), whole)
    assert hidden(out) == []


# ---- what the files are ------------------------------------------------------------------------


def test_every_file_is_safetensors_json_text_or_a_picture(whole):
    seen = set()
    for path in (path for path in whole.out.rglob("*") if path.is_file()):
        seen.add(path.suffix)
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                assert all(file.get_tensor(name).dtype == np.float32 for name in file.keys())
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            assert all(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
        else:
            assert "\0" not in path.read_text(encoding="utf-8")
    assert seen == {".safetensors", ".json", ".jsonl", ".md", ".yaml", ".html", ".svg"}
    assert sorted(path.name for path in (whole.out / "checkpoint-8").iterdir()) == FILES


def test_bytes_are_on_the_disk_before_the_folder_takes_its_place(tmp_path, monkeypatch):
    """Or a power cut could leave a folder of the right name with empty files in it."""
    events: list[Any] = []
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_ino))

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with staged(tmp_path / "checkpoint-1") as staging:
        (staging / "sub").mkdir()
        for name in ("a", "sub/b"):
            (staging / name).write_text(name)
    made = tmp_path / "checkpoint-1"
    inodes = [path.stat().st_ino for path in (made, made / "a", made / "sub", made / "sub" / "b")]
    assert sorted(events[:4]) == sorted(inodes)
    assert events[4:] == ["rename", tmp_path.stat().st_ino]


def test_every_file_of_a_checkpoint_is_flushed(folder, tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def noted(number: int) -> None:
        flushed.add(os.fstat(number).st_ino)
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    run = fine_tune(folder, tmp_path / "out", max_steps=1)
    made = run.out / "checkpoint-1"
    assert {path.stat().st_ino for path in (made, *made.iterdir())} <= flushed
    final = ("adapter_model.safetensors", "adapter_config.json", "mlx/adapters.safetensors")
    assert {(run.out / name).stat().st_ino for name in final} <= flushed


def test_files_of_a_run_have_the_modes_that_the_umask_asks_for(whole):
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

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "rename", fails)
        with staged(out, replace=True) as staging:
            (staging / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert (out / "a").read_text() == "old"
