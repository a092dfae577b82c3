"""What an adapter's config says, PEFT's or mlx-lm's: every key is used, harmless or refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_qlora.errors import AdapterError, ConfigError, listing
from mlx_qlora.folders import MLX_LM, PEFT
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, matches_pattern, target_paths
from mlx_qlora.model.weights import read_safetensors_header

CONFIG, WEIGHTS = PEFT
MLX_LM_WEIGHTS = MLX_LM[1]
# PEFT's options that change the arithmetic, with the one value that we compute. Absent is fine too.
OFF = ("fan_in_fan_out", "use_qalora", "use_bdlora", "lora_bias")
ABSENT = (
    *("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
FIXED = {"peft_type": "LORA", "bias": "none", **dict.fromkeys(OFF, False), **dict.fromkeys(ABSENT)}
NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
USED = {
    *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"),
}
# Of the training, of where the files are, or of options that are refused if they are on.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
    *("ensure_weight_tying", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
}
# Where an adapter began does not matter, unless the base was changed to begin there.
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


def is_mlx_lm(folder: Path) -> bool:
    """Whether a folder holds mlx-lm's adapter and not PEFT's."""
    return (folder / MLX_LM_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file()


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig of PEFT's or mlx-lm's folder; an AdapterError if we do not compute it."""
    return _read_mlx_lm_config(folder) if is_mlx_lm(folder) else _read_peft_config(folder)


def _read_peft_config(folder: Path) -> LoraConfig:
    """As `read_adapter_config`; the error lists every option that we do not compute."""
    path = folder / CONFIG
    for name in PEFT:
        if not (folder / name).is_file():
            what = f"it has no {name}" if folder.is_dir() else "there is no such folder"
            raise AdapterError(f"{folder} is no PEFT adapter: {what}")
    config = _read_object(path)
    unsupported = [
        f"{name} is {config[name]!r}; supported: {value!r}"
        for name, value in FIXED.items()
        if name in config and (config[name] or None) != (value or None)
    ]
    if (begin := config.get("init_lora_weights")) not in KEEP_THE_BASE:
        unsupported.append(f"init_lora_weights is {begin!r}, which needs a changed base model")
    unsupported += [f"{name} is missing" for name in NEEDED if config.get(name) is None]
    unsupported += [
        f"{name} is {value!r}, and no such option is known here"
        for name, value in config.items()
        if value and name not in {*FIXED, *NEEDED, *USED, *HARMLESS}
    ]
    if unsupported:
        raise AdapterError(f"{path} describes an adapter we cannot run:\n{listing(unsupported)}")

    targets, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    dropout = config.get("lora_dropout") or 0.0
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    rules = {
        "target_modules": (isinstance(targets, str) or _all(targets, str), "text or a list of it"),
        "rank_pattern": (_all(ranks, int, dict), "a map of text to whole numbers"),
        "alpha_pattern": (_all(alphas, (int, float), dict), "a map of text to numbers"),
        "layers_to_transform": (layers is None or _all(layers, int), "a list of whole numbers"),
    }
    for name in ("exclude_modules", "layers_pattern"):
        value = config.get(name) or []
        rules[name] = isinstance(value, str) or _all(value, str), "text or a list of it"
    for name, value in (("r", config["r"]), ("lora_alpha", config["lora_alpha"])):
        rules[name] = _is(value, (int, float)), "a number"
    rules["lora_dropout"] = _is(dropout, (int, float)), "a number"
    for name in ("use_rslora", "use_dora"):
        rules[name] = isinstance(config.get(name) or False, bool), "true or false"
    for name, (holds, rule) in rules.items():
        if not holds:
            raise AdapterError(f"{path}: {name} must be {rule}; got {config[name]!r}")
    try:
        return LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=dropout,
            target_modules=targets,
            layers_to_transform=layers,
            use_rslora=config.get("use_rslora") or False,
            use_dora=config.get("use_dora") or False,
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _all(value: Any, kind: Any, container: type = list) -> bool:
    """Whether a value is such a container of nothing but such values."""
    if not isinstance(value, container):
        return False
    return all(_is(x, kind) for x in (value.values() if container is dict else value))


