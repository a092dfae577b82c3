"""An adapter on disk: PEFT's layout, and mlx-lm's in the folder `mlx/`; out and in.

A LoRA weight has in PEFT's file the name that it has in our tree, after a prefix. mlx-lm has the
same two matrices transposed, and one rank and one scale for all of them.
"""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora.adapters.options import CONFIG, MLX_LM_WEIGHTS, WEIGHTS, for_this_model, is_mlx_lm
from mlx_qlora.adapters.origin import base_hash, check_base, check_whole, original_base
from mlx_qlora.adapters.push import Facts, model_card
from mlx_qlora.errors import AdapterError, AdapterWarning, ConfigError, listing
from mlx_qlora.folders import (
    ADAPTER_FOLDER,
    CARD,
    MLX_COPY,
    MLX_LM,
    NOTE,
    check_writable,
    staged,
    user_path,
)
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, LoRALinear, add_lora, lora_layers
from mlx_qlora.model.lora_init import begins_with_base
from mlx_qlora.model.quantize import FrozenMatrix, pack, unpack
from mlx_qlora.model.rope import in_both_spellings
from mlx_qlora.model.stored import StoredTensor, check_finite, tensors_in
from mlx_qlora.readers import reading
from mlx_qlora.tree import flat, nested

PREFIX = "base_model.model."
LEAVES = {  # mlx-lm's -> PEFT's
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "m": ".lora_magnitude_vector",
}
# What PEFT writes besides where it thinks that the vocabulary was touched.
COPIES = {
    f"{PREFIX}model.embed_tokens.weight": "embed_tokens",
    f"{PREFIX}lm_head.weight": "lm_head",
}
ROWS = 4096  # of a vocabulary that are compared at once

# ---- out: PEFT's layout --------------------------------------------------------------------------


def save_adapter(
    model: LlamaForCausalLM,
    folder: str | Path,
    base_model_name_or_path: str | None = None,
    *,
    mlx_lm: bool = True,
) -> Path:
    """Write the adapter as a PEFT folder, with a copy for mlx-lm in its `mlx/`.

    The tensors are the float32 masters. What was written is read back and compared before it
    replaces anything older. Files of other names in the folder are left alone.

    Args:
        base_model_name_or_path: the original Hugging Face repository, which every PEFT user will
            load; by default what the model's own files say they are a copy of.
        mlx_lm: whether `mlx/` is written too.

    Raises:
        AdapterError: the model has no LoRA layers, or nothing says what the base is.
        ConfigError: the folder holds somebody else's adapter or README.md.
    """
    base = base_model_name_or_path or original_base(model.source)
    return write_adapter(model, folder, base, base_hash(model), mlx_lm)


def write_adapter(
    model: LlamaForCausalLM,
    folder: str | Path,
    base: str,
    known_by: dict[str, str],
    mlx_lm: bool = True,
) -> Path:
    """As `save_adapter`, with a base's hash or, where a run's record has it, without."""
    layers_of(model)
    folder = user_path(folder)
    check_writable(folder, ADAPTER_FOLDER)
    marks, gone = (CONFIG, MLX_COPY[0]), () if mlx_lm else MLX_COPY
    with staged(folder, marks=marks, gone=gone) as staging:
        write_peft(staging, adapter_tensors(model), peft_config(model, base), known_by)
        if mlx_lm:
            _write_mlx_lm(model, staging / "mlx", known_by)
    return folder


def layers_of(model: LlamaForCausalLM) -> list[tuple[str, LoRALinear]]:
    """The LoRA layers of a model that is to be written; an AdapterError if it has none."""
    layers = lora_layers(model)
    if not layers:
        raise AdapterError(
            "the model has no LoRA layers; call add_lora or load_adapter first, and merge only "
            "after save_adapter and save_merged"
        )
    return layers


