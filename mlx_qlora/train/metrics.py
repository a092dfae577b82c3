"""Metrics: measured, logged, and handed to trackers."""

import contextlib
import importlib.util
import json
import os
import secrets
import socket
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
from rich.console import Console

from mlx_qlora import device
from mlx_qlora.errors import ConfigError, did_you_mean, require, say, waiting, warn
from mlx_qlora.fields import config_section, option
from mlx_qlora.folders import write_whole
from mlx_qlora.progress import doing
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.step import StepResult

NAMES = ("tensorboard", "wandb")
RUN_ID = "wandb_run_id"
PARTS, MOST_STEPS = 20, 10  # so often figures are written, and at least that often


@config_section("logging")
class LoggingConfig:
    """How often figures are written, and where besides `metrics.jsonl`."""

    logging_steps: int | str = option(
        "auto",
        f"steps between written figures. auto: a twentieth of the run, at most {MOST_STEPS}",
    )
    report_to: list[str] | str = option(
        [], "tensorboard, wandb or both, besides metrics.jsonl, which is always written"
    )
    run_name: str | None = option(
        None, "name of the run in trackers. null: the output folder's name"
    )
    project: str = option("mlx-qlora", "project of the run in wandb")

    def __post_init__(self) -> None:
        steps, name = self.logging_steps, self.run_name
        legal = steps == "auto" or (isinstance(steps, int) and steps >= 1)
        require(legal, "logging.logging_steps", "be at least 1, or auto", steps)
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

    def for_steps(self, steps: int) -> "LoggingConfig":
        """With a number in the place of `auto`, for a run of so many steps."""
        every = min(-(-steps // PARTS), MOST_STEPS)
        return replace(self, logging_steps=every) if self.logging_steps == "auto" else self


# ---- trackers ------------------------------------------------------------------------------------


def require_trackers(report_to: list[str]) -> None:
    """Refuses a tracker that could not begin; nothing is written, nobody is asked anything."""
    for name in report_to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder `wandb` of offline runs
            raise ConfigError(
                f"logging.report_to: {name} is not installed; run: pip install 'mlx-qlora[{name}]'"
            )
    if "wandb" not in report_to:
        return
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        has_key = wandb.login(prompt=False)
    except wandb.Error as error:
        raise ConfigError(f"logging.report_to: wandb: {error}; run `wandb login`") from None
    if not has_key:
        raise ConfigError(
            "logging.report_to: wandb has no API key on this machine; run `wandb login`, or set "
            "WANDB_MODE=offline to keep the run here until `wandb sync`"
        )


def tracked(record: dict[str, Any]) -> dict[str, float]:
    """A line of `metrics.jsonl` as trackers take it: name -> number.

    Text and lists stay in the file; a step that was skipped is a 1 at `train/skipped`.
    """
    numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
    if "skipped" in record:
        numbers["skipped"] = 1
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in numbers.items()
        if name != "step"
    }


class TensorBoard:
    """One event file of `tensorboard`'s own records.

    Each record reaches the file before `write` returns. `tensorboard.summary.Writer` would write
    from a thread, where a full disk ends in a traceback, imports TensorFlow where there is one, and
    knows neither session logs nor text.

    All event files of a folder are one run to TensorBoard. The history up to the last `step` is
    written where there is no event file yet; what another process wrote after it is purged from
    view by a `SessionLog.START`, as TensorBoard does for its own restarts.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, settings: dict[str, Any], state: RunState) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        continues = state.step > 0 and any(folder.glob("*tfevents*"))
        # Files are read in the order of their names: the time in them is finer than a second.
        place = f"{socket.gethostname()}.{os.getpid()}"
        path = folder / f"events.out.tfevents.{time.time():017.6f}.{place}"
        self.make_event: Any = vars(event_pb2)["Event"]  # made at import: no checker sees it
        self.records = RecordWriter(path.open("xb"))
        self._event(0, file_version="brain.Event:2")
        self._event(state.step + 1 if continues else 0, session_log={"status": "START"})
        if not continues:
            text = textwrap.indent(json.dumps(settings, indent=2), "    ")  # a block of code
            self._event(0, summary=text_pb("args/text_summary", text))
            for record in state.log_history:
                self.write(record["step"], tracked(record))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one point per name, in float32."""
        points = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._event(step, summary={"value": points})

    def _event(self, step: int, **content: Any) -> None:
        event = self.make_event(wall_time=time.time(), step=step, **content)
        self.records.write(event.SerializeToString())
        self.records.flush()

    def close(self, failed: bool) -> None:
        """Closes the file; how the run ended has no place in it."""
        self.records.close()


class Wandb:
    """One run of Weights & Biases; a run that goes on has its id from the output folder.

    wandb takes no step twice and none backwards. So what it lacks of the history is written when
    the run begins (all of it when offline: each folder of an offline run is whole), and what a
    killed process has sent already is left out. Step 0 begins a new run.
    """

    name = "wandb"

    def __init__(
        self, project: str, name: str, output: Path, settings: dict[str, Any], state: RunState
    ) -> None:
        import wandb

        place = output / RUN_ID
        known = place.read_text(encoding="utf-8").strip() if state.step and place.is_file() else ""
        try:
            self.run = wandb.init(
                project=project,
                name=name,
                dir=str(output),  # its own files go to `<output>/wandb`
                config=settings,
                id=known or secrets.token_hex(4),
                resume="allow",
                reinit="create_new",  # a notebook's own run is not ours to write to, or to end
                allow_val_change=True,  # a run may go on with other `logging` or `checkpointing`
                settings=wandb.Settings(console="off"),  # the live line is not for a log
            )
        except Exception as error:  # its own process answers with errors that are no wandb.Error
            raise ConfigError(
                f"logging.report_to: wandb cannot start a run: {error}; set WANDB_MODE=offline to "
                "keep it on this machine, or leave wandb out"
            ) from None
        if not self.run.disabled and self.run.id != known:
            write_whole(place, f"{self.run.id}\n")
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
        self.done, self.first = state.step, self.run.step
        for record in state.log_history:
            if record["step"] >= self.first:
                self.write(record["step"], tracked(record))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hands one record to wandb's own process, which sends it when it can."""
        if self.done < step < self.first:
            return  # sent before the run was killed, and the same: steps are taken alike
        # A validation that a signal put off belongs to a step that wandb has closed already.
        self.run.log({**values, "train/global_step": step}, step=max(step, self.first))

    def close(self, failed: bool) -> None:
        """Waits until everything is sent; a failed or interrupted run is shown as such."""
        with waiting("wandb, which sends the last figures"):
            self.run.finish(exit_code=int(failed))


Tracker: TypeAlias = TensorBoard | Wandb


def open_trackers(
    config: LoggingConfig, output: Path, settings: dict[str, Any], state: RunState
) -> list[Tracker]:
    """Opens what `report_to` names; a ConfigError if a package is missing, or wandb refuses."""
    require_trackers(list(config.report_to))
    name = config.run_name or output.resolve().name
    opened: list[Tracker] = []
    if "tensorboard" in config.report_to:
        opened.append(TensorBoard(output / "runs" / name, settings, state))
    if "wandb" in config.report_to:
        try:
            opened.append(Wandb(config.project, name, output, settings, state))
        except BaseException:
            for tracker in opened:
                tracker.close(failed=True)
            raise
    return opened


# ---- metrics -------------------------------------------------------------------------------------


class Metrics:
    """Writes `metrics.jsonl`, keeps the history, and counts the steps.

    A log window is `every` steps long; the open losses of the state are those of one that is not
    full yet. On a terminal and in a notebook others show the run; anywhere else it is told in plain
    lines. The trackers are closed with the metrics.
    """

    def __init__(
        self,
        path: Path,
        total_steps: int,
        state: RunState,
        every: int,
        console: Console,
        trackers: list[Tracker],
    ) -> None:
        self.state, self.trackers, self.console = state, trackers, console
        self.total_steps, self.every = total_steps, every
        self.file = path.open("a", encoding="utf-8")
        self.tokens, self.started = 0, time.perf_counter()  # of the log window
        self.in_lines = not (console.is_terminal or console.is_jupyter)
        self.under_way = doing("training", total_steps, done=state.step)

    def __enter__(self) -> "Metrics":
        self.task = self.under_way.__enter__()
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.under_way.__exit__(None, None, None)
        self.file.close()
        for tracker in self.trackers:
            try:
                tracker.close(failed=kind is not None)
            except (Exception, KeyboardInterrupt) as error:  # what was trained is worth more
                self._warn(tracker, error, "the last figures may be missing there")

    def train_step(self, epoch: float, result: StepResult, rate: float) -> None:
        """Shows an optimiser step, and records the mean loss of each log window.

        As Hugging Face's Trainer logs it: the mean of the steps' losses. That of a skipped step is
        left out.
        """
        state, step, every = self.state, self.state.step, self.every
        self.tokens += result.tokens
        if result.finite:
            state.open_losses.append(result.loss)
            state.open_grad_norm = result.grad_norm
            for name, value in result.metrics.items():
                state.open_metrics.setdefault(name, []).append(value)
        speed = self.tokens / max(time.perf_counter() - self.started, 1e-9)
        loss, lr, grad = f"loss {result.loss:.4f}", f"lr {rate:.2e}", f"grad {result.grad_norm:.2f}"
        pace, memory = f"{speed:,.0f} tok/s", f"{mx.get_peak_memory() / 1e9:.2f} GB"
        compared = _compared(result.metrics)
        self.task.figures = f"epoch {epoch:.2f}", loss, *compared, pace, lr, memory, grad
        self.task.advance()
        if (step % every and step != self.total_steps) or not state.open_losses:
            return
        mean = sum(state.open_losses) / len(state.open_losses)
        means = {name: sum(values) / len(values) for name, values in state.open_metrics.items()}
        if self.in_lines:
            figures = "  ".join([f"loss {mean:.4f}", *_compared(means), lr, grad, pace, memory])
            say(self.console, f"step {step}/{self.total_steps}  {figures}")
        record = {
            "examples": state.rows,
            "loss": mean,
            "grad_norm": state.open_grad_norm,
            "learning_rate": rate,
            "tokens_per_second": round(speed, 1),
            "peak_memory_bytes": mx.get_peak_memory(),
            "process_memory_bytes": device.process_memory_bytes(),
            **means,
        }
        state.open_losses, state.open_grad_norm, state.open_metrics = [], 0.0, {}
        self.tokens, self.started = 0, time.perf_counter()
        self.event(epoch, **record)

    def validation(
        self, epoch: float, loss: float, metrics: dict[str, float], seconds: float
    ) -> None:
        """Records one pass over the validation set, and keeps its time out of tokens/s."""
        self.started += seconds
        if self.in_lines:
            figures = "  ".join([f"validation loss {loss:.4f}", *_compared(metrics)])
            say(self.console, f"step {self.state.step}: {figures}")
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.event(epoch, eval_loss=loss, **named, eval_runtime=round(seconds, 3))

    def event(self, epoch: float, **values: Any) -> None:
        """Adds a record of the last step to the history, and a line that others can read at once.

        A tracker that fails is left out from then on: only the run's own disk may end the run.
        """
        record = {"step": self.state.step, "epoch": round(epoch, 4), **values}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.state.log_history.append(record)
        for tracker in tuple(self.trackers):
            try:
                tracker.write(record["step"], tracked(record))
            except Exception as error:  # whatever the package makes of a network
                self.trackers.remove(tracker)
                self._warn(tracker, error, "the run goes on without it; metrics.jsonl has it all")
                with contextlib.suppress(Exception):
                    tracker.close(failed=True)

    def _warn(self, tracker: Tracker, error: BaseException, then: str) -> None:
        reason = str(error) or type(error).__name__
        warn(self.console, f"logging.report_to: {tracker.name}: {reason}; {then}")


def _compared(metrics: dict[str, float]) -> list[str]:
    """How far an objective that compares models or answers tells them apart, in words."""
    words = {"rewards/accuracies": "accuracy {:.0%}", "rewards/margins": "margin {:.3f}"}
    words["kl"] = "KL {:.3f}"
    return [text.format(metrics[name]) for name, text in words.items() if name in metrics]
