"""The training loop: batches to gradients to new weights, until the last step.

Read `train` first: it is the whole story. Every step is a function of (config, data, step), so a
run that is stopped and continued takes the same steps as one that was not.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_qlora import device
from mlx_qlora.cpu import blas
from mlx_qlora.data.batches import Batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import DataConfig
from mlx_qlora.distributed import processes
from mlx_qlora.errors import ConfigError, ProcessError, TrainingError, say, warn
from mlx_qlora.folders import disk_errors
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.allreduce import from_first, score_of_all, weights_from_first
from mlx_qlora.train.checkpoint import (
    CheckpointingConfig,
    RunState,
    best_eval,
    checkpoints,
    last_checkpoint,
    load_checkpoint,
    load_weights,
    remove_leftovers,
    rotate,
    save_checkpoint,
    trainer_state,
    validations_since_best,
    was_validated,
)
from mlx_qlora.train.config import TrainingConfig, batches_of
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.metrics import LoggingConfig, Metrics, rewrite_metrics, trackers
from mlx_qlora.train.optim import AdamW, flatten
from mlx_qlora.train.score import Score, score
from mlx_qlora.train.signals import Interrupted, Interruption
from mlx_qlora.train.step import Outcome, StepError, Update, split

# ---- how long a run is ---------------------------------------------------------------------------


MANY, USUAL = 20, 3  # passes that learn rows by heart, and that are a start


@dataclass(frozen=True)
class Course:
    """The length of a run.

    Attributes:
        steps: optimiser steps.
        examples: to learn from.
        passes: how often each of them is seen, as a fraction.
        warmup_steps: through which the rate rises.
        by_passes: whether the config says how many passes, and not how many steps.
    """

    steps: int
    examples: int
    passes: float
    warmup_steps: int
    by_passes: bool = False

    def __str__(self) -> str:
        passes = f"{self.passes:,.0f}" if self.passes >= 10 else f"{self.passes:.2f}"
        return f"{self.steps:,} steps: {passes} passes over {self.examples:,} examples"

    @property
    def warnings(self) -> list[str]:
        """What is most likely not meant, with the remedy."""
        found = []
        if self.warmup_steps >= self.steps > 1:
            found.append(
                f"training.warmup_steps={self.warmup_steps} is all of the run's {self.steps:,} "
                "steps, so the learning rate hardly gets where it should; set "
                f"training.warmup_steps={self.steps // 10}"
            )
        if self.passes > MANY:
            usual = math.ceil(self.steps / self.passes * USUAL)
            fewer = f"num_train_epochs={USUAL}" if self.by_passes else f"max_steps={usual}"
            found.append(
                f"{self.passes:,.0f} passes over {self.examples:,} examples learn them by heart; "
                f"set training.{fewer}, which is {USUAL} passes, or collect more rows"
            )
        return found


def course_of(training: TrainingConfig, batches: Batches, examples: int) -> Course:
    """How long a run on these batches is."""
    passes = batches.epoch(training.micro_batches(batches))
    by_passes = training.num_train_epochs is not None
    return Course(training.total_steps(batches), examples, passes, training.warmup_steps, by_passes)


# ---- skipped steps and loss spikes ---------------------------------------------------------------


# A step's loss this many times above the median of the last ones, and this far above their usual
# spread, is called a spike.
SPIKE, SPREADS, REMEMBERED = 1.5, 8.0, 20


def note_skipped(
    state: RunState, outcome: Outcome, epoch: float, most: int, metrics: Metrics, console: Console
) -> None:
    """Keeps which rows made a step that moved nothing.

    Args:
        state: of the run; the step is counted there.
        outcome: of the step.
        epoch: where in the data it was.
        most: `max_skipped_steps`: so many in a row end the run.
        metrics: where it is recorded.
        console: where it is said.

    Raises:
        StepError: there were so many.
    """
    state.skipped_in_a_row += 1
    what = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}"
    rows = list(outcome.suspects)
    record = {"step": state.step, "epoch": round(epoch, 4), "skipped": what, "rows": rows}
    state.log_history.append(metrics.event(record))
    shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    warn(console, f"step {state.step}: {what}: skipped. Rows: {shown}")
    if state.skipped_in_a_row >= most:
        raise StepError(
            f"step {state.step}: {what}: {state.skipped_in_a_row} steps in a row have moved "
            "nothing (training.max_skipped_steps); lower training.learning_rate, or look at "
            f"these rows: {shown}",
            again=False,
        )


def note_loss(
    state: RunState, outcome: Outcome, epoch: float, metrics: Metrics, console: Console
) -> None:
    """Remembers a step's loss, and says so where it is far above the last ones."""
    state.skipped_in_a_row, recent = 0, state.recent_losses
    state.recent_losses = [*recent, outcome.loss][-REMEMBERED:]
    if len(recent) < REMEMBERED // 2:
        return
    usual = statistics.median(recent)
    spread = statistics.median(abs(loss - usual) for loss in recent)
    if outcome.loss > max(SPIKE * usual, usual + SPREADS * spread):
        record = {"step": state.step, "epoch": round(epoch, 4), "spike": outcome.loss}
        state.log_history.append(metrics.event({**record, "usual": usual}))
        warn(
            console,
            f"step {state.step}: loss {outcome.loss:.3f}, where {usual:.3f} was usual; if this "
            "happens often, lower training.learning_rate",
        )


