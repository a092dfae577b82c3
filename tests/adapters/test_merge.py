"""Merged models against transformers, PEFT and mlx-lm: same logits, same text, no harm on disk."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.adapters import largest, silence
from support.command_line import contents
from support.models import (
    LLAMA3_ROPE,
    load_folder,
    make_hf_model,
    our_logits,
    random_tokens,
    randomise_lora,
    save_hf,
    torch_logits,
)
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.adapters.drift import VERSIONS, Drift, Figures
from mlx_qlora.adapters.merge import merge, save_merged
from mlx_qlora.adapters.several import disabled
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers, trainable_count
from mlx_qlora.model.quantize import Linear, QuantConfig
from mlx_qlora.model.stored import tensors_in
from mlx_qlora.model.weights import load_model, open_checkpoint

TOKENS = random_tokens(2, 150)  # well beyond LLAMA3_ROPE's 64 original positions
CONFIGS = {
    "default": LoraConfig(r=4),
    "dora": LoraConfig(r=4, use_dora=True),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
    "dora pissa": LoraConfig(r=4, init_lora_weights="pissa", use_dora=True),
    "patterns": LoraConfig(
        r=2, rank_pattern={"q_proj": 5, r"layers\.1\.mlp\.up_proj": 3}, alpha_pattern={"o_proj": 3}
    ),
    "one layer": LoraConfig(r=4, target_modules=["k_proj", "down_proj"], layers_to_transform=[1]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny model as the hub has it: Llama 3.1 RoPE, untied."""
    return write_model(tmp_path_factory.mktemp("merge") / "model")


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> Tokenizer:
    return load_tokenizer(source)


def adapted(
    source: Path, config: LoraConfig | None = None, *, noise: float = 0.02, **how: Any
) -> LlamaForCausalLM:
    """The tiny model with an adapter that has moved from where it began."""
    model = add_lora(load_folder(source, **how), config or LoraConfig(r=4))
    draw = np.random.default_rng(3)
    layer: Any
    for _, layer in lora_layers(model):
        for factor in (layer.lora_A, layer.lora_B):
            shape = factor.weight.shape
            moved = noise * draw.standard_normal(shape).astype(np.float32)
            factor.weight = factor.weight + mx.array(moved)
        if "lora_magnitude_vector" in layer:
            stretch = 1 + noise * draw.standard_normal(layer.lora_magnitude_vector.shape)
            layer.lora_magnitude_vector *= mx.array(stretch.astype(np.float32))
    return model


def theirs(folder: Path) -> Any:
    """What transformers opens, without a word of warning."""
    from transformers import AutoModelForCausalLM

    with silence():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def mlx_lm_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    import mlx_lm

    loaded: Any = mlx_lm.load(str(folder))[0]
    return np.array(loaded(mx.array(tokens)).astype(mx.float32))


# ---- in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, QuantConfig(4, 32)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_computes_what_the_adapter_did(
    source: Path, name: str, quantize: QuantConfig | None
) -> None:
    model = adapted(source, CONFIGS[name], quantize=quantize)
    with disabled(model):
        base = our_logits(model, TOKENS)
    logits = our_logits(model, TOKENS)
    targets = [path for path, _ in lora_layers(model)]
    assert merge(model) is model
    assert largest(our_logits(model, TOKENS), logits) < 1e-4
    assert largest(base, logits) > 0.05
    assert lora_layers(model) == [] and trainable_count(model) == 0
    assert not hasattr(model, "lora_config")
    modules = dict(model.named_modules())
    for path in targets:
        assert type(modules[path]) is Linear and modules[path].quant is None
        assert modules[path].weight.dtype == mx.float32
    with pytest.raises(mq.AdapterError, match="no LoRA layers"):
        merge(model)


