"""A streamed base against one in memory: the same bits, little memory, and files that change."""

import copy
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from support.command_line import contents
from support.models import TINY, our_logits, quantise_with_mlx_lm, random_tokens, randomise_lora
from support.streamed import PACKED, in_memory, load_as, matrices, settings, train, weights_of
from support.tiny_folder import write_random_model, write_rows
from support.tiny_gguf import write_tiny_gguf
from support.training import at_step, make_examples, stop

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.adapters.several import disabled
from mlx_qlora.cli import main
from mlx_qlora.commands import open_with_plan
from mlx_qlora.config import build
from mlx_qlora.data.batches import Batch, make_batches
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.device import CPU, METAL
from mlx_qlora.errors import ConfigError, StreamedWarning, UserError, WeightsError
from mlx_qlora.model import streaming
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.engine import Engine, loss_and_grads
from mlx_qlora.train.memory import LAYER, NOTHING, Footprint
from mlx_qlora.train.score import score_rows
from mlx_qlora.tree import flat

DEVICES = {"cpu": CPU, "metal": dataclasses.replace(METAL, dtype="float32")}
LORAS = {
    "lora": LoraConfig(r=4, lora_dropout=0.1),
    "rslora": LoraConfig(r=4, use_rslora=True, layers_to_transform=[1]),
    "dora": LoraConfig(r=4, use_dora=True, lora_dropout=0.1),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense folder, one that mlx-lm has quantised, and a GGUF file."""
    home = tmp_path_factory.mktemp("sources")
    dense = write_random_model(home / "dense")
    quantise_with_mlx_lm(dense, home / "mlx", {"bits": 4, "group_size": 32})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dense / name, home / "mlx" / name)
    return {"dense": dense, "mlx": home / "mlx", "gguf": write_tiny_gguf(home / "tiny.gguf")}


def batch() -> Batch:
    return next(iter(make_batches(make_examples(), batch_size=6, seed=0)))


def computed(residency: str, path: Path, lora: LoraConfig, **how: Any) -> dict[str, Any]:
    """Loss and gradients, logits and scores of a model with an adapter that does something."""
    model = load_as(residency, path, lora=lora, **how)
    randomise_lora(model)
    found: dict[str, Any] = {"logits": our_logits(model, random_tokens(2, 9))}
    for recompute in ("none", "all"):
        loss, _, grads = loss_and_grads(model, batch(), mx.random.key(3), recompute)
        found |= {f"{recompute} {name}": np.array(g) for name, g in flat(grads).items()}
        found[f"{recompute} loss"] = np.array(loss)
    engine = Engine(model, kl_weight=0.5)
    randomise_lora(model, seed=2)
    weights = flat(model.trainable_parameters())
    sums, _, grads = engine(weights, batch(), mx.random.key(3))
    found |= {"sums": np.array(sums)} | {f"kl {name}": np.array(g) for name, g in grads.items()}
    scores = score_rows(model, batch(), partial(disabled, model))
    return found | {"nats": scores.nats, "hits": scores.hits, "kl": scores.kl}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["dense", "mlx", "gguf"])
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("matmul", ["dequantize", "quantized"])
def test_a_streamed_base_gives_the_bits_of_a_resident_one(
    sources: dict[str, Path], source: str, kind: str, matmul: str
) -> None:
    lora = LORAS["lora"] if source != "gguf" else LoraConfig(r=4)
    with device.use(DEVICES[kind]):
        found, expected = (
            computed(residency, sources[source], lora, matmul=matmul)
            for residency in ("streamed", "resident")
        )
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["rslora", "dora"])
@pytest.mark.parametrize("quantize", [PACKED, None])
def test_every_kind_of_lora_is_streamed(sources: dict[str, Path], name: str, quantize: Any) -> None:
    found, expected = (
        computed(residency, sources["dense"], LORAS[name], quantize=quantize)
        for residency in ("streamed", "resident")
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_an_adapter_begins_with_the_original_weights(sources: dict[str, Path], init: str) -> None:
    lora = LoraConfig(r=4, init_lora_weights=init)
    found, expected = (
        computed(residency, sources["dense"], lora) for residency in ("streamed", "resident")
    )
    assert_equal(found, expected)


def test_a_part_that_is_taken_off_dense_weights_is_refused(sources: dict[str, Path]) -> None:
    model = load_as("streamed", sources["dense"], None)
    with pytest.raises(ConfigError, match=r"model\.residency=resident"):
        add_lora(model, LoraConfig(r=4, init_lora_weights="pissa"))


def test_texts_are_generated_alike(sources: dict[str, Path]) -> None:
    texts = []
    for residency in ("streamed", "resident"):
        how: dict[str, Any] = {"frozen_matmul": "dequantize", "residency": residency}
        model, tokenizer = loaded(sources["mlx"], **how)
        texts.append(mq.generate(model, tokenizer, "the quick", max_new_tokens=8, seed=5))
        prompts = ["the quick", "Name a colour."]
        texts[-1] += repr(mq.generate_batch(model, tokenizer, prompts, max_new_tokens=6, seed=5))
    assert texts[0] == texts[1]


def loaded(path: Path, **how: Any) -> Any:
    """What `mq.load` returns; that a streamed model generates slowly is said."""
    if how.get("residency") != "streamed":
        return mq.load(path, **how)
    with pytest.warns(StreamedWarning, match="every generated token"):
        return mq.load(path, **how)


def test_a_copy_of_a_streamed_model_is_streamed(sources: dict[str, Path]) -> None:
    model = load_as("streamed", sources["mlx"], lora=LORAS["lora"])
    tokens = random_tokens(2, 9)
    assert np.array_equal(our_logits(copy.deepcopy(model), tokens), our_logits(model, tokens))
    assert in_memory(model) == 0


# ---- what is in memory ---------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    peaks = {}
    for layers in (4, 16):
        folder = write_random_model(tmp_path / str(layers), num_hidden_layers=layers)
        model = load_as("streamed", folder, None, lora=LoraConfig(r=1, target_modules=["q_proj"]))
        weights = flat(model.trainable_parameters())
        engine = Engine(model, "all", compiled=False)
        mx.eval(engine(weights, batch())[2])  # what is made once
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loss, _, grads = engine(weights, batch())
        mx.eval(loss, grads)
        inputs = int(batch().tokens.size) * TINY["hidden_size"] * 4 * layers
        peaks[layers] = mx.get_peak_memory() - before - inputs
    of_layer = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192)
    assert peaks[16] - peaks[4] < of_layer, "12 more layers took more than one of them"


def test_a_layer_is_in_memory_while_it_is_computed(sources: dict[str, Path]) -> None:
    model = load_as("streamed", sources["mlx"])
    reader, layers = model.model.reader, model.layers
    assert reader is not None and in_memory(model) == 0
    with reader.layer(1):
        reader.ahead(0)
        assert in_memory(layers[1]) == in_memory(model) > 0
    assert in_memory(model) == 0
    reader.ahead(7)  # there is none
    assert reader.resident_bytes == streaming.streamed_bytes(layers[0]) * 2
    assert flat(model.trainable_parameters()) == {}


def test_a_schedule_recomputes_before_it_reads_the_base_more_often() -> None:
    config = dataclasses.replace(load_config(), num_hidden_layers=32)
    lengths, machine = [2048] * 16, device.machine("m1-16")
    resident, streamed = (
        Footprint(config, lengths, 2, machine, streamed=streamed).schedule("auto", 8e9)
        for streamed in (False, True)
    )
    assert resident.n_chunks > streamed.n_chunks
    assert {*streamed.levels} - {NOTHING} and streamed.levels.count(LAYER) >= 0
    plenty = [
        Footprint(config, lengths, 2, machine, streamed=streamed).schedule("auto", 1e15)
        for streamed in (False, True)
    ]
    assert plenty[0] == plenty[1]


def load_config() -> Any:
    from mlx_qlora.model.llama import LlamaConfig

    return LlamaConfig(4096, 32, 32, 8, 128, 14336, 128256)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


@pytest.mark.filterwarnings("ignore::mlx_qlora.errors.StreamedWarning")
def test_runs_leave_the_same_bytes_and_go_on_from_either(
    sources: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    for residency in ("resident", "streamed"):
        train(sources["dense"], rows, tmp_path / residency, residency)
    with at_step(2, stop), pytest.raises(KeyboardInterrupt):
        train(sources["dense"], rows, tmp_path / "stopped", "streamed")
    train(sources["dense"], rows, tmp_path / "stopped", "resident", resume_from_checkpoint="auto")
    expected = weights_of(tmp_path / "resident")
    assert expected
    assert weights_of(tmp_path / "streamed") == expected
    assert weights_of(tmp_path / "stopped") == expected


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, change, os.remove])
def test_a_file_that_changes_during_a_run_is_one_clear_error(
    sources: dict[str, Path], rows: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    source = Path(shutil.copytree(sources["mlx"], tmp_path / "model"))
    file, whole = source / "model.safetensors", tmp_path / "whole"
    train(source, rows, whole, "streamed")
    shutil.copyfile(sources["mlx"] / file.name, kept := tmp_path / "kept")
    with at_step(2, lambda _: damage(file)):
        with pytest.raises(
            WeightsError, match=r"model\.safetensors cannot be read any more: "
        ) as e:
            train(source, rows, tmp_path / "out", "streamed", eval_steps=4)
    assert "restore the file" in str(e.value)
    file.unlink(missing_ok=True)
    shutil.copyfile(kept, file)
    more = {"resume_from_checkpoint": "auto"}
    train(source, rows, tmp_path / "out", "streamed", eval_steps=4, **more)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_auto_streams_what_would_not_fit(
    sources: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(n_bytes: int) -> tuple[Any, Any, str]:
        monkeypatch.setattr(device, "_chip_and_working_set", lambda: ("chip", n_bytes))
        console = Console(file=io.StringIO(), width=300)
        values = settings(sources["mlx"], rows, tmp_path / "out", "auto")
        values["model"]["frozen_matmul"] = "resident"
        return *open_with_plan(build(values), console), console.file.getvalue()  # pyright: ignore

    inputs, plan, said = opened(1 << 30)
    assert (inputs.config.model.residency, plan.residency) == ("auto", "resident")
    assert "streamed  weights from the disk" not in said and inputs.load().model.reader is None
    inputs, plan, said = opened(plan.parts["base weights"] + plan.parts["dequantised copy"])
    assert inputs.config.model.residency == plan.residency == "streamed"
    assert "would not fit" in said and "two layers in memory" in said
    assert inputs.load().model.reader is not None


def test_auto_of_load_streams_what_fills_the_memory(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mq.load(sources["mlx"])[0].model.reader is None
    monkeypatch.setattr(device, "_chip_and_working_set", lambda: ("chip", 50_000))
    with pytest.warns(StreamedWarning):
        assert mq.load(sources["mlx"])[0].model.reader is not None


def test_a_dense_copy_of_streamed_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.frozen_matmul=resident"):
        build({"model": {"residency": "streamed", "frozen_matmul": "resident"}})


# ---- the packed copy -----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of copies of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlx-qlora" / "weights"


def test_a_copy_is_made_once_for_each_packing(sources: dict[str, Path], cache: Path) -> None:
    def copies() -> dict[Path, int]:
        return {path.parent: path.stat().st_mtime_ns for path in cache.glob("*/about.json")}

    def n_bytes(copy: Path) -> int:
        return sum(x.nbytes for f in copy.glob("*.safetensors") for x in load_file(f).values())

    load_as("streamed", sources["mlx"])
    load_as("streamed", sources["dense"], None)
    assert not copies(), "files that can be streamed were copied"
    model = load_as("streamed", sources["dense"])
    (first,) = copies().items()
    assert n_bytes(first[0]) == streaming.streamed_bytes(model)
    load_as("streamed", sources["dense"])
    assert [*copies().items()] == [first]
    load_as("streamed", sources["dense"], mq.QuantConfig(8, 32))
    assert len(copies()) == 2
    for damage in (truncate, os.remove):
        damage(next(first[0].glob("*.safetensors")))
        load_as("streamed", sources["dense"])
        assert n_bytes(first[0]) == streaming.streamed_bytes(model)


def test_a_copy_that_cannot_be_finished_is_none(
    sources: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, n = streaming.PackedCopy.take, 0

    def interrupted(copy: Any, path: str, matrix: Any) -> None:
        nonlocal n
        n += 1
        if n == 5:
            raise KeyboardInterrupt
        take(copy, path, matrix)

    monkeypatch.setattr(streaming.PackedCopy, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_as("streamed", sources["dense"])
    assert not [*cache.iterdir()]
    assert matrices(load_as("streamed", sources["dense"]))[0].is_away


def test_a_copy_needs_room_on_the_disk(
    sources: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"needs a packed copy of .* mlx-qlora cache --clear"):
        load_as("streamed", sources["dense"])
    cache.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(cache)
    cache.write_text("a file")
    with pytest.raises(UserError, match="cannot be written to"):
        load_as("streamed", sources["dense"])


def test_the_command_lists_and_clears_what_is_kept(
    sources: dict[str, Path], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_as("streamed", sources["dense"])
    (copy,) = cache.iterdir()
    rows = write_rows(cache.parents[1] / "rows.jsonl", 3)
    mq.read_examples(rows, load_tokenizer(sources["dense"]))
    assert main(["cache", "--json"]) == 0
    tokens, entry = json.loads(capsys.readouterr().out)["entries"]
    assert (tokens["kind"], tokens["of"]) == ("tokens", str(rows))
    assert (entry["kind"], entry["folder"]) == ("weights", str(copy))
    assert entry["of"] == str(sources["dense"]) and entry["bytes"] > 50_000
    assert main(["cache", "--clear"]) == 0
    assert "removed from" in capsys.readouterr().out and not copy.exists()
    assert main(["cache"]) == 0


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore::mlx_qlora.errors.StreamedWarning")
def test_a_streamed_model_merges_to_the_same_bytes(
    sources: dict[str, Path], tmp_path: Path, bits: int | None, name: str
) -> None:
    quantize = None if bits is None else mq.QuantConfig(bits, 32)
    for residency in ("streamed", "resident"):
        how: Any = {"frozen_matmul": "dequantize", "residency": residency}
        model, tokenizer = mq.load(sources["mlx"], **how)
        add_lora(model, LORAS[name], seed=1)
        randomise_lora(model)
        mq.save_merged(model, tokenizer, tmp_path / residency, quantize=quantize)
        assert residency == "resident" or in_memory(model) == 0
    streamed, resident = (contents(tmp_path / residency) for residency in ("streamed", "resident"))
    assert streamed == resident


def test_merging_takes_one_tensor_in_memory(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 12):
        folder = write_random_model(tmp_path / str(layers), num_hidden_layers=layers)
        model = load_as("streamed", folder, None, lora=LoraConfig(r=1, target_modules=["q_proj"]))
        tokenizer = load_tokenizer(folder)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mq.save_merged(model, tokenizer, tmp_path / f"merged {layers}", dtype="float32")
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] - peaks[0] < 64 * 192 * 4
