"""A source becomes examples: what is kept, refused and reported, cached, and divided for a run."""

import datetime
import errno
import gzip
import io
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.limits import files_of_at_most, small_chunks
from support.tiny_folder import CHAT, write_tokenizer

from mlx_qlora.data.chats import CANNOT_WRITE, NO_TEMPLATE, alpaca_prompt
from mlx_qlora.data.examples import Example
from mlx_qlora.data.read import DataConfig, read_examples, train_validation_test
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.folders import user_cache, user_path

TURNS = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def rows(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(start, start + n)]


def write_rows(path: Path, content: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def talk(*contents: str) -> dict[str, Any]:
    """A row of messages, from a user and an assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def same(a: Example, b: Example) -> bool:
    return a.tokens.tolist() == b.tokens.tolist() and a.learned.tolist() == b.learned.tolist()


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_counts_and_names_every_refusal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(rows(1)[0]).encode()
    path.write_bytes(good + b'\n\n{"instruction": "x"}\n[1]\nbroken\n\xff\n' + good + b"\n")
    examples = read_examples(path, tokenizer, DataConfig())
    report = examples.report
    assert (report.read, report.kept, len(examples)) == (6, 2, 2)
    assert [line for line, _ in report.refused] == [3, 4, 5, 6]
    assert [(e.line, e.file, e.place) for e in examples] == [
        (line, str(path), f"{path}:{line}") for line in (1, 7)
    ]
    assert report.tokens == sum(map(len, examples))
    assert report.supervised == sum(int(e.learned.sum()) for e in examples)
    assert (report.source, report.format, report.template) == (str(path), "alpaca", "auto")
    assert f"{path} (alpaca): 6 rows read, 2 kept, 4 refused; {report.tokens} tokens" in str(report)
    assert "\n  line 3: field 'output' is missing\n" in str(report)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_the_report_does_not_depend_on_how_rows_are_cut_into_chunks(
    tokenizer: Tokenizer, tmp_path: Path, n_workers: int
) -> None:
    for i, name in enumerate("ab"):
        write_rows(tmp_path / f"{name}.jsonl", [*rows(9, 9 * i), {"text": "x"}, *rows(4), "bad"])
    config = DataConfig(cache_dir=None, num_workers=n_workers)
    whole = read_examples(tmp_path, tokenizer, config)
    with small_chunks(100):
        in_chunks = read_examples(tmp_path, tokenizer, config)
    assert [line for line, _ in whole.report.refused] == [10, 15, 10, 15]
    assert (in_chunks.report, in_chunks.digest) == (whole.report, whole.digest)
    assert [e.place for e in in_chunks] == [e.place for e in whole]


def test_copies_and_cuts_are_counted(tokenizer: Tokenizer) -> None:
    """A copy says the same; an id, the order of the fields or an empty input make no other."""
    first, second = rows(2)
    copies = [{**first, "id": 7}, dict(reversed(first.items())), {**first, "input": ""}]
    nearly = [{**first, "input": "x"}, {**first, "output": first["output"] + " "}]
    long = {"instruction": "fox " * 100, "output": "Yes."}
    alike = {**long, "instruction": "1 " + long["instruction"]}  # until both are cut
    many = [first, *copies, second, *nearly, long, long, alike]
    examples = read_examples(many, tokenizer, DataConfig(max_length=60))
    report = examples.report
    assert same(examples[-1], examples[-2])
    assert (report.kept, report.duplicates, report.truncated) == (10, 4, 3)
    assert "; 3 cut to data.max_length, before their answers; 4 repeat an" in str(report)
    assert str(read_examples([first, second], tokenizer).report).endswith("% supervised")


def test_no_usable_row_is_an_error_that_names_the_reasons(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "x"}])
    with pytest.raises(DataError, match="line 1: field 'output' is missing"):
        read_examples(path, tokenizer, DataConfig())
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"no usable row in .*; it has no rows"):
        read_examples(tmp_path / "blank.jsonl", tokenizer, DataConfig())
    with pytest.raises(DataError, match=r"no usable row in rows .*; it has no rows"):
        read_examples([], tokenizer)


def test_strict_stops_at_any_refusal_and_names_all(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = [*rows(1), {"instruction": "x"}, {"output": "y"}]
    path = write_rows(tmp_path / "a.jsonl", content)
    strict = DataConfig(strict=True)
    for source, name, unit in ((path, str(path), "line"), (content, "rows", "row")):
        for _ in range(2):  # the second time from the cache
            with pytest.raises(DataError) as caught:
                read_examples(source, tokenizer, strict)
            assert str(caught.value) == (
                f"data.strict: {name} has 2 rows that cannot be used:\n"
                f"  {unit} 2: field 'output' is missing\n"
                f"  {unit} 3: field 'instruction' is missing"
            )
    assert len(read_examples(rows(2), tokenizer, strict)) == 2


def test_a_row_longer_than_max_length_is_refused_by_line_or_stops_all(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = {"instruction": "Say it.", "output": "fox " * 50}
    path = write_rows(tmp_path / "a.jsonl", [*rows(2), long, *rows(2, 2)])
    n = len(read_examples([long], tokenizer, DataConfig())[0])
    config = DataConfig(max_length=n - 1, truncation="drop")
    examples = read_examples(path, tokenizer, config)
    assert len(examples) == 4
    assert examples.report.refused == [(3, f"{n} tokens, longer than data.max_length={n - 1}")]
    assert len(read_examples(path, tokenizer, replace(config, max_length=n))) == 5
    error = replace(config, truncation="error", cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # what failed is not cached
        with pytest.raises(DataError) as caught:
            read_examples(path, tokenizer, error)
        words = f"{path}:3: {n} tokens, longer than data.max_length={n - 1}; shorten it, or set"
        assert str(caught.value).startswith(words)
    assert not [place for place in (tmp_path / "cache").rglob("*") if place.is_file()]
    other = [{"instruction": "x"}, *rows(1)]  # a row that is wrong in another way does not
    assert len(read_examples(other, tokenizer, DataConfig(truncation="error"))) == 1


PREFIX = "the chat template refuses it: "


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("first\r\n\tsecond", "first second"),
        ("one\u2028two\x85three\x0bfour ", "one two three four"),
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("\ud800 \u202e", r"\ud800 \u202e"),
        ("y" * 570, "y" * 570),
        ("y" * 571, "y" * 567 + "..."),
        ("\x1b" * 1_000_000, r"\x1b" * 141 + r"\x1" + "..."),
    ],
)
def test_a_reason_is_one_line_of_at_most_600_characters_whatever_a_template_says(
    chatty: Tokenizer, told: str, reason: str, tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    raised = "{{ raise_exception(messages[0]['content']) if messages[0]['content'] != 'q' }}"
    template.write_text(raised + CHAT)
    rows = [TURNS, {"messages": [{"role": "user", "content": told}, TURNS["messages"][1]]}]
    report = read_examples(rows, chatty, DataConfig(template=str(template))).report
    assert report.refused == [(2, PREFIX + reason)] and len(PREFIX + reason) <= 600


# ---- refused rows in a file ----------------------------------------------------------------------


def test_refused_rows_are_written_with_place_reason_and_content(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path, refused = tmp_path / "a.jsonl", tmp_path / "refused.jsonl"
    good = json.dumps(rows(1)[0]).encode()
    path.write_bytes(good + b'\r\n{"instruction": "\xc3\xa9"}\r\n\nbroken \n\xff\n' + good)
    table = tmp_path / "b.csv"
    table.write_text("instruction,output\nsay,one\nalone\nempty,\n")
    config = DataConfig(
        refused_path=str(refused), cache_dir=str(tmp_path / "cache"), max_refused=0.7
    )
    expected = [
        [str(path), 2, "field 'output' is missing", '{"instruction": "é"}'],
        [str(path), 4, "not JSON: Expecting value at column 1", "broken "],
        [str(path), 5, "not UTF-8 (byte 0)", "\\xff"],
        [str(table), 3, "1 fields, where the header has 2", None],
        [str(table), 4, "field 'output' is empty", {"instruction": "empty", "output": ""}],
    ]

    def written() -> list[list[Any]]:
        lines = refused.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        assert all(list(entry) == ["file", "line", "reason", "row"] for entry in found)
        return [list(entry.values()) for entry in found]

    for cached in (False, True):  # each time anew, and not one behind the other
        assert read_examples(path, tokenizer, config).report.cached == cached
        assert written() == expected[:3]
    train_validation_test(
        replace(config, path=str(path), validation_path=str(table)), tokenizer, seed=0
    )
    assert written() == expected
    with pytest.raises(DataError, match=r"data\.strict"):
        read_examples(table, tokenizer, replace(config, strict=True))
    assert written() == expected[3:]
    read_examples(write_rows(tmp_path / "c.jsonl", rows(1)), tokenizer, config)
    assert refused.read_text() == ""


def test_refused_items_of_one_line_are_written_alone_and_with_their_own_reasons(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    items = ['{"text": "a"}', '{"b": 1}', '{"text": "a"}', '{"text": 1}', '{"text": 1e999}']
    path, refused = tmp_path / "a.json", tmp_path / "refused.jsonl"
    path.write_text("[" + ", ".join([*items, '{"text": ["\\ud800"]}']) + "]")
    read_examples(path, tokenizer, DataConfig(refused_path=str(refused)))
    expected: list[tuple[int, str, Any]] = [
        (2, "field 'text' is missing", {"b": 1}),
        (4, "field 'text' must be a string, not int", {"text": 1}),
        (5, "field 'text' must be a string, not float", "{'text': inf}"),
        (6, "field 'text' must be a string, not list", {"text": ["\ud800"]}),
    ]
    assert [
        json.loads(line, parse_constant=pytest.fail) for line in refused.read_text().splitlines()
    ] == [
        {"file": str(path), "line": number, "reason": why, "row": row}
        for number, why, row in expected
    ]


def test_refused_rows_are_written_whole_or_not_at_all(tokenizer: Tokenizer, tmp_path: Path) -> None:
    refused = tmp_path / "new" / "refused.jsonl"
    config = DataConfig(refused_path=str(refused))
    bad = [*rows(1), {"text": "x" * 200_000, "output": "y"}]

    def message() -> str:
        with pytest.raises(DataError) as caught:
            read_examples(bad, tokenizer, config)
        return str(caught.value)

    cannot = f"data.refused_path: {refused} cannot be written: "
    assert message() == cannot + os.strerror(errno.ENOENT)
    refused.parent.mkdir()
    refused.write_text("of an earlier run\n")
    with files_of_at_most(100_000):
        assert message() == cannot + os.strerror(errno.EFBIG)
    assert refused.read_text() == "of an earlier run\n"
    assert list(refused.parent.iterdir()) == [refused]
    read_examples(bad, tokenizer, config)
    assert json.loads(refused.read_text())["row"] == bad[1]


def test_refused_rows_are_never_written_over_the_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    good = json.dumps(rows(1)[0]) + "\n{}\n"
    path, other, strange = folder / "more" / "a.jsonl", folder / "b.jsonl", tmp_path / "[a].jsonl"
    for place in (path, other, strange):
        place.write_text(good)
    (tmp_path / "link.jsonl").symlink_to(path)
    before = sorted(tmp_path.rglob("*"))
    for source, refused in [
        (path, path),
        (path, tmp_path / "link.jsonl"),
        (tmp_path / "link.jsonl", path),
        (path, folder / "x" / ".." / "more" / "a.jsonl"),
        (strange, strange),
        (folder, other),
        (folder / "*.jsonl", other),
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
    assert {place.read_text() for place in (path, other, strange)} == {good}
    assert sorted(tmp_path.rglob("*")) == before


# ---- sources -------------------------------------------------------------------------------------


def test_rows_in_memory_are_those_of_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(20))
    for source in (path, str(path)):
        assert read_examples(source, tokenizer).digest == read_examples(rows(20), tokenizer).digest
    one_by_one = read_examples((row for row in rows(20)), tokenizer)
    assert [(e.file, e.line, e.place) for e in one_by_one][:2] == [
        *[("rows", 1, "rows:1"), ("rows", 2, "rows:2")]
    ]
    assert one_by_one.report.source == "rows"


def test_what_a_row_in_memory_does_not_say_may_be_anything(tokenizer: Tokenizer) -> None:
    rows = [{"text": "a", "id": 10**6000}, {"text": "a", (1, 2): {1: 2, "a": 3}}]
    rows.append({"text": "a", "when": datetime.date(2026, 1, 1), "tags": {1, 2}})
    report = read_examples(rows, tokenizer).report
    assert (report.kept, report.duplicates) == (3, 2)


@pytest.mark.parametrize("extra", [{"t": {1: 2, "a": 3}}, {"t": {(1, 2): 3}}, {"t": 10**6000}])
def test_a_message_in_memory_that_json_cannot_hold_is_refused(
    chatty: Tokenizer, extra: dict[str, Any]
) -> None:
    question, answer = TURNS["messages"]
    report = read_examples([TURNS, {"messages": [{**question, **extra}, answer]}], chatty).report
    ((number, why),) = report.refused
    assert number == 2 and why.startswith("cannot be written as JSON: ")


def test_nesting_that_parses_but_cannot_be_written_again_is_no_crash(
    chatty: Tokenizer, tmp_path: Path
) -> None:
    deep = [
        f'{{"messages": [{{"role": "user", "content": "q", "x": {"[" * d}{"]" * d}}}, '
        '{"role": "assistant", "content": "a"}]}'
        for d in range(900, 1000)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(TURNS), *deep]))
    examples = read_examples(tmp_path / "a.jsonl", chatty)
    refused = examples.report.refused
    kept = [example.line for example in examples]
    assert kept[0] == 1 and sorted(kept + [line for line, _ in refused]) == list(range(1, 102))
    assert {why for _, why in refused} <= {"nested too deeply", "not JSON: nested too deeply"}


def test_a_folder_may_hold_files_of_many_formats(chatty: Tokenizer, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    (folder / "notes.txt").write_text("no rows")
    (folder / ".hidden.jsonl").write_text("no rows")
    content = {
        "a.jsonl": ("alpaca", rows(2)),
        "b.csv": ("prompt_completion", [{"prompt": "Count: ", "completion": "one, two"}]),
        "c.json": ("messages", [talk("hi", "you"), talk("a", "b", "c", "d")]),
        "more/d.parquet": ("text", [{"text": "one"}, {"text": "two"}]),
        "more/e.jsonl.gz": (
            "sharegpt",
            [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}],
        ),
        "more/f.ndjson": ("text", [{"text": "three"}]),
    }
    write_rows(folder / "a.jsonl", content["a.jsonl"][1])
    (folder / "b.csv").write_text('prompt,completion\nCount: ,"one, two"\n')
    (folder / "c.json").write_text(json.dumps(content["c.json"][1], indent=1))
    table = pyarrow.Table.from_pylist(content["more/d.parquet"][1])
    pyarrow.parquet.write_table(table, folder / "more" / "d.parquet")
    lines = json.dumps(content["more/e.jsonl.gz"][1][0]).encode()
    (folder / "more" / "e.jsonl.gz").write_bytes(gzip.compress(lines))
    write_rows(folder / "more" / "f.ndjson", content["more/f.ndjson"][1])

    examples = read_examples(folder, chatty)
    single = [read_examples(some, chatty) for _, some in content.values()]
    assert len(examples) == 9
    assert all(same(a, b) for a, b in zip(examples, (e for part in single for e in part)))
    assert [(file.name, file.format, file.kept) for file in examples.report.files] == [
        (str(folder / name), form, len(some)) for name, (form, some) in content.items()
    ]
    assert {e.file for e in examples} == {str(folder / name) for name in content}
    assert [e.line for e in examples][:3] == [1, 2, 2]
    forms = "alpaca, prompt_completion, messages, text, sharegpt"
    told = f"{folder} ({forms}, 6 files): 9 rows read, 9 kept, 0 refused; "
    assert str(examples.report).startswith(told)


def test_one_format_to_a_file_and_a_named_one_is_not_guessed(tokenizer: Tokenizer) -> None:
    rows = [7, {"question": 1}, {"text": "first"}, {"prompt": "a", "completion": "b"}]
    report = read_examples(rows, tokenizer).report
    assert report.format == "text" and "rows (text): " in str(report)
    assert [line for line, _ in report.refused] == [1, 2, 4]
    assert report.refused[2][1] == (
        "is 'prompt_completion' in a file of 'text' (field 'text' is missing); split the file by "
        "format, or set data.format"
    )
    named = read_examples(rows, tokenizer, DataConfig(format="prompt_completion"))
    assert named.report.refused[1:] == [
        (2, "field 'prompt' is missing"),
        (
            3,
            "is 'text' in a file of 'prompt_completion' (field 'prompt' is missing); split the "
            "file by format, or set data.format",
        ),
    ]


# ---- templates -----------------------------------------------------------------------------------


def test_the_template_that_is_named_writes_the_rows(chatty: Tokenizer, tmp_path: Path) -> None:
    asked = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    alpaca = f"<|bos|>{alpaca_prompt('Add.', '1 2')}3<|eos|>"
    mine = tmp_path / "mine.jinja"
    mine.write_text(CHAT.replace("<|", "(").replace("|>", ")"))
    for template, text in {
        "auto": alpaca,
        "alpaca": alpaca,
        "alpaca-preamble": "<|bos|>Below is an instruction that describes a task, paired with an "
        "input that provides further context. Write a response that appropriately completes the "
        f"request.\n\n{alpaca.removeprefix('<|bos|>')}",
        "chat": "<|bos|><|user|>Add.\n\n1 2<|eos|><|assistant|>3<|eos|>",
        str(mine): "<|bos|>(user)Add.\n\n1 2<|eos|>(assistant)3<|eos|>",
    }.items():
        examples = read_examples(asked, chatty, DataConfig(template=template))
        assert [chatty.decode(e.tokens) for e in examples] == [text]
        assert examples.report.template == template


def test_a_template_that_cannot_be_read_names_the_field(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    for path in (tmp_path / "none.jinja", tmp_path, tmp_path / "bytes.jinja"):
        with pytest.raises(ConfigError) as caught:
            read_examples(rows(1), tokenizer, DataConfig(template=str(path)))
        assert str(caught.value).startswith(
            "data.template must be auto, alpaca, alpaca-preamble, chat or a file with a template; "
            f"'{path}' cannot be read: "
        )


def test_a_model_without_a_chat_template_says_what_to_do(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError) as caught:
        read_examples(rows(1), tokenizer, DataConfig(template="chat"))
    assert str(caught.value) == f"data.template=chat, but {NO_TEMPLATE}"
    with pytest.raises(DataError) as caught:
        read_examples([TURNS], tokenizer)
    assert str(caught.value).splitlines()[1:] == [f"  row 1: {NO_TEMPLATE}"]


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_alpaca_cannot_write_chats(tokenizer: Tokenizer, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(template="alpaca", format=form)
    assert str(caught.value) == f"data.template=alpaca {CANNOT_WRITE}"
    field = {"messages": "messages", "sharegpt": "conversations"}[form]
    with pytest.raises(ConfigError) as caught:
        read_examples([{field: TURNS["messages"]}], tokenizer, DataConfig(template="alpaca"))
    assert str(caught.value) == f"rows holds {form}; data.template=alpaca {CANNOT_WRITE}"


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"max_length": 1}, "data.max_length must be at least 2; got 1"),
        ({"num_workers": -1}, "data.num_workers must be at least 0; got -1"),
        ({"train_on": "prompt"}, "data.train_on must be one of 'response', 'all'"),
        ({"truncation": "left"}, "data.truncation must be one of 'left-context', 'right', 'drop'"),
        ({"format": "jsonl"}, "data.format must be one of 'auto', 'alpaca', 'messages'"),
        ({"split": "some"}, "data.split must be auto, or shares"),
        ({"split": [0.5, 0.4, 0.2]}, "data.split must be auto, or shares"),
        ({"split": [0.0, 0.5, 0.5]}, "data.split must be auto, or shares"),
        ({"split": [1.2, -0.1, -0.1]}, "data.split must be auto, or shares"),
        ({"split": [float("nan"), 0.5, 0.5]}, "data.split must be auto, or shares"),
    ],
)
def test_a_value_out_of_range_is_named(how: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**how)
    assert words in str(caught.value)


# ---- the parts of a run --------------------------------------------------------------------------


def lengths(tokenizer: Tokenizer, seed: int = 0, **how: Any) -> list[int | None]:
    split = train_validation_test(DataConfig(**how), tokenizer, seed)
    return [None if part is None else len(part) for part in split]


def test_named_files_stand_for_their_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "a.jsonl", rows(100)))
    other = str(write_rows(tmp_path / "b.jsonl", rows(7, 1000)))
    named = {"validation_path": other, "test_path": other}
    assert lengths(tokenizer, path=path) == [90, 10, None]  # too few to test by default

    tenths: dict[str, Any] = {"path": path, "split": [0.8, 0.1, 0.1]}
    train, validation, test = lengths(tokenizer, **tenths)
    assert train and validation and test and train + validation + test == 100
    assert lengths(tokenizer, **tenths, validation_path=other) == [100 - test, 7, test]
    train, validation, test = lengths(tokenizer, **tenths, test_path=other)
    assert train and validation and train + validation == 100 and test == 7
    assert lengths(tokenizer, path=path, **named) == [100, 7, 7]
    assert lengths(tokenizer, path=path, split=[1.0, 0.0, 0.0]) == [100, None, None]
    config = DataConfig(**tenths)
    _, _, test = train_validation_test(config, tokenizer, 0)
    _, _, again = train_validation_test(replace(config, validation_path=other), tokenizer, 0)
    assert test is not None and again is not None and test.digest == again.digest
    config = DataConfig(path=path, split=[1.0, 0.0, 0.0], test_path=other)
    whole, none, test = train_validation_test(config, tokenizer, 0)
    assert len(whole) == 100 and none is None and test is not None and len(test) == 7
    assert (whole.report.source, test.report.source) == (path, other)


def test_a_folder_s_files_stand_for_their_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, some in {"train": rows(100), "valid": rows(5, 200), "test": rows(6, 300)}.items():
        write_rows(folder / f"{name}.jsonl", some)
    other = str(write_rows(tmp_path / "b.jsonl", rows(7, 1000)))
    split = train_validation_test(DataConfig(path=str(folder)), tokenizer, 0)
    for part, some in zip(split, (rows(100), rows(5, 200), rows(6, 300))):
        assert part is not None and part.digest == read_examples(some, tokenizer).digest
    assert read_examples(folder, tokenizer).digest == read_examples(rows(100), tokenizer).digest
    assert lengths(tokenizer, path=str(folder), validation_path=other) == [100, 7, 6]
    config = DataConfig(path=str(folder), test_path=str(folder))
    train, validation, test = train_validation_test(config, tokenizer, 0)
    assert train and validation and test and test.digest == train.digest != validation.digest
    (folder / "valid.jsonl").unlink()
    train, validation, test = lengths(tokenizer, path=str(folder))
    assert train and validation and train + validation == 100 and test == 6


def test_the_seed_of_a_run_decides_its_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = DataConfig(path=str(write_rows(tmp_path / "a.jsonl", rows(100))))
    digests = [train_validation_test(config, tokenizer, seed)[0].digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_rows_of_another_file_that_are_trained_too_are_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = str(write_rows(tmp_path / "a.jsonl", rows(20)))
    leaky = [{**row, "id": 1} for row in rows(3)] + rows(2, 100)
    other = str(write_rows(tmp_path / "b.jsonl", leaky))
    config = DataConfig(path=path, validation_path=other, split=[1.0, 0.0, 0.0])
    train, validation, _ = train_validation_test(config, tokenizer, 0)
    assert validation is not None
    assert (train.report.leaked, validation.report.leaked) == (0, 3)
    assert "; 3 are also training rows" in str(validation.report)


def test_a_missing_path_and_an_empty_training_part_are_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is missing"):
        train_validation_test(DataConfig(), tokenizer, 0)
    path = str(write_rows(tmp_path / "a.jsonl", rows(1)))
    config = DataConfig(path=path, split=[1e-9, 0.5, 0.5 - 1e-9])
    with pytest.raises(DataError, match="no row is left to train on"):
        train_validation_test(config, tokenizer, 0)
    with pytest.raises(DataError, match="is missing; give the path of a file or folder of rows"):
        train_validation_test(
            DataConfig(path=path, test_path=str(tmp_path / "no.jsonl")), tokenizer, 0
        )


# ---- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def test_the_second_time_examples_come_from_the_cache_and_are_the_same(
    tokenizer: Tokenizer, cached: DataConfig, tmp_path: Path
) -> None:
    write_rows(tmp_path / "a.jsonl", [*rows(5), {"instruction": "x"}, *rows(3)])
    write_rows(tmp_path / "b.jsonl", [{"prompt": "fox " * 50, "completion": "x"}, "bad"])
    config = replace(cached, max_length=50)
    source = str(tmp_path / "*.jsonl")
    first, second = (read_examples(source, tokenizer, config) for _ in range(2))
    uncached = read_examples(source, tokenizer, replace(config, cache_dir=None))
    assert [e.report.cached for e in (first, second, uncached)] == [False, True, False]
    for examples in (second, uncached):
        assert examples.digest == first.digest and len(examples) == 9
        assert [e.place for e in examples] == [e.place for e in first]
        assert all(same(a, b) for a, b in zip(examples, first))
        assert replace(examples.report, cached=False) == first.report
        assert str(examples.report) == str(first.report)
        lines = [
            [[e.line for e in part] for part in some.split([0.5, 0.5])]
            for some in (examples, first)
        ]
        assert lines[0] == lines[1]
    assert first.report.truncated == 1 and first.report.duplicates == 3


def test_without_a_cache_nothing_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    before = sorted(user_cache().rglob("*"))
    for _ in range(2):
        examples = read_examples(path, tokenizer, DataConfig(cache_dir=None))
        assert not examples.report.cached and len(examples) == 3
    assert sorted(user_cache().rglob("*")) == before
    assert [place.name for place in tmp_path.iterdir()] == ["a.jsonl"]


def test_rows_in_memory_are_not_cached(tokenizer: Tokenizer, cached: DataConfig) -> None:
    for _ in range(2):
        assert not read_examples(rows(3), tokenizer, cached).report.cached
    assert cached.cache_dir is not None and not Path(cached.cache_dir).exists()


def test_auto_is_the_user_s_cache(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    assert user_cache() == tmp_path / "here" / "mlx-qlora"
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    assert [read_examples(path, tokenizer).report.cached for _ in range(2)] == [False, True]
    assert any((tmp_path / "here" / "mlx-qlora").rglob("*"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "mlx-qlora"
    assert user_path("~/mine", "data.cache_dir") == tmp_path / "mine"


@pytest.mark.parametrize(
    "change",
    [
        *[{"train_on": "all"}, {"max_length": 40}, {"truncation": "drop"}, {"template": "alpaca"}],
        *[{"format": "alpaca"}, {"template": "chat"}],
    ],
)
def test_what_changes_the_tokens_is_not_taken_from_the_cache(
    chatty: Tokenizer, cached: DataConfig, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    read_examples(path, chatty, cached)
    changed = replace(cached, **change)
    assert [read_examples(path, chatty, changed).report.cached for _ in range(2)] == [False, True]
    assert read_examples(path, chatty, cached).report.cached


@pytest.mark.parametrize(
    "change",
    [
        *[{"num_workers": 0}, {"packing": False}, {"shuffle": False}, {"strict": True}],
        *[{"split": [1.0, 0.0, 0.0]}, {"path": "elsewhere"}],
    ],
)
def test_what_does_not_is(
    tokenizer: Tokenizer, cached: DataConfig, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    read_examples(path, tokenizer, cached)
    assert read_examples(path, tokenizer, replace(cached, **change)).report.cached


def test_another_content_tokenizer_or_chat_template_is_encoded_anew(
    chatty: Tokenizer, without_bos: Tokenizer, cached: DataConfig, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [talk("a", "b"), talk("c", "d")])
    first = read_examples(path, chatty, cached)
    folder = write_tokenizer(tmp_path / "other", chat=True)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    for tokenizer in (
        load_tokenizer(folder),
        without_bos.with_chat_template(CHAT),
        chatty.with_chat_template(CHAT.replace("<", "(")),
    ):
        other = read_examples(path, tokenizer, cached)
        assert not other.report.cached and other.digest != first.digest
    stamp = path.stat()
    write_rows(path, [talk("a", "b"), talk("c", "e")])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of one size and time, yet another
    changed = read_examples(path, chatty, cached)
    assert not changed.report.cached and changed.digest != first.digest
    write_rows(path, [talk("a", "b"), talk("c", "d")])
    again = read_examples(path, chatty, cached)
    assert again.report.cached and again.digest == first.digest


def test_a_file_that_was_moved_is_known_by_its_content_and_named_as_it_is_now(
    tokenizer: Tokenizer, cached: DataConfig, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*rows(3), {"output": "x"}])
    first = read_examples(path, tokenizer, cached)
    moved = path.rename(tmp_path / "b.jsonl")
    second = read_examples(moved, tokenizer, cached)
    assert second.report.cached and second.digest == first.digest
    assert {e.file for e in second} == {str(moved)} == {f.name for f in second.report.files}
    assert second.report.source == str(moved)
    assert {e.file for e in first} == {str(path)}


def test_rows_that_are_refused_for_one_reason_take_one_line(tokenizer: Tokenizer) -> None:
    bad = [{"question": "a", "answer": "b"}, {"text": 1}]
    report = read_examples([*rows(1), *bad * 3, {"instruction": " "}], tokenizer).report
    shown = report.refusals().splitlines()
    assert len(report.refused) == 7 and len(shown) == 3
    assert shown[0].startswith("  row 2 and 2 more: field 'instruction' is missing; data.columns=")
    assert shown[1:] == [
        "  row 3 and 2 more: is 'text' in a file of 'alpaca' (field 'instruction' is missing); "
        "split the file by format, or set data.format",
        "  row 8: field 'instruction' is empty",
    ]


# ---- columns and system messages -----------------------------------------------------------------


def test_columns_of_other_names_read_what_the_formats_own_names_say(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    asked = [{"q": r["instruction"], "a": r["output"], "text": "not this"} for r in rows(20)]
    path = write_rows(tmp_path / "qa.jsonl", asked)
    config = DataConfig(columns={"instruction": "q", "output": "a"})
    examples = read_examples(path, tokenizer, config)
    assert examples.digest == read_examples(rows(20), tokenizer).digest
    assert list(examples.contents) == list(read_examples(rows(20), tokenizer).contents)
    assert str(examples.report).startswith(f"{path} (alpaca, q as instruction, a as output): 20 ")
    misspelt = replace(config, columns={"instruction": "q", "output": "texd"})
    with pytest.raises(DataError, match=r"'texd', .* is missing or null; did you mean 'text'\?"):
        read_examples(path, tokenizer, misspelt)


def test_two_mappings_of_a_file_do_not_share_their_tokens(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "ab.jsonl", [{"a": f"{i} one", "b": f"{i} two"} for i in range(9)])
    cache = {"cache_dir": str(tmp_path / "cache")}
    there = DataConfig(columns={"instruction": "a", "output": "b"}, **cache)
    back = replace(there, columns={"instruction": "b", "output": "a"})
    for cached in (False, True):
        first, second = (read_examples(path, tokenizer, config) for config in (there, back))
        assert (first.report.cached, second.report.cached) == (cached, cached)
        assert first.digest != second.digest
    turned = replace(there, columns=dict(reversed(there.columns.items())))
    assert read_examples(path, tokenizer, turned).report.cached


def test_a_system_message_is_written_before_each_row_without_one(
    chatty: Tokenizer, tmp_path: Path
) -> None:
    brief = {"role": "system", "content": "Be brief."}
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    config = DataConfig(system="Be brief.", cache_dir=str(tmp_path / "cache"))
    plain = read_examples(path, chatty, replace(config, system=None, template="chat"))
    examples = read_examples(path, chatty, config)
    assert not examples.report.cached and examples.report.kept == 3
    assert all(len(e) > len(p) for e, p in zip(examples, plain))
    messages = [brief, *talk("q", "a")["messages"]]
    whole = read_examples([{"messages": messages}], chatty)[0]
    assert same(read_examples([talk("q", "a")], chatty, config)[0], whole)
    # What a row says is the same, so that the parts of a run stay what they were.
    assert list(examples.contents) == list(plain.contents)
    with pytest.raises(DataError, match=r"data\.template=alpaca cannot write messages"):
        read_examples(rows(2), chatty, replace(config, template="alpaca"))
    with pytest.raises(DataError, match="a text has no place for a system message"):
        read_examples([{"text": "a"}], chatty, config)


def test_the_system_message_that_all_rows_share_is_known(chatty: Tokenizer, tmp_path: Path) -> None:
    def chats(*systems: str) -> list[dict[str, Any]]:
        turns = talk("q", "a")["messages"]
        return [
            {"messages": [*([{"role": "system", "content": text}] * bool(text)), *turns]}
            for text in systems
        ]

    def shared(rows: list[dict[str, Any]], n_workers: int = 0) -> str | None:
        path = write_rows(tmp_path / "chats.jsonl", rows)
        config = DataConfig(num_workers=n_workers, cache_dir=str(tmp_path / "cache"))
        reports = [read_examples(path, chatty, config).report for _ in range(2)]
        assert [report.cached for report in reports] == [False, True]
        assert not any(report.unread for report in reports)
        assert reports[0].shared_system == reports[1].shared_system
        return reports[0].shared_system

    brief = "Be brief. Ask: who?"
    assert shared(chats(*[brief] * 3)) == brief
    assert shared(chats(*[brief] * 1500), n_workers=2) == brief, "in several chunks"
    assert shared(chats(brief, brief, "")) is None
    assert shared(chats(brief, "Be kind.", brief)) is None
    assert shared(chats(*["Be kind."] * 700, *[brief] * 800), n_workers=2) is None
    assert shared(chats("", "")) is None
    asked = [{"instruction": "q", "output": "a", "system": brief}]
    assert read_examples(asked, chatty).report.shared_system == brief

    said = "\n  with a system message: 2 rows; the others have none, unless the chat template "
    said += "writes one; data.system gives them one"
    for rows in (chats(brief, brief, ""), chats(brief, "Be kind.", "")):
        assert str(read_examples(rows, chatty).report).endswith(said)
        assert said not in str(read_examples(rows, chatty, DataConfig(system="Be fair.")).report)
    for rows in (chats(brief, "Be kind."), chats("", "")):
        assert said[4:] not in str(read_examples(rows, chatty).report)


def test_columns_that_no_format_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns must name some of messages.*'ouput'"):
        DataConfig(columns={"ouput": "answer"})
    turned = r"name fields first: \{'prompt': 'a', 'completion': 'b'\}"
    with pytest.raises(ConfigError, match=turned):
        DataConfig(columns={"a": "prompt", "b": "completion"})
    with pytest.raises(ConfigError, match=r"data\.system must not be empty"):
        DataConfig(system="")


def test_a_console_says_what_is_done_and_refused_rows_are_no_warning_then(tokenizer) -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = read_examples([{"text": "one"}, {"text": 1}], tokenizer, console=console)
    assert len(examples.report.refused) == 1 and "tokenising" in said.getvalue()
