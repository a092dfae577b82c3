"""What `mlx-qlora doctor --tune` measured of this machine, for what `auto` leaves to it.

One file holds the seconds of a position in a decoder layer, by how its frozen matrices are
multiplied. A run takes its choice from there, and records it.
"""

import json
import math
import os
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mlx_qlora import device
from mlx_qlora.config import RunConfig
from mlx_qlora.distributed import processes
from mlx_qlora.errors import say
from mlx_qlora.folders import disk_errors, user_cache, write_whole
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig
from mlx_qlora.readers import json_value
from mlx_qlora.train.checkpoint import values_before

FASTER = 0.97  # of the time of the table's choice; a smaller difference is noise
Seconds = dict[str, dict[str, float]]  # dtype -> way to multiply -> seconds of a position


def key_of(llama: LlamaConfig, quant: QuantConfig) -> str:
    """The chip, MLX's version and a layer's shape."""
    facts, heads = device.facts(), f"{llama.num_attention_heads}/{llama.num_key_value_heads}"
    where = f"{facts['chip']} ({facts['device']}), MLX {facts['mlx']}"
    shape = f"{llama.hidden_size} x {llama.intermediate_size}, {heads} heads of {llama.head_dim}"
    return f"{where}, {shape}, {quant.mode} {quant.bits} bits in groups of {quant.group_size}"


def stored() -> dict[str, Seconds]:
    """What the file holds, by key; a file that is not ours is ignored with a warning."""
    path = user_cache() / "machine.json"
    layers = json_value(path, "layers")
    with suppress(TypeError, AttributeError):
        numbers = [s for of in layers.values() for ways in of.values() for s in ways.values()]
        if all(type(seconds) is float and seconds > 0 for seconds in numbers):
            return layers
    if os.path.exists(path):  # False where nothing can be asked
        warnings.warn(f"{path} is damaged, and ignored; run: mlx-qlora doctor --tune", stacklevel=2)
    return {}


def store(key: str, seconds: Seconds) -> Path:
    """Put a layer's times into the file, in place of older ones; a TrainingError if it cannot."""
    path = user_cache() / "machine.json"
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"layers": stored() | {key: seconds}}, indent=1) + "\n")
    return path


def fastest(key: str, dense_numbers: int) -> tuple[str, str, str] | None:
    """The dtype, the fastest way to multiply, and the reason; None if nothing was measured.

    The dtype is the device's own: float16 may be faster where bfloat16 is emulated, but nobody
    knows beforehand which models overflow in it (docs/log.md). `resident` needs room for a copy of
    all `dense_numbers` of packed matrices.
    """
    machine = device.this_machine()
    dtype, dense_bytes = machine.device.dtype, dense_numbers * machine.device.compute_dtype.size
    seconds = stored().get(key, {}).get(dtype, {})
    usual = device.frozen_matmul("auto", dense_bytes, machine)
    ways = ("quantized", "dequantize", *["resident"] * device.has_room(dense_bytes, machine))
    known = {way: seconds[way] for way in ways if way in seconds}
    if usual not in known:
        return None
    best = min(known, key=lambda way: known[way])
    if known[best] > FASTER * known[usual]:
        return dtype, usual, "no other was faster here"
    return dtype, best, f"{known[usual] / known[best]:.2f} times as fast here as {usual}"


def as_measured(
    config: RunConfig,
    llama: LlamaConfig,
    packing: QuantConfig | None,
    dense_numbers: int,
    console: Console,
) -> RunConfig:
    """With what `doctor --tune` measured in the place of `auto`, which a line says.

    A run that goes on repeats its own choice, whatever has been measured since. `packing` is that
    of the layers' matrices, `dense_numbers` are in all packed ones.
    """
    model = config.model
    if before := values_before(config.checkpointing, "model"):
        names = [n for n in ("dtype", "frozen_matmul") if getattr(model, n) == "auto"]
        return replace(config, model=replace(model, **{n: before.get(n, "auto") for n in names}))
    usual = model.frozen_matmul == "auto" and model.dtype in ("auto", device.current().dtype)
    usual = usual and model.residency != "streamed"
    if not usual or packing is None or processes().size > 1:  # machines may differ
        return config
    if (found := fastest(key_of(llama, packing), dense_numbers)) is None:
        return config
    dtype, way, why = found
    say(console, f"measured  model.dtype={dtype}, model.frozen_matmul={way}: {why}")
    return replace(config, model=replace(model, dtype=dtype, frozen_matmul=way))


def as_measured_for(model: LlamaForCausalLM, config: RunConfig, console: Console) -> RunConfig:
    """As `as_measured`, for a loaded model, which is multiplied with that way from then on."""
    matrices = [m for m in model.modules() if isinstance(m, FrozenMatrix) and m.quant]
    if not matrices or model.frozen_matmul != "auto" or model.model.reader is not None:
        return config
    numbers = sum(math.prod(matrix.shape) for matrix in matrices)
    chosen = as_measured(config, model.config, matrices[0].quant, numbers, console)
    for matrix in matrices if chosen.model.frozen_matmul != config.model.frozen_matmul else ():
        matrix.matmul = chosen.model.frozen_matmul  # pyright: ignore
        matrix.make_resident()
    return chosen
