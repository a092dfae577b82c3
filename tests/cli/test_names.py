"""Names that the system does not take are refused before time is spent, and change nothing."""

from pathlib import Path

import pytest
from support.command_line import call, contents

LONG = "d" * 300
NEAR = "e" * 250  # a name, but its staging would be none
DEEP = "/".join(["f" * 200] * 20)
HALF = "g\ud800"
BYTES = "h\udcff"  # as Python has a byte that is no UTF-8
BAD = {
    "long": (LONG, "File name too long"),
    "long below": (f"new/{LONG}", "File name too long"),
    "no room for its staging": (NEAR, "File name too long"),
    "deep": (DEEP, "File name too long"),
    "a NUL": ("a\0b", "NUL"),
    "half of a letter": (HALF, "UTF-8"),
    "bytes": (BYTES, "UTF-8"),
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight or a row is an error: nothing may be read by then."""

    def late(*_: object, **__: object) -> None:
        raise AssertionError("time was spent")

    monkeypatch.setattr("mlx_qlora.run.open_files", late)
    monkeypatch.setattr("mlx_qlora.exports.with_adapter", late)
    monkeypatch.setattr("mlx_qlora.exports.loaded", late)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["train", "sweep", "merge", "export", "export --gguf-model"])
def test_an_output_folder_that_cannot_be_is_refused_at_once(
    command, name, train, tmp_path, opened, capsys
):
    folder, reason = BAD[name]
    before = contents(tmp_path)
    _, *words = train
    if command not in ("train", "sweep"):
        words = ["--model", "nowhere", "--adapter", "nowhere"]
    assert call(*command.split(), *words, "--output-dir", folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx-qlora: ") and error.count("mlx-qlora: ") == 1
    assert reason.lower() in error.lower() or (reason == "NUL" and "null" in error), error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_scores_that_cannot_be_is_refused_at_once(name, train, opened, capsys):
    words = ["--model", "nowhere", "--data", "rows.jsonl", "--output", BAD[name][0]]
    assert call("evaluate", *words, "--answers", "0") == 2
    assert "mlx-qlora: --output: " in capsys.readouterr().err


@pytest.mark.parametrize("name", BAD)
def test_push_of_a_name_that_cannot_be(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("push", BAD[name][0], "me/it") == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx-qlora: ") and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "field", ["model.source", "data.path", "model.adapter", "data.cache_dir", "logging.run_name"]
)
def test_a_nul_in_a_field_is_named(field, train, tmp_path, capsys):
    section, _, name = field.partition(".")
    Path("nul.yaml").write_text(f'{section}:\n  {name}: "a\\0b"\n')
    words = [word for word in train if not word.startswith(field)]
    for flag in ("--model", "--data"):
        if field in ("model.source", "data.path") and flag[2:] == section:
            place = words.index(flag)
            del words[place : place + 2]
    assert call(*words, "--config", "nul.yaml") == 2
    assert f"{field} must hold no NUL" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("in_the_way", ["report.html", "plots", "mlx", "adapter_model.safetensors"])
def test_a_folder_in_the_place_of_a_file_and_the_other_way_round(
    in_the_way, finished, tmp_path, capsys, opened
):
    """They stand in the folder of a run, whose files may be overwritten else."""
    place = tmp_path / "out" / in_the_way
    if place.is_dir():
        place.rename(tmp_path / "away")
        place.write_text("mine")
    else:
        place.unlink()
        place.mkdir()
    assert call(*finished.words) == 2
    assert f"out/{in_the_way} is not known to be from mlx-qlora" in capsys.readouterr().err
