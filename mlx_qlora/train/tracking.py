"""A run's figures in TensorBoard and in Weights & Biases, beside `metrics.jsonl`.

Names are those that Hugging Face's Trainer writes (`train/loss`, `eval/loss`; see `rewrite_logs`
in transformers' `integrations/integration_utils.py`), and the step is always the optimiser step.
"""

import importlib.util
import itertools
import json
import os
import secrets
import socket
import textwrap
import time
from pathlib import Path
from typing import Any, TypeAlias

from mlx_qlora.adapters.files import staged
from mlx_qlora.errors import ConfigError

NAMES = ("tensorboard", "wandb")
RUN_ID = "wandb_run_id"
NUMBER = itertools.count()  # of an event file within this process


# ---- before the run ----------------------------------------------------------------------------


def require_trackers(report_to: list[str]) -> None:
    """Refuses a tracker that could not begin; nothing is written, nobody is asked anything.

    Args:
        report_to: names out of `NAMES`.

    Raises:
        ConfigError: a package is missing, or wandb has no key and was not told to stay offline.
    """
    for name in report_to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder `wandb` of offline runs
            raise ConfigError(
                f"logging.report_to: {name} is not installed: pip install 'mlx-qlora[{name}]'"
            )
    if "wandb" in report_to:
        _require_key()


def _require_key() -> None:
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
            "logging.report_to: wandb has no API key for this machine: run `wandb login`, or set "
            "WANDB_MODE=offline to keep the run here until `wandb sync`"
        )


# ---- a record ----------------------------------------------------------------------------------


def tracked(record: dict[str, Any]) -> dict[str, float]:
    """A line of `metrics.jsonl` as trackers take it: name -> number.

    Text and lists stay in the file; a step that was skipped is a 1 at `train/skipped`.
    """
    marks = {"skipped": 1} if "skipped" in record else {}
    values = {name: value for name, value in {**record, **marks}.items() if name != "step"}
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


# ---- the two -----------------------------------------------------------------------------------


class TensorBoard:
    """One event file of `tensorboard`'s own records, which needs neither TensorFlow nor torch.

    Each record reaches the file before `write` returns. `EventFileWriter` of the same package
    would write from a thread, where a full disk ends in a traceback, and imports TensorFlow where
    there is one; its `RecordWriter` does neither.

    Args:
        folder: of the run, made if need be; TensorBoard reads all its event files as one run.
        settings: section -> field -> value, shown under Text as `args`, as the Trainer does.
        history: the records up to here; written where the folder has no event file yet.
        step: the last optimiser step that was done. What another process wrote behind it is
            purged from view by a `SessionLog.START`, as TensorBoard does for its own restarts.
    """

    name = "tensorboard"

    def __init__(
        self, folder: Path, settings: dict[str, Any], history: list[dict[str, Any]], step: int
    ) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        continues = step > 0 and any(folder.glob("*tfevents*"))
        # Files are read in the order of their names: the time in them is finer than a second.
        ending = f"{socket.gethostname()}.{os.getpid()}.{next(NUMBER)}"
        path = folder / f"events.out.tfevents.{time.time():017.6f}.{ending}"
        self.make_event: Any = vars(event_pb2)["Event"]  # made at import: no checker sees it
        self.records = RecordWriter(path.open("xb"))
        self._event(0, file_version="brain.Event:2")
        self._event(step + 1 if continues else 0, session_log={"status": "START"})
        if not continues:
            self._event(0, summary={"value": [_text("args", settings)]})
            for record in history:
                self.write(record["step"], tracked(record))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one point per name, in float32.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        points = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._event(step, summary={"value": points})

    def _event(self, step: int, **what: Any) -> None:
        event = self.make_event(wall_time=time.time(), step=step, **what)
        self.records.write(event.SerializeToString())
        self.records.flush()

    def close(self, failed: bool) -> None:
        """Closes the file; how the run ended has no place in it."""
        self.records.close()


def _text(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """JSON as torch's `SummaryWriter.add_text` writes text; the indent makes it a block of code."""
    text = textwrap.indent(json.dumps(values, indent=2), "    ")
    shape = {"dim": [{"size": 1}]}
    return {
        "tag": f"{name}/text_summary",
        "metadata": {"plugin_data": {"plugin_name": "text"}},
        "tensor": {"dtype": "DT_STRING", "string_val": [text.encode()], "tensor_shape": shape},
    }


class Wandb:
    """One run of Weights & Biases; a run that goes on has its id from the output folder.

    wandb takes no step twice and none backwards. So what it lacks of the history is written when
    the run begins (all of it when offline: each folder of an offline run is whole), and what a
    killed process has sent already is left out.

    Args:
        project: of wandb.
        name: of the run.
        output: the output folder; wandb's own files go to `<output>/wandb`.
        settings: section -> field -> value; wandb's config.
        history: the records up to here.
        step: the last optimiser step that was done.

    Raises:
        ConfigError: wandb refuses or cannot be reached.
    """

    name = "wandb"

    def __init__(
        self,
        project: str,
        name: str,
        output: Path,
        settings: dict[str, Any],
        history: list[dict[str, Any]],
        step: int,
    ) -> None:
        import wandb

        kept = output / RUN_ID
        known = kept.read_text(encoding="utf-8").strip() if step and kept.is_file() else ""
        try:
            self.run = wandb.init(
                project=project,
                name=name,
                dir=str(output),
                config=settings,
                id=known or secrets.token_hex(4),
                resume="allow",
                reinit="create_new",  # a notebook's own run is not ours to write to, or to end
                allow_val_change=True,  # a run may go on with other `logging` or `checkpointing`
                settings=wandb.Settings(console="off"),  # the live line is not for a log
            )
        except Exception as error:  # its own process answers with errors that are no wandb.Error
            raise ConfigError(
                f"logging.report_to: wandb cannot begin a run: {error}; set WANDB_MODE=offline to "
                "keep it on this machine, or leave wandb out"
            ) from None
        if not self.run.disabled and self.run.id != known:
            with staged(output) as staging:
                (staging / RUN_ID).write_text(f"{self.run.id}\n", encoding="utf-8")
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
        self.done, self.first = step, self.run.step
        for record in history:
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
        self.run.finish(exit_code=int(failed))


Tracker: TypeAlias = TensorBoard | Wandb


def trackers(
    report_to: list[str],
    output: Path,
    run_name: str | None,
    project: str,
    settings: dict[str, Any],
    history: list[dict[str, Any]],
    step: int,
) -> list[Tracker]:
    """Opens what `report_to` names.

    Args:
        report_to: names out of `NAMES`.
        output: the output folder; it exists.
        run_name: None takes the output folder's name.
        project: for wandb.
        settings: section -> field -> value.
        history: records of the run up to here.
        step: the last optimiser step that was done; 0 begins a new run.

    Raises:
        ConfigError: a package is missing, or wandb cannot begin.
        OSError: the output folder cannot be written to.
    """
    require_trackers(report_to)
    name = run_name or output.resolve().name
    opened: list[Tracker] = []
    if "tensorboard" in report_to:
        opened.append(TensorBoard(output / "runs" / name, settings, history, step))
    if "wandb" in report_to:
        try:
            opened.append(Wandb(project, name, output, settings, history, step))
        except BaseException:
            for tracker in opened:
                tracker.close(failed=True)
            raise
    return opened
