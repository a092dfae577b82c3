"""`mlx-qlora doctor`: what this machine is, what it lacks for a run, and the command that fixes it.

Whatever goes wrong in a check becomes a finding, too. Nothing is downloaded or changed.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mlx_qlora import device
from mlx_qlora.before.plan import trainable
from mlx_qlora.config import RunConfig
from mlx_qlora.cpu import blas as cpu_blas
from mlx_qlora.distributed import in_time
from mlx_qlora.errors import SourceError, UserError, shown, visible
from mlx_qlora.model import hub
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.weights import open_checkpoint
from mlx_qlora.train.memory import adapter_bytes


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str  # "ok"; "warning": works, but slowly or not in every case; "error": does not work
    name: str  # of what was looked at
    text: str
    fix: str | None = None  # a command to paste; beside "ok", one that is worth knowing


_ok, _warning, _error = (partial(Finding, state) for state in ("ok", "warning", "error"))

# ---- the command ---------------------------------------------------------------------------------

COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
COLOURS |= {"pass": "green", "slower": "yellow", "larger": "yellow", "fail": "bold red"}
MARGIN = 9 + 13  # columns of the state and the name


def doctor(console: Console, run: "PlannedRun") -> list[Finding]:
    """Examines this machine, and the model of a run if it names one; prints what it finds."""
    return examine(console, *MACHINE, run.hub, run.model, run.disk, packages, environment)


def examine(console: Console, *checks: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Makes some checks, and prints what they find as they go."""
    report = list[Finding]()
    for check in checks:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the findings say it
                for finding in check():
                    report.append(finding)
                    show(console, finding)
        except Exception as cause:  # a check that breaks must not keep the others from being made
            name = getattr(check, "__name__", "check").replace("_", " ")
            text = f"could not be checked ({type(cause).__name__}: {cause})"
            report.append(_warning(name, text))
            show(console, report[-1])
    return report


def show(console: Console, finding: Finding) -> None:
    """A line of the table; its fix has a line to itself and is not wrapped: it can be pasted."""
    width = max(console.width - MARGIN, 20) if console.is_terminal else sys.maxsize
    lines = textwrap.wrap(
        visible(finding.text), width, break_long_words=False, break_on_hyphens=False
    )
    row = Text(f"{finding.state:<9}", COLOURS[finding.state])
    row.append(f"{finding.name:<13}", "bold")
    row.append(("\n" + " " * MARGIN).join(lines), "default")
    if finding.fix:
        row.append(f"\n{'':<{MARGIN}}{visible(finding.fix)}", "cyan")
    console.print(row, soft_wrap=True, highlight=False)


# ---- the machine ---------------------------------------------------------------------------------

SIDE = {"cpu": 1024, "metal": 4096, "cuda": 8192}  # of the products that are timed
IF_THROTTLED = {"metal": "sudo pmset -a lowpowermode 0", "cuda": "nvidia-smi"}
REFERENCE_BLAS = 10e9  # FLOP/s: the reference BLAS stays below on any core, an OpenBLAS above


def python() -> Iterator[Finding]:
    """On a Mac one for arm64, since MLX has no other wheels there."""
    text = f"Python {platform.python_version()}, {platform.machine()}"
    arm = "/opt/homebrew/bin/brew install python@3.12 && /opt/homebrew/bin/python3.12 -m venv .venv"
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        yield _error("python", f"{text}, under Rosetta or on Intel; MLX needs arm64", arm)
    else:
        yield _ok("python", text)


def system() -> Iterator[Finding]:
    """macOS 14 or newer, or Linux."""
    on_mac = sys.platform == "darwin"
    text = f"macOS {platform.mac_ver()[0]}" if on_mac else f"Linux {platform.release()}"
    if on_mac and _macos() < 14:
        fix = "softwareupdate --install --all --restart"
        yield _error("system", f"{text}; MLX needs 14 or newer", fix)
    elif on_mac or sys.platform.startswith("linux"):
        yield _ok("system", text)
    else:
        yield _error("system", f"{platform.system()}: MLX runs on macOS and Linux")


def mlx() -> Iterator[Finding]:
    """Versions, and the device and dtype that are computed with."""
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm")]
        here = device.current()
    except (ImportError, OSError) as cause:
        fix = "pip install --upgrade --force-reinstall mlx mlx-lm"
        yield _error("mlx", f"MLX cannot be loaded ({cause})", fix)
        return
    text = f"{', '.join(versions)}; computes on {here.kind} in {here.dtype}"
    if here.kind == "cpu" and device.has_gpu_wheel():
        fix = "pip uninstall -y mlx-cpu && pip install --force-reinstall --no-deps mlx-cuda-13"
        yield _warning("mlx", f"{text}, though a CUDA wheel is installed", fix)
    elif here.kind == "cpu" and sys.platform == "darwin":
        yield _warning("mlx", f"{text}: Metal is not available, as in a virtual machine")
    else:
        yield _ok("mlx", text)


