"""Files as they come: one bad line is named and hides no good one."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_qlora.data import files
from mlx_qlora.data.files import RowFile, find_files, parse, raw_rows, read_rows
from mlx_qlora.errors import DataError

with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(words, inside, max_size=3),
    max_leaves=6,
)
items = st.lists(st.dictionaries(words, values, max_size=3) | st.integers() | words, max_size=6)
rows = st.lists(st.dictionaries(words, values, max_size=3), max_size=6)
blanks = st.text(" \t\r\n", max_size=3)


def file_at(path: Path) -> RowFile:
    return find_files(path)["train"][0]


def read(tmp_path: Path, content: bytes, name: str = "rows.jsonl") -> list[tuple[int, Any]]:
    path = tmp_path / name
    path.write_bytes(content)
    return list(read_rows(file_at(path)))


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


@with_fixture
@given(rows, st.lists(st.sampled_from([b"", b" \t", b"\r"])), st.sampled_from([b"\n", b"\r\n"]))
def test_any_lines_come_back_with_their_numbers(
    tmp_path: Path, rows: list[Any], between: list[bytes], end: bytes
) -> None:
    lines, expected = [], []
    for i, row in enumerate(rows):
        lines += between[: i % 3]
        lines.append(json.dumps(row, ensure_ascii=i % 2 == 0).encode())
        expected.append((len(lines), row))
    assert read(tmp_path, end.join([*lines, b""]) or b"\n") == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1, "a": 2}', "field 'a' appears twice"),
        (b'{"m": [{"role": "user", "role": "tool"}]}', "field 'role' appears twice"),
        (b'{"a": NaN}', "not JSON: NaN is no JSON number"),
        (b'{"a": -Infinity}', "not JSON: -Infinity is no JSON number"),
    ],
)
def test_what_python_would_read_and_json_does_not_mean_is_refused(
    tmp_path: Path, line: bytes, words: str
) -> None:
    rows = read(tmp_path, line + b'\n{"a": 2}\n')
    assert [str(row) for _, row in rows] == [words, "{'a': 2}"]
    array = read(tmp_path, b"[" + line + b', {"a": 2}]', "rows.json")
    assert [str(row) for _, row in array] == [words, "{'a': 2}"]


def test_raw_json_lines_are_bytes_that_are_parsed_later(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\nbroken\n')
    raw = list(raw_rows(file_at(tmp_path / "a.jsonl")))
    assert [(line, bytes(text).strip()) for line, text in raw] == [(1, b'{"a": 1}'), (2, b"broken")]
    assert parse(raw[0][1]) == {"a": 1} and isinstance(parse(raw[1][1]), DataError)


@pytest.mark.parametrize("row", [{"a": b"1"}, "text", None, 7, DataError("no row")])
def test_what_is_no_bytes_is_a_row_already(row: Any) -> None:
    assert parse(row) is row


# ---- other kinds of files ----------------------------------------------------------------------


def read_file(path: Path, content: bytes) -> list[tuple[int, Any]]:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    read = read_rows(file_at(path))
    return [(n, str(r) if isinstance(r, DataError) else r) for n, r in read]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_the_items_of_an_array_are_counted(tmp_path: Path, name: str) -> None:
    content = b'\xef\xbb\xbf [\n  {"a": 1},\n\n  {"a":\n 2}, {"a": "x\\ny"}\n]\n'
    assert read_file(tmp_path / name, content) == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": "x\ny"})]
    assert read_file(tmp_path / name, b" [] \n") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"a": 1},\n{"a": tru', "all after it is lost"),
        (b'[{"a": 1},\n{"a": tru}]', "all after it is lost"),
        (b'[{"a": 1},\n{"a": {"b": 1, "b": 2}, "c": tru', "all after it is lost"),
        (b'[{"a": 1},\n{"a": NaN, "c": tru}]', "all after it is lost"),
        (b'[{"a": 1},\n', "all after it is lost"),
        (b'[{"a": 1}\n', "the file is cut short"),
        (b'[{"a": 1}\n{"a": 2}]', "a comma is missing"),
        (b'[{"a": 1},, {"a": 2}]', "all after it is lost"),
        (b'[{"a": 1}]\n[{"a": 2}]', "behind the end of the array is lost"),
        (b'[{"a": 1}, ' + b"[" * 100_000, "nested too deeply"),
        (b'[{"a": 1},\n{"a": "\xff"}, {"a": 2}]', "not UTF-8"),
    ],
)
def test_an_array_that_breaks_off_keeps_what_came_before_and_says_what_is_lost(
    tmp_path: Path, content: bytes, words: str
) -> None:
    first, (number, reason) = read_file(tmp_path / "a.json", content)
    assert first == (1, {"a": 1}) and number == 2 and words in reason


@with_fixture
@given(items, st.lists(st.tuples(blanks, blanks), min_size=6, max_size=6), blanks, st.data())
def test_any_array_comes_back_however_it_is_cut_into_pieces(
    tmp_path: Path, rows: list[Any], between: list[Any], begin: str, data: st.DataObject
) -> None:
    text, expected = f"{begin}[", []
    for i, (row, (before, after)) in enumerate(zip(rows, between)):
        text += ("," if i else "") + before
        expected.append((i + 1, row))
        indent = data.draw(st.sampled_from([None, 1]))
        text += json.dumps(row, ensure_ascii=data.draw(st.booleans()), indent=indent) + after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE", data.draw(st.integers(4, 60)))
        assert read(tmp_path, (text + "]").encode(), "rows.json") == expected


def test_a_bad_item_keeps_to_itself_and_items_need_not_be_objects(tmp_path: Path) -> None:
    content = b'[{"a": 1},\n{"b": 1, "b": 2},\n[3], "x", null, true,\n{"a": 4}]'
    items = [{"a": 1}, "field 'b' appears twice", [3], "x", None, True, {"a": 4}]
    assert read_file(tmp_path / "a.json", content) == list(enumerate(items, 1))


def test_an_item_longer_than_a_piece_is_read(tmp_path: Path) -> None:
    rows = [{"a": "é" * files.PIECE}, {"a": "x" * 3 * files.PIECE}, {"a": 1}]
    content = json.dumps(rows, ensure_ascii=False, indent=0).encode()
    assert [row for _, row in read(tmp_path, content, "a.json")] == rows


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
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz (is damaged|cannot be read): "):
            list(read_rows(file_at(tmp_path / "rows.jsonl.gz")))


@with_fixture
@given(
    st.lists(st.tuples(words, words), max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans()
)
def test_any_csv_comes_back_with_the_lines_that_its_rows_begin_on(
    tmp_path: Path, rows: list[tuple[str, str]], end: str, bom: bool
) -> None:
    text = io.StringIO(newline="")
    text.write(f"instruction,output{end}")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=end)
    expected = []
    for row in rows:
        line = 1 + text.getvalue().count("\n")
        writer.writerow(row)
        expected.append((line, dict(zip(("instruction", "output"), row))))
    content = text.getvalue().encode("utf-8-sig" if bom else "utf-8")
    assert read(tmp_path, content, "rows.csv") == expected


def test_a_csv_row_that_is_none_hides_no_other(tmp_path: Path) -> None:
    content = b'a,b\n"x"y,z\n\n1,2\n1,2,3\n,\n"open,2\n3,4\n'
    (first, *between, last) = read_file(tmp_path / "rows.csv", content)
    assert first[0] == 2 and first[1].startswith("not CSV: ")
    assert between == [
        (4, {"a": "1", "b": "2"}),
        (5, "3 fields, where the header has 2"),
        (6, {"a": "", "b": ""}),
    ]
    assert last[0] == 7 and last[1].startswith("not CSV: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'"open,b\n1,2\n', "no header: unexpected end of data"),
        (b"a,b\r1,2\r", "no header: new-line character"),
        (b"a,b,a\n1,2,3\n", "the header names 'a' twice; give each column its own name"),
    ],
)
def test_a_csv_file_without_a_proper_header_is_named(
    tmp_path: Path, content: bytes, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_file(tmp_path / "rows.csv", content)
    assert f"{tmp_path / 'rows.csv'}, line 1: {words}" in str(caught.value)


def test_a_csv_field_may_be_long_and_a_file_may_hold_no_row(tmp_path: Path) -> None:
    assert read_file(tmp_path / "a.csv", b"a\n" + b"x" * 1_000_000) == [(2, {"a": "x" * 1_000_000})]
    assert read_file(tmp_path / "b.csv", b"a,b\n") == []
    assert read_file(tmp_path / "c.csv.gz", b"a,b\n1,2\n") == [(2, {"a": "1", "b": "2"})]
