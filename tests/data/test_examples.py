"""Rows to tokens and labels, against a slow reference written from the definition."""

import datetime
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_folder import CHAT, write_tokenizer

from mlx_qlora.data import encode
from mlx_qlora.data.batches import IGNORE, collate
from mlx_qlora.data.encode import encode_prompt
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.data.read import DataConfig, cache_folder, read_examples, train_validation_test
from mlx_qlora.data.rows import alpaca_prompt
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=False))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


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


row = st.fixed_dictionaries(
    {
        "instruction": st.text(max_size=30).map(lambda text: "a" + text),
        "input": st.text(max_size=10),
        "output": st.text(max_size=30).map(lambda text: "b" + text),
    }
)
with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


# ---- tokens and labels -------------------------------------------------------------------------


@with_fixture
@given(row=row, train_on=st.sampled_from(["response", "all"]))
def test_tokens_and_labels_are_those_of_the_definition(
    tokenizer: Tokenizer, row: dict[str, str], train_on: str
) -> None:
    """Prompt after one BOS, then the response, then EOS; learned from the response on."""
    example = read_examples([row], tokenizer, DataConfig(train_on=train_on))[0]
    prompt, response = alpaca_prompt(row["instruction"], row["input"]), row["output"]
    context = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ids = example.tokens.tolist()
    assert ids[: len(context)] == context
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
    clean = (prompt + response).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(ids[1:-1]) == clean
    first = 1 if train_on == "all" else len(context)
    assert example.learned.tolist() == [i >= first for i in range(len(ids))]
    assert example.tokens.dtype == np.int32


@with_fixture
@given(some=st.lists(row, min_size=1, max_size=5), train_on=st.sampled_from(["response", "all"]))
def test_a_batch_s_labels_are_its_tokens_shifted_by_one_where_learned(
    tokenizer: Tokenizer, some: list[dict[str, str]], train_on: str
) -> None:
    examples = read_examples(some, tokenizer, DataConfig(train_on=train_on))
    batch = collate([[example] for example in examples])
    tokens, labels = np.array(batch.tokens), np.array(batch.labels)
    assert tokens.shape == labels.shape
    for b, example in enumerate(examples):
        for t in range(tokens.shape[1]):
            last = t + 1 >= len(example)
            wanted = IGNORE if last or not example.learned[t + 1] else example.tokens[t + 1]
            assert labels[b, t] == wanted
            if not last:
                assert tokens[b, t] == example.tokens[t]
    assert (labels != IGNORE).sum() == examples.report.supervised


def test_a_tokenizer_without_bos_gets_none(without_bos: Tokenizer) -> None:
    example = read_examples(rows(1), without_bos, DataConfig())[0]
    whole = alpaca_prompt("Say 0.") + "It is 0."
    assert example.tokens.tolist() == [*without_bos.encode(whole), without_bos.eos_id]


def test_a_prompt_that_spells_the_bos_gets_no_second_one(tokenizer: Tokenizer) -> None:
    assert encode_prompt(tokenizer, "<|bos|>hi") == encode_prompt(tokenizer, "hi")


@pytest.mark.parametrize(
    ("plain", "spelled"),
    [
        ({"prompt": "hi", "completion": "you"}, {"prompt": "<|bos|>hi", "completion": "you"}),
        ({"text": "hi you"}, {"text": "<|bos|>hi you"}),
        (talk("hi", "you"), talk("hi", "you")),
    ],
)
def test_there_is_one_bos_whoever_writes_it_and_it_is_not_learned(
    chatty: Tokenizer, plain: dict[str, Any], spelled: dict[str, Any]
) -> None:
    writes_bos = chatty.with_chat_template("{{ bos_token }}" + CHAT)
    a, b = read_examples([plain], chatty)[0], read_examples([spelled], writes_bos)[0]
    assert same(a, b)
    assert a.tokens[0] == chatty.bos_id and a.tokens.tolist().count(chatty.bos_id) == 1
    assert not a.learned[0] and a.learned.any()


