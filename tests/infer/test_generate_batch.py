"""Many prompts at once: each text is the one that it would be alone."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.infer.generate import GenerationConfig, batch_tokens, generate, generate_batch

PROMPTS: list[Any] = [
    "the quick brown fox jumps over the lazy dog and then",
    "fox",
    "What is the capital of France?",
    [{"role": "user", "content": "Name a colour."}],
    "Paris",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return mq.load(write_model(tmp_path_factory.mktemp("batch") / "model", chat=True))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_texts_are_those_of_single_prompts(
    tiny: tuple[Any, Any], batch_size: int, penalty: float
) -> None:
    how: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.0, "repetition_penalty": penalty}
    texts = generate_batch(*tiny, PROMPTS, batch_size=batch_size, **how)
    assert texts == [generate(*tiny, prompt, **how) for prompt in PROMPTS]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_prompt_i_draws_as_a_single_one_with_seed_plus_i(
    tiny: tuple[Any, Any], batch_size: int
) -> None:
    texts = generate_batch(*tiny, PROMPTS, 16, seed=40, batch_size=batch_size)
    assert texts == [generate(*tiny, p, 16, seed=40 + i) for i, p in enumerate(PROMPTS)]


def test_equal_logits_give_equal_draws_whatever_stands_beside() -> None:
    """A model whose logits are the same everywhere: only the draws can differ."""

    class Flat:
        layers = (None,)

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


def test_a_row_ends_at_its_stop_text_and_the_next_prompt_takes_its_place(
    tiny: tuple[Any, Any],
) -> None:
    how: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "repetition_penalty": 1.0}
    whole = [generate(*tiny, prompt, **how) for prompt in PROMPTS]
    stop = [whole[0][3:5], whole[2][6:8]]
    texts = generate_batch(*tiny, PROMPTS, stop=stop, batch_size=2, **how)
    assert texts == [generate(*tiny, prompt, stop=stop, **how) for prompt in PROMPTS]
    assert texts != whole and not any(s in text for text in texts for s in stop)


def test_a_text_alone_stops_an_answer_as_a_list_of_it_does(tiny: tuple[Any, Any]) -> None:
    how: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "repetition_penalty": 1.0}
    stop = generate(*tiny, PROMPTS[0], **how)[3:6]
    assert len(set(stop)) > 1, "one of its characters would end the answer sooner"
    alone = generate(*tiny, PROMPTS[0], stop=[stop], **how)
    assert alone == generate(*tiny, PROMPTS[0], stop=stop, **how)
    assert alone == "".join(mq.stream(*tiny, PROMPTS[0], stop=stop, **how))
    assert [alone] == generate_batch(*tiny, PROMPTS[:1], stop=stop, **how)


@pytest.mark.parametrize("prompts", ["Hello", [{"role": "user", "content": "Hello"}]])
def test_a_prompt_in_the_place_of_a_list_is_refused(tiny: tuple[Any, Any], prompts: Any) -> None:
    with pytest.raises(mq.ConfigError, match=r"prompts must be a list of prompts \(\[prompt\] for"):
        generate_batch(*tiny, prompts)
    assert len(generate_batch(*tiny, [prompts], 4)) == 1


def test_a_text_ends_where_the_context_does_and_a_prompt_that_fills_it_is_refused(
    tmp_path: Path,
) -> None:
    model, tokenizer = mq.load(write_model(tmp_path / "model", max_position_embeddings=72))
    tokenizer = dataclasses.replace(tokenizer, eos_ids=frozenset())
    prompts = ["fox", "the quick brown fox jumps"]
    how: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
    made = [mq.stream(model, tokenizer, prompt, 99, **how) for prompt in prompts]
    texts = ["".join(each) for each in made]
    sizes = [(each.speed.prompt_tokens, each.speed.new_tokens) for each in made]
    assert all(asked + new == 72 for asked, new in sizes) and sizes[0] != sizes[1]
    assert generate_batch(model, tokenizer, prompts, 99, **how) == texts
    assert [generate(model, tokenizer, prompt, 99, **how) for prompt in prompts] == texts
    long, words = "the quick brown fox " * 24, "tokens, and the model was made for 72: shorten it"
    for ask in (generate, mq.stream):
        with pytest.raises(mq.ConfigError, match=rf"the prompt has \d+ {words}"):
            ask(model, tokenizer, long)
    with pytest.raises(mq.ConfigError, match=rf"prompts\[1\] has \d+ {words}"):
        generate_batch(model, tokenizer, ["fox", long])


def test_a_row_that_has_ended_gets_no_more_tokens(tiny: tuple[Any, Any]) -> None:
    how, ended = GenerationConfig(0, max_new_tokens=12), set[int]()
    counts = np.zeros(3, int)
    for i, _ in batch_tokens(tiny[0], [[5], [6, 7], [8]], how, None, 2, ended):
        counts[i] += 1
        if counts[i] == 4 and i == 1:
            ended.add(i)
    assert counts.tolist() == [12, 4, 12]


def test_no_prompts_give_no_texts(tiny: tuple[Any, Any]) -> None:
    assert generate_batch(*tiny, []) == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"seed": 2**64 - 1}, "seed must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"stop": [""]}, "stop must hold texts that are not empty"),
        ({"stop": ""}, "stop must hold texts that are not empty"),
        ({"top_p": 0.0}, "generation.top_p must be in"),
    ],
)
def test_a_value_out_of_range_is_named(tiny: tuple[Any, Any], how: dict[str, Any], words: str):
    with pytest.raises(mq.ConfigError, match=words):
        generate_batch(*tiny, PROMPTS, **how)


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(mq.TokenizerError, match="no chat template"):
        generate_batch(*mq.load(write_model(tmp_path / "model")), PROMPTS)


@pytest.mark.slow
def test_real_texts_are_those_of_single_prompts(smollm2: tuple[Any, Any]) -> None:
    prompts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village"]
    hows: list[dict[str, Any]] = [{"temperature": 0.0}, {"seed": 3}]
    for how in hows:
        texts = generate_batch(*smollm2, prompts, 24, batch_size=2, **how)
        for i, prompt in enumerate(prompts):
            own: dict[str, Any] = how | ({"seed": 3 + i} if "seed" in how else {})
            assert texts[i] == generate(*smollm2, prompt, 24, **own)
