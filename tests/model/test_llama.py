"""The Llama tree against transformers' LlamaForCausalLM on the same weights, in float32."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.families import write_family
from support.models import (
    LLAMA3_ROPE,
    TINY,
    load_folder,
    make_hf_model,
    our_logits,
    random_tokens,
    save_hf,
    torch_logits,
)

from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import QuantConfig

SIZES = {  # name -> what differs from TINY
    "llama 3.1 rope": {"rope_parameters": LLAMA3_ROPE},
    "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads as heads": {"num_key_value_heads": 4},
    "tied head": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "head_dim 24": {"head_dim": 24},
    "sizes that no power of two divides": {
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 52,
        "vocab_size": 101,
    },
    "norm epsilon 1e-3": {"rms_norm_eps": 1e-3},
}


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 1e-4, both absolutely and relative to how much the logits vary."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3  # or 1e-4 would prove little
    worst = np.abs(ours - theirs).max()
    assert worst <= 1e-4 and worst <= 1e-4 * theirs.std(), worst


def assert_equals_transformers(folder: Path, oracle: Any, B: int = 2, T: int = 37) -> None:
    tokens = random_tokens(B, T, oracle.config.vocab_size)
    theirs = torch_logits(oracle, tokens)
    assert_same_logits(our_logits(load_folder(folder), tokens), theirs)


# ---- logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = make_hf_model(**SIZES[name])
    assert_equals_transformers(save_hf(oracle, tmp_path), oracle)


@pytest.mark.parametrize("T", [1, 2, 8, 9, 37, 300])
def test_logits_equal_transformers_at_every_length(T: int, hf_tiny: tuple[Any, Path]) -> None:
    oracle, folder = hf_tiny
    assert_equals_transformers(folder, oracle, T=T)


@pytest.mark.parametrize(
    "rope", [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}]
)
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_logits_equal_transformers_with_the_v4_spelling(
    rope: dict[str, Any], type_key: str, tmp_path: Path
) -> None:
    oracle = make_hf_model(rope_parameters=rope)
    path = save_hf(oracle, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling[type_key] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling
    path.write_text(json.dumps(config))
    assert_equals_transformers(tmp_path, oracle, T=300)


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 10000.0}, {"factor": 4.0}, {"original_max_position_embeddings": 8192}],
)
def test_a_wrong_rope_parameter_shows_in_the_logits(
    change: dict[str, Any], hf_tiny: tuple[Any, Path], tmp_path: Path
) -> None:
    """The comparisons above have the power to see one."""
    oracle, folder = hf_tiny
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    tokens = random_tokens(2, 300)
    difference = our_logits(load_folder(tmp_path), tokens) - torch_logits(oracle, tokens)
    assert np.abs(difference).max() > 1e-2


def test_a_sharded_folder_gives_the_same_logits(hf_tiny: tuple[Any, Path], tmp_path: Path) -> None:
    oracle, _ = hf_tiny
    save_hf(oracle, tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    assert_equals_transformers(tmp_path, oracle)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_files_compute_in_float32(dtype: str, tmp_path: Path) -> None:
    import torch

    oracle = make_hf_model(rope_parameters=LLAMA3_ROPE)
    with torch.no_grad():  # not `oracle.to(dtype).float()`, which rounds the RoPE table too
        for weight in oracle.parameters():
            weight.copy_(weight.to(getattr(torch, dtype)))
    save_hf(copy.deepcopy(oracle).to(getattr(torch, dtype)), tmp_path)
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert weights["lm_head.weight"].dtype == getattr(mx, dtype)
    assert_equals_transformers(tmp_path, oracle)


# ---- the cache of keys and values --------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(hf_tiny: tuple[Any, Path]) -> LlamaForCausalLM:
    return load_folder(hf_tiny[1])


def cached_logits(
    model: LlamaForCausalLM, tokens: np.ndarray, pieces: list[int], cache: list[Any]
) -> np.ndarray:
    """Logits of `tokens` fed in pieces of the given lengths."""
    starts = np.cumsum([0, *pieces])
    parts = [
        np.array(model(mx.array(tokens[:, a:b]), cache=cache))
        for a, b in itertools.pairwise(starts)
    ]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "pieces", [[1] * 24, [12] + [1] * 12, [3, 1, 8, 12], [20, 4]], ids=lambda p: f"{len(p)} pieces"
)
def test_the_cache_gives_the_logits_of_the_full_forward(
    pieces: list[int], tiny: LlamaForCausalLM
) -> None:
    tokens = random_tokens(2, 24)
    stepwise = cached_logits(tiny, tokens, pieces, tiny.make_cache())
    assert_same_logits(stepwise, our_logits(tiny, tokens))


def test_mlx_lms_quantised_cache_gives_nearly_the_same_logits(tmp_path: Path) -> None:
    folder = save_hf(make_hf_model(head_dim=32), tmp_path)  # 32 is the smallest group there is
    model, tokens = load_folder(folder), random_tokens(2, 24)
    full = our_logits(model, tokens)
    cache = model.make_cache()
    head = cached_logits(model, tokens[:, :12], [12], cache)
    cache = [layer.to_quantized(group_size=32, bits=8) for layer in cache]
    tail = cached_logits(model, tokens[:, 12:], [1] * 8 + [4], cache)
    assert_same_logits(head, full[:, :12])
    assert 0 < np.abs(tail - full[:, 12:]).max() < 0.03 * full.std()


def test_mlx_lm_generates_with_our_tree(tiny: LlamaForCausalLM) -> None:
    from mlx_lm.generate import generate_step

    prompt = random_tokens(1, 11)[0]
    steps = generate_step(mx.array(prompt), tiny, max_tokens=5)
    written = [int(token) for token, _ in steps]
    for n in range(5):
        seen = np.array([[*prompt, *written[:n]]])
        assert written[n] == our_logits(tiny, seen)[0, -1].argmax()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_rows_of_the_embedding_in_the_place_of_tokens_give_the_same_logits(
    tmp_path: Path, family: str
) -> None:
    """As in mlx-lm's model protocol, whose `generate_step` then passes no tokens at all."""
    from mlx_lm.generate import generate_step

    write_family(family, tmp_path)
    model, tokens = load_folder(tmp_path), mx.array(random_tokens(2, 24))
    rows, none = model.model.embed_tokens(tokens), mx.zeros((2, 0), mx.int32)
    wanted = our_logits(model, np.array(tokens))
    for cache in (None, model.make_cache()):
        found = np.array(model(none, cache, input_embeddings=rows))
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    given = generate_step(none[0], model, max_tokens=4, input_embeddings=rows[0])
    plain = generate_step(tokens[0], model, max_tokens=4)
    assert [int(t) for t, _ in given] == [int(t) for t, _ in plain]


