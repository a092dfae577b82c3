"""A base that is streamed from the disk against one in memory: speed, memory, the same bits.

Run as: python benchmarks/streaming.py        (on two CPU cores about an hour)
        python benchmarks/streaming.py --layers 4 --steps 2        (some minutes)

A model of Llama 3.1 8B's shape, with 18 of its layers, 4 bits and random weights, is written to the
disk once (2.5 GB). Then LoRA of rank 16 on all seven linears is trained on rows of 512 tokens, by
the same route, each time in a process of its own: the base in memory; streamed, with the file in
the page cache; streamed, with the file dropped from it before each step. Asserted: the same bytes
of the adapter; streamed at least 0.85 of the resident tokens/s, dropped 0.7; and that a process
takes at most 150 MB + 16 bytes for each trainable parameter + the layers' inputs + two packed
layers + one dense matrix, and 10 % (anonymous and shared memory: the system can drop mapped files).
"""

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import measure
import mlx.core as mx
import numpy as np
import shapes

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.errors import StreamedWarning
from mlx_qlora.model import streaming
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.optim import AdamW
from mlx_qlora.tree import flat

WARM, DROPPED = 0.85, 0.7  # least shares of the resident speed
FIXED, FOR_EACH, MARGIN = 150e6, 16, 1.1  # bytes of a process; for a trainable parameter; tolerance
WAYS = ("resident", "streamed", "dropped")