@pytest.mark.parametrize(
    "row",
    [
        {"text": "one"},
        {"text": "one<|eos|>"},
        {"text": "one<|eos|>\n"},
        {"instruction": "count", "output": "one"},
        {"instruction": "count", "output": "one<|eos|>"},
        {"prompt": "count", "completion": "one"},
        talk("count", "one"),
        talk("count", "one", "go on", "one"),
    ],
)
def test_every_answer_ends_with_one_eos_that_is_learned(
    chatty: Tokenizer, row: dict[str, Any]
) -> None:
    example = read_examples([row], chatty)[0]
    ids, eos = example.tokens.tolist(), chatty.eos_id
    assert ids[-1] == eos and ids[-2] != eos and example.learned[-1]
    learned = [id for id, is_learned in zip(ids, example.learned) if is_learned]
    assert learned.count(eos) == (2 if len(row.get("messages", [])) == 4 else 1)
    assert chatty.decode(learned).replace("<|eos|>", "") in ("one", "oneone")


def test_the_first_token_is_never_learned(without_bos: Tokenizer) -> None:
    example = read_examples(rows(1), without_bos, DataConfig(train_on="all"))[0]
    assert not example.learned[0] and example.learned[1:].all()
    example = read_examples([{"text": "one two"}], without_bos)[0]
    assert not example.learned[0] and example.learned[1:].all()


def test_the_prompt_alone_is_always_a_prefix_of_prompt_and_response(tokenizer: Tokenizer) -> None:
    """Also where one token would span the border, as "th|e" would in the corpus's " the"."""
    whole = tokenizer.encode("the fox")
    straddled = 0
    for i in range(1, 7):
        prompt, response = "the fox"[:i], "the fox"[i:]
        example = read_examples([{"prompt": prompt, "completion": response}], tokenizer)[0]
        ids, context = example.tokens.tolist(), encode_prompt(tokenizer, prompt)
        assert ids[: len(context)] == context
        assert example.learned.tolist() == [t >= len(context) for t in range(len(ids))]
        assert tokenizer.decode(ids[1:-1]) == "the fox"
        straddled += ids[1:-1] != whole
    assert straddled  # at least one border was inside a token


# ---- rows that are too long --------------------------------------------------------------------


def cut(
    full: Example, context: int, bos: int, most: int, truncation: str
) -> tuple[list[int], list[bool]] | str:
    """Ids and labels within a limit by the words of `truncation`, or why there are none."""
    ids, learned = full.tokens.tolist(), full.learned.tolist()
    n, excess = len(ids), len(ids) - most
    if excess <= 0:
        return ids, learned
    if truncation == "right":
        if not any(learned[:most]):
            return f"no supervised token within max_length {most}"
        while not learned[most - 1]:  # context that no answer follows
            most -= 1
        return ids[:most], learned[:most]
    if truncation == "left-context":
        if context - excess < max(bos, 1):  # something must predict the first token of the answer
            after = f"{n} tokens, of which {n - context} from the first answer on"
            return f"{after}: longer than max_length {most}"
        ids = ids[:bos] + ids[bos + excess :]
        learned = learned[:bos] + learned[bos + excess :]
        return ids, [False, *learned[1:]]
    return f"{n} tokens, longer than max_length {most}"


@pytest.mark.parametrize("truncation", ["left-context", "right", "drop", "error"])
@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize("with_bos", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the quick brown fox", "completion": " jumps over"},
        {"prompt": "dog", "completion": " jumps over the lazy dog"},
        {"text": "the quick brown fox"},
        talk("the quick", "brown fox", "jumps", "over"),
    ],
)
def test_a_long_row_is_cut_as_its_policy_says(
    chatty: Tokenizer,
    without_bos: Tokenizer,
    row: dict[str, Any],
    with_bos: bool,
    train_on: str,
    truncation: str,
) -> None:
    tokenizer = chatty if with_bos else without_bos.with_chat_template(CHAT)
    context = int(read_examples([row], tokenizer)[0].learned.argmax())
    if "text" in row:
        context = int(with_bos)
    full = read_examples([row], tokenizer, DataConfig(train_on=train_on))[0]
    for most in range(2, len(full) + 2):
        config = DataConfig(train_on=train_on, truncation=truncation, max_length=most)
        wanted = cut(full, context, int(with_bos), most, truncation)
        if isinstance(wanted, str):
            with pytest.raises(DataError) as caught:
                read_examples([row], tokenizer, config)
            assert f"1: {wanted}" in str(caught.value)
            assert str(caught.value).startswith("rows:1: ") == (truncation == "error")
            continue
        examples = read_examples([row], tokenizer, config)
        assert (examples[0].tokens.tolist(), examples[0].learned.tolist()) == wanted
        assert examples.report.truncated == int(most < len(full))


