"""Text <-> ids for one model, and its chat template.

A model brings its tokenizer in one of four formats: `tokenizer.json`, Meta's tiktoken file, a
SentencePiece model, or a GGUF's metadata. Each becomes a small codec; everything a caller needs
besides (BOS, EOS, template, what to save) is assembled once, from the same configuration keys.
"""

from __future__ import annotations

import base64
import datetime
import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_qlora.data.gguf_tokenizer import LLAMA3_SPLIT, build_gguf_tokenizer
from mlx_qlora.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2
    import jinja2.nodes
    import tiktoken
    import tokenizers

_SHIPPED = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
]
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

# Special tokens that end a response in some Llama-family model, whatever its EOS is.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>")

_LLAMA3_RANKS = 128_000
_LLAMA3_NAMES = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
).split() + [f"reserved_special_token_{i}" for i in range(2, 246)]
_LLAMA3_SPECIALS = {f"<|{name}|>": _LLAMA3_RANKS + i for i, name in enumerate(_LLAMA3_NAMES)}
# tiktoken's regex engine fails on longer texts and on longer runs without a break.
_MOST_CHARACTERS, _LONGEST_RUN = 400_000, 25_000


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text <-> ids for one model.

    Attributes:
        vocab_size: Number of ids, special and added tokens included.
        bos_id: The id that opens a sequence; None where the model has none.
        eos_id: The id to append after a response.
        eos_ids: Every id that ends generation, `eos_id` among them.
        adds_bos: True if the model expects `bos_id` in front of a sequence.
        chat_template: Jinja source that turns messages into text; None for most base models.
        special_tokens: The strings that a template may name: `bos_token`, `eos_token`, ...
        source: The folder or file it was loaded from.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    eos_ids: frozenset[int]
    adds_bos: bool
    chat_template: str | None
    special_tokens: Mapping[str, str]
    source: Path
    _codec: _Codec
    _built_files: Callable[[], dict[str, str]] | None  # None: `source` has files to copy

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; text that spells a special token becomes that token.

        Adds neither BOS nor EOS. Half of a surrogate pair, which JSON can hold and UTF-8 cannot,
        is read as U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._codec.encode(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self._codec.decode([int(i) for i in ids], skip_special_tokens)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Writes a conversation as the one text that the model's chat template makes of it.

        The text holds the special tokens, BOS included where the template writes it: encode it
        without adding another.

        Args:
            messages: `{"role": ..., "content": ...}` in order; more keys where the template
                reads them (`tool_calls`, ...).
            add_generation_prompt: True ends the text where the assistant's answer begins.
            tools: JSON schemas of the functions that the model may call.

        Raises:
            TokenizerError: There is no template, or it is damaged or refuses these messages.
        """
        if self.chat_template is None:
            raise TokenizerError(
                f"{self.source} has no chat template, so messages cannot be rendered; use an "
                "instruct model, or put the template in a chat_template.jinja beside the tokenizer"
            )
        try:
            return _compiled(self.chat_template).render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # the template is the user's code: whatever it raises is input
            raise TokenizerError(
                f"{self.source}: the chat template fails on these messages: {error}; give it the "
                "roles and fields that it expects, or correct the template"
            ) from error

    def save(self, folder: Path) -> None:
        """Writes what the base ships, so that `folder` encodes alike here and in transformers.

        A folder's tokenizer files are copied byte for byte. A GGUF's tokenizer becomes
        `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

        Args:
            folder: Made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._built_files is not None:
            for name, text in self._built_files().items():
                (folder / name).write_text(text, encoding="utf-8")
            return
        for path in (self.source / name for name in _SHIPPED):
            if path.exists() and path.resolve() != (folder / path.name).resolve():
                shutil.copyfile(path, folder / path.name)


def load_tokenizer(source: Path, gguf_metadata: Mapping[str, Any] | None = None) -> Tokenizer:
    """Loads a model's tokenizer, whichever format it comes in.

    Args:
        source: A model folder, or a GGUF file (then `gguf_metadata` is needed).
        gguf_metadata: The second value of `mx.load(source, return_metadata=True)`.

    Raises:
        TokenizerError: A file is missing or damaged, the format is unknown, or no EOS is known.
    """
    source = Path(source)
    if gguf_metadata is not None:
        built = build_gguf_tokenizer(gguf_metadata, source.name)
        codec = _TokenizersCodec(built.backend)
        return _assemble(source, codec, built.config, built.end_ids, built.files)

    config = _read_configs(source)
    end_ids = _as_list(_read_json(source / "generation_config.json").get("eos_token_id"))
    vocabulary, model = source / "tokenizer.json", source / "tokenizer.model"
    if vocabulary.exists():
        codec, defaults = _open_tokenizers(vocabulary, config)
    elif model.exists():
        opener = _open_tiktoken if _is_tiktoken(model) else _open_sentencepiece
        codec, defaults = opener(model, config)
    else:
        raise TokenizerError(
            f"{source} holds neither tokenizer.json nor tokenizer.model; copy the tokenizer files "
            "of the model there, or download the whole model folder again"
        )
    return _assemble(source, codec, defaults | config, end_ids, None)


def _assemble(
    source: Path,
    codec: _Codec,
    config: Mapping[str, Any],
    end_ids: list[int],
    built_files: Callable[[], dict[str, str]] | None,
) -> Tokenizer:
    named = {key: _content(config[key]) for key in _NAMED if config.get(key) is not None}
    bos_id = _known_id(source, codec, "bos_token", named)
    eos_id = _known_id(source, codec, "eos_token", named)
    if eos_id is None and not end_ids:
        raise TokenizerError(
            f"{source}: no end-of-sequence token is known; set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
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
    )


def _known_id(source: Path, codec: _Codec, key: str, named: Mapping[str, str]) -> int | None:
    if key not in named:
        return None
    token_id = codec.token_id(named[key])
    if token_id is None:
        raise TokenizerError(
            f"{source}: {key} is {named[key]!r}, which is not in the vocabulary; correct {key} in "
            "tokenizer_config.json, or download the tokenizer files again"
        )
    return token_id


def _read_configs(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` and its satellites as one dict, in transformers' precedence."""
    config = _read_json(folder / "tokenizer_config.json")
    named = _read_json(folder / "special_tokens_map.json")
    # A config that lists its added tokens is complete; an older one yields to the map beside it.
    config = named | config if "added_tokens_decoder" in config else config | named

    decoder = config.setdefault("added_tokens_decoder", {})
    listed = {token["content"] for token in decoder.values()}
    for content, i in _read_json(folder / "added_tokens.json").items():
        if content not in listed:
            decoder[str(i)] = {"content": content, "special": False}

    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    template = template or _read_json(folder / "chat_template.json").get("chat_template")
    jinja_file = folder / "chat_template.jinja"
    config["chat_template"] = _read_text(jinja_file) if jinja_file.exists() else template
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} is damaged: {error}; download it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is damaged: {error}; download it again") from error


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


