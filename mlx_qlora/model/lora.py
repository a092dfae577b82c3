"""Which linears of a model get a low-rank update, of what shape, and where it begins.

One linear's arithmetic is in `lora_linear` and `dora`, its beginning in `initial`. Field names and
the rules of matching are PEFT's.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ConfigError, did_you_mean
from mlx_qlora.fields import check_choices, option, require
from mlx_qlora.model.dora import DoRALinear
from mlx_qlora.model.initial import PLAIN, is_known, leave, start
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora_linear import LoRALinear
from mlx_qlora.model.quantize import Linear
from mlx_qlora.model.weights import open_checkpoint
from mlx_qlora.tree import flat, nested

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraConfig:
    """Which linears get an update, and of what shape; field names and meanings are PEFT's.

    Raises:
        ConfigError: a value out of range.
    """

    r: int = option(16, "rank of the update")
    lora_alpha: float = option(32, "the update is scaled by lora_alpha / r")
    lora_dropout: float = option(0.1, "probability of dropping an input of lora_A, in [0, 1)")
    target_modules: list[str] | str = option(
        ALL_SEVEN, 'names or path endings of linears, "all-linear", or one regex on the whole path'
    )
    layers_to_transform: list[int] | None = option(
        None, "indices of the layers that get updates; null or an empty list means all"
    )
    bias: str = option("none", "biases stay frozen", choices=("none",))
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) (arXiv 2312.03732)")
    use_dora: bool = option(False, "train the length of each row as well (arXiv 2402.09353)")
    init_lora_weights: bool | str = option(
        True, "true, gaussian, pissa, pissa_niter_N, olora or loftq: where the update begins"
    )
    rank_pattern: dict[str, int] = option(
        {}, "path endings or regexes -> a rank of their own, the first that matches"
    )
    alpha_pattern: dict[str, float] = option({}, "the same for lora_alpha")
    loraplus_lr_ratio: float = option(
        1.0, "lora_B learns at this many times learning_rate (LoRA+, arXiv 2402.12354)"
    )

    def __post_init__(self) -> None:
        check_choices("lora", self)
        require(isinstance(self.r, int) and self.r >= 1, "lora.r", "be at least 1", self.r)
        require(self.lora_alpha > 0, "lora.lora_alpha", "be above 0", self.lora_alpha)
        finite = math.isfinite(self.lora_alpha)
        require(finite, "lora.lora_alpha", "be finite", self.lora_alpha)
        in_range = 0 <= self.lora_dropout < 1
        require(in_range, "lora.lora_dropout", "be in [0, 1)", self.lora_dropout)
        ratio = self.loraplus_lr_ratio
        legal = 0 < ratio < math.inf
        require(legal, "lora.loraplus_lr_ratio", "be above 0 and finite", ratio)
        require(bool(self.target_modules), "lora.target_modules", "not be empty", "nothing")
        known = "be true, gaussian, pissa, pissa_niter_N, olora or loftq"
        begin = self.init_lora_weights
        require(is_known(begin), "lora.init_lora_weights", known, begin)
        self._check_patterns()
        if isinstance(self.target_modules, tuple):  # a tuple is what the signature shows
            object.__setattr__(self, "target_modules", list(self.target_modules))
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "lora.layers_to_transform needs lora.target_modules to be a list of names "
                f"(PEFT's rule); got {self.target_modules!r}"
            )

    def _check_patterns(self) -> None:
        for key, r in self.rank_pattern.items():
            legal = isinstance(r, int) and r >= 1
            require(legal, f"lora.rank_pattern.{key}", "be at least 1", r)
        for key, alpha in self.alpha_pattern.items():
            legal = 0 < alpha < math.inf
            require(legal, f"lora.alpha_pattern.{key}", "be above 0 and finite", alpha)
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                raise ConfigError(f"lora: the pattern {key!r} is no regex: {error}") from None

    def rank_of(self, path: str) -> int:
        """The rank of the update of a linear."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, path), self.r)

    def alpha_of(self, path: str) -> float:
        """`lora_alpha` of a linear."""
        return self.alpha_pattern.get(_first_match(self.alpha_pattern, path), self.lora_alpha)

    def scale_of(self, path: str) -> float:
        """The factor of a linear's update: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        r = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(r) if self.use_rslora else r)


def add_lora(
    model: LlamaForCausalLM, config: LoraConfig, seed: int = 0, *, begin: bool = True
) -> LlamaForCausalLM:
    """Puts a LoRALinear around every targeted linear, in place.

    By default A is uniform in +-1 / sqrt(d_in) and B is zero, so that the first forward is the
    base model exactly; A must not be zero too, or neither would ever move.

    Args:
        model: a model without LoRA layers.
        config: ranks, scale, dropout, targets, and how the update begins.
        seed: draws A. The same seed gives the same adapter.
        begin: False leaves the base as it is, for weights that will be loaded.

    Returns:
        The same model; its trainable parameters are now exactly the LoRA weights.

    Raises:
        ConfigError: a target or a pattern matches nothing (the message lists what exists), the
            model already has LoRA layers, or it does not have what the update begins from.
    """
    if lora_layers(model):
        raise ConfigError("the model already has LoRA layers; load it again to start anew")
    targets = target_paths(model, config)
    if begin:  # PEFT lets a pattern match nothing, and so may what others have written
        _check_patterns(config, targets)
    keys = mx.random.split(mx.random.key(seed), len(targets))
    how = config.init_lora_weights if begin else True
    linears, wrapped = dict(_linears(model)), {}
    if how not in PLAIN:
        _check_ranks(config, {path: linears[path] for path in targets})
    packed = any(linears[path].quant is not None for path in targets)
    originals = _originals(model) if packed and how not in PLAIN else {}
    for path, key in zip(targets, keys):
        linear, r, scale = linears[path], config.rank_of(path), config.scale_of(path)
        begun = start(how, linear, r, scale, key, originals.get(f"{path}.weight"))
        if begun.left is not None:
            leave(linear, begun.left)
        kind = DoRALinear if config.use_dora else LoRALinear
        layer = kind(linear, begun.A, begun.B, scale, config.lora_dropout)
        if begun.left is not None:
            layer._begun = begun.A, begun.B
        wrapped[path] = layer
    model.update_modules(nested(wrapped))
    model.lora_config = config
    return model


def _check_patterns(config: LoraConfig, targets: list[str]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(_matches(key, path) for path in targets):
                endings = sorted({path.rpartition(".")[2] for path in targets})
                raise ConfigError(
                    f"lora.{name}: {key!r} matches no linear that has an update; the targets' "
                    f"names are {', '.join(endings)}"
                )


def _check_ranks(config: LoraConfig, linears: dict[str, Linear]) -> None:
    for path, linear in linears.items():
        r, most = config.rank_of(path), min(linear.shape)
        if r > most:
            raise ConfigError(
                f"lora.init_lora_weights: {config.init_lora_weights} finds {most} components in "
                f"{path}, fewer than its rank of {r}; choose a smaller lora.r or "
                "lora.rank_pattern"
            )


def _originals(model: LlamaForCausalLM) -> dict[str, mx.array]:
    """The tensors of the model's own files, as they were before they were packed; lazy."""
    source = getattr(model, "source", None)
    if source is None or not source.path.exists():
        return {}
    checkpoint = open_checkpoint(source)
    return {
        name: array
        for shard in checkpoint.shards
        for name, array in shard.items()
        if name.rpartition(".")[0] not in checkpoint.packing
    }


