"""What a person sees of a run on a terminal: nothing wraps, nothing is silent, its end is known."""

import io
import json
import math
import re
import shlex
from itertools import pairwise

import pytest
from rich.cells import cell_len
from rich.console import Console
from support.tiny_folder import write_random_model, write_rows
from support.training import at_step, train_run

from mlx_qlora import progress
from mlx_qlora.after import screen
from mlx_qlora.after.screen import HEAD, folded, shown, table_row, task_line
from mlx_qlora.errors import fold
from mlx_qlora.infer import evaluate, generate
from mlx_qlora.train import loop
from mlx_qlora.train.loop import Run
from mlx_qlora.train.step import Step

ESCAPE = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")


class Time:
    """A clock that only this moves; the screen is drawn as it does."""

    def __init__(self) -> None:
        self.now, self.frames = 100.0, list[tuple[float, list[str]]]()

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now = min(self.now + 0.5, until)
            for each in screen._shown:
                each.tick()


@pytest.fixture
def time(monkeypatch):
    """The fake clock; what is drawn is kept with its time."""
    made = Time()

    class Drawn:
        def __init__(self, **_):
            self.start = self.stop = lambda: None

        def update(self, group, refresh):
            made.frames.append((made.now, [line.plain for line in group.renderables]))

    monkeypatch.setattr(progress, "now", made)
    monkeypatch.setattr(loop, "now", made)
    monkeypatch.setattr(screen, "EVERY", 1e6)
    monkeypatch.setattr(screen, "Live", Drawn)
    return made


def costs(monkeypatch, time, where, name, seconds):
    """Within the test a call of this function takes so many seconds more of the fake clock."""
    real = getattr(where, name)

    def slow(*args, **how):
        result = real(*args, **how)
        time.passes(seconds(*args))
        return result

    monkeypatch.setattr(where, name, slow)


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_fits_is_never_silent_and_knows_its_end(width, time, tmp_path, monkeypatch):
    """Steps of 4 to 8 s, rows scored in 0.2 s, of which a run's ETA knows nothing beforehand."""
    costs(
        monkeypatch, time, Step, "__call__", lambda _, batches, __: 4 + batches[0].real_tokens % 5
    )
    costs(monkeypatch, time, evaluate, "score_rows", lambda _, batch, __: 0.2 * len(batch.tokens))
    real, real_tokens = loop.score, generate.batch_tokens

    def slow_tokens(*args):
        for pair in real_tokens(*args):
            time.passes(0.2 * 0.5 / 3)  # the token of all three answers: half a row
            yield pair

    def slow_score(model, batches):
        def slowly():
            for batch in batches:
                time.passes(0.2 * len(batch.tokens))
                yield batch

        return real(model, slowly())

    monkeypatch.setattr(loop, "score", slow_score)
    monkeypatch.setattr(generate, "batch_tokens", slow_tokens)
    write_random_model(tmp_path / "model")
    values = {
        "model": {"source": str(tmp_path / "model"), "bits": None},
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 240)), "max_length": 64},
        "training": {"learning_rate": 1e-2},
        "checkpointing": {"output_dir": str(tmp_path / "out")},
        "logging": {"logging_steps": 5},
        "generation": {"max_new_tokens": 8},
    }
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, width=width)
    with shown(console):
        result = train_run(values, console)
    ended, frames = time.now, time.frames
    began = frames[0][0]

    lines = [line for _, frame in frames for line in frame]
    assert max(map(cell_len, lines)) < width
    whole = ESCAPE.sub("", printed.getvalue()).splitlines()
    paths = [line for line in whole if str(tmp_path) in line]  # one word may be any length
    assert max(map(cell_len, set(whole) - {*paths})) < width

    changes = [began, *(at for (_, old), (at, new) in pairwise(frames) if new != old), ended]
    assert max(b - a for a, b in pairwise(changes)) <= 3

    for what in ("training", "validating", "answering", "scoring"):
        assert any(line.startswith(what) for line in lines), what
    etas = [(at, frame[0]) for at, frame in frames if frame[0].startswith("training")]
    for at, line in etas:
        if at - began >= (ended - began) / 3:
            left = re.search(r"(\d):(\d\d):(\d\d) left", line)
            assert left, line
            seconds = 3600 * int(left[1]) + 60 * int(left[2]) + int(left[3])
            assert seconds == pytest.approx(ended - at, rel=0.3, abs=5), (at, line)

    (head,) = (i for i, line in enumerate(whole) if line == HEAD)
    table = [line for line in whole[head + 1 :] if re.match(r" +\d+ +\d\.\d\d ", line)]
    assert len(table) == len([r for r in result.log_history if {"loss", "eval_loss"} & r.keys()])
    assert sum("▼" in line or "▲" in line for line in table) >= 4
    assert {"next", "report", "test", "done"} <= {line.split(" ")[0] for line in whole}


