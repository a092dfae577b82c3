"""Text from a model, by mlx-lm's cache and prefill machinery on our tree.

mlx-lm is imported where it is used: it brings transformers, which takes seconds.
"""

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_qlora.data.encode import encode_prompt
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.fields import require
from mlx_qlora.infer.pieces import Answer
from mlx_qlora.infer.prompt_cache import PromptCache, kv_group
from mlx_qlora.infer.sampling import GenerationConfig, Sampler, key_of, repetition_processor
from mlx_qlora.model.llama import LlamaForCausalLM

Prompt = str | list[dict[str, Any]]


def generate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.1,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    *,
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> str:
    """The model's continuation of a prompt.

    Args:
        model: base or tuned.
        tokenizer: the model's.
        prompt: text, taken as it is (after one BOS if the model expects one), or a list of chat
            messages, rendered with the model's chat template.
        max_new_tokens: most tokens to generate; the text ends where the model's context does, too.
        temperature: 0 is greedy; otherwise logits are divided by it before top_k and top_p.
        top_p: keep the likeliest tokens that make up this probability.
        top_k: keep this many likeliest tokens; 0 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of all tokens
            seen so far; 1 is none (Keskar et al. 2019, arXiv 1909.05858).
        seed: draws the samples; the same seed gives the same text. None takes a fresh one.
        stop: a text that ends the answer where it begins, or several, of which the one that is
            complete first counts.
        kv_bits: 2, 4 or 8 quantise the keys and values of all tokens; None keeps them exact.
        prompt_cache: keeps the keys and values for the next call: what a prompt has in common
            with the tokens before is not computed again.

    Returns:
        The new text alone, without the token that ended it.

    Raises:
        ConfigError: a value out of range, a prompt that is empty, or one that fills the model's
            context.
        TokenizerError: messages were given but the model has no chat template.
    """
    how = GenerationConfig(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    ids = prompt_ids(tokenizer, prompt)
    return "".join(Stream(model, tokenizer, ids, how, seed, stop, kv_bits, prompt_cache))


def stream(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.1,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    *,
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> "Stream":
    """As `generate`, but the text comes in pieces as it is made; they join to the same text.

    Returns:
        An iterator of str. Its `speed` tells how fast it was, once it is exhausted or closed.

    Raises:
        UserError: as `generate`, before the first piece.
    """
    how = GenerationConfig(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    ids = prompt_ids(tokenizer, prompt)
    return Stream(model, tokenizer, ids, how, seed, stop, kv_bits, prompt_cache)


@dataclass(frozen=True)
class Speed:
    """How fast a text was made.

    Attributes:
        prompt_tokens: of the prompt, cached ones included.
        cached_tokens: of those, how many a prompt cache had already.
        new_tokens: that were made, the one that ended the text included.
        prompt_tokens_per_second: those that were computed, over the time to the first new token.
        tokens_per_second: new ones from the first one on; 0 if there are less than two.
        peak_memory_bytes: MLX's, since `mx.reset_peak_memory()` or the start of the process.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int


class Stream(Iterator[str]):
    """Text that is being made, piece by piece."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer,
        prompt: list[int],
        how: GenerationConfig,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        kv_bits: int | None = None,
        cache: PromptCache | None = None,
    ) -> None:
        self._answer = Answer(tokenizer, stop_texts(stop))
        most = min(how.max_new_tokens, room_for(model, prompt))
        how = dataclasses.replace(how, max_new_tokens=most)
        self._prompt, self._cached = len(prompt), cache.common(model, prompt) if cache else 0
        self._tokens = generate_tokens(model, prompt, how, seed, kv_bits, cache)
        self._times: list[float] = []  # of the start, the first token and the last one
        self._made = 0
        self._text = self._pieces()

    def __next__(self) -> str:
        return next(self._text)

    def close(self) -> None:
        """Ends the text here; a prompt cache keeps what was computed."""
        self._text.close()

    @property
    def speed(self) -> Speed:
        """The figures so far."""
        start, first, last = self._times if self._times else (0.0, 0.0, 0.0)
        wait, rest = first - start, last - first
        computed = self._prompt - self._cached
        return Speed(
            self._prompt,
            self._cached,
            self._made,
            computed / wait if wait > 0 else 0.0,
            (self._made - 1) / rest if rest > 0 else 0.0,
            mx.get_peak_memory(),
        )

    @property
    def ids(self) -> list[int]:
        """The new tokens so far, without the one that ended the text."""
        return self._answer.ids

    def _pieces(self) -> Generator[str]:
        """The text, and the notes that `speed` reads."""
        start = time.perf_counter()
        with closing(self._tokens):
            for token in self._tokens:
                now = time.perf_counter()
                self._times = [start, self._times[1] if self._made else now, now]
                self._made += 1
                if piece := self._answer.add(token):
                    yield piece
                if self._answer.ended:
                    break
        if piece := self._answer.end():
            yield piece


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a text or of chat messages that await the assistant's answer."""
    if not isinstance(prompt, str):
        prompt = tokenizer.render_chat(prompt, add_generation_prompt=True)
    ids = encode_prompt(tokenizer, prompt)
    if not ids:
        raise ConfigError("the prompt is empty")
    return ids


def room_for(
    model: LlamaForCausalLM, ids: list[int], what: str = "the prompt", remedy: str = "shorten it"
) -> int:
    """How many tokens the model's context has room for behind these.

    Beyond the positions that a model was made for, what it says is noise, and nothing tells.

    Args:
        model: that will be asked.
        ids: of the prompt.
        what: it is called in the message.
        remedy: what its user can do.

    Raises:
        ConfigError: there is no room for an answer.
    """
    most = model.config.max_position_embeddings
    if len(ids) >= most:
        raise ConfigError(
            f"{what} has {len(ids)} tokens, and the model was made for {most}: {remedy}"
        )
    return most - len(ids)


def stop_texts(stop: str | Sequence[str] | None) -> list[str]:
    """The texts that end an answer: one may stand alone.

    Raises:
        ConfigError: one is empty.
    """
    texts = [stop] if isinstance(stop, str) else list(stop or [])
    require(all(texts), "stop", "hold texts that are not empty", stop)
    return texts


def generate_tokens(
    model: LlamaForCausalLM,
    prompt: list[int],
    how: GenerationConfig,
    seed: int | None = None,
    kv_bits: int | None = None,
    cache: PromptCache | None = None,
) -> Generator[int]:
    """New token ids, without end but for `how.max_new_tokens`; arguments as in `generate`."""
    sampler, group = Sampler(how, key_of(seed)), kv_group(model, kv_bits)
    cache = cache if cache is not None else PromptCache()
    cache.check(kv_bits)

    def steps() -> Generator[int]:
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        streams: Any = [generation_stream]  # one for each thread, which mlx-lm types as another
        layers, cached = cache.lend(model, prompt)
        penalise = repetition_processor(how.repetition_penalty, prompt[:cached])
        made = generate_step(
            mx.array(prompt[cached:]),
            model,
            max_tokens=how.max_new_tokens,
            sampler=sampler,
            logits_processors=[penalise] if how.repetition_penalty != 1 else None,
            prompt_cache=layers,
            kv_bits=kv_bits,
            kv_group_size=group,
            quantized_kv_start=0,
        )
        new: list[int] = []
        try:
            with wired_limit(model, streams), closing(made):
                for token, _ in made:
                    new.append(int(token))
                    yield new[-1]
        except GeneratorExit:  # the text ended; after any other exception the cache stays empty
            cache.keep(model, layers, prompt + new, kv_bits)
            raise
        cache.keep(model, layers, prompt + new, kv_bits)

    return steps()
