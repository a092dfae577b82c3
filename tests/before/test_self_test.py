"""The self-test finds and names what is wrong: a kernel, a run, the process that it is in."""

import getpass
import io
import json
import platform
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from support.tiny_folder import write_random_model

import mlx_qlora as mq
from mlx_qlora import measured
from mlx_qlora.before import kernels, self_test
from mlx_qlora.before.doctor import Finding
from mlx_qlora.cli import main
from mlx_qlora.config import RunConfig, to_dict
from mlx_qlora.cpu import attention as cpu_attention
from mlx_qlora.folders import user_cache
from mlx_qlora.model import dropout, swiglu
from mlx_qlora.model.rope import Rope
from mlx_qlora.train import loop, loss
from mlx_qlora.train.optim import AdamW


def wrong_for_one_length(real):
    """Attention without its mask, for documents of 33 positions."""

    def attend(q, k, v, *, scale, mask):
        return real(q, k, v, scale=scale, mask=None if q.shape[2] == 33 else mask)

    return attend


def half_a_gradient(real):
    return lambda x, *rest: real((x + mx.stop_gradient(x)) / 2, *rest)


def last_doubled(real):
    def backward(*arguments):
        dq, dk, dv = real(*arguments)
        return dq, dk, dv * 1.001

    return backward


# Where a kernel is planted, what is put there, and how the self-test names it.
PLANTED = {
    "packed product": (
        *(mx, "quantized_matmul"),
        lambda real: (
            lambda *a, transpose, **how: (
                real(*a, transpose=True, **how) * 1.001
                if transpose
                else real(*a, transpose=False, **how)
            )
        ),
        "matmul, float32: quantized, 96 x 4 bits by 64",
    ),
    "packed product back": (
        *(mx, "quantized_matmul"),
        lambda real: (
            lambda *a, transpose, **how: (
                real(*a, transpose=transpose, **how) * (1 if transpose else 0.999)
            )
        ),
        "matmul, float32: quantized, 1 x 4 bits by 32",
    ),
    "dequantising": (
        *(mx, "dequantize"),
        lambda real: lambda *a, **how: real(*a, **how) * 1.001,
        "matmul, float32: dequantize, 96 x 8 bits by 64",
    ),
    "quantising": (
        *(mx, "quantize"),
        lambda real: lambda w, **how: real(mx.roll(w, 1, 1), **how),
        "matmul, float32: packing, 4 bits by 32",
    ),
    "attention": (
        *(mx.fast, "scaled_dot_product_attention", wrong_for_one_length),
        "attention, bfloat16: 3 x 33 positions, heads of 128",
    ),
    "attention's gradient": (
        *(cpu_attention, "backward", last_doubled),
        "attention, float32: 3 x 1 positions, heads of 128",
    ),
    "RoPE with offsets": (
        *(mx.fast, "rope"),
        lambda real: lambda x, *a, offset, **how: real(x, *a, offset=offset * 0, **how),
        "RoPE, bfloat16: heads of 64",
    ),
    "RoPE's gradient": (*(Rope, "rotate", half_a_gradient), "RoPE, float32: heads of 128"),
    "RMSNorm's gradient": (
        *(mx.fast, "rms_norm", half_a_gradient),
        "elementwise, bfloat16: RMSNorm",
    ),
    "SwiGLU's gradient": (
        *(swiglu, "_backward"),
        lambda real: lambda *a: [x * 1.001 for x in real(*a)],
        "elementwise, float32: SwiGLU",
    ),
    "scatter": (*(kernels, "taken", half_a_gradient), "elementwise, float32: gather"),
    "cross-entropy": (
        *(loss, "exp"),
        lambda real: lambda x: real(x * 1.001),
        "loss, float32: 33 tokens",
    ),
    "dropout": (
        *(dropout, "_rounds"),
        lambda real: lambda words: real(words ^ 1),
        "dropout, bfloat16: 99 x 999 bits, linear by linear",
    ),
    "an exception": (
        *(mx.fast, "rms_norm"),
        lambda real: lambda *a: mx.zeros((2,)) + mx.zeros((3,)),
        "elementwise, float32: ValueError",
    ),
}


@pytest.fixture
def few_lengths(monkeypatch):
    monkeypatch.setattr(kernels, "LENGTHS", (1, 8, 33, 1025))
    yield
    dropout._column_words.cache_clear()  # which a wrong kernel may have made


@pytest.mark.parametrize("planted", PLANTED)
def test_a_wrong_kernel_is_found_and_named(monkeypatch, few_lengths, planted):
    owner, attribute, plant, named = PLANTED[planted]
    name, dtype, case = re.split(", |: ", named, maxsplit=2)
    monkeypatch.setattr(kernels, "KERNELS", {name: kernels.KERNELS[name]})
    if planted == "RoPE's gradient":  # a method, whose first argument is not x
        real = Rope.rotate
        monkeypatch.setattr(Rope, "rotate", lambda self, x, a: plant(lambda x: real(self, x, a))(x))
    elif planted == "scatter":
        monkeypatch.setattr(kernels, "taken", lambda x, rows: plant(lambda x: x[rows])(x))
    else:
        monkeypatch.setattr(owner, attribute, plant(getattr(owner, attribute)))
    found = {finding.text.partition(":")[0]: finding for finding in kernels.kernels()}
    assert found[dtype].state == "fail" and found[dtype].name == name
    shown = found[dtype].text.replace("; ", "\n").splitlines()
    assert any(case in line for line in shown), found[dtype].text
    if planted == "attention":  # no other length is called wrong
        assert "wrong in 4:" in found[dtype].text and found["float32"].state == "pass"


