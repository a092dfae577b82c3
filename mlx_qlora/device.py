"""What this machine computes on and what follows from it; what other machines are."""

import ctypes
import functools
import importlib
import importlib.metadata
import math
import os
import platform
import re
import resource
import statistics
import sys
import threading
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_qlora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import mlx.core as mx

FrozenMatmul = Literal["quantized", "dequantize", "resident"]
SMALL_CACHE = 16 << 20  # bytes of freed buffers, while weights come and go
COPY_SHARE = 0.4  # of the memory that a dequantised copy may take; the rest is for training


@dataclass(frozen=True)
class Device:
    """A kind of device, and every choice of this package that follows from it.

    The one place where they are made: whoever computes something in two ways asks `current()` for
    its attribute. The defaults are a GPU's; docs/log.md has the measurements.
    """

    kind: Literal["cpu", "metal", "cuda"]
    dtype: str = "bfloat16"  # of activations, by MLX's name

    # How a layer is computed.
    fused_attention: bool = True  # MLX's kernel; False: cpu/attention.py, for float32
    attention_multiple: int = 1  # document lengths that the kernel's gradient needs
    attention_positions: int = 16384  # of documents attended to at once
    attention_padding: float = 0.25  # of each, to fill it up to the longest: fewer kernels
    attention_scratch: float = 0.0  # bytes of its gradient for each head and pair of positions
    fast_exponentials: bool = False  # cpu/exponentials.py, for float32
    compiles: bool = True  # whether `training.compile: auto` fuses elementwise operations
    stacks_matrices: bool = True  # multiplies those that read the same input as one
    packed_matmul: bool = False  # whether `frozen_matmul: auto` never makes dense copies
    few_rows: int = 32  # multiplied packed, which is faster than dequantising the matrix
    row_as_column: bool = False  # a single row times a dense matrix: cpu/blas.py

    # How much at once.
    side_by_side: bool = False  # each core computes a shard of a chunk: cpu/streams.py
    busy_positions: int = 4096  # of a chunk: fewer leave the device idle
    chunk_positions: int = 16384  # more gain no speed, and memory is better left to others
    few_shapes: bool = True  # pads the position axis: freed buffers and graphs are used again
    head_bytes: int = 256 << 20  # of logits, and of the head's rows, in a slice of the vocabulary
    adamw_slice: int = 1 << 26  # numbers of the flat buffers that AdamW moves at once
    adamw_bytes: int | None = None  # temporary arrays of that; None: as large as the buffers
    cache_share: float = 1.0  # of what a step takes and gives back that MLX keeps for the next
    prompt_positions: int = 1 << 14  # of prompts that are read at once, before they are answered

    # What it reaches.
    memory_share: float = 0.92  # that a plan may fill; MLX drops freed buffers where it must
    matmul_share: float = 0.55  # of the chip's matmul rate that training reaches
    waits_for_weights: bool = False  # reads them before it multiplies, and not meanwhile
    wires_memory: bool = False  # keeps MLX's memory from being paged out
    dispatch_seconds: float = math.inf  # a single kernel may take, before a watchdog ends it

    @property
    def compute_dtype(self) -> "mx.Dtype":
        """The dtype of activations."""
        import mlx.core as mx

        return getattr(mx, self.dtype)


CUDA = Device("cuda", attention_multiple=128)  # what cuDNN differentiates

METAL = Device(
    "metal",
    attention_scratch=6.4,  # mlx-train-perf's figure; MLX's backward goes by blocks
    packed_matmul=True,
    busy_positions=2048,
    chunk_positions=8192,
    memory_share=0.85,  # a Mac runs other programs, too
    matmul_share=0.85,
    wires_memory=True,
    dispatch_seconds=2.0,
)

CPU = Device(
    "cpu",
    "float32",  # BLAS has no 16-bit products
    fused_attention=False,
    attention_positions=1024,
    attention_padding=0.1,
    fast_exponentials=True,
    compiles=False,  # saves next to nothing
    stacks_matrices=False,
    few_rows=4,  # 8 ns to dequantise a number, 1.3 to multiply it packed
    row_as_column=True,
    side_by_side=True,
    busy_positions=512,
    chunk_positions=1024,
    few_shapes=False,
    head_bytes=8 << 20,  # near the caches, like the next
    adamw_slice=1 << 19,
    adamw_bytes=8 << 20,
    cache_share=0.1,  # as fast as with all of it, once buffers are given back
    prompt_positions=512,
    memory_share=0.5,
    matmul_share=0.45,
    waits_for_weights=True,
)