def test_biases_are_kept_and_the_dtype_is_the_computation_s(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", attention_bias=True, mlp_bias=True)
    model = adapted(folder, dtype=mx.bfloat16, quantize=QuantConfig(8, 32))
    up: Any = model.layers[0].mlp.up_proj
    bias = np.array(up.base_layer.bias.astype(mx.float32))
    merge(model)
    up = model.layers[0].mlp.up_proj
    assert up.weight.dtype == up.bias.dtype == mx.bfloat16 == up.dtype
    np.testing.assert_array_equal(np.array(up.bias.astype(mx.float32)), bias)


def test_without_the_adapter_is_the_base_and_afterwards_all_is_as_it_was(source: Path) -> None:
    base = our_logits(load_folder(source), TOKENS)
    for name in ("default", "dora", "pissa", "dora pissa"):
        model = adapted(source, CONFIGS[name])
        before, layers = our_logits(model, TOKENS), lora_layers(model)
        with disabled(model):
            assert largest(our_logits(model, TOKENS), base) < 2e-5
        np.testing.assert_array_equal(our_logits(model, TOKENS), before)
        assert all(new is old for (_, new), (_, old) in zip(lora_layers(model), layers))


# ---- as a folder: dense ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_mlx_lm_and_we_open_it_with_the_adapter_s_logits(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    model = adapted(source, CONFIGS[name])
    logits = our_logits(model, TOKENS)
    merged = save_merged(model, tokenizer, tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(our_logits(model, TOKENS), logits)  # it keeps its layers
    assert merged.drift is None and merged.folder == tmp_path / "out"
    assert merged.bytes == sum(map(len, contents(tmp_path / "out").values()))
    assert largest(torch_logits(theirs(tmp_path / "out"), TOKENS), logits) < 1e-4
    assert largest(mlx_lm_logits(tmp_path / "out", TOKENS), logits) < 1e-4
    again, its_tokenizer = mq.load(tmp_path / "out", dtype="float32")
    assert largest(our_logits(again, TOKENS), logits) < 1e-4
    assert its_tokenizer.encode("The fox: Zoë?") == tokenizer.encode("The fox: Zoë?")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", [None, QuantConfig(4, 32)])
def test_shards_hold_what_one_file_would(
    tokenizer: Tokenizer, tmp_path: Path, tied: bool, quantize: QuantConfig | None
) -> None:
    folder = write_model(tmp_path / "m", tie_word_embeddings=tied)
    model, most = adapted(folder), 40_000
    how: dict[str, Any] = {"dtype": "float32", "quantize": quantize}
    save_merged(model, tokenizer, tmp_path / "one", **how)
    save_merged(model, tokenizer, tmp_path / "many", max_shard_bytes=most, **how)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    n = len(files)
    assert n > 2
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)
    ]
    parts = {}
    for file in files:
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        tensors = load_file(file)
        assert sum(a.nbytes for a in tensors.values()) <= most or len(tensors) == 1
        assert {name: index["weight_map"][name] for name in tensors} == dict.fromkeys(
            tensors, file.name
        )
        parts |= tensors
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in whole.values())
    assert ("lm_head.weight" in whole) is not tied
    assert (
        json.loads((tmp_path / "many" / "config.json").read_text())["tie_word_embeddings"] is tied
    )
    logits = our_logits(mq.load(tmp_path / "one", dtype="float32")[0], TOKENS)
    assert largest(mlx_lm_logits(tmp_path / "many", TOKENS), logits) < 1e-4
    if quantize is None:
        assert (
            largest(torch_logits(theirs(tmp_path / "many"), TOKENS), our_logits(model, TOKENS))
            < 1e-4
        )


