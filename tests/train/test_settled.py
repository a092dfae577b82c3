"""What a run settles by itself: its steps, from the data; its warmup; when it validates."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from rich.console import Console
from support.command_line import call, printed_json
from support.training import make_examples

import mlx_qlora as mq
from mlx_qlora.config import build, explained, settle
from mlx_qlora.data.batches import make_batches
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.data.read import _split
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.train.config import RunLength, TrainingConfig

LLAMA = LlamaConfig(4096, 32, 32, 8, 128, 14336, 128256)


class Many:
    """So many examples, of which nothing but their number is asked."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    lengths = np.array([64])


def length_of(n: int, training: TrainingConfig) -> RunLength:
    settled = training.for_examples(n)
    batches = make_batches(Many(n), settled.rows, epochs=settled.num_train_epochs)
    return RunLength.of(settled, batches)


@pytest.mark.parametrize("n", [50, 200, 1_000, 20_000, 500_000])
def test_the_defaults_learn_whatever_the_number_of_rows(n):
    length = length_of(n, TrainingConfig())
    assert 1 <= length.passes <= 5
    assert length.steps >= 30
    assert 1 <= length.warmup_steps <= 0.15 * length.steps
    assert length.warnings == []


@pytest.mark.parametrize(
    ("n", "fields", "rows", "accumulation"),
    [
        (10, {}, 4, 1),
        (50, {}, 5, 1),
        (170, {}, 17, 1),
        (180, {}, 18, 1),
        (10**6, {}, 18, 1),
        (180, {"num_train_epochs": 1}, 6, 1),
        (180, {"max_steps": 7}, 18, 1),
        (180, {"per_device_train_batch_size": 6}, 6, 3),
        (180, {"per_device_train_batch_size": 32}, 32, 1),
        (180, {"gradient_accumulation_steps": 4}, 4, 4),
        (180, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 6}, 6, 3),
        (None, {}, 18, 1),
    ],
)
def test_a_step_has_4_to_18_examples_and_a_given_number_is_kept(n, fields, rows, accumulation):
    settled = TrainingConfig(**fields).for_examples(n)
    assert (settled.rows, settled.accumulation) == (rows, accumulation)
    assert settled.for_examples(10) == settled, "settled once and for all"


@pytest.mark.parametrize(("processes", "in_step"), [(1, 18), (2, 18), (3, 18), (4, 16), (8, 16)])
def test_processes_share_a_step_and_do_not_make_it_larger(processes, in_step):
    settled = TrainingConfig().for_examples(1_000, processes)
    assert settled.rows * processes == in_step


def test_passes_without_end_are_no_more_than_many():
    assert TrainingConfig(num_train_epochs=1e6).for_examples(1_000).rows == 18


def test_what_is_settled_is_in_the_config_and_said_with_its_reason():
    examples = make_examples(90)
    config = mq.RunConfig(training=mq.TrainingConfig(learning_rate="auto"))
    settled = settle(config, LLAMA, examples)
    training, checkpointing = settled.training, settled.checkpointing
    assert (training.rows, training.accumulation, training.warmup_steps) == (9, 1, 3)
    assert (checkpointing.eval_steps, checkpointing.save_steps) == (5, 5)
    lines = explained(config, settled, examples, examples)
    assert lines == [
        "batch     9 examples in a step: 90 rows, read 3 times, make 30 steps",
        "warmup    3 of 30 steps: warmup_ratio 0.1",
        "rate      0.000286: by the model's width",
        "every     5 steps a validation and a checkpoint: a sixth of the run, at most 500 steps",
    ]
    assert settle(settled, LLAMA, make_examples(500)) == settled
    without = explained(config, settled, examples, None)
    assert without[:3] == lines[:3]
    assert without[3].startswith("every     5 steps a checkpoint: a sixth")
    assert explained(settled, settled, examples, examples) == []
    more = {"training": {"num_train_epochs": 6}, "lora": {"r": 64}}
    lines = explained(build(more), settle(build(more), LLAMA, examples), examples, examples)
    goes_on = build(more | {"model": {"adapter": "a"}})
    assert not any("alpha" in x for x in explained(goes_on, settled, examples, examples))
    fewer = "for more set per_device_train_batch_size=9 and gradient_accumulation_steps=1"
    assert lines[0].endswith(f"read 6 times, make 30 steps; {fewer}")
    assert "scale     alpha stays 32 with r 64; lora_alpha=128 keeps the usual ratio" in lines
    assert settle(config, LLAMA).checkpointing.eval_steps == "auto", "without data it stays open"


@pytest.mark.parametrize(
    ("steps", "every"), [(1, 1), (6, 1), (7, 2), (135, 23), (3_000, 500), (10**6, 500)]
)
def test_a_run_is_validated_and_saved_six_times_or_every_500_steps(steps, every):
    made = mq.CheckpointingConfig().for_steps(steps)
    assert (made.eval_steps, made.save_steps) == (every, every)
    assert mq.CheckpointingConfig(eval_steps=7).for_steps(steps).eval_steps == 7


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (20, 1), (31, 2), (181, 10), (10**6, 10)])
def test_a_run_has_twenty_figures_or_one_for_ten_steps(steps, every):
    assert mq.LoggingConfig().for_steps(steps).logging_steps == every
    assert mq.LoggingConfig(logging_steps=7).for_steps(steps).logging_steps == 7


