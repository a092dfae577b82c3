"""One trial of a sweep: up to a rung, from where it stood, and measured there."""

import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_qlora.adapters.several import adapter_names, detach
from mlx_qlora.after.bootstrap import Interval, ratio_interval
from mlx_qlora.config import RunConfig
from mlx_qlora.cpu import blas
from mlx_qlora.errors import ConfigError, did_you_mean, require
from mlx_qlora.fields import typed
from mlx_qlora.folders import remove_leftovers, write_whole
from mlx_qlora.infer.evaluate import score_examples
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora_init import PLAIN
from mlx_qlora.readers import parse_json, read_text
from mlx_qlora.record import deciding_values, write_record
from mlx_qlora.run import Inputs
from mlx_qlora.train.checkpoint import NAMES, RunState
from mlx_qlora.train.loop import Run
from mlx_qlora.train.signals import Interrupted
from mlx_qlora.train.step import StepError

# ---- the grid ------------------------------------------------------------------------------------

ORDER = ("learning_rate", "r", "batch_size")
WORDS = {"learning_rate": "learning rate", "r": "rank", "batch_size": "batch"}
TRIALS = "trials"  # their folder, below the sweep's
DEFAULT_GRID: dict[str, list[Any]] = {"learning_rate": [1e-4, 2e-4, 5e-4]}
WARMUP_SHARE = 10  # a trial warms up for at most a tenth of its steps


@dataclass(frozen=True, order=True)
class Point:
    """One candidate. Points are ordered by caution: of two equally good ones the lower is taken.

    `lora_alpha` is not varied: at a scale of alpha / r the best learning rate depends little on
    the rank (Schulman et al. 2025, "LoRA Without Regret").
    """

    learning_rate: float  # at the end of the warmup
    r: int
    batch_size: int  # rows of an optimiser step, however many micro-batches make it up
    seed: int  # of the adapter, the order of rows and the dropout; the split is the sweep's own

    def label(self, fields: Sequence[str]) -> str:
        """The point in words, as far as these fields go."""
        return ", ".join(f"{WORDS[name]} {getattr(self, name):g}" for name in fields)


def checked_grid(grid: Mapping[str, Sequence[Any]] | None) -> dict[str, list[Any]]:
    """The grid in the order of its stages, from low to high; a ConfigError for a wrong value."""
    grid = grid or DEFAULT_GRID
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
    """A ConfigError for a config whose trials could not share one base or be continued."""
    init = config.lora.init_lora_weights
    if init not in PLAIN:
        raise ConfigError(
            f"lora.init_lora_weights={init} decomposes each matrix, which a sweep would repeat "
            "for each trial; sweep with true or gaussian, and train with it "
            "afterwards"
        )
    if config.model.adapter is not None:
        raise ConfigError(
            "model.adapter: each trial of a sweep begins a new adapter; merge this one "
            "into the model first, or leave it out"
        )
    resume = config.checkpointing.resume_from_checkpoint
    require(resume == "auto", "checkpointing.resume_from_checkpoint", "be auto in a sweep", resume)


def start_point(config: RunConfig) -> Point:
    """The values of the config, from which the first stage varies one."""
    training = config.training
    return Point(training.peak, config.lora.r, training.rows * training.accumulation, training.seed)


def stages(grid: dict[str, list[Any]], product: bool) -> list[tuple[str, ...]]:
    """The fields that are varied at once, stage by stage."""
    return [tuple(grid)] if product else [(name,) for name in grid]


def candidates(start: Point, fields: Sequence[str], grid: dict[str, list[Any]]) -> list[Point]:
    """The points of one stage, from cautious to bold."""
    combinations = itertools.product(*(grid[name] for name in fields))
    return sorted(replace(start, **dict(zip(fields, values))) for values in combinations)