@pytest.mark.parametrize(
    "rope", [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 3e4, "factor": 4.0}, None]
)
def test_rope_is_written_in_both_spellings(
    tokenizer: Tokenizer, tmp_path: Path, rope: dict[str, Any] | None
) -> None:
    """Each spelling alone must say it all: v5's for transformers, v4's for mlx-lm and us."""
    given = rope or {"rope_type": "default", "rope_theta": 12345.0}
    folder = write_model(tmp_path / "m", rope_parameters=given)
    model = adapted(folder)
    logits = our_logits(model, TOKENS)
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["rope_parameters"] == given
    assert config["rope_theta"] == given["rope_theta"]
    scaling = {name: value for name, value in given.items() if name != "rope_theta"}
    assert config["rope_scaling"] == (scaling if rope else None)
    for dropped in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in dropped}))
        assert largest(torch_logits(theirs(tmp_path / "out"), TOKENS), logits) < 1e-4
        assert largest(our_logits(load_folder(tmp_path / "out"), TOKENS), logits) < 1e-4
        if dropped == ["rope_parameters"]:
            assert largest(mlx_lm_logits(tmp_path / "out", TOKENS), logits) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_the_rounded_merged_weights(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, dtype: str
) -> None:
    import torch

    model = adapted(source)
    save_merged(model, tokenizer, tmp_path / "out", dtype=dtype)
    save_merged(model, tokenizer, tmp_path / "exact", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == dtype
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    weights = theirs(tmp_path / "out").state_dict()
    assert weights.keys() == exact.keys()
    for name, weight in weights.items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, torch.from_numpy(exact[name]).to(weight.dtype)), name
    logits = our_logits(model, TOKENS)
    assert 0 < largest(mlx_lm_logits(tmp_path / "out", TOKENS), logits) < 0.5


def test_the_config_forgets_what_the_files_no_longer_are(
    tokenizer: Tokenizer, source: Path, tmp_path: Path
) -> None:
    """A packed copy of org/original, merged, is neither packed nor org/original."""
    packed = write_packed(source, tokenizer, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text()) | {"_name_or_path": "org/original"}
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    model = adapted(packed)
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization", "quantization_config", "_name_or_path"} & written.keys()
    assert contents(tmp_path / "out")["generation_config.json"].startswith(b'{"temperature": 0.25')
    logits = our_logits(model, TOKENS)
    assert largest(torch_logits(theirs(tmp_path / "out"), TOKENS), logits) < 1e-4


def write_packed(source: Path, tokenizer: Tokenizer, folder: Path) -> Path:
    """The tiny model as mlx-lm's own converter packs it."""
    from mlx_lm.convert import convert

    convert(str(source), str(folder), quantize=True, q_group_size=32, q_bits=4, dtype="float32")
    return folder


# ---- onto the original weights -----------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of 64 divide its columns."""
    return write_model(tmp_path_factory.mktemp("wide") / "model", intermediate_size=192)


