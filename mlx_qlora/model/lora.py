"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen matrix plus a trainable low-rank update.

The class and attribute names are PEFT's. A LoRA weight's path in the tree,
`model.layers.0.self_attn.q_proj.lora_A.weight`, is its key in an adapter file after the prefix
`base_model.model.`, and its shape there is its shape here.
"""

import math
import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ConfigError, did_you_mean
from mlx_qlora.fields import check_choices, option, require
from mlx_qlora.model.dropout import RANGE, kept, threshold
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import Linear
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
    loraplus_lr_ratio: float = option(
        1.0, "lora_B learns at this many times learning_rate (LoRA+, arXiv 2402.12354)"
    )

    def __post_init__(self) -> None:
        check_choices("lora", self)
        require(isinstance(self.r, int) and self.r >= 1, "lora.r", "be at least 1", self.r)
        require(self.lora_alpha > 0, "lora.lora_alpha", "be above 0", self.lora_alpha)
        in_range = 0 <= self.lora_dropout < 1
        require(in_range, "lora.lora_dropout", "be in [0, 1)", self.lora_dropout)
        ratio = self.loraplus_lr_ratio
        legal = 0 < ratio < math.inf
        require(legal, "lora.loraplus_lr_ratio", "be above 0 and finite", ratio)
        require(bool(self.target_modules), "lora.target_modules", "not be empty", "nothing")
        if isinstance(self.target_modules, tuple):  # a tuple is what the signature shows
            object.__setattr__(self, "target_modules", list(self.target_modules))
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "lora.layers_to_transform needs lora.target_modules to be a list of names "
                f"(PEFT's rule); got {self.target_modules!r}"
            )

    @property
    def scale(self) -> float:
        """The factor of the update: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LowRank(nn.Module):
    """One trainable factor of an update, float32; it is called `lora_A` or `lora_B`."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight


class LoRALinear(nn.Module):
    """y = base(x) + scale * B(A(dropout(x))), after Hu et al., equation 3 and section 4.1.

    A and B are float32 masters; the forward casts them to x's dtype, so that the output's dtype
    is the input's and nothing downstream widens.

    Args:
        base_layer: the frozen linear of weight (d_out, d_in).
        lora_A: (r, d_in) float32.
        lora_B: (d_out, r) float32.
        scale: factor of the update; applied to the rank-r tensor, which is the smallest.
        dropout: probability of dropping an input of A. Acts only where a key is given.
    """

    def __init__(
        self, base_layer: Linear, lora_A: mx.array, lora_B: mx.array, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = LowRank(lora_A)
        self.lora_B = LowRank(lora_B)
        self.scale = scale
        self.dropout = dropout

    def __call__(self, x: mx.array, dropout_key: mx.array | None = None) -> mx.array:
        """x (..., d_in) -> (..., d_out); the key draws the dropout mask, None means no dropout.

        One key (2,) draws for all of x, keys (N, 2) for each of x's N rows.
        """
        y = self.base_layer(x)
        A = self.lora_A.weight.astype(x.dtype)
        B = self.lora_B.weight.astype(x.dtype)
        scale = self.scale
        if dropout_key is not None and self.dropout > 0:
            x = x * kept(dropout_key, self.dropout, x.shape).astype(x.dtype)
            scale /= 1 - threshold(self.dropout) / RANGE  # what is kept stands for what is not
        return mx.addmm(y, scale * (x @ A.T), B.T)


def add_lora(model: LlamaForCausalLM, config: LoraConfig, seed: int = 0) -> LlamaForCausalLM:
    """Puts a LoRALinear around every targeted linear, in place.

    A is uniform in +-1 / sqrt(d_in) (PEFT's kaiming_uniform(a=sqrt(5))). B is zero, so that the
    first forward is the base model exactly; A must not be zero too, or neither would ever move.

    Args:
        model: a model without LoRA layers.
        config: ranks, scale, dropout and targets.
        seed: draws A. The same seed gives the same adapter.

    Returns:
        The same model; its trainable parameters are now exactly the LoRA weights.

    Raises:
        ConfigError: a target matches nothing (the message lists what exists), or the model
            already has LoRA layers.
    """
    if lora_layers(model):
        raise ConfigError("the model already has LoRA layers; load it again to start anew")
    targets = target_paths(model, config)
    keys = mx.random.split(mx.random.key(seed), len(targets))

    wrapped = []
    linears = dict(_linears(model))
    for path, key in zip(targets, keys):
        d_out, d_in = linears[path].shape
        bound = 1 / math.sqrt(d_in)
        A = mx.random.uniform(-bound, bound, (config.r, d_in), mx.float32, key)
        B = mx.zeros((d_out, config.r), mx.float32)
        layer = LoRALinear(linears[path], A, B, config.scale, config.lora_dropout)
        wrapped.append((path, layer))
    model.update_modules(nested(dict(wrapped)))
    model.lora_config = config
    return model


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
