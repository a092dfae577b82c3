"""`mlx-qlora doctor --self-test`: whether this machine computes what training needs, and how fast.

Kernels are compared with their definitions, twenty steps of a tiny model with losses that are
shipped, and a layer of a real size with the plan, in a process that a failing device may end.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent import futures
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from mlx_qlora import __version__, device
from mlx_qlora.adapters.peft import adapter_tensors
from mlx_qlora.before import doctor
from mlx_qlora.before.doctor import Finding
from mlx_qlora.before.kernels import kernels
from mlx_qlora.before.plan import (
    bytes_read,
    elementwise_bytes,
    flops_per_token,
    weights_of_layer,
)
from mlx_qlora.config import ModelConfig, RunConfig, build, to_dict
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.errors import ConfigError
from mlx_qlora.folders import disk_errors, user_path, write_whole
from mlx_qlora.measured import fastest, key_of, store
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, trainable_count
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig, pack
from mlx_qlora.model.rope import RopeConfig
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.readers import card_text
from mlx_qlora.run import Inputs, open_files, packing_of
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.loop import train
from mlx_qlora.train.memory import adapter_bytes, persistent_bytes, step_bytes
from mlx_qlora.tree import flat

# ---- twenty steps of a tiny model ----------------------------------------------------------------

# Its config.json, the settings of the run, the rows as (tokens not learned, *tokens), the losses.
GOLDEN = Path(__file__).with_name("trajectory.json")
ALLOWED = {"float32": 1e-4, "bfloat16": 1e-2}  # nats; a share of the loss


def steps() -> Iterator[Finding]:
    """The shipped losses in both dtypes; the same run again, and one that goes on half-way."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    losses, here = np.array(golden["losses"]), device.current().dtype
    with tempfile.TemporaryDirectory() as place:
        base = write_base(Path(place, "base"), golden["model"])
        run = partial(_run, base, golden)
        for dtype in ALLOWED:
            reached, adapter = run(Path(place, dtype), dtype)
            off = reached - losses if dtype == "float32" else reached / losses - 1
            good = (worst := float(np.abs(off).max())) <= ALLOWED[dtype]
            text = f"{dtype}: loss {reached[0]:.3f} to {reached[-1]:.3f}, {worst:.1e} off, allowed "
            yield Finding("pass" if good else "fail", "20 steps", f"{text}{ALLOWED[dtype]:.0e}")
            for what, resume in ("again", "none"), ("from step 10", "checkpoint-10"):
                if dtype != here:
                    break
                resume = resume if resume == "none" else str(Path(place, dtype, resume))
                again = run(Path(place, what), dtype, resume_from_checkpoint=resume)
                good = again[0].tolist() == reached.tolist() and again[1] == adapter
                text = f"{dtype}, {what}: {'the same bits' if good else 'other bits'}"
                yield Finding("pass" if good else "fail", "20 steps", text)


def _run(base: Path, golden: Any, output: Path, dtype: str, **more: Any) -> tuple[np.ndarray, Any]:
    """The losses of the shipped run, and the bytes of the adapter's matrices."""
    more |= {"output_dir": str(output), "save_steps": 10, "eval_steps": 20}
    config, quiet = build({**golden["settings"], "checkpointing": more}), Console(quiet=True)
    checkpoint = open_checkpoint(ModelFiles(base, "self-test", None, "self-test"))
    model = load_model(checkpoint, config.model.quantize(), getattr(mx, dtype))
    rows = [
        Example(np.array(ids, np.int32), np.arange(len(ids)) >= n_prompt, line)
        for line, (n_prompt, *ids) in enumerate(golden["rows"], 1)
    ]
    output.mkdir()
    no_tokenizer: Any = None
    inputs = Inputs(config, no_tokenizer, model.config, Examples.of(rows)).prepare(model)
    inputs = inputs.to_resume(quiet)
    history = train(model, inputs, quiet).log_history
    losses = np.array([step["loss"] for step in history if "loss" in step])
    return losses, [array.tobytes() for array in adapter_tensors(model).values()]


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """A model's files but for the tokenizer's, with weights that follow from their names."""
    folder.mkdir()
    weights = {}
    for name, array in flat(LlamaForCausalLM(LlamaConfig.from_hf(config)).parameters()).items():
        drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(array.shape)
        weights[name] = (0.08 * drawn + (array.ndim == 1)).astype(np.float32)  # a norm is near 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# ---- a layer of a real size ----------------------------------------------------------------------

