"""A model that says what it is told to."""

from typing import Any

import mlx.core as mx

from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.infer.generate import prompt_ids
from mlx_qlora.model.llama import LlamaForCausalLM


class Parrot(LlamaForCausalLM):
    """After the prompt "x" it says some ids, whatever the seed and the temperature, then ends."""

    def __init__(self, like: LlamaForCausalLM, tokenizer: Tokenizer, ids: list[int]) -> None:
        super().__init__(like.config)
        self._ids, self._end = ids, min(tokenizer.eos_ids)
        self._n_prompt = len(prompt_ids(tokenizer, "x"))

    def __call__(self, tokens: mx.array, cache: Any = None, *rest: Any, **named: Any) -> mx.array:
        logits = super().__call__(tokens, cache, *rest, **named)
        at = cache[0].offset - self._n_prompt  # below 0 while the prompt is read
        said = self._ids[at] if 0 <= at < len(self._ids) else self._end
        return mx.broadcast_to(1e4 * (mx.arange(logits.shape[-1]) == said), logits.shape)
