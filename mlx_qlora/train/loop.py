"""The training loop: batches to gradients to new weights, until the last step.

Read `train` first: it is the whole story. Every step is a function of (config, data, step), so a
run that is stopped and continued takes the same steps as one that was not.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora import backend, blas
from mlx_qlora.console import say, warn
from mlx_qlora.data.batches import Batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import DataConfig
from mlx_qlora.errors import ConfigError, ProcessError, TrainingError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.processes import processes
from mlx_qlora.train.checkpoint import (
    CheckpointingConfig,
    RunState,
    checkpoints,
    disk_errors,
    load_checkpoint,
    load_weights,
    remove_leftovers,
    rotate,
    save_checkpoint,
)
from mlx_qlora.train.config import TrainingConfig, batches_of
from mlx_qlora.train.course import course_of
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.history import best_eval, validations_since_best, was_validated
from mlx_qlora.train.interruption import Interrupted, Interruption
from mlx_qlora.train.metrics import LoggingConfig, Metrics, rewrite_metrics
from mlx_qlora.train.optim import AdamW, flatten
from mlx_qlora.train.outcome import Outcome, StepError
from mlx_qlora.train.result import TrainResult
from mlx_qlora.train.score import Score, score
from mlx_qlora.train.together import from_first, score_of_all, weights_from_first
from mlx_qlora.train.tracking import trackers
from mlx_qlora.train.trainer_state import trainer_state
from mlx_qlora.train.trouble import note_loss, note_skipped
from mlx_qlora.train.update import Update, split


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
    backend.limit_memory()
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
        disk_errors(run.output),
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
        if compiled == "auto":  # on a CPU it saves next to nothing; see docs/log.md
            compiled = backend.backend().device != "cpu"
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
