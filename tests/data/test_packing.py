"""Documents that share a row or an axis train exactly what they would alone."""

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.gradients import add_grads, gap
from support.models import TINY, load_folder, our_logits, random_tokens, randomise_lora
from support.tiny_folder import write_model
from support.training import joined

import mlx_qlora as mq
from mlx_qlora.data.batches import IGNORE, Batch, collate
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.engine import loss_and_grads

Rows = list[list[int]]  # positions of each document of each row
WIDTH = 45  # padded to 48

# ---- packed is the same as one by one ----------------------------------------------------------


@pytest.fixture(scope="module")
def model(hf_tiny: tuple[Any, Path]) -> Any:
    """Random, with Llama 3.1's RoPE; tests do not change it."""
    ours = load_folder(hf_tiny[1])
    add_lora(ours, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3), seed=5)
    randomise_lora(ours)
    return ours


def documents_of(rows: Rows, seed: int) -> list[list[Example]]:
    """Random documents of so many positions (tokens but the last), half of them learned."""
    draw = np.random.default_rng(seed)
    made = []
    for row in rows:
        made.append([])
        for n in row:
            tokens = draw.integers(0, TINY["vocab_size"], n + 1).astype(np.int32)
            learned = draw.random(n + 1) < 0.5
            learned[[0, -1]] = False, True
            made[-1].append(Example(tokens, learned))
    return made


def in_rows(rows: list[list[Example]]) -> Batch:
    """Each list of documents as one row."""
    return collate(joined(rows))


def alone(document: Example) -> Batch:
    """A batch of one document, without padding, made without the library's own `collate`."""
    labels = np.where(document.learned[1:], document.tokens[1:], IGNORE)
    return Batch(mx.array(document.tokens[None, :-1]), mx.array(labels[None]))


def one_by_one(model: Any, documents: Iterable[Example]) -> tuple[float, int, Any]:
    """Sums over documents that never met."""
    nats, count, total = 0.0, 0, None
    for document in documents:
        loss, n, grads = loss_and_grads(model, alone(document), recompute="none")
        nats, count, total = nats + loss.item(), count + n, add_grads(total, grads)
        mx.eval(total)
    return nats, count, total


def both(first: Any, second: Any) -> list[Any]:
    pairs = list(zip(tree_flatten(first), tree_flatten(second)))
    assert pairs and all(a[0] == b[0] for a, b in pairs)
    return pairs


def is_real(batch: Batch) -> np.ndarray:
    real = np.zeros(batch.tokens.shape, bool)
    for row, start, end in batch.documents.tolist():
        real[row, start:end] = True
    return real


