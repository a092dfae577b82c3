"""Text from a prompt: `generate`, `stream` and `generate_batch`."""

import time
import warnings
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, Unpack, cast

import mlx.core as mx
import numpy as np

from mlx_qlora.data.encode import encode_prompt
from mlx_qlora.data.formats import without_nulls
from mlx_qlora.data.rows import messages_of
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, PromptWarning, did_you_mean, require
from mlx_qlora.fields import checked
from mlx_qlora.infer.tokens import (
    GenerationConfig,
    GenerationSettings,
    PromptCache,
    StreamSettings,
    batch_tokens,
    generate_tokens,
    key_of,
)
from mlx_qlora.model.llama import LlamaForCausalLM, check_ids
from mlx_qlora.progress import doing

# ---- prompts and settings ------------------------------------------------------------------------

Prompt = str | list[dict[str, Any]] | list[int]


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a text, of chat messages that await the assistant's answer, or as they are."""
    if isinstance(prompt, Mapping):
        raise ConfigError("a prompt must be text, messages or token ids; put the message in a list")
    if isinstance(prompt, str):
        ids = encode_prompt(tokenizer, prompt)
    elif len(prompt) and isinstance(prompt[0], Mapping):
        # Read as in a row, parts and the names of others included.
        messages = messages_of({"messages": without_nulls(prompt)}, "messages", asked=True)
        text = tokenizer.render_chat(messages, add_generation_prompt=True)
        ids = encode_prompt(tokenizer, text)
    elif len(prompt) and not isinstance(prompt[0], int | np.integer):
        kind = type(prompt[0]).__name__
        raise ConfigError(f"a prompt must be text, messages or token ids, not a list of {kind}")
    else:
        ids = [i.item() if isinstance(i, np.integer) else i for i in cast("list[int]", prompt)]
    if not ids:
        raise ConfigError("the prompt is empty")
    return ids


def room_for(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    ids: list[int],
    what: str = "the prompt",
    remedy: str = "shorten it",
) -> int:
    """How many tokens fit into the model's context after these.

    A ConfigError if there is no room for an answer: `what` is too long, and `remedy` helps.
    """
    check_ids(ids, model.config.vocab_size, what, tokenizer.decode)
    limit, n = model.config.max_position_embeddings, len(ids)
    if n >= limit:  # beyond the positions that it was trained on a model writes noise, silently
        raise ConfigError(f"{what} has {n} tokens, and the model was made for {limit}; {remedy}")
    return limit - n


def _config_of(settings: Mapping[str, Any], known: Collection[str]) -> GenerationConfig:
    """The fields of GenerationConfig among some keywords; a ConfigError if one is not known."""
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, known) or f"; supported: {', '.join(known)}"
            raise ConfigError(f"unknown keyword {name!r}{hint}")
    names = [field.name for field in fields(GenerationConfig)]
    return GenerationConfig(**{name: settings[name] for name in names if name in settings})


# ---- tokens to text ------------------------------------------------------------------------------

UNREADABLE = "\ufffd"  # what bytes that are not (yet) UTF-8 are decoded to


