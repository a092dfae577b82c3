"""Rounding that compensates: against the textbook, in every format, and on whole models."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from support.command_line import call, contents
from support.models import our_logits, random_tokens, randomise_lora
from support.tiny_folder import write_random_model, write_rows

import mlx_qlora as mq
from mlx_qlora import progress
from mlx_qlora.adapters import calibration, requantize
from mlx_qlora.adapters.drift import ADAPTER, BASE, MERGED, PLAIN, VERSIONS, WRITTEN
from mlx_qlora.adapters.gguf_model import LEVELS, OFFSET, blocks, save_gguf_model
from mlx_qlora.adapters.requantize import (
    Grid,
    Rounded,
    compensate,
    damped,
    factored,
    grid_of,
    improve,
    packed,
    round_matrix,
    scales_of,
)
from mlx_qlora.adapters.several import disabled
from mlx_qlora.data.batches import IGNORE, evaluation_batches
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.model.quantize import QuantConfig, unpack

M, N = 96, 40  # columns and rows of the matrices here
MLX = [
    QuantConfig(4, 32),
    QuantConfig(3, 32),
    QuantConfig(5, 32),
    QuantConfig(6, 32),
    QuantConfig(8, 32),
    QuantConfig(4, 32, "mxfp4"),
]


def of_ggml(kind: Any) -> Grid:
    first, last = LEVELS[kind]
    levels = np.arange(first, last + 1, dtype=np.float32)
    return Grid(levels, 32, kind in OFFSET, lambda x: x.astype(np.float16).astype(np.float32))


GRIDS = {f"{q.bits} {q.mode}": grid_of(q, mx.float32) for q in MLX}
GRIDS |= {Type(kind).name: of_ggml(kind) for kind in LEVELS}


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (M, N), and inputs (600, M) that depend on each other, as those of a model do."""
    draw = np.random.default_rng(seed)
    shared = draw.standard_normal((600, 12)) @ draw.standard_normal((12, M))
    X = shared + 0.5 * draw.standard_normal((600, M))
    return draw.standard_normal((M, N)).astype(np.float32), X.astype(np.float32)


def plainly(W: np.ndarray, grid: Grid) -> np.ndarray:
    """Each number at the nearest one of its group, by itself."""
    scales, offsets = (np.repeat(x, grid.group, 0) for x in scales_of(W, grid))
    values = grid.levels[:, None, None] * scales + offsets
    return np.take_along_axis(values, np.abs(values - W).argmin(0)[None], 0)[0]


def compensated(W: np.ndarray, H: np.ndarray, grid: Grid) -> Rounded:
    rounded = Rounded(grid, np.empty(W.shape, np.uint8), *scales_of(W, grid))
    with factored(H) as (order, C):
        compensate(rounded, W, 0 * W, order, C)
    return rounded


def improved(begin: Rounded, W: np.ndarray, H: np.ndarray, sweeps: int = 4) -> np.ndarray:
    rounded = copy.deepcopy(begin)
    improve(rounded, W, 0 * W, H, sweeps)
    return rounded.dense


@pytest.mark.parametrize("name", GRIDS)
def test_the_output_is_nearer_than_that_of_plain_rounding(name: str) -> None:
    (W, X), grid = problem(), GRIDS[name]
    H = damped(X.T @ X)
    first = compensated(W, H, grid)
    after = improved(first, W, H)
    lost = [float(np.square(X @ (Q - W)).sum()) for Q in (plainly(W, grid), first.dense, after)]
    assert lost[2] < lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("name", GRIDS)
def test_inputs_that_do_not_depend_on_each_other_leave_plain_rounding(name: str) -> None:
    (W, _), grid, eye = problem(), GRIDS[name], np.eye(M, dtype=np.float32)
    rounded = compensated(W, eye, grid)
    np.testing.assert_allclose(rounded.dense, plainly(W, grid), atol=1e-6)


