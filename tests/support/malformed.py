"""Rows of every format, and lines that are none, for tests and `benchmarks/hostile.py`."""

import json
import random
from collections.abc import Callable
from typing import Any

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
