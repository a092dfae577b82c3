"""TensorBoard and wandb get what `metrics.jsonl` gets, once, whatever happens to the run.

Event files are read by TensorBoard's own reader; wandb runs offline and its log is read back.
"""

import dataclasses
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.training import recorded, start

from mlx_qlora.config import build, set_override
from mlx_qlora.errors import ConfigError
from mlx_qlora.train.checkpoint import RunState, checkpoints
from mlx_qlora.train.metrics import LoggingConfig, require_trackers, tracked

ROOT = Path(__file__).parents[2]
CLOCK = (
    *("train/tokens_per_second", "eval/runtime"),
    *("train/peak_memory_bytes", "train/process_memory_bytes"),
)
BOTH = ["tensorboard", "wandb"]
pytestmark = pytest.mark.usefixtures("usual_signals")
# A run in a process of its own; `ACT` happens when its console is told of step 5.
CHILD = """
import io, os, signal, sys, time
from pathlib import Path
from rich.console import Console
from support.training import start

class Ear(io.StringIO):
    def write(self, text):
        if "step 5/" in text:
            ACT
        sys.__stderr__.write(text)
        return super().write(text)

trackers = ["tensorboard", "wandb"]
start(Path(sys.argv[1]), Path(sys.argv[2]), Console(file=Ear(), width=200), report_to=trackers)
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No account, no network, and none of this machine's settings."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
            patch.delenv(name, raising=False)
        import wandb

        wandb.teardown()  # it remembers the mode of other tests in this process
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def whole(hf_tiny, tmp_path_factory):
    """An unbroken run with both trackers; (its folder, its result)."""
    out = tmp_path_factory.mktemp("tracked") / "whole"
    return out, start(hf_tiny[1], out, report_to=BOTH)[1]


def child(act: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The script above, in a process group of its own."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    env.pop("WANDB_SERVICE", None)  # or it would share wandb's process with these tests
    return subprocess.run(
        [sys.executable, "-c", CHILD.replace("ACT", act), *map(str, arguments)],
        env=env,
        text=True,
        capture_output=True,
        start_new_session=True,
        timeout=60,
    )


def points(history: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, float32 value) of each point, as a history has them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in history:
        for name, value in tracked(record).items():
            found.setdefault(name, []).append((record["step"], float(np.float32(value))))
    return found


def events(out: Path, run: str | None = None) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "runs" / (run or out.name)), {"scalars": 0}).Reload()


def scalars(read: Any) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of each point, as TensorBoard reads them."""
    tags = read.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags}


def args_of(read: Any) -> list[dict[str, Any]]:
    found = read.Tensors("args/text_summary") if read.Tags()["tensors"] else []
    return [json.loads(event.tensor_proto.string_val[0]) for event in found]


def without_clock(found: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in found.items() if name not in CLOCK}


def offline_runs(out: Path) -> list[Path]:
    """The logs of offline runs, oldest first."""
    found = (out / "wandb").glob("offline-run-*/run-*.wandb")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def wandb_log(path: Path) -> list[Any]:
    """The records of a finished run: wandb's own process writes the last ones when it can."""
    for _ in range(200):
        log = parsed(path)
        if any(record.HasField("exit") for record in log):
            return log
        time.sleep(0.05)
    raise AssertionError(f"{path} was not finished")


