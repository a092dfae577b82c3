"""The stream of rows: complete, seeded, shared without loss, and reachable at any index."""

import itertools
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.data.batches import (
    IGNORE,
    Batch,
    Batches,
    collate,
    make_batches,
    packed_width,
    padded_width,
)
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.errors import ConfigError, DataError

sizes = st.integers(1, 7)
worlds = st.integers(1, 3)
lengths = st.lists(st.integers(2, 200), min_size=1, max_size=40)
shares = st.sampled_from([0.01, 0.3, 0.5, 1, 1.5, 2, 2.7, 3])
# Every way in which rows are made and ordered.
hows = st.fixed_dictionaries(
    {"shuffle": st.booleans(), "packing": st.booleans(), "seed": st.integers(0, 5)},
    optional={"max_length": st.sampled_from([200, 500, 2000])},
)
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
    stop, R = everyone[0].stop, everyone[0].rows_per_epoch
    assert stop is not None and {rank.stop for rank in everyone} == {stop}
    rows = stream(everyone, stop)
    assert len(rows) == max(1, round(epochs * R))
    assert stop == math.ceil(len(rows) / (size * world))
    for start in range(0, len(rows), R):
        epoch = [i for row in rows[start : start + R] for i in row]
        assert len(epoch) == len(set(epoch))
        if start + R <= len(rows):
            assert sorted(epoch) == list(range(len(lengths)))
    if not how["packing"]:
        assert all(len(row) == 1 for row in rows) and len(lengths) == R


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
            assert len(passed) == len(b) == a.stop == math.ceil(a.rows_per_epoch / (size * world))
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
    st.lists(st.integers(40, 90), min_size=20, max_size=40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(1, 1, 6), (2, 1, 3), (3, 1, 2), (1, 2, 3), (1, 3, 2), (2, 3, 1), (3, 2, 1)]),
)
def test_a_step_has_the_same_rows_however_many_micro_batches_share_it(
    lengths: list[int], shuffle: bool, packing: bool, factors: tuple[int, int, int]
) -> None:
    """Where the examples fill their rows, and where no rows are sorted by length."""
    how = {"shuffle": shuffle and packing, "packing": packing, "max_length": 128}
    expected = steps(made(lengths), 6, 1, 1, 8, **how)
    assert steps(made(lengths), *factors, 8, **how) == expected


def test_processes_take_turns_in_the_stream() -> None:
    a, b, c = ranks(made([5] * 14), 2, 3, shuffle=False, packing=False, epochs=1)
    assert [documents(rank[0]) for rank in (a, b, c)] == [[[0], [3]], [[1], [4]], [[2], [5]]]
    assert [documents(rank[2]) for rank in (a, b, c)] == [[[12]], [[13]], [[]]]


@pytest.mark.parametrize("packing", [True, False])
def test_a_process_without_rows_has_one_of_padding_and_nothing_to_learn(packing: bool) -> None:
    idle = make_batches(made([100]), 2, packing=packing, epochs=1, rank=1, world_size=2)
    (batch,) = list(idle)
    assert same(batch, idle[0])
    assert batch.tokens.shape == batch.labels.shape == (1, 128 if packing else 64)
    assert (np.array(batch.tokens) == 0).all() and (np.array(batch.labels) == IGNORE).all()
    assert batch.documents is not None and batch.documents.shape == (0, 3)
    assert (batch.places, batch.real_tokens) == ((), 0)


# ---- order -------------------------------------------------------------------------------------