def test_the_page_is_there_from_the_first_step_and_loads_itself_again_until_the_end(
    time, tmp_path, monkeypatch
):
    costs(monkeypatch, time, Step, "__call__", lambda *_: 6)
    pages, page = [], tmp_path / "out" / "report.html"
    record = Run.record

    def look(self, *args):
        record(self, *args)
        pages.append(page.read_text(encoding="utf-8"))

    monkeypatch.setattr(Run, "record", look)
    write_random_model(tmp_path / "model")
    values = {
        "model": {"source": str(tmp_path / "model"), "bits": None},
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 40)), "max_length": 64},
        "training": {"max_steps": 4},
        "checkpointing": {"output_dir": str(page.parent)},
        "logging": {"logging_steps": 1},
        "generation": {"max_new_tokens": 4},
    }
    train_run(values, Console(quiet=True))
    assert len(pages) == 4
    refresh = '<meta http-equiv="refresh"'
    assert all(refresh in text and "Use the adapter" not in text for text in pages)
    assert "Step 0 of 4" in pages[0] and re.search(r"Step 3 of 4, about \d+.\d seconds", pages[3])
    assert pages[3].count("<polyline") > pages[0].count("<polyline")
    last = page.read_text(encoding="utf-8")
    assert refresh not in last and "Did it learn?" in last and "Use the adapter" in last


def test_a_terminal_without_utf_8_gets_plain_bars_and_a_prompt_of_two_lines_as_it_is(
    tmp_path, monkeypatch
):
    """Only the longer of the prompts have one line in the second run, which shows one of them."""
    monkeypatch.setattr(screen, "EVERY", 1e6)
    write_random_model(tmp_path / "model")

    def shown_by_a_run(name, instructions):
        rows = [{"instruction": text, "output": "on"} for text in instructions]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": {"source": str(tmp_path / "model"), "bits": None},
            "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 64},
            "training": {"max_steps": 4},
            "checkpointing": {"output_dir": str(tmp_path / name), "eval_steps": 2},
            "generation": {"max_new_tokens": 4},
        }
        file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        console = Console(file=file, force_terminal=True, width=60)
        with shown(console) as watched, at_step(2, lambda _: watched.tick()):
            train_run(values, console)
        file.flush()
        printed = ESCAPE.sub("", file.buffer.getvalue().decode("latin-1"))
        command = printed[printed.index("next ") + 5 : printed.index("mlx-qlora export")]
        return printed, shlex.split(command.replace("\\\n", ""))

    printed, words = shown_by_a_run("two", [f"say  on\n  {i}" for i in range(40)])
    assert re.search(r"training +=+-+  \d/4 ", printed) and " v\n" in printed
    assert re.fullmatch(r"say  on\n  \d+", words[words.index("--instruction") + 1])
    mixed = [f"say\n{i}" if i % 2 else f"say on in one line: {i}" for i in range(40)]
    _, words = shown_by_a_run("one", mixed)
    assert words[words.index("--instruction") + 1].startswith("say on in one line")


# ---- lines ---------------------------------------------------------------------------------------


def test_a_tasks_pace_leaves_out_the_tasks_within_it(monkeypatch):
    time = Time()
    monkeypatch.setattr(progress, "now", time)
    with progress.doing("training", 10, "steps") as run:
        assert math.isnan(run.seconds_left)
        time.now += 2
        run.advance()
        with progress.doing("validating", 4, "rows") as inner:
            time.now += 30
            inner.advance(2)
            assert (run.seconds_left, inner.seconds_left) == (18, 30)
            assert progress.tasks() == [run, inner]
        time.now += 2
        run.advance()
        assert run.pace == 2
        time.now += 1
        assert run.seconds_left == 15
        run.beyond = lambda: 100.0
        assert run.seconds_left == 115
    assert progress.tasks() == []


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_line_shows_as_many_figures_as_there_is_room_for(width):
    with progress.doing("training", 12_345, "steps", done=9_999) as task:
        task.figures = (
            "loss 1.2345",
            "352 tok/s",
            "lr 2.00e-04",
            "1.23 GB",
            "grad 1.00",
            "x" * 300,
        )
        line = task_line(task, width)
    assert cell_len(line) < width and "9,999/12,345" in line
    assert ("loss" in line, "grad" in line) == (width > 40, width > 80)
    with progress.doing("fetching", unit="files") as task:  # nobody knows how many
        assert re.search(r"─+  0 files  0:00:00 so far$", task_line(task, 80))


