"""Random rows and chats: `python benchmarks/fuzz.py` tries 10,000 and 1,000 of each kind."""

import sys
from pathlib import Path

import pytest
from support.npm_tokenizers import CHATS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fuzz

from mlx_qlora.data import marks


@pytest.mark.parametrize("form", fuzz.FORMATS)
def test_of_random_rows_nothing_differs_in_silence(form):
    counts, wrong = fuzz.try_rows(form, 300, seed=1)
    assert wrong == []
    assert counts["trained"] > 200 and counts["refused"] > 10 and counts["fields counted"] > 50


@pytest.mark.parametrize("chat", CHATS)
def test_random_chats_are_what_transformers_writes(chat):
    counts, wrong = fuzz.try_chats(chat, 40, seed=1)
    assert wrong == []
    assert counts.total() == 40 and counts["refused"] < 30


def test_a_field_that_vanishes_is_seen(monkeypatch):
    monkeypatch.setattr(marks, "HARMLESS", marks.HARMLESS | {"mood", "notes"})
    _, wrong = fuzz.try_rows("text", 50, seed=1)
    assert len(wrong) == 1 and "are counted, not" in wrong[0]
