"""The order of batches: complete, seeded, and reachable at any index."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.data.batches import IGNORE, Batch, collate, make_batches, padded_width
from mlx_qlora.data.examples import DataReport, Example, Examples
from mlx_qlora.errors import ConfigError, DataError

sizes = st.integers(1, 20)
lengths = st.lists(st.integers(2, 300), min_size=1, max_size=90)


def made(of_lengths: list[int]) -> Examples:
    """Examples whose line is their place and whose second half is learned."""
    found = []
    for i, n in enumerate(of_lengths):
        tokens = np.arange(1, n + 1, dtype=np.int32)
        found.append(Example(tokens, np.arange(n) >= max(1, n // 2), i, str(i).encode()))
    return Examples(found, DataReport("made"))


def order(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [batch.lines for batch in batches]


@given(lengths, sizes, st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_example_exactly_once(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    batches = make_batches(made(lengths), size, seed)
    n = len(batches)
    assert n == -(-len(lengths) // size)
    one = [batches._epoch_order(epoch)[i] for i in range(n)]
    assert sorted(np.concatenate(one).tolist()) == list(range(len(lengths)))
    widths = sorted(map(len, one))
    assert widths[1:] == [size] * (n - 1)  # the one partial batch is kept
    assert widths[0] == len(lengths) - size * (n - 1)


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    examples = made(list(range(2, 102)))
    first = make_batches(examples, 4, seed=5)
    epochs = [[first[i].lines for i in range(e * 25, e * 25 + 25)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = make_batches(examples, 4, seed=5)
    np.random.seed(1)  # no global state takes part
    assert [again[i].lines for i in range(50, 75)] == epochs[2]  # without having made the others
    assert [again[i].lines for i in range(25)] == epochs[0]
    assert [make_batches(examples, 4, seed=6)[i].lines for i in range(25)] != epochs[0]


def test_any_batch_by_its_index_is_the_one_that_iteration_gives() -> None:
    batches = make_batches(made(list(range(2, 40))), 5, seed=1)
    walked = list(batches)
    assert len(walked) == len(batches) == 8
    for i in np.random.default_rng(0).permutation(8):
        batch = make_batches(made(list(range(2, 40))), 5, seed=1)[int(i)]
        assert batch.lines == walked[i].lines
        assert mx.array_equal(batch.tokens, walked[i].tokens)
        assert mx.array_equal(batch.labels, walked[i].labels)


def test_without_shuffling_the_rows_keep_their_order_and_one_pass_ends() -> None:
    batches = make_batches(made([5] * 11), 4, shuffle=False)
    assert order(list(batches)) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)]
    assert order(list(batches)) == order(list(batches))


def test_batches_are_not_in_order_of_length_but_hold_similar_ones() -> None:
    random = np.random.default_rng(0)
    examples = made(random.integers(10, 1000, 640).tolist())
    batches = make_batches(examples, 8, seed=0)
    longest = [max(len(examples[line]) for line in batches[i].lines) for i in range(80)]
    assert longest != sorted(longest)
    assert abs(np.corrcoef(np.arange(80), longest)[0, 1]) < 0.4
    real = sum(batches[i].real_tokens for i in range(80))
    padded = sum(batches[i].tokens.size for i in range(80))
    assert real / padded > 0.85  # random batches of these lengths would reach 0.57
    firsts = {line for i in range(20) for line in batches[i].lines}
    assert max(firsts) > 320 and min(firsts) < 320


@given(lengths.filter(lambda some: len(some) <= 12))
def test_a_batch_is_right_padded_and_knows_its_documents(lengths: list[int]) -> None:
    batch = collate(list(made(lengths)))
    tokens, labels = np.array(batch.tokens), np.array(batch.labels)
    T = padded_width(max(lengths) - 1)
    assert tokens.shape == labels.shape == (len(lengths), T)
    assert batch.tokens.dtype == batch.labels.dtype == mx.int32
    for b, n in enumerate(lengths):
        assert tokens[b].tolist() == [*range(1, n), *[0] * (T - n + 1)]
        assert (labels[b, n - 1 :] == IGNORE).all()
        assert (labels[b] != IGNORE).sum() == n - max(1, n // 2)
    assert batch.documents is not None
    assert batch.documents.tolist() == [[b, 0, n - 1] for b, n in enumerate(lengths)]
    assert batch.real_tokens == sum(n - 1 for n in lengths)


def test_a_batch_without_documents_has_no_padding() -> None:
    assert Batch(mx.zeros((3, 7)), mx.zeros((3, 7))).real_tokens == 21


def test_widths_are_few_never_too_small_and_waste_is_bounded() -> None:
    widths = {n: padded_width(n) for n in range(1, 8193)}
    assert len(set(widths.values())) <= 40
    for n, width in widths.items():
        assert width >= n and width % 64 == 0
        assert width - n < max(64, width / 5)
    assert np.mean([1 - n / width for n, width in widths.items()]) < 0.1
    assert all(widths[n] <= widths[n + 1] for n in range(1, 8192))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_1_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size must be at least 1; got {size}"):
        make_batches(made([4]), size)


def test_no_examples_are_refused() -> None:
    with pytest.raises(DataError, match="no examples to make batches of"):
        make_batches(made([5, 6])[:0])