# ---- dtype -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, QuantConfig(4, 32), QuantConfig(4, 32, "mxfp4")])
@pytest.mark.parametrize("matmul", ["resident", "dequantize", "quantized"])
def test_nothing_widens_bfloat16(
    quantize: QuantConfig | None, matmul: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 file, biases everywhere; one float32 scale would widen all that follows it."""
    sizes = {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}
    folder = save_hf(make_hf_model(**sizes), tmp_path)
    model = load_folder(folder, quantize, matmul, mx.bfloat16)
    seen: dict[str, mx.Dtype] = {}
    pieces = {"attention_norm", "rotate", "add_attention", "mlp_norm", "add_mlp"}
    for kind in {type(module) for _, module in model.named_modules()}:
        for name in {"__call__", "complete", *pieces} & vars(kind).keys():
            monkeypatch.setattr(kind, name, recording(kind, name, seen))
    logits = model(mx.array(random_tokens(2, 12)))
    assert logits.dtype == mx.bfloat16
    called = {f"{kind}.__call__" for kind in ("Embedding", "RMSNorm", "DecoderLayer")}
    called |= {"Attention.rotate", *(f"DecoderLayer.{piece}" for piece in pieces - {"rotate"})}
    assert set(seen) >= {"Linear.complete"} | called
    assert set(seen.values()) == {mx.bfloat16}, seen


def recording(kind: type, name: str, seen: dict[str, mx.Dtype]) -> Any:
    original, place = vars(kind)[name], f"{kind.__name__}.{name}"

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        for array in out if isinstance(out, tuple) else [out]:
            if seen.get(place, mx.bfloat16) == mx.bfloat16:  # the first that differs stays
                seen[place] = array.dtype
        return out

    return call


def test_bfloat16_logits_are_those_of_float32_to_bfloat16_precision(
    hf_tiny: tuple[Any, Path],
) -> None:
    oracle, folder = hf_tiny
    tokens = random_tokens(2, 37)
    theirs = torch_logits(oracle, tokens)
    ours = our_logits(load_folder(folder, dtype=mx.bfloat16), tokens)
    assert 0 < (ours - theirs).std() < 0.02 * theirs.std()


# ---- the causal mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 8, 9, 20])
def test_no_token_sees_its_future(T: int, tiny: LlamaForCausalLM) -> None:
    tokens = random_tokens(1, T)
    changed = tokens.copy()
    changed[0, -1] = (changed[0, -1] + 1) % TINY["vocab_size"]
    a, b = our_logits(tiny, tokens), our_logits(tiny, changed)
    np.testing.assert_allclose(a[:, :-1], b[:, :-1], atol=1e-6)
    assert np.abs(a[:, -1] - b[:, -1]).max() > 0.1
