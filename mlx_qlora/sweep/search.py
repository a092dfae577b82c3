"""A sweep, from a config and a grid to a winner.

Each stage is one bracket of successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): all
candidates get a short budget, the better half goes on from its checkpoints to twice that, and so on
to the full one. Everything known is on disk, so the same command goes on where a killed one ended.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora import device
from mlx_qlora.adapters.origin import original_base
from mlx_qlora.after.bootstrap import FEWEST
from mlx_qlora.after.plots import svg_file
from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.errors import ConfigError, DataError, TrainingError, listing, require, say, warn
from mlx_qlora.folders import check_writable, disk_errors, locked, staged
from mlx_qlora.model.hub import sample_of
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.run import OUTPUT, Inputs, open_inputs
from mlx_qlora.sweep import page, trial
from mlx_qlora.sweep.page import Stage, Trial
from mlx_qlora.sweep.trial import Measured, Point
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.config import batches_of

TOO_FEW_EXAMPLES = 20


def sweep(
    config: RunConfig,
    console: Console,
    grid: Mapping[str, Sequence[Any]] | None = None,
    steps: int | None = None,
    rungs: int = 3,
    *,
    product: bool = False,
    repeat_best: bool = False,
) -> "Sweep":
    """Find a learning rate, a rank and a batch size by short runs.

    Args:
        config: everything that is not varied; `checkpointing.output_dir` is the sweep's folder.
        grid: any of `learning_rate`, `r` and `batch_size` (rows of an optimiser step) -> values.
        steps: the full budget of a trial in optimiser steps; those of the config if not given.
        rungs: how often candidates are compared; the first budget is steps / 2**(rungs - 1).
        product: try all combinations at once, instead of field after field.
        repeat_best: train the winner once more with another seed, to see what chance does.

    Raises:
        UserError: any of its kinds, before anything is trained; or TrainingError, if all
            candidates of a stage fail or the disk does.
        Interrupted: a signal came; the same command goes on.
    """
    values = trial.checked_grid(grid)
    trial.check_swept(config)
    require(1 <= rungs <= 10, "the sweep's rungs", "be from 1 to 10", rungs)
    output = Path(config.checkpointing.output_dir)
    is_sweep = page.read_fingerprint(output) is not None
    check_writable(output, (page.BEST, page.PLOT), OUTPUT, is_ours=lambda _: is_sweep)
    trials = output / trial.TRIALS
    for link in (path for path in (trials, *trials.glob("*")) if path.is_symlink()):
        raise ConfigError(f"{link} is a link, which a sweep does not follow; remove it")
    inputs = _open(config, console)
    config = inputs.config
    if steps is None:
        batches = batches_of(inputs.train, config.data, config.training)
        steps = config.training.total_steps(batches)
    shortest = 2 ** (rungs - 1)
    require(steps >= shortest, "the sweep's steps", f"be at least {shortest}", steps)
    for fields in trial.stages(values, product):  # wrong values, before the model is loaded
        for point in trial.candidates(trial.start_point(config), fields, values):
            trial.config_of(config, point, steps, output)
    with disk_errors(
        output, lambda: "What the trials have saved is kept: the same command goes on"
    ):
        output.mkdir(parents=True, exist_ok=True)
        with locked(output):
            ours, theirs = inputs.state.fingerprint, page.read_fingerprint(output) or {}
            if others := [name for name, hash in ours.items() if theirs.get(name, hash) != hash]:
                raise ConfigError(
                    f"{output} holds a sweep of another {' and '.join(others)}, whose losses "
                    "cannot be compared with these; choose another --output-dir"
                )
            sweep = Sweep(inputs, inputs.load(), console, values, steps, rungs)
            sweep.run(product, repeat_best)
            return sweep


def _open(config: RunConfig, console: Console) -> Inputs:
    """Open what all trials share; the hashes of the model and the data are in its state."""
    if config.training.objective != "sft":
        raise ConfigError(
            "mlx-qlora sweep compares losses of training.objective=sft, and not those of "
            f"{config.training.objective}; leave training.objective out, or train each setting"
        )
    inputs = open_inputs(config, console)
    config, validation, checkpoint = inputs.config, inputs.validation, inputs.checkpoint
    assert checkpoint is not None
    if validation is None or len(validation) < FEWEST:
        raise DataError(
            f"a sweep compares by validation rows, at least {FEWEST}, and there are "
            f"{len(validation or ())}; name some with data.validation_path, or raise data.split's "
            "second share"
        )
    say(console, f"split     {len(inputs.train):,} train, {len(validation):,} validation")
    if len(validation) < TOO_FEW_EXAMPLES:
        warn(console, f"{len(validation)} validation rows show only large differences")
    base = config.model.base_model_name_or_path or original_base(checkpoint.files)
    packing = {name: getattr(config.model, name) for name in ("bits", "group_size", "mode")}
    dtype = str(device.compute_dtype(config.model.dtype))
    model = hashlib.sha256(json.dumps([base, packing, dtype]).encode())
    model.update(sample_of(checkpoint.files.path))
    data = hashlib.sha256((inputs.train.digest + validation.digest).encode())
    fingerprint = {"model": model.hexdigest(), "data": data.hexdigest()}
    return replace(inputs, state=RunState(fingerprint=fingerprint))


@dataclass
class Sweep:
    """A sweep, and what is known of it so far."""

    inputs: Inputs  # what all trials share, with a config of what is not varied
    model: LlamaForCausalLM  # the base, which they share, too
    console: Console
    grid: dict[str, list[Any]]
    steps: int  # the full budget, at the rows of a step that the config has
    rungs: int  # how many budgets there are
    trials: dict[Point, Trial] = field(default_factory=dict)  # in the order in which they began
    done: list[Stage] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # as it stands in `sweep.json`

    def run(self, product: bool, repeat_best: bool) -> None:
        """Run all stages, and the winner once more with another seed if that is asked for."""
        self.write()
        best = trial.start_point(self.inputs.config)
        for fields in trial.stages(self.grid, product):
            best = self.stage(fields, trial.candidates(best, fields, self.grid))
        repeated = None
        if repeat_best:
            repeated = replace(best, seed=best.seed + 1)
            for rung in range(self.rungs):
                if self.measure(repeated, rung).failed:
                    break
        self.write(best, repeated)

    def stage(self, fields: tuple[str, ...], points: list[Point]) -> Point:
        """Halve the points rung by rung; returns the winner."""
        alive, history = points, []
        results: dict[Point, Measured] = {}
        for rung in range(self.rungs):
            results = {point: self.measure(point, rung) for point in alive}
            finite = [point for point in alive if not results[point].failed]
            if not finite:
                reasons = [f"{p.label(fields)}: {results[p].failed}" for p in alive]
                raise TrainingError(f"every candidate failed:\n{listing(reasons)}")
            # Points are in order and sorting is stable: of equals the more cautious one is first.
            best = sorted(finite, key=lambda point: results[point].validation_loss)
            if rung < self.rungs - 1:  # the better half goes on, and the odd one
                best = best[: (len(alive) + 1) // 2]
            history.append((tuple(alive), tuple(best)))
            alive = sorted(best)
            if rung < self.rungs - 1:
                names = "; ".join(point.label(fields) for point in alive)
                say(self.console, f"rung {rung + 1}/{self.rungs}: {names} continue")
        winner = alive[trial.ties([results[point] for point in alive])[0]]  # the most cautious one
        self.done.append(Stage(fields, tuple(points), tuple(history), winner))
        self.write()
        return winner

    def measure(self, point: Point, rung: int) -> Measured:
        """Take a point's figures at a rung from this sweep, from the disk, or by training."""
        config = trial.config_of(self.inputs.config, point, self.steps, self.inputs.output)
        tried = self.trials.setdefault(point, Trial(point, config, []))
        if len(tried.measured) > rung:
            return tried.measured[rung]
        name, steps = tried.name, config.training.max_steps
        assert steps is not None
        step = trial.budget(steps, rung, self.rungs)
        result = trial.recorded(config, step, self.inputs)
        if result is not None:
            say(self.console, f"reused    {name} at step {step}")
        else:
            say(self.console, f"trial     {name}: to step {step} of {steps}")
            result = trial.measure(config, step, self.model, self.inputs, self.console)
        loss = f"failed: {result.failed}" if result.failed else f"{result.validation_loss:.4f}"
        say(self.console, f"          validation loss {loss}")
        tried.measured.append(result)
        return result

    def write(self, winner: Point | None = None, repeated: Point | None = None) -> None:
        """Leave what is known in the folder; with a winner the sweep is over, and says so."""
        output, config, stages = self.inputs.output, self.inputs.config, self.done
        trials = [*self.trials.values()]
        findings = [line for stage in stages for line in page.stage_findings(stage, self.trials)]
        best, command = None, ""
        if winner is not None:
            best = self.trials[winner]
            command = page.ready_command(output, config, best)
            if repeated is not None:
                findings += page.seed_findings(best, self.trials[repeated], stages, self.trials)
        self.record = {
            "fingerprint": self.inputs.state.fingerprint,
            "grid": self.grid,
            "steps": self.steps,
            "rungs": self.rungs,
            "finished": best is not None,
            "trials": [each.row(self.rungs) for each in trials],
            "stages": [stage.row(self.trials) for stage in stages],
            "winner": best.name if best else None,
            "findings": findings,
            "command": command,
        }
        with staged(output) as staging:
            text = json.dumps(self.record, indent=2) + "\n"
            (staging / page.RECORD).write_text(text, encoding="utf-8")
            if best is not None:  # into a folder of its own
                asked = replace(config.checkpointing, output_dir=str(output / "best"))
                text = to_yaml(replace(best.config, checkpointing=asked))
                (staging / page.BEST).write_text(text, encoding="utf-8")
                (staging / page.PLOT).write_text(svg_file(page.plot_of(trials)), encoding="utf-8")
        if best is not None:
            self.console.print(page.table(trials, self.rungs))
            for line in findings:
                say(self.console, f"finding   {line}")
            say(self.console, f"winner    {best.name}; {output / page.BEST}\n          {command}")