def config_of(config: RunConfig, point: Point, steps: int, output: Path) -> RunConfig:
    """The run that a point stands for, in a folder below `output` that is named after it.

    A larger batch takes fewer steps, so that all trials see as many rows. The schedule is that of
    the whole budget: a trial that is stopped early has taken the first steps of its full run, and
    its loss is read while the rate is still high. That costs bold rates more than cautious ones,
    but all candidates of a rung are read at the same place of it.
    """
    training, start_rows = config.training, start_point(config).batch_size
    rows, micro_batches = training.rows, training.accumulation
    if point.batch_size != start_rows:
        fits = range(1, min(rows, point.batch_size) + 1)
        rows = max(n for n in fits if point.batch_size % n == 0)
        micro_batches = point.batch_size // rows
    steps = scaled(steps, start_rows, point.batch_size)
    trial = replace(
        config,
        lora=replace(config.lora, r=point.r),
        training=replace(
            training,
            learning_rate=point.learning_rate,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            max_steps=steps,
            num_train_epochs=None,
            warmup_steps=min(training.warmup_of(steps), steps // WARMUP_SHARE),
            seed=point.seed,
        ),
    )
    name = f"lr{point.learning_rate:g}_r{point.r}_b{point.batch_size}_s{point.seed}"
    decides = json.dumps(deciding_values(trial), sort_keys=True)
    folder = output / TRIALS / f"{name}_{hashlib.sha256(decides.encode()).hexdigest()[:8]}"
    # The newest checkpoint is all that a trial goes on from; which one is best the sweep decides.
    checkpointing = replace(
        config.checkpointing,
        output_dir=str(folder),
        save_total_limit=1,
        load_best_model_at_end=False,
        early_stopping_patience=None,
    )
    return replace(trial, checkpointing=checkpointing)


def scaled(steps: int, before: int, now: int) -> int:
    """As many steps of `now` rows as see the rows of `steps` steps of `before` rows."""
    return math.ceil(steps * before / now)


def budget(steps: int, rung: int, rungs: int) -> int:
    """The step up to which a trial goes on a rung, counted from 0; the last one is `steps`."""
    return math.ceil(steps / 2 ** (rungs - 1 - rung))


# ---- comparison ----------------------------------------------------------------------------------

# Nats per token. Trials of one seed see the same rows and masks, so that even learning rates of
# 1.0e-7 and 1.1e-7 differ alike on all examples: clear of 0, and of no use to anybody.
WORTH = 1e-3


@dataclass(frozen=True)
class Measured:
    """A trial at a rung, as its record on disk has it."""

    key: str  # hash of the trial's config, model and data: what decides its figures
    step: int
    train_loss: float  # mean nats per supervised token of the last steps, at most 20
    nats: list[float]  # of each validation example, over its tokens; empty if the trial failed
    tokens: list[int]  # supervised ones of each validation example
    failed: str = ""  # why it cannot go on, or nothing
    # Real tokens trained per second by the process that finished the rung; None if only the
    # validation was left to it.
    tokens_per_second: float | None = None
    peak_memory_bytes: int = 0  # MLX's, since then
    seconds: float = 0.0  # wall time of that process since then

    @property
    def validation_loss(self) -> float:
        """Nats per token, as the validation loss of a run is; infinite if the trial failed."""
        return math.inf if self.failed else float(np.sum(self.nats) / np.sum(self.tokens))


def difference(first: Measured, second: Measured) -> Interval:
    """First minus second, in nats per token of the same examples.

    Paired (Koehn 2004, W04-3250): what both find hard or easy cancels. The interval is about the
    choice of validation examples; of the chance in training, the seed, it knows nothing.
    """
    return ratio_interval(np.subtract(first.nats, second.nats), np.array(first.tokens))


def is_clear(apart: Interval) -> bool:
    """Whether the interval leaves out 0, and the difference is at least WORTH."""
    return not apart.includes_zero and abs(apart.estimate) >= WORTH


def standard_error(measured: Measured) -> float:
    """Of the validation loss, over the choice of examples; nats per token.

    That of a ratio of sums, to first order (Cochran 1977, Sampling Techniques, section 6.4).
    """
    n, tokens = len(measured.nats), np.array(measured.tokens)
    residuals = np.array(measured.nats) - measured.validation_loss * tokens
    return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / tokens.sum())


def ties(finalists: Sequence[Measured]) -> list[int]:
    """Positions of the best of some models, and of those whose distance to it is within chance."""
    best = min(finalists, key=lambda measured: measured.validation_loss)
    return [i for i, each in enumerate(finalists) if not is_clear(difference(each, best))]


def in_words(first: str, second: str, apart: Interval) -> str:
    """One sentence: which one is better and by how much, or that chance may have made it so."""
    better, worse = (first, second) if apart.estimate < 0 else (second, first)
    # Both ends: the interval reaches farther to the side where single examples differ much.
    low, high = (-apart.high, -apart.low) if apart.estimate < 0 else (apart.low, apart.high)
    interval = f"{low:.4f} to {high:.4f}" if apart.known else "not known"
    by = abs(apart.estimate)
    if not is_clear(apart):
        shown = f"difference {by:.4f}, interval {interval}"
        return f"{first} and {second} are indistinguishable here ({shown})"
    return f"{better} is better than {worse} by {by:.4f} ({interval}) nats per token"


