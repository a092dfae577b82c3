"""`evaluate` and `chat` on the command line, with a run's own folder."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora.cli import main


def call(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    colours = ("red", "green", "blue", "black", "white", "grey")
    lines = [
        {"messages": [
            {"role": "user", "content": f"Colour {i}?"},
            {"role": "assistant", "content": f"It is {colours[i % 6]}."},
        ]}
        for i in range(48)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def run(chat_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "outputs"
    words = ["--model", chat_folder, "--data", rows, "--output-dir", out, "--max-steps", 3]
    words += ["--max-length", 64, "model.bits=null", "training.warmup_steps=0"]
    words += ["model.base_model_name_or_path=org/base", "generation.max_new_tokens=8"]
    assert call("train", *words) == 0
    return out


def test_evaluate_compares_with_the_base_and_writes_it_down(run, rows, tmp_path, capsys):
    file = tmp_path / "scores.json"
    words = ["--adapter", run, "--data", rows, "--limit", 20, "--answers", 10, "--output", file]
    assert call("evaluate", *words, "generation.max_new_tokens=8") == 0
    shown = capsys.readouterr().out
    assert "20 of 48" in shown and "loss" in shown and "perplexity" in shown
    found = json.loads(file.read_text())
    assert found["rows_scored"] == 20 and found["forgetting"] is not None
    assert all(f'"{name}"' in json.dumps(found["comparison"]) for name in ("loss", "chrf"))


def test_chat_answers_and_ends(run, monkeypatch, capsys):
    said = "Hello\n/adapter off\nHello\n/help\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert call("chat", "--adapter", run, "--seed", 0, "generation.max_new_tokens=6") == 0
    shown = capsys.readouterr().out
    assert shown.count("/s; answer") == 2 and "/reset" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sweep", "--learning-rates", "fast"],
            "must be numbers between commas; got 'fast'",
        ),
        (["evaluate", "--data", "x.jsonl"], "--model SOURCE, or an adapter with --adapter DIR"),
        (["chat"], "model.source is missing"),
    ],
)
def test_what_is_missing_is_named(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    assert call(*words) == 2
    assert message in capsys.readouterr().err
