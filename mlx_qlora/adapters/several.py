"""Several adapters on one base: one of them, or none, is in the tree; the others wait beside it.

All adapters wrap the same frozen linears. Switching exchanges modules of the tree and computes
nothing, so that without an adapter the model is the base bit for bit, and only the active adapter
is trained, saved, or costs time.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.adapters.peft import load_adapter
from mlx_qlora.errors import ConfigError, did_you_mean
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, LoRALinear, lora_layers
from mlx_qlora.tree import bound, flat, nested

COMBINATIONS = ("cat", "linear")
UNNAMED = "default"  # PEFT's name for an adapter that was given none


@dataclass
class Adapter:
    """One adapter of a model."""

    config: LoraConfig  # that `add_lora` made it from
    layers: dict[str, LoRALinear]  # path in the tree -> the layer around the base's linear


def adapter_names(model: LlamaForCausalLM) -> list[str]:
    """The names of a model's adapters, the oldest first."""
    return list(_adapters(model))


def active(model: LlamaForCausalLM) -> str | None:
    """The name of the adapter that is on; None means the base alone."""
    adapters, in_tree = _adapters(model), dict(lora_layers(model))
    return next((name for name, each in adapters.items() if _is_in(in_tree, each)), None)


def attach(model: LlamaForCausalLM, folder: str | Path, name: str) -> LlamaForCausalLM:
    """Add a PEFT adapter to a model under a name, and switch to it.

    LoRA layers that `add_lora` or `load_adapter` put into the model count as an adapter called
    `default` (or `default_2` and so on, where that is taken).

    Raises:
        AdapterError: as `load_adapter`; the model is as it was.
        ConfigError: the name is taken.
    """
    adapters, former = _adapters(model), active(model)
    _check_new(adapters, name)
    _put(model, None)
    try:
        load_adapter(model, folder)
    except BaseException:
        _put(model, former)
        raise
    adapters[name] = Adapter(model.lora_config, dict(lora_layers(model)))
    return model


def detach(model: LlamaForCausalLM, name: str) -> LlamaForCausalLM:
    """Remove an adapter and free its memory; if it was on, the base is on afterwards."""
    adapters = _adapters(model)
    _check_known(adapters, name)
    if active(model) == name:
        _put(model, None)
    del adapters[name]
    return model


def switch(model: LlamaForCausalLM, name: str | None) -> LlamaForCausalLM:
    """Turn on one adapter, or with None the base alone.

    `model.trainable_parameters()`, `save_adapter` and `generate` are then the adapter's.
    """
    adapters = _adapters(model)
    if name is not None:
        _check_known(adapters, name)
    _put(model, name)
    return model


@contextmanager
def disabled(model: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """Lend the base alone; afterwards, also after an exception, what was on is on again."""
    former, layers = active(model), lora_layers(model)
    before = {  # what was taken off the base is added
        path: LoRALinear(layer.base_layer, *layer.initial_update, layer.scale, 0.0)
        for path, layer in layers
        if layer.initial_update
    }
    if before:
        model.update_modules(nested(before))
    else:
        switch(model, None)
    try:
        yield model
    finally:
        if before:
            model.update_modules(nested(dict(layers)))
        else:  # an adapter that was detached within cannot come back
            switch(model, former if former in _adapters(model) else None)


def untrained(model: LlamaForCausalLM) -> partial[AbstractContextManager[Any]]:
    """What lends a model, once it is trained, as it is now."""
    if any(mx.any(layer.lora_B.weight != 0).item() for _, layer in lora_layers(model)):
        # An adapter that does something from the start, which training replaces.
        return partial(bound, model, flat(model.trainable_parameters()))
    return partial(disabled, model)


def combine(
    model: LlamaForCausalLM, weights: dict[str, float], name: str, combination_type: str = "cat"
) -> LlamaForCausalLM:
    """Make a new adapter of a weighted sum of others, and switch to it.

    As PEFT's `add_weighted_adapter`. Of each linear, with factors f = weight * scale:

        cat      sum of f B A, exactly; the ranks add up
        linear   (sum of sqrt|f| B) (sum of sign(f) sqrt|f| A): rough, but of the same rank

    A linear that only some adapters change gets their updates; dropout is that of the first. With
    rsLoRA, PEFT 0.21 multiplies the sum by the square root of the new rank once more; we do not.
    `weights` are name -> factor; negative ones subtract.

    Raises:
        ConfigError: an unknown adapter or type, a name that is taken, weights that are not finite,
            an adapter with DoRA, or for `linear` ranks that differ.
    """
    adapters = _adapters(model)
    _check_new(adapters, name)
    _check_sum(adapters, weights, combination_type)
    parts = [(adapters[each], weight) for each, weight in weights.items()]
    ranks = [max(len(x.factors()[0]) for x in part.layers.values()) for part, _ in parts]
    rank = sum(ranks) if combination_type == "cat" else max(ranks)
    layers = {}
    for path in dict.fromkeys(path for part, _ in parts for path in part.layers):
        terms = [(part.layers[path], weight) for part, weight in parts if path in part.layers]
        if combination_type == "linear":
            A, B = _linear(path, terms)
        else:
            A = mx.concatenate(
                [weight * layer.scale * layer.factors()[0] for layer, weight in terms]
            )
            B = mx.concatenate([layer.factors()[1] for layer, _ in terms], axis=1)
        missing = rank - len(A)
        A, B = mx.pad(A, [(0, missing), (0, 0)]), mx.pad(B, [(0, 0), (0, missing)])
        mx.eval(A, B)
        first = terms[0][0]
        layers[path] = LoRALinear(first.base_layer, A, B, 1.0, first.dropout)
    configs = [part.config for part, _ in parts]
    targets = [(each.target_modules, each.layers_to_transform) for each in configs]
    same = all(each == targets[0] for each in targets)
    config = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights=True,
        target_modules=configs[0].target_modules if same else list(layers),
        layers_to_transform=configs[0].layers_to_transform if same else None,
    )
    adapters[name] = Adapter(config, layers)
    _put(model, name)
    return model


