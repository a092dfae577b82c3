"""The record of a run: what is needed to repeat it, and the hashes of what decides its weights."""

import hashlib
import importlib.metadata
import json
import math
import platform
from typing import TYPE_CHECKING

from mlx_qlora import __version__, device
from mlx_qlora.adapters.origin import base_hash
from mlx_qlora.adapters.peft import adapter_tensors
from mlx_qlora.config import RunConfig, Values, to_dict, to_yaml, with_whole_paths
from mlx_qlora.distributed import processes
from mlx_qlora.folders import RECORD, write_whole
from mlx_qlora.model.hub import sample_of
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import begins_with_base, lora_layers
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.train.config import NUMERICS

if TYPE_CHECKING:
    from mlx_qlora.run import Inputs


def fingerprint_of(
    model: LlamaForCausalLM, inputs: "Inputs", config: RunConfig, base: str
) -> dict[str, str]:
    """Hash what decides the weights: two runs with the same hashes end with the same bytes.

    The model has its LoRA layers as they begin; the validation rows count because they decide early
    stopping and the best weights.
    """
    digest = hashlib.sha256(base.encode())
    for name, matrix in model.named_modules():
        if isinstance(matrix, FrozenMatrix):
            digest.update(f"{name} {matrix.shape} {matrix.quant} {matrix.dtype}".encode())
    digest.update(sample_of(model.source.path) if model.source is not None else b"")
    for weight in adapter_tensors(model).values():
        digest.update(weight.tobytes())
    packed = any(layer.base_layer.quant is not None for _, layer in lora_layers(model))
    if packed and begins_with_base(model.lora_config.init_lora_weights):
        digest.update(b"the base as it is")  # these runs once changed it
    decides = json.dumps(deciding_values(config), sort_keys=True)
    rows = inputs.train.digest + (inputs.validation.digest if inputs.validation else "")
    return {
        "config": hashlib.sha256(decides.encode()).hexdigest(),
        "data": hashlib.sha256(rows.encode()).hexdigest(),
        "model": digest.hexdigest(),
        "numerics": str(NUMERICS),
        **base_hash(model),
    }


def write_record(inputs: "Inputs") -> None:
    """Write `run.yaml` and `training_args.json`: what is needed to repeat the run."""
    names = ("mlx", "mlx-lm", "numpy", "safetensors", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in names}
    config, examples, output = with_whole_paths(inputs.config), inputs.train, inputs.output
    record = {
        "config": to_dict(config),
        "versions": {"mlx-qlora": __version__, "python": platform.python_version(), **versions},
        "machine": device.facts(),
        "fingerprint": inputs.state.fingerprint,
        "data": {
            "rows": len(examples),
            "tokens": int(examples.lengths.sum()),
            "format": examples.report.format,
        },
    }
    # First: it marks the folder as ours.
    write_whole(output / RECORD, json.dumps(record, indent=2) + "\n")
    write_whole(output / "run.yaml", to_yaml(config))


def deciding_values(config: RunConfig) -> Values:
    """Section -> field -> value of what decides the weights, and not what only memory asks for."""
    decides = {k: v for k, v in to_dict(config).items() if k in ("model", "lora", "training")}
    training = decides["training"]
    for name in ("gradient_checkpointing", "compile", "max_skipped_steps"):
        del training[name]
    # How a step's examples are divided among micro-batches and processes is not what it learns.
    sizes = "per_device_train_batch_size", "gradient_accumulation_steps"
    numbers = [training.pop(name) for name in sizes]
    if "auto" not in numbers:
        training[f"{' x '.join(sizes)} x processes"] = math.prod(numbers) * processes().size
    del training["warmup_ratio"]  # warmup_steps is what it gives
    # Where it is; its content is hashed.
    for name in ("source", "revision", "adapter", "residency"):
        del decides["model"][name]
    # The rows themselves have a hash of their own.
    return {**decides, "data": {"shuffle": config.data.shuffle}}
