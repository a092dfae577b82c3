"""What may change about a run without changing what it learns, through the command line.

The self-test's `trajectory.json` has the losses of one run, which every machine is compared with;
`python tests/train/test_invariants.py` writes them, as is due after a change of the arithmetic that
is meant.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from support.gpu_route import ROUTES
from support.tiny_folder import write_model
from support.training import recorded

from mlx_qlora.before.self_test import GOLDEN
from mlx_qlora.cli import main
from mlx_qlora.config import build, read_yaml
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.weights import open_checkpoint
from mlx_qlora.run import open_inputs

HERE = Path(__file__).parent
TRAJECTORY = json.loads(GOLDEN.read_text(encoding="utf-8"))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the self-test writes for a weight of this name."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return (0.08 * drawn + (len(shape) == 1)).astype(np.float32)


STEPS = 20
WORDS = "one two three four five six seven eight nine ten".split()
QUIET = ["data.split=[1, 0, 0]", "data.cache_dir=null", "logging.logging_steps=1"]
TINY = ["model.bits=4", "model.group_size=32", "model.dtype=float32", "lora.r=4"]
TINY += ["lora.lora_alpha=8", "training.warmup_steps=4", "training.learning_rate=1e-2"]


def write_base(folder: Path, **changes: object) -> Path:
    """A tiny model whose weights follow from their names, and not from transformers' own draws."""
    write_model(folder, **changes)
    path = folder / "model.safetensors"
    arrays = {name: weight(name, array.shape) for name, array in load_file(path).items()}
    save_file(arrays, path, metadata={"format": "pt"})
    return folder