LLAMA_8B = LlamaConfig(4096, 32, 32, 8, 128, 14336, 128256, rope=RopeConfig(theta=5e5))
LLAMA_1B = LlamaConfig(2048, 16, 32, 8, 64, 8192, 128256, rope=RopeConfig(theta=5e5))
VOCABULARY = 1024  # the head's work is not what is measured
LONG, FEW = 256, 64  # tokens of a document, where there is time for long ones or not
SLOWER, LARGER = 0.7, 1.15  # of the plan: speed and memory of which that is said
EMULATED = "Apple M1", "Apple M2"  # chips without bfloat16, where float16 may be faster


def layers(config: RunConfig, budget: float, keep: bool) -> Iterator[Finding]:
    """One layer, forward and back, in each way that this device could choose, against the plan.

    It is the model's that the `config` names, or Llama's of 8B, on a CPU of 1B. `budget` is seconds
    of a line; `keep` stores the times, for `auto` to choose by.
    """
    here, machine, quant = device.current(), device.this_machine(), config.model.quantize()
    shape, name = (LLAMA_1B, "1B") if here.kind == "cpu" else (LLAMA_8B, "8B")
    if config.model.source is not None:
        checkpoint = open_files(config, weights=False)
        shape, name = LlamaConfig.from_hf(checkpoint.config), config.model.source
        quant = packing_of(checkpoint, quant)
    quant, dense = quant or QuantConfig(), shape.num_hidden_layers * sum(weights_of_layer(shape))
    dense_bytes = dense * here.compute_dtype.size
    usual, times = device.frozen_matmul("auto", dense_bytes), dict[str, dict[str, float]]()
    ways = {"quantized": here.packed_matmul, "dequantize": True}
    ways["resident"] = device.has_room(dense_bytes, machine)
    made = [(way, here.dtype, 0.0) for way, possible in ways.items() if possible]
    made += [(usual, here.dtype, LoraConfig().lora_dropout)]
    if machine.name.removeprefix("this machine (").startswith(EMULATED):
        made.append((usual, "float16", 0.0))
    for way, dtype, rate in made:
        mx.clear_cache()
        before, model = mx.get_active_memory(), _layer(shape, quant, way, dtype, rate)
        lengths, seconds, norm = _timed(engine := Engine(model, compiled=here.compiles), budget)
        peak = mx.get_peak_memory() - before
        footprint, plan = engine.planned(lengths)
        flops = flops_per_token(model.config, plan.levels, lengths, 0.5) * sum(lengths)
        read = plan.n_chunks * bytes_read(model.config, plan.levels, engine.dtype.size)
        moved = elementwise_bytes(model.config, plan.levels, engine.dtype.size, rate > 0)
        speed = machine.seconds(flops, read, moved * sum(lengths)) / seconds
        trained = trainable_count(model)
        planned = persistent_bytes(model) - 2 * adapter_bytes(trained) // 3  # there is no AdamW
        planned += sum(footprint.highest(plan)) + step_bytes(trained, plan.n_chunks, False)
        state = "slower" if speed < SLOWER and way == usual else "pass"
        state = "larger" if peak > LARGER * planned else state
        text = f"{name}, {way}, {dtype}, dropout {rate:g}: {sum(lengths) / seconds:,.0f} tokens/s"
        text += f" ({speed:.2f} of the plan), {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f})"
        if not 0 < norm < np.inf:
            state, text = "fail", f"{text}; the gradient is {norm}, or changes from run to run"
        yield Finding(state, "one layer", text)
        if not rate:
            times.setdefault(dtype, {})[way] = seconds / sum(lengths)
        del model, engine
    rest = {"float32", "bfloat16", "float16", *ways}.difference(*made)
    yield Finding("ok", "one layer", f"not measured on this device: {sorted(rest)}")
    if keep:
        path = store(key_of(shape, quant), times)
        dtype, way, why = fastest(key_of(shape, quant), dense) or ("auto", "auto", "")
        text = f"model.dtype={dtype} model.frozen_matmul={way}: {why}; kept in {path}"
        yield Finding("ok", "settings", text)


