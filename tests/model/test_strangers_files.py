"""Whatever a stranger's model folder holds, what is wrong with it is one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import call
from support.tiny_folder import write_random_model

DEEP, DIGITS = "[" * 100_000, '{"a": ' + "1" * 6000 + "}"
INDEX = "model.safetensors.index.json"


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def config(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def header(content: bytes) -> Callable[[Path], Any]:
    whole = struct.pack("<Q", len(content)) + content
    return lambda folder: (folder / "model.safetensors").write_bytes(whole)


# What is done to a model's folder -> what is said.
MEMBERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config nests": (text("config.json", DEEP), "config.json cannot be read: it is nested too"),
    "config of digits": (text("config.json", DIGITS), "config.json cannot be read: Exceeds the"),
    "header nests": (header(DEEP.encode()), "model.safetensors is damaged (it is nested too"),
    "header of digits": (header(DIGITS.encode()), "model.safetensors is damaged (Exceeds the"),
    "index nests": (text(INDEX, DEEP), "index.json cannot be read: ValueError('it is nested"),
    "generation config nests": (text("generation_config.json", DEEP), "is nested too deeply"),
    "special tokens nest": (text("special_tokens_map.json", DEEP), "is nested too deeply"),
    "tokenizer's config nests": (text("tokenizer_config.json", DEEP), "is nested too deeply"),
    "added tokens nest": (text("added_tokens.json", DEEP), "is nested too deeply"),
    "tokenizer nests": (
        text("tokenizer.json", DEEP),
        "tokenizer.json is damaged, or needs a newer",
    ),
    "a billion layers": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers must be a positive integer of at most 10,000; got 1000000000",
    ),
    "a wide head": (config(head_dim=10**9), "head_dim 1,000,000,000 is too large for a matrix"),
    "an endless vocabulary": (
        config(vocab_size=10**12),
        "vocab_size must be a positive integer of at most 2,147,483,647; got 1000000000000",
    ),
    "packing by a word": (config(quantization_config="x"), "quantization_config must be an obj"),
    "packing by a list": (config(quantization_config=[1]), "quantization_config must be an obj"),
    "positions by a word": (config(max_position_embeddings="x"), "must be a positive integer;"),
    "RoPE without a base": (config(rope_theta=0), "rope_theta must be a positive number; got 0"),
    "an end by a word": (config(eos_token_id="x"), "eos_token_id must be an id or a list of ids"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_what_is_wrong_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = MEMBERS[name]
    write_random_model(tmp_path)
    spoil(tmp_path)
    assert call("generate", "--model", tmp_path, "--prompt", "x") == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("mlx-qlora: ") and not out, err