def parsed(path: Path) -> list[Any]:
    """The records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes.

    See https://github.com/google/leveldb/blob/main/doc/log_format.md.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    content, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if at + 7 + length > len(content):
            break  # not written to its end yet
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(parts))
            parts = b""
    return found


def rows(log: list[Any]) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    return [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in log
        if r.HasField("history")
    ]


def series(log: list[Any]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, float32 value) of each point of a wandb run."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows(log):
        for name, value in row.items():
            if name.startswith(("train/", "eval/")) and name != "train/global_step":
                found.setdefault(name, []).append((row["_step"], float(np.float32(value))))
    return found


def config_of(log: list[Any]) -> dict[str, Any]:
    (run,) = (record.run for record in log if record.HasField("run"))
    return {update.key: json.loads(update.value_json) for update in run.config.update}


# ---- what they are told ------------------------------------------------------------------------


def test_names_are_those_that_transformers_writes(whole):
    from transformers.integrations.integration_utils import rewrite_logs

    history = whole[1].log_history
    assert {"loss", "eval_loss"} <= {key for record in history for key in record}
    for record in history:
        logs = {key: value for key, value in record.items() if key != "step"}
        assert tracked(record) == rewrite_logs(logs)


def test_of_an_event_only_numbers_go_out():
    skipped = {"step": 3, "epoch": 0.5, "skipped": "loss nan", "rows": ["line 7"]}
    assert tracked(skipped) == {"train/epoch": 0.5, "train/skipped": 1}
    spike = {"step": 3, "epoch": 0.5, "spike": 9.0, "usual": 1.5}
    assert tracked(spike) == {"train/epoch": 0.5, "train/spike": 9.0, "train/usual": 1.5}


def test_tensorboard_reads_what_metrics_jsonl_holds(whole):
    out, result = whole
    read = events(out)
    assert scalars(read) == points(recorded(out))
    assert [step for step, _ in scalars(read)["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in scalars(read)["eval/loss"]] == [4, 8]
    (args,) = args_of(read)
    assert args["training"]["learning_rate"] == 1e-2 and args["lora"]["r"] == 4
    assert args["model"]["base_model_name_or_path"] == "org/base"
    assert result.log_history == recorded(out)


def test_wandb_has_the_history_and_the_settings(whole):
    out = whole[0]
    (path,) = offline_runs(out)
    log = wandb_log(path)
    assert series(log).keys() == points(recorded(out)).keys()
    wanted = {name: dict(values) for name, values in points(recorded(out)).items()}
    assert {name: dict(values) for name, values in series(log).items()} == wanted
    assert [row["_step"] for row in rows(log)] == list(range(1, 9)), "one row per step"
    assert all(row["train/global_step"] == row["_step"] for row in rows(log))
    assert config_of(log)["training"]["learning_rate"] == 1e-2
    assert config_of(log)["lora"]["target_modules"][0] == "q_proj"
    (run,) = (record.run for record in log if record.HasField("run"))
    assert (run.project, run.display_name) == ("mlx-qlora", "whole")
    assert run.run_id == (out / "wandb_run_id").read_text().strip()
    assert [r.exit.exit_code for r in log if r.HasField("exit")] == [0]


def test_the_name_and_the_project_can_be_chosen(hf_tiny, tmp_path):
    names = {"run_name": "my run", "project": "others"}
    start(hf_tiny[1], tmp_path / "out", report_to=BOTH, logging_steps=8, max_steps=2, **names)
    assert [step for step, _ in scalars(events(tmp_path / "out", "my run"))["train/loss"]] == [2]
    (path,) = offline_runs(tmp_path / "out")
    (run,) = (record.run for record in wandb_log(path) if record.HasField("run"))
    assert (run.project, run.display_name) == ("others", "my run")


# ---- a run that ends early, and goes on --------------------------------------------------------


def test_a_killed_run_goes_on_as_one_series(hf_tiny, whole, tmp_path):
    """Killed at step 5, gone on from checkpoint 3: steps 4 and 5 are there once."""
    out = tmp_path / "parts"
    killed = child("os.kill(os.getpid(), signal.SIGKILL)", hf_tiny[1], out)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3"]
    assert scalars(events(out))["train/loss"][-1][0] == 4, "it had written more than it kept"
    run_id = (out / "wandb_run_id").read_text()

    start(hf_tiny[1], out, report_to=BOTH)
    assert len(list((out / "runs" / "parts").iterdir())) == 2
    read = events(out)
    assert scalars(read) == points(recorded(out))
    assert without_clock(scalars(read)) == without_clock(scalars(events(whole[0])))
    assert len(args_of(read)) == 1

    assert (out / "wandb_run_id").read_text() == run_id
    paths = offline_runs(out)
    assert [path.name for path in paths] == [f"run-{run_id.strip()}.wandb"] * 2
    unbroken = series(wandb_log(offline_runs(whole[0])[0]))
    assert without_clock(series(wandb_log(paths[-1]))) == without_clock(unbroken)


def test_a_tracker_that_joins_late_gets_what_came_before_and_of_a_run_anew_that_alone(
    hf_tiny, tmp_path
):
    out, board = tmp_path / "out", {"report_to": ["tensorboard"]}
    start(hf_tiny[1], out)
    (out / "checkpoint-8" / "resume_state.json").unlink()
    start(hf_tiny[1], out, **board)
    assert scalars(events(out)) == points(recorded(out))
    assert len(args_of(events(out))) == 1
    start(hf_tiny[1], out, **board, resume_from_checkpoint="none", max_steps=3)
    assert scalars(events(out)) == points(recorded(out))
    assert args_of(events(out))[-1]["training"]["max_steps"] == 3  # TensorBoard keeps old texts


def test_a_step_that_wandb_closed_is_not_sent_again(monkeypatch, tmp_path):
    """As online, where a resumed run begins behind the last step that the server has.

    Steps 1 to 6 are there; the run goes on from a checkpoint of step 4.
    """
    import wandb

    from mlx_qlora.train.metrics import Wandb

    monkeypatch.setattr(wandb.Run, "step", property(lambda run: 7))
    history = [{"step": step, "loss": 1.0 / step} for step in range(1, 5)]
    run = Wandb("p", "n", tmp_path, {}, RunState(step=4, log_history=history))
    run.write(4, {"eval/loss": 0.5})  # was due when a signal came
    for step in range(5, 10):
        run.write(step, {"train/loss": 1.0 / step})
    run.close(failed=False)
    found = rows(wandb_log(offline_runs(tmp_path)[0]))
    assert [row["_step"] for row in found] == [7, 8, 9]
    assert found[0]["eval/loss"] == 0.5 and found[0]["train/loss"] == 1 / 7


def test_ctrl_c_leaves_both_whole(hf_tiny, tmp_path):
    """As from a terminal: the whole process group gets the signal, wandb's own process too."""
    out = tmp_path / "out"
    stopped = child("os.killpg(0, signal.SIGINT)", hf_tiny[1], out)
    assert "Interrupted: stopped by SIGINT; saved" in stopped.stderr, stopped.stderr
    assert scalars(events(out)) == points(recorded(out))
    log = wandb_log(offline_runs(out)[0])
    assert series(log)["train/loss"] == points(recorded(out))["train/loss"]
    assert [r.exit.exit_code for r in log if r.HasField("exit")] == [1]


