"""The page and its plots: complete, self-contained, and escaped."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlx_qlora.config import RunConfig
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.report import plot, write_report
from mlx_qlora.train.loop import TrainResult

HISTORY = [
    {"step": s, "loss": 3.0 - s / 10, "learning_rate": 1e-4, "grad_norm": 1.0,
     "tokens_per_second": 100.0, "peak_memory_bytes": 10**9} for s in (5, 10, 15)
] + [{"step": 15, "eval_loss": 2.0}]  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> str:
    result = TrainResult(tmp_path, 15, 1.5, 2.0, HISTORY, 61.0, 123.0, 2 * 10**9)
    scores = {"before": Scores(3.0, 20.1, 0.3, 99), "after": Scores(2.0, 7.4, 0.5, 99)}
    samples = [{"prompt": "<b>&", "before": "x", "after": "y"}]
    return write_report(result, RunConfig(), scores, samples).read_text(encoding="utf-8")


def test_the_page_answers_what_a_person_asks(page):
    for text in (
        "loss 3.0000, perplexity 20.10",
        "loss 2.0000, perplexity 7.40, token accuracy 50.0%, 99 tokens",
        "1.0 minutes",
        "123 real tokens per second",
        "2.00 GB",
        "PeftModel.from_pretrained",
        "lora_alpha: 32",
    ):
        assert text in page, text


def test_the_page_is_self_contained_and_escapes_what_users_wrote(page):
    class Links(HTMLParser):
        found: tuple[str, ...] = ()

        def handle_starttag(self, tag, attrs):
            self.found += tuple(v for k, v in attrs if k in ("src", "href") and v)

    parser = Links()
    parser.feed(page)
    assert not parser.found
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page


def test_plots_are_well_formed_svg_with_every_point(page, tmp_path):
    for path in (tmp_path / "plots").glob("*.svg"):
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    loss = plot(HISTORY, ("loss", "eval_loss"))
    assert loss.count("<polyline") == 2
    assert 'points="64.0,16.0 346.0,112.0' in loss  # highest at the top left, middle in the middle
    assert plot([], ("loss",)) == "<p>nothing was recorded</p>"
