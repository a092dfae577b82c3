"""What this machine is, what other machines are, and what follows for a run."""

import functools
import importlib.metadata
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlx_qlora.cpu import blas
from mlx_qlora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import mlx.core as mx

# ---- this machine --------------------------------------------------------------------------------


FrozenMatmul = Literal["quantized", "dequantize", "resident"]


Kind = Literal["metal", "cuda", "cpu"]


COPY_SHARE = 0.4  # of the memory that a dequantised copy may take; the rest is for training


@dataclass(frozen=True)
class Device:
    """The machine's device, and the dtype that it computes in."""

    kind: Kind
    compute_dtype: "mx.Dtype"


@functools.cache
def current() -> Device:
    """The device that MLX computes on in this process."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        if blas.has_gpu_wheel():
            # Both wheels write the same libmlx.so, and pip cannot leave mlx-cpu out.
            warnings.warn(
                "a CUDA wheel of MLX is installed but MLX computes on the CPU: the last one "
                "installed wins. Remedy: pip uninstall -y mlx-cpu && "
                "pip install --force-reinstall --no-deps mlx-cuda-13",
                stacklevel=2,
            )
        return Device("cpu", mx.float32)
    if mx.metal.is_available():
        return Device("metal", mx.bfloat16)
    return Device("cuda", mx.bfloat16)


def compute_dtype(name: str) -> "mx.Dtype":
    """The dtype that activations have: `auto` asks the device, a name is taken as it is.

    Raises:
        ConfigError: an unknown name.
    """
    import mlx.core as mx

    known = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    if name == "auto":
        return current().compute_dtype
    if name not in known:
        raise ConfigError(f"model.dtype must be one of auto, {', '.join(known)}; got {name!r}")
    return known[name]


def frozen_matmul(
    name: str,
    dense_bytes: int = 0,
    device: Kind | None = None,
    working_set_bytes: int | None = None,
) -> FrozenMatmul:
    """How frozen quantised weights are multiplied.

    Args:
        name: a strategy, which is taken as it is, or `auto`.
        dense_bytes: of a copy of all packed matrices in the compute dtype.
        device: of another machine than this one.
        working_set_bytes: of another machine than this one.

    Raises:
        ConfigError: an unknown name.
    """
    if name == "auto":
        if (device or current().kind) == "metal":
            return "quantized"
        memory = facts()["working_set_bytes"] if working_set_bytes is None else working_set_bytes
        return "resident" if dense_bytes <= COPY_SHARE * memory else "dequantize"
    if name not in ("quantized", "dequantize", "resident"):
        legal = "auto, quantized, dequantize, resident"
        raise ConfigError(f"model.frozen_matmul must be one of {legal}; got {name!r}")
    return name  # pyright: ignore[reportReturnType]


_processes_here = 1


def share_cores(processes: int) -> None:
    """Notes how many processes of this run are on this machine; each uses its share of `cores`."""
    global _processes_here
    _processes_here = processes


def cores() -> int:
    """How many cores a CPU may use; on a GPU 1, as nothing is computed side by side."""
    return own_cores() if current().kind == "cpu" else 1


def own_cores() -> int:
    """How many cores of this machine this process may use.

    Processes that share a machine keep to their share. Each with a thread for every core, two of
    them on two cores took 2.4 times as long: whoever waits for a sum keeps a core busy, too.
    """
    of_machine = os.cpu_count() or 1
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    allowed = len(os.sched_getaffinity(0)) if has_affinity else of_machine
    return max(1, min(allowed, of_machine // _processes_here))


def facts() -> dict[str, Any]:
    """What a bug report needs to know about this machine, as plain data.

    Returns:
        Chip, cores, memory in bytes, operating system, Python and MLX versions, the device, its
        compute dtype, and the BLAS that multiplies on the CPU.
    """
    import mlx.core as mx

    info = mx.device_info()
    memory = info.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chosen = current()
    if sys.platform == "darwin":
        multiplies = "Accelerate"
    else:
        multiplies = blas.loaded() or "reference BLAS (slow; pip install cmeel-openblas)"
    return {
        "chip": str(info.get("device_name") or platform.processor()),
        "cores": os.cpu_count(),
        "memory_bytes": int(memory),
        "working_set_bytes": int(info.get("max_recommended_working_set_size", memory)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": importlib.metadata.version("mlx"),
        "device": chosen.kind,
        "compute_dtype": str(chosen.compute_dtype).removeprefix("mlx.core."),
        "blas": multiplies,
    }


def limit_memory() -> None:
    """Keeps MLX's memory where the machine can serve it; the one place that sets its limits.

    On Metal the working set is wired, so that macOS does not page weights out between steps. The
    cache of freed buffers is bounded everywhere: batches of many shapes would fill memory with it.
    """
    import mlx.core as mx

    working_set = facts()["working_set_bytes"]
    if current().kind == "metal":
        mx.set_wired_limit(working_set)
    mx.set_cache_limit(working_set // 8)


# What Metal, CUDA and the C++ library say when memory is at an end.
OUT_OF_MEMORY = (
    *("Insufficient Memory", "OutOfMemory", "out of memory", "Unable to allocate"),
    *("Attempting to allocate", "bad_alloc", "cudaErrorMemoryAllocation"),
)


WATCHDOG = ("ImpactingInteractivity", "CallbackErrorTimeout")


def is_out_of_memory(reason: str) -> bool:
    """Whether an error of MLX says that memory is at an end."""
    return any(words in reason for words in OUT_OF_MEMORY)


def hint(reason: str) -> str:
    """What a user can do about an error of the device; empty where nothing is known."""
    if any(words in reason for words in WATCHDOG):  # mlx#3267: macOS protects the display
        return (
            ". macOS stops work that keeps the display waiting: set the environment variable "
            "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1, or lower training.per_device_train_batch_size "
            "or data.max_length"
        )
    return ""


# ---- machines by name ----------------------------------------------------------------------------


# Teraflops of each chip. Measured: m3-max, m4-max, m3-ultra, m5-max, h100.
APPLE = {
    **{"m1": 2.0, "m1-pro": 3.9, "m1-max": 7.8, "m1-ultra": 15.6},
    **{"m2": 2.7, "m2-pro": 5.1, "m2-max": 10.2, "m2-ultra": 20.4},
    **{"m3": 3.1, "m3-pro": 5.5, "m3-max": 11.4, "m3-ultra": 18.9},
    **{"m4": 3.2, "m4-pro": 6.9, "m4-max": 13.4},
    **{"m5": 13.0, "m5-max": 57.0},
}


NVIDIA = {"a100": 250.0, "h100": 798.0, "h200": 798.0}


# What training reaches of a device's matmul rate (estimates; a CPU's is measured, in docs/log.md).
REACHED = {"cpu": 0.45, "metal": 0.85, "cuda": 0.55}


# What of its memory a device gives to one process. macOS: two thirds of small memories, three
# quarters of others (the default of `iogpu.wired_limit_mb`); a CPU shares with everything else.
SMALL_MAC = 36e9


PROBE = 1024  # rows and columns of the product that measures this machine


LONG = 1 << 25  # numbers of an array that no cache holds


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Attributes:
        name: for people.
        device: which of MLX's backends it has.
        working_set_bytes: what MLX may use.
        cores: that compute side by side; 1 on a GPU.
        itemsize: bytes of a number in its compute dtype.
    """

    name: str
    device: Kind
    working_set_bytes: int
    cores: int
    itemsize: int

    @functools.cached_property
    def flops(self) -> float:
        """Matmul rate in the compute dtype: from the table, or of this machine, measured."""
        chip = self.name.rpartition("-")[0]
        known = {**APPLE, **NVIDIA}.get(chip)
        return known * 1e12 if known else _measured_flops()

    def seconds(self, flops: float, read: int) -> float:
        """How long training takes for so many multiplications and additions.

        Args:
            flops: of matmuls.
            read: bytes of weights that these take from memory. A CPU's cores wait for them, which
                is most of a small micro-batch's time; a GPU reads them meanwhile.
        """
        waiting = read / _measured_reading() if self.device == "cpu" else 0.0
        return flops / (self.flops * REACHED[self.device]) + waiting


