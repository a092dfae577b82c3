"""What encodes and decodes: `tokenizers`, tiktoken or SentencePiece."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qlora.errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def token_text(token: Any) -> str:
    """The text of a token, which configurations spell as a string or as an object."""
    return str(token.get("content", token) if isinstance(token, dict) else token)


# ---- codecs --------------------------------------------------------------------------------------
# Each has `size`, one more than its highest id, and `specials`, the ids of control tokens by their
# text: text can spell them, and decode can skip them.


class TokenizersCodec:
    """A `tokenizers` backend: it matches special tokens itself."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.size = 1 + max(backend.get_vocab().values(), default=-1)
        added = backend.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, special tokens in it matched whole, nothing added around it."""
        try:  # faster than `encode`, even for one text: no offsets are kept
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            raise _of_rust(error) from None
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of ids."""
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise _of_rust(error) from None

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text, or None."""
        return self.backend.token_to_id(token)


def _of_rust(error: BaseException) -> BaseException:
    """A panic, such as of a regex that takes too long, as an error of ours; another as it is."""
    if type(error).__name__ != "PanicException":
        return error
    return TokenizerError(f"tokenizer.json fails on a text ({error}); download it again")


class SplitCodec:
    """tiktoken or SentencePiece: special tokens are cut out here, the rest goes to the package.

    `whole` are tokens that match whole in text but are no control tokens; `patterns` has regular
    expressions for tokens that take in spaces around them, or stand only between words.
    """

    def __init__(
        self,
        whole: Mapping[str, int],
        specials: dict[str, int],
        plain_size: int,
        encode_plain: Callable[[str], list[int]],
        decode_plain: Callable[[list[int]], str],
        patterns: Mapping[str, str] | None = None,
    ):
        self._ids = dict(whole) | specials
        self._tokens = {i: token for token, i in self._ids.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        patterns = {token: re.escape(token) for token in longest_first} | dict(patterns or {})
        self._pattern = re.compile(f"({'|'.join(patterns[token] for token in longest_first)})")
        self._encode_plain, self._decode_plain = encode_plain, decode_plain
        self._plain_size = plain_size
        self.specials = specials
        self.size = max(plain_size, 1 + max(self._tokens, default=-1))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, special tokens in it matched whole, nothing added around it."""
        encoded: list[list[int]] = [[] for _ in texts]
        for ids, text in zip(encoded, texts):
            for n, part in enumerate(self._pattern.split(text)):
                if n % 2:
                    ids.append(self._ids[part if part in self._ids else part.strip()])
                elif part:
                    ids.extend(self._encode_plain(part))
        return encoded

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of ids."""
        parts = []
        for is_whole, run in itertools.groupby(ids, key=self._tokens.__contains__):
            if is_whole:
                tokens = [self._tokens[i] for i in run]
                parts += [t for t in tokens if not (skip_special_tokens and t in self.specials)]
            else:
                parts.append(self._decode_plain([i for i in run if i < self._plain_size]))
        return "".join(parts)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text, or None."""
        return self._ids.get(token)


Codec = TokenizersCodec | SplitCodec

# ---- a folder's files ----------------------------------------------------------------------------


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
    if getattr(backend.model, "dropout", None):  # of BPE, for whoever trained with it
        backend.model.dropout = None
    for part in filter(None, (backend.normalizer, backend.decoder)):
        if (times := _growth(json.loads(part.__getstate__()))) > 64:  # real ones: 2
            raise TokenizerError(f"{path} makes a text {times:,.0f} times as long; get it again")
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
    named = [config.get(key) for key in NAMED_TOKENS]
    named += config.get("additional_special_tokens") or []
    flags = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in (token_text(token) for token in named if token is not None):
        if backend.token_to_id(text) is not None:
            token = flags.get(text) or AddedToken(text, normalized=False)
            token.special = True  # its other flags, such as the spaces it takes in, stay
            backend.add_special_tokens([token])
    prefix = [backend.id_to_token(i) for i in backend.encode("").ids[:1]]
    bos = config.get("bos_token")
    return TokenizersCodec(backend), {"add_bos_token": bos and prefix == [token_text(bos)]}


def _growth(part: dict[str, Any]) -> float:
    """How many times as long a text may become, by what a `tokenizer.json` has it replaced with."""
    if part["type"] == "Sequence":
        return math.prod(map(_growth, part.get("normalizers") or part.get("decoders") or ()))
    old, new = part.get("pattern", {}).get("String"), part.get("content", part.get("prepend", ""))
    return max(1.0, len(new) / len(old) if old else 1.0 + len(new))


def is_tiktoken(path: Path) -> bool:
    """Whether a `tokenizer.model` is Meta's text file of ranks and not a SentencePiece model."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\s*\n", file.readline(1024)) is not None


_LLAMA3_RANKS = 128_000
_LLAMA3_NAMES = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
).split() + [f"reserved_special_token_{i}" for i in range(2, 246)]
_LLAMA3_SPECIALS = {f"<|{name}|>": _LLAMA3_RANKS + i for i, name in enumerate(_LLAMA3_NAMES)}
# Llama 3's cut: contractions, words with one leading mark, up to 3 digits, punctuation, spaces.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's regex engine fails on longer texts and on longer runs without a break.
_MOST_CHARACTERS, _LONGEST_RUN = 400_000, 25_000


def open_tiktoken(path: Path) -> tuple[Codec, dict[str, Any]]:
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
    bpe = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    encode = functools.partial(_encode_long, bpe)
    codec = SplitCodec({}, _LLAMA3_SPECIALS, _LLAMA3_RANKS, encode, bpe.decode)
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    return codec, {"bos_token": bos, "eos_token": eos, "add_bos_token": True}


def _encode_long(plain: tiktoken.Encoding, text: str) -> list[int]:
    """Ids of a text that is cut where Meta's reference cuts it, so that a long one has the same."""
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
    # Each text between special tokens gets the dummy prefix, as in llama.cpp and in Llama 2's
    # tokenizer.json; transformers calls this legacy=True.
    patterns = {token["content"]: token_pattern(token) for _, token in added}
    codec = SplitCodec(whole, specials, size, model.encode, model.decode, patterns)
    return codec, defaults | {"add_bos_token": True}


def token_pattern(token: Mapping[str, Any]) -> str:
    """A regular expression for an added token with its flags, as `tokenizers` matches it."""
    space = {side: r"\s*" * bool(token.get(side)) for side in ("lstrip", "rstrip")}
    text = re.escape(token["content"])
    text = rf"(?<!\w){text}(?!\w)" if token.get("single_word") else text
    return space["lstrip"] + text + space["rstrip"]


def _added_tokens(config: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Tokens that the configuration adds to the vocabulary, by rising id."""
    return sorted((int(i), token) for i, token in config["added_tokens_decoder"].items())
