"""The adapter as mlx-lm reads it: `mlx_lm.load(..., adapter_path="outputs/mlx")`.

mlx-lm's layout is the transpose of PEFT's: lora_a (d_in, r), lora_b (r, d_out), under names of
its own, with one rank and one scale for all.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora.errors import AdapterError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, lora_layers


def write_mlx_lm(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes `adapters.safetensors` and `adapter_config.json` and reads them back."""
    lora: LoraConfig = model.lora_config
    layers = lora_layers(model)
    tensors = {}
    for path, layer in layers:
        tensors[f"{path}.lora_a"] = np.ascontiguousarray(np.array(layer.lora_A.weight).T)
        tensors[f"{path}.lora_b"] = np.ascontiguousarray(np.array(layer.lora_B.weight).T)
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {
            "rank": lora.r,
            "scale": lora.scale,
            "dropout": lora.lora_dropout,
            # Whole paths: mlx-lm takes them whatever num_layers is, so they also say
            # which layers are left out.
            "keys": [path for path, _ in layers],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    written = load_file(folder / "adapters.safetensors")
    same = written.keys() == tensors.keys() and all(
        written[name].tobytes() == array.tobytes() for name, array in tensors.items()
    )
    if not same:
        raise AdapterError(f"{folder}: what was read back is not what was written")
