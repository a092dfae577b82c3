"""A user of the hub's stand-in: a home of their own, and our commands on it."""

import json
import os
import re
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from support.hub_server import Hub

from mlx_qlora.errors import SourceError
from mlx_qlora.model.hub import ModelFiles

ROOT = Path(__file__).parents[2]
REPO = "some-org/Tiny-Llama"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "model.safetensors": WEIGHTS,
}

# Resolves in a process of its own, because huggingface_hub reads its environment on import.
CHILD = """
import sys, json, dataclasses
from mlx_qlora.errors import SourceError
from mlx_qlora.model.hub import resolve
{before}
try:
    files = resolve(*json.loads(sys.argv[1]))
except SourceError as error:
    print("\\nERROR " + json.dumps(str(error)))
else:
    print("\\nFILES " + json.dumps(dataclasses.asdict(files), default=str))
"""


@pytest.fixture
def hub():
    hub = Hub(repos={REPO: dict(MODEL)})
    server = hub.start()
    yield hub
    hub.release.set()
    server.shutdown()
    server.server_close()


def environ_of(home: Path, url: str, **environ: str) -> dict[str, str]:
    """A user's environment, without what this machine's has to say of the hub.

    Without xet the client speaks LFS, which the stand-ins know.
    """
    kept = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|.*(?i:proxy)", k)}
    kept |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}
    return kept | {"HF_HUB_DISABLE_TELEMETRY": "1", **environ}


class Away:
    """A user's machine: a home, an environment, and calls of `resolve` on it."""

    def __init__(self, home, hub):
        self.home, self.hub = home, hub
        self.cache = home / "hub"

    def environ(self, **environ):
        return environ_of(self.home, self.hub.url, **environ)

    def start(self, source, revision=None, before="", weights=True, **environ):
        code = CHILD.format(before=before)
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, json.dumps([source, revision, weights])],
            env=self.environ(**environ),
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def resolve(self, *args, **environ):
        out, err = self.start(*args, **environ).communicate(timeout=30)
        found = re.search(r"^(FILES|ERROR) (.*)$", out, re.MULTILINE)
        assert found, err
        if found[1] == "ERROR":
            raise SourceError(json.loads(found[2]))
        files = json.loads(found[2])
        files |= {"path": Path(files["path"]), "left_on_hub": tuple(files["left_on_hub"])}
        return ModelFiles(**files)

    def run(self, *words, **environ):
        """One command of ours on that machine; (exit code, its JSON, what it said)."""
        done = subprocess.run(
            [sys.executable, "-m", "mlx_qlora", *map(str, words), "--json"],
            env=self.environ(**environ),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout), done.stderr

    def refused(self, *args, **environ):
        with pytest.raises(SourceError) as error:
            self.resolve(*args, **environ)
        shown = traceback.format_exception(error.value)
        assert "The above exception" not in "".join(shown), "no traceback of the client above it"
        return str(error.value)


@pytest.fixture
def away(tmp_path, hub):
    return Away(tmp_path, hub)


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