def test_a_config_of_steps_or_warmup_is_refused_where_it_makes_no_sense():
    for fields, words in (
        ({"num_train_epochs": 3, "max_steps": 5}, "exclude each other; got 5 and 3"),
        ({"gradient_accumulation_steps": "many"}, "gradient_accumulation_steps must be a number"),
        ({"warmup_ratio": 1.5}, "training.warmup_ratio must be in"),
    ):
        with pytest.raises(mq.ConfigError, match=words):
            build({"training": fields})
    for fields in ({"eval_steps": "often"}, {"save_steps": 0}):
        with pytest.raises(mq.ConfigError, match="must be at least 1, or auto"):
            build({"checkpointing": fields})


# ---- the split ---------------------------------------------------------------------------------


def examples_of(*copies: int) -> Examples:
    """So many copies of the first row, of the second, ..."""
    rows = (
        np.array([i % 300, i // 300, 1, 2], np.int32)
        for i, n in enumerate(copies)
        for _ in range(n)
    )
    return Examples.of(Example(tokens, np.arange(4) > 1) for tokens in rows)


def split_of(examples: Examples, seed: int = 0) -> list[Examples]:
    parts = _split(examples, "auto", [False, False], seed)
    assert sum(map(len, parts)) == len(examples)
    for one, other in itertools.combinations(parts, 2):
        assert not set(one.contents) & set(other.contents)
    return parts


@pytest.mark.parametrize(
    ("n", "parts"),
    [
        (1, (1, 0, 0)),
        (3, (3, 0, 0)),
        (4, (3, 1, 0)),
        (20, (15, 5, 0)),
        (50, (42, 8, 0)),
        (199, (180, 19, 0)),
    ],
)
def test_a_small_set_keeps_its_rows_for_the_training(n, parts):
    assert tuple(map(len, split_of(examples_of(*[1] * n)))) == parts


def test_a_large_one_has_tenths_of_at_most_500():
    for n, wanted in ((1_000, 100), (20_000, 500)):
        _, *held_out = map(len, split_of(examples_of(*[1] * n)))
        assert all(abs(part - wanted) < 4 * wanted**0.5 for part in held_out)


@pytest.mark.parametrize("n", [250, 900, 4_000])
def test_a_row_that_was_trained_is_not_held_out_when_the_file_grows(n):
    train, *_ = split_of(examples_of(*[1] * n))
    _, *later = split_of(examples_of(*[1] * (n + 300)))
    assert not set(train.contents) & {content for part in later for content in part.contents}


@pytest.mark.parametrize(
    "copies",
    [[5], [300], [95, *[1] * 5], [300, *[1] * 700], [70, 70, 70], [2] * 40, [30, 1, 1, 1]],
)
@pytest.mark.parametrize("seed", range(5))
def test_rows_that_repeat_stay_together_and_take_no_part_from_the_training(copies, seed):
    train, *held_out = split_of(examples_of(*copies), seed)
    n = sum(copies)
    assert len(train) >= 0.7 * n
    assert all(len(part) <= max(8, 0.16 * n) for part in held_out)
    if len(copies) > 30:
        assert len(held_out[0]), "something is validated"


def test_two_shares_are_enough_where_nothing_is_tested():
    assert build({"data": {"split": [0.9, 0.1]}}).data.split == [0.9, 0.1, 0.0]


# ---- the commands ------------------------------------------------------------------------------


def test_a_dry_run_says_how_long_the_run_would_be(train_words, capsys):
    assert call(*train_words, "--dry-run", "--json") == 0
    figures = printed_json(capsys)
    assert {"passes", "steps", "warmup_steps", "examples_per_step", "eta_seconds"} <= set(figures)
    assert (figures["passes"], figures["examples_per_step"]) == (3.0, 4)
    assert figures["steps"] == 18 and figures["warmup_steps"] == 2
    assert figures["eta_seconds"] > 0


@pytest.fixture
def train_words(chat_folder, tmp_path, monkeypatch):
    from support.tiny_folder import write_rows

    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    words = ["train", "--model", str(chat_folder), "--data", str(rows), "--output-dir", "out"]
    return [*words, "model.bits=null", "lora.r=2", "data.max_length=64"]


def test_a_run_of_one_step_learns(tmp_path, chat_folder):
    model, tokenizer = mq.load(chat_folder)
    examples = make_examples(4)
    config = mq.RunConfig(
        training=mq.TrainingConfig(max_steps=1),
        checkpointing=mq.CheckpointingConfig(output_dir=str(tmp_path / "out")),
    )
    mq.fine_tune(model, tokenizer, examples, config=config, console=Console(file=io.StringIO()))
    weights = dict(model.trainable_parameters()["model"]["layers"][0]["self_attn"])
    assert np.array(weights["q_proj"]["lora_B"]["weight"]).any()
    assert dataclasses.replace(config.training, seed=1).max_steps == 1
