"""Many prompts at once: each text is the one that it would be alone."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.tiny_folder import write_model, write_random_model

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.infer.generate import generate, generate_batch

PROMPTS: list[Any] = [
    "the quick brown fox jumps over the lazy dog and then",
    "fox",
    "What is the capital of France?",
    [{"role": "user", "content": "Name a colour."}],
    "Paris",
]


@pytest.fixture(scope="module")
def tiny(chat_folder: Path) -> tuple[Any, Any]:
    return mq.load(chat_folder)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_texts_are_those_of_single_prompts(tiny, batch_size, penalty):
    how: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.0, "repetition_penalty": penalty}
    texts = generate_batch(*tiny, PROMPTS, batch_size=batch_size, **how)
    assert texts == [generate(*tiny, prompt, **how) for prompt in PROMPTS]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_prompt_i_draws_as_a_single_one_with_seed_plus_i(tiny, batch_size):
    texts = generate_batch(*tiny, PROMPTS, max_new_tokens=16, seed=40, batch_size=batch_size)
    single = [
        generate(*tiny, prompt, max_new_tokens=16, seed=40 + i) for i, prompt in enumerate(PROMPTS)
    ]
    assert texts == single


def test_a_row_ends_at_its_stop_text_and_the_next_prompt_takes_its_place(tiny):
    how: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "repetition_penalty": 1.0}
    whole = [generate(*tiny, prompt, **how) for prompt in PROMPTS]
    stop = [whole[0][3:5], whole[2][6:8]]
    texts = generate_batch(*tiny, PROMPTS, stop=stop, batch_size=2, **how)
    assert texts == [generate(*tiny, prompt, stop=stop, **how) for prompt in PROMPTS]
    assert texts != whole and not any(s in text for text in texts for s in stop)
    (alone,) = generate_batch(*tiny, PROMPTS[:1], stop=stop[0], **how)
    assert alone == generate(*tiny, PROMPTS[0], stop=[stop[0]], **how)


@pytest.mark.parametrize("prompts", ["Hello", [{"role": "user", "content": "Hello"}], [5, 6]])
def test_a_prompt_in_the_place_of_a_list_is_refused(tiny, prompts):
    with pytest.raises(mq.ConfigError, match=r"prompts must be a list of prompts \(\[prompt\] for"):
        generate_batch(*tiny, prompts)
    assert len(generate_batch(*tiny, [prompts], max_new_tokens=4)) == 1


def test_a_text_ends_where_the_context_does_and_a_prompt_that_fills_it_is_refused(tmp_path):
    model, tokenizer = mq.load(write_model(tmp_path / "model", max_position_embeddings=72))
    tokenizer = dataclasses.replace(tokenizer, eos_ids=frozenset())
    prompts = ["fox", "the quick brown fox jumps"]
    how: Any = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 99}
    made = [mq.stream(model, tokenizer, prompt, **how) for prompt in prompts]
    texts = ["".join(each) for each in made]
    sizes = [(each.speed.prompt_tokens, each.speed.new_tokens) for each in made]
    assert all(asked + new == 72 for asked, new in sizes) and sizes[0] != sizes[1]
    assert generate_batch(model, tokenizer, prompts, **how) == texts
    assert [generate(model, tokenizer, prompt, **how) for prompt in prompts] == texts
    long, words = "the quick brown fox " * 24, "tokens, and the model was made for 72; shorten it"
    for ask in (generate, mq.stream):
        with pytest.raises(mq.ConfigError, match=rf"the prompt has \d+ {words}"):
            ask(model, tokenizer, long)
    with pytest.raises(mq.ConfigError, match=rf"prompts\[1\] has \d+ {words}"):
        generate_batch(model, tokenizer, ["fox", long])


def test_no_prompts_give_no_texts(tiny):
    assert generate_batch(*tiny, []) == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"seed": 2**64 - 1}, "seed must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"stop": [""]}, "stop must hold no empty text"),
        ({"stop": ""}, "stop must hold no empty text"),
        ({"top_p": 0.0}, "generation.top_p must be in"),
    ],
)
def test_a_value_out_of_range_is_named(tiny, how, words):
    with pytest.raises(mq.ConfigError, match=words):
        generate_batch(*tiny, PROMPTS, **how)


@pytest.mark.slow
def test_real_texts_are_those_of_single_prompts(short_files):
    smollm2 = mq.load(short_files.path)
    prompts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village"]
    hows: list[dict[str, Any]] = [{"temperature": 0.0}, {"seed": 3}]
    for how in hows:
        texts = generate_batch(*smollm2, prompts, max_new_tokens=10, batch_size=2, **how)
        for i, prompt in enumerate(prompts):
            own: dict[str, Any] = how | ({"seed": 3 + i} if "seed" in how else {})
            assert texts[i] == generate(*smollm2, prompt, max_new_tokens=10, **own)


def test_long_prompts_are_read_in_pieces_of_little_memory_and_answered_alike(tmp_path):
    model = mq.load(write_random_model(tmp_path, max_position_embeddings=1024))
    prompts: list[Any] = [[5 + (i * n) % 300 for i in range(700)] for n in (1, 3, 7)]
    texts, peaks = [], []
    for positions in (1 << 14, device.CPU.prompt_positions):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with device.use(dataclasses.replace(device.current(), prompt_positions=positions)):
            texts.append(generate_batch(*model, prompts, max_new_tokens=4, temperature=0.0))
        peaks.append(mx.get_peak_memory() - before)
    assert texts[0] == texts[1]
    assert peaks[1] < peaks[0] / 2