def _layer(
    shape: LlamaConfig, quant: QuantConfig, way: Any, dtype: str, rate: float
) -> LlamaForCausalLM:
    """A model of one layer, packed, with LoRA layers; its rows repeat, which costs no time."""
    one = {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "windows": shape.windows[:1]}
    model = LlamaForCausalLM(replace(shape, **one))
    for path, module in model.named_modules():
        if isinstance(module, FrozenMatrix):
            module.dtype, module.matmul, (rows, columns) = getattr(mx, dtype), way, module.shape
            tile = mx.random.normal((FEW, columns), scale=columns**-0.5, key=mx.random.key(0))
            module.put(tuple(x[mx.arange(rows) % FEW] for x in pack(tile, quant)), quant)
            module.make_resident()
        elif path.endswith("norm"):
            module.weight = module.weight.astype(getattr(mx, dtype))
    model.freeze()
    return add_lora(model, LoraConfig(lora_dropout=rate))


def _timed(engine: Engine, budget: float) -> tuple[list[int], float, float]:
    """Documents of a chunk; the least seconds of its forward and backward; the gradient's norm."""
    weights = flat(engine.model.trainable_parameters())

    def once(n: int, T: int) -> tuple[float, float]:
        tokens = mx.arange(n * T).reshape(n, T) % VOCABULARY
        batch, start = Batch(tokens, mx.where(mx.arange(T) < T // 2, IGNORE, tokens)), now()
        loss, _, grads = engine(weights, batch, mx.random.key(0))
        squares = mx.stack([grad.square().sum() for grad in grads.values()]).sum()
        mx.eval(loss, squares, grads)
        return now() - start, float(np.sqrt(np.array(squares)) + 0 * np.array(loss))

    now, n = time.perf_counter, device.this_machine().cores
    once(n, FEW)  # compiles, and fills MLX's cache of freed buffers
    most = min(n * FEW * budget / 2 / once(n, FEW)[0], device.current().chunk_positions)
    T = LONG if most >= n * LONG else FEW
    n = max(n, int(most) // T)
    mx.reset_peak_memory()
    runs = [once(n, T)]
    while sum(seconds for seconds, _ in runs) < budget / 2:
        runs.append(once(n, T))
    norms = [norm for _, norm in runs]
    # The same work each time: what differs was lost, on some devices without an error.
    alike = np.allclose(norms, norms[0], rtol=0.1)
    return [T] * n, min(runs)[0], norms[0] if alike else np.nan


# ---- the command ---------------------------------------------------------------------------------

BAD = "error", "fail"
MARK, DONE = b"self-test:", "done"  # of lines that the process means for us
TITLE = f"self-test of mlx-qlora {__version__}"
PARTS = "machine", "kernels", "steps", "layers"


def self_test(
    source: str | None = None,
    report: str | Path | None = None,
    *,
    seconds: float = 5.0,
    parts: tuple[str, ...] = PARTS,
    console: Console | None = None,
    config: RunConfig | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Test whether this machine trains right and as fast as planned; print line by line.

    Args:
        source: the model whose layers are timed, as for `load`; its weights are not fetched.
        report: a JSON and a Markdown file to write, for an issue: without personal data.
        seconds: of each line that measures speed.
        config: in the place of `source`.
        keep: stores the times, for `model.frozen_matmul: auto` to choose by.

    Returns:
        `ok`, and `findings` as dicts of state, name, text and fix.

    Raises:
        ConfigError: the report's folder cannot be written to, or other files have its names.
    """
    config, path = config or RunConfig(ModelConfig(source=source)), None
    if report is not None:
        path = re.sub(r"\.(json|md)$", "", str(user_path(report).absolute()))
        for file in (Path(f"{path}.json"), Path(f"{path}.md")):
            if file.exists() and TITLE[:22] not in card_text(file)[:99]:
                raise ConfigError(f"--report: {file} exists and is no self-test; name another")
        if not os.access(Path(path).parent, os.W_OK):
            raise ConfigError(
                f"--report: {Path(path).parent} is no folder to write to; name another"
            )
    in_child = partial(_from_child, [to_dict(config), parts, seconds, keep])
    findings = doctor.examine(console or Console(), in_child)
    result: dict[str, Any] = {"about": TITLE, "ok": all(each.state not in BAD for each in findings)}
    result |= {"findings": [asdict(finding) for finding in findings]}
    if path is not None:
        to_json = partial(json.dumps, indent=1, ensure_ascii=False)
        rows = [f"| {each.state} | {each.name} | {each.text} |" for each in findings]
        head = [TITLE, "", "| | | |", "|---|---|---|"]
        with disk_errors(Path(path).parent):
            write_whole(Path(f"{path}.json"), anonymous(to_json(result)) + "\n")
            write_whole(Path(f"{path}.md"), anonymous("\n".join([*head, *rows])) + "\n")
    return result


def lines(values: Any, parts: list[str], seconds: float, keep: bool) -> Iterator[Finding]:
    """The findings of some parts; an error of one is a finding, too."""
    quiet, config = Console(quiet=True), build(values)
    checks = {
        "machine": lambda: (f for check in doctor.MACHINE for f in doctor.examine(quiet, check)),
        "kernels": kernels,
        "steps": steps,
        "layers": lambda: layers(config, seconds, keep),
    }
    for part in parts:
        try:
            yield from checks[part]()
        except Exception as cause:
            yield Finding("fail", part, f"{type(cause).__name__}: {cause}")


def _from_child(words: list[Any]) -> Iterator[Finding]:
    """`lines` of a process whose float32 is float32: MLX's default on some GPUs is TF32."""
    code = "from mlx_qlora.before import self_test; self_test._child()"
    command = [sys.executable, "-c", code, json.dumps(words)]
    environment = {**os.environ, "MLX_ENABLE_TF32": "0"}
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    try:
        child = subprocess.Popen(command, **streams)
    except OSError as cause:
        yield Finding("fail", "process", f"it cannot be started: {cause}")
        return
    last = ""
    with child, futures.ThreadPoolExecutor(1) as reader:
        errors = reader.submit(lambda: child.stderr.read() if child.stderr else b"")
        try:
            for line in map(bytes.strip, child.stdout or ()):
                if line.startswith(MARK):  # others may print, too
                    last = json.loads(line.removeprefix(MARK))
                    if last != DONE:
                        yield Finding(**last)
        except BaseException:  # Ctrl-C, or nobody reads on
            child.kill()
            raise
        said = errors.result().decode(errors="replace").strip().rpartition("\n")[2]
    if (code := child.returncode) < 0:
        said = f"{signal.Signals(-code).name} {said}"
        if code == -signal.SIGILL:
            said += "a library is for another CPU; set MLX_QLORA_BLAS to another BLAS, or to none"
    if code or last != DONE:
        yield Finding("fail", "process", f"it ended early: {said}")


def _child() -> None:
    for said in chain(map(asdict, lines(*json.loads(sys.argv[1]))), [DONE]):
        print(f"\n{MARK.decode()}{json.dumps(said)}", flush=True)


def anonymous(text: str) -> str:
    """Without folders, and without this computer's name."""
    host = platform.node().partition(".")[0] or "localhost"
    text = re.sub(rf"\b{re.escape(host)}(\.local)?\b", "computer", text, flags=re.IGNORECASE)
    if len(home := str(Path.home())) > 1:
        text = text.replace(home, "~")  # whose name may have spaces
    text = re.sub(r"/Volumes/[^/\n\"|]*/", "/Volumes/disk/", text)  # and so may a disk's
    prefix = r"(?:file://|smb://[^\s/]*|~|\.{1,2})"
    return re.sub(rf"(?<![\w./:]){prefix}?/(?:[^/\s|\"]+/)+", "", text)
