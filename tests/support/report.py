"""A report with everything in it, made from figures, and a reader of its HTML."""

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.after.answer_metrics import LOWER, paired_row
from mlx_qlora.after.report import Report, write_report
from mlx_qlora.before.plan import Plan
from mlx_qlora.config import RunConfig, build
from mlx_qlora.data.examples import DataReport, FileReport
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.train.loop import TrainResult
from mlx_qlora.train.memory import Schedule

HOSTILE = "<script>alert('1')</script>\"'&</pre></style><img src=x onerror=y>"
VOID = {"meta", "img", "br"}
PLAN = Plan(
    {"base weights": 10**9, "activations": 6 * 10**8}, 8 * 10**9, "M4", 1000,
    Schedule(1, [0]), 4096, 120.0, "", process_bytes=18 * 10**8,
)  # fmt: skip
FILE = FileReport(HOSTILE, "alpaca", read=12, kept=10, refused=[(3, "SECRET"), (7, "SECRET")])
DATA = DataReport(HOSTILE, [FILE], tokens=100, supervised=25, histogram=[(1, 10, 10)])
ROWS = np.full(20, 60.0)
LOSS = paired_row("loss", LOWER, [ROWS, ROWS - 10 - np.arange(20)], np.full(20, 20))
SAMPLE = {"prompt": HOSTILE, "reference": "ref", "before": HOSTILE, "after": "ref"}


def history(steps: int, every: int = 5) -> list[dict[str, Any]]:
    """Records as `metrics.jsonl` has them, each fourth with a validation."""
    records: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        records.append(
            {"step": step, "epoch": step / 100, "loss": 1 + 2 / step, "grad_norm": 1.5,
             "learning_rate": 1e-4, "tokens_per_second": 101.5, "peak_memory_bytes": 10**9}
        )  # fmt: skip
        if step % (4 * every) == 0:
            records.append({"step": step, "eval_loss": 2.125 + 1 / step})
    return records


def scores_of(loss: float, accuracy: float) -> Scores:
    return Scores(loss=loss, perplexity=math.exp(loss), token_accuracy=accuracy, n_tokens=99)


SCORES = {"before": scores_of(3.0, 0.25), "after": scores_of(2.0, 0.5)}


def result_in(folder: Path, records: list[dict[str, Any]]) -> TrainResult:
    steps = int(records[-1]["step"]) if records else 0
    peaks = 2 * 10**9, 21 * 10**8
    return TrainResult(folder, steps, 1.5, 2.0, records, 61.0, 123.0, *peaks, best_step=20)


def written(
    folder: Path,
    records: list[dict[str, Any]] | None = None,
    config: RunConfig | None = None,
    scores: dict[str, Scores] = SCORES,
    **changes: Any,
) -> str:
    """The HTML of a report with everything in it, or with these fields of `Report`."""
    fields: dict[str, Any] = {"samples": [SAMPLE], "data": [DATA], "plan": PLAN}
    fields |= {"loss": LOSS, **changes}
    result = result_in(folder, history(40) if records is None else records)
    result.test_scores = scores
    page = write_report(Report(result, config or build({"model": {"source": HOSTILE}}), **fields))
    return page.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that every tag is closed in its place, and collects what matters.

    Attributes:
        text: with each stretch of white space as one space.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.links, self.text, self.ids = [], [], [], "", set()
        self.feed(html)
        self.close()
        self.text = " ".join(self.text.split())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append((tag, known))
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]
        assert not any(name.startswith("on") for name in known), known
        self.ids |= {known["id"]} if "id" in known else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += f" {data}"
