"""Several processes train as one does: the same weights, whatever happens to any of them.

They are real processes that MLX's ring joins; `ring.py` starts them. Starting costs more than a
run, so one ring of two does all that leaves both of them alive, one run after the other.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import ring
from support.tiny_folder import write_model
from support.training import recorded

from mlx_qlora import device
from mlx_qlora import distributed as room
from mlx_qlora.cli import main
from mlx_qlora.distributed import RING_PADS, WORDS, Processes
from mlx_qlora.train.allreduce import MOST_BUCKETS, SMALLEST_BUCKET, GradientAllReduce
from mlx_qlora.train.checkpoint import checkpoints, read_state

STEPS, CLOSE = 15, 1e-5
SHORT = "training.max_steps=8"  # with a validation, a checkpoint, and a step after them
LORA = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))  # weights of the tiny model, for r=1
# What is sent in a step besides the gradients: three counts and three signals, and the loss sum.
BESIDES = 6 * 8 + 4
SCORE = 11 * 8  # numbers of a validation
# Ten rows to test on besides, which both processes score.
SPLIT = ("data.split=[0.6, 0.2, 0.2]", "--json")
# What a run is told besides, by name.
KINDS = {
    "plain": (),
    "best": (
        *("training.learning_rate=0.02", "checkpointing.eval_steps=1"),
        *("checkpointing.early_stopping_patience=1", "checkpointing.load_best_model_at_end=true"),
    ),
    "poisoned": (SHORT,),
    "epoch": ("training.max_steps=null", "training.num_train_epochs=1.02"),
    "large": ("lora.r=512", "training.max_steps=4", "checkpointing.save_steps=9"),
    "wide": (
        *("training.per_device_train_batch_size=3", "data.prompt_loss_weight=0.1"),
        *("training.kl_weight=0.5", SHORT),
    ),
    "judged": ("training.objective=kto", "training.max_steps=12"),
    "tested": SPLIT,
}
POISONED_ROW = 25  # of the stream: of step 5, and of the second process


class Place:
    """A folder with a tiny model, rows of unequal lengths, and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model")
        self.rows = self.write_rows("rows.jsonl", 60)

    def write_rows(self, name: str, n: int, judged: bool = False) -> Path:
        lines = [
            {"instruction": f"Say {i}." + " really" * (i % 5), "output": f"{i}." + " yes" * (i % 7)}
            | ({"label": i % 3 > 0} if judged else {})
            for i in range(n)
        ]
        path = self.folder / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def output(self, name: str, n: int) -> Path:
        return self.folder / f"{name}-{n}"

    def words(self, name: str, n: int, *more: str, command: str = "train") -> list[str]:
        """The command of one of n processes: six rows make a step, however many there are."""
        return [
            *(command, "--model", str(self.model), "--data", str(self.rows)),
            *("--output-dir", str(self.output(name, n)), f"data.cache_dir={self.folder / 'cache'}"),
            *("model.bits=null", "lora.r=4", "lora.lora_dropout=0.2", "data.max_length=64"),
            *("data.split=[0.8, 0.2, 0.0]", f"training.max_steps={STEPS}", "--batch-size", "1"),
            *(f"training.gradient_accumulation_steps={6 // n}", "training.warmup_steps=2"),
            *("training.learning_rate=0.01", "generation.max_new_tokens=1"),
            *("logging.logging_steps=1", "checkpointing.eval_steps=5"),
            *("checkpointing.save_steps=7", *more),
        ]

    def run(self, name: str, n: int) -> dict[str, Any]:
        words = self.words(name, n, *KINDS[name])
        if name == "judged":
            words += ["--data", str(self.write_rows("judged.jsonl", 60, judged=True))]
        if name == "poisoned":
            return {"words": words, "poison": POISONED_ROW}
        if name == "wide":  # two parts of a micro-batch side by side in every process
            return {"words": [*words, f"training.gradient_accumulation_steps={2 // n}"], "cores": 2}
        return {"words": words}

    def runs(self, n: int, *names: str) -> dict[str, Any]:
        """Name -> what was found by each rank."""
        found = ring.commands(n, [self.run(name, n) for name in names], self.folder / f"runs-{n}")
        return dict(zip(names, found))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(place: Place) -> dict[str, Any]:
    return place.runs(1, "plain", "best", "poisoned", "epoch", "wide", "judged", "tested")


