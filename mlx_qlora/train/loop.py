"""The training loop: batches to gradients to new weights, until the last step.

Read `train` first: it is the whole story. Every step is a function of (config, data, step), so a
run that is stopped and continued takes the same steps as one that was not.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from rich.console import Console

from mlx_qlora import device
from mlx_qlora.cpu import blas
from mlx_qlora.data.batches import Batch, Batches, evaluation_batches
from mlx_qlora.distributed import processes
from mlx_qlora.errors import ConfigError, ProcessError, TrainingError, say, warn
from mlx_qlora.folders import disk_errors, write_whole
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.progress import doing, now
from mlx_qlora.train.allreduce import broadcast_state, score_of_all
from mlx_qlora.train.checkpoint import (
    best_eval,
    discard_after,
    last_checkpoint,
    load_tensors,
    read_state,
    rotate,
    save_checkpoint,
    validations_since_best,
    was_validated,
)
from mlx_qlora.train.config import RunLength, batches_of
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.memory import largest_micro_batch
from mlx_qlora.train.metrics import Metrics, open_trackers
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.preferences import Preferences
from mlx_qlora.train.score import score
from mlx_qlora.train.signals import Interrupted, StopSignal
from mlx_qlora.train.step import Step, StepError, StepResult

if TYPE_CHECKING:
    from mlx_qlora.run import Inputs

# A step's loss this many times above the median of the last ones, and this far above their usual
# spread, is a loss spike.
SPIKE, SPREADS, REMEMBERED = 1.5, 8.0, 20


# ---- the result ----------------------------------------------------------------------------------


@dataclass
class TrainResult:
    """What a finished run was.

    Attributes:
        steps: optimiser steps of the whole run.
        train_loss: mean nats per supervised token over the last log window; of preferences, mean
            loss per example.
        eval_loss: the last validation loss, if there was a validation set; the best one, if the
            run ended with the best weights.
        seconds: wall time of this process's part, validation and checkpoints included.
        tokens_per_second: real tokens trained per second of that time.
        peak_memory_bytes: MLX's peak.
        process_memory_bytes: the peak of the process, all that it had before the run included.
        best_step: step of the best validation loss, if there was one.
        stopped_early: whether patience ended the run before its last step.
        test_scores: "before" and "after", of the test rows or, without any, of the validation
            rows; empty where there were none.
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
    process_memory_bytes: int = 0
    best_step: int | None = None
    stopped_early: bool = False
    test_scores: dict[str, Any] = field(default_factory=dict)
    html: str = field(default="", repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the history, as JSON has them."""
        short = asdict(replace(self, log_history=[]))
        return {k: v for k, v in short.items() if k not in ("log_history", "html")}

    def _repr_html_(self) -> str | None:
        """The summary and the plots in a notebook; None lets it show the text."""
        return self.html or None


# ---- the loop ------------------------------------------------------------------------------------


def train(model: LlamaForCausalLM, inputs: "Inputs", console: Console) -> TrainResult:
    """Trains the model's LoRA weights in place, from the inputs' state on.

    Raises:
        TrainingError: the run cannot go on; the last checkpoint is whole.
        Interrupted: a signal came, and what was done is saved.
    """
    started = time.perf_counter()
    run = Run(model, inputs, console)
    length = RunLength.of(inputs.config.training, run.batches)
    say(console, f"          {length}")
    for warning in length.warnings:
        warn(console, warning)
    if (preferences := run.preferences) is not None:  # before what was trained is put back
        rows = run.held_out or run.batches
        run.step.retried([rows[0]], lambda: preferences.refer(run.step.pieces))
    if inputs.resumed is not None:
        run.resume(inputs.resumed)
    run.state = broadcast_state(run.state, run.optimizer, run.processes)
    model.update(run.optimizer.tree())
    tokens_before = run.state.tokens
    with (
        run.stop,
        disk_errors(run.output, lambda: last_checkpoint(run.output)),
        run.processes.agree(run.begin),
        blas.threads(1),  # of a matmul: the shards of a chunk already have a core each
        saved_if_others_are_lost(run),
    ):
        try:
            if run.owes_validation():
                run.after_step()
            run.take_steps(run.total_steps)
        except StepError as error:
            last = last_checkpoint(run.output, "is the last checkpoint")
            ended = TrainingError(f"{error}. {last}")
            ended.is_shared = not error.again  # all have the same numbers; a device is one's own
            raise ended from None
        if run.stop.signum is not None:
            # All save before any leaves: a launcher ends all where one has left.
            stopped = Interrupted(run.stop.signum, run.processes.agree(run.save_if_new))
            if not run.processes.is_first:
                stopped.args = ()  # the first one prints it, which knows what was saved
            raise stopped
        run.end()
    return run.result(time.perf_counter() - started, run.state.tokens - tokens_before)


class Run:
    """The parts of a run, and what happens between its steps."""

    def __init__(self, model: LlamaForCausalLM, inputs: "Inputs", console: Console) -> None:
        self.config = config = inputs.config
        self.model, self.base, self.console = model, inputs.base, console
        training = config.training
        self.processes = everyone = processes()
        self.state = inputs.state  # up to the last step that was taken
        self.output = Path(config.checkpointing.output_dir)
        self.batches = batches_of(inputs.train, config.data, training, everyone.size, everyone.rank)
        validation = inputs.validation
        self.held_out = evaluation_batches(validation) if validation else None
        self.total_steps = training.total_steps(self.batches)
        compiled = device.current().compiles if training.compile == "auto" else training.compile
        adam = training.adam_beta1, training.adam_beta2, training.adam_epsilon
        more = training.weight_decay, training.max_grad_norm, model.lora_config.loraplus_lr_ratio
        self.optimizer = AdamW(model.trainable_parameters(), *adam, *more)
        self.stop = StopSignal(agreed=self.processes.size > 1)
        engine = Engine(model, training.recompute, bool(compiled), training.kl_weight)
        engine.limit_memory(largest_micro_batch(inputs.train, training.rows))
        self.preferences = None
        if training.objective != "sft":
            self.preferences = Preferences(training, model, self.batches, self.held_out)
        rest = self.stop, console, self.preferences
        self.step = Step(engine, self.optimizer, training.seed, *rest)

    # ---- before the first step -------------------------------------------------------------------

    def resume(self, checkpoint: Path) -> None:
        """Puts back the weights and moments that belong to the state."""
        load_tensors(checkpoint, self.model, self.optimizer, self.state.updates)
        say(self.console, f"continuing from {checkpoint}")

    def begin(self) -> Metrics:
        """Clears what a run that goes on from here will write again, and opens the metrics."""
        state, path, trackers = self.state, Path(os.devnull), []
        if self.processes.is_first:
            path, logging = self.output / "metrics.jsonl", self.config.logging
            # First: it may fail, and nothing was removed yet.
            trackers = open_trackers(logging, self.output, self.settings(), state)
            discard_after(self.output, state.step)
            rotate(self.output, state, self.config.checkpointing.save_total_limit)
            # As at the checkpoint: lines may be too many, cut, or lost.
            write_whole(path, "".join(json.dumps(record) + "\n" for record in state.log_history))
        every = int(self.config.logging.logging_steps)
        self.metrics = Metrics(path, self.total_steps, state, every, self.console, trackers)
        return self.metrics

    def settings(self) -> dict[str, dict[str, Any]]:
        """Section -> field -> value, for trackers."""
        model = {**self.state.config.get("model", {}), "base_model_name_or_path": self.base}
        names = ("data", "training", "checkpointing", "logging")
        sections = {name: asdict(getattr(self.config, name)) for name in names}
        return {"model": model, "lora": asdict(self.model.lora_config), **sections}

    def owes_validation(self) -> bool:
        """Whether the last step's validation was due and not done: a signal came before it."""
        step, due = self.state.step, self._is_due(self.config.checkpointing.eval_steps)
        validates = self.held_out is not None and step > 0
        return validates and due and not was_validated(self.state.log_history, step)

    # ---- steps -----------------------------------------------------------------------------------

    def take_steps(self, until: int) -> None:
        """Takes steps up to this one, or until a signal comes or patience is at its end."""
        training, state, stop = self.config.training, self.state, self.stop
        accumulated = training.accumulation
        end = min(until * accumulated, training.micro_batches(self.batches))
        stream = self.batches.ahead(state.step * accumulated, end)
        while state.step < until and not self.is_done() and stop.signum is None:
            rate = training.rate(state.step + 1, self.total_steps)
            result = self.step(list(islice(stream, accumulated)), rate)
            if result is None:
                break  # a signal came within the step: it will be taken again
            stop.signum = stop.signum or result.signum
            self.record(result, rate)
            self.after_step()

    def record(self, result: StepResult, rate: float) -> None:
        """Counts a step, and writes what it was where that is due."""
        state = self.state
        state.step += 1
        state.rows += result.rows
        state.tokens += result.tokens
        state.updates = self.optimizer.step
        if result.finite:
            self.model.update(self.optimizer.tree())
            self._watch_for_spike(result)
        else:
            self._record_skipped(result)
        self.metrics.train_step(self.epoch, result, rate)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.state.rows / len(self.batches.examples)

    def _record_skipped(self, result: StepResult) -> None:
        """Records which rows made a step that moved nothing; a StepError if it is one too many."""
        state, rows = self.state, list(result.suspects)
        state.skipped_in_a_row += 1
        reason = f"loss {result.loss}, gradient norm {result.grad_norm}"
        self.metrics.event(self.epoch, skipped=reason, rows=rows)
        shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        warn(self.console, f"step {state.step} skipped: {reason}; rows: {shown}")
        if state.skipped_in_a_row >= self.config.training.max_skipped_steps:
            raise StepError(
                f"step {state.step}: {reason}, and {state.skipped_in_a_row} steps in a row were "
                "skipped (training.max_skipped_steps); lower training.learning_rate, or look at "
                f"these rows: {shown}",
                again=False,
            )

    def _watch_for_spike(self, result: StepResult) -> None:
        """Remembers a step's loss, and warns where it is far above the last ones."""
        state = self.state
        state.skipped_in_a_row, recent = 0, state.recent_losses
        state.recent_losses = [*recent, result.loss][-REMEMBERED:]
        if len(recent) < REMEMBERED // 2:
            return
        usual = statistics.median(recent)
        spread = statistics.median(abs(loss - usual) for loss in recent)
        if result.loss > max(SPIKE * usual, usual + SPREADS * spread):
            self.metrics.event(self.epoch, spike=result.loss, usual=usual)
            warn(
                self.console,
                f"step {state.step}: loss {result.loss:.3f}, where {usual:.3f} was usual; if this "
                "happens often, lower training.learning_rate",
            )

    # ---- validation and checkpoints --------------------------------------------------------------

    def after_step(self) -> None:
        """Validation and checkpoint, where they are due."""
        checkpointing, best = self.config.checkpointing, False
        if self.held_out is not None and self._is_due(checkpointing.eval_steps):
            best = self.validate(self.held_out)
            if self.stop.signum is not None:
                return  # half a validation counts for nothing: it is done when the run goes on
        due = self._is_due(checkpointing.save_steps) or self.is_done()
        if due or (best and checkpointing.load_best_model_at_end):
            self.processes.agree(self.save)  # the others wait as long as the disk needs

    def _is_due(self, every: int | str) -> bool:
        return self.state.step % int(every) == 0 or self.state.step == self.total_steps

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return itertools.takewhile(lambda _: self.stop.signum is None, self.step.pieces(batches))

    def validate(self, held_out: Batches) -> bool:
        """Measures the validation loss; returns whether it is the best so far."""

        def pieces() -> Iterator[Batch]:
            n_rows = len(held_out.examples) / self.processes.size
            with doing("validating", n_rows, "rows") as task:
                share = islice(held_out, self.processes.rank, None, self.processes.size)
                for piece in self._until_stopped(share):
                    yield piece
                    task.advance(len(piece.tokens))

        started, preferences = now(), self.preferences
        if preferences is not None:
            work = partial(preferences.validate, self._until_stopped)
            loss, metrics = self.step.retried([held_out[0]], work)
            signum = None
        else:
            ours = self.step.retried([held_out[0]], lambda: score(self.model, pieces()))
            took, received = now() - started, self.stop.received
            total, signum = score_of_all(ours, self.processes, took, received)
            loss, metrics = total.loss, total.metrics
        if self.stop.signum is not None:
            return False
        self.stop.signum = signum
        self.metrics.validation(self.epoch, loss, metrics, now() - started)
        best = best_eval(self.state.log_history)
        return best is not None and best[0] == self.state.step

    def save(self) -> Path | None:
        """Writes a checkpoint of this step, in the first process."""
        if not self.processes.is_first:
            return None
        about = self.base, self.config, self.batches
        return save_checkpoint(self.model, self.optimizer, self.state, *about)

    def save_if_new(self) -> Path | None:
        """The checkpoint of this step, written if it is not there; None before the first step."""
        path = self.output / f"checkpoint-{self.state.step}"
        return path if path.exists() else self.save() if self.state.step else None

    # ---- the end ---------------------------------------------------------------------------------

    def is_done(self) -> bool:
        """Whether the last step is done, or patience is at its end."""
        return self.state.step >= self.total_steps or self.out_of_patience()

    def out_of_patience(self) -> bool:
        """Whether the last `early_stopping_patience` validations were all worse than the best."""
        patience = self.config.checkpointing.early_stopping_patience
        return patience is not None and validations_since_best(self.state.log_history) >= patience

    def end(self) -> None:
        """Puts the best weights in the place of the last, if that is asked for."""
        best = best_eval(self.state.log_history)
        if self.out_of_patience() and self.state.step < self.total_steps:
            say(self.console, f"stopped early at step {self.state.step}: no better validation loss")
        if not self.config.checkpointing.load_best_model_at_end or best is None:
            return
        try:
            if best[0] != self.state.step and self.processes.is_first:
                read_state(folder := self.output / f"checkpoint-{best[0]}")
                load_tensors(folder, self.model, self.optimizer)
            say(self.console, f"best      step {best[0]}, validation loss {best[1]:.4f}")
        except ConfigError as error:  # it was not saved by this run, or damaged since
            warn(self.console, f"step {best[0]} was best, but {error}; the last weights are kept")
        # Of several processes only the first one has read them.
        self.optimizer.weights = self.processes.broadcast_array(self.optimizer.weights)
        self.model.update(self.optimizer.tree())

    def result(self, seconds: float, tokens: int) -> TrainResult:
        """What the run was, in which this process trained so many real tokens."""
        history, best = self.state.log_history, best_eval(self.state.log_history)
        losses, evals = ([r[key] for r in history if key in r] for key in ("loss", "eval_loss"))
        ends_with_best = best and self.config.checkpointing.load_best_model_at_end
        return TrainResult(
            output_dir=self.output,
            steps=self.state.step,
            train_loss=losses[-1] if losses else float("nan"),
            eval_loss=best[1] if best and ends_with_best else evals[-1] if evals else None,
            log_history=history,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            process_memory_bytes=device.process_memory_bytes(),
            best_step=best[0] if best else None,
            stopped_early=self.state.step < self.total_steps,
        )


@contextmanager
def saved_if_others_are_lost(run: Run) -> Iterator[None]:
    """Saves the last finished step where another process is lost, and says so in the error."""
    try:
        yield
    except ProcessError as error:
        if run.processes.is_first:
            last = run.save_if_new()
            kept = (
                f"The same command continues from {last}" if last else last_checkpoint(run.output)
            )
        else:  # whose disk may be another one
            kept = "The same command continues from what process 0 saved last"
        raise ProcessError(f"{error}. {kept}", error.is_shared) from None
