"""What the machine is, and which BLAS multiplies on Linux."""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.gpu_route import PACKED, ROUTES, routes
from support.gradients import gap, packed_batch
from support.models import load_folder, randomise_lora

from mlx_qlora import device
from mlx_qlora.cpu import blas, streams
from mlx_qlora.device import CPU, CUDA, METAL, Machine, compute_dtype, facts, frozen_matmul
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.engine import Engine
from mlx_qlora.tree import flat

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
    assert no_name.startswith("reference BLAS (slow; pip install scipy-openblas32)")
    assert slow > 5 * fast, (slow, fast)
    # Sorted imports put mlx first; Python has then bound its symbols already.
    late, late_name = fresh(
        "import mlx.core as mx\nmx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))" + MATMUL_SECONDS
    )
    assert late_name == name
    assert slow > 5 * late, (slow, late)


@pytest.mark.skipif(not ON_LINUX, reason="elsewhere MLX's own BLAS multiplies")
def test_the_packaged_blas_has_kernels_for_every_cpu() -> None:
    """One for a single kind of CPU ends the process on the next: Illegal instruction."""
    name = fresh("import json, mlx_qlora.device as d; print(json.dumps(d.openblas))")
    config = ctypes.CDLL(name).scipy_openblas_get_config
    config.restype = ctypes.c_char_p
    assert b"DYNAMIC_ARCH" in config()


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
            "times slower; run: pip install scipy-openblas32",
            "UserWarning",
        ]
    ]
    assert fresh(WARNINGS, blas=str(path)) == (told if ON_LINUX else [])  # others choose no BLAS


@pytest.mark.parametrize("blas", [None, "none"])
def test_importing_warns_of_nothing_where_the_choice_is_clear(blas: str | None) -> None:
    assert fresh(WARNINGS, blas) == []


@pytest.mark.skipif(not ON_LINUX, reason="elsewhere MLX's own BLAS multiplies")
def test_an_environment_may_have_spaces_in_its_path(tmp_path: Path) -> None:
    """The maps of a process end in a path."""
    import mlx.core
    import scipy_openblas32

    place = tmp_path / "my venv"
    place.mkdir()
    for package in (Path(mlx.core.__file__).parent, Path(scipy_openblas32.__file__).parent):
        (place / package.name).symlink_to(package)
    script = f"""
import sys; sys.path.insert(0, {str(place)!r})
import json, mlx_qlora.device as d
print(json.dumps(d.openblas))"""
    assert fresh(script) == str(place / "scipy_openblas32" / "lib" / "libscipy_openblas.so")


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


FOREIGN = {"mlx_lm", "torch", "transformers", "peft", "gguf"}
HEAVY = {*FOREIGN, "mlx", "numpy", "tokenizers", "tiktoken", "sentencepiece", "jinja2"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        # On Linux MLX is there from the start: its BLAS is replaced.
        ("import mlx_qlora", HEAVY - {"mlx"}),
        ("import mlx_qlora.device, mlx_qlora.errors", HEAVY - {"mlx"}),
        ("import mlx_qlora.data.tokenizer", HEAVY - {"mlx", "numpy"}),
        ("import mlx_qlora.model.hub", {"huggingface_hub"}),
        ("import mlx_qlora.model.weights, mlx_qlora.adapters.export", FOREIGN),
        ("from mlx_qlora import load, loss_and_grads, fine_tune, WeightsError", FOREIGN),
    ],
)
def test_importing_loads_no_library_before_it_is_needed(statement: str, absent: set[str]) -> None:
    loaded = fresh(f"""
import json, sys
{statement}
print(json.dumps(sorted({{n.partition(".")[0] for n, m in sys.modules.items() if m}})))
""")
    assert "mlx_qlora" in loaded and absent.isdisjoint(loaded)


# ---- choices -----------------------------------------------------------------------------------


def test_the_device_decides_dtype_and_strategy() -> None:
    chosen = device.current()
    assert (device._found() == CPU) == (mx.default_device() == mx.Device(mx.cpu))
    for here, dtype in ((CPU, mx.float32), (METAL, mx.bfloat16), (CUDA, mx.bfloat16)):
        with device.use(here):
            assert compute_dtype("auto") == dtype and facts()["device"] == here.kind
            assert (device.this_machine().device, device.machine(None).device) == (here, here)
    assert device.current() == chosen


@pytest.mark.parametrize(
    ("here", "dense_bytes", "strategy"),
    [
        (CPU, 4e9, "resident"),
        (CPU, 5e9, "dequantize"),
        (CUDA, 4e9, "resident"),
        (CUDA, 5e9, "dequantize"),
        (METAL, 1e9, "quantized"),
    ],
)
def test_a_dequantised_copy_is_kept_where_it_helps_and_fits(here, dense_bytes, strategy) -> None:
    machine = Machine("another", here, 10 * 1000**3, cores=1)
    assert frozen_matmul("auto", int(dense_bytes), machine) == strategy


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
    monkeypatch.setattr(device, "_processes_here", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: of_machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(allowed), raising=False)
    device.share_cores(processes)
    with device.use(CPU):
        assert device.cores() == share
    with device.use(METAL):
        assert device.cores() == 1


def test_this_machine_is_asked_where_no_other_is_named() -> None:
    for here, fits, too_large in (
        (CPU, "resident", "dequantize"),
        (METAL, "quantized", "quantized"),
    ):
        with device.use(here):
            assert (frozen_matmul("auto"), frozen_matmul("auto", 1 << 60)) == (fits, too_large)


def test_a_named_choice_is_taken_as_it_is() -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert compute_dtype(name) == getattr(mx, name)
    for name in ("quantized", "dequantize", "resident"):
        assert frozen_matmul(name) == name


