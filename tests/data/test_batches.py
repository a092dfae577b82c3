"""The stream of rows: complete, seeded, shared without loss, and reachable at any index."""

import itertools
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.training import joined

from mlx_qlora.data.batches import (
    IGNORE,
    Batch,
    Batches,
    collate,
    make_batches,
    padded_width,
)
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.errors import ConfigError, DataError

sizes = st.integers(1, 7)
worlds = st.integers(1, 3)
lengths = st.lists(st.integers(2, 200), min_size=1, max_size=40)
shares = st.sampled_from([0.01, 0.3, 0.5, 1, 1.5, 2, 2.7, 3])
# Every way in which examples are ordered.
hows = st.fixed_dictionaries({"shuffle": st.booleans(), "seed": st.integers(0, 5)})
quick = settings(deadline=None, max_examples=60)


def example(i: int, n: int, learned: Any = None) -> Example:
    """A row whose tokens tell it from any other, and its second half is learned."""
    tokens = 1000 * (i + 1) + np.arange(n, dtype=np.int32)
    return Example(tokens, np.arange(n) >= max(1, n // 2) if learned is None else learned, i)


def made(of_lengths: list[int]) -> Examples:
    return Examples.of(example(i, n) for i, n in enumerate(of_lengths))


def documents(batch: Batch) -> list[list[int]]:
    """The examples in each row of a batch, by number; each is checked to be there as a whole."""
    assert batch.documents is not None and batch.documents.dtype == np.int32
    tokens = np.array(batch.tokens)
    rows: list[list[int]] = [[] for _ in tokens]
    for (b, start, end), place in zip(batch.documents.tolist(), batch.places, strict=True):
        i = int(place.removeprefix("rows:"))
        assert tokens[b, start:end].tolist() == [1000 * (i + 1) + t for t in range(end - start)]
        rows[b].append(i)
    return rows


def one(batches: Batches, index: int) -> list[list[int]]:
    """The rows at an index, without the one of padding that stands for none."""
    return [row for row in documents(batches[index]) if row]


def stream(ranks: list[Batches], n: int) -> list[list[int]]:
    """The rows of the first n batches of all ranks, in the order of the stream."""
    found = []
    for i in range(n):
        for turn in itertools.zip_longest(*(one(rank, i) for rank in ranks)):
            found += [row for row in turn if row is not None]
    return found


def ranks(examples: Examples, size: int, world: int, **how: Any) -> list[Batches]:
    return [make_batches(examples, size, rank=r, world_size=world, **how) for r in range(world)]


def same(a: Batch, b: Batch) -> bool:
    assert a.documents is not None and b.documents is not None
    return (
        a.places == b.places
        and np.array_equal(a.documents, b.documents)
        and bool(mx.array_equal(a.tokens, b.tokens))
        and bool(mx.array_equal(a.labels, b.labels))
    )


# ---- nothing is lost, nothing comes twice ------------------------------------------------------


@quick
@given(lengths, sizes, worlds, shares, hows)
def test_every_example_comes_once_an_epoch_whoever_shares_the_rows(
    lengths: list[int], size: int, world: int, epochs: float, how: dict[str, Any]
) -> None:
    """Over several epochs and a part of one, with the last partial batch."""
    everyone = ranks(made(lengths), size, world, epochs=epochs, **how)
    stop, R = everyone[0].stop, len(lengths)
    assert stop is not None and {rank.stop for rank in everyone} == {stop}
    rows = stream(everyone, stop)
    assert len(rows) == max(1, round(epochs * R))
    assert stop == math.ceil(len(rows) / (size * world))
    for start in range(0, len(rows), R):
        epoch = [i for row in rows[start : start + R] for i in row]
        assert len(epoch) == len(set(epoch))
        if start + R <= len(rows):
            assert sorted(epoch) == list(range(len(lengths)))
    assert all(len(row) == 1 for row in rows)


@quick
@given(lengths, sizes, worlds, hows, st.integers(0, 12), st.randoms())
def test_a_run_that_goes_on_from_any_index_sees_what_it_would_have_seen(
    lengths: list[int], size: int, world: int, how: dict[str, Any], stop: int, random: Any
) -> None:
    examples = made(lengths)
    whole = stream(ranks(examples, size, world, **how), 12)
    before = stream(ranks(examples, size, world, **how), stop)
    again = ranks(examples, size, world, **how)  # another process, that has made no batch yet
    after = [
        row
        for i in range(stop, 12)
        for turn in zip(*(one(rank, i) for rank in again))
        for row in turn
    ]
    assert before + after == whole
    order = list(range(12))
    random.shuffle(order)
    fresh = make_batches(examples, size, world_size=world, **how)
    found = {i: fresh[i] for i in order}
    walked = make_batches(examples, size, world_size=world, **how)
    assert all(same(found[i], walked[i]) for i in range(12))


@quick
@given(lengths, sizes, worlds, shares, hows)
def test_batches_made_ahead_are_those_of_their_index(
    lengths: list[int], size: int, world: int, epochs: float, how: dict[str, Any]
) -> None:
    batches = make_batches(
        made(lengths), size, epochs=epochs, rank=world - 1, world_size=world, **how
    )
    assert batches.stop is not None
    for start in (0, batches.stop // 2):
        ahead = list(batches.ahead(start, batches.stop))
        assert len(ahead) == batches.stop - start
        assert all(same(batch, batches[i]) for i, batch in enumerate(ahead, start))


def test_an_endless_stream_can_be_left_at_any_time() -> None:
    batches = make_batches(made([5] * 7), 2)
    ahead = batches.ahead(3, 10**9)
    assert all(same(next(ahead), batches[i]) for i in range(3, 8))
    ahead.close()
    assert list(batches.ahead(4, 4)) == []


@quick
@given(lengths, sizes, worlds, hows)
def test_iterating_is_one_pass_with_the_rows_that_are_left_at_its_end(
    lengths: list[int], size: int, world: int, how: dict[str, Any]
) -> None:
    """Whatever the epochs of the run."""
    examples = made(lengths)
    for epochs in (None, 0.2, 3.5):
        once, other = (ranks(examples, size, world, epochs=e, **how) for e in (1, epochs))
        for a, b in zip(once, other):
            passed = list(b)
            assert len(passed) == len(b) == a.stop == math.ceil(len(lengths) / (size * world))
            assert all(same(batch, a[i]) for i, batch in enumerate(passed))


# ---- one stream, however it is shared ----------------------------------------------------------


def steps(
    examples: Examples, size: int, world: int, accumulation: int, n: int, **how: Any
) -> list[list[list[int]]]:
    """The rows of each optimiser step, sorted."""
    everyone = ranks(examples, size, world, **how)
    return [
        sorted(
            row
            for a in range(accumulation)
            for rank in everyone
            for row in one(rank, step * accumulation + a)
        )
        for step in range(n)
    ]


@quick
@given(lengths, hows, st.sampled_from([4, 6, 12]))
def test_a_step_has_the_same_rows_however_many_processes_share_it(
    lengths: list[int], how: dict[str, Any], effective: int
) -> None:
    examples = made(lengths)
    expected = steps(examples, effective, 1, 1, 6, **how)
    for world in (2, 3, 4):
        if effective % world == 0:
            assert steps(examples, effective // world, world, 1, 6, **how) == expected


@quick
@given(
    lengths,
    hows,
    st.sampled_from([(1, 1, 6), (2, 1, 3), (3, 1, 2), (1, 2, 3), (1, 3, 2), (2, 3, 1), (3, 2, 1)]),
)
def test_a_step_has_the_same_examples_however_many_micro_batches_share_it(
    lengths: list[int], how: dict[str, Any], factors: tuple[int, int, int]
) -> None:
    expected = steps(made(lengths), 6, 1, 1, 8, **how)
    assert steps(made(lengths), *factors, 8, **how) == expected


def test_processes_take_turns_in_the_stream() -> None:
    a, b, c = ranks(made([5] * 14), 2, 3, shuffle=False, epochs=1)
    assert [documents(rank[0]) for rank in (a, b, c)] == [[[0], [3]], [[1], [4]], [[2], [5]]]
    assert [documents(rank[2]) for rank in (a, b, c)] == [[[12]], [[13]], [[]]]


def test_a_process_without_rows_has_one_of_padding_and_nothing_to_learn() -> None:
    idle = make_batches(made([100]), 2, epochs=1, rank=1, world_size=2)
    (batch,) = list(idle)
    assert same(batch, idle[0])
    assert batch.tokens.shape == batch.labels.shape == (1, 16)
    assert (np.array(batch.tokens) == 0).all() and (np.array(batch.labels) == IGNORE).all()
    assert batch.documents is not None and batch.documents.shape == (0, 3)
    assert (batch.places, batch.real_tokens) == ((), 0)


# ---- order -------------------------------------------------------------------------------------


def order(batches: Batches, start: int, stop: int) -> list[list[list[int]]]:
    return [one(batches, i) for i in range(start, stop)]


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    examples = made([2 + i % 60 for i in range(300)])
    first = make_batches(examples, 4, seed=5)
    n = len(first)
    epochs = [order(first, e * n, (e + 1) * n) for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    np.random.seed(1)  # no global state takes part
    again = make_batches(examples, 4, seed=5)
    assert order(again, 2 * n, 3 * n) == epochs[2]  # without having made the others
    assert order(again, 0, n) == epochs[0]
    assert order(make_batches(examples, 4, seed=6), 0, n) != epochs[0]
    limited = make_batches(examples, 4, seed=5, epochs=3)
    assert order(limited, 0, n) == epochs[0]  # the end of a run does not change its beginning


def test_without_shuffling_the_examples_keep_their_order() -> None:
    lengths = [2 + 37 * i % 50 for i in range(40)]
    batches = make_batches(made(lengths), 3, shuffle=False)
    for _ in range(2):
        walked = [i for batch in batches for row in documents(batch) for i in row]
        assert walked == list(range(40))
    rows = stream([batches], 2 * len(batches))
    assert [i for row in rows for i in row][:80] == [*range(40), *range(40)][:80]


@quick
@given(lengths, sizes, worlds, shares, hows)
def test_epochs_are_counted_in_rows(
    lengths: list[int], size: int, world: int, epochs: float, how: dict[str, Any]
) -> None:
    for batches in (
        make_batches(made(lengths), size, world_size=world, **how),
        make_batches(made(lengths), size, world_size=world, epochs=epochs, **how),
    ):
        R = len(lengths)
        last = batches.stop or 9
        assert [batches.epoch(i) for i in range(last)] == [
            i * size * world / R for i in range(last)
        ]
        if batches.stop is not None:
            assert batches.epoch(last) == max(1, round(epochs * R)) / R


# ---- arrays ------------------------------------------------------------------------------------


@st.composite
def laid_out(draw: Any) -> list[list[Example]]:
    """Some rows of examples with any labels; a token may be 0, and learned."""
    rows, i = [], 0
    for count in draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)):
        rows.append([])
        for _ in range(count):
            learned = np.array([False, *draw(st.lists(st.booleans(), min_size=1, max_size=20))])
            tokens = 1000 * i + np.arange(len(learned), dtype=np.int32)
            rows[-1].append(Example(tokens, learned, i))
            i += 1
    return rows


@quick
@given(laid_out())
def test_a_batch_is_what_its_definition_says(rows: list[list[Example]]) -> None:
    batch = collate(joined(rows))
    T = padded_width(max(sum(len(e) - 1 for e in row) for row in rows))
    tokens = np.zeros((len(rows), T), int)
    labels = np.full((len(rows), T), IGNORE)
    spans = []
    for b, row in enumerate(rows):
        at = 0
        for e in row:
            start = at
            for t in range(len(e) - 1):
                tokens[b, at] = e.tokens[t]
                if e.learned[t + 1]:
                    labels[b, at] = e.tokens[t + 1]
                at += 1
            spans.append([b, start, at])
    assert batch.tokens.dtype == batch.labels.dtype == mx.int32
    assert np.array(batch.tokens).tolist() == tokens.tolist()
    assert np.array(batch.labels).tolist() == labels.tolist()
    assert batch.documents is not None and batch.documents.tolist() == spans
    assert batch.places == tuple(row[0].place for row in rows for _ in row)
    assert batch.real_tokens == sum(len(e) - 1 for row in rows for e in row)


def test_a_batch_without_documents_has_no_padding() -> None:
    batch = Batch(mx.zeros((3, 7)), mx.zeros((3, 7)))
    assert batch.real_tokens == 21


# ---- widths ------------------------------------------------------------------------------------


def test_widths_are_few_never_too_small_and_waste_is_bounded() -> None:
    widths = {n: padded_width(n) for n in range(1, 16385)}
    assert len(set(widths.values())) <= 120
    for n, width in widths.items():
        assert width >= n and width % 16 == 0
        assert width - n < max(16, 0.06 * width)
    assert np.mean([1 - n / width for n, width in widths.items()]) < 0.03
    assert all(widths[n] <= widths[n + 1] for n in range(1, 16384))


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1; got -1"),
        ({"world_size": 0}, "world_size must be at least 1; got 0"),
        ({"rank": 1}, "rank must be from 0 to 0; got 1"),
        ({"rank": -1}, "rank must be from 0 to 0; got -1"),
        ({"rank": 3, "world_size": 3}, "rank must be from 0 to 2; got 3"),
        ({"epochs": 0}, "epochs must be above 0 and finite; got 0"),
        ({"epochs": -1.5}, "epochs must be above 0 and finite; got -1.5"),
        ({"epochs": float("nan")}, "epochs must be above 0 and finite; got nan"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(how: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_batches(made([4, 6]), **how)
    assert str(caught.value) == words


def test_no_examples_are_refused() -> None:
    with pytest.raises(DataError, match="no examples to make batches of"):
        make_batches(made([5, 6])[:0])


def test_an_index_outside_the_stream_is_refused() -> None:
    ended = make_batches(made([5] * 5), 2, epochs=1)
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"the stream has 3 batches; got index {index}"):
            ended[index]
    with pytest.raises(IndexError, match="the stream has no end; got index -1"):
        make_batches(made([5] * 5), 2)[-1]