def _read_mlx_lm_config(folder: Path) -> LoraConfig:
    """As `read_adapter_config`; rank and targets are those that the tensors show."""
    path, file = folder / CONFIG, folder / MLX_LM_WEIGHTS
    config = _read_object(path)
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    # Before mlx-lm had `fine_tune_type`, `use_dora` said it.
    kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") is True else "lora")
    scale, dropout = parameters.get("scale"), parameters.get("dropout") or 0.0
    for name, value in (("scale", scale), ("dropout", dropout)):
        if not _is(value, (int, float)):
            raise AdapterError(f"{path}: lora_parameters.{name} must be a number; got {value!r}")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}; supported: lora, dora")
    header = read_safetensors_header(file, AdapterError)
    ranks = {e["shape"][-1] for name, e in header.items() if name.endswith(".lora_a")}
    if len(ranks) != 1 or 0 in ranks:
        shown = ", ".join(map(str, sorted(ranks))) or "none"
        raise AdapterError(f"{file}: one rank is expected in all lora_a; got {shown}")
    rank = ranks.pop()
    try:
        return LoraConfig(
            r=rank,
            lora_alpha=scale * rank,
            lora_dropout=dropout,
            target_modules=sorted({name.rpartition(".")[0] for name in header}),
            use_dora=kind == "dora",
        )
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from None


# ---- on a model ----------------------------------------------------------------------------------


def for_this_model(
    model: LlamaForCausalLM, folder: Path
) -> tuple[LoraConfig, list[str], list[str]]:
    """What an adapter's config means for a model, by PEFT's rules where it is PEFT's.

    Returns:
        The config without what the model does not have, the paths of the linears with an update,
        and what was passed over, as PEFT does.

    Raises:
        AdapterError: the config cannot be computed, or is for another model.
    """
    lora = read_adapter_config(folder)
    try:
        if is_mlx_lm(folder):
            return lora, target_paths(model, lora), []
        return _by_peft_s_rules(model, lora, _read_object(folder / CONFIG))
    except (ConfigError, re.error) as error:
        raise AdapterError(f"{folder / CONFIG} is for another model: {error}") from None


def _by_peft_s_rules(
    model: LlamaForCausalLM, lora: LoraConfig, config: dict[str, Any]
) -> tuple[LoraConfig, list[str], list[str]]:
    linears = target_paths(model, LoraConfig(target_modules="all-linear"))
    # In PEFT's tree a tied model has an lm_head as well.
    modules = [*linears, *sorted({"lm_head", *dict(model.named_modules())} - {*linears})]
    wanted, layers = lora.target_modules, lora.layers_to_transform or []
    excluded, patterns = (config.get(key) or [] for key in ("exclude_modules", "layers_pattern"))
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def is_target(path: str) -> bool:
        if excluded and _names(excluded, path):
            return False
        if wanted == "all-linear":
            return path in linears
        if isinstance(wanted, str) or path in wanted or not layers:
            return _names(wanted, path)
        of_layers = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns]
        matches = (re.match(each, path) for each in of_layers or [r".*?\.[^.]*\.(\d+)\."])
        layer = next((int(match[1]) for match in matches if match), None)
        return layer in layers and _names(wanted, path)

    paths = [path for path in modules if is_target(path)]
    if not paths or not set(paths) <= set(linears):
        target_paths(
            model, lora
        )  # its message says what is wrong, unless these two have part in it
        raise ConfigError("no linear of a layer is left by exclude_modules and layers_pattern")
    absent: dict[str, list[Any]] = {
        "target_modules": [
            name
            for name in (wanted if isinstance(wanted, list) else [])
            if not any(_names([name], path) for path in modules)
        ],
        "layers_to_transform": [i for i in layers if not 0 <= i < len(model.layers)],
    }
    if excluded or patterns:
        wanted, layers = paths, []
    elif isinstance(wanted, list):
        wanted = [name for name in wanted if name not in absent["target_modules"]]
    layers = [i for i in layers if i not in absent["layers_to_transform"]] or None
    fitted = replace(lora, target_modules=wanted, layers_to_transform=layers)
    for name in ("rank_pattern", "alpha_pattern"):
        keys = getattr(lora, name)
        absent[name] = [k for k in keys if not any(matches_pattern(k, path) for path in paths)]
    shown = [f"{name} {', '.join(map(str, values))}" for name, values in absent.items() if values]
    return fitted, paths, shown


def _names(targets: str | list[str], path: str) -> bool:
    """Whether a regex, or one of some names or endings, is a path's."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)