@pytest.fixture(scope="module")
def two(place: Place) -> dict[str, Any]:
    """Name -> what was found by each of two processes, of all that they go through together."""
    names = ("plain", "best", "poisoned", "large", "wide", "judged", "tested")
    runs = {name: place.run(name, 2) for name in names}
    runs |= different(place) | eventful(place)
    for name in ("everyone", "second"):  # of these one or both get a signal
        runs[name] = {"words": place.words(name, 2), "pause": 0.1}
    runs["starved"] = runs.pop("starved")  # the last: it ends one of them
    words = ring.prepare(2, [*runs.values()], place.folder / "two")
    started = ring.start(2, lambda rank: words, place.folder / "two")
    for name, ranks in (("everyone", (0, 1)), ("second", (1,))):
        wait_for_step(place.output(name, 2), 8, started, 900)
        for rank in ranks:
            started[rank].send_signal(signal.SIGINT)
    ring.ends(started, 300)
    both = (ring.found_by(rank, place.folder / "two") for rank in (0, 1))
    return dict(zip(runs, map(list, zip(*both))))


@pytest.fixture(scope="module")
def three(place: Place) -> dict[str, Any]:
    return place.runs(3, "plain", "poisoned", "epoch", "large")


def different(place: Place) -> dict[str, Any]:
    """Runs that are refused, most because the second process is unlike the first one."""

    def unlike(name: str, *more: str, **fields: Any) -> list[Any]:
        words = place.words(name, 2)
        return [{"words": words}, {"words": [*words, *more], **fields}]

    other_rows = place.write_rows("other.jsonl", 50)
    other_model = write_model(place.folder / "other", seed=1)
    return {
        "rate": unlike("rate", "training.learning_rate=0.02"),
        "rows": unlike("rows", "--data", str(other_rows)),
        "model": unlike("model", "--model", str(other_model)),
        "version": unlike("version", version="9.9.9"),
        "patience": unlike("patience", "checkpointing.early_stopping_patience=3"),
        "mistyped": {"words": [*place.words("mistyped", 2), "training.learning_rat=1"]},
        "nowhere": unlike("nowhere", "--output-dir", "/dev/null/out"),
        "missing": unlike("missing", "--data", str(place.folder / "nowhere.jsonl")),
        "sweep": {"words": place.words("sweep", 2, command="sweep")},
        "evaluate": {"words": ["evaluate", "--model", str(place.model), "--data", str(place.rows)]},
    }


