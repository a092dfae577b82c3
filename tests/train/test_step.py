"""Steps that go wrong: numbers that are not finite, spikes, and a device that gives up."""

import dataclasses
import io
import itertools
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
from support.gradients import add_grads
from support.models import load_folder, random_tokens, randomise_lora
from support.training import (
    changed,
    make_examples,
    poisoned,
    recorded,
    settings,
    start,
    without_clocks,
)

from mlx_qlora import device
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.errors import TrainingError
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train import loop
from mlx_qlora.train.checkpoint import checkpoints, read_state
from mlx_qlora.train.config import batches_of
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.loop import TrainResult
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.signals import StopSignal
from mlx_qlora.train.step import Step, StepError, split, suspects

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
    MemoryError(),
]
WATCHDOG = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)
Change = Callable[[Batch, Any, Any], Any]


def engine_that(change: Change) -> type[Engine]:
    """An engine whose (loss, grads) of a batch are `change(batch, loss, grads)`."""

    class Changed(Engine):
        def __call__(self, weights, batch, dropout_key=None, before=None, *more):
            loss, n_tokens, grads = super().__call__(weights, batch, dropout_key)
            loss, grads = change(batch, loss, grads)
            return loss, n_tokens, add_grads(before, grads)

    return Changed


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


def stepper(
    model,
    engine: type[Engine] = Engine,
    console: Console | None = None,
    optimizer: type[AdamW] = AdamW,
    stop: StopSignal | None = None,
) -> Step:
    # This epsilon: Adam divides by the gradient, and would make much of the rounding of tiny ones.
    moves = optimizer(model.trainable_parameters(), epsilon=1e-4)
    quiet = console or Console(file=io.StringIO())
    return Step(engine(model, "none", compiled=False), moves, 3, stop or StopSignal(), quiet)


def numbers_of(step: Step) -> tuple[bytes, ...]:
    optimizer = step.optimizer
    buffers = optimizer.weights, optimizer.mean, optimizer.square
    return *(np.array(buffer).tobytes() for buffer in buffers), str(optimizer.step).encode()


def same_to_rounding(first: Step, second: Step) -> bool:
    for name in ("weights", "mean", "square"):
        a, b = getattr(first.optimizer, name), getattr(second.optimizer, name)
        if mx.abs(a - b).max().item() > 2e-5 * mx.abs(b).max().item():
            return False
    return True


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


@pytest.mark.parametrize("row", [12, 17])  # of the first and of the second micro-batch
def test_a_step_that_is_not_finite_has_not_been(model, row):
    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        return POISONS[poison](loss, grads) if row in batch.rows else (loss, grads)

    dirty, clean = stepper(model, engine_that(change)), stepper(model)
    for first_row in (0, 20):
        assert dirty(a_step(first_row), 1e-2).finite
        assert clean(a_step(first_row), 1e-2).finite
    before, everyone = numbers_of(dirty), [f"rows:{n}" for n in range(12, 20)]
    for poison in POISONS:
        result = dirty(a_step(12), 1e-2)
        assert not result.finite, poison
        assert numbers_of(dirty) == before, poison
        blamed = everyone[:4] if row < 16 else everyone[4:]
        assert list(result.suspects) == (blamed if "loss" in poison else everyone), poison
    assert dirty(a_step(40), 1e-2).finite
    clean(a_step(40), 1e-2)
    assert numbers_of(dirty) == numbers_of(clean) != before


def test_of_a_split_batch_only_the_piece_that_is_not_finite_is_named(model):
    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        return (loss * float("nan") if 14 in batch.rows else loss), grads

    step = stepper(model, engine_that(change))
    step.n_splits = 2
    named = step(a_step(12, packed=True), 1e-2).suspects
    assert named == ("rows:14",) * 2 + ("rows:15",) * 2


def test_a_gradient_that_is_no_number_is_looked_for_where_it_was_made():
    batch = a_batch(3, False)
    losses = [(batch, mx.array(1.5))]
    assert suspects(losses, elsewhere=False) == batch.places
    assert suspects(losses, elsewhere=True) == ("rows of another process; see its rank-*.log",)
    losses += [(a_batch(7, False), mx.array(mx.nan))]
    assert suspects(losses, elsewhere=True) == losses[1][0].places


