"""Random rows and chats, and mutated files: `python benchmarks/fuzz.py` tries many thousands."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from support.command_line import python
from support.npm_tokenizers import CHATS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fuzz
import hostile

from mlx_qlora.data import marks


@pytest.mark.parametrize("form", fuzz.FORMATS)
def test_of_random_rows_nothing_differs_in_silence(form):
    counts, wrong = fuzz.try_rows(form, 300, seed=1)
    assert wrong == []
    assert counts["trained"] > 200 and counts["refused"] > 10 and counts["fields counted"] > 50


@pytest.mark.parametrize("chat", CHATS)
def test_random_chats_are_what_transformers_writes(chat):
    counts, wrong = fuzz.try_chats(chat, 40, seed=1)
    assert wrong == []
    assert counts.total() == 40 and counts["refused"] < 30


def test_a_field_that_vanishes_is_seen(monkeypatch):
    monkeypatch.setattr(marks, "HARMLESS", marks.HARMLESS | {"mood", "notes"})
    _, wrong = fuzz.try_rows("text", 50, seed=1)
    assert len(wrong) == 1 and "are counted, not" in wrong[0]


def test_malformed_rows_and_mutated_files_end_well():
    words = ["--rows", "0", "--chats", "0", "--malformed", "300", "--files", "60"]
    ended = python("benchmarks/fuzz.py", *words, "--seed", "1")
    result = json.loads(ended.stdout.splitlines()[-1])["hostile"]
    assert ended.returncode == 0 and result["bad"] == {}, ended.stdout + ended.stderr
    assert result["files"] == 60 and result["done"] > 2 and result["refused"] > 30


def slow() -> str:
    while True:
        pass


ENDS = {
    "traceback": lambda: str(1 / 0),
    "abort": lambda: os.abort() or "",  # type: ignore[func-returns-value]
    "hang": slow,
    "memory": lambda: print(f"mlx-qlora: {len(b'x' * (600 << 20))}") or "2",
    "raw output": lambda: print("\x1b]52;") or "2",
    "differs in silence": lambda: "a row is lost",
    "refused": lambda: print("mlx-qlora: no") or "2",
}


@pytest.mark.parametrize("outcome", ENDS)
def test_how_a_fork_ends_is_seen(outcome, tmp_path, monkeypatch):
    if outcome == "hang":
        monkeypatch.setattr(hostile, "SECONDS", 1)
    assert hostile.in_a_fork(ENDS[outcome], tmp_path)[0] == outcome


def test_a_wait_is_a_hang_only_without_cpu_time(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "STILL", 0.4)
    assert hostile.in_a_fork(lambda: time.sleep(60) or "0", tmp_path)[0] == "hang"
    if sys.platform == "linux":
        assert hostile.in_a_fork(busy_for_a_second, tmp_path)[0] == "done"


def busy_for_a_second() -> str:
    until = time.process_time() + 1
    while time.process_time() < until:
        pass
    return "0"


def test_trials_go_on_where_a_state_file_ends(tmp_path, monkeypatch):
    tried, outcome = [], "hang"
    monkeypatch.setattr(hostile, "make_seeds", lambda place: place)
    monkeypatch.setattr(hostile, "trial", lambda kind, *_: tried.append(kind) or ("x", outcome, ""))
    state = tmp_path / "state.json"
    assert len(hostile.try_all(2 * hostile.ROWS, 3, 0, state)["bad"]) == 5
    outcome = "done"  # as of mended code: what was bad is tried again
    done = hostile.try_all(2 * hostile.ROWS, 9, 0, state)
    assert tried == (["rows"] * 2 + ["files"] * 3) * 2 + ["files"] * 6
    assert done["counts"] == {"x: done": 11} and not done["bad"] and done["trials"] == 11
