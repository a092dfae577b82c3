"""What a sweep tries: points, the runs that they stand for, and how long each may take.

The order is the guide's: the learning rate first, then the rank, then the rows of a step; each
stage keeps what the one before it has found. This is greedy: it tries a sum of candidates and not
their product, and can miss a best point whose values are only good together.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_qlora.config import RunConfig
from mlx_qlora.errors import ConfigError, did_you_mean
from mlx_qlora.fields import require
from mlx_qlora.model.initial import PLAIN
from mlx_qlora.record import deciding_values

ORDER = ("learning_rate", "r", "batch_size")
WORDS = {"learning_rate": "learning rate", "r": "rank", "batch_size": "batch"}
DEFAULT_GRID: dict[str, list[Any]] = {"learning_rate": [1e-4, 2e-4, 5e-4]}
WARMUP_SHARE = 10  # a trial warms up for at most a tenth of its steps


@dataclass(frozen=True, order=True)
class Point:
    """One candidate. Points are ordered by caution: of two equally good ones the lower is taken.

    Attributes:
        learning_rate: at the end of the warmup.
        r: rank. `lora_alpha` stays: at a scale of alpha / r the best learning rate hardly depends
            on the rank (Schulman et al. 2025, "LoRA Without Regret").
        batch_size: rows of an optimiser step, however many micro-batches make it up.
        seed: of the adapter, the order of rows and the dropout; the split is the sweep's own.
    """

    learning_rate: float
    r: int
    batch_size: int
    seed: int

    def label(self, fields: Sequence[str]) -> str:
        """The point in words, as far as these fields go."""
        return ", ".join(f"{WORDS[name]} {getattr(self, name):g}" for name in fields)


def checked_grid(grid: Mapping[str, Sequence[Any]] | None) -> dict[str, list[Any]]:
    """The grid in the order of its stages, each value once, from low to high.

    Raises:
        ConfigError: an unknown field, a field without values, or a value of the wrong type.
    """
    grid = DEFAULT_GRID if not grid else grid
    for name, values in grid.items():
        if name not in ORDER:
            known = ", ".join(ORDER)
            raise ConfigError(
                f"a sweep cannot vary {name!r}{did_you_mean(name, ORDER)}; it varies {known}"
            )
        require(len(values) > 0, f"the sweep's {name}", "have at least one value", "nothing")
        for value in values:
            kind = (int, float) if name == "learning_rate" else int
            legal = isinstance(value, kind) and not isinstance(value, bool)
            legal = legal and 0 < value < math.inf
            require(legal, f"the sweep's {name}", "be a number above 0", value)
    return {name: sorted(set(grid[name])) for name in ORDER if name in grid}


def check_swept(config: RunConfig) -> None:
    """Refuses a config whose trials could not share one base, or could not be continued.

    Raises:
        ConfigError: naming the field.
    """
    begin = config.lora.init_lora_weights
    if begin not in PLAIN:
        raise ConfigError(
            f"lora.init_lora_weights={begin} changes the base, which the trials of a sweep share; "
            "sweep with true or gaussian, and train with it afterwards"
        )
    if config.model.adapter is not None:
        raise ConfigError(
            "model.adapter: the trials of a sweep begin adapters of their own; merge this one "
            "into the model first, or leave it out"
        )
    again = config.checkpointing.resume_from_checkpoint
    require(again == "auto", "checkpointing.resume_from_checkpoint", "be auto in a sweep", again)


def start_point(config: RunConfig) -> Point:
    """Where the sweep stands before its first stage."""
    training = config.training
    rows = training.rows * training.gradient_accumulation_steps
    return Point(training.peak, config.lora.r, rows, training.seed)


def stages(grid: dict[str, list[Any]], product: bool) -> list[tuple[str, ...]]:
    """The fields that are varied together, stage by stage."""
    return [tuple(grid)] if product else [(name,) for name in grid]


def candidates(at: Point, fields: Sequence[str], grid: dict[str, list[Any]]) -> list[Point]:
    """The points of one stage, from cautious to bold."""
    together = itertools.product(*(grid[name] for name in fields))
    return sorted(replace(at, **dict(zip(fields, values))) for values in together)


def config_of(config: RunConfig, point: Point, steps: int, output: Path) -> RunConfig:
    """The run that a point stands for, in a folder below `output` that is named after it.

    A larger batch takes fewer steps, so that all trials see as many rows: what is compared costs
    the same. The schedule is that of the whole budget. A trial that is stopped early has taken the
    first steps of its full run, and going on takes the next ones: nothing is restarted, and no
    second warmup is needed. Its loss is then read while the rate is still high. That costs bold
    rates more than timid ones, but all candidates of a rung are read at the same place of it.
    """
    training, before = config.training, start_point(config).batch_size
    rows, waves = training.rows, training.gradient_accumulation_steps
    if point.batch_size != before:
        fits = range(1, min(rows, point.batch_size) + 1)
        rows = max(n for n in fits if point.batch_size % n == 0)
        waves = point.batch_size // rows
    steps = scaled(steps, before, point.batch_size)
    made = replace(
        config,
        lora=replace(config.lora, r=point.r),
        training=replace(
            training,
            learning_rate=point.learning_rate,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=waves,
            max_steps=steps,
            num_train_epochs=None,
            warmup_steps=min(training.warmup_steps, steps // WARMUP_SHARE),
            seed=point.seed,
        ),
    )
    name = f"lr{point.learning_rate:g}_r{point.r}_b{point.batch_size}_s{point.seed}"
    decides = json.dumps(deciding_values(made), sort_keys=True)
    folder = output / "trials" / f"{name}_{hashlib.sha256(decides.encode()).hexdigest()[:8]}"
    # The newest checkpoint is all that a trial goes on from; the best one is the sweep's matter.
    checkpointing = replace(
        config.checkpointing,
        output_dir=str(folder),
        save_total_limit=1,
        load_best_model_at_end=False,
        early_stopping_patience=None,
    )
    return replace(made, checkpointing=checkpointing)


def scaled(steps: int, before: int, now: int) -> int:
    """As many steps of `now` rows as see the rows of `steps` steps of `before` rows."""
    return math.ceil(steps * before / now)


def budget(steps: int, rung: int, rungs: int) -> int:
    """The step up to which a trial goes on a rung, counted from 0; the last one is `steps`."""
    return math.ceil(steps / 2 ** (rungs - 1 - rung))


def kept(started: int) -> int:
    """How many candidates of a rung go on: the better half, and the odd one."""
    return (started + 1) // 2
