"""The engine's gradients: against MLX's own, and each other where equal."""

import dataclasses
import importlib.util
import itertools
import threading
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.gpu_route import EXACT, PACKED
from support.gradients import autodiff, gap, packed_batch, tuned, with_lora
from support.models import load_folder, our_logits, random_tokens, randomise_lora

from mlx_qlora import device
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.errors import ConfigError
from mlx_qlora.model import llama, swiglu
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.model.quantize import Embedding, FrozenMatrix, QuantConfig
from mlx_qlora.train import engine as engine_module
from mlx_qlora.train import memory
from mlx_qlora.train.engine import Engine, Tape, arrays_of, loss_and_grads
from mlx_qlora.train.loss import cross_entropy
from mlx_qlora.train.memory import (
    EXPONENTIALS,
    KEPT,
    LAYER,
    LEVELS,
    MLP,
    NOTHING,
    Footprint,
    check_recompute,
)
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.score import score
from mlx_qlora.tree import flat, nested


@pytest.fixture
def model(hf_tiny):
    return tuned(hf_tiny[1], lora_dropout=0.3)


def a_batch(B: int = 3, T: int = 24, seed: int = 0) -> Batch:
    tokens = random_tokens(B, T + 1, seed=seed)
    labels = tokens[:, 1:].copy()
    labels[:, : T // 3] = IGNORE
    labels[0, T // 2 :] = IGNORE
    return Batch(mx.array(tokens[:, :-1]), mx.array(labels))


# ---- the loss ----------------------------------------------------------------------------------


def test_loss_is_the_float64_sum_of_masked_nats(model):
    batch = a_batch()
    loss, n_tokens, _ = loss_and_grads(model, batch)
    logits = our_logits(model, np.array(batch.tokens)).astype(np.float64)
    labels = np.array(batch.labels)
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp, np.maximum(labels, 0)[..., None], -1)[..., 0]
    assert n_tokens == (labels != IGNORE).sum()
    assert loss.dtype == mx.float32
    assert loss.item() == pytest.approx(nats[labels != IGNORE].sum(), rel=1e-6)


def test_a_batch_without_supervised_tokens_gives_zero_and_no_nan(model):
    batch = a_batch()
    empty = Batch(batch.tokens, mx.full(batch.labels.shape, IGNORE, mx.int32))
    loss, n_tokens, grads = loss_and_grads(model, empty)
    assert (loss.item(), n_tokens) == (0.0, 0)
    assert all((g == 0).all().item() for _, g in tree_flatten(grads))


def test_padding_positions_reach_neither_loss_nor_gradients(model):
    """Columns added at the right, whatever they hold, change nothing."""
    batch = a_batch()
    junk = mx.array(random_tokens(3, 17, seed=9))
    none = mx.full((3, 17), IGNORE, mx.int32)
    padded = Batch(mx.concatenate([batch.tokens, junk], 1), mx.concatenate([batch.labels, none], 1))
    loss, n, grads = loss_and_grads(model, batch)
    padded_loss, padded_n, padded_grads = loss_and_grads(model, padded)
    assert n == padded_n
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert gap(grads, padded_grads) < 1e-5


def test_token_accuracy_counts_the_first_choices(model):
    batch = a_batch()
    labels = np.array(batch.labels)
    learned = np.flatnonzero(labels != IGNORE)
    hidden = model.model(batch.tokens).reshape(labels.size, -1)[mx.array(learned)]
    found = cross_entropy(model.head, hidden, mx.array(labels.reshape(-1)[learned]), False)
    choices = our_logits(model, np.array(batch.tokens)).argmax(-1)
    assert np.array(found.choices).tolist() == choices[labels != IGNORE].tolist()
    wanted, previous = labels != IGNORE, np.roll(labels != IGNORE, 1, axis=1)
    previous[:, 0] = False
    pairs = wanted & previous
    total = score(model, [batch])
    assert total.hits == (choices == labels)[wanted].sum()
    assert (total.tokens, total.pairs) == (wanted.sum(), pairs.sum())
    assert total.repeated == (choices == np.roll(choices, 1, axis=1))[pairs].sum()
    assert total.repeated_targets == (labels == np.roll(labels, 1, axis=1))[pairs].sum()


# ---- gradients ---------------------------------------------------------------------------------


def test_dropout_key_decides_the_masks(model):
    batch = a_batch()
    losses = [loss_and_grads(model, batch, mx.random.key(k))[0].item() for k in (1, 1, 2)]
    without = loss_and_grads(model, batch)[0].item()
    assert losses[0] == losses[1] != losses[2]
    assert without not in losses


def test_gradients_are_float32_and_of_lora_weights_alone(model):
    _, _, grads = loss_and_grads(model, a_batch())
    leaves = tree_flatten(grads)
    assert len(leaves) == 2 * 7 * 2
    assert all(".lora_" in name and g.dtype == mx.float32 for name, g in leaves)


def test_bfloat16_compute_gives_float32_gradients_close_to_float32s(hf_tiny):
    results = []
    for dtype in (mx.float32, mx.bfloat16):
        ours = load_folder(hf_tiny[1], dtype=dtype)
        add_lora(ours, LoraConfig(r=4, lora_dropout=0.0), seed=5)
        randomise_lora(ours)
        results.append(loss_and_grads(ours, a_batch()))
    (loss, _, grads), (bf_loss, _, bf_grads) = results
    assert all(g.dtype == mx.float32 for _, g in tree_flatten(bf_grads))
    assert bf_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert gap(grads, bf_grads) < 0.1


def test_a_model_without_lora_and_a_wrong_recompute_are_refused(hf_tiny, model):
    with pytest.raises(ConfigError, match="nothing to train; call add_lora"):
        loss_and_grads(load_folder(hf_tiny[1]), a_batch())
    for wrong in ("some", 3, -1, 1.5):
        with pytest.raises(ConfigError, match="none, all, auto, or a number of layers from 0 to 2"):
            check_recompute(wrong, 2)


# ---- gradients against MLX's own ---------------------------------------------------------------

ROWS = [[20, 9, 3], [30, 1], [17, 8, 5], [12, 12], [31], [2, 25]]
SIZE = sum(map(sum, ROWS))
LEVEL_LISTS = [
    *([level, level] for level in LEVELS),
    [LAYER, EXPONENTIALS],
    [NOTHING, MLP],
    [MLP, NOTHING],
]


@contextmanager
def split_into(n_chunks: int, cores: int, positions: int = SIZE):
    """So many chunks and cores; yields how many shards each chunk had."""
    seen, real, limit = [], memory.chunks_of, -(-positions // n_chunks)
    here = dataclasses.replace(device.current(), chunk_positions=limit, busy_positions=limit)

    def chunks_of(*args: Any) -> Any:
        made = real(*args)
        seen.extend(map(len, made))
        return made

    with device.use(here), pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "FEWEST_POSITIONS", 1)
        patch.setattr(device, "cores", lambda: cores)
        patch.setattr(memory, "chunks_of", chunks_of)
        yield seen


@pytest.fixture(scope="module")
def autodiffed(hf_tiny):
    """A model, a batch, a key, and what MLX says of them."""
    model, batch, key = tuned(hf_tiny[1]), packed_batch(ROWS, width=40), mx.random.key(3)
    return model, batch, key, *autodiff(model, batch, key)


@pytest.fixture(scope="module")
def autodiffed_packed(hf_tiny):
    """The same of a model whose matrices are packed, in float32 from dense copies."""
    model = with_lora(load_folder(hf_tiny[1], PACKED))
    batch, key = packed_batch(ROWS, width=40), mx.random.key(3)
    return batch, key, *autodiff(model, batch, key)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("n_chunks", "cores"), [(1, 1), (2, 1), (5, 2)])