def test_compensation_is_the_textbook_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frantar et al. 2022, algorithm 1, by the inverse of H in float64; here in several blocks."""
    monkeypatch.setattr(requantize, "BLOCK", 40)
    monkeypatch.setattr(requantize, "STEP", 30)
    (W, X), grid = problem(), GRIDS["4 affine"]
    H, (scales, offsets) = damped(X.T @ X), scales_of(W, grid)
    order = np.argsort(-np.diag(H), kind="stable")
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)].astype(np.float64))).T
    left, wanted = W[order].astype(np.float64), np.empty(W.shape)
    for i, column in enumerate(order):
        scale, offset = scales[column // 32], offsets[column // 32]
        q = np.clip(np.rint((left[i] - offset) / scale), 0, 15)
        wanted[column] = q
        left[i:] -= U[i, i:, None] * ((left[i] - q * scale - offset) / U[i, i])
    before = H.copy()
    levels = compensated(W, H, grid).levels
    np.testing.assert_array_equal(H, before)
    rows = (levels == wanted).all(axis=0)
    assert rows.mean() > 0.9, "of a number between two levels float32 may take the other"


def test_coordinate_descent_never_makes_a_row_worse_and_finds_the_base_again() -> None:
    (W, X), grid = problem(), GRIDS["4 affine"]
    H = damped(X.T @ X)
    begin = compensated(W, H, grid)
    costs = []
    for sweeps in range(4):
        E = improved(begin, W, H, sweeps) - W
        costs.append(((H @ E) * E).sum(axis=0))
    for before, after in itertools.pairwise(costs):
        assert (after <= before * (1 + 1e-4)).all()
    same = improved(begin, begin.dense, H)
    np.testing.assert_array_equal(same, begin.dense)


@pytest.mark.parametrize("quant", MLX, ids=lambda q: f"{q.bits} {q.mode}")
def test_mlx_decodes_what_was_promised(quant: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    W, X = problem()
    monkeypatch.setattr(requantize, "ROWS", 16)
    rounded = round_matrix(W, damped(X.T @ X), 0 * W, grid_of(quant, mx.float32))
    dense = unpack(packed(rounded, quant), quant, mx.float32)
    np.testing.assert_allclose(np.array(dense).T, rounded.dense, atol=1e-6)


@pytest.mark.parametrize("kind", [Type(kind) for kind in LEVELS], ids=lambda kind: kind.name)
def test_ggml_decodes_what_was_promised(kind: Type) -> None:
    W, X = problem()
    rounded = round_matrix(W, damped(X.T @ X), 0 * W, of_ggml(kind))
    np.testing.assert_array_equal(dequantize(blocks(rounded, kind), kind).T, rounded.dense)


def test_a_group_of_zeros_and_inputs_that_are_never_there() -> None:
    for name, grid in GRIDS.items():
        W, X = problem()
        W[:32], X[:, 40:50] = 0, 0
        rounded = round_matrix(W, damped(X.T @ X), 0 * W, grid)
        lost = np.square(X @ (rounded.dense - W)).sum()
        assert lost < 0.5 * np.square(X @ (plainly(W, grid) - W)).sum(), name
        assert np.isfinite(rounded.dense).all() and (rounded.scales != 0).all()


# ---- whole models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and the same in 4 bits."""
    home = tmp_path_factory.mktemp("requantize")
    model, tokenizer = mq.load(write_random_model(home / "dense"))
    add_lora(model, LoraConfig(r=1))  # which changes nothing yet
    how: dict[str, Any] = {"dtype": "float32", "quantize": QuantConfig(4, 32)}
    mq.save_merged(model, tokenizer, home / "base", **how)
    return home


def rows(n: int, seed: int) -> Examples:
    """Rows of a few patterns: their tokens depend on each other."""
    draw = np.random.default_rng(seed)
    tokens = (draw.integers(0, 320, (n, 1)) + draw.integers(1, 4, (n, 1)) * np.arange(30)) % 320
    return Examples.of([Example(t.astype(np.int32), np.arange(30) > 9) for t in tokens])


def tuned(home: Path, residency: str = "resident", **config: Any) -> tuple[Any, Tokenizer]:
    model, tokenizer = mq.load(home / "base", residency=residency)
    add_lora(model, LoraConfig(r=4, **config), seed=1)
    randomise_lora(model, scale=0.03)
    return model, tokenizer


Write = Callable[[Any, Tokenizer, Path, Any], tuple[Path, Any]]


def as_mlx(quant: QuantConfig) -> Write:
    def write(model: Any, tokenizer: Tokenizer, folder: Path, rows: Any) -> tuple[Path, Any]:
        how: dict[str, Any] = {"dtype": "float32", "quantize": quant, "rows": rows}
        return folder, mq.save_merged(model, tokenizer, folder, **how).drift

    return write


def as_gguf(kind: str) -> Write:
    def write(model: Any, tokenizer: Tokenizer, folder: Path, rows: Any) -> tuple[Path, Any]:
        made = save_gguf_model(model, tokenizer, folder, "org/base", type=kind, rows=rows)
        return made.file, made.drift

    return write


