"""Rows of ids and labels as a sequence: slices, digests, lengths, and how a seed divides them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError


def rows(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(start, start + n)]


def same(a: Example, b: Example) -> bool:
    tokens, learned = (
        getattr(a, x).tolist() == getattr(b, x).tolist() for x in ("tokens", "learned")
    )
    return tokens and learned and a.starts == b.starts


slowly = settings(deadline=None)
labelled = st.lists(st.tuples(st.integers(0, 2**30 - 1), st.booleans()), min_size=2, max_size=9)


# ---- a sequence ----------------------------------------------------------------------------------


@slowly
@given(st.lists(labelled, min_size=1, max_size=6))
def test_examples_by_hand_come_back_as_they_were(some: list[list[tuple[int, bool]]]) -> None:
    made = [
        Example(
            np.array([token for token, _ in row], np.int32),
            np.array([learned for _, learned in row]),
            line=i + 1,
            file=f"file {i % 2}",
            starts=(1,) if i % 3 == 2 else (),
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


@slowly
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


# ---- the digest ----------------------------------------------------------------------------------


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
    apart = [{"text": "no row of this format"}, *({**row, "id": 1} for row in rows(5))]
    assert read_examples(apart, tokenizer, DataConfig(format="alpaca")).digest == base.digest
    assert base[::-1][::-1].digest == base.digest


@slowly
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


# ---- split ---------------------------------------------------------------------------------------


def parts(examples: Examples, seed: int = 0, shares: Any = (0.8, 0.1, 0.1)) -> list[set[bytes]]:
    return [{e.tokens.tobytes() for e in part} for part in examples.split(shares, seed)]


def test_adding_rows_moves_no_row_to_another_part(tokenizer: Tokenizer) -> None:
    before = parts(read_examples(rows(200), tokenizer, DataConfig()))
    after = parts(read_examples([*rows(50, 500), *rows(200)], tokenizer, DataConfig()))
    for old, new in zip(before, after):
        assert old <= new
    assert before != parts(read_examples(rows(200), tokenizer, DataConfig()), seed=1)


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


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], [0.9, 0.2], 0.9, "0.9,0.1"])
def test_shares_that_are_none_are_refused(shares: Any) -> None:
    examples = Examples.of([Example(np.arange(3, dtype=np.int32), np.arange(3) > 0)])
    with pytest.raises(ConfigError, match="shares must be a list that sums to 1, such as"):
        examples.split(shares)


def test_shares_are_met_on_average_and_the_order_is_kept(tokenizer: Tokenizer) -> None:
    examples = read_examples(rows(3000), tokenizer, DataConfig())
    split = examples.split([0.8, 0.1, 0.1], seed=3)
    shares = [len(part) / 3000 for part in split]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert all([e.line for e in part] == sorted(e.line for e in part) for part in split)
    assert sorted(e.line for part in split for e in part) == list(range(1, 3001))
    assert [len(part) for part in examples.split([1.0, 0.0, 0.0])] == [3000, 0, 0]
    assert [len(part) for part in examples.split([0.0, 0.0, 1.0])] == [0, 0, 3000]


@slowly
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