def _linear(path: str, terms: list[tuple[LoRALinear, float]]) -> tuple[mx.array, mx.array]:
    """A (r, d_in) and B (d_out, r), float32; the sign goes to A alone."""
    updates = [layer.factors() for layer, _ in terms]
    ranks = [len(A) for A, _ in updates]
    if len(set(ranks)) > 1:
        raise ConfigError(f"linear needs equal ranks; those of {path} are {ranks}; use cat")
    roots = [math.sqrt(abs(weight * layer.scale)) for layer, weight in terms]
    A = [math.copysign(f, w) * A for f, (A, _), (_, w) in zip(roots, updates, terms)]
    B = [f * B for f, (_, B) in zip(roots, updates)]
    return mx.stack(A).sum(axis=0), mx.stack(B).sum(axis=0)


def _check_sum(adapters: dict[str, Adapter], weights: dict[str, float], kind: str) -> None:
    if kind not in COMBINATIONS:
        hint = did_you_mean(kind, COMBINATIONS)
        raise ConfigError(f"combination_type must be cat or linear; got {kind!r}{hint}")
    if not weights:
        raise ConfigError("weights must name at least one adapter; got none")
    for each, weight in weights.items():
        _check_known(adapters, each)
        if not math.isfinite(weight):
            raise ConfigError(f"weights[{each!r}] must be a finite number; got {weight!r}")
        if adapters[each].config.use_dora:
            raise ConfigError(
                f"the adapter {each!r} uses DoRA, whose row lengths cannot be summed; combine "
                "adapters without it, or merge this one into the base"
            )


def _adapters(model: LlamaForCausalLM) -> dict[str, Adapter]:
    """`model.adapters`, with layers that were put into the tree since the last call."""
    # In the object's __dict__: as an item of the module its layers would be parameters.
    adapters: dict[str, Adapter] = vars(model).setdefault("adapters", {})
    in_tree = dict(lora_layers(model))
    for adapter in adapters.values():
        if _is_in(in_tree, adapter):
            adapter.config = model.lora_config  # a run may have set another LoRA+ ratio
            return adapters
    if in_tree:
        names = (UNNAMED, *(f"{UNNAMED}_{n}" for n in range(2, len(adapters) + 2)))
        name = next(name for name in names if name not in adapters)
        adapters[name] = Adapter(model.lora_config, in_tree)
    return adapters


def _is_in(in_tree: dict[str, LoRALinear], adapter: Adapter) -> bool:
    return any(in_tree.get(path) is layer for path, layer in adapter.layers.items())


def _put(model: LlamaForCausalLM, name: str | None) -> None:
    """Make one adapter's layers, or the bare linears, the modules of the tree."""
    for each, of_name in vars(model)["adapters"].items():
        if any(layer.initial_update is not None for layer in of_name.layers.values()):
            raise ConfigError(
                f"the adapter {each!r} began with init_lora_weights="
                f"{of_name.config.init_lora_weights!r}, which changed the dense base that others "
                "would share; save_adapter(model, folder), load the base again, and "
                "attach(model, folder, name)"
            )
    adapter = vars(model)["adapters"][name] if name is not None else None
    bare: dict[str, nn.Module] = {path: layer.base_layer for path, layer in lora_layers(model)}
    base = dict(model.named_modules()) | bare
    layers = adapter.layers if adapter else {}
    for path, layer in layers.items():
        if base.get(path) is not layer.base_layer:
            raise ConfigError(
                f"{path} of the base was replaced since the adapter {name!r} was attached; load "
                "the base again, and attach the adapters to it"
            )
    if bare or layers:
        model.update_modules(nested(bare | layers))
    vars(model).pop("lora_config", None)
    if adapter:
        model.lora_config = adapter.config


def _check_new(adapters: dict[str, Adapter], name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter's name must be text; got {name!r}")
    if name in adapters:
        raise ConfigError(
            f"the model already has an adapter {name!r}; choose another name, or "
            f"detach(model, {name!r}) first"
        )


def _check_known(adapters: dict[str, Adapter], name: str) -> None:
    if name not in adapters:
        exists = ", ".join(map(repr, adapters)) or "none"
        hint = did_you_mean(str(name), adapters)
        raise ConfigError(f"the model has no adapter {name!r}{hint}; it has {exists}")