_in_use: Device | None = None


def current() -> Device:
    """The device whose choices hold: that of `use`, or the one that MLX computes on."""
    return _in_use or _found()


@contextmanager
def use(device: Device) -> Iterator[None]:
    """Make the choices of another device, in all threads; MLX goes on to compute where it did."""
    global _in_use
    before, _in_use = _in_use, device
    try:
        yield
    finally:
        _in_use = before


@functools.cache
def _found() -> Device:
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        return METAL if mx.metal.is_available() else CUDA
    if has_gpu_wheel():
        # Both wheels write the same libmlx.so, and pip cannot leave mlx-cpu out.
        warnings.warn(
            "MLX computes on the CPU, though its CUDA wheel is installed: the one installed last "
            "wins; run: pip uninstall -y mlx-cpu && "
            "pip install --force-reinstall --no-deps mlx-cuda-13",
            stacklevel=3,
        )
    return CPU


def has_gpu_wheel() -> bool:
    """Whether a CUDA backend of MLX is installed."""
    wheels = "mlx-cuda-12", "mlx-cuda-13"
    return any([*importlib.metadata.distributions(name=name)] for name in wheels)


def compute_dtype(name: str) -> "mx.Dtype":
    """The dtype of activations by its name; `auto` leaves it to the device."""
    import mlx.core as mx

    return current().compute_dtype if name == "auto" else getattr(mx, name)


def frozen_matmul(
    name: str, dense_bytes: int = 0, machine: "Machine | None" = None, streamed: bool = False
) -> FrozenMatmul:
    """How frozen quantised weights are multiplied; a strategy's name is taken as it is.

    For `auto` it depends on the machine, this one if not given, and on the bytes of a copy of all
    packed matrices in the compute dtype, for which weights that are streamed have no place.
    """
    if name == "auto":
        machine = machine or this_machine()
        if machine.device.packed_matmul:
            return "quantized"
        return "resident" if has_room(dense_bytes, machine) and not streamed else "dequantize"
    if name == "resident" and streamed:
        raise ConfigError(
            "model.frozen_matmul=resident keeps a dense copy of all weights in memory, and "
            "model.residency=streamed none; choose auto, quantized or dequantize"
        )
    return name  # pyright: ignore[reportReturnType]


def has_room(dense_bytes: int, machine: "Machine") -> bool:
    """Whether a machine has memory for a dequantised copy of so many bytes."""
    return dense_bytes <= COPY_SHARE * machine.working_set_bytes


# ---- cores ---------------------------------------------------------------------------------------

_processes_here = 1


def share_cores(processes: int) -> None:
    """Set how many processes of this run are on this machine."""
    global _processes_here
    _processes_here = processes


def cores() -> int:
    """How many cores compute side by side; 1 on a GPU."""
    return own_cores() if current().side_by_side else 1


