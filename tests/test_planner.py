"""Plans made from headers alone, against what a model then really holds."""

import mlx.core as mx
import pytest
from conftest import make_hf_model, save_hf

import mlx_qlora as mq
from mlx_qlora.config import RunConfig, build
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.planner import plan, plan_checkpoint
from mlx_qlora.tree import flat


@pytest.fixture(scope="module")
def checkpoint_files(tmp_path_factory):
    model = make_hf_model(hidden_size=256, intermediate_size=512, vocab_size=2048)
    folder = save_hf(model, tmp_path_factory.mktemp("plan") / "model")
    return ModelFiles(folder, str(folder), None, str(folder))


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("frozen_matmul", ["resident", "dequantize"])
def test_base_weights_are_predicted_to_the_byte_but_for_the_norms(
    checkpoint_files, bits, frozen_matmul
):
    config = build({"model": {"bits": bits, "frozen_matmul": frozen_matmul}})
    predicted = plan_checkpoint(open_checkpoint(checkpoint_files), config)
    model = load_model(
        open_checkpoint(checkpoint_files), config.model.quantize(), mx.float32, frozen_matmul
    )
    held = sum(array.nbytes for array in flat(model.parameters()).values())
    held += sum(
        m._resident.nbytes for m in model.modules() if getattr(m, "_resident", None) is not None
    )
    promised = predicted.parts["base weights"] + predicted.parts.get("dequantised copy", 0)
    assert promised == pytest.approx(held, rel=0.01)
    assert ("dequantised copy" in predicted.parts) == (
        bits is not None and frozen_matmul == "resident"
    )


def test_llama_8b_counts_its_parameters_without_weights(checkpoint_files):
    assert plan_checkpoint(open_checkpoint(checkpoint_files), RunConfig()).trainable == 2 * 16 * (
        2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512)
    )


def test_what_does_not_fit_says_what_to_change(checkpoint_files, monkeypatch):
    from mlx_qlora import backend

    facts = backend.facts()
    monkeypatch.setattr(backend, "facts", lambda: facts | {"working_set_bytes": 10_000_000})
    config = build({"training": {"gradient_checkpointing": False}, "data": {"max_length": 512}})
    predicted = plan_checkpoint(open_checkpoint(checkpoint_files), config)
    assert not predicted.fits
    assert "Largest part: activations; lower training.per_device" in str(predicted)
    recomputed = build({"training": {"gradient_checkpointing": True}, "data": {"max_length": 512}})
    smaller = plan_checkpoint(open_checkpoint(checkpoint_files), recomputed)
    assert smaller.parts["activations"] < predicted.parts["activations"]


def test_plan_by_source_shows_every_part_and_the_total(smollm2_files):
    predicted = plan("smollm2-135m")
    shown = str(predicted)
    for part in (*predicted.parts, "predicted peak", "this machine has", "trainable parameters"):
        assert part in shown
    assert predicted.trainable == 4_884_480
    assert predicted.total_bytes == sum(predicted.parts.values())
    assert mq.plan is plan
