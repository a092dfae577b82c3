"""A sweep: its order, its halving, what it says of noise, and that it can be killed."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from support.models import our_logits, random_tokens
from support.tiny_folder import write_model, write_rows

import mlx_qlora as mq
from mlx_qlora import run
from mlx_qlora.after.bootstrap import Interval
from mlx_qlora.config import build, read_yaml, to_yaml
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.sweep.search import sweep
from mlx_qlora.sweep.trial import (
    Measured,
    budget,
    candidates,
    checked_grid,
    config_of,
    difference,
    in_words,
    is_clear,
    stages,
    standard_error,
    start_point,
    ties,
)
from mlx_qlora.train.config import TrainingConfig
from mlx_qlora.train.signals import Interrupted

GRID = {"learning_rate": [1e-7, 1e-2, 1.0, 1e30], "r": [2, 4]}
STEPS = 8
TIMES = ("tokens_per_second", "peak_memory_bytes", "seconds")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", 70)
    return folder


def config(place: Path, out: Path, **changes: dict[str, Any]) -> mq.RunConfig:
    """A tiny run with dropout and accumulation."""
    values: dict[str, dict[str, Any]] = {
        "model": {"source": str(place / "model"), "bits": 4, "group_size": 32},
        "data": {
            "path": str(place / "rows.jsonl"),
            "max_length": 64,
            "split": [0.6, 0.4, 0.0],
            "num_workers": 0,
        },
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {
            "max_steps": 400,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        },
        "checkpointing": {"output_dir": str(out), "save_steps": 3},
    }
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields}
    return build(values)


def swept(config: mq.RunConfig, grid: Any, steps: int = STEPS, rungs: int = 3, **how: Any):
    """(result, its winner, what was printed)."""
    printed = io.StringIO()
    found = sweep(config, Console(file=printed, width=200), grid, steps, rungs, **how)
    trials, record, output = [*found.trials.values()], found.record, found.inputs.output
    (winner,) = (each for each in trials if each.name == record["winner"])
    asked = replace(found.inputs.config.checkpointing, output_dir=str(output / "best"))
    result = SimpleNamespace(
        **{"trials": trials, "stages": found.done, "output_dir": output, "winner": winner},
        **{"findings": record["findings"], "command": record["command"]},
        best=replace(winner.config, checkpointing=asked),
    )
    return result, winner, printed.getvalue()


def without_times(out: Path) -> dict[str, Any]:
    record = json.loads((out / "sweep.json").read_text())
    for row in record["trials"]:
        for name in TIMES:
            assert row.pop(name) != 0  # null: killed between the last step and its validation
    record["command"] = record["command"].replace(str(out), "OUT")
    return record


def trained(printed: str) -> list[str]:
    """The trials that were trained, one for each rung, in order."""
    return re.findall(r"^trial +(\S+): to step", printed, re.MULTILINE)


def weights(folder: Path, step: int) -> list[bytes]:
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return [(folder / f"checkpoint-{step}" / name).read_bytes() for name in names]


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory):
    """The sweep that most tests look at, with the base that it used."""
    out = tmp_path_factory.mktemp("done") / "out"
    bases, logits, load = [], [], run.load_model
    tokens = random_tokens(2, 20)

    def loading(*words: Any) -> Any:
        bases.append(load(*words))
        logits.append(our_logits(bases[-1], tokens))
        return bases[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_model", loading)
        result, _, printed = swept(config(place, out), GRID, repeat_best=True)
    assert len(bases) == 1, "the base is loaded once"
    return result, printed, logits[0], our_logits(bases[0], tokens), bases[0]


# ---- the plan ----------------------------------------------------------------------------------


def test_stages_come_in_the_guides_order_and_each_varies_one_field(place, tmp_path):
    grid = checked_grid({"r": [32, 8, 8, 16], "batch_size": [8], "learning_rate": [5e-4, 1e-4]})
    assert list(grid.items()) == [
        ("learning_rate", [1e-4, 5e-4]),
        ("r", [8, 16, 32]),
        ("batch_size", [8]),
    ]
    assert stages(grid, False) == [("learning_rate",), ("r",), ("batch_size",)]
    at = start_point(config(place, tmp_path))
    assert (at.learning_rate, at.r, at.batch_size, at.seed) == (1e-2, 4, 8, 0)
    assert [p.r for p in candidates(at, ("r",), grid)] == [8, 16, 32]
    assert {p.learning_rate for p in candidates(at, ("r",), grid)} == {1e-2}
    (together,) = stages(grid, True)
    assert len(set(candidates(at, together, grid))) == 2 * 3 * 1


def test_budgets_double_from_rung_to_rung():
    assert [budget(100, rung, 3) for rung in range(3)] == [25, 50, 100]
    assert [budget(10, rung, 3) for rung in range(3)] == [3, 5, 10]
    assert [budget(7, rung, 1) for rung in range(1)] == [7]


def test_a_batch_sees_as_many_rows_and_a_trial_is_planned_for_its_whole_budget(place, tmp_path):
    whole = config(place, tmp_path)
    start = start_point(whole)
    for rows, made in {8: (4, 2), 16: (4, 4), 6: (3, 2), 5: (1, 5), 2: (2, 1)}.items():
        training = config_of(whole, replace(start, batch_size=rows), 40, tmp_path).training
        assert (training.rows, training.gradient_accumulation_steps) == made
        assert training.max_steps == (steps := math.ceil(40 * 8 / rows))
        assert training.warmup_steps == steps // 10


def test_the_automatic_learning_rate_is_the_published_rule():
    auto = TrainingConfig(learning_rate="auto")
    for hidden, published in ((4096, 2.86e-4), (3072, 3.58e-4), (2048, 4.91e-4)):
        rate = auto.at_hidden_size(hidden).learning_rate
        assert rate == pytest.approx(published, rel=2e-3)
    assert TrainingConfig(learning_rate=3e-4).at_hidden_size(64).learning_rate == 3e-4
    with pytest.raises(mq.ConfigError, match=r"training\.learning_rate must be a number or auto"):
        TrainingConfig(learning_rate="fast")


def test_auto_is_resolved_and_recorded(place, tmp_path):
    out = tmp_path / "out"
    asked = config(place, out, training={"learning_rate": "auto"})
    _, winner, _ = swept(asked, {"r": [2]}, steps=1, rungs=1)
    rate = 5e-5 * 10 * (2000 / 64) ** 0.781
    assert winner.point.learning_rate == rate
    recorded = read_yaml(Path(winner.config.checkpointing.output_dir) / "run.yaml")
    assert recorded["training"]["learning_rate"] == rate
    assert read_yaml(out / "best.yaml")["training"]["learning_rate"] == rate


# ---- a whole sweep -----------------------------------------------------------------------------


def test_halving_the_absurd_lose_and_the_diverged_stop_nothing(done):
    result, _, _, _, _ = done
    rates, ranks = result.stages
    assert [[len(on) for on in rung] for rung in rates.rungs] == [[4, 2], [2, 1], [1, 1]]
    assert [[len(on) for on in rung] for rung in ranks.rungs] == [[2, 1], [1, 1], [1, 1]]
    states = {t.point.learning_rate: t.state(3) for t in result.trials if t.point.r == 4}
    assert states[1e-2] == "finished"
    assert states[1e30].startswith("failed: step 2") and "not finite" in states[1e30]
    assert rates.winner.learning_rate == 1e-2
    assert any("learning rate 1e+30 failed" in line for line in result.findings)
    for rate in (1e-7, 1.0):
        (worse,) = [t for t in result.trials if t.point.learning_rate == rate]
        (better,) = [t for t in result.trials if t.point == rates.winner]
        rung = len(worse.measured) - 1
        apart = difference(better.measured[rung], worse.measured[rung])
        assert apart.high < 0, "the interval leaves out 0"
        assert any(f"is better than learning rate {rate:g} by" in x for x in result.findings)


def test_the_shared_base_is_unchanged_bit_for_bit(done):
    _, _, before, after, base = done
    assert np.array_equal(before, after)
    assert trainable_count(base) == 0 and not mq.adapter_names(base)


def test_a_trial_that_went_on_is_bit_for_bit_an_uninterrupted_run(done, place, tmp_path):
    """`fine_tune` of the same config, with its own model, validation and checkpoints."""
    result, printed, *_ = done
    tried = result.winner
    assert printed.count("continuing from") >= 3
    alone = replace(
        tried.config,
        checkpointing=mq.CheckpointingConfig(output_dir=str(tmp_path / "alone"), eval_steps=4),
    )
    model, tokenizer = mq.load(place / "model", mq.QuantConfig(4, 32))
    rows = mq.read_examples(place / "rows.jsonl", tokenizer, alone.data)
    learn, held_out, _ = rows.split(alone.data.split, alone.training.seed)
    ran = mq.fine_tune(model, tokenizer, learn, held_out, alone, console=Console(quiet=True))
    folder = Path(tried.config.checkpointing.output_dir)
    assert weights(folder, STEPS) == weights(tmp_path / "alone", STEPS)
    assert ran.eval_loss == pytest.approx(tried.measured[-1].validation_loss, abs=1e-6)


def test_the_record_the_table_and_the_plot(done):
    result, printed, *_ = done
    record = json.loads((result.output_dir / "sweep.json").read_text())
    assert record["finished"] and record["winner"] == result.winner.name
    assert [stage["varied"] for stage in record["stages"]] == [["learning_rate"], ["r"]]
    for row in record["trials"]:
        assert row["name"] in printed
        if not row["state"].startswith("failed"):
            assert f"{row['validation_loss']:.4f} ± {row['validation_loss_error']:.4f}" in printed
            assert row["peak_memory_bytes"] > 0 and row["tokens_per_second"] > 0
    assert {row["steps"] for row in record["trials"]} == {2, 8} | (
        {4} if any(len(t.measured) == 2 for t in result.trials) else set()
    )
    assert any(line.startswith("with seed 1") for line in record["findings"])
    svg = ElementTree.parse(result.output_dir / "sweep.svg").getroot()
    shapes = [element.tag.rpartition("}")[2] for element in svg.iter()]
    measured = sum(not m.failed for trial in result.trials for m in trial.measured)
    assert shapes.count("circle") == measured


def test_the_best_config_is_the_winners_and_can_be_trained(done):
    result, printed, *_ = done
    loaded = build(read_yaml(result.output_dir / "best.yaml"))
    tried = result.winner.config
    assert loaded == result.best
    assert replace(loaded, checkpointing=tried.checkpointing) == tried
    assert loaded.checkpointing.output_dir == str(result.output_dir / "best")
    assert result.command.endswith("best.yaml training.max_steps=400 training.warmup_steps=40")
    assert result.command in printed
    from mlx_qlora import cli

    words = [*result.command.split()[1:], "--print-config"]
    assert cli.main(words) == 0


# ---- noise -------------------------------------------------------------------------------------


def measured(nats: np.ndarray, tokens: np.ndarray) -> Measured:
    return Measured("", 1, 0.0, nats, tokens)


def test_the_interval_covers_the_truth_as_often_as_it_says_and_pairing_narrows_it():
    random = np.random.default_rng(0)
    covered, narrower, trials, n = 0, 0, 200, 60
    for repeat in range(trials):
        tokens = random.integers(3, 30, n)
        hard = random.gamma(2.0, 0.5, n)
        first = measured(tokens * (hard + random.normal(0.02, 0.1, n)), tokens)
        second = measured(tokens * hard, tokens)
        found = difference(first, second)
        covered += found.low <= 0.02 <= found.high
        if repeat < 20:
            apart = math.hypot(standard_error(first), standard_error(second))
            narrower += found.high - found.low < apart
    assert 0.89 <= covered / trials <= 0.99
    assert narrower == 20


def test_the_standard_error_is_that_of_resamples():
    random = np.random.default_rng(1)
    tokens = random.integers(3, 30, 100)
    losses = measured(tokens * random.gamma(2.0, 0.5, 100), tokens)
    drawn = random.integers(0, 100, (20_000, 100))
    means = losses.nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    assert standard_error(losses) == pytest.approx(means.std(), rel=0.04)


def test_equals_are_called_so_and_clear_winners_too():
    random = np.random.default_rng(2)
    tokens = random.integers(3, 30, 80)
    first = measured(tokens * random.gamma(2.0, 0.5, 80), tokens)
    near = measured(first.nats + tokens * random.normal(0.0, 0.1, 80), tokens)
    far = measured(first.nats + tokens * random.normal(0.5, 0.1, 80), tokens)
    assert ties([far, near, first]) == [1, 2]
    assert "are indistinguishable here (difference " in in_words("a", "b", difference(first, near))
    tiny = tokens * random.uniform(1e-6, 2e-6, 80)  # everywhere worse, and by nothing
    hair = measured(first.nats + tiny, tokens)
    assert difference(hair, first).low > 0 and not is_clear(difference(hair, first))
    said = in_words("a", "b", difference(far, first))
    number = r"0\.[45]\d+"
    assert re.fullmatch(
        rf"b is better than a by {number} \({number} to {number}\) nats per token", said
    )
    assert in_words("b", "a", difference(first, far)) == said
    lopsided = Interval(-0.03, -0.17, 0.001, 80, "bca")
    assert in_words("a", "b", lopsided).endswith("(difference 0.0300, interval -0.0010 to 0.1700)")
    few = measured(first.nats[:7], tokens[:7]), measured(far.nats[:7], tokens[:7])
    assert not is_clear(difference(*few)), "of seven examples nothing is said"
    assert in_words("a", "b", difference(*few)).endswith(", interval not known)")


def test_indistinguishable_candidates_are_reported_and_the_cautious_one_taken(place, tmp_path):
    grid = {"learning_rate": [1.0e-7, 1.1e-7, 1.2e-7]}
    result, winner, printed = swept(config(place, tmp_path / "out"), grid, steps=2, rungs=1)
    assert winner.point.learning_rate == 1.0e-7
    same = [line for line in result.findings if "indistinguishable" in line]
    assert len(same) == 2 and all(line in printed for line in same)
    best = min(result.trials, key=lambda t: t.measured[-1].validation_loss)
    said = any("has the lowest loss, but its lead over" in x for x in result.findings)
    assert said == (best is not winner)


# ---- again -------------------------------------------------------------------------------------


def test_another_grid_reuses_what_is_there_and_says_so(done, place):
    result, *_ = done
    before = without_times(result.output_dir)
    _, winner, printed = swept(config(place, result.output_dir), GRID, repeat_best=True)
    assert trained(printed) == [] and without_times(result.output_dir) == before
    assert "reused" in printed and winner.name == result.winner.name

    wider = {**GRID, "learning_rate": [1e-7, 1e-2, 2e-2]}
    again, _, printed = swept(config(place, result.output_dir), wider)
    assert trained(printed)[:3] and all("lr0.02_" in name for name in trained(printed)[:3])
    assert len([t for t in again.trials if t.point.learning_rate == 1e-2 and t.point.r == 4]) == 1
    assert "reused    lr1e-07_r4" in printed and "reused    lr0.01_r4" in printed


def test_a_trial_that_skipped_too_many_steps_is_tried_again_with_more_allowed(place, tmp_path):
    grid, failed = {"learning_rate": [1e-7, 1e30]}, []
    for allowed in (1, 1, 6):
        patient = config(place, tmp_path, training={"max_skipped_steps": allowed})
        result, _, printed = swept(patient, grid, steps=6, rungs=1)
        failed.append(result.trials[-1].measured[-1].failed)
        assert ("reused    lr1e+30_r4" in printed) == (len(failed) == 2)
    assert failed[0] == failed[1] and "1 steps in a row" in failed[0]
    assert failed[2] != failed[0]


SCRIPT = """
import sys
from rich.console import Console
from mlx_qlora.config import build, read_yaml, to_yaml
from mlx_qlora.sweep.search import sweep
sweep(build(read_yaml(sys.argv[1])), Console(), {"learning_rate": [1e-7, 1e-2], "r": [2, 4]}, 8)
"""


SHORT_GRID = {"learning_rate": [1e-7, 1e-2], "r": [2, 4]}


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("alone") / "out"
    swept(config(place, out), SHORT_GRID)
    return out


def test_killed_anywhere_it_goes_on_to_the_same_result(place, alone, tmp_path):
    """SIGKILL within the first rung's validation, and again amid a trial that went on."""
    out = tmp_path / "killed"
    (tmp_path / "config.yaml").write_text(to_yaml(config(place, out)))
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "config.yaml")]
    for glob in ("trials/lr1e-07*/checkpoint-2", "trials/lr0.01_r4*/checkpoint-6"):
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(words, stdout=log, stderr=log)
        until = time.monotonic() + 30
        while not list(out.glob(glob)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        assert process.poll() is None, (tmp_path / "log").read_text()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        log.close()
        assert not json.loads((out / "sweep.json").read_text())["finished"]
    _, _, printed = swept(config(place, out), SHORT_GRID)
    assert "reused    lr1e-07" in printed and "checkpoint-6" in printed
    assert without_times(out) == without_times(alone)
    for folder in (alone / "trials").iterdir():
        (newest,) = folder.glob("checkpoint-*")
        step = int(newest.name.partition("-")[2])
        assert weights(folder, step) == weights(out / "trials" / folder.name, step)
    assert not [path for path in out.rglob(".*")], "nothing is left behind"


class Interrupting(io.StringIO):
    """A terminal at which somebody types Ctrl-C when the second trial has taken a step."""

    def write(self, text: str) -> int:
        written = super().write(text)
        if text.startswith("step 1/") and "trial     lr0.01" in self.getvalue():
            os.kill(os.getpid(), signal.SIGINT)
        return written


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_saves_the_last_step_and_the_sweep_goes_on_from_there(place, alone, tmp_path):
    asked = config(place, tmp_path / "out", logging={"logging_steps": 1})
    with pytest.raises(Interrupted, match=r"saved .*lr0\.01.*checkpoint-1\."):
        sweep(asked, Console(file=Interrupting(), width=200), SHORT_GRID, STEPS, 3)
    _, _, printed = swept(config(place, tmp_path / "out"), SHORT_GRID)
    assert "reused    lr1e-07" in printed and "checkpoint-1\n" in printed
    assert without_times(tmp_path / "out") == without_times(alone)


def test_a_product_is_one_stage_of_all_combinations(place, tmp_path):
    grid = {"learning_rate": [1e-3, 1e-2], "batch_size": [8, 4]}
    result, winner, _ = swept(config(place, tmp_path / "out"), grid, 2, 2, product=True)
    (only,) = result.stages
    assert len(only.points) == 4 and [len(all_) for all_, _ in only.rungs] == [4, 2]
    steps = {t.point.batch_size: t.config.training.max_steps for t in result.trials}
    assert steps == {8: 2, 4: 4}
    assert winner.point == only.winner
    assert any("learning rate 0.001, batch 4" in line for line in result.findings)


def test_a_damaged_record_is_measured_again_and_another_trials_is_not_taken(place, tmp_path):
    asked = config(place, tmp_path / "out")
    swept(asked, {"r": [2, 4]}, steps=2, rungs=1)
    before = without_times(tmp_path / "out")
    two, four = sorted((tmp_path / "out").glob("trials/*/validation-2.json"))
    two.write_bytes(four.read_bytes())
    four.write_text("{")
    _, _, printed = swept(asked, {"r": [2, 4]}, steps=2, rungs=1)
    assert "reused" not in printed
    assert without_times(tmp_path / "out") == before


# A field of a record that no sweep writes, or all of another record.
STRANGERS: list[Any] = [
    *({"nats": "x"}, {"nats": [[1]]}, {"tokens": 3}, {"train_loss": "x"}, {"seconds": [1]}),
    *({"b": 1}, [1], {"step": 2}, {"key": "../x"}),
    *({"nats": ["nan"]}, {"nats": [1e308]}, {"tokens": [0]}, {"tokens": [-1]}),  # of each row
]


def test_a_strangers_record_is_measured_again(place, tmp_path):
    asked = config(place, tmp_path / "out")
    swept(asked, {"r": [2]}, steps=1, rungs=1)
    before = without_times(tmp_path / "out")
    (record,) = (tmp_path / "out").glob("trials/*/validation-1.json")
    kept = json.loads(record.read_text())
    for wrong in STRANGERS:
        if isinstance(wrong, dict):
            (name, value), n = *wrong.items(), len(kept["nats"])
            of_rows = name in ("nats", "tokens") and isinstance(value, list)
            wrong = kept | {name: value * n if of_rows else value}
        record.write_text(json.dumps(wrong))
        _, _, printed = swept(asked, {"r": [2]}, steps=1, rungs=1)
        assert "reused" not in printed and without_times(tmp_path / "out") == before, wrong


@pytest.mark.parametrize("name", ["trials", "trials/mine"])
def test_a_link_in_the_place_of_a_trial_is_not_followed(place, tmp_path, name):
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path)
    with pytest.raises(mq.ConfigError, match=f"{link} is a link, which a sweep does not follow"):
        swept(config(place, tmp_path / "out"), {"r": [2]}, steps=1, rungs=1)
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_kill_left_in_a_finished_trial_is_removed(place, tmp_path):
    asked = config(place, tmp_path / "out")
    swept(asked, {"r": [2]}, steps=1, rungs=1)
    (trial,) = (tmp_path / "out" / "trials").iterdir()
    (trial / ".mlx-qlora-abcdefgh.tmp").mkdir()
    swept(asked, {"r": [2]}, steps=1, rungs=1)
    assert not [*trial.glob(".mlx-qlora*")]


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best.yaml", "sweep.svg"])
def test_files_of_others_are_left_alone(place, tmp_path, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(mq.ConfigError, match=f"{name} is not known to be from mlx-qlora"):
        swept(config(place, tmp_path / "out"), {"r": [2]}, steps=1, rungs=1)
    assert mine.read_text() == "mine"


def test_other_data_and_another_model_are_refused(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    swept(config(place, out), {"r": [2]}, steps=1, rungs=1)
    kept = (out / "sweep.json").read_bytes()
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("refused too late"))
    other = str(write_rows(tmp_path / "rows.jsonl", 50))
    with pytest.raises(mq.ConfigError, match="a sweep of another data"):
        swept(config(place, out, data={"path": other}), {"r": [2]}, steps=1, rungs=1)
    model = {"source": str(write_model(tmp_path / "model", seed=5))}
    with pytest.raises(mq.ConfigError, match="a sweep of another model"):
        swept(config(place, out, model=model), {"r": [2]}, steps=1, rungs=1)
    assert (out / "sweep.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("changes", "grid", "how", "message"),
    [
        ({"lora": {"init_lora_weights": "pissa"}}, None, {}, "decomposes each matrix"),
        ({"lora": {"init_lora_weights": "olora"}}, None, {}, "decomposes each matrix"),
        ({"model": {"adapter": "there"}}, None, {}, "begins a new adapter"),
        ({"checkpointing": {"resume_from_checkpoint": "none"}}, None, {}, "be auto in a sweep"),
        ({}, {"rank": [2]}, {}, "cannot vary 'rank'"),
        ({}, {"r": []}, {}, "at least one value"),
        ({}, {"r": [2.5]}, {}, "the sweep's r must be a number above 0; got 2.5"),
        ({}, {"learning_rate": [-1]}, {}, "the sweep's learning_rate must be"),
        ({}, None, {"rungs": 5}, "the sweep's steps must be at least 16; got 8"),
        ({"data": {"split": [1.0, 0.0, 0.0]}}, None, {}, "compares by validation rows"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    changes, grid, how, message, place, tmp_path
):
    with pytest.raises(mq.UserError, match=message):
        swept(config(place, tmp_path / "out", **changes), grid, **how)
    assert not (tmp_path / "out").exists()


def test_a_sweep_in_which_everything_fails_says_why(place, tmp_path):
    with pytest.raises(mq.UserError, match=r"every candidate failed:\n.*learning rate 1e\+30"):
        swept(config(place, tmp_path / "out"), {"learning_rate": [1e30]}, steps=4, rungs=1)
