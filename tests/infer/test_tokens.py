"""Token ids in and out: each step of sampling against transformers, and mlx-lm's loops."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.gpu_route import EXACT, routes
from support.models import load_folder, random_tokens
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.infer.generate import generate
from mlx_qlora.infer.tokens import (
    GenerationConfig,
    PromptCache,
    Sampler,
    batch_tokens,
    filtered,
    generate_tokens,
    repetition_processor,
)
from mlx_qlora.model.llama import LlamaConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tokens") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_folder(folder)  # in float32


def logits(seed: int = 0, rows: int = 1, V: int = 300) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, V)) * 3).astype(np.float32)


# ---- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_what_may_be_sampled_and_how_likely_is_transformers_own(temperature, top_k, top_p):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.from_numpy(logits(rows=3))
    scores = TemperatureLogitsWarper(temperature)(None, scores)  # pyright: ignore
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)  # pyright: ignore
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)  # pyright: ignore
    how = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    logprobs = mx.array(logits(rows=3))
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    ours = np.array(mx.softmax(filtered(logprobs, how), axis=-1))
    theirs = torch.softmax(scores, dim=-1).numpy()
    assert ((ours > 0) == (theirs > 0)).all()
    assert np.abs(ours - theirs).max() < 1e-6


def test_top_p_1_rules_out_nothing_whatever_the_rounding():
    wide = mx.array(logits(V=50_000))
    how = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0)
    assert not mx.isinf(filtered(wide, how)).any()


def test_draws_have_the_filtered_distribution():
    how = GenerationConfig(temperature=1.3, top_k=8, top_p=0.9)
    row = mx.array(logits(V=12)[:1] / 3)
    sampler = Sampler(how, mx.random.key(0))
    drawn = np.array([sampler(row).item() for _ in range(4000)])
    wanted = np.array(mx.softmax(filtered(row, how), axis=-1))[0]
    found, may = np.bincount(drawn, minlength=12), wanted > 0
    assert not found[~may].any()
    expected = wanted[may] * len(drawn)
    chi_square = ((found[may] - expected) ** 2 / expected).sum()
    assert may.sum() >= 5 and chi_square < 3 * may.sum()  # far below one in a thousand


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 2.0])
def test_the_repetition_penalty_is_transformers_own(penalty):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = [3, 7, 7, 3, 250, 0]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seen]),  # pyright: ignore
        torch.from_numpy(logits()),  # pyright: ignore
    )
    ours = repetition_processor(penalty)(mx.array(seen), mx.array(logits()))
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-6)


# ---- one prompt --------------------------------------------------------------------------------


@routes("none", *EXACT, "metal-bfloat16", "cuda-float16")
def test_greedy_with_a_cache_is_the_argmax_of_the_whole_sequence(gpu_route, folder):
    """In 16 bits, of those whose logits are as large up to rounding."""
    model = gpu_route.load(folder)
    prompt = random_tokens(1, 13, seed=3)[0].tolist()
    how = GenerationConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
    got = list(generate_tokens(model, prompt, how))
    ids = list(prompt)
    for token in got:
        scores = np.array(model(mx.array([ids]))[0, -1].astype(mx.float32))
        margin = gpu_route.tolerance.product * np.abs(scores).max()
        assert scores[token] >= scores.max() - (margin if gpu_route.dtype != mx.float32 else 0)
        ids.append(token)
    assert len(got) == 20


def test_the_repetition_penalty_counts_prompt_and_answer(model):
    """Against the definition, without a cache: every token seen so far, prompt included."""
    prompt = random_tokens(1, 9, seed=5)[0].tolist()
    how = GenerationConfig(temperature=0, repetition_penalty=1.7, max_new_tokens=20)
    got = list(generate_tokens(model, prompt, how))
    ids = list(prompt)
    for _ in range(20):
        scores = np.array(model(mx.array([ids]))[0, -1])
        for token in set(ids):
            scores[token] = scores[token] / 1.7 if scores[token] > 0 else scores[token] * 1.7
        ids.append(int(scores.argmax()))
    assert got == ids[9:]
    plain = GenerationConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
    assert got != list(generate_tokens(model, prompt, plain))


def test_no_more_than_max_new_tokens_are_made(model):
    for n in (1, 2, 17):
        how = GenerationConfig(temperature=0, max_new_tokens=n)
        assert len(list(generate_tokens(model, [5, 6, 7], how))) == n


def test_a_quantised_cache_holds_nearly_the_same(tmp_path, in_float32):
    folder = write_model(tmp_path / "model", head_dim=32)
    model, tokenizer = mq.load(folder)
    how, exact = GenerationConfig(0, 1, 0, 1, 8), PromptCache()
    prompt = random_tokens(1, 40, seed=3)[0].tolist()
    list(generate_tokens(model, prompt, how, None, None, exact))
    wanted = np.array(exact._layers[0].keys_and_values()[0])[:, :, :40]
    for bits, most in ((8, 0.03), (4, 0.5)):
        cache = PromptCache()
        list(generate_tokens(model, prompt, how, None, bits, cache))
        layer = cache._layers[0]
        assert layer.bits == bits and layer.nbytes < exact._layers[0].nbytes / 2
        kept = mx.dequantize(*layer.keys, group_size=layer.group_size, bits=bits)
        assert 0 < np.abs(np.array(kept)[:, :, :40] - wanted).max() < most
        with pytest.raises(mq.ConfigError, match=f"prompt cache has kv_bits={bits}; got None"):
            generate(model, tokenizer, "x", prompt_cache=cache)


# ---- many prompts ------------------------------------------------------------------------------


def test_equal_logits_give_equal_draws_whatever_stands_beside():
    """A model whose logits are the same everywhere: only the draws can differ."""

    class Flat:
        layers = (None,)
        config = LlamaConfig(4, 1, 1, 1, 4, 4, 50)

        def make_cache(self) -> list[Any]:
            from mlx_lm.models.cache import KVCache

            return [KVCache()]

        def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
            B, T = tokens.shape
            cache[0].update_and_fetch(mx.zeros((B, 1, T, 4)), mx.zeros((B, 1, T, 4)))
            return mx.zeros((B, T, 50))

    how = GenerationConfig(1.0, 1.0, 0, 1.0, max_new_tokens=20)

    def drawn(n: int, batch_size: int) -> dict[int, list[int]]:
        made: dict[int, list[int]] = {i: [] for i in range(n)}
        model: Any = Flat()
        for i, token in batch_tokens(
            model, [[1] * (i + 1) for i in range(n)], how, 3, batch_size, set()
        ):
            made[i].append(token)
        return made

    alone, many = drawn(3, 1), drawn(6, 4)
    assert all(many[i] == alone[i] and len(alone[i]) == 20 for i in range(3))
    assert len({tuple(tokens) for tokens in many.values()}) == 6


def test_a_row_that_has_ended_gets_no_more_tokens(model):
    how, ended = GenerationConfig(0, max_new_tokens=12), set[int]()
    counts = np.zeros(3, int)
    for i, _ in batch_tokens(model, [[5], [6, 7], [8]], how, None, 2, ended):
        counts[i] += 1
        if counts[i] == 4 and i == 1:
            ended.add(i)
    assert counts.tolist() == [12, 4, 12]
