"""Token ids in, token ids out: how the next token is chosen, and mlx-lm's loops around the model.

mlx-lm brings `generate_step` for one prompt and `BatchGenerator` for many, and their key-value
caches. The sampler is ours: its draws depend on a seed and on nothing else.
"""

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypedDict

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qlora import device
from mlx_qlora.errors import ConfigError, require
from mlx_qlora.fields import config_section, option
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import lora_layers

# ---- settings ------------------------------------------------------------------------------------


@config_section("generation")
class GenerationConfig:
    """How the next token is chosen; names and order of operations are Hugging Face's."""

    temperature: float = option(0.7, "chance in an answer; 0 takes the likeliest token")
    top_p: float = option(0.9, "sample from the likeliest tokens that make up this probability")
    top_k: int = option(50, "sample from this many likeliest tokens. 0 means all")
    repetition_penalty: float = option(1.1, "divides positive logits of tokens already seen")
    max_new_tokens: int = option(512, "most tokens to generate")

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("temperature", self.temperature >= 0, "be at least 0"),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]"),
            ("top_k", self.top_k >= 0, "be at least 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "be above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
        ):
            require(holds, f"generation.{name}", rule, getattr(self, name))


class GenerationSettings(TypedDict, total=False):
    """Keywords of `generate_batch`, for type checkers: GenerationConfig's fields and two more."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int
    seed: int | None
    stop: str | Sequence[str] | None


class StreamSettings(GenerationSettings, total=False):
    """Keywords of `generate` and `stream`."""

    kv_bits: int | None
    prompt_cache: "PromptCache | None"


# ---- sampling ------------------------------------------------------------------------------------


def key_of(seed: int | None) -> mx.array:
    """The random key (2,) uint32 of a seed of 64 bits; None takes a fresh one."""
    seed = secrets.randbits(64) if seed is None else seed
    require(0 <= seed < 2**64, "seed", "be in [0, 2**64)", seed)
    return mx.random.key(seed)


class Sampler:
    """Draws a token from log-probabilities (1, V), with a new key for each draw.

    mlx-lm's samplers draw from MLX's global state, which training and other threads also move;
    this one depends on its key alone. Temperature comes before top_k and top_p, as in Hugging
    Face; mlx-lm applies it last, which keeps other tokens.
    """

    def __init__(self, config: GenerationConfig, key: mx.array) -> None:
        self.config, self.key = config, key

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities (1, V) -> token (1,)."""
        if self.config.temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        self.key, draw = mx.random.split(self.key)
        return mx.random.categorical(filtered(logprobs, self.config), key=draw)


def filtered(logprobs: mx.array, config: GenerationConfig) -> mx.array:
    """Scaled log-probabilities (..., V) float32, with -inf for tokens top_k or top_p rule out.

    Both keep every token from a least value on, so that equal ones stay or go together.
    """
    scaled = (logprobs / config.temperature).astype(mx.float32)
    V = scaled.shape[-1]
    k = min(config.top_k or V, V)
    if k == V and config.top_p == 1:
        return scaled
    # Only the best k need an order: sorting all of them would take as long as a layer.
    best = mx.topk(scaled, k) if k < V else scaled
    least = best.min(axis=-1, keepdims=True)
    if config.top_p < 1:  # at 1 all stay; a rounded sum would drop some
        ranked = -mx.sort(-best, axis=-1)
        whole = mx.logsumexp(mx.where(scaled < least, -mx.inf, scaled), axis=-1, keepdims=True)
        chances = mx.exp(ranked - whole)
        # A token stays while those before it have not made up top_p: the likeliest always does.
        before = mx.cumsum(chances, axis=-1, inclusive=False)
        least = mx.where(before < config.top_p, ranked, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(scaled < least, -mx.inf, scaled)


def repetition_processor(
    penalty: float, cached: Sequence[int] = ()
) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor in mlx-lm's form: (tokens so far (n,), logits (1, V)) -> logits (1, V).

    The penalty divides positive and multiplies negative logits of tokens that were seen (Keskar et
    al. 2019, arXiv 1909.05858), also of those in a prompt cache, which mlx-lm does not pass on.
    """
    known = mx.array(sorted(set(cached)), mx.int32)
    make_repetition_penalty = device.mlx_lm("sample_utils").make_repetition_penalty
    penalise = make_repetition_penalty(penalty, context_size=1 << 30)  # all tokens
    return lambda tokens, logits: penalise(mx.concatenate([known, tokens]), logits)


# ---- the prompt cache ----------------------------------------------------------------------------


def kv_group(model: LlamaForCausalLM, kv_bits: int | None) -> int:
    """How many numbers of a head share a scale in a quantised cache, if MLX can quantise it."""
    require(kv_bits in (None, 2, 4, 8), "kv_bits", "be one of 2, 4, 8, or None", kv_bits)
    size = model.config.head_dim
    if kv_bits is not None and size % 32:
        raise ConfigError(f"kv_bits needs a head_dim that 32 divides; this model's is {size}")
    if kv_bits is not None and (any(model.config.windows) or model.config.attention_softcap):
        raise ConfigError(
            f"kv_bits: {model.config.model_type} has windows or capped scores, which a quantised "
            "cache cannot have; leave kv_bits out"
        )
    return 64 if size % 64 == 0 else 32


@dataclass
class PromptCache:
    """The keys and values of the last prompt and its answer, for the next prompt.

    It holds the tokens `ids`, and belongs to the weights that made it: for another model, another
    adapter or one that was trained meanwhile it starts over.
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
        if model.config.rope.by_length:  # keys of another text's length
            return 0
        longest = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(longest) if self.ids[i] != prompt[i]), longest)

    def lend(self, model: LlamaForCausalLM, prompt: list[int]) -> tuple[list[Any], int]:
        """mlx-lm's caches of all layers, and how many tokens of the prompt they hold.

        Until `keep` takes them back the prompt cache is empty: an exception between two layers
        leaves caches that do not agree.
        """
        kv = device.mlx_lm("models.cache")
        common, layers = self.common(model, prompt), self._layers
        # A window that is full has forgotten what a shorter text would need.
        if common < len(self.ids) and not kv.can_trim_prompt_cache(layers):
            common = 0
        if common:
            kv.trim_prompt_cache(layers, len(self.ids) - common)
        else:
            layers = model.make_cache()
        self.reset()
        return layers, common

    def keep(
        self, model: LlamaForCausalLM, layers: list[Any], ids: list[int], kv_bits: int | None
    ) -> None:
        """Takes back caches that hold some of these tokens, from the first on."""
        kv = device.mlx_lm("models.cache")
        held = min(len(ids), layers[0].offset)
        if layers[0].offset > held and not kv.can_trim_prompt_cache(layers):
            return  # see `lend`
        for layer in layers:  # mlx-lm computes one token ahead, which may be in the cache already
            layer.trim(layer.offset - held)
        self.ids, self._layers, self._kv_bits = ids[:held], layers, kv_bits
        self._weights = _weights(model)