def test_a_cut_keeps_bos_instruction_s_end_and_answer(tokenizer: Tokenizer) -> None:
    """By hand: the context loses ids from its left, the answer and its EOS none."""
    row = {"prompt": "the quick brown fox", "completion": " jumps"}
    answer = [*tokenizer.encode(" jumps"), tokenizer.eos_id]
    context = tokenizer.encode(row["prompt"])
    config = DataConfig(max_length=len(answer) + 3)
    example = read_examples([row], tokenizer, config)[0]
    assert example.tokens.tolist() == [tokenizer.bos_id, *context[-2:], *answer]
    assert example.learned.tolist() == [False] * 3 + [True] * len(answer)


def test_a_row_longer_than_max_length_is_refused_by_line(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = {"instruction": "Say it.", "output": "fox " * 50}
    path = write_rows(tmp_path / "a.jsonl", [*rows(2), long, *rows(2, 2)])
    n = len(read_examples([long], tokenizer, DataConfig())[0])
    config = DataConfig(max_length=n - 1, truncation="drop")
    examples = read_examples(path, tokenizer, config)
    assert len(examples) == 4
    assert examples.report.refused == [(3, f"{n} tokens, longer than max_length {n - 1}")]
    assert len(read_examples(path, tokenizer, replace(config, max_length=n))) == 5
    with pytest.raises(DataError) as caught:
        read_examples(path, tokenizer, replace(config, truncation="error"))
    words = f"{path}:3: {n} tokens, longer than max_length {n - 1}; shorten it, or set"
    assert str(caught.value).startswith(words)


def test_error_is_for_long_rows_alone(tokenizer: Tokenizer) -> None:
    config = DataConfig(truncation="error")
    assert len(read_examples([{"instruction": "x"}, *rows(1)], tokenizer, config)) == 1


# ---- the report --------------------------------------------------------------------------------


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


def test_the_report_does_not_depend_on_how_rows_are_cut_into_chunks(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate("ab"):
        write_rows(tmp_path / f"{name}.jsonl", [*rows(9, 9 * i), {"text": "x"}, *rows(4), "bad"])
    config = DataConfig(cache_dir=None)
    whole = read_examples(tmp_path, tokenizer, config)
    monkeypatch.setattr(encode, "CHUNK_ROWS", 2)
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
    many = [first, *copies, second, *nearly, long, long]
    report = read_examples(many, tokenizer, DataConfig(max_length=60)).report
    assert (report.kept, report.duplicates, report.truncated) == (9, 4, 2)
    assert "; 2 cut to max_length; 4 " in str(report)
    told = str(read_examples([first, second], tokenizer).report)
    assert told.endswith("% supervised")


def test_rows_that_are_cut_alike_are_no_copies(tokenizer: Tokenizer) -> None:
    long = [{"prompt": f"{i} " + "fox " * 50, "completion": "Yes."} for i in range(2)]
    examples = read_examples(long, tokenizer, DataConfig(max_length=20))
    assert same(examples[0], examples[1])
    assert examples.report.duplicates == 0


@with_fixture
@given(st.lists(st.integers(2, 500), min_size=1, max_size=60))
def test_the_histogram_has_every_row_in_its_step(lengths: list[int]) -> None:
    made = (Example(np.zeros(n, np.int32), np.arange(n) > 0) for n in lengths)
    report = Examples.of(made).report
    assert len(report.histogram) <= 10
    ends = [0]
    for low, high, count in report.histogram:
        assert low == ends[-1] + 1
        assert count == sum(low <= n <= high for n in lengths)
        ends.append(high)
    assert len(set(np.diff(ends).tolist())) == 1  # steps of one size
    assert sum(count for _, _, count in report.histogram) == len(lengths)
    assert (report.longest, report.tokens) == (max(lengths), sum(lengths))
    assert report.supervised == sum(lengths) - len(lengths)
    assert ends[-2] < max(lengths) <= ends[-1]


def test_no_usable_row_is_an_error_that_names_the_reasons(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "x"}])
    with pytest.raises(DataError, match="line 1: field 'output' is missing"):
        read_examples(path, tokenizer, DataConfig())
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"no usable row in .*: it holds no row at all"):
        read_examples(tmp_path / "blank.jsonl", tokenizer, DataConfig())
    with pytest.raises(DataError, match=r"no usable row in rows .*: it holds no row at all"):
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


