"""The command line's manners: dry runs, quiet runs, JSON, completion, fields out of place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_folder import write_model

from mlx_qlora.cli import COMMANDS, completion_script, main
from mlx_qlora.commands import RUN
from mlx_qlora.config import SECTIONS

ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(30)]
QUICK = ["model.bits=null", "training.max_steps=2", "training.gradient_accumulation_steps=1"]
QUICK += ["training.warmup_steps=1", "lora.r=2", "data.max_length=64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("manners") / "model")


@pytest.fixture
def train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a run into `out` that takes a second."""
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["train", "--model", str(model), "--data", "rows.jsonl", "--output-dir", "out", *QUICK]


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON object on standard output."""
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    return json.loads(out)


# ---- dry runs ----------------------------------------------------------------------------------


def test_a_dry_run_shows_the_first_batch_and_writes_nothing(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "--dry-run", "--refused", "refused.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "30 rows read, 30 kept" in shown and "predicted peak" in shown
    assert "batch 1, row 1" in shown and "⟦It is" in shown
    assert "would be trained for 2 steps; nothing was trained, and nothing but the token" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_dry_run_says_the_loss_that_training_begins_with(
    train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train += ["logging.logging_steps=1", "lora.lora_dropout=0"]
    assert main([*train, "--dry-run", "--json"]) == 0
    first = found(capsys)["first_batch"]
    assert main([*train, "--quiet"]) == 0
    history = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert history[0]["step"] == 1
    assert first["loss"] == pytest.approx(history[0]["loss"], abs=1e-5)


def test_a_dry_run_knows_where_a_run_would_go_on(
    train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "checkpointing.save_steps=1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    capsys.readouterr()
    assert main([*train, "--dry-run", "--json"]) == 0
    assert found(capsys)["resume_from_checkpoint"] == "out/checkpoint-2"
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("lora.target_modules=[nothing]", "nothing"),
        ("checkpointing.resume_from_checkpoint=elsewhere", "elsewhere"),
        ("data.validation_path=away.jsonl", "away.jsonl"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(
    train: list[str], wrong: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for words in ([*train, wrong, "--dry-run"], [*train, wrong]):
        assert main(words) == 2
        ends.append(capsys.readouterr().err)
    assert ends[0] == ends[1] and message in ends[0]


# ---- quiet and JSON ----------------------------------------------------------------------------


def test_a_quiet_run_says_nothing_and_leaves_everything(
    train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Path("out/adapter_model.safetensors").is_file() and Path("out/report.html").is_file()


def test_a_quiet_run_still_warns(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*train, "--quiet", "checkpointing.save_steps=1"]) == 0
    damaged = Path("out/checkpoint-2/optimizer.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main([*train, "--quiet", "checkpointing.save_steps=1"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning   ") and "checkpoint-2" in err


def test_a_run_says_what_it_does_before_and_after_the_training(
    train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Started again when it is done, it says so and not how fast it was."""
    assert main(train) == 0
    first = capsys.readouterr().out
    assert "before    3 held-out rows are answered, 4 are scored\n" in first
    assert "done      0." in first and "tokens/s" in first
    assert main(train) == 0
    assert "done      step 2 was the last one; adapter in out\n" in capsys.readouterr().out


def test_a_run_says_how_often_it_sees_its_rows(
    train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "--dry-run", "data.packing=false", "--batch-size", "8"]) == 0
    shown = capsys.readouterr().out
    assert "course    2 steps: 0.67 passes over 24 examples, about 0 min" in shown
    assert "warning" not in shown
    words = [*train, "--quiet", "data.packing=false", "--batch-size", "24"]
    assert main([*words, "training.warmup_steps=30", "training.max_steps=30"]) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "training.warmup_steps=30 is all of the run's 30 steps" in warnings[0]
    assert warnings[0].endswith("; set training.warmup_steps=3")
    assert "30 passes over 24 examples learn them by heart; set training.max_steps=3" in warnings[1]


