"""A run writes into its folder alone, whatever in there is a link to somewhere else."""

import shutil
from pathlib import Path

import pytest
from support.command_line import call

MINE = ["tokenizer.json", "tokenizer_config.json", "adapter_model.safetensors", "run.yaml"]
MINE += ["adapter_config.json", "metrics.jsonl", "report.html", "plots/loss.svg"]


def test_no_file_is_written_through_a_link(train: list[str], tmp_path: Path) -> None:
    assert call(*train) == 0
    away = tmp_path / "away"
    away.mkdir()
    for path in (tmp_path / "out" / name for name in MINE):
        victim = away / path.name
        shutil.move(path, victim)
        victim.write_text("mine")
        path.symlink_to(victim)
    assert call(*train, "--resume", "false") == 0
    assert {path.read_text() for path in away.iterdir()} == {"mine"}
    assert not any((tmp_path / "out" / name).is_symlink() for name in MINE)


@pytest.mark.parametrize("words", [["checkpointing.save_total_limit=1"], []])
def test_a_checkpoint_that_was_moved_away_is_forgotten_and_not_removed(
    words: list[str], train: list[str], tmp_path: Path
) -> None:
    steps = ["checkpointing.save_steps=1", "training.max_steps=2"]
    assert call(*train, *steps) == 0
    place, away = tmp_path / "out" / "checkpoint-1", tmp_path / "away"
    shutil.move(place, away)
    place.symlink_to(away)
    files = sorted(away.rglob("*"))
    assert call(*train, *steps, "--resume", "false", *words) == 0
    assert files and sorted(away.rglob("*")) == files
    assert not [*(tmp_path / "out").glob(".*")]
