"""The command line: every way to be wrong ends in one message and exit code 2."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import randomise_lora
from support.tiny_folder import write_model, write_tokenizer

import mlx_qlora as mq
from mlx_qlora.cli import main
from mlx_qlora.config import SECTIONS, RunConfig, build, read_yaml

ROOT = Path(__file__).parents[2]
ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(30)]
QUICK = ["model.bits=null", "training.max_steps=2", "training.gradient_accumulation_steps=1"]
QUICK += ["training.warmup_steps=1", "lora.r=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def python(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


# ---- help and config ---------------------------------------------------------------------------


def test_help_lists_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for section, config in SECTIONS.items():
        for field, value in vars(config()).items():
            lines = [line for line in shown.splitlines() if f"  {section}.{field}  (" in line]
            assert len(lines) == 1, field
            assert lines[0].endswith(f"default {'null' if value is None else value})")


def test_the_printed_config_reads_back_to_the_same_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "org/base", "--learning-rate", "1e-5", "--max-steps", "7"]
    words += ["lora.r=4", "data.split=[0.5, 0.25, 0.25]", "--output-dir", "2026-11-22"]
    words += ["training.seed=3", "--print-config"]  # overrides before and after flags
    assert main(["train", *words]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(printed)
    config = build(read_yaml(tmp_path / "run.yaml"))
    assert (config.model.source, config.training.learning_rate) == ("org/base", 1e-5)
    assert (config.training.max_steps, config.training.seed, config.lora.r) == (7, 3, 4)
    assert config.checkpointing.output_dir == "2026-11-22"
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_flags_win_over_the_file_and_overrides_over_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("training: {max_steps: 1, seed: 1}\nlora: {r: 1}\n")
    words = ["--config", str(tmp_path / "run.yaml"), "--max-steps", "2", "lora.r=3"]
    assert main(["train", *words, "--print-config"]) == 0
    (tmp_path / "out.yaml").write_text(capsys.readouterr().out)
    config = build(read_yaml(tmp_path / "out.yaml"))
    assert (config.training.max_steps, config.training.seed, config.lora.r) == (2, 1, 3)


def test_both_module_names_are_the_command_line() -> None:
    whole = python("mlx_qlora", "train", "lora.r=4", "--print-config")
    short = python("mlx_qlora.train", "lora.r=4", "--print-config")
    assert whole.returncode == short.returncode == 0
    assert whole.stdout == short.stdout
    assert "r: 4" in whole.stdout
    assert not whole.stderr and not short.stderr


def test_a_process_that_fails_says_one_line_and_exits_with_2() -> None:
    done = python("mlx_qlora.train", "lora.rr=4")
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("mlx-qlora: unknown field lora.rr")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["train", "--nonsense"], ["nothing"], []])
def test_words_that_no_command_has_exit_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


# ---- a run that works --------------------------------------------------------------------------


def test_train_leaves_an_adapter_that_generate_and_train_open(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--model", str(folder), "--data", str(data), "--output-dir", str(out), *QUICK]
    assert main(["train", *words]) == 0
    assert "done" in capsys.readouterr().out
    assert build(read_yaml(out / "run.yaml")).lora.r == 2
    model, _ = mq.load(folder, adapter=out)
    assert model.lora_config.r == 2
    assert any(
        array.any()
        for n, array in load_file(out / "adapter_model.safetensors").items()
        if "_B" in n
    )
    ask = ["generate", "--model", str(folder), "--adapter", str(out), "--prompt", "Say"]
    ask += ["--seed", "1", "model.bits=null", "generation.max_new_tokens=4"]
    said = []
    for _ in range(2):
        assert main(ask) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()
    more = ["--adapter", str(out), "--output-dir", str(tmp_path / "more")]
    assert main(["train", *words, *more]) == 0
    assert build(read_yaml(tmp_path / "more" / "run.yaml")).lora.r == 2  # the adapter's own


def test_plan_prints_the_trainable_parameters(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(folder), "model.bits=null", "lora.r=2"]) == 0
    model, _ = mq.load(folder)
    mq.add_lora(model, mq.LoraConfig(r=2))
    from mlx_qlora.model.lora import trainable_count

    assert f"trainable parameters  {trainable_count(model):,}" in capsys.readouterr().out


# ---- a run that cannot work --------------------------------------------------------------------


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def missing_data(words: dict[str, str], tmp: Path) -> str:
    words["--data"] = str(tmp / "no.jsonl")
    return "no.jsonl is missing"


def empty_data(words: dict[str, str], tmp: Path) -> str:
    (tmp / "empty.jsonl").touch()
    words["--data"] = str(tmp / "empty.jsonl")
    return "empty.jsonl is empty"


def no_data(words: dict[str, str], tmp: Path) -> str:
    del words["--data"]
    return "data.path is missing"


def no_model(words: dict[str, str], tmp: Path) -> str:
    del words["--model"]
    return "model.source is missing; name a model with --model SOURCE"


def unknown_model(words: dict[str, str], tmp: Path) -> str:
    words["--model"] = "smollm2-136m"
    return "did you mean 'smollm2-135m'"


def missing_folder(words: dict[str, str], tmp: Path) -> str:
    words["--model"] = str(tmp / "modle")
    return "did you mean 'model'"


def wrong_shape(words: dict[str, str], tmp: Path) -> str:
    path = tmp / "model" / "model.safetensors"
    arrays = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    save_file(arrays, path, metadata={"format": "pt"})
    return f"{name} in model.safetensors has shape (64, 160)"


def missing_tensor(words: dict[str, str], tmp: Path) -> str:
    path = tmp / "model" / "model.safetensors"
    arrays = load_file(path)
    del arrays["model.norm.weight"]
    save_file(arrays, path, metadata={"format": "pt"})
    return "model.norm.weight is missing"


def truncated(words: dict[str, str], tmp: Path) -> str:
    path = tmp / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model.safetensors is truncated"


def other_architecture(words: dict[str, str], tmp: Path) -> str:
    changed_config(tmp / "model", model_type="mistral", architectures=["MistralForCausalLM"])
    return "model_type is 'mistral'"


def other_rope(words: dict[str, str], tmp: Path) -> str:
    changed_config(tmp / "model", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    return "yarn"


def no_tokenizer(words: dict[str, str], tmp: Path) -> str:
    (tmp / "model" / "tokenizer.json").unlink()
    return "tokenizer.json"


def other_adapter(words: dict[str, str], tmp: Path) -> str:
    other, _ = mq.load(write_model(tmp / "other", num_hidden_layers=3))
    mq.add_lora(other, mq.LoraConfig(r=2))
    randomise_lora(other)
    words["--adapter"] = str(mq.save_adapter(other, tmp / "adapter"))
    return "belongs to no target of this model"


def no_adapter(words: dict[str, str], tmp: Path) -> str:
    words["--adapter"] = str(tmp / "adapter")
    return "no such folder"


def unknown_target(words: dict[str, str], tmp: Path) -> str:
    words["lora.target_modules=[q_prj]"] = ""
    return "'q_prj' matches nothing; did you mean 'q_proj'"


def unknown_field(words: dict[str, str], tmp: Path) -> str:
    words["training.lora_r=4"] = ""
    return "unknown field training.lora_r"


def file_for_output(words: dict[str, str], tmp: Path) -> str:
    (tmp / "file").write_text("mine")
    words["--output-dir"] = str(tmp / "file")
    return "file is a file; choose another with --output-dir"


def too_long(words: dict[str, str], tmp: Path) -> str:
    words["--max-length"] = "5"
    return "longer than max_length 5"


BROKEN: list[Callable[[dict[str, str], Path], str]] = [
    *(missing_data, empty_data, no_data, no_model, unknown_model, missing_folder, wrong_shape),
    *(missing_tensor, truncated, other_architecture, other_rope, no_tokenizer, other_adapter),
    *(no_adapter, unknown_target, unknown_field, file_for_output, too_long),
]


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_wrong_input_is_one_message_and_changes_no_file(
    breaks: Any, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.yaml", "metrics.jsonl"):
        (out / name).write_text("of an earlier run")
    (out / "training_args.json").write_text('{"versions": {"mlx-qlora": "0.1.0"}}')
    words = {"--model": str(tmp_path / "model"), "--data": str(data), "--output-dir": str(out)}
    wanted = breaks(words, tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    capsys.readouterr()
    argv = [word for pair in words.items() for word in pair if word]
    assert main(["train", *argv, *QUICK]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mlx-qlora: ")
    assert wanted in said
    assert "Traceback" not in said
    assert said.count("mlx-qlora: ") == 1
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_generate_refuses_messages_a_seed_out_of_range_and_a_missing_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["generate", "--model", str(folder), "--prompt", "x", "model.bits=null"]
    for words, wanted in (
        (["--seed", "-1"], "seed must be in"),
        (["generation.top_p=2"], "generation.top_p must be in (0, 1]"),
        (["model.adapter=nowhere"], "no such folder"),
    ):
        assert main([*ask, *words]) == 2
        assert wanted in capsys.readouterr().err
    assert main(["generate", "--prompt", "x"]) == 2
    assert "model.source is missing" in capsys.readouterr().err


def test_an_interrupted_command_exits_with_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_qlora.before.plan.plan", interrupt)
    assert main(["plan", "--model", str(folder)]) == 130


def test_the_defaults_of_the_command_line_are_those_of_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--print-config"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert build(read_yaml(tmp_path / "run.yaml")) == RunConfig()


def test_a_tokenizer_alone_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path / "model")
    assert main(["plan", "--model", str(tmp_path / "model")]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--model", "smollm2-135m"], "nothing to answer: pass --prompt TEXT"),
        (["generate", "--prompt", "x", "--input", "y"], "--input goes with --instruction"),
    ],
)
def test_generate_says_what_it_lacks(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_generate_asks_an_instruction_as_training_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_model(tmp_path / "model", chat=True))
    how = ["generation.temperature=0", "generation.max_new_tokens=6", "model.bits=null"]
    asked = ["--instruction", "count", "--input", "7"]
    assert main(["generate", "--model", folder, *asked, *how]) == 0
    answer = capsys.readouterr().out
    model, tokenizer = mq.load(folder)
    prompt = "### Instruction:\ncount\n\n### Input:\n7\n\n### Response:\n"
    expected = mq.generate(model, tokenizer, prompt, max_new_tokens=6, temperature=0)
    assert answer == expected + "\n"
    assert main(["generate", "--model", folder, "--prompt", prompt, "--raw", *how]) == 0
    assert capsys.readouterr().out == answer
    assert main(["generate", "--model", folder, "--prompt", prompt, *how]) == 0
    assert capsys.readouterr().out != answer, "without --raw the chat template goes around it"