def _first_match(patterns: dict[str, Any], path: str) -> str:
    """The first key that matches a path, by PEFT's rule; the path itself if none does."""
    return next((key for key in patterns if _matches(key, path)), path)


def _matches(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def target_paths(model: LlamaForCausalLM, config: LoraConfig) -> list[str]:
    """The paths of the linears that a config targets, by PEFT's rules, in the model's order.

    A list matches names or path endings, a string is a regex on the whole path, and "all-linear"
    means every linear of the layers. A path named whole is taken whatever `layers_to_transform`
    says. The output head is not offered: it stays frozen.

    Raises:
        ConfigError: a target, or a layer index, that matches nothing.
    """
    paths = [path for path, _ in _linears(model)]
    names = sorted({path.split(".", 3)[3] for path in paths})
    exists = "the linears of each layer are " + ", ".join(names)
    wanted = config.target_modules

    if wanted == "all-linear":
        matched = paths
    elif isinstance(wanted, str):
        try:
            matched = [path for path in paths if re.fullmatch(wanted, path)]
        except re.error as error:
            raise ConfigError(f"lora.target_modules: {wanted!r} is no regex: {error}") from None
        if not matched:
            raise ConfigError(f"lora.target_modules: no path matches {wanted!r}; {exists}")
        # PEFT would adapt these too. In its tree a tied model has an lm_head as well.
        modules = {path for path, _ in model.named_modules()} | {"lm_head"}
        if beyond := sorted(p for p in modules.difference(paths) if re.fullmatch(wanted, p)):
            raise ConfigError(
                f"lora.target_modules: {wanted!r} also matches {beyond[-1]}, which cannot have an "
                f"update; {exists}"
            )
    else:
        endings = [name.rpartition(".")[2] for name in names]
        for target in wanted:
            if not any(_ends_with(path, target) for path in paths):
                hint = did_you_mean(target, endings)
                problem = f"lora.target_modules: {target!r} matches nothing{hint}"
                raise ConfigError(f"{problem}; {exists}")
        matched = [path for path in paths if any(_ends_with(path, target) for target in wanted)]

    if not config.layers_to_transform:
        return matched
    n = len(model.layers)
    for index in config.layers_to_transform:
        rule = f"name layers from 0 to {n - 1}"
        require(0 <= index < n, "lora.layers_to_transform", rule, index)
    layers = [path for path in matched if int(path.split(".")[2]) in config.layers_to_transform]
    return [path for path in matched if path in layers or path in wanted]


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """(path, layer) of every LoRALinear, in the model's order."""
    return [(p, m) for p, m in _in_order(model) if isinstance(m, LoRALinear)]


def trainable_count(model: nn.Module) -> int:
    """How many numbers training will change."""
    return sum(array.size for array in flat(model.trainable_parameters()).values())


def _linears(model: LlamaForCausalLM) -> list[tuple[str, Linear]]:
    """(path, linear) of every linear inside the decoder layers."""
    return [
        (path, module)
        for path, module in _in_order(model)
        if isinstance(module, Linear) and path.startswith("model.layers.")
    ]


def _in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules in reading order (layer 2 before layer 10, q before k), not in a set's."""
    rank = {name: i for i, name in enumerate(ALL_SEVEN)}

    def position(item: tuple[str, nn.Module]) -> tuple[int, int]:
        parts = item[0].split(".")
        layer = int(parts[2]) if len(parts) > 2 and parts[2].isdigit() else -1
        return layer, rank.get(parts[-1], -1)

    return sorted(model.named_modules(), key=position)


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
