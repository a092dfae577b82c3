"""What the machine is, and which BLAS multiplies on Linux."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_qlora import device as room
from mlx_qlora.device import Device, compute_dtype, facts, frozen_matmul
from mlx_qlora.errors import ConfigError

ON_LINUX = sys.platform.startswith("linux")


def fresh(script: str, blas: str | None = None) -> Any:
    """What `script` prints as JSON in a new process, where MLX_QLORA_BLAS is `blas`."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_QLORA_BLAS"}
    if blas is not None:
        environment["MLX_QLORA_BLAS"] = blas
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(done.stdout)


# ---- BLAS --------------------------------------------------------------------------------------

MATMUL_SECONDS = """
import json, time, warnings
warnings.simplefilter("error")
import mlx_qlora
import mlx.core as mx
from mlx_qlora.device import facts
a = mx.random.normal((512, 512))
mx.eval(a @ a)
times = []
for _ in range(30 if "reference" not in facts()["blas"] else 5):
    start = time.perf_counter()
    mx.eval(a @ a)
    times.append(time.perf_counter() - start)
print(json.dumps([min(times), facts()["blas"]]))
"""


# What makes matmuls slow is the reference BLAS of MLX's wheel for Linux CPUs, which no Mac and no
# CUDA wheel has.
@pytest.mark.skipif(
    not ON_LINUX or mx.default_device() != mx.Device(mx.cpu), reason="MLX's own BLAS is fast here"
)
def test_importing_the_package_makes_matmuls_at_least_5_times_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The factor is some 70; some 30 with one thread, which a busy machine disturbs less."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    fast, name = fresh(MATMUL_SECONDS)
    slow, no_name = fresh(MATMUL_SECONDS, blas="none")
    assert "openblas" in name.lower()
    assert no_name.startswith("reference BLAS (slow; pip install cmeel-openblas)")
    assert slow > 5 * fast, (slow, fast)
    # Sorted imports put mlx first; Python has then bound its symbols already.
    late, late_name = fresh(
        "import mlx.core as mx\nmx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))" + MATMUL_SECONDS
    )
    assert late_name == name
    assert slow > 5 * late, (slow, late)


WARNINGS = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mlx_qlora
    import mlx_qlora.model.llama
    from mlx_qlora.cpu.blas import load_fast_blas
print(json.dumps([[str(w.message), w.category.__name__] for w in caught]))
"""


@pytest.mark.parametrize("kind", ["missing", "text", "another library"])
def test_a_blas_that_cannot_be_loaded_warns_once_with_the_remedy(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "libblas.so"
    if kind == "text":
        path.write_text("not a library")
    elif kind == "another library":  # loads, but multiplies nothing
        path = Path(str(sys.modules["_ctypes"].__file__))
    told = [
        [
            f"MLX_QLORA_BLAS={path} could not be loaded: matmuls on this CPU will be some 70 "
            "times slower. Remedy: pip install cmeel-openblas",
            "UserWarning",
        ]
    ]
    assert fresh(WARNINGS, blas=str(path)) == (told if ON_LINUX else [])  # others choose no BLAS


@pytest.mark.parametrize("blas", [None, "none"])
def test_importing_warns_of_nothing_where_the_choice_is_clear(blas: str | None) -> None:
    assert fresh(WARNINGS, blas) == []


def test_a_library_that_is_named_is_the_one_that_is_loaded() -> None:
    script = """
import json, pathlib, mlx_qlora
from mlx_qlora.cpu.blas import load_fast_blas
first = load_fast_blas()
maps = pathlib.Path("/proc/self/maps")
mapped = maps.is_file() and "openblas" in maps.read_text()
print(json.dumps([first, load_fast_blas(), mapped]))
"""
    default, again, mapped = fresh(script)
    assert default == again and mapped == bool(default) == ON_LINUX
    assert fresh(script, blas=default) == [default, default, ON_LINUX]
    assert fresh(script, blas="none") == [None, None, False]


# ---- importing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["mlx_qlora", "mlx_qlora.device", "mlx_qlora.errors"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    script = f"""
import json, sys
import {module}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    loaded = fresh(script)
    assert "mlx_qlora" in loaded
    heavy = {"mlx", "mlx_lm", "torch", "transformers", "peft", "numpy", "tokenizers", "gguf"}
    assert heavy.isdisjoint(loaded)


