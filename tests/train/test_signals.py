"""Ctrl-C, SIGTERM, a closed terminal: a checkpoint of the last finished step, one message."""

import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from rich.console import Console
from support.command_line import ROOT
from support.training import settings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import crash

import mlx_qlora as mq
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.signals import Interrupted, StopSignal, raised

pytestmark = pytest.mark.usefixtures("usual_signals")
PATIENCE = 300  # seconds for a process that needs a few, on a machine that is busy
BOTH = pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
# A real run that says when it is at a certain place, and stays there until a signal was received.
PAUSING = """
import signal, sys, time
from itertools import chain
from mlx_qlora.cli import main
from mlx_qlora.train import loop

place, number, seconds_after = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
counts = {"micro-batch": 0, "validation": 0}
call, score = loop.Engine.__call__, loop.score

def pause(at):
    counts[at] += 1
    print(at, counts[at], flush=True)
    if (at, counts[at]) == (place, number):
        handler, until = signal.getsignal(signal.SIGTERM), time.monotonic() + 300
        print("waiting", flush=True)
        while signal.getsignal(signal.SIGTERM) == handler:
            time.sleep(0.001)
            if time.monotonic() > until:
                sys.exit("no signal was received")
        print("received", flush=True)
        time.sleep(seconds_after)

def pausing_call(self, *words):
    pause("micro-batch")
    return call(self, *words)

def pausing_score(model, batches):
    first = next(batches)
    pause("validation")
    return score(model, chain([first], batches))

loop.Engine.__call__, loop.score = pausing_call, pausing_score
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def alone(warm: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> crash.LeftAlone:
    return warm.submit(crash.LeftAlone, tmp_path_factory.mktemp("interruption")).result()


@pytest.fixture
def resumes(warm: ProcessPoolExecutor, alone: crash.LeftAlone) -> Callable[[Path, int], None]:
    """The same command goes on from that step, and ends like the run that was left alone."""

    def check(place: Path, step: int) -> None:
        done = warm.submit(crash.end_of, crash.command(alone.inputs, place)).result()
        assert (done.code, done.err) == (0, "")
        assert f"continuing from {place / 'out' / f'checkpoint-{step}'}\n" in done.out
        assert crash.differences(alone.out, place / "out") == []
        assert crash.names(place / "out") == crash.names(alone.out)

    return check


def paused(words: list[str], place: str, number: int, seconds_after: float = 0.0) -> Any:
    """A process that waits at the numbered place, and what it printed until then."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSING, place, str(number), str(seconds_after), *words],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, read_until(process, "waiting")


def read_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == wanted:
            return lines
    raise AssertionError(f"it ended before: {lines} {process.communicate()[1]}")


# ---- a real run --------------------------------------------------------------------------------


@BOTH
def test_a_signal_saves_the_last_finished_step_and_the_run_goes_on_from_it(
    name, alone, resumes, tmp_path
):
    """In the first of the two micro-batches of step 11."""
    process, _ = paused(crash.command(alone.inputs, tmp_path), "micro-batch", 21)
    process.send_signal(signal.Signals[name])
    printed, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[name]
    kept = tmp_path / "out" / "checkpoint-10"
    assert said == (
        f"mlx-qlora: stopped by {name}; saved {kept}. The same command continues from there\n"
    )
    assert "micro-batch" not in printed and "done" not in printed
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == 10
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    resumes(tmp_path, 10)


HANGING = """
import os, signal, sys, time
from pathlib import Path
from mlx_qlora.train.signals import StopSignal

with StopSignal() as stop:
    print("ready", flush=True)
    while stop.signum is None:
        time.sleep(0.01)
    print("to nobody", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # as ssh and launchers send it behind
    time.sleep(0.1)
    Path(sys.argv[1]).write_text("saved")
sys.exit(128 + signal.SIGHUP)
"""


