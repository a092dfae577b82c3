"""`merge`, `export` and `push` on the command line, from nothing but a run's own folder."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import ROOT, call, contents
from support.models import our_logits, random_tokens, randomise_lora

import mlx_qlora as mq
from mlx_qlora.cli import parse
from mlx_qlora.commands import config_of
from mlx_qlora.config import build, to_yaml
from mlx_qlora.errors import AdapterWarning

TOKENS = random_tokens(2, 17)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """(the folder that a run leaves, logits of its model)."""
    out = tmp_path_factory.mktemp("run") / "outputs"
    tuned, tokenizer = mq.load(model, mq.QuantConfig(8, 32))
    mq.add_lora(tuned, mq.LoraConfig(r=4, lora_alpha=6, use_rslora=True))
    randomise_lora(tuned)
    mq.save_adapter(tuned, out, base_model_name_or_path="org/base")
    tokenizer.save(out)
    config = build({"model": {"source": str(model), "bits": 8, "group_size": 32}})
    (out / "run.yaml").write_text(to_yaml(config))
    return out, our_logits(tuned, TOKENS)


@pytest.fixture
def without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def load(*args: Any, **how: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mlx_qlora.loading.load", load)


def test_merge_needs_the_run_s_folder_alone(run, tmp_path, capsys):
    out, logits = run
    merged = tmp_path / "merged"
    assert call("merge", "--adapter", out, "--output-dir", merged, "--save-dtype", "float32") == 0
    assert "merged" in capsys.readouterr().out
    model, _ = mq.load(merged)
    assert np.abs(our_logits(model, TOKENS) - logits).max() < 1e-4
    words = ["--model", merged, "--prompt", "a", "--max-new-tokens", 1]
    parsed = {name: parse([name, *map(str, words[:2])]) for name in ("generate", "train")}
    assert [config_of(args).model.bits for args in parsed.values()] == [None, 4]
    assert config_of(parse(["chat", "--model", str(merged), "model.bits=8"])).model.bits == 8


def test_merge_into_the_original_weights_is_another_model(run, model, tmp_path):
    out, logits = run
    words = ["merge", "--adapter", out, "--output-dir", tmp_path / "m", "--save-dtype", "float32"]
    assert call(*words, "--base", model) == 0
    with pytest.warns(AdapterWarning, match="trained over weights of 8 bits"):
        wanted, _ = mq.load(model, adapter=out)
    found = our_logits(mq.load(tmp_path / "m")[0], TOKENS)
    assert np.abs(found - our_logits(wanted, TOKENS)).max() < 1e-4
    assert np.abs(found - logits).max() > 1e-3  # 8 bits are not 32


def test_requantising_without_the_run_s_rows_says_that_it_measures_nothing(run, tmp_path, capsys):
    words = ["merge", "--adapter", run[0], "--output-dir", tmp_path / "m", "--requantize", "4"]
    assert call(*words, "model.group_size=32") == 0
    assert "names rows, as after a run in Python; name rows with --data" in capsys.readouterr().out
    model, _ = mq.load(tmp_path / "m")
    assert model.layers[0].mlp.up_proj.quant == mq.QuantConfig(4, 32)


@pytest.mark.parametrize(
    ("flags", "files"),
    [
        ([], {"adapter_config.json", "adapter_model.safetensors", "README.md", "mlx"}),
        (["--portable"], {"adapter_config.json", "adapter_model.safetensors", "README.md"}),
        (["--mlx"], {"adapter_config.json", "adapters.safetensors"}),
        (["--gguf"], {"adapter.gguf", "Modelfile"}),
        (["--gguf-model"], {"model-q8_0.gguf", "Modelfile"}),
        (["--type", "f16"], {"model-f16.gguf", "Modelfile"}),
    ],
)
def test_export_writes_each_form_over_itself_too_and_ours_read_it_back(
    run, model, tmp_path, flags, files
):
    out, logits = run
    made = tmp_path / "made"
    words = ["export", "--adapter", out, "--output-dir", made, *flags]
    words += ["model.base_model_name_or_path=org/base"]
    assert call(*words) == 0
    assert {path.name for path in made.iterdir()} == files
    before = contents(tmp_path)
    assert call(*words) == 0
    assert contents(tmp_path) == before
    if files & {"model-q8_0.gguf", "model-f16.gguf"}:
        whole = our_logits(mq.load(next(made.glob("*.gguf")))[0], TOKENS)
        assert np.abs(whole - logits).max() < 0.2 * logits.std()
    elif "--gguf" not in flags:
        opened, _ = mq.load(model, mq.QuantConfig(8, 32), adapter=made)
        assert np.abs(our_logits(opened, TOKENS) - logits).max() < 1e-5


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (["export"], "README.md"),
        (["export"], "adapter_config.json"),
        (["export"], "mlx/adapters.safetensors"),
        (["export", "--portable"], "README.md"),
        (["export", "--portable"], "adapter_config.json"),
        (["export", "--mlx"], "adapter_config.json"),  # it writes no card
        (["merge"], "README.md"),
    ],
)
@pytest.mark.usefixtures("without_loading")
def test_files_of_others_are_named_and_kept(run, tmp_path, form, name, capsys):
    (tmp_path / "made" / name).parent.mkdir(parents=True)
    (tmp_path / "made" / name).write_text("# precious, about mlx-qlora")
    before = contents(tmp_path)
    words = [*form, "--adapter", run[0]]
    words += ["model.base_model_name_or_path=org/base"] if form[0] == "export" else []
    assert call(*words, "--output-dir", tmp_path / "made") == 2
    assert str(tmp_path / "made") in (said := capsys.readouterr().err)
    assert "choose another folder" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "form",
    [
        "export",
        "export --portable",
        "export --mlx",
        "export --gguf",
        "export --gguf-model",
        "merge",
    ],
)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("rows.jsonl", "rows.jsonl is a file"),
        ("rows.jsonl/below", "rows.jsonl is a file"),
        ("locked/below", "locked may not be written to"),
        ("", "--output-dir must name a folder"),
    ],
)
@pytest.mark.usefixtures("without_loading")
def test_a_folder_that_cannot_be_is_refused_before_the_model_is_loaded(
    run, tmp_path, form, place, message, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}")
    Path("locked").mkdir()
    # The superuser, as whom tests may run, may write everywhere.
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "locked" and may(path, mode)
    )
    assert call(*form.split(), "--adapter", run[0], "--output-dir", place) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == {"rows.jsonl": b"{}"}


@pytest.mark.parametrize("form", [["export", "--portable"], ["merge"]], ids=" ".join)
@pytest.mark.parametrize("place", [".", ".."])
@pytest.mark.usefixtures("without_loading")
def test_the_current_folder_is_not_replaced_as_a_whole(
    run, tmp_path, form, place, monkeypatch, capsys
):
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / ("inner" if place == ".." else ""))
    if place == ".":
        (tmp_path / "here" / "inner").rmdir()
    assert call(*form, "--adapter", run[0], "--output-dir", place) == 2
    assert "is the current folder or holds it" in capsys.readouterr().err
    assert (tmp_path / "here").is_dir()


def test_a_disk_that_refuses_is_told_without_a_traceback(run, tmp_path, monkeypatch, capsys):
    def full(*args: Any, **how: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_qlora.adapters.peft.save_file", full)
    words = ["export", "--adapter", run[0], "model.base_model_name_or_path=org/base"]
    assert call(*words, "--output-dir", tmp_path / "made") == 2
    assert "No space left on device; free some space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- the whole model, for other programs -----------------------------------------------------


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that writes down what it was called with; the PATH has it and little else."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho "$PWD" "$@" >> {folder}/calls\n{script}\n')
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "calls"


def test_a_merged_folder_becomes_a_gguf_by_the_command_that_merge_prints(run, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert call("merge", "--adapter", run[0], "--output-dir", merged) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    command = line.partition(": ")[2]
    assert command == f"mlx-qlora export --model {merged} --output-dir gguf --gguf-model"
    words = shlex.split(command)[1:]
    words[words.index("gguf")] = str(tmp_path / "gguf")
    assert call(*words) == 0
    whole = our_logits(mq.load(tmp_path / "gguf" / "model-q8_0.gguf")[0], TOKENS)
    assert np.abs(whole - run[1]).max() < 0.2 * run[1].std()


def test_ollama_is_given_the_model(run, tmp_path, monkeypatch, capsys):
    calls = program(tmp_path / "bin", "ollama", "cat Modelfile >/dev/null", monkeypatch)
    words = ["export", "--adapter", run[0], "--output-dir", tmp_path / "g", "--type", "q4_0"]
    assert call(*words, "--ollama", "my-model") == 0
    assert calls.read_text() == f"{tmp_path}/g create my-model -f Modelfile\n"
    said = capsys.readouterr().out
    assert "ollama    has the model as my-model" in said and "ollama run my-model" in said
    assert "replaces an older one" not in said
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert f"ollama create NAME -f {tmp_path}/g/Modelfile" in said
    assert "model-q4_0.gguf" in said and ", replaces an older one" in said


@pytest.mark.usefixtures("without_loading")
def test_a_model_of_others_in_lm_studio_is_kept(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".lmstudio" / "models" / "me" / "mine" / "model-q8_0.gguf"
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    assert call("export", "--adapter", run[0], "--lmstudio", "me/mine") == 2
    assert "choose another folder with --lmstudio" in capsys.readouterr().err
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["a\x1b[31mb.gguf", "a\nFROM b.gguf", "a\u202eb.gguf", "in/a\rb.gguf"]
)
@pytest.mark.usefixtures("without_loading")
def test_a_modelfile_cannot_name_every_base(run, tmp_path, capsys, name):
    base, out = tmp_path / name, tmp_path / "g"
    base.parent.mkdir(exist_ok=True)
    base.touch()
    words = ["export", "--gguf", "--adapter", run[0], "--output-dir", out, "--model"]
    assert call(*words, base.parent if "/" in name else base) == 2
    error = capsys.readouterr().err
    assert f"{str(base)!r} has characters that no Modelfile can hold; rename it" in error
    assert not out.exists() and error.count("\n") == 1


def test_what_ollama_says_is_told_and_the_file_stays(run, tmp_path, monkeypatch, capsys):
    script = "echo pulling >&2; echo Error: no server >&2; exit 3"
    program(tmp_path / "bin", "ollama", script, monkeypatch)
    words = ["export", "--adapter", run[0], "--output-dir", tmp_path / "g"]
    assert call(*words, "--ollama", "mine") == 2
    error = capsys.readouterr().err
    assert "ollama failed (3): Error: no server; the command was" in error
    assert (tmp_path / "g" / "model-q8_0.gguf").is_file()


def test_a_signal_while_ollama_works_says_what_is_written(run, tmp_path, monkeypatch, capsys):
    script = f"kill -TERM {os.getpid()}; sleep 60"
    program(tmp_path / "bin", "ollama", script, monkeypatch)
    words = ["export", "--adapter", run[0], "--output-dir", tmp_path / "g"]
    assert call(*words, "--ollama", "mine") == 143
    said = f"SIGTERM; new files are in {tmp_path}/g; the same command completes them\n"
    assert said in capsys.readouterr().err
    (tmp_path / "bin" / "ollama").write_text("")
    monkeypatch.setattr("mlx_qlora.exports.loaded", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert call(*words, "--ollama", "mine") == 143
    assert "SIGTERM; nothing was written; what was there is as" in capsys.readouterr().err


def test_a_program_ends_with_the_process_that_asked_for_it(tmp_path):
    script = "import sys; from mlx_qlora.adapters.gguf_model import _run\n"
    script += "_run(sys.argv[2:], sys.argv[1])"
    program = "echo $$ > made; mv made pid; exec sleep 60"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "sh", "-c", program], cwd=ROOT
    )
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        for _ in range(1000):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.01)
        pytest.fail("it goes on")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gguf", "--type", "q4_0"], "--type needs --gguf-model; got --gguf"),
        (["--mlx", "--ollama", "x"], "--ollama needs --gguf-model; got --mlx"),
        (["--type", "q9"], "type must be one of q8_0, "),
        (["--ollama", "x"], "--ollama: the program ollama is not on the PATH"),
        (["--lmstudio", "me/mine"], "pass either --output-dir DIR or --lmstudio"),
    ],
)
@pytest.mark.usefixtures("without_loading")
def test_what_cannot_be_is_told_before_the_model_is_loaded(
    run, tmp_path, words, message, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call("export", "--adapter", run[0], "--output-dir", tmp_path / "g", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "g").exists()


@pytest.mark.usefixtures("without_loading")
def test_a_place_is_needed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("export", "--adapter", run[0]) == 2
    assert "pass either --output-dir DIR or --lmstudio" in capsys.readouterr().err
    assert call("export", "--adapter", run[0], "--lmstudio", "mine") == 2
    assert "--lmstudio must name PUBLISHER/MODEL; got 'mine'" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["usual", "pointer", "settings"])
def test_lm_studio_finds_the_model_in_its_own_folder(run, tmp_path, where, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home, models = tmp_path / ".lmstudio", tmp_path / ".lmstudio" / "models"
    if where == "pointer":
        home, models = tmp_path / "elsewhere", tmp_path / "elsewhere" / "models"
        (tmp_path / ".lmstudio-home-pointer").write_text(f"{home}\n")
    home.mkdir()
    if where == "settings":
        models = tmp_path / "disk"
        (home / "settings.json").write_text(json.dumps({"downloadsFolder": str(models)}))
    assert call("export", "--adapter", run[0], "--lmstudio", "me/mine", "--type", "q4_1") == 0
    assert [path.name for path in (models / "me" / "mine").glob("*.gguf")] == ["model-q4_1.gguf"]


def test_a_k_quant_is_llama_cpp_s_work(run, tmp_path, monkeypatch, capsys):
    words = ["export", "--adapter", run[0], "--output-dir", tmp_path / "g", "--type", "q4_k_m"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(*words) == 0
    command = f"llama-quantize {tmp_path}/g/model-bf16.gguf {tmp_path}/g/model-q4_k_m.gguf Q4_K_M"
    assert f"for q4_k_m, with llama.cpp's program: {command}" in capsys.readouterr().out
    assert "FROM ./model-bf16.gguf" in (tmp_path / "g" / "Modelfile").read_text()
    calls = program(tmp_path / "bin", "llama-quantize", 'cp "$1" "$2"', monkeypatch)
    assert call(*words) == 0
    assert calls.read_text().split()[1:] == ["model-bf16.gguf", "model-q4_k_m.gguf", "Q4_K_M"]
    assert "FROM ./model-q4_k_m.gguf" in (tmp_path / "g" / "Modelfile").read_text()
    assert (tmp_path / "g" / "model-q4_k_m.gguf").is_file()


def test_push_lists_what_it_would_upload(run, capsys):
    assert call("push", run[0], "me/adapter", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("adapter_model.safetensors", "README.md", "me/adapter"))
    assert "resume_state" not in shown


def test_the_folder_that_was_meant_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    assert call("generate", "--adapter", "output", "--prompt", "x") == 2
    said = "output is no PEFT adapter: no such folder; did you mean 'outputs'?"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "--output-dir", "m"], "model.adapter is missing"),
        (
            ["export", "--output-dir", "m", "--adapter", "nowhere"],
            "nowhere is no PEFT adapter: no such folder",
        ),
        (["export", "--output-dir", "m", "--gguf", "--mlx"], "not allowed with argument --gguf"),
        (["push", "nowhere", "me/x", "--dry-run"], "nowhere"),
        (
            ["merge", "--output-dir", "m", "--adapter", "a", "--model", "no/such/place"],
            "a is no PEFT",
        ),
    ],
)
def test_what_is_missing_or_too_much_is_named_and_nothing_is_written(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
