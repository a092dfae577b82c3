"""Gradients: against float64 differences, and against each other where the maths says equal."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_folder, our_logits, random_tokens, randomise_lora
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.loss import padded_count, supervised_targets, token_losses
from mlx_qlora.train.engine import Engine, add_grads, loss_and_grads
from mlx_qlora.train.memory import check_recompute
from mlx_qlora.train.score import score


@pytest.fixture
def model(hf_tiny):
    ours = load_folder(hf_tiny[1])
    add_lora(ours, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3), seed=5)
    randomise_lora(ours)
    return ours


def a_batch(B: int = 3, T: int = 24, seed: int = 0) -> Batch:
    tokens = random_tokens(B, T + 1, seed=seed)
    labels = tokens[:, 1:].copy()
    labels[:, : T // 3] = IGNORE
    labels[0, T // 2 :] = IGNORE
    return Batch(mx.array(tokens[:, :-1]), mx.array(labels))


def gap(first, second) -> float:
    """The largest difference of two gradient trees, relative to the largest gradient."""
    pairs = list(zip(tree_flatten(first), tree_flatten(second)))
    assert all(a[0] == b[0] for a, b in pairs)
    largest = max(mx.abs(a).max().item() for (_, a), _ in pairs)
    return max(mx.abs(a - b).max().item() for (_, a), (_, b) in pairs) / largest


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


def test_supervised_counts_come_from_a_small_set():
    assert len({padded_count(n) for n in range(1, 20_000)}) <= 48
    assert all(n <= padded_count(n) <= n * 1.5 + 16 for n in range(1, 20_000))


def test_token_accuracy_counts_the_first_choices(model):
    batch = a_batch()
    positions, targets, n = supervised_targets(batch)
    _, chosen = token_losses(model, model.model(batch.tokens), positions, targets)
    choices = our_logits(model, np.array(batch.tokens)).argmax(-1)
    labels = np.array(batch.labels)
    assert np.array(chosen)[:n].tolist() == choices[labels != IGNORE].tolist()
    wanted, previous = labels != IGNORE, np.roll(labels != IGNORE, 1, axis=1)
    previous[:, 0] = False
    pairs = wanted & previous
    total = score(model, [batch])
    assert total.hits == (choices == labels)[wanted].sum()
    assert (total.tokens, total.pairs) == (wanted.sum(), pairs.sum())
    assert total.repeated == (choices == np.roll(choices, 1, axis=1))[pairs].sum()
    assert total.repeated_targets == (labels == np.roll(labels, 1, axis=1))[pairs].sum()


# ---- gradients ---------------------------------------------------------------------------------


def test_gradients_equal_finite_differences(model):
    """Central differences along random directions, one per LoRA matrix."""
    batch, key = a_batch(), mx.random.key(4)
    weights = model.trainable_parameters()
    _, _, grads = loss_and_grads(model, batch, key)
    engine = Engine(model, "none", compiled=False)
    random = np.random.default_rng(0)
    for (name, gradient), (_, weight) in list(zip(tree_flatten(grads), tree_flatten(weights)))[::3]:
        direction = mx.array(random.normal(size=weight.shape).astype(np.float32))
        direction = direction / mx.sqrt(direction.square().sum())
        losses = []
        for sign in (1, -1):
            moved = dict(tree_flatten(weights))
            moved[name] = weight + sign * 2e-2 * direction
            loss, _, _ = engine(tree_unflatten(list(moved.items())), batch, key)
            losses.append(loss.item())
        measured = (losses[0] - losses[1]) / 4e-2
        promised = (gradient * direction).sum().item()
        assert measured == pytest.approx(promised, rel=2e-2, abs=2e-3), name


@pytest.mark.parametrize("recompute", ["all", 1, 2, "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recompute_changes_nothing_with_dropout_on(model, recompute, compiled):
    batch, key = a_batch(), mx.random.key(8)
    loss, _, grads = loss_and_grads(model, batch, key, recompute="none")
    engine = Engine(model, recompute, compiled)
    again, _, again_grads = engine(model.trainable_parameters(), batch, key)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert gap(grads, again_grads) < 1e-5


def test_a_checkpoint_that_draws_its_own_dropout_is_wrong(model):
    """The control: what mx.checkpoint does to a layer that calls mx.random without a key."""
    h = mx.random.normal((2, 16, 64))
    layer = model.layers[0]

    def run(x, weights):
        layer.update(weights)
        drawn = mx.random.randint(0, 2**31 - 1, (2, 2)).astype(mx.uint32)  # from the global state
        return layer(x, "causal", None, drawn)

    weights = layer.trainable_parameters()
    mx.random.seed(0)
    plain = mx.grad(lambda w: run(h, w).square().sum())(weights)
    mx.random.seed(0)
    checkpointed = mx.grad(lambda w: mx.checkpoint(run)(h, w).square().sum())(weights)
    layer.update(weights)
    assert gap(plain, checkpointed) > 1e-2


def test_dropout_key_decides_the_masks(model):
    batch = a_batch()
    losses = [loss_and_grads(model, batch, mx.random.key(k))[0].item() for k in (1, 1, 2)]
    without = loss_and_grads(model, batch)[0].item()
    assert losses[0] == losses[1] != losses[2]
    assert without not in losses


def test_micro_batches_add_up_to_one_batch(model):
    """Unequal supervised counts, which a mean of means would weigh wrongly."""
    batch = a_batch(B=4)
    whole_loss, whole_n, whole = loss_and_grads(model, batch)
    total, nats, count = None, 0.0, 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = Batch(batch.tokens[rows], batch.labels[rows])
        loss, n, grads = loss_and_grads(model, part)
        total, nats, count = add_grads(total, grads), nats + loss.item(), count + n
    assert count == whole_n
    assert nats == pytest.approx(whole_loss.item(), rel=1e-6)
    assert gap(whole, total) < 1e-5


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


def test_the_model_is_left_as_it_was(model):
    before = dict(tree_flatten(model.parameters()))
    engine = Engine(model, "all", compiled=True)
    mx.eval(engine(model.trainable_parameters(), a_batch(), mx.random.key(0)))
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)


def test_a_model_without_lora_and_a_wrong_recompute_are_refused(hf_tiny, model):
    with pytest.raises(ConfigError, match="nothing to train; call add_lora"):
        loss_and_grads(load_folder(hf_tiny[1]), a_batch())
    for wrong in ("some", 3, -1, 1.5):
        with pytest.raises(ConfigError, match="none, all, auto, or a number of layers from 0 to 2"):
            check_recompute(wrong, 2)


def test_scores_add_up_over_batches(model):
    batches = [a_batch(seed=s) for s in (1, 2)]
    total = score(model, batches)
    nats, n = total.nats, total.tokens
    sums = [loss_and_grads(model, b)[:2] for b in batches]
    assert n == sum(count for _, count in sums)
    assert nats == pytest.approx(sum(s.item() for s, _ in sums), rel=1e-6)