def write_counts(path: Path, n: int) -> Path:
    """Rows to count on from a number, of at most 64 tokens: unpacked, all are of one width."""
    draw, rows = random.Random(0), []
    for i in range(n):
        first, many = draw.randrange(4), draw.randrange(1, 6)
        answer = " ".join(WORDS[first : first + many])
        rows.append({"instruction": f"count {i}", "input": WORDS[first], "output": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_base(folder: Path) -> list[str]:
    """The words of a command that trains a tiny model on 160 rows."""
    rows = write_counts(folder / "rows.jsonl", 160)
    words = ["--model", str(write_base(folder / "model")), "--data", str(rows)]
    return ["train", *words, *QUIET, *TINY, "--max-length", "128", "--max-steps", str(STEPS)]


def batch_of(rows: int, micro_batches: int) -> list[str]:
    return ["--batch-size", str(rows), f"training.gradient_accumulation_steps={micro_batches}"]


def records(output: Path) -> list[dict[str, float]]:
    return [record for record in recorded(output) if "loss" in record]


def losses(output: Path, *words: str) -> np.ndarray:
    assert main([*words, "--output-dir", str(output)]) == 0
    return np.array([record["loss"] for record in records(output)])


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4
    assert abs((ours - theirs).mean()) <= 1e-5


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_base(tmp_path_factory.mktemp("invariants"))


# ---- one trajectory ----------------------------------------------------------------------------


TRAJECTORY_ROUTES = {"metal-float32": batch_of(8, 1), "cuda-float32": batch_of(4, 2)}


@pytest.mark.parametrize("name", TRAJECTORY_ROUTES)
def test_runs_by_a_gpu_s_route_take_the_committed_trajectory(command, tmp_path, name):
    """With packed products on Metal, which `auto` chooses."""
    with ROUTES[name].taken():
        found = losses(tmp_path / "out", *command, "model.dtype=auto", *TRAJECTORY_ROUTES[name])
    assert_same(found, np.array(TRAJECTORY["losses"]))


def test_a_run_in_16_bits_follows_the_committed_trajectory(command, tmp_path):
    with ROUTES["metal-bfloat16"].taken() as route:
        found = losses(tmp_path / "out", *command, "model.dtype=auto", *batch_of(8, 1))
    gap = np.abs(found / np.array(TRAJECTORY["losses"]) - 1)
    assert 0 < gap.max() < route.tolerance.loss


@pytest.mark.parametrize(
    "how",
    [
        batch_of(8, 1),
        [*batch_of(4, 2), "training.gradient_checkpointing=true"],
        [*batch_of(2, 4), "training.gradient_checkpointing=1"],
        [*batch_of(8, 1), "training.compile=true"],
        [*batch_of(8, 1), "training.compile=false", "training.gradient_checkpointing=false"],
    ],
    ids=" ".join,
)
def test_runs_take_the_committed_trajectory(command, tmp_path, how):
    assert_same(losses(tmp_path / "out", *command, *how), np.array(TRAJECTORY["losses"]))


def test_the_committed_trajectory_learns_and_another_seed_leaves_it(command, tmp_path):
    committed = np.array(TRAJECTORY["losses"])
    assert len(committed) == STEPS
    assert committed[-1] < 0.6 * committed[0]
    other = losses(tmp_path / "out", *command, *batch_of(8, 1), "training.seed=1")
    assert np.abs(other - committed).mean() > 1e-2


def test_the_self_test_trains_the_rows_that_the_command_reads(command, tmp_path):
    shutil.copytree(Path(command[2]).parent, tmp_path, dirs_exist_ok=True)
    losses(tmp_path / "out", *command, *batch_of(8, 1), "--max-steps", "1")
    assert rows_of(tmp_path) == TRAJECTORY["rows"]
    config = json.loads(Path(command[2], "config.json").read_text())
    assert LlamaConfig.from_hf(TRAJECTORY["model"]) == LlamaConfig.from_hf(config)


@pytest.mark.parametrize("kl_weight", ["0", "0.5"])
def test_runs_are_the_same_however_they_are_computed(command, tmp_path, kl_weight):
    command = [*command, f"training.kl_weight={kl_weight}"]
    off = ["training.compile=false", "training.gradient_checkpointing=false"]
    plain = losses(tmp_path / "plain", *command, *batch_of(8, 1), *off)
    for number, how in enumerate(
        [
            [*batch_of(8, 1), "training.compile=true", "training.gradient_checkpointing=false"],
            [*batch_of(4, 2), "training.compile=true", "training.gradient_checkpointing=1"],
            [*batch_of(2, 4), "training.compile=false", "training.gradient_checkpointing=true"],
        ]
    ):
        assert_same(losses(tmp_path / str(number), *command, *how), plain)


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_rows_of_different_widths_are_the_same_in_any_batch(command, tmp_path, dropout):
    """Rows of 30 to 110 tokens: batches of 64, 112 and 128 columns."""
    draw = random.Random(0)
    rows = [
        {"instruction": f"count {i}", "output": " ".join(["one two"] * draw.randrange(1, 13))}
        for i in range(160)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*command, "--data", str(path), f"lora.lora_dropout={dropout}"]
    plain = losses(tmp_path / "8x1", *words, *batch_of(8, 1))
    assert_same(losses(tmp_path / "2x4", *words, *batch_of(2, 4)), plain)


def test_packing_is_a_name_that_is_accepted_and_changes_no_bit(command, tmp_path):
    words = [*command, *batch_of(4, 2), "--max-steps", "4"]
    first, second = (
        losses(tmp_path / value, *words, f"data.packing={value}") for value in ("true", "false")
    )
    assert first.tolist() == second.tolist()


# ---- to the bit --------------------------------------------------------------------------------


def test_the_same_command_or_its_run_yaml_alone_leaves_the_same_bits(command, tmp_path):
    words = [*command, *batch_of(4, 2), "--max-steps", "6", "checkpointing.save_steps=3"]
    first = losses(tmp_path / "first", *words)
    assert first.tolist() == losses(tmp_path / "second", *words).tolist()
    again = ["train", "--config", str(tmp_path / "first" / "run.yaml")]
    done = subprocess.run(  # in which sets and dicts have another order
        [sys.executable, "-m", "mlx_qlora", *again, "--output-dir", str(tmp_path / "third")],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert first.tolist() == [record["loss"] for record in records(tmp_path / "third")]
    for name in (
        "adapter_model.safetensors",
        "mlx/adapters.safetensors",
        "checkpoint-3/optimizer.safetensors",
        "checkpoint-6/optimizer.safetensors",
    ):
        for other in ("second", "third"):
            ours, theirs = (tmp_path / run / name for run in ("first", other))
            assert ours.read_bytes() == theirs.read_bytes(), (other, name)


# ---- bfloat16 ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_follows_float32_on_the_demos_data(tmp_path, smollm2_files):
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    import docstring_data

    model = write_base(tmp_path / "model", vocab_size=49152, tie_word_embeddings=True)
    metadata = open_checkpoint(smollm2_files).metadata
    load_tokenizer(smollm2_files.path, metadata).save(model)
    rows = tmp_path / "rows.jsonl"
    made = islice(docstring_data.rows(), 300)
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    words = ["train", "--model", str(model), "--data", str(rows), *QUIET, *TINY, *batch_of(8, 1)]
    words += ["--max-steps", "10", "--max-length", "96", "data.truncation=drop"]
    wide = losses(tmp_path / "float32", *words)
    how = ["model.dtype=bfloat16", "model.frozen_matmul=dequantize"]
    narrow = losses(tmp_path / "bfloat16", *words, *how)
    assert wide[-1] < 0.95 * wide[0]
    assert 0 < np.abs(narrow / wide - 1).max() < 1e-2


def write_golden(folder: Path) -> None:
    """Records the run and its rows, a line for each, for the self-test."""
    ran = losses(folder / "out", *make_base(folder), *batch_of(8, 1)).tolist()
    parts = TRAJECTORY | {"losses": ran, "rows": rows_of(folder)}
    *texts, rows = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in parts.items())
    GOLDEN.write_text("{" + ",\n".join([*texts, rows.replace("], [", "],\n [")]) + "}\n")


def rows_of(folder: Path) -> list[list[int]]:
    """The number of tokens that are not learned, and then all tokens, of each row."""
    inputs = open_inputs(build(read_yaml(str(folder / "out" / "run.yaml"))), Console(quiet=True))
    rows = ((example.tokens.tolist(), example.learned) for example in inputs.train)
    return [[int((~learned).sum()), *tokens] for tokens, learned in rows]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        write_golden(Path(made))