class _Codec(Protocol):
    size: int
    specials: dict[str, int]  # control tokens: text can spell them, decode can skip them

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def token_id(self, token: str) -> int | None: ...


class _TokenizersCodec:
    """A `tokenizers` backend: it matches special tokens itself."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.size = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)


class _SplitCodec:
    """tiktoken or SentencePiece: special tokens are cut out here, the rest goes to the package."""

    def __init__(
        self,
        whole: Mapping[str, int],
        specials: dict[str, int],
        plain_size: int,
        encode_plain: Callable[[str], list[int]],
        decode_plain: Callable[[list[int]], str],
    ):
        self._ids = dict(whole) | specials
        self._tokens = {i: token for token, i in self._ids.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._encode_plain, self._decode_plain = encode_plain, decode_plain
        self.specials = specials
        self.size = max(plain_size, 1 + max(self._tokens, default=-1))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for n, part in enumerate(self._pattern.split(text)):
            if n % 2:
                ids.append(self._ids[part])
            elif part:
                ids.extend(self._encode_plain(part))
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        parts = []
        for is_whole, run in itertools.groupby(ids, key=self._tokens.__contains__):
            if not is_whole:
                parts.append(self._decode_plain(list(run)))
                continue
            tokens = [self._tokens[i] for i in run]
            parts += [t for t in tokens if not (skip_special_tokens and t in self.specials)]
        return "".join(parts)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)


def _open_tokenizers(path: Path, config: Mapping[str, Any]) -> tuple[_Codec, dict[str, Any]]:
    from tokenizers import AddedToken, Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(
            f"{path} is damaged, or needs a newer `tokenizers` package: {error}"
        ) from error
    # A file can carry the length limits of whoever saved it; cutting rows is data.max_length's.
    backend.no_truncation()
    backend.no_padding()
    known = backend.get_added_tokens_decoder()
    missing = [(i, token) for i, token in _added_tokens(config) if i not in known]
    backend.add_tokens([AddedToken(**token) for _, token in missing])
    for i, token in missing:
        if (got := backend.token_to_id(token["content"])) != i:
            raise TokenizerError(
                f"{path} gives {token['content']!r} the id {got}, and the files beside it the id "
                f"{i}; download them all again"
            )
    # Special in the configuration alone still means: matched whole, and skipped by decode.
    named = [config.get(key) for key in _NAMED] + (config.get("additional_special_tokens") or [])
    texts = [_content(token) for token in named if token is not None]
    backend.add_special_tokens([t for t in texts if backend.token_to_id(t) is not None])
    prefix = [backend.id_to_token(i) for i in backend.encode("").ids[:1]]
    bos = config.get("bos_token")
    return _TokenizersCodec(backend), {"add_bos_token": bos and prefix == [_content(bos)]}


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\s*\n", file.readline(1024)) is not None


def _open_tiktoken(path: Path, config: Mapping[str, Any]) -> tuple[_Codec, dict[str, Any]]:
    import tiktoken

    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:  # binascii.Error is one
        raise TokenizerError(f"{path} is damaged: {error}; download it again") from error
    if sorted(ranks.values()) != list(range(_LLAMA3_RANKS)):
        raise TokenizerError(
            f"{path} holds {len(ranks)} ranks where Llama 3 has {_LLAMA3_RANKS}; download it "
            "again, or, for another family, use a folder with tokenizer.json"
        )
    plain = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    encode = functools.partial(_encode_long, plain)
    codec = _SplitCodec({}, _LLAMA3_SPECIALS, _LLAMA3_RANKS, encode, plain.decode)
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    return codec, {"bos_token": bos, "eos_token": eos, "add_bos_token": True}


def _encode_long(plain: tiktoken.Encoding, text: str) -> list[int]:
    """Cuts the text where Meta's reference does, so that a long one too gets the same ids."""
    ids: list[int] = []
    for at in range(0, len(text), _MOST_CHARACTERS):
        chunk, start = text[at : at + _MOST_CHARACTERS], 0
        runs = re.finditer(r"\S+|\s+", chunk) if len(chunk) > _LONGEST_RUN else ()
        for run in runs:
            for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                ids += plain.encode_ordinary(chunk[start:cut])
                start = cut
        ids += plain.encode_ordinary(chunk[start:])
    return ids


