"""What the machine is, and the two choices that follow from it, made here and nowhere else.

1. The compute dtype: bfloat16 on a GPU, float32 on a CPU (where 16-bit matmuls have no BLAS).
2. How a frozen, quantised weight is multiplied:
     "quantized"   Metal: `mx.quantized_matmul` reads the packed weight directly;
     "dequantize"  CUDA: dequantise, then a dense matmul (the quantised backward kernel is naive);
     "resident"    CPU: dequantised once and kept; `quantized_matmul` is 40-70x slower there.

On Linux it also decides which BLAS multiplies. MLX's CPU wheel links the reference BLAS
(about 2 GFLOP/s on one thread); an OpenBLAS loaded into the global namespace before the first
matmul takes over its symbols and is some 70 times faster.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_qlora.errors import ConfigError

if TYPE_CHECKING:
    import mlx.core as mx

FrozenMatmul = Literal["quantized", "dequantize", "resident"]
Device = Literal["metal", "cuda", "cpu"]

_blas_path: str | None = None


@dataclass(frozen=True)
class Backend:
    """The machine's device and the choices made for it."""

    device: Device
    compute_dtype: "mx.Dtype"
    frozen_matmul: FrozenMatmul


# ---- BLAS on Linux -----------------------------------------------------------------------------


def load_fast_blas() -> str | None:
    """Loads an OpenBLAS over MLX's reference BLAS; must run before MLX's first matmul.

    Does nothing but on Linux. `MLX_QLORA_BLAS=PATH` names another library with the CBLAS
    symbols, and `MLX_QLORA_BLAS=none` keeps MLX's own.

    Returns:
        The path or name of the library that was loaded, or None.
    """
    global _blas_path
    if not sys.platform.startswith("linux") or _blas_path:
        return _blas_path
    wanted = os.environ.get("MLX_QLORA_BLAS")
    if wanted == "none":
        return None
    _provide_libgfortran()
    for candidate in [wanted] if wanted else _openblas_candidates():
        try:
            # RTLD_GLOBAL puts the symbols in front of those that libmlx.so was linked with.
            ctypes.CDLL(candidate, ctypes.RTLD_GLOBAL).cblas_sgemm  # noqa: B018
        except (OSError, AttributeError):
            continue
        _blas_path = candidate
        return candidate
    if not _has_gpu_wheel():
        problem = f"MLX_QLORA_BLAS={wanted} could not be loaded" if wanted else "no OpenBLAS found"
        warnings.warn(
            f"{problem}: matmuls on this CPU will be some 70 times slower. "
            "Remedy: pip install cmeel-openblas",
            stacklevel=3,
        )
    return None


def _openblas_candidates() -> Iterator[str]:
    """The packaged OpenBLAS first: it is the same on every machine; then the system's."""
    for folder in map(Path, sys.path):
        library = folder / "cmeel.prefix" / "lib" / "libopenblas.so.0"
        if library.is_file():
            yield str(library)
    if system := ctypes.util.find_library("openblas"):
        yield system


def _provide_libgfortran() -> None:
    """Makes `libgfortran.so.5`, which OpenBLAS asks for by that name, loadable without root.

    A bare Linux has no Fortran runtime, but MLX's wheel bundles one, renamed to
    `libgfortran-<hash>.so.5.0.0`. The loader matches a needed library against the names that
    loaded ones carry inside (DT_SONAME), so a copy in memory with its plain name satisfies it.
    """
    try:
        ctypes.CDLL("libgfortran.so.5")
        return
    except OSError:
        pass
    bundled = [library for folder in sys.path for library in Path(folder).glob("mlx_*.libs/lib*")]
    for helper in bundled:
        if helper.name.startswith("libquadmath-"):
            ctypes.CDLL(str(helper))
    for runtime in bundled:
        if not runtime.name.startswith("libgfortran-"):
            continue
        hashed = runtime.name.encode() + b"\0"
        plain = b"libgfortran.so.5".ljust(len(hashed), b"\0")
        with open(os.memfd_create("libgfortran.so.5"), "wb") as in_memory:
            in_memory.write(runtime.read_bytes().replace(hashed, plain))
            in_memory.flush()
            try:
                ctypes.CDLL(f"/proc/self/fd/{in_memory.fileno()}")
            except OSError:
                continue  # the OpenBLAS that needs it will fail to load, and the caller says so


def _has_gpu_wheel() -> bool:
    for name in ("mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.version(name)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


# ---- device ------------------------------------------------------------------------------------


@functools.cache
def backend() -> Backend:
    """The backend that MLX computes on in this process."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        if _has_gpu_wheel():
            # Both wheels write the same libmlx.so, and pip cannot leave mlx-cpu out.
            warnings.warn(
                "a CUDA wheel of MLX is installed but MLX computes on the CPU: the last one "
                "installed wins. Remedy: pip uninstall -y mlx-cpu && "
                "pip install --force-reinstall --no-deps mlx-cuda-13",
                stacklevel=2,
            )
        return Backend("cpu", mx.float32, "resident")
    if mx.metal.is_available():
        return Backend("metal", mx.bfloat16, "quantized")
    return Backend("cuda", mx.bfloat16, "dequantize")


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


def frozen_matmul(name: str) -> FrozenMatmul:
    """How frozen quantised weights are multiplied: `auto` asks the backend."""
    if name == "auto":
        return backend().frozen_matmul
    if name not in ("quantized", "dequantize", "resident"):
        legal = "auto, quantized, dequantize, resident"
        raise ConfigError(f"model.frozen_matmul must be one of {legal}; got {name!r}")
    return name  # pyright: ignore[reportReturnType]


def facts() -> dict[str, Any]:
    """What a bug report needs to know about this machine, as plain data.

    Returns:
        Chip, cores, memory in bytes, operating system, Python and MLX versions, the device, its
        compute dtype and frozen-matmul strategy, and the BLAS that multiplies on the CPU.
    """
    import mlx.core as mx

    info = mx.device_info()
    memory = info.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chosen = backend()
    if sys.platform == "darwin":
        blas = "Accelerate"
    else:
        blas = _blas_path or "reference BLAS (slow; pip install cmeel-openblas)"
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
        "frozen_matmul": chosen.frozen_matmul,
        "blas": blas,
    }
