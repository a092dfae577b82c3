"""What all benchmarks share: the model and data, medians, a table, a plot, and the JSON line."""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
RESULTS = Path(__file__).parent / "results"


def docstrings(tokenizer: Any, max_length: int) -> Any:
    """The demo's data: functions of this machine's Python library, and their docstrings."""
    import docstring_data

    import mlx_qlora as mq

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "docstrings.jsonl"
        docstring_data.write(data)
        return mq.read_examples(data, tokenizer, mq.DataConfig(max_length=max_length))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def shown(found: dict[str, float], digits: int = 0) -> str:
    """A spread in a cell: median (lowest .. highest)."""
    median, low, high = (f"{found[name]:,.{digits}f}" for name in ("median", "lowest", "highest"))
    return f"{median} ({low} .. {high})"


def gigabytes(size: float) -> str:
    """Bytes in a cell."""
    return f"{size / 1e9:.2f} GB"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table for a person."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)


def bars(name: str, title: str, unit: str, values: dict[str, float]) -> Path:
    """Saves a bar chart, one bar per name."""
    return _saved(name, title, lambda axes: _bars(axes, unit, values))


def lines(
    name: str, title: str, x_label: str, y_label: str, series: dict[str, dict[float, float]]
) -> Path:
    """Saves lines, both axes logarithmic: slope 1 is linear growth."""

    def draw(axes: Any) -> None:
        for label, points in series.items():
            axes.plot(list(points), list(points.values()), marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.legend()

    return _saved(name, title, draw)


def finish(name: str, settings: dict[str, Any], results: dict[str, Any], plot: Path) -> None:
    """Prints where the plot is, and the JSON line."""
    from mlx_qlora import device

    print(f"plot: {plot}")
    about = {"benchmark": name, "settings": settings, "machine": device.facts()}
    print(json.dumps({**about, "results": results}, default=str))


def _bars(axes: Any, unit: str, values: dict[str, float]) -> None:
    drawn = axes.barh(list(values), list(values.values()), color="#4477aa")
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.set_xlabel(unit)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _saved(name: str, title: str, draw: Any) -> Path:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    draw(axes)
    axes.set_title(title)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.svg"
    figure.savefig(path)
    plt.close(figure)
    return path
