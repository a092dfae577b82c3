"""A path becomes files, and files become rows: one bad line is named and hides no good one."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.dataset_server import DatasetHub
from support.tiny_folder import write_tokenizer

from mlx_qlora.data import formats
from mlx_qlora.data.files import find_files
from mlx_qlora.data.formats import RowFile, hub_dataset, parse, raw_rows, without_nulls
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.rows import detect_format
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError

ROOT = Path(__file__).parents[2]
ENDINGS = ".jsonl, .ndjson, .json, .csv, .parquet, .arrow"
REMEDY = "rename or remove them, or name the files one by one (data.path, data.test_path, ...)"
LOST = "not JSON, so the rest of the file is lost: "

Rows = list[tuple[int, Any]]


def write(folder: Path, *names: str, content: bytes = b"{}") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def rows_of(file: RowFile) -> Rows:
    """Every row of a file with its line; a refusal as its words."""
    rows = ((line, parse(raw)) for line, raw in raw_rows(file))
    return [(line, str(row) if isinstance(row, DataError) else row) for line, row in rows]


def read(path: Path, content: bytes | str) -> Rows:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return rows_of(find_files(path)["train"][0])


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

# ---- paths -------------------------------------------------------------------------------------


def names(path: Path | str, relative_to: Path) -> dict[str, list[str]]:
    return {
        part: [str(Path(file.path).relative_to(relative_to)) for file in files]
        for part, files in find_files(path).items()
    }


def refusal(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        find_files(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "compressed"),
    [
        ("a.jsonl", "jsonl", False),
        ("a.b.ndjson", "ndjson", False),
        ("a.JSON", "json", False),
        ("a.csv", "csv", False),
        ("a.parquet", "parquet", False),
        ("a.jsonl.gz", "jsonl", True),
        ("a.v2.Json.GZ", "json", True),
        ("a.parquet.gz", "parquet", True),
        ("[a]*.csv", "csv", False),
    ],
)
def test_a_file_is_for_training_and_of_the_kind_that_its_ending_says(
    tmp_path: Path, name: str, kind: str, compressed: bool
) -> None:
    path = write(tmp_path, name, content=b"12345") / name
    file = RowFile(str(path), kind, path, compressed)
    assert find_files(path) == {"train": [file]}
    assert file.size == 5


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.txt", ".txt"), ("a", "no"), ("a.gz", ".gz"), ("a.tar.gz", ".tar.gz"), ("jsonl", "no")],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, ending: str) -> None:
    path = write(tmp_path, name) / name
    reason = f"data file {path}: {ending} ending; supported: {ENDINGS}, each also .gz"
    assert refusal(path) == reason


def test_an_empty_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", content=b"") / "a.jsonl"
    reason = f"{path} is empty; fetch or write it again"
    assert refusal(path) == refusal(tmp_path) == reason
    path = tmp_path / "b.jsonl"
    reason = f"data file {path} is missing; give the path of a file or folder of rows"
    assert refusal(path) == reason
    write(tmp_path, "questions.csv")
    path = tmp_path / "question.csv"
    assert refusal(path) == f"data file {path} is missing; did you mean 'questions.csv'?"


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "rows/a.csv")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/rows/a.csv", "~/rows", "~/rows/*.csv"):
        assert names(path, tmp_path)["train"] == ["rows/a.csv"]


def test_a_folder_is_searched_through_in_order_and_without_what_is_hidden(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a/z.csv", "a/b/c.json.gz", "d.parquet")
    write(tmp_path, ".h.jsonl", "a/.cache/x.jsonl", "README.md", "a/x.txt")
    found = ["a/b/c.json.gz", "a/z.csv", "b.jsonl", "d.parquet"]
    assert names(tmp_path, tmp_path) == {"train": found}
    # A folder inside a hidden one is not hidden itself.
    assert names(tmp_path / "a" / ".cache", tmp_path)["train"] == ["a/.cache/x.jsonl"]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ("gsm_train gsm_test", {"train": "gsm_train", "test": "gsm_test"}),
        ("rows rows_test", {"train": "rows", "test": "rows_test"}),
        ("alpaca alpaca.val dolly.val dolly", {"train": "alpaca dolly"}),
        ("unit-test-writing code", {"train": "code unit-test-writing"}),
        ("web-dev cooking", {"train": "cooking web-dev"}),
        ("driver_training unit_test", {"train": "driver_training", "test": "unit_test"}),
        ("unit_test api_test", {"train": "api_test unit_test"}),
        ("train/unit-test-writing test/a", {"train": "train/unit-test-writing", "test": "test/a"}),
    ],
)
def test_the_last_word_of_a_name_counts_where_all_have_one_or_one_is_the_rest(
    files: str, parts: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path, *(f"{file}.jsonl" for file in files.split()))
    found = names(tmp_path, tmp_path)
    for part, expected in parts.items():
        assert found[part] == [f"{file}.jsonl" for file in expected.split()]


def test_copies_that_datasets_leaves_beside_rows_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path, "data-00000-of-00001.arrow", "cache-1a2b.arrow", "cache-3c.arrow")
    write(tmp_path, "state.json", "dataset_info.json", "dataset_infos.json")
    assert names(tmp_path, tmp_path) == {"train": ["data-00000-of-00001.arrow"]}


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "README.md", ".hidden.jsonl")
    reason = f"data folder {tmp_path} holds no file of rows; supported: {ENDINGS}"
    assert refusal(tmp_path) == reason


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (["train.jsonl"], ["valid.jsonl"], ["test.jsonl"]),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/validation-00000-of-00001.parquet"],
            ["data/test-00000-of-00001.parquet"],
        ),
        (["Training_en.csv", "train.fr.csv"], ["dev.csv", "val-1.csv"], []),
        (["train/a.csv", "train/b/c.csv"], ["dev/a.csv"], ["test/a.csv"]),
        (["en/Train/a.csv", "en/train-1/a.csv"], ["en/validation/x/a.csv"], ["en/test_1/a.csv"]),
        (["train/de/a.csv", "train/en/a.csv"], [], ["test/de/a.csv", "test/en/a.csv"]),
        (["de/train.csv"], ["en/valid.csv"], ["en/test.csv"]),
        (["train/more.csv", "train.csv"], [], ["test.csv"]),
        (["data/a/train.csv"], ["data/a/val.csv"], ["data/test/a/b.csv"]),
    ],
)
def test_a_folder_that_names_its_parts_is_taken_by_them(
    tmp_path: Path, train: list[str], validation: list[str], test: list[str]
) -> None:
    write(tmp_path, *train, *validation, *test)
    parts = {"train": train, "validation": validation, "test": test}
    assert names(tmp_path, tmp_path) == parts


@pytest.mark.parametrize(
    ("part", "sets", "found"),
    [
        # Two configs of a data set on the hub.
        (
            "train",
            ["main", "socratic"],
            [
                f"{config}/{part}-00000-of-00001.parquet"
                for config in ("main", "socratic")
                for part in ("train", "test")
            ],
        ),
        ("train", ["de", "en"], ["de/train/0000.parquet", "en/train/0000.parquet"]),
        ("train", ["", "more"], ["train.csv", "more/train.csv"]),
        ("train", ["a", "a/b"], ["a/train/x.csv", "a/b/train/x.csv"]),
        ("train", ["x", "y"], ["x/a_train.csv", "x/a_test.csv", "y/a_train.csv", "y/a_test.csv"]),
        ("test", ["anatomy", "virology"], ["train.csv", "anatomy/test.csv", "virology/test.csv"]),
        ("validation", ["a", "b"], ["a/train.csv", "a/val.csv", "b/dev/x.csv"]),
    ],
)
def test_a_folder_of_several_data_sets_is_refused_with_their_names(
    tmp_path: Path, part: str, sets: list[str], found: list[str]
) -> None:
    write(tmp_path, *found)
    folders = [tmp_path / each for each in sets]
    assert refusal(tmp_path) == (
        f"data folder {tmp_path} holds several data sets, each with {part} files of its own:\n"
        + "".join(f"  {folder}\n" for folder in folders)
        + f"name one of them (data.path={folders[-1]}), or the files to train on by a pattern "
        f"(such as data.path='{tmp_path}/*/train*')"
    )
    if part == "train":  # each by itself is whole
        own = [name for name in found if name.startswith(f"{sets[-1]}/") and "train" in name]
        assert names(folders[-1], tmp_path)["train"] == own


def test_a_name_that_only_begins_like_a_part_or_is_above_the_folder_is_none(
    tmp_path: Path,
) -> None:
    found = ["testimonials.csv", "tests/a.csv", "trainer.csv", "values.csv"]
    write(tmp_path / "test", *found)
    assert names(tmp_path / "test", tmp_path / "test")["train"] == found


def test_a_file_whose_path_names_two_parts_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "test/train.jsonl")
    with pytest.raises(DataError, match=r"says train and test; rename it"):
        find_files(tmp_path)


def test_files_that_are_for_nothing_beside_named_parts_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", *(f"more-{i}.csv" for i in range(7)))
    assert refusal(tmp_path) == (
        f"data folder {tmp_path} has files whose names say what they are for, and others whose "
        "names do not:\n"
        + "".join(f"  {tmp_path}/more-{i}.csv\n" for i in range(5))
        + f"  ... and 2 more\n{REMEDY}"
    )
    (tmp_path / "train.csv").rename(tmp_path / "test.csv")
    assert "for, and others whose names do not:\n" in refusal(tmp_path)


@pytest.mark.parametrize(
    "found", [["test.jsonl", "valid.jsonl"], ["test/a.csv"], ["a/dev-1.csv", "b/test/train0.csv"]]
)
def test_a_folder_with_named_parts_but_none_to_train_on_is_refused(
    tmp_path: Path, found: list[str]
) -> None:
    write(tmp_path, *found)
    assert refusal(tmp_path) == (
        f"data folder {tmp_path} has files whose names say what they are for, and none for "
        "training:\n" + "".join(f"  {tmp_path}/{name}\n" for name in found) + REMEDY
    )


def test_a_pattern_matches_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", "test.csv", "c/d/train.jsonl", "c/x.txt")
    (tmp_path / "folder.jsonl").mkdir()
    for pattern, found in [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[b-z].json?", ["b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "c/d/train.jsonl"]),
        ("t*", ["test.csv"]),
    ]:
        parts = {"train": found}
        assert names(tmp_path / pattern, tmp_path) == parts
    nothing = f"{tmp_path}/*.csv.gz"
    assert refusal(nothing) == f"data {nothing} matches no file; correct the pattern"
    assert refusal(tmp_path / "c/*.t*").startswith(f"data file {tmp_path}/c/x.txt: .txt ending")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("some-org/My_Data.v1", ("some-org/My_Data.v1", None, None)),
        ("owner/name/config", ("owner/name", "config", None)),
        ("owner/name:validation", ("owner/name", None, "validation")),
        ("owner/name/config:train+test", ("owner/name", "config", "train+test")),
        ("owner/name:train[:10%]", ("owner/name", None, "train[:10%]")),
    ],
)
def test_a_data_set_is_named_by_owner_name_config_and_split(name: str, parts: Any) -> None:
    assert find_files(name)["train"] == [RowFile(name, "hub", parts)]


@pytest.mark.parametrize(
    "name",
    [
        "name",
        "owner/name.jsonl",
        "owner/name.csv.gz",
        "a/b/c/d",
        "/owner/name",
        "owner/name:",
        "owner/na me",
        "owner/name/config:train:test/x",
    ],
)
def test_other_names_are_missing_files(name: str) -> None:
    reason = f"data file {name} is missing; give the path of a file or folder of rows"
    assert refusal(name) == reason


def test_a_folder_goes_before_a_data_set_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "owner/name/a.csv")
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_files("owner/name")["train"]] == ["owner/name/a.csv"]


# ---- JSON lines --------------------------------------------------------------------------------


def test_lines_become_rows_with_their_numbers_and_need_not_be_objects(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}') == [(1, {"a": 1}), (2, {"a": 2})]
    assert read(tmp_path / "a.jsonl", '[1]\n"text"\nnull\n') == [(1, [1]), (2, "text"), (3, None)]
    assert read(tmp_path / "a.jsonl", rb'{"a": "\ud83d\ude00 \ud800"}') == [(1, {"a": "😀 \ud800"})]


def test_bom_crlf_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n\t\r\n{"a": 2}\r\n'
    assert read(tmp_path / "a.jsonl", content) == [(1, {"a": 1}), (5, {"a": 2})]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    row = {"a": "one\u2028two\u2029three\x85four"}
    content = json.dumps(row, ensure_ascii=False) + '\n{"a": 2}\n'
    assert read(tmp_path / "a.jsonl", content) == [(1, row), (2, {"a": 2})]
    for end in ("\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"):
        (one, why), two = read(tmp_path / "a.jsonl", end.join(['{"a": 1}'] * 3) + '\n{"a": 2}')
        assert (one, two) == (1, (2, {"a": 2})) and why.startswith("not JSON: ")


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
        (b'{"a": 1, "a": 2}', "field 'a' appears twice"),
        (b'{"m": [{"role": "user", "role": "tool"}]}', "field 'role' appears twice"),
        (b'{"a": NaN}', "not JSON: NaN is no JSON number"),
        (b'{"a": -Infinity}', "not JSON: -Infinity is no JSON number"),
        # Lines of 5 megabytes.
        (b'{"a": "' + b"x" * 5_000_000, "not JSON: "),
        (b"[" * 5_000_000, "nested too deeply"),
        (b'{"a": "' + b"x" * 5_000_000 + b'\xff"}', "not UTF-8 (byte 5000007)"),
    ],
    ids=itertools.count(),
)
def test_a_bad_line_is_refused_with_its_reason_and_the_others_are_kept(
    tmp_path: Path, bad: bytes, words: str
) -> None:
    long = '{"a": "' + "é" * 2_500_000 + '"}'
    first, (line, reason), last = read(
        tmp_path / "a.jsonl", b'{"a": 1}\n\n' + bad + b"\n" + long.encode() + b"\n"
    )
    assert first == (1, {"a": 1}) and last == (4, json.loads(long))
    assert line == 3 and words in reason


def test_utf_16_is_refused_line_by_line(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.jsonl", '{"a": 1}\r\n{"a": 2}\r\n'.encode("utf-16"))
    assert rows[0] == (1, "not UTF-8 (byte 0)") and len(rows) == 3
    assert all(reason.startswith(("not UTF-8", "not JSON")) for _, reason in rows)


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
    assert read(tmp_path / "a.jsonl", end.join([*lines, b""]) or b"\n") == expected


def test_raw_json_lines_are_bytes_that_are_parsed_later(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", content=b'\xef\xbb\xbf{"a": 1}\nbroken\n')
    raw = list(raw_rows(find_files(tmp_path)["train"][0]))
    assert [(line, bytes(text).strip()) for line, text in raw] == [(1, b'{"a": 1}'), (2, b"broken")]
    for row in ({"a": b"1"}, "text", None, 7, DataError("no row")):
        assert parse(row) is row


# ---- JSON arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_the_items_of_an_array_are_counted(tmp_path: Path, name: str) -> None:
    content = b'\xef\xbb\xbf [\n  {"a": 1},\n\n  {"a":\n 2}, {"a": "x\\ny"}\n] \r\n\t\n'
    items = [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": "x\ny"})]
    assert read(tmp_path / name, content) == items
    assert read(tmp_path / name, " [] \n") == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (b', {"a": tru', f"{LOST}Expecting value"),
        (b', {"a": tru}]', f"{LOST}Expecting value"),
        (b', {"a": {"b": 1, "b": 2}, "c": tru', f"{LOST}Expecting value"),
        (b', {"a": NaN, "c": tru}]', f"{LOST}Expecting value"),
        (b",\n", f"{LOST}Expecting value"),
        (b',, {"a": 2}]', f"{LOST}Expecting value"),
        (b", " + b"[" * 100_000, f"{LOST}nested too deeply"),
        (b"\n", f"{LOST}the file is cut short"),
        (b'\n{"a": 2}]', f"{LOST}a comma is missing"),
        (b'\xff, {"a": 2}]', f"{LOST}a comma is missing"),
        *(
            (b"]" + more, "not JSON: text after the end of the array, which is ignored")
            for more in (b'\n{"a": 2}\n{"a": 3}', b'\n[{"a": 2}]', b"]", b",", b"\0", b" \n\t x")
        ),
    ],
    ids=itertools.count(),
)
def test_an_array_that_breaks_off_keeps_what_came_before_and_says_what_is_lost(
    tmp_path: Path, more: bytes, reason: str
) -> None:
    assert read(tmp_path / "a.json", b'[{"a": 1}' + more) == [(1, {"a": 1}), (2, reason)]


def test_an_array_cut_anywhere_keeps_all_before_and_names_the_item_of_the_cut(
    tmp_path: Path,
) -> None:
    rows = [{"messages": [{"role": "user", "content": f"é {i}\n"}]} for i in range(4)]
    content = ("[" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]").encode()
    ends = [match.end() for match in re.finditer(rb"\]\}", content)]
    assert len(ends) == len(rows)
    for cut in range(2, len(content)):
        found = read(tmp_path / "rows.json", content[:cut])
        n_whole = sum(end <= cut for end in ends)
        assert found[:n_whole] == list(enumerate(rows[:n_whole], 1))
        ((number, reason),) = found[n_whole:]
        assert number == n_whole + 1 and reason.startswith(LOST) and len(reason.splitlines()) == 1


# Items of an array, and what becomes of them: each alone, whatever it is.
MIXED = [
    (b'{"text": "a"}', {"text": "a"}),
    (b'{"a": NaN, "text": "' + b"x" * 100 + b'"}', "not JSON: NaN is no JSON number"),
    (b'{"a": 1, "a": 2, "b": "yyyyyyyyyyyy"}', "field 'a' appears twice"),
    (b'{"a": "caf\xe9 au lait"}', "not UTF-8 (byte 10)"),
    (b"-7.125e-3", -7.125e-3),
    ('{"a": "日本語 😀"}'.encode(), {"a": "日本語 😀"}),
    (b"123456", 123456),
    (b'{"id": ' + b"9" * 30 + b"}", {"id": int("9" * 30)}),
    (b"0.5E+10", 0.5e10),
    (b'[3, "x"]', [3, "x"]),
    (b"null", None),
    (b"-0", 0),
]


@pytest.mark.parametrize("piece", [*range(1, 30), 1000])
def test_an_item_that_is_no_row_hides_no_other_however_the_file_is_cut_into_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(formats, "PIECE", piece)
    draw = random.Random(piece)
    for _ in range(3):
        mixed = draw.sample(MIXED, len(MIXED))
        content = b"[" + b" ,\n".join(text for text, _ in mixed) + b"]"
        expected = [(i, row) for i, (_, row) in enumerate(mixed, 1)]
        assert read(tmp_path / "rows.json", content) == expected


@with_fixture
@given(items, st.lists(st.tuples(blanks, blanks), min_size=6, max_size=6), blanks, st.data())
def test_any_array_comes_back_however_it_is_cut_into_pieces(
    tmp_path: Path, rows: list[Any], between: list[Any], begin: str, data: st.DataObject
) -> None:
    text = f"{begin}["
    for i, (row, (before, after)) in enumerate(zip(rows, between)):
        text += ("," if i else "") + before
        indent = data.draw(st.sampled_from([None, 1]))
        text += json.dumps(row, ensure_ascii=data.draw(st.booleans()), indent=indent) + after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE", data.draw(st.integers(1, 60)))
        assert read(tmp_path / "rows.json", text + "]") == list(enumerate(rows, 1))


def test_an_item_longer_than_a_piece_is_read(tmp_path: Path) -> None:
    rows = [{"a": "é" * formats.PIECE}, {"a": "x" * 3 * formats.PIECE}, {"a": 1}]
    content = json.dumps(rows, ensure_ascii=False, indent=0)
    assert read(tmp_path / "a.json", content) == list(enumerate(rows, 1))


def test_damaged_compression_names_the_file(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for content in (whole[:-20], b"no gzip at all", whole[:30] + b"\0" * 40):
        write(tmp_path, "rows.jsonl.gz", content=content)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz (is damaged|cannot be read): "):
            rows_of(find_files(tmp_path)["train"][0])


# ---- CSV ---------------------------------------------------------------------------------------


def test_csv_rows_may_span_lines_and_are_checked_against_the_header(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbfinstruction,output\r\nsay,"one\r\ntwo, three"\r\nalone\r\n'
        b"b\xe9,x\r\nlast,row\r\n"
    )
    assert read(tmp_path / "rows.csv", content) == [
        (2, {"instruction": "say", "output": "one\r\ntwo, three"}),
        (4, "1 fields, where the header has 2"),
        (5, "not UTF-8; save it as CSV UTF-8"),
        (6, {"instruction": "last", "output": "row"}),
    ]


@with_fixture
@given(
    st.lists(st.tuples(words, words), max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(",;\t"),
)
def test_any_csv_comes_back_with_the_lines_that_its_rows_begin_on(
    tmp_path: Path, rows: list[tuple[str, str]], end: str, bom: bool, mark: str
) -> None:
    text = io.StringIO(newline="")
    text.write(f"instruction{mark}output{end}")
    writer = csv.writer(text, delimiter=mark, quoting=csv.QUOTE_ALL, lineterminator=end)
    expected = []
    for row in rows:
        line = 1 + text.getvalue().count("\n")
        writer.writerow(row)
        expected.append((line, dict(zip(("instruction", "output"), row))))
    content = text.getvalue().encode("utf-8-sig" if bom else "utf-8")
    assert read(tmp_path / "rows.csv", content) == expected


def test_a_header_with_a_comma_has_no_other_mark_between_columns(tmp_path: Path) -> None:
    content = b"output,a;b\tc\n1;2,3\n"
    assert read(tmp_path / "rows.csv", content) == [(2, {"output": "1;2", "a;b\tc": "3"})]
    assert read(tmp_path / "rows.csv", b"text\n1;2\n") == [(2, {"text": "1;2"})]


def test_a_csv_row_that_is_none_hides_no_other(tmp_path: Path) -> None:
    content = 'a,b\n"x"y,z\n\n1,2\n1,2,3\n,\n"open,2\n3,4\n'
    (first, *between, last) = read(tmp_path / "rows.csv", content)
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
        (b'"text"x\na\n', "no header: ',' expected after '\"'"),
        (b"a,b\r1,2\r", "no header: new-line character"),
        ("text,b\r\na,b\r\n".encode("utf-16"), "no header: new-line character seen"),
        (b"a,b,a\n1,2,3\n", "the header has 'a' twice; rename one"),
        (b"text,,\na,,\n", "the header has '' twice; rename one"),
    ],
    ids=itertools.count(),
)
def test_a_csv_file_without_a_proper_header_is_named(
    tmp_path: Path, content: bytes, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows.csv", content)
    assert str(caught.value).startswith(f"data file {tmp_path / 'rows.csv'}, line 1: {words}")


def test_a_csv_header_in_another_encoding_names_the_fields_that_it_lacks(tmp_path: Path) -> None:
    ((line, row),) = read(tmp_path / "a.csv", b"t\xe9xt\na\n")
    with pytest.raises(DataError, match=r"of no format that is known: .* has: 't\\udce9xt'"):
        detect_format(row)
    assert line == 2


def test_a_csv_field_may_be_long_and_a_file_may_hold_no_row(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "a\n" + "x" * 1_000_000) == [(2, {"a": "x" * 1_000_000})]
    assert read(tmp_path / "b.csv", "a,b\n") == []
    assert read(tmp_path / "c.csv.gz", "a,b\n1,2\n") == [(2, {"a": "1", "b": "2"})]


def packed(path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        file.write(b'{"text": "')
        for _ in range(600):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')


def table(**columns: Any) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = {"text": ["a"]} | {name: make(pyarrow) for name, make in columns.items()}
        names = ["text" if name == "twice" else name for name in rows]
        arrays = [pyarrow.array(column) for column in rows.values()]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names), path)

    return write


def struct_of_two(pyarrow: Any) -> Any:
    return pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["x", "x"])


LONG = 2**24 + 1


def of_no_format(path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        for _ in range(60):
            file.write(b'{"a": "' + b"x" * (10 << 20) + b'"}\n')


def repeated_value(path: Path, size: int = LONG) -> None:
    """A value that is there once, for a thousand rows."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000), ["x" * size])
    write = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, **write)


