"""Which BLAS multiplies on a Linux CPU, and how.

MLX's CPU wheel links the reference BLAS (about 2 GFLOP/s on one thread). An OpenBLAS loaded into
the global namespace takes over its symbols and is some 70 times faster in float32.

Python binds a library's symbols when it loads it. Where mlx_qlora is imported first, loading
OpenBLAS first is all there is to do; where MLX was imported first (sorted imports do that), the
addresses that libmlx.so has already bound are overwritten.
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


def load_fast_blas() -> str | None:
    """Load an OpenBLAS over MLX's reference BLAS, on Linux; returns its path or name, or None.

    `MLX_QLORA_BLAS=PATH` names another library with the CBLAS symbols, and `MLX_QLORA_BLAS=none`
    keeps MLX's own.
    """
    if not sys.platform.startswith("linux") or device.openblas:
        return device.openblas
    wanted = os.environ.get("MLX_QLORA_BLAS")
    if wanted == "none":
        return None
    _provide_libgfortran()
    problem = f"MLX_QLORA_BLAS={wanted} could not be loaded" if wanted else "no OpenBLAS found"
    remedy = "pip install cmeel-openblas"
    for candidate in [wanted] if wanted else _openblas_candidates():
        try:
            # RTLD_GLOBAL puts the symbols in front of those that libmlx.so was linked with.
            library = ctypes.CDLL(candidate, ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018
        except (OSError, AttributeError):
            continue
        if "mlx.core" not in sys.modules or _rebind(library) or device.has_gpu_wheel():
            device.openblas = candidate
            return candidate
        problem, remedy = "MLX was imported before mlx_qlora", "import mlx_qlora before mlx"
        break
    if not device.has_gpu_wheel():
        warnings.warn(
            f"{problem}: matmuls on this CPU will be some 70 times slower. Remedy: {remedy}",
            stacklevel=3,
        )
    return None


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Let the loaded OpenBLAS use n threads for a matmul; does nothing to another BLAS.

    Around a whole run, too: each change wakes OpenBLAS's threads, which then spin for a while.
    """
    library: Any = ctypes.CDLL(device.openblas) if device.openblas else None
    is_openblas = hasattr(library, "openblas_set_num_threads")
    before = library.openblas_get_num_threads() if is_openblas else n
    if before == n:
        yield
        return
    library.openblas_set_num_threads(n)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)


def row_product(x: "mx.array", W: "mx.array") -> "mx.array":
    """x @ W.T of a single row x (..., columns), computed as the column W @ x.

    A token that is generated costs what it takes to read all weights, and BLAS reads W once for
    a column (gemv) where it packs it for a row (gemm). Only an output head, far taller than wide,
    gains nothing from that.
    """
    if W.shape[0] >= TALL * W.shape[1]:
        return x @ W.T
    return (W @ x.reshape(-1, 1)).reshape(*x.shape[:-1], W.shape[0])


def _rebind(library: ctypes.CDLL) -> bool:
    """Point the jump slots of a libmlx.so that is already loaded at another BLAS, if all can be.

    A slot is where the dynamic loader keeps the address of an imported function; the file says
    where its slots are, the process where the file lies in memory.
    """
    import elftools.common.exceptions
    from elftools.elf.elffile import ELFFile

    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
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
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        ctypes.c_void_p.from_address(at).value = address
    return True


def _openblas_candidates() -> Iterator[str]:
    """The packaged OpenBLAS first: it is the same on every machine; then the system's."""
    for folder in map(Path, sys.path):
        library = folder / "cmeel.prefix" / "lib" / "libopenblas.so.0"
        if library.is_file():
            yield str(library)
    if system := ctypes.util.find_library("openblas"):
        yield system


def _provide_libgfortran() -> None:
    """Make `libgfortran.so.5`, which OpenBLAS asks for by that name, loadable without root.

    A bare Linux (a CI image, a container) has no Fortran runtime, but MLX's wheel bundles one,
    renamed to `libgfortran-<hash>.so.5.0.0`. The loader matches a needed library against the names
    that loaded ones carry inside (DT_SONAME), so a copy in memory with its plain name satisfies it.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgfortran.so.5")
        return

    def bundled(name: str) -> list[Path]:
        return [file for folder in sys.path for file in Path(folder).glob(f"mlx_*.libs/{name}-*")]

    for helper in bundled("libquadmath"):
        ctypes.CDLL(str(helper))
    for runtime in bundled("libgfortran"):
        hashed = runtime.name.encode() + b"\0"
        plain = b"libgfortran.so.5".ljust(len(hashed), b"\0")
        with open(os.memfd_create("libgfortran.so.5"), "wb") as in_memory:
            in_memory.write(runtime.read_bytes().replace(hashed, plain))
            in_memory.flush()
            try:
                ctypes.CDLL(f"/proc/self/fd/{in_memory.fileno()}")
            except OSError:
                continue  # the OpenBLAS that needs it will fail to load, and the caller says so
