"""Whole runs, as `mlx-qlora train` makes them."""

from typing import Any

from rich.console import Console

from mlx_qlora.commands import open_with_plan
from mlx_qlora.config import build
from mlx_qlora.run import run
from mlx_qlora.train.loop import TrainResult


def train_run(values: dict[str, dict[str, Any]], console: Console | None = None) -> TrainResult:
    """Train with section -> field -> value; quietly, unless a console is given."""
    console = console or Console(quiet=True)
    inputs, plan = open_with_plan(build(values), console)
    return run(inputs, console, plan)
