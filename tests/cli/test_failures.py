"""Every way to be wrong ends in one message and an exit code, and changes no file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.command_line import contents, shell
from support.models import randomise_lora
from support.tiny_folder import write_model, write_tokenizer

import mlx_qlora as mq
from mlx_qlora.cli import main

# ---- a run that cannot work --------------------------------------------------------------------

WEIGHTS = Path("model/model.safetensors")


def change_config(**changes):
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def transpose_a_weight():
    arrays = load_file(WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    save_file(arrays, WEIGHTS, metadata={"format": "pt"})


def lose_a_weight():
    arrays = load_file(WEIGHTS)
    del arrays["model.norm.weight"]
    save_file(arrays, WEIGHTS, metadata={"format": "pt"})


def save_an_adapter_of_three_layers():
    other, _ = mq.load(write_model(Path("other"), num_hidden_layers=3))
    mq.add_lora(other, mq.LoraConfig(r=2))
    randomise_lora(other)
    mq.save_adapter(other, "adapter")


# name -> (what is done to the files, words after those of a run that works, part of the message)
BROKEN = {
    "missing rows": (None, "--data no.jsonl", "no.jsonl is missing"),
    "empty rows": (Path("empty.jsonl").touch, "--data empty.jsonl", "empty.jsonl is empty"),
    "no rows": (None, "data.path=null", "data.path is missing"),
    "no model": (
        None, "model.source=null", "model.source is missing; name a model with --model SOURCE"
    ),
    "unknown model": (None, "--model smollm2-136m", "did you mean 'smollm2-135m'"),
    "missing folder": (None, "--model ./modle", "did you mean 'model'"),
    "wrong shape": (
        transpose_a_weight, "", "up_proj.weight in model.safetensors has shape (64, 160)"
    ),
    "missing tensor": (lose_a_weight, "", "model.norm.weight is missing"),
    "cut file": (
        lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:-1000]), "", "safetensors is damaged"
    ),
    "other architecture": (
        lambda: change_config(model_type="mamba"), "", "model_type is 'mamba'"
    ),
    "other rope": (
        lambda: change_config(rope_scaling={"rope_type": "axial", "factor": 4.0}), "", "axial"
    ),
    "no tokenizer": (Path("model/tokenizer.json").unlink, "", "tokenizer.json"),
    "other adapter": (
        save_an_adapter_of_three_layers, "--adapter adapter", "belongs to no target of this model"
    ),
    "no adapter": (None, "--adapter adapter", "no such folder"),
    "unknown target": (
        None, "lora.target_modules=[q_prj]", "'q_prj' matches nothing; did you mean 'q_proj'"
    ),
    "unknown field": (None, "training.lora_r=4", "unknown field training.lora_r"),
    "file for output": (
        Path("file").touch, "--output-dir file", "file is a file; choose another with --output-dir"
    ),
    "long rows": (None, "data.max_length=5", "no room in data.max_length=5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_input_is_one_message_and_changes_no_file(name, train, model, tmp_path, capsys):
    spoil, more, message = BROKEN[name]
    shutil.copytree(model, "model")
    Path("out").mkdir()
    for file in ("adapter_model.safetensors", "adapter_config.json", "run.yaml", "metrics.jsonl"):
        Path("out", file).write_text("of an earlier run")
    Path("out/training_args.json").write_text('{"versions": {"mlx-qlora": "0.1.0"}}')
    if spoil:
        spoil()
    before = contents(tmp_path)
    capsys.readouterr()
    assert main([*train, "--model", "model", *more.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx-qlora: ") and error.count("mlx-qlora: ") == 1
    assert message in error and "Traceback" not in error
    assert contents(tmp_path) == before


def test_a_checkpoint_that_is_none_is_named_before_a_row_is_read(train, model, capsys):
    assert main([*train, "--model", str(model), "--resume", "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert "nowhere is no checkpoint; name a folder checkpoint-N" in err
    assert "data  " not in out


def test_json_of_an_error(train, capsys):
    assert main([*train, "--data", "away.jsonl", "--json"]) == 2
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert err == f"mlx-qlora: {printed['error']}\n"
    assert "away.jsonl" in printed["error"] and printed["kind"] == "DataError"


# ---- other commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model {} --prompt x --seed -1 model.bits=null", "seed must be in"),
        ("--model {} --prompt x generation.top_p=2", "generation.top_p must be in (0, 1]"),
        ("--model {} --prompt x model.bits=null model.adapter=nowhere", "no such folder"),
        ("--model {} model.bits=null", "nothing to answer; pass --prompt TEXT"),
        ("--prompt x", "model.source is missing"),
        ("--prompt x --input y", "--input needs --instruction"),
    ],
)
def test_generate_says_what_is_wrong_or_missing(words, message, model, capsys):
    assert main(["generate", *words.format(model).split()]) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_alone_is_no_model(tmp_path, capsys):
    write_tokenizer(tmp_path / "model")
    assert main(["plan", "--model", str(tmp_path / "model")]) == 2
    assert "config.json" in capsys.readouterr().err


# ---- interrupts, pipes and standard input ------------------------------------------------------


def test_an_interrupted_command_exits_with_130(model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_qlora.before.plan.plan", interrupt)
    assert main(["plan", "--model", str(model)]) == 130


def test_ctrl_c_during_the_imports_is_one_of_ours():
    code = (
        "import mlx_qlora.cli as cli\n"
        "def interrupt(*_):\n    raise KeyboardInterrupt\n"
        "cli.make_parser = interrupt\nraise SystemExit(cli.main(['plan']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize("command", ["doctor", "plan --model smollm2-135m --json"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(command):
    """What Rich prints (doctor) and what we print."""
    done = shell(f"$us {command} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_a_letter_that_a_terminal_cannot_show_ends_no_command(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some 漢 text"}\n' * 3)
    done = shell(f"PYTHONIOENCODING=ascii $us inspect {rows} --model {model} --show 1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u6f22" in done.stdout


@pytest.mark.parametrize(
    ("line", "given", "message"),
    [
        ("generate --model nowhere --prompt - <&-", b"", b"--prompt - reads standard input"),
        ("chat --model nowhere <&-", b"", b"chat reads what you type from standard input"),
        ("generate --model nowhere --prompt -", b"caf\xe9", b"input is not utf-8 at byte 3"),
    ],
)
def test_standard_input_that_is_none_is_refused_before_the_model_is_looked_for(
    line, given, message
):
    done = shell(f"$us {line}", given)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count(b"\n") == 1
