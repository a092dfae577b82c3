"""Which BLAS multiplies on a Linux CPU, and how.

MLX's CPU wheel links the reference BLAS (about 2 GFLOP/s on one thread). The OpenBLAS that NumPy's
wheels are built with is some 70 times faster in float32, and chooses its kernels by the CPU that
it finds. Its symbols have a prefix, and Python has bound MLX's own when it loaded libmlx.so: the
addresses bound there are overwritten.
"""

import contextlib
import ctypes
import ctypes.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qlora import device

if TYPE_CHECKING:
    import mlx.core as mx

SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # what libmlx.so multiplies with
TALL = 16  # times as many rows as columns: an output head, no other matrix
REMEDY = "pip install scipy-openblas32"


def load_fast_blas() -> str | None:
    """Put an OpenBLAS in the place of MLX's reference BLAS, on Linux; its path or name, or None.

    `MLX_QLORA_BLAS=PATH` names another library with the CBLAS symbols, and `MLX_QLORA_BLAS=none`
    keeps MLX's own.
    """
    if not sys.platform.startswith("linux") or device.openblas:
        return device.openblas
    wanted = os.environ.get("MLX_QLORA_BLAS")
    if wanted == "none":
        return None
    problem = f"MLX_QLORA_BLAS={wanted} could not be loaded" if wanted else "no OpenBLAS found"
    for candidate in [wanted] if wanted else _openblas_candidates():
        try:
            library = ctypes.CDLL(candidate)
            [_function(library, name) for name in SYMBOLS]
        except (OSError, AttributeError):
            continue
        if _rebind(library) or device.has_gpu_wheel():
            device.openblas = candidate
            return candidate
        problem = f"MLX does not let {candidate} replace its BLAS"
    if not device.has_gpu_wheel():
        warnings.warn(
            f"{problem}: matmuls on this CPU will be some 70 times slower; run: {REMEDY}",
            stacklevel=3,
        )
    return None


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Let the loaded OpenBLAS use n threads for a matmul; does nothing to another BLAS.

    Around a whole run, too: each change wakes OpenBLAS's threads, which then spin for a while.
    """
    library = ctypes.CDLL(device.openblas) if device.openblas else None
    try:
        change = _function(library, "openblas_set_num_threads")
        before = _function(library, "openblas_get_num_threads")()
    except AttributeError:  # of another maker
        change, before = int, n
    if before == n:
        yield
        return
    change(n)
    try:
        yield
    finally:
        change(before)


def row_product(x: "mx.array", W: "mx.array") -> "mx.array":
    """x @ W.T of a single row x (..., columns), computed as the column W @ x.

    A token that is generated costs what it takes to read all weights, and BLAS reads W once for
    a column (gemv) where it packs it for a row (gemm). Only an output head, far taller than wide,
    gains nothing from that.
    """
    if W.shape[0] >= TALL * W.shape[1]:
        return x @ W.T
    return (W @ x.reshape(-1, 1)).reshape(*x.shape[:-1], W.shape[0])


def _function(library: Any, name: str) -> Any:
    """A function of a BLAS; in NumPy's build all have a prefix."""
    return getattr(library, name, None) or getattr(library, f"scipy_{name}")


def _rebind(library: ctypes.CDLL) -> bool:
    """Point the jump slots of libmlx.so at another BLAS, if all can be.

    A slot is where the dynamic loader keeps the address of an imported function; the file says
    where its slots are, the process where the file lies in memory.
    """
    import elftools.common.exceptions
    import mlx.core  # maps libmlx.so into memory
    from elftools.elf.elffile import ELFFile

    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    regions = [(line[0].split("-"), line[1], line[-1]) for line in maps]
    mlx = [region for region in regions if region[2].endswith("/libmlx.so")]
    if not mlx:
        return False
    base, path = int(mlx[0][0][0], 16), mlx[0][2]
    writable = [(int(a, 16), int(b, 16)) for (a, b), access, _ in mlx if "w" in access]
    try:
        with open(path, "rb") as file:
            elf = ELFFile(file)
            relocations: Any = elf.get_section_by_name(".rela.plt")
            names: Any = elf.get_section(relocations["sh_link"])
            slots = {
                base + slot["r_offset"]: name
                for slot in relocations.iter_relocations()
                if (name := names.get_symbol(slot["r_info_sym"]).name) in SYMBOLS
            }
    except (OSError, TypeError, AttributeError, elftools.common.exceptions.ELFError):
        return False  # stripped or linked in another way
    if not slots or not all(any(a <= at < b for a, b in writable) for at in slots):
        return False
    for at, name in slots.items():
        address = ctypes.cast(_function(library, name), ctypes.c_void_p).value
        ctypes.c_void_p.from_address(at).value = address
    return True


def _openblas_candidates() -> Iterator[str]:
    """The packaged OpenBLAS first: it is the same on every machine; then the system's."""
    for folder in map(Path, sys.path):
        library = folder / "scipy_openblas32" / "lib" / "libscipy_openblas.so"
        if library.is_file():
            yield str(library)
    if system := ctypes.util.find_library("openblas"):
        yield system
