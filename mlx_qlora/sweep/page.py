"""The findings of a sweep: what its record holds, sentences, a table and a plot."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mlx_qlora.after.plots import Line, Plot
from mlx_qlora.config import RunConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.readers import parse_json, read_text
from mlx_qlora.sweep import trial as of_trial
from mlx_qlora.sweep.trial import Measured, Point, standard_error

RECORD, BEST, PLOT = "sweep.json", "best.yaml", "sweep.svg"


@dataclass(frozen=True)
class Trial:
    """One point of a sweep, with what was measured at each rung that it has reached, in order."""

    point: Point
    config: RunConfig
    measured: list[Measured]

    @property
    def name(self) -> str:
        """Of its folder below `trials`."""
        return Path(self.config.checkpointing.output_dir).name

    def state(self, rungs: int) -> str:
        """How it ended."""
        if self.measured[-1].failed:
            return f"failed: {self.measured[-1].failed}"
        n = len(self.measured)
        return "finished" if n == rungs else f"stopped at rung {n} of {rungs}"

    def row(self, rungs: int) -> dict[str, Any]:
        """The trial in figures, as `sweep.json` has it; what was not measured is null."""
        last = self.measured[-1]
        finite = not last.failed
        return {
            "name": self.name,
            **asdict(self.point),
            "steps": last.step,
            "train_loss": last.train_loss if finite else None,
            "validation_loss": last.validation_loss if finite else None,
            "validation_loss_error": standard_error(last) if finite else None,
            "state": self.state(rungs),
            "tokens_per_second": last.tokens_per_second,
            "peak_memory_bytes": max(measured.peak_memory_bytes for measured in self.measured),
            "seconds": sum(measured.seconds for measured in self.measured),
        }


@dataclass(frozen=True)
class Stage:
    """One bracket of successive halving."""

    fields: tuple[str, ...]  # what was varied
    points: tuple[Point, ...]  # the candidates
    # Of each rung, who was measured, and who went on, the best first.
    rungs: tuple[tuple[tuple[Point, ...], tuple[Point, ...]], ...]
    winner: Point  # the most cautious of those that the full budget cannot tell from the best

    def row(self, trials: dict[Point, Trial]) -> dict[str, Any]:
        """The stage as `sweep.json` has it: names of trials."""
        rungs = [
            {"measured": [trials[p].name for p in began], "went_on": [trials[p].name for p in on]}
            for began, on in self.rungs
        ]
        return {"varied": self.fields, "rungs": rungs, "winner": trials[self.winner].name}


def read_fingerprint(output: Path) -> dict[str, str] | None:
    """Of the sweep that a folder holds, or None; a ConfigError if its record is damaged."""
    path = output / RECORD
    try:
        return dict(parse_json(read_text(path))["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); remove it if the trials beside it are of this model "
            "and data, or choose another --output-dir"
        ) from None


# ---- sentences -----------------------------------------------------------------------------------


def stage_findings(stage: Stage, trials: dict[Point, Trial]) -> list[str]:
    """The winner against each other candidate, where both were last measured on one rung."""
    findings, won = [], trials[stage.winner]
    winner, lowest = stage.winner.label(stage.fields), stage.rungs[-1][1][0]
    if lowest != stage.winner:
        findings.append(
            f"{lowest.label(stage.fields)} has the lowest loss, but its lead over {winner} may "
            "be chance: among equals the lower learning rate, then the lower rank, then the "
            "smaller batch is chosen"
        )
    for point in stage.points:
        if point == stage.winner:
            continue
        name, other = point.label(stage.fields), trials[point]
        finite = [measured for measured in other.measured if not measured.failed]
        if other.measured[-1].failed:
            findings.append(f"{name} failed: {other.measured[-1].failed}")
        if not finite:
            continue
        rung = len(finite) - 1
        apart = of_trial.difference(won.measured[rung], finite[rung])
        early = rung < len(won.measured) - 1
        where = f", at step {finite[rung].step}, where it was stopped" if early else ""
        findings.append(of_trial.in_words(winner, name, apart) + where)
    return findings


def seed_findings(
    best: Trial, repeated: Trial, stages: list[Stage], trials: dict[Point, Trial]
) -> list[str]:
    """What another seed changes, and which leads are smaller than that."""
    again, seed = repeated.measured[-1], repeated.point.seed
    if again.failed:
        return [f"seed {seed} failed: {again.failed}; the winner is not stable"]
    loss = best.measured[-1].validation_loss
    gap = abs(again.validation_loss - loss)
    findings = [
        f"with seed {seed} the winner's loss is {again.validation_loss:.4f} instead of "
        f"{loss:.4f}: chance in training alone moves it by {gap:.4f}, seen once"
    ]
    for stage in stages:
        finalists, _ = stage.rungs[-1]
        for point in finalists:
            measured = trials[point].measured[-1]
            if point == stage.winner or measured.failed:
                continue
            lead = measured.validation_loss - trials[stage.winner].measured[-1].validation_loss
            if abs(lead) <= gap:
                name = point.label(stage.fields)
                findings.append(f"the difference between {name} and the winner is no larger")
    return findings


def ready_command(output: Path, config: RunConfig, best: Trial) -> str:
    """`mlx-qlora train` with the winner's values, and the length that the config asks for."""
    asked, tried = config.training, best.config.training
    rows, changes = of_trial.start_point(config).batch_size, dict[str, Any]()
    if asked.num_train_epochs is not None:
        changes = {"max_steps": "null", "num_train_epochs": asked.num_train_epochs}
    elif asked.max_steps is not None:
        steps = of_trial.scaled(asked.max_steps, rows, best.point.batch_size)
        changes = {"max_steps": steps} if steps != tried.max_steps else {}
    warmup = of_trial.scaled(asked.warmup_steps or 0, rows, best.point.batch_size)
    if warmup != tried.warmup_steps:
        changes["warmup_steps"] = warmup
    words = ["mlx-qlora", "train", "--config", str(output / BEST)]
    return shlex.join([*words, *(f"training.{name}={value}" for name, value in changes.items())])


