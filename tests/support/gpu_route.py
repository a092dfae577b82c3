"""The routes that a GPU takes, run on a CPU, and a checker of what a GPU cannot do or punishes.

`gpu_route` (conftest.py) takes a route: the choices of a Metal or a CUDA machine hold (fused
attention, packed products, compiled, a GPU's chunks and padding, one stream), and MLX computes on
its CPU stream. `Contract` wraps MLX's functions meanwhile and collects what would fail or be slow
on the device itself. It knows MLX's functions and the package's public ones, not its internals.

What a CPU does differently, and no test should take for a GPU's behaviour:

- 16-bit products and `mx.quantized_matmul` are some 50 times slower: models are tiny.
- MLX's CPU kernel of packed products sums 16-bit numbers in 16 bits where Metal's and CUDA's sum in
  float32; a loss came out 23 % wrong. The checker lets it sum in float32.
- `mx.compile` of a CPU calls a C++ compiler; where there is none, nothing is fused.
- The gradient of fused attention is always decomposed: which kernel a GPU would take is checked by
  its rules alone.
"""

import dataclasses
import functools
import io
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.models import load_folder

from mlx_qlora import device
from mlx_qlora.device import CUDA, METAL, Device, Machine
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.llama import LlamaForCausalLM, LlamaModel
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.memory import Footprint
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.step import Step

# ---- routes --------------------------------------------------------------------------------------

PACKED = QuantConfig(4, 32)


@dataclass(frozen=True)
class Tolerance:
    """How far results in a dtype may be from exact ones, relative to the largest of them."""

    product: float  # of one operation
    loss: float
    gradient: float


TOLERANCES = {
    "float32": Tolerance(5e-6, 2e-6, 1e-5),
    "float16": Tolerance(4e-3, 1e-3, 2e-2),  # 10 bits of mantissa
    "bfloat16": Tolerance(3e-2, 1e-2, 1e-1),  # 7 bits
}


@dataclass(frozen=True)
class Route:
    """The choices of a device, and how frozen matrices are multiplied there."""

    device: Device
    matmul: str

    @property
    def dtype(self) -> mx.Dtype:
        return self.device.compute_dtype

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.device.dtype]

    @property
    def machine(self) -> Machine:
        """The slowest of its kind, for which a watchdog is tightest."""
        return device.machine({"metal": "m1-8", "cuda": "a100-40"}[self.device.kind])

    def load(self, folder: Any, quantize: QuantConfig | None = PACKED) -> LlamaForCausalLM:
        """A model as this route has it in memory."""
        return load_folder(folder, quantize, self.matmul, self.dtype)

    @contextmanager
    def taken(self) -> Iterator["Route"]:
        """Within it the route's choices hold, and its contract, which is checked at the end."""
        with device.use(self.device), Contract(self).watching() as contract:
            yield self
        contract.check()


def _route(base: Device, dtype: str, matmul: str) -> Route:
    return Route(dataclasses.replace(base, dtype=dtype), matmul)


ROUTES = {
    "metal-float32": _route(METAL, "float32", "quantized"),
    "metal-float16": _route(METAL, "float16", "quantized"),
    "metal-bfloat16": _route(METAL, "bfloat16", "quantized"),
    "metal-bfloat16-dequantize": _route(METAL, "bfloat16", "dequantize"),
    "cuda-float32": _route(CUDA, "float32", "dequantize"),
    "cuda-float16": _route(CUDA, "float16", "dequantize"),
    "cuda-bfloat16": _route(CUDA, "bfloat16", "resident"),
}
EXACT = ["metal-float32", "cuda-float32"]  # whose results are a CPU's up to rounding
NARROW = [name for name in ROUTES if name not in EXACT]


@contextmanager
def no_route() -> Iterator[Route]:
    """The choices of the device that MLX computes on, in float32, and nothing is checked."""
    yield Route(dataclasses.replace(device.current(), dtype="float32"), "resident")


def routes(*names: str) -> pytest.MarkDecorator:
    """Runs a test on each of some routes, "none" among them; it takes the fixture `gpu_route`."""
    return pytest.mark.parametrize("gpu_route", names, indirect=True)


# ---- the contract --------------------------------------------------------------------------------