@pytest.mark.parametrize("name", CONFIGS)
def test_base_gives_what_peft_merges_into_the_original(
    wide: Path, tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    from peft import PeftModel

    model = adapted(wide, CONFIGS[name], quantize=QuantConfig(4, 64))
    mq.save_adapter(model, tmp_path / "adapter")
    plain = make_hf_model(rope_parameters=LLAMA3_ROPE, intermediate_size=192)
    with silence():
        peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32", base=wide)
    save_merged(model, tokenizer, tmp_path / "deq", dtype="float32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {name: w.numpy() for name, w in peft.state_dict().items()}
    assert tensors.keys() == wanted.keys()
    for key, array in wanted.items():
        assert largest(tensors[key], array) < 1e-5, key
    logits = torch_logits(peft.eval(), TOKENS)
    assert largest(torch_logits(theirs(tmp_path / "out"), TOKENS), logits) < 1e-5
    assert largest(torch_logits(theirs(tmp_path / "deq"), TOKENS), logits) > 0.05


def test_a_base_that_is_not_the_original_is_refused_before_anything_is_written(
    wide: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = adapted(wide, quantize=QuantConfig(4, 64))
    packed = write_packed(wide, tokenizer, tmp_path / "packed")
    other = {
        "rope": {"intermediate_size": 192, "rope_parameters": {**LLAMA3_ROPE, "factor": 4.0}},
        "size": {"intermediate_size": 224},
        "weights": {"intermediate_size": 192, "seed": 7},
    }
    for name, changes in other.items():
        write_model(tmp_path / name, **changes)
    damaged = shutil.copytree(wide, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    for base, error, words in (
        (packed, mq.ConfigError, "is quantised, too"),
        (tmp_path / "rope", mq.WeightsError, "rope is RopeConfig"),
        (tmp_path / "size", mq.WeightsError, "intermediate_size is 224; the model's is 192"),
        (tmp_path / "weights", mq.WeightsError, "model.norm.weight has other values"),
        (damaged, mq.WeightsError, "up_proj.weight is missing"),
        (tmp_path / "none", mq.SourceError, "no such file or folder"),
    ):
        with pytest.raises(error, match=words):
            save_merged(model, tokenizer, tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()
    files = ModelFiles(wide, None, None, "wide")
    save_merged(model, tokenizer, tmp_path / "out", base=files)
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- quantised ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "quant",
    [QuantConfig(4, 32), QuantConfig(3, 32), QuantConfig(8, 32), QuantConfig(4, 32, "mxfp4")],
)
def test_quantised_it_opens_in_mlx_lm_and_here_with_equal_logits(
    tokenizer: Tokenizer, tmp_path: Path, quant: QuantConfig, tied: bool
) -> None:
    model = adapted(write_model(tmp_path / "m", tie_word_embeddings=tied))
    save_merged(model, tokenizer, tmp_path / "q", dtype="float32", quantize=quant)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    packing = {"group_size": quant.group_size, "bits": quant.bits, "mode": quant.mode}
    assert config["quantization"] == config["quantization_config"] == packing
    again = mq.load(tmp_path / "q", dtype="float32")[0]
    logits = our_logits(again, TOKENS)
    assert again.model.embed_tokens.quant == again.head.quant == quant
    assert largest(mlx_lm_logits(tmp_path / "q", TOKENS), logits) < 1e-4
    # What is written is what loading the dense export with `quantize` makes of it.
    save_merged(model, tokenizer, tmp_path / "d", dtype="float32")
    packed = mq.load(tmp_path / "d", quantize=quant, dtype="float32")[0]
    np.testing.assert_array_equal(our_logits(packed, TOKENS), logits)


def test_matrices_that_are_packed_so_already_are_copied(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = adapted(source, config, quantize=QuantConfig(4, 32))
    save_merged(model, tokenizer, tmp_path / "q", dtype="float32", quantize=QuantConfig(4, 32))
    again = load_folder(tmp_path / "q")
    for path in ("mlp.down_proj", "self_attn.q_proj"):
        old, new = (dict(m.named_modules())[f"model.layers.1.{path}"] for m in (model, again))
        old = getattr(old, "base_layer", None) or old
        same = [bool(mx.array_equal(a, b)) for a, b in zip(old.packed(), new.packed())]
        assert all(same) if path == "mlp.down_proj" else not any(same)


def test_the_verdict_says_what_was_lost() -> None:
    def drift(kept: float) -> Drift:
        figures = {v: Figures(2.0, 0.5, 0.1, kept) for v in VERSIONS}
        return Drift(figures, 600, "4 bits")

    lost = "rounding to 4 bits lost 34% of what was learned; take more bits"
    for kept, words in (
        (0.66, lost),
        (0.97, "keep 97%"),
        (-0.2, "lost all of what was learned"),
        (float("nan"), "gains nothing"),
    ):
        assert words in str(drift(kept))


def test_without_rows_nothing_is_measured(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = adapted(source, quantize=QuantConfig(4, 32))
    merged = save_merged(model, tokenizer, tmp_path / "q", quantize=QuantConfig(4, 32))
    assert merged.drift is None


# ---- what happens to the disk ------------------------------------------------------------------


def test_an_older_export_makes_way_as_a_whole(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, out, fresh = adapted(source), tmp_path / "out", tmp_path / "fresh"
    out.mkdir()  # empty: it may be used
    save_merged(model, tokenizer, out, max_shard_bytes=50_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    (out / ".DS_Store").write_bytes(b"left by a file browser")
    save_merged(model, tokenizer, out)
    save_merged(model, tokenizer, fresh)
    assert contents(out) == contents(fresh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]
    link = tmp_path / "link"
    link.symlink_to(out)
    save_merged(model, tokenizer, link, dtype="float32")
    assert (
        link.is_symlink()
        and largest(our_logits(load_folder(out), TOKENS), our_logits(model, TOKENS)) < 1e-4
    )


def test_a_write_that_fails_leaves_everything_as_it_was(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = adapted(source)
    save_merged(model, tokenizer, tmp_path / "out")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in ("out", "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                save_merged(model, tokenizer, tmp_path / target, dtype="float32")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert contents(tmp_path) == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bytes_that_read_back_otherwise_are_found(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that flips a bit between write and read."""

    def flip(path: Path, error: type[Exception]) -> dict[str, Any]:
        with path.open("r+b") as file:
            file.seek(-1000, 2)
            byte = file.read(1)[0]
            file.seek(-1000, 2)
            file.write(bytes([byte ^ 1]))
        return tensors_in(path, error)

    monkeypatch.setattr("mlx_qlora.adapters.merge.tensors_in", flip)
    with pytest.raises(mq.WeightsError, match=r"what was read back of .* is not what was written"):
        save_merged(adapted(source), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_refused_and_untouched(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = adapted(source)
    own = shutil.copytree(source, tmp_path / "own")
    save_merged(model, tokenizer, tmp_path / "extra")
    (tmp_path / "extra" / "model.gguf").write_text("converted for hours")
    mq.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "file").write_text("text")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("about mlx-qlora")
    before = contents(tmp_path)
    trained = adapted(own)
    for target, using, words in (
        ("own", model, r"config\.json \(and \d+ more\) is not known to be"),
        ("extra", model, r"model\.gguf is not known to be from mlx-qlora and would be deleted"),
        ("adapter", model, r"adapter/README\.md \(and 4 more\)"),
        ("notes", model, "choose another folder with output_dir"),
        ("file", model, "is a file"),
        ("own", trained, "holds the weights that are read"),
    ):
        with pytest.raises(mq.ConfigError, match=words) as caught:
            save_merged(using, tokenizer, tmp_path / target)
        assert str(tmp_path / target) in str(caught.value)
        assert contents(tmp_path) == before
    with pytest.raises(mq.ConfigError, match="holds the weights that are read"):
        save_merged(model, tokenizer, own, base=own)


def test_wrong_requests_are_refused_before_anything_is_written(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(source)
    nan, huge = adapted(source), adapted(source)
    lora_layers(nan)[3][1].lora_B.weight *= float("nan")
    lora_layers(huge)[3][1].lora_B.weight *= 1e9
    requests: tuple[tuple[Any, dict[str, Any], type[Exception], str], ...] = (
        (load_folder(source), {}, mq.AdapterError, "no LoRA layers"),
        (
            model,
            {"dtype": "int8"},
            mq.ConfigError,
            "dtype must be one of bfloat16, float16, float32",
        ),
        (model, {"max_shard_bytes": 0}, mq.ConfigError, "max_shard_bytes must be at least 1"),
        (model, {"quantize": QuantConfig(4, 128)}, mq.ConfigError, "128 does not divide the 64"),
        (nan, {}, mq.WeightsError, "o_proj.weight of the merged model has numbers"),
        (nan, {"quantize": QuantConfig(4, 32, "mxfp4")}, mq.WeightsError, "or NaN"),
        (huge, {"dtype": "float16"}, mq.WeightsError, "float16 cannot hold"),
    )
    for using, how, error, words in requests:
        with pytest.raises(error, match=words):
            save_merged(using, tokenizer, tmp_path / "out", **how)
        assert list(tmp_path.iterdir()) == []

    dense = sum(a.nbytes for a in load_file(source / "model.safetensors").values())

    class Usage:
        free = dense - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage)
    with pytest.raises(
        mq.ConfigError, match=rf"needs {dense:,} bytes, and .* has {dense - 1:,} free"
    ):
        save_merged(model, tokenizer, tmp_path / "a" / "b", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_no_second_dense_copy_is_made(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    deep = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
    save_hf(make_hf_model(**deep), folder)
    one_matrix, dense = 512 * 256 * 4, (folder / "model.safetensors").stat().st_size
    ways: list[dict[str, Any]] = [{}, {"base": folder}, {"quantize": QuantConfig(8, 64)}]
    for how in ways:
        model = adapted(folder, quantize=QuantConfig(4, 64), matmul="dequantize")
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        save_merged(model, tokenizer, tmp_path / "out", dtype="float32", **how)
        assert mx.get_peak_memory() - held < 8 * one_matrix < dense / 1.5


# ---- the real model ----------------------------------------------------------------------------


def test_smollm2_s_text_is_the_same_everywhere(short_files: ModelFiles, tmp_path: Path) -> None:
    import mlx_lm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = open_checkpoint(short_files)
    tokenizer = load_tokenizer(short_files.path, checkpoint.metadata)
    model = add_lora(load_model(checkpoint, None, mx.float32, "resident"), LoraConfig(r=8))
    randomise_lora(model, scale=0.1)
    prompt, folder = "The lighthouse stands", tmp_path / "out"
    tokens = np.array([tokenizer.encode(prompt)])
    logits = our_logits(model, tokens)
    greedy = {"max_new_tokens": 16, "temperature": 0.0, "repetition_penalty": 1.0}
    text = mq.generate(model, tokenizer, prompt, **greedy)
    with disabled(model):
        assert mq.generate(model, tokenizer, prompt, **greedy) != text

    save_merged(model, tokenizer, folder, dtype="float32", max_shard_bytes=200_000_000)
    del model
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == ([2, 0], True)
    again, its_tokenizer = mq.load(folder, dtype="float32")
    assert largest(our_logits(again, tokens), logits) < 1e-4
    assert mq.generate(again, its_tokenizer, prompt, **greedy) == text
    del again
    with silence():
        torch_model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch_tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = torch_tokenizer(prompt, return_tensors="pt")
        made = torch_model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert torch_tokenizer.decode(made[0, tokens.size :], skip_special_tokens=True) == text
    assert largest(torch_logits(torch_model, tokens), logits) < 5e-4  # torch's own error is 1e-4
    del torch_model
    loaded, wrapper = mlx_lm.load(str(folder))[:2]
    # mlx-lm drops the space that a text begins with.
    assert mlx_lm.generate(loaded, wrapper, prompt, max_tokens=16) == text.removeprefix(" ")


def test_a_merged_gguf_base_keeps_its_ids_of_ends_and_padding(
    short_files: ModelFiles, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(short_files)
    tokenizer = load_tokenizer(short_files.path, checkpoint.metadata)
    model = add_lora(load_model(checkpoint, None, mx.float32, "resident"), LoraConfig(r=2))
    save_merged(model, tokenizer, tmp_path / "out")
    ids = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids


@pytest.mark.parametrize(("pad", "wanted"), [("<|eos|>", 1), ("no token", None), (None, None)])
def test_a_padding_token_that_the_embedding_lacks_is_not_written(
    tmp_path: Path, pad: str | None, wanted: int | None
) -> None:
    base = write_model(tmp_path / "model")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": pad}))
    model, tokenizer = mq.load(base)
    mq.save_merged(mq.add_lora(model, LoraConfig(r=2)), tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("pad_token_id") == wanted
