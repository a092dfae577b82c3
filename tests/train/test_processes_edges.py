"""Several processes of which one alone meets with something, or with hardly anything to do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support import ring
from test_processes import CLOSE, STEPS, Place, last_step, launch

from mlx_qlora import distributed as room
from mlx_qlora.distributed import RING_PADS, Processes
from mlx_qlora.train.step import Gradients

# Ten rows to test on besides, which both processes score.
SPLIT = ("data.split=[0.6, 0.2, 0.2]", "--json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("edges"))


@pytest.fixture(scope="module")
def found(place: Place) -> dict[str, Any]:
    """Name -> what was found by each of two processes."""

    def one_of(name: str, *more: str, **how: Any) -> dict[str, Any]:
        return {"words": place.words(name, 2, *more), **how}

    slow = {"slow_save": 3.0, "patience": 1.5}
    runs: dict[str, Any] = {
        "slow": one_of("slow", "training.max_steps=8", **slow),
        "signalled": [one_of("signalled"), one_of("signalled", signalled=STEPS // 5)],
        "tested": one_of("tested", *SPLIT),
        "hungry": [one_of("hungry"), one_of("hungry", starved=(4, 4))],
        "full": one_of("full"),
        "starved": [one_of("starved"), one_of("starved", starved=(9, 10))],  # the last: it ends
    }
    folder = place.folder / "found"
    words = ring.prepare(2, [*runs.values()], folder)
    ring.ends(ring.start(2, lambda rank: words, folder), 120)
    both = [ring.found_by(rank, folder) for rank in (0, 1)]
    return dict(zip(runs, map(list, zip(*both))))


def test_the_others_wait_for_a_slow_disk(place: Place, found: dict[str, Any]) -> None:
    assert [each["code"] for each in found["slow"]] == [0, 0], found["slow"][0]["err"]
    assert last_step(place.output("slow", 2)) == 8


def test_a_signal_within_the_last_validation_is_heard_by_all(
    place: Place, found: dict[str, Any]
) -> None:
    assert [each["code"] for each in found["signalled"]] == [143, 143]
    assert last_step(place.output("signalled", 2)) == STEPS
    assert not (place.output("signalled", 2) / "report.html").exists()


def test_test_rows_are_shared_out_and_scored_as_by_one(place: Place, found: dict[str, Any]) -> None:
    run = {"words": place.words("tested", 1, *SPLIT)}
    ((alone,),) = ring.commands(1, [run], place.folder / "alone")
    one, two = (json.loads(each["out"])["test_scores"] for each in (alone, found["tested"][0]))
    for when in ("before", "after"):
        assert one[when]["n_tokens"] == two[when]["n_tokens"] > 0
        assert one[when]["loss"] == pytest.approx(two[when]["loss"], abs=CLOSE)
    assert one["before"]["loss"] - one["after"]["loss"] > 0.1
    assert found["tested"][1]["out"] == ""


def test_memory_that_ends_once_while_weights_are_moved_changes_nothing(
    place: Place, found: dict[str, Any]
) -> None:
    """The sums of that step were sent: sent again they would meet those of the next one."""
    assert [each["code"] for each in found["hungry"] + found["full"]] == [0] * 4
    assert len({each["weights"] for each in found["hungry"] + found["full"]}) == 1
    assert found["hungry"][1]["sent"] != [] == found["hungry"][1]["err"].splitlines()


def test_memory_that_ends_while_weights_are_moved_ends_the_run(
    place: Place, found: dict[str, Any]
) -> None:
    first, second = found["starved"]
    assert [first["code"], second["code"]] == [2, 2]
    assert "out of memory while the weights are moved; lower lora.r" in second["err"]
    assert "another process is gone" in first["err"]
    # The first one had the sums of step 9, and could take it.
    assert (len(first["sent"]), len(second["sent"])) == (1 + 9, 1 + 8)
    assert str(place.output("starved", 2) / "checkpoint-9") in first["err"]
    assert last_step(place.output("starved", 2)) == 9


def test_one_process_under_the_launcher_is_alone(place: Place) -> None:
    words = place.words("single", 1, "training.max_steps=2")
    launcher = launch(1, [sys.executable, "-m", "mlx_qlora", *words])
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert "step 2/2" in out and last_step(place.output("single", 1)) == 2


def test_a_launcher_of_one_process_may_plan(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_qlora.cli import main

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
def test_launchers_say_how_many_processes_share_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], rank: int, n: int
) -> None:
    (tmp_path / "ring").write_text(json.dumps(RING))
    (tmp_path / "spoilt").write_text('[["10.0.0.1')
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert room._on_this_machine(rank) == n


def test_a_spoilt_list_of_hosts_is_told_without_a_traceback(place: Place, tmp_path: Path) -> None:
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


SCORES = """
import sys
from mlx_qlora.distributed import processes
from mlx_qlora.train.score import Score
from mlx_qlora.train.allreduce import score_of_all

own = processes()
nats = [2.5, float(sys.argv[1])][own.rank]
came = [None, 15][own.rank]
total, signum = score_of_all(Score(nats, 1, 2, 3, 4, 5), own, 0.1, came)
print(total.nats, total.hits, total.tokens, total.repeated_targets, signum)
"""


@pytest.mark.parametrize(("nats", "sum_of_both"), [("4.5", "7.0"), ("nan", "nan"), ("inf", "nan")])
def test_a_validation_that_is_no_number_is_one_in_all(
    tmp_path: Path, nats: str, sum_of_both: str
) -> None:
    ended = ring.ends(ring.start(2, lambda rank: ["-c", SCORES, nats], tmp_path))
    assert ended == [(0, f"{sum_of_both} 2 4 10 {int(signal.SIGTERM)}\n", "")] * 2


class ManyInARing:
    """A group of so many processes, of which this is the first."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("size", [2, 128, 129, 512])
def test_the_smallest_array_passes_through_the_largest_ring(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def all_sum(array: mx.array, group: ManyInARing, stream: Any) -> mx.array:
        padded = array.itemsize * group.size() <= RING_PADS  # as MLX's ring does by itself
        if array.size < group.size() and not padded:
            raise RuntimeError(f"Can't perform the ring all reduce of {array.size} elements")
        return array * group.size()

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    many = Processes(ManyInARing(size))  # pyright: ignore[reportArgumentType]
    assert many.all_sum(mx.array([3], mx.int64)).tolist() == [3 * size]
    assert many.all_sum(mx.array(2.0)).item() == 2 * size


def test_a_sum_that_finds_no_memory_is_not_another_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def all_sum(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    two = Processes(ManyInARing(2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        two.all_sum(mx.zeros(4))
    assert two.sent_bytes == 0


def test_a_gradient_that_is_no_number_is_looked_for_where_it_was_made() -> None:
    class Rows:
        places = ("rows.jsonl:3", "rows.jsonl:4")

    losses: Any = [(Rows, mx.array(1.5))]
    found = Gradients({}, mx.array(1.5), None, losses)  # pyright: ignore[reportArgumentType]
    assert found.suspects(alone=False, finite=False) == Rows.places
    assert found.suspects(alone=True, finite=True) == Rows.places
    assert found.suspects(alone=False, finite=True) == (
        "rows of another process: see its rank-*.log",
    )
