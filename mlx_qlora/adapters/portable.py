"""The adapter as a PEFT folder for readers that know only r and lora_alpha.

llama.cpp's converter ignores use_rslora and alpha_pattern, vLLM takes one scale for all layers, and
Ollama reads lora_alpha as an integer. So here every update has the same rank, filled up with zeros,
lora_B carries the scale, and lora_alpha is r: whichever formula a reader has, its factor is 1.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.ownership import ADAPTER_FOLDER, check_names, check_not_here
from mlx_qlora.adapters.peft import (
    PREFIX,
    original_base,
    peft_config,
    write_peft,
)
from mlx_qlora.errors import AdapterError, listing
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import lora_layers

# What may be replaced as a whole: an earlier export, and what macOS puts into every folder.
EXPORTED = {*ADAPTER_FOLDER, ".DS_Store"}

Update = tuple[np.ndarray, np.ndarray, float]


def save_portable(
    model: LlamaForCausalLM, folder: str | Path, base_model_name_or_path: str | None = None
) -> Path:
    """Writes the adapter as a PEFT folder of uniform rank whose scaling is exactly 1.

    It computes the same as `save_adapter`'s folder, in every reader. Training is better continued
    from that one: here A and B have been rescaled.

    Args:
        model: with LoRA layers, but not DoRA's.
        folder: made if it does not exist; an earlier export in it is replaced as a whole.
        base_model_name_or_path: the original Hugging Face repository; by default what the model's
            own files say they are a copy of.

    Returns:
        The folder.

    Raises:
        AdapterError: the model has no LoRA layers or has DoRA's, the folder holds other files,
            or nothing says what the base is.
        ConfigError: the folder's adapter is somebody else's, or it is the current folder.
    """
    updates = plain_updates(model, "vLLM and llama.cpp refuse DoRA")
    base = base_model_name_or_path or original_base(getattr(model, "source", None))
    folder = Path(folder).expanduser()
    check_replaceable(folder)
    rank = max(len(A) for A, _, _ in updates.values())
    with staged(folder.resolve(), replace=True) as staging:  # a link stays one
        write_peft(staging, _uniform(updates, rank), _config(model, base, rank))
    return folder


def plain_updates(model: LlamaForCausalLM, why: str) -> dict[str, Update]:
    """Path -> A (r, d_in), B (d_out, r), both float32, and the scale, of the original base.

    Args:
        model: with LoRA layers.
        why: DoRA's are not possible, for the message.

    Raises:
        AdapterError: the model has no LoRA layers, or has DoRA's.
    """
    layers = lora_layers(model)
    if not layers:
        raise AdapterError("the model has no LoRA layers; call add_lora(model, ...) first")
    if model.lora_config.use_dora:
        raise AdapterError(f"{why}: merge the adapter into its base instead (mlx-qlora merge)")
    updates = {}
    for path, layer in layers:
        A, B = layer.update_of_the_base()
        updates[path] = np.array(A), np.array(B), layer.scale
    return updates


def check_replaceable(folder: Path, field: str = "folder") -> None:
    """Refuses a folder that holds anything but an earlier export, as all in it would go.

    Raises:
        AdapterError: it is a file, or holds other files.
        ConfigError: the adapter in it is somebody else's, or it is the current folder.
    """
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file: give a folder for the portable adapter")
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted({path.relative_to(folder).as_posix() for path in files} - EXPORTED)
    if others:
        raise AdapterError(
            f"{folder} holds files that are no adapter's; a portable adapter needs a folder of its "
            f"own, as some readers take every file in it:\n{listing(others, most=5)}"
        )
    check_names(folder, ADAPTER_FOLDER, field)
    check_not_here(folder, field)


def _uniform(updates: dict[str, Update], rank: int) -> dict[str, np.ndarray]:
    """PEFT key -> float32 array, all of one rank and with the scale in lora_B."""
    tensors = {}
    for path, (A, B, scale) in updates.items():
        more = (0, rank - len(A))
        tensors[f"{PREFIX}{path}.lora_A.weight"] = np.pad(A, (more, (0, 0)))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = np.pad(B * np.float32(scale), ((0, 0), more))
    return tensors


def _config(model: LlamaForCausalLM, base: str, rank: int) -> dict[str, Any]:
    config = peft_config(model, base)
    if isinstance(config["target_modules"], str):  # a regex; not every reader has Python's
        config["target_modules"] = [path for path, _ in lora_layers(model)]
    uniform = {"r": rank, "lora_alpha": rank, "use_rslora": False}
    return config | uniform | {"rank_pattern": {}, "alpha_pattern": {}}
