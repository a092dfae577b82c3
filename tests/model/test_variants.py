"""Every kind of update against PEFT, torch and mlx-lm: DoRA, rsLoRA, beginnings, patterns.

The adapters are moved as training would move them before anything is compared: what begins at
zero proves nothing.
"""

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.adapters import (
    CONFIG,
    WEIGHTS,
    by_peft,
    largest,
    move,
    moved_by_peft,
    silence,
    weights_of,
)
from support.command_line import contents
from support.models import (
    LLAMA3_ROPE,
    load_folder,
    make_hf_model,
    our_logits,
    quantise_with_mlx_lm,
    random_tokens,
    save_hf,
    torch_logits,
)
from support.tiny_folder import write_model
from support.training import SETTINGS, Finished, assert_same, at_step, fine_tune, stop

import mlx_qlora as mq
from mlx_qlora.adapters.peft import load_adapter, save_adapter
from mlx_qlora.cli import main
from mlx_qlora.config import build, set_override
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.errors import AdapterWarning, ConfigError
from mlx_qlora.model import dropout
from mlx_qlora.model.dropout import position_words
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import DoRALinear, LoraConfig, add_lora, lora_layers
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.train.engine import Engine, loss_and_grads
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.signals import Interrupted
from mlx_qlora.tree import flat, nested