PROCESS = """
import json
import numpy as np
from mlx_qlora.device import process_memory_bytes
before = process_memory_bytes()
array = np.ones(80_000_000, np.uint8)
del array
print(json.dumps([before, process_memory_bytes()]))
"""


def test_the_peak_of_a_process_is_its_own_and_counts_what_was_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = np.ones(200_000_000, np.uint8)  # which a process that this one starts has not had
    before, after = fresh(PROCESS)
    assert 5e6 < before < 150e6 and 75e6 < after - before < 85e6
    del ours
    here = device.process_memory_bytes()
    with monkeypatch.context() as patch:  # as on macOS
        patch.setattr(Path, "read_text", lambda *_, **__: "")
        assert device.process_memory_bytes() == pytest.approx(here, rel=0.05)
        patch.setattr(sys, "platform", "darwin")
        assert device.process_memory_bytes() == pytest.approx(here / 1024, rel=0.05)


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


# ---- another device's route --------------------------------------------------------------------


def gradients_of(model: LlamaForCausalLM) -> tuple[float, int, Any]:
    """Loss, tokens and gradients of a packed batch, at the choices that hold."""
    batch = packed_batch([[20, 9, 3], [30, 1], [17, 8, 5], [12, 12], [31], [2, 25]])
    add_lora(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2), seed=5)
    randomise_lora(model)
    engine = Engine(model, "auto", device.current().compiles)
    loss, n, grads = engine(flat(model.trainable_parameters()), batch, mx.random.key(3))
    mx.eval(loss, grads)
    return loss.item(), n, grads


@pytest.fixture(scope="module")
def on_a_cpu(hf_tiny) -> tuple[float, int, Any]:
    with device.use(CPU):
        return gradients_of(load_folder(hf_tiny[1], PACKED, "resident"))


@routes(*ROUTES)
def test_a_gpu_s_route_has_the_gradients_of_a_cpu_s(
    hf_tiny, on_a_cpu, monkeypatch, gpu_route
) -> None:
    """Fused attention, packed products, compiled, one stream, a GPU's chunks and padding."""
    used, fused, packed = set(), mx.fast.scaled_dot_product_attention, mx.quantized_matmul

    def counted(name: str, real: Any) -> Any:
        return lambda *args, **settings: used.add(name) or real(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "scaled_dot_product_attention", counted("fused", fused))
        patch.setattr(mx, "quantized_matmul", counted("packed", packed))
        loss, n, grads = gradients_of(gpu_route.load(hf_tiny[1]))
    assert used == ({"fused", "packed"} if gpu_route.matmul == "quantized" else {"fused"})
    wanted_loss, wanted_n, wanted = on_a_cpu
    assert n == wanted_n and loss == pytest.approx(wanted_loss, rel=gpu_route.tolerance.loss)
    # A route that was not taken would give 0.
    assert 0 < gap(wanted, grads) < gpu_route.tolerance.gradient


# ---- beside other processes ----------------------------------------------------------------------


@pytest.mark.parametrize(("others", "left"), [(0.0, 4), (0.4, 4), (0.6, 3), (2.0, 2), (2.5, 2)])
def test_cores_that_other_processes_take_are_counted(
    others: float, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four cores for a second, in which this process keeps one and a half busy."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    stat, own = tmp_path / "stat", [700.0]
    monkeypatch.setattr(streams, "STAT", str(stat))
    monkeypatch.setattr(streams, "_since", ((0.0, 0.0, 0.0), 0.0))
    monkeypatch.setattr(os, "sysconf", lambda _: 1)
    monkeypatch.setattr(time, "process_time", lambda: own[0])
    for busy in (0, 150 + round(100 * others)):
        stat.write_text(f"cpu  {1000 + busy} 0 10 {9000 + 400 * (busy > 0) - busy} 5 0 3 0 0 0\n")
        seen = streams.cores_left()
        own[0] += 150
    assert seen == left
    stat.write_text(stat.read_text().replace(" 5 0 3 ", " 6 0 3 "))  # a tick tells nothing
    assert streams.cores_left() == left


@pytest.mark.parametrize("text", ["", "cpu", "cpu a b c d e", "intr 1 2"])
def test_where_nobody_counts_all_cores_are_there(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(streams, "STAT", str(stat))
    assert streams.cores_left() == os.cpu_count()
    stat.write_text(text)
    assert streams.cores_left() == os.cpu_count()


def test_a_matmul_has_no_more_threads_than_cores_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(blas, "threads", lambda n: asked.append(n) or contextlib.nullcontext())
    monkeypatch.setattr(device, "cores", lambda: 4)
    for left, shards, n in ((4, 1, 4), (1, 1, 1), (3, 2, 2), (1, 2, 1), (4, 4, 1)):
        monkeypatch.setattr(streams, "cores_left", lambda left=left: left)
        with streams.cores_shared(range(shards)):
            assert asked[-1] == n
    # What others took is known of the time since this was last asked: long ago is no answer.
    monkeypatch.setattr(streams, "cores_left", lambda: asked.append(-1) or 4)
    with streams.cores_shared(range(4)):
        assert asked[-2:] == [-1, 1]


def test_the_number_of_threads_changes_no_bit() -> None:
    draw = np.random.default_rng(0)
    for M, K, N in ((1, 576, 1536), (40, 576, 192), (128, 1536, 576), (333, 64, 49)):
        x, W = (mx.array(draw.standard_normal(n), mx.float32) for n in ((M, K), (N, K)))
        products = []
        for n in (1, 2):
            with blas.threads(n):
                y = x @ W.T
                products.append([np.array(each) for each in (y, y @ W, y.T @ x)])
        assert all((a == b).all() for a, b in zip(*products))
