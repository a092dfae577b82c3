"""mlx-qlora: fine-tune Llama models with QLoRA on a Mac, in pure MLX.

Names load on first use (PEP 562), so importing the package costs next to nothing. The one thing
that happens at import is the choice of BLAS on Linux, which has to come before MLX's first
matmul; see `mlx_qlora.backend`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mlx_qlora._version import __version__ as __version__
from mlx_qlora.backend import load_fast_blas

load_fast_blas()
