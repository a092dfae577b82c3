"""Text from a model, by mlx-lm's cache and prefill machinery on our tree.

mlx-lm is imported where it is used: it brings transformers, which takes seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_qlora.data.encode import encode_prompt
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.fields import option, require
from mlx_qlora.model.llama import LlamaForCausalLM


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen; names and order of operations are Hugging Face's."""

    temperature: float = option(0.7, "divides the logits; 0 always takes the likeliest token")
    top_p: float = option(0.9, "sample from the likeliest tokens that make up this probability")
    top_k: int = option(50, "sample from this many likeliest tokens; 0 means all")
    repetition_penalty: float = option(1.1, "divides positive logits of tokens already seen")
    max_new_tokens: int = option(512, "most tokens to generate")

    def __post_init__(self) -> None:
        field = "generation."
        require(self.temperature >= 0, f"{field}temperature", "be at least 0", self.temperature)
        require(0 < self.top_p <= 1, f"{field}top_p", "be in (0, 1]", self.top_p)
        require(self.top_k >= 0, f"{field}top_k", "be at least 0", self.top_k)
        penalty = self.repetition_penalty
        require(penalty > 0, f"{field}repetition_penalty", "be above 0", penalty)
        most = self.max_new_tokens
        require(most >= 1, f"{field}max_new_tokens", "be at least 1", most)


def generate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompt: str | list[dict[str, Any]],
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.1,
    seed: int | None = None,
    stop: list[str] | None = None,
) -> str:
    """The model's continuation of a prompt.

    Args:
        model: base or tuned.
        tokenizer: the model's.
        prompt: text, taken as it is (after one BOS if the model expects one), or a list of chat
            messages, rendered with the model's chat template.
        max_new_tokens: most tokens to generate.
        temperature: 0 is greedy; otherwise logits are divided by it before top_k and top_p.
        top_p: keep the likeliest tokens that make up this probability.
        top_k: keep this many likeliest tokens; 0 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of all tokens
            seen so far; 1 is none (Keskar et al. 2019, arXiv 1909.05858).
        seed: draws the samples; the same seed gives the same text. None takes a fresh one.
        stop: texts that end the answer where they begin.

    Returns:
        The new text alone, without the token that ended it.

    Raises:
        ConfigError: a value out of range, or an empty prompt.
        TokenizerError: messages were given but the model has no chat template.
    """
    how = GenerationConfig(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    text = ""
    for text in _growing(model, tokenizer, prompt, how, seed):
        cut = min((text.find(s) for s in stop or [] if s in text), default=-1)
        if cut >= 0:
            return text[:cut]
    return text


def _growing(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompt: str | list[dict[str, Any]],
    how: GenerationConfig,
    seed: int | None,
) -> Iterator[str]:
    """Yields the whole text so far after each new token."""
    ids: list[int] = []
    for token in generate_tokens(model, prompt_ids(tokenizer, prompt), how, seed):
        if token in tokenizer.eos_ids:
            return
        ids.append(token)
        # Decoded whole: a character may span tokens, and a token's text depends on its left.
        yield tokenizer.decode(ids)


def prompt_ids(tokenizer: Tokenizer, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Token ids of a text or of chat messages that await the assistant's answer."""
    if not isinstance(prompt, str):
        prompt = tokenizer.render_chat(prompt, add_generation_prompt=True)
    ids = encode_prompt(tokenizer, prompt)
    if not ids:
        raise ConfigError("the prompt is empty")
    return ids


def generate_tokens(
    model: LlamaForCausalLM, prompt: list[int], how: GenerationConfig, seed: int | None = None
) -> Iterator[int]:
    """Yields new token ids, without end but for `how.max_new_tokens`."""
    from mlx_lm.generate import generate_step

    if seed is not None:
        require(0 <= seed < 2**64, "seed", "be in [0, 2**64)", seed)
    key = mx.random.key(seed) if seed is not None else mx.random.split(mx.random.key(_entropy()))[0]
    penalise = repetition_processor(how.repetition_penalty)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=how.max_new_tokens,
        sampler=Sampler(how, key),
        logits_processors=[penalise] if how.repetition_penalty != 1 else None,
    )
    for token, _ in steps:
        yield int(token)


def _entropy() -> int:
    import secrets

    return secrets.randbits(32)


class Sampler:
    """Draws a token from log-probabilities (1, V), with a key of its own for each draw.

    mlx-lm's samplers draw from MLX's global state, which training and other threads also move;
    this one depends on its key alone. Temperature comes before top_k and top_p, as in Hugging
    Face; mlx-lm applies it last, which keeps other tokens.
    """

    def __init__(self, how: GenerationConfig, key: mx.array) -> None:
        self.how = how
        self.key = key

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities (1, V) -> token (1,)."""
        if self.how.temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        self.key, draw = mx.random.split(self.key)
        return mx.random.categorical(filtered(logprobs, self.how), key=draw)


def filtered(logprobs: mx.array, how: GenerationConfig) -> mx.array:
    """Scaled log-probabilities (..., V), with -inf for tokens that top_k or top_p rule out."""
    logprobs = (logprobs / how.temperature).astype(mx.float32)
    order = mx.argsort(-logprobs, axis=-1)
    ranked = mx.take_along_axis(logprobs, order, axis=-1)
    ranks = mx.arange(logprobs.shape[-1])
    keep = mx.broadcast_to(ranks < (how.top_k or logprobs.shape[-1]), logprobs.shape)
    if how.top_p < 1:  # at 1 all stay; a rounded sum would drop some
        chances = mx.softmax(mx.where(keep, ranked, -mx.inf), axis=-1)
        # A token stays while those before it have not made up top_p: the likeliest always does.
        keep = keep & (mx.cumsum(chances, axis=-1) - chances < how.top_p)
    places = mx.argsort(order, axis=-1)
    return mx.where(mx.take_along_axis(keep, places, axis=-1), logprobs, -mx.inf)


def repetition_processor(penalty: float) -> Any:
    """A logits processor in mlx-lm's form: (tokens so far (n,), logits (1, V)) -> logits."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        seen = logits[:, tokens]
        logits[:, tokens] = mx.where(seen > 0, seen / penalty, seen * penalty)
        return logits

    return process
