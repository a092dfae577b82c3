"""No option is accepted and ignored: one that cannot act in a run is refused, or a line says so."""

from pathlib import Path

import pytest
from support.command_line import call

ALL = "data.split=[1, 0, 0]"
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
        "data.packing=False is not used: rows are computed end to end",
        True,
    ),
    "a history without chats": (
        ["data.history=as_asked", "--data", "texts.jsonl"],
        "data.history=as_asked is not used: no row is a chat",
        True,
    ),
    "a split of parts that have files": (
        ["data.validation_path=rows.jsonl", "data.test_path=rows.jsonl"],
        "data.split=[0.8, 0.1, 0.1] is not used: validation and test rows have a file of their own",
        True,
    ),
    "sampling without temperature": (
        ["generation.temperature=0", "generation.top_k=5"],
        "generation.top_k=5 is not used: generation.temperature=0 takes the likeliest token",
        True,
    ),
    "a name twice": (["--config", "twice.yaml"], "'learning_rate' is given twice in what", False),
    "a section twice": (["--config", "sections.yaml"], "'data' is given twice in what", False),
    "a number of another base": (
        ["--config", "octal.yaml"],
        "training.seed must be int; got '010'",
        False,
    ),
    "a time for a number": (
        ["--config", "time.yaml"],
        "training.seed must be int; got '1:30'",
        False,
    ),
    "a typed number of another base": (
        ["training.seed=010"],
        "training.seed must be int; got '010'",
        False,
    ),
    "a typed name twice": (
        ["lora.rank_pattern={q_proj: 8, q_proj: 4}"],
        "lora.rank_pattern must be map of text to int",
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
        "75% of the rows of bad.jsonl cannot be used, and data.max_refused=0.5 allows no more",
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
