"""Cross-entropy piece by piece against float64 with all logits, and what memory it takes."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora import device
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.quantize import FrozenMatrix, Linear, QuantConfig, pack
from mlx_qlora.train import loss
from mlx_qlora.train.loss import cross_entropy, vocabulary_slices

V, D = 331, 64  # 331 rows are no multiple of anything
MATMULS = ["quantized", "dequantize", "resident"]


@pytest.fixture
def narrow(monkeypatch, use_device):
    """Pieces of 48 rows for any number of tokens."""
    use_device(head_bytes=0)
    monkeypatch.setattr(loss, "NARROWEST", 48)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_targets(S: int, rows: int = V) -> np.ndarray:
    """The first and the last row among them."""
    targets = np.random.default_rng(3).integers(0, rows, S).astype(np.int32)
    targets[:2] = (0, rows - 1)[: len(targets[:2])]
    return targets


def dense_head(W: np.ndarray) -> Linear:
    head = Linear(W.shape[1], W.shape[0])
    head.weight = mx.array(W)
    return head


def packed_head(W: np.ndarray, matmul: str, quant: QuantConfig) -> Linear:
    head = dense_head(W)
    packed = dict(zip(("weight", "scales", "biases"), pack(head.weight, quant)))
    for name, array in packed.items():
        head[name] = array
    head.quant, head.matmul = quant, matmul
    head.make_resident()
    return head


def exact(W: np.ndarray, hidden: np.ndarray, targets: np.ndarray):
    """Losses, first choices and d(sum of losses) / d(hidden), in float64."""
    W, hidden, S = W.astype(np.float64), hidden.astype(np.float64), len(targets)
    logits = hidden @ W.T
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    nats = np.log(total)[:, 0] + logits.max(-1) - logits[np.arange(S), targets]
    return nats, logits.argmax(-1), weights / total @ W - W[targets]


def assert_exact(head: FrozenMatrix, W, hidden, targets, tolerance: float = 2e-6) -> None:
    found = cross_entropy(head, mx.array(hidden), mx.array(targets))
    nats, choices, gradient = exact(W, hidden, targets)
    assert found.nats.dtype == found.gradient.dtype == mx.float32
    largest = np.abs(hidden.astype(np.float64) @ W.T.astype(np.float64)).max()
    assert np.abs(np.array(found.nats) - nats).max() <= tolerance * max(largest, 1)
    assert np.abs(np.array(found.gradient) - gradient).max() <= 5 * tolerance * np.abs(W).max()
    plainly = cross_entropy(head, mx.array(hidden), mx.array(targets), differentiate=False)
    assert np.abs(np.array(plainly.nats) - nats).max() <= tolerance * max(largest, 1)
    assert np.array(plainly.choices).tolist() == choices.tolist()


# ---- numbers -----------------------------------------------------------------------------------


def test_pieces_cover_the_vocabulary_once_and_in_order(narrow):
    for rows in (1, 47, 48, 49, V, 1000):
        made = vocabulary_slices(rows, D, 37)
        assert [i for start, end in made for i in range(start, end)] == list(range(rows))
        assert all(end - start <= 48 for start, end in made)
    assert len(vocabulary_slices(V, D, 37)) == 7


@pytest.mark.parametrize("S", [1, 2, 37, 130])
def test_a_dense_head_equals_float64_piece_by_piece(narrow, S):
    W = normal(V, D) * 0.3
    assert_exact(dense_head(W), W, normal(S, D, seed=1), some_targets(S))


def test_a_dense_head_equals_float64_in_one_piece():
    W = normal(V, D) * 0.3
    assert len(vocabulary_slices(V, D, 37)) == 1
    assert_exact(dense_head(W), W, normal(37, D, seed=1), some_targets(37))


@pytest.mark.parametrize("quant", [QuantConfig(4, 32), QuantConfig(4, 32, "mxfp4")], ids=str)
@pytest.mark.parametrize("matmul", MATMULS)
def test_a_packed_head_equals_float64_piece_by_piece(narrow, matmul, quant):
    head = packed_head(normal(V, D) * 0.3, matmul, quant)
    how = {"group_size": 32, "bits": 4, "mode": quant.mode}
    W = np.array(mx.dequantize(*head.packed(), **how, dtype=mx.float32))
    assert_exact(head, W, normal(37, D, seed=1), some_targets(37))


@pytest.mark.parametrize("matmul", [None, *MATMULS])
def test_a_tied_embedding_is_a_head_as_any_other(narrow, matmul):
    model = LlamaForCausalLM(LlamaConfig(D, 1, 4, 2, 16, 96, V, tie_word_embeddings=True))
    W, table = normal(V, D) * 0.3, model.model.embed_tokens
    if matmul is None:
        table.weight = mx.array(W)
    else:
        made = packed_head(W, matmul, QuantConfig(4, 32))
        for name in ("weight", "scales", "biases"):
            table[name] = made[name]
        table.quant, table.matmul = made.quant, matmul
        table.make_resident()
        W = np.array(made.dense())
    assert model.head is table
    assert_exact(model.head, W, normal(37, D, seed=1), some_targets(37))


@pytest.mark.parametrize("falling", [False, True])
def test_logits_of_ten_thousand_stay_right(narrow, falling):
    """Whole numbers, so that logits are exact; the largest comes first or last, or anywhere."""
    W, hidden = np.round(normal(V, D) * 20), np.round(normal(37, D, seed=1) * 60)
    order = np.argsort(hidden[0] @ W.T)
    W = W[order[::-1] if falling else order]
    assert np.abs(hidden @ W.T).max() > 1e4
    assert_exact(dense_head(W), W, hidden, some_targets(37), tolerance=1e-7)


def test_of_equal_logits_the_first_wins_within_a_piece_and_between_pieces(narrow):
    W, hidden = np.round(normal(V, D)), np.round(normal(5, D, seed=1) * 3)
    equal = [(10, 20), (47, 48), (3, 330), (100, 101), (5, 200)]
    for i, rows in enumerate(equal):
        W[list(rows)] = 9 * np.sign(hidden[i])  # no other row can have a larger product
    logits = hidden @ W.T
    assert all((logits[i, list(rows)] == logits[i].max()).all() for i, rows in enumerate(equal))
    found = cross_entropy(dense_head(W), mx.array(hidden), mx.array(some_targets(5)), False)
    assert np.array(found.choices).tolist() == [10, 47, 3, 100, 5]
    ones = dense_head(np.ones((V, D)))
    same = cross_entropy(ones, mx.array(hidden), mx.array(some_targets(5)), False)
    assert np.array(same.choices).tolist() == [0] * 5
    np.testing.assert_allclose(np.array(same.nats), np.log(V), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_row(narrow, bad):
    W, hidden, targets = normal(V, D), normal(6, D, seed=1), some_targets(6)
    hidden[2, 5] = bad
    found = cross_entropy(dense_head(W), mx.array(hidden), mx.array(targets))
    finite = np.isfinite(np.array(found.nats))
    assert finite.tolist() == [True, True, False, True, True, True]
    nats, _, gradient = exact(W, hidden[finite], targets[finite])
    np.testing.assert_allclose(np.array(found.nats)[finite], nats, rtol=1e-5)
    np.testing.assert_allclose(np.array(found.gradient)[finite], gradient, atol=1e-5)


def test_a_nan_in_the_head_is_not_hidden(narrow):
    W = normal(V, D)
    W[200, 3] = np.nan
    found = cross_entropy(dense_head(W), mx.array(normal(4, D)), mx.array(some_targets(4)))
    assert not np.isfinite(np.array(found.nats)).any()


def test_bfloat16_is_summed_in_float32(narrow):
    W, hidden, targets = normal(V, D) * 0.3, normal(37, D, seed=1), some_targets(37)
    head = dense_head(W)
    head.weight, head.dtype = head.weight.astype(mx.bfloat16), mx.bfloat16
    low = mx.array(hidden).astype(mx.bfloat16)
    found = cross_entropy(head, low, mx.array(targets))
    assert found.nats.dtype == found.gradient.dtype == mx.float32
    rounded = [np.array(x.astype(mx.float32)) for x in (head.weight, low)]
    nats, _, gradient = exact(*rounded, targets)
    np.testing.assert_allclose(np.array(found.nats), nats, atol=5e-2)
    np.testing.assert_allclose(np.array(found.gradient), gradient, atol=2e-2)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_the_divergence_and_its_gradient_equal_float64_piece_by_piece(narrow, softcap, shift):
    """With a row of the head that all states move along, so that all logits move alike."""
    W, hidden, targets = normal(V, D) * 0.3, normal(37, D, seed=1), some_targets(37)
    W[:, 0], hidden[:, 0] = 1, shift
    base = hidden + 0.3 * normal(37, D, seed=2)
    base[:, 0] = 0
    args = mx.array(hidden), mx.array(targets), True, softcap, mx.array(base)
    found = {weight: cross_entropy(dense_head(W), *args, weight) for weight in (0.0, 0.7)}

    def logs_and_slope(states):
        logits = states.astype(np.float64) @ W.T.astype(np.float64)
        slope = np.ones_like(logits)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
            slope = 1 - (logits / softcap) ** 2
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)), slope

    (p, slope), (q, _) = logs_and_slope(hidden), logs_and_slope(base)
    kl = (np.exp(p) * (p - q)).sum(-1)
    gradient = (np.exp(p) * (p - q - kl[:, None]) * slope) @ W
    for losses in found.values():
        np.testing.assert_allclose(np.array(losses.kl), kl, atol=1e-5)
    added = [
        np.array(getattr(found[0.7], n) - getattr(found[0.0], n)) for n in ("nats", "gradient")
    ]
    np.testing.assert_allclose(added[0], 0.7 * kl, atol=1e-5)
    np.testing.assert_allclose(added[1], 0.7 * gradient, atol=1e-5)
    scored = cross_entropy(dense_head(W), *args[:2], False, softcap, args[4])
    np.testing.assert_allclose(np.array(scored.kl), kl, atol=1e-5)


# ---- memory ------------------------------------------------------------------------------------


def peak(run) -> int:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
@pytest.mark.parametrize("matmul", [None, "dequantize", "resident"])
def test_no_more_than_a_few_pieces_of_the_logits_exist_at_once(use_device, matmul, kl_weight):
    S, rows = 1024, 32768
    use_device(head_bytes=device.CPU.head_bytes)
    W, hidden = normal(rows, D) * 0.3, mx.array(normal(S, D, seed=1))
    targets = mx.array(some_targets(S, rows))
    quant = QuantConfig(4, 32)
    head = dense_head(W) if matmul is None else packed_head(W, matmul, quant)
    mx.eval(head.parameters(), hidden, targets)

    def found():
        base = 0.9 * hidden if kl_weight else None
        losses = cross_entropy(head, hidden, targets, base=base, kl_weight=kl_weight)
        return losses.nats, losses.gradient

    def naive():
        def nats(hidden):
            logits = head.multiply(hidden)
            picked = mx.take_along_axis(logits, targets[:, None], -1)[:, 0]
            return (mx.logsumexp(logits, -1) - picked).sum()

        return mx.value_and_grad(nats)(hidden)

    logits = S * rows * 4
    # A piece is a sixteenth; how many are alive at once is up to the thread that frees them.
    assert peak(found) < 0.5 * logits
    if matmul is None:
        assert peak(naive) > 1.5 * logits


def test_a_head_that_is_dequantised_never_is_whole():
    """The output head is the widest matrix of a small model."""
    rows, wide = 32768, 256
    head = packed_head(normal(rows, wide), "dequantize", QuantConfig(4, 32))
    hidden, targets = mx.array(normal(2, wide)), mx.array(some_targets(2, rows))
    mx.eval(head.parameters(), hidden, targets)
    with device.use(dataclasses.replace(device.current(), head_bytes=1 << 20)):
        used = peak(lambda: cross_entropy(head, hidden, targets).gradient)
    assert used < 0.25 * rows * wide * 4 < peak(head.dense)
