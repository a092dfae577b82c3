"""A disk that fails at one call costs nothing: a sample of `benchmarks/faults.py`."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.command_line import ROOT

COMMANDS = "train", "sweep", "merge", "mlx", "push"  # of each kind one


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="the failing disk is a library for Linux, and needs a C compiler",
)
def test_a_sample_of_faults_in_commands_that_write():
    words = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--sample", "2"]
    words += ["--only", ",".join(COMMANDS)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == 0 and tuple(result["counts"]) == COMMANDS
    tried = {name: count["faults"] for name, count in result["counts"].items()}
    assert tried.pop("push") == 0, "push writes nothing on this disk"
    assert min(tried.values()) >= 1
    ends = [count.get("ended in a message", 0) for count in result["counts"].values()]
    assert sum(ends) >= len(COMMANDS) - 1, "most calls that fail end the command"
