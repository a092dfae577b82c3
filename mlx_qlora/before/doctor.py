"""`mlx-qlora doctor`: what this machine is, what it lacks for a run, and the command that mends it.

Each check reports what it finds as lines, and whatever goes wrong in it becomes a line, too. The
network is asked for a few seconds at most; nothing is downloaded and nothing on disk is changed.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from mlx_qlora import device
from mlx_qlora.before.plan import trainable
from mlx_qlora.cpu import blas
from mlx_qlora.errors import SourceError, UserError
from mlx_qlora.model import hub
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.weights import open_checkpoint
from mlx_qlora.train.memory import adapter_bytes


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: `warning` works, but slowly or not in every case; `error` does not work.
        text: what was found.
        fix: a command to paste; beside `ok`, one that is worth knowing. None where there is none.
    """

    name: str
    state: Literal["ok", "warning", "error"]
    text: str
    fix: str | None = None


# ---- the machine ---------------------------------------------------------------------------------


SIDE = {"cpu": 1024, "metal": 4096, "cuda": 8192}  # of the products that are timed


REFERENCE_BLAS = 10e9  # FLOP/s: the reference BLAS stays below on any core, an OpenBLAS above


def python() -> Iterator[Finding]:
    """3.10 or newer; on a Mac one for arm64, since MLX has no other wheels there."""
    text = f"Python {platform.python_version()}, {platform.machine()}"
    arm = "/opt/homebrew/bin/brew install python@3.12 && /opt/homebrew/bin/python3.12 -m venv .venv"
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        yield Finding("python", "error", f"{text}, under Rosetta or on Intel; MLX needs arm64", arm)
    elif tuple(map(int, platform.python_version_tuple()[:2])) < (3, 10):
        fix = "uv venv --python 3.12"
        yield Finding("python", "error", f"{text}; 3.10 or newer is needed", fix)
    else:
        yield Finding("python", "ok", text)


def system() -> Iterator[Finding]:
    """macOS 14 or newer, or Linux."""
    if sys.platform == "darwin":
        version = platform.mac_ver()[0]
        if int(version.split(".")[0]) < 14:
            fix = "softwareupdate --install --all --restart"
            yield Finding("system", "error", f"macOS {version}; MLX needs 14 or newer", fix)
        else:
            yield Finding("system", "ok", f"macOS {version}")
    elif sys.platform.startswith("linux"):
        yield Finding("system", "ok", f"Linux {platform.release()}")
    else:
        yield Finding("system", "error", f"{platform.system()}: MLX runs on macOS and Linux")


def mlx() -> Iterator[Finding]:
    """Versions, and the device and dtype that are computed with."""
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm")]
        kind, dtype = device.current().kind, _dtype()
    except (ImportError, OSError) as error:
        fix = "pip install --upgrade --force-reinstall mlx mlx-lm"
        yield Finding("mlx", "error", f"MLX cannot be loaded ({error})", fix)
        return
    text = f"{', '.join(versions)}; computes on {kind} in {dtype}"
    if kind == "cpu" and blas.has_gpu_wheel():
        fix = "pip uninstall -y mlx-cpu && pip install --force-reinstall --no-deps mlx-cuda-13"
        yield Finding("mlx", "warning", f"{text}, though a CUDA wheel is installed", fix)
    elif kind == "cpu" and sys.platform == "darwin":
        yield Finding("mlx", "warning", f"{text}: Metal is not available, as in a virtual machine")
    else:
        yield Finding("mlx", "ok", text)


def chip() -> Iterator[Finding]:
    """The chip, its cores, and how much of the memory MLX may use."""
    facts = device.facts()
    memory, working_set = facts["memory_bytes"], facts["working_set_bytes"]
    text = f"{facts['chip']}, {facts['cores']} cores, {memory / 2**30:.0f} GiB of memory"
    yield Finding("chip", "ok", f"{text}, of which MLX may use {working_set / 2**30:.1f}")