def _weights(model: LlamaForCausalLM) -> list[Any]:
    """What decides keys and values and may change: the model, and its adapter's arrays."""
    layers = [layer.trainable_parameters() for _, layer in lora_layers(model)]
    return [model, *(array for _, array in tree_flatten(layers))]


# ---- tokens --------------------------------------------------------------------------------------

PREFILL, SHORTEST = 2048, 32  # mlx-lm's own choice; fewer tokens would take longer


def prefill_step(model: LlamaForCausalLM, longest: int, n_prompts: int = 1) -> int:
    """Tokens of a prompt that are computed at once; all, where its length decides their RoPE.

    Of many prompts fewer: attention to all of them at once would take more than training does.
    """
    if model.config.rope.by_length:
        return max(PREFILL, longest)
    return max(SHORTEST, min(PREFILL, device.current().prompt_positions // n_prompts))


def generate_tokens(
    model: LlamaForCausalLM,
    prompt: list[int],
    config: GenerationConfig,
    seed: int | None = None,
    kv_bits: int | None = None,
    cache: PromptCache | None = None,
) -> Generator[int]:
    """The new token ids of one prompt: `config.max_new_tokens` of them, end tokens or not.

    A ConfigError, as of `generate`, comes before the first token.
    """
    sampler, group = Sampler(config, key_of(seed)), kv_group(model, kv_bits)
    cache = cache if cache is not None else PromptCache()
    if cache.ids and cache._kv_bits != kv_bits:
        raise ConfigError(
            f"the prompt cache has kv_bits={cache._kv_bits}; got {kv_bits}; pass the same, or call "
            "prompt_cache.reset() first"
        )

    def tokens() -> Generator[int]:
        mlx_lm = device.mlx_lm("generate")
        streams: Any = [mlx_lm.generation_stream]  # one for each thread
        layers, n_cached = cache.lend(model, prompt)
        penalise = repetition_processor(config.repetition_penalty, prompt[:n_cached])
        steps = mlx_lm.generate_step(
            mx.array(prompt[n_cached:]),
            model,
            max_tokens=config.max_new_tokens,
            sampler=sampler,
            logits_processors=[penalise] if config.repetition_penalty != 1 else None,
            prompt_cache=layers,
            prefill_step_size=prefill_step(model, len(prompt)),
            kv_bits=kv_bits,
            kv_group_size=group,
            quantized_kv_start=0,
        )
        new: list[int] = []
        try:
            with mlx_lm.wired_limit(model, streams), closing(steps):
                for token, _ in steps:
                    new.append(int(token))
                    yield new[-1]
        except GeneratorExit:  # the text ended; after any other exception the cache stays empty
            cache.keep(model, layers, prompt + new, kv_bits)
            raise
        cache.keep(model, layers, prompt + new, kv_bits)

    return tokens()


def batch_tokens(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    config: GenerationConfig,
    seed: int | None,
    batch_size: int,
    ended: set[int],
) -> Iterator[tuple[int, int]]:
    """The new tokens of one or more prompts, as they come: (number of the prompt, token).

    `seed` is the first prompt's, each following one adds 1. `batch_size` is the most prompts at
    once. `ended`, numbers of prompts that want no more tokens, is read after each token.
    """
    n = len(prompts)
    samplers = [Sampler(config, key_of(None if seed is None else seed + i)) for i in range(n)]
    if config.temperature == 0:  # mlx-lm calls a shared sampler once for all rows
        samplers = samplers[:1] * n
    penalise = config.repetition_penalty != 1
    processors: Any = [repetition_processor(config.repetition_penalty)] if penalise else []
    # Prompts of similar length start together, as the shorter ones are padded.
    order = sorted(range(n), key=lambda i: -len(prompts[i]))
    longest = max(map(len, prompts), default=0)
    generator = device.mlx_lm("generate").BatchGenerator(
        model,
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
        prefill_step_size=prefill_step(model, longest, max(1, min(n, batch_size))),
    )
    try:
        uids = generator.insert(
            [prompts[i] for i in order],
            max_tokens=[config.max_new_tokens] * n,
            samplers=[samplers[i] for i in order],
            logits_processors=[processors] * n,
        )
        numbers = dict(zip(uids, order))
        while responses := generator.next_generated():
            for response in responses:
                yield numbers[response.uid], int(response.token)
            if done := [r.uid for r in responses if numbers[r.uid] in ended]:
                generator.remove(done)
    finally:
        generator.close()
