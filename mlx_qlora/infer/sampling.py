"""Which token comes next: logits -> penalty -> temperature -> top_k -> top_p -> a draw."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_qlora.fields import option, require


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


def key_of(seed: int | None) -> mx.array:
    """The key (2,) uint32 that a seed stands for; None takes a fresh one.

    Raises:
        ConfigError: the seed is no unsigned number of 64 bits.
    """
    if seed is None:
        import secrets

        seed = secrets.randbits(64)
    require(0 <= seed < 2**64, "seed", "be in [0, 2**64)", seed)
    return mx.random.key(seed)


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
    """Scaled log-probabilities (..., V) float32, with -inf for tokens top_k or top_p rule out.

    Both keep the tokens from a least value on, so that equal ones stay or go together.
    """
    scaled = (logprobs / how.temperature).astype(mx.float32)
    V = scaled.shape[-1]
    k = min(how.top_k or V, V)
    if k == V and how.top_p == 1:
        return scaled
    # Of the best k alone the order matters: sorting them all would take as long as a layer.
    best = mx.topk(scaled, k) if k < V else scaled
    least = best.min(axis=-1, keepdims=True)
    if how.top_p < 1:  # at 1 all stay; a rounded sum would drop some
        ranked = -mx.sort(-best, axis=-1)
        whole = mx.logsumexp(mx.where(scaled < least, -mx.inf, scaled), axis=-1, keepdims=True)
        chances = mx.exp(ranked - whole)
        # A token stays while those before it have not made up top_p: the likeliest always does.
        before = mx.cumsum(chances, axis=-1, inclusive=False)
        least = mx.where(before < how.top_p, ranked, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(scaled < least, -mx.inf, scaled)


def repetition_processor(
    penalty: float, before: list[int] | None = None
) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor in mlx-lm's form: (tokens so far (n,), logits (1, V)) -> logits (1, V).

    Args:
        penalty: divides positive and multiplies negative logits of tokens that were seen (Keskar
            et al. 2019, arXiv 1909.05858).
        before: tokens seen that mlx-lm does not tell of: those that a prompt cache holds.
    """
    cached = mx.array(sorted(set(before)), mx.int32) if before else None

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if cached is not None:
            tokens = mx.concatenate([cached, tokens.astype(mx.int32)])
        seen = logits[:, tokens]
        logits[:, tokens] = mx.where(seen > 0, seen / penalty, seen * penalty)
        return logits

    return process
