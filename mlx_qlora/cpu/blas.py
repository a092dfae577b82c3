"""Which BLAS multiplies on a Linux CPU.

MLX's CPU wheel links the reference BLAS (about 2 GFLOP/s on one thread). An OpenBLAS loaded into
the global namespace takes over its symbols and is some 70 times faster in float32.

Python binds a library's symbols when it loads it. Where mlx_qlora is imported first, loading
OpenBLAS first is all there is to do; where MLX was imported first (sorted imports do that), the
addresses that libmlx.so has already noted down are written anew.
"""

import ctypes
import ctypes.util
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What libmlx.so calls to multiply matrices.
SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")


_loaded: str | None = None


def load_fast_blas() -> str | None:
    """Loads an OpenBLAS over MLX's reference BLAS.

    Does nothing but on Linux. `MLX_QLORA_BLAS=PATH` names another library with the CBLAS
    symbols, and `MLX_QLORA_BLAS=none` keeps MLX's own.

    Returns:
        The path or name of the library that was loaded, or None.
    """
    global _loaded
    if not sys.platform.startswith("linux") or _loaded:
        return _loaded
    wanted = os.environ.get("MLX_QLORA_BLAS")
    if wanted == "none":
        return None
    _provide_libgfortran()
    for candidate in [wanted] if wanted else _openblas_candidates():
        try:
            # RTLD_GLOBAL puts the symbols in front of those that libmlx.so was linked with.
            library = ctypes.CDLL(candidate, ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018
        except (OSError, AttributeError):
            continue
        if "mlx.core" in sys.modules and not _rebind(library) and not has_gpu_wheel():
            warnings.warn(
                "MLX was imported before mlx_qlora, so matmuls on this CPU will be some 70 times "
                "slower. Remedy: import mlx_qlora before mlx",
                stacklevel=3,
            )
            return None
        _loaded = candidate
        return candidate
    if not has_gpu_wheel():
        problem = f"MLX_QLORA_BLAS={wanted} could not be loaded" if wanted else "no OpenBLAS found"
        warnings.warn(
            f"{problem}: matmuls on this CPU will be some 70 times slower. "
            "Remedy: pip install cmeel-openblas",
            stacklevel=3,
        )
    return None


def loaded() -> str | None:
    """The path or name of the BLAS that took MLX's own's place, or None."""
    return _loaded


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Lets the loaded OpenBLAS use n threads for a matmul; does nothing to another BLAS.

    Around a whole run, too: each change wakes OpenBLAS's threads, which then spin for a while.
    """
    library = ctypes.CDLL(_loaded) if _loaded else None
    if library is None or not hasattr(library, "openblas_set_num_threads"):
        yield
        return
    before = library.openblas_get_num_threads()
    if before == n:
        yield
        return
    library.openblas_set_num_threads(n)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)


def _rebind(library: ctypes.CDLL) -> bool:
    """Points the jump slots of a libmlx.so that is loaded already at another BLAS.

    A slot is where the dynamic loader noted the address of an imported function; the file says
    where its slots are, the process where the file lies in memory.

    Returns:
        Whether every slot could be written.
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


def has_gpu_wheel() -> bool:
    """Whether a CUDA backend of MLX is installed."""
    for name in ("mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.version(name)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False