# ---- what fails --------------------------------------------------------------------------------


def test_a_full_disk_ends_the_tracker_and_not_the_run(hf_tiny, whole, monkeypatch, tmp_path):
    from tensorboard.summary.writer.record_writer import RecordWriter

    written, write = [], RecordWriter.write

    def fails(self: Any, data: bytes) -> None:
        written.append(data)
        if len(written) > 6:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fails)
    printed = io.StringIO()
    console = Console(file=printed)
    _, result = start(hf_tiny[1], tmp_path / "out", console, report_to=["tensorboard"])
    assert result.steps == 8 and len(recorded(tmp_path / "out")) == len(result.log_history) == 10
    (warning,) = re.findall("warning.*", printed.getvalue())
    assert "logging.report_to: tensorboard:" in warning and "No space left" in warning
    assert "the run goes on without it" in warning
    assert [step for step, _ in scalars(events(tmp_path / "out"))["train/loss"]] == [1, 2, 3]


def test_what_wandb_refuses_is_said_before_training(hf_tiny, tmp_path):
    """Here its own process refuses: the run is open elsewhere."""
    from mlx_qlora.train.metrics import Wandb

    out = tmp_path / "out"
    start(hf_tiny[1], out, report_to=BOTH)
    (out / "checkpoint-8" / "resume_state.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*")}
    other = Wandb("p", "n", out, {}, RunState(step=6))
    with pytest.raises(ConfigError, match=r"wandb cannot start a run: run ID .* in use; set WAN"):
        start(hf_tiny[1], out, report_to=BOTH)
    other.close(failed=False)
    kept = ("metrics.jsonl", "checkpoint-3", "checkpoint-6", "wandb_run_id")
    assert {name: before[out / name] for name in kept} == {
        name: (out / name).stat().st_mtime_ns for name in kept
    }