# ---- the result ----------------------------------------------------------------------------------


@dataclass
class TrainResult:
    """What a finished run was.

    Attributes:
        output_dir: where its files are.
        steps: optimiser steps of the whole run.
        train_loss: mean nats per supervised token over the last log window.
        eval_loss: the last validation loss, if there was a validation set; the best one, if the
            run ended with the best weights.
        log_history: every logged record, in order.
        seconds: wall time of this process's part, validation and checkpoints included.
        tokens_per_second: real tokens trained per second of that time.
        peak_memory_bytes: MLX's peak.
        best_step: step of the best validation loss, if there was one.
        stopped_early: whether patience ended the run before its last step.
        test_scores: of the test rows, "before" and "after"; empty where there were none.
        html: what a notebook shows, once a report was written; see `mlx_qlora.report`.
    """

    output_dir: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    log_history: list[dict[str, Any]] = field(repr=False)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    best_step: int | None = None
    stopped_early: bool = False
    test_scores: dict[str, Any] = field(default_factory=dict)
    html: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(
        cls,
        output: Path,
        history: list[dict[str, Any]],
        step: int,
        total_steps: int,
        ends_with_best: bool,
        seconds: float,
        tokens: int,
    ) -> "TrainResult":
        """What a run was that has just ended.

        Args:
            output: its folder.
            history: its records.
            step: the last one.
            total_steps: that it would have gone on to.
            ends_with_best: whether its weights are those of the best validation, if there is one.
            seconds: wall time of this process's part.
            tokens: real ones, trained in that time.
        """
        best = best_eval(history)
        losses, evals = ([r[key] for r in history if key in r] for key in ("loss", "eval_loss"))
        eval_loss = evals[-1] if evals else None
        return cls(
            output_dir=output,
            steps=step,
            train_loss=losses[-1] if losses else float("nan"),
            eval_loss=best[1] if best and ends_with_best else eval_loss,
            log_history=history,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            best_step=best[0] if best else None,
            stopped_early=step < total_steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the history, as JSON has them."""
        figures = dataclasses.asdict(self)
        return {k: v for k, v in figures.items() if k not in ("log_history", "html")}

    def _repr_html_(self) -> str | None:
        """The summary and the plots in a notebook; None lets it show the text."""
        return self.html or None


# ---- the loop ------------------------------------------------------------------------------------


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

    Raises:
        TrainingError: the run cannot go on; the last checkpoint is whole.
        Interrupted: a signal came, and what was done is saved.
    """
    started = time.perf_counter()
    device.limit_memory()
    run = Run(model, examples, validation, data, training, checkpointing, logging, base, console)
    course = course_of(training, run.batches, len(examples))
    say(console, f"          {course}")
    for warning in course.warnings:
        warn(console, warning)
    if resumed is not None:
        state = load_checkpoint(resumed, model, run.optimizer)
        say(console, f"continuing from {resumed}")
    state = from_first(state, run.optimizer, run.processes)
    model.update(run.optimizer.tree())
    done_before = state.tokens
    with (
        Interruption(run.processes.size > 1) as interruption,
        disk_errors(run.output, lambda: last_checkpoint(run.output)),
        run.processes.agree(lambda: run.begin(state)),
        blas.threads(1),  # what parts side by side have; see there
        run.kept_if_others_go(),
    ):
        try:
            if run.owes_validation():
                run.after_step(interruption)
            run.take_steps(run.total_steps, interruption)
        except StepError as error:
            ended = TrainingError(f"{error}. {run.kept()}")
            ended.is_shared = not error.again  # numbers are everybody's, a device is one's own
            raise ended from None
        if interruption.signum is not None:
            # Together: a launcher ends all where one has left, and the first may still be writing.
            saved = run.processes.agree(run.save_if_new)
            stop = Interrupted(interruption.signum, saved)
            if not run.processes.is_first:
                stop.args = ()  # the first one tells it, who knows what was saved
            raise stop
        run.end()
    return run.result(time.perf_counter() - started, state.tokens - done_before)


class Run:
    """The parts of a run, and what happens between its steps."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        examples: Examples,
        validation: Examples | None,
        data: DataConfig,
        training: TrainingConfig,
        checkpointing: CheckpointingConfig,
        logging: LoggingConfig,
        base: str,
        console: Console,
    ) -> None:
        self.model, self.base, self.console = model, base, console
        self.processes = processes()
        self.data, self.training = data, training
        self.checkpointing, self.logging = checkpointing, logging
        self.output = Path(checkpointing.output_dir)
        self.batches = batches_of(examples, data, training, self.processes)
        self.held_out = batches_of(validation, data, training) if validation else None
        self.total_steps = training.total_steps(self.batches)
        compiled = training.compile
        if compiled == "auto":
            compiled = device.current().compiles
        self.engine = Engine(model, training.recompute, compiled=bool(compiled))
        self.optimizer = AdamW(
            model.trainable_parameters(),
            training.adam_beta1,
            training.adam_beta2,
            training.adam_epsilon,
            training.weight_decay,
            training.max_grad_norm,
            model.lora_config.loraplus_lr_ratio,
        )
        self._update: Update | None = None

    def begin(self, state: RunState) -> Metrics:
        """Clears what a run that goes on from here will write anew, and opens the metrics.

        Raises:
            ConfigError: a tracker of `logging.report_to` cannot begin.
        """
        self.state, path = state, self.output / "metrics.jsonl"
        logging = self.logging
        if not self.processes.is_first:
            nowhere = Path(os.devnull)
            self.metrics = Metrics(nowhere, self.total_steps, state, logging, self.console, [])
            return self.metrics
        told = trackers(
            list(logging.report_to),
            self.output,
            logging.run_name,
            logging.project,
            self.settings(),
            state.log_history,
            state.step,
        )  # first: it may fail, and nothing was removed yet
        remove_leftovers(self.output, state.step)
        rotate(self.output, state, self.checkpointing.save_total_limit)
        rewrite_metrics(path, state.log_history)
        self.metrics = Metrics(path, self.total_steps, state, logging, self.console, told)
        return self.metrics

    def settings(self) -> dict[str, dict[str, Any]]:
        """Section -> field -> value, for trackers."""
        model = {**self.state.config.get("model", {}), "base_model_name_or_path": self.base}
        sections = {
            "lora": self.model.lora_config,
            "data": self.data,
            "training": self.training,
            "checkpointing": self.checkpointing,
            "logging": self.logging,
        }
        return {"model": model, **{name: asdict(section) for name, section in sections.items()}}

    def take_steps(self, until: int, interruption: Interruption) -> None:
        """Takes steps up to this one, or until a signal comes or patience is at its end.

        Raises:
            StepError: one cannot be taken, or too many in a row moved nothing.
        """
        waves, state = self.training.gradient_accumulation_steps, self.state
        end = min(until * waves, self.training.micro_batches(self.batches))
        stream = self.batches.ahead(state.step * waves, end)
        while state.step < until and not self.is_done() and interruption.signum is None:
            share = list(islice(stream, waves))
            rate = self.training.rate(state.step + 1, self.total_steps)
            outcome = self.update(interruption).step(share, rate)
            if outcome is None:
                break  # a signal came within the step: it will be taken again
            interruption.signum = interruption.signum or outcome.signum
            self.note(outcome, rate)
            self.after_step(interruption)

    def update(self, interruption: Interruption) -> Update:
        """The taker of steps, made once: it remembers how far batches had to be halved."""
        if self._update is None:
            self._update = Update(
                self.engine,
                self.optimizer,
                self.training.seed,
                interruption,
                self.console,
                self.processes,
            )
        return self._update

    def note(self, outcome: Outcome, rate: float) -> None:
        """Counts a step, and writes what it was where that is due.

        Raises:
            StepError: too many steps in a row moved nothing.
        """
        state = self.state
        state.step += 1
        state.rows += outcome.rows
        state.tokens += outcome.tokens
        state.updates = self.optimizer.step
        epoch = state.rows / self.batches.rows_per_epoch
        if outcome.finite:
            self.model.update(self.optimizer.tree())
            note_loss(state, outcome, epoch, self.metrics, self.console)
        else:
            most = self.training.max_skipped_steps
            note_skipped(state, outcome, epoch, most, self.metrics, self.console)
        record = self.metrics.train_step(state.step, epoch, outcome, rate)
        if record:
            state.log_history.append(record)
        state.open_losses = list(self.metrics.window.losses)
        state.open_grad_norm = self.metrics.window.grad_norm

    def owes_validation(self) -> bool:
        """Whether the last step's validation was due and not done: a signal came before it."""
        step, due = self.state.step, self._is_due(self.checkpointing.eval_steps)
        return (
            self.held_out is not None
            and step > 0
            and due
            and not was_validated(self.state.log_history, step)
        )

    def after_step(self, interruption: Interruption) -> None:
        """Validation and checkpoint, where they are due."""
        best = False
        if self.held_out is not None and self._is_due(self.checkpointing.eval_steps):
            best = self.validate(interruption)
            if interruption.signum is not None:
                return  # half a validation counts for nothing: it is done when the run goes on
        due = self._is_due(self.checkpointing.save_steps) or self.is_done()
        if due or (best and self.checkpointing.load_best_model_at_end):
            self.processes.agree(self.save)  # the others wait as long as the disk needs

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def validate(self, interruption: Interruption) -> bool:
        """Measures the validation loss; returns whether it is the best so far."""
        assert self.held_out is not None
        before = time.perf_counter()
        own = self._score(self.held_out, interruption)
        if interruption.signum is not None:
            return False
        seconds = time.perf_counter() - before
        total, signum = score_of_all(own, self.processes, seconds, interruption.came)
        interruption.signum = interruption.signum or signum
        state, seconds = self.state, time.perf_counter() - before
        epoch = state.rows / self.batches.rows_per_epoch
        state.log_history.append(self.metrics.validation(state.step, epoch, total, seconds))
        best = best_eval(state.log_history)
        return best is not None and best[0] == state.step

    def _score(self, held_out: Batches, interruption: Interruption) -> Score:
        """The sums over a pass, of smaller batches where they do not fit into memory."""
        update = self.update(interruption)
        while True:
            share = islice(held_out, self.processes.rank, None, self.processes.size)
            batches = (part for whole in share for part in split(whole, update.parts))
            try:
                return score(self.model, (b for b in batches if interruption.signum is None))
            except (RuntimeError, MemoryError) as error:
                reason = str(error) or "out of memory"
            update.shrink(held_out.batch_size, reason)

    def save(self) -> Path | None:
        """Writes a checkpoint of this step, in the first process."""
        if not self.processes.is_first:
            return None
        shown = trainer_state(
            self.state, self.training, self.checkpointing, self.logging.logging_steps, self.batches
        )
        return save_checkpoint(
            self.model, self.optimizer, self.state, shown, self.base, self.checkpointing
        )

    def save_if_new(self) -> Path | None:
        """The checkpoint of this step, written if it is not there; None before the first step."""
        path = self.output / f"checkpoint-{self.state.step}"
        return path if path.exists() else self.save() if self.state.step else None

    @contextmanager
    def kept_if_others_go(self) -> Iterator[None]:
        """Saves the last finished step where another process is lost, in a step or a validation.

        Raises:
            ProcessError: with what there is to go on from.
        """
        try:
            yield
        except ProcessError as error:
            if self.processes.is_first:
                there = checkpoints(self.output)
                last = self.save_if_new() or (there[-1] if there else None)
                kept = f"The same command goes on from {last}" if last else self.kept()
            else:  # whose disk may be another one
                kept = "The same command goes on from what process 0 has saved last"
            raise ProcessError(f"{error}. {kept}", error.is_shared) from None

    def is_done(self) -> bool:
        """Whether the last step is done, or patience is at its end."""
        return self.state.step >= self.total_steps or self.out_of_patience()

    def out_of_patience(self) -> bool:
        """Whether the last `early_stopping_patience` validations were all worse than the best."""
        patience = self.checkpointing.early_stopping_patience
        return patience is not None and validations_since_best(self.state.log_history) >= patience

    def end(self) -> None:
        """Puts the best weights in the place of the last, if that is asked for."""
        best = best_eval(self.state.log_history)
        if self.out_of_patience() and self.state.step < self.total_steps:
            say(self.console, f"stopped early at step {self.state.step}: no better validation loss")
        if not self.checkpointing.load_best_model_at_end or best is None:
            return
        try:
            if best[0] != self.state.step and self.processes.is_first:
                load_weights(self.output / f"checkpoint-{best[0]}", self.model, self.optimizer)
            say(self.console, f"best      step {best[0]}, validation loss {best[1]:.4f}")
        except ConfigError as error:  # it was not saved by this run, or damaged since
            warn(
                self.console,
                f"step {best[0]} was best, but {error}: the last weights stay",
            )
        # Of several processes only the first one has read them.
        self.optimizer.weights = flatten(self.model.trainable_parameters())
        weights_from_first(self.optimizer, self.processes)
        self.model.update(self.optimizer.tree())

    def kept(self) -> str:
        """What there is to go on from, for messages."""
        there = checkpoints(self.output)
        return f"{there[-1]} is the last checkpoint" if there else "No checkpoint was written yet"

    def result(self, seconds: float, tokens: int) -> TrainResult:
        """What the run was, of which this process trained so many real tokens."""
        return TrainResult.of(
            self.output,
            self.state.log_history,
            self.state.step,
            self.total_steps,
            self.checkpointing.load_best_model_at_end,
            seconds,
            tokens,
        )