def eventful(place: Place) -> dict[str, Any]:
    """Runs in which something happens to the first or the second process alone."""

    def one(name: str, *more: str, **event: Any) -> dict[str, Any]:
        return {"words": place.words(name, 2, *more), **event}

    return {
        "slow": one("slow", SHORT, slow_save=2.0, patience=1.5),
        "signalled": [one("signalled"), one("signalled", signalled=STEPS // 5)],
        "hungry": [one("hungry", SHORT), one("hungry", SHORT, starved=(4, 4))],
        "full": one("full", SHORT),
        "starved": [one("starved"), one("starved", starved=(9, 10))],
    }


@pytest.fixture
def together(request: pytest.FixtureRequest, n: int) -> dict[str, Any]:
    return request.getfixturevalue({2: "two", 3: "three"}[n])


def series(output: Path, key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in recorded(output) if key in record]


def assert_same_adapter(one: Path, other: Path) -> None:
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    # A weight near 0 moves by the rate, 0.02 in "best", whatever its gradient: rounding shows.
    assert max(np.abs(mine[name] - theirs[name]).max() for name in mine) < 2 * CLOSE
    assert max(np.abs(mine[name]).max() for name in mine if "lora_B" in name) > 0.01


# ---- the same run --------------------------------------------------------------------------------

SAME = [(2, "plain"), (2, "best"), (2, "poisoned"), (2, "wide"), (2, "judged")]
SAME += [(3, "plain"), (3, "poisoned"), (3, "epoch")]


@pytest.mark.parametrize(("n", "name"), SAME)
def test_several_processes_train_as_one_does(place, alone, together, n, name):
    one, several = place.output(name, 1), place.output(name, n)
    assert [found["code"] for found in alone[name] + together[name]] == [0] * (n + 1)
    for key in ("loss", "grad_norm", "eval_loss", *["kl"] * (name == "wide")):
        mine, theirs = series(several, key), series(one, key)
        assert [step for step, _ in mine] == [step for step, _ in theirs], key
        # A norm is of a size of its own.
        scale = max(1.0, max(value for _, value in theirs))
        assert max(abs(a - b) for (_, a), (_, b) in zip(mine, theirs)) < CLOSE * scale, key
    assert_same_adapter(one, several)
    assert len({found["weights"] for found in together[name]}) == 1, "not the same bits everywhere"


def test_the_runs_that_are_compared_are_what_they_are_meant_to_be(place, alone, two):
    assert len(series(place.output("plain", 1), "loss")) == STEPS
    lengths = [len(json.loads(line)["output"]) for line in place.rows.read_text().splitlines()]
    assert len(set(lengths)) > 5
    best = recorded(place.output("best", 1))
    losses = dict(series(place.output("best", 1), "eval_loss"))
    assert best[-1]["step"] < STEPS and min(losses, key=losses.__getitem__) < best[-1]["step"]
    skipped = [record for record in recorded(place.output("poisoned", 1)) if "skipped" in record]
    assert [record["step"] for record in skipped] == [POISONED_ROW // 6 + 1]
    parts = [[each["parts"] for each in alone[name] + two[name]] for name in ("plain", "wide")]
    assert parts == [[1, 1, 1], [2, 2, 2]]
    # The last step has rows for some processes only.
    epoch = recorded(place.output("epoch", 1))[-1]
    rows = json.loads((checkpoints(place.output("epoch", 1))[-1] / "resume_state.json").read_text())
    assert epoch["epoch"] == 1.0208 and rows["rows"] == 49


@pytest.mark.parametrize("n", [2, 3])
def test_the_first_process_alone_writes_and_prints(place, together, n):
    for name in {2: ("plain", "best", "large"), 3: ("plain", "epoch", "large")}[n]:
        found = together[name]
        assert "step 4" in found[0]["out"]
        assert [(other["out"], other["err"]) for other in found[1:]] == [("", "")] * (n - 1)
        logs = sorted(place.output(name, n).glob("*rank*"))
        assert [log.name for log in logs] == [f"rank-{rank}.log" for rank in range(1, n)]
        for rank, log in enumerate(logs, 1):
            assert f"process {rank} of {n}" in log.read_text()


@pytest.mark.parametrize("n", [2, 3])
def test_processes_of_one_machine_share_its_cores(together, n):
    share = max(1, min(device.cores(), (os.cpu_count() or 1) // n))
    assert {found["cores"] for found in together["plain"]} == {share}


@pytest.mark.parametrize("n", [2, 3])
def test_a_process_names_the_step_that_rows_of_another_have_spoilt(place, together, n):
    logs = [place.output("poisoned", n) / f"rank-{rank}.log" for rank in range(1, n)]
    guilty = POISONED_ROW % n  # every n-th row of the stream is its own
    (record,) = [r for r in recorded(place.output("poisoned", n)) if "skipped" in r]
    assert record["rows"] == ["rows of another process; see its rank-*.log"]
    shown = logs[guilty - 1].read_text().replace("\n", " ")
    assert "skipped" in shown and "rows.jsonl:" in shown.partition("skipped")[2]


# ---- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "name", "r"), [(2, "plain", 4), (2, "large", 512), (3, "large", 512)]
)
def test_a_step_sends_its_gradients_once(together, n, name, r):
    for found in together[name]:
        steps = np.diff(found["sent"])
        between = np.zeros(len(steps), int)  # counted with the step after it
        between[5::5] += SCORE
        if name == "plain":
            between[7::7] += n * WORDS  # the others wait for the checkpoint
        assert (steps - between).tolist() == [4 * LORA * r + BESIDES] * len(steps)
        assert 4 * LORA * r + BESIDES <= 1.05 * 4 * LORA * r


# `ring.acknowledged` asks the kernel for each connection's bytes; no other system counts them so.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's count is Linux's")
@pytest.mark.parametrize("n", [2, 3])
def test_the_ring_puts_on_the_wire_what_a_ring_has_to(together, n):
    arrays = np.diff(together["large"][0]["sent"]).sum()
    wire = sum(np.diff(found["wire"]).sum() for found in together["large"])
    assert wire == pytest.approx(2 * (n - 1) * arrays, rel=0.1)


class Recorder:
    """In the place of `Processes`: notes what is sent, and when."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.size = 2

    def all_sum(self, array: mx.array) -> mx.array:
        self.events.append(np.array(array))
        return array * 2

    def worked(self, seconds: float) -> None:
        self.events.append("worked")

    def wait(self, *arrays: mx.array) -> None:
        self.events.append("waited")


def layers(n: int, floats: int) -> dict[str, tuple[int, ...]]:
    names = [f"layers.{i}.{side}" for i in range(n) for side in "AB"]
    return dict.fromkeys(names, (floats // 8, 4))


def test_buckets_go_out_as_soon_as_their_layers_are_done():
    shapes = layers(6, SMALLEST_BUCKET // 4)  # two matrices of half a bucket in each layer
    grads = {name: mx.full(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    recorder = Recorder()
    summed = GradientAllReduce(shapes, recorder)  # pyright: ignore[reportArgumentType]
    assert [name for bucket in summed.buckets for name in bucket] == [*reversed(shapes)]
    assert len(summed.buckets) == 6
    done: set[str] = set()
    for layer in reversed(range(6)):
        done |= {f"layers.{layer}.{side}" for side in "AB"}
        summed.reduce(grads, done)
        assert len(recorder.events) == 6 - layer
        assert set(recorder.events[-1].tolist()) == {2 * layer, 2 * layer + 1}
    # Computed again in smaller parts, as after out-of-memory: nothing is sent twice.
    summed.reduce(grads, {"layers.5.A", "layers.5.B"})
    summed.reduce(grads, done)
    assert len(recorder.events) == 6
    total, nats, counts, signum = summed.wait(grads, mx.array(1.5), (3, 7, 2), signal.SIGTERM)
    assert recorder.events[-2:] == ["worked", "waited"] and len(recorder.events) == 10
    assert (counts, signum, nats.item()) == ((6, 14, 4), signal.SIGTERM, 3)
    assert [*total] == [*shapes]
    for name in shapes:
        assert np.array_equal(np.array(total[name]), 2 * np.array(grads[name])), name
    summed.begin()
    summed.reduce(grads, done)
    assert len(recorder.events) == 16, "the next step sends its own"


def test_a_bucket_waits_for_the_whole_of_itself_and_for_those_before_it():
    shapes = layers(2, SMALLEST_BUCKET // 2)  # each matrix a bucket
    grads = {name: mx.zeros(shape) for name, shape in shapes.items()}
    recorder = Recorder()
    summed = GradientAllReduce(shapes, recorder)  # pyright: ignore[reportArgumentType]
    assert len(summed.buckets) == 4
    summed.reduce(grads, {"layers.1.A", "layers.0.A", "layers.0.B"})
    assert recorder.events == []
    summed.reduce(grads, {"layers.1.B"})
    assert len(recorder.events) == 1


def test_a_large_adapter_goes_in_few_messages_and_a_small_one_in_one():
    small = GradientAllReduce(layers(32, 64), Recorder())  # pyright: ignore[reportArgumentType]
    assert len(small.buckets) == 1
    large = GradientAllReduce(layers(64, SMALLEST_BUCKET // 2), Recorder())  # pyright: ignore
    assert MOST_BUCKETS // 2 < len(large.buckets) <= MOST_BUCKETS


# ---- refused -------------------------------------------------------------------------------------

REFUSED = ("rate", "rows", "model", "version", "patience", "mistyped", "nowhere", "missing")
REFUSED += ("sweep", "evaluate")


def test_processes_that_are_unlike_each_other_are_refused_with_one_message(place, two):
    found = {name: two[name] for name in REFUSED}
    assert {each["code"] for ranks in found.values() for each in ranks} == {2}
    wanted = {
        "rate": "in process 1 training.learning_rate is 0.02, in process 0 0.01",
        "rows": "in process 1 the hash of the rows is",
        "model": "in process 1 the hash of the model is",
        "version": "in process 1 mlx-qlora is 9.9.9, in process 0",
        "patience": "in process 1 checkpointing.early_stopping_patience is 3, in process 0 None",
        "missing": f"process 1: data file {place.folder / 'nowhere.jsonl'}",
    }
    early = {
        "mistyped": "unknown field training.learning_rat;",
        "nowhere": "process 1: checkpointing.output_dir",
    }
    for name, words in wanted.items():
        first, second = found[name]
        assert words in first["err"] and first["err"].count("mlx-qlora: ") == 1, first["err"]
        assert (second["out"], second["err"]) == ("", "")
        assert first["sent"] == second["sent"] == [], "it trained"
        output = place.output(name, 2)
        assert [path.name for path in output.iterdir()] == ["rank-1.log"]
        assert words.removeprefix("process 1: ") in (output / "rank-1.log").read_text().replace(
            "\n", ""
        )
    for name, words in early.items():
        first, second = found[name]
        assert words in first["err"] and (second["out"], second["err"]) == ("", ""), first["err"]
    assert "/dev/null/out/rank-1.log cannot be made" in found["nowhere"][0]["err"]
    for name in ("sweep", "evaluate"):
        assert f"{name} runs in one process; start it without mlx.launch" in found[name][0]["err"]
        assert not place.output(name, 2).exists()


# Two of them score rows, of which a loss is no number; then the first one is gone.
SCORED_AND_LOST = """
import os, sys, time
import mlx_qlora
import mlx.core as mx
import numpy as np
from mlx_qlora.errors import ProcessError
from mlx_qlora.distributed import processes
from mlx_qlora.train.score import Score
from mlx_qlora.train.allreduce import score_of_all

own = processes()
received = [None, 15][own.rank]
for nats in (4.5, float("nan"), float("inf"), 2.0**60):
    each = np.array([[2.5, 0.5], [nats, 0.25]][own.rank])
    print(*own.total(each))
    total, signum = score_of_all(Score([2.5, nats][own.rank], 1, 2, 3, 4, 5), own, 0.1, received)
    print(total.nats, total.hits, total.tokens, total.repeated_targets, signum, flush=True)
own.gather("ready")
if own.rank == 0:
    os._exit(9)
try:  # MLX tells of the first sum's failure when the second is asked for, or sooner
    unheard = own.all_sum(mx.ones((1000,)))
    time.sleep(1)  # it has failed by now, and nobody has waited for it
    own.all_sum(mx.ones((5,)))
except ProcessError as error:
    print(error)
    sys.exit(5)
"""


def test_sums_that_are_no_numbers_are_the_same_in_all_and_a_lost_process_is_told_by_the_next_sum(
    tmp_path,
):
    script = ["-c", SCORED_AND_LOST]
    (_, first, _), (code, second, err) = ring.ends(ring.start(2, lambda rank: script, tmp_path))
    sums = (7.0, "nan", "inf", 2.0**60)
    scores = "".join(f"{x} 0.75\n{x} 2 4 10 {int(signal.SIGTERM)}\n" for x in sums)
    assert first == scores and second.startswith(scores)
    assert code == 1, "MLX would have waited at the end of the process"
    said = second.removeprefix(scores)
    assert said.startswith("process 1 of 2: another process is gone"), err


# ---- what happens to one of them -----------------------------------------------------------------


def test_the_others_wait_for_a_slow_disk(place, two):
    assert [each["code"] for each in two["slow"]] == [0, 0], two["slow"][0]["err"]
    assert last_step(place.output("slow", 2)) == 8


def test_a_signal_within_the_last_validation_is_heard_by_all(place, two):
    assert [each["code"] for each in two["signalled"]] == [143, 143]
    assert last_step(place.output("signalled", 2)) == STEPS
    page = (place.output("signalled", 2) / "report.html").read_text(encoding="utf-8")
    assert f"Step {STEPS} of {STEPS}: stopped by SIGTERM; saved" in page


def test_test_rows_are_shared_out_and_scored_as_by_one(alone, two):
    mine, theirs = (json.loads(runs["tested"][0]["out"])["test_scores"] for runs in (alone, two))
    for when in ("before", "after"):
        assert mine[when]["n_tokens"] == theirs[when]["n_tokens"] > 0
        assert mine[when]["loss"] == pytest.approx(theirs[when]["loss"], abs=CLOSE)
    assert mine["before"]["loss"] - mine["after"]["loss"] > 0.1
    assert two["tested"][1]["out"] == ""


def test_memory_that_ends_once_while_weights_are_moved_changes_nothing(place, two):
    """The sums of that step were sent: sent again they would meet those of the next one."""
    assert [each["code"] for each in [*two["hungry"], *two["full"]]] == [0] * 4
    assert len({each["weights"] for each in [*two["hungry"], *two["full"]]}) == 1
    assert two["hungry"][1]["sent"] != [] == two["hungry"][1]["err"].splitlines()


def test_memory_that_ends_while_weights_are_moved_ends_the_run(place, two):
    first, second = two["starved"]
    assert [first["code"], second["code"]] == [2, 2]
    assert "out of memory while the weights are updated; lower lora.r" in second["err"]
    assert "another process is gone" in first["err"]
    # The first one had the sums of step 9, and could take it.
    assert (len(first["sent"]), len(second["sent"])) == (1 + 9, 1 + 8)
    assert str(place.output("starved", 2) / "checkpoint-9") in first["err"]
    assert last_step(place.output("starved", 2)) == 9


def test_one_process_under_the_launcher_is_alone(place):
    words = place.words("single", 1, "training.max_steps=2")
    launcher = launch(1, [sys.executable, "-m", "mlx_qlora", *words])
    out, err = printed_by(launcher)
    assert launcher.returncode == 0, err
    assert "step 2/2" in out and last_step(place.output("single", 1)) == 2


def first_of(size: int) -> Any:
    """A group of so many processes, of which this is the first."""
    return SimpleNamespace(rank=lambda: 0, size=lambda: size)


@pytest.mark.parametrize("size", [2, 128, 129, 512])
def test_the_smallest_array_passes_through_the_largest_ring(monkeypatch, size):
    def all_sum(array: mx.array, group: Any, stream: Any) -> mx.array:
        padded = array.itemsize * group.size() <= RING_PADS  # as MLX's ring does by itself
        if array.size < group.size() and not padded:
            raise RuntimeError(f"Can't perform the ring all reduce of {array.size} elements")
        return array * group.size()

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    many = Processes(first_of(size))
    assert many.all_sum(mx.array([3], mx.int64)).tolist() == [3 * size]
    assert many.all_sum(mx.array(2.0)).item() == 2 * size


def test_a_sum_that_finds_no_memory_is_not_another_s_fault(monkeypatch):
    def all_sum(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    two = Processes(first_of(2))
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        two.all_sum(mx.zeros(4))
    assert two.sent_bytes == 0


# ---- stopped -------------------------------------------------------------------------------------


class Broken:
    """Two processes that something happens to in the middle of the run.

    Attributes:
        output: of the run.
        ended: exit code, output and errors of each process.
        seconds: from the event to the end of the last one.
    """

    def __init__(
        self, place: Place, name: str, number: int, *ranks: int, step: int = 8, **how: Any
    ) -> None:
        self.output, self.folder = place.output(name, 2), place.folder / f"broken-{name}"
        run = {"words": place.words(name, 2), "pause": 0.1, **how}
        words = ring.prepare(2, [run], self.folder)
        started = ring.start(2, lambda rank: words, self.folder)
        wait_for_step(self.output, step, started)
        for rank in ranks:
            started[rank].send_signal(number)
        began = time.monotonic()
        watched = [
            each for rank, each in enumerate(started) if number != signal.SIGSTOP or not rank
        ]
        self.ended = ring.ends(watched, 60)
        self.seconds = time.monotonic() - began
        for each in started:
            if each.poll() is None:
                each.kill()
                each.communicate()

    def found(self, rank: int) -> dict[str, Any]:
        return ring.found_by(rank, self.folder)[0]


def wait_for_step(output: Path, step: int, started: list[Any], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline and all(each.poll() is None for each in started)
        time.sleep(0.01)


def last_step(output: Path) -> int:
    """The step of the newest checkpoint; all are whole."""
    return max(read_state(path)["step"] for path in checkpoints(output))


@pytest.fixture(scope="module")
def killed(place: Place) -> dict[str, Broken]:
    # At step 5 there is a validation, and no checkpoint yet.
    second = Broken(place, "killed-1", signal.SIGKILL, 1, step=5)
    return {"killed-1": second, "killed-0": Broken(place, "killed-0", signal.SIGKILL, 0)}


@pytest.fixture(scope="module")
def killed_under_launcher(place: Place) -> tuple[Path, str]:
    """(output, what the launcher printed), of a run whose second process was killed."""
    output, folder = place.output("launched-killed", 2), place.folder / "broken-launched"
    words = place.words("launched-killed", 2)
    script = ring.prepare(2, [{"words": words, "pause": 0.1}], folder)
    launcher = launch(2, [sys.executable, *script])
    wait_for_step(output, 5, [launcher])
    os.kill(int((folder / "pid-1").read_text()), signal.SIGKILL)
    out, err = printed_by(launcher)
    return output, ring.found_by(0, folder)[0]["err"] + out + err


def launch(n: int, command: list[str]) -> subprocess.Popen[str]:
    """MLX's launcher, which lies beside the interpreter."""
    port = ring.free_ports(1)[0] - n
    own = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(n), "--backend", "ring"]
    launcher = subprocess.Popen(
        [*own, "--starting-port", str(port), "--", *command],
        env=ring.outside_a_ring(),
        cwd=ring.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # It would spin on the core of its processes while they can take input, or its own has ended:
    # so they are given more than a pipe holds, and it stays open.
    assert launcher.stdin is not None
    launcher.stdin.write(100_000 * "\n")
    launcher.stdin.flush()
    return launcher


def printed_by(launcher: subprocess.Popen[str]) -> tuple[str, str]:
    """Standard output and errors of a launcher, once it has ended."""
    given, launcher.stdin = launcher.stdin, None  # which `communicate` would close at once
    try:
        return launcher.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.communicate()
        raise
    finally:
        with contextlib.suppress(BrokenPipeError):
            given.close()


@pytest.mark.parametrize("name", ["everyone", "second"])
def test_a_signal_to_any_process_ends_all_after_the_same_step(place, two, name):
    (first, second), output = two[name], place.output(name, 2)
    assert [first["code"], second["code"]] == [130, 130]
    assert len(first["sent"]) == len(second["sent"]) > 5
    step = len(first["sent"]) - 1
    assert step < STEPS and last_step(output) == step
    assert first["err"].startswith(
        f"mlx-qlora: stopped by SIGINT; saved {output}/checkpoint-{step}"
    )
    assert (second["out"], second["err"]) == ("", "")


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_message(killed, gone):
    broken = killed[f"killed-{gone}"]
    left = 1 - gone
    assert broken.seconds < 30
    assert broken.ended[gone][0] == -signal.SIGKILL and broken.ended[left][0] == 1
    found = broken.found(left)
    assert found["err"].startswith(f"mlx-qlora: process {left} of 2: another process is gone")
    assert "Traceback" not in found["err"] and found["err"].count("\n") == 1
    saved = str(broken.output / f"checkpoint-{last_step(broken.output)}")
    goes_on = {0: saved, 1: "what process 0 saved last\n"}[left]
    assert f". The same command continues from {goes_on}" in found["err"]


def test_a_process_that_is_killed_under_the_launcher_ends_all(killed_under_launcher):
    output, printed = killed_under_launcher
    assert "another process is gone" in printed and "Traceback" not in printed
    assert last_step(output) >= 5


def test_a_process_that_hangs_is_not_waited_for_for_ever(place):
    broken = Broken(place, "hanging", signal.SIGSTOP, 1, patience=6.0)
    assert [code for code, *_ in broken.ended] == [1]
    assert 4 < broken.seconds < 12
    message = broken.found(0)["err"]
    assert message.startswith("mlx-qlora: process 0 of 2: another process did not answer ")
    assert str(broken.output / f"checkpoint-{last_step(broken.output)}") in message


def test_one_process_goes_on_from_whatever_several_have_left(
    place, alone, two, killed, killed_under_launcher
):
    left = {name: place.output(name, 2) for name in ("everyone", "second", *killed)}
    left["launched-killed"] = killed_under_launcher[0]
    runs, begun = [], {}
    for name, output in left.items():
        begun[name] = last_step(output)
        shutil.copytree(output, place.output(name, 1))
        shutil.copytree(output, place.output(name, 3))
        runs.append({"words": place.words(name, 1)})
    found = dict(zip(left, ring.commands(1, runs, place.folder / "resumed")))
    for name, (only,) in found.items():
        assert only["code"] == 0 and len(only["sent"]) - 1 == STEPS - begun[name], name
        assert_same_adapter(place.output(name, 1), place.output("plain", 1))
    three = ring.commands(3, [{"words": place.words("second", 3)}], place.folder / "resumed-3")
    assert {each["code"] for each in three[0]} == {0}
    assert [len(each["sent"]) - 1 for each in three[0]] == [STEPS - begun["second"]] * 3
    assert_same_adapter(place.output("second", 3), place.output("plain", 1))


# ---- launchers -----------------------------------------------------------------------------------


def test_a_launcher_of_one_process_may_plan(place, monkeypatch, capsys):
    monkeypatch.setenv("PMI_RANK", "0")  # as srun leaves it
    room.processes.cache_clear()
    assert main(["plan", "--model", str(place.model), "model.bits=null"]) == 0
    room.processes.cache_clear()
    assert "predicted peak" in capsys.readouterr().out


RING = [["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5000"], ["10.0.1.1:5002"], ["[::1]:5000"]]


@pytest.mark.parametrize(
    ("environ", "rank", "n"),
    [
        ({}, 0, 1),
        ({"MLX_HOSTFILE": "ring"}, 0, 2),
        ({"MLX_HOSTFILE": "ring"}, 1, 1),
        ({"MLX_HOSTFILE": "ring"}, 2, 2),
        ({"MLX_HOSTFILE": "nowhere"}, 0, 1),
        ({"MLX_HOSTFILE": "spoilt"}, 0, 1),  # MLX says what is wrong with it
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 0, 4),
        ({"MPI_LOCALNRANKS": "3"}, 7, 3),
    ],
)
def test_launchers_say_how_many_processes_share_a_machine(tmp_path, monkeypatch, environ, rank, n):
    (tmp_path / "ring").write_text(json.dumps(RING))
    (tmp_path / "spoilt").write_text('[["10.0.0.1')
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert room._on_this_machine(rank) == n


def test_a_spoilt_list_of_hosts_is_told_without_a_traceback(place, tmp_path):
    (tmp_path / "hosts").write_text('[["127.0.0.1')
    run = subprocess.run(
        [sys.executable, "-m", "mlx_qlora", *place.words("spoilt", 1)],
        env={**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "the other processes cannot be reached" in run.stderr


LAUNCHED = ("launched", 2), ("plain", 1)


def test_the_launcher_starts_a_run_as_it_stands(place, alone):
    _, *words = place.words("launched", 2)
    launcher = launch(2, [sys.executable, "-m", "mlx_qlora.train", *words])
    out, err = printed_by(launcher)
    assert launcher.returncode == 0, err
    assert f"step {STEPS}/{STEPS}" in out and out.count("done   ") == 1, out
    assert "Traceback" not in err
    assert_same_adapter(place.output("launched", 2), place.output("plain", 1))
    mine, theirs = (dict(series(place.output(*of), "loss")) for of in LAUNCHED)
    assert mine == pytest.approx(theirs, abs=CLOSE)