def _open_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[_Codec, dict[str, Any]]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=path.read_bytes() or b"-")  # b"" is taken
    except RuntimeError as error:
        raise TokenizerError(
            f"{path} is neither a SentencePiece model nor a tiktoken file; download it again"
        ) from error
    size = model.get_piece_size()
    control = (i for i in range(size) if model.is_control(i) or model.is_unknown(i))
    specials = {model.id_to_piece(i): i for i in control}
    for token in (_content(config[key]) for key in _NAMED if config.get(key)):
        if (i := model.piece_to_id(token)) != model.unk_id():
            specials[token] = i
    added = _added_tokens(config)
    specials |= {token["content"]: i for i, token in added if token.get("special")}
    whole = {token["content"]: i for i, token in added}
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    defaults = {key: model.id_to_piece(i) for key, i in ids.items() if i >= 0}
    # Each stretch between special tokens is a text of its own and gets the dummy prefix, as in
    # llama.cpp and in Llama 2's tokenizer.json; transformers calls this legacy=True.
    codec = _SplitCodec(whole, specials, size, model.encode, model.decode)
    return codec, defaults | {"add_bos_token": True}


def _added_tokens(config: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Tokens that the configuration adds to the vocabulary, by rising id."""
    return sorted((int(i), token) for i, token in config["added_tokens_decoder"].items())


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compiles a template from the hub, which is untrusted code, in a sandbox.

    The environment is the one that templates are written for: transformers' own.
    """
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for a mask; the text is unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(template)
