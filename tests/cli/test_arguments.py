"""Words become a config or a helpful message; help, printed configs and completion agree."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.command_line import call, printed_json, python

from mlx_qlora.cli import COMMANDS, completion_script, main
from mlx_qlora.config import SECTIONS, RunConfig, build, read_yaml, set_override
from mlx_qlora.names import PRESETS

# ---- help and printed configs ------------------------------------------------------------------


def test_help_all_lists_every_field_with_its_default(capsys):
    assert call("train", "--help-all") == 0
    shown = capsys.readouterr().out
    for section, config in SECTIONS.items():
        for field, value in vars(config()).items():
            name = re.compile(rf"  {section}\.{field}(, --[\w-]+)?  \(")
            lines = [line for line in shown.splitlines() if name.match(line)]
            assert len(lines) == 1, field
            assert lines[0].endswith(f"default {'null' if value is None else value})")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_two_screens_and_says_what_things_are(
    command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert call(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48 and max(map(len, lines)) <= 80
    assert not any("short for" in line or "SUPPRESS" in line for line in lines)


@pytest.mark.parametrize("command", [name for name in COMMANDS if COMMANDS[name].reads])
def test_help_all_shows_the_fields_that_a_command_reads_and_no_others(command, capsys):
    assert call(command, "--help-all") == 0
    shown = capsys.readouterr().out
    for section in SECTIONS:
        read = COMMANDS[command].fields(section)
        assert (f"\n{section}:\n" in shown) == bool(read)
        for field in SECTIONS[section].__dataclass_fields__:
            assert (re.search(rf"^  {section}\.{field}\b", shown, re.M) is not None) == (
                field in read
            )


def config_of(words, tmp_path, capsys):
    """What a command's --print-config reads back to."""
    assert main([*words, "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    return build(read_yaml(tmp_path / "printed.yaml"))


def test_the_printed_config_reads_back_to_the_same_one(tmp_path, capsys):
    words = ["--model", "org/base", "--learning-rate", "1e-5", "--max-steps", "7"]
    words += ["lora.r=4", "data.split=[0.5, 0.25, 0.25]", "--output-dir", "2026-11-22"]
    words += ["training.seed=3"]  # overrides before and after flags
    config = config_of(["train", *words], tmp_path, capsys)
    assert (config.model.source, config.training.learning_rate) == ("org/base", 1e-5)
    assert (config.training.max_steps, config.training.seed, config.lora.r) == (7, 3, 4)
    assert config.checkpointing.output_dir == "2026-11-22"
    printed = (tmp_path / "printed.yaml").read_text()
    assert main(["train", "--config", str(tmp_path / "printed.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_flags_win_over_the_file_and_overrides_over_flags(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("training: {max_steps: 1, seed: 1}\nlora: {r: 1}\n")
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--max-steps", "2", "lora.r=3"]
    config = config_of(words, tmp_path, capsys)
    assert (config.training.max_steps, config.training.seed, config.lora.r) == (2, 1, 3)


def test_the_defaults_of_the_command_line_are_those_of_python(tmp_path, capsys):
    assert config_of(["train"], tmp_path, capsys) == RunConfig()


def test_both_module_names_are_the_command_line(capsys):
    assert main(["train", "lora.r=4", "--print-config"]) == 0
    short = python("-m", "mlx_qlora.train", "lora.r=4", "--print-config")
    assert (short.returncode, short.stdout, short.stderr) == (0, capsys.readouterr().out, "")
    wrong = python("-m", "mlx_qlora", "train", "lora.rr=4")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("mlx-qlora: unknown field lora.rr")
    assert len(wrong.stderr.splitlines()) == 1


# ---- other names of a field, and presets ------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("train --epochs 2", "training.num_train_epochs", 2),
        ("train --lora-r 8", "lora.r", 8),
        ("train --lora_rank=8", "lora.r", 8),
        ("train --rank 8", "lora.r", 8),
        ("train --lr 1e-4", "training.learning_rate", 1e-4),
        ("train --lr 1e-4 --lora-r 4", "training.learning_rate", 1e-4),
        ("train --warmup-ratio 0.2", "training.warmup_ratio", 0.2),
        ("train --warmup 7", "training.warmup_steps", 7),
        ("train --resume", "checkpointing.resume_from_checkpoint", "auto"),
        ("train --resume none", "checkpointing.resume_from_checkpoint", "none"),
        ("train --resume-from-checkpoint none", "checkpointing.resume_from_checkpoint", "none"),
        ("train --use-dora --max_steps 3", "lora.use_dora", True),
        ("train --use_dora false", "lora.use_dora", False),
        ("train --model_name_or_path 007", "model.source", "007"),
        ("train --load_in_4bit false", "model.bits", None),
        ("train --load-in-8bit", "model.bits", 8),
        ("train --optim adamw_torch --mask-prompt", "data.train_on", "response"),
        ("train --train-on-inputs", "data.train_on", "all"),
        ("train lora.rank=8", "lora.r", 8),
        ("train training.lr=1e-4", "training.learning_rate", 1e-4),
        ("generate --temp 0.5", "generation.temperature", 0.5),
        ("sweep --learning-rate 1e-4", "training.learning_rate", 1e-4),
        ("inspect --columns {instruction:q,output:a}", "data.columns", None),
    ],
)
def test_a_field_is_set_by_any_of_its_names(line, field, value, capsys):
    words = [*line.split(), "--print-config", "--json"]
    if "--columns" in words:
        words[2], value = "{instruction: q, output: a}", {"instruction": "q", "output": "a"}
    assert main(words) == 0
    section, _, name = field.partition(".")
    assert printed_json(capsys)[section][name] == value


def test_a_field_by_another_name_is_noted_beside_what_is_printed(capsys):
    assert main(["train", "--optim", "adamw_8bit", "--lr", "1e-4", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# optim=adamw_8bit has no effect; the optimiser is always AdamW, in float32"
    assert lines[1] == "# lr is training.learning_rate"
    assert main(["train", "--lr", "1e-4", "--model", "smollm2-136m"]) == 2
    assert capsys.readouterr().err.startswith("note      lr is training.learning_rate\n")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_fields_and_nothing_that_is_given(name, capsys, tmp_path):
    fields = [field.partition("=")[0] for field in PRESETS[name][1].split()]
    assert main(["train", "--preset", name, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"# preset {name}, {PRESETS[name][0]}: ")
    assert all(f"{field}=" in printed.splitlines()[0] for field in fields)
    (tmp_path / "printed.yaml").write_text(printed)
    config = build(read_yaml(tmp_path / "printed.yaml"))
    assert config == build(preset_values(name)) != RunConfig()
    first, *_ = fields
    assert main(["train", "--preset", name, f"{first}=3", "--print-config"]) == 0
    assert f"{first}=" not in capsys.readouterr().out.splitlines()[:1]


def preset_values(name):
    values = {}
    for field in PRESETS[name][1].split():
        set_override(values, field)
    return values


def test_what_goes_together_is_not_taken_from_a_preset_by_halves(capsys):
    for words, field in (
        (["--max-steps", "5"], "num_train_epochs: null"),
        (["--lora-r", "4"], "lora_alpha: 32"),
        (["--adapter", "other"], "r: 16"),
    ):
        assert main(["train", "--preset", "knowledge", *words, "--print-config"]) == 0
        assert f"  {field}\n" in capsys.readouterr().out


# ---- words that are wrong or in the wrong place ------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --nonsense", "error:"),
        ("", "error:"),
        ("tarin --model m", "unknown command 'tarin'; did you mean 'train'?\n"),
        ("xyz --model m", "unknown command 'xyz'; see mlx-qlora --help"),
        ("push out me/mine lora.r=3", "push takes no fields; leave out lora.r=3"),
        (
            "generate training.seed=1",
            "training.seed=1: generate does not read it; it reads fields of model, data, gene",
        ),
        (
            "generate data.history=joint",
            "data.history=joint: generate does not read it; it reads data.system, data.template",
        ),
        (
            "chat --history joint",
            "data.history=joint: chat does not read it; it reads data.sys",
        ),
        ("evaluate data.split=auto", "data.split=auto: evaluate does not read it; it reads data."),
        ("evaluate generation.top_k=5", "top_k=5: evaluate does not read it; it reads generation."),
        (
            "evaluate --epochs 2",
            "num_train_epochs=2 (--epochs): evaluate does not read it; it reads training.",
        ),
        (
            "inspect --lr 1e-4",
            "learning_rate=1e-4 (--learning-rate): inspect does not read it; it reads training.",
        ),
        ("inspect model.bits=8", "model.bits=8: inspect does not read it; it reads model.so"),
        ("plan --save-steps 2", "save_steps=2: plan does not read it; it reads checkpointing.ev"),
        ("plan --lr 9", "learning_rate=9 (--learning-rate): plan does not read it; it"),
        ("doctor lora.lora_alpha=8", "lora.lora_alpha=8: doctor does not read it; it reads lora."),
        (
            "merge --output-dir m model.base_model_name_or_path=a/b",
            "model.base_model_name_or_path=a/b: merge does not read it; it reads model.source",
        ),
        (
            "inspect lora.r=3",
            "(--lora-r): inspect does not read it; it reads fields of model",
        ),
        (
            "plan generation.top_k=3",
            "generation.top_k=3: plan does not read it; it reads fields of",
        ),
        ("merge --output-dir m training.seed=1", "merge does not read it; it reads fields of m"),
        ("train --set training.max_steps=2", "without it, as training.max_steps=100"),
        ("train --epoch 3", "--epoch; did you mean --epochs?"),
        ("--epoch train --lr 1e-4", "unknown arguments: --epoch; did you mean --epochs?\n"),
        ("train --dpo", "--dpo; did you mean --objective dpo?"),
        ("train --scale 20", "--scale; did you mean lora.lora_alpha (scale x lora.r)?"),
        ("train --lr fast", "training.learning_rate must be a number or auto; got 'fast'"),
        ("train --optimizer lion", "optimizer may be adamw or adamw_hf or "),
        ("train --epoch 3 --lora_s 2", "--epoch; did you mean --epochs?, --lora_s; did you mean"),
        ("train --preset tiny", "invalid choice: 'tiny'"),
        ("train --batch-sise 8", "did you mean --batch-size?"),
        ("doctor --sefl-test", "--sefl-test; did you mean --self-test?"),
        ("push out me/my --pubic", "--pubic; did you mean --public?"),
        ("cache --claer", "--claer; did you mean --clear?"),
        ("train --lora-dropuot 0", "did you mean --lora-dropout?"),
        ("train lora.rnk=8", "unknown field lora.rnk; did you mean lora.r?"),
        ("train training.epoch=8", "did you mean training.num_train_epochs?"),
        ("train lora.rnk=8 data.pth=x", "2 names are unknown:\n  unknown field lora.rnk; did"),
        ("train learning_rate=1e-4", "did you mean training.learning_rate=1e-4?"),
        ("train lr=1e-4", "did you mean training.learning_rate=1e-4?"),
        ("train rows.jsonl", "for a file of rows pass --data rows.jsonl"),
        ("inspect lr=1e-4", "did you mean training.learning_rate=1e-4?"),
        ("inspect rows.jsonl more.csv", "one source of rows; got rows.jsonl and more.csv"),
        ("inspect rows.jsonl --data more.csv", "got rows.jsonl and more.csv"),
        ("inspect data.path=more.csv rows.jsonl", "got rows.jsonl and more.csv"),
        ("train data.columns={instruction: q, output: a}", "put quotes around it: data.columns='{"),
        ("generate --model m ~nobody=1", "mlx-qlora: expected section.field=value; got "),
    ],
)
def test_a_wrong_word_is_told_with_what_was_meant(line, message, capsys):
    assert call(*line.split()) == 2
    assert message in capsys.readouterr().err


def test_a_long_text_in_a_wrong_place_is_no_path(capsys):
    assert main(["generate", "--model", "m", "Why is a = b? " * 30]) == 2
    assert capsys.readouterr().err.startswith("mlx-qlora: expected section.field=value; got ")


def test_a_file_may_hold_fields_that_a_command_does_not_read(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("training:\n  seed: 5\nmodel:\n  bits: 8\n")
    config = str(tmp_path / "run.yaml")
    assert main(["generate", "--config", config, "--print-config"]) == 0
    assert "bits: 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["{} data.max_length=64", "data.max_length=64 {}", "--model m data.max_length=64 {}"]
)
@pytest.mark.parametrize("file", ["rows.jsonl", "a=b.jsonl", "by/lang=en/*.jsonl"])
def test_the_file_to_inspect_may_stand_anywhere(line, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a=b.jsonl").touch()
    assert main(["inspect", *line.format(file).split(), "--print-config", "--json"]) == 0
    data = printed_json(capsys)["data"]
    assert (data["path"], data["max_length"]) == (file, 64)


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
def test_bash_completes_commands_flags_and_fields(typed, offered, tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    (tmp_path / "ask.sh").write_text(COMPLETE)
    words = ["bash", str(tmp_path / "ask.sh"), str(tmp_path / "complete.sh"), "mlx-qlora", *typed]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == offered, done.stderr


def test_zsh_takes_its_script(tmp_path):
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
    done = subprocess.run([zsh, "-f", "-c", loads], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "_shtab_mlx_qlora", done.stderr
