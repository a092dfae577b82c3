"""Steps that go wrong: numbers that are not finite, spikes, and a device that gives up."""

import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from rich.console import Console
from support.grad_sums import add_grads
from support.models import load_folder, random_tokens, randomise_lora
from test_loop import make_examples

from mlx_qlora import device
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.data.read import DataConfig
from mlx_qlora.errors import TrainingError
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train import loop
from mlx_qlora.train.checkpoint import (
    CheckpointingConfig,
    RunState,
    checkpoint_to_resume,
    checkpoints,
    read_state,
)
from mlx_qlora.train.config import TrainingConfig
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.loop import TrainResult, train
from mlx_qlora.train.metrics import LoggingConfig
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.signals import Interruption
from mlx_qlora.train.step import Update, split

MALLOC = "[malloc] Unable to allocate 123 bytes."
OUT_OF_MEMORY = [
    RuntimeError(MALLOC),
    RuntimeError(
        "[metal::malloc] Attempting to allocate 123 bytes which is greater than the maximum "
        "allowed buffer size of 99 bytes."
    ),
    RuntimeError(
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    ),
    RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
    MemoryError("std::bad_alloc"),
]
WATCHDOG = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)
Change = Callable[[Batch, Any, Any], Any]


def engine_that(change: Change) -> type[Engine]:
    """An engine whose (loss, grads) of a batch are `change(batch, loss, grads)`."""

    class Changed(Engine):
        def __call__(self, weights, batch, dropout_key=None, before=None, all_reduce=None):
            loss, n_tokens, grads = super().__call__(weights, batch, dropout_key)
            loss, grads = change(batch, loss, grads)
            return loss, n_tokens, add_grads(before, grads)

    return Changed


def poisoning(*rows: int) -> type[Engine]:
    """An engine whose loss and gradients are NaN where one of these rows is in the batch."""

    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        bad = float("nan") if set(rows) & set(batch.rows) else 1.0
        return loss * bad, tree_map(lambda g: g * bad, grads)

    return engine_that(change)


def too_small_for(rows: int, error: Exception) -> type[Engine]:
    """An engine that has no memory for so many rows at once."""

    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        if batch.tokens.shape[0] >= rows:
            raise error
        return loss, grads

    return engine_that(change)


# ---- one step ----------------------------------------------------------------------------------


@pytest.fixture
def model(hf_tiny):
    ours = load_folder(hf_tiny[1])
    add_lora(ours, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3), seed=5)
    randomise_lora(ours)
    return ours


def a_step(first_row: int, packed: bool = False) -> list[Batch]:
    """Two micro-batches of four rows."""
    return [a_batch(first_row, packed), a_batch(first_row + 4, packed)]


def a_batch(first_row: int, packed: bool) -> Batch:
    tokens = random_tokens(4, 25, seed=first_row)
    labels = tokens[:, 1:].copy()
    labels[:, : 2 + first_row % 5] = IGNORE
    rows = tuple(range(first_row, first_row + 4))
    ends = [0, 13, 24] if packed else [0, 24]
    documents = [(b, *span) for b in range(4) for span in itertools.pairwise(ends)]
    places = tuple(f"rows:{first_row + b}" for b, *_ in documents)
    documents = np.array(documents, np.int32)
    return Batch(mx.array(tokens[:, :-1]), mx.array(labels), documents, places, rows)


def updater(model, engine: type[Engine] = Engine, console: Console | None = None) -> Update:
    # This epsilon: Adam divides by the gradient, and would make much of the rounding of tiny ones.
    optimizer = AdamW(model.trainable_parameters(), epsilon=1e-4)
    quiet = console or Console(file=io.StringIO())
    return Update(engine(model, "none", compiled=False), optimizer, 3, Interruption(), quiet)


def numbers_of(update: Update) -> tuple[bytes, ...]:
    optimizer = update.optimizer
    buffers = optimizer.weights, optimizer.mean, optimizer.square
    return *(np.array(buffer).tobytes() for buffer in buffers), str(optimizer.step).encode()


def same_to_rounding(first: Update, second: Update) -> bool:
    pairs = [
        (getattr(first.optimizer, name), getattr(second.optimizer, name))
        for name in ("weights", "mean", "square")
    ]
    return all(mx.abs(a - b).max().item() <= 2e-5 * mx.abs(b).max().item() for a, b in pairs)