def test_refused_rows_are_written_with_place_reason_and_content(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path, refused = tmp_path / "a.jsonl", tmp_path / "refused.jsonl"
    good = json.dumps(rows(1)[0]).encode()
    path.write_bytes(good + b'\r\n{"instruction": "\xc3\xa9"}\r\n\nbroken \n\xff\n' + good)
    table = tmp_path / "b.csv"
    table.write_text("instruction,output\nsay,one\nalone\nempty,\n")
    config = DataConfig(refused_path=str(refused), cache_dir=str(tmp_path / "cache"))
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


def test_refused_rows_are_not_written_where_they_cannot_or_must_not_be(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    path = write_rows(folder / "a.jsonl", rows(1))
    nowhere = DataConfig(path=str(path), refused_path=str(tmp_path / "no" / "refused.jsonl"))
    with pytest.raises(DataError, match=r"data\.refused_path: .* cannot be written: No such"):
        read_examples(path, tokenizer, nowhere)
    with pytest.raises(DataError, match=r"data\.refused_path: .* cannot be written: No such"):
        train_validation_test(nowhere, tokenizer, 0)
    for source, refused in ((path, path), (folder, folder / "refused.jsonl")):
        with pytest.raises(ConfigError, match=r"data\.refused_path: .* is among the rows of"):
            read_examples(source, tokenizer, DataConfig(refused_path=str(refused)))
    assert path.read_text() == json.dumps(rows(1)[0]) + "\n"


# ---- sources -----------------------------------------------------------------------------------


def test_rows_in_memory_may_hold_what_json_cannot(tokenizer: Tokenizer) -> None:
    extra = {**rows(1)[0], "when": datetime.date(2026, 1, 1), "tags": {1, 2}}
    assert len(read_examples([extra], tokenizer, DataConfig())) == 1


def test_rows_in_memory_are_those_of_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(20))
    for source in (path, str(path)):
        assert read_examples(source, tokenizer).digest == read_examples(rows(20), tokenizer).digest
    one_by_one = read_examples((row for row in rows(20)), tokenizer)
    assert [(e.file, e.line, e.place) for e in one_by_one][:2] == [
        *[("rows", 1, "rows:1"), ("rows", 2, "rows:2")]
    ]
    assert one_by_one.report.source == "rows"


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


def test_refusals_in_several_files_are_named_with_their_file(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    a = write_rows(tmp_path / "a.jsonl", [{"text": 1}, {"text": "x"}])
    b = write_rows(tmp_path / "b.jsonl", [{"text": "y"}, {"text": ""}])
    report = read_examples(str(tmp_path / "*.jsonl"), tokenizer).report
    assert report.refused == [
        (1, "field 'text' must be a string, not int"),
        (2, "field 'text' is empty"),
    ]
    assert f"\n  {a}, line 1: field 'text' must" in str(report)
    assert f"\n  {b}, line 2: field 'text' is empty" in str(report)


def test_of_a_folder_that_names_its_parts_the_training_files_are_read(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for i, name in enumerate(("test", "train-1", "train-2", "valid")):
        write_rows(tmp_path / f"{name}.jsonl", rows(i + 1, 10 * i))
    examples = read_examples(tmp_path, tokenizer)
    assert examples.digest == read_examples([*rows(2, 10), *rows(3, 20)], tokenizer).digest


@pytest.mark.parametrize(
    ("rows", "form"),
    [
        ([{"prompt": "Count: ", "completion": "one two"}], "prompt_completion"),
        ([{"text": "one two three"}], "text"),
        ([7, {"question": 1}, {"text": "one two three"}], "text"),
    ],
)
def test_other_formats_are_detected_stated_and_learned(
    tokenizer: Tokenizer, rows: list[Any], form: str
) -> None:
    examples = read_examples(rows, tokenizer, DataConfig())
    assert examples.report.format == form and f"rows ({form}): " in str(examples.report)
    (example,) = examples
    learned = tokenizer.decode(example.tokens[example.learned].tolist())
    assert learned == (rows[-1].get("completion") or rows[-1]["text"]) + "<|eos|>"
    assert len(examples.report.refused) == len(rows) - 1


def test_one_format_to_a_file_and_a_named_one_is_not_guessed(tokenizer: Tokenizer) -> None:
    rows = [{"text": "first"}, {"prompt": "a", "completion": "b"}]
    assert read_examples(rows, tokenizer, DataConfig()).report.refused == [
        (2, "field 'text' is missing")
    ]
    named = DataConfig(format="prompt_completion")
    assert read_examples(rows, tokenizer, named).report.refused == [
        (1, "field 'prompt' is missing")
    ]


# ---- templates ---------------------------------------------------------------------------------


def decoded(examples: Examples, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(e.tokens.tolist()) for e in examples]


def test_the_template_that_is_named_writes_the_rows(chatty: Tokenizer, tmp_path: Path) -> None:
    asked = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    alpaca = f"<|bos|>{alpaca_prompt('Add.', '1 2')}3<|eos|>"
    mine = tmp_path / "mine.jinja"
    mine.write_text(CHAT.replace("<|", "(").replace("|>", ")"))
    for template, text in {
        "auto": alpaca,
        "alpaca": alpaca,
        "chat": "<|bos|><|user|>Add.\n\n1 2<|eos|><|assistant|>3<|eos|>",
        str(mine): "<|bos|>(user)Add.\n\n1 2<|eos|>(assistant)3<|eos|>",
    }.items():
        examples = read_examples(asked, chatty, DataConfig(template=template))
        assert decoded(examples, chatty) == [text]
        assert examples.report.template == template


def test_a_template_that_cannot_write_the_rows_is_refused(
    tokenizer: Tokenizer, chatty: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="but the model has no chat template"):
        read_examples(rows(1), tokenizer, DataConfig(template="chat"))
    with pytest.raises(ConfigError, match=r"data\.template must be .* 'no\.jinja' cannot be read"):
        read_examples(rows(1), tokenizer, DataConfig(template="no.jinja"))
    for form in ("messages", "sharegpt"):
        with pytest.raises(ConfigError, match=r"data\.template=alpaca cannot write rows of"):
            DataConfig(template="alpaca", format=form)
    old = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    for form, row in {"sharegpt": old, "messages": talk("a", "b")}.items():
        path = write_rows(tmp_path / "a.jsonl", [row])
        with pytest.raises(
            ConfigError, match=rf"a\.jsonl holds {form}, which data\.template=alpaca"
        ):
            read_examples(path, chatty, DataConfig(template="alpaca"))
    with pytest.raises(DataError, match="line 1: the model has no chat template"):
        read_examples(path, tokenizer)


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"max_length": 1}, "data.max_length must be at least 2; got 1"),
        ({"num_workers": -1}, "data.num_workers must be at least 0; got -1"),
        ({"train_on": "prompt"}, "data.train_on must be one of 'response', 'all'"),
        ({"truncation": "left"}, "data.truncation must be one of 'left-context', 'right', 'drop'"),
        ({"format": "jsonl"}, "data.format must be one of 'auto', 'alpaca', 'messages'"),
        ({"split": [0.5, 0.5]}, "data.split must be three shares"),
        ({"split": [0.5, 0.4, 0.2]}, "data.split must be three shares"),
        ({"split": [0.0, 0.5, 0.5]}, "data.split must be three shares"),
        ({"split": [1.2, -0.1, -0.1]}, "data.split must be three shares"),
        ({"split": [float("nan"), 0.5, 0.5]}, "data.split must be three shares"),
    ],
)
def test_a_value_out_of_range_is_named(how: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**how)
    assert words in str(caught.value)