class Pieces:
    """Decodes token by token; the pieces join to the text of all tokens.

    Each time only a short window is decoded. It begins with a token after which the text does not
    depend on what came before: one that shows a character that is neither a space (SentencePiece
    drops spaces at a beginning) nor part of one that spans tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        # SentencePiece's 256 tokens for single bytes, where the tokenizer has them.
        ids = (tokenizer._codec.token_id(f"<0x{byte:02X}>") for byte in range(256))
        self._bytes = frozenset(i for i in ids if i is not None)
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were returned

    def add(self, token: int) -> str:
        """The text that became certain with this token; often one token late, or empty."""
        self._window.append(token)
        text = self._decode(self._window)
        # A character may go on in the next token; and of bytes in a row, `tokenizers` shows all
        # as unreadable if one of them is.
        if token in self._bytes or text.endswith(UNREADABLE):
            return ""
        piece, self._shown = text[self._shown :], len(text)
        alone = self._decode([token])
        if alone.strip() and UNREADABLE not in alone:
            self._window, self._shown = [token], len(alone)
        return piece

    def end(self) -> str:
        """The text that was held back, once no token follows."""
        return self._decode(self._window)[self._shown :] if self._window else ""


class Answer:
    """Tokens in, text out, up to an end token or a stop text.

    Of several stop texts the one that is complete first counts. What may be the beginning of one
    is held back until more is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        self.ids: list[int] = []  # so far, without one that ended the text
        self.ended = False  # whether no more tokens are wanted
        self._stop, self._stopped = stop, False
        self._end_ids = tokenizer.eos_ids
        self._pieces, self._held = Pieces(tokenizer), ""

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        if token in self._end_ids:
            self.ended = True
            return ""
        self.ids.append(token)
        return self._up_to_stop(self._pieces.add(token), is_last=False)

    def end(self) -> str:
        """The text that was held back, once no token follows."""
        return self._up_to_stop(self._pieces.end(), is_last=True)

    def _up_to_stop(self, piece: str, is_last: bool) -> str:
        if self._stopped:
            return ""
        text = self._held + piece
        # (end, start) of each stop text: min() is the one that is complete first.
        matches = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            self.ended = self._stopped = True
            return text[: min(matches)[1]]
        # As many characters at the end as may be the beginning of a stop text.
        starts = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        begun = max((len(start) for start in starts if text.endswith(start)), default=0)
        certain = len(text) - (0 if is_last else begun)
        self._held = text[certain:]
        return text[:certain]


def stop_texts(stop: str | Sequence[str] | None) -> list[str]:
    """The texts that end an answer, of one or several; a ConfigError if one is empty."""
    texts = [stop] if isinstance(stop, str) else list(stop or [])
    require(all(texts), "stop", "hold no empty text", stop)
    return texts


# ---- one prompt, and many ------------------------------------------------------------------------


@checked
def generate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    **settings: "Unpack[StreamSettings]",
) -> str:
    """The model's continuation of a prompt: the new text alone, without the token that ended it.

    Args:
        prompt: text, taken as it is (after one BOS if the model expects one), a list of chat
            messages, rendered with the model's chat template, or token ids.
        **settings: the fields of `GenerationConfig` (temperature=0.7, top_p=0.9, top_k=50,
            repetition_penalty=1.1, max_new_tokens=512; the text ends where the model's context
            does, too), and

            - seed: draws the samples; the same seed gives the same text. None takes a fresh one.
            - stop: a text that ends the answer where it begins, or several, of which the one that
              is complete first counts.
            - kv_bits: 2, 4 or 8 quantise the keys and values of all tokens; None keeps them exact.
            - prompt_cache: a `PromptCache` keeps the keys and values for the next call: what a
              prompt has in common with the tokens before is not computed again.

    Raises:
        ConfigError: a value out of range, an unknown keyword, a prompt that is empty, or one that
            fills the model's context.
        DataError: a token that the model's embedding has no row for.
        TokenizerError: messages were given but the model has no chat template.

    Warns:
        PromptWarning: the prompt of a chat model is a text in no form of a chat.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is not None:
        if not any(mark in prompt for mark in ("###", "[INST]", *tokenizer._codec.specials)):
            asked = "[{'role': 'user', 'content': PROMPT}]"
            how = f"the prompt is continued as it is; to ask a chat model pass {asked}"
            warnings.warn(how, PromptWarning, stacklevel=3)  # above `checked`
    return "".join(Stream(model, tokenizer, prompt, settings))


@checked
def stream(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    **settings: "Unpack[StreamSettings]",
) -> "Stream":
    """As `generate`, but an iterator of the pieces of the text; they join to the same text.

    Its `speed` has figures once it is exhausted or closed.

    Raises:
        UserError: as `generate`, before the first piece.
    """
    return Stream(model, tokenizer, prompt, settings)


@dataclass(frozen=True)
class Speed:
    """How fast a text was generated.

    Attributes:
        prompt_tokens: of the prompt, cached ones included.
        cached_tokens: of those, how many a prompt cache had already.
        new_tokens: generated ones, the one that ended the text included.
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
    """The text of one prompt, piece by piece; see `generate` for the settings."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: Prompt, how: StreamSettings
    ) -> None:
        config = _config_of(how, StreamSettings.__annotations__)
        self._answer = Answer(tokenizer, stop_texts(how.get("stop")))
        self.prompt = prompt_ids(tokenizer, prompt)
        n_new = min(config.max_new_tokens, room_for(model, tokenizer, self.prompt))
        config = replace(config, max_new_tokens=n_new)
        cache = how.get("prompt_cache") or PromptCache()
        self._n_cached = cache.common(model, self.prompt)
        seed, kv_bits = how.get("seed"), how.get("kv_bits")
        self._tokens = generate_tokens(model, self.prompt, config, seed, kv_bits, cache)
        self._times = (0.0, 0.0, 0.0)  # of the start, the first token and the last one
        self._n_new = 0
        self._pieces = self._text()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the text here; a prompt cache keeps what was computed."""
        self._pieces.close()

    @property
    def speed(self) -> Speed:
        """The figures so far."""
        start, first, last = self._times
        n, cached, new = len(self.prompt), self._n_cached, self._n_new
        reading = (n - cached) / (first - start) if first > start else 0.0
        writing = (new - 1) / (last - first) if last > first else 0.0
        return Speed(n, cached, new, reading, writing, mx.get_peak_memory())

    @property
    def ids(self) -> list[int]:
        """The new tokens so far, without the one that ended the text."""
        return self._answer.ids

    def _text(self) -> Generator[str]:
        start = time.perf_counter()
        with closing(self._tokens):
            for token in self._tokens:
                now = time.perf_counter()
                self._times = (start, self._times[1] if self._n_new else now, now)
                self._n_new += 1
                if piece := self._answer.add(token):
                    yield piece
                if self._answer.ended:
                    break
        if piece := self._answer.end():
            yield piece