def test_a_step_that_a_signal_abandons_has_not_been(model):
    """It comes within the second micro-batch of three."""
    stop, seen = StopSignal(), []

    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        seen.append(batch.rows[0])
        if batch.rows[0] == 12:
            stop.signum = 2
        return loss, grads

    step = stepper(model, engine_that(change), stop=stop)
    step(a_step(0), 1e-2)
    before = numbers_of(step)
    assert step([*a_step(8), a_batch(16, False)], 1e-2) is None
    assert seen == [0, 4, 8, 12]
    assert numbers_of(step) == before


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_make_the_step_of_the_batch(model, packed):
    """Rows 0 to 7 as 2 x 4, 4 x 2 and 8 x 1, with dropout."""
    steps = []
    for n in (1, 2, 4):
        steps.append(stepper(model))
        micro = [piece for batch in a_step(0, packed) for piece in split(batch, n)]
        assert len(micro) == 2 * n
        steps[-1](micro, 1e-2)
    assert all(same_to_rounding(other, steps[0]) for other in steps[1:])
    assert not same_to_rounding(stepper(model), steps[0])


# ---- memory ------------------------------------------------------------------------------------


SHORTAGES = [
    *((error, 4, 2, False) for error in OUT_OF_MEMORY),
    *((RuntimeError(MALLOC), *case) for case in ((4, 2, True), (2, 4, False), (2, 4, True))),
]


@pytest.mark.parametrize(("error", "too_many", "n_splits", "packed"), SHORTAGES)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    model, error, too_many, n_splits, packed
):
    printed = io.StringIO()
    halved = stepper(model, too_small_for(too_many, error), Console(file=printed, width=30))
    whole = stepper(model)
    for first_row in (0, 8):
        ours = halved(a_step(first_row, packed), 1e-2)
        theirs = whole(a_step(first_row, packed), 1e-2)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert ours.tokens == theirs.tokens
    assert same_to_rounding(halved, whole)
    assert halved.optimizer.step == whole.optimizer.step == 2
    assert printed.getvalue().splitlines() == [
        f"warning   out of memory: from now on at most {4 // n} of 4 rows are computed at once; "
        "the result is the same"
        for n in (2, 4)
        if n <= n_splits
    ]


def test_memory_that_ends_within_a_step_leaves_nothing_of_it(model):
    """It may end in the second micro-batch, or once in the update, which is only tried again."""
    calls = []

    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        calls.append(batch.tokens.shape[0])
        if len(calls) == 4:
            raise RuntimeError(MALLOC)
        return loss, grads

    class EndsOnce(AdamW):
        ended = False

        def update(self, *args, **keywords):
            if self.step == 1 and not self.ended:
                self.ended = True
                raise RuntimeError(MALLOC)
            return super().update(*args, **keywords)

    ended, whole = stepper(model, engine_that(change), optimizer=EndsOnce), stepper(model)
    for first_row in (0, 8):
        ended(a_step(first_row), 1e-2)
        whole(a_step(first_row), 1e-2)
    assert ended.optimizer.ended
    assert calls == [4, 4, 4, 4] + [2] * 4
    assert ended.optimizer.step == 2
    assert same_to_rounding(ended, whole)


def test_no_memory_to_move_the_weights_ends_the_run_with_a_remedy(model):
    class Starved(AdamW):
        def update(self, *_, **__):
            raise RuntimeError(MALLOC)

    step = stepper(model, optimizer=Starved)
    before = numbers_of(step)
    message = "^out of memory while the weights are updated; lower lora.r"
    with pytest.raises(TrainingError, match=message):
        step(a_step(0), 1e-2)
    assert numbers_of(step) == before and step.n_splits == 1


def test_no_more_rows_are_split_than_there_are(model):
    printed = io.StringIO()
    step = stepper(model, too_small_for(2, RuntimeError(MALLOC)), Console(file=printed, width=200))
    batch = a_batch(0, False)
    names = ("tokens", "labels", "documents", "places", "rows")
    step([dataclasses.replace(batch, **{name: getattr(batch, name)[:3] for name in names})], 1e-2)
    assert re.findall("at most . of 3 rows are", printed.getvalue()) == [
        "at most 2 of 3 rows are",
        "at most 1 of 3 rows are",
    ]