def wired_limit() -> Iterator[Finding]:
    """What macOS lets the GPU hold (github.com/ml-explore/mlx-lm, README, Large Models)."""
    if sys.platform != "darwin":
        return
    facts = device.facts()
    megabytes, working_set = facts["memory_bytes"] >> 20, facts["working_set_bytes"] >> 20
    limit = int(output_of("sysctl", "-n", "iogpu.wired_limit_mb"))
    text = f"set to {limit:,} MB" if limit else f"macOS's own choice, {working_set:,} MB"
    most = megabytes - max(4096, megabytes // 8)  # the rest is for macOS itself
    if int(platform.mac_ver()[0].split(".")[0]) < 15:
        yield Finding("wired limit", "ok", f"{text}; macOS 15 could raise it")
    elif limit > most:
        text = f"{text} of {megabytes:,}: macOS itself may run out of memory"
        yield Finding("wired limit", "warning", text, "sudo sysctl iogpu.wired_limit_mb=0")
    elif most > max(limit, working_set):
        text = f"{text}; a model that needs more may have {most:,} MB, until the next restart"
        yield Finding("wired limit", "ok", text, f"sudo sysctl iogpu.wired_limit_mb={most}")
    else:
        yield Finding("wired limit", "ok", text)


def blas_library() -> Iterator[Finding]:
    """Which library multiplies on a CPU."""
    chosen, wanted = device.facts()["blas"], os.environ.get("MLX_QLORA_BLAS")
    if device.current().kind == "cuda":
        yield Finding("blas", "ok", "the GPU multiplies")
    elif sys.platform == "darwin" or blas.loaded():
        yield Finding("blas", "ok", str(chosen))
    else:
        text = "MLX's reference BLAS, some 70 times slower in float32 than OpenBLAS"
        if wanted:
            text, fix = f"{text}: MLX_QLORA_BLAS={wanted}", "unset MLX_QLORA_BLAS"
        else:
            fix = "pip install cmeel-openblas"
        yield Finding("blas", "warning", text, fix)


def matmul() -> Iterator[Finding]:
    """The measured rate, against what the chip is known for."""
    kind, chip = device.current().kind, str(device.facts()["chip"]).lower()
    side = SIDE[kind]
    with blas.threads(device.cores()):
        rate = matmul_rate(side)
    text = f"{rate / 1e9:,.0f} GFLOP/s in {_dtype()}, {side} x {side}"
    known = {**device.APPLE, **device.NVIDIA}
    name = re.sub(r"\W+", "-", chip.removeprefix("apple ").strip())
    near = [name] if name in known else [key for key in device.NVIDIA if key in chip]
    expected = known[near[0]] * 1e12 if near and kind != "cpu" else None
    if expected is not None:
        text += f"; about {expected / 1e9:,.0f} are expected of this chip"
    if kind == "cpu" and rate < REFERENCE_BLAS:
        fix = "pip install cmeel-openblas" if sys.platform.startswith("linux") else None
        text += ": the speed of a reference BLAS, which an OpenBLAS exceeds many times"
        yield Finding("matmul", "warning", text, fix)
    elif expected is not None and rate < expected / 2:
        fix = "sudo pmset -a lowpowermode 0" if kind == "metal" else "nvidia-smi"
        yield Finding("matmul", "warning", f"{text}: is it throttled, or shared?", fix)
    else:
        yield Finding("matmul", "ok", text)


def matmul_rate(
    side: int, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of square products in the compute dtype: 2 side^3 over the shortest of them.

    Args:
        side: rows and columns.
        seconds: how long to repeat it.
        clock: that it is timed by, in seconds.
    """
    import mlx.core as mx

    x = mx.random.normal((side, side)).astype(device.current().compute_dtype)
    mx.eval(x, x @ x)  # the first one pays for the kernel
    end, shortest = clock() + seconds, float("inf")
    while True:
        start = clock()
        mx.eval(x @ x)
        now = clock()
        shortest = min(shortest, now - start)
        if now >= end:
            return 2 * side**3 / shortest


def _dtype() -> str:
    return str(device.current().compute_dtype).removeprefix("mlx.core.")


def output_of(*command: str) -> str:
    """What a command of the system prints, if it does so within three seconds."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True)
    return done.stdout.strip()


# ---- what the hub offers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What the hub has of a model that we may read."""

    bytes: int  # of all files that we read
    bytes_to_fetch: int  # of those that the cache lacks
    config: dict[str, Any]  # config.json


def on_offer(repo: str, revision: str | None = None, timeout: float = 10) -> Offer:
    """Asks what `resolve` would download, and leaves the cache as it is.

    Not huggingface_hub's `dry_run`, which moves the cache's `refs/main` to the hub's newest commit:
    an older copy that is whole would then not be found any more without a network.

    Args:
        repo: as `org/name`.
        revision: a branch, tag or commit.
        timeout: seconds for each of three questions.

    Raises:
        SourceError: no access, no such repository or revision, no model in it, or no network.
    """
    from huggingface_hub import HfApi, errors, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session
    from huggingface_hub.utils import hf_raise_for_status as raise_for_status

    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=timeout).sha
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=commit)
        files = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
        names = [*filter_repo_objects(files, allow_patterns=hub.NEEDED, ignore_patterns=hub.UNREAD)]
        missing = [] if "config.json" in names else ["config.json"]
        if not any(name.endswith(".safetensors") for name in names):
            missing.append("*.safetensors")
        if missing:
            raise SourceError(hub.unfit(repo, [*files], missing))
        # Everybody may list a gated repository: only a file tells who may read it.
        url = hf_hub_url(repo, "config.json", revision=commit)
        answer = get_session().get(url, headers=build_hf_headers(), timeout=timeout)
        raise_for_status(answer)
        config = answer.json()
    except (OSError, RuntimeError, http_error) as error:
        raise SourceError(hub.explain(error, repo, revision)) from error
    cached = [try_to_load_from_cache(repo, name, revision=commit) for name in names]
    absent = [name for name, path in zip(names, cached) if not isinstance(path, str)]
    sizes = [sum(files[name] for name in some) for some in (names, absent)]
    return Offer(sizes[0], sizes[1], config if isinstance(config, dict) else {})