def chip() -> Iterator[Finding]:
    """The chip, its cores, and how much of the memory MLX may use."""
    facts = device.facts()
    memory, working_set = facts["memory_bytes"], facts["working_set_bytes"]
    text = f"{facts['chip']}, {facts['cores']} cores, {memory / 2**30:.0f} GB of memory"
    yield _ok("chip", f"{text}, of which MLX may use {working_set / 2**30:.1f}")


def wired_limit() -> Iterator[Finding]:
    """What macOS lets the GPU hold (github.com/ml-explore/mlx-lm, README, Large Models)."""
    if sys.platform != "darwin":
        return
    facts = device.facts()
    megabytes, working_set = facts["memory_bytes"] >> 20, facts["working_set_bytes"] >> 20
    limit = int(output_of("sysctl", "-n", "iogpu.wired_limit_mb"))
    text = f"set to {limit / 1024:.1f} GB"
    text = text if limit else f"macOS's default, {working_set / 1024:.1f} GB"
    most = megabytes - max(4096, megabytes // 8)  # the rest is for macOS itself
    command = "sudo sysctl iogpu.wired_limit_mb="
    if _macos() < 15:
        yield _ok("wired limit", f"{text}; macOS 15 and newer can raise it")
    elif limit > most:
        text += f" of {megabytes / 1024:.0f}; macOS itself may run out of memory"
        yield _warning("wired limit", text, f"{command}0")
    elif most > max(limit, working_set):
        text += f"; up to {most / 1024:.1f} GB is possible, until the next restart"
        yield _ok("wired limit", text, f"{command}{most}")
    else:
        yield _ok("wired limit", text)


def blas() -> Iterator[Finding]:
    """Which library multiplies on a CPU."""
    if device.current().kind == "cuda":
        yield _ok("blas", "the GPU multiplies")
    elif sys.platform == "darwin" or device.openblas:
        yield _ok("blas", str(device.facts()["blas"]))
    else:
        text = "MLX's reference BLAS, some 70 times slower in float32 than OpenBLAS"
        fix = "pip install scipy-openblas32"
        if wanted := os.environ.get("MLX_QLORA_BLAS"):
            text, fix = f"{text}: MLX_QLORA_BLAS={wanted}", "unset MLX_QLORA_BLAS"
        yield _warning("blas", text, fix)


def matmul() -> Iterator[Finding]:
    """The measured rate, against what the chip is known for."""
    here, chip = device.current(), str(device.facts()["chip"]).lower()
    side = SIDE[here.kind]
    with cpu_blas.threads(device.cores()):
        rate = matmul_rate(side)
    text = f"{rate / 1e9:,.0f} GFLOP/s in {here.dtype}, {side} x {side}"
    if here.kind == "cpu":
        if rate >= REFERENCE_BLAS:
            yield _ok("matmul", text)
            return
        fix = "pip install scipy-openblas32" if sys.platform.startswith("linux") else None
        text += ", the speed of a reference BLAS; OpenBLAS is many times as fast"
        yield _warning("matmul", text, fix)
        return
    apple = device.APPLE.get(re.sub(r"\W+", "-", chip.removeprefix("apple ").strip()))
    nvidia = next((rate for name, rate in device.NVIDIA.items() if name in chip), 0.0)
    expected = 1e12 * (apple or nvidia)
    if expected:
        text += f"; about {expected / 1e9:,.0f} are expected of this chip"
    if rate < expected / 2:
        yield _warning("matmul", f"{text}; it may be throttled or shared", IF_THROTTLED[here.kind])
    else:
        yield _ok("matmul", text)


def matmul_rate(side: int) -> float:
    """FLOP/s of square products in the compute dtype, by the shortest in about a second."""
    import mlx.core as mx

    x = mx.random.normal((side, side)).astype(device.current().compute_dtype)
    mx.eval(x, x @ x)  # the first one pays for the kernel
    timer = timeit.Timer(lambda: mx.eval(x @ x))
    n, _ = timer.autorange()  # in a fifth of a second
    return 2 * side**3 / min(timer.repeat(5 * n, number=1))


def _macos() -> int:
    return int(platform.mac_ver()[0].split(".")[0])


def output_of(*command: str) -> str:
    """What a command of the system prints, if it does so within three seconds."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True)
    return done.stdout.strip()


MACHINE = (python, system, mlx, chip, wired_limit, blas, matmul)

# ---- what a run needs: the hub, a model, room on the disks ---------------------------------------

PATIENCE = 2.5  # seconds until the hub counts as away
LONGER = 6.0  # seconds for all that is asked about a model, once the hub has answered
# Llama 3.1 8B in 16 bits, and what the defaults train of it: a yardstick where no model is named.
LLAMA_8B_BYTES, LLAMA_8B_TRAINED = 2 * 8_030_261_248, 41_943_040


@dataclass
class PlannedRun:
    """The run that somebody has in mind, and what is found out about it check by check."""

    config: RunConfig
    away: Exception | None = None  # what kept the hub from answering
    to_fetch: int = LLAMA_8B_BYTES  # bytes to download
    n_trained: int = LLAMA_8B_TRAINED  # numbers that the run trains
    of: str = "Llama 3.1 8B"  # the model whose figures these are; this one until another is known

    def hub(self) -> Iterator[Finding]:
        """Whether the hub answers, and as whom it knows us."""
        hub.check_environment()
        from huggingface_hub import constants, errors, get_token
        from huggingface_hub.utils import build_hf_headers, get_session

        url = constants.ENDPOINT

        def ask() -> Any:
            headers = build_hf_headers()  # asks the hub itself, at times
            return get_session().get(f"{url}/api/whoami-v2", headers=headers, timeout=PATIENCE)

        only = "only models on this disk can be used"
        if constants.HF_HUB_OFFLINE:
            self.away = errors.OfflineModeIsEnabled()
            yield _warning("hub", f"HF_HUB_OFFLINE is set: {only}", "unset HF_HUB_OFFLINE")
            return
        try:
            answer = _in_time(ask, PATIENCE)
            status = answer.status_code
            if status >= 500:
                raise RuntimeError(f"it answered {status}")
        except Exception as cause:
            self.away = cause
            text = f"{url} cannot be reached ({cause}): {only}"
            yield _warning("hub", text, f"curl --head {url}")
            return
        yield _ok("hub", f"{url} answers")
        if status == 200:
            yield _ok("login", f"logged in as {answer.json().get('name')}")
        elif get_token() is None:
            text = "not logged in; enough for public models, not for gated ones such as Meta's"
            yield _ok("login", f"{text} Llama", "hf auth login")
        elif status == 401:
            text = hub.token_refused("/api/whoami-v2")
            yield _error("login", text, _command(text))
        else:
            text = f"{url} answered {status} when asked for the account"
            yield _warning("login", text, "hf auth whoami")

    def model(self) -> Iterator[Finding]:
        """Whether the model can be had and read, and what it needs of the disks."""
        if self.config.model.source is None:
            return
        try:
            yield _ok("model", self._examined(self.config.model.source))
        except UserError as cause:
            yield _error("model", str(cause), _command(str(cause)))

    def _examined(self, source: str) -> str:
        """Asks for no more than the headers of files here, and sizes and a config elsewhere."""
        files, size, to_fetch = None, 0, 0
        revision = self.config.model.revision
        if not hub.is_on_hub(source):
            files = hub.resolve(source, revision)
        elif folder := hub.whole_copy(source, revision):
            files = hub.ModelFiles(folder, source, folder.name, source)
        elif self.away:
            raise SourceError(hub.explain(self.away, source, revision))
        if files:
            config = open_checkpoint(files).config
        else:
            ask = partial(hub.on_offer, source, revision, PATIENCE)
            try:
                config, size, to_fetch = _in_time(ask, LONGER)
            except RuntimeError as cause:
                raise SourceError(hub.explain(cause, source, revision)) from cause
        llama = LlamaConfig.from_hf(config)
        self.n_trained = trainable(LlamaForCausalLM(llama), self.config.lora)  # without memory
        self.of, self.to_fetch = source, to_fetch
        family = f"{llama.model_type}, {llama.num_hidden_layers} layers"
        if files:
            whole = "; completely in the cache" if hub.is_on_hub(source) else ""
            return f"{files.path}: {family}{whole}"
        begun = "partly in the cache" if to_fetch < size else "not in the cache yet"
        begun += f"; {to_fetch / 1e9:,.2f} GB to fetch"
        return f"{source}: {family} that you may read, {begun}"

    def disk(self) -> Iterator[Finding]:
        """Whether there is room for the download, and for the checkpoints of a run."""
        from huggingface_hub import constants

        cache, checkpointing = Path(constants.HF_HUB_CACHE), self.config.checkpointing
        output = Path(checkpointing.output_dir).absolute()
        # The newest ones, the best one, and one more before the oldest of them goes.
        kept = checkpointing.save_total_limit + 2
        need = kept * adapter_bytes(self.n_trained)
        fetch = f"{self.to_fetch / 1e9:,.2f} GB to fetch {self.of}" if self.to_fetch else "none"
        yield self._room("cache", cache, self.to_fetch, fetch, "export HF_HOME=")
        checkpoints = f"{need / 1e9:,.2f} GB for {kept} checkpoints of {self.of}"
        if self.to_fetch and _existing(cache).stat().st_dev == _existing(output).stat().st_dev:
            need, checkpoints = need + self.to_fetch, f"{checkpoints}, besides the download"
        yield self._room("output", output, need, checkpoints, "mlx-qlora train --output-dir ")

    def _room(self, name: str, folder: Path, need: int, what: str, fix: str) -> Finding:
        """Whether a disk has room for a folder that need not exist yet, and we may write there."""
        existing, fix = _existing(folder), f"{fix}/path/on/another/disk"
        if not existing.is_dir():
            return _error(name, f"{existing} is a file, so {folder} cannot be made", fix)
        if not os.access(existing, os.W_OK | os.X_OK):
            return _error(name, f"{existing} cannot be written to by this user", fix)
        free = shutil.disk_usage(existing).free
        text = f"{folder}: {free / 1e9:,.2f} GB free, needed: {what}"
        if free >= need:
            return _ok(name, text)
        # Too small for the yardstick is perhaps not too small for the model.
        is_known = self.of == self.config.model.source
        return _error(name, text, fix) if is_known else _warning(name, text, fix)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _in_time(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns, or a RuntimeError if it takes longer: name servers heed no timeout."""
    try:
        return in_time(work, seconds, "the hub")
    except TimeoutError:
        raise RuntimeError(f"no answer within {seconds:g} s") from None


def _command(message: str) -> str | None:
    """The command in a message of `hub`, which is written for people."""
    if match := re.search(r"unset (HF_TOKEN)|(HF_HUB_OFFLINE) is set", message):
        return f"unset {match[1] or match[2]}"
    only_gguf = r"as GGUF \(([^,)]+).*(hf download \S+) FILE (--local-dir \.)"
    if match := re.search(only_gguf, message):
        file, download, here = match.groups()
        return f"{download} {file} {here}"
    # Access is asked for before one logs in.
    if match := re.search(r"ask for access at (https://\S+[^,\s])", message):
        return f"python -m webbrowser {match[1]}"
    match = re.search(r"pip install .*|(?<=`)[^`]+(?=`)", message)
    return match[0] if match else None


# ---- packages and variables ----------------------------------------------------------------------

EXTRAS = {
    "tensorboard": ("tensorboard", "logging.report_to=[tensorboard]"),
    "wandb": ("wandb", "logging.report_to=[wandb]"),
    "pyarrow": ("parquet", "rows in Parquet files"),
    "datasets": ("datasets", "rows from data sets of the hub"),
    "gguf": ("gguf", "adapters for llama.cpp and Ollama"),
    "rouge-score": ("evaluate", "ROUGE-L of answers"),
    "sacrebleu": ("evaluate", "chrF of answers"),
}


def packages() -> Iterator[Finding]:
    """Which optional ones are installed, and what each is for."""
    for package, (extra, purpose) in EXTRAS.items():
        try:
            yield _ok(package, f"{importlib.metadata.version(package)}, for {purpose}")
        except importlib.metadata.PackageNotFoundError:
            fix = f"pip install 'mlx-qlora[{extra}]'"
            yield _ok(package, f"not installed; optional, for {purpose}", fix)


def environment() -> Iterator[Finding]:
    """Variables that change what a run does, where they are set or should be."""
    watchdog = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
    if sys.platform == "darwin":
        if os.environ.get(watchdog):
            yield _ok("watchdog", f"{watchdog} is set: macOS does not stop long GPU work")
        elif '"spdisplays_ndrvs"' in output_of("system_profiler", "-json", "SPDisplaysDataType"):
            # A display is attached: github.com/ml-explore/mlx/issues/3267
            text = "macOS stops GPU work that keeps the display waiting (ImpactingInteractivity)"
            yield _ok("watchdog", f"{text}; if it does", f"export {watchdog}=1")
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if threads and device.current().kind == "cpu" and sys.platform.startswith("linux"):
        text = f"OPENBLAS_NUM_THREADS={threads}: training sets its own number, numpy keeps to it"
        yield _ok("environment", text)
    for name in ("HF_HOME", "HF_ENDPOINT"):
        if value := os.environ.get(name):
            yield _ok("environment", shown(f"{name}={value}"))
