"""Dropout: each position has a mask of its own, which no batching and no recomputing changes."""

import mlx.core as mx
import numpy as np
import pytest
from support.gradients import add_grads, drawn_here, gap, tuned
from support.models import random_tokens

from mlx_qlora.data.batches import IGNORE, Batch, halves
from mlx_qlora.model import lora
from mlx_qlora.model.llama import kept, position_keys, split_keys
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


def masks(keys: mx.array, dropout: float, width: int, d: int) -> mx.array:
    """(B, width, d): what is kept of rows that are padded to a width."""
    B = keys.shape[0]
    row, column = (mx.array(a.reshape(-1)) for a in np.indices((B, width), np.int32))
    drawn = kept(position_keys(keys, row, column), dropout, (B * width, d))
    return drawn.reshape(B, width, d)


# ---- masks -------------------------------------------------------------------------------------


def test_a_row_s_mask_does_not_depend_on_how_wide_it_is_padded():
    narrow, wide = masks(KEYS, 0.3, T, 32), masks(KEYS, 0.3, 2 * T, 32)
    assert mx.array_equal(narrow, wide[:, :T]).item()
    positions = np.array(wide).reshape(-1, 32)
    assert len(np.unique(positions, axis=0)) == len(positions), "no two positions drop alike"


def test_a_position_has_its_mask_wherever_it_stands_among_the_documents(model):
    """The engine lays documents one behind the other, in parts, and leaves others out."""
    whole_rows = model.model.documents(DOCUMENTS, 4 * T, T)
    shuffled = model.model.documents(DOCUMENTS[[5, 1, 3]])
    of_rows = model.model.dropout_keys(KEYS, 4, whole_rows)
    of_some = model.model.dropout_keys(KEYS, 4, shuffled)
    here = np.array(shuffled.row) * T + np.array(shuffled.column)
    assert len(here) == 15 + 14 + 9
    for layer, some in zip(of_rows, of_some):
        for keys, own in zip(layer, some):
            assert np.array_equal(np.array(keys)[here], np.array(own))


def test_a_single_key_draws_a_mask_of_any_shape():
    drawn = kept(mx.random.key(3), 0.3, (2, 3, 500))
    assert drawn.shape == (2, 3, 500)
    assert abs(drawn.astype(mx.float32).mean().item() - 0.7) < 0.05


def test_one_key_becomes_a_key_for_each_row_and_keys_of_rows_stay(model):
    documents = model.model.documents(DOCUMENTS, 4 * T, T)
    key = mx.random.key(1)
    one, each = (
        [
            np.array(keys)
            for layer in model.model.dropout_keys(given, 4, documents)
            for keys in layer
        ]
        for given in (key, mx.random.split(key, 4))
    )
    assert len(one) == 2 * 7 and len({array.tobytes() for array in one}) == len(one)
    assert all(np.array_equal(a, b) for a, b in zip(one, each))


def test_no_key_is_used_twice_or_after_it_was_split(model, monkeypatch):
    drawn, split = [], []

    def note_kept(keys, dropout, shape):
        drawn.extend(map(tuple, keys.tolist()))
        return kept(keys, dropout, shape)

    def note_split(keys, n):
        split.extend(map(tuple, keys.tolist()))
        return split_keys(keys, n)

    monkeypatch.setattr(lora, "kept", note_kept)
    monkeypatch.setattr("mlx_qlora.model.llama.split_keys", note_split)
    for rows in ((0, 1, 2, 3), (4, 5, 6, 7)):
        model(a_batch(packed=False).tokens, dropout_key=dropout_keys(0, rows))
    n_rows, n_layers = 8, 2
    assert len(drawn) == n_rows * T * n_layers * 7
    assert len(split) == n_rows * (1 + n_layers)
    assert len({*drawn, *split}) == len(drawn) + len(split)


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("d", [256, 254])
def test_inputs_are_kept_at_the_rate_and_rows_independently(dropout, d):
    n = 256 * d
    drawn = np.array(masks(KEYS, dropout, 256, d)).reshape(4, n).astype(float)
    five_sigmas = 5 * np.sqrt(dropout * (1 - dropout) / n)
    assert np.abs(drawn.mean(1) - (1 - dropout)).max() < five_sigmas
    columns = drawn.reshape(4 * 256, d)
    assert np.abs(columns.mean(0) - (1 - dropout)).max() < 6 * five_sigmas / 5 * np.sqrt(n / 1024)
    neighbours = np.corrcoef(columns[:, :-1].ravel(), columns[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(4 * n)
    correlations = np.corrcoef(drawn)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "all", 1, "auto"])
def test_recomputing_and_compiling_change_no_gradient(model, recompute, compiled, packed):
    batch = a_batch(packed)
    loss, n, grads = loss_and_grads(model, batch, KEYS, "none")
    engine = Engine(model, recompute, compiled)
    again, again_n, again_grads = engine(flat(model.trainable_parameters()), batch, KEYS)
    assert again_n == n
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert gap(grads, again_grads) < 1e-5


def test_a_checkpoint_that_draws_its_own_masks_is_wrong(model):
    """The control: the same comparison, with keys from the global state within the layer."""
    h, layer = mx.random.normal((4 * T, 64)), model.layers[0]
    documents = model.model.documents(DOCUMENTS, 4 * T, T)
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [halves, single_rows])
def test_gradients_of_parts_add_up_to_those_of_the_batch(model, parts, packed):
    batch = a_batch(packed)
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
            assert nats == pytest.approx(loss.item(), rel=1e-6)
        return gap(whole, grads)

    def own_keys(row: int, B: int) -> mx.array:
        return KEYS[row : row + B]

    def keys_of_the_first_rows(row: int, B: int) -> mx.array:
        return KEYS[:B]

    assert gap_with(own_keys) < 1e-5
    assert gap_with(keys_of_the_first_rows) > 1e-2