def hang_up(words: list[str], ready: Callable[[], bool]) -> int:
    """The exit code of a process whose terminal is closed as soon as it is ready."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    until = time.monotonic() + PATIENCE
    while not ready() and process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 65536)
        time.sleep(0.002)
    try:
        assert process.poll() is None, "it ended before"
        os.close(ours)
        return process.wait(PATIENCE)
    finally:
        process.kill()


def test_a_closed_terminal_saves_the_last_finished_step(alone, resumes, tmp_path):
    metrics = tmp_path / "out" / "metrics.jsonl"
    words = ["-m", "mlx_qlora", *crash.command(alone.inputs, tmp_path)]
    code = hang_up(words, lambda: metrics.exists() and '"step": 9,' in metrics.read_text())
    assert code == 128 + signal.SIGHUP
    (*_, last) = sorted(int(p.name.partition("-")[2]) for p in metrics.parent.glob("checkpoint-*"))
    assert last >= 9
    resumes(tmp_path, last)


def test_what_follows_a_closed_terminal_is_no_second_thought(tmp_path):
    saved = tmp_path / "saved"
    until = time.monotonic() + 2
    code = hang_up(["-c", HANGING, str(saved)], lambda: time.monotonic() > until)
    assert code == 128 + signal.SIGHUP and saved.read_text() == "saved"


def test_a_pipe_that_closes_with_the_terminal_is_written_to_no_more(tmp_path):
    """As of a launcher, which passes on what its processes print."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(tmp_path / "saved")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 128 + signal.SIGHUP
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_terminal_that_is_closed_after_ctrl_c_does_not_end_the_saving(capfd, usual_signals):
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert (stop.signum, stop.received) == (signal.SIGTERM, signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in usual_signals} == usual_signals


@BOTH
def test_a_second_signal_stops_at_once(name, alone, tmp_path):
    words = crash.command(alone.inputs, tmp_path)
    process, _ = paused(words, "micro-batch", 21, seconds_after=60)
    process.send_signal(signal.Signals[name])
    read_until(process, "received")
    process.send_signal(signal.Signals[name])
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": -signal.SIGTERM}[name]
    kept = f"{tmp_path}/out/checkpoint-10 is complete, and the same command continues from it"
    assert said == ("" if name == "SIGTERM" else f"mlx-qlora: stopped by SIGINT; {kept}\n")
    there = sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*"))
    assert there == ["checkpoint-10", "checkpoint-9"]


