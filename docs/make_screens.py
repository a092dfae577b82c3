"""Writes the screens in docs/data.md and docs/inspect.svg: what the command itself prints.

Run as: make docs        (or: python docs/make_screens.py)
"""

import io
import os
import re
from pathlib import Path

from rich.console import Console

from mlx_qlora.before.inspect import inspect_data
from mlx_qlora.config import build

DOCS = Path(__file__).parent
COMMAND = "mlx-qlora inspect rows.jsonl --model smollm2-135m --show 1"
CONFIG = {"model": {"source": "smollm2-135m"}, "data": {"path": "rows.jsonl", "cache_dir": None}}
BLOCK = re.compile(rf"(\$ {re.escape(COMMAND)}\n).*?(```)", re.DOTALL)


def screen(console: Console) -> None:
    """Prints what COMMAND prints."""
    before = Path.cwd()
    os.chdir(DOCS / "screens")
    try:
        inspect_data(build(CONFIG), console, show=1)
    finally:
        os.chdir(before)


def page(text: str) -> str:
    """docs/data.md with the screen of today."""
    printed = io.StringIO()
    screen(Console(file=printed, width=100))
    shown = "\n".join(line.rstrip() for line in printed.getvalue().splitlines()).strip()
    return BLOCK.sub(lambda found: f"{found[1]}{shown}\n{found[2]}", text)


def picture() -> str:
    """The same in colour, as SVG."""
    console = Console(
        record=True, width=110, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    screen(console)
    return console.export_svg(title="mlx-qlora inspect", unique_id="inspect")


if __name__ == "__main__":
    path = DOCS / "data.md"
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "inspect.svg").write_text(picture(), encoding="utf-8")
    print(f"wrote the screens of {path}")
