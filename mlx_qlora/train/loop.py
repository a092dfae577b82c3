"""The training loop: batches to gradients to new weights, until the last step.

Read `train` first: it is the whole story. Every step is a function of (config, data, step), so a
run that is stopped and continued takes the same steps as one that was not.
"""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
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
    best_eval,
    checkpoints,
    disk_errors,
    load_checkpoint,
    load_weights,
    remove_leftovers,
    rotate,
    save_checkpoint,
)
from mlx_qlora.train.config import TrainingConfig, batches_of
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.interruption import Interrupted, Interruption
from mlx_qlora.train.metrics import LoggingConfig, Metrics, rewrite_metrics
from mlx_qlora.train.optim import AdamW, flatten
from mlx_qlora.train.outcome import Outcome
from mlx_qlora.train.result import TrainResult
from mlx_qlora.train.score import Score, score
from mlx_qlora.train.together import from_first, score_of_all, weights_from_first
from mlx_qlora.train.tracking import trackers
from mlx_qlora.train.trainer_state import trainer_state
from mlx_qlora.train.update import Update, split

# A step's loss this many times above the median of the last ones, and this far above their usual
# spread, is called a spike.
SPIKE, SPREADS, REMEMBERED = 1.5, 8.0, 20


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
    if resumed is not None:
        state = load_checkpoint(resumed, model, run.optimizer)
        say(console, f"continuing from {resumed}")
    state = from_first(state, run.optimizer, run.processes)
    model.update(run.optimizer.tree())
    done_before = state.tokens
    with (
        Interruption(run.processes.size > 1) as interruption,
        disk_errors(run.output),
        run.begin(state),
        blas.threads(1),  # what parts side by side have; see there
        run.kept_if_others_go(),
    ):
        if state.step and run.owes_validation():
            run.after_step(interruption)
        accumulation = training.gradient_accumulation_steps
        stream = run.batches.ahead(state.step * accumulation, training.micro_batches(run.batches))
        while not run.is_done() and interruption.signum is None:
            share = list(islice(stream, accumulation))
            rate = training.rate(state.step + 1, run.total_steps)
            try:
                outcome = run.update(interruption).step(share, rate)
            except TrainingError as error:
                raise TrainingError(f"{error}. {run.kept()}") from None
            if outcome is None:
                break  # a signal came within the step: it will be taken again
            interruption.signum = interruption.signum or outcome.signum
            run.note(outcome, rate)
            run.after_step(interruption)
        if interruption.signum is not None:
            stop = Interrupted(interruption.signum, run.save_if_new())
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
            TrainingError: too many steps in a row moved nothing.
        """
        state = self.state
        state.step += 1
        state.rows += outcome.rows
        state.tokens += outcome.tokens
        state.updates = self.optimizer.step
        epoch = state.rows / self.batches.rows_per_epoch
        if outcome.finite:
            self.model.update(self.optimizer.tree())
            state.skipped_in_a_row = 0
            self._watch_for_spikes(outcome, epoch)
            state.recent_losses = [*state.recent_losses, outcome.loss][-REMEMBERED:]
        else:
            self._skip(outcome, epoch)
        record = self.metrics.train_step(state.step, epoch, outcome, rate)
        if record:
            state.log_history.append(record)
        state.open_losses = list(self.metrics.window.losses)
        state.open_grad_norm = self.metrics.window.grad_norm

    def _skip(self, outcome: Outcome, epoch: float) -> None:
        state = self.state
        state.skipped_in_a_row += 1
        what = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}"
        rows = list(outcome.suspects)
        record = {"step": state.step, "epoch": round(epoch, 4), "skipped": what, "rows": rows}
        state.log_history.append(self.metrics.event(record))
        shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        warn(self.console, f"step {state.step}: {what}: skipped. Rows: {shown}")
        if state.skipped_in_a_row >= self.training.max_skipped_steps:
            raise TrainingError(
                f"step {state.step}: {what}: {state.skipped_in_a_row} steps in a row have moved "
                f"nothing (training.max_skipped_steps). {self.kept()}; lower "
                f"training.learning_rate, or look at these rows: {shown}"
            )

    def _watch_for_spikes(self, outcome: Outcome, epoch: float) -> None:
        recent = self.state.recent_losses
        if len(recent) < REMEMBERED // 2:
            return
        usual = statistics.median(recent)
        spread = statistics.median(abs(loss - usual) for loss in recent)
        if outcome.loss > max(SPIKE * usual, usual + SPREADS * spread):
            step = self.state.step
            record = {"step": step, "epoch": round(epoch, 4), "spike": outcome.loss}
            self.state.log_history.append(self.metrics.event({**record, "usual": usual}))
            warn(
                self.console,
                f"step {step}: loss {outcome.loss:.3f}, where {usual:.3f} was usual; if "
                "this happens often, lower training.learning_rate",
            )

    def owes_validation(self) -> bool:
        """Whether this step's validation is due and was not done: a signal came before it."""
        step, history = self.state.step, self.state.log_history
        done = any(record["step"] == step and "eval_loss" in record for record in history)
        return (
            self.held_out is not None and self._is_due(self.checkpointing.eval_steps) and not done
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
            self.save()

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def validate(self, interruption: Interruption) -> bool:
        """Measures the validation loss; returns whether it is the best so far."""
        assert self.held_out is not None
        before = time.perf_counter()
        total = self._score(self.held_out, interruption)
        total = score_of_all(total, self.processes, time.perf_counter() - before)
        if interruption.signum is not None:
            return False
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
            there = checkpoints(self.output)
            last = self.save_if_new() or (there[-1] if there else None)
            kept = f"The same command goes on from {last}" if last else self.kept()
            raise ProcessError(f"{error}. {kept}") from None

    def is_done(self) -> bool:
        """Whether the last step is done, or patience is at its end."""
        return self.state.step >= self.total_steps or self.out_of_patience()

    def out_of_patience(self) -> bool:
        """Whether the last `early_stopping_patience` validations were all worse than the best."""
        patience = self.checkpointing.early_stopping_patience
        steps = [r["step"] for r in self.state.log_history if "eval_loss" in r]
        best = best_eval(self.state.log_history)
        return patience is not None and best is not None and steps[::-1].index(best[0]) >= patience

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
        """What the run was."""
        history = self.state.log_history
        best = best_eval(history)
        ends_with_best = self.checkpointing.load_best_model_at_end and best is not None
        evals = [best[1]] if ends_with_best and best else []
        evals = evals or [r["eval_loss"] for r in history if "eval_loss" in r][-1:]
        losses = [r["loss"] for r in history if "loss" in r]
        return TrainResult(
            output_dir=self.output,
            steps=self.state.step,
            train_loss=losses[-1] if losses else float("nan"),
            eval_loss=evals[0] if evals else None,
            log_history=history,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            best_step=best[0] if best else None,
            stopped_early=self.state.step < self.total_steps,
        )
