"""Generated text against transformers: greedy token by token, and each step of sampling."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_tokens, torch_logits
from tiny_folder import hf_smollm2, write_model

import mlx_qlora as mq
from mlx_qlora.infer.generate import (
    GenerationConfig,
    Sampler,
    filtered,
    generate,
    generate_tokens,
    prompt_ids,
    repetition_processor,
)

GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "### Instruction:\nName three colours.\n\n### Response:\n",
    "Once upon a time, in a village by the sea,",
    "Photosynthesis is the process by which",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return mq.load(write_model(tmp_path_factory.mktemp("generate") / "model", chat=True))


def logits(seed: int = 0, rows: int = 1, V: int = 300) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, V)) * 3).astype(np.float32)


# ---- greedy ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(smollm2: tuple[Any, Any]) -> None:
    """Each of our tokens is transformers' first choice after all before it: its greedy text."""
    model, tokenizer = smollm2
    how = GenerationConfig(max_new_tokens=24, **GREEDY)
    for prompt in PROMPTS:
        ids = prompt_ids(tokenizer, prompt)
        ours = list(generate_tokens(model, ids, how))
        scores = torch_logits(hf_smollm2(), np.array([ids + ours[:-1]]))[0, len(ids) - 1 :]
        assert ours == scores.argmax(axis=-1).tolist(), prompt
        assert len(set(ours)) > 4
    text = generate(model, tokenizer, PROMPTS[-1], max_new_tokens=24, **GREEDY)
    assert text == tokenizer.decode(ours)  # pyright: ignore


@pytest.mark.slow
def test_a_chat_prompt_is_the_template_s_text(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    answer = generate(model, tokenizer, messages, max_new_tokens=12, **GREEDY)
    assert answer == generate(model, tokenizer, text, max_new_tokens=12, **GREEDY)
    assert "Paris" in answer


def test_greedy_with_a_cache_is_the_argmax_of_the_whole_sequence(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    prompt = random_tokens(1, 13, seed=3)[0].tolist()
    how = GenerationConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
    got = list(generate_tokens(model, prompt, how))
    ids = list(prompt)
    for _ in range(20):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
    assert got == ids[13:]


def test_the_repetition_penalty_counts_prompt_and_answer(tiny: tuple[Any, Any]) -> None:
    """Against the definition, without a cache: every token seen so far, prompt included."""
    model, _ = tiny
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


# ---- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_what_may_be_sampled_and_how_likely_is_transformers_own(
    temperature: float, top_k: int, top_p: float
) -> None:
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


def test_top_p_1_rules_out_nothing_whatever_the_rounding() -> None:
    wide = mx.array(logits(V=50_000))
    how = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0)
    assert not mx.isinf(filtered(wide, how)).any()


def test_draws_have_the_filtered_distribution() -> None:
    how = GenerationConfig(temperature=1.3, top_k=8, top_p=0.9)
    row = mx.array(logits(V=12)[:1] / 3)
    sampler = Sampler(how, mx.random.key(0))
    drawn = np.array([sampler(row).item() for _ in range(4000)])
    wanted = np.array(mx.softmax(filtered(row, how), axis=-1))[0]
    share = np.bincount(drawn, minlength=12) / len(drawn)
    assert (np.abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-9).all()


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 2.0])
def test_the_repetition_penalty_is_transformers_own(penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = [3, 7, 7, 3, 250, 0]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seen]),
        torch.from_numpy(logits()),  # pyright: ignore
    )
    ours = repetition_processor(penalty)(mx.array(seen), mx.array(logits()))
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-6)


