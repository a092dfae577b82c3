"""A GGUF file's metadata -> the `tokenizers` object that encodes like the model's own.

A GGUF keeps a vocabulary, its merges or scores, and a *name* for how text is cut before merging.
The rest (the regex, the byte alphabet, the dummy prefix) lives in code: llama.cpp's and, here,
ours. An unknown name is refused: text cut differently gives other ids without any sign of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_qlora.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

# Llama 3's cut: contractions, words with one leading mark, up to 3 digits, punctuation, spaces.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> our three ways to cut. llama.cpp's names, several for one cut.
_CUTS = {
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "default": "gpt2",
}

# GGUF's key, without "_token_id" -> Hugging Face's.
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type


class GgufTokenizer(NamedTuple):
    """What a GGUF says about its tokenizer, in Hugging Face's terms.

    Attributes:
        backend: Encodes and decodes; `backend.to_str()` is a complete `tokenizer.json`.
        config: What `tokenizer_config.json` holds for it.
        end_ids: Ids that end a turn or a message, besides the EOS that `config` names.
    """

    backend: tokenizers.Tokenizer
    config: dict[str, Any]
    end_ids: list[int]

    def files(self) -> dict[str, str]:
        """Name and text of the files that make a folder transformers opens."""
        named = {key: self.config[key] for key in _NAMED.values() if key in self.config}
        return {
            "tokenizer.json": self.backend.to_str(),
            "tokenizer_config.json": _json_text(self.config),
            "special_tokens_map.json": _json_text(named),
        }


def build_gguf_tokenizer(metadata: Mapping[str, Any], source: str) -> GgufTokenizer:
    """Builds the tokenizer that a GGUF file embeds.

    Args:
        metadata: The second value of `mx.load(path, return_metadata=True)`: str, list[str] and
            `mx.array` scalars and vectors.
        source: The file's name, for messages.

    Returns:
        The backend with control and user-defined tokens added, and its configuration.

    Raises:
        TokenizerError: A key is missing, or the tokenizer's model or pre-tokenizer is unknown.
    """
    kind = _required(metadata, "model", source)
    tokens = _required(metadata, "tokens", source)
    types = _required(metadata, "token_type", source).tolist()
    ids = _named_ids(metadata, kind, len(tokens))
    if kind == "gpt2":
        backend, adds_bos = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, types, tokens[ids["unk_token"]], source)
        adds_bos = True
    else:
        raise TokenizerError(
            f"{source}: tokenizer.ggml.model is {kind!r}, and only 'gpt2' and 'llama' are "
            "supported; use the model's Hugging Face folder instead"
        )
    _add_whole_tokens(backend, tokens, types)
    adds_bos = bool(_scalar(metadata, "add_bos_token", adds_bos)) and "bos_token" in ids
    if adds_bos:
        _prepend_bos(backend, tokens[ids["bos_token"]], ids["bos_token"])
    config = {name: tokens[i] for name, i in ids.items()} | {
        "add_bos_token": adds_bos,
        # Decoding "a ." as "a." would lose a space that the model wrote.
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    ends = [_scalar(metadata, f"{key}_token_id") for key in ("eot", "eom")]
    return GgufTokenizer(backend, config, [i for i in ends if i is not None])


def _named_ids(metadata: Mapping[str, Any], kind: str, size: int) -> dict[str, int]:
    """Ids of BOS, EOS, ... by Hugging Face's names; an id outside the vocabulary is unsaid."""
    # The format's own defaults; llama.cpp has the same.
    ids = {"unk_token": 0, "bos_token": 1, "eos_token": 2} if kind == "llama" else {}
    stated = {name: _scalar(metadata, f"{key}_token_id", -1) for key, name in _NAMED.items()}
    return ids | {name: i for name, i in stated.items() if 0 <= i < size}


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], source: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether this family expects BOS when the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = _required(metadata, "pre", source)
    cut = _CUTS.get(pre)
    if cut is None:
        raise TokenizerError(
            f"{source}: tokenizer.ggml.pre is {pre!r}, and the known ones are "
            f"{', '.join(_CUTS)}; use the model's Hugging Face folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "merges", source)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        # Llama 3 takes a word that is a token as that token, whatever the merges would build.
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama3")
    except Exception as error:  # `tokenizers` raises bare Exception for a merge of unknown parts
        raise TokenizerError(
            f"{source}: its merges do not fit its tokens ({str(error).splitlines()[0]}); "
            "download it again"
        ) from error
    backend = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut != "llama3")
    if cut == "llama3":
        first = [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")]
    elif cut == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    else:
        first = []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, cut == "llama3"


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], unknown: str, source: str
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: merges recovered from scores, spaces as ▁, unknown text as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _required(metadata, "scores", source).tolist()
    vocab = {token: i for i, token in enumerate(tokens)}
    prefix = bool(_scalar(metadata, "add_space_prefix", True))
    model = models.BPE(
        vocab=vocab,
        merges=_merges_from_scores(tokens, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    # Normalisation runs on each stretch between special tokens, so each of them gets the dummy
    # prefix: as llama.cpp and Llama 2's own tokenizer.json do, and unlike transformers 5.
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), space] if prefix else [space]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_from_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best piece first.

    SentencePiece joins the neighbours whose union has the highest score. A list of merges in
    order of the union's score makes `tokenizers` do the same.
    """
    position = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == _NORMAL}
    merges = []
    for piece, i in position.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in position and right in position:
                merges.append((-scores[i], position[left], position[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _add_whole_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Makes control and user-defined tokens match whole in text, before anything is cut."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    backend.add_tokens(added)


def _prepend_bos(backend: tokenizers.Tokenizer, bos: str, bos_id: int) -> None:
    # For whoever opens the saved tokenizer.json: our own encode adds no special tokens.
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
    )


def _required(metadata: Mapping[str, Any], key: str, source: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise TokenizerError(
            f"{source} has no tokenizer.ggml.{key}; convert the model again with a current "
            "llama.cpp, or use its Hugging Face folder"
        )
    return value


def _scalar(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}")
    return default if value is None else value.item()


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
