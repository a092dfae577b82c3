"""The adapter as a PEFT folder, out and in.

PEFT is lenient where it hurts: it only warns of tensors that a file lacks, and says nothing of
tensors that it does not know. So both directions check the exact set of names and shapes here.
Format: PEFT's docs/source/developer_guides/checkpoint.md.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora._version import __version__
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.mlx_lm import write_mlx_lm
from mlx_qlora.errors import AdapterError, ConfigError, listing
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers, target_paths
from mlx_qlora.model.weights import read_safetensors_header
from mlx_qlora.tree import flat, nested

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT options that change the arithmetic, with the one value that we compute. Absent is fine too.
FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
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
    """
    if not lora_layers(model):
        raise AdapterError("the model has no LoRA layers; call add_lora(model, ...) first")
    base = base_model_name_or_path or original_base(getattr(model, "source", None))
    folder = Path(folder).expanduser()
    tensors = adapter_tensors(model)
    with staged(folder) as staging:
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
    """PEFT key -> float32 array, for every LoRA weight."""
    return {PREFIX + name: np.array(w) for name, w in flat(model.trainable_parameters()).items()}


def peft_config(model: LlamaForCausalLM, base: str) -> dict[str, Any]:
    """What `adapter_config.json` says; only keys that every PEFT since 0.8 knows.

    r, lora_alpha and target_modules are always written: without them PEFT would fall back to
    defaults of its own and compute something else without a warning.
    """
    lora: LoraConfig = model.lora_config
    targets = lora.target_modules
    if targets == "all-linear":  # PEFT would expand this anew, and may know other linears
        targets = sorted({path.rpartition(".")[2] for path, _ in lora_layers(model)})
    alpha = int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha
    return {
        "base_model_name_or_path": base,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": lora.layers_to_transform,
        "lora_alpha": alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "revision": _revision_of(model, base),
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.use_rslora,
    }


def write_peft(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Writes the three files of a PEFT adapter and reads them back."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(_model_card(config))

    written = load_file(folder / WEIGHTS)
    same = written.keys() == tensors.keys() and all(
        written[name].shape == array.shape and written[name].tobytes() == array.tobytes()
        for name, array in tensors.items()
    )
    if not same or json.loads((folder / CONFIG).read_text()) != config:
        raise AdapterError(f"{folder}: what was read back is not what was written; nothing changed")


def _model_card(config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    front = [f"base_model: {base}", "library_name: peft", "pipeline_tag: text-generation", "tags:"]
    if not Path(base).is_absolute():
        front.append(f"- base_model:adapter:{base}")
    lines = [
        "---",
        *front,
        "- lora",
        "- mlx-qlora",
        "---",
        "",
        f"A LoRA adapter for `{base}`, trained with mlx-qlora {__version__}.",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("this folder")',
        "```",
    ]
    return "\n".join(lines) + "\n"


# ---- in ----------------------------------------------------------------------------------------


def load_adapter(model: LlamaForCausalLM, folder: str | Path) -> LlamaForCausalLM:
    """Attaches a PEFT adapter, ours or another's, to a model without one.

    Args:
        model: the base, frozen.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

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
    lora = read_peft_config(folder)
    header = read_safetensors_header(folder / WEIGHTS, AdapterError)
    try:
        paths = target_paths(model, lora)
    except ConfigError as error:
        raise AdapterError(f"{folder / CONFIG} is for another model: {error}") from None
    _check_tensors(model, folder, lora, paths, header)

    try:
        arrays: Any = mx.load(str(folder / WEIGHTS))
    except (RuntimeError, ValueError) as error:  # offsets that do not fit the shapes
        raise AdapterError(f"{folder / WEIGHTS} is damaged: {error}") from None
    add_lora(model, lora)
    weights = {name.removeprefix(PREFIX): a.astype(mx.float32) for name, a in arrays.items()}
    model.update(nested(weights))
    mx.eval(model.trainable_parameters())
    return model


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
    if not (layers is None or _holds(layers, int)):
        raise AdapterError(f"{path}: layers_to_transform must hold integers; got {layers!r}")
    try:
        return LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout", 0.0),
            target_modules=targets,
            layers_to_transform=layers,
            use_rslora=config.get("use_rslora", False),
        )
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


def _holds(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _check_tensors(
    model: LlamaForCausalLM,
    folder: Path,
    lora: LoraConfig,
    paths: list[str],
    header: dict[str, Any],
) -> None:
    """Compares names, shapes and dtypes with what the config promises for this model."""
    modules = dict(model.named_modules())
    expected = {}
    for path in paths:
        d_out, d_in = modules[path].shape
        expected[f"{PREFIX}{path}.lora_A.weight"] = [lora.r, d_in]
        expected[f"{PREFIX}{path}.lora_B.weight"] = [d_out, lora.r]
    problems = [f"{name} is missing" for name in expected if name not in header]
    for name, entry in header.items():
        if name not in expected:
            problems.append(f"{name} belongs to no target of this model")
        elif entry.get("shape") != expected[name]:
            problems.append(f"{name} has shape {entry.get('shape')}, not {expected[name]}")
        elif entry.get("dtype") not in ("F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {entry.get('dtype')}")
    if problems:
        raise AdapterError(
            f"{folder / WEIGHTS} is damaged or for another model:\n{listing(problems)}"
        )