# ---- a trial -------------------------------------------------------------------------------------


def recorded(config: RunConfig, step: int, inputs: Inputs) -> Measured | None:
    """What an earlier sweep has measured of this very trial at this step, or None.

    What a killed one has left in the trial's folder is removed.
    """
    path, n = _record(config, step), len(inputs.validation or ())
    remove_leftovers(path.parent, NAMES)
    try:
        measured = typed(Measured, parse_json(read_text(path)))
    except (OSError, ValueError, TypeError, LookupError):  # none, or a damaged one
        return None
    same = measured.key == _key(config, inputs) and measured.step == step
    whole = len(measured.nats) == len(measured.tokens) == n and min(measured.tokens) > 0
    whole = whole and all(abs(nats) < 1e99 for nats in measured.nats)  # and is a number
    return measured if same and (whole or measured.failed) else None


def measure(
    config: RunConfig, step: int, model: LlamaForCausalLM, inputs: Inputs, console: Console
) -> Measured:
    """Train a trial up to a step, from its newest checkpoint if it has one, and score it.

    The `config` is the trial's; the model, the shared base, is bare again afterwards; `inputs` are
    the sweep's. Interrupted by a signal, after what was done is saved.
    """
    output, began = Path(config.checkpointing.output_dir), time.perf_counter()
    assert inputs.validation is not None
    output.mkdir(parents=True, exist_ok=True)
    mx.reset_peak_memory()
    failed, may_pass, train_loss, speed = "", False, math.nan, None
    nats, tokens = np.zeros(0), np.zeros(0, int)
    try:
        trial = replace(inputs, config=config).prepare(model).to_resume(console)
        write_record(trial)
        run, speed = _advance(model, trial, step, console)
        train_loss = statistics.fmean(run.state.recent_losses or [math.nan])
        scores = score_examples(model, inputs.tokenizer, inputs.validation)
        if np.isfinite(scores.nats).all():
            nats, tokens = scores.nats, scores.tokens
        else:
            failed = f"step {step}: the validation loss is not finite"
    except StepError as error:  # the other trials go on
        failed, may_pass = str(error), error.again
    finally:
        for name in adapter_names(model):
            detach(model, name)
        mx.clear_cache()
    learned = train_loss, nats.tolist(), tokens.tolist(), failed
    took = speed, mx.get_peak_memory(), time.perf_counter() - began
    measured = Measured(_key(config, inputs), step, *learned, *took)
    if not may_pass:  # what the device gave up is tried again by the next sweep
        write_whole(_record(config, step), json.dumps(asdict(measured)) + "\n")
    return measured


def _advance(
    model: LlamaForCausalLM, trial: Inputs, until: int, console: Console
) -> tuple[Run, float | None]:
    """Take the steps of `train.loop.train` up to one and save them: the run, and real tokens/s."""
    if trial.state.step > until:  # of a sweep with fewer rungs: the steps are taken again
        fresh = RunState(fingerprint=trial.state.fingerprint, config=trial.state.config)
        trial = replace(trial, state=fresh, resumed=None)
    run = Run(model, replace(trial, validation=None), console)
    if trial.resumed is not None:
        run.resume(trial.resumed)
    before, began = run.state.tokens, time.perf_counter()
    with run.stop, run.begin(), blas.threads(1):
        run.take_steps(until)
        saved = run.save_if_new()
        if run.stop.signum is not None:
            raise Interrupted(run.stop.signum, saved)
    tokens = run.state.tokens - before
    return run, tokens / max(time.perf_counter() - began, 1e-9) if tokens else None


def _record(config: RunConfig, step: int) -> Path:
    return Path(config.checkpointing.output_dir) / f"validation-{step}.json"


def _key(config: RunConfig, inputs: Inputs) -> str:
    # What a run learns does not depend on it, but whether a trial failed does.
    patience = config.training.max_skipped_steps
    decides = {"config": deciding_values(config), "patience": patience, **inputs.state.fingerprint}
    # `prepare` names the base where the user did not; that is hashed with the model already.
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
