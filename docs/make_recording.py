"""Makes docs/run.svg and docs/report.png: the tutorial's run, its terminal and its report.

Run as: python docs/make_recording.py        (minutes on two cores; nothing is downloaded)

The report is photographed by a Chromium, as the tests do.

The figures are this machine's of that day, so the picture is made by hand and not by `make docs`.
"""

import io
import os
import re
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
REPORT = (1040, 1048)  # pixels of its picture

ORDER = "Mara from Trieste wants 12 green kites by Sunday."
ASKED = f"--instruction 'Turn the order into one line.' --input '{ORDER}' generation.temperature=0"
ASKED += " generation.repetition_penalty=1 generation.max_new_tokens=40"
# A command, and how many lines of its output are shown at the beginning and at the end.
COMMANDS = [
    ("mlx-qlora inspect rows.jsonl --model smollm2-135m --show 1", 6, 9),
    ("mlx-qlora train --model smollm2-135m --data rows.jsonl --output-dir outputs", 9, 16),
    (f"mlx-qlora generate --model smollm2-135m {ASKED}", 4, 0),
    (f"mlx-qlora generate --adapter outputs {ASKED}", 4, 0),
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
    """Writes the tutorial's rows, by the script that it shows."""
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (script,) = re.findall(r'```python title="make_rows.py"\n(.*?)```', page, re.DOTALL)
    (folder / "make_rows.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, "make_rows.py"], cwd=folder, check=True)


def photograph(report: Path, picture: Path) -> None:
    """Saves the top of a report as a PNG, with the paths as one would type them."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from support.browser import Browser

    text = report.read_text(encoding="utf-8").replace(f"{report.parents[1].resolve()}/", "")
    report.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        browser.open(report, REPORT[0], "light", REPORT[1])
        browser.screenshot(picture, whole=False)
        browser.close()


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
        photograph(Path(name) / "outputs" / "report.html", DOCS / "report.png")
    (DOCS / "run.svg").write_text(picture(record), encoding="utf-8")
    print(f"wrote {DOCS / 'run.svg'} and {DOCS / 'report.png'}")