# ---- access --------------------------------------------------------------------------------------


PATIENCE = 2.5  # seconds until the hub counts as away


LONGER = 6.0  # seconds for all that is asked about a model, once the hub has answered


# Llama 3.1 8B in 16 bits, and what the defaults train of it: a yardstick where no model is named.
LLAMA_8B_BYTES, LLAMA_8B_TRAINED = 2 * 8_030_261_248, 41_943_040


@dataclass
class Needs:
    """What the named model needs of the disks; Llama 3.1 8B's needs as long as none is known.

    Attributes:
        fetch: bytes to download.
        trained: how many numbers a run trains.
        lora: what it trains.
        of: whose figures they are.
        is_yardstick: whether that model is not the one that was asked for.
    """

    fetch: int = LLAMA_8B_BYTES
    trained: int = LLAMA_8B_TRAINED
    lora: LoraConfig = field(default_factory=LoraConfig)
    of: str = "Llama 3.1 8B"
    is_yardstick: bool = True


def the_hub(away: list[Exception]) -> Iterator[Finding]:
    """Whether the hub answers, and as whom it knows us; what kept it from answering is noted."""
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import build_hf_headers, get_session

    if constants.HF_HUB_OFFLINE:
        away.append(errors.OfflineModeIsEnabled())
        text = "HF_HUB_OFFLINE is set: only models on this disk can be used"
        yield Finding("hub", "warning", text, "unset HF_HUB_OFFLINE")
        return
    url = constants.ENDPOINT

    def ask() -> Any:
        headers = build_hf_headers()  # asks the hub itself, at times
        return get_session().get(f"{url}/api/whoami-v2", headers=headers, timeout=PATIENCE)

    try:
        answer = _in_time(ask, PATIENCE)
    except Exception as error:
        away.append(error)
        text = f"{url} cannot be reached ({error}): only models on this disk can be used"
        yield Finding("hub", "warning", text, f"curl --head {url}")
        return
    if answer.status_code >= 500:
        away.append(RuntimeError(f"it answered {answer.status_code}"))
        text = f"{url} answered {answer.status_code}: only models on this disk can be used"
        yield Finding("hub", "warning", text, f"curl --head {url}")
        return
    yield Finding("hub", "ok", f"{url} answers")
    if answer.status_code == 200:
        yield Finding("login", "ok", f"logged in as {answer.json().get('name')}")
    elif get_token() is None:
        text = "not logged in; enough for public models, not for gated ones such as Meta's Llama"
        yield Finding("login", "ok", text, "hf auth login")
    elif answer.status_code == 401:
        text = hub.token_refused("/api/whoami-v2")
        yield Finding("login", "error", text, _command(text))
    else:
        text = f"{url} answered {answer.status_code} to the question who we are"
        yield Finding("login", "warning", text, "hf auth whoami")


def model(
    source: str, revision: str | None, away: list[Exception], needs: Needs
) -> Iterator[Finding]:
    """Whether the model can be had and read; `needs` is told what it needs of the disks."""
    try:
        if not hub.is_on_hub(source):
            text = _on_disk(hub.resolve(source, revision), needs)
        elif folder := hub.whole_copy(source, revision):
            files = hub.ModelFiles(folder, source, folder.name, source)
            text = f"{_on_disk(files, needs)}; whole in the cache"
        elif away:
            raise SourceError(hub.explain(away[0], source, revision))
        else:
            text = _on_hub(source, revision, needs)
    except UserError as error:
        yield Finding("model", "error", str(error), _command(str(error)))
    else:
        yield Finding("model", "ok", text)