@st.composite
def packed_rows(draw: st.DrawFn) -> Rows:
    """One to three rows, full to the brim or not."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row, room = [], WIDTH
        while room and (n := draw(st.integers(0, 20))) > 0:
            row.append(min(n, room))
            room -= row[-1]
        rows.append(row or [WIDTH])
    return rows


EXTREMES: list[Rows] = [
    [[1] * WIDTH],  # documents of two tokens, to the brim
    [[1, 2, 3, 4, 5, 6, 7, 8], [8, 9, 8]],  # around the fewest that attention is fused for
    [[WIDTH], [20, 28], [1]],
    [[WIDTH - 1, 1], [1, WIDTH - 1]],
    [[10], [3, 4]],  # padding within the batch, and at its end
]
with_model = settings(max_examples=15, deadline=None)


def extremes(test: Any) -> Any:
    for rows in EXTREMES:
        test = example(rows=rows, seed=0)(test)
    return test


@pytest.mark.parametrize("recompute", ["none", "all"])
@with_model
@extremes
@given(rows=packed_rows(), seed=st.integers(0, 9))
def test_packed_loss_and_gradients_are_the_sums_of_the_documents_alone(
    model: Any, recompute: str, rows: Rows, seed: int
) -> None:
    documents = documents_of(rows, seed)
    batch = in_rows(documents)
    loss, n_tokens, grads = loss_and_grads(model, batch, recompute=recompute)
    nats, count, total = one_by_one(model, chain(*documents))
    assert n_tokens == count
    assert loss.item() == pytest.approx(nats, rel=2e-6)
    assert gap(total, grads) < 1e-5


@with_model
@extremes
@given(rows=packed_rows(), seed=st.integers(0, 9))
def test_packed_logits_are_those_of_each_document_alone(model: Any, rows: Rows, seed: int) -> None:
    documents = documents_of(rows, seed)
    batch = in_rows(documents)
    packed = np.array(model(batch.tokens, documents=batch.documents))
    assert np.isfinite(packed).all()
    for document, (row, start, end) in zip(chain(*documents), batch.documents.tolist()):
        single = our_logits(model, document.tokens[None, :-1])[0]
        np.testing.assert_allclose(packed[row, start:end], single, rtol=0, atol=2e-5)


def test_a_row_taken_for_one_document_is_something_else(model: Any) -> None:
    """The control: where the borders are not told, the documents see each other."""
    documents = documents_of([[20, 28]], 0)
    batch = in_rows(documents)
    whole = Batch(batch.tokens, batch.labels)
    nats, _, total = one_by_one(model, documents[0])
    loss, _, grads = loss_and_grads(model, whole)
    assert abs(loss.item() - nats) > 1
    assert gap(total, grads) > 0.1


@with_model
@extremes
@given(rows=packed_rows(), seed=st.integers(0, 9))
def test_whatever_stands_in_the_padding_changes_nothing(model: Any, rows: Rows, seed: int) -> None:
    batch = in_rows(documents_of(rows, seed))
    junk = random_tokens(*batch.tokens.shape, seed=seed)
    filled = np.where(is_real(batch), np.array(batch.tokens), junk)
    other = Batch(mx.array(filled), batch.labels, batch.documents)
    loss, _, grads = loss_and_grads(model, batch)
    filled_loss, _, filled_grads = loss_and_grads(model, other)
    assert filled_loss.item() == loss.item()
    assert all(mx.array_equal(a, b).item() for (_, a), (_, b) in both(grads, filled_grads))


# ---- evaluate ----------------------------------------------------------------------------------


def test_evaluate_on_packed_rows_gives_the_sums_over_documents(tmp_path: Path) -> None:
    tuned, tokenizer = mq.load(write_model(tmp_path / "model"))
    mq.add_lora(tuned, mq.LoraConfig(r=4, lora_dropout=0.5))
    randomise_lora(tuned)
    sizes = [1, 2, 7, 8, 9, 60, 130, 250, 3, 90, 400, 31]
    documents = documents_of([sizes], 0)[0]
    examples = Examples.of(documents)
    nats, hits, count = 0.0, 0, 0
    for document in documents:
        logits = our_logits(tuned, document.tokens[None, :-1])[0].astype(np.float64)
        where = np.flatnonzero(document.learned[1:])
        targets = document.tokens[1:][where]
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nats -= logp[where, targets].sum()
        hits += int((logits[where].argmax(axis=-1) == targets).sum())
        count += len(where)
    for batch_size in (1, 8):
        scores = mq.evaluate(tuned, tokenizer, examples, batch_size)
        assert scores.n_tokens == count
        assert scores.loss == pytest.approx(nats / count, rel=1e-6)
        assert scores.token_accuracy == hits / count


# ---- the real model and real rows --------------------------------------------------------------


@pytest.mark.slow
def test_packed_docstrings_train_the_real_model_as_one_by_one(monkeypatch, short_files) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import docstring_data

    real, tokenizer = mq.load(short_files.path, dtype="float32")
    mq.add_lora(real, mq.LoraConfig(r=4, lora_dropout=0.0))
    randomise_lora(real, scale=0.01)
    rows = list(islice(docstring_data.rows(), 60))
    examples = mq.read_examples(rows, tokenizer, mq.DataConfig(cache_dir=None))
    chosen = sorted(examples, key=len)[:16:2]
    batch = in_rows([chosen[:3], chosen[3:]])
    assert batch.documents[:, 1].any() and batch.real_tokens < batch.tokens.size
    loss, n_tokens, grads = loss_and_grads(real, batch, recompute="none")
    nats, count, total = one_by_one(real, chosen)
    assert n_tokens == count
    assert loss.item() == pytest.approx(nats, rel=1e-5)
    for (name, single), (_, packed) in both(total, grads):
        largest = mx.abs(single).max().item()
        assert mx.abs(packed - single).max().item() <= 1e-4 * largest, name
