"""The adapter on disk in PEFT's layout and in mlx-lm's, out and in."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora.adapters.push import Facts, model_card
from mlx_qlora.errors import AdapterError, ConfigError, listing
from mlx_qlora.folders import ADAPTER_FOLDER, MLX_LM, check_writable, staged
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, changes_base, lora_layers, target_paths
from mlx_qlora.model.weights import read_safetensors_header
from mlx_qlora.tree import flat, nested

# ---- mlx-lm's layout -----------------------------------------------------------------------------


MLX_LM_CONFIG, MLX_LM_WEIGHTS = MLX_LM


PEFT_PREFIX = "base_model.model."


PEFT_LEAVES = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "m": ".lora_magnitude_vector",
}


# ---- out ---------------------------------------------------------------------------------------
def save_mlx_lm(model: LlamaForCausalLM, folder: str | Path) -> Path:
    """Writes the adapter for mlx-lm alone, into a folder that is whole or not there.

    Args:
        model: with LoRA layers.
        folder: files of other names in it are left alone.

    Returns:
        The folder.

    Raises:
        AdapterError: the model has no LoRA layers, or files of PEFT's adapter are in the folder:
            both have an `adapter_config.json`.
        ConfigError: the folder holds an adapter that somebody else wrote.
    """
    if not lora_layers(model):
        raise AdapterError("the model has no LoRA layers; call add_lora(model, ...) first")
    folder = Path(folder).expanduser()
    if (folder / "adapter_model.safetensors").exists():
        raise AdapterError(f"{folder} holds a PEFT adapter already; choose another folder")
    check_writable(folder, MLX_LM)
    with staged(folder, marks=(MLX_LM_CONFIG,)) as staging:
        write_mlx_lm(model, staging)
    return folder


def write_mlx_lm(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes `adapters.safetensors` and `adapter_config.json` and reads them back.

    Updates of smaller rank are filled up with zeros, and those of another scale carry the
    difference in lora_b: the product stays the same.
    """
    lora: LoraConfig = model.lora_config
    layers = lora_layers(model)
    updates = {path: tuple(map(np.array, layer.update_of_the_base())) for path, layer in layers}
    rank = max(len(A) for A, _ in updates.values())
    scale = layers[0][1].scale
    tensors = {}
    for path, layer in layers:
        A, B = updates[path]
        A, B = np.pad(A, ((0, rank - len(A)), (0, 0))), np.pad(B, ((0, 0), (0, rank - len(A))))
        B = B if layer.scale == scale else B * np.float32(layer.scale / scale)
        tensors[f"{path}.lora_a"] = np.ascontiguousarray(A.T)
        tensors[f"{path}.lora_b"] = np.ascontiguousarray(B.T)
        if lora.use_dora:
            tensors[f"{path}.m"] = np.array(layer.lora_magnitude_vector)
    config = {
        "fine_tune_type": "dora" if lora.use_dora else "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": lora.lora_dropout,
            # Whole paths: mlx-lm takes them whatever num_layers is, so they also say
            # which layers are left out.
            "keys": [path for path, _ in layers],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / MLX_LM_WEIGHTS, metadata={"format": "mlx"})
    (folder / MLX_LM_CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    written = load_file(folder / MLX_LM_WEIGHTS)
    same = written.keys() == tensors.keys() and all(
        written[name].tobytes() == array.tobytes() for name, array in tensors.items()
    )
    if not same:
        raise AdapterError(f"{folder}: what was read back is not what was written")


# ---- in ----------------------------------------------------------------------------------------
def read_mlx_lm_config(folder: Path) -> LoraConfig:
    """The LoraConfig of an adapter that mlx-lm has written, as its tensors show it.

    Raises:
        AdapterError: files are missing or damaged, or it is no LoRA or DoRA.
    """
    path = folder / MLX_LM_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path} is no adapter config of mlx-lm: {error!r}") from None
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}; supported: lora, dora")
    header = read_safetensors_header(folder / MLX_LM_WEIGHTS, AdapterError)
    ranks = {e["shape"][-1] for name, e in header.items() if name.endswith(".lora_a")}
    paths = {name.rpartition(".")[0] for name in header}
    if len(ranks) != 1 or 0 in ranks:
        found = ", ".join(map(str, sorted(ranks))) or "none"
        raise AdapterError(
            f"{folder / MLX_LM_WEIGHTS}: one rank is expected in all lora_a; got {found}"
        )
    rank = ranks.pop()
    try:
        return LoraConfig(
            r=rank,
            lora_alpha=scale * rank,
            lora_dropout=dropout,
            target_modules=sorted(paths),
            use_dora=kind == "dora",
        )
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from None


def peft_name(name: str) -> str:
    """What PEFT calls a tensor of mlx-lm's; any other name stays as it is."""
    path, _, leaf = name.rpartition(".")
    return f"{PEFT_PREFIX}{path}{PEFT_LEAVES[leaf]}" if leaf in PEFT_LEAVES else name


# ---- PEFT's layout -------------------------------------------------------------------------------


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
    check_writable(folder, ADAPTER_FOLDER)
    tensors = adapter_tensors(model)
    copies = tuple(f"mlx/{name}" for name in MLX_LM)
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


# ---- a folder -> LoRA layers ---------------------------------------------------------------------


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
