"""Dropout: each position has a mask of its own, which no batching and no recomputing changes."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.gpu_route import EXACT, routes
from support.gradients import add_grads, drawn_here, gap, tuned, with_lora
from support.models import random_tokens

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import dropout_bits

from mlx_qlora.data.batches import IGNORE, Batch, halves
from mlx_qlora.model.attention import Documents
from mlx_qlora.model.dropout import mask, mixed, position_words
from mlx_qlora.train.engine import Engine, loss_and_grads
from mlx_qlora.train.step import dropout_keys
from mlx_qlora.tree import flat

T = 24
KEYS = dropout_keys(3, (5, 6, 7, 8))  # (4, 2), of four rows of a stream
# Two documents in the first row, one that fills the second, padding behind the others.
DOCUMENTS = np.array(
    [(0, 0, 10), (0, 10, 24), (1, 0, 24), (2, 0, 9), (2, 9, 20), (3, 0, 15)], np.int32
)


@pytest.fixture
def model(hf_tiny):
    return tuned(hf_tiny[1], lora_dropout=0.3)


def a_batch(packed: bool) -> Batch:
    """Four rows, whose supervised counts differ."""
    tokens = random_tokens(4, T + 1, seed=2)
    labels = tokens[:, 1:].copy()
    for row, unlearned in zip(labels, (16, 3, 9, 0)):
        row[:unlearned] = IGNORE
    if packed:
        outside = np.ones((4, T), bool)
        for row, start, end in DOCUMENTS:
            outside[row, start : end - 1] = False
        labels[outside] = IGNORE
    return Batch(mx.array(tokens[:, :-1]), mx.array(labels), DOCUMENTS if packed else None)


def single_rows(batch: Batch) -> list[Batch]:
    return [row for half in halves(batch) for row in halves(half)]


def masks(keys: mx.array, dropout: float, width: int, d: int, linear: int = 0) -> np.ndarray:
    """(B, width, d): what one linear keeps of rows that are padded to a width."""
    B = keys.shape[0]
    row, position = (mx.array(a.reshape(-1)) for a in np.indices((B, width), np.int32))
    words = position_words(keys, row, position, linear + 1)[linear]
    return np.array(mask(words, dropout, d, mx.uint8)).reshape(B, width, d)


# ---- masks -------------------------------------------------------------------------------------


def test_a_row_s_mask_does_not_depend_on_how_wide_it_is_padded_or_who_is_beside_it():
    wide = masks(KEYS, 0.3, 2 * T, 32)
    assert np.array_equal(masks(KEYS, 0.3, T, 32), wide[:, :T])
    assert np.array_equal(masks(KEYS[2:3], 0.3, T, 32)[0], wide[2, :T])
    assert np.array_equal(masks(KEYS, 0.3, T, 9), wide[:, :T, :9]), "nor on the columns after"
    positions = wide.reshape(-1, 32)
    assert len(np.unique(positions, axis=0)) == len(positions), "no two positions drop alike"


def test_a_position_has_its_mask_wherever_it_stands_among_the_documents(model):
    """The engine lays documents end to end, in chunks, and leaves others out."""
    whole_rows = Documents.of(DOCUMENTS, 4 * T, T)
    shuffled = Documents.of(DOCUMENTS[[5, 1, 3]])
    of_rows = model.model.dropout_keys(KEYS, 4, whole_rows)
    of_some = model.model.dropout_keys(KEYS, 4, shuffled)
    here = np.array(shuffled.row) * T + np.array(shuffled.column)
    assert len(here) == 15 + 14 + 9
    for layer, some in zip(of_rows, of_some):
        for keys, own in zip(layer, some):
            assert np.array_equal(np.array(keys)[here], np.array(own))


def test_one_key_becomes_a_key_for_each_row_and_every_linear_has_words_of_its_own(model):
    documents = Documents.of(DOCUMENTS, 4 * T, T)
    key = mx.random.key(1)
    one, each = (
        [np.array(w) for layer in model.model.dropout_keys(given, 4, documents) for w in layer]
        for given in (key, mx.random.split(key, 4))
    )
    assert len(one) == 2 * 7 and len({array.tobytes() for array in one}) == len(one)
    assert all(np.array_equal(a, b) for a, b in zip(one, each))
    # Padding is position 0 of row 0; all others have words of their own.
    assert len(np.unique(np.concatenate(one))) >= 14 * (10 + 14 + 24 + 9 + 11 + 15)


def test_the_hash_is_the_one_that_was_published():
    """Against the definition in plain integers, at the ends and in between."""
    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF]

    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    assert mixed(mx.array(words, mx.uint32)).tolist() == [lowbias32(word) for word in words]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_masks_are_as_independent_as_chance(dropout):
    """A million draws here; `python benchmarks/dropout_bits.py` takes a hundred million."""
    for name, z in dropout_bits.scores(10**6, dropout).items():
        assert abs(z) < 5, name


def test_the_scores_see_a_pattern(monkeypatch):
    """The control: positions that share a mask, and bits that are not mixed."""
    monkeypatch.setattr(
        dropout_bits, "position_words", lambda k, r, p, n: [mx.full((p.size, 2), 7, mx.uint32)] * n
    )
    assert max(map(abs, dropout_bits.scores(10**6, 0.1).values())) > 50


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu_route", "compiled"),
    [
        ("none", False),
        ("none", True),
        *((name, True) for name in (*EXACT, "metal-bfloat16")),
    ],
    indirect=["gpu_route"],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", ["none", "all", 1, "auto"])
def test_recomputing_and_compiling_change_no_gradient(
    hf_tiny, gpu_route, recompute, compiled, packed
):
    model, batch = with_lora(gpu_route.load(hf_tiny[1], None), lora_dropout=0.3), a_batch(packed)
    loss, n, grads = loss_and_grads(model, batch, KEYS, "none")
    engine = Engine(model, recompute, compiled)
    again, again_n, again_grads = engine(flat(model.trainable_parameters()), batch, KEYS)
    assert again_n == n
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert gap(grads, again_grads) < 1e-5


def test_a_checkpoint_that_draws_its_own_masks_is_wrong(model):
    """The control: the same comparison, with keys from the global state within the layer."""
    h, layer = mx.random.normal((4 * T, 64)), model.layers[0]
    documents = Documents.of(DOCUMENTS, 4 * T, T)
    given = model.model.dropout_keys(KEYS, 4, documents)[0]
    before = layer.trainable_parameters()

    def gradients(draws: bool, checkpointed: bool):
        def run(x, weights):
            layer.update(weights)
            return layer(x, documents, drawn_here(4 * T) if draws else given)

        forward = mx.checkpoint(run) if checkpointed else run
        mx.random.seed(0)
        grads = mx.grad(lambda weights: forward(h, weights).square().sum())(before)
        layer.update(before)
        return grads

    assert gap(gradients(True, False), gradients(True, True)) > 1e-2
    assert gap(gradients(False, False), gradients(False, True)) < 1e-5


@routes("none", *EXACT, "metal-bfloat16")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [halves, single_rows])
def test_gradients_of_parts_add_up_to_those_of_the_batch(hf_tiny, gpu_route, parts, packed):
    model, batch = with_lora(gpu_route.load(hf_tiny[1], None), lora_dropout=0.3), a_batch(packed)
    loss, n, whole = loss_and_grads(model, batch, KEYS)

    def gap_with(keys_of) -> float:
        grads, nats, count, row = None, 0.0, 0, 0
        for part in parts(batch):
            B = part.tokens.shape[0]
            part_loss, part_n, part_grads = loss_and_grads(model, part, keys_of(row, B))
            grads, nats = add_grads(grads, part_grads), nats + part_loss.item()
            count, row = count + part_n, row + B
        assert (count, row) == (n, 4)
        if keys_of is own_keys:
            assert nats == pytest.approx(loss.item(), rel=gpu_route.tolerance.loss)
        return gap(whole, grads)

    def own_keys(row: int, B: int) -> mx.array:
        return KEYS[row : row + B]

    def keys_of_the_first_rows(row: int, B: int) -> mx.array:
        return KEYS[:B]

    assert gap_with(own_keys) < gpu_route.tolerance.gradient
    assert gap_with(keys_of_the_first_rows) > max(1e-2, gpu_route.tolerance.gradient)
