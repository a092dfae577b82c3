"""What is written down of a run, and what tells it from others."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from mlx_qlora import backend
from mlx_qlora._version import __version__
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.peft import adapter_tensors
from mlx_qlora.config import RunConfig, to_dict, to_yaml
from mlx_qlora.data.examples import Examples
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.processes import processes


def fingerprint_of(
    model: LlamaForCausalLM,
    examples: Examples,
    validation: Examples | None,
    config: RunConfig,
    base: str,
) -> dict[str, str]:
    """Hashes of what decides the weights: two runs with the same ones end alike.

    Args:
        model: with its LoRA layers as they begin.
        examples: to train on.
        validation: to measure on, which decides early stopping and the best weights.
        config: of the run.
        base: the original repository.
    """
    digest = hashlib.sha256(base.encode())
    for name, matrix in model.named_modules():
        if isinstance(matrix, FrozenMatrix):
            digest.update(f"{name} {matrix.shape} {matrix.quant} {matrix.dtype}".encode())
    source = getattr(model, "source", None)
    digest.update(sample_of(source.path) if source is not None else b"")
    for weight in adapter_tensors(model).values():
        digest.update(weight.tobytes())
    return {
        "config": _hash(json.dumps(deciding_values(config), sort_keys=True)),
        "data": _hash(examples.digest + (validation.digest if validation else "")),
        "model": digest.hexdigest(),
    }


def write_record(
    output: Path, config: RunConfig, fingerprint: dict[str, str], examples: Examples
) -> None:
    """Writes `run.yaml` and `training_args.json`: what is needed to repeat the run."""
    names = ("mlx", "mlx-lm", "numpy", "safetensors", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = {
        "config": to_dict(config),
        "versions": {"mlx-qlora": __version__, "python": platform.python_version(), **versions},
        "machine": backend.facts(),
        "fingerprint": fingerprint,
        "data": {"rows": len(examples), "tokens": int(examples.lengths.sum())},
    }
    with staged(output) as staging:  # first: by this one a folder is known to be ours
        text = json.dumps(record, indent=2) + "\n"
        (staging / "training_args.json").write_text(text, encoding="utf-8")
    with staged(output) as staging:
        (staging / "run.yaml").write_text(to_yaml(config), encoding="utf-8")


def deciding_values(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What decides the weights; where files go and how often, and what memory asks for, do not."""
    decides = {k: v for k, v in to_dict(config).items() if k in ("model", "lora", "training")}
    training = decides["training"]
    for name in ("gradient_checkpointing", "compile", "max_skipped_steps"):
        del training[name]
    # How a step's rows are divided among micro-batches and processes is not what it learns.
    rows = training.pop("per_device_train_batch_size") * training.pop("gradient_accumulation_steps")
    training["rows_per_step"] = rows * processes().size
    for name in ("source", "revision", "adapter"):  # where it lies; what it is, is hashed
        del decides["model"][name]
    data = to_dict(config)["data"]  # which rows there are is told by the hash of the data
    return {**decides, "data": {name: data[name] for name in ("packing", "max_length", "shuffle")}}


def sample_of(path: Path) -> bytes:
    """A hash of the sizes of a model's weight files and of pieces all over them.

    Reading all of a large model would take longer than anybody waits.
    """
    hashed = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for piece in range(64):
                stream.seek(size * piece // 64)
                hashed.update(stream.read(1024))
    return hashed.digest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
