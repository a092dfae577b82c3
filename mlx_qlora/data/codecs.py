"""The three packages that turn text into ids, behind one small interface.

`tokenizers` matches special tokens itself; for tiktoken and SentencePiece they are cut out here,
and only the text between them goes to the package.
"""

from __future__ import annotations

import base64
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_qlora.data.gguf_tokenizer import LLAMA3_SPLIT
from mlx_qlora.errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

_LLAMA3_RANKS = 128_000
_LLAMA3_NAMES = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
).split() + [f"reserved_special_token_{i}" for i in range(2, 246)]
_LLAMA3_SPECIALS = {f"<|{name}|>": _LLAMA3_RANKS + i for i, name in enumerate(_LLAMA3_NAMES)}
# tiktoken's regex engine fails on longer texts and on longer runs without a break.
_MOST_CHARACTERS, _LONGEST_RUN = 400_000, 25_000


def token_text(token: Any) -> str:
    """The text of a token, which configurations spell as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


class Codec(Protocol):
    """What a `Tokenizer` needs of a package."""

    size: int
    specials: dict[str, int]  # control tokens: text can spell them, decode can skip them

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, nothing added around it."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of ids."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text, or None."""
        ...


class TokenizersCodec:
    """A `tokenizers` backend: it matches special tokens itself."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.size = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, special tokens in it matched whole."""
        # Faster than one by one, even for one: no offsets are kept.
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of ids."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text, or None."""
        return self._backend.token_to_id(token)


class SplitCodec:
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

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, special tokens in it matched whole."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for n, part in enumerate(self._pattern.split(text)):
            if n % 2:
                ids.append(self._ids[part])
            elif part:
                ids.extend(self._encode_plain(part))
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of ids."""
        parts = []
        for is_whole, run in itertools.groupby(ids, key=self._tokens.__contains__):
            if not is_whole:
                parts.append(self._decode_plain(list(run)))
                continue
            tokens = [self._tokens[i] for i in run]
            parts += [t for t in tokens if not (skip_special_tokens and t in self.specials)]
        return "".join(parts)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text, or None."""
        return self._ids.get(token)


def open_tokenizers(path: Path, config: Mapping[str, Any]) -> tuple[Codec, dict[str, Any]]:
    """Opens a `tokenizer.json`; returns its codec and what it says where `config` is silent."""
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
    named = [config.get(key) for key in NAMED_TOKENS] + (
        config.get("additional_special_tokens") or []
    )
    texts = [token_text(token) for token in named if token is not None]
    backend.add_special_tokens([t for t in texts if backend.token_to_id(t) is not None])
    prefix = [backend.id_to_token(i) for i in backend.encode("").ids[:1]]
    bos = config.get("bos_token")
    return TokenizersCodec(backend), {"add_bos_token": bos and prefix == [token_text(bos)]}


def is_tiktoken(path: Path) -> bool:
    """Whether a `tokenizer.model` is Meta's text file of ranks and not a SentencePiece model."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\s*\n", file.readline(1024)) is not None


def open_tiktoken(path: Path, config: Mapping[str, Any]) -> tuple[Codec, dict[str, Any]]:
    """Opens Meta's Llama 3 `tokenizer.model`; returns as `open_tokenizers` does."""
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
    codec = SplitCodec({}, _LLAMA3_SPECIALS, _LLAMA3_RANKS, encode, plain.decode)
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


def open_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[Codec, dict[str, Any]]:
    """Opens a SentencePiece `tokenizer.model`; returns as `open_tokenizers` does."""
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
    for token in (token_text(config[key]) for key in NAMED_TOKENS if config.get(key)):
        if (i := model.piece_to_id(token)) != model.unk_id():
            specials[token] = i
    added = _added_tokens(config)
    specials |= {token["content"]: i for i, token in added if token.get("special")}
    whole = {token["content"]: i for i, token in added}
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    defaults = {key: model.id_to_piece(i) for key, i in ids.items() if i >= 0}
    # Each stretch between special tokens is a text of its own and gets the dummy prefix, as in
    # llama.cpp and in Llama 2's tokenizer.json; transformers calls this legacy=True.
    codec = SplitCodec(whole, specials, size, model.encode, model.decode)
    return codec, defaults | {"add_bos_token": True}


def _added_tokens(config: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Tokens that the configuration adds to the vocabulary, by rising id."""
    return sorted((int(i), token) for i, token in config["added_tokens_decoder"].items())
