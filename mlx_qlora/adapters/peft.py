"""The adapter as a PEFT folder, out and in.

PEFT is lenient where it hurts: it only warns of tensors that a file lacks, and says nothing of
tensors that it does not know. So both directions check the exact set of names and shapes here.
Format: PEFT's docs/source/developer_guides/checkpoint.md.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora.adapters.card import Facts, model_card
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.mlx_lm import FILES as MLX_LM_FILES
from mlx_qlora.adapters.mlx_lm import write_mlx_lm
from mlx_qlora.adapters.ownership import ADAPTER_FOLDER, check_names
from mlx_qlora.errors import AdapterError, ConfigError, listing
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.initial import changes_base
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, lora_layers
from mlx_qlora.tree import flat

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT options that change the arithmetic, with the one value that we compute. Absent is fine too.
FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_qalora": False,
    "use_bdlora": False,
    "lora_bias": False,
    "exclude_modules": None,
    "layers_pattern": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# Where an adapter began does not matter, unless the base was changed to begin there.
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


# ---- out ---------------------------------------------------------------------------------------


def save_adapter(
    model: LlamaForCausalLM,
    folder: str | Path,
    base_model_name_or_path: str | None = None,
    *,
    mlx_lm: bool = True,
) -> Path:
    """Writes the adapter as a PEFT folder, with a copy for mlx-lm in its `mlx/`.

    The tensors are the float32 masters. What was written is read back and compared before it
    takes the place of anything older.

    Args:
        model: with LoRA layers.
        folder: made if it does not exist; files of other names in it are left alone.
        base_model_name_or_path: the original Hugging Face repository, which every PEFT user will
            load; by default what the model's own files say they are a copy of.
        mlx_lm: whether `mlx/` is written too.

    Returns:
        The folder.

    Raises:
        AdapterError: the model has no LoRA layers, or nothing says what the base is.
        ConfigError: the folder holds somebody else's adapter or README.md.
    """
    if not lora_layers(model):
        raise AdapterError("the model has no LoRA layers; call add_lora(model, ...) first")
    base = base_model_name_or_path or original_base(getattr(model, "source", None))
    folder = Path(folder).expanduser()
    check_names(folder, ADAPTER_FOLDER)
    tensors = adapter_tensors(model)
    copies = tuple(f"mlx/{name}" for name in MLX_LM_FILES)
    with staged(folder, marks=(CONFIG, copies[0]), gone=() if mlx_lm else copies) as staging:
        write_peft(staging, tensors, peft_config(model, base))
        if mlx_lm:
            write_mlx_lm(model, staging / "mlx")
    return folder


def original_base(source: ModelFiles | None) -> str:
    """The Hugging Face repository that a model's files are a copy of.

    Raises:
        AdapterError: they do not say, so the user must.
    """
    if source is None or source.hf_id is None:
        what = source.source if source else "this model"
        raise AdapterError(
            f"nothing says which Hugging Face repository {what} was made from, and PEFT needs "
            "the original one. Pass model.base_model_name_or_path=org/name "
            "(in Python: save_adapter(model, folder, base_model_name_or_path=...))"
        )
    return source.hf_id


def _revision_of(model: LlamaForCausalLM, base: str) -> str | None:
    """The commit of the base, if the model's files are the base itself and not a copy of it."""
    source = getattr(model, "source", None)
    return source.revision if source is not None and source.source == base else None


