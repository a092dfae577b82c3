"""The training loop: batches to gradients to new weights, until the last step.

Read `train` first: it is the whole story. Every step is a function of (config, data, step), so a
run that is stopped and continued takes the same steps as one that was not.
"""

import json
import math
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_qlora.backend import backend
from mlx_qlora.data.batches import Batch, Batches, make_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import DataConfig
from mlx_qlora.errors import ConfigError, TrainingError
from mlx_qlora.fields import check_choices, option, require
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.checkpoint import (
    CheckpointingConfig,
    RunState,
    forget_checkpoints_after,
    load_checkpoint,
    save_checkpoint,
)
from mlx_qlora.train.metrics import LoggingConfig, Metrics, say
from mlx_qlora.train.optim import SCHEDULES, AdamW, learning_rate
from mlx_qlora.train.step import Engine, add_grads, score
from mlx_qlora.tree import number

DEFAULT_STEPS = 1000


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to learn; names and defaults as Hugging Face users know them."""

    learning_rate: float = option(2e-4, "the rate at the end of the warmup")
    lr_scheduler_type: str = option("cosine", "what follows the warmup", choices=SCHEDULES)
    warmup_steps: int = option(100, "steps over which the rate grows from 0")
    max_steps: int | None = option(
        None, f"optimiser steps; {DEFAULT_STEPS} if num_train_epochs is not given either"
    )
    num_train_epochs: float | None = option(None, "passes over the data, instead of max_steps")
    per_device_train_batch_size: int = option(6, "rows in a micro-batch")
    gradient_accumulation_steps: int = option(3, "micro-batches in an optimiser step")
    max_grad_norm: float | None = option(1.0, "clip the gradient to this norm; null never clips")
    weight_decay: float = option(0.01, "decoupled, on every LoRA matrix")
    adam_beta1: float = option(0.9, "decay of AdamW's mean of gradients")
    adam_beta2: float = option(0.999, "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = option(1e-8, "keeps AdamW's division from 0")
    gradient_checkpointing: bool | int | str = option(
        "auto", "recompute activations: true, false, auto (as memory asks), or how many layers"
    )
    seed: int = option(0, "draws the adapter, the order of rows, the split and the dropout")

    def __post_init__(self) -> None:
        check_choices("training", self)
        if self.max_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "max_steps", DEFAULT_STEPS)
        elif self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError(
                "training.max_steps and training.num_train_epochs exclude each other; "
                f"got {self.max_steps} and {self.num_train_epochs}"
            )
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps")
        for name in (*counts, "max_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"training.{name}", "be at least 1", value)
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "num_train_epochs"):
            value = getattr(self, name)
            legal = value is None or 0 < value < math.inf
            require(legal, f"training.{name}", "be above 0 and finite", value)
        for name in ("warmup_steps", "weight_decay", "seed"):
            value = getattr(self, name)
            require(0 <= value < 2**63, f"training.{name}", "be at least 0", value)
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name}", "be in [0, 1)", value)
        word = self.gradient_checkpointing
        if isinstance(word, str):
            require(word == "auto", "training.gradient_checkpointing", "be a known word", word)

    @property
    def recompute(self) -> str | int:
        """`gradient_checkpointing` in the engine's words."""
        if isinstance(self.gradient_checkpointing, bool):
            return "all" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of one optimiser step, counted from 1."""
        peak, warmup = self.learning_rate, self.warmup_steps
        return learning_rate(step, peak, warmup, total_steps, self.lr_scheduler_type)

    def micro_batches(self, batches: Batches) -> int:
        """Micro-batches of the whole run; the last step may have fewer than the others."""
        if self.max_steps is not None:
            return self.max_steps * self.gradient_accumulation_steps
        assert batches.stop is not None
        return batches.stop

    def total_steps(self, batches: Batches) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.micro_batches(batches) // self.gradient_accumulation_steps)


@dataclass
class TrainResult:
    """What a finished run was.

    Attributes:
        output_dir: where its files are.
        steps: optimiser steps of the whole run.
        train_loss: mean nats per supervised token over the last log window.
        eval_loss: the last validation loss, if there was a validation set.
        log_history: every logged record, in order.
        seconds: wall time of this process's part, validation and checkpoints included.
        tokens_per_second: real tokens trained per second of that time.
        peak_memory_bytes: MLX's peak.
    """

    output_dir: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    log_history: list[dict[str, Any]] = field(repr=False)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0


def train(
    model: LlamaForCausalLM,
    examples: Examples,
    validation: Examples | None,
    data: DataConfig,
    training: TrainingConfig,
    checkpointing: CheckpointingConfig,
    logging: LoggingConfig,
    base: str,
    state: RunState,
    resumed: Path | None,
    console: Console,
) -> TrainResult:
    """Trains the model's LoRA weights in place.

    Args:
        model: with LoRA layers.
        examples: to learn from.
        validation: to measure the loss on at `eval_steps` and at the end; None measures nothing.
        data: how examples share rows, and whether they are shuffled.
        training: how long and how fast.
        checkpointing: where files go and when.
        logging: how often figures are written.
        base: the original Hugging Face repository, for the adapter in each checkpoint.
        state: of a run that has not begun; it carries the fingerprint into the checkpoints.
        resumed: the checkpoint to go on from, or None to begin at step 1.
        console: where the live line goes.

    Returns:
        What the run was; the model holds the trained weights.
    """
    started, trained_tokens = time.perf_counter(), 0
    batches = batches_of(examples, data, training)
    held_out = batches_of(validation, data, training) if validation else None
    total_steps = training.total_steps(batches)

    # On a CPU compiling saves next to nothing and may wait for a C++ compiler; see docs/log.md.
    engine = Engine(model, training.recompute, compiled=backend().device != "cpu")
    optimizer = AdamW(
        model.trainable_parameters(),
        training.adam_beta1,
        training.adam_beta2,
        training.adam_epsilon,
        training.weight_decay,
        training.max_grad_norm,
    )
    if resumed is not None:
        state = load_checkpoint(resumed, model, optimizer)
        say(console, f"continuing from {resumed}")

    output = Path(checkpointing.output_dir)
    forget_checkpoints_after(output, state.step)
    forget_after(output / "metrics.jsonl", state.step)
    metrics = Metrics(output / "metrics.jsonl", total_steps, state, logging, console)
    first = state.step * training.gradient_accumulation_steps
    stream = enumerate(batches.ahead(first, training.micro_batches(batches)), first)
    with metrics:
        for step in range(state.step + 1, total_steps + 1):
            rate = training.rate(step, total_steps)
            share = list(islice(stream, training.gradient_accumulation_steps))
            loss, norm, tokens = train_step(engine, optimizer, share, training.seed, rate)
            refuse_divergence(step, loss, norm)
            model.update(optimizer.tree())
            state.step = step
            trained_tokens += tokens

            epoch = batches.epoch(share[-1][0] + 1)
            record = metrics.train_step(step, epoch, loss, norm, rate, tokens)
            if record:
                state.log_history.append(record)
            is_last = step == total_steps
            if held_out and (is_last or step % checkpointing.eval_steps == 0):
                before = time.perf_counter()
                nats, _, count = score(model, held_out)
                seconds = time.perf_counter() - before
                state.log_history.append(metrics.validation(step, epoch, nats / count, seconds))
            if is_last or step % checkpointing.save_steps == 0:
                state.open_losses = list(metrics.window.losses)
                shown = trainer_state(state, training, checkpointing, logging, batches)
                save_checkpoint(model, optimizer, state, shown, base, checkpointing)

    seconds = time.perf_counter() - started
    history = state.log_history
    return TrainResult(
        output_dir=output,
        steps=total_steps,
        train_loss=[r["loss"] for r in history if "loss" in r][-1],
        eval_loss=([r["eval_loss"] for r in history if "eval_loss" in r] or [None])[-1],
        log_history=history,
        seconds=seconds,
        tokens_per_second=trained_tokens / seconds,
        peak_memory_bytes=mx.get_peak_memory(),
    )


def batches_of(examples: Examples, data: DataConfig, training: TrainingConfig) -> Batches:
    """The batches of a run, or of its validation."""
    return make_batches(
        examples,
        training.per_device_train_batch_size,
        training.seed,
        data.shuffle,
        data.packing,
        max(data.max_length, int(examples.lengths.max())),
        epochs=training.num_train_epochs,
    )


def train_step(
    engine: Engine,
    optimizer: AdamW,
    micro_batches: list[tuple[int, Batch]],
    seed: int,
    rate: float,
) -> tuple[float, float, int]:
    """One optimiser step over its micro-batches, each with its index in the run.

    Returns:
        Mean nats per supervised token, the gradient's norm before clipping, and how many real
        tokens were gone through.
    """
    weights = optimizer.tree()
    total, nats, supervised, tokens = None, mx.array(0.0), 0, 0
    for index, batch in micro_batches:
        loss, n_tokens, grads = engine(weights, batch, dropout_key(seed, index))
        total, nats = add_grads(total, grads), nats + loss
        supervised, tokens = supervised + n_tokens, tokens + batch.real_tokens
        mx.eval(total, nats)  # or the graphs of all micro-batches would be alive at once
    assert total is not None
    norm = optimizer.update(total, supervised, rate)
    mx.eval(optimizer.weights, optimizer.mean, optimizer.square, norm)
    return number(nats) / max(supervised, 1), number(norm), tokens


def refuse_divergence(step: int, loss: float, norm: float) -> None:
    """Stops a run whose weights are no numbers, before they replace a good checkpoint.

    Raises:
        TrainingError: the loss or the gradient norm is not finite.
    """
    if not math.isfinite(loss + norm):
        raise TrainingError(
            f"step {step}: loss {loss}, gradient norm {norm}: the run has diverged. "
            "Nothing of this step was saved; lower training.learning_rate and start again"
        )


def dropout_key(seed: int, micro_batch: int) -> mx.array:
    """The key of one micro-batch, from nothing but the run's seed and its index."""
    entropy = np.random.SeedSequence([seed, micro_batch]).generate_state(1, np.uint64)
    return mx.random.key(int(entropy[0]))