def test_a_signal_during_validation_leaves_it_to_the_next_process(warm, alone, resumes, tmp_path):
    """The checkpoint without it is replaced, and a kill between the two renames harms nothing."""
    process, _ = paused(crash.command(alone.inputs, tmp_path), "validation", 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert f"saved {tmp_path / 'out' / 'checkpoint-6'}. " in said
    evals = [r["step"] for r in crash.figures(tmp_path / "out") if "eval_loss" in r]
    assert evals == [3]

    words = crash.command(alone.inputs, tmp_path)
    moment = crash.Moment("rename", "out/checkpoint-6")
    killed = warm.submit(crash.end_of, words, tmp_path, moment).result()
    assert killed.code == -signal.SIGKILL
    assert "step 6: validation loss" in killed.out
    assert not (tmp_path / "out" / "checkpoint-6").exists(), "the kill is between the renames"
    resumes(tmp_path, 6)


# ---- in Python ---------------------------------------------------------------------------------


@pytest.fixture
def begin(alone: crash.LeftAlone, tmp_path: Path) -> Callable[[], mq.TrainResult]:
    """Does a short run in this process."""
    how = {"max_length": 128, "cache_dir": None, "max_steps": 4, "r": 2}
    config = settings(tmp_path / "out", per_device_train_batch_size=2, save_steps=500, **how)

    def run() -> mq.TrainResult:
        model, tokenizer = mq.load(alone.inputs / "model")
        rows = mq.read_examples(alone.inputs / "rows.jsonl", tokenizer, config.data)
        silent = Console(file=io.StringIO())
        return mq.fine_tune(model, tokenizer, rows, None, config, console=silent)

    return run


def at_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> list:
    """Lets something happen in a micro-batch; returns a list that gets an entry for each."""
    call, seen = Engine.__call__, []

    def acting(self: Engine, *words: Any) -> Any:
        seen.append(len(seen) + 1)
        if len(seen) == number:
            act()
        return call(self, *words)

    monkeypatch.setattr(Engine, "__call__", acting)
    return seen


def handlers() -> dict[int, Any]:
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {number: signal.getsignal(number) for number in watched}


@pytest.mark.parametrize(("name", "micro_batch", "step"), [("SIGINT", 5, 2), ("SIGTERM", 8, 3)])
def test_fine_tune_raises_a_keyboard_interrupt_that_names_the_checkpoint(
    name, micro_batch, step, begin, tmp_path, monkeypatch, usual_signals
):
    signum = signal.Signals[name]
    seen = at_micro_batch(monkeypatch, micro_batch, lambda: signal.raise_signal(signum))
    with pytest.raises(KeyboardInterrupt) as caught:
        begin()
    assert isinstance(caught.value, Interrupted)
    assert (caught.value.signum, len(seen)) == (signum, micro_batch)
    assert caught.value.checkpoint == tmp_path / "out" / f"checkpoint-{step}"
    assert caught.value.checkpoint.is_dir()
    assert handlers() == usual_signals


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(
    begin, tmp_path, monkeypatch, usual_signals
):
    at_micro_batch(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match=r"^stopped by SIGINT; no step was finished\.") as caught:
        begin()
    assert caught.value.checkpoint is None
    assert not list((tmp_path / "out").glob("*checkpoint*"))


def test_handlers_are_watched_within_a_run_and_restored_even_after_an_exception(
    begin, monkeypatch, usual_signals
):
    within: dict[int, Any] = {}

    def fail() -> None:
        within.update(handlers())
        raise ZeroDivisionError

    at_micro_batch(monkeypatch, 3, fail)
    with pytest.raises(ZeroDivisionError):
        begin()
    assert within and not any(within[number] is usual_signals[number] for number in within)
    assert handlers() == usual_signals


def test_a_run_in_a_thread_sets_no_handlers(begin, monkeypatch, usual_signals):
    within: dict[int, Any] = {}
    results: list[mq.TrainResult] = []
    at_micro_batch(monkeypatch, 3, lambda: within.update(handlers()))
    thread = threading.Thread(target=lambda: results.append(begin()))
    thread.start()
    thread.join(PATIENCE)
    assert within == usual_signals
    assert results[0].steps == 4


def test_a_model_of_the_main_thread_is_computed_in_another():
    model, tokenizer = mq.load("smollm2-135m")
    made: list[Any] = []
    tokens = mx.array([tokenizer.encode("one two three four five six seven eight nine ten")])
    thread = threading.Thread(target=lambda: made.append(mx.isfinite(model(tokens)).all().item()))
    thread.start()
    thread.join(PATIENCE)
    assert made == [True]


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signum is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_second_signal_has_the_effect_that_it_had_before(usual_signals):
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
        assert not isinstance(caught.value, Interrupted)
    assert handlers() == usual_signals


def test_whoever_presses_ctrl_c_at_a_terminal_is_told_at_once_that_it_was_heard(monkeypatch, capfd):
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 2)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
        assert "stopping: what is under way is finished and saved" in capfd.readouterr().err
    monkeypatch.undo()
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


# ---- where an exception cannot be caught -------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["-m", "mlx_qlora"], ["-m", "mlx_qlora.train"], ["mlx-qlora"], ["program.py"]]
)
def test_ctrl_c_before_the_command_line_begins_shows_no_traceback(tmp_path, words):
    """The program of another keeps its own."""
    (tmp_path / "tomllib.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    if words[0] != "-m":
        words = [str(tmp_path / words[0])]
        Path(words[0]).write_text("from mlx_qlora.cli import main; main()")
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, *words]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == -signal.SIGINT  # which a shell calls 130
    assert ("KeyboardInterrupt" in ended.stderr) == words[0].endswith(".py")
    assert not ended.stderr or words[0].endswith(".py")


@BOTH
def test_a_signal_that_python_swallows_is_raised_again(name, usual_signals):
    number = getattr(signal, name)

    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as caught, raised():
        Swallows()
        time.sleep(30)
    assert getattr(caught.value, "signum", signal.SIGINT) == number
    assert handlers() == usual_signals
