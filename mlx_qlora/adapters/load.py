"""A folder's adapter, PEFT's or mlx-lm's, becomes LoRA layers of a model."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.adapters.mlx_lm import WEIGHTS as MLX_LM_WEIGHTS
from mlx_qlora.adapters.mlx_lm import peft_name, read_mlx_lm_config
from mlx_qlora.adapters.peft import CONFIG, PREFIX, WEIGHTS, read_peft_config
from mlx_qlora.errors import AdapterError, ConfigError, listing
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers, target_paths
from mlx_qlora.model.weights import read_safetensors_header
from mlx_qlora.tree import nested


def load_adapter(model: LlamaForCausalLM, folder: str | Path) -> LlamaForCausalLM:
    """Attaches an adapter to a model without one: PEFT's, ours or another's, or mlx-lm's.

    Args:
        model: the base, frozen.
        folder: with `adapter_config.json` and `adapter_model.safetensors`, or mlx-lm's
            `adapters.safetensors`.

    Returns:
        The same model, with LoRA layers, ready to generate or to be trained on.

    Raises:
        AdapterError: files are missing or damaged, the adapter uses an option that we do not
            compute, or its tensors are not those of this model; all bad tensors are listed.
        ConfigError: the model already has LoRA layers.
    """
    if lora_layers(model):
        raise ConfigError("the model already has LoRA layers; load it again to attach an adapter")
    folder = Path(folder).expanduser()
    lora = read_adapter_config(folder)
    file = folder / (MLX_LM_WEIGHTS if is_mlx_lm(folder) else WEIGHTS)
    header = read_safetensors_header(file, AdapterError)
    try:
        paths = target_paths(model, lora)
    except ConfigError as error:
        raise AdapterError(f"{folder / CONFIG} is for another model: {error}") from None
    _check_tensors(model, file, lora, paths, header)

    try:
        arrays: Any = mx.load(str(file))
    except (RuntimeError, ValueError) as error:  # offsets that do not fit the shapes
        raise AdapterError(f"{file} is damaged: {error}") from None
    if is_mlx_lm(folder):
        arrays = {peft_name(name): mx.contiguous(array.T) for name, array in arrays.items()}
    add_lora(model, lora, begin=False)
    weights = {name.removeprefix(PREFIX): a.astype(mx.float32) for name, a in arrays.items()}
    model.update(nested(weights))
    mx.eval(model.trainable_parameters())
    return model


def _check_tensors(
    model: LlamaForCausalLM,
    file: Path,
    lora: LoraConfig,
    paths: list[str],
    header: dict[str, Any],
) -> None:
    """Compares names, shapes and dtypes with what the config promises for this model."""
    modules = dict(model.named_modules())
    expected = {}
    for path in paths:
        d_out, d_in = modules[path].shape
        r = lora.rank_of(path)
        expected[f"{PREFIX}{path}.lora_A.weight"] = [r, d_in]
        expected[f"{PREFIX}{path}.lora_B.weight"] = [d_out, r]
        if lora.use_dora:
            expected[f"{PREFIX}{path}.lora_magnitude_vector"] = [d_out]
    transposed = file.name == MLX_LM_WEIGHTS
    found = {peft_name(name) if transposed else name for name in header}
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, entry in header.items():
        wanted = expected.get(peft_name(name) if transposed else name)
        wanted = wanted[::-1] if wanted and transposed else wanted
        if wanted is None:
            problems.append(f"{name} belongs to no target of this model")
        elif entry.get("shape") != wanted:
            problems.append(f"{name} has shape {entry.get('shape')}, not {wanted}")
        elif entry.get("dtype") not in ("F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {entry.get('dtype')}")
    if problems:
        raise AdapterError(f"{file} is damaged or for another model:\n{listing(problems)}")


def is_mlx_lm(folder: Path) -> bool:
    """Whether a folder holds mlx-lm's adapter and not PEFT's."""
    return (folder / MLX_LM_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file()


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig of an adapter's folder, PEFT's or mlx-lm's.

    Raises:
        AdapterError: it is neither, or one that we do not compute.
    """
    return read_mlx_lm_config(folder) if is_mlx_lm(folder) else read_peft_config(folder)