def adapter_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """PEFT key -> float32 array, for every LoRA weight, as updates of the base."""
    tensors = {name: np.array(w) for name, w in flat(model.trainable_parameters()).items()}
    for path, layer in lora_layers(model):
        A, B = layer.factors()
        tensors |= {f"{path}.lora_A.weight": np.array(A), f"{path}.lora_B.weight": np.array(B)}
    return {PREFIX + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def uniform_updates(
    model: LlamaForCausalLM, scale: float
) -> tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The largest rank, and path -> A (r, d_in) and B (d_out, r), float32, of it and of one scale.

    A smaller rank is padded with zeros, and B carries what another scale differs by: their product
    stays the same.
    """
    layers = layers_of(model)
    rank = max(len(layer.factors()[0]) for _, layer in layers)
    updates = {}
    for path, layer in layers:
        A, B = map(np.array, layer.factors())
        B = B if layer.scale == scale else B * np.float32(layer.scale / scale)
        missing = 0, rank - len(A)
        updates[path] = np.pad(A, (missing, (0, 0))), np.pad(B, ((0, 0), missing))
    return rank, updates


def peft_config(model: LlamaForCausalLM, base: str) -> dict[str, Any]:
    """The content of `adapter_config.json`: only keys that every PEFT since 0.8 knows.

    r, lora_alpha and target_modules are always written: without them PEFT would fall back to
    defaults of its own and compute something else without a warning.
    """
    lora = _config_of_tensors(model.lora_config)
    targets = lora.target_modules
    if targets == "all-linear":  # PEFT would expand this again, and may know other linears
        targets = sorted({path.rpartition(".")[2] for path, _ in lora_layers(model)})
    source = model.source
    # A copy's commit is none of the original's, and AutoPeftModel would look for it there.
    revision = source.revision if source is not None and source.source == base else None
    options = {name: value for name, value in vars(lora).items() if name != "loraplus_lr_ratio"}
    return options | {
        "alpha_pattern": {key: _whole(alpha) for key, alpha in lora.alpha_pattern.items()},
        "base_model_name_or_path": base,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(lora.lora_alpha),
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": revision,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }


def _config_of_tensors(lora: LoraConfig) -> LoraConfig:
    """The config of `adapter_tensors`: PiSSA's and OLoRA's have twice the rank, at one scale."""
    if not begins_with_base(lora.init_lora_weights):
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


def _whole(alpha: float) -> float:
    """An int where it is one: Ollama reads nothing else."""
    return int(alpha) if alpha == int(alpha) else alpha


def write_peft(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], base: dict[str, str]
) -> None:
    """Write the three files of a PEFT adapter, with its `base_hash`, and read them back."""
    # Only the outer keys are sorted: of two patterns that match, the first counts.
    sorted_config = dict(sorted(config.items()))
    _write_checked(folder / WEIGHTS, tensors, {"format": "pt", **base}, sorted_config)
    (folder / CARD).write_text(model_card(Facts(config)))


def _write_checked(
    file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], config: dict[str, Any]
) -> None:
    """Write tensors, and beside them `adapter_config.json`, and read both back."""
    folder = file.parent
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=metadata)
    # The same bytes each time: safetensors writes metadata in an order that changes.
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header |= {name: metadata for name in header if name == "__metadata__"}
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":")).encode().ljust(length))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    read = {name: (x.shape, x.tobytes()) for name, x in load_file(file).items()}
    is_same = read == {name: (x.shape, x.tobytes()) for name, x in tensors.items()}
    if not is_same or json.loads((folder / CONFIG).read_text()) != config:
        raise AdapterError(f"{folder}: what was read back is not what was written; nothing changed")


# ---- out: mlx-lm's layout ------------------------------------------------------------------------


def save_mlx_lm(model: LlamaForCausalLM, folder: str | Path) -> Path:
    """Write the adapter for mlx-lm alone; files of other names in the folder are left alone.

    An AdapterError without LoRA layers, or where PEFT's adapter is in the folder: both have an
    `adapter_config.json`. A ConfigError where somebody else's is.
    """
    layers_of(model)
    folder = user_path(folder)
    if (folder / WEIGHTS).exists():
        raise AdapterError(f"{folder} holds a PEFT adapter already; choose another folder")
    check_writable(folder, MLX_LM)
    with staged(folder, marks=(CONFIG,)) as staging:
        _write_mlx_lm(model, staging, base_hash(model))
    return folder


def note_on_mlx_lm(model: LlamaForCausalLM) -> str:
    """What mlx-lm would silently misread of the base's config.json; empty if nothing."""
    config = getattr(model, "hf_config", {})
    if not config.get("rope_parameters") or config.get("model_type") == "qwen3":
        return ""
    both = in_both_spellings(config, model.config.rope) | {"rope_parameters": None}
    missing = {k: v for k, v in both.items() if v is not None and config.get(k) is None}
    if missing in ({}, {"rope_theta": 10000.0}):
        return ""
    return (
        "mlx-lm 0.32 does not read the base's rope_parameters, and would compute other "
        f"positions; add {json.dumps(missing)[1:-1]} to its config.json, or merge, which writes it"
    )


def _write_mlx_lm(model: LlamaForCausalLM, folder: Path, known_by: dict[str, str]) -> None:
    lora: LoraConfig = model.lora_config
    layers = lora_layers(model)
    rank, updates = uniform_updates(model, scale := layers[0][1].scale)
    tensors = {}
    for path, layer in layers:
        A, B = updates[path]
        tensors[f"{path}.lora_a"] = np.ascontiguousarray(A.T)
        tensors[f"{path}.lora_b"] = np.ascontiguousarray(B.T)
        if lora.use_dora:
            tensors[f"{path}.m"] = np.array(layer.lora_magnitude_vector)
    # Whole paths as keys: mlx-lm takes them whatever num_layers is, so they also say which layers
    # are left out.
    keys = [path for path, _ in layers]
    config = {
        "fine_tune_type": "dora" if lora.use_dora else "lora",
        "num_layers": len(model.layers),
        "lora_parameters": dict(rank=rank, scale=scale, dropout=lora.lora_dropout, keys=keys),
    }
    config |= {NOTE: note} if (note := note_on_mlx_lm(model)) else {}
    metadata = {"format": "mlx", **known_by}
    _write_checked(folder / MLX_LM_WEIGHTS, tensors, metadata, config)


# ---- in: a folder becomes LoRA layers ------------------------------------------------------------


def load_adapter(model: LlamaForCausalLM, folder: str | Path) -> LlamaForCausalLM:
    """Attach an adapter to a model without one: PEFT's, ours or another's, or mlx-lm's.

    The base stays frozen, and gets LoRA layers that are ready to generate or to be trained on.

    Raises:
        AdapterError: files are missing or damaged, the adapter uses an option that we do not
            compute, or its tensors are not those of this model; all bad tensors are listed.
        ConfigError: the model already has LoRA layers.

    Warns:
        AdapterWarning: of what is passed over, and of another base than it was trained on.
    """
    if lora_layers(model):
        raise ConfigError(
            "the model already has LoRA layers; add another adapter with attach(model, folder, "
            "name), use the base with switch(model, None), or load the model again"
        )
    folder = user_path(folder)
    check_whole(folder)
    lora, paths, passed_over = for_this_model(model, folder)
    from_mlx_lm = is_mlx_lm(folder)
    file = folder / (MLX_LM_WEIGHTS if from_mlx_lm else WEIGHTS)
    header = tensors_in(file, AdapterError)
    copies = [] if from_mlx_lm else [name for name in COPIES if name in header]
    _check_tensors(model, file, lora, paths, {n: e for n, e in header.items() if n not in copies})

    with reading(file, AdapterError):
        loaded: Any = mx.load(str(file), return_metadata=True)
    arrays, metadata = loaded
    for name, array in arrays.items():
        check_finite(name, file, array, error=AdapterError)
    check_base(model.source, folder, metadata)
    carried = " and ".join(COPIES[name] for name in copies)
    if not all(
        _is_copy(arrays.pop(name), model.head if "lm_head" in name else model.model.embed_tokens)
        for name in copies
    ):
        raise AdapterError(
            f"{file} also holds {carried}, with other numbers than the base's; merge it with PEFT, "
            "and name the merged model as model.source"
        )
    if copies:
        note = f"{file} also holds {carried}, equal to the base's, which are ignored"
        warnings.warn(note, AdapterWarning, stacklevel=2)
    if passed_over:
        note = f"ignored, because the model has none of these: {'; '.join(passed_over)}"
        warnings.warn(f"{folder / CONFIG}: {note}", AdapterWarning, stacklevel=2)
    if from_mlx_lm:
        named = [(name.rpartition("."), array) for name, array in arrays.items()]
        arrays = {f"{path}{LEAVES[leaf]}": mx.contiguous(x.T) for (path, _, leaf), x in named}
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
    header: dict[str, StoredTensor],
) -> None:
    """Compare names, shapes and dtypes with what the config promises for this model."""
    modules, expected = dict(model.named_modules()), {}
    for path in paths:
        (d_out, d_in), r = modules[path].shape, lora.rank_of(path)
        shapes = {"lora_a": [r, d_in], "lora_b": [d_out, r], "m": [d_out]}
        for leaf, shape in [*shapes.items()][: 3 if lora.use_dora else 2]:
            if file.name == MLX_LM_WEIGHTS:
                expected[f"{path}.{leaf}"] = shape[::-1]
            else:
                expected[f"{PREFIX}{path}{LEAVES[leaf]}"] = shape
    problems = [f"{name} is missing" for name in expected if name not in header]
    for name, entry in header.items():
        shape = expected.get(name)
        if shape is None:
            problems.append(f"{name} belongs to no target of this model")
        elif [*entry.shape] != shape:
            problems.append(f"{name} has shape {[*entry.shape]}, not {shape}")
        elif entry.kind not in ("F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {entry.kind}")
    if problems:
        raise AdapterError(f"{file} is damaged, or for another model:\n{listing(problems)}")


def _is_copy(array: mx.array, matrix: FrozenMatrix) -> bool:
    """Whether an array is a matrix of the base, but for what rounding or packing loses."""
    if tuple(array.shape) != matrix.shape:
        return False
    for start in range(0, len(array), ROWS):
        theirs = array[start : start + ROWS]
        ours = matrix.lookup(mx.arange(start, start + len(theirs)))
        if matrix.quant is None:
            same = (theirs.astype(ours.dtype) == ours) | (ours.astype(theirs.dtype) == theirs)
        else:
            theirs = theirs.astype(mx.float32)
            lost = theirs - unpack(pack(theirs, matrix.quant), matrix.quant, mx.float32)
            least = 1e-3 * mx.abs(theirs).max(axis=1)  # as scales are rounded, too
            same = mx.abs(theirs - ours).max(axis=1) <= 2 * mx.abs(lost).max(axis=1) + least
        if not same.all().item():
            return False
    return True
