"""What tests of the command line share: a tiny model, rows for it, and one finished run."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.command_line import QUICK
from support.tiny_folder import write_model

from mlx_qlora.cli import main

OUT = ["--data", "rows.jsonl", "--output-dir", "out", *QUICK, "generation.max_new_tokens=4"]
ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(30)]


def write_thirty_rows(folder: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(lines))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a run into `out`, in a folder that holds only rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_thirty_rows(tmp_path)
    return ["train", "--model", str(model), *OUT]


@dataclass(frozen=True)
class Finished:
    """A run of two steps with a checkpoint after each, and --json.

    Attributes:
        words: the command.
        out: what it printed on standard output.
        err: what it printed on standard error.
    """

    words: list[str]
    out: str
    err: str


@pytest.fixture(scope="session")
def first_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """(the folder in which it ran, the run); nothing may be changed there."""
    place = tmp_path_factory.mktemp("finished")
    write_thirty_rows(place)
    words = ["train", "--model", str(model), *OUT]
    words += ["checkpointing.save_steps=1", "logging.logging_steps=1", "lora.lora_dropout=0"]
    words += ["generation.top_k=7", "model.base_model_name_or_path=org/tiny"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main([*words, "--json"]) == 0, err.getvalue()
    return place, Finished(words, out.getvalue(), err.getvalue())


@pytest.fixture
def finished(
    first_run: tuple[Path, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Finished:
    """The finished run; its folder, with rows.jsonl and out, is the current one."""
    place, run = first_run
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return run