def test_pieces_that_are_computed_anyway_are_halved_when_memory_ends(model):
    """A device that computes 12 positions at once has cut 4 rows of 24 into pairs already."""
    few = dataclasses.replace(device.current(), chunk_positions=12)
    halved = too_small_for(2, RuntimeError(MALLOC))
    with device.use(few):
        step = stepper(model, halved)
        assert [len(piece.tokens) for piece in step.split(a_batch(0, False))] == [2, 2]
        step([a_batch(0, False)], 1e-2)
    assert step.n_splits == 4, "one attempt in between, and not two"


def test_a_single_row_that_does_not_fit_ends_the_run_with_a_remedy(model):
    step = stepper(model, too_small_for(1, RuntimeError(MALLOC)))
    before = numbers_of(step)
    with pytest.raises(TrainingError) as raised:
        step(a_step(0), 1e-2)
    assert str(raised.value) == (
        "out of memory with a single row; lower data.max_length, set "
        f"training.gradient_checkpointing=true, or lower lora.r ({MALLOC})"
    )
    assert step.n_splits == 4
    assert numbers_of(step) == before


@pytest.mark.parametrize("rows", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_pieces_are_whole_rows_in_order(rows, n):
    tokens = mx.array(random_tokens(rows, 8))
    documents = np.array([(b, *span) for b in range(rows) for span in ((0, 5), (5, 7))], np.int32)
    places = tuple(f"{b}-{i}" for b in range(rows) for i in range(2))
    made = split(Batch(tokens, tokens, documents, places, tuple(range(7, 7 + rows))), n)
    sizes = [part.tokens.shape[0] for part in made]
    assert min(n, rows) <= len(made) <= rows and sum(sizes) == rows
    assert max(sizes) <= -(-rows // n)
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
    step = stepper(model, too_small_for(1, RuntimeError(words)))
    with pytest.raises(TrainingError) as raised:
        step(a_step(0), 1e-2)
    assert step.n_splits == 1, "splitting is for want of memory"
    message = str(raised.value)
    assert message.startswith(f"the device failed: {words}")
    hint = message.removeprefix(f"the device failed: {words}")
    assert (remedy in hint) if remedy else hint == ""


@pytest.mark.parametrize("lost", [("loss", "gradient"), ("gradient",)])
def test_a_gradient_of_nothing_is_a_device_that_lost_its_work(model, lost):
    """Metal may lose a command buffer without an error; its arrays stay zeros."""

    calls = itertools.count()

    def change(batch: Batch, loss: Any, grads: Any) -> Any:
        # The gradient alone is lost once, in both micro-batches of a step; with the loss, always.
        is_lost = "loss" in lost or next(calls) < 2
        grads = tree_map(mx.zeros_like, grads) if is_lost else grads
        return (loss * 0 if "loss" in lost else loss), grads

    healthy, step = stepper(model), stepper(model, engine_that(change))
    healthy(a_step(0), 1e-2)
    step.optimizer = healthy.optimizer  # with moments that would go on moving the weights
    before = numbers_of(step)
    with pytest.raises(StepError) as raised:
        step(a_step(8), 1e-2)
    loss = "0" if "loss" in lost else r"\d\.\d+"
    words = rf"the device failed: the gradient of \d+ tokens is exactly 0, at a loss of {loss}"
    assert re.fullmatch(words, str(raised.value)) and raised.value.again
    assert numbers_of(step) == before


def test_a_gradient_that_is_nothing_again_is_what_the_rows_give(model):
    """Queries that see one key learn nothing, and small numbers are 0 in float16."""
    step = stepper(model, engine_that(lambda _, loss, g: (loss, tree_map(mx.zeros_like, g))))
    with step.console.capture() as said:
        result = step(a_step(0), 1e-2)
    assert result is not None and result.grad_norm == 0
    assert "nothing to learn in a step" in said.get()


def test_a_loss_of_nothing_is_what_a_certain_model_has(model):
    """Where the target's probability rounds to 1, the gradient is small and not 0."""
    step = stepper(model, engine_that(lambda batch, loss, grads: (loss * 0, grads)))
    result = step(a_step(0), 1e-2)
    assert result is not None and result.finite and result.loss == 0
    assert step.optimizer.step == 1


def test_memory_is_limited_before_a_run(monkeypatch, hf_tiny, tmp_path):
    working_set = device.facts()["working_set_bytes"]
    before, temporary = mx.set_cache_limit(12345), []
    limit_memory = device.limit_memory
    try:
        with monkeypatch.context() as patch:
            patch.setattr(device, "limit_memory", lambda n: (temporary.append(n), limit_memory(n)))
            run(hf_tiny[1], tmp_path / "out", max_steps=1)
        share = device.current().cache_share
        assert mx.set_cache_limit(before) == int(share * temporary[0]) > 0
    finally:
        mx.set_cache_limit(before)

    for kind in (device.METAL, device.CUDA, device.CPU):
        wired, limits, caches = [], [], []
        with device.use(kind), monkeypatch.context() as patch:
            patch.setattr(mx, "set_wired_limit", wired.append)
            patch.setattr(mx, "set_memory_limit", limits.append)
            patch.setattr(mx, "set_cache_limit", caches.append)
            for n in (1000, 10 * working_set):
                device.limit_memory(n)
        wired, limits = wired[:1], limits[:1]
        assert wired == limits == ([working_set] if kind is device.METAL else [])
        assert caches == [int(1000 * kind.cache_share), working_set // 8]


# ---- whole runs --------------------------------------------------------------------------------


def noise(n: int, seed: int) -> Examples:
    """Tokens drawn from eight: once a model knows which, it can learn no more."""
    drawn = np.random.default_rng(seed).integers(100, 108, (n, 32)).astype(np.int32)
    return Examples.of(Example(row, np.arange(32) > 0, i) for i, row in enumerate(drawn))


def run(folder: Path, output: Path, *, printed: io.StringIO | None = None, **fields) -> TrainResult:
    """Steps of 2 micro-batches of 2 rows, in order: step k has rows 4 k - 4 to 4 k - 1."""
    console = Console(file=printed or io.StringIO(), width=60)
    sizes = {"per_device_train_batch_size": 2, "shuffle": False, "max_skipped_steps": 3}
    fields = {"examples": make_examples(40), "eval_steps": 100, **sizes, **fields}
    return start(folder, output, console, **fields)[1]


def adapter(output: Path, step: int) -> bytes:
    return (output / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()


def test_a_skipped_step_is_recorded_with_its_rows(hf_tiny, tmp_path):
    from transformers import TrainerState

    out, printed, examples = tmp_path / "out", io.StringIO(), poisoned(make_examples(40), 10)
    result = run(hf_tiny[1], out, printed=printed, examples=examples)
    config = settings(out, per_device_train_batch_size=2, shuffle=False)
    named = list(batches_of(examples, config.data, config.training)[5].places)
    assert named == ["rows:11", "rows:12"], "the micro-batch of rows 10 and 11, counted from 1"
    reason = "loss nan, gradient norm nan"
    skipped = [record for record in recorded(out) if "skipped" in record]
    assert skipped == [{"step": 3, "epoch": 0.3, "skipped": reason, "rows": named}]
    assert skipped[0] in result.log_history
    assert [r["step"] for r in result.log_history if "loss" in r] == [1, 2, 4, 5, 6, 7, 8]
    assert f"step 3 skipped: {reason}; rows: {', '.join(named)}\n" in printed.getvalue()
    assert printed.getvalue().count("skipped") == 1

    last = out / "checkpoint-8"
    shown = TrainerState.load_from_json(str(last / "trainer_state.json")).log_history
    assert [record["step"] for record in shown] == [1, 2, 4, 5, 6, 7, 8, 8]
    assert not any(record.keys() & {"skipped", "rows"} for record in shown)
    assert (read_state(last)["updates"], read_state(last)["step"]) == (7, 8)
    assert adapter(out, 3) != adapter(out, 6)


def test_too_many_skipped_steps_in_a_row_end_the_run(hf_tiny, tmp_path):
    out = tmp_path / "out"
    bad = poisoned(make_examples(40), 0, 4, 12, 16, 20)  # of steps 1, 2, 4, 5 and 6
    message = (
        r"^step 6: loss nan, gradient norm nan, and 3 steps in a row were skipped "
        r"\(training\.max_skipped_steps\); lower training\.learning_rate, or look at these rows: "
        rf"rows:21, rows:22\. {re.escape(str(out))}/checkpoint-3 is the last checkpoint$"
    )
    with pytest.raises(TrainingError, match=message):
        run(hf_tiny[1], out, examples=bad)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3"]
    assert read_state(out / "checkpoint-3")["step"] == 3  # every checksum fits
    assert [r["step"] for r in recorded(out) if "skipped" in r] == [1, 2, 4, 5, 6]

    assert run(hf_tiny[1], out).steps == 8  # the rows were repaired
    assert [r["step"] for r in recorded(out) if "skipped" in r] == [1, 2]


def test_a_rate_at_which_numbers_overflow_ends_the_run(hf_tiny, tmp_path):
    message = r"3 steps in a row were skipped .*lower training.*No checkpoint was written yet$"
    with pytest.raises(TrainingError, match=message):
        run(hf_tiny[1], tmp_path / "out", learning_rate=1e30, save_steps=9)
    assert [r["step"] for r in recorded(tmp_path / "out") if "skipped" in r] == [2, 3, 4]


@pytest.mark.parametrize(("skipped", "logging_steps"), [(2, 1), (3, 1), (4, 1), (4, 4)])
def test_a_run_resumed_around_a_skipped_step_is_the_unbroken_one(
    hf_tiny, tmp_path, skipped, logging_steps
):
    """Resumed after step 3; the step before, of or after the checkpoint was skipped.

    Logged every fourth step, the record of a step that was skipped has the gradient's norm of the
    step before it, which the checkpoint carries on.
    """
    fields: dict[str, Any] = {"examples": poisoned(make_examples(40), 4 * skipped - 1)}
    fields["logging_steps"] = logging_steps
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    unbroken = run(hf_tiny[1], whole, **fields)
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    resumed = run(hf_tiny[1], parts, **fields)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        ours, theirs = (out / "checkpoint-8" / name for out in (parts, whole))
        assert ours.read_bytes() == theirs.read_bytes()
    assert without_clocks(resumed.log_history) == without_clocks(unbroken.log_history)
    assert without_clocks(recorded(parts)) == without_clocks(recorded(whole))


def test_a_run_without_enough_memory_ends_like_one_with_enough(hf_tiny, tmp_path, monkeypatch):
    run(hf_tiny[1], tmp_path / "whole")
    monkeypatch.setattr(loop, "Engine", too_small_for(2, RuntimeError(MALLOC)))
    printed = io.StringIO()
    run(hf_tiny[1], tmp_path / "split", printed=printed)
    assert printed.getvalue().count("out of memory") == 1
    ours, theirs = (
        [r["loss"] for r in recorded(tmp_path / name) if "loss" in r] for name in ("split", "whole")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_memory_that_ends_in_a_validation_is_a_training_error(hf_tiny, tmp_path, monkeypatch):
    def score(*_):
        raise RuntimeError(MALLOC)

    monkeypatch.setattr(loop, "score", score)
    with pytest.raises(TrainingError, match="out of memory with a single row"):
        run(hf_tiny[1], tmp_path / "out")


# ---- spikes ------------------------------------------------------------------------------------


def test_a_spike_gives_one_warning_and_one_record(hf_tiny, tmp_path):
    draw, out, printed = np.random.default_rng(0), tmp_path / "out", io.StringIO()
    rows = {i: lambda tokens: np.full(len(tokens), 100) for i in range(64)}  # soon learned
    rows |= {i: lambda tokens: draw.integers(0, 300, len(tokens)) for i in range(48, 52)}
    examples = changed(noise(64, 0), rows)  # 48 to 51 are all of step 13
    history = run(hf_tiny[1], out, printed=printed, examples=examples, max_steps=16).log_history
    losses = {r["step"]: r["loss"] for r in history if "loss" in r}
    usual = float(np.median([losses[step] for step in range(1, 13)]))
    (spike,) = [record for record in history if "spike" in record]
    assert spike == {"step": 13, "epoch": 0.8125, "spike": losses[13], "usual": usual}
    assert spike in recorded(out)
    assert printed.getvalue().count("warning") == 1
    assert (
        f"warning   step 13: loss {losses[13]:.3f}, where {usual:.3f} was usual; if this happens "
        "often, lower training.learning_rate\n"
    ) in printed.getvalue()


def test_a_normal_run_has_no_spike(hf_tiny, tmp_path):
    printed = io.StringIO()
    fields = {"max_steps": 24, "shuffle": True, "examples": make_examples(24)}
    result = run(hf_tiny[1], tmp_path / "out", printed=printed, **fields)
    assert not any("spike" in record for record in result.log_history)
    assert "was usual" not in printed.getvalue()