FEWEST_QUERIES = 9  # of an attention that Metal's fused kernels differentiate
CUDNN_MULTIPLE = 128  # of positions, for cuDNN to differentiate
MOST_MASKED = 512  # queries whose scores may be an array: a block of a window's attention
MOST_SHAPES = 64  # of the axis of positions, in one test
LONGEST_DISPATCH = 2.0  # seconds; macOS stops work that keeps the display waiting for longer
MOST_KEPT = 1.05  # times what the schedule counts
SYNCHRONISATIONS = {Step: 1, AdamW: 1, Engine: 0}  # per call, beside `mx.eval`
ON_CPU_ONLY = (
    *("cholesky", "cholesky_inv", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu", "lu_factor"),
    *("pinv", "qr", "solve", "solve_triangular", "svd", "tri_inv"),
)
OPERATOR_NAMES = "add sub mul truediv floordiv mod pow matmul neg getitem".split()
READS = (
    *("item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__"),
    *("__repr__", "__str__", "__format__", "__dlpack__"),
)
OPERATORS = [  # and methods that return arrays
    name
    for name, of_class in vars(mx.array).items()
    if callable(of_class)
    and (not name.startswith("_") or name.strip("_").removeprefix("r") in OPERATOR_NAMES)
    and name not in READS
]
PRODUCTS = ("matmul", "addmm", "quantized_matmul", "__matmul__")
HEAD = "mlx_qlora.train.loss"  # the only module that computes activations in float32
CAPPED = "attend_capped"  # and the only function: Gemma 2's scores, for which no kernel exists


@dataclass
class Call:
    """A call of the package within which host synchronisations are counted."""

    of: type
    places: list[str] = field(default_factory=list)


class Contract:
    """What a GPU cannot do, or punishes; `violations` says what was done, and where.

    - arrays of float64;
    - the factorisations of `mx.linalg`, but for those that name the CPU's stream;
    - attention that is differentiated with a causal array as its mask (T x T scores), with fewer
      than 9 queries and none (Metal refuses), or of lengths that cuDNN cannot differentiate;
    - float32 arrays of activations in a 16-bit model, outside of the head;
    - reading a result before `mx.eval` has waited for it, more than once in an optimiser step or at
      all in the engine;
    - more than 64 lengths of the axis of positions;
    - a product or an attention of more than 2 s at the planner's rate of the slowest machine;
    - more memory kept by a forward than its schedule counts.
    """

    def __init__(self, route: Route) -> None:
        self.route, self.machine = route, route.machine
        self.violations: list[str] = []
        self.shapes: set[int] = set()
        self._axes: set[int] = set()  # positions of the forward that is running
        self._narrowest = 0  # numbers of an activation for each position; 0: a float32 model
        self._call: Call | None = None
        self._schedule: tuple[Footprint, Any] | None = None
        self._memory_before: int | None = None
        self._weights_bytes = 0
        self._started: dict[int, tuple[Any, int]] = {}  # arrays that `mx.async_eval` was given
        self._n_started = self._n_finished = 0
        self._here = threading.local()  # how deep in a derivative, in an explicit CPU stream

    def check(self) -> None:
        """Raises an AssertionError if the contract was broken."""
        if len(self.shapes) > MOST_SHAPES:
            self._report(f"{len(self.shapes)} lengths of the axis of positions", "mlx_qlora")
        assert not self.violations, "a GPU's contract: " + "; ".join(self.violations)

    def _report(self, what: str, place: str | None = None) -> None:
        """Notes a violation, once for each place of the package; others' code is not judged."""
        place = place or _place()
        if place and f"{what} ({place})" not in self.violations:
            self.violations.append(f"{what} ({place})")

    # ---- wrapping ----

    @contextmanager
    def watching(self) -> Iterator["Contract"]:
        """Wraps MLX's functions and the package's calls."""
        with pytest.MonkeyPatch.context() as patch:
            self._wrap_mlx(patch)
            self._wrap_derivatives(patch)
            self._wrap_evaluation(patch)
            self._wrap_package(patch)
            yield self

    def _wrap_mlx(self, patch: pytest.MonkeyPatch) -> None:
        if mx.default_device() == mx.Device(mx.cpu):
            patch.setattr(mx, "quantized_matmul", _summed_in_float32(mx.quantized_matmul))
        for module in (mx, mx.fast, mx.linalg, mx.random):
            for name, real in list(vars(module).items()):
                is_function = type(real).__name__ == "nb_func" or name == "quantized_matmul"
                if is_function and not name.startswith("_"):
                    patch.setattr(module, name, self._observed(name, real))
        for name in OPERATORS:
            patch.setattr(mx.array, name, self._observed(name, vars(mx.array)[name]))
        for name in ON_CPU_ONLY:
            patch.setattr(mx.linalg, name, self._of_cpu(name, getattr(mx.linalg, name)))
        attention = mx.fast.scaled_dot_product_attention
        patch.setattr(mx.fast, "scaled_dot_product_attention", self._attention(attention))
        patch.setattr(mx, "stream", self._stream(mx.stream))

    def _observed(self, name: str, real: Callable) -> Callable:
        """A function whose results are looked at."""

        def call(*args: Any, **settings: Any) -> Any:
            results = real(*args, **settings)
            if type(results) is mx.array:
                self._look_at(results)
                if name in PRODUCTS:
                    self._product(args[name == "addmm"], results)
            elif isinstance(results, (tuple, list)):
                for _, result in tree_flatten(results):
                    if type(result) is mx.array:
                        self._look_at(result)
            return results

        return call

    def _of_cpu(self, name: str, real: Callable) -> Callable:
        def call(*args: Any, **settings: Any) -> Any:
            stream = settings.get("stream")
            if not _is_cpu(stream) and not getattr(self._here, "on_cpu", 0):
                self._report(f"mx.linalg.{name} without the CPU's stream")
            return real(*args, **settings)

        return call

    def _stream(self, real: Callable) -> Callable:
        @contextmanager
        def stream(where: Any) -> Iterator[None]:
            n, self._here.on_cpu = getattr(self._here, "on_cpu", 0), _is_cpu(where)
            try:
                with real(where):
                    yield
            finally:
                self._here.on_cpu = n

        return stream

    def _attention(self, real: Callable) -> Callable:
        def call(q: mx.array, k: mx.array, v: mx.array, **settings: Any) -> mx.array:
            T, L, mask = q.shape[2], k.shape[2], settings.get("mask")
            is_array = isinstance(mask, mx.array)
            if self._differentiates:
                if is_array and T >= FEWEST_QUERIES and (T > MOST_MASKED or _is_causal(mask)):
                    self._report("an array as the mask of a differentiated attention")
                elif not is_array and T < FEWEST_QUERIES:
                    self._report("a differentiated attention of fewer than 9 queries")
                is_cuda = self.route.device.kind == "cuda"
                if is_cuda and not is_array and T % CUDNN_MULTIPLE:
                    self._report(f"a differentiated attention of {T} queries, not whole 128s")
            # Four products in one kernel of the backward, and two in the forward.
            flops = (8 if self._differentiates else 4) * math.prod(q.shape) * L
            self._dispatch(flops / (2 if mask == "causal" else 1), f"attention of {T} queries")
            return real(q, k, v, **settings)

        return call

    @property
    def _differentiates(self) -> bool:
        return getattr(self._here, "depth", 0) > 0

    def _wrap_derivatives(self, patch: pytest.MonkeyPatch) -> None:
        def within(fun: Callable) -> Callable:
            @functools.wraps(fun)
            def call(*args: Any, **settings: Any) -> Any:
                depth = getattr(self._here, "depth", 0)
                self._here.depth = depth + 1
                try:
                    return fun(*args, **settings)
                finally:
                    self._here.depth = depth

            return call

        def transformation(real: Callable) -> Callable:
            return lambda fun, *args, **settings: real(within(fun), *args, **settings)

        for name in ("vjp", "grad", "value_and_grad"):
            patch.setattr(mx, name, transformation(getattr(mx, name)))

    def _wrap_evaluation(self, patch: pytest.MonkeyPatch) -> None:
        evaluate, start, array, asarray = mx.eval, mx.async_eval, np.array, np.asarray

        def async_eval(*args: Any) -> None:
            start(*args)
            self._n_started += 1
            for x in _arrays(args):
                self._started[id(x)] = weakref.ref(x), self._n_started

        def eval_(*args: Any) -> None:
            arrays = _arrays(args)
            asked = [self._start_of(x) for x in arrays]
            if any(n is None and is_lazy(x) for n, x in zip(asked, arrays)):
                asked.append(self._n_started)  # one stream: what was started before is done
            evaluate(*args)
            self._n_finished = max([self._n_finished, *filter(None, asked)])

        patch.setattr(mx, "async_eval", async_eval)
        patch.setattr(mx, "eval", eval_)
        for name in READS:
            if name in vars(mx.array):
                patch.setattr(mx.array, name, self._read(vars(mx.array)[name]))
        # numpy may read an array through its buffer, and not by __array__.
        patch.setattr(np, "array", self._read(array))
        patch.setattr(np, "asarray", self._read(asarray))

    def _start_of(self, x: mx.array) -> int | None:
        reference, n = self._started.get(id(x), (lambda: None, 0))
        return n if reference() is x else None

    def _read(self, real: Callable) -> Callable:
        def read(x: Any, *args: Any, **settings: Any) -> Any:
            if self._call is not None and type(x) is mx.array:
                n = self._start_of(x)
                if is_lazy(x) or (n is not None and n > self._n_finished):
                    self._call.places.append(_place() or "a test")
            return real(x, *args, **settings)

        return read

    def _wrap_package(self, patch: pytest.MonkeyPatch) -> None:
        engine, documents, schedule = Engine.__call__, Documents.of, Footprint.schedule
        forward = LlamaModel.__call__

        @contextmanager
        def layers_of(model: LlamaModel) -> Iterator[None]:
            before = self._axes, self._narrowest
            config, dtype = model._config, model.embed_tokens.dtype
            width = config.num_key_value_heads * config.head_dim
            self._axes, self._narrowest = set(), 0 if dtype == mx.float32 else width
            try:
                yield
            finally:
                self._axes, self._narrowest = before

        def call_engine(of: Engine, *args: Any, **settings: Any) -> Any:
            mx.synchronize()
            mx.clear_cache()  # a freed buffer that is used again may be larger than what is kept
            weights = args[0] if args else settings["weights"]
            self._weights_bytes = sum(weight.nbytes for weight in weights.values())
            self._memory_before = mx.get_active_memory()
            try:
                with layers_of(of.model.model):
                    return engine(of, *args, **settings)
            finally:
                self._memory_before = None

        def call_model(of: LlamaModel, tokens: mx.array, *args: Any, **settings: Any) -> Any:
            with layers_of(of):
                self._axes |= {tokens.size}
                return forward(of, tokens, *args, **settings)

        def made_documents(*args: Any) -> Any:
            context = documents(*args)
            groups = {group.n * group.T for group in context.groups}
            self._axes |= {context.positions.size, *groups}
            return context

        def made_schedule(of: Footprint, *args: Any) -> Any:
            made = schedule(of, *args)
            self._schedule = of, made
            return made

        patch.setattr(Engine, "__call__", call_engine)
        patch.setattr(LlamaModel, "__call__", call_model)
        patch.setattr(Documents, "of", made_documents)
        patch.setattr(Footprint, "schedule", made_schedule)
        for kind, name in ((Engine, "__call__"), (AdamW, "update"), (Step, "__call__")):
            patch.setattr(kind, name, self._counted(kind, getattr(kind, name)))

    def _counted(self, kind: type, real: Callable) -> Callable:
        def call(*args: Any, **settings: Any) -> Any:
            if self._call is not None:  # within another one, which counts
                return real(*args, **settings)
            self._call = Call(kind)
            try:
                return real(*args, **settings)
            finally:
                places, most = self._call.places, SYNCHRONISATIONS[kind]
                self._call = None
                if len(places) > most:
                    where = ", ".join(dict.fromkeys(places))
                    self._report(f"{len(places)} host synchronisations in {kind.__name__}", where)

        return call

    # ---- looking ----

    def _look_at(self, x: mx.array) -> None:
        """At what an operation returned."""
        dtype = x.dtype
        if dtype == mx.float64:
            self._report("an array of float64")
        elif dtype == mx.float32 and self._narrowest and self._is_activation(x):
            names = _functions()
            if not any(module == HEAD or name == CAPPED for module, name in names):
                self._report(f"float32 activations {x.shape} in a {self.route.device.dtype} layer")
        if self._memory_before is not None and sys._getframe(2).f_globals["__name__"] == HEAD:
            self._kept()

    def _is_activation(self, x: mx.array) -> bool:
        """Whether an array has a row for each position, as wide as an activation."""
        sizes = [math.prod(x.shape[:i]) for i in range(1, x.ndim)]
        rows = max((n for n in sizes if n in self._axes), default=0)
        return rows >= FEWEST_QUERIES and x.size >= rows * self._narrowest

    def _kept(self) -> None:
        """What a forward has kept by the time that the head begins."""
        mx.synchronize()
        kept = mx.get_active_memory() - (self._memory_before or 0)
        self._memory_before = None
        assert self._schedule is not None
        footprint, made = self._schedule
        counted = footprint.kept(made.levels, made.n_chunks)
        N, config = max(self._axes, default=0), footprint.config
        # Besides: the last layer's output, the head's input, words of dropout, indices; the LoRA
        # weights, cut from the optimiser's buffer and cast; a slice of the head.
        others = N * (2 * config.hidden_size * footprint.itemsize + 128 * len(made.levels))
        others += (
            2 * self._weights_bytes + config.vocab_size * config.hidden_size * footprint.itemsize
        )
        if kept > MOST_KEPT * counted + others:
            self._report(f"{kept} bytes kept by a forward whose schedule counts {counted}")

    def _product(self, x: mx.array, out: mx.array) -> None:
        self._dispatch(2 * out.size * x.shape[-1], f"product of {x.shape}")
        is_of_layer = x.ndim == 2 and self._call is not None
        if is_of_layer and sys._getframe(2).f_globals["__name__"] != HEAD:
            if x.shape[0] in self._axes:
                self.shapes.add(x.shape[0])

    def _dispatch(self, flops: float, what: str) -> None:
        seconds = flops / (self.machine.flops * self.machine.device.matmul_share)
        if seconds > LONGEST_DISPATCH:
            self._report(f"{seconds:.1f} s of {what} in one dispatch on {self.machine.name}")


def is_lazy(x: mx.array) -> bool:
    """Whether an array is yet to be computed: its graph has an operation."""
    graph = io.StringIO()
    EXPORT_TO_DOT(graph, x)
    return "rectangle" in graph.getvalue()


EXPORT_TO_DOT, AS_TYPE = mx.export_to_dot, mx.array.astype  # not the wrapped ones


def _is_cpu(where: Any) -> bool:
    return where is not None and not isinstance(where, mx.Stream) and mx.Device(mx.cpu) == where


def _is_causal(mask: mx.array) -> bool:
    """Whether a mask says no more than the word "causal"."""
    try:
        seen = np.array(mask)
    except ValueError:  # traced: it depends on what is differentiated
        return False
    return bool((seen == np.tri(*seen.shape[-2:], dtype=bool)).all())


def _arrays(tree: Any) -> list[mx.array]:
    return [x for _, x in tree_flatten(tree) if type(x) is mx.array]


def _summed_in_float32(real: Callable) -> Callable:
    """A packed product that sums as a GPU's does, and returns what it would have returned."""

    def call(x: mx.array, w: mx.array, scales: mx.array, *biases: Any, **settings: Any) -> mx.array:
        floats = [p for p in (x, scales, *biases) if p.dtype != mx.uint8]  # as mxfp4's scales are
        dtype = functools.reduce(mx.result_type, [p.dtype for p in floats])
        if x.dtype == mx.float32:
            return real(x, w, scales, *biases, **settings)
        x, *parts = (
            p if p.dtype == mx.uint8 else AS_TYPE(p, mx.float32) for p in (x, scales, *biases)
        )
        return AS_TYPE(real(x, w, *parts, **settings), dtype)

    return call


def _functions() -> Iterator[tuple[str, str]]:
    """The module and name of each function that is running, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back


def _place() -> str | None:
    """The innermost line of the package that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("mlx_qlora."):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None
