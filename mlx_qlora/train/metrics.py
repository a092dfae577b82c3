"""What a run says while it runs: one JSON line per event, and one live line for the person."""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_qlora.console import say, warn
from mlx_qlora.errors import ConfigError, did_you_mean
from mlx_qlora.fields import option, require
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.outcome import Outcome
from mlx_qlora.train.score import Score
from mlx_qlora.train.tracking import NAMES, Tracker, tracked


@dataclass(frozen=True)
class LoggingConfig:
    """How often figures are written, and where besides `metrics.jsonl`."""

    logging_steps: int = option(10, "write figures every this many steps (and at the last)")
    report_to: list[str] | str = option(
        [], "tensorboard, wandb or both, besides metrics.jsonl, which is always written"
    )
    run_name: str | None = option(
        None, "of the run in trackers; null takes the output folder's name"
    )
    project: str = option("mlx-qlora", "the project that wandb files the run under")

    def __post_init__(self) -> None:
        steps, name = self.logging_steps, self.run_name
        require(steps >= 1, "logging.logging_steps", "be at least 1", steps)
        chosen = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        for word in chosen:
            if word not in NAMES:
                raise ConfigError(
                    f"logging.report_to must be tensorboard, wandb, [tensorboard, wandb] or []; "
                    f"got {word!r}{did_you_mean(word, NAMES)}"
                )
        object.__setattr__(self, "report_to", list(dict.fromkeys(chosen)))
        is_name = name is None or (name.strip(".") and "/" not in name and "\0" not in name)
        require(bool(is_name), "logging.run_name", "name a folder, without a /", name)
        require(bool(self.project), "logging.project", "name a project", "nothing")


class Metrics:
    """Writes `metrics.jsonl` and shows the progress.

    Args:
        path: the JSONL file, opened for appending; each line is a dict with `step`.
        total_steps: optimiser steps of the whole run.
        state: of the run; its steps are done, and its open losses begin the first record.
        config: how often.
        console: where the live line goes; on anything but a terminal it becomes plain lines.
        trackers: what else takes the records; they are closed with the metrics.
    """

    def __init__(
        self,
        path: Path,
        total_steps: int,
        state: RunState,
        config: LoggingConfig,
        console: Console,
        trackers: list[Tracker],
    ) -> None:
        self.trackers = trackers
        self.total_steps = total_steps
        self.every = config.logging_steps
        self.console = console
        self.file = path.open("a", encoding="utf-8")
        self.window = Window()
        self.window.losses = list(state.open_losses)
        self.window.grad_norm = state.open_grad_norm
        self.live = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            # Wide enough that one slow step does not make the ETA jump.
            speed_estimate_period=300,
        )
        self.task = self.live.add_task("", total=total_steps, completed=state.step)

    def __enter__(self) -> "Metrics":
        self.live.start()
        self.window.started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.live.stop()
        self.file.close()
        for tracker in self.trackers:
            try:
                tracker.close(failed=kind is not None)
            except (Exception, KeyboardInterrupt) as error:  # what was trained is worth more
                self._warn(tracker, error, "its last figures may be missing there")

    def train_step(
        self, step: int, epoch: float, outcome: Outcome, rate: float
    ) -> dict[str, Any] | None:
        """Notes one optimiser step; returns what was written, or None between log steps.

        Args:
            step: from 1.
            epoch: how many times the data has been seen, as a fraction.
            outcome: of the step; the loss of one that was skipped is left out of the means.
            rate: learning rate of this step.
        """
        self.window.add(outcome)
        figures = (
            f"loss {outcome.loss:.4f}  lr {rate:.2e}  grad {outcome.grad_norm:.2f}  "
            f"{self.window.tokens_per_second:,.0f} tok/s  {_gb(mx.get_peak_memory())}"
        )
        self.live.update(self.task, completed=step, description=figures)
        if (step % self.every and step != self.total_steps) or not self.window.losses:
            return None
        if not self.console.is_terminal:
            say(self.console, f"step {step}/{self.total_steps}  {figures}")
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": self.window.mean_loss,
            "grad_norm": self.window.grad_norm,
            "learning_rate": rate,
            "tokens_per_second": round(self.window.tokens_per_second, 1),
            "peak_memory_bytes": mx.get_peak_memory(),
        }
        self.window = Window()
        return self.event(record)

    def validation(self, step: int, epoch: float, total: Score, seconds: float) -> dict[str, Any]:
        """Notes one pass over the validation set, and keeps its time out of tokens/s."""
        self.window.started += seconds
        loss, pairs = total.nats / total.tokens, max(total.pairs, 1)
        say(self.console, f"step {step}: validation loss {loss:.4f}")
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "eval_loss": loss,
            "eval_token_accuracy": total.hits / total.tokens,
            "eval_repetition": total.repeated / pairs,
            "eval_reference_repetition": total.repeated_targets / pairs,
            "eval_runtime": round(seconds, 3),
        }
        return self.event(record)

    def event(self, record: dict[str, Any]) -> dict[str, Any]:
        """Appends a record as one line, at once readable by others, and returns it.

        A tracker that fails is left out from then on: no disk and no network but the run's own
        may end the run.
        """
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for tracker in tuple(self.trackers):
            try:
                tracker.write(record["step"], tracked(record))
            except Exception as error:  # whatever the package makes of a network
                self.trackers.remove(tracker)
                self._warn(tracker, error, "the run goes on without it; metrics.jsonl has it all")
                with contextlib.suppress(Exception):
                    tracker.close(failed=True)
        return record

    def _warn(self, tracker: Tracker, error: BaseException, then: str) -> None:
        reason = str(error) or type(error).__name__
        warn(self.console, f"logging.report_to: {tracker.name}: {reason}; {then}")


class Window:
    """The steps since the last log line."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.losses: list[float] = []
        self.grad_norm = 0.0
        self.tokens = 0

    def add(self, outcome: Outcome) -> None:
        """Adds one optimiser step."""
        self.tokens += outcome.tokens
        if outcome.finite:
            self.losses.append(outcome.loss)
            self.grad_norm = outcome.grad_norm

    @property
    def mean_loss(self) -> float:
        """Mean of the steps' losses, as Hugging Face's Trainer logs it."""
        return sum(self.losses) / len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of training time."""
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)


def rewrite_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Makes `metrics.jsonl` what it was at a checkpoint: lines may be too many, cut, or lost."""
    partial = path.with_name(f".{path.name}.partial")
    lines = [json.dumps(record) + "\n" for record in history]
    try:
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