FORMATS = {f"{q.bits} {q.mode}": as_mlx(q) for q in MLX if q.bits != 3}
FORMATS |= {kind: as_gguf(kind) for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_nearer_to_the_tuned_model_than_rounded_plainly(
    home: Path, tmp_path: Path, name: str
) -> None:
    model, tokenizer = tuned(home)
    held_out, tokens = rows(6, 1), random_tokens(2, 20)
    before = our_logits(model, tokens)
    place, drift = FORMATS[name](model, tokenizer, tmp_path / "out", (rows(80, 0), held_out))
    np.testing.assert_array_equal(our_logits(model, tokens), before)
    assert progress.latest["writing"].done == progress.latest["writing"].total > 0
    assert list(drift.figures) == list(VERSIONS) and drift.tokens == 6 * 20
    kl = {version: figures.kl for version, figures in drift.figures.items()}
    assert kl[ADAPTER] == 0 < kl[MERGED] < kl[WRITTEN] < kl[PLAIN]
    again, _ = mq.load(place)
    scores = mq.evaluate(again, tokenizer, held_out)
    wanted = drift.figures[WRITTEN]
    if "q" not in name:  # a GGUF's embedding and head are in 8 bits, which the verdict leaves out
        assert scores.loss == pytest.approx(wanted.loss, abs=1e-4)
        assert scores.token_accuracy == pytest.approx(wanted.token_accuracy, abs=0.01)
    else:
        assert scores.loss == pytest.approx(wanted.loss, abs=0.02)


def test_the_original_weights_are_read_as_often_as_they_are_needed(
    home: Path, tmp_path: Path
) -> None:
    model, tokenizer = tuned(home)
    how: dict[str, Any] = {"base": home / "dense", "quantize": QuantConfig(4, 32)}
    both, held_out = (rows(10, 0), rows(3, 1)), rows(3, 1)
    drift = mq.save_merged(model, tokenizer, tmp_path / "out", rows=both, **how).drift
    assert drift is not None
    again, _ = mq.load(tmp_path / "out")
    scores = mq.evaluate(again, tokenizer, held_out)
    assert scores.loss == pytest.approx(drift.figures[WRITTEN].loss, abs=0.01)


def test_of_all_rows_no_more_is_there_than_what_a_half_of_a_layer_reads(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "AT_ONCE", 90)  # tokens: three rows
    model, tokenizer = tuned(home)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    as_mlx(QuantConfig(4, 32))(model, tokenizer, tmp_path / "out", (rows(40, 0), rows(40, 1)))
    read = (2 + 5) * 40 * 30 * 4 * 64  # bytes, training rows in two versions, held-out ones in five
    assert mx.get_peak_memory() - before < 2 * read


def test_the_verdict_is_what_torch_computes(home: Path, tmp_path: Path) -> None:
    import torch
    import torch.nn.functional as F

    model, tokenizer = tuned(home)
    held_out = rows(5, 1)
    folder, drift = as_mlx(QuantConfig(4, 32))(
        model, tokenizer, tmp_path / "out", (rows(40, 0), held_out)
    )
    (batch,) = evaluation_batches(held_out)
    labels = torch.from_numpy(np.array(batch.labels)).long().flatten()
    learned = labels != IGNORE

    def logs(model: Any) -> Any:
        logits = torch.from_numpy(our_logits(model, np.array(batch.tokens))).double()
        return logits.flatten(0, 1)[learned].log_softmax(-1)

    exact, written = logs(model), logs(mq.load(folder)[0])
    with disabled(model):
        base = logs(model)
    losses = {v: F.nll_loss(x, labels[learned]).item() for v, x in ((BASE, base), (ADAPTER, exact))}
    for version, each in ((BASE, base), (ADAPTER, exact), (WRITTEN, written)):
        figures = drift.figures[version]
        kl = F.kl_div(each, exact, reduction="batchmean", log_target=True).item()
        hits = (each.argmax(-1) == labels[learned]).double().mean().item()
        assert figures.loss == pytest.approx(F.nll_loss(each, labels[learned]).item(), abs=1e-5)
        assert figures.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert figures.token_accuracy == pytest.approx(hits)
        kept = (losses[BASE] - figures.loss) / (losses[BASE] - losses[ADAPTER])
        assert np.isnan(figures.kept) or figures.kept == pytest.approx(kept, abs=1e-3)
    assert str(drift) in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::mlx_qlora.errors.StreamedWarning")
@pytest.mark.parametrize("name", ["4 affine", "q4_0"])
def test_a_streamed_base_gives_the_same_bytes(home: Path, tmp_path: Path, name: str) -> None:
    for residency in ("streamed", "resident"):
        model, tokenizer = tuned(home, residency, use_dora=name == "4 affine")
        FORMATS[name](model, tokenizer, tmp_path / residency, (rows(20, 0), rows(3, 1)))
    streamed, resident = (contents(tmp_path / residency) for residency in ("streamed", "resident"))
    assert streamed == resident


def test_embedding_head_and_what_was_not_adapted_stay_as_the_base_has_them(
    home: Path, tmp_path: Path
) -> None:
    base, tokenizer = mq.load(home / "dense", QuantConfig(8, 64))
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        linear = dict(base.named_modules())[f"model.layers.1.{path}"]
        linear.pack(linear.dense(), QuantConfig(4, 32))
    model = add_lora(base, LoraConfig(r=4, target_modules=["q_proj"]))
    randomise_lora(model)
    as_mlx(QuantConfig(4, 32))(model, tokenizer, tmp_path / "out", (rows(20, 0), None))
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    own = {"bits": 8, "group_size": 64, "mode": "affine"}
    assert said == {"bits": 4, "group_size": 32, "mode": "affine"} | {
        path: own for path in ("model.embed_tokens", "lm_head")
    }
    import mlx_lm

    again, theirs = mq.load(tmp_path / "out")[0], mlx_lm.load(str(tmp_path / "out"))[0]
    tokens = random_tokens(1, 20)
    logits = np.array(theirs(mx.array(tokens)).astype(mx.float32))
    assert np.abs(our_logits(again, tokens) - logits).max() < 1e-4
    modules = [dict(m.named_modules()) for m in (model, again)]
    for path in ("model.embed_tokens", "lm_head", "model.layers.1.mlp.down_proj"):
        old, new = (named[path].packed() for named in modules)
        assert all(mx.array_equal(a, b) for a, b in zip(old, new)), path


def test_the_command_takes_the_run_s_own_rows_or_says_why_not(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 60)
    words = ["--model", home / "base", "--data", data, "--max-steps", "2", "--quiet"]
    words += ["model.base_model_name_or_path=org/base"]
    assert call("train", *words, "--output-dir", tmp_path / "run", "--max-length", "64") == 0
    merge = ["merge", "--adapter", tmp_path / "run", "--output-dir", tmp_path / "out"]
    capsys.readouterr()
    for bits in ("4", "mxfp4"):
        assert call(*merge, "--requantize", bits) == 0
        out = capsys.readouterr().out
        assert "rounded plainly" in out and "held-out tokens" in out and "merged, 16 bits" in out
    export = ["export", "--adapter", tmp_path / "run", "--output-dir", tmp_path / "g"]
    export += ["model.base_model_name_or_path=org/base"]
    assert call(*export, "--type", "q4_1") == 0
    assert "held-out tokens" in capsys.readouterr().out
    kinds = {t.tensor_type for t in gguf.GGUFReader(tmp_path / "g" / "model-q4_1.gguf").tensors}
    assert kinds == {Type.Q4_1, Type.Q8_0, Type.F32}
    Path(data).rename(tmp_path / "moved.jsonl")
    for command in ([*merge, "--requantize", "4"], [*export, "--type", "q4_1"]):
        assert call(*command) == 0
        said = capsys.readouterr().out
        assert "held-out tokens" not in said
        assert "rounded plainly, and not measured: the run's rows cannot be read" in said
        assert call(*command, "--data", tmp_path / "moved.jsonl") == 0
        assert "held-out tokens" in capsys.readouterr().out
    assert call(*merge, "--requantize", "many") == 2
    assert "--requantize must be a number of bits, or mxfp4" in capsys.readouterr().err


def test_an_adapter_that_is_not_a_number_is_refused(home: Path, tmp_path: Path) -> None:
    model, tokenizer = tuned(home)
    model.layers[1].self_attn.o_proj.lora_B.weight *= float("nan")
    for name in ("4 affine", "q4_0"):
        with pytest.raises(mq.WeightsError, match=r"o_proj\.weight of the merged model has"):
            FORMATS[name](model, tokenizer, tmp_path / name, (rows(9, 0), None))
        assert not (tmp_path / name).exists() or not list((tmp_path / name).iterdir())