def order(batches: Batches, start: int, stop: int) -> list[list[list[int]]]:
    return [one(batches, i) for i in range(start, stop)]


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch_alone(packing: bool) -> None:
    examples = made([2 + i % 60 for i in range(300)])
    how: dict[str, Any] = {"packing": packing, "max_length": 100}
    first = make_batches(examples, 4, seed=5, **how)
    n = len(first)
    epochs = [order(first, e * n, (e + 1) * n) for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    np.random.seed(1)  # no global state takes part
    again = make_batches(examples, 4, seed=5, **how)
    assert order(again, 2 * n, 3 * n) == epochs[2]  # without having made the others
    assert order(again, 0, n) == epochs[0]
    assert order(make_batches(examples, 4, seed=6, **how), 0, n) != epochs[0]
    limited = make_batches(examples, 4, seed=5, epochs=3, **how)
    assert order(limited, 0, n) == epochs[0]  # the end of a run does not change its beginning


def test_each_seed_packs_other_examples_together_and_each_epoch_the_same() -> None:
    examples = made(np.random.default_rng(0).integers(2, 60, 200).tolist())

    def rows(seed: int, epoch: int) -> set[tuple[int, ...]]:
        batches = make_batches(examples, 1, seed, max_length=65)
        R = batches.rows_per_epoch
        return {tuple(one(batches, i)[0]) for i in range(epoch * R, (epoch + 1) * R)}

    assert rows(0, 0) == rows(0, 1) == rows(0, 2)
    assert rows(0, 0) != rows(1, 0)


@pytest.mark.parametrize("packing", [True, False])
def test_without_shuffling_the_examples_keep_their_order(packing: bool) -> None:
    lengths = [2 + 37 * i % 50 for i in range(40)]
    batches = make_batches(made(lengths), 3, shuffle=False, packing=packing, max_length=64)
    for _ in range(2):
        walked = [i for batch in batches for row in documents(batch) for i in row]
        assert walked == list(range(40))
    rows = stream([batches], 2 * len(batches))
    assert [i for row in rows for i in row][:80] == [*range(40), *range(40)][:80]


def test_without_shuffling_a_row_is_as_full_as_the_order_lets_it_be() -> None:
    batches = make_batches(made([41, 31, 11, 62, 4, 65]), 1, shuffle=False, max_length=65)
    assert batches.width == 64
    assert order(batches, 0, 4) == [[[0]], [[1, 2]], [[3, 4]], [[5]]]


def test_unpacked_rows_of_similar_length_share_a_batch_in_every_epoch() -> None:
    """Also in those that begin within a batch: 643 rows are 80 batches of 8, and 3 more."""
    random = np.random.default_rng(0)
    batches = make_batches(made(random.integers(10, 1000, 643).tolist()), 8, packing=False)
    for first in (0, 81, 161, 242):
        some = [batches[i] for i in range(first, first + 79)]
        real, positions = np.sum([(b.real_tokens, b.tokens.size) for b in some], axis=0)
        assert real / positions > 0.88  # random batches would reach 0.57


def test_unpacked_lengths_do_not_come_in_waves() -> None:
    random = np.random.default_rng(0)
    examples = made(random.integers(10, 1000, 640).tolist())
    batches = make_batches(examples, 8, seed=0, packing=False)
    longest = [max(len(examples[row[0]]) for row in one(batches, i)) for i in range(80)]
    assert abs(np.corrcoef(np.arange(80), longest)[0, 1]) < 0.3
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3
    early = {row[0] for i in range(20) for row in one(batches, i)}
    assert max(early) > 320 and min(early) < 320


@quick
@given(lengths, sizes, worlds, shares, hows)
def test_epochs_are_counted_in_rows(
    lengths: list[int], size: int, world: int, epochs: float, how: dict[str, Any]
) -> None:
    for batches in (
        make_batches(made(lengths), size, world_size=world, **how),
        make_batches(made(lengths), size, world_size=world, epochs=epochs, **how),
    ):
        R = batches.rows_per_epoch
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
@given(laid_out(), st.sampled_from([None, 80, 96]))
def test_a_batch_is_what_its_definition_says(rows: list[list[Example]], width: int | None) -> None:
    batch = collate(rows, width)
    T = width or padded_width(max(sum(len(e) - 1 for e in row) for row in rows))
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
    assert batch.places == tuple(e.place for row in rows for e in row)
    assert batch.real_tokens == sum(len(e) - 1 for row in rows for e in row)


def test_a_batch_without_documents_has_no_padding() -> None:
    batch = Batch(mx.zeros((3, 7)), mx.zeros((3, 7)))
    assert batch.real_tokens == 21


# ---- widths ------------------------------------------------------------------------------------


def test_widths_are_few_never_too_small_and_waste_is_bounded() -> None:
    widths = {n: padded_width(n) for n in range(1, 8193)}
    assert len(set(widths.values())) <= 40
    for n, width in widths.items():
        assert width >= n and width % 64 == 0
        assert width - n < max(64, width / 5)
    assert np.mean([1 - n / width for n, width in widths.items()]) < 0.1
    assert all(widths[n] <= widths[n + 1] for n in range(1, 8192))


@pytest.mark.parametrize(
    ("lengths", "rows", "max_length", "width"),
    [
        ([2049] * 10, 4, 2049, 2048),  # the longest decides
        ([101] * 1000, 4, 2049, 2048),  # there is enough for wide rows
        ([101] * 40, 4, 2049, 1024),  # 4000 positions in 4 rows: 1000 each
        ([101] * 40, 8, 2049, 512),
        ([101] * 5 + [13], 4, 2049, 128),  # 512 positions
        ([101] * 5 + [14], 4, 2049, 192),  # 513 positions
        ([101] * 3, 4, 2049, 128),  # fewer examples than rows: one each
        ([901, 11, 11], 4, 2049, 1024),
        ([2], 1, 2, 64),
    ],
)
def test_rows_are_as_wide_as_asked_unless_all_examples_would_not_fill_a_batch(
    lengths: list[int], rows: int, max_length: int, width: int
) -> None:
    assert packed_width(np.array(lengths), rows, max_length) == width
    assert make_batches(made(lengths), rows, max_length=max_length).width == width
    if rows % 2 == 0:
        halves = make_batches(made(lengths), rows // 2, max_length=max_length, world_size=2)
        assert halves.width == width


@quick
@given(lengths, sizes, worlds, hows)
def test_every_packed_row_has_the_one_width_and_any_other_its_batch_s(
    lengths: list[int], size: int, world: int, how: dict[str, Any]
) -> None:
    for batches in ranks(made(lengths), size, world, **how):
        for batch in batches:
            rows = [sum(lengths[i] - 1 for i in row) for row in documents(batch)]
            if how["packing"]:
                assert batch.tokens.shape == (len(rows), batches.width)
            else:
                assert batches.width is None
                assert batch.tokens.shape == (len(rows), padded_width(max(1, *rows)))
            assert len(rows) <= size


def test_without_max_length_rows_are_as_wide_as_the_longest_example() -> None:
    assert make_batches(made([65] * 100), 2).width == 64
    assert make_batches(made([65] * 100), 2, max_length=1000).width == 1024


@quick
@given(lengths, sizes, hows)
def test_the_useful_share_is_what_the_batches_show(
    lengths: list[int], size: int, how: dict[str, Any]
) -> None:
    batches = make_batches(made(lengths), size, **how)
    real = sum(batch.real_tokens for batch in batches)
    assert real == sum(n - 1 for n in lengths)
    assert batches.useful_share == pytest.approx(real / sum(b.tokens.size for b in batches))


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
        ({"max_length": 5}, "max_length must hold the longest example, 6; got 5"),
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
    ended = make_batches(made([5] * 5), 2, packing=False, epochs=1)
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"the stream has 3 batches; got index {index}"):
            ended[index]
    with pytest.raises(IndexError, match="the stream has no end; got index -1"):
        make_batches(made([5] * 5), 2)[-1]
