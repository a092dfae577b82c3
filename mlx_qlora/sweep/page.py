"""What a sweep has found: sentences, a table, `sweep.json`, `best.yaml` and a plot."""

import dataclasses
import html
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.errors import ConfigError, say
from mlx_qlora.folders import disk_errors, staged
from mlx_qlora.sweep.trial import (
    Measured,
    Point,
    difference,
    in_folder,
    in_words,
    scaled,
    standard_error,
    start_point,
)

# ---- plots ---------------------------------------------------------------------------------------


WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 64, 40, 16, 200  # pixels


COLOURS = ("#0a66c2", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c")


def plot(measured: Mapping[tuple[Point, int], Measured]) -> str:
    """One line for each rank, batch and number of steps; bars are one standard error each way.

    Args:
        measured: (point, rung) -> what was found; failed trials have no place in it.
    """
    series: dict[tuple[int, int, int, int], list[tuple[float, float, float]]] = {}
    for (point, _), found in measured.items():
        if not found.failed:
            name = (found.step, point.r, point.batch_size, point.seed)
            at = point.learning_rate, found.validation_loss, standard_error(found.losses)
            series.setdefault(name, []).append(at)
    points = [point for line in series.values() for point in line]
    xs = [math.log10(rate) for rate, _, _ in points]
    lows, highs = [y - e for _, y, e in points], [y + e for _, y, e in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(lows), max(highs)
    x0, x1 = (x0, x1) if x1 > x0 else (x0 - 0.5, x1 + 0.5)
    y1 = y1 if y1 > y0 else y0 + 1

    def place(rate: float, loss: float) -> tuple[float, float]:
        across = (math.log10(rate) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (loss - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    drawn = []
    for loss in (y0, (y0 + y1) / 2, y1):
        y = place(10**x0, loss)[1]
        drawn.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d0d0d5"/>')
        drawn.append(f'<text x="4" y="{y + 4:.1f}">{loss:.4g}</text>')
    for rate in sorted({rate for rate, _, _ in points}):
        x = place(rate, y0)[0]
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{rate:g}</text>')
    drawn.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">learning rate; nats per token</text>')
    for i, (name, line) in enumerate(sorted(series.items())):
        drawn += _line(sorted(line), place, COLOURS[i % len(COLOURS)])
        steps, rank, batch, seed = name
        label = html.escape(f"step {steps}, rank {rank}, batch {batch}, seed {seed}")
        colour, x, y = COLOURS[i % len(COLOURS)], WIDTH - RIGHT + 12, TOP + 16 * i
        drawn.append(f'<text x="{x}" y="{y}" fill="{colour}">{label}</text>')
    height = max(HEIGHT, TOP + 16 * len(series))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" '
        f'fill="#fff"/><title>validation loss over learning rate</title>{"".join(drawn)}</svg>\n'
    )


def _line(
    line: list[tuple[float, float, float]],
    place: Callable[[float, float], tuple[float, float]],
    colour: str,
) -> list[str]:
    path = " ".join("{:.1f},{:.1f}".format(*place(rate, loss)) for rate, loss, _ in line)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for rate, loss, error in line:
        x, y = place(rate, loss)
        bottom, top = place(rate, loss - error)[1], place(rate, loss + error)[1]
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        drawn.append(f'<path d="M{x:.1f} {bottom:.1f}V{top:.1f}" stroke="{colour}"/>')
    return drawn


# ---- the page ------------------------------------------------------------------------------------


RECORD, BEST, PLOT = "sweep.json", "best.yaml", "sweep.svg"


@dataclass(frozen=True)
class Trial:
    """One point of a sweep.

    Attributes:
        point: its values.
        config: of its run.
        measured: what was measured at each rung that it has reached, in order.
    """

    point: Point
    config: RunConfig
    measured: tuple[Measured, ...]

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


@dataclass(frozen=True)
class Stage:
    """One bracket of successive halving.

    Attributes:
        fields: what was varied.
        points: the candidates.
        rungs: of each rung, who was measured, and who went on, the best first.
        winner: the most cautious of those that the full budget cannot tell from the best.
    """

    fields: tuple[str, ...]
    points: tuple[Point, ...]
    rungs: tuple[tuple[tuple[Point, ...], tuple[Point, ...]], ...]
    winner: Point


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found.

    Attributes:
        output_dir: where its files are.
        trials: in the order in which they began.
        stages: in order.
        winner: the trial to go on with; None while the sweep is under way.
        best: the config in `best.yaml`: the winner's, into a folder of its own.
        findings: sentences on what is better than what, and what cannot be told.
        command: trains the winner for as long as the sweep's config says.
        record: all of that as it stands in `sweep.json`.
    """

    output_dir: Path
    trials: list[Trial]
    stages: list[Stage]
    winner: Trial | None
    best: RunConfig | None
    findings: list[str]
    command: str
    record: dict[str, Any] = field(repr=False)


def read_fingerprint(output: Path) -> dict[str, str] | None:
    """Of the sweep that a folder holds; None if it holds none.

    Raises:
        ConfigError: its record is damaged.
    """
    path = output / RECORD
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); remove it if the trials beside it are of this model "
            "and data, or choose another --output-dir"
        ) from None


def write_sweep(
    output: Path,
    config: RunConfig,
    about: dict[str, Any],
    trials: list[Trial],
    stages: list[Stage],
    winner: Point | None,
    repeated: Point | None,
    console: Console,
) -> SweepResult:
    """Writes the sweep's files; with a winner, prints the table and the sentences, too."""
    by_point = {trial.point: trial for trial in trials}
    best = by_point[winner] if winner is not None else None
    findings = [line for stage in stages for line in stage_findings(stage, by_point)]
    if best is not None and repeated is not None:
        findings += seed_findings(best, by_point[repeated], stages, by_point)
    chosen, command = None, ""
    if best is not None:
        chosen = in_folder(best.config, output / "best")
        asked = dataclasses.replace(config.checkpointing, output_dir=str(output / "best"))
        chosen = dataclasses.replace(chosen, checkpointing=asked)
        command = ready_command(output, config, best)
    rungs = about["rungs"]
    record = {
        **about,
        "finished": best is not None,
        "trials": [row(trial, rungs) for trial in trials],
        "stages": [_stage_record(stage, by_point) for stage in stages],
        "winner": best.name if best else None,
        "findings": findings,
        "command": command,
    }
    with disk_errors(output), staged(output) as staging:
        text = json.dumps(record, indent=2) + "\n"
        (staging / RECORD).write_text(text, encoding="utf-8")
        if chosen is not None:
            (staging / BEST).write_text(to_yaml(chosen), encoding="utf-8")
            lines = {(t.point, i): m for t in trials for i, m in enumerate(t.measured)}
            (staging / PLOT).write_text(plot(lines), encoding="utf-8")
    if best is not None:
        console.print(table(trials, rungs))
        for line in findings:
            say(console, f"finding   {line}")
        say(console, f"winner    {best.name}; {output / BEST}\n          {command}")
    return SweepResult(output, trials, stages, best, chosen, findings, command, record)


# ---- sentences ---------------------------------------------------------------------------------
def stage_findings(stage: Stage, trials: dict[Point, Trial]) -> list[str]:
    """The winner against each other candidate, where both were last measured on one rung."""
    found, won = [], trials[stage.winner]
    best = stage.rungs[-1][1][0]
    if best != stage.winner:
        found.append(
            f"{best.label(stage.fields)} has the lowest loss, but cannot be told from "
            f"{stage.winner.label(stage.fields)}: of equals the lower learning rate, then the "
            "lower rank, then the smaller batch is taken"
        )
    for point in stage.points:
        if point == stage.winner:
            continue
        name, other = point.label(stage.fields), trials[point]
        whole = [m for m in other.measured if not m.failed]
        if other.measured[-1].failed:
            found.append(f"{name} failed: {other.measured[-1].failed}")
        if not whole:
            continue
        rung = len(whole) - 1
        apart = difference(won.measured[rung].losses, whole[rung].losses)
        told = in_words(stage.winner.label(stage.fields), name, apart)
        early = rung < len(won.measured) - 1
        at = f", at step {whole[rung].step}, where it was stopped" if early else ""
        found.append(told + at)
    return found


def seed_findings(
    best: Trial, repeated: Trial, stages: list[Stage], trials: dict[Point, Trial]
) -> list[str]:
    """What another seed changes, and which leads are smaller than that."""
    again = repeated.measured[-1]
    if again.failed:
        return [f"seed {repeated.point.seed} failed: {again.failed}; the winner is not stable"]
    ours = best.measured[-1].validation_loss
    gap = abs(again.validation_loss - ours)
    lines = [
        f"with seed {repeated.point.seed} the winner's loss is {again.validation_loss:.4f} instead "
        f"of {ours:.4f}: chance in training alone, seen once, moves it by {gap:.4f}"
    ]
    for stage in stages:
        last, _ = stage.rungs[-1]
        for point in last:
            measured = trials[point].measured[-1]
            if point == stage.winner or measured.failed:
                continue
            lead = measured.validation_loss - trials[stage.winner].measured[-1].validation_loss
            if abs(lead) <= gap:
                name = point.label(stage.fields)
                lines.append(f"what lies between {name} and the winner is no more than that")
    return lines


def ready_command(output: Path, config: RunConfig, best: Trial) -> str:
    """`mlx-qlora train` with the winner's values, and the length that the config asks for."""
    asked, tried = config.training, best.config.training
    changes: dict[str, Any] = {}
    if asked.num_train_epochs is not None:
        changes = {"max_steps": "null", "num_train_epochs": asked.num_train_epochs}
    elif asked.max_steps is not None:
        rows = start_point(config).batch_size
        steps = scaled(asked.max_steps, rows, best.point.batch_size)
        changes = {"max_steps": steps} if steps != tried.max_steps else {}
    if asked.warmup_steps != tried.warmup_steps:
        changes["warmup_steps"] = asked.warmup_steps
    words = ["mlx-qlora", "train", "--config", str(output / BEST)]
    return shlex.join([*words, *(f"training.{name}={value}" for name, value in changes.items())])


# ---- rows --------------------------------------------------------------------------------------
def row(trial: Trial, rungs: int) -> dict[str, Any]:
    """A trial in figures, as `sweep.json` has it; what was not measured is null."""
    last = trial.measured[-1]
    known = not last.failed
    return {
        "name": trial.name,
        **dataclasses.asdict(trial.point),
        "steps": last.step,
        "train_loss": last.train_loss if known else None,
        "validation_loss": last.validation_loss if known else None,
        "validation_loss_error": standard_error(last.losses) if known else None,
        "state": trial.state(rungs),
        "tokens_per_second": last.tokens_per_second,
        "peak_memory_bytes": max(measured.peak_memory_bytes for measured in trial.measured),
        "seconds": sum(measured.seconds for measured in trial.measured),
    }


def _stage_record(stage: Stage, trials: dict[Point, Trial]) -> dict[str, Any]:
    def names(points: Sequence[Point]) -> list[str]:
        return [trials[point].name for point in points]

    rungs = [{"measured": names(all_), "went_on": names(on)} for all_, on in stage.rungs]
    winner = trials[stage.winner].name
    return {"varied": stage.fields, "rungs": rungs, "winner": winner}


def table(trials: list[Trial], rungs: int) -> Table:
    """All trials, for the console; 80 columns hold it."""
    shown = Table(title="sweep", title_justify="left", padding=0)
    for head in ("rate", "rank", "batch", "seed", "steps", "train loss", "validation loss"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("tokens/s", justify="right")
    shown.add_column("state")
    for trial in trials:
        facts, point = row(trial, rungs), trial.point
        losses = ["-", "-"]
        if facts["validation_loss"] is not None:
            error = facts["validation_loss_error"]
            losses = [f"{facts['train_loss']:.4f}", f"{facts['validation_loss']:.4f} ± {error:.4f}"]
        values = (point.learning_rate, point.r, point.batch_size, point.seed, facts["steps"])
        speed = facts["tokens_per_second"]
        shown.add_row(
            *(f"{value:g}" for value in values),
            *losses,
            f"{speed:,.0f}" if speed else "-",
            facts["state"],
        )
    return shown