@pytest.mark.parametrize("levels", LEVEL_LISTS, ids=str)
def test_gradients_equal_mlx_s_own_whatever_is_kept(autodiffed, levels, n_chunks, cores, compiled):
    model, batch, key, nats, grads = autodiffed
    with split_into(n_chunks, cores) as seen:
        loss, n, ours = Engine(model, levels, compiled)(
            flat(model.trainable_parameters()), batch, key
        )
        assert seen == [cores] * n_chunks
    assert n == (np.array(batch.labels) != IGNORE).sum()
    assert loss.item() == pytest.approx(nats, rel=2e-6)
    assert gap(grads, ours) < 1e-5


@pytest.mark.parametrize(
    ("gpu_route", "levels", "n_chunks"),
    [
        *((name, levels, 2) for name in EXACT for levels in LEVEL_LISTS),
        ("metal-float32", [NOTHING] * 2, 5),
        *((name, [MLP, NOTHING], 2) for name in ("metal-bfloat16", "metal-float16")),
        *((name, [LAYER, EXPONENTIALS], 1) for name in ("metal-bfloat16", "cuda-float16")),
    ],
    indirect=["gpu_route"],
    ids=str,
)
def test_gradients_of_a_gpu_s_route_equal_mlx_s_own_whatever_is_kept(
    hf_tiny, autodiffed_packed, gpu_route, levels, n_chunks
):
    batch, key, nats, grads = autodiffed_packed
    model, here = with_lora(gpu_route.load(hf_tiny[1])), gpu_route.tolerance
    with split_into(n_chunks, 1) as seen:
        loss, n, ours = Engine(model, levels)(flat(model.trainable_parameters()), batch, key)
        assert seen == [1] * n_chunks
    assert n == (np.array(batch.labels) != IGNORE).sum()
    assert loss.item() == pytest.approx(nats, rel=here.loss)
    assert gap(grads, ours) < here.gradient


