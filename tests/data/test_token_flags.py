"""Added tokens keep all their flags: what is special, and what else a token takes in.

Against `tokenizers` itself, on made and on real tokenizers.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from support import npm_tokenizers
from support.tiny_folder import write_tokenizer
from tokenizers import AddedToken, Tokenizer, models

from mlx_qlora.data.codecs import SplitCodec, token_pattern
from mlx_qlora.data.tokenizer import load_tokenizer

FLAGS = [
    dict(zip(("lstrip", "rstrip", "single_word"), values))
    for values in itertools.product((False, True), repeat=3)
]
PIECES = [
    "<x>",
    "<y>",
    "a",
    "Z9",
    "é",
    "_",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\u3000",
    ",",
    "<",
    ">",
]


def random_texts(pieces: list[str], count: int = 300) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(pieces, k=draw.randrange(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("key", ["unk_token", "pad_token", "additional_special_tokens", None])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_token_that_the_configuration_names_keeps_its_flags(
    flags: dict[str, bool], key: str | None, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<x>", normalized=False, **flags)])
    backend.add_tokens([AddedToken("<y>", normalized=False, **flags)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if key is not None:
        config[key] = ["<x>", "<y>"] if key.startswith("additional") else "<x>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    for text in random_texts(PIECES):
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_tokens_of_a_sentencepiece_model_are_cut_out_with_their_flags(
    flags: dict[str, bool],
) -> None:
    tokens: list[dict[str, Any]] = [{"content": "<x>", **flags}, {"content": "<y>"}]
    ids = {token["content"]: i for i, token in enumerate(tokens)}
    characters = {character: 10 + i for i, character in enumerate(sorted(set("".join(PIECES))))}
    codec = SplitCodec(
        ids,
        {},
        100,
        lambda text: [characters[character] for character in text],
        str,
        {token["content"]: token_pattern(token) for token in tokens},
    )
    backend = Tokenizer(models.BPE(vocab={**characters, "<x>": 0, "<y>": 1}, merges=[]))
    backend.add_tokens([AddedToken("<x>", normalized=False, **flags), "<y>"])
    for text in random_texts(PIECES):
        assert codec.encode_batch([text]) == [backend.encode(text).ids], text


@pytest.mark.parametrize("name", npm_tokenizers.SHA256)
def test_a_real_tokenizer_makes_the_ids_that_tokenizers_makes(name: str) -> None:
    folder = npm_tokenizers.folder(name)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    ours = load_tokenizer(folder)
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    draw = random.Random(1)
    pieces = [*draw.sample(added, min(20, len(added))), *PIECES[2:], "Hello", " world", "12"]
    for text in ("Ünïcödé 漢字 🙂👩‍🚀 x\n\n\ty", "def f(x):\n    return x"):
        assert ours.decode(ours.encode(text)) == text
    for text in random_texts(pieces, 200):
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
