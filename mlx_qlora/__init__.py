"""mlx-qlora: fine-tune dense language models with QLoRA on a Mac, in pure MLX.

Names load on first use (PEP 562), so importing the package costs next to nothing. They are listed
once, in `__init__.pyi`, which type checkers and editors read instead of this file. What happens at
import is the choice of BLAS on Linux (`mlx_qlora.cpu.blas`) and, for our own command line, what
Ctrl-C does.
"""

import signal
import sys

# Ctrl-C in what is imported here ends the command line without a traceback; see `signals.raised`.
if (sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].split(".")[0] == "mlx_qlora") or (
    "".join(sys.orig_argv[1:2]).endswith("/mlx-qlora")
):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib
import re
from pathlib import Path
from typing import Any

from mlx_qlora.cpu.blas import load_fast_blas

load_fast_blas()

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME = {
    name: module
    for module, name in re.findall(
        r"^from (\S+) import (\w+)", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.M
    )
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_qlora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return sorted(__all__)