def own_cores() -> int:
    """How many cores of this machine this process may use.

    Processes that share a machine keep to their share. Each with a thread for every core, two of
    them on two cores took 2.4 times as long: whoever waits for a sum keeps a core busy, too.
    """
    of_machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else of_machine
    return max(1, min(allowed, of_machine // _processes_here))


# ---- facts, memory, errors -----------------------------------------------------------------------

openblas: str | None = None  # what cpu/blas.py loaded over MLX's own BLAS: a path or name


def facts() -> dict[str, Any]:
    """What a bug report needs to know about this machine, as plain data."""
    import mlx.core as mx

    info = mx.device_info()
    memory = info.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own_blas = "reference BLAS (slow; pip install scipy-openblas32)"
    return {
        "chip": str(info.get("device_name") or platform.processor()),
        "cores": os.cpu_count(),
        "memory_bytes": int(memory),
        "working_set_bytes": int(info.get("max_recommended_working_set_size", memory)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": importlib.metadata.version("mlx"),
        "device": current().kind,
        "compute_dtype": current().dtype,
        "blas": "Accelerate" if sys.platform == "darwin" else openblas or own_blas,
    }


def limit_memory(temporary: int) -> None:
    """Keep MLX's memory where the plan says, by which a step takes so many `temporary` bytes.

    On Metal the working set is wired, so that macOS does not page weights out between steps, and
    MLX waits for what is under way before it takes more: its own limit is 1.5 times that. The
    cache of freed buffers is bounded everywhere: batches of many shapes would fill memory with it.
    """
    import mlx.core as mx

    here = this_machine()
    if here.device.wires_memory:
        mx.set_wired_limit(here.working_set_bytes)
        mx.set_memory_limit(here.working_set_bytes)
    mx.set_cache_limit(here.cache_bytes(temporary))
    free_at_once()


def free_at_once() -> None:
    """Let Linux have the memory of large arrays when they are freed."""
    # glibc soon takes arrays of up to 32 MB from a heap that it keeps, unless the threshold is set:
    # a streamed run was a third larger than what MLX had.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


@contextmanager
def small_cache() -> Iterator[None]:
    """Within it hardly any freed buffer is kept: weights that are dropped outweigh all else."""
    import mlx.core as mx

    free_at_once()
    mx.clear_cache()
    before = mx.set_cache_limit(0)
    mx.set_cache_limit(min(before, SMALL_CACHE))
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def process_memory_bytes() -> int:
    """The most memory that this process has had, with what it shares, such as libraries."""
    try:  # getrusage would begin with the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


# What Metal, CUDA and the C++ library say when memory is exhausted.
OUT_OF_MEMORY = (
    *("Insufficient Memory", "OutOfMemory", "out of memory", "Unable to allocate"),
    *("Attempting to allocate", "bad_alloc", "cudaErrorMemoryAllocation"),
)
WATCHDOG = ("ImpactingInteractivity", "CallbackErrorTimeout")


def is_out_of_memory(reason: str) -> bool:
    """Whether an error of MLX says that memory is exhausted."""
    return any(words in reason for words in OUT_OF_MEMORY)


def hint(reason: str) -> str:
    """What a user can do about an error of the device; empty where nothing is known."""
    if any(words in reason for words in WATCHDOG):  # mlx#3267: macOS protects the display
        return (
            "; macOS stops work that keeps the display waiting; set the environment variable "
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
# GB/s of memory, as published for the largest GPU of a name: an m3-max or m4-max with 36 GB has
# three quarters, an a100 with 80 GB 2,039. Reported and not published: m5-max.
BANDWIDTH = {
    **{"m1": 68, "m1-pro": 200, "m1-max": 400, "m1-ultra": 800},
    **{"m2": 100, "m2-pro": 200, "m2-max": 400, "m2-ultra": 800},
    **{"m3": 100, "m3-pro": 150, "m3-max": 400, "m3-ultra": 819},
    **{"m4": 120, "m4-pro": 273, "m4-max": 546, "m5": 153, "m5-max": 614},
    **{"a100": 1555, "h100": 3350, "h200": 4800},
}
BANDWIDTH_SHARE = 0.85  # that elementwise kernels reach
EMULATED = 0.9  # of their matmul rate that m1 and m2 reach in bfloat16, which they lack
SMALL_MAC = 36e9  # macOS gives a process 2/3 of so little memory, else 3/4 (iogpu.wired_limit_mb)
PROBE = 1024  # rows and columns of the product that measures this machine
UNCACHED = 1 << 24  # numbers of an array that no cache holds
PROCESS_BYTES = 57 << 20  # of Python, its packages and libraries, imported
TOKEN_BYTES = 750  # of a token of the vocabulary, in the tokenizer: SmolLM2's has 40 MB, Qwen's 108
HEAP_BYTES = 23 << 20  # that stay with the heap where matrices are read or dequantised in turn
DISK = 1.5e9  # bytes per second of the slowest SSD that these Macs are sold with


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine."""

    name: str
    device: Device
    working_set_bytes: int  # what MLX may use
    cores: int  # that compute side by side; 1 on a GPU

    @functools.cached_property
    def flops(self) -> float:
        """Matmul rate in the compute dtype: from the table, or of this machine, measured."""
        known = {**APPLE, **NVIDIA}.get(self.name.rpartition("-")[0])
        share = EMULATED if self.name.startswith(("m1", "m2")) else 1.0
        return known * 1e12 * share if known else _measured_flops(self.device.dtype)

    @property
    def matmul_rate(self) -> float:
        """Flops per second that training reaches."""
        return self.flops * self.device.matmul_share

    @functools.cached_property
    def bytes_per_second(self) -> float:
        """Of memory, as training reaches it: from the table, or of this machine, measured."""
        known = BANDWIDTH.get(self.name.rpartition("-")[0])
        return known * 1e9 * BANDWIDTH_SHARE if known else _measured_reading()

    def cache_bytes(self, temporary: int) -> int:
        """How many bytes of freed buffers MLX may keep, of what a step takes and gives back."""
        return min(self.working_set_bytes // 8, int(self.device.cache_share * temporary))

    def seconds(self, flops: float, weights: int, elementwise: float) -> float:
        """How long training takes for so many flops of matmuls and bytes that are moved.

        A CPU's cores wait for the `weights` that matmuls read, which is most of a small
        micro-batch's time. A GPU reads them meanwhile, and waits for `elementwise` operations.
        """
        moved = weights if self.device.waits_for_weights else elementwise
        return flops / self.matmul_rate + moved / self.bytes_per_second


def this_machine() -> Machine:
    """The machine of this process, with its current device."""
    chip, working_set = _chip_and_working_set()
    return Machine(f"this machine ({chip})", current(), working_set, cores())


@functools.cache
def _chip_and_working_set() -> tuple[str, int]:
    here = facts()
    return here["chip"], here["working_set_bytes"]


def machine(name: str | None) -> Machine:
    """A machine by its name, CHIP-GB, or this one; a ConfigError for an unknown name."""
    if name is None:
        return this_machine()
    plain = re.sub(r"[\s_-]+", "-", name.lower().strip().removeprefix("apple"))
    match = re.fullmatch(r"-?([a-z]+\d+(?:-[a-z]+)?)-(\d+)(?:-?gb)?", plain)
    chip, gigabytes = (match[1], int(match[2])) if match else (name, 0)
    memory = gigabytes << 30
    if chip in APPLE and gigabytes:
        share = 2 / 3 if memory <= SMALL_MAC else 3 / 4
        return Machine(f"{chip}-{gigabytes}", METAL, int(memory * share), 1)
    if chip in NVIDIA and gigabytes:
        return Machine(f"{chip}-{gigabytes}", CUDA, int(memory * 0.95), 1)
    chips = [*APPLE, *NVIDIA]
    hint = did_you_mean(chip.lower(), (), {each: f"{each}-GB" for each in chips})
    raise ConfigError(
        f"--machine: {name!r} is not CHIP-GB, like m4-max-64{hint}; chips: {', '.join(chips)}"
    )


@functools.cache
def _measured_flops(dtype: str) -> float:
    import mlx.core as mx

    x = mx.random.normal((PROBE, PROBE)).astype(getattr(mx, dtype))
    return 2 * PROBE**3 / _median_seconds(lambda: x @ x)


@functools.cache
def _measured_reading() -> float:
    """Bytes per second that a core reads from memory."""
    import mlx.core as mx

    x = mx.arange(UNCACHED, dtype=mx.float32)
    return x.nbytes / _median_seconds(x.sum)


def _median_seconds(compute: Callable[[], "mx.array"]) -> float:
    """The median of five measurements, after one to warm up."""
    import mlx.core as mx

    mx.eval(compute())
    return statistics.median(timeit.repeat(lambda: mx.eval(compute()), number=1, repeat=5))


_importing = threading.Lock()


@functools.cache
def mlx_lm(module: str) -> Any:
    """A module of mlx-lm, whose import would set this process's limits of open files.

    Where the shell's are lower the system refuses that, which would end the import.
    """
    with _importing:
        ours = resource.setrlimit
        try:
            resource.setrlimit = lambda *_: None
            return importlib.import_module(f"mlx_lm.{module}")
        finally:
            resource.setrlimit = ours
