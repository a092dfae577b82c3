"""Models whose base is streamed, beside the same ones in memory, and runs of them."""

import io
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from support.command_line import contents

from mlx_qlora.commands import open_with_plan
from mlx_qlora.config import build
from mlx_qlora.errors import StreamedWarning
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.run import run

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


def settings(source: Path, rows: Path, out: Path, residency: str, **more: Any) -> dict[str, Any]:
    model = {"source": str(source), "group_size": 32, "residency": residency}
    model |= {"frozen_matmul": "dequantize", "base_model_name_or_path": "org/base"}
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    checkpointing = {"output_dir": str(out), "save_steps": 1, "eval_steps": 2, **more}
    data = {"path": str(rows), "max_length": 48, "num_workers": 1}
    lora = {"r": 2, "lora_dropout": 0.2}
    return {
        **{"model": model, "training": training, "checkpointing": checkpointing},
        **{"data": data, "lora": lora, "generation": {"max_new_tokens": 4}},
    }


def train(*args: Any, **more: Any) -> str:
    """A run as `mlx-qlora train` makes it; what it printed."""
    console = Console(file=io.StringIO(), width=300)
    inputs, plan = open_with_plan(build(settings(*args, **more)), console)
    run(inputs, console, plan)
    return console.file.getvalue()  # pyright: ignore


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: x for name, x in contents(folder).items() if name.endswith(".safetensors")}
