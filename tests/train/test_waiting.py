"""Who waits for long says for what; a signal outside of the loop says what was kept."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import ring
from support.command_line import QUICK, ROOT, call
from support.tiny_folder import write_model, write_rows

from mlx_qlora import distributed, errors
from mlx_qlora.distributed import in_time
from mlx_qlora.errors import waiting
from mlx_qlora.folders import locked

# ---- waiting -----------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "PATIENCE", 0.05)
    monkeypatch.setattr(distributed, "PATIENCE", 0.05)


def wait_in_words() -> None:
    with waiting("it"):
        time.sleep(0.5)


def wait_for_a_lock(folder: Path) -> None:
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, [other]).start()
    with locked(folder, wait=True):
        pass


def wait_for_an_answer(_: Path) -> None:
    assert in_time(lambda: time.sleep(0.5) or "it", 60, "it") == "it"


def wait_for_a_prompt(folder: Path) -> None:
    read, write = os.pipe()
    threading.Timer(0.5, os.close, [write]).start()
    before = sys.stdin
    sys.stdin = open(read)
    try:
        assert call("generate", "--model", str(folder / "none"), "--prompt", "-") == 2
    finally:
        sys.stdin.close()
        sys.stdin = before


WAITS = {
    "words": (lambda _: wait_in_words(), "waiting for it"),
    "a lock": (wait_for_a_lock, "waiting for another process that writes to"),
    "an answer": (wait_for_an_answer, "waiting for it"),
    "a prompt": (wait_for_a_prompt, "waiting for the prompt from standard input"),
}


# What reads the prompt closes it in passing.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", WAITS)
def test_a_long_wait_says_once_what_it_waits_for(name, impatient, tmp_path, capsys):
    wait, words = WAITS[name]
    wait(tmp_path)
    assert capsys.readouterr().err.count(words) == 1


@pytest.mark.parametrize("name", ["a lock", "an answer"])
def test_a_short_wait_says_nothing(name, tmp_path, capsys):
    WAITS[name][0](tmp_path)
    assert capsys.readouterr().err == ""


def test_a_process_whose_peer_was_refused_says_so_and_can_be_ended(tmp_path):
    """MLX waits for the peer with Python's lock held: neither threads nor handlers run."""
    script = "import sys; from mlx_qlora import distributed; distributed.PATIENCE = 0.5\n"
    script += "from mlx_qlora.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["-c", script, "train", "--output-dir", str(tmp_path / "out")]
    refused = [*words, "--no-such-flag", "1"]
    first, second = ring.start(2, lambda rank: refused if rank else words, tmp_path)
    assert second.wait(60) == 2
    assert first.stderr is not None
    line = next(line for line in first.stderr if not line.startswith("[ring]"))
    assert line.startswith("mlx-qlora: waiting for the other processes to begin"), line
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == -signal.SIGTERM
    for process in (first, second):
        process.communicate()


# ---- a signal outside of the loop --------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, and a run of two steps in `done`."""
    folder = tmp_path_factory.mktemp("signals")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", 30)
    assert call(*train(folder, "done")) == 0
    return folder


def train(folder: Path, out: str) -> list[str]:
    opened = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    more = ["generation.max_new_tokens=2", "checkpointing.save_steps=1"]
    more += ["model.base_model_name_or_path=org/tiny"]
    return ["train", *opened, "--output-dir", str(folder / out), *QUICK, *more]


SWEEP = ["--steps", "2", "--rungs", "1", "--learning-rates", "1e-3", "data.split=[0.6, 0.4, 0]"]
KEPT = "checkpoint-2 is complete, and the same command continues from it"
NOTHING = "nothing was written; what was there is as it was"
# What is called -> (the command, what is said).
PLACES = {
    "mlx_qlora.run.train_validation_test": ("train", "No checkpoint was written yet"),
    "mlx_qlora.run.load_model": ("train", "No checkpoint was written yet"),
    "mlx_qlora.run.write_record": ("train", "No checkpoint was written yet"),
    "mlx_qlora.run.write_adapter": ("train", KEPT),
    "mlx_qlora.after.observer.measure": ("train", "the adapter in {} is complete"),
    "mlx_qlora.after.observer.write_report": ("train", "the adapter in {} is complete"),
    "mlx_qlora.sweep.trial.score_examples": ("sweep", "what its trials have saved is kept"),
    "mlx_qlora.adapters.merge._write_shard": ("merge", NOTHING),
    "mlx_qlora.exports.with_adapter": ("merge", NOTHING),
    "mlx_qlora.adapters.peft.write_peft": ("export", NOTHING),
    "mlx_qlora.exports.push_to_hub": ("push", "nothing of it is in the repository unless all"),
}


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", range(len(PLACES)))
def test_a_signal_outside_of_the_loop_says_what_was_kept(
    number, place, tmp_path, monkeypatch, capsys
):
    called, (command, said) = [*PLACES.items()][number]
    signum = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[number % 3]
    shutil.copytree(place, tmp_path / "here")
    out = tmp_path / "here" / "out"
    opened = ["--adapter", place / "done", "--output-dir", out]
    words = {
        "train": train(tmp_path / "here", "out"),
        "sweep": ["sweep", *train(tmp_path / "here", "out")[1:], *SWEEP],
        "merge": ["merge", *opened],
        "export": ["export", *opened],
        "push": ["push", place / "done", "me/it"],
    }[command]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]

    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(signum)
        raise AssertionError("the signal was missed")

    monkeypatch.setattr(called, stop)
    capsys.readouterr()
    assert call(*words) == 128 + signum
    lines = capsys.readouterr().err.splitlines()
    last = [line for line in lines if line.startswith("mlx-qlora: stopped")]
    assert len(last) == 1 and said.format(out) in last[0], lines
    assert not [path for path in (tmp_path / "here").rglob(".*") if path.suffix == ".tmp"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_a_command_that_writes_nothing_says_nothing(monkeypatch, capsys, usual_signals):
    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("mlx_qlora.before.plan.plan", stop)
    assert call("plan", "--model", "smollm2-135m") == 143
    assert capsys.readouterr().err == ""


def test_an_ignored_hangup_stays_ignored(monkeypatch, capsys, usual_signals):
    """As under `nohup`."""
    seen: list[str] = []

    def stop(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        seen.append("went on")
        raise errors.ConfigError("here")

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr("mlx_qlora.before.plan.plan", stop)
    assert call("plan", "--model", "smollm2-135m") == 2 and seen == ["went on"]


def test_the_waiting_line_is_on_standard_error_of_a_pipe(tmp_path):
    """What is printed for a program stays what it is."""
    script = "from mlx_qlora import errors; import time; errors.PATIENCE = 0.1\n"
    script += "with errors.waiting('a\\x1b[31m'):\n    time.sleep(0.5)\nprint('{}')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert json.loads(done.stdout) == {}
    assert done.stderr == "mlx-qlora: waiting for a\\x1b[31m\n"
