"""The docs site builds without a warning and without a network, and leaves no page out."""

import logging
import re
import socket
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.browser import Browser

ROOT = Path(__file__).parents[2]


class Fetched(HTMLParser):
    """What a browser fetches by itself to show a page; links that a reader may click are not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("img", "script", "iframe", "source"):
            self.found += [values.get("src") or ""]
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.found += [values.get("href") or ""]


def in_nav(nav: Any) -> list[str]:
    """The pages of mkdocs' nav, which is lists of maps of lists."""
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [page for item in items for page in in_nav(item)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    """(the built folder, what was logged at warning or above); sockets are forbidden."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())

    def refuse(*_: Any) -> None:
        raise AssertionError("the build of the docs wants the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        patch.setattr(socket.socket, "connect", refuse)
        logging.getLogger("mkdocs").addHandler(handler)
        try:
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False))
        finally:
            logging.getLogger("mkdocs").removeHandler(handler)
    return folder, records


def test_the_build_has_no_warning(site):
    """What `mkdocs build --strict` counts."""
    assert site[1] == []


def test_every_page_is_in_the_nav_and_the_nav_names_only_pages():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = in_nav(yaml.safe_load(text)["nav"])
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named)) and set(named) == pages


def test_no_page_fetches_anything_from_elsewhere(site):
    built = list(site[0].rglob("*.html"))
    assert len(built) > 20
    for path in built:
        reader = Fetched()
        reader.feed(path.read_text(encoding="utf-8"))
        assert reader.found, path
        strange = [url for url in reader.found if re.match(r"(https?:)?//", url)]
        assert not strange, f"{path}: {strange}"
    for sheet in site[0].rglob("*.css"):
        imported = re.findall(r"url\(['\"]?((?:https?:)?//[^)'\"]+)", sheet.read_text())
        assert not imported, f"{sheet}: {imported}"


def test_links_within_pages_lead_somewhere(site):
    """Anchors too: strict mode says of them only what it calls info."""
    ids = {}
    for path in site[0].rglob("*.html"):
        ids[path.resolve()] = set(re.findall(r'\bid="([^"]+)"', path.read_text(encoding="utf-8")))
    checked = 0
    for path in ids:
        for href in re.findall(r'<a [^>]*href="([^"]+#[^"]+)"', path.read_text(encoding="utf-8")):
            if re.match(r"\w+:", href):
                continue
            file, anchor = href.split("#", 1)
            target = (path.parent / file).resolve() if file else path
            checked += 1
            assert anchor in ids.get(target, ()), f"{path.name}: {href}"
    assert checked > 10


def test_the_python_reference_shows_every_public_name(site):
    import mlx_qlora as mq

    text = (site[0] / "reference" / "python.html").read_text(encoding="utf-8")
    for name in set(mq.__all__) - {"__version__"}:
        assert f'id="mlx_qlora.{name}"' in text, name
    # Docstrings are read as Google's: arguments are a table or list, and not a line of prose.
    assert "gradients of the *sum*" in text or "sum of nats over supervised tokens" in text
    assert not re.search(r"<p>\s*Args:", text)


def test_material_toggles_light_and_dark(site):
    text = (site[0] / "index.html").read_text(encoding="utf-8")
    assert 'data-md-color-scheme="default"' in text and 'data-md-color-scheme="slate"' in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_search_works_in_pages_opened_from_disk(site, browser):
    browser.open(site[0] / "how-to" / "resume-and-stop.html", 1300, "light")
    typed = "const box = document.querySelector('[data-md-component=search-query]');"
    typed += "box.focus(); box.value = 'perplexity'; "
    typed += "box.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}))"
    shown = "[...document.querySelectorAll('.md-search-result__item a')].map(a => a.href).join()"
    found, until = "", time.monotonic() + 30
    while "glossary.html" not in found and time.monotonic() < until:
        browser.run(f"(() => {{ {typed} }})()")
        time.sleep(0.2)
        found = browser.run(shown)
    assert "glossary.html" in found, found
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("width", [1300, 375])
def test_no_page_is_wider_than_its_window_and_no_code_is_cut(site, browser, width):
    wide = "[...document.querySelectorAll('pre > code')].filter("
    wide += "e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    # Every page would build the search index again, which takes longer than the page.
    browser.ask("Network.setBlockedURLs", urls=["*search*"])
    for page in sorted(site[0].rglob("*.html")):
        if page.name in ("404.html", "log.html"):
            continue
        browser.open(page, width, "dark")
        assert browser.run(wide) == [], page
        assert browser.run("document.documentElement.scrollWidth") <= width, page
    browser.ask("Network.setBlockedURLs", urls=[])


def test_the_site_needs_no_torch():
    """What `make docs` installs: the extra `docs`, and nothing of the tests."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = re.findall(r"^\$\(VENV\)/\.docs:.*\n\t(.*)", makefile, re.MULTILINE)
    assert target == ["$(PIP) --editable '.[docs]'"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (asked,) = re.findall(r"^docs = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    assert "mkdocs-material" in asked and not re.search("torch|transformers|peft|trl", asked)