# ---- a sequence --------------------------------------------------------------------------------

labelled = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=2, max_size=9)


@with_fixture
@given(st.lists(labelled, min_size=1, max_size=6))
def test_examples_by_hand_come_back_as_they_were(some: list[list[tuple[int, bool]]]) -> None:
    made = [
        Example(
            np.array([token for token, _ in row], np.int32),
            np.array([learned for _, learned in row]),
            line=i + 1,
            file=f"file {i % 2}",
        )
        for i, row in enumerate(some)
    ]
    examples = Examples.of(made, "by hand")
    assert len(examples) == len(made)
    for a, b in zip(examples, made, strict=True):
        assert same(a, b) and (a.place, a.tokens.dtype) == (b.place, np.int32)
    assert examples.lengths.tolist() == [len(e) for e in made]
    assert examples.report.source == "by hand"


def test_slices_and_indices_are_those_of_a_list(tokenizer: Tokenizer) -> None:
    examples = read_examples(rows(10), tokenizer)
    lines = list(range(1, 11))
    for place in (slice(3), slice(7, None), slice(1, 9, 3), slice(None, None, -1), slice(5, 5)):
        part = examples[place]
        assert [e.line for e in part] == lines[place]
        assert part.lengths.tolist() == [len(e) for e in part]
    assert examples[-1].line == 10 and examples[2:][0].line == 3
    with pytest.raises(IndexError):
        examples[10]