def test_strategies_of_multiplying_a_packed_weight_give_equal_gradients(hf_tiny):
    batch, key, found = packed_batch(ROWS), mx.random.key(3), []
    for matmul in ("quantized", "dequantize", "resident"):
        ours = load_folder(hf_tiny[1], QuantConfig(4, 32), matmul)
        packed = [m for m in ours.modules() if isinstance(m, FrozenMatrix) and m.quant]
        assert len(packed) >= 2 * 7 and all(m.matmul == matmul for m in packed)
        add_lora(ours, LoraConfig(r=4, lora_dropout=0.2), seed=5)
        randomise_lora(ours)
        for levels in ([NOTHING, LAYER], [MLP, EXPONENTIALS]):
            found.append(loss_and_grads(ours, batch, key, levels)[::2])
        found.append(autodiff(ours, batch, key))
    for loss, grads in found[1:]:
        assert float(loss) == pytest.approx(found[0][0].item(), rel=2e-6)
        assert gap(found[0][1], grads) < 2e-5


@pytest.mark.parametrize(
    "lora",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["up_proj", "v_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("levels", [[NOTHING, NOTHING], [LAYER, LAYER]], ids=str)
def test_a_part_of_the_weights_learns_exactly_and_nothing_below_it_is_differentiated(
    hf_tiny, lora, levels
):
    model, batch, key = tuned(hf_tiny[1], **lora), packed_batch(ROWS), mx.random.key(3)
    nats, grads = autodiff(model, batch, key)
    hook = Complete()
    engine = Engine(model, levels, compiled=False)
    loss, _, ours = engine(flat(model.trainable_parameters()), batch, key, None, hook)
    assert loss.item() == pytest.approx(nats, rel=2e-6)
    assert gap(grads, nested(ours)) < 1e-5
    assert len(hook.seen) == (1 if lora.get("layers_to_transform") == [1] else 2)
    assert hook.seen[-1] == set(ours)


def test_what_has_no_gradient_here_is_refused_and_not_given_zeros(hf_tiny):
    model = tuned(hf_tiny[1])
    model.model.norm.unfreeze()
    with pytest.raises(
        ConfigError, match=r"model\.norm\.weight is trainable, but only LoRA weights"
    ):
        loss_and_grads(model, packed_batch(ROWS))


class Complete:
    """Notes which gradients are complete after each layer that was differentiated."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def reduce(self, grads: dict[str, mx.array], complete: set[str]) -> None:
        assert complete <= grads.keys()
        self.seen.append(set(complete))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("levels", [[level, level] for level in LEVELS], ids=str)
def test_gates_that_saturate_have_finite_and_equal_gradients(hf_tiny, levels, compiled):
    """Below -88 e ** -x is infinite in float32, and its derivative times 0 would be NaN."""
    model, batch = tuned(hf_tiny[1]), packed_batch(ROWS)
    for layer in model.layers:
        gate = layer.mlp.gate_proj.base_layer
        gate.weight = gate.weight * 100
    _, _, wanted = Engine(model, "none", compiled=True)(flat(model.trainable_parameters()), batch)
    loss, _, grads = Engine(model, levels, compiled)(flat(model.trainable_parameters()), batch)
    assert mx.isfinite(loss).item()
    assert all(mx.isfinite(g).all().item() for _, g in tree_flatten(wanted))
    assert all(mx.isfinite(g).all().item() for _, g in tree_flatten(grads))
    assert gap(wanted, grads) < 1e-4


def test_documents_with_nothing_to_learn_and_padding_are_not_computed(
    model, monkeypatch, use_device
):
    use_device(few_shapes=False)
    batch, seen, look_up = packed_batch(ROWS, width=50), [], Embedding.__call__

    def noting(self, tokens):
        seen.append(tokens.size)
        return look_up(self, tokens)

    monkeypatch.setattr(Embedding, "__call__", noting)
    loss, n, grads = loss_and_grads(model, batch, mx.random.key(1))
    assert sum(seen) == SIZE < batch.tokens.size

    labels, silent = np.array(batch.labels), batch.documents[[1, 3, 8]]
    for row, start, end in silent:
        labels[row, start:end] = IGNORE
    fewer = Batch(batch.tokens, mx.array(labels), batch.documents)
    seen.clear()
    loss, n, grads = loss_and_grads(model, fewer, mx.random.key(1))
    assert sum(seen) == SIZE - (silent[:, 2] - silent[:, 1]).sum()
    nats, exact = autodiff(model, fewer, mx.random.key(1))
    assert n == (labels != IGNORE).sum()
    assert loss.item() == pytest.approx(nats, rel=2e-6)
    assert gap(exact, grads) < 1e-5


# ---- what a call leaves behind -----------------------------------------------------------------


def all_arrays(model) -> dict[str, mx.array]:
    arrays = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        if isinstance(module, FrozenMatrix):
            arrays[f"{name}._resident"] = module._resident
    return arrays


# A piece's calls: 1 and 2 on the way up, 3 and more on the way down.
@pytest.mark.parametrize(
    ("piece", "calls"),
    [
        *((piece, n) for piece in ("attention_norm", "mlp_norm") for n in range(1, 9)),
        *((piece, n) for piece in ("rotate", "add_attention") for n in range(1, 7)),
        *(("add_mlp", n) for n in range(1, 5)),
        *(("linears", n) for n in (1, 4, 8, 9, 12, 16, 24)),
    ],
)
def test_a_call_and_an_exception_in_the_middle_of_one_leave_the_model_as_it_was(
    hf_tiny, monkeypatch, piece, calls
):
    model = load_folder(hf_tiny[1], QuantConfig(4, 32), "dequantize")
    add_lora(model, LoraConfig(r=4, lora_dropout=0.2), seed=5)
    randomise_lora(model)
    batch, key, before = a_batch(B=1), mx.random.key(2), all_arrays(model)
    expected = loss_and_grads(model, batch, key, "none")
    mx.eval(expected)
    assert all(before[name] is array for name, array in all_arrays(model).items())
    doubled = {n: 2 * w for n, w in tree_flatten(model.trainable_parameters())}
    owner = llama.Attention if piece == "rotate" else llama.DecoderLayer
    real, left = getattr(owner, piece), [calls]

    def failing(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("in the middle")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
        patch.setattr(owner, piece, failing)
        loss_grads = Engine(model, "all", False)(doubled, batch, key)
        mx.eval(loss_grads)
    after = all_arrays(model)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    again = loss_and_grads(model, batch, key, "none")
    assert again[0].item() == expected[0].item()
    assert gap(expected[2], again[2]) == 0


def test_one_dense_copy_at_a_time_is_in_memory(hf_tiny, monkeypatch):
    model = load_folder(hf_tiny[1], QuantConfig(4, 32), "dequantize")
    add_lora(model, LoraConfig(r=4), seed=5)
    layers = [m for layer in model.layers for m in layer.modules() if isinstance(m, FrozenMatrix)]
    copies, fails, real = [], [], FrozenMatrix.unpacked_by_blocks

    def counted(*args):
        copies.append([m for m in layers if m.resident_bytes])
        if len(copies) in fails:
            raise RuntimeError("in the middle")
        return real(*args)

    monkeypatch.setattr(FrozenMatrix, "unpacked_by_blocks", counted)
    mx.eval(loss_and_grads(model, packed_batch(ROWS), None, "all"))
    assert len(copies) > 2 * len(layers) and not any(copies)  # forward, again, and back
    fails += [len(copies) + 3, 2 * len(copies)]
    for _ in fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            loss_and_grads(model, packed_batch(ROWS), None, "all")
        assert not any(m.resident_bytes for m in layers)


def test_what_worked_in_one_thread_works_in_the_next(autodiffed):
    """MLX's streams belong to the thread that made them."""
    model, batch, key, nats, grads = autodiffed
    found, failures = [], []

    def work() -> None:
        try:
            with split_into(1, 2) as seen:
                loss, _, ours = loss_and_grads(model, batch, key)
                mx.eval(loss, ours)
                found.append((seen, loss.item(), gap(grads, ours)))
        except RuntimeError as error:
            failures.append(error)

    work()
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    assert not failures
    for seen, loss, difference in found:
        assert seen == [2] and loss == pytest.approx(nats, rel=2e-6) and difference < 1e-5
    assert len(found) == 3


# ---- how a batch is shared out -----------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 8))
def test_documents_are_shared_out_evenly_each_to_one_and_in_order(lengths, n):
    documents = np.array([(i, 7, 7 + length) for i, length in enumerate(lengths)], np.int32)
    shares = memory.split_evenly(documents, n)
    n = min(n, len(lengths))
    assert len(shares) == n
    loads = [int((share[:, 2] - share[:, 1]).sum()) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    assert max(loads) <= 4 / 3 * max(sum(lengths) / n, max(lengths)) + max(lengths) / 3
    assert all((np.diff(share[:, 0]) > 0).all() for share in shares)
    assert np.array_equal(np.sort(np.concatenate(shares)[:, 0]), np.arange(len(lengths)))


SIZES = llama.LlamaConfig(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    vocab_size=320,
)


@pytest.mark.parametrize("lengths", [[100] * 12, [700, 20, 30, 500, 600, 90], [3000], [5] * 9])
def test_a_schedule_saves_with_chunks_first_then_level_by_level_and_keeps_its_budget(
    use_device, lengths
):
    use_device(chunk_positions=1000, busy_positions=300)
    N, n_layers, batch = sum(lengths), SIZES.num_hidden_layers, Footprint(SIZES, lengths, 4)

    def kept(made: memory.Schedule) -> int:
        return batch.kept(made.levels, made.n_chunks)

    roomy = batch.schedule("auto", 1e18)
    assert roomy == memory.Schedule(memory.default_chunks(lengths), [NOTHING] * n_layers)
    tightest = batch.schedule("auto", 0)
    assert tightest.levels == [LAYER] * n_layers
    most = max(roomy.n_chunks, min(-(-N // 300), len(lengths)))
    assert tightest.n_chunks == most
    made = [roomy]
    for budget in np.linspace(kept(roomy), kept(tightest), 200).tolist():
        made.append(batch.schedule("auto", budget))
        assert kept(made[-1]) <= budget
        assert made[-1].levels == [NOTHING] * n_layers or made[-1].n_chunks == most
        levels = made[-1].levels
        assert levels == sorted(levels, reverse=True) and levels[0] - levels[-1] <= 1
    for before, after in itertools.pairwise(made):
        assert (after.n_chunks, after.levels) >= (before.n_chunks, before.levels)
    sizes = {memory.layer_bytes(SIZES, level, 100, 4, device.current()) for level in LEVELS}
    assert len({tuple(m.levels) for m in made}) == 1 + (len(sizes) - 1) * n_layers


@pytest.mark.parametrize(
    ("here", "different"), [(device.CPU, 4), (device.METAL, 3), (device.CUDA, 3)]
)
@pytest.mark.parametrize("T", [1, 100, 1000])
def test_each_level_keeps_less_than_the_one_before(T, here, different):
    """A fused kernel keeps no exponentials."""
    sizes = [memory.layer_bytes(SIZES, level, T, 4, here) for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == different


def test_given_levels_are_kept_and_recomputing_everything_asks_for_more_chunks(use_device):
    use_device(chunk_positions=1000, busy_positions=300)
    lengths = [100] * 20
    for levels in ([LAYER, MLP, NOTHING, NOTHING], [LAYER] * 4):
        made = Footprint(SIZES, lengths, 4).schedule(levels, 0)
        assert made.levels == levels
        assert made.n_chunks >= memory.default_chunks(lengths)
    assert made.n_chunks == 7 > memory.default_chunks(lengths) == 2


# ---- compiling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("few_shapes", [False, True])
def test_200_steps_of_mixed_lengths_trace_a_few_graphs_and_keep_their_memory(
    model, monkeypatch, use_device, few_shapes
):
    traced, active, differentiating, compile_, vjp_ = [], [], [], mx.compile, mx.vjp

    def counting(fun, *args, **kwargs):
        def traces(*inputs):
            if not differentiating:  # within a transformation MLX compiles nothing
                traced.append(fun)
            return fun(*inputs)

        return compile_(traces, *args, **kwargs)

    def vjp(*args):
        differentiating.append(True)
        try:
            return vjp_(*args)
        finally:
            differentiating.pop()

    monkeypatch.setattr(mx, "compile", counting)
    monkeypatch.setattr(mx, "vjp", vjp)
    spec = importlib.util.spec_from_file_location("freshly_compiled", swiglu.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)  # the module itself may have met these shapes before
    for name in ("swiglu", "swiglu_vjp"):
        monkeypatch.setattr(engine_module, name, getattr(fresh, name))
    # Slices of two sizes: the last one is shorter.
    use_device(adamw_slice=1000, few_shapes=few_shapes)
    engine, optimizer = Engine(model, compiled=True), AdamW(model.trainable_parameters())
    random, shapes = np.random.default_rng(0), set()
    for i in range(200):
        rows = [random.integers(1, 40, random.integers(1, 4)).tolist() for _ in range(1 + i % 3)]
        batch = packed_batch(rows, i)
        if i % 2:
            batch = Batch(batch.tokens, batch.labels)
        shapes.add(batch.tokens.shape)
        loss, n, grads = engine(optimizer.named(optimizer.weights), batch, mx.random.key(i))
        norm = optimizer.update(grads, n, 1e-3, loss)
        mx.eval(norm, optimizer.weights, optimizer.mean, optimizer.square)
        del batch, loss, grads, norm
        active.append(mx.get_active_memory())
    assert len(shapes) > 100
    widths = {memory.padded_width(n) for n in range(1, 361)}
    assert 2 <= len(traced) <= (2 * len(widths) + 8 if few_shapes else 8)
    # By then attention has made its masks for every width, which it keeps.
    assert active[-1] == pytest.approx(active[120], rel=0.02)


def test_a_gpu_keeps_no_more_for_a_loop_of_one_s_own_than_is_planned(
    model, monkeypatch, use_device
):
    """Uncompiled it would keep the sigmoids, which the plan for a GPU does not count."""
    use_device(device.METAL)
    tapes: list[Tape] = []
    kept: list[int] = []

    def tape(*args: Any) -> Tape:
        tapes.append(Tape(*args))
        return tapes[-1]

    def loss(engine: Engine, last: Tape, losses: list[mx.array]):
        arrays = [array for each in tapes for array in arrays_of(each.values)]
        kept.append(sum(array.nbytes for array in arrays) - last.values["y"].nbytes)
        return original(engine, last, losses)

    original = Engine._loss
    monkeypatch.setattr(engine_module, "Tape", tape)
    monkeypatch.setattr(Engine, "_loss", loss)
    loss_and_grads(model, a_batch(B=4, T=96), recompute="none")
    assert kept == [Footprint(model.config, [96] * 4, 4).kept([NOTHING] * len(model.layers), 1)]


@pytest.mark.parametrize("level", [NOTHING, EXPONENTIALS, MLP, LAYER])
def test_what_the_forward_keeps_is_what_the_schedule_counts(model, level):
    batch = a_batch(B=4, T=96)
    compiled = device.current().compiles
    engine = Engine(model, [level] * len(model.layers), compiled)
    documents = memory.supervised_documents(batch)
    arrays: list[mx.array] = []
    for shard in memory.chunks_of(model, batch, [documents])[0]:
        x = model.model.embed_tokens(shard.tokens)
        for i, layer in enumerate(model.layers):
            tape = Tape(layer, shard, shard.keys[i], compiled)
            tape.values["x"] = x
            assert len(list(tape.forward(KEPT[level]))) == 5
            x = tape.values.pop("y")
            arrays += arrays_of(tape.values)
    kept = {id(array): array.nbytes for array in arrays}
    lengths = (documents[:, 2] - documents[:, 1]).tolist()
    counted = Footprint(model.config, lengths, 4).kept(engine.recompute, 1)
    assert sum(kept.values()) == pytest.approx(counted, rel=0.05)