def packed_columns(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: ["x" * 1_000_000] * 150 for name in ("text", "other")})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)


def write_arrow(path: Path, columns: Callable[[Any], dict[str, Any]], form: str = "stream") -> None:
    import pyarrow

    table = pyarrow.table(columns(pyarrow))
    new = getattr(pyarrow.ipc, f"new_{form}")
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as out:
        out.write_table(table)


def long_text(path: Path) -> None:
    write_arrow(path, lambda _: {"text": ["a", "x" * LONG]})


def long_values(path: Path) -> None:
    def column(a: Any) -> Any:
        return a.DictionaryArray.from_arrays(a.array([0] * 100), ["x" * (LONG - 100)])

    write_arrow(path, lambda a: {"text": column(a), "a": column(a), "b": column(a)})


def beyond_the_end(path: Path) -> None:
    write_arrow(path, lambda _: {"text": ["abc"] * 3}, form="file")
    offsets = struct.pack("<4i", 0, 3, 6, 9)
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, struct.pack("<4i", 0, 3, 6, 2**30)))


# What a file holds that unpacks to gigabytes, or to what Python has no value for -> what is said.
STRANGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "an endless line": ("r.jsonl.gz", packed, "line 1: longer than 16,777,216 bytes"),
    "a long line": (
        "r.jsonl",
        lambda path: path.write_bytes(b'{"text": "b"}\n{"text": "' + b"a" * LONG + b'"}\n'),
        "line 2: longer than 16,777,216 bytes",
    ),
    "long rows of no format": ("r.jsonl.gz", of_no_format, "no usable row in"),
    "a long header": ("r.csv", lambda path: path.write_bytes(b"a" * LONG), "line 1: longer than"),
    "a long item": (
        "r.json",
        lambda path: path.write_bytes(b'[{"text": "' + b"a" * 3 * LONG),
        "so the rest of the file is lost",
    ),
    "a quote that never ends": (
        "r.csv",
        lambda path: path.write_bytes(b'text\n"' + b"a\n" * (1 + LONG // 2)),
        "field larger than field limit (16777216)",
    ),
    "many columns": (
        "r.csv",
        lambda path: path.write_text(",".join(map(str, range(100_000))) + "\n0\n"),
        "1 fields, where the header has 100000",
    ),
    "a day beyond all": (
        "r.parquet",
        table(day=lambda a: a.array([2**31 - 1], a.int32()).cast(a.date32())),
        "r.parquet is damaged: ",
    ),
    "a time beyond all": (
        "r.parquet",
        table(time=lambda a: a.array([2**62], a.timestamp("us"))),
        "r.parquet is damaged: ",
    ),
    "a time that takes long": (
        "r.parquet",
        table(time=lambda a: a.array([2**62], a.duration("s"))),
        "r.parquet is damaged: ",
    ),
    "text that is none": (
        "r.parquet",
        table(other=lambda a: a.array([b"\xff"], a.binary()).view(a.string())),
        "r.parquet is damaged: 'utf-8' codec",
    ),
    "a long value, often": ("r.parquet", repeated_value, "row 1 is longer than 16,777,216 bytes"),
    "a very long value, often": (
        "r.parquet",
        lambda path: repeated_value(path, 1 << 26),
        "r.parquet is damaged: it has a dictionary of 67,108,868 bytes",
    ),
    "columns of one long value": ("r.arrow", long_values, "row 1 is longer than 16,777,216 bytes"),
    "columns that are packed": ("r.parquet", packed_columns, "are packed 1000-fold; write smaller"),
    "rows of nothing": (
        "r.arrow",
        lambda path: write_arrow(path, lambda a: {"text": a.nulls(10**9)}),
        "more than 100 rows a byte; write it as JSONL",
    ),
    "an offset beyond the end": ("r.arrow", beyond_the_end, "r.arrow is damaged: In column 0"),
    "a long text of a table": ("r.arrow", long_text, "row 2 is longer than 16,777,216 bytes"),
    "fields of one name": ("r.parquet", table(s=struct_of_two), "r.parquet is damaged: "),
    "columns of one name": (
        "r.parquet",
        table(twice=lambda a: a.array(["b"])),
        "r.parquet is damaged: it names column 'text' twice",
    ),
}


def test_long_rows_as_pyarrow_writes_them_are_read(tmp_path: Path) -> None:
    """Its dictionary of a column has 1,024 rows, however long they are, before it gives it up."""
    pytest.importorskip("pyarrow")
    rows = [{"text": f"{i} " + "x" * 20_000} for i in range(1000)]
    assert [row for _, row in raw_rows(write_parquet(tmp_path / "a.parquet", rows))] == rows


@pytest.mark.parametrize("form", ["stream", "file"])
def test_both_formats_of_arrow_are_read(tmp_path: Path, form: str) -> None:
    """A stream is what `datasets` writes, and a file what pyarrow and pandas call Feather."""
    pytest.importorskip("pyarrow")
    write_arrow(tmp_path / "a.arrow", lambda _: {"text": [f"{i}" for i in range(40)]}, form)
    rows = raw_rows(RowFile("a.arrow", "arrow", tmp_path / "a.arrow"))
    assert [row["text"] for _, row in rows] == [f"{i}" for i in range(40)]


@pytest.mark.parametrize("name", STRANGE)
def test_what_no_row_can_hold_is_one_error(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, write, said = STRANGE[name]
    if file.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    write(tmp_path / file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / file, tokenizer, DataConfig(cache_dir=None, num_workers=0))
    assert said in str(caught.value) and len(str(caught.value)) < 1000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500 << (20 if sys.platform == "darwin" else 10)


# ---- lines and rows ----------------------------------------------------------------------------


def content_of(name: str, texts: list[str]) -> bytes:
    """The content of a file with one row for each text."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": text} for text in texts]
    if name.startswith("array"):
        content = b"\xef\xbb\xbf \n" + json.dumps(rows, indent=1).encode()
    elif ".csv" in name:
        content = "\n".join(["text", *(f'"{text}"' for text in texts)]).encode()
    elif ".parquet" in name:
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
        content = stream.getvalue()
    else:
        content = "\n\n".join(map(json.dumps, rows)).encode()
    return gzip.compress(content) if name.endswith(".gz") else content


@pytest.mark.parametrize(
    ("name", "unit", "number"),
    [
        ("lines.jsonl", "line", 3),
        ("lines.ndjson.gz", "line", 3),
        ("lines.json", "line", 3),
        ("lines.json.gz", "line", 3),
        ("table.csv", "line", 3),
        ("table.csv.gz", "line", 3),
        ("array.json", "row", 2),
        ("array.json.gz", "row", 2),
        ("table.parquet", "row", 2),
        ("table.parquet.gz", "row", 2),
    ],
)
def test_rows_that_have_no_lines_of_their_own_are_counted(
    tokenizer: Tokenizer, tmp_path: Path, name: str, unit: str, number: int
) -> None:
    write(tmp_path / "rows", name, content=content_of(name, ["a", "", "c"]))
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    for cached in (False, True):
        report = read_examples(tmp_path / "rows" / name, tokenizer, config).report
        assert report.cached == cached and [file.unit for file in report.files] == [unit]
        assert report.refusals() == f"  {unit} {number}: field 'text' is empty"
    write(tmp_path / "rows", "good.jsonl", content=b'{"text": "d"}')
    report = read_examples(tmp_path / "rows", tokenizer, config).report
    place = f"{tmp_path / 'rows' / name}, {unit} {number}"
    assert report.refusals() == f"  {place}: field 'text' is empty"


# ---- Parquet -----------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, Any]], **how: Any) -> RowFile:
    import pyarrow
    import pyarrow.parquet

    plain = path.with_suffix("") if path.suffix == ".gz" else path
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain, **how)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return RowFile(path.name, "parquet", path, path.suffix == ".gz")


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_rows_of_parquet_are_counted_from_one(tmp_path: Path, name: str) -> None:
    rows = [
        {"n": i, "text": f"é {i}", "turns": [{"a": "b"}] * (i % 3), "more": {"x": {}, "y": [0]}}
        for i in range(3000)
    ]
    table = [{**row, "turns": [{**turn, "c": None} for turn in row["turns"]]} for row in rows]
    for i, row in enumerate(rows):
        if i % 5 == 0:  # fields that the other rows of the table do not have
            row["id"] = table[i]["id"] = "1"
            table[i]["turns"] = [{"a": "b", "c": [{"d": 1, "e": "f"}, {"d": 2}]}]
            row["turns"] = table[i]["turns"]
            table[i]["more"] = row["more"] = {"x": {"z": True}, "y": []}
    file = write_parquet(tmp_path / name, table, row_group_size=700)
    assert [(n, without_nulls(row)) for n, row in rows_of(file)] == list(enumerate(rows, 1))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    content = Path(whole.path).read_bytes()
    zipped = gzip.compress(content)
    for damaged, compressed in [
        (b"no table", False),
        (content[:-9], False),
        (content, True),
        (zipped[:-12], True),
        (zipped[:20] + b"\0" * 30, True),
    ]:
        (tmp_path / "b.parquet").write_bytes(damaged)
        file = RowFile("b.parquet", "parquet", tmp_path / "b.parquet", compressed)
        with pytest.raises(DataError, match=r"^data file b\.parquet is damaged: "):
            rows_of(file)


def test_damage_far_into_parquet_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = [{"text": f"{i:0100}"} for i in range(4096)]
    how = {"row_group_size": 1024, "compression": "gzip", "use_dictionary": False}
    file = write_parquet(tmp_path / "a.parquet", rows, **how)
    third = pyarrow.parquet.ParquetFile(file.path).metadata.row_group(2).column(0)
    content = bytearray(Path(file.path).read_bytes())
    middle = third.data_page_offset + third.total_compressed_size // 2
    content[middle : middle + 50] = bytes(50)
    Path(file.path).write_bytes(content)
    got = []
    with pytest.raises(DataError, match=r"^data file a\.parquet is damaged after row 2048: "):
        for _, row in raw_rows(file):
            got.append(row)
    assert got == rows[:2048]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as caught:
        rows_of(file)
    assert str(caught.value) == "a.parquet needs pyarrow; run: pip install 'mlx-qlora[parquet]'"


# ---- data sets on the hub ----------------------------------------------------------------------

CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: validation, path: valid.jsonl}
- config_name: small
  data_files: small/train.jsonl
---
"""
DATA_SETS = {
    "owner/name": {
        "README.md": CARD,
        "train.jsonl": b'{"prompt": "a", "completion": "1"}\n{"prompt": "b"}\n'
        b'{"prompt": "c", "completion": "3"}\n',
        "valid.jsonl": b'{"prompt": "v", "completion": "9"}\n',
        "small/train.jsonl": b'{"instruction": "s", "output": "7"}\n',
    },
    "owner/bare": {
        "data/train-00000-of-00002.jsonl": b'{"text": "t 0"}\n',
        "data/train-00001-of-00002.jsonl": b'{"text": "t 1"}\n',
        "data/test-00000-of-00001.jsonl": b'{"text": "t 2"}\n',
    },
}
# Reads in a process of its own, because `datasets` reads its environment on import.
CHILD = """
import json, sys
from pathlib import Path
from mlx_qlora.data.read import read_examples
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import DataError
tokenizer = load_tokenizer(Path(sys.argv[1]))
for source in sys.argv[2:]:
    try:
        made = read_examples(source, tokenizer)
    except DataError as error:
        said = str(error)
    else:
        texts = [tokenizer.decode(e.tokens, skip_special_tokens=True) for e in made]
        report = made.report
        refusals = report.refusals()
        said = [[e.place for e in made], texts, refusals, report.format, report.cached]
    print("SAID " + json.dumps(said))
"""


def read_away(home: Path, hub: str, *sources: str, **environ: str) -> dict[str, Any]:
    """What each source became on a machine with this home folder."""
    kept = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|.*(?i:proxy)", k)}
    kept |= {"HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home), "HF_ENDPOINT": hub}
    kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environ}
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:owner/name",
            "-c",
            CHILD,
            write_tokenizer(home / "tiny"),
            *sources,
        ],
        env={**kept, "PYTHONPATH": str(ROOT)},  # datasets looks for torch by itself
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall("^SAID (.*)$", done.stdout, re.MULTILINE)
    return dict(zip(sources, map(json.loads, said), strict=True))


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A home, a hub that is gone now, and what each source became when it was there."""
    home, hub = tmp_path_factory.mktemp("home"), DatasetHub(repos=DATA_SETS)
    server = hub.start()
    sources = ["owner/name", "owner/name:validation", "owner/name/default:validation+train"]
    sources += ["owner/name/small", "owner/bare", "owner/gone", "owner/name:gone"]
    said = read_away(home, hub.url, *sources, "owner/name/gone")
    server.shutdown()
    server.server_close()
    return home, hub.url, said


def test_data_sets_are_read_by_split_and_config(online: tuple[Path, str, dict[str, Any]]) -> None:
    refused, form = "  row {}: field 'completion' is missing", "prompt_completion"
    text = "### Instruction:\ns\n\n### Response:\n7"
    assert list(online[2].values())[:5] == [
        [["owner/name:1", "owner/name:3"], ["a1", "c3"], refused.format(2), form, False],
        [["owner/name:validation:1"], ["v9"], "", form, False],
        [
            [f"owner/name/default:validation+train:{i}" for i in (1, 2, 4)],
            ["v9", "a1", "c3"],
            refused.format(3),
            form,
            False,
        ],
        [["owner/name/small:1"], [text], "", "alpaca", False],
        [["owner/bare:1", "owner/bare:2"], ["t 0", "t 1"], "", "text", False],
    ]


NOT_LOADED = "data {} is no file, and the data set of that name on the hub cannot be loaded: "


def test_what_the_hub_does_not_have_is_one_message(
    online: tuple[Path, str, dict[str, Any]],
) -> None:
    for name, reason in {
        "owner/gone": "Dataset 'owner/gone' doesn't exist on the Hub",
        "owner/name:gone": 'Unknown split "gone"',
        "owner/name/gone": "'gone' not fou",
    }.items():
        message = online[2][name]
        assert message.startswith(NOT_LOADED.format(name)) and reason in message
        assert "\n" not in message


def test_a_data_set_that_was_read_once_is_read_without_a_hub_and_another_is_one_message(
    online: tuple[Path, str, dict[str, Any]],
) -> None:
    home, hub, before = online
    sources = ["owner/bare", "owner/name/small"]  # `datasets` asks the hub which config is meant
    after = read_away(home, hub, *sources, "owner/never", HF_HUB_OFFLINE="1")
    for name in sources:
        assert after[name] == [*before[name][:4], True]  # from the cache
    assert after["owner/never"] == NOT_LOADED.format("owner/never") + (
        "Couldn't reach 'owner/never' on the Hub (OfflineModeIsEnabled)"
    )


def test_without_datasets_the_hub_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        hub_dataset(find_files("owner/name")["train"][0])
    assert str(caught.value) == (
        "data owner/name is neither a file nor a folder; if it is a data set on the hub, "
        "run: pip install 'mlx-qlora[datasets]'"
    )


def test_a_group_of_rows_that_takes_far_more_memory_than_disk_is_refused(tmp_path, monkeypatch):
    """Of values that differ, which no dictionary holds."""
    monkeypatch.setattr("mlx_qlora.data.formats.MOST_GROUP", 1 << 20)
    pa, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    texts = pa.table({"text": [f"{i}{'a' * 1_000_000}" for i in range(3)]})
    path = tmp_path / "r.parquet"
    parquet.write_table(texts, path, compression="zstd", use_dictionary=False)
    (file,) = find_files(path)["train"]
    with pytest.raises(DataError, match=r"r.parquet is damaged: 3,000,\d+ bytes are packed"):
        next(raw_rows(file))
    monkeypatch.setattr("mlx_qlora.data.formats.MOST_GROUP", 1 << 28)
    assert len(list(raw_rows(file))) == 3