def test_the_digest_changes_with_any_token_label_or_order(tokenizer: Tokenizer) -> None:
    base = read_examples(rows(5), tokenizer, DataConfig())
    digests = {
        base.digest,
        read_examples(rows(5), tokenizer, DataConfig(train_on="all")).digest,
        read_examples(rows(6), tokenizer, DataConfig()).digest,
        read_examples(rows(5)[::-1], tokenizer, DataConfig()).digest,
        read_examples(rows(5, 1), tokenizer, DataConfig()).digest,
        base[1:].digest,
    }
    assert len(digests) == 6
    assert read_examples(rows(5), tokenizer, DataConfig()).digest == base.digest
    assert base[::-1][::-1].digest == base.digest


@with_fixture
@given(st.lists(labelled, min_size=1, max_size=4), st.data())
def test_one_token_one_label_or_one_border_makes_another_digest(
    some: list[list[tuple[int, bool]]], data: st.DataObject
) -> None:
    def digest(rows: list[list[tuple[int, bool]]]) -> str:
        return Examples.of(
            Example(np.array([t for t, _ in row], np.int32), np.array([w for _, w in row]))
            for row in rows
        ).digest

    row = data.draw(st.integers(0, len(some) - 1))
    place = data.draw(st.integers(0, len(some[row]) - 1))
    token, learned = some[row][place]
    seen = {digest(some)}
    for changed in [(token ^ 1, learned)], [(token, not learned)], [], [(token, learned)] * 2:
        new = [*some[row][:place], *changed, *some[row][place + 1 :]]
        seen.add(digest([*some[:row], new, *some[row + 1 :]]))
    if place:
        seen.add(digest([*some[:row], some[row][:place], some[row][place:], *some[row + 1 :]]))
    assert len(seen) == 5 + bool(place)