def main() -> None:
    """Measures, prints tables and a JSON line, and asserts the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=shapes.SHAPES)
    parser.add_argument("--layers", default=18, type=int)
    parser.add_argument("--vocabulary", default=32000, type=int)
    parser.add_argument("--rows", default=1, type=int, help="of --tokens each, in a step")
    parser.add_argument("--tokens", default=512, type=int)
    parser.add_argument("--r", default=16, type=int)
    parser.add_argument("--targets", nargs="*", help="linears with an update; all seven by default")
    parser.add_argument("--steps", default=5, type=int)
    parser.add_argument("--recompute", default="all")
    parser.add_argument("--matmul", default="dequantize", choices=("dequantize", "quantized"))
    parser.add_argument("--ways", nargs="*", default=[*WAYS], choices=WAYS)
    parser.add_argument("--folder", type=Path, help="where the model is written, or already lies")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(train(args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        if not (args.folder / "config.json").exists():
            write_model(args)
        found = {way: in_a_process(args, way) for way in args.ways}
    show(found)
    plot = measure.bars(
        "streaming",
        "training with a base in memory and on the disk",
        "tokens/s",
        {way: result["tokens_per_second"] for way, result in found.items()},
    )
    measure.finish("streaming", vars(args), found, plot)
    check(found)


# ---- the model -----------------------------------------------------------------------------------


def write_model(args: argparse.Namespace) -> None:
    """A folder as MLX's converters write it, of random bytes: one tensor in memory at a time."""
    args.folder.mkdir(parents=True, exist_ok=True)
    config = vars(shapes.config(args.shape, args.layers)).copy()
    keys = (*shapes.SIZES, "rms_norm_eps", "max_position_embeddings")
    config = {key: config[key] for key in keys} | {"vocab_size": args.vocabulary}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 5e5}
    bits, size = shapes.QUANT.bits, shapes.QUANT.group_size
    config["quantization"] = {"bits": bits, "group_size": size}
    (args.folder / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM(LlamaConfig.from_hf(config))  # zeros that are never computed
    header: dict[str, Any] = {}
    offset = 0
    for name, array in sorted(flat(model.parameters()).items()):
        rows, *columns = array.shape
        tensors = {name: ("F16", (rows,))}
        if columns:
            groups = rows, columns[0] // size
            path = name.removesuffix(".weight")
            tensors = {name: ("U32", (rows, columns[0] * bits // 32))}
            tensors |= {f"{path}.{part}": ("F16", groups) for part in ("scales", "biases")}
        for tensor, (kind, shape) in tensors.items():
            end = offset + int(np.prod(shape)) * {"U32": 4, "F16": 2}[kind]
            header[tensor] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
            offset = end
    draw, text = np.random.default_rng(0), json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (args.folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in header.items():
            file.write(content(draw, name, entry).tobytes())


def content(draw: np.random.Generator, name: str, entry: dict[str, Any]) -> np.ndarray:
    """Numbers such that activations stay about as large as they are."""
    shape = entry["shape"]
    if entry["dtype"] == "U32":
        return np.frombuffer(draw.bytes(4 * int(np.prod(shape))), np.uint32)
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float16)
    columns = shape[1] * shapes.QUANT.group_size
    step = columns**-0.5 / 4.6  # 16 even steps have a deviation of 4.6
    return np.full(shape, step if name.endswith("scales") else -7.5 * step, np.float16)


# ---- one way, in a process of its own ------------------------------------------------------------


class Watch:
    """What this process takes, sampled: anonymous and shared memory, in bytes."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, process_bytes("RssAnon") + process_bytes("RssShmem"))

    def stop(self) -> int:
        """The peak."""
        self._stop.set()
        self._thread.join()
        return self.peak


def process_bytes(name: str) -> int:
    """A figure of /proc/self/status; 0 where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


class Reads:
    """How long layers were read, and how long the computation waited for them, in seconds."""

    def __init__(self) -> None:
        self.reading = self.waiting = 0.0
        self.n_bytes = 0
        run, wait = streaming._Reading._run, streaming._Reading.wait

        def timed_run(reading: Any) -> None:
            start = time.perf_counter()
            run(reading)
            self.reading += time.perf_counter() - start
            self.n_bytes += sum(m.stored.nbytes for m in reading._matrices)

        def timed_wait(reading: Any) -> Any:
            start = time.perf_counter()
            found = wait(reading)
            self.waiting += time.perf_counter() - start
            return found

        streaming._Reading._run, streaming._Reading.wait = timed_run, timed_wait


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Some steps; the first one is not timed, unless it is the only one."""
    import warnings

    warnings.simplefilter("ignore", StreamedWarning)
    reads, file = Reads(), args.folder / "model.safetensors"
    files = ModelFiles(args.folder, None, None, str(args.folder))
    residency = "resident" if args.worker == "resident" else "streamed"
    model = load_model(
        open_checkpoint(files), None, device.current().compute_dtype, args.matmul, residency
    )
    device.limit_memory()
    how = {"target_modules": args.targets} if args.targets else {}
    mq.add_lora(model, mq.LoraConfig(r=args.r, lora_dropout=0.0, **how))
    optimizer, engine = AdamW(model.trainable_parameters()), Engine(model, args.recompute, False)
    model.update(optimizer.tree())
    mx.eval(optimizer.weights, optimizer.mean, optimizer.square)
    draw, times = np.random.default_rng(0), []
    mx.reset_peak_memory()
    watch = Watch()
    for _ in range(args.steps):
        tokens = draw.integers(0, args.vocabulary, (args.rows, args.tokens + 1)).astype(np.int32)
        labels = np.where(draw.random(tokens.shape) < 0.25, tokens, -100).astype(np.int32)
        batch = mq.Batch(mx.array(tokens[:, :-1]), mx.array(labels[:, 1:]))
        if args.worker == "dropped":
            drop(file)
        reads.reading, reads.waiting, reads.n_bytes = 0.0, 0.0, 0
        start = time.perf_counter()
        loss, n, grads = engine(optimizer.named(optimizer.weights), batch)
        norm = optimizer.update(grads, n, 1e-3, loss)
        mx.eval(norm, loss, optimizer.weights, optimizer.mean, optimizer.square)
        model.update(optimizer.tree())
        times.append(time.perf_counter() - start)
        losses = loss.item() / n
        del loss, grads, norm
    peak, seconds = watch.stop(), min(times[1:] or times)
    trainable = int(optimizer.weights.size)
    reader, config = model.model.reader, model.config
    itemsize = device.current().compute_dtype.size
    inputs = args.rows * args.tokens * config.hidden_size * config.num_hidden_layers * itemsize
    dense = config.hidden_size * config.intermediate_size * itemsize
    packed = reader.resident_bytes if reader else 0
    bound = FIXED + FOR_EACH * trainable + inputs + packed + dense * (args.matmul == "dequantize")
    return {
        "seconds": times,
        "tokens_per_second": args.rows * args.tokens / seconds,
        "loss": losses,
        "adapter": hashlib.sha256(np.array(optimizer.weights).tobytes()).hexdigest(),
        "process_bytes": peak,
        "high_water_bytes": process_bytes("VmHWM"),
        "mlx_peak_bytes": mx.get_peak_memory(),
        "bound_bytes": bound * MARGIN,
        "parts": {"trainable": trainable, "inputs": inputs, "packed": packed, "dense": dense},
        "base_bytes": streaming.streamed_bytes(model),
        "read_bytes": reads.n_bytes,
        "needed_bytes_per_second": reads.n_bytes / seconds,
        "reached_bytes_per_second": reads.n_bytes / max(reads.reading, 1e-9),
        "overlap": 1 - reads.waiting / reads.reading if reads.reading else 1.0,
    }


def drop(file: Path) -> None:
    """Take a file out of the page cache, so that it is read from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def in_a_process(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Trains in one way, and returns what `train` does."""
    command = [sys.executable, __file__, "--worker", way]
    for name, value in vars(args).items():
        if name in ("worker", "ways") or value is None:
            continue
        command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


# ---- what was found ------------------------------------------------------------------------------


def show(found: dict[str, dict[str, Any]]) -> None:
    """A table for a person."""
    rows = []
    for way, of in found.items():
        is_streamed = way != "resident"
        rate = [f"{of[f'{name}_bytes_per_second'] / 1e6:,.0f}" for name in ("needed", "reached")]
        rows.append(
            [
                way,
                f"{of['tokens_per_second']:.1f}",
                *(f"{of[name] / 1e6:,.0f}" for name in ("process_bytes", "mlx_peak_bytes")),
                f"{of['bound_bytes'] / 1e6:,.0f}" if is_streamed else "",
                *(rate if is_streamed else ["", ""]),
                f"{of['overlap']:.0%}" if is_streamed else "",
                of["adapter"][:8],
            ]
        )
    columns = ["base", "tokens/s", "process MB", "MLX MB", "bound MB"]
    columns += ["needed MB/s", "reached MB/s", "overlap", "adapter"]
    measure.show("a base in memory and on the disk", columns, rows)


def check(found: dict[str, dict[str, Any]]) -> None:
    """Asserts the claims."""
    assert len({of["adapter"] for of in found.values()}) == 1, "adapters of different bytes"
    for way, of in found.items():
        if way == "resident":
            continue
        used, bound = of["process_bytes"], of["bound_bytes"]
        assert used <= bound, f"{way}: {used / 1e6:,.0f} MB, and {bound / 1e6:,.0f} are allowed"
        if "resident" in found:
            share = of["tokens_per_second"] / found["resident"]["tokens_per_second"]
            least = WARM if way == "streamed" else DROPPED
            assert share >= least, f"{way}: {share:.2f} of the resident speed, not {least}"


if __name__ == "__main__":
    main()