def _on_disk(files: hub.ModelFiles, needs: Needs) -> str:
    """Reads the headers of a model's files: they are whole, and of an architecture we know."""
    layers = _layers(open_checkpoint(files).config, files.source, needs)
    needs.fetch = 0
    return f"{files.path}: a Llama of {layers} layers"


def _on_hub(source: str, revision: str | None, needs: Needs) -> str:
    """Asks the hub for the size and the architecture of a model that may be fetched."""
    try:
        offer = _in_time(partial(on_offer, source, revision, PATIENCE), LONGER)
    except RuntimeError as error:
        raise SourceError(hub.explain(error, source, revision)) from error
    layers = _layers(offer.config, source, needs)
    needs.fetch = offer.bytes_to_fetch
    begun = "in part in the cache" if offer.bytes_to_fetch < offer.bytes else "not in the cache yet"
    return (
        f"{source}: a Llama of {layers} layers that you may read, {begun}; "
        f"{offer.bytes_to_fetch / 1e9:,.2f} GB to fetch"
    )


def _layers(config: dict[str, Any], source: str, needs: Needs) -> int:
    """The number of layers; `needs` is told how many numbers a run trains.

    Raises:
        WeightsError: it is no Llama.
    """
    llama = LlamaConfig.from_hf(config)
    needs.trained = trainable(LlamaForCausalLM(llama), needs.lora)  # lazy zeros: no memory
    needs.of, needs.is_yardstick = source, False
    return llama.num_hidden_layers


def disks(needs: Needs, output_dir: str, save_total_limit: int) -> Iterator[Finding]:
    """Whether there is room for the download, and for the checkpoints of a run."""
    from huggingface_hub import constants

    cache, output = Path(constants.HF_HUB_CACHE), Path(output_dir).expanduser().absolute()
    # The newest ones, the best one, and one more before the oldest of them goes.
    kept = save_total_limit + 2
    run = kept * adapter_bytes(needs.trained)
    to_fetch = f"{needs.fetch / 1e9:,.2f} GB to fetch {needs.of}" if needs.fetch else "none"
    yield _room("cache", cache, needs.fetch, to_fetch, needs, "export HF_HOME=")
    checkpoints = f"{run / 1e9:,.2f} GB for {kept} checkpoints of {needs.of}"
    if needs.fetch and _existing(cache).stat().st_dev == _existing(output).stat().st_dev:
        run, checkpoints = run + needs.fetch, f"{checkpoints}, besides the download"
    yield _room("output", output, run, checkpoints, needs, "mlx-qlora train --output-dir ")


