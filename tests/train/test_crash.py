"""A command that is killed and given again ends bit for bit as one that was left alone."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from support.command_line import ROOT

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import crash
from crash import RANDOM, LeftAlone, Moment


@pytest.fixture(scope="module")
def alone(warm: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> LeftAlone:
    return warm.submit(LeftAlone, tmp_path_factory.mktemp("crash")).result()


def test_four_of_four_killed_runs_end_identically_and_leave_nothing_behind(warm, alone):
    moments = [
        [Moment(RANDOM, 0.5), Moment(RANDOM, 0.5)],
        [  # with half of a checkpoint's moments on disk; then before a checkpoint gets its name
            Moment("half a file", "out/.checkpoint-8.tmp/optimizer.safetensors"),
            Moment("rename", "out/checkpoint-10"),
        ],
        [Moment("remove", 7)],  # the six files of an old checkpoint are gone, its folder is not
        [  # the last checkpoint has its name, the oldest is not removed; then amid the adapter
            alone.moment("rename", "out/checkpoint-18", then=1),
            Moment("rename", "out/adapter_model.safetensors"),
        ],
    ]
    names = [f"trial-{number}" for number in range(len(moments))]
    trials = [*warm.map(crash.run_trial, [alone] * len(moments), names, moments)]
    assert [trial.killed for trial in trials[1:]] == moments[1:]
    assert all(trial.killed for trial in trials)
    assert [trial.problems for trial in trials] == [[]] * len(moments)
    assert [trial.litter for trial in trials] == [[]] * len(moments)


SOLO = [name for name in crash.CASES if name != "two"]


@pytest.mark.slow
@pytest.mark.parametrize("n, cases", [(48, SOLO), (2, ["two"])], ids=["one process", "two"])
def test_every_command_may_be_killed(tmp_path, n, cases):
    """Trials with the seed's moments, 50 in all; the file of results is gone on from."""
    results = tmp_path / "results.jsonl"
    words = [sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--kills", str(n), "--seed"]
    kept = [*words, "1", "--only", ",".join(cases), "--results", str(results), "--jobs", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(kept, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(trials) == n and {trial["case"] for trial in trials} == {*cases}
    assert all(trial["killed"] and not trial["problems"] for trial in trials)


def test_the_comparison_sees_one_bit_one_loss_and_one_file(alone, tmp_path):
    other = shutil.copytree(alone.out, tmp_path / "out")
    for path in (other / "run.yaml", other / "training_args.json"):
        path.write_text(path.read_text().replace(str(alone.place), str(tmp_path)))
    for path in other.glob("checkpoint-*/trainer_state.json"):
        path.write_text(path.read_text().replace(str(alone.place), str(tmp_path)))
    assert crash.differences(alone.out, other) == []
    weights = other / "checkpoint-18" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    records = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    records[3]["loss"] += 1e-12
    (other / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (other / "mlx" / "adapters.safetensors").unlink()
    assert crash.differences(alone.out, other) == [
        "checkpoint-18/adapter_model.safetensors differs",
        "metrics.jsonl differs",
        "mlx/adapters.safetensors is missing",
    ]


def test_moments_are_drawn_from_the_seed_half_of_them_inside_writes(alone):
    drawn = [alone.draw(number, seed=1) for number in range(100)]
    assert drawn == [alone.draw(number, seed=1) for number in range(100)]
    assert drawn != [alone.draw(number, seed=2) for number in range(100)]
    kinds = [moment.kind for moments in drawn for moment in moments]
    assert 0.3 < kinds.count(RANDOM) / len(kinds) < 0.7 and {*kinds} == {RANDOM, *crash.CALLS}