@functools.cache
def this_machine() -> Machine:
    """The machine of this process."""
    here = facts()
    return Machine(
        f"this machine ({here['chip']})",
        current().kind,
        here["working_set_bytes"],
        cores(),
        current().compute_dtype.size,
    )


def machine(name: str | None) -> Machine:
    """A machine by its name, or this one.

    Raises:
        ConfigError: an unknown chip, or a name that is not CHIP-GB.
    """
    if name is None:
        return this_machine()
    match = re.fullmatch(r"([a-z]+\d+(?:-[a-z]+)?)-(\d+)", name.lower())
    chip, gigabytes = (match[1], int(match[2])) if match else (name, 0)
    if chip in APPLE and gigabytes:
        memory = gigabytes << 30
        share = 2 / 3 if memory <= SMALL_MAC else 3 / 4
        return Machine(name.lower(), "metal", int(memory * share), 1, 2)
    if chip in NVIDIA and gigabytes:
        return Machine(name.lower(), "cuda", int((gigabytes << 30) * 0.95), 1, 2)
    hint = did_you_mean(chip, [*APPLE, *NVIDIA])
    raise ConfigError(
        f"--machine: {name!r} is not CHIP-GB, like m4-max-64{hint}; "
        f"chips: {', '.join([*APPLE, *NVIDIA])}"
    )


@functools.cache
def _measured_flops() -> float:
    """The rate of square products on this machine."""
    import mlx.core as mx

    dtype = current().compute_dtype
    x = mx.random.normal((PROBE, PROBE)).astype(dtype)
    return 2 * PROBE**3 / _usual_seconds(lambda: x @ x)


@functools.cache
def _measured_reading() -> float:
    """Bytes per second that a core reads from memory."""
    import mlx.core as mx

    x = mx.arange(LONG, dtype=mx.float32)
    return x.nbytes / _usual_seconds(x.sum)


def _usual_seconds(compute: Callable[[], "mx.array"]) -> float:
    """The median of a few measurements, one more before them to warm up."""
    import mlx.core as mx

    mx.eval(compute())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
