"""Files as they come: one bad line is named and hides no good one."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora.data.formats import read_rows
from mlx_qlora.errors import DataError


def read(tmp_path: Path, content: bytes, name: str = "rows.jsonl") -> list[tuple[int, Any]]:
    path = tmp_path / name
    path.write_bytes(content)
    return list(read_rows(path))


def test_lines_become_rows_with_their_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, b'{"a": 1}\n{"a": 2}\n') == [(1, {"a": 1}), (2, {"a": 2})]
    assert read(tmp_path, b'{"a": 1}\n{"a": 2}') == [(1, {"a": 1}), (2, {"a": 2})]


def test_bom_crlf_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n\t\r\n{"a": 2}\r\n'
    assert read(tmp_path, content) == [(1, {"a": 1}), (5, {"a": 2})]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
    row = {"a": text.replace("\x0b", "").replace("\x0c", "").replace("\x1c", "")}
    content = json.dumps(row, ensure_ascii=False).encode() + b'\n{"a": 2}\n'
    assert read(tmp_path, content) == [(1, row), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"a": "\xff\xfe"}', "not UTF-8 (byte 7)"),
        (b'{"a": 1', "not JSON: "),
        (b"{'a': 1}", "at column 2"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data at column 10"),
        (b'{"a": "tab\there"}', "not JSON: Invalid control character"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: "),
        (b"instruction,output", "not JSON: "),
        (b"\x00", "not JSON: "),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON: "),  # a BOM belongs to the start of the file alone
    ],
)
def test_a_bad_line_is_refused_with_its_reason_and_the_others_are_kept(
    tmp_path: Path, bad: bytes, words: str
) -> None:
    rows = read(tmp_path, b'{"a": 1}\n\n' + bad + b'\n{"a": 2}\n')
    assert [number for number, _ in rows] == [1, 3, 4]
    assert rows[0][1] == {"a": 1} and rows[2][1] == {"a": 2}
    assert isinstance(rows[1][1], DataError)
    assert words in str(rows[1][1])


def test_utf_16_is_refused_line_by_line(tmp_path: Path) -> None:
    rows = read(tmp_path, '{"a": 1}\n'.encode("utf-16"))
    assert all("not UTF-8" in str(row) or "not JSON" in str(row) for _, row in rows)


def test_values_that_are_no_objects_are_left_to_the_template(tmp_path: Path) -> None:
    assert read(tmp_path, b'[1]\n"text"\nnull\n') == [(1, [1]), (2, "text"), (3, None)]


def test_a_line_of_5_megabytes_is_read(tmp_path: Path) -> None:
    row = {"a": "é" * 2_500_000}
    content = json.dumps(row, ensure_ascii=False).encode() + b'\n{"a": 2}\n'
    assert read(tmp_path, content) == [(1, row), (2, {"a": 2})]


def test_escaped_surrogates_survive(tmp_path: Path) -> None:
    assert read(tmp_path, rb'{"a": "\ud83d\ude00 \ud800"}') == [(1, {"a": "😀 \ud800"})]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.jsonl", "is missing; give the path of a JSONL file"),
        ("folder.jsonl", "is a folder; give the path of a JSONL file"),
        ("empty.jsonl", "is empty"),
        ("rows.txt", ".txt ending; known: .jsonl, .ndjson, .json, .csv, each also .gz"),
    ],
)
def test_a_file_that_cannot_be_rows_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / name))
    assert words in str(caught.value) and name in str(caught.value)


# ---- other kinds of files ----------------------------------------------------------------------


def read_file(path: Path, content: bytes) -> list[tuple[int, Any]]:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return [(n, str(r) if isinstance(r, DataError) else r) for n, r in read_rows(path)]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_the_items_of_an_array_come_with_the_lines_they_begin_on(tmp_path: Path, name: str) -> None:
    content = b'\xef\xbb\xbf [\n  {"a": 1},\n\n  {"a":\n 2}, {"a": "x\\ny"}\n]\n'
    assert read_file(tmp_path / name, content) == [(2, {"a": 1}), (4, {"a": 2}), (5, {"a": "x\ny"})]


def test_an_array_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    first, second = read_file(tmp_path / "a.json", b'[{"a": 1},\n{"a": tru')
    assert first == (1, {"a": 1}) and second[0] == 2 and "all after it is lost" in second[1]
    assert read_file(tmp_path / "b.json", b'[{"a": 1}\n')[1] == (
        2,
        "the array is not closed: the file is cut short",
    )
    assert read_file(tmp_path / "c.json", b'[{"a": "\xff"}]') == [
        (1, "not UTF-8: nothing of this array can be read")
    ]
    assert read_file(tmp_path / "d.json", b"[]") == []


def test_a_json_file_may_hold_lines_and_lines_may_be_compressed(tmp_path: Path) -> None:
    lines = b'{"a": 1}\n\n{"a": 2}\n'
    for name in ("a.json", "b.jsonl.gz", "c.ndjson"):
        assert read_file(tmp_path / name, lines) == [(1, {"a": 1}), (3, {"a": 2})]


def test_csv_rows_may_span_lines_and_are_checked_against_the_header(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbfinstruction,output\r\nsay,"one\r\ntwo, three"\r\nalone\r\n'
        b"b\xe9,x\r\nlast,row\r\n"
    )
    assert read_file(tmp_path / "rows.csv", content) == [
        (2, {"instruction": "say", "output": "one\r\ntwo, three"}),
        (4, "1 fields, where the header has 2"),
        (5, "not UTF-8"),
        (6, {"instruction": "last", "output": "row"}),
    ]


def test_damaged_compression_names_the_file(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for content in (whole[:-20], b"no gzip at all", whole[:30] + b"\0" * 40):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz is damaged"):
            list(read_rows(tmp_path / "rows.jsonl.gz"))
