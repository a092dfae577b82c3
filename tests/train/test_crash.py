"""A run that is killed and started again ends bit for bit as one that was left alone."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import crash
from crash import RANDOM, LeftAlone, Moment


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> LeftAlone:
    return LeftAlone(tmp_path_factory.mktemp("crash"))


def test_six_of_six_killed_runs_end_identically_and_leave_nothing_behind(alone):
    moments = [
        [Moment(RANDOM, 0.8)],  # before the first line of progress
        [Moment(RANDOM, 4.5), Moment(RANDOM, 4.5)],
        [Moment(RANDOM, 12.3)],
        [  # with half of a checkpoint's moments on disk; then before a checkpoint gets its name
            Moment("half a file", "out/.checkpoint-8.tmp/optimizer.safetensors"),
            Moment("rename", "out/checkpoint-20"),
        ],
        [Moment("remove", 7)],  # the six files of an old checkpoint are gone, its folder is not
        [  # the last checkpoint has its name, the oldest is not removed; then amid the adapter
            alone.moment("rename", "out/checkpoint-36", then=1),
            Moment("rename", "out/adapter_model.safetensors"),
        ],
    ]
    trials = crash.run_trials(alone, moments)
    assert [trial.killed for trial in trials[3:]] == moments[3:]
    assert all(trial.killed for trial in trials)
    assert [trial.problems for trial in trials] == [[]] * 6
    assert [trial.litter for trial in trials] == [[]] * 6


def test_the_comparison_sees_one_bit_one_loss_and_one_file(alone, tmp_path):
    other = shutil.copytree(alone.out, tmp_path / "out")
    assert crash.differences(alone.out, other) == []
    weights = other / "checkpoint-36" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    records = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    records[4]["loss"] += 1e-12
    (other / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (other / "mlx" / "adapters.safetensors").unlink()
    assert crash.differences(alone.out, other) == [
        "checkpoint-36/adapter_model.safetensors differs",
        "metrics.jsonl differs",
        "mlx/adapters.safetensors is missing",
    ]


def test_moments_are_drawn_from_the_seed_half_of_them_inside_writes(alone):
    drawn = crash.draw_moments(alone, 50, seed=1)
    assert drawn == crash.draw_moments(alone, 50, seed=1) != crash.draw_moments(alone, 50, seed=2)
    kinds = [moments[0].kind for moments in drawn]
    assert len(kinds) == 50 and kinds.count(RANDOM) == 25 and set(kinds) == {RANDOM, *crash.CALLS}