def test_a_seed_gives_one_text_whatever_the_global_state(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    texts = []
    for state in (1, 2):
        mx.random.seed(state)
        mx.random.normal((state,))
        texts.append(generate(model, tokenizer, "the fox", max_new_tokens=24, seed=7))
    assert texts[0] == texts[1]
    others = {generate(model, tokenizer, "the fox", max_new_tokens=24, seed=s) for s in range(4)}
    assert len(others) == 4


def test_without_a_seed_texts_differ_and_the_global_state_is_not_touched(
    tiny: tuple[Any, Any],
) -> None:
    model, tokenizer = tiny
    mx.random.seed(3)
    untouched = mx.random.normal((4,))
    mx.random.seed(3)
    texts = {generate(model, tokenizer, "the fox", max_new_tokens=24) for _ in range(3)}
    assert len(texts) == 3
    assert mx.array_equal(mx.random.normal((4,)), untouched)


# ---- where a text ends -------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Makes the model say these ids."""
    monkeypatch.setattr("mlx_qlora.infer.generate.generate_tokens", lambda *_: iter(ids))


def test_an_end_token_stops_and_is_not_in_the_text(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    said = tokenizer.encode("Blue.")
    scripted(monkeypatch, [*said, tokenizer.eos_id, *tokenizer.encode("more")])
    assert generate(model, tokenizer, "x") == "Blue."
    scripted(monkeypatch, [tokenizer.eos_id, *said])
    assert generate(model, tokenizer, "x") == ""


def test_a_stop_text_ends_the_answer_where_it_begins(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    said = tokenizer.encode("The fox jumps.\n\n### Instruction:\nWhat")
    for stop, wanted in (
        (["### Instruction:"], "The fox jumps.\n\n"),
        (["\n\n", "fox"], "The "),
        (["o"], "The f"),
        (["absent"], "The fox jumps.\n\n### Instruction:\nWhat"),
        ([], "The fox jumps.\n\n### Instruction:\nWhat"),
    ):
        scripted(monkeypatch, said)
        assert generate(model, tokenizer, "x", stop=stop) == wanted


def test_a_character_of_several_tokens_is_whole_in_the_text(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    assert len(tokenizer.encode("猫")) == 3
    scripted(monkeypatch, tokenizer.encode("猫 Zoë"))
    assert generate(model, tokenizer, "x") == "猫 Zoë"


def test_no_more_than_max_new_tokens_are_made(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    for n in (1, 2, 17):
        how = GenerationConfig(temperature=0, max_new_tokens=n)
        assert len(list(generate_tokens(model, [5, 6, 7], how))) == n


# ---- prompts -----------------------------------------------------------------------------------


def test_a_prompt_gets_exactly_one_bos(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    for text in ("the fox", "<|bos|>the fox"):
        ids = prompt_ids(tokenizer, text)
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1


def test_messages_are_rendered_with_the_chat_template(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    messages = [{"role": "user", "content": "Hi"}]
    ids = prompt_ids(tokenizer, messages)
    assert tokenizer.decode(ids) == "<|bos|><|user|>Hi<|eos|><|assistant|>"


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    _, tokenizer = mq.load(write_model(tmp_path / "model"))
    with pytest.raises(mq.TokenizerError, match="no chat template"):
        prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])


def test_an_empty_prompt_is_refused_where_no_bos_stands_in(smollm2: tuple[Any, Any]) -> None:
    with pytest.raises(mq.ConfigError, match="the prompt is empty"):
        generate(*smollm2, "")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"temperature": -0.1}, "generation.temperature must be at least 0; got -0.1"),
        ({"temperature": float("nan")}, "generation.temperature must be at least 0; got nan"),
        ({"top_p": 0.0}, "generation.top_p must be in (0, 1]; got 0.0"),
        ({"top_p": 1.01}, "generation.top_p must be in (0, 1]; got 1.01"),
        ({"top_k": -1}, "generation.top_k must be at least 0; got -1"),
        ({"repetition_penalty": 0}, "generation.repetition_penalty must be above 0; got 0"),
        ({"max_new_tokens": 0}, "generation.max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": -5}, "generation.max_new_tokens must be at least 1; got -5"),
        ({"seed": -1}, "seed must be in [0, 2**64); got -1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_rule(
    tiny: tuple[Any, Any], how: dict[str, Any], words: str
) -> None:
    with pytest.raises(mq.ConfigError) as caught:
        generate(*tiny, "x", **how)
    assert str(caught.value) == words
