"""Ten thousand lines that are no rows: each is named with its line, and no good row is harmed."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.limits import small_chunks

from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.rows import FORMATS
from mlx_qlora.data.tokenizer import Tokenizer

MALFORMED = 2000  # lines for each of the five formats
WORDS = [
    "fox",
    "Paris",
    "blue",
    "é",
    "漢字",
    "😀",
    "\u2028",
    "a\nb",
    "tab\tbed",
    '"',
    "\\",
]
NO_TEXT: list[Any] = [7, -1.5, True, None, [], {}, [1, "a"], {"a": 1}, "", " \n\t "]
MESSAGE = {"role": "user", "content": "hello"}

Row = dict[str, Any]


# ---- good rows, and what must become of them ---------------------------------------------------


def sentence(draw: random.Random) -> str:
    return "x" + " ".join(draw.choices(WORDS, k=draw.randrange(1, 6))) + str(draw.randrange(10**6))


def good_row(form: str, draw: random.Random) -> tuple[Row, str, str]:
    """A row, what stands before its answer, and its answer."""
    asked, about, answer = (sentence(draw) for _ in range(3))
    plain = f"### Instruction:\n{asked}\n\n### Input:\n{about}\n\n### Response:\n"
    chat = f"<|user|>{asked}<|eos|><|assistant|>"
    turns = [("user", asked), ("assistant", answer)]
    return {
        "alpaca": ({"instruction": asked, "input": about, "output": answer}, plain, answer),
        "messages": ({"messages": [{"role": r, "content": c} for r, c in turns]}, chat, answer),
        "sharegpt": (
            {"conversations": [{"from": r, "value": c} for r, c in turns]},
            chat,
            answer,
        ),
        "prompt_completion": ({"prompt": asked, "completion": answer}, asked, answer),
        "text": ({"text": answer}, "", answer),
    }[form]


def as_line(row: Any, draw: random.Random) -> bytes:
    """The row as JSON, in one of the ways that are all the same."""
    text = json.dumps(row, ensure_ascii=False)
    if "\ud800" in text or draw.random() < 0.5:
        text = json.dumps(row)
    return draw.choice([b"", b" ", b"\t"]) + text.encode() + draw.choice([b"", b" ", b"\r"])


# ---- what can be wrong -------------------------------------------------------------------------

Breaks = Callable[[str, Row, random.Random], bytes]


def truncated(form: str, row: Row, draw: random.Random) -> bytes:
    line = as_line(row, draw).strip()
    return line[: draw.randrange(1, len(line))]


def bad_utf8(form: str, row: Row, draw: random.Random) -> bytes:
    line = as_line(row, draw)
    at = draw.randrange(len(line))
    bad = [b"\xff", b"\xfe\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe9 "]
    return line[:at] + draw.choice(bad) + line[at:]


def utf_16(form: str, row: Row, draw: random.Random) -> bytes:
    text = json.dumps(row)
    return text.encode(draw.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]))


def late_bom(form: str, row: Row, draw: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + as_line(row, draw).lstrip()


def nested(form: str, row: Row, draw: random.Random) -> bytes:
    depth = draw.choice([10, 400, 3000, 100_000])
    deep = draw.choice(["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth])
    return draw.choice([deep, f'{{"{min(row)}": {deep}}}']).encode()


def no_json_number(form: str, row: Row, draw: random.Random) -> bytes:
    value = draw.choice(["NaN", "Infinity", "-Infinity", "nan", "+1", "0x10", "01", ".5", "1e"])
    return with_field(row, "id", value)


def thousands_of_digits(form: str, row: Row, draw: random.Random) -> bytes:
    number = draw.choice(["", "-"]) + "9" * draw.randrange(5000, 9000)
    number += draw.choice(["", ".5"])
    return draw.choice([number, f'{{"{min(row)}": {number}}}']).encode()


def half_a_pair(form: str, row: Row, draw: random.Random) -> bytes:
    half = draw.choice(["\\ud800", "\\udfff", "\\udc00\\ud800", "\\ud83dx"])
    return json.dumps(row).replace("x", half, 1).encode()  # a sentence begins with it


def twice(form: str, row: Row, draw: random.Random) -> bytes:
    field = draw.choice(list(row))
    return draw.choice(
        [
            with_field(row, field, json.dumps(row[field])),
            with_field(row, "meta", '{"a": 1, "b": [{"c": 1, "c": 2}]}'),
        ]
    )


def control_sign(form: str, row: Row, draw: random.Random) -> bytes:
    sign = chr(draw.choice([0, 1, 7, 8, 9, 13, 27, 31]))
    return with_field(row, "id", f'"a{sign}b"')


def loose_json(form: str, row: Row, draw: random.Random) -> bytes:
    text = json.dumps(row)
    return draw.choice(
        [
            text + ",",
            text + "}",
            text + text,
            text + "\r" + text,
            text[:-1] + ",}",
            str(row),
            "{" + text,
            "// " + text,
            text + " # done",
            text.replace(":", "=", 1),
            'data: {"a": 1}',
            r'{"text": "\x41"}',
            r'{"text": "\u12"}',
            "instruction,output",
            "<html>",
            "\0",
        ]
    ).encode()


def no_object(form: str, row: Row, draw: random.Random) -> bytes:
    values = [[], [row], ["a", "b"], "text", "", 0, 12.5, -1, True, None, json.dumps(row)]
    return json.dumps(draw.choice(values)).encode()


def other_fields(form: str, row: Row, draw: random.Random) -> bytes:
    keys = ["", "Text", "instructions", "k" * 10_000, "\ud800", "a\nb", "\u2028", "__class__"]
    return json.dumps({key: "a" for key in draw.sample(keys, draw.randrange(4))}).encode()


def field_missing(form: str, row: Row, draw: random.Random) -> bytes:
    row = json.loads(json.dumps(row))
    inside = draw.choice([row, *messages_of(row)])
    del inside[draw.choice([key for key in inside if key != "input"])]
    return as_line(row, draw)


def field_of_another_kind(form: str, row: Row, draw: random.Random) -> bytes:
    row = json.loads(json.dumps(row))
    inside = draw.choice([row, *messages_of(row)])
    key = draw.choice([key for key in inside if key != "input"])
    inside[key] = draw.choice(NO_TEXT[:-1] if key in ("role", "from") else NO_TEXT)
    return as_line(row, draw)


def strange_content(form: str, row: Row, draw: random.Random) -> bytes:
    """What a text or a content could be taken for, and is not."""
    contents: list[Any] = [
        [MESSAGE],
        [{**MESSAGE, "content": "a"}, 7],
        [{"type": "image_url", "image_url": {"url": "a"}}],
        [{"type": "text"}],
        [{"type": ["text"], "text": "a"}],
        [{"type": "text", "text": None}],
        ["hello"],
        [[MESSAGE]],
    ]
    return with_answer(form, row, draw.choice(contents), draw)


def too_long(form: str, row: Row, draw: random.Random) -> bytes:
    return with_answer(form, row, "fox " * 3000, draw)


def with_answer(form: str, row: Row, answer: Any, draw: random.Random) -> bytes:
    row = json.loads(json.dumps(row))
    inside = messages_of(row)
    target = inside[-1] if inside else row
    key = {"messages": "content", "sharegpt": "value", "alpaca": "output", "text": "text"}
    target[key.get(form, "completion")] = answer
    return as_line(row, draw)


def no_answer(form: str, row: Row, draw: random.Random) -> bytes:
    """Rows of which nothing could be learned, and tools that are none."""
    row = json.loads(json.dumps(row))
    if not (turns := messages_of(row)):
        return as_line({key: "" for key in row}, draw)
    if draw.random() < 0.5:
        row["tools"] = draw.choice([7, [1], {"a": 1}, "[", "no", [[]], "[" * 9999])
    elif draw.random() < 0.5:
        turns[-1]["weight"] = draw.choice([0, -0.5, -2, "0", []])
    else:
        turns[-1].update({"role": "user"} if "role" in turns[-1] else {"from": "human"})
    return as_line(row, draw)


def bad_tool_call(form: str, row: Row, draw: random.Random) -> bytes:
    row = json.loads(json.dumps(row))
    for turn in messages_of(row):
        calls = [7, "f", {"a": 1}, [1], [{}], [{"name": 7}], [{"function": []}]]
        calls += [[{"name": "f", "arguments": text}] for text in ("{", "[" * 9999, "[]")]
        turn["tool_calls"] = draw.choice(calls)
    return as_line(row, draw) if messages_of(row) else b"{}"


def messages_of(row: Row) -> list[Row]:
    return row.get("messages") or row.get("conversations") or []


def with_field(row: Row, name: str, value: str) -> bytes:
    """The row and one more field, whose value is written as it is."""
    return f"{json.dumps(row)[:-1]}, {json.dumps(name)}: {value}}}".encode()


KINDS: list[Breaks] = [
    *(truncated, truncated, bad_utf8, utf_16, late_bom, nested, no_json_number),
    *(thousands_of_digits, twice, control_sign, loose_json, no_object, other_fields),
    *(field_missing, field_of_another_kind, strange_content, no_answer, bad_tool_call),
    *(too_long, half_a_pair),
]


def mixture(form: str, n: int, draw: random.Random) -> tuple[bytes, list[int], dict[int, Any]]:
    """A file with n malformed lines: its content, their numbers, and the good rows by number."""
    lines: list[bytes] = []
    bad: list[int] = []
    good: dict[int, Any] = {}

    def add_good() -> None:
        row, before, answer = good_row(form, draw)
        lines.append(as_line(row, draw))
        good[len(lines)] = before, answer

    add_good()
    for i in range(n):
        row, _, _ = good_row(form, draw)
        line = KINDS[i % len(KINDS)](form, row, draw)
        assert b"\n" not in line
        lines.append(line)
        bad.append(len(lines))
        if draw.random() < 0.3:
            add_good()
        if draw.random() < 0.1:
            lines.append(draw.choice([b"", b"  ", b"\t", b"\r", b" \r\r"]))  # no row
    add_good()
    return b"\n".join(lines), bad, good


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
            csv.writer(text).writerow(whole(value) for value in row.values())
            content += text.getvalue().encode() + draw.choice([b"", b"", b"\r\n"])
            good[line] = before, answer
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    for n_workers in (0, 2):
        config = DataConfig(format=form, cache_dir=None, num_workers=n_workers)
        with small_chunks(20_000):
            check(read_examples(path, chatty, config), chatty, bad, good)
