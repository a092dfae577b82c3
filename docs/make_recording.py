"""Makes docs/run.svg: the commands below really run, and what they print, shown as a terminal.

Run as: python docs/make_recording.py        (a minute on two cores; nothing is downloaded)

The figures are this machine's of that day, so the picture is made by hand and not by `make docs`.
"""

import io
import itertools
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

DOCS = Path(__file__).parent
WIDTH = 100
ROWS = 60
SHORT = 200  # most characters of a function, for steps of a second

# A command, and how many lines of its output are shown at the beginning and at the end.
COMMANDS = [
    ("mlx-qlora inspect docstrings.jsonl --model smollm2-135m --max-length 128", 9, 2),
    (
        "mlx-qlora train --model smollm2-135m --data docstrings.jsonl --batch-size 2 "
        "--max-length 128 "
        "--max-steps 8 training.warmup_steps=2 training.gradient_accumulation_steps=1 "
        "logging.logging_steps=1 generation.max_new_tokens=16",
        4,
        16,
    ),
    (
        "mlx-qlora generate --adapter outputs --seed 0 generation.temperature=0 "
        "--instruction 'Write a one-sentence docstring for this Python function.' "
        "--input 'def is_leap(year): return year % 4 == 0 and (year % 100 or year % 400 == 0)'",
        4,
        0,
    ),
]

# Rich's own template fetches its font from another site. Here each piece of text carries its
# length, so that whatever fixed-width font is there fits.
PAGE = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px;
  line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
# Dark on light pages and on dark ones; the frame that Rich draws sets it off from the latter.
GROUND, INK = (22, 27, 34), (201, 209, 217)
COLOURS = [(72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65)]
COLOURS += [(121, 192, 255), (210, 168, 255), (86, 212, 221), (201, 209, 217)]
THEME = TerminalTheme(GROUND, INK, COLOURS, COLOURS)


def write_data(folder: Path) -> None:
    """Writes the first short rows of the demo's data set."""
    rows = runpy.run_path(str(DOCS.parent / "examples" / "docstring_data.py"))["rows"]
    lines = (json.dumps(row) + "\n" for row in itertools.islice(rows(SHORT), ROWS))
    (folder / "docstrings.jsonl").write_text("".join(lines), encoding="utf-8")


def printed(command: str, folder: Path) -> list[str]:
    """The lines that a command prints, on both streams.

    Raises:
        CalledProcessError: it failed.
    """
    environ = {**os.environ, "PYTHONPATH": str(DOCS.parent), "COLUMNS": str(WIDTH)}
    environ |= {"XDG_CACHE_HOME": str(folder / "cache")}
    made = subprocess.run(
        [sys.executable, "-m", "mlx_qlora", *shlex.split(command)[1:]],
        cwd=folder,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    return [line.rstrip() for line in made.stdout.splitlines()]


def cut(lines: list[str], first: int, last: int) -> list[str]:
    """The first and the last lines; one that says how many are between stands for those."""
    left = len(lines) - first - last
    if left <= 1:
        return lines
    return [*lines[:first], f"… {left} lines", *lines[len(lines) - last :]]


def folded(command: str) -> list[str]:
    """A command over several lines, as it would be typed into a shell."""
    lines, line = [], "$"
    # Only a quoted text may have spaces in it, and it stays whole.
    for word in map(shlex.quote, shlex.split(command)):
        if len(line) + len(word) + 3 > WIDTH:
            lines.append(f"{line} \\")
            line = "   "
        line += f" {word}"
    return [*lines, line]


def picture(shown: list[tuple[str, list[str]]]) -> str:
    """SVG of commands and the lines of each."""
    console = Console(
        record=True, width=WIDTH, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    for number, (command, lines) in enumerate(shown):
        if number:
            console.print()
        for line in folded(command):
            text = Text(line, style="bold")
            text.highlight_regex(r"^\$", "bold green")
            console.print(text, no_wrap=True, overflow="ellipsis")
        for line in lines:
            text = Text(line)
            text.highlight_regex(r"^… \d+ lines$", "dim italic")
            text.highlight_regex(
                r"^(data|lengths|split|epoch|plan|before|training|done|test|advice)\b", "cyan"
            )
            text.highlight_regex(r"\bloss [\d.]+( -> [\d.]+)?", "yellow")
            console.print(text, no_wrap=True, overflow="ellipsis")
    return console.export_svg(title="mlx-qlora", theme=THEME, code_format=PAGE, unique_id="run")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name))
        record = [(c, cut(printed(c, Path(name)), first, last)) for c, first, last in COMMANDS]
    (DOCS / "run.svg").write_text(picture(record), encoding="utf-8")
    print(f"wrote {DOCS / 'run.svg'}")
