"""Dropout, advice and memory where runs differ in shape, begin from an adapter, or are resumed."""

import io
import shutil

import numpy as np
import pytest
from rich.console import Console
from test_advice import history, skipped
from test_invariants import assert_same, batch_of, command, losses  # noqa: F401
from test_update import (  # noqa: F401
    MALLOC,
    a_step,
    kept_apart,
    model,
    poisoning,
    start,
    too_small_for,
    updater,
)

from mlx_qlora.after.advice import advise
from mlx_qlora.errors import TrainingError
from mlx_qlora.train import loop


def test_unpacked_rows_of_different_widths_with_dropout(command, tmp_path):
    """Rows of 30 to 110 tokens: batches of 64, 112 and 128 columns."""
    import json
    import random

    draw = random.Random(0)
    rows = [
        {"instruction": f"count {i}", "output": " ".join(["one two"] * draw.randrange(1, 13))}
        for i in range(160)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = [*command, "--data", str(path), "data.packing=false"]
    for p in ("0", "0.1"):
        plain = losses(tmp_path / f"8x1-{p}", *alone, *batch_of(8, 1), f"lora.lora_dropout={p}")
        other = losses(tmp_path / f"2x4-{p}", *alone, *batch_of(2, 4), f"lora.lora_dropout={p}")
        print("dropout", p, "max difference", np.abs(plain - other).max())
        assert_same(other, plain)


def test_loraplus_on_an_attached_adapter(hf_tiny, tmp_path):
    """`train --adapter DIR lora.loraplus_lr_ratio=8` trains, and records, a ratio of 1."""
    from support.models import load_folder
    from test_loraplus import adapted, counting

    from mlx_qlora.adapters.peft import load_adapter, save_adapter
    from mlx_qlora.config import build
    from mlx_qlora.run import prepare

    save_adapter(adapted(hf_tiny[1]), tmp_path / "adapter", "org/base")
    ours = load_adapter(load_folder(hf_tiny[1]), tmp_path / "adapter")
    config = build(
        {
            "lora": {"loraplus_lr_ratio": 8.0},
            "model": {"base_model_name_or_path": "org/base"},
            "checkpointing": {"output_dir": str(tmp_path / "out")},
        }
    )
    prepared = prepare(ours, counting(), None, config)
    assert prepared.config.lora.loraplus_lr_ratio == 8.0
    assert ours.lora_config.loraplus_lr_ratio == 8.0


FALL_AND_CLIMB = history([3.0, 2.4, 2.0, 1.6, 1.5, 1.4, 1.6, 2.2, 2.8, 3.1])
FLAT_WITH_A_SKIP = [*history([3.0, 2.99, 3.0, 2.99, 2.98, 3.0]), skipped(30)]
FLAT_AND_OVERFITTED = history([2.00, 2.00, 1.99, 1.99, 1.98, 1.97, 1.97, 1.96], [1.9, 1.95, 2.0])


@pytest.mark.parametrize("found", [FALL_AND_CLIMB, FLAT_WITH_A_SKIP, FLAT_AND_OVERFITTED])
def test_advice_does_not_contradict_itself(found):
    told = " ".join(map(str, advise(found)))
    print(told)
    rate = "raise training.learning_rate" in told and "lower training.learning_rate" in told
    steps = "train for more steps" in told and "train for fewer steps" in told
    rank = "raise lora.r" in told and "lower lora.r" in told
    assert not (rate or steps or rank)


@pytest.mark.parametrize("logged", [4])
def test_the_gradient_norm_of_an_open_log_window_survives_resuming(
    hf_tiny, tmp_path, monkeypatch, logged
):
    from mlx_qlora.train.metrics import LoggingConfig

    monkeypatch.setattr("test_update.LoggingConfig", lambda logging_steps: LoggingConfig(logged))
    monkeypatch.setattr(loop, "Engine", poisoning(12))  # step 4: the resumed window's first
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    unbroken = start(hf_tiny[1], whole)
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    resumed = start(hf_tiny[1], parts)
    assert kept_apart(resumed.log_history) == kept_apart(unbroken.log_history)


def test_a_memory_error_without_words_is_want_of_memory(model):
    update = updater(model, too_small_for(4, MemoryError()))
    assert update.step(a_step(0), 1e-2).finite


def test_memory_that_ends_in_a_validation_is_a_training_error(hf_tiny, tmp_path, monkeypatch):
    def score(*_):
        raise RuntimeError(MALLOC)

    monkeypatch.setattr(loop, "score", score)
    with pytest.raises(TrainingError):
        start(hf_tiny[1], tmp_path / "out")


def test_no_more_parts_are_told_of_than_there_are_rows(model):
    from test_update import a_batch

    printed = io.StringIO()
    import dataclasses

    batch = a_batch(0, False)
    cut = dataclasses.replace(
        batch,
        tokens=batch.tokens[:3],
        labels=batch.labels[:3],
        documents=batch.documents[:3],
        places=batch.places[:3],
        rows=batch.rows[:3],
    )
    update = updater(model, too_small_for(2, RuntimeError(MALLOC)), Console(file=printed))
    update.step([cut], 1e-2)
    assert "3 rows are computed in 4 parts" not in printed.getvalue()


def test_one_skipped_step_is_singular_and_one_in_a_thousand_is_no_divergence():
    healthy = history([3.0 - 0.002 * i for i in range(1000)])
    (advice,) = advise([*healthy, skipped(500)]) or [None]
    assert advice is None or "1 steps were" not in str(advice)
