"""The command line in this process and in others, as tests of it want it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_qlora.cli import main

ROOT = Path(__file__).parents[2]
# A run that takes a second.
QUICK = ["model.bits=null", "training.max_steps=2", "training.gradient_accumulation_steps=1"]
QUICK += ["training.warmup_steps=1", "lora.r=2", "data.max_length=64"]
QUICK += ["data.split=[0.8, 0.1, 0.1]"]


def call(*words: Any) -> int:
    """The exit code of a command, argparse's own included."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def printed_json(capsys: Any) -> dict[str, Any]:
    """The one JSON object on standard output."""
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    return json.loads(out)


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs `python *words` in the checkout."""
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def shell(line: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of bash, in which `$us` is the command line, with `given` as standard input."""
    words, env = ["bash", "-c", line], {**os.environ, "us": f"{sys.executable} -m mlx_qlora"}
    return subprocess.run(words, env=env, input=given, capture_output=True, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    """Path below a folder -> bytes, of every file in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
