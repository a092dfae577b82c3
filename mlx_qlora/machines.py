"""What a machine can do, as far as a plan needs to know: this one, or one named by its chip.

A name is `CHIP-GB`, for example `m4-max-64`, `m1-8` or `h100-80`. Matmul rates are dense bfloat16
products in teraflops: measured where a measurement was published, else 0.75 of the nominal peak,
which is what the measured chips reach (docs/performance.md has the sources).
"""

import functools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_qlora import backend
from mlx_qlora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import mlx.core as mx

# Teraflops of each chip. Measured: m3-max, m4-max, m3-ultra, m5-max, h100.
APPLE = {
    **{"m1": 2.0, "m1-pro": 3.9, "m1-max": 7.8, "m1-ultra": 15.6},
    **{"m2": 2.7, "m2-pro": 5.1, "m2-max": 10.2, "m2-ultra": 20.4},
    **{"m3": 3.1, "m3-pro": 5.5, "m3-max": 11.4, "m3-ultra": 18.9},
    **{"m4": 3.2, "m4-pro": 6.9, "m4-max": 13.4},
    **{"m5": 13.0, "m5-max": 57.0},
}
NVIDIA = {"a100": 250.0, "h100": 798.0, "h200": 798.0}
# What training reaches of a device's matmul rate (estimates; a CPU's is measured, in docs/log.md).
REACHED = {"cpu": 0.45, "metal": 0.85, "cuda": 0.55}
# What of its memory a device gives to one process. macOS: two thirds of small memories, three
# quarters of others (the default of `iogpu.wired_limit_mb`); a CPU shares with everything else.
SMALL_MAC = 36e9
PROBE = 1024  # rows and columns of the product that measures this machine
LONG = 1 << 25  # numbers of an array that no cache holds


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Attributes:
        name: for people.
        device: which of MLX's backends it has.
        working_set_bytes: what MLX may use.
        cores: that compute side by side; 1 on a GPU.
        itemsize: bytes of a number in its compute dtype.
    """

    name: str
    device: backend.Device
    working_set_bytes: int
    cores: int
    itemsize: int

    @functools.cached_property
    def flops(self) -> float:
        """Matmul rate in the compute dtype: from the table, or of this machine, measured."""
        chip = self.name.rpartition("-")[0]
        known = {**APPLE, **NVIDIA}.get(chip)
        return known * 1e12 if known else _measured_flops()

    def seconds(self, flops: float, read: int) -> float:
        """How long training takes for so many multiplications and additions.

        Args:
            flops: of matmuls.
            read: bytes of weights that these take from memory. A CPU's cores wait for them, which
                is most of a small micro-batch's time; a GPU reads them meanwhile.
        """
        waiting = read / _measured_reading() if self.device == "cpu" else 0.0
        return flops / (self.flops * REACHED[self.device]) + waiting


@functools.cache
def this_machine() -> Machine:
    """The machine of this process."""
    facts = backend.facts()
    return Machine(
        f"this machine ({facts['chip']})",
        backend.backend().device,
        facts["working_set_bytes"],
        backend.cores(),
        backend.backend().compute_dtype.size,
    )


def machine(name: str | None) -> Machine:
    """A machine by its name, or this one.

    Raises:
        ConfigError: an unknown chip, or a name that is not CHIP-GB.
    """
    if name is None:
        return this_machine()
    match = re.fullmatch(r"([a-z]+\d+(?:-[a-z]+)?)-(\d+)", name.lower())
    chip, gigabytes = (match[1], int(match[2])) if match else (name, 0)
    if chip in APPLE and gigabytes:
        memory = gigabytes << 30
        share = 2 / 3 if memory <= SMALL_MAC else 3 / 4
        return Machine(name.lower(), "metal", int(memory * share), 1, 2)
    if chip in NVIDIA and gigabytes:
        return Machine(name.lower(), "cuda", int((gigabytes << 30) * 0.95), 1, 2)
    hint = did_you_mean(chip, [*APPLE, *NVIDIA])
    raise ConfigError(
        f"--machine: {name!r} is not CHIP-GB, like m4-max-64{hint}; "
        f"chips: {', '.join([*APPLE, *NVIDIA])}"
    )


@functools.cache
def _measured_flops() -> float:
    """The rate of square products on this machine."""
    import mlx.core as mx

    dtype = backend.backend().compute_dtype
    x = mx.random.normal((PROBE, PROBE)).astype(dtype)
    return 2 * PROBE**3 / _usual_seconds(lambda: x @ x)


@functools.cache
def _measured_reading() -> float:
    """Bytes per second that a core reads from memory."""
    import mlx.core as mx

    x = mx.arange(LONG, dtype=mx.float32)
    return x.nbytes / _usual_seconds(x.sum)


def _usual_seconds(compute: Callable[[], "mx.array"]) -> float:
    """The median of a few measurements, one more before them to warm up."""
    import mlx.core as mx

    mx.eval(compute())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
