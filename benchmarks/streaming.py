"""A base that is streamed from the disk against one in memory: speed, memory, the same bits.

Run as: python benchmarks/streaming.py        (on two CPU cores half an hour)
        python benchmarks/streaming.py --r 4 --targets q_proj v_proj --ways streamed --steps 1
        python benchmarks/streaming.py --merge --ways streamed --steps 1
        python benchmarks/streaming.py --shape qwen2.5-0.5b --tokens 256 --r 8 --ways resident \
            streamed --mlx-bytes 361e6 --least 0.5

A model of a shape, by default of Llama 3.1 8B's with 20 of its layers, 4 bits and random weights,
is written to the disk once (2.5 GB). Then LoRA of rank 16 on all seven linears is trained on rows
of 512 tokens, by the same route, each time in a process of its own: the base in memory; streamed,
with the file in the page cache; streamed, with the file dropped from it before each step. The
processes take turns, a step each, and the first is not timed; a speed is the median of the rounds'
ratios. Asserted: the same bytes of the first gradients and of the adapter; streamed at least 0.85
of the resident tokens/s, dropped 0.7; and that a process takes at most 150 MB + 16 bytes for each
trainable parameter + the layers' inputs + two packed layers + one dense matrix, and 10 %
(anonymous and shared memory: the system can drop mapped files). With `--merge` the adapter is
merged as well, by a process that the system allows less data than the packed model has.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import measure
import mlx.core as mx
import numpy as np
import shapes

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import StreamedWarning
from mlx_qlora.model import streaming
from mlx_qlora.model.hub import ModelFiles, resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.optim import AdamW
from mlx_qlora.tree import flat

WARM, DROPPED = 0.85, 0.7  # least shares of the resident speed
FIXED, FOR_EACH, MARGIN = 150e6, 16, 1.1  # bytes of a process; for a trainable parameter; tolerance
WAYS = ("resident", "streamed", "dropped")
ALLOWED = 1.5e9  # bytes of data beside imports and threads, for merging


def main() -> None:
    """Measures, prints tables and a JSON line, and asserts the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=shapes.SHAPES)
    parser.add_argument("--layers", type=int, help="20 of 8B, else all that the shape has")
    parser.add_argument("--vocabulary", type=int, help="32,000 of 8B, else the shape's")
    parser.add_argument("--rows", default=1, type=int, help="of --tokens each, in a step")
    parser.add_argument("--tokens", default=512, type=int)
    parser.add_argument("--r", default=16, type=int)
    parser.add_argument("--targets", nargs="*", help="linears with an update; all seven by default")
    parser.add_argument("--steps", default=5, type=int)
    parser.add_argument("--recompute", default="all")
    parser.add_argument("--matmul", default="dequantize", choices=("dequantize", "quantized"))
    parser.add_argument("--ways", nargs="*", default=[*WAYS], choices=WAYS)
    parser.add_argument("--folder", type=Path, help="where the model is written, or already lies")
    parser.add_argument("--merge", action="store_true", help="merge in little memory, too")
    parser.add_argument("--mlx-bytes", type=float, help="most that MLX may take, streamed")
    parser.add_argument("--least", default=WARM, type=float, help="share of the resident speed")
    parser.add_argument("--worker", choices=(*WAYS, "merge"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    is_8b = args.shape == "llama-3.1-8b"
    args.layers = args.layers or (20 if is_8b else shapes.config(args.shape).num_hidden_layers)
    args.vocabulary = args.vocabulary or (32000 if is_8b else shapes.config(args.shape).vocab_size)
    if args.worker:
        print(json.dumps(merge(args) if args.worker == "merge" else train(args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        if not (args.folder / "config.json").exists():
            write_model(args)
        results = in_turns(args)
        merged = result_of(started(args, "merge")) if args.merge else None
    show(results, merged)
    plot = measure.bars(
        "streaming",
        "training with a base in memory and on the disk",
        "tokens/s",
        {way: result["tokens_per_second"] for way, result in results.items()},
    )
    measure.finish("streaming", vars(args), {**results, "merge": merged}, plot)
    check(results, args)


# ---- the model -----------------------------------------------------------------------------------


def write_model(args: argparse.Namespace) -> None:
    """A folder as MLX's converters write it, of random bytes: one tensor in memory at a time."""
    args.folder.mkdir(parents=True, exist_ok=True)
    config = vars(shapes.config(args.shape, args.layers)).copy()
    keys = (*shapes.SIZES, "rms_norm_eps", "max_position_embeddings")
    config = {key: config[key] for key in keys} | {"vocab_size": args.vocabulary}
    kind = ("qwen2", "Qwen2ForCausalLM") if "qwen" in args.shape else ("llama", "LlamaForCausalLM")
    config |= {"model_type": kind[0], "architectures": [kind[1]], "rope_theta": 5e5}
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
    if len(shape) == 1:
        return np.full(shape, 1 if name.endswith("norm.weight") else 0.01, np.float16)
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
        read, wait = streaming._read, streaming.Future.result

        def timed_read(matrices: list[Any]) -> Any:
            start = time.perf_counter()
            arrays = read(matrices)
            self.reading += time.perf_counter() - start
            self.n_bytes += sum(matrix.stored.nbytes for matrix in matrices)
            return arrays

        def timed_wait(reading: Any, timeout: float | None = None) -> Any:
            start = time.perf_counter()
            arrays = wait(reading, timeout)
            self.waiting += time.perf_counter() - start
            return arrays

        streaming._read, streaming.Future.result = timed_read, timed_wait


def load(args: argparse.Namespace, residency: str) -> LlamaForCausalLM:
    """The model with LoRA layers."""
    warnings.simplefilter("ignore", StreamedWarning)
    files = ModelFiles(args.folder, None, None, str(args.folder))
    dtype = device.current().compute_dtype
    model = load_model(open_checkpoint(files), None, dtype, args.matmul, residency)
    how = {"target_modules": args.targets} if args.targets else {}
    return mq.add_lora(model, mq.LoraConfig(r=args.r, lora_dropout=0.0, **how))


def hashed(*arrays: mx.array) -> str:
    """Of the bytes of some arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.array(array).tobytes())
    return sha.hexdigest()


def train(args: argparse.Namespace) -> dict[str, Any]:
    """A step for each line of the standard input, whose seconds are printed."""
    reads, file = Reads(), args.folder / "model.safetensors"
    model = load(args, "resident" if args.worker == "resident" else "streamed")
    optimizer, engine = AdamW(model.trainable_parameters()), Engine(model, args.recompute, False)
    engine.limit_memory([args.tokens] * args.rows)
    model.update(optimizer.tree())
    mx.eval(optimizer.weights, optimizer.mean, optimizer.square)
    draw, times, gradients = np.random.default_rng(0), [], ""
    mx.reset_peak_memory()
    watch = Watch()
    for _ in sys.stdin:
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
        gradients = gradients or hashed(*(grads[name] for name in sorted(grads)))
        del loss, grads, norm
        print(times[-1], flush=True)
    peak, seconds = watch.stop(), statistics.median(times[1:] or times)
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
        "gradients": gradients,
        "adapter": hashed(optimizer.weights),
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


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Merge the adapter into dense bfloat16, with little memory allowed by the system."""
    built_in = resolve("smollm2-135m")
    tokenizer = load_tokenizer(built_in.path, open_checkpoint(built_in).metadata)
    mx.eval(mx.zeros((64, 64)) @ mx.zeros((64, 64)))
    before = process_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (before + int(ALLOWED),) * 2)
    model, watch, start = load(args, "streamed"), Watch(), time.perf_counter()
    merged = mq.save_merged(model, tokenizer, args.folder / "merged")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "process_bytes": watch.stop(), "written_bytes": merged.bytes}


def started(args: argparse.Namespace, way: str) -> subprocess.Popen[str]:
    """A process that trains in one way, or merges."""
    command = [sys.executable, __file__, "--worker", way]
    for name, value in vars(args).items():
        if name in ("worker", "ways", "merge") or value is None:
            continue
        name = name.replace("_", "-")
        command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it says last."""
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def in_turns(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Trains in all ways, a step of each at a time; what `train` returns of each."""
    processes = {way: started(args, way) for way in args.ways}
    for step in range(args.steps):
        for way, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            print(f"step {step + 1} {way}: {float(process.stdout.readline()):.1f} s", flush=True)
    results = {way: result_of(process) for way, process in processes.items()}
    for of in results.values() if "resident" in results else ():
        rounds = zip(results["resident"]["seconds"][1:], of["seconds"][1:])
        of["share"] = statistics.median([before / after for before, after in rounds] or [1])
    return results


# ---- what was found ------------------------------------------------------------------------------


def show(found: dict[str, dict[str, Any]], merged: dict[str, Any] | None) -> None:
    """A table for a person."""
    rows = []
    for way, of in found.items():
        is_streamed = way != "resident"
        rate = [f"{of[f'{name}_bytes_per_second'] / 1e6:,.0f}" for name in ("needed", "reached")]
        rows.append(
            [
                way,
                f"{of['tokens_per_second']:.1f}",
                f"{of['share']:.2f}" if "share" in of else "",
                *(f"{of[name] / 1e6:,.0f}" for name in ("process_bytes", "mlx_peak_bytes")),
                f"{of['bound_bytes'] / 1e6:,.0f}" if is_streamed else "",
                *(rate if is_streamed else ["", ""]),
                f"{of['overlap']:.0%}" if is_streamed else "",
                of["adapter"][:8],
            ]
        )
    columns = ["base", "tokens/s", "share", "process MB", "MLX MB", "bound MB"]
    columns += ["needed MB/s", "reached MB/s", "overlap", "adapter"]
    measure.show("a base in memory and on the disk", columns, rows)
    if merged:
        written, used = (measure.gigabytes(merged[f"{n}_bytes"]) for n in ("written", "process"))
        print(f"merged: {written} written in {merged['seconds']:.0f} s by a process of {used}")


def check(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Asserts the claims."""
    for name in ("gradients", "adapter"):
        assert len({of[name] for of in found.values()}) == 1, f"{name} of different bytes"
    for way, of in found.items():
        if way == "resident":
            continue
        used, bound = of["process_bytes"], of["bound_bytes"]
        if args.mlx_bytes:
            used, bound = of["mlx_peak_bytes"], args.mlx_bytes
        assert used <= bound, f"{way}: {used / 1e6:,.0f} MB, and {bound / 1e6:,.0f} are allowed"
        least = args.least if way == "streamed" else DROPPED
        assert of.get("share", 1) >= least, f"{way}: {of['share']:.2f} of resident, not {least}"


if __name__ == "__main__":
    main()