TOKENS = random_tokens(2, 21)
PREFIX = "base_model.model."

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora dora": {"use_rslora": True, "use_dora": True},
}
BEGINNINGS = (True, "gaussian", "pissa", "pissa_niter_4", "olora")
RANKS = {"q_proj": 3, r"layers\.1\.mlp\.(gate|up)_proj": 6}
ALPHAS = {"v_proj": 3.5, r"model\.layers\.0\.mlp\..*": 11}
WHERE: dict[str, dict[str, Any]] = {
    "no pattern": {},
    "ranks": {"rank_pattern": RANKS},
    "alphas": {"alpha_pattern": ALPHAS},
    "ranks and alphas": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "one layer": {"target_modules": ["q_proj", "mlp.down_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r"model\.layers\.\d\.(self_attn\.[qv]|mlp\.down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.fixture
def base(hf_tiny: tuple[Any, Path]) -> Path:
    return hf_tiny[1]


@pytest.fixture(scope="module")
def without(hf_tiny: tuple[Any, Path]) -> np.ndarray:
    """The logits of the base."""
    return torch_logits(hf_tiny[0], TOKENS)


def in_peft(hf: Any, folder: Path, **how: Any) -> Any:
    """A folder as PEFT opens it on a copy of the original model, without a warning."""
    from peft import PeftModel

    with silence():
        return PeftModel.from_pretrained(copy.deepcopy(hf), folder, **how).eval()


def peft_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {name.removeprefix(PREFIX): layer for name, layer in found.items()}


def named(parameter: str) -> str:
    """Our name of a parameter of a PEFT model."""
    name = parameter.removeprefix(PREFIX).replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


# ---- ours, read by PEFT and by ourselves -------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_and_we_open_what_we_saved_and_compute_the_same_logits(
    hf_tiny: tuple[Any, Path],
    without: np.ndarray,
    tmp_path: Path,
    variant: str,
    beginning: Any,
    where: str,
) -> None:
    hf, base = hf_tiny
    config = LoraConfig(
        r=4, lora_alpha=6.5, init_lora_weights=beginning, **VARIANTS[variant], **WHERE[where]
    )
    model = add_lora(load_folder(base), config)
    assert largest(our_logits(model, TOKENS), without) < 1e-5  # it begins where the base is
    move(model)
    logits = our_logits(model, TOKENS)
    assert largest(logits, without) > 0.01
    save_adapter(model, tmp_path / "a")

    theirs = in_peft(hf, tmp_path / "a")
    lengths = sum("magnitude" in name for name, _ in theirs.named_parameters())
    assert lengths == (len(lora_layers(model)) if config.use_dora else 0)
    assert largest(torch_logits(theirs, TOKENS), logits) < 1e-5

    again = load_adapter(load_folder(base), tmp_path / "a")
    assert largest(our_logits(again, TOKENS), logits) < 1e-5
    save_adapter(again, tmp_path / "b")
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one.keys() == two.keys() and len(one) == 5
    if beginning not in (True, "gaussian"):
        # alpha sqrt(2) / sqrt(2 r) is alpha / sqrt(r) but for the last digit, which mlx/ shows.
        one, two = ({n: f[n] for n in (WEIGHTS, CONFIG, "README.md")} for f in (one, two))
    assert one == two


def test_the_written_numbers_are_the_trained_ones_unless_the_base_made_way(
    base: Path, tmp_path: Path
) -> None:
    for beginning, factor in ((True, 1), ("pissa", 2)):
        config = LoraConfig(r=4, use_dora=True, init_lora_weights=beginning, rank_pattern=RANKS)
        model = move(add_lora(load_folder(base), config))
        folder = save_adapter(model, tmp_path / str(beginning))
        written, trained = load_file(folder / WEIGHTS), weights_of(model)
        assert written.keys() == {PREFIX + name for name in trained}
        for name, array in trained.items():
            ours = written[PREFIX + name][tuple(slice(n) for n in array.shape)]
            np.testing.assert_array_equal(ours, array)
            assert ours.dtype == np.float32
            grown = 1 if "magnitude" in name else factor
            assert written[PREFIX + name].size == grown * array.size


# ---- PEFT's, read by us ------------------------------------------------------------------------


PEFT_S_OWN: dict[str, dict[str, Any]] = {
    "its own targets": {"target_modules": None},
    "a layer's number": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0},
}


@pytest.mark.parametrize(
    "where", ["no pattern", "ranks and alphas", "one layer", "regex", *PEFT_S_OWN]
)
@pytest.mark.parametrize("beginning", [True, "gaussian"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_we_open_what_peft_wrote_and_compute_its_logits(
    hf_tiny: tuple[Any, Path],
    without: np.ndarray,
    tmp_path: Path,
    variant: str,
    beginning: Any,
    where: str,
) -> None:
    options = {"target_modules": "all-linear", **{**WHERE, **PEFT_S_OWN}[where]}
    options |= {"init_lora_weights": beginning, **VARIANTS[variant]}
    theirs = moved_by_peft(hf_tiny[0], tmp_path / "a", r=4, lora_alpha=6, **options)
    model = load_adapter(load_folder(hf_tiny[1]), tmp_path / "a")
    logits = our_logits(model, TOKENS)
    assert largest(logits, torch_logits(theirs, TOKENS)) < 1e-5
    assert largest(logits, without) > 0.01


def test_a_pattern_of_peft_s_that_matches_nothing_changes_nothing(
    hf_tiny: tuple[Any, Path], tmp_path: Path
) -> None:
    """PEFT warns whoever makes such an adapter, and computes it."""
    import torch

    patterns = {"rank_pattern": {"k_proj": 2, "w1": 8}, "alpha_pattern": {"w1": 3}}
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        theirs = by_peft(hf_tiny[0], r=4, target_modules=["q_proj", "k_proj"], **patterns)
    with torch.no_grad():
        for weight in (p for p in theirs.parameters() if p.requires_grad):
            weight.add_(torch.randn_like(weight) * 0.03)
    theirs.save_pretrained(tmp_path / "a")
    with pytest.warns(AdapterWarning, match="none of these: rank_pattern w1; alpha_pattern w1"):
        model = load_adapter(load_folder(hf_tiny[1]), tmp_path / "a")
    assert largest(our_logits(model, TOKENS), torch_logits(theirs, TOKENS)) < 1e-5


# ---- where an update begins --------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beginning", ["pissa", "olora"])
def test_principal_beginnings_are_peft_s_on_the_same_weights(
    hf_tiny: tuple[Any, Path], beginning: str, variant: str
) -> None:
    options = {"r": 5, "lora_alpha": 8, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    options |= {"init_lora_weights": beginning, **VARIANTS[variant]}
    theirs = peft_layers(by_peft(hf_tiny[0], target_modules="all-linear", **options))
    model = add_lora(load_folder(hf_tiny[1]), LoraConfig(target_modules="all-linear", **options))
    assert {path for path, _ in lora_layers(model)} == theirs.keys()
    for path, ours in lora_layers(model):
        peft = theirs[path]
        A, B = (getattr(peft, f"lora_{X}")["default"].weight.detach().numpy() for X in "AB")
        signs = np.sign((np.array(ours.lora_A.weight) * A).sum(axis=1, keepdims=True))
        assert ours.scale == pytest.approx(peft.scaling["default"], rel=1e-12)
        assert largest(signs * np.array(ours.lora_A.weight), A) < 1e-5
        assert largest(signs.T * np.array(ours.lora_B.weight), B) < 1e-5
        product = ours.scale * np.array(ours.lora_B.weight @ ours.lora_A.weight)
        assert largest(product, peft.scaling["default"] * B @ A) < 1e-5
        left = peft.base_layer.weight.detach().numpy()
        assert largest(np.array(ours.base_layer.dense()), left) < 1e-5
        if isinstance(ours, DoRALinear):
            length = peft.lora_magnitude_vector["default"].weight.detach().numpy()
            assert largest(np.array(ours.lora_magnitude_vector), length) < 1e-5


def test_a_beginning_at_nothing_has_peft_s_distribution(base: Path) -> None:
    """Kaiming's uniform of +-1 / sqrt(d_in), or a normal one of deviation 1 / r; B is zero."""
    for beginning in (True, "gaussian"):
        model = add_lora(
            load_folder(base),
            LoraConfig(r=16, init_lora_weights=beginning, rank_pattern={"gate_proj": 32}),
        )
        for path, layer in lora_layers(model):
            A = np.array(layer.lora_A.weight)
            r, d_in = A.shape
            assert r == (32 if "gate" in path else 16)
            wanted = 1 / r if beginning == "gaussian" else 1 / math.sqrt(3 * d_in)
            assert A.std() == pytest.approx(wanted, rel=0.1)
            assert abs(A.mean()) < 4 * wanted / math.sqrt(A.size)
            beyond = float((np.abs(A) > wanted * math.sqrt(3) * 1.001).mean())
            assert (0.05 < beyond < 0.12) if beginning == "gaussian" else beyond == 0
            assert not np.array(layer.lora_B.weight).any()
        firsts = {np.array(layer.lora_A.weight)[0, 0].item() for _, layer in lora_layers(model)}
        assert len(firsts) == 14  # every linear has a draw of its own


def test_a_randomised_svd_comes_close_to_the_exact_one(
    base: Path, decaying: tuple[Any, Path]
) -> None:
    def products(folder: Path, beginning: str) -> dict[str, np.ndarray]:
        model = add_lora(load_folder(folder), LoraConfig(r=4, init_lora_weights=beginning))
        pairs = {p: (m.lora_B.weight, m.lora_A.weight, m.scale) for p, m in lora_layers(model)}
        return {path: np.array(scale * (B @ A)) for path, (B, A, scale) in pairs.items()}

    def gap(folder: Path, rounds: int) -> float:
        exact = products(folder, "pissa")
        found = products(folder, f"pissa_niter_{rounds}")
        norm = np.linalg.norm
        return max(float(norm(found[path] - W) / norm(W)) for path, W in exact.items())

    assert gap(decaying[1], 16) < 1e-5
    # A random matrix's singular values are close together: the hardest case.
    assert gap(base, 16) < 0.1 < gap(base, 1)


@pytest.mark.parametrize("beginning", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_a_rank_that_a_matrix_does_not_have_is_refused_before_anything_changes(
    base: Path, beginning: str
) -> None:
    """k_proj is (32, 64): a decomposition of it has 32 components, and no 40."""
    model = load_folder(base, QuantConfig(4, 32) if beginning == "loftq" else None)
    before = our_logits(model, TOKENS)
    config = LoraConfig(r=8, rank_pattern={"k_proj": 40}, init_lora_weights=beginning)
    with pytest.raises(ConfigError, match=r"k_proj.* 40|40.* k_proj") as caught:
        add_lora(model, config)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)
    assert not lora_layers(model)


def test_a_rank_beyond_the_matrix_is_no_matter_where_it_begins_at_nothing(
    hf_tiny: tuple[Any, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=8, rank_pattern={"k_proj": 40}, use_dora=True)
    model = move(add_lora(load_folder(hf_tiny[1]), config))
    save_adapter(model, tmp_path / "a")
    theirs = in_peft(hf_tiny[0], tmp_path / "a")
    assert largest(torch_logits(theirs, TOKENS), our_logits(model, TOKENS)) < 1e-5


# ---- on a quantised base -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def decaying(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny model whose matrices have, like trained ones, few large singular values."""
    import torch

    hf = make_hf_model(rope_parameters=LLAMA3_ROPE, intermediate_size=128)
    with torch.no_grad():
        for layer in peft_layers(by_peft(hf, r=1, target_modules="all-linear")):
            weight = hf.get_parameter(f"{layer}.weight")
            U, S, V = torch.linalg.svd(weight, full_matrices=False)
            decay = 1 / torch.arange(1, len(S) + 1)
            weight.copy_(U @ torch.diag(decay * S.norm() / decay.norm()) @ V)
    return hf, save_hf(hf, tmp_path_factory.mktemp("decaying") / "model")


FOUR_BITS = QuantConfig(4, 64)


def lost(hf: Any, model: LlamaForCausalLM) -> dict[str, float]:
    """How far each adapted matrix is from the original's, relative to it."""
    gaps = {}
    for path, layer in lora_layers(model):
        W = hf.get_parameter(f"{path}.weight").detach().numpy()
        gaps[path] = float(np.linalg.norm(np.array(layer.merged()) - W) / np.linalg.norm(W))
    return gaps


@pytest.mark.parametrize("matmul", ["resident", "quantized", "dequantize"])
@pytest.mark.parametrize("beginning", ["loftq"])
def test_a_quantised_model_begins_nearer_to_the_original_than_quantisation_leaves_it(
    decaying: tuple[Any, Path], beginning: str, matmul: str
) -> None:
    hf, folder = decaying
    original = torch_logits(hf, TOKENS)
    plain = add_lora(load_folder(folder, FOUR_BITS, matmul), LoraConfig(r=8))
    config = LoraConfig(r=8, init_lora_weights=beginning)
    model = add_lora(load_folder(folder, FOUR_BITS, matmul), config)
    for path, layer in lora_layers(model):
        assert layer.base_layer.quant == FOUR_BITS, path
    before, after = lost(hf, plain), lost(hf, model)
    print(f"{beginning}: matrices {np.mean(list(before.values())):.4f} -> ", end="")
    print(f"{np.mean(list(after.values())):.4f}")
    assert all(after[path] < 0.9 * before[path] for path in before)
    gaps = [np.abs(our_logits(m, TOKENS) - original).mean() for m in (plain, model)]
    assert gaps[1] < 0.9 * gaps[0]


@pytest.mark.parametrize("matmul", ["resident", "quantized", "dequantize"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beginning", ["pissa", "pissa_niter_4", "olora"])
def test_what_was_trained_on_a_quantised_base_is_what_the_adapter_computes_on_it(
    decaying: tuple[Any, Path], tmp_path: Path, beginning: str, variant: str, matmul: str
) -> None:
    folder = decaying[1]
    bare = load_folder(folder, FOUR_BITS, matmul)
    config = LoraConfig(r=8, init_lora_weights=beginning, **VARIANTS[variant])
    model = add_lora(load_folder(folder, FOUR_BITS, matmul), config)
    # The update that is subtracted at the start is so much larger, and its rounding with it.
    limit = 1e-5 * (config.r**0.5 if config.use_rslora else 1)
    assert largest(our_logits(model, TOKENS), our_logits(bare, TOKENS)) < limit
    trained = our_logits(move(model), TOKENS)
    assert largest(trained, our_logits(bare, TOKENS)) > 1e-2
    save_adapter(model, tmp_path / "a")
    assert largest(our_logits(load_adapter(bare, tmp_path / "a"), TOKENS), trained) < limit


@pytest.mark.parametrize("variant", VARIANTS)
def test_loftq_is_the_svd_of_what_quantisation_lost(
    decaying: tuple[Any, Path], variant: str
) -> None:
    hf, folder = decaying
    plain = load_folder(folder, FOUR_BITS)
    config = LoraConfig(
        r=8, rank_pattern={"o_proj": 3}, init_lora_weights="loftq", **VARIANTS[variant]
    )
    model = add_lora(load_folder(folder, FOUR_BITS), config)
    quantised: Any = dict(plain.named_modules())
    for path, layer in lora_layers(model):
        W = hf.get_parameter(f"{path}.weight").detach().numpy()
        Q = np.array(quantised[path].dense())
        U, S, V = np.linalg.svd(W - Q, full_matrices=False)
        r = config.rank_of(path)
        product = layer.scale * np.array(layer.lora_B.weight @ layer.lora_A.weight)
        assert largest(product, (U[:, :r] * S[:r]) @ V[:r]) < 1e-6
        np.testing.assert_array_equal(np.array(layer.base_layer.dense()), Q)


@pytest.mark.parametrize("files", ["dense", "quantised"])
def test_loftq_without_an_original_is_refused_by_one_message(
    decaying: tuple[Any, Path], tmp_path: Path, files: str
) -> None:
    folder = decaying[1]
    if files == "quantised":
        quantise_with_mlx_lm(folder, tmp_path / "q", {"bits": 4, "group_size": 64})
        folder = tmp_path / "q"
    model = load_folder(folder)
    before = our_logits(model, TOKENS)
    with pytest.raises(
        ConfigError, match=r"lora\.init_lora_weights: loftq .*model\.bits"
    ) as caught:
        add_lora(model, LoraConfig(r=4, init_lora_weights="loftq"))
    assert "\n" not in str(caught.value)
    assert not lora_layers(model)
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)


@pytest.mark.parametrize("beginning", ["pissa", "olora"])
def test_what_was_learned_on_a_quantised_base_is_written_for_the_original(
    decaying: tuple[Any, Path], tmp_path: Path, beginning: str
) -> None:
    """W + s (B A - B0 A0): before anything is learned this is the original to the last digit."""
    hf, folder = decaying
    config = LoraConfig(r=8, init_lora_weights=beginning)
    model = add_lora(load_folder(folder, FOUR_BITS), config)
    begun = {path: np.array(layer.merged()) for path, layer in lora_layers(model)}
    save_adapter(model, tmp_path / "begun")
    theirs = in_peft(hf, tmp_path / "begun")
    assert largest(torch_logits(theirs, TOKENS), torch_logits(hf, TOKENS)) < 1e-5
    save_adapter(move(model), tmp_path / "moved")
    updates = peft_layers(in_peft(hf, tmp_path / "moved"))
    for path, layer in lora_layers(model):
        learned = np.array(layer.merged()) - begun[path]
        theirs = updates[path].get_delta_weight("default").detach().numpy()
        assert largest(theirs, learned) < 1e-5 < largest(learned, 0 * learned)


# ---- gradients ---------------------------------------------------------------------------------


def pattern_arrays(B: int = 3, T: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels that have something to learn, some of them not supervised."""
    draw = np.random.default_rng(seed)
    tokens = (draw.integers(0, 4, (B, 1)) + 3 * np.arange(T + 1)) % 320
    labels = tokens[:, 1:].copy()
    for row in labels:
        row[: draw.integers(0, T // 2)] = IGNORE
    return tokens[:, :-1].astype(np.int32), labels.astype(np.int32)


def pattern_batch(seed: int = 0) -> Batch:
    tokens, labels = pattern_arrays(seed=seed)
    return Batch(mx.array(tokens), mx.array(labels))


def torch_loss(model: Any, tokens: np.ndarray, labels: np.ndarray) -> Any:
    """The sum of nats over supervised tokens."""
    import torch

    logits = model(torch.from_numpy(tokens).long()).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(labels).long().flatten(), reduction="sum"
    )


GRADIENTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "dora patterns": {"use_dora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "dora one layer": {"use_dora": True, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_torch_and_peft(
    hf_tiny: tuple[Any, Path], tmp_path: Path, name: str
) -> None:
    config = LoraConfig(r=4, lora_alpha=6, **GRADIENTS[name])
    model = move(add_lora(load_folder(hf_tiny[1]), config))
    save_adapter(model, tmp_path / "a")
    theirs = in_peft(hf_tiny[0], tmp_path / "a", is_trainable=True)
    tokens, labels = pattern_arrays()
    nats = torch_loss(theirs, tokens, labels)
    nats.backward()
    wanted = {named(n): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    lengths = [path for path in wanted if "magnitude" in path]
    assert len(lengths) == (len(lora_layers(model)) if config.use_dora else 0)
    for recompute in ("none", "all"):
        loss, n, grads = loss_and_grads(model, pattern_batch(), recompute=recompute)
        assert n == (labels != IGNORE).sum()
        assert loss.item() == pytest.approx(nats.item(), rel=1e-6)
        found = flat(grads)
        assert found.keys() == wanted.keys() == weights_of(model).keys()
        for path, gradient in wanted.items():
            gap = np.linalg.norm(np.array(found[path]) - gradient)
            assert gap <= 1e-4 * np.linalg.norm(gradient), (recompute, path)
            assert np.linalg.norm(gradient) > 1e-2


def test_dora_with_dropout_is_peft_s_formula_with_our_mask() -> None:
    from mlx_qlora.model.quantize import Linear

    draw = np.random.default_rng(0)
    W, A, B = (draw.normal(size=s) for s in ((24, 40), (3, 40), (24, 3)))
    x, scale, key = draw.normal(size=(7, 40)), 1.7, mx.random.key(5)
    linear = Linear(40, 24)
    linear.weight = mx.array(W.astype(np.float32))
    layer = DoRALinear(
        linear, *(mx.array(w.astype(np.float32)) for w in (A, B)), scale=scale, dropout=0.3
    )
    layer.lora_magnitude_vector = layer.lora_magnitude_vector * 1.2 + 0.1
    m = np.array(layer.lora_magnitude_vector).astype(np.float64)
    longer = m / np.linalg.norm(W + scale * B @ A, axis=1)
    assert np.abs(longer - 1).min() > 0.1

    def peft(dropped: np.ndarray) -> np.ndarray:
        update = longer * scale * (dropped @ A.T @ B.T)
        return x @ W.T + (longer - 1) * (dropped @ W.T) + update

    single = mx.array(x.astype(np.float32))
    assert largest(np.array(layer(single)), peft(x)) < 1e-4
    (words,) = position_words(key[None], mx.zeros(7, mx.int32), mx.arange(7), 1)
    mask = np.array(dropout.mask(words, 0.3, 40, mx.float32))
    assert 0.5 < mask.mean() < 0.9
    kept = x * mask / (1 - 0.3)
    assert largest(np.array(layer(single, words)), peft(kept)) < 1e-4
    dense = np.array(layer.merged())
    assert largest(dense, longer[:, None] * (W + scale * B @ A)) < 1e-4


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_dora_s_gradients_under_dropout_are_those_of_finite_differences(
    base: Path, recompute: Any
) -> None:
    """The norm is a constant to the gradient (section 4.3), so the differences hold it still."""
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3, use_dora=True)
    model = move(add_lora(load_folder(base), config))
    batch = pattern_batch()
    key, weights = mx.random.key(11), weights_of(model)

    def loss_at(shift: dict[str, np.ndarray], size: float) -> float:
        shifted = {n: mx.array(w + np.float32(size) * shift[n]) for n, w in weights.items()}
        model.update(nested(shifted))
        return loss_and_grads(model, batch, key, recompute)[0].item()  # pyright: ignore

    loss, _, tree = loss_and_grads(model, batch, key, recompute)
    grads = {name: np.array(gradient) for name, gradient in flat(tree).items()}
    assert abs(loss.item() - loss_and_grads(model, batch, None)[0].item()) > 0.1  # it drops
    norms = {id(layer): layer.norm() for _, layer in lora_layers(model)}  # pyright: ignore
    mx.eval(list(norms.values()))
    draw = np.random.default_rng(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DoRALinear, "norm", lambda self: norms[id(self)])
        for kind in ("lora_A", "lora_B", "magnitude"):
            for signs in (np.sign, lambda g: np.sign(g) * (draw.random(g.shape) < 0.5)):
                shift = {n: signs(g) if kind in n else np.zeros_like(g) for n, g in grads.items()}
                length = math.sqrt(sum(float((s**2).sum()) for s in shift.values()))
                shift = {n: (s / length).astype(np.float32) for n, s in shift.items()}
                slope = sum(float((grads[n] * shift[n]).sum()) for n in grads)
                step = 0.02
                found = (loss_at(shift, step) - loss_at(shift, -step)) / (2 * step)
                assert found == pytest.approx(slope, rel=1e-2), kind
                assert abs(slope) > 1


# ---- training ----------------------------------------------------------------------------------


def our_losses(model: LlamaForCausalLM, steps: int, rate: float) -> list[float]:
    engine = Engine(model, "none", compiled=True)
    optimizer = AdamW(model.trainable_parameters(), weight_decay=0.01, max_grad_norm=1.0)
    losses = []
    for step in range(steps):
        batch = pattern_batch(seed=step)
        loss, n, grads = engine(optimizer.named(optimizer.weights), batch)
        mx.eval(optimizer.update(grads, n, rate))
        losses.append(loss.item() / n)
    model.update(optimizer.tree())
    return losses  # pyright: ignore[reportReturnType]


def torch_losses(model: Any, steps: int, rate: float) -> list[float]:
    import torch

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    losses = []
    for step in range(steps):
        tokens, labels = pattern_arrays(seed=step)
        loss = torch_loss(model, tokens, labels) / int((labels != IGNORE).sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
        {"use_rslora": True, "rank_pattern": RANKS},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
        {"init_lora_weights": "olora", "alpha_pattern": ALPHAS},
    ],
    ids=str,
)
def test_ten_steps_follow_torch_and_peft(
    hf_tiny: tuple[Any, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    hf, base = hf_tiny
    model = add_lora(load_folder(base), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **options))
    if "init_lora_weights" in options:  # PEFT's own beginning, on a base that it has changed
        theirs = by_peft(hf, r=4, lora_alpha=8, target_modules="all-linear", **options)
    else:
        save_adapter(model, tmp_path / "a")
        theirs = in_peft(hf, tmp_path / "a", is_trainable=True)
    wanted = torch_losses(theirs, 10, 5e-3)
    losses = our_losses(model, 10, 5e-3)
    gap = np.abs(np.array(losses) - wanted).max()
    print(f"largest gap {gap:.2e}; {wanted[0]:.3f} -> {wanted[-1]:.3f}")
    assert wanted[-1] < wanted[0] - 0.5, "the run must learn, to mean anything"
    assert gap < 1e-4
    assert largest(our_logits(model, TOKENS), torch_logits(theirs, TOKENS)) < 1e-3
    save_adapter(model, tmp_path / "end")
    end = in_peft(hf, tmp_path / "end")
    assert largest(our_logits(model, TOKENS), torch_logits(end, TOKENS)) < 2e-5


def test_with_lora_plus_the_lengths_learn_as_fast_as_in_peft_s_optimizer(
    hf_tiny: tuple[Any, Path],
) -> None:
    import torch
    from peft.optimizers import create_loraplus_optimizer

    theirs = by_peft(hf_tiny[0], r=2, target_modules="all-linear", use_dora=True)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.01
    )
    paths = {id(p): named(n) for n, p in theirs.named_parameters()}
    wanted = {
        paths[id(p)]: (group["lr"] / 1e-3, group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    model = add_lora(load_folder(hf_tiny[1]), LoraConfig(r=2, use_dora=True))
    ours = AdamW(model.trainable_parameters(), lr_ratio=8.0)
    assert {n: a.size for n, a in ours.named(ours.ratios).items()}.keys() == wanted.keys()
    for name, ratio in ours.named(ours.ratios).items():
        assert (np.array(ratio) == wanted[name][0]).all(), (name, wanted[name])
        assert wanted[name][1] == 0.01, name


# ---- checkpoints -------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}
RUNS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "randomised pissa, patterns": {
        "init_lora_weights": "pissa_niter_2",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"up_proj": 5.5},
    },
    "olora dora": {"init_lora_weights": "olora", "use_dora": True},
    "pissa on 4 bits": {"init_lora_weights": "pissa"},
    "loftq on 4 bits": {"init_lora_weights": "loftq", "use_dora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("variants") / "model", **SHAPE)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and its fields; within it models are loaded as the name says."""
    with pytest.MonkeyPatch.context() as patch:
        if "4 bits" in request.param:
            patch.setattr(mq, "load", partial(mq.load, quantize=QuantConfig(4, 32)))
        yield request.param, RUNS[request.param]


def test_a_stopped_run_ends_bit_for_bit_like_an_unbroken_one(
    folder: Path, tmp_path: Path, run: tuple[str, dict[str, Any]], in_float32: None
) -> None:
    name, fields = run
    whole = fine_tune(folder, tmp_path / "whole", **fields)
    for step in (1, 4):
        out = tmp_path / f"stopped-{step}"
        with at_step(step, stop), pytest.raises(Interrupted):
            fine_tune(folder, out, **fields)
        assert_same(fine_tune(folder, out, **fields), whole)
    assert trained(whole)
    if "4 bits" not in name:
        hf = make_hf_model(0, rope_parameters=LLAMA3_ROPE, **SHAPE)
        logits = our_logits(whole.model, TOKENS)
        for opened in (whole.out, whole.out / "checkpoint-8", tmp_path / "stopped-4/checkpoint-8"):
            assert largest(torch_logits(in_peft(hf, opened), TOKENS), logits) < 1e-5, opened
        early = in_peft(hf, tmp_path / "stopped-4" / "checkpoint-4")
        assert largest(torch_logits(early, TOKENS), logits) > 1e-3


def trained(whole: Finished) -> bool:
    """Whether every kind of weight has moved since the run began."""
    return all(
        any(
            not np.array_equal(one, load_file(whole.out / "checkpoint-3" / WEIGHTS)[name])
            for name, one in load_file(whole.out / "checkpoint-8" / WEIGHTS).items()
            if kind in name
        )
        for kind in {n.rpartition(".lora_")[2] for n in load_file(whole.out / WEIGHTS)}
    )


def test_the_best_weights_of_a_pissa_run_are_put_back(
    folder: Path, tmp_path: Path, in_float32: None
) -> None:
    fields = {"init_lora_weights": "pissa", "use_dora": True, "load_best_model_at_end": True}
    run = fine_tune(folder, tmp_path / "out", **fields, learning_rate=1.0, eval_steps=1)
    assert run.result.best_step is not None and run.result.best_step < SETTINGS["max_steps"]
    best = run.out / f"checkpoint-{run.result.best_step}"
    assert run.adapter == (best / WEIGHTS).read_bytes()
    hf = make_hf_model(0, rope_parameters=LLAMA3_ROPE, **SHAPE)
    logits = torch_logits(in_peft(hf, best), TOKENS)
    assert largest(logits, our_logits(run.model, TOKENS)) < 1e-5


# ---- mlx-lm ------------------------------------------------------------------------------------


# ---- the config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["q_proj", "layers.0.self_attn.q_proj"],
        ["layers.0.self_attn.q_proj", "q_proj"],
        [r"^model\.layers\.1\.mlp\.up_proj", "mlp.down_proj"],
        [r"^model\.layers\.0\..*", "k_proj|v_proj"],
        [r".*\.1\..*", r"layers\.[01]\.mlp\.(gate|up)_proj"],
        ["self_attn.o_proj", ".*"],
    ],
    ids=str,
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_match_what_peft_s_match_and_the_first_one_wins(
    hf_tiny: tuple[Any, Path], keys: list[str], use_rslora: bool
) -> None:
    options = {"r": 5, "lora_alpha": 9, "target_modules": "all-linear", "use_rslora": use_rslora}
    options["rank_pattern"] = {key: 2 + i for i, key in enumerate(keys)}
    options["alpha_pattern"] = {key: 1.5 + i for i, key in enumerate(reversed(keys))}
    theirs = peft_layers(by_peft(hf_tiny[0], **options))
    model = add_lora(load_folder(hf_tiny[1]), LoraConfig(**options))
    for path, layer in lora_layers(model):
        assert len(layer.lora_A.weight) == theirs[path].r["default"], path
        assert layer.scale == pytest.approx(theirs[path].scaling["default"], rel=1e-12), path
    assert len({theirs[path].r["default"] for path in theirs}) > 1


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key", ["w1", "proj", r"^layers\.0\..*", "^q_proj", "layers.2.mlp.up_proj", "o_proj"]
)
def test_a_pattern_that_matches_no_target_is_refused(base: Path, field: str, key: str) -> None:
    model = load_folder(base)
    targets: list[str] = ["q_proj", "up_proj"]
    patterns: dict[str, Any] = {field: {"q_proj": 2, key: 2}}
    with pytest.raises(ConfigError, match=rf"lora\.{field}: .* matches no target") as caught:
        add_lora(model, LoraConfig(target_modules=targets, **patterns))
    assert repr(key) in str(caught.value) and "q_proj, up_proj" in str(caught.value)
    assert not lora_layers(model)


def test_the_command_line_sets_variants(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "lora.rank_pattern={q_proj: 8}",
        r"lora.alpha_pattern={'layers\.0\..*': 2.5, v_proj: 4}",
        "lora.use_dora=true",
        "lora.init_lora_weights=pissa_niter_4",
    ]
    values: dict[str, dict[str, Any]] = {}
    for word in words:
        set_override(values, word)
    lora = build(values).lora
    assert lora.rank_pattern == {"q_proj": 8}
    assert lora.alpha_pattern == {r"layers\.0\..*": 2.5, "v_proj": 4}
    assert lora.use_dora is True and lora.init_lora_weights == "pissa_niter_4"
    assert lora.rank_of("model.layers.1.self_attn.q_proj") == 8
    assert lora.scale_of("model.layers.0.self_attn.q_proj") == 2.5 / 8
    assert main(["train", *words, "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "  rank_pattern:\n    q_proj: 8\n" in shown
    assert "  init_lora_weights: pissa_niter_4\n" in shown
    set_override(values, "lora.init_lora_weights=true")
    assert build(values).lora.init_lora_weights is True


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.rank_pattern={q_proj: 0}", "lora.rank_pattern.q_proj must be at least 1; got 0"),
        ("lora.rank_pattern={q_proj: 2.5}", "lora.rank_pattern must be a map of text to int"),
        ("lora.rank_pattern=8", "lora.rank_pattern must be a map of text to int; got 8"),
        ("lora.rank_pattern=[q_proj]", "lora.rank_pattern must be a map of text to int"),
        ("lora.alpha_pattern={q_proj: x}", "lora.alpha_pattern must be a map of text to number"),
        ("lora.alpha_pattern={3: 4}", "lora.alpha_pattern must be a map of text to number"),
        ("lora.init_lora_weights=[]", "lora.init_lora_weights must be true, gaussian"),
        ("lora.init_lora_weights=false", "lora.init_lora_weights must be true, gaussian"),
    ],
)
def test_a_bad_word_on_the_command_line_is_refused_by_name(word: str, message: str) -> None:
    values: dict[str, dict[str, Any]] = {}
    set_override(values, word)
    with pytest.raises(ConfigError) as caught:
        build(values)
    assert message in str(caught.value)
