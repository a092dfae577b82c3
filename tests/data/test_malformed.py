"""Ten thousand lines that are no rows: each is named with its line, and no good row is harmed."""

import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest
from support.limits import small_chunks
from support.malformed import (
    Breaks,
    as_line,
    bad_tool_call,
    field_missing,
    field_of_another_kind,
    good_row,
    mixture,
    no_answer,
    no_object,
    other_fields,
    strange_content,
)

from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.rows import FORMATS
from mlx_qlora.data.tokenizer import Tokenizer

MALFORMED = 2000  # lines for each of the five formats
# ---- JSON lines --------------------------------------------------------------------------------


def check(examples: Examples, chatty: Tokenizer, bad: list[int], good: dict[int, Any]) -> None:
    """Every bad line has a reason of its own, every good row the text and the answer it had."""
    refused = examples.report.refused
    assert [line for line, _ in refused] == bad
    assert [reason for _, reason in refused if not is_a_line(reason)] == []
    assert [row.line for row in examples] == list(good)
    assert examples.report.read == len(bad) + len(good)
    for row, (before, answer) in zip(examples, good.values()):
        context, learned = row.tokens[~row.learned], row.tokens[row.learned]
        assert chatty.decode(context) == f"<|bos|>{before}"
        assert chatty.decode(learned) == f"{answer}<|eos|>"
        first = len(context)
        assert row.learned.tolist() == [i >= first for i in range(len(row))]


def is_a_line(reason: str) -> bool:
    return bool(reason.strip()) and len(reason.splitlines()) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_of_ten_thousand_malformed_lines_each_is_named_and_no_good_row_is_harmed(
    form: str, chatty: Tokenizer, tmp_path: Path
) -> None:
    content, bad, good = mixture(form, MALFORMED, random.Random(0))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    config = DataConfig(format=form, cache_dir=None, num_workers=0)
    examples = read_examples(path, chatty, config)
    assert len(bad) == MALFORMED == 10_000 / len(FORMATS)
    check(examples, chatty, bad, good)


@pytest.mark.parametrize("form", FORMATS)
def test_worker_processes_and_a_guessed_format_find_the_same(
    form: str, chatty: Tokenizer, tmp_path: Path
) -> None:
    content, bad, good = mixture(form, 300, random.Random(1))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with small_chunks(3000):
        examples = read_examples(path, chatty, DataConfig(cache_dir=None, num_workers=2))
    assert examples.report.format == form
    check(examples, chatty, bad, good)


# ---- JSON arrays and CSV -----------------------------------------------------------------------

OF_ANOTHER_SHAPE: list[Breaks] = [
    *(no_object, other_fields, field_missing, field_of_another_kind, strange_content, no_answer),
    bad_tool_call,
]


@pytest.mark.parametrize("form", FORMATS)
def test_items_of_an_array_that_are_no_rows_hide_none_behind_them(
    form: str, chatty: Tokenizer, tmp_path: Path
) -> None:
    draw, items, bad, good = random.Random(2), [], [], {}
    for i in range(400):
        row, before, answer = good_row(form, draw)
        if i % 2:
            items.append(OF_ANOTHER_SHAPE[i // 2 % len(OF_ANOTHER_SHAPE)](form, row, draw))
            bad.append(len(items))
        else:
            items.append(as_line(row, draw))
            good[len(items)] = before, answer
    path = tmp_path / "rows.json"
    ends = [draw.choice([b",", b", ", b"\n,\r\n", b",\n\n\t"]) for _ in items[1:]]
    content = b"".join(item + end for item, end in zip(items, [*ends, b"\n"]))
    path.write_bytes(b"\xef\xbb\xbf [" + content + b"]\n")
    for n_workers in (0, 2):
        config = DataConfig(format=form, cache_dir=None, num_workers=n_workers)
        with small_chunks(20_000):
            check(read_examples(path, chatty, config), chatty, bad, good)


@pytest.mark.parametrize("form", ["alpaca", "prompt_completion", "text"])
def test_lines_of_csv_that_are_no_rows_hide_none_behind_them(
    form: str, chatty: Tokenizer, tmp_path: Path
) -> None:
    draw, bad, good = random.Random(3), [], {}
    header = list(good_row(form, draw)[0])
    n = len(header)
    wrong = [b",".join([b"a"] * (n + 1)), b'"a"b' + b",c" * (n - 1), b'""' + b",c" * (n - 1)]
    wrong += [b"a\xff" + b",c" * (n - 1), b"a\rb" + b",c" * (n - 1), b'"a\n\xc3"' + b",c" * (n - 1)]
    content = ",".join(header).encode() + b"\r\n"
    for i in range(1000):
        line = content.count(b"\n") + 1
        row, before, answer = good_row(form, draw)
        if i % 2:
            content += wrong[i // 2 % len(wrong)] + b"\n"
            bad.append(line)
        else:
            text = io.StringIO()
            csv.writer(text).writerow(row.values())
            content += text.getvalue().encode() + draw.choice([b"", b"", b"\r\n"])
            good[line] = before, answer
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    for n_workers in (0, 2):
        config = DataConfig(format=form, cache_dir=None, num_workers=n_workers)
        with small_chunks(20_000):
            check(read_examples(path, chatty, config), chatty, bad, good)
