"""Rows, files and signs that no one expects: none stops a run, hides a row or is half a reason."""

import errno
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.tiny_folder import CHAT, write_tokenizer

from mlx_qlora.before import inspect
from mlx_qlora.data import examples, files
from mlx_qlora.data.batches import make_batches
from mlx_qlora.data.examples import DataReport, Example, Examples, FileReport, write_refused
from mlx_qlora.data.files import RowFile, find_files, read_rows
from mlx_qlora.data.read import DataConfig, read_examples, train_validation_test
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError, DataError

GOOD = '{"text": "a"}'
TURNS = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


def read(path: Path, content: str | bytes, tokenizer: Tokenizer, **how: Any) -> Examples:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(path, tokenizer, DataConfig(cache_dir=None, num_workers=0, **how))


def found(path: Path, content: str) -> list[tuple[int, Any]]:
    path.write_text(content)
    rows = read_rows(RowFile(path.name, path.suffix[1:], path))
    return [(n, str(row) if isinstance(row, DataError) else row) for n, row in rows]


# ---- values ------------------------------------------------------------------------------------


def test_nesting_that_parses_but_cannot_be_written_again_is_no_crash(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    deep = [
        f'{{"messages": [{{"role": "user", "content": "q", "x": {"[" * d}{"]" * d}}}, '
        '{"role": "assistant", "content": "a"}]}'
        for d in range(900, 1000)
    ]
    examples = read(tmp_path / "a.jsonl", "\n".join([json.dumps(TURNS), *deep]), tokenizer)
    refused = examples.report.refused
    kept = [example.line for example in examples]
    assert kept[0] == 1 and sorted(kept + [line for line, _ in refused]) == list(range(1, 102))
    assert {why for _, why in refused} <= {"nested too deeply", "not JSON: nested too deeply"}


@pytest.mark.parametrize("extra", [{"t": {1: 2, "a": 3}}, {"t": {(1, 2): 3}}, {"t": 10**6000}])
def test_a_message_in_memory_that_json_cannot_hold_is_refused(
    extra: dict[str, Any], tokenizer: Tokenizer
) -> None:
    question, answer = TURNS["messages"]
    report = read_examples([TURNS, {"messages": [{**question, **extra}, answer]}], tokenizer).report
    ((number, why),) = report.refused
    assert number == 2 and why.startswith("holds what JSON cannot: ")


def test_what_a_row_in_memory_does_not_say_may_be_anything(tokenizer: Tokenizer) -> None:
    rows = [{"text": "a", "id": 10**6000}, {"text": "a", (1, 2): {1: 2, "a": 3}}]
    report = read_examples(rows, tokenizer).report
    assert (report.kept, report.duplicates) == (2, 1)


# ---- arrays and tables -------------------------------------------------------------------------


def test_an_item_with_a_name_twice_may_lie_across_what_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [
        GOOD,
        '{"a": NaN, "text": "' + "x" * 100 + '"}',
        '{"a": 1, "a": 2, "b": "yyyyyyyyyyyyyyyyyyyyyyy"}',
        GOOD,
    ]
    for piece in (1, 7, 40):
        monkeypatch.setattr(files, "PIECE", piece)
        assert found(tmp_path / "a.json", "[" + ",\n".join(items) + "]") == [
            (1, {"text": "a"}),
            (2, "not JSON: NaN is no JSON number"),
            (3, "field 'a' appears twice"),
            (4, {"text": "a"}),
        ]


def test_a_number_cut_at_its_point_or_exponent_is_one_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for piece in range(1, 20):
        monkeypatch.setattr(files, "PIECE", piece)
        rows = found(tmp_path / "a.json", f"[-7.125e-3,\n{GOOD}, 0.5]")
        assert rows == [(1, -7.125e-3), (2, {"text": "a"}), (3, 0.5)], piece


@pytest.mark.parametrize(
    "more", [f"\n{GOOD}\n{GOOD}", f"\n[{GOOD}]", f" {GOOD}", "]", ",", "\0", " \n\t x"]
)
def test_what_stands_behind_an_array_is_reported_as_one_row(
    more: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    report = read(tmp_path / "a.json", f"[{GOOD}, {GOOD}]{more}", tokenizer).report
    assert (report.read, report.kept) == (3, 2)
    assert report.refusals() == "  row 3: what stands behind the end of the array is lost"


def test_space_behind_an_array_is_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    report = read(tmp_path / "a.json", f"[{GOOD}, {GOOD}] \r\n\t\n", tokenizer).report
    assert (report.read, report.kept) == (2, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'"text"x\na\n', "no header: ',' expected after '\"'"),
        ("text,b\r\na,b\r\n".encode("utf-16"), "no header: new-line character seen"),
        (b"text,id,text,id\na,1,b,2\n", "the header names 'text' twice; give each column its own"),
        (b"text,,\na,,\n", "the header names '' twice; give each column its own name"),
    ],
    ids=["quote in the header", "UTF-16", "two names twice", "columns without a name"],
)
def test_a_csv_header_that_cannot_be_read_is_an_error_of_the_user(
    content: bytes, words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path, refused = tmp_path / "a.csv", tmp_path / "refused.jsonl"
    with pytest.raises(DataError) as caught:
        read(path, content, tokenizer, refused_path=str(refused))
    assert str(caught.value).startswith(f"data file {path}, line 1: {words}")
    assert not refused.exists()


def test_a_csv_header_in_another_encoding_names_the_fields_that_it_lacks(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"\n  line 2: has the fields of no format: .* has: 't\\u"):
        read(tmp_path / "a.csv", b"t\xe9xt\na\n", tokenizer)


# ---- reasons -----------------------------------------------------------------------------------


def test_a_reason_names_the_fields_of_a_row_in_one_short_line(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = ["a\nb", "\ud800", "\x1b[2J", "\u2028", "k" * 1_000_000]
    rows = [*(json.dumps({key: 1}) for key in keys)] * 25 + [GOOD]
    refused = tmp_path / "refused.jsonl"
    report = read(
        tmp_path / "a.jsonl", "\n".join(rows), tokenizer, refused_path=str(refused)
    ).report
    said = (
        "has the fields of no format: messages; conversations; instruction, output; prompt, "
        "completion; text (it has: "
    )
    shown = [r"'a\nb'", r"'\ud800'", r"'\x1b[2J'", r"'\u2028'", "'" + "k" * 39]
    assert [why for _, why in report.refused] == [f"{said}{key})" for key in shown] * 25
    assert len(refused.read_bytes().split(b"\n")) == 125 + 1


PREFIX = "the chat template refuses it: "


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("first\r\n\tsecond", "first second"),
        ("one\u2028two\x85three\x0bfour ", "one two three four"),
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("\ud800 \u202e", r"\ud800 \u202e"),
        ("y" * 270, "y" * 270),
        ("y" * 271, "y" * 267 + "..."),
        ("\x1b" * 1_000_000, r"\x1b" * 66 + r"\x1" + "..."),
    ],
)
def test_a_reason_is_one_line_of_at_most_300_characters_whatever_a_template_says(
    told: str, reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    raised = "{{ raise_exception(messages[0]['content']) if messages[0]['content'] != 'q' }}"
    template.write_text(raised + CHAT)
    rows = [TURNS, {"messages": [{"role": "user", "content": told}, TURNS["messages"][1]]}]
    report = read_examples(rows, tokenizer, DataConfig(template=str(template))).report
    assert report.refused == [(2, PREFIX + reason)] and len(PREFIX + reason) <= 300


# ---- refused rows in a file --------------------------------------------------------------------


def test_refused_items_of_one_line_are_written_alone_and_with_their_own_reasons(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    items = [GOOD, '{"b": 1}', GOOD, '{"text": 1}', '{"text": 1e999}', '{"text": ["\\ud800"]}']
    path, refused = tmp_path / "a.json", tmp_path / "refused.jsonl"
    read(path, "[" + ", ".join(items) + "]", tokenizer, refused_path=str(refused))
    written = refused.read_text().splitlines()
    expected: list[tuple[int, str, Any]] = [
        (2, "field 'text' is missing", {"b": 1}),
        (4, "field 'text' must be a string, not int", {"text": 1}),
        (5, "field 'text' must be a string, not float", "{'text': inf}"),
        (6, "field 'text' must be a string, not list", {"text": ["\ud800"]}),
    ]
    assert [json.loads(line, parse_constant=pytest.fail) for line in written] == [
        {"file": str(path), "line": number, "reason": why, "row": row}
        for number, why, row in expected
    ]


def refused_of(name: str, *numbers: int) -> tuple[DataReport, list[RowFile]]:
    """A report of three rows in memory, of which some are refused."""
    told = FileReport(name, "text", "row", 3, 3, [(n, f"bad {n}") for n in numbers])
    return DataReport(name, [told]), [RowFile(name, "memory", [{"n": n} for n in (1, 2, 3)])]


def test_the_refused_rows_of_several_sources_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "refused.jsonl"
    path.write_text("of an earlier run\n")
    write_refused(path, [refused_of("x", 1, 3), refused_of("y"), refused_of("z", 2)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"file": name, "line": n, "reason": f"bad {n}", "row": {"n": n}}
        for name, n in (("x", 1), ("x", 3), ("z", 2))
    ]
    write_refused(path, [refused_of("x")])
    assert path.read_text() == "" and list(tmp_path.iterdir()) == [path]


def test_refused_rows_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "refused.jsonl"
    path.write_text("of an earlier run\n")
    seen = []

    def breaks_off(file: RowFile) -> Iterator[tuple[int, Any]]:
        yield 1, {"n": "x" * 1_000_000}
        seen.extend(place.name for place in tmp_path.iterdir())
        assert path.read_text() == "of an earlier run\n"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(examples, "raw_rows", breaks_off)
    with pytest.raises(DataError) as caught:
        write_refused(path, [refused_of("x", 1, 2)])
    assert str(caught.value) == (
        f"data.refused_path: {path} cannot be written: No space left on device"
    )
    assert len(seen) == 2  # it was being written, under another name
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "of an earlier run\n"


def test_refused_rows_are_never_written_over_the_data_or_among_it(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    path, other = folder / "more" / "a.jsonl", folder / "b.jsonl"
    strange, linked = tmp_path / "[a].jsonl", tmp_path / "linked.jsonl"
    for place in (path, other, strange, linked):
        place.write_text(GOOD + "\n{}\n")
    (tmp_path / "link.jsonl").symlink_to(path)
    (folder / "more" / "link.jsonl").symlink_to(linked)
    for source, refused in [
        (path, path),
        (path, tmp_path / "link.jsonl"),
        (tmp_path / "link.jsonl", path),
        (path, folder / "x" / ".." / "more" / "a.jsonl"),
        (strange, strange),
        (folder, linked),
        (folder, other),
        (folder, folder / "refused.jsonl"),
        (folder, folder / "more" / "refused.jsonl"),
        (folder / "*.jsonl", other),
        (folder / "*.jsonl", folder / "refused.jsonl"),
        (folder / "more" / "?.jsonl", folder / "more" / "r.jsonl"),
    ]:
        with pytest.raises(ConfigError) as caught:
            read_examples(source, tokenizer, DataConfig(refused_path=str(refused)))
        assert str(caught.value) == (
            f"data.refused_path: {refused} is among the rows of {source}; name another file"
        )
    for part in ("validation_path", "test_path"):
        config = DataConfig(path=str(path), refused_path=str(other), **{part: str(other)})
        with pytest.raises(ConfigError, match=f"is among the rows of {other}; name another file$"):
            train_validation_test(config, tokenizer, 0)
    for place in (path, other, strange, linked):
        assert place.read_text() == GOOD + "\n{}\n"
    assert sorted(place.name for place in folder.rglob("*")) == [
        *("a.jsonl", "b.jsonl", "link.jsonl", "more")
    ]
    config = DataConfig(refused_path=str(folder / "refused.txt"))
    assert read_examples(path, tokenizer, config).report.kept == 1
    assert len((folder / "refused.txt").read_text().splitlines()) == 1


# ---- rows as a person sees them ----------------------------------------------------------------


def shown(examples: Examples, tokenizer: Tokenizer, colour: bool = False) -> str:
    """The first row of the first batch."""
    console = Console(file=io.StringIO())
    console.print(inspect.rows(make_batches(examples, 1), tokenizer, 1, colour), soft_wrap=True)
    return console.file.getvalue()


def test_a_row_that_ends_in_context_is_shown_without_a_foreign_token(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("abc")]
    learned = np.array([False, True, True, False])
    assert len(ids) == 4
    examples = Examples.of([Example(np.array(ids, np.int32), learned, 1)])
    # The last id is not learned and no input: a batch does not hold it.
    assert shown(examples, tokenizer) == (
        "batch 1, row 1: 3 of 64 positions used\n"
        "rows:1: 4 tokens, 2 supervised\n"
        "<|bos|>⟦ab⟧\n"
        "61 x padding\n\n"
    )


@pytest.mark.parametrize(
    ("text", "pictures"),
    [
        ("if x:\n\treturn\t1", "if x:\n␉return␉1"),
        ("a\r\nb", "a␍\nb"),
        ("bell\x07 back\x08", "bell␇ back␈"),
        ("a\x0bb\x0c", "a␋b␌"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\x00b\x1f\x7f", "a␀b␟␡"),
        ("é 漢字 😀 ␉", "é 漢字 😀 ␉"),
    ],
)
@pytest.mark.parametrize("colour", [False, True])
def test_signs_that_a_terminal_acts_on_are_shown_as_their_pictures(
    text: str, pictures: str, colour: bool, tokenizer: Tokenizer
) -> None:
    out = shown(read_examples([{"text": text}], tokenizer), tokenizer, colour)
    learned = f"{pictures}<|eos|>"
    assert f" supervised\n<|bos|>{learned if colour else f'⟦{learned}⟧'}\n" in out


def test_every_control_sign_but_the_line_break_has_a_picture() -> None:
    codes = [*(code for code in range(32) if code != 10), 127]
    assert sorted(inspect.PICTURES) == [*codes, *range(0x80, 0xA0)]
    assert {inspect.PICTURES[code] for code in range(0x80, 0xA0)} == {0xFFFD}
    assert (
        "".join(map(chr, codes)).translate(inspect.PICTURES) == "␀␁␂␃␄␅␆␇␈␉␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟␡"
    )


@pytest.mark.parametrize("tools", [[{"function": "add"}], [{"function": None}], [{}], ["add"]])
def test_tools_without_a_name_refuse_the_row_and_no_other(tools, tokenizer):
    report = read_examples([TURNS, {**TURNS, "tools": tools}], tokenizer).report
    assert report.refused == [(2, "field 'tools' must be a list of JSON schemas, each with a name")]


def test_a_chat_with_tools_that_begins_with_the_assistant_is_refused(tokenizer):
    chat = {"messages": TURNS["messages"][1:], "tools": [{"name": "add"}]}
    report = read_examples([TURNS, chat], tokenizer).report
    assert report.refused == [
        (2, "has tools but begins with the assistant; put the user's question first")
    ]


def test_a_file_whose_path_names_two_parts_is_refused(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "train.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match=r"is for train and for test by its name; rename it"):
        find_files(tmp_path)


def test_refused_rows_that_cannot_be_written_are_an_error_of_the_user(tokenizer, tmp_path):
    (tmp_path / "file.txt").write_text("")
    config = DataConfig(refused_path=str(tmp_path / "file.txt" / "refused.jsonl"))
    with pytest.raises(DataError, match=r"data\.refused_path: .* cannot be written"):
        read_examples([TURNS], tokenizer, config)
