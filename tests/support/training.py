"""Short runs of the training loop on a tiny model, and what can happen in the middle of one."""

import dataclasses
import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from support.models import load_folder

import mlx_qlora as mq
from mlx_qlora.commands import open_with_plan
from mlx_qlora.config import SECTIONS, RunConfig, build
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.run import run
from mlx_qlora.train import loop
from mlx_qlora.train.checkpoint import RunState, checkpoint_to_resume
from mlx_qlora.train.config import NUMERICS
from mlx_qlora.train.loop import Run, TrainResult, train
from mlx_qlora.train.score import Score

FINGERPRINT = {"config": "c", "data": "d", "numerics": str(NUMERICS)}
SECTION_OF = {
    field.name: section for section, made in SECTIONS.items() for field in dataclasses.fields(made)
}
# Steps of two micro-batches of three rows, a validation every four and a checkpoint every three.
SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "save_steps": 3,
    "eval_steps": 4,
    "save_total_limit": 10,
    "logging_steps": 1,
}
# Of whole runs by the public call.
PUBLIC: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.3,
    "max_length": 40,
    "eval_steps": 2,
    "logging_steps": 3,
}
CLOCKS = {"tokens_per_second", "peak_memory_bytes", "process_memory_bytes", "eval_runtime"}
NAN_TOKEN = 319  # whose embedding is no number in a model that `start` was asked to poison


def joined(rows: list[list[Example]]) -> list[Example]:
    """Each list of documents as one example, which has them end to end."""
    examples = []
    for row in rows:
        tokens, learned = (np.concatenate(x) for x in zip(*((e.tokens, e.learned) for e in row)))
        starts = np.cumsum([len(e) for e in row[:-1]], dtype=int).tolist()
        examples.append(Example(tokens, learned, row[0].line, starts=tuple(starts)))
    return examples


def make_examples(n: int = 22, seed: int = 0) -> Examples:
    """Counting by threes from a few starts; the second half of each row is learned."""
    random = np.random.default_rng(seed)
    rows = []
    for line in range(1, n + 1):
        length = int(random.integers(8, 30))
        tokens = ((random.integers(0, 4) + 3 * np.arange(length)) % 320).astype(np.int32)
        rows.append(Example(tokens, np.arange(length) >= length // 2, line))
    return Examples.of(rows)


def changed(examples: Examples, rows: dict[int, Callable[[np.ndarray], np.ndarray]]) -> Examples:
    """The examples, with the tokens of some of them changed."""
    made = [examples[i] for i in range(len(examples))]
    for i, change in rows.items():
        tokens = change(np.array(made[i].tokens)).astype(np.int32)
        made[i] = dataclasses.replace(made[i], tokens=tokens)
    return Examples.of(made)


def poisoned(examples: Examples, *rows: int) -> Examples:
    """The examples, of which these have the token whose embedding is no number."""
    return changed(examples, dict.fromkeys(rows, lambda t: np.array([NAN_TOKEN, *t[1:]])))


def settings(output: Path, **fields: Any) -> RunConfig:
    """A config for a run into this folder; keywords are fields, whatever their section."""
    values: dict[str, dict[str, Any]] = {"checkpointing": {"output_dir": str(output)}}
    for name, value in {**SETTINGS, **fields}.items():
        values.setdefault(SECTION_OF[name], {})[name] = value
    return build(values)


def inputs(train: Examples, validation: Examples | None = None, **more: Any) -> Any:
    """What `train` reads of a run's inputs."""
    begin = {"base": "org/base", "state": RunState(), "resumed": None}
    return SimpleNamespace(train=train, validation=validation, **{**begin, **more})


def start(
    folder: Path,
    output: Path,
    console: Console | None = None,
    examples: Examples | None = None,
    validation: Examples | None = None,
    **fields: Any,
) -> tuple[Any, TrainResult]:
    """One run on a fresh tiny model; (model, result)."""
    model = load_folder(folder)
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = mx.where(
        (mx.arange(weight.shape[0]) == NAN_TOKEN)[:, None], mx.nan, weight
    )
    add_lora(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2), seed=1)
    output.mkdir(exist_ok=True)
    config = settings(output, **fields)
    fresh = RunState(fingerprint=FINGERPRINT)
    path, state, _ = checkpoint_to_resume(config.checkpointing, fresh, {})
    made = inputs(
        make_examples() if examples is None else examples,
        make_examples(6, seed=9) if validation is None else validation,
        config=config,
        state=state,
        resumed=path,
    )
    return model, train(model, made, console or Console(file=io.StringIO()))


@contextmanager
def at_step(step: int, action: Callable[[Run], Any]) -> Iterator[None]:
    """Within it something happens after a step, before its validation and checkpoint."""
    record = Run.record

    def recorded(self: Run, *args: Any) -> None:
        record(self, *args)
        if self.state.step == step:
            action(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", recorded)
        yield


@contextmanager
def losses(values: list[float]) -> Iterator[None]:
    """Within it validations measure these losses, one after the other, and no more of them."""
    left = iter(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "score", lambda model, batches: Score(nats=next(left), tokens=1))
        yield
    assert next(left, None) is None, "fewer validations than losses"


def without_clocks(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock or the machine decides."""
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in history]


def recorded(output: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ---- whole runs ---------------------------------------------------------------------------------


def train_run(values: dict[str, dict[str, Any]], console: Console | None = None) -> TrainResult:
    """A run as `mlx-qlora train` makes it, quiet unless a console is given.

    Args:
        values: section -> field -> value.
    """
    console = console or Console(quiet=True)
    inputs, plan = open_with_plan(build(values), console)
    return run(inputs, console, plan)


class Finished(NamedTuple):
    out: Path
    model: Any
    result: TrainResult
    printed: str

    @property
    def adapter(self) -> bytes:
        return (self.out / "adapter_model.safetensors").read_bytes()


def fine_tune(
    folder: Path,
    out: Path,
    examples: Examples | None = None,
    held_out: Examples | None = None,
    **fields: Any,
) -> Finished:
    """One run by the public call, on a fresh tiny model; keywords are fields of the config."""
    model, tokenizer = mq.load(folder)
    printed = io.StringIO()
    result = mq.fine_tune(
        model,
        tokenizer,
        make_examples() if examples is None else examples,
        make_examples(6, seed=9) if held_out is None else held_out,
        settings(out, **{**PUBLIC, **fields}),
        console=Console(file=printed, width=300),
    )
    return Finished(out, model, result, printed.getvalue())


def stop(_: Run) -> None:
    signal.raise_signal(signal.SIGTERM)


def assert_same(run: Finished, whole: Finished) -> None:
    """That a run ended bit for bit like one that nothing happened to."""
    last = f"checkpoint-{SETTINGS['max_steps']}"
    for name in ("adapter_model.safetensors", f"{last}/optimizer.safetensors"):
        assert (run.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    assert without_clocks(run.result.log_history) == without_clocks(whole.result.log_history)
    assert recorded(run.out) == run.result.log_history
    assert run.result.steps == SETTINGS["max_steps"]
