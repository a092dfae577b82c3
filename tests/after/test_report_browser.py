"""The report as a real browser shows it: two widths, two themes, nothing fetched, nothing amiss."""

import runpy
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import MISSING, Browser, find_browser
from support.report import HOSTILE, history, written

WIDTHS, THEMES = (1200, 375), ("light", "dark")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    long = {"prompt": "x" * 500 + HOSTILE, "before": "no\n" * 80, "after": "y" * 300}
    long["reference"] = "a red car"
    written(folder, history(4000), samples=[long] * 2)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def pixels(path: Path) -> np.ndarray:
    """(height, width) float64 brightness, 0 to 255."""
    return np.asarray(Image.open(path).convert("L"), np.float64)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_the_page_loads_alone_fits_and_draws_every_plot(browser, folder, width, theme):
    page = folder / "report.html"
    browser.open(page, width, theme)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == width

    # Each line is as large as its plot's box, and no text of a plot leaves the plot.
    boxes = browser.run(
        "[...document.querySelectorAll('svg.plot polyline')].map(e => {"
        "const b = e.getBoundingClientRect(), p = e.closest('figure').getBoundingClientRect();"
        "return [b.width / p.width, b.left >= p.left && b.right <= p.right + 1]})"
    )
    assert len(boxes) == 6
    assert all(share > 0.6 and inside for share, inside in boxes), boxes
    outside = browser.run(
        "[...document.querySelectorAll('svg.plot text')].filter(e => {"
        "const b = e.getBoundingClientRect(), p = e.closest('figure').getBoundingClientRect();"
        "return b.left < p.left || b.right > p.right || b.bottom > p.bottom})"
        ".map(e => e.textContent)"
    )
    assert outside == []
    small = browser.run(
        "[...document.querySelectorAll('svg.plot text, p, td, th, pre, a')].filter(e =>"
        "parseFloat(getComputedStyle(e).fontSize) < 11.5).length"
    )
    assert small == 0


def test_hostile_text_is_shown_and_not_run(browser, folder):
    browser.open(folder / "report.html", 1200, "light")
    shown = browser.run("document.querySelector('.sample pre').textContent")
    assert shown.endswith(HOSTILE)
    assert browser.run("document.querySelectorAll('script, img').length") == 0


def test_pictures_are_not_blank_and_the_themes_differ(browser, folder, tmp_path):
    brightness = {}
    for width in WIDTHS:
        for theme in THEMES:
            browser.open(folder / "report.html", width, theme)
            shot = pixels(browser.screenshot(tmp_path / f"{width}-{theme}.png", whole=False))
            assert shot.shape[1] == (750 if width == 375 else 1200)
            # Ink on every tenth of the window: text, lines and cards all the way down.
            assert all(part.std() > 4 for part in np.array_split(shot[:, :], 10)), (width, theme)
            brightness[width, theme] = shot.mean()
        assert brightness[width, "light"] > 200 and brightness[width, "dark"] < 60


@pytest.mark.parametrize("theme", THEMES)
def test_a_plot_that_is_a_file_of_its_own_looks_like_one(browser, folder, tmp_path, theme):
    browser.open(folder / "plots" / "loss.svg", 800, theme, height=260)
    assert browser.complaints() == []
    shot = pixels(browser.screenshot(tmp_path / "loss.png", whole=False))[5:235, 5:715]
    ground = np.median(shot)
    assert ground > 240 if theme == "light" else ground < 50
    assert np.count_nonzero(abs(shot - ground) > 60) > 1500  # lines and text


def test_without_a_browser_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(AssertionError) as error:
        find_browser()
    assert MISSING in str(error.value) and "apt-get install -y chromium" in MISSING


@pytest.mark.slow
def test_the_demo_s_report_answers_the_five_questions(
    browser, tmp_path, monkeypatch, short_smollm2
):
    """The real demo, cut short: its model, its rows, its page."""
    monkeypatch.syspath_prepend(str(short_smollm2))
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    demo = runpy.run_path(str(examples / "demo.py"))
    main = demo["main"]
    short = {"LEAST_FALL": -1.0, "TEST_ROWS": 3, "VALIDATION_ROWS": 2}
    short |= {"BATCH_SIZE": 2, "MAX_NEW_TOKENS": 6}
    import docstring_data

    first = list(islice(docstring_data.rows(), 400))
    monkeypatch.setattr(docstring_data, "rows", lambda: first)
    for name, value in short.items():
        monkeypatch.setitem(main.__globals__, name, value)
    out = tmp_path / "demo"
    monkeypatch.setattr("sys.argv", ["demo.py", "--output-dir", str(out), "--max-steps", "2"])
    assert main() == 0

    brightness = {}
    for theme in THEMES:
        browser.open(out / "report.html", 1200, theme)
        assert browser.complaints() == []
        assert browser.run("document.querySelectorAll('svg.plot polyline').length") >= 5
        browser.screenshot(tmp_path / f"{theme}.png")
        brightness[theme] = pixels(tmp_path / f"{theme}.png").mean()
    assert brightness["light"] > 180 and brightness["dark"] < 75
    text = browser.run("document.body.innerText")
    for words in ("learn", "overfit", "answers", "cost", "use"):
        assert words in text.lower(), words
    samples = browser.run("document.querySelectorAll('.sample').length")
    assert samples == 3
