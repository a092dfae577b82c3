"""Tokenizers inside GGUF files, read and written.

A GGUF keeps a vocabulary, its merges or scores, and a *name* for how text is cut before merging.
The rest (the regex, the byte alphabet, the dummy prefix) is code: llama.cpp's and, here, ours. An
unknown name is refused: text cut differently silently gives other ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_qlora.data.codecs import LLAMA3_SPLIT, NAMED_TOKENS
from mlx_qlora.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

    from mlx_qlora.data.tokenizer import Tokenizer

# ---- how text is cut -----------------------------------------------------------------------------

# What follows the words in most of the regular expressions.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}" for a, b in ("*+", "+*")]
_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
# Name of a cut -> the regular expressions, one after the other; byte-level BPE's own if empty.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (),
    "smollm": (),  # each digit first, then the same
    "llama3": (LLAMA3_SPLIT,),
    "qwen2": (LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "tekken": ("|".join([*_CASED, r"\p{N}"]) + _SLASH,),
    "gpt-4o": ("|".join([*(f"{c}{_ENDINGS}?" for c in _CASED), r"\p{N}{1,3}"]) + _SLASH,),
    "seed": (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
# tokenizer.ggml.pre -> the cut; llama.cpp's names, several for one. The first is what we write.
_CUTS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), "smollm"),
    **dict.fromkeys(("gpt-2", "gpt2", "default", "exaone4"), "gpt2"),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), "llama3"),
    **dict.fromkeys(("gpt-4o", "llama4"), "gpt-4o"),
    **{"tekken": "tekken", "seed-coder": "seed", "hunyuan-dense": "deepseek3"},
}
# Take a word that is a token as that token, whatever the merges would build, and expect BOS.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")

# ---- a file's tokenizer --------------------------------------------------------------------------

# GGUF's keys, without "_token_id" -> Hugging Face's.
_NAMED = dict(zip(("bos", "eos", "unknown", "padding"), NAMED_TOKENS))
# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def files_of(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """Name -> text of the files that transformers opens, of what `build_gguf_tokenizer` made."""
    named = {key: config[key] for key in NAMED_TOKENS if key in config}
    config = dict(config)
    if tool_template := config.pop("tool_template", None):
        templates = {"default": config["chat_template"], "tool_use": tool_template}
        config["chat_template"] = [{"name": k, "template": v} for k, v in templates.items()]
    return {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(named, indent=2, ensure_ascii=False) + "\n",
    }


def build_gguf_tokenizer(
    metadata: Mapping[str, Any], source: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[int]]:
    """Builds the tokenizer that a GGUF file embeds; `source` names it in messages.

    Also what its `tokenizer_config.json` would say, and ids that end a turn besides its EOS.
    """
    from tokenizers import AddedToken, processors

    kind = _required(metadata, "model", source)
    tokens = _required(metadata, "tokens", source)
    types = _required(metadata, "token_type", source).tolist()
    for key in ("token_type", "scores"):
        if (n := len(metadata.get(f"tokenizer.ggml.{key}", tokens))) != len(tokens):
            raise TokenizerError(f"{source}: {key} has {n} entries for {len(tokens)} tokens")
    # BOS, EOS, ... by Hugging Face's names; defaults are llama.cpp's, an id outside is none.
    ids = {"unk_token": 0, "bos_token": 1, "eos_token": 2} if kind == "llama" else {}
    stated = {name: _scalar(metadata, f"{key}_token_id", -1) for key, name in _NAMED.items()}
    ids |= {name: i for name, i in stated.items() if 0 <= i < len(tokens)}
    if kind == "gpt2":
        backend, adds_bos = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, types, tokens[ids["unk_token"]], source)
        adds_bos = True
    else:
        raise TokenizerError(
            f"{source}: tokenizer.ggml.model is {kind!r}; supported: gpt2, llama; use the model's "
            "Hugging Face folder instead"
        )
    # Control and user-defined tokens match whole in text, before anything is cut.
    whole = [
        AddedToken(token, normalized=False, special=type_ != _USER_DEFINED)
        for token, type_ in zip(tokens, types)
        if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    backend.add_tokens(whole)
    adds_bos = bool(_scalar(metadata, "add_bos_token", adds_bos)) and "bos_token" in ids
    if adds_bos:  # for whoever opens the saved tokenizer.json: our encode adds no special tokens
        bos, bos_id = tokens[ids["bos_token"]], ids["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    config = {name: tokens[i] for name, i in ids.items()} | {
        "add_bos_token": adds_bos,
        # Decoding "a ." as "a." would lose a space that the model wrote.
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
        if with_tools := metadata.get("tokenizer.chat_template.tool_use"):
            config["tool_template"] = with_tools
    ends = [_scalar(metadata, f"{key}_token_id") for key in ("eot", "eom")]
    return backend, config, [i for i in ends if i is not None]


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], source: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether this family expects BOS when the file does not say."""
    from tokenizers import Tokenizer, decoders, models

    pre = _required(metadata, "pre", source)
    if pre not in _CUTS:
        raise TokenizerError(
            f"{source}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(_CUTS)}; "
            "use the model's Hugging Face folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "merges", source)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS)
    except Exception as error:  # `tokenizers` raises bare Exception for a merge of unknown parts
        raise TokenizerError(
            f"{source}: its merges do not fit its tokens ({str(error).splitlines()[0]}); "
            "download it again"
        ) from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(_CUTS[pre])
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _WHOLE_WORDS


def _pre_tokenizer(cut: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    """Cuts text into words, and writes their bytes as letters."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [
        pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[cut]
    ]
    if cut == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not _SPLITS[cut])
    return pre_tokenizers.Sequence([*steps, byte_level])


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], unknown: str, source: str
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: merges recovered from scores, spaces as ▁, unknown text as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _required(metadata, "scores", source).tolist()
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges_from_scores(tokens, scores, types)
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(_scalar(metadata, "add_space_prefix", True))
    # Normalisation runs on each text between special tokens, so each of them gets the dummy
    # prefix: as in llama.cpp and Llama 2's own tokenizer.json, and unlike transformers 5.
    space = normalizers.Replace(" ", "▁")
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, space])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_from_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Every split of a piece in two, best piece first, as SentencePiece joins by score."""
    position = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == _NORMAL}
    merges = []
    for piece, i in position.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in position and right in position:
                merges.append((-scores[i], position[left], position[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


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
    value = default if value is None else value.item() if getattr(value, "size", 0) == 1 else value
    if not isinstance(value, int | None):
        raise TokenizerError(f"tokenizer.ggml.{key} must be a number or a flag; got {value!r}")
    return value


# ---- written -------------------------------------------------------------------------------------

# Every kind of word that some cut treats in its own way; pieces of it tell the cuts apart.
_PROBE = (
    "I'll We'Ve HTTPServer's camelCase naïve ÀÉ x/y/\n//\n\n 1 22 333 4444 ٣٤ 12ab 3.14,\r\n"
    "  \t two  spaces \n \n\n\n한국어 日本語のテキスト 漢字 คำไทย हिन्दी עִבְרִית"
    " -->  ...!!? $5 €6 'S 'd🙂 a_b #x (y)[z] end  "
)
NO_GGUF = "llama.cpp does not support this tokenizer"
_SPACE = "\u2581"  # how SentencePiece writes one


def gguf_tokenizer(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` pairs of a GGUF whose embedding has so many rows.

    A TokenizerError without a `tokenizer.json`, or if llama.cpp has no name for what it does.
    """
    backend, source = tokenizer.backend, tokenizer.source
    if backend is None:
        raise TokenizerError(
            f"{source} has no tokenizer.json, which a GGUF's tokenizer is made from; write one "
            "with transformers (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    said = json.loads(backend.to_str())
    model, added = said["model"], backend.get_added_tokens_decoder()
    if model["type"] != "BPE":
        raise TokenizerError(f"{source}: {NO_GGUF}: it is {model['type']}, not BPE")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    pieces = bool(model.get("byte_fallback"))  # SentencePiece's; else bytes are written as letters
    texts = {i: text for text, i in backend.get_vocab().items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [_NORMAL if i in texts else _UNUSED for i in range(rows)]
    for i, token in added.items():
        if i < rows:
            types[i] = _CONTROL if token.special else _USER_DEFINED
            if pieces and not token.special:  # they are looked for in the text as it is
                tokens[i] = token.content.replace(_SPACE, " ")
    pairs: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if pieces:
        for i, text in enumerate(tokens):
            types[i] = _BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else types[i]
            types[i] = _UNKNOWN if text == model.get("unk_token") else types[i]
        place: dict[str, int] = {}
        for n, merge in enumerate(merges):  # the earliest one that makes a piece is its score
            place.setdefault(merge.replace(" ", ""), n)
        scores = [-float(place.get(text, len(merges))) for text in tokens]
        prefix = _has_space_prefix(said, tokenizer)
        pairs |= {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}
    else:
        pairs |= {"model": "gpt2", "pre": _name_of_cut(backend, said, source), "merges": merges}
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for key, name in list(_NAMED.items())[2:]:
        named[key] = backend.token_to_id(tokenizer.special_tokens.get(name, ""))
    # llama.cpp has a place for three; what it knows by their texts needs none.
    known = {backend.token_to_id(text) for text in ("<|endoftext|>", "</s>", "<|end_of_text|>")}
    ends = sorted(tokenizer.eos_ids - {tokenizer.eos_id}, key=lambda i: (i in known, i))
    named |= dict(zip(("eot", "eom"), ends))
    pairs |= {f"{key}_token_id": i for key, i in named.items() if i is not None and i < rows}
    pairs["add_bos_token"] = tokenizer.adds_bos
    pairs = {f"tokenizer.ggml.{key}": value for key, value in pairs.items()}
    if tokenizer.chat_template is not None:
        pairs["tokenizer.chat_template"] = tokenizer.chat_template
        if tokenizer.tool_template is not None:
            pairs["tokenizer.chat_template.tool_use"] = tokenizer.tool_template
    return pairs


def _name_of_cut(backend: tokenizers.Tokenizer, said: dict[str, Any], source: Any) -> str:
    """The `tokenizer.ggml.pre` of which every piece of a text is the tokenizer's own."""
    # llama.cpp does not compose letters (NFC), as text mostly comes composed.
    kinds = [step["type"] for step in _steps(said["normalizer"]) if step["type"] != "NFC"]
    why = f"its normalizer is {', '.join(kinds)}"
    if not kinds and (before := backend.pre_tokenizer) is not None:
        ours, whole = before.pre_tokenize_str(_PROBE), bool(said["model"].get("ignore_merges"))
        names = [p for p in _CUTS if ours == _pre_tokenizer(_CUTS[p]).pre_tokenize_str(_PROBE)]
        for pre in names:
            if whole == (pre in _WHOLE_WORDS):
                return pre
        if names and _merges_make_all(backend, said):  # then it is all the same
            return names[0]
        why = f"it splits text unlike any of {', '.join(_CUTS)}"
        why = f"it splits text as {names[0]}, but merges all words" if names else why
    raise TokenizerError(f"{source}: {NO_GGUF}: {why}")


def _merges_make_all(backend: tokenizers.Tokenizer, said: dict[str, Any]) -> bool:
    """Whether the merges lead to each word that is a token, so that nothing skips them."""
    from tokenizers import Tokenizer, models

    vocab, added = said["model"]["vocab"], backend.get_added_tokens_decoder()
    merges: list[Any] = [
        tuple(m.split(" ") if isinstance(m, str) else m) for m in said["model"]["merges"]
    ]
    words = [text for text, i in vocab.items() if i not in added]
    encoded = Tokenizer(models.BPE(vocab, merges)).encode_batch_fast(words)
    return all(len(encoding.ids) == 1 for encoding in encoded)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, be it one or a sequence."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    return [step for key in part if key != "type" for each in part[key] for step in _steps(each)]


def _has_space_prefix(said: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether each text between special tokens begins with a space that is not there."""
    steps = [*_steps(said["normalizer"]), *_steps(said["pre_tokenizer"])]
    unknown = {step["type"] for step in steps} - {"Prepend", "Replace", "Metaspace", "Split"}
    if unknown:
        raise TokenizerError(f"{tokenizer.source}: {NO_GGUF}: it has {', '.join(unknown)}")
    schemes = {step.get("prepend_scheme", step["type"]) for step in steps}
    # "first" is at the very beginning of a text alone: where a chat has a special token.
    wanted = {"Prepend", "always"} | ({"first"} if tokenizer.chat_template is None else set())
    return bool(schemes & wanted)