def test_right_kernels_pass(few_lengths):
    found = [*kernels.kernels()]
    assert len(found) == 2 * len(kernels.KERNELS)
    assert [f for f in found if f.state != "pass"] == []


def noisy(real):
    random = np.random.default_rng()  # without a seed

    def update(self, grads, *rest):
        grads = {name: g + mx.array(1e-4 * random.random(), g.dtype) for name, g in grads.items()}
        return real(self, grads, *rest)

    return update


WRONG_RUNS = {
    "float32: loss 6": (
        AdamW,
        "update",
        lambda real: lambda self, g, n, rate, *rest: real(self, g, n, rate * 1.01, *rest),
    ),
    "float32, again: other bits": (AdamW, "update", noisy),
    "float32, from step 10: other bits": (
        loop,
        "load_tensors",
        lambda real: (
            lambda path, model, optimizer, n: (
                real(path, model, optimizer, n),
                setattr(optimizer, "square", optimizer.square * 1.0001),
            )
        ),
    ),
}


@pytest.mark.parametrize("said", WRONG_RUNS)
def test_a_wrong_run_is_found_and_named(monkeypatch, said):
    owner, attribute, plant = WRONG_RUNS[said]
    monkeypatch.setattr(self_test, "ALLOWED", {"float32": 1e-4})
    monkeypatch.setattr(owner, attribute, plant(getattr(owner, attribute)))
    found = [*self_test.steps()]
    assert len(found) == 3
    assert any(f.state == "fail" and f.text.startswith(said) for f in found), found


# ---- the command


def whole(tmp_path, **how):
    out = io.StringIO()
    console = Console(file=out, width=200)
    result = mq.self_test("smollm2-135m", tmp_path / "mine.md", seconds=0.2, console=console, **how)
    return result, out.getvalue()


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine(tmp_path):
    result, printed = whole(tmp_path)
    states = {f["name"]: set[str]() for f in result["findings"]}
    for finding in result["findings"]:
        states[finding["name"]].add(finding["state"])
    assert result["ok"] and "fail" not in printed
    for name in (*kernels.KERNELS, "20 steps"):
        assert states[name] == {"ok", "pass"} if name == "matmul" else {"pass"}
    assert states["one layer"] <= {"ok", "pass", "slower", "larger"}
    assert "smollm2-135m, resident" in printed
    report = json.loads((tmp_path / "mine.json").read_text())
    table = (tmp_path / "mine.md").read_text()
    assert [f["name"] for f in report["findings"]] == [f["name"] for f in result["findings"]]
    assert table.count("\n| ") >= len(result["findings"])
    for text in (table, (tmp_path / "mine.json").read_text()):
        private = str(Path.home()), platform.node(), str(tmp_path), f"/{getpass.getuser()}/"
        assert not [word for word in private if word in text]
    assert not (user_cache() / "machine.json").exists()


def test_what_a_report_must_not_say(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/Jo Li"))
    assert self_test.anonymous("in /Users/Jo Li/models/x y/z.gguf") == "in x y/z.gguf"
    for path in ("../jo/acme/llama", "/Volumes/Jo's Disk/llama", "file:///mnt/jo/llama"):
        assert self_test.anonymous(f"{path}, 4 GFLOP/s") == "llama, 4 GFLOP/s"
    node = platform.node()
    text = f"/home/ann/x/libblas.so on {node}; ~/y/z.py, 4096 x 4096, https://a.org/b, 3/4 of it"
    assert self_test.anonymous(text) == (
        "libblas.so on computer; z.py, 4096 x 4096, https://a.org/b, 3/4 of it"
    )


def test_a_part_that_breaks_fails_and_the_next_one_is_done(monkeypatch):
    def broken():
        yield Finding("pass", "a", "")
        raise RuntimeError("kernel panic")

    monkeypatch.setattr(self_test, "kernels", broken)
    monkeypatch.setattr(self_test, "steps", lambda: [Finding("pass", "b", "")])
    found = [*self_test.lines(to_dict(RunConfig()), ["kernels", "steps"], 1.0, False)]
    text = "RuntimeError: kernel panic"
    assert [(f.state, f.name) for f in found] == [("pass", "a"), ("fail", "kernels"), ("pass", "b")]
    assert found[1].text == text


def test_a_process_that_dies_is_named(monkeypatch, tmp_path, capsys):
    fake = tmp_path / "python"
    line = json.dumps({"state": "pass", "name": "matmul", "text": "all"})
    said = f"echo noise of others\necho 'self-test:{line}'\n"
    fake.write_text(f"#!/bin/sh\n{said}echo boom >&2\nkill -ILL $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert main(["doctor", "--self-test"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.split() == ["pass", "matmul", "all"]
    assert last.startswith("fail     process      it ended early: SIGILL boom")
    assert "MLX_QLORA_BLAS" in last
    fake.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    assert main(["doctor", "--self-test", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_report_goes_with_the_self_test(capsys):
    assert main(["doctor", "--report", "x"]) == 2
    assert "--report needs --self-test" in capsys.readouterr().err


def test_tune_measures_stores_and_says_what_holds(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = write_random_model(tmp_path / "model")
    real = self_test.lines  # here, and with little time
    monkeypatch.setattr(
        self_test, "_from_child", lambda words: real(words[0], words[1], 0.05, words[3])
    )
    assert main(["doctor", "--tune", "--model", str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [f["name"] for f in found] == ["one layer"] * 4 + ["settings"]
    assert "model.frozen_matmul=" in found[-1]["text"]
    (seconds,) = measured.stored().values()
    assert seconds.keys() == {"float32"}
    assert seconds["float32"].keys() == {"dequantize", "resident"}