# ---- table and plot ------------------------------------------------------------------------------


def table(trials: list[Trial], rungs: int) -> Table:
    """All trials, for the console; 80 columns hold it."""
    shown = Table(title="sweep", title_justify="left", padding=0)
    for head in ("rate", "rank", "batch", "seed", "steps", "train loss", "validation loss"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("tokens/s", justify="right")
    shown.add_column("state")
    for trial in trials:
        row, point = trial.row(rungs), trial.point
        losses = ["-", "-"]
        if row["validation_loss"] is not None:
            error = row["validation_loss_error"]
            losses = [f"{row['train_loss']:.4f}", f"{row['validation_loss']:.4f} ± {error:.4f}"]
        values = (point.learning_rate, point.r, point.batch_size, point.seed, row["steps"])
        speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "-"
        shown.add_row(*map("{:g}".format, values), *losses, speed, row["state"])
    return shown


def plot_of(trials: list[Trial]) -> Plot:
    """Validation loss over the learning rate, with one standard error each way."""
    series: dict[tuple[int, int, int, int], list[tuple[float, float, float]]] = {}
    for trial in trials:
        point = trial.point
        for measured in trial.measured:
            if not measured.failed:
                key = (measured.step, point.r, point.batch_size, point.seed)
                loss = (point.learning_rate, measured.validation_loss, standard_error(measured))
                series.setdefault(key, []).append(loss)
    lines = []
    for (steps, rank, batch, seed), losses in sorted(series.items()):
        rates, values, errors = zip(*sorted(losses))
        label = f"step {steps}, rank {rank}, batch {batch}, seed {seed}"
        lines.append(Line(label, list(zip(rates, values)), errors))
    title = "Validation loss over learning rate"
    return Plot("sweep", title, "nats per token", lines, axis="learning rate", log=True)