@checked
def generate_batch(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 8,
    **settings: "Unpack[GenerationSettings]",
) -> list[str]:
    """The continuation of each prompt, in order; where one ends, the next prompt takes its place.

    Each step of a batch reads all weights once, which is most of what a token costs.

    Args:
        prompts: each as `generate` takes it; a single one is a list of one.
        batch_size: most prompts at once; memory and speed depend on it, and the texts by the
            rounding of their logits alone.
        **settings: as in `generate`, without kv_bits and prompt_cache. Prompt i draws as
            `generate(..., seed=seed + i)` does, whichever prompts are in its batch, and the
            repetition penalty counts each prompt's own tokens.

    Raises:
        ConfigError: as `generate`, or a prompt in the place of a list.
        TokenizerError: messages were given but the model has no chat template.
    """
    config = _config_of(settings, [*GenerationSettings.__annotations__, "batch_size"])
    seed, stop = settings.get("seed"), stop_texts(settings.get("stop"))
    for any_seed in (seed, None if seed is None else seed + max(len(prompts) - 1, 0)):
        key_of(any_seed)
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    single = isinstance(prompts, str) or any(isinstance(each, dict | int) for each in prompts)
    require(not single, "prompts", "be a list of prompts ([prompt] for a single one)", prompts)
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    names = [f"prompts[{i}]" for i in range(len(rows))] if len(rows) > 1 else ["the prompt"]
    room = [room_for(model, tokenizer, row, name) for row, name in zip(rows, names)]
    answers = [Answer(tokenizer, stop) for _ in rows]
    texts, ended = [""] * len(rows), set[int]()
    with doing("answering", len(rows), "answers") as task:
        for i, token in batch_tokens(model, rows, config, seed, batch_size, ended):
            texts[i] += answers[i].add(token)
            if answers[i].ended or len(answers[i].ids) == room[i]:
                ended.add(i)
            if i in ended or len(answers[i].ids) == config.max_new_tokens:
                task.advance()
    return [text + answer.end() for text, answer in zip(texts, answers)]