def test_the_model_needs_no_torch_transformers_or_mlx_lm() -> None:
    script = """
import json, sys
import mlx_qlora
mlx_qlora.load, mlx_qlora.loss_and_grads, mlx_qlora.fine_tune, mlx_qlora.WeightsError
import mlx_qlora.model.weights
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    loaded = fresh(script)
    assert "mlx" in loaded
    assert {"mlx_lm", "torch", "transformers", "peft", "gguf"}.isdisjoint(loaded)


# ---- choices -----------------------------------------------------------------------------------


def test_the_device_decides_dtype_and_strategy() -> None:
    chosen = room.current()
    assert chosen in (
        Device("cpu", mx.float32),
        Device("metal", mx.bfloat16),
        Device("cuda", mx.bfloat16),
    )
    assert (chosen.kind == "cpu") == (mx.default_device() == mx.Device(mx.cpu))
    assert compute_dtype("auto") == chosen.compute_dtype


@pytest.mark.parametrize(
    ("device", "dense_bytes", "strategy"),
    [
        ("cpu", 4e9, "resident"),
        ("cpu", 5e9, "dequantize"),
        ("cuda", 4e9, "resident"),
        ("cuda", 5e9, "dequantize"),
        ("metal", 1e9, "quantized"),
    ],
)
def test_a_dequantised_copy_is_kept_where_it_helps_and_fits(device, dense_bytes, strategy) -> None:
    assert frozen_matmul("auto", int(dense_bytes), device, 10 * 1000**3) == strategy


@pytest.mark.parametrize(
    ("of_machine", "allowed", "processes", "share"),
    [
        (8, 8, 1, 8),
        (8, 8, 2, 4),
        (8, 3, 2, 3),  # a launcher has bound each process to cores of its own
        (8, 8, 9, 1),
        (None, 2, 2, 1),  # a system that does not say how many there are
    ],
)
def test_processes_of_one_machine_share_its_cores(
    monkeypatch, of_machine, allowed, processes, share
) -> None:
    monkeypatch.setattr(room, "current", lambda: Device("cpu", mx.float32))
    monkeypatch.setattr(room, "_processes_here", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: of_machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(allowed), raising=False)
    room.share_cores(processes)
    assert room.cores() == share
    monkeypatch.setattr(room, "current", lambda: Device("metal", mx.bfloat16))
    assert room.cores() == 1


def test_this_machine_is_asked_where_no_other_is_named() -> None:
    assert frozen_matmul("auto") == ("quantized" if room.current().kind == "metal" else "resident")
    if room.current().kind != "metal":
        assert frozen_matmul("auto", 1 << 60) == "dequantize"


def test_a_named_choice_is_taken_as_it_is() -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert compute_dtype(name) == getattr(mx, name)
    for name in ("quantized", "dequantize", "resident"):
        assert frozen_matmul(name) == name


def test_an_unknown_choice_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        compute_dtype("fp16")
    assert str(raised.value) == (
        "model.dtype must be one of auto, float32, bfloat16, float16; got 'fp16'"
    )
    with pytest.raises(ConfigError) as raised:
        frozen_matmul("fast")
    legal = "auto, quantized, dequantize, resident"
    assert str(raised.value) == f"model.frozen_matmul must be one of {legal}; got 'fast'"


def test_facts_are_plain_data_with_these_keys() -> None:
    known = facts()
    kinds = {
        "chip": str, "cores": int, "memory_bytes": int, "working_set_bytes": int, "system": str,
        "python": str, "mlx": str, "device": str, "compute_dtype": str,
        "blas": str,
    }  # fmt: skip
    assert {key: type(value) for key, value in known.items()} == kinds
    assert json.loads(json.dumps(known)) == known
    assert all(known.values())  # nothing empty, nothing zero
    assert known["mlx"] == importlib.metadata.version("mlx")
    assert known["python"] == ".".join(map(str, sys.version_info[:3]))
    assert known["compute_dtype"] in ("float32", "bfloat16")
    assert 2**28 < known["working_set_bytes"] <= known["memory_bytes"] < 2**45
