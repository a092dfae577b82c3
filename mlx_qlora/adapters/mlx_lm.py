"""The adapter as mlx-lm writes it and reads it: `mlx_lm.load(..., adapter_path="outputs/mlx")`.

mlx-lm's layout is the transpose of PEFT's: lora_a (d_in, r), lora_b (r, d_out), under names of
its own, with one rank and one scale for all.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.ownership import check_names
from mlx_qlora.errors import AdapterError, ConfigError
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, lora_layers
from mlx_qlora.model.weights import read_safetensors_header

CONFIG, WEIGHTS = FILES = "adapter_config.json", "adapters.safetensors"
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
    check_names(folder, FILES)
    with staged(folder, marks=(CONFIG,)) as staging:
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
    save_file(tensors, folder / WEIGHTS, metadata={"format": "mlx"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    written = load_file(folder / WEIGHTS)
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
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path} is no adapter config of mlx-lm: {error!r}") from None
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}; supported: lora, dora")
    header = read_safetensors_header(folder / WEIGHTS, AdapterError)
    ranks = {e["shape"][-1] for name, e in header.items() if name.endswith(".lora_a")}
    paths = {name.rpartition(".")[0] for name in header}
    if len(ranks) != 1 or 0 in ranks:
        found = ", ".join(map(str, sorted(ranks))) or "none"
        raise AdapterError(f"{folder / WEIGHTS}: one rank is expected in all lora_a; got {found}")
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