def test_wandb_s_own_process_may_die(hf_tiny, tmp_path):
    """It is the only child that a run has."""
    act = (
        "import subprocess; found = subprocess.run(['pgrep', '-P', str(os.getpid())], "
        "capture_output=True).stdout.split(); os.kill(int(found[0]), signal.SIGKILL); "
        "time.sleep(0.5)"
    )
    ended = child(act, hf_tiny[1], tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert len(re.findall(r"warning   logging\.report_to: wandb", ended.stderr)) == 1
    assert recorded(tmp_path / "out")[-1]["step"] == 8
    assert scalars(events(tmp_path / "out")) == points(recorded(tmp_path / "out"))


@pytest.mark.parametrize("name", BOTH)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        require_trackers(BOTH)
    remedy = f"{name} is not installed; run: pip install 'mlx-qlora[{name}]'"
    assert str(caught.value) == f"logging.report_to: {remedy}"


def test_a_folder_of_offline_runs_is_no_package(monkeypatch, tmp_path):
    import importlib.util

    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(ConfigError, match="wandb is not installed"):
        require_trackers(["wandb"])


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WANDB_MODE": ""}, "wandb has no API key on this machine; run `wandb login`, or set "),
        ({"WANDB_MODE": "", "WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"WANDB_MODE": "offline"}, "fine"),
        ({"WANDB_MODE": "disabled"}, "fine"),
    ],
)
def test_nobody_is_asked_for_a_key(env, words):
    """On a terminal, where wandb would ask."""
    ours, theirs = pty.openpty()
    code = textwrap.dedent("""
        from mlx_qlora.errors import ConfigError
        from mlx_qlora.train.metrics import require_trackers
        try:
            require_trackers(["wandb"])
            print("fine")
        except ConfigError as error:
            print(error)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={k: v for k, v in {**os.environ, **env}.items() if v},
        cwd=ROOT,
        text=True,
    ) as process:
        said, _ = process.communicate(timeout=30)
    os.close(theirs)
    os.close(ours)
    assert words in said and said.count("\n") == 1


# ---- what it costs who does not ask for it -----------------------------------------------------


def test_a_run_without_trackers_imports_neither_package(hf_tiny, tmp_path):
    code = CHILD.replace("ACT", "pass").replace('["tensorboard", "wandb"]', "[]")
    code += "print([n for n in sys.modules if n in ('wandb', 'tensorboard', 'tensorflow')])"
    code = f"import mlx_qlora\n{code}"
    arguments = [sys.executable, "-c", code, hf_tiny[1], tmp_path / "out"]
    ended = subprocess.run(arguments, text=True, capture_output=True, timeout=60)
    assert ended.stdout.strip() == "[]", ended.stderr
    assert not (tmp_path / "out" / "runs").exists() and not (tmp_path / "out" / "wandb").exists()


# ---- the fields --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tensorboard", ["tensorboard"]),
        ("[tensorboard,wandb]", BOTH),
        ("[tensorboard, wandb]", BOTH),
        ("[wandb, wandb]", ["wandb"]),
        ("[]", []),
    ],
)
def test_a_word_or_a_list_names_trackers(text, value):
    values: dict[str, Any] = {}
    set_override(values, f"logging.report_to={text}")
    assert build(values).logging.report_to == value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"report_to": "tensorbord"}, "got 'tensorbord'; did you mean 'tensorboard'?"),
        ({"report_to": ["wandb", "wand"]}, "got 'wand'; did you mean 'wandb'?"),
        ({"report_to": "none"}, r"tensorboard, wandb, \[tensorboard, wandb\] or \[\]; got 'none'"),
        ({"report_to": None}, "logging.report_to must be a list of text or text; got None"),
        ({"report_to": [1]}, "logging.report_to must be a list of text or text"),
        ({"run_name": "a/b"}, "logging.run_name must name a folder, without a /; got 'a/b'"),
        ({"run_name": ".."}, "logging.run_name must name a folder"),
        ({"run_name": ""}, "logging.run_name must name a folder"),
        ({"project": ""}, "logging.project must name a project"),
    ],
)
def test_what_is_no_tracker_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        build({"logging": fields})


def test_a_tracker_does_not_make_it_another_run():
    """The same run may go on with another tracker: the fields decide no weights."""
    from mlx_qlora.record import deciding_values

    config = build({})
    other = dataclasses.replace(config, logging=LoggingConfig(5, BOTH, "n", "p"))
    assert deciding_values(config) == deciding_values(other)
