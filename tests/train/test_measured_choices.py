"""What `doctor --tune` measured decides what `auto` means; a run keeps to its own choice."""

import dataclasses
import json

import pytest
from support.tiny_folder import write_random_model, write_rows
from support.training import fine_tune, recorded, without_clocks

import mlx_qlora as mq
from mlx_qlora import device, measured
from mlx_qlora.cli import main
from mlx_qlora.config import read_yaml
from mlx_qlora.errors import TrainingError
from mlx_qlora.folders import user_cache
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.quantize import QuantConfig

QUICK = ["data.split=[1, 0, 0]", "data.cache_dir=null", "logging.logging_steps=1", "lora.r=2"]
QUICK += ["--batch-size", "4", "--max-length", "64", "checkpointing.save_steps=2"]
FOUR_BITS = QuantConfig()
FASTER_PACKED = {"quantized": 1.0, "dequantize": 2.0, "resident": 1.5}


@pytest.fixture(autouse=True)
def own_file(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_rows(folder / "rows.jsonl", 24)
    return write_random_model(folder / "model").parent


def key(folder, quant=FOUR_BITS):
    config = json.loads((folder / "model" / "config.json").read_text())
    return measured.key_of(LlamaConfig.from_hf(config), quant)


def store(folder, seconds, quant=FOUR_BITS):
    return measured.store(key(folder, quant), {device.current().dtype: seconds})


def train(base, out, *words):
    source = ["--model", str(base / "model"), "--data", str(base / "rows.jsonl")]
    return main(["train", *source, *QUICK, "--output-dir", str(out), *words])


def chosen(out):
    model = read_yaml(str(out / "run.yaml"))["model"]
    return model["dtype"], model["frozen_matmul"]


# ---- the file


def test_what_is_stored_is_found_again_beside_other_layers(base):
    path = store(base, FASTER_PACKED)
    assert path == user_cache() / "machine.json"
    store(base, {"resident": 1.0}, QuantConfig(8, 32))
    layers = measured.stored()
    assert layers[key(base)] == {"float32": FASTER_PACKED} and len(layers) == 2
    words = device.facts()["chip"], device.facts()["mlx"], "64 x 192", "4/2 heads of 16"
    assert all(word in key(base) for word in words)


@pytest.mark.parametrize(
    ("seconds", "way", "why"),
    [
        ({"quantized": 1.0, "resident": 1.5}, "quantized", "1.50 times as fast here as resident"),
        ({"quantized": 0.99, "resident": 1.0}, "resident", "no other was faster here"),
        ({"dequantize": 2.0, "resident": 1.0}, "resident", "no other was faster here"),
        ({"sideways": 0.1, "resident": 1.0}, "resident", "no other was faster here"),
    ],
)
def test_the_fastest_way_is_taken_if_it_is_faster_than_noise(base, seconds, way, why):
    store(base, seconds)
    assert measured.fastest(key(base), 1000) == ("float32", way, why)


def test_a_copy_that_does_not_fit_is_not_chosen(base):
    store(base, {"dequantize": 1.0, "resident": 0.1})
    assert measured.fastest(key(base), 1 << 50) == (
        "float32",
        "dequantize",
        "no other was faster here",
    )


def test_other_layers_dtypes_and_devices_have_no_say(base, use_device):
    store(base, {"quantized": 1.0})  # the table's own way was not measured
    assert measured.fastest(key(base), 1000) is None
    store(base, FASTER_PACKED)
    assert measured.fastest(key(base, QuantConfig(8)), 1000) is None
    use_device(dataclasses.replace(device.CPU, dtype="bfloat16"))
    assert measured.fastest(key(base), 1000) is None
    measured.store(key(base), {"float16": {"quantized": 1e-9, "resident": 1e-9}})
    assert measured.fastest(key(base), 1000) is None  # float16 is measured and never chosen


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"layers": 3}',
        '{"layers": {"a": []}}',
        '{"layers": {"a": {"float32": {"resident": "fast"}}}}',
        '{"layers": {"a": {"float32": {"resident": -1.0}}}}',
        "[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_a_file_that_is_not_ours_is_ignored_with_a_warning(base, tmp_path, text):
    path = user_cache() / "machine.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="machine.json is damaged, and ignored"):
        assert measured.fastest(key(base), 1000) is None
    with pytest.warns(UserWarning, match="ignored"):
        store(base, FASTER_PACKED)
    assert measured.stored() == {key(base): {"float32": FASTER_PACKED}}


