"""Rows to tokens and labels, against a slow reference written from the definition."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_folder import write_tokenizer

from mlx_qlora.data.batches import IGNORE, collate
from mlx_qlora.data.examples import (
    DataConfig,
    Examples,
    encode_pair,
    encode_prompt,
    read_examples,
    train_validation_test,
)
from mlx_qlora.data.template import alpaca_row
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=False))


def rows(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(start, start + n)]


def write_rows(path: Path, content: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


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
    prompt, response = alpaca_row(row)
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
    batch = collate(list(examples))
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
    prompt, response = alpaca_row(rows(1)[0])
    assert example.tokens.tolist() == [*without_bos.encode(prompt + response), without_bos.eos_id]


def test_a_prompt_that_spells_the_bos_gets_no_second_one(tokenizer: Tokenizer) -> None:
    assert encode_prompt(tokenizer, "<|bos|>hi") == encode_prompt(tokenizer, "hi")


def test_the_first_token_is_never_learned(without_bos: Tokenizer) -> None:
    example = read_examples(rows(1), without_bos, DataConfig(train_on="all"))[0]
    assert not example.learned[0] and example.learned[1:].all()


def test_the_prompt_alone_is_always_a_prefix_of_prompt_and_response(tokenizer: Tokenizer) -> None:
    """Also where one token would span the border, as "th|e" would in the corpus's " the"."""
    whole = tokenizer.encode("the fox")
    borders = [i for i in range(1, 7) if len(tokenizer.encode("the fox"[:i])) > 0]
    straddled = 0
    for i in borders:
        prompt, response = "the fox"[:i], "the fox"[i:]
        context, answer = encode_pair(tokenizer, prompt, response)
        assert context == encode_prompt(tokenizer, prompt)
        assert tokenizer.decode([*context[1:], *answer[:-1]]) == "the fox"
        straddled += [*context[1:], *answer[:-1]] != whole
    assert straddled  # at least one border was inside a token


def test_a_row_longer_than_max_length_is_refused_by_line(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = {"instruction": "Say it.", "output": "fox " * 50}
    path = write_rows(tmp_path / "a.jsonl", [*rows(2), long, *rows(2, 2)])
    n = len(read_examples([long], tokenizer, DataConfig())[0])
    examples = read_examples(path, tokenizer, DataConfig(max_length=n - 1))
    assert len(examples) == 4
    assert examples.report.refused == [(3, f"{n} tokens, longer than max_length {n - 1}")]
    assert len(read_examples(path, tokenizer, DataConfig(max_length=n))) == 5


def test_the_report_counts_and_names_every_refusal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(rows(1)[0]).encode()
    path.write_bytes(good + b'\n\n{"instruction": "x"}\n[1]\nbroken\n\xff\n' + good + b"\n")
    examples = read_examples(path, tokenizer, DataConfig())
    report = examples.report
    assert (report.read, report.kept, len(examples)) == (6, 2, 2)
    assert [line for line, _ in report.refused] == [3, 4, 5, 6]
    assert [e.line for e in examples] == [1, 7]
    assert report.tokens == sum(map(len, examples))
    assert report.supervised == sum(int(e.learned.sum()) for e in examples)
    assert "6 rows read, 2 kept, 4 refused" in str(report)
    assert "line 3: field 'output' is missing" in str(report)


def test_no_usable_row_is_an_error_that_names_the_reasons(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "x"}])
    with pytest.raises(DataError, match="line 1: field 'output' is missing"):
        read_examples(path, tokenizer, DataConfig())
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="no usable row"):
        read_examples(tmp_path / "blank.jsonl", tokenizer, DataConfig())


def test_rows_in_memory_may_hold_what_json_cannot(tokenizer: Tokenizer) -> None:
    extra = {**rows(1)[0], "when": datetime.date(2026, 1, 1), "tags": {1, 2}}
    assert len(read_examples([extra], tokenizer, DataConfig())) == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"max_length": 1}, "data.max_length must be at least 2; got 1"),
        ({"train_on": "prompt"}, "data.train_on must be one of 'response', 'all'"),
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


# ---- split -------------------------------------------------------------------------------------


def parts(examples: Examples, seed: int = 0, shares: Any = (0.8, 0.1, 0.1)) -> list[set[bytes]]:
    return [{e.digest for e in part} for part in examples.split(shares, seed)]


def test_adding_rows_moves_no_row_to_another_part(tokenizer: Tokenizer) -> None:
    before = parts(read_examples(rows(200), tokenizer, DataConfig()))
    after = parts(read_examples([*rows(50, 500), *rows(200)], tokenizer, DataConfig()))
    for old, new in zip(before, after):
        assert old <= new


def test_copies_of_a_row_share_a_part(tokenizer: Tokenizer) -> None:
    reordered = [dict(reversed(list(row.items()))) for row in rows(100)]
    examples = read_examples([*rows(100), *reordered], tokenizer, DataConfig())
    split = examples.split([0.5, 0.25, 0.25], seed=0)
    assert sum(map(len, split)) == 200
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not {e.digest for e in split[a]} & {e.digest for e in split[b]}
    assert all(len(part) % 2 == 0 for part in split)


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
    assert [len(part) for part in examples.split([1.0, 0.0, 0.0])] == [3000, 0, 0]
    assert [len(part) for part in examples.split([0.0, 0.0, 1.0])] == [0, 0, 3000]


def test_named_files_stand_for_their_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "a.jsonl", rows(100)))
    other = str(write_rows(tmp_path / "b.jsonl", rows(7, 1000)))

    def lengths(**how: Any) -> list[int]:
        split = train_validation_test(DataConfig(path=path, **how), tokenizer, seed=0)
        return [len(part) if part is not None else -1 for part in split]

    train, validation, test = lengths()
    assert train + validation + test == 100
    assert lengths(validation_path=other) == [100 - test, 7, test]
    assert lengths(test_path=other) == [100 - validation, validation, 7]
    assert lengths(validation_path=other, test_path=other) == [100, 7, 7]
    assert lengths(split=[1.0, 0.0, 0.0]) == [100, -1, -1]


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
    assert [e.digest for e in tests[0]] == [e.digest for e in tests[1]]


def test_a_missing_path_and_an_empty_training_part_are_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is missing"):
        train_validation_test(DataConfig(), tokenizer, 0)
    path = str(write_rows(tmp_path / "a.jsonl", rows(1)))
    config = DataConfig(path=path, split=[1e-9, 0.5, 0.5 - 1e-9])
    with pytest.raises(DataError, match="no row is left to train on"):
        train_validation_test(config, tokenizer, 0)


def test_the_digest_changes_with_any_token_label_or_order(tokenizer: Tokenizer) -> None:
    base = read_examples(rows(5), tokenizer, DataConfig())
    digests = {
        base.digest,
        read_examples(rows(5), tokenizer, DataConfig(train_on="all")).digest,
        read_examples(rows(6), tokenizer, DataConfig()).digest,
        read_examples(rows(5)[::-1], tokenizer, DataConfig()).digest,
        read_examples(rows(5, 1), tokenizer, DataConfig()).digest,
    }
    assert len(digests) == 5
    assert read_examples(rows(5), tokenizer, DataConfig()).digest == base.digest


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
    wanted = rows[-1].get("completion") or rows[-1]["text"]
    assert learned.endswith(tokenizer.decode([tokenizer.eos_id]))
    assert wanted.strip().endswith(
        learned.removesuffix(tokenizer.decode([tokenizer.eos_id])).strip()
    )
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
