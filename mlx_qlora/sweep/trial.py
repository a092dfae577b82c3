"""One trial of a sweep: up to a rung, from where it stood, and measured there."""

import hashlib
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_qlora import backend, blas
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.several import adapter_names, detach
from mlx_qlora.config import RunConfig
from mlx_qlora.console import say, warn
from mlx_qlora.data.batches import collate
from mlx_qlora.data.examples import Examples
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.preparation import Prepared, prepare
from mlx_qlora.record import deciding_values, write_record
from mlx_qlora.sweep.compare import Losses
from mlx_qlora.train.checkpoint import disk_errors, load_checkpoint, restore_set_aside, step_of
from mlx_qlora.train.interruption import Interrupted, Interruption
from mlx_qlora.train.loop import Run
from mlx_qlora.train.outcome import StepError
from mlx_qlora.train.score import score_rows

ROWS = 8  # validation examples that are scored at once


@dataclass(frozen=True)
class Ground:
    """What all trials stand on.

    Attributes:
        model: the frozen base; between trials it has no LoRA layers.
        examples: to learn from.
        validation: what every trial is measured on.
        fingerprint: hashes of the model and the data.
    """

    model: LlamaForCausalLM
    examples: Examples
    validation: Examples
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """A trial at a rung, as its record on disk has it.

    Attributes:
        key: hash of the trial's config, model and data: what decides its figures.
        step: optimiser steps done.
        train_loss: mean nats per supervised token of the last steps, at most 20.
        nats: of each validation example; empty if the trial failed.
        tokens: supervised ones of each validation example.
        failed: why it cannot go on, or nothing.
        tokens_per_second: real tokens trained per second by the process that finished the rung;
            None if only the validation was left to it.
        peak_memory_bytes: MLX's peak since then.
        seconds: wall time since then, of the process that finished the rung.
    """

    key: str
    step: int
    train_loss: float
    nats: list[float]
    tokens: list[int]
    failed: str = ""
    tokens_per_second: float | None = None
    peak_memory_bytes: int = 0
    seconds: float = 0.0

    @property
    def losses(self) -> Losses:
        """For comparisons."""
        return Losses(np.array(self.nats), np.array(self.tokens))

    @property
    def validation_loss(self) -> float:
        """Nats per token; infinite if the trial failed."""
        return math.inf if self.failed else self.losses.mean


def recorded(config: RunConfig, step: int, ground: Ground) -> Measured | None:
    """What an earlier sweep has measured of this very trial at this step, or None."""
    path = _record(config, step)
    try:
        found = Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or a damaged one: it is measured again
        return None
    same = found.key == _key(config, ground)
    return found if same and (found.failed or len(found.nats) == len(ground.validation)) else None


def measure(config: RunConfig, step: int, ground: Ground, console: Console) -> Measured:
    """Trains a trial up to a step, from its newest checkpoint if it has one, and scores it.

    Args:
        config: the trial's, whose output folder is its own.
        step: where to stop.
        ground: the shared base and data; the base is bare again afterwards, and unchanged.
        console: where progress goes.

    Raises:
        Interrupted: a signal came, and what was done is saved.
        TrainingError: the disk failed.
    """
    output, model, began = Path(config.checkpointing.output_dir), ground.model, time.perf_counter()
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        restore_set_aside(output)
    mx.reset_peak_memory()
    failed, again, losses, speed = "", False, Losses(np.zeros(0), np.zeros(0)), None
    try:
        prepared = prepare(model, ground.examples, ground.validation, config)
        for damage in prepared.damaged:
            warn(console, f"{damage}: the checkpoint before it is used")
        write_record(output, prepared.config, prepared.state.fingerprint, ground.examples)
        run, speed = _advance(prepared, step, ground, console)
        train_loss = statistics.fmean(run.state.recent_losses or [math.nan])
        losses = per_example(model, ground.validation)
        if not np.isfinite(losses.nats).all():
            failed = f"step {step}: the validation loss is not finite"
    except StepError as error:  # the other trials go on; one that the device gave up may be tried
        failed, again, train_loss = str(error), error.again, math.nan
    finally:
        bare(model)
    found = Measured(
        _key(config, ground),
        step,
        train_loss,
        [] if failed else losses.nats.tolist(),
        [] if failed else losses.tokens.tolist(),
        failed,
        speed,
        mx.get_peak_memory(),
        time.perf_counter() - began,
    )
    if not again:
        with disk_errors(output), staged(output) as staging:
            text = json.dumps(asdict(found)) + "\n"
            (staging / _record(config, step).name).write_text(text, encoding="utf-8")
    return found


def _advance(
    prepared: Prepared, until: int, ground: Ground, console: Console
) -> tuple[Run, float | None]:
    """Takes the steps that `train.loop.train` would take, but stops before the last one.

    Raises:
        StepError: one cannot be taken, or too many in a row moved nothing.
        Interrupted: a signal came, and what was done is saved.

    Returns:
        The run, and real tokens per second if any were trained.
    """
    config, state, resumed = prepared.config, prepared.state, prepared.resumed
    backend.limit_memory()
    sections = config.data, config.training, config.checkpointing, config.logging
    run = Run(ground.model, ground.examples, None, *sections, prepared.base, console)
    # A checkpoint from behind this rung is of a sweep with fewer rungs; its steps come again.
    if resumed is not None and step_of(resumed) <= until:
        state = load_checkpoint(resumed, ground.model, run.optimizer)
        say(console, f"continuing from {resumed}")
    before, began = state.tokens, time.perf_counter()
    with (
        Interruption() as interruption,
        disk_errors(run.output),
        run.begin(state),
        blas.threads(1),
    ):
        run.take_steps(until, interruption)
        saved = run.save_if_new()
        if interruption.signum is not None:
            raise Interrupted(interruption.signum, saved)
    tokens = state.tokens - before
    return run, tokens / max(time.perf_counter() - began, 1e-9) if tokens else None


def per_example(model: LlamaForCausalLM, examples: Examples) -> Losses:
    """What each example costs the model, without dropout."""
    found = []
    for first in range(0, len(examples), ROWS):
        some = range(first, min(first + ROWS, len(examples)))
        found.append(score_rows(model, collate([[examples[i]] for i in some])))
    nats, tokens = ([getattr(part, name) for part in found] for name in ("nats", "tokens"))
    return Losses(np.concatenate(nats), np.concatenate(tokens))


def bare(model: LlamaForCausalLM) -> None:
    """Takes all LoRA layers out of a model: the base's own linears stand there again."""
    for name in adapter_names(model):
        detach(model, name)
    mx.clear_cache()


def _record(config: RunConfig, step: int) -> Path:
    return Path(config.checkpointing.output_dir) / f"validation-{step}.json"


def _key(config: RunConfig, ground: Ground) -> str:
    # What a run learns does not depend on it, but whether a trial failed does.
    patience = config.training.max_skipped_steps
    decides = {"config": deciding_values(config), "patience": patience, **ground.fingerprint}
    # `prepare` names the base where the user did not; that is hashed with the model already.
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def in_folder(config: RunConfig, folder: Path) -> RunConfig:
    """The same run, with its files elsewhere."""
    return replace(config, checkpointing=replace(config.checkpointing, output_dir=str(folder)))