def test_a_folder_that_cannot_be_made_is_an_error_of_the_user(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TrainingError, match="mlx-qlora"):
        store(base, {"resident": 1.0})


# ---- a run


def test_a_cache_whose_path_is_longer_than_any_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("x" * 300)))
    assert measured.stored() == {}


def test_without_a_file_auto_stays_auto(base, tmp_path, capsys):
    assert train(base, tmp_path / "out", "--max-steps", "2") == 0
    assert chosen(tmp_path / "out") == ("auto", "auto")
    assert "measured" not in capsys.readouterr().out


def test_a_run_says_and_records_its_choice_and_repeats_it(base, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    store(base, FASTER_PACKED)
    words = ["--max-steps", "4"]
    assert train(base, whole, *words) == 0 and chosen(whole) == ("float32", "quantized")
    said = "measured  model.dtype=float32, model.frozen_matmul=quantized: 1.50 times as fast here"
    assert said in capsys.readouterr().out
    assert train(base, out, *words) == 0
    for folder in out.glob("checkpoint-4"):  # as if it had been killed after step 2
        folder.rename(tmp_path / "gone")
    (user_cache() / "machine.json").unlink()
    store(base, {"quantized": 9.0, "resident": 1.0})
    assert train(base, out, *words) == 0 and chosen(out) == ("float32", "quantized")
    assert "measured  " not in capsys.readouterr().out.rpartition("split ")[2]
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert without_clocks(recorded(out)) == without_clocks(recorded(whole))


def test_a_run_that_began_without_a_file_goes_on_without_it(base, tmp_path):
    out = tmp_path / "out"
    assert train(base, out, "--max-steps", "4") == 0
    (out / "checkpoint-4").rename(tmp_path / "gone")
    store(base, FASTER_PACKED)
    assert train(base, out, "--max-steps", "4") == 0 and chosen(out) == ("auto", "auto")
    again = ["checkpointing.resume_from_checkpoint=none", "--max-steps", "2"]
    assert train(base, out, *again) == 0 and chosen(out) == ("float32", "quantized")


@pytest.mark.parametrize(
    "words", [["model.frozen_matmul=dequantize"], ["model.dtype=bfloat16"], ["model.bits=null"]]
)
def test_what_somebody_set_is_not_overruled(base, tmp_path, words, capsys):
    store(base, FASTER_PACKED)
    assert train(base, tmp_path / "out", "--max-steps", "1", *words) == 0
    assert "measured" not in capsys.readouterr().out
    assert "quantized" not in chosen(tmp_path / "out")


def test_a_notebooks_model_is_multiplied_with_as_measured(base, tmp_path):
    """`load` knows nothing of it; `fine_tune` changes the way and records it."""
    store(base, FASTER_PACKED)
    out = tmp_path / "out"
    dense = fine_tune(base / "model", tmp_path / "dense", max_steps=2)
    assert "measured" not in dense.printed  # nothing is packed
    model, tokenizer = mq.load(base / "model", mq.QuantConfig())
    rows = mq.read_examples(base / "rows.jsonl", tokenizer, mq.DataConfig(max_length=64))
    way = model.layers[0].mlp.down_proj
    assert way.matmul == "resident" and way.resident_bytes
    config = mq.RunConfig(
        training=mq.TrainingConfig(max_steps=2),
        checkpointing=mq.CheckpointingConfig(output_dir=str(out)),
    )
    mq.fine_tune(model, tokenizer, rows, config=config)
    assert (way.matmul, way.resident_bytes) == ("quantized", 0)
    assert chosen(out)[1] == "quantized"