def adapter_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """PEFT key -> float32 array, for every LoRA weight, as updates of the original base."""
    tensors = {name: np.array(w) for name, w in flat(model.trainable_parameters()).items()}
    for path, layer in lora_layers(model):
        A, B = layer.update_of_the_base()
        tensors |= {f"{path}.lora_A.weight": np.array(A), f"{path}.lora_B.weight": np.array(B)}
    return {PREFIX + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def written_config(model: LlamaForCausalLM) -> LoraConfig:
    """The config of what `adapter_tensors` returns: twice the rank and the same scale, or as is."""
    lora: LoraConfig = model.lora_config
    if not changes_base(lora.init_lora_weights):
        return lora
    factor = math.sqrt(2) if lora.use_rslora else 2
    return dataclasses.replace(
        lora,
        r=2 * lora.r,
        lora_alpha=lora.lora_alpha * factor,
        rank_pattern={key: 2 * r for key, r in lora.rank_pattern.items()},
        alpha_pattern={key: alpha * factor for key, alpha in lora.alpha_pattern.items()},
        init_lora_weights=True,
    )


def peft_config(model: LlamaForCausalLM, base: str) -> dict[str, Any]:
    """What `adapter_config.json` says; only keys that every PEFT since 0.8 knows.

    r, lora_alpha and target_modules are always written: without them PEFT would fall back to
    defaults of its own and compute something else without a warning.
    """
    lora = written_config(model)
    targets = lora.target_modules
    if targets == "all-linear":  # PEFT would expand this anew, and may know other linears
        targets = sorted({path.rpartition(".")[2] for path, _ in lora_layers(model)})
    return {
        "alpha_pattern": {key: _whole(alpha) for key, alpha in lora.alpha_pattern.items()},
        "base_model_name_or_path": base,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": lora.layers_to_transform,
        "lora_alpha": _whole(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": lora.rank_pattern,
        "revision": _revision_of(model, base),
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def _whole(alpha: float) -> float:
    """An int where it is one: Ollama reads nothing else."""
    return int(alpha) if alpha == int(alpha) else alpha


def write_peft(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Writes the three files of a PEFT adapter and reads them back."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # Sorted on the outside alone: of two patterns that match, the first counts.
    (folder / CONFIG).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    (folder / "README.md").write_text(model_card(Facts(config)))

    written = load_file(folder / WEIGHTS)
    same = written.keys() == tensors.keys() and all(
        written[name].shape == array.shape and written[name].tobytes() == array.tobytes()
        for name, array in tensors.items()
    )
    if not same or json.loads((folder / CONFIG).read_text()) != config:
        raise AdapterError(f"{folder}: what was read back is not what was written; nothing changed")


# ---- in ----------------------------------------------------------------------------------------


def read_peft_config(folder: Path) -> LoraConfig:
    """The LoraConfig of a PEFT folder.

    Raises:
        AdapterError: no such file, or an option that we do not compute; lists all of them.
    """
    path = folder / CONFIG
    if not path.is_file():
        kind = "" if folder.is_dir() else " (no such folder)"
        raise AdapterError(f"{folder} is no PEFT adapter: it has no {CONFIG}{kind}")
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder} is no PEFT adapter: it has no {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    unsupported = [
        f"{name} is {config[name]!r}; supported: {value!r}"
        for name, value in FIXED.items()
        if name in config and (config[name] or None) != (value or None)
    ]
    if (begun := config.get("init_lora_weights")) not in KEEP_THE_BASE:
        unsupported.append(f"init_lora_weights is {begun!r}, which needs a changed base model")
    for name in ("peft_type", "r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            unsupported.append(f"{name} is missing")
    if unsupported:
        raise AdapterError(f"{path} describes an adapter we cannot run:\n{listing(unsupported)}")
    targets, layers = config["target_modules"], _as_list(config.get("layers_to_transform"))
    if not (isinstance(targets, str) or _holds(targets, str)):
        raise AdapterError(f"{path}: target_modules must be text or a list of it; got {targets!r}")
    for name, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = config.get(name) or {}
        if not (isinstance(pattern, dict) and _holds(list(pattern.values()), kinds)):
            raise AdapterError(f"{path}: {name} must map text to numbers; got {pattern!r}")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name) or False, bool):
            raise AdapterError(f"{path}: {name} must be true or false; got {config[name]!r}")
    if not (layers is None or _holds(layers, int)):
        raise AdapterError(f"{path}: layers_to_transform must hold integers; got {layers!r}")
    try:
        return LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout", 0.0),
            target_modules=targets,
            layers_to_transform=layers,
            use_rslora=config.get("use_rslora") or False,
            use_dora=config.get("use_dora") or False,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


def _holds(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