def _room(name: str, folder: Path, need: int, what: str, needs: Needs, fix: str) -> Finding:
    """Whether a disk has room for a folder that need not exist yet, and we may write there."""
    here = _existing(folder)
    elsewhere = f"{fix}/path/on/another/disk"
    if not here.is_dir():
        return Finding(name, "error", f"{here} is a file, so {folder} cannot be made", elsewhere)
    if not os.access(here, os.W_OK | os.X_OK):
        return Finding(name, "error", f"{here} cannot be written to by this user", elsewhere)
    free = shutil.disk_usage(here).free
    text = f"{folder}: {free / 1e9:,.2f} GB free, needed: {what}"
    if free < need:
        return Finding(name, "warning" if needs.is_yardstick else "error", text, elsewhere)
    return Finding(name, "ok", text)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _in_time(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns, if it does so in time: name servers heed no client's timeout.

    Raises:
        RuntimeError: it took longer; its thread is left to itself and keeps nobody from leaving.
    """
    done: list[Any] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # raised again below, in the thread that asked
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise RuntimeError(f"no answer within {seconds:g} s")
    return done[0]


def _command(message: str) -> str | None:
    """The command in a message of `hub`, which is written for people."""
    for words, command in (
        ("unset HF_TOKEN", "unset HF_TOKEN"),
        ("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    ):
        if words in message:
            return command
    only_gguf = r"as GGUF \(([^,)]+).*(hf download \S+) FILE (--local-dir \.)"
    if found := re.search(only_gguf, message):
        file, download, here = found.groups()
        return f"{download} {file} {here}"
    # Access is asked for before one logs in.
    if found := re.search(r"ask for access at (https://\S+[^,\s])", message):
        return f"python -m webbrowser {found[1]}"
    found = re.search(r"pip install .*|(?<=`)[^`]+(?=`)", message)
    return found[0] if found else None


# ---- settings ------------------------------------------------------------------------------------


EXTRAS = {
    "tensorboard": ("tensorboard", "logging.report_to=[tensorboard]"),
    "wandb": ("wandb", "logging.report_to=[wandb]"),
    "matplotlib": ("plots", "plots as PNG"),
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
            version = importlib.metadata.version(package)
            yield Finding(package, "ok", f"{version}, for {purpose}")
        except importlib.metadata.PackageNotFoundError:
            fix = f"pip install 'mlx-qlora[{extra}]'"
            yield Finding(package, "ok", f"not installed; optional, for {purpose}", fix)


def environment() -> Iterator[Finding]:
    """Variables that change what a run does, where they are set or should be."""
    watchdog = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
    if sys.platform == "darwin":
        if os.environ.get(watchdog):
            yield Finding("watchdog", "ok", f"{watchdog} is set: macOS lets long GPU work go on")
        elif _has_display():  # github.com/ml-explore/mlx/issues/3267
            text = "macOS stops GPU work that keeps the display waiting (ImpactingInteractivity)"
            yield Finding("watchdog", "ok", f"{text}; if it does", f"export {watchdog}=1")
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if threads and device.current().kind == "cpu" and sys.platform.startswith("linux"):
        text = f"OPENBLAS_NUM_THREADS={threads}: training sets its own number, numpy keeps to it"
        yield Finding("environment", "ok", text)
    for name in ("HF_HOME", "HF_ENDPOINT"):
        if value := os.environ.get(name):
            yield Finding("environment", "ok", f"{name}={value}")


def _has_display() -> bool:
    found = json.loads(output_of("system_profiler", "-json", "SPDisplaysDataType"))
    return any(gpu.get("spdisplays_ndrvs") for gpu in found["SPDisplaysDataType"])


# ---- the command ---------------------------------------------------------------------------------


MACHINE = {
    "python": python,
    "system": system,
    "mlx": mlx,
    "chip": chip,
    "wired limit": wired_limit,
    "blas": blas_library,
    "matmul": matmul,
}


COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


MARGIN = 9 + 13  # columns of the state and the name


def doctor(
    console: Console,
    source: str | None = None,
    revision: str | None = None,
    output_dir: str = "outputs",
    lora: LoraConfig | None = None,
    save_total_limit: int = 3,
) -> list[Finding]:
    """Examines the machine, and the model if one is named, and prints what is found as it is.

    Args:
        console: where it is printed.
        source: as for `load`; never downloaded.
        revision: a branch, tag or commit of a hub repository.
        output_dir: where a run would leave its files.
        lora: what a run would train, which decides how large its checkpoints are.
        save_total_limit: how many checkpoints it would keep.
    """
    findings = []
    for finding in examine(source, revision, output_dir, lora, save_total_limit):
        findings.append(finding)
        _print(console, finding)
    return findings


def examine(
    source: str | None = None,
    revision: str | None = None,
    output_dir: str = "outputs",
    lora: LoraConfig | None = None,
    save_total_limit: int = 3,
) -> Iterator[Finding]:
    """What `doctor` prints, one by one. Raises nothing: a check that breaks is a finding, too."""
    for name, check in MACHINE.items():
        yield from _guarded(name, check)
    away: list[Exception] = []
    needs = Needs(lora=lora or LoraConfig())
    yield from _guarded("hub", partial(the_hub, away))
    if source is not None:
        yield from _guarded("model", partial(model, source, revision, away, needs))
    yield from _guarded("disk", partial(disks, needs, output_dir, save_total_limit))
    yield from _guarded("packages", packages)
    yield from _guarded("environment", environment)


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the findings say it
            found = [*check()]
    except Exception as error:  # a check must not keep the others from being made
        text = f"could not be checked ({type(error).__name__}: {error})"
        found = [Finding(name, "warning", text)]
    yield from found


def _print(console: Console, finding: Finding) -> None:
    """A line of the table; its fix stands alone and is never wrapped, so that it can be pasted."""
    width = console.width - MARGIN if console.is_terminal else sys.maxsize
    lines = textwrap.wrap(
        finding.text, max(width, 20), break_long_words=False, break_on_hyphens=False
    )
    row = Text(f"{finding.state:<9}", COLOURS[finding.state])
    row.append(f"{finding.name:<13}", "bold")
    row.append(("\n" + " " * MARGIN).join(lines), "default")
    if finding.fix:
        row.append(f"\n{'':<{MARGIN}}{finding.fix}", "cyan")
    console.print(row, soft_wrap=True, highlight=False)
