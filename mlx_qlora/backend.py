"""What the machine is, and the two choices that follow from it, made here and nowhere else.

1. The compute dtype: bfloat16 on a GPU, float32 on a CPU (where 16-bit matmuls have no BLAS).
2. How a frozen, quantised weight is multiplied:
     "quantized"   Metal: `mx.quantized_matmul` reads the packed weight directly;
     "resident"    CPU and CUDA: dequantised once and kept, where memory is large enough for that
                   (`quantized_matmul` is 40-70x slower on a CPU, its backward is naive on CUDA);
     "dequantize"  and where it is not: dequantised for each layer, then a dense matmul.

The second follows from sizes and not from a stopwatch, because the choice shows in the last digits:
a run that is resumed, or done again, has to make it alike. `benchmarks/frozen_matmul.py` measures.
"""

import functools
import importlib.metadata
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlx_qlora import blas
from mlx_qlora.errors import ConfigError

if TYPE_CHECKING:
    import mlx.core as mx

FrozenMatmul = Literal["quantized", "dequantize", "resident"]
Device = Literal["metal", "cuda", "cpu"]
COPY_SHARE = 0.4  # of the memory that a dequantised copy may take; the rest is for training


@dataclass(frozen=True)
class Backend:
    """The machine's device, and the dtype that it computes in."""

    device: Device
    compute_dtype: "mx.Dtype"


@functools.cache
def backend() -> Backend:
    """The backend that MLX computes on in this process."""
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
        return Backend("cpu", mx.float32)
    if mx.metal.is_available():
        return Backend("metal", mx.bfloat16)
    return Backend("cuda", mx.bfloat16)


def compute_dtype(name: str) -> "mx.Dtype":
    """The dtype that activations have: `auto` asks the backend, a name is taken as it is.

    Raises:
        ConfigError: an unknown name.
    """
    import mlx.core as mx

    known = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    if name == "auto":
        return backend().compute_dtype
    if name not in known:
        raise ConfigError(f"model.dtype must be one of auto, {', '.join(known)}; got {name!r}")
    return known[name]


def frozen_matmul(
    name: str,
    dense_bytes: int = 0,
    device: Device | None = None,
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
        if (device or backend().device) == "metal":
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
    """How many cores a CPU backend may use; on a GPU 1, as nothing is computed side by side."""
    return own_cores() if backend().device == "cpu" else 1


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
    chosen = backend()
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
        "device": chosen.device,
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
    if backend().device == "metal":
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