def test_the_digest_is_of_what_is_trained_and_not_of_where_it_lies(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    apart = [{**row, "id": i} for i, row in enumerate(rows(6))]
    write_rows(tmp_path / "a.jsonl", ["bad", *apart[:2]])
    write_rows(tmp_path / "b.jsonl", apart[2:])
    examples = read_examples(tmp_path, tokenizer)
    assert examples.digest == read_examples(rows(6), tokenizer).digest


# ---- split -------------------------------------------------------------------------------------


def parts(examples: Examples, seed: int = 0, shares: Any = (0.8, 0.1, 0.1)) -> list[set[bytes]]:
    return [{e.tokens.tobytes() for e in part} for part in examples.split(shares, seed)]


def test_adding_rows_moves_no_row_to_another_part(tokenizer: Tokenizer) -> None:
    before = parts(read_examples(rows(200), tokenizer, DataConfig()))
    after = parts(read_examples([*rows(50, 500), *rows(200)], tokenizer, DataConfig()))
    for old, new in zip(before, after):
        assert old <= new


def test_a_row_s_part_does_not_depend_on_how_it_is_encoded(
    tokenizer: Tokenizer, without_bos: Tokenizer
) -> None:
    lines = [
        [[e.line for e in part] for part in examples.split([0.6, 0.2, 0.2], seed=1)]
        for examples in (
            read_examples(rows(100), tokenizer),
            read_examples(rows(100), tokenizer, DataConfig(train_on="all")),
            read_examples(rows(100), without_bos),
        )
    ]
    assert lines[0] == lines[1] == lines[2]


def test_copies_of_a_row_share_a_part(tokenizer: Tokenizer) -> None:
    reordered = [dict(reversed(list(row.items()))) for row in rows(100)]
    examples = read_examples([*rows(100), *reordered], tokenizer, DataConfig())
    split = examples.split([0.5, 0.25, 0.25], seed=0)
    assert sum(map(len, split)) == 200
    for a, b in ((0, 1), (0, 2), (1, 2)):
        texts = [{e.tokens.tobytes() for e in split[i]} for i in (a, b)]
        assert not texts[0] & texts[1]
    assert all(len(part) % 2 == 0 for part in split)


def test_a_slice_is_split_as_the_whole_is(tokenizer: Tokenizer) -> None:
    examples = read_examples(rows(100), tokenizer)
    for part, whole in zip(examples[30:].split([0.5, 0.5]), examples.split([0.5, 0.5])):
        assert [e.line for e in part] == [e.line for e in whole if e.line > 30]


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], [0.9, 0.2]])
def test_shares_that_are_none_are_refused(shares: list[float]) -> None:
    examples = Examples.of([Example(np.arange(3, dtype=np.int32), np.arange(3) > 0)])
    with pytest.raises(ConfigError, match="shares of a split must sum to 1"):
        examples.split(shares)


def test_a_seed_gives_one_split_and_another_seed_another(tokenizer: Tokenizer) -> None:
    examples = read_examples(rows(200), tokenizer, DataConfig())
    assert parts(examples, 1) == parts(examples, 1)
    assert parts(examples, 1) != parts(examples, 2)


def test_shares_are_met_on_average_and_the_order_is_kept(tokenizer: Tokenizer) -> None:
    examples = read_examples(rows(3000), tokenizer, DataConfig())
    split = examples.split([0.8, 0.1, 0.1], seed=3)
    shares = [len(part) / 3000 for part in split]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert all([e.line for e in part] == sorted(e.line for e in part) for part in split)
    assert sorted(e.line for part in split for e in part) == list(range(1, 3001))
    assert [len(part) for part in examples.split([1.0, 0.0, 0.0])] == [3000, 0, 0]
    assert [len(part) for part in examples.split([0.0, 0.0, 1.0])] == [0, 0, 3000]


@with_fixture
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 3))
def test_any_shares_take_their_rows_from_one_line(weights: list[int], seed: int) -> None:
    """Parts tile [0, 1) in their order: a first share that grows only takes from the next ones."""
    made = (Example(np.arange(i, i + 3, dtype=np.int32), np.arange(3) > 0, i) for i in range(400))
    examples = Examples.of(made)
    shares = [weight / sum(weights) for weight in weights]
    split = examples.split(shares, seed)
    assert [len(part) / 400 for part in split] == pytest.approx(shares, abs=0.15)
    for i in range(1, len(weights)):
        head, _ = examples.split([sum(shares[:i]), 1 - sum(shares[:i])], seed)
        together = sorted(e.line for part in split[:i] for e in part)
        assert [e.line for e in head] == together


# ---- the parts of a run ------------------------------------------------------------------------


