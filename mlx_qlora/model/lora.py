"""LoRA (Hu et al. 2021, arXiv 2106.09685): small trainable matrices beside frozen ones.

A linear W gets an update, y = W x + scale * B A x. DoRA (Liu et al. 2024, arXiv 2402.09353) trains
the length of each row as well. Names and definitions are PEFT's.
"""

import functools
import json
import math
import re
import reprlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ConfigError, did_you_mean, require
from mlx_qlora.fields import config_section, option
from mlx_qlora.model.dropout import Mask
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora_init import INITS, PLAIN, begins_with_base, initial, take_off
from mlx_qlora.model.quantize import Given, Gradients, Linear, plus
from mlx_qlora.model.weights import as_array, open_checkpoint
from mlx_qlora.tree import bound, flat, nested

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@config_section("lora")
class LoraConfig:
    """Which linears get an update, and of what shape; field names and meanings are PEFT's."""

    r: int = option(
        16,
        "rank of the adapter, 1 or more: how much it can learn. 8 to 64 is usual; more, if the "
        "validation loss still falls at the end",
    )
    lora_alpha: float = option(32, "the update is scaled by lora_alpha / r. Twice r is usual")
    lora_dropout: float = option(0.1, "share of lora_A's inputs to drop, in [0, 1)")
    target_modules: list[str] | str = option(
        ALL_SEVEN, 'names or path endings of linears, "all-linear", or one regex on the whole path'
    )
    layers_to_transform: list[int] | None = option(
        None, "numbers of the layers to train, from 0. null or an empty list means all"
    )
    bias: str = option("none", "biases are not trained", choices=("none",))
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) (arXiv 2312.03732)")
    use_dora: bool = option(False, "train the length of each row as well (arXiv 2402.09353)")
    init_lora_weights: bool | str = option(
        True, "initial weights: true (a usual LoRA), gaussian, pissa, pissa_niter_N, olora or loftq"
    )
    rank_pattern: dict[str, int] = option(
        {}, "path endings or regexes -> their rank; the first that matches counts"
    )
    alpha_pattern: dict[str, float] = option({}, "the same for lora_alpha")
    loraplus_lr_ratio: float = option(
        1.0, "lora_B learns at this many times learning_rate (LoRA+, arXiv 2402.12354)"
    )

    def __post_init__(self) -> None:
        ranks = {f"rank_pattern.{key}": r for key, r in self.rank_pattern.items()}
        for name, r in {"r": self.r, **ranks}.items():
            require(r >= 1, f"lora.{name}", "be at least 1", r)
            require(r <= 1 << 16, f"lora.{name}", f"be at most {1 << 16:,}", r)
        factors = {f"alpha_pattern.{key}": alpha for key, alpha in self.alpha_pattern.items()}
        factors |= {"lora_alpha": self.lora_alpha, "loraplus_lr_ratio": self.loraplus_lr_ratio}
        for name, factor in factors.items():
            require(0 < factor < math.inf, f"lora.{name}", "be above 0 and finite", factor)
        in_range = 0 <= self.lora_dropout < 1
        require(in_range, "lora.lora_dropout", "be in [0, 1)", self.lora_dropout)
        require(bool(self.target_modules), "lora.target_modules", "not be empty", "nothing")
        init = self.init_lora_weights
        known = init is True or (isinstance(init, str) and INITS.fullmatch(init) is not None)
        names = "be true, gaussian, pissa, pissa_niter_N, olora or loftq"
        require(known, "lora.init_lora_weights", names, init)
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(f"lora: {key!r} is no regex: {error}") from None
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "lora.layers_to_transform needs lora.target_modules to be a list of names "
                f"(PEFT's rule); got {self.target_modules!r}"
            )

    def rank_of(self, path: str) -> int:
        """The rank of the update of a linear."""
        return _first_match(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """The factor of a linear's update: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        r, alpha = self.rank_of(path), _first_match(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def _first_match(patterns: dict[str, Any], path: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches a path, by PEFT's rule."""
    return next((value for key, value in patterns.items() if matches_pattern(key, path)), otherwise)


# Ends when each regex was tried on each text. Python's engine cannot be interrupted in a thread,
# and engines of linear time have not all that PEFT's users write, such as looking ahead.
TRY_MATCHES = """
import json, re, resource, sys
regexes, texts, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for regex in regexes:
    try:
        pattern = re.compile(regex)
    except (re.error, RecursionError, OverflowError):  # which whoever uses it says
        continue
    for text in texts:
        pattern.match(text), pattern.fullmatch(text)
"""
SECONDS = 3  # of one core, for all of them


def check_patterns(regexes: Iterable[str], paths: Iterable[str]) -> None:
    """Try regexes in a process that ends in time, before they are used on the same paths here."""
    risky = [regex for regex in regexes if re.search(r"[*+?{|]", regex.removeprefix(ANY_PARENT))]
    if not risky:
        return
    shown = reprlib.repr(", ".join(risky).replace(ANY_PARENT, ""))
    command, given = [sys.executable, "-ISc", TRY_MATCHES], [risky, sorted(paths), SECONDS]
    ended = subprocess.run(command, input=json.dumps(given).encode(), capture_output=True)
    if ended.returncode:  # negative of a signal, and 1 of Python without memory
        reason = f"takes more than {SECONDS} seconds, or all memory"
        raise ConfigError(f"lora: to match {shown} {reason}: list the modules' names")


compiled = functools.cache(re.compile)  # whose own forgets more than 512
ANY_PARENT = r"(.*\.)?"


def matches_pattern(key: str, path: str) -> bool:
    """Whether a key of a pattern is the path of a linear, its ending or a regex for it."""
    return compiled(as_regex(key)).match(path) is not None


def as_regex(key: str) -> str:
    """The regex that a key of a pattern stands for, by PEFT's rule."""
    return rf"{ANY_PARENT}({key})$"


class LowRank(nn.Module):
    """One trainable factor of an update, float32; it is called `lora_A` or `lora_B`."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight


class LoRALinear(nn.Module):
    """y = base(x) + scale * B(A(dropout(x))), after Hu et al., equation 3 and section 4.1.

    A (r, d_in) and B (d_out, r) are float32 masters; the forward casts them to x's dtype, so that
    nothing downstream widens. Dropout acts only where a key is given.

    Where the update begins with a part of W (PiSSA, OLoRA), that part is taken off again. A dense W
    is left without it. A packed one stays as it is, y = base(x) + scale * (B A - B0 A0) x: packed
    again, the rest would be rounded otherwise, and nobody else could compute what was trained.
    """

    def __init__(
        self,
        base_layer: Linear,
        lora_A: mx.array,
        lora_B: mx.array,
        scale: float,
        dropout: float,
        begins_with_base: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = LowRank(lora_A)
        self.lora_B = LowRank(lora_B)
        self.scale = scale
        self.dropout = dropout
        self._begun = (lora_A, lora_B) if begins_with_base else None
        self._is_taken_off = begins_with_base and base_layer.quant is None  # by `take_off`

    def _extra_repr(self) -> str:
        return f"r={len(self.lora_A.weight)}, scale={self.scale:g}, dropout={self.dropout:g}"

    def __call__(self, x: mx.array, dropout_key: mx.array | None = None) -> mx.array:
        """x (..., d_in) -> (..., d_out); dropout by words (..., 2), two of each position."""
        return self.complete(self.base_layer.multiply(x), x, dropout_key)

    def complete(self, product: mx.array, x: mx.array, key: Given = None) -> mx.array:
        """The result for x (..., d_in), from its product with the base's W (..., d_out)."""
        y, mask = self.base_layer.complete(product, x), Mask(key, self.dropout)
        A, B = (factor.astype(x.dtype) for factor in self._beside_base())
        # The rank-r tensor is divided by the share that is kept: it is the smallest.
        return mx.addmm(y, (self.scale / mask.share) * (mask(x) @ A.T), B.T)

    def vjp(self, x: mx.array, dy: mx.array, key: Given, others: Given) -> Gradients:
        """As `Linear.vjp`, with A and B."""
        mask, r = Mask(key, self.dropout), len(self.lora_A.weight)
        A, B = (factor.astype(x.dtype) for factor in self._beside_base())
        scale, dropped = self.scale / mask.share, mask(x)
        down = scale * (dy @ B)  # (N, r), the gradient of dropped @ A.T
        gradients = {
            "lora_A.weight": (dropped.T @ down).T[:r],
            "lora_B.weight": ((scale * (dropped @ A.T)).T @ dy).T[:, :r],
        }
        dx = plus(others, self.base_layer.multiply_back(dy))
        return mask.add_to(dx, down @ A), gradients

    @property
    def initial_update(self) -> tuple[mx.array, mx.array] | None:
        """A and B that were taken off the base layer; None if it is as it was."""
        return self._begun if self._is_taken_off else None

    def _beside_base(self) -> tuple[mx.array, mx.array]:
        """The factors of what the base layer does not compute."""
        if self._is_taken_off:
            return self.lora_A.weight, self.lora_B.weight
        return self.factors()

    def factors(self) -> tuple[mx.array, mx.array]:
        """A (r, d_in) and B (d_out, r) of the update to the base as it was.

        Of PiSSA and OLoRA B A - B0 A0 is [B, -B0] [A; A0], of twice the rank; its first half is
        what is trained.
        """
        A, B = self.lora_A.weight, self.lora_B.weight
        if self._begun is None:
            return A, B
        A0, B0 = self._begun
        return mx.concatenate([A, A0]), mx.concatenate([B, -B0], axis=1)

    def merged(self, W: mx.array | None = None) -> mx.array:
        """The dense matrix (d_out, d_in) float32 of the base, or of W, with the update."""
        factors = self._beside_base() if W is None else self.factors()
        W = self.base_layer.dense() if W is None else W
        A, B = (factor.astype(mx.float32) for factor in factors)
        return W.astype(mx.float32) + self.scale * (B @ A)


class DoRALinear(LoRALinear):
    """A `LoRALinear` whose rows have a trainable length."""

    def __init__(self, base_layer: Linear, *args: Any, **settings: Any) -> None:
        super().__init__(base_layer, *args, **settings)
        self._squares = base_layer.dense().astype(mx.float32).square().sum(axis=1)
        self.lora_magnitude_vector = self.norm()  # float32; PEFT's name, without `.weight`
        mx.eval(self._squares, self.lora_magnitude_vector)

    def complete(self, product: mx.array, x: mx.array, key: Given = None) -> mx.array:
        """The result for x (..., d_in), from its product with the base's W (..., d_out).

        PEFT's formula: with dropout, what the new lengths change of the base's output is dropped
        as the update is, and the base's own output is not.
        """
        base, mask = self.base_layer, Mask(key, self.dropout)
        y, through_base = base.complete(product, x), product
        if mask.share < 1:
            x = mask(x) / mask.share
            through_base = base.multiply(x)
        A, B = (factor.astype(x.dtype) for factor in self._beside_base())
        # In float32: 16 bits would lose a length that has barely moved, but not what it adds.
        longer = self.lora_magnitude_vector.astype(mx.float32) / self.norm()
        update = (self.scale * (x @ A.T)) @ B.T
        return y + (longer - 1).astype(x.dtype) * through_base + longer.astype(x.dtype) * update

    def vjp(self, x: mx.array, dy: mx.array, key: Given, others: Given) -> Gradients:
        """As `Linear.vjp`, with A, B and the lengths."""
        weights, base = flat(self.trainable_parameters()), self.base_layer

        def run(product: mx.array, x: mx.array, *weights_now: mx.array) -> list[mx.array]:
            with bound(self, dict(zip(weights, weights_now))):
                return [self.complete(product, x, key)]

        primals = [base.multiply(x), x, *weights.values()]
        dproduct, dx, *gradients = mx.vjp(run, primals, [dy])[1]
        dx = plus(others, dx) + base.multiply_back(dproduct)
        return dx, dict(zip(weights, gradients))

    def norm(self) -> mx.array:
        """(d_out,) float32: the length of each row of W + s B A, a constant to the gradient."""
        A, B = (mx.stop_gradient(factor).astype(mx.float32) for factor in self._beside_base())
        base: Any = self.base_layer
        crossed = base.multiply(A.astype(base.dtype)).astype(mx.float32).T  # W A^T (d_out, r)
        within = B @ (A @ A.T)
        squares = ((2 * self.scale) * crossed + self.scale**2 * within) * B
        return mx.sqrt(self._squares + squares.sum(axis=1))

    def merged(self, W: mx.array | None = None) -> mx.array:
        """The dense matrix (d_out, d_in) float32 of the base, or of W, with the update."""
        W = super().merged(W)
        lengths = mx.sqrt(W.square().sum(axis=1))
        return (self.lora_magnitude_vector.astype(mx.float32) / lengths)[:, None] * W


def add_lora(
    model: LlamaForCausalLM, config: LoraConfig, seed: int = 0, *, begin: bool = True
) -> LlamaForCausalLM:
    """Put a LoRALinear around every targeted linear, in place: nothing else is trainable then.

    By default B is zero, so that the first forward is the base model exactly.

    Args:
        model: without LoRA layers; it is returned.
        config: what gets an update, and of what shape.
        seed: draws A. The same seed gives the same adapter.
        begin: False leaves the base as it is, for weights that will be loaded.

    Raises:
        ConfigError: a target or a pattern matches nothing (the message lists what exists), the
            model already has LoRA layers, or it does not have what the update begins from.
    """
    if lora_layers(model):
        raise ConfigError("the model already has LoRA layers; load it again to start over")
    config = for_model(model, config)
    targets = target_paths(model, config)
    linears, wrapped, originals = dict(model.linears), {}, {}
    init = config.init_lora_weights if begin else True
    if begin:  # PEFT lets a pattern match nothing, and so may what others have written
        _check(config, {path: linears[path] for path in targets})
    if init not in PLAIN and any(linears[path].quant is not None for path in targets):
        originals = _originals(model)
    for path, key in zip(targets, mx.random.split(mx.random.key(seed), len(targets))):
        linear, scale = linears[path], config.scale_of(path)
        original = as_array(originals.pop(f"{path}.weight", None))  # or all would stay
        A, B = initial(init, linear, config.rank_of(path), scale, key, original)
        kind, part = DoRALinear if config.use_dora else LoRALinear, begins_with_base(init)
        if part and linear.quant is None:
            take_off(linear, scale * (B @ A))
        wrapped[path] = kind(linear, A, B, scale, config.lora_dropout, part)
    model.update_modules(nested(wrapped))
    model.lora_config = config
    return model


def drawn(model: LlamaForCausalLM, seed: int) -> dict[str, mx.array]:
    """The path and the array of each weight that `add_lora` began with, where it was a PLAIN one.

    Nobody has to keep them: they follow from the seed.
    """
    layers, init = lora_layers(model), model.lora_config.init_lora_weights
    weights: dict[str, mx.array] = {}
    for (path, layer), key in zip(layers, mx.random.split(mx.random.key(seed), len(layers))):
        r = len(layer.lora_A.weight)
        A, B = initial(init, layer.base_layer, r, layer.scale, key, None)
        weights |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        if isinstance(layer, DoRALinear):  # B is zero, and the rows have the base's lengths
            weights[f"{path}.lora_magnitude_vector"] = mx.sqrt(layer._squares)
    return weights


def _check(config: LoraConfig, targets: dict[str, Linear]) -> None:
    """Refuse patterns that match nothing, and ranks that an initialisation cannot find."""
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(matches_pattern(key, path) for path in targets):
                endings = sorted({path.rpartition(".")[2] for path in targets})
                raise ConfigError(
                    f"lora.{name}: {key!r} matches no target of LoRA; the targets are "
                    f"{', '.join(endings)}"
                )
    for path, linear in targets.items():
        if begins_with_base(config.init_lora_weights) and linear.quant is None and linear.stored:
            raise ConfigError(
                f"lora.init_lora_weights: {config.init_lora_weights} changes the dense weights, "
                "which streaming reads as they are; set model.bits, or "
                "model.residency=resident"
            )
        r, most = config.rank_of(path), min(linear.shape)
        if r > most and config.init_lora_weights not in PLAIN:
            raise ConfigError(
                f"lora.init_lora_weights: {config.init_lora_weights} finds {most} components in "
                f"{path}, fewer than its rank {r}; choose a smaller lora.r or "
                "lora.rank_pattern"
            )


def _originals(model: LlamaForCausalLM) -> dict[str, Any]:
    """The tensors of the model's own files, as they were before they were packed; lazy."""
    if model.source is None or not model.source.path.exists():
        return {}
    checkpoint = open_checkpoint(model.source)
    of, packing = checkpoint.tensors, checkpoint.packing
    return {name: x for name, x in of.items() if name.rpartition(".")[0] not in packing}


def for_model(model: LlamaForCausalLM, config: LoraConfig) -> LoraConfig:
    """With the names that a model has for all seven, where some of them are one matrix."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path, _ in model.linears))
    wanted = config.target_modules
    if isinstance(wanted, str) or set(wanted) != set(ALL_SEVEN) or set(names) == set(ALL_SEVEN):
        return config
    return replace(config, target_modules=names)


def target_paths(
    model: LlamaForCausalLM,
    config: LoraConfig,
    is_excluded: Callable[[str], bool] = lambda path: False,
) -> list[str]:
    """The paths of the linears that a config targets, by PEFT's rules, in the model's order.

    A list matches names or path endings, a string is a regex on the whole path, and "all-linear"
    means every linear of the layers. A path named whole is taken whatever `layers_to_transform`
    says, and one that is excluded never. The output head is not offered: it stays frozen. A
    ConfigError names a target, or a layer, that matches nothing.
    """
    wanted = for_model(model, config).target_modules
    paths = [path for path, _ in model.linears]
    names = sorted({path.split(".", 3)[3] for path in paths})
    exists = "the linears of each layer are " + ", ".join(names)
    # PEFT would adapt these too. In its tree a tied model has an lm_head as well.
    others = {"lm_head", *(path for path, _ in model.named_modules())}.difference(paths)
    regexes = [as_regex(key) for key in (*config.rank_pattern, *config.alpha_pattern)]
    regexes += [wanted] if isinstance(wanted, str) and wanted != "all-linear" else []
    check_patterns(regexes, {*paths, *others})
    if wanted == "all-linear":
        matched = paths
    elif isinstance(wanted, str):
        try:
            matched = [path for path in paths if re.fullmatch(wanted, path)]
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"lora.target_modules: {wanted!r} is no regex: {error}") from None
        if not matched:
            hint = f"as a text it is a pattern of whole paths, and none matches; write [{wanted}]"
            hint = hint if re.fullmatch(r"\w+", wanted) else f"no path matches {wanted!r}"
            raise ConfigError(f"lora.target_modules: {wanted!r}: {hint}; {exists}")
        if beyond := sorted(p for p in others if re.fullmatch(wanted, p) and not is_excluded(p)):
            raise ConfigError(
                f"lora.target_modules: {wanted!r} also matches {beyond[-1]}, which cannot be "
                f"trained; {exists}"
            )
    else:
        endings = [name.rpartition(".")[2] for name in names]
        for target in wanted:
            if not any(is_named(target, path) for path in paths):
                problem = f"{target!r} matches nothing{did_you_mean(target, endings)}"
                raise ConfigError(f"lora.target_modules: {problem}; {exists}")
        matched = [path for path in paths if any(is_named(target, path) for target in wanted)]
    matched = [path for path in matched if not is_excluded(path)]
    if not config.layers_to_transform:
        return matched
    layers, n = config.layers_to_transform, len(model.layers)
    for index in layers:
        rule = f"name layers from 0 to {n - 1}"
        require(0 <= index < n, "lora.layers_to_transform", rule, index)
    return [path for path in matched if int(path.split(".")[2]) in layers or path in wanted]


def lora_layers(model: LlamaForCausalLM) -> list[tuple[str, LoRALinear]]:
    """(path, layer) of every LoRALinear, in the model's order."""
    return [(path, module) for path, module in model.linears if isinstance(module, LoRALinear)]


def trainable_count(model: nn.Module) -> int:
    """How many numbers training will change."""
    return sum(array.size for array in flat(model.trainable_parameters()).values())


def is_named(target: str, path: str) -> bool:
    """Whether a name is that of a module, or how its path ends."""
    return path == target or path.endswith(f".{target}")