def one_element(grads: Any, value: float) -> Any:
    """The gradients, with this value as the very first of their numbers."""
    seen = []

    def change(g: mx.array) -> mx.array:
        seen.append(g)
        return mx.where(mx.arange(g.size).reshape(g.shape) == 0, value, g) if len(seen) == 1 else g

    return tree_map(change, grads)


POISONS: dict[str, Callable[[Any, Any], Any]] = {
    "loss is NaN": lambda loss, grads: (loss * float("nan"), grads),
    "loss is inf": lambda loss, grads: (loss + float("inf"), grads),
    "one gradient is NaN": lambda loss, grads: (loss, one_element(grads, float("nan"))),
    "one gradient is -inf": lambda loss, grads: (loss, one_element(grads, -float("inf"))),
    "the norm overflows": lambda loss, grads: (loss, one_element(grads, 1e30)),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("row", [12, 17])  # of the first and of the second micro-batch
def test_a_step_that_is_not_finite_has_not_been(model, poison, row):
    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        return POISONS[poison](loss, grads) if row in batch.rows else (loss, grads)

    poisoned, clean = updater(model, engine_that(change)), updater(model)
    for first_row in (0, 20):
        assert poisoned.step(a_step(first_row), 1e-2).finite
        assert clean.step(a_step(first_row), 1e-2).finite
    before = numbers_of(poisoned)
    outcome = poisoned.step(a_step(12), 1e-2)
    assert not outcome.finite
    assert numbers_of(poisoned) == before
    everyone = [f"rows:{n}" for n in range(12, 20)]
    blamed = everyone[:4] if row < 16 else everyone[4:]
    assert list(outcome.suspects) == (blamed if "loss" in poison else everyone)
    assert poisoned.step(a_step(40), 1e-2).finite
    clean.step(a_step(40), 1e-2)
    assert numbers_of(poisoned) == numbers_of(clean) != before


def test_of_a_halved_batch_only_the_part_that_is_not_finite_is_named(model):
    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        return (loss * float("nan") if 14 in batch.rows else loss), grads

    update = updater(model, engine_that(change))
    update.parts = 2
    assert (
        update.step(a_step(12, packed=True), 1e-2).suspects == ("rows:14",) * 2 + ("rows:15",) * 2
    )


def test_a_step_that_is_given_up_has_not_been(model):
    update = updater(model)
    update.step(a_step(0), 1e-2)
    before, asked = numbers_of(update), []

    class Second(Interruption):
        """A signal comes within the second micro-batch."""

        signum = property(lambda self: asked.append(1) or (2 if len(asked) == 2 else None))
        signum = signum.setter(lambda self, value: None)

    update.interruption = Second()
    assert update.step(a_step(8), 1e-2) is None
    assert len(asked) == 2
    assert numbers_of(update) == before


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_make_the_step_of_the_batch(model, packed):
    """Rows 0 to 7 as 2 x 4, 4 x 2 and 8 x 1, with dropout."""
    updates = []
    for parts in (1, 2, 4):
        updates.append(updater(model))
        micro = [part for batch in a_step(0, packed) for part in split(batch, parts)]
        assert len(micro) == 2 * parts
        updates[-1].step(micro, 1e-2)
    assert all(same_to_rounding(other, updates[0]) for other in updates[1:])
    assert not same_to_rounding(updater(model), updates[0])


# ---- memory ------------------------------------------------------------------------------------


SHORTAGES = [
    *((error, 4, 2, False) for error in OUT_OF_MEMORY),
    *((RuntimeError(MALLOC), *how) for how in ((4, 2, True), (2, 4, False), (2, 4, True))),
]


@pytest.mark.parametrize(("error", "too_many", "parts", "packed"), SHORTAGES)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(model, error, too_many, parts, packed):
    printed = io.StringIO()
    halved = updater(model, too_small_for(too_many, error), Console(file=printed, width=30))
    whole = updater(model)
    for first_row in (0, 8):
        ours = halved.step(a_step(first_row, packed), 1e-2)
        theirs = whole.step(a_step(first_row, packed), 1e-2)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert ours.tokens == theirs.tokens
    assert same_to_rounding(halved, whole)
    assert halved.optimizer.step == whole.optimizer.step == 2
    assert printed.getvalue().splitlines() == [
        f"warning   out of memory: of 4 rows at most {4 // n} are computed at once from here on; "
        "the result is the same"
        for n in (2, 4)
        if n <= parts
    ]


def test_memory_that_ends_within_a_step_leaves_nothing_of_it(model):
    """It may end in the second micro-batch, or once in the update, which is only tried again."""
    calls = []

    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        calls.append(batch.tokens.shape[0])
        if len(calls) == 4:
            raise RuntimeError(MALLOC)
        return loss, grads

    class Ends(AdamW):
        ended = False

        def update(self, *what, **how):
            norm = super().update(*what, **how)
            if self.step == 2 and not self.ended:
                self.ended = True
                raise RuntimeError(MALLOC)
            return norm

    ended, whole = updater(model, engine_that(change)), updater(model)
    ended.optimizer = Ends(model.trainable_parameters(), epsilon=1e-4)
    for first_row in (0, 8):
        ended.step(a_step(first_row), 1e-2)
        whole.step(a_step(first_row), 1e-2)
    assert calls == [4, 4, 4, 4] + [2] * 4
    assert ended.optimizer.step == 2
    assert same_to_rounding(ended, whole)


def test_no_memory_to_move_the_weights_ends_the_run_with_a_remedy(model, monkeypatch):
    update = updater(model)
    before = numbers_of(update)

    def starved(*_: Any, **__: Any) -> Any:
        update.optimizer.step += 1
        raise RuntimeError(MALLOC)

    monkeypatch.setattr(update.optimizer, "update", starved)
    message = "^out of memory while the weights are moved; lower lora.r"
    with pytest.raises(TrainingError, match=message):
        update.step(a_step(0), 1e-2)
    assert numbers_of(update) == before and update.parts == 1 and update.optimizer.step == 0


def test_a_single_row_that_does_not_fit_ends_the_run_with_a_remedy(model):
    update = updater(model, too_small_for(1, RuntimeError(MALLOC)))
    before = numbers_of(update)
    with pytest.raises(TrainingError) as raised:
        update.step(a_step(0), 1e-2)
    assert str(raised.value) == (
        "out of memory with a single row; lower data.max_length, set "
        f"training.gradient_checkpointing=true, or lower lora.r ({MALLOC})"
    )
    assert update.parts == 4
    assert numbers_of(update) == before


@pytest.mark.parametrize("rows", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_are_whole_rows_in_order(rows, parts):
    tokens = mx.array(random_tokens(rows, 8))
    documents = np.array([(b, *span) for b in range(rows) for span in ((0, 5), (5, 7))], np.int32)
    places = tuple(f"{b}-{i}" for b in range(rows) for i in range(2))
    made = split(Batch(tokens, tokens, documents, places, tuple(range(7, 7 + rows))), parts)
    sizes = [part.tokens.shape[0] for part in made]
    assert min(parts, rows) <= len(made) <= rows and sum(sizes) == rows
    assert max(sizes) <= -(-rows // parts)
    assert mx.array_equal(mx.concatenate([part.tokens for part in made]), tokens).item()
    assert [row for part in made for row in part.rows] == list(range(7, 7 + rows))
    assert [place for part in made for place in part.places] == list(places)
    for part, size in zip(made, sizes):
        theirs = [(b, *span) for b in range(size) for span in ((0, 5), (5, 7))]
        assert part.documents.tolist() == [list(d) for d in theirs]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("[METAL] Command buffer execution failed: Page Fault", None),
        ("cudaGraphLaunch failed: an illegal memory access was encountered", None),
        (WATCHDOG, "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"),
    ],
)
def test_other_errors_of_the_device_end_the_run_in_its_own_words(model, words, remedy):
    update = updater(model, too_small_for(1, RuntimeError(words)))
    with pytest.raises(TrainingError) as raised:
        update.step(a_step(0), 1e-2)
    assert update.parts == 1, "halving is for want of memory"
    message = str(raised.value)
    assert message.startswith(f"the device gave up: {words}")
    hint = message.removeprefix(f"the device gave up: {words}")
    assert (remedy in hint) if remedy else hint == ""


def test_memory_is_limited_before_a_run(monkeypatch, hf_tiny, tmp_path):
    working_set = device.facts()["working_set_bytes"]
    before = mx.set_cache_limit(12345)
    try:
        start(hf_tiny[1], tmp_path / "out", max_steps=1)
        assert mx.set_cache_limit(before) == working_set // 8
    finally:
        mx.set_cache_limit(before)

    for kind, wired in ((device.METAL, [working_set]), (device.CUDA, []), (device.CPU, [])):
        limits, caches = [], []
        with device.use(kind), monkeypatch.context() as patch:
            patch.setattr(mx, "set_wired_limit", limits.append)
            patch.setattr(mx, "set_cache_limit", caches.append)
            device.limit_memory()
        assert (limits, caches) == (wired, [working_set // 8])


# ---- whole runs --------------------------------------------------------------------------------


def noise(n: int, seed: int) -> Examples:
    """Tokens drawn from eight: once a model knows which, it can learn no more."""
    drawn = np.random.default_rng(seed).integers(100, 108, (n, 32)).astype(np.int32)
    return Examples.of(Example(row, np.arange(32) > 0, i) for i, row in enumerate(drawn))


def start(
    folder: Path, output: Path, printed: io.StringIO | None = None, packing=False, **changes: Any
) -> TrainResult:
    """A run of steps of 2 micro-batches of 2 rows: step k has rows 4 k - 4 to 4 k - 1."""
    model = load_folder(folder)
    add_lora(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2), seed=1)
    examples = changes.pop("examples", (make_examples(24), make_examples(6, seed=9)))
    training = TrainingConfig(
        max_steps=changes.pop("max_steps", 8),
        learning_rate=changes.pop("learning_rate", 1e-2),
        warmup_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_skipped_steps=changes.pop("max_skipped_steps", 3),
    )
    output.mkdir(exist_ok=True)
    places = {"output_dir": str(output), "save_steps": 3, "eval_steps": 100}
    checkpointing = CheckpointingConfig(**{**places, "save_total_limit": 10, **changes})
    state = RunState(fingerprint={"config": "c"})
    return train(
        model,
        *examples,
        DataConfig(packing=packing),
        training,
        checkpointing,
        LoggingConfig(logging_steps=1),
        "org/base",
        state,
        checkpoint_to_resume(checkpointing, state)[0],
        Console(file=printed or io.StringIO(), width=60),
    )


def adapter(output: Path, step: int) -> bytes:
    return (output / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def kept_apart(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, less what differs from machine to machine and from hour to hour."""
    clocks = {"tokens_per_second", "peak_memory_bytes", "eval_runtime"}
    return [{k: v for k, v in record.items() if k not in clocks} for record in history]


def test_a_skipped_step_is_recorded_with_its_rows(hf_tiny, tmp_path, monkeypatch):
    from transformers import TrainerState

    batches = loop.batches_of(
        make_examples(24),
        DataConfig(packing=False),
        TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    )
    named = list(batches[5].places)  # the micro-batch of rows 10 and 11
    assert len(named) == 2
    monkeypatch.setattr(loop, "Engine", poisoning(10))
    printed = io.StringIO()
    result = start(hf_tiny[1], tmp_path / "out", printed)
    what = "loss nan, gradient norm nan"
    skipped = [record for record in lines_of(tmp_path / "out") if "skipped" in record]
    assert skipped == [{"step": 3, "epoch": 0.5, "skipped": what, "rows": named}]
    assert skipped[0] in result.log_history
    assert [r["step"] for r in result.log_history if "loss" in r] == [1, 2, 4, 5, 6, 7, 8]
    assert f"step 3: {what}: skipped. Rows: {', '.join(named)}\n" in printed.getvalue()
    assert printed.getvalue().count("skipped") == 1

    last = tmp_path / "out" / "checkpoint-8"
    shown = TrainerState.load_from_json(str(last / "trainer_state.json")).log_history
    assert [record["step"] for record in shown] == [1, 2, 4, 5, 6, 7, 8, 8]
    assert not any(record.keys() & {"skipped", "rows"} for record in shown)
    assert (read_state(last)["updates"], read_state(last)["step"]) == (7, 8)
    assert adapter(tmp_path / "out", 3) != adapter(tmp_path / "out", 6)


def test_too_many_skipped_steps_in_a_row_end_the_run(hf_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Engine", poisoning(0, 4, 12, 16, 20))  # of steps 1, 2, 4, 5 and 6
    out = tmp_path / "out"
    message = (
        r"^step 6: loss nan, gradient norm nan: 3 steps in a row have moved nothing "
        r"\(training\.max_skipped_steps\); lower training\.learning_rate, or look at these rows: "
        rf"rows:\d+, rows:\d+\. {re.escape(str(out))}/checkpoint-3 is the last checkpoint$"
    )
    with pytest.raises(TrainingError, match=message):
        start(hf_tiny[1], out)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3"]
    assert read_state(out / "checkpoint-3")["step"] == 3  # every checksum fits
    assert [r["step"] for r in lines_of(out) if "skipped" in r] == [1, 2, 4, 5, 6]

    monkeypatch.setattr(loop, "Engine", Engine)  # as if the rows had been mended
    assert start(hf_tiny[1], out).steps == 8
    assert [r["step"] for r in lines_of(out) if "skipped" in r] == [1, 2]


def test_no_checkpoint_yet_is_said_too(hf_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Engine", poisoning(0))
    with pytest.raises(TrainingError, match=r"lower training.*No checkpoint was written yet$"):
        start(hf_tiny[1], tmp_path / "out", max_skipped_steps=1)


def test_a_rate_at_which_numbers_overflow_ends_the_run(hf_tiny, tmp_path):
    """Nothing is simulated here."""
    with pytest.raises(TrainingError, match="3 steps in a row have moved nothing"):
        start(hf_tiny[1], tmp_path / "out", learning_rate=1e30)
    assert [r["step"] for r in lines_of(tmp_path / "out") if "skipped" in r] == [2, 3, 4]


def test_one_poisoned_batch_hardly_changes_how_a_run_ends(hf_tiny, tmp_path, monkeypatch):
    how = {"examples": (noise(64, seed=0), noise(8, seed=1)), "max_steps": 30}
    how["learning_rate"] = 3e-2
    clean = start(hf_tiny[1], tmp_path / "clean", **how)
    monkeypatch.setattr(loop, "Engine", poisoning(41))
    poisoned = start(hf_tiny[1], tmp_path / "poisoned", **how)
    assert sum("skipped" in record for record in poisoned.log_history) == 1
    assert clean.eval_loss < 0.8 * clean.log_history[0]["loss"], "or there is nothing to compare"
    assert poisoned.train_loss == pytest.approx(clean.train_loss, rel=0.01)
    assert poisoned.eval_loss == pytest.approx(clean.eval_loss, rel=0.01)


@pytest.mark.parametrize("skipped", [2, 3, 4])
def test_a_run_resumed_around_a_skipped_step_is_the_unbroken_one(
    hf_tiny, tmp_path, monkeypatch, skipped
):
    """Resumed after step 3; the step before, of or after the checkpoint was skipped."""
    monkeypatch.setattr(loop, "Engine", poisoning(4 * skipped - 1))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    unbroken = start(hf_tiny[1], whole)
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    resumed = start(hf_tiny[1], parts)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        ours, theirs = (out / "checkpoint-8" / name for out in (parts, whole))
        assert ours.read_bytes() == theirs.read_bytes()
    assert kept_apart(resumed.log_history) == kept_apart(unbroken.log_history)
    assert kept_apart(lines_of(parts)) == kept_apart(lines_of(whole))


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_without_enough_memory_ends_like_one_with_enough(
    hf_tiny, tmp_path, monkeypatch, packing
):
    start(hf_tiny[1], tmp_path / "whole", packing=packing)
    monkeypatch.setattr(loop, "Engine", too_small_for(2, RuntimeError(MALLOC)))
    printed = io.StringIO()
    start(hf_tiny[1], tmp_path / "halved", printed, packing=packing)
    assert printed.getvalue().count("out of memory") == 1
    ours, theirs = (
        [r["loss"] for r in lines_of(tmp_path / name) if "loss" in r]
        for name in ("halved", "whole")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# ---- spikes ------------------------------------------------------------------------------------


def test_a_spike_gives_one_warning_and_one_record(hf_tiny, tmp_path, monkeypatch):
    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        return loss * (3 if {48, 50} & set(batch.rows) else 1), grads  # all of step 13

    monkeypatch.setattr(loop, "Engine", engine_that(change))
    printed = io.StringIO()
    history = start(hf_tiny[1], tmp_path / "out", printed, max_steps=16).log_history
    losses = {r["step"]: r["loss"] for r in history if "loss" in r}
    usual = float(np.median([losses[step] for step in range(1, 13)]))
    (spike,) = [record for record in history if "spike" in record]
    assert spike == {"step": 13, "epoch": 2.1667, "spike": losses[13], "usual": usual}
    assert spike in lines_of(tmp_path / "out")
    assert printed.getvalue().count("warning") == 1
    assert (
        f"warning   step 13: loss {losses[13]:.3f}, where {usual:.3f} was usual; if this happens "
        "often, lower training.learning_rate\n"
    ) in printed.getvalue()


@pytest.mark.parametrize("packing", [False, True])
def test_a_normal_run_has_no_spike(hf_tiny, tmp_path, packing):
    printed = io.StringIO()
    result = start(hf_tiny[1], tmp_path / "out", printed, packing, max_steps=24)
    assert not any("spike" in record for record in result.log_history)
    assert "was usual" not in printed.getvalue()