def forget_after(path: Path, step: int) -> None:
    """Drops lines of `metrics.jsonl` beyond a step: they will be written again, once."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a run that died, or not ours
    path.write_text("".join(kept), encoding="utf-8")


def trainer_state(
    state: RunState,
    training: TrainingConfig,
    checkpointing: CheckpointingConfig,
    logging: LoggingConfig,
    batches: Batches,
) -> dict[str, Any]:
    """`trainer_state.json` with exactly the keys that transformers' TrainerState accepts."""
    train_keys = ("loss", "grad_norm", "learning_rate", "epoch", "step")
    eval_keys = ("eval_loss", "eval_runtime", "epoch", "step")
    return {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": state.log_history[-1]["epoch"] if state.log_history else 0.0,
        "eval_steps": checkpointing.eval_steps,
        "global_step": state.step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [
            {k: record[k] for k in (eval_keys if "eval_loss" in record else train_keys)}
            for record in state.log_history
        ],
        "logging_steps": logging.logging_steps,
        "max_steps": training.total_steps(batches),
        "num_input_tokens_seen": 0,
        "num_train_epochs": math.ceil(batches.epoch(training.micro_batches(batches))),
        "save_steps": checkpointing.save_steps,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": training.per_device_train_batch_size,
        "trial_name": None,
        "trial_params": None,
    }
