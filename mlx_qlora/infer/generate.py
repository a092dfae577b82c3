"""Answers to many prompts, several at once, by mlx-lm's continuous batching.

On most machines a token costs the reading of all weights; rows of a batch share it.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qlora.data.encode import encode_prompt
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, option, require
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import lora_layers

# ---- sampling ------------------------------------------------------------------------------------


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


# ---- pieces of text ------------------------------------------------------------------------------


UNREADABLE = "\ufffd"  # what bytes that are no UTF-8 (yet) are decoded to


class Pieces:
    """Decodes token by token; the pieces join to the text of all tokens.

    Each time only a short window is decoded. It begins with a token behind which nothing depends
    on what came before: one that shows a character that is neither a space (SentencePiece drops
    spaces at a beginning) nor part of one that spans tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._bytes = _byte_tokens(tokenizer)
        self._window: list[int] = []
        self._told = 0  # characters of the window's text that were returned

    def add(self, token: int) -> str:
        """The text that became certain with this token; often one token late, or empty."""
        self._window.append(token)
        text = self._decode(self._window)
        # A character may go on in the next token; and of bytes in a row, `tokenizers` shows all
        # as unreadable if one of them is.
        if token in self._bytes or text.endswith(UNREADABLE):
            return ""
        piece, self._told = text[self._told :], len(text)
        alone = self._decode([token])
        if alone.strip() and UNREADABLE not in alone:
            self._window, self._told = [token], len(alone)
        return piece

    def end(self) -> str:
        """What was held back, once no token follows."""
        return self._decode(self._window)[self._told :] if self._window else ""


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of SentencePiece's 256 tokens for single bytes, where the tokenizer has them."""
    ids = (tokenizer._codec.token_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)


class Answer:
    """Tokens in, text out, up to an end token or a stop text.

    Of several stop texts the one that is complete first counts. What may be the beginning of one
    is held back until more is known.

    Attributes:
        ids: the tokens so far, without one that ended the text.
        ended: whether no more tokens are wanted.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        self.ids: list[int] = []
        self.ended = False
        self._ends = tokenizer.eos_ids
        self._stop: list[str] | None = stop  # None once one was found
        self._pieces, self._held = Pieces(tokenizer), ""

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        if token in self._ends:
            self.ended = True
            return ""
        self.ids.append(token)
        return self._up_to_stop(self._pieces.add(token), last=False)

    def end(self) -> str:
        """What was held back, once no token follows."""
        return self._up_to_stop(self._pieces.end(), last=True)

    def _up_to_stop(self, piece: str, last: bool) -> str:
        if self._stop is None:
            return ""
        text = self._held + piece
        found = [(at + len(each), at) for each in self._stop if (at := text.find(each)) >= 0]
        if found:
            self.ended, self._stop, self._held = True, None, ""
            return text[: min(found)[1]]
        held = 0 if last else max((_begun(text, each) for each in self._stop), default=0)
        sure = len(text) - held
        self._held = text[sure:]
        return text[:sure]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


# ---- the prompt cache ----------------------------------------------------------------------------


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


# ---- one prompt ----------------------------------------------------------------------------------


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


# ---- many prompts --------------------------------------------------------------------------------


def generate_batch(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.1,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    *,
    batch_size: int = 8,
) -> list[str]:
    """The model's continuation of each prompt; where one ends, the next prompt takes its place.

    Args:
        model: base or tuned.
        tokenizer: the model's.
        prompts: each as `generate` takes it; a single one is a list of one.
        max_new_tokens: most tokens to generate for each prompt, as in `generate`.
        temperature: as in `generate`.
        top_p: as in `generate`.
        top_k: as in `generate`.
        repetition_penalty: as in `generate`; each prompt counts its own tokens.
        seed: prompt i draws as `generate(..., seed=seed + i)` does, whatever stands beside it.
        stop: as in `generate`.
        batch_size: most prompts at once; memory and speed depend on it, and the texts by the
            rounding of their logits alone.

    Returns:
        The new texts, in the order of the prompts.

    Raises:
        ConfigError: a value out of range, a prompt in the place of a list, or one that is empty or
            fills the model's context.
        TokenizerError: messages were given but the model has no chat template.
    """
    how = GenerationConfig(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    for last in (seed, seed if seed is None else seed + max(len(prompts) - 1, 0)):
        key_of(last)
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    alone = isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts)
    require(not alone, "prompts", "be a list of prompts ([prompt] for a single one)", prompts)
    stops = stop_texts(stop)
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = [
        room_for(model, row, f"prompts[{i}]" if len(rows) > 1 else "the prompt")
        for i, row in enumerate(rows)
    ]
    answers = [Answer(tokenizer, stops) for _ in rows]
    texts, ended = [""] * len(rows), set[int]()
    for i, token in batch_tokens(model, rows, how, seed, batch_size, ended):
        texts[i] += answers[i].add(token)
        if answers[i].ended or len(answers[i].ids) == room[i]:
            ended.add(i)
    return [text + answer.end() for text, answer in zip(texts, answers)]


def batch_tokens(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    how: GenerationConfig,
    seed: int | None,
    batch_size: int,
    ended: set[int],
) -> Iterator[tuple[int, int]]:
    """New tokens of many prompts, as they come.

    Args:
        model: base or tuned.
        prompts: token ids of each, at least one.
        how: as for all.
        seed: of the first prompt; those behind it count on.
        batch_size: most prompts at once.
        ended: numbers of prompts that want no more tokens; looked at after each token.

    Yields:
        The number of a prompt, and a token for it.
    """
    from mlx_lm.generate import BatchGenerator

    samplers = [
        Sampler(how, key_of(None if seed is None else seed + i)) for i in range(len(prompts))
    ]
    if how.temperature == 0:  # one that is shared is called once for all rows
        samplers = samplers[:1] * len(prompts)
    penalise = how.repetition_penalty != 1
    processors: Any = [repetition_processor(how.repetition_penalty)] if penalise else []
    # Prompts of like lengths start together, as the shorter ones are padded.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    generator = BatchGenerator(
        model, completion_batch_size=batch_size, prefill_batch_size=batch_size
    )
    try:
        uids = generator.insert(
            [prompts[i] for i in order],
            max_tokens=[how.max_new_tokens] * len(order),
            samplers=[samplers[i] for i in order],
            logits_processors=[processors] * len(order),
        )
        numbers = dict(zip(uids, order))
        while responses := generator.next_generated():
            for response in responses:
                yield numbers[response.uid], int(response.token)
            if done := [r.uid for r in responses if numbers[r.uid] in ended]:
                generator.remove(done)
    finally:
        generator.close()
