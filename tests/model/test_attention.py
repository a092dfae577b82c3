"""Attention against float64, block by block and fused; and documents that know no others."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora import device
from mlx_qlora.cpu import attention as blocks
from mlx_qlora.cpu.attention import Reach, Residuals
from mlx_qlora.model.attention import Documents, attend_vjp, attend_with_residuals
from mlx_qlora.model.rope import Rope, RopeConfig

HD = 16
ROPE = Rope(HD, RopeConfig(10000.0))
REACH = Reach(HD**-0.5)
LENGTHS = [1, 2, 8, 9, 127, 128, 129, 300]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def inputs(n: int, T: int, H: int, K: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the output, of n documents."""
    shapes = [(n, T, H, HD), (n, T, K, HD), (n, T, K, HD), (n, T, H, HD)]
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def exact(q, k, v, dout, reach: Reach = REACH) -> list[np.ndarray]:
    """Output, dq, dk, dv of causal attention, with all scores, in float64."""
    q, k, v, dout = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, dout))
    n, H, T, Hd = q.shape
    G = H // k.shape[1]
    keys, values = (x.repeat(G, axis=1) for x in (k, v))
    seen = np.tri(T, dtype=bool)
    if reach.window is not None:
        seen &= ~np.tri(T, k=-reach.window, dtype=bool)
    scores, slope = q @ keys.swapaxes(2, 3) * reach.scale, 1.0
    if reach.softcap is not None:
        tanh = np.tanh(scores / reach.softcap)
        scores, slope = reach.softcap * tanh, 1 - tanh**2
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = dout @ values.swapaxes(2, 3)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dscores = dscores * slope * reach.scale
    dk, dv = dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dout
    dk, dv = (x.reshape(n, H // G, G, T, Hd).sum(2) for x in (dk, dv))
    return [x.swapaxes(1, 2) for x in (weights @ values, dscores @ keys, dk, dv)]


def ours(q, k, v, dout, keep_weights: bool, reach: Reach = REACH) -> list[mx.array]:
    arrays = [mx.array(x) for x in (q, k, v)]
    out, residuals = attend_with_residuals(*arrays, reach, keep_weights)
    return [out, *attend_vjp(*arrays, out, residuals, mx.array(dout), reach)]


def assert_close(found, wanted, tolerance: float, size: float = 1.0) -> None:
    """Each of some arrays, to a share of its largest value, or of the numbers it is made of."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted):
        a, b = np.array(a), np.array(b)
        assert a.shape == b.shape and np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), size), name


# ---- documents of one length -------------------------------------------------------------------

REACHES = [
    Reach(0.3, 1),
    Reach(0.25, 7),
    Reach(0.25, 128),
    Reach(0.2, 200, 2.0),
    Reach(1.0, None, 5.0),
]


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("T", [1, 7, 8, 130, 300])
@pytest.mark.parametrize("route", ["blocks", "weights kept", "fused"])
def test_windows_and_capped_scores_equal_float64(route, T, reach):
    """By blocks on a CPU, with and without the exponentials; and as on a GPU."""
    given = inputs(2, T, 4, 2)
    with device.use(device.METAL if route == "fused" else device.current()):
        found = ours(*given, keep_weights=route == "weights kept", reach=reach)
    assert_close(found, exact(*given, reach), 2e-5)
    if reach.window is not None and T > reach.window:
        wide = Reach(reach.scale, None, reach.softcap)
        assert np.abs(exact(*given, wide)[0] - exact(*given, reach)[0]).max() > 1e-3, "the control"


@pytest.mark.parametrize("keep_weights", [False, True])
@pytest.mark.parametrize(("H", "K"), [(6, 2), (3, 3)])
@pytest.mark.parametrize("T", LENGTHS)
def test_output_and_gradients_equal_float64(T, H, K, keep_weights):
    given = inputs(2, T, H, K)
    assert_close(ours(*given, keep_weights), exact(*given), 5e-6)


@pytest.mark.parametrize("keep_weights", [False, True])
def test_narrower_blocks_for_longer_documents_give_the_same(monkeypatch, keep_weights):
    monkeypatch.setattr(blocks, "MOST_SCORES", 0)
    q, k, v, dout = inputs(2, 131, 6, 2)
    out, residuals = blocks.forward(*map(mx.array, (q, k, v)), REACH)
    assert len(residuals.weights) == 9
    residuals = residuals if keep_weights else Residuals(residuals.log_sum)
    found = blocks.backward(*map(mx.array, (q, k, v)), out, residuals, mx.array(dout), REACH)
    assert_close([out, *found], exact(q, k, v, dout), 5e-6)


@pytest.mark.parametrize("T", [9, 129, 300])
def test_mlx_differentiates_the_blocks_as_float64_does(T):
    """What a model does in `mx.grad`, without the engine."""
    q, k, v, dout = inputs(2, T, 6, 2)

    def loss(*arrays):
        return (attend_with_residuals(*arrays, REACH)[0] * mx.array(dout)).sum()

    found = mx.grad(loss, (0, 1, 2))(*map(mx.array, (q, k, v)))
    assert_close([exact(q, k, v, dout)[0], *found], exact(q, k, v, dout), 5e-6)


@pytest.mark.parametrize("keep_weights", [False, True])
@pytest.mark.parametrize("T", [9, 129, 300])
def test_very_large_scores_stay_finite_and_right(T, keep_weights):
    """Whole numbers, so that scores of 1e4 and more are exact and only the softmax can err."""
    q, k, v, dout = inputs(2, T, 6, 2)
    q, k = np.round(q * 100), np.round(k * 100)
    wanted = exact(q, k, v, dout)
    q64 = np.abs((q[0, :, 0].astype(np.float64) @ k[0, :, 0].T) / 4)
    assert q64.max() > 1e4
    # Recomputed from the log-sum, a weight is as exact as float32 tells 1e4 from its neighbour.
    tolerance = 1e-5 if keep_weights else 2e-2
    assert_close(ours(q, k, v, dout, keep_weights), wanted, tolerance, size=100)


@pytest.mark.parametrize("T", LENGTHS)
def test_the_fused_kernel_and_the_blocks_give_the_same(T):
    q, k, v, dout = map(mx.array, inputs(2, T, 6, 2))
    with device.use(device.METAL):
        fused, none_kept = attend_with_residuals(q, k, v, REACH)
        dfused = attend_vjp(q, k, v, fused, none_kept, dout, REACH)
    out, residuals = blocks.forward(q, k, v, REACH)
    for kept in (residuals, Residuals(residuals.log_sum)):
        assert_close(
            [fused, *dfused], [out, *blocks.backward(q, k, v, out, kept, dout, REACH)], 1e-5
        )


def test_memory_grows_with_the_positions_and_not_with_their_square():
    """The control is the same with all scores at once, which is what the blocks are for."""
    T = 2048
    q, k, v, dout = map(mx.array, inputs(1, T, 4, 2))
    mx.eval(q, k, v, dout)

    def peak(run) -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(run())
        return mx.get_peak_memory() - before

    def in_blocks():
        out, residuals = blocks.forward(q, k, v, REACH)
        return blocks.backward(q, k, v, out, Residuals(residuals.log_sum), dout, REACH)

    def at_once():
        keys, values = (mx.repeat(x, 2, axis=2).swapaxes(1, 2) for x in (k, v))
        scores = q.swapaxes(1, 2) @ keys.swapaxes(2, 3) + mx.where(mx.tri(T), 0, -mx.inf)
        return mx.softmax(scores, -1) @ values

    scores = 4 * T * T * 4
    assert peak(in_blocks) < scores / 2
    assert peak(at_once) > scores


# ---- documents of many lengths -----------------------------------------------------------------

# Rows of 64: padding between documents, before and behind them; some fill their row.
SPREAD = np.array(
    [(0, 0, 10), (0, 12, 30), (1, 5, 9), (1, 9, 10), (2, 0, 64), (3, 0, 18), (3, 40, 64)], np.int32
)
ALIKE = np.array([(0, 0, 100), (1, 0, 95), (2, 3, 94)], np.int32)  # 100, 95 and 91: one group
LAYOUTS = {
    "rows": (SPREAD, 4 * 64, 64),
    "behind each other": (SPREAD, None, None),
    "padded at the end": (SPREAD, 192, None),
    "alike, in rows": (ALIKE, 3 * 100, 100),
    "alike": (ALIKE, None, None),
    "one": (np.array([(0, 0, 50)], np.int32), None, None),
}


@pytest.fixture(params=LAYOUTS)
def laid_out(request):
    """Documents, and the slice of each among the N positions."""
    table, N, T = LAYOUTS[request.param]
    lengths = table[:, 2] - table[:, 1]
    firsts = table[:, 0] * T + table[:, 1] if T else np.cumsum(lengths) - lengths
    spans = [slice(int(a), int(a + n)) for a, n in zip(firsts, lengths)]
    return Documents.of(table, N, T), spans


def flat_inputs(N: int, H: int = 6, K: int = 2) -> list[np.ndarray]:
    return [x[0] for x in inputs(1, N, H, K)]


def through(documents: Documents, q, k, v, dout, keep_weights: bool) -> list[np.ndarray]:
    arrays = [mx.array(x) for x in (q, k, v)]
    out, residuals = documents.attend_with_residuals(*arrays, REACH, keep_weights)
    return [
        np.array(x)
        for x in (out, *documents.attend_vjp(*arrays, out, residuals, mx.array(dout), REACH))
    ]


def size(documents: Documents) -> int:
    return documents.positions.size


def test_documents_of_similar_length_share_a_group():
    for kind in (device.CPU, device.METAL):
        with device.use(kind):
            documents = Documents.of(ALIKE)
        (group,) = documents.groups
        assert (group.n, group.T) == (3, 100)
        assert documents.real.sum().item() == 100 + 95 + 91
    # Lengths that cuDNN differentiates, and powers of two: a few shapes, as each has its kernel.
    with device.use(device.CUDA):
        groups = Documents.of(ALIKE).groups
    assert [(group.n, group.T) for group in groups] == [(2, 128), (1, 128)]


def test_positions_rows_and_columns_say_where_a_token_comes_from(laid_out):
    documents, spans = laid_out
    table = ALIKE if len(spans) == 3 else SPREAD if len(spans) > 3 else np.array([(0, 0, 50)])
    for span, (row, start, end) in zip(spans, table):
        assert np.array(documents.positions)[span].tolist() == list(range(end - start))
        assert (np.array(documents.row)[span] == row).all()
        assert np.array(documents.column)[span].tolist() == list(range(start, end))


@pytest.mark.parametrize("keep_weights", [False, True])
def test_each_document_is_attended_to_as_if_it_stood_alone(laid_out, keep_weights):
    documents, spans = laid_out
    given = flat_inputs(size(documents))
    found = through(documents, *given, keep_weights)
    outside = np.ones(size(documents), bool)
    for span in spans:
        wanted = exact(*(x[None, span] for x in given))
        assert_close([x[None, span] for x in found], wanted, 5e-6)
        outside[span] = False
    assert all((x[outside] == 0).all() for x in found)


@pytest.mark.parametrize("keep_weights", [False, True])
def test_nothing_outside_a_document_changes_a_bit_of_it(laid_out, keep_weights):
    """Padding and other documents are filled with junk, their gradients too."""
    documents, spans = laid_out
    given = flat_inputs(size(documents))
    clean = through(documents, *given, keep_weights)
    for i, span in enumerate(spans):
        inside = np.zeros(size(documents), bool)
        inside[span] = True
        junk = [normal(*x.shape, seed=9 + i, scale=20) for x in given]
        filled = [np.where(inside[:, None, None], x, y) for x, y in zip(given, junk)]
        for before, after in zip(clean, through(documents, *filled, keep_weights)):
            assert np.array_equal(before[span], after[span])


def test_mlx_differentiates_documents_as_attend_vjp_does(laid_out):
    documents, spans = laid_out
    q, k, v, dout = flat_inputs(size(documents))
    inside = np.zeros(size(documents), bool)
    for span in spans:
        inside[span] = True
    dout = dout * inside[:, None, None]

    def loss(*arrays):
        return (documents.attend(*arrays, REACH) * mx.array(dout)).sum()

    found = mx.grad(loss, (0, 1, 2))(*map(mx.array, (q, k, v)))
    wanted = through(documents, q, k, v, dout, False)
    assert_close([wanted[0], *found], wanted, 1e-5)


def test_future_tokens_and_other_documents_would_be_noticed():
    """The control: one document taken for two, and two for one, are something else."""
    given = flat_inputs(40)
    two = np.array([(0, 0, 20), (0, 20, 40)], np.int32)
    apart = through(Documents.of(two), *given, True)
    whole = through(Documents.of(np.array([(0, 0, 40)], np.int32)), *given, True)
    assert np.abs(apart[0][:20] - whole[0][:20]).max() < 1e-5
    assert np.abs(apart[0][20:] - whole[0][20:]).max() > 0.1


# ---- RoPE --------------------------------------------------------------------------------------


def exact_rope(x: np.ndarray) -> np.ndarray:
    """x (T, H, Hd) in float64, pair i being (i, i + Hd / 2)."""
    turns = np.exp(1j * np.arange(len(x))[:, None, None] / np.array(ROPE.periods, np.float64))
    half = x.shape[-1] // 2
    rotated = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([rotated.real, rotated.imag], -1)


def test_rope_by_table_equals_the_kernel_and_float64_document_by_document(laid_out):
    documents, spans = laid_out
    x = normal(size(documents), 6, HD)
    found = np.array(documents.rotate(mx.array(x), ROPE))
    table = ROPE.angles(documents.positions, documents.lengths)
    by_table = np.array(ROPE.rotate(mx.array(x), table))
    for span in spans:
        kernel = ROPE.by_kernel(mx.array(x[span]).swapaxes(0, 1)[None], 0)[0].swapaxes(0, 1)
        for rotated in (found, by_table):
            np.testing.assert_allclose(rotated[span], np.array(kernel), atol=2e-5)
            np.testing.assert_allclose(rotated[span], exact_rope(x[span]), atol=5e-5)


def test_gradients_of_rope_by_table_equal_the_kernel_s(laid_out):
    documents, spans = laid_out
    x, dy = (mx.array(normal(size(documents), 6, HD, seed=s)) for s in (0, 1))
    table = ROPE.angles(documents.positions, documents.lengths)
    found = mx.vjp(lambda x: ROPE.rotate(x, table), [x], [dy])[1][0]
    rotated = mx.vjp(lambda x: documents.rotate(x, ROPE), [x], [dy])[1][0]
    np.testing.assert_allclose(np.array(found), np.array(rotated), atol=2e-5)
    for span in spans:

        def kernel(x):
            return ROPE.by_kernel(x.swapaxes(0, 1)[None], 0)[0].swapaxes(0, 1)

        exact = mx.vjp(kernel, [x[span]], [dy[span]])[1][0]
        np.testing.assert_allclose(np.array(found[span]), np.array(exact), atol=2e-5)


def test_rope_keeps_lower_precision():
    documents = Documents.of(SPREAD)
    x = mx.array(normal(size(documents), 6, HD))
    rotated = documents.rotate(x.astype(mx.bfloat16), ROPE)
    assert rotated.dtype == mx.bfloat16
    gap = mx.abs(rotated.astype(mx.float32) - documents.rotate(x, ROPE)).max().item()
    assert gap < 0.05