def test_json_of_a_run_has_its_figures_and_leaves_standard_output_alone(
    train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "plan" in err and "adapter in out" in err
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert result["output_dir"] == "out" and result["steps"] == 2
    assert result["eval_loss"] == last["eval_loss"]
    scores = result["test_scores"]
    assert scores["before"]["n_tokens"] == scores["after"]["n_tokens"] > 0
    assert scores["before"]["loss"] != scores["after"]["loss"]


def test_json_of_the_other_commands(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*train, "--quiet", "model.base_model_name_or_path=org/tiny"]) == 0
    model = train[2]

    assert main(["plan", "--model", model, "--json"]) == 0
    plan = found(capsys)
    assert plan["total_bytes"] == sum(plan["parts"].values()) and plan["fits"] is True

    assert main(["inspect", "rows.jsonl", "--model", model, "--json"]) == 0
    inspected = found(capsys)
    assert inspected["sources"][0]["kept"] == 30 and sum(inspected["rows"].values()) == 30

    few = ["generation.max_new_tokens=4", "generation.temperature=0"]
    asked = ["generate", "--adapter", "out", "--instruction", "Say 3."]
    assert main([*asked, *few, "--json"]) == 0
    answer = found(capsys)
    assert main([*asked, *few]) == 0
    assert capsys.readouterr().out == answer["text"] + "\n"
    assert 0 < answer["new_tokens"] <= 4

    judge = ["evaluate", "--adapter", "out", "--data", "rows.jsonl", "--answers", "0", "--json"]
    assert main(judge) == 0
    assert found(capsys)["rows_scored"] == 30

    assert main(["merge", "--adapter", "out", "--output-dir", "merged", "--json"]) == 0
    merged = found(capsys)
    sizes = [path.stat().st_size for path in Path("merged").iterdir()]
    assert merged["folder"] == "merged" and merged["bytes"] == sum(sizes)

    assert main(["export", "--adapter", "out", "--output-dir", "e", "--portable", "--json"]) == 0
    assert found(capsys) == {"format": "portable", "path": "e"}

    assert main(["push", "out", "me/mine", "--dry-run", "--json"]) == 0
    assert "adapter_model.safetensors" in [name for name, _ in found(capsys)["files"]]

    sweep = ["sweep", "--model", model, "--data", "rows.jsonl", "--output-dir", "s", *QUICK]
    sweep.append("data.split=[0.6,0.4,0]")
    assert main([*sweep, "--learning-rates", "1e-4,1e-3", "--rungs", "1", "--json"]) == 0
    assert found(capsys) == json.loads(Path("s/sweep.json").read_text())

    assert main(["train", "--print-config", "lora.r=3", "--json"]) == 0
    assert found(capsys)["lora"]["r"] == 3


def test_json_of_an_error(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*train, "--data", "away.jsonl", "--json"]) == 2
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err == f"mlx-qlora: {said['error']}\n"
    assert "away.jsonl" in said["error"] and said["kind"] == "DataError"


# ---- fields out of place -----------------------------------------------------------------------


def test_every_command_runs_something() -> None:
    assert {*COMMANDS} == {*RUN, "completion"}
    assert {section for command in COMMANDS.values() for section in command.sections} == {*SECTIONS}


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["generate", "training.seed=1"], "training"),
        (["inspect", "lora.r=3"], "lora"),
        (["plan", "generation.top_k=3"], "generation"),
        (["merge", "--output-dir", "m", "data.path=x"], "data"),
    ],
)
def test_a_field_that_a_command_does_not_read_is_refused(
    words: list[str], section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"{words[0]} reads no field of {section}; it reads those of model" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tarin", "there is no command 'tarin'; did you mean 'train'?\n"),
        ("xyz", "there is no command 'xyz'; see mlx-qlora --help"),
    ],
)
def test_a_mistyped_command_gets_its_nearest(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([word, "--model", "m"])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_command_without_fields_takes_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["push", "out", "me/mine", "lora.r=3"])
    assert stopped.value.code == 2
    assert "push reads no fields: lora.r=3" in capsys.readouterr().err


def test_a_file_may_hold_fields_that_a_command_does_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("training:\n  seed: 5\nmodel:\n  bits: 8\n")
    config = str(tmp_path / "run.yaml")
    assert main(["generate", "--config", config, "--print-config"]) == 0
    assert "bits: 8" in capsys.readouterr().out


