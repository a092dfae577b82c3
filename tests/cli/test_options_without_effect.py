"""No option is accepted and ignored: one that cannot act in a run is refused, or a line says so."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command_line import call

from mlx_qlora import fields
from mlx_qlora.cli import COMMANDS
from mlx_qlora.config import SECTIONS

ALL, STEPS = "data.split=[1, 0, 0]", "training.max_steps=4"
DPO = ["training.objective=dpo", "--data", "pairs.jsonl", STEPS]
# Words of a run -> what is said on standard error, and whether the run goes on.
SAID: dict[str, tuple[list[str], str, bool]] = {
    "early stopping without validation": (
        [ALL, "checkpointing.early_stopping_patience=2"],
        "checkpointing.early_stopping_patience needs validation rows, and there are none",
        False,
    ),
    "the best model without validation": (
        [ALL, "checkpointing.load_best_model_at_end=true"],
        "checkpointing.load_best_model_at_end needs validation rows, and there are none",
        False,
    ),
    "more patience than validations": (
        ["checkpointing.early_stopping_patience=3", "checkpointing.eval_steps=1", STEPS],
        "checkpointing.early_stopping_patience=3 is not used: the run could stop at "
        "validation 4 at the earliest, and has 4; set a smaller checkpointing.eval_steps",
        True,
    ),
    "patience for all but the last validation": (
        ["checkpointing.early_stopping_patience=2", "checkpointing.eval_steps=1", STEPS],
        "",
        True,
    ),
    "more patience than automatic validations": (
        ["checkpointing.early_stopping_patience=9", STEPS],
        "checkpointing.early_stopping_patience=9 is not used: the run could stop at validation 10",
        True,
    ),
    "the best of one validation": (
        ["checkpointing.load_best_model_at_end=true", "checkpointing.eval_steps=9", STEPS],
        "checkpointing.load_best_model_at_end=True is not used: the run is validated once, at its",
        True,
    ),
    "a system message that every row has": (
        ["data.system=Be brief.", "--data", "systems.jsonl", "data.template=chat.jinja"],
        "data.system=Be brief. is not used: every row has a system message",
        True,
    ),
    "a system message that some rows have": (
        ["data.system=Be brief.", "--data", "some.jsonl", "data.template=chat.jinja"],
        "",
        True,
    ),
    "what is learned of texts": (
        ["data.train_on=all", "--data", "texts.jsonl"],
        "data.train_on=all is not used: no row has a prompt",
        True,
    ),
    "what a prompt of texts weighs": (
        ["data.prompt_loss_weight=0.1", "--data", "texts.jsonl"],
        "data.prompt_loss_weight=0.1 is not used: no row has a prompt",
        True,
    ),
    "how strongly answers are told apart where none are": (
        ["training.beta=0.5"],
        "training.beta=0.5 is not used: dpo, orpo, simpo and kto read it, not sft",
        True,
    ),
    "dropout where answers are compared": (
        [*DPO, "lora.lora_dropout=0.2"],
        "lora.lora_dropout=0.2 is not used: answers are compared without dropout",
        True,
    ),
    "a margin of another objective": (
        [*DPO, "training.simpo_gamma=2"],
        "training.simpo_gamma=2 is not used: simpo reads it, not dpo",
        True,
    ),
    "prompts that a comparison does not learn": (
        [*DPO, "data.prompt_loss_weight=0.5"],
        "data.prompt_loss_weight=0.5 is not used: prompts are not learned",
        True,
    ),
    "how many refused rows a strict run allows": (
        ["data.strict=true", "data.max_refused=0.1"],
        "data.max_refused=0.1 is not used: data.strict allows no row to be refused",
        True,
    ),
    "wandb's project without wandb": (
        ["logging.report_to=tensorboard", "logging.project=mine"],
        "logging.project=mine is not used: logging.report_to does not name wandb",
        True,
    ),
    "validations without rows": (
        [ALL, "checkpointing.eval_steps=1"],
        "checkpointing.eval_steps=1 is not used: there are no validation rows",
        True,
    ),
    "a share of warmup beside its steps": (
        ["training.warmup_ratio=0.3"],
        "training.warmup_ratio=0.3 is not used: training.warmup_steps is set",
        True,
    ),
    "packing": (
        ["data.packing=false"],
        "data.packing=False is not used: rows are always computed end to end",
        True,
    ),
    "a history without chats": (
        ["data.history=as_asked", "--data", "texts.jsonl"],
        "data.history=as_asked is not used: no row is a chat",
        True,
    ),
    "a split of parts that have files": (
        ["data.validation_path=rows.jsonl", "data.test_path=rows.jsonl"],
        "data.split=[0.8, 0.1, 0.1] is not used: validation and test rows have separate files",
        True,
    ),
    "sampling without temperature": (
        ["generation.temperature=0", "generation.top_k=5"],
        "generation.top_k=5 is not used: generation.temperature=0 takes the likeliest token",
        True,
    ),
    "a name twice": (
        ["--config", "twice.yaml"],
        "'learning_rate' is given twice in the section",
        False,
    ),
    "a section twice": (
        ["--config", "sections.yaml"],
        "'data' is given twice in the section",
        False,
    ),
    "a number of another base": (
        ["--config", "octal.yaml"],
        "training.seed must be an int; got '010'",
        False,
    ),
    "a time for a number": (
        ["--config", "time.yaml"],
        "training.seed must be an int; got '1:30'",
        False,
    ),
    "a typed number of another base": (
        ["training.seed=010"],
        "training.seed must be an int; got '010'",
        False,
    ),
    "a typed name twice": (
        ["lora.rank_pattern={q_proj: 8, q_proj: 4}"],
        "lora.rank_pattern must be a map of text to int",
        False,
    ),
    "a run's name without a tracker": (
        ["logging.run_name=mine"],
        "logging.run_name=mine is not used: logging.report_to names no tracker",
        True,
    ),
    "groups of weights that are not quantised": (
        ["model.group_size=32"],
        "model.group_size=32 is not used: no weight is quantised",
        True,
    ),
    "most rows refused": (
        ["--data", "bad.jsonl"],
        "75% of the rows of bad.jsonl cannot be used, and data.max_refused=0.5 is exceeded",
        False,
    ),
    "most rows refused, and allowed": (
        ["--data", "bad.jsonl", "data.max_refused=0.75", ALL],
        "",
        True,
    ),
}


@pytest.fixture
def files(train: list[str]) -> list[str]:
    Path("twice.yaml").write_text("training:\n  learning_rate: 1\n  seed: 1\n  learning_rate: 2\n")
    Path("sections.yaml").write_text("data:\n  seed: 1\ntraining:\n  seed: 1\ndata:\n  seed: 2\n")
    Path("octal.yaml").write_text("training:\n  seed: 010\n")
    Path("time.yaml").write_text("training:\n  seed: 1:30\n")
    Path("texts.jsonl").write_text("".join(f'{{"text": "a{i}"}}\n' for i in range(30)))
    rows = [f'{{"instruction": "a{i}", "output": "b"}}' for i in range(4)]
    pair = '{"prompt": "a%d", "chosen": "b", "rejected": "c"}\n'
    Path("pairs.jsonl").write_text("".join(pair % i for i in range(30)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    systems = [{"role": "system", "content": "Be kind."}, *turns]
    whole = [json.dumps({"messages": systems}).replace('"a"', f'"a{i}"') for i in range(30)]
    Path("systems.jsonl").write_text("\n".join(whole))
    Path("some.jsonl").write_text("\n".join([*whole, json.dumps({"messages": turns})]))
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    Path("bad.jsonl").write_text("\n".join([*rows, *["{"] * 12]))
    return train


@pytest.mark.parametrize("name", SAID)
def test_an_option_that_cannot_act_is_named(
    name: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words, text, goes_on = SAID[name]
    code = call(*files, *words, "--dry-run")
    out, err = capsys.readouterr()
    assert code == (0 if goes_on else 2), err
    assert text in out + err
    assert text or "is not used" not in out
    assert not (goes_on and text) or f"warning   {text}" in out


def test_a_run_without_such_options_has_no_warning(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*files, "--dry-run") == 0
    assert "is not used" not in "".join(capsys.readouterr())


def test_true_goes_on_from_the_newest_checkpoint_as_auto_does(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for value, word in (("true", "auto"), ("false", "none")):
        assert call(*files, f"checkpointing.resume_from_checkpoint={value}", "--print-config") == 0
        assert f"resume_from_checkpoint: {word}\n" in capsys.readouterr().out


# ---- what a command reads ----------------------------------------------------------------------

GROUPS = "model.group_size=32"
OWN_ROWS = ["--data", "rows.jsonl", "data.cache_dir=null"]
GGUF = ["--gguf-model", "--type", "q4_0"]
USES: dict[str, list[str]] = {
    "plan": [GROUPS, "--data", "rows.jsonl", "data.cache_dir=null"],
    "inspect": ["rows.jsonl", "data.cache_dir=null"],
    "generate": [GROUPS, "--instruction", "Say", "generation.max_new_tokens=2"],
    "chat": [GROUPS, "generation.max_new_tokens=2"],
    "evaluate": [GROUPS, "--data", "rows.jsonl", "--answers", "1", "data.cache_dir=null"],
    "merge": [GROUPS, "--adapter", "out", "--output-dir", "merged", "--requantize", "4", *OWN_ROWS],
    "export": [GROUPS, "--adapter", "out", "--output-dir", "exported", *GGUF, *OWN_ROWS],
    "doctor": [],
}
# Functions that look at fields, or copy them, whatever the command does.
NO_READERS = {"__post_init__", "check", "replace", "with_model", "as_taught", "unused"}
NO_READERS |= {
    "at_hidden_size",
    "for_steps",
    "check_needs",
    "without_effect",
    "explained",
    "check_patterns",
}
# Of the run whose rows a rounding is measured on, by its record.
RUN = {"training.objective", "training.seed", "data.max_refused", "data.prompt_loss_weight"}
RUN |= {"data.split", "data.validation_path", "data.test_path"}
# Read by what a command shares with a run, and of no use to it: how long a run would be.
LENGTH = "max_steps num_train_epochs warmup_ratio warmup_steps per_device_train_batch_size "
LENGTH += "gradient_accumulation_steps"
BESIDES: dict[str, set[str]] = {
    "merge": RUN,
    "export": RUN,
    "evaluate": {f"training.{name}" for name in LENGTH.split()}
    # Answers are the likeliest ones, by settings of the command's own.
    | {
        "data.shuffle",
        "data.prompt_loss_weight",
        "training.objective",
        "generation.repetition_penalty",
        "generation.temperature",
    },
}


@pytest.mark.parametrize("command", USES)
def test_a_command_declares_the_fields_that_it_reads(
    command: str,
    finished: Any,
    model: Path,
    chat_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: set[str] = set()

    def watch(section: str, config: type) -> None:
        plain: Any = config.__getattribute__
        names = {f.name for f in dataclasses.fields(config)}

        def watched(self: Any, name: str) -> Any:
            frames = [sys._getframe(1).f_code, sys._getframe(2).f_code]
            is_reader = NO_READERS.isdisjoint(code.co_name for code in frames)
            if name in names and is_reader and frames[0].co_filename != fields.__file__:
                read.add(f"{section}.{name}")
            return plain(self, name)

        monkeypatch.setattr(config, "__getattribute__", watched)

    for section, config in SECTIONS.items():
        watch(section, config)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    folder = chat_folder if command == "chat" else model
    assert call(command, "--model", folder, *USES[command]) in (0, 1)  # 1: doctor found something
    about = COMMANDS[command]
    declared = {f"{section}.{name}" for section in about.reads for name in about.fields(section)}
    assert declared - read == set()
    # An adapter has a LoraConfig of its own.
    others = {name for name in read - declared if command == "plan" or "lora." not in name}
    assert others <= BESIDES.get(command, set())


# ---- generate ------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ 'A:' if add_generation_prompt }}"
TEN = [GROUPS, "generation.temperature=0", "generation.max_new_tokens=10"]
RAW = ["--raw", "--prompt"]


@pytest.mark.parametrize("asked", [["--prompt", "Say it."], ["--instruction", "Say it."]])
def test_a_question_is_written_by_the_template_that_is_named(
    asked: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    texts = []
    for words in ([*asked, f"data.template={file}"], [*RAW, "<Say it.>A:"], asked):
        assert call("generate", "--model", model, *words, *TEN, "--json") == 0
        out, err = capsys.readouterr()
        assert "is not used" not in err
        texts.append(json.loads(out)["text"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--raw", "data.template=own.jinja"], "data.template=own.jinja is not used: --raw gives"),
        (["data.template=alpaca"], "data.template=alpaca is not used: it is how an --instruction"),
        (["data.template=missing.jinja"], "data.template must be auto, alpaca,"),
    ],
)
def test_a_template_that_cannot_act_on_a_prompt_is_named(
    words: list[str],
    said: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text(TEMPLATE)
    code = call("generate", "--model", model, "--prompt", "Say it.", *words, *TEN)
    assert code == (2 if "must be" in said else 0)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "merge", "export"])
def test_a_packing_for_weights_that_are_packed_is_named(
    command: str, finished: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = ["--output-dir", "packed", "--requantize", "4", GROUPS]
    assert call("merge", "--model", model, "--adapter", "out", *packed) == 0
    capsys.readouterr()
    words = ["--prompt", "Say", *TEN] if command == "generate" else ["--adapter", "out"]
    words += [] if command == "generate" else ["--output-dir", "written"]
    for bits, is_idle in ((8, True), (4, False)):
        call(command, "--model", "packed", *words, f"model.bits={bits}", GROUPS)
        text = "the weights are quantised in the files"
        assert (text in capsys.readouterr().err) is is_idle
