"""Text <-> ids for one model, and its chat template.

A model brings its tokenizer in one of four formats: `tokenizer.json`, Meta's tiktoken file, a
SentencePiece model, or a GGUF's metadata. Each becomes a small codec; everything a caller needs
besides (BOS, EOS, template, what to save) is assembled once, from the same configuration keys.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qlora.data import codecs
from mlx_qlora.data.gguf_tokenizer import build_gguf_tokenizer, files_of
from mlx_qlora.errors import TokenizerError
from mlx_qlora.model.hub import check_readable
from mlx_qlora.readers import read_object, read_text, reading

if TYPE_CHECKING:
    import tokenizers

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
SHIPPED = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
    TOOL_TEMPLATE,
]
_HIDING = threading.Lock()  # of what a process has once
CONFIGS = ["generation_config.json", "config.json"]  # which name tokens that end a text
TYPES: dict[str, Any] = dict.fromkeys(codecs.NAMED_TOKENS, str | dict | None)
TYPES |= {"chat_template": str | list | None, "add_bos_token": bool | None}
TYPES |= {"added_tokens_decoder": dict | None, "additional_special_tokens": list | None}
# Special tokens that end a response in some Llama-family model, whatever its EOS is.
_ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>"),
    *("<end_of_turn>", "<|call|>"),
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text <-> ids for one model."""

    vocab_size: int  # the highest id and 1; special and added tokens included
    bos_id: int | None
    eos_id: int  # to append after a response
    eos_ids: frozenset[int]  # every id that ends generation, `eos_id` among them
    adds_bos: bool  # whether the model expects `bos_id` at the start of a sequence
    chat_template: str | None  # Jinja source; None for most base models
    special_tokens: Mapping[str, str]  # what a template may name: `bos_token`, `eos_token`, ...
    source: Path  # the folder or file it was loaded from
    _codec: codecs.Codec
    _built_files: Callable[[], dict[str, str]] | None  # None: `source` has files to copy
    _own_template: bool = False  # True: the template is not the one that `source` ships
    tool_template: str | None = None  # the template `tool_use` beside the default one

    def __repr__(self) -> str:
        return f"Tokenizer({self.source}, {self.vocab_size:,} tokens)"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; text that spells a special token becomes that token.

        Adds neither BOS nor EOS. Half of a surrogate pair, which JSON can hold and UTF-8 cannot,
        is read as U+FFFD.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them; on several threads where the codec can."""
        return self._codec.encode_batch([_whole_characters(text) for text in texts])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a character cut in two) become U+FFFD.

        Ids without a token, such as the rows that pad an embedding, become nothing.
        """
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._codec.decode(known, skip_special_tokens)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Writes a conversation as text by the model's chat template.

        The text holds the special tokens, BOS included where the template writes it: encode it
        without adding another. A TokenizerError if there is no template, or it fails.
        """
        from mlx_qlora.data.templates import render_template

        source = self.template_for(self.chat_template, tools)
        if source is None:
            raise TokenizerError(
                f"{self.source} has no chat template, so messages cannot be rendered; use an "
                "instruct model, or put the template in a chat_template.jinja beside the tokenizer"
            )
        chat = (source, messages, tools, self.special_tokens)
        try:
            return render_template(*chat, add_generation_prompt=add_generation_prompt)
        except TokenizerError as error:
            raise TokenizerError(
                f"{self.source}: the chat template fails on these messages: {error}; give it the "
                "roles and fields that it expects, or correct the template"
            ) from error

    @functools.cached_property
    def own_system(self) -> str:
        """The system message that the chat template writes of itself; empty if it writes none."""
        asked, mark = [{"role": "user", "content": "?"}], "\U000f1a2b"
        with suppress(TokenizerError):
            bare = self.render_chat(asked)
            given = self.render_chat([{"role": "system", "content": mark}, *asked])
            before, _, after = given.partition(mark)
            if bare.startswith(before) and bare.endswith(after):
                return bare[len(before) : len(bare) - len(after)].strip()
        return ""

    def template_for(self, source: str | None, tools: Any) -> str | None:
        """The template that writes a chat: another one where there are tools, if it has one."""
        return self.tool_template if tools and self.tool_template else source

    @functools.cached_property
    def end_texts(self) -> list[str]:
        """How the tokens that end an answer are written."""
        return [text for text in (self.decode([i]) for i in sorted(self.eos_ids)) if text.strip()]

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template, which `save` then writes."""
        return replace(self, chat_template=source, tool_template=None, _own_template=True)

    @property
    def backend(self) -> tokenizers.Tokenizer | None:
        """What `tokenizer.json` describes; None of a tiktoken or SentencePiece file."""
        return self._codec.backend if isinstance(self._codec, codecs.TokenizersCodec) else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text becomes."""
        deciding = (self._codec, self.bos_id, self.eos_id, sorted(self.eos_ids), self.adds_bos)
        return hashlib.blake2b(pickle.dumps(deciding), digest_size=16).hexdigest()

    @functools.cached_property
    def vocabulary(self) -> str:
        """A hash of some of its tokens' texts, which no other model's tokenizer has in common."""
        texts = [self.decode([i]) for i in range(0, self.vocab_size, 499)]
        return hashlib.blake2b(repr(texts).encode("utf-8", "replace"), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes what the base ships, so that `folder` encodes alike here and in transformers.

        A folder's tokenizer files are copied byte for byte. A GGUF's tokenizer becomes
        `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._built_files is not None:
            for name, text in self._built_files().items():
                (folder / name).write_text(text, encoding="utf-8")
        else:
            for path, copy in ((self.source / name, folder / name) for name in SHIPPED):
                if path.exists() and path.resolve() != copy.resolve():
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, copy)
        if self._own_template and self.chat_template is not None:
            # transformers prefers this file to the template in tokenizer_config.json.
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
            if self.tool_template is not None:
                (folder / TOOL_TEMPLATE).parent.mkdir(exist_ok=True)
                (folder / TOOL_TEMPLATE).write_text(self.tool_template, encoding="utf-8")


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def _without_panics() -> Iterator[None]:
    """Hide standard error, where `tokenizers` writes of a panic that is an exception besides."""
    with _HIDING, open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def load_tokenizer(source: Path, gguf_metadata: Mapping[str, Any] | None = None) -> Tokenizer:
    """Loads a model's tokenizer, whichever format it comes in.

    `source` is a model folder, or a GGUF file and `gguf_metadata` the second value of
    `mx.load(source, return_metadata=True)`. A TokenizerError says what cannot be used, and why.
    """
    source = Path(source)
    with reading(source, TokenizerError), _without_panics():
        if gguf_metadata is not None:
            backend, config, end_ids = build_gguf_tokenizer(gguf_metadata, source.name)
            files = functools.partial(files_of, backend, config)
            return _assemble(source, codecs.TokenizersCodec(backend), config, end_ids, files)
        for path in (source / name for name in (*SHIPPED, *CONFIGS)):
            if path.exists():
                check_readable(path, TokenizerError)
        return _of_folder(source)


def _of_folder(source: Path) -> Tokenizer:
    config = read_configs(source)
    end_ids: list[int] = []
    for path in (source / name for name in CONFIGS):
        ends = _read_json(path).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if any(type(i) is not int for i in ends):
            raise TokenizerError(f"{path}: eos_token_id must be an id or a list of ids; got {ends}")
        end_ids += ends
    vocabulary, model = source / "tokenizer.json", source / "tokenizer.model"
    if vocabulary.exists():
        codec, defaults = codecs.open_tokenizers(vocabulary, config)
    elif model.exists() and codecs.is_tiktoken(model):
        codec, defaults = codecs.open_tiktoken(model)
    elif model.exists():
        codec, defaults = codecs.open_sentencepiece(model, config)
    else:
        raise TokenizerError(
            f"{source} holds neither tokenizer.json nor tokenizer.model; copy the tokenizer files "
            "of the model there, or download the whole model folder again"
        )
    said = {name: value for name, value in config.items() if value is not None}
    return _assemble(source, codec, defaults | said, end_ids, None)


def _assemble(
    source: Path,
    codec: codecs.Codec,
    config: Mapping[str, Any],
    end_ids: list[int],
    built_files: Callable[[], dict[str, str]] | None,
) -> Tokenizer:
    stated = {key: config[key] for key in codecs.NAMED_TOKENS if config.get(key) is not None}
    named = {key: codecs.token_text(token) for key, token in stated.items()}
    ids = {key: codec.token_id(named[key]) for key in ("bos_token", "eos_token") if key in named}
    for key, token_id in ids.items():
        if token_id is None:
            raise TokenizerError(
                f"{source}: {key} is {named[key]!r}, which is not in the vocabulary; correct {key} "
                "in tokenizer_config.json, or download the tokenizer files again"
            )
    bos_id, eos_id = ids.get("bos_token"), ids.get("eos_token")
    if eos_id is None and not end_ids:
        raise TokenizerError(
            f"{source}: no end-of-sequence token is known; set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
    if codec.size > 1 << 24:  # some sixty times as many as in the largest vocabularies
        raise TokenizerError(f"{source}: no model has the id {codec.size - 1:,}; download it again")
    eos_id = end_ids[0] if eos_id is None else eos_id
    ends = [codec.specials[token] for token in _ENDS if token in codec.specials]
    return Tokenizer(
        vocab_size=codec.size,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=frozenset([eos_id, *end_ids, *ends]),
        adds_bos=bos_id is not None and bool(config.get("add_bos_token")),
        chat_template=config.get("chat_template"),
        special_tokens=named,
        source=source,
        _codec=codec,
        _built_files=built_files,
        tool_template=config.get("tool_template"),
    )


def read_configs(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` and the files beside it as one dict, in transformers' precedence."""
    config = _read_json(folder / "tokenizer_config.json")
    named = _read_json(folder / "special_tokens_map.json")
    # A config that lists its added tokens is complete; an older one yields to the map beside it.
    config = named | config if "added_tokens_decoder" in config else config | named
    for key, kind in TYPES.items():
        if not isinstance(value := config.get(key), kind):
            raise TokenizerError(f"{folder}: the tokenizer's {key} must be {kind}; got {value!r}")
    decoder = config["added_tokens_decoder"] = config.get("added_tokens_decoder") or {}
    listed = {token["content"] for token in decoder.values()}
    for content, i in _read_json(folder / "added_tokens.json").items():
        if content not in listed:
            decoder[str(i)] = {"content": content, "special": False}

    template = config.get("chat_template")
    if isinstance(template, list):
        several = {entry["name"]: entry["template"] for entry in template}
        template, config["tool_template"] = several.get("default"), several.get("tool_use")
    template = template or _read_json(folder / "chat_template.json").get("chat_template")
    if (beside := folder / TOOL_TEMPLATE).exists():
        config["tool_template"] = _read_text(beside)
    jinja_file = folder / "chat_template.jinja"
    config["chat_template"] = _read_text(jinja_file) if jinja_file.exists() else template
    return config


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, TokenizerError) if path.exists() else {}


def _read_text(path: Path) -> str:
    with reading(path, TokenizerError):
        return read_text(path)