def lengths(tokenizer: Tokenizer, seed: int = 0, **how: Any) -> list[int | None]:
    split = train_validation_test(DataConfig(**how), tokenizer, seed)
    return [None if part is None else len(part) for part in split]


def test_named_files_stand_for_their_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "a.jsonl", rows(100)))
    other = str(write_rows(tmp_path / "b.jsonl", rows(7, 1000)))
    named = {"validation_path": other, "test_path": other}

    train, validation, test = lengths(tokenizer, path=path)
    assert train and validation and test and train + validation + test == 100
    assert lengths(tokenizer, path=path, validation_path=other) == [100 - test, 7, test]
    train, validation, test = lengths(tokenizer, path=path, test_path=other)
    assert train and validation and train + validation == 100 and test == 7
    assert lengths(tokenizer, path=path, **named) == [100, 7, 7]
    assert lengths(tokenizer, path=path, split=[1.0, 0.0, 0.0]) == [100, None, None]
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
    assert lengths(tokenizer, path=str(folder), validation_path=other) == [100, 7, 6]
    config = DataConfig(path=str(folder), test_path=str(folder))
    train, validation, test = train_validation_test(config, tokenizer, 0)
    assert train and validation and test and test.digest == train.digest != validation.digest
    (folder / "valid.jsonl").unlink()
    train, validation, test = lengths(tokenizer, path=str(folder))
    assert train and validation and train + validation == 100 and test == 6


def test_an_unchanged_test_set_is_the_same_with_a_validation_file(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = str(write_rows(tmp_path / "a.jsonl", rows(300)))
    other = str(write_rows(tmp_path / "b.jsonl", rows(3, 1000)))
    tests = [
        train_validation_test(DataConfig(path=path, validation_path=p), tokenizer, 0)[2]
        for p in (None, other)
    ]
    assert tests[0] is not None and tests[1] is not None
    assert tests[0].digest == tests[1].digest


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
    assert "; 3 are among the training rows, too" in str(validation.report)


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


# ---- the cache ---------------------------------------------------------------------------------


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
        assert parts(examples) == parts(first)
    assert first.report.truncated == 1 and first.report.duplicates == 3


def test_without_a_cache_nothing_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    before = sorted(cache_folder("auto").rglob("*"))
    for _ in range(2):
        examples = read_examples(path, tokenizer, DataConfig(cache_dir=None))
        assert not examples.report.cached and len(examples) == 3
    assert sorted(cache_folder("auto").rglob("*")) == before
    assert [place.name for place in tmp_path.iterdir()] == ["a.jsonl"]


def test_rows_in_memory_are_not_cached(tokenizer: Tokenizer, cached: DataConfig) -> None:
    for _ in range(2):
        assert not read_examples(rows(3), tokenizer, cached).report.cached
    assert cached.cache_dir is not None and not Path(cached.cache_dir).exists()


def test_auto_is_the_user_s_cache(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    assert cache_folder("auto") == tmp_path / "here" / "mlx-qlora"
    path = write_rows(tmp_path / "a.jsonl", rows(3))
    assert [read_examples(path, tokenizer).report.cached for _ in range(2)] == [False, True]
    assert any((tmp_path / "here" / "mlx-qlora").rglob("*"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / ".cache" / "mlx-qlora"
    assert cache_folder("~/mine") == tmp_path / "mine"


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


def test_a_damaged_entry_is_made_again(
    tokenizer: Tokenizer, cached: DataConfig, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(30))
    digest = read_examples(path, tokenizer, cached).digest
    (tokens,) = Path(cached.cache_dir or "").rglob("tokens.bin")
    tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    again = [read_examples(path, tokenizer, cached) for _ in range(2)]
    assert [(e.report.cached, e.digest) for e in again] == [(False, digest), (True, digest)]


def test_what_failed_leaves_no_entry(
    tokenizer: Tokenizer, cached: DataConfig, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*rows(3), {"instruction": "x", "output": "y " * 99}])
    config = replace(cached, truncation="error", max_length=60)
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:4: .* longer than max_length 60"):
            read_examples(path, tokenizer, config)
    assert not [place for place in Path(cached.cache_dir or "").rglob("*") if place.is_file()]
