"""What an adapter's config says, PEFT's or mlx-lm's: every key is used, harmless or refused."""

import re
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_qlora.errors import AdapterError, ConfigError, did_you_mean, listing, require
from mlx_qlora.fields import a_value_of, coerce
from mlx_qlora.folders import MLX_LM, PEFT, written_by
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, check_patterns, is_named, matches_pattern, target_paths
from mlx_qlora.model.stored import tensors_in
from mlx_qlora.readers import read_object, reading

CONFIG, WEIGHTS = PEFT
MOST_CONFIG = 1 << 17  # bytes; with a rank and an alpha for each linear of 80 layers it has half
MLX_LM_WEIGHTS = MLX_LM[1]
# PEFT's options that change the arithmetic, with the one value that we compute. Absent is fine too.
OFF = ("fan_in_fan_out", "use_qalora", "use_bdlora", "lora_bias")
ABSENT = (
    *("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
FIXED = {"peft_type": "LORA", "bias": "none", **dict.fromkeys(OFF, False), **dict.fromkeys(ABSENT)}
NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
# Of the training, of where the files are, or of options that are refused if they are on.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
    *("ensure_weight_tying", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
}
FILTERS = ("exclude_modules", "layers_pattern")  # of the targets, and in no config of ours
# Where an adapter began does not matter, unless the base was changed to begin there.
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
HINTS: dict[str, Any] = typing.get_type_hints(LoraConfig)
HINTS |= dict.fromkeys(FILTERS, str | list[str]) | {"layers_to_transform": int | list[int]}
READ = [x for x in HINTS if x not in ("bias", "init_lora_weights", "loraplus_lr_ratio")]
KNOWN = {*FIXED, *NEEDED, *READ, *HARMLESS, "init_lora_weights"}


def is_mlx_lm(folder: Path) -> bool:
    """Whether a folder holds mlx-lm's adapter and not PEFT's."""
    return (folder / MLX_LM_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file()


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig of PEFT's or mlx-lm's folder; an AdapterError if we do not compute it."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Any]]:
    """The LoraConfig, and PEFT's filters of its targets."""
    with reading(folder / CONFIG, AdapterError):
        try:
            return _read_mlx_lm_config(folder) if is_mlx_lm(folder) else _read_peft_config(folder)
        except ConfigError as error:
            raise AdapterError(f"{folder / CONFIG}: {error}") from None


def _typed(value: Any, annotation: Any, name: str) -> Any:
    """A value of JSON as a type, in which no text is a number; a ConfigError if it is another."""
    typed = coerce(value, annotation, name)
    require(typed == value, name, f"be {a_value_of(annotation)}", value)
    return typed


def _read_peft_config(folder: Path) -> tuple[LoraConfig, dict[str, Any]]:
    """As `_read`; the error lists every option that we do not compute."""
    path = folder / CONFIG
    for name in PEFT:
        if not (folder / name).is_file():
            beside = (path.name for path in folder.absolute().parent.glob("*/"))
            near = did_you_mean(folder.name, beside) or "; name the output folder of a run"
            what = f"{name} is missing" if folder.is_dir() else f"no such folder{near}"
            saved = [str(path.parent) for path in folder.glob(f"checkpoint-*/{CONFIG}")]
            if saved and written_by(folder):
                last = max(saved, key=lambda path: (len(path), path))
                what = f"its run has not finished; run its command again, or name {last}"
                raise AdapterError(f"{folder} has no adapter yet: {what}")
            raise AdapterError(f"{folder} is no PEFT adapter: {what}")
    config = read_object(path, AdapterError, MOST_CONFIG)
    unsupported = [
        f"{name} is {config[name]!r}; supported: {value!r}"
        for name, value in FIXED.items()
        if name in config and (config[name] or None) != (value or None)
    ]
    if (begin := config.get("init_lora_weights")) not in KEEP_THE_BASE:
        unsupported.append(f"init_lora_weights is {begin!r}, which changes the base model")
    unsupported += [f"{name} is missing" for name in NEEDED if config.get(name) is None]
    unknown = [name for name, value in config.items() if value and name not in KNOWN]
    unsupported += [f"{name} is {config[name]!r}, an unknown option" for name in unknown]
    if unsupported:
        raise AdapterError(f"{path} describes an unsupported adapter:\n{listing(unsupported)}")
    given = {name: config[name] for name in READ if config.get(name) is not None}
    values = {name: _typed(value, HINTS[name], name) for name, value in given.items()}
    if isinstance(layers := values.get("layers_to_transform"), int):
        values["layers_to_transform"] = [layers]
    filters = {name: values.pop(name) for name in FILTERS if name in values}
    return LoraConfig(**{"lora_dropout": 0.0, **values}), filters


def _read_mlx_lm_config(folder: Path) -> tuple[LoraConfig, dict[str, Any]]:
    """As `_read`; rank and targets are those that the tensors show."""
    path, file = folder / CONFIG, folder / MLX_LM_WEIGHTS
    config = read_object(path, AdapterError, MOST_CONFIG)
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    # Before mlx-lm had `fine_tune_type`, `use_dora` said it.
    kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") is True else "lora")
    scale = _typed(parameters.get("scale"), float, "lora_parameters.scale")
    dropout = _typed(parameters.get("dropout") or 0.0, float, "lora_parameters.dropout")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}; supported: lora, dora")
    header = tensors_in(file, AdapterError)
    ranks = {e.shape[-1] for name, e in header.items() if name.endswith(".lora_a")}
    if len(ranks) != 1 or 0 in ranks:
        shown = ", ".join(map(str, sorted(ranks))) or "none"
        raise AdapterError(f"{file}: all lora_a must have the same rank; got {shown}")
    rank: Any = ranks.pop()
    targets = sorted({name.rpartition(".")[0] for name in header})
    shape = {"r": rank, "lora_alpha": scale * rank, "target_modules": targets}
    return LoraConfig(**shape, lora_dropout=dropout, use_dora=kind == "dora"), {}


# ---- on a model ----------------------------------------------------------------------------------


def for_this_model(
    model: LlamaForCausalLM, folder: Path
) -> tuple[LoraConfig, list[str], list[str]]:
    """An adapter's config without what a model does not have, its linears, what was passed over.

    By PEFT's rules where it is PEFT's; an AdapterError if it is for another model.
    """
    (lora, filters), path = _read(folder), folder / CONFIG
    excluded, patterns = (filters.get(name) or [] for name in FILTERS)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    targets, layers = lora.target_modules, lora.layers_to_transform or []
    beyond = [i for i in layers if not 0 <= i < len(model.layers)]
    layers = [i for i in layers if 0 <= i < len(model.layers)] or layers

    def is_excluded(path: str) -> bool:
        if isinstance(excluded, str) and re.fullmatch(excluded, path):
            return True
        if isinstance(excluded, list) and any(is_named(name, path) for name in excluded):
            return True
        in_layers = any(re.match(layer[p], path) for p in patterns)
        return bool(layers and patterns) and path not in lora.target_modules and not in_layers

    layer = {p: rf"(?:^|.*?\.){p}\.\d+\." for p in patterns}
    modules = {"lm_head", *dict(model.named_modules())}  # in PEFT a tied model has a head
    absent: dict[str, list[Any]] = {"target_modules": [], "layers_to_transform": beyond}
    try:
        check_patterns(
            [*layer.values(), *([excluded] if isinstance(excluded, str) else [])], modules
        )
        if isinstance(targets, list) and not is_mlx_lm(folder):
            named = {t: [m for m in modules if is_named(t, m)] for t in targets}
            absent["target_modules"] = [t for t, paths in named.items() if not paths]
            targets = [t for t in targets if not all(map(is_excluded, named[t]))] or targets
        fitted = replace(lora, target_modules=targets, layers_to_transform=layers or None)
        paths = target_paths(model, fitted, is_excluded)
        if not paths:
            raise ConfigError("exclude_modules and layers_pattern leave no linear of a layer")
    except (ConfigError, re.error, RecursionError) as error:
        raise AdapterError(f"{path} is for another model: {error}") from None
    for name in ("rank_pattern", "alpha_pattern"):
        keys = getattr(lora, name)
        absent[name] = [key for key in keys if not any(matches_pattern(key, p) for p in paths)]
    if excluded or patterns:
        fitted = replace(fitted, target_modules=paths, layers_to_transform=None)
    shown = [f"{name} {', '.join(map(str, values))}" for name, values in absent.items() if values]
    return fitted, paths, shown