def test_an_adapter_is_used_as_its_run_was_told_but_for_what_is_typed(
    train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "--quiet", "generation.top_k=7"]) == 0  # with model.bits=null
    use = ["generate", "--adapter", "out", "--print-config", "--json"]
    assert main(use) == 0
    told = found(capsys)
    assert (told["model"]["source"], told["model"]["bits"]) == (train[2], None)
    assert (told["model"]["adapter"], told["generation"]["top_k"]) == ("out", 7)
    assert told["training"]["max_steps"] == 1000  # of the run, no use for it here
    assert main([*use, "model.bits=4", "generation.top_k=50"]) == 0  # the defaults, but typed
    told = found(capsys)
    assert (told["model"]["bits"], told["generation"]["top_k"]) == (4, 50)
    assert main([*use, "--model", "org/other"]) == 0
    told = found(capsys)
    assert (told["model"]["source"], told["generation"]["top_k"]) == ("org/other", 50)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_fields_that_a_command_reads_and_no_others(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for section in SECTIONS:
        assert (f"\n{section}:\n" in shown) == (section in COMMANDS[command].sections)


# ---- completion --------------------------------------------------------------------------------

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_mlx_qlora "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["tr"], ["train"]),
        (["train", "--out"], ["--output-dir"]),
        (["train", "training.lear"], ["training.learning_rate="]),
        (["train", "--model", "x", "lora.use_"], ["lora.use_rslora=", "lora.use_dora="]),
        (["merge", "--save-dtype", "float"], ["float16", "float32"]),
        (["completion", ""], ["bash", "zsh"]),
    ],
    ids=" ".join,
)
def test_bash_completes_commands_flags_and_fields(
    typed: list[str], offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    (tmp_path / "ask.sh").write_text(COMPLETE)
    words = ["bash", str(tmp_path / "ask.sh"), str(tmp_path / "complete.sh"), "mlx-qlora", *typed]
    made = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert made.stdout.split() == offered, made.stderr


def test_zsh_takes_its_script(tmp_path: Path) -> None:
    script = completion_script("zsh")
    assert "compadd -S '' -- model.source=" in script and ":_mlx_qlora_fields" in script
    zsh = shutil.which("zsh")
    assert zsh, "the tests want a zsh: `make tools` as root, or `sudo apt-get install zsh`"
    (tmp_path / "_mlx-qlora").write_text(script)
    loads = (
        f"autoload -Uz compinit; compinit -u -d {tmp_path}/dump; "
        f'eval "$(< {tmp_path}/_mlx-qlora)"; '
        "print ${_comps[mlx-qlora]}; functions _mlx_qlora_fields >/dev/null"
    )
    made = subprocess.run([zsh, "-f", "-c", loads], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and made.stdout.strip() == "_shtab_mlx_qlora", made.stderr


# ---- words in the wrong place, or of other trainers --------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --lr 1e-4", "did you mean --learning-rate?"),
        ("train --epochs 3", "did you mean training.num_train_epochs=VALUE?"),
        ("train --rank 8", "did you mean lora.r=VALUE?"),
        ("plan --lr 1e-4", "did you mean training.learning_rate=VALUE?"),
        ("train --batch-sise 8", "did you mean --batch-size?"),
        ("train --lora-dropuot 0", "did you mean lora.lora_dropout=VALUE?"),
        ("train lora.rank=8", "unknown field lora.rank; did you mean lora.r?"),
        ("train training.epochs=8", "did you mean training.num_train_epochs?"),
        ("train learning_rate=1e-4", "did you mean training.learning_rate=1e-4?"),
        ("train lr=1e-4", "did you mean training.learning_rate=1e-4?"),
        ("train rows.jsonl", "for a file of rows pass --data rows.jsonl"),
        ("inspect lr=1e-4", "did you mean training.learning_rate=1e-4?"),
        ("inspect rows.jsonl more.csv", "one source of rows; got rows.jsonl and more.csv"),
        ("inspect rows.jsonl --data more.csv", "got rows.jsonl and more.csv"),
        ("inspect data.path=more.csv rows.jsonl", "got rows.jsonl and more.csv"),
    ],
)
def test_a_word_gets_the_field_that_it_usually_means(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(line.split())
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["{} data.max_length=64", "data.max_length=64 {}", "--model m data.max_length=64 {}"]
)
@pytest.mark.parametrize("file", ["rows.jsonl", "a=b.jsonl", "by/lang=en/*.jsonl"])
def test_the_file_to_inspect_may_stand_anywhere(
    line: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.jsonl").touch()
    assert main(["inspect", *line.format(file).split(), "--print-config", "--json"]) == 0
    data = found(capsys)["data"]
    assert (data["path"], data["max_length"]) == (file, 64)


@pytest.mark.parametrize("text", ["Why is a = b? " * 30, "~nobody=1"])
def test_a_text_in_a_wrong_place_is_no_path(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "m", text]) == 2
    assert capsys.readouterr().err.startswith("mlx-qlora: expected section.field=value, got ")


# ---- what stands at the other end of a pipe ----------------------------------------------------


def shell(line: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """A line of bash; `$us` is the command line."""
    us = {"us": f"{sys.executable} -m mlx_qlora", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        ["bash", "-c", line], env={**os.environ, **us}, capture_output=True, timeout=120, **how
    )


def test_a_reader_that_has_seen_enough_ends_what_rich_prints_too() -> None:
    done = shell("$us doctor | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_a_reader_that_has_seen_enough_ends_a_command_quietly() -> None:
    done = shell("$us plan --model smollm2-135m --json | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (128 + 13, b"")


@pytest.mark.parametrize(
    ("line", "given", "message"),
    [
        ("$us generate --model nowhere --prompt - <&-", b"", b"--prompt - reads standard input"),
        ("$us chat --model nowhere <&-", b"", b"chat reads what you type from standard input"),
        ("$us generate --model nowhere --prompt -", b"caf\xe9", b"is no utf-8 at byte 3; convert"),
    ],
)
def test_standard_input_that_is_none_is_refused_before_the_model_is_looked_for(
    line: str, given: bytes, message: bytes
) -> None:
    done = shell(line, input=given)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_ctrl_c_during_the_imports_is_one_of_ours() -> None:
    stop = "import mlx_qlora.cli as a, mlx_qlora.cli as c\n"
    stop += "def interrupt(*_):\n    raise KeyboardInterrupt\n"
    stop += "a.make_parser = interrupt\nraise SystemExit(c.main(['plan']))"
    done = subprocess.run([sys.executable, "-c", stop], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")
