"""Python, the system, MLX, and how fast this machine multiplies."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from mlx_qlora import backend, blas, machines
from mlx_qlora.checks.finding import Finding

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
        device, dtype = backend.backend().device, _dtype()
    except (ImportError, OSError) as error:
        fix = "pip install --upgrade --force-reinstall mlx mlx-lm"
        yield Finding("mlx", "error", f"MLX cannot be loaded ({error})", fix)
        return
    text = f"{', '.join(versions)}; computes on {device} in {dtype}"
    if device == "cpu" and blas.has_gpu_wheel():
        fix = "pip uninstall -y mlx-cpu && pip install --force-reinstall --no-deps mlx-cuda-13"
        yield Finding("mlx", "warning", f"{text}, though a CUDA wheel is installed", fix)
    elif device == "cpu" and sys.platform == "darwin":
        yield Finding("mlx", "warning", f"{text}: Metal is not available, as in a virtual machine")
    else:
        yield Finding("mlx", "ok", text)


def chip() -> Iterator[Finding]:
    """The chip, its cores, and how much of the memory MLX may use."""
    facts = backend.facts()
    memory, working_set = facts["memory_bytes"], facts["working_set_bytes"]
    text = f"{facts['chip']}, {facts['cores']} cores, {memory / 2**30:.0f} GiB of memory"
    yield Finding("chip", "ok", f"{text}, of which MLX may use {working_set / 2**30:.1f}")


def wired_limit() -> Iterator[Finding]:
    """What macOS lets the GPU hold (github.com/ml-explore/mlx-lm, README, Large Models)."""
    if sys.platform != "darwin":
        return
    facts = backend.facts()
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
    chosen, wanted = backend.facts()["blas"], os.environ.get("MLX_QLORA_BLAS")
    if backend.backend().device == "cuda":
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
    device, chip = backend.backend().device, str(backend.facts()["chip"]).lower()
    side = SIDE[device]
    with blas.threads(backend.cores()):
        rate = matmul_rate(side)
    text = f"{rate / 1e9:,.0f} GFLOP/s in {_dtype()}, {side} x {side}"
    known = {**machines.APPLE, **machines.NVIDIA}
    name = re.sub(r"\W+", "-", chip.removeprefix("apple ").strip())
    near = [name] if name in known else [key for key in machines.NVIDIA if key in chip]
    expected = known[near[0]] * 1e12 if near and device != "cpu" else None
    if expected is not None:
        text += f"; about {expected / 1e9:,.0f} are expected of this chip"
    if device == "cpu" and rate < REFERENCE_BLAS:
        fix = "pip install cmeel-openblas" if sys.platform.startswith("linux") else None
        text += ": the speed of a reference BLAS, which an OpenBLAS exceeds many times"
        yield Finding("matmul", "warning", text, fix)
    elif expected is not None and rate < expected / 2:
        fix = "sudo pmset -a lowpowermode 0" if device == "metal" else "nvidia-smi"
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

    x = mx.random.normal((side, side)).astype(backend.backend().compute_dtype)
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
    return str(backend.backend().compute_dtype).removeprefix("mlx.core.")


def output_of(*command: str) -> str:
    """What a command of the system prints, if it does so within three seconds."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True)
    return done.stdout.strip()
