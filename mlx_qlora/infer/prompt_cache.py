"""The keys and values of tokens, kept for the next prompt that begins like the last one."""

from dataclasses import dataclass, field
from typing import Any

from mlx.utils import tree_flatten

from mlx_qlora.errors import ConfigError
from mlx_qlora.fields import require
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import lora_layers

KV_BITS = (2, 4, 8)
KV_GROUPS = (64, 32)  # numbers of a head that share a scale: the first that divides it


def kv_group(model: LlamaForCausalLM, kv_bits: int | None) -> int:
    """How many numbers of a head share a scale in a quantised cache."""
    if kv_bits is None:
        return KV_GROUPS[0]
    rule = f"be one of {', '.join(map(str, KV_BITS))}, or None"
    require(kv_bits in KV_BITS, "kv_bits", rule, kv_bits)
    size = model.config.head_dim
    fitting = [group for group in KV_GROUPS if size % group == 0]
    if not fitting:
        raise ConfigError(f"kv_bits needs heads of a multiple of 32; this model's have {size}")
    return fitting[0]


@dataclass
class PromptCache:
    """The keys and values of the last prompt and its answer, for the next prompt.

    It belongs to the weights that made it: for another model, another adapter or one that was
    trained meanwhile it begins anew.

    Attributes:
        ids: the tokens that it holds.
    """

    ids: list[int] = field(default_factory=list)
    _layers: list[Any] = field(default_factory=list)
    _weights: list[Any] = field(default_factory=list)
    _kv_bits: int | None = None

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        self.ids, self._layers, self._weights = [], [], []

    def common(self, model: LlamaForCausalLM, prompt: list[int]) -> int:
        """How many tokens of a prompt need not be computed; the last one always must."""
        now = _weights(model)
        if len(now) != len(self._weights) or any(a is not b for a, b in zip(now, self._weights)):
            return 0
        most = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt[i]), most)

    def check(self, kv_bits: int | None) -> None:
        """Refuses to go on with keys and values of another precision.

        Raises:
            ConfigError: naming both.
        """
        if self.ids and self._kv_bits != kv_bits:
            raise ConfigError(
                f"the prompt cache was made with kv_bits={self._kv_bits}; got {kv_bits}: pass the "
                "same, or prompt_cache.reset() first"
            )

    def lend(self, model: LlamaForCausalLM, prompt: list[int]) -> tuple[list[Any], int]:
        """mlx-lm's caches of all layers, and how many tokens of the prompt they hold.

        Until `keep` gives them back this one is empty: what breaks off in the middle of a layer
        leaves layers that do not agree.
        """
        from mlx_lm.models.cache import trim_prompt_cache

        common, layers = self.common(model, prompt), self._layers
        if common:
            trim_prompt_cache(layers, len(self.ids) - common)
        else:
            layers = model.make_cache()
        self.reset()
        return layers, common

    def keep(
        self, model: LlamaForCausalLM, layers: list[Any], ids: list[int], kv_bits: int | None
    ) -> None:
        """Takes layers back that hold some of these tokens, from the first on."""
        held = min(len(ids), layers[0].offset)
        for layer in layers:  # the token behind the last one may be under way
            layer.trim(layer.offset - held)
        self.ids, self._layers, self._kv_bits = ids[:held], layers, kv_bits
        self._weights = _weights(model)


def _weights(model: LlamaForCausalLM) -> list[Any]:
    """What decides keys and values and may change: the model, and its adapter's arrays."""
    layers = [layer.trainable_parameters() for _, layer in lora_layers(model)]
    return [model, *(array for _, array in tree_flatten(layers))]
