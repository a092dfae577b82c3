"""Models whose base is streamed, beside the same ones in memory."""

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.errors import StreamedWarning
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig
from mlx_qlora.model.weights import load_model, open_checkpoint

PACKED = QuantConfig(4, 32)


def load_as(
    residency: str,
    path: Path,
    quantize: QuantConfig | None = PACKED,
    matmul: str = "dequantize",
    lora: LoraConfig | None = None,
) -> LlamaForCausalLM:
    """A model in float32, resident or streamed, with LoRA layers if they are given."""
    files = ModelFiles(path=path, hf_id=str(path), revision=None, source=str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StreamedWarning)
        model = load_model(open_checkpoint(files), quantize, mx.float32, matmul, residency)
    return model if lora is None else add_lora(model, lora, seed=1)


def matrices(model: Any) -> list[FrozenMatrix]:
    """The frozen matrices of a model, LoRA layers' included."""
    return [module for module in model.modules() if isinstance(module, FrozenMatrix)]


def in_memory(model: Any) -> int:
    """Bytes of its frozen matrices that are in memory."""
    arrays = (array for m in matrices(model) for array in m.values() if isinstance(array, mx.array))
    return sum(array.nbytes for array in arrays if array.ndim == 2)