def test_a_time_left_may_be_longer_than_any_calendar(monkeypatch):
    monkeypatch.setattr(progress, "now", time := Time())
    with progress.doing("training", 1e14, "steps") as task:
        time.now += 2
        task.advance()
        assert task_line(task, 120).endswith("100000 days, 0:00:00 left")


# ---- the thread ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["follower", "start", "update", "stop"])
def test_what_cannot_be_shown_is_said_once_and_neither_ends_a_run_nor_hides_its_end(
    failing, monkeypatch
):
    def fails(*_, **__):
        raise ValueError("no such thing")

    class Drawn:
        def __init__(self, **_):
            self.start = self.update = self.stop = lambda *_, **__: None
            setattr(self, failing, fails)

    monkeypatch.setattr(screen, "EVERY", 1e6)
    monkeypatch.setattr(screen, "Live", Drawn)
    console = Console(file=(printed := io.StringIO()), force_terminal=True, width=200)
    follower = fails if failing == "follower" else lambda: None
    with pytest.raises(KeyboardInterrupt), shown(console) as watched:
        watched.follower = follower
        with progress.doing("training", 3):
            watched.tick()
            watched.tick()
            raise KeyboardInterrupt
    assert printed.getvalue().count("no such thing") == 1


def test_a_quiet_terminal_is_left_alone(monkeypatch):
    monkeypatch.setattr(screen, "EVERY", 1e6)
    console = Console(file=io.StringIO(), force_terminal=True, quiet=True)
    with shown(console) as watched, progress.doing("training", 3):
        watched.tick()
        assert watched._live is None


def test_a_row_of_the_table_has_an_arrow_where_the_validation_loss_moved():
    record = {"step": 10, "epoch": 0.22, "examples": 180, "loss": 2.5, "learning_rate": 2e-4}
    row = table_row(record | {"tokens_per_second": 352.2, "peak_memory_bytes": 1_230_000_000})
    assert row.split() == ["10", "0.22", "180", "2.5000", "2.00e-04", "352", "1.23", "GB"]
    assert len(row) == len(HEAD) < 80
    evaluated = {"step": 10, "epoch": 0.22, "eval_loss": 2.0}
    arrows = [table_row(evaluated, before)[-1] for before in (math.nan, 2.1, 1.9)]
    assert arrows == ["0", "▼", "▲"]


def test_a_command_is_folded_between_its_words_and_stays_the_same_command():
    words = [
        "mlx-qlora",
        "generate",
        "--adapter",
        "my out",
        "--prompt",
        "it's a long question " * 3,
    ]
    lines = folded(words, 60).split("\n")
    assert len(lines) > 1 and all(len(line) < 60 for line in lines[:-1])
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == words  # as a shell reads it
    assert folded(words, 10**6) == shlex.join(words)


def test_a_long_message_is_folded_below_its_label_and_keeps_its_words():
    line = "warning   " + "one-word/and/path.jsonl " * 12
    shown = fold(line.rstrip(), 80).split("\n")
    assert len(shown) > 3 and max(map(len, shown)) < 80
    assert all(part.startswith(" " * 10 + "o") for part in shown[1:])
    assert " ".join("".join(shown).split()).count("one-word/and/path.jsonl") == 12
    assert fold("short", 80) == "short"


def test_without_a_terminal_a_line_says_now_and_then_how_far_it_is(time, capsys):
    console = Console(file=(printed := io.StringIO()))
    with shown(console), progress.doing("scoring", 40, "rows") as task:
        time.passes(29)
        assert capsys.readouterr().err == ""
        task.advance(10)
        time.passes(2)
        assert capsys.readouterr().err == (
            "mlx-qlora: scoring 10 of 40 rows, about 1.4 minutes left\n"
        )
        time.passes(3600)
        lines = capsys.readouterr().err.splitlines()
        assert 5 < len(lines) < 12, "more and more rarely"
    assert printed.getvalue() == "", "what a command prints stays as it is"
    with shown(Console(file=printed, quiet=True)), progress.doing("scoring"):
        time.passes(3600)
    assert capsys.readouterr() == ("", "")
