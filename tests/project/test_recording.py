"""docs/run.svg and docs/report.png show a real run, and fetch nothing when they are looked at."""

import re
import runpy
import shlex
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from mlx_qlora import cli

DOCS = Path(__file__).parents[2] / "docs"
MAKER = runpy.run_path(str(DOCS / "make_recording.py"))
SVG = (DOCS / "run.svg").read_text(encoding="utf-8")
NAMESPACE = "http://www.w3.org/2000/svg"  # a name: nobody fetches it
CHARACTER = 12.2  # its width in Rich's pictures


def lines_of(svg: str) -> list[str]:
    """The terminal's lines, top to bottom; each colour is a text, and spaces are none."""
    lines: dict[float, str] = defaultdict(str)
    for text in ElementTree.fromstring(svg).iter(f"{{{NAMESPACE}}}text"):
        if "textLength" in text.attrib:  # the title has none
            column = round(float(text.attrib["x"]) / CHARACTER)
            y = float(text.attrib["y"])
            lines[y] = lines[y].ljust(column) + (text.text or "").replace("\xa0", " ")
    return [lines[y].rstrip() for y in sorted(lines)]


def test_nothing_is_fetched_by_looking_at_it():
    rest = SVG.replace(f'xmlns="{NAMESPACE}"', "")
    assert re.findall(r"https?:|//|@import|@font-face|href|<script|data:", rest) == []
    # What is left of url() points into the picture itself.
    assert set(re.findall(r"url\((.)", rest)) == {"#"}
    assert len(SVG.encode()) < 200_000


@pytest.mark.parametrize("command", [c for c, _, _ in MAKER["COMMANDS"]])
def test_a_command_shown_parses_and_is_shown_whole(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*shlex.split(command)[1:], "--print-config"]) == 0, capsys.readouterr().err
    shown = "\n".join(lines_of(SVG))
    folded = MAKER["folded"](command)
    assert shlex.split(" ".join(line.rstrip("\\") for line in folded))[1:] == shlex.split(command)
    assert "\n".join(folded) in shown


def test_the_run_shown_learned_and_ended():
    shown = "\n".join(lines_of(SVG))
    before, after = re.findall(r"loss ([\d.]+) -> ([\d.]+)", shown)[0]
    assert float(after) < float(before) and "adapter in outputs" in shown
    assert shown.endswith("12 x green kites | Mara, Trieste | due Sunday")
    assert not re.search(r"/tmp|/home|/Users|/root|Traceback|[Ww]arning", shown)


def test_long_outputs_are_cut_and_say_so():
    cut, ten = MAKER["cut"], [str(n) for n in range(10)]
    assert cut(ten, 2, 3) == ["0", "1", "… 5 lines", "7", "8", "9"]
    assert cut(ten, 2, 0) == ["0", "1", "… 8 lines"]
    assert cut(ten, 5, 4) == cut(ten, 20, 0) == ten


def test_a_picture_shows_each_line_and_cuts_wide_ones():
    wide = "step 2/4  loss 1.25  " + "x" * 200
    lines = lines_of(MAKER["picture"]([("mlx-qlora plan", ["data      a & <b>", wide])]))
    assert lines[:2] == ["$ mlx-qlora plan", "data      a & <b>"]
    assert lines[2].startswith("step 2/4  loss 1.25") and len(lines[2]) == MAKER["WIDTH"]
    assert lines[2].endswith("…")


def test_the_picture_of_the_report_is_as_large_as_said():
    picture = Image.open(DOCS / "report.png")
    assert picture.size == MAKER["REPORT"]
    assert (DOCS / "report.png").stat().st_size < 300_000
    assert len(picture.convert("L").getcolors() or []) > 20  # not blank
