"""Generated text: whole characters, where it ends, settings, prompts."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.models import randomise_lora
from support.parrot import Parrot
from support.tiny_folder import CORPUS, write_model, write_tokenizer

import mlx_qlora as mq
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.infer.generate import Pieces, generate, prompt_ids, stream
from mlx_qlora.infer.tokens import (
    GenerationConfig,
    GenerationSettings,
    PromptCache,
    StreamSettings,
)

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def tiny(chat_folder: Path) -> tuple[Any, Any]:
    return mq.load(chat_folder)


# ---- greedy ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chat_prompt_is_the_template_s_text(smollm2):
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    answer = generate(model, tokenizer, messages, max_new_tokens=12, **GREEDY)
    assert answer == generate(model, tokenizer, text, max_new_tokens=12, **GREEDY)
    assert "Paris" in answer


# ---- seeds -------------------------------------------------------------------------------------


def test_a_seed_gives_one_text_whatever_the_global_state(tiny):
    model, tokenizer = tiny
    texts = []
    for state in (1, 2):
        mx.random.seed(state)
        mx.random.normal((state,))
        texts.append(generate(model, tokenizer, "the fox", max_new_tokens=24, seed=7))
    assert texts[0] == texts[1]
    others = {generate(model, tokenizer, "the fox", max_new_tokens=24, seed=s) for s in range(4)}
    assert len(others) == 4


def test_without_a_seed_texts_differ_and_the_global_state_is_not_touched(tiny):
    model, tokenizer = tiny
    mx.random.seed(3)
    untouched = mx.random.normal((4,))
    mx.random.seed(3)
    texts = {generate(model, tokenizer, "the fox", max_new_tokens=24) for _ in range(3)}
    assert len(texts) == 3
    assert mx.array_equal(mx.random.normal((4,)), untouched)


# ---- where a text ends -------------------------------------------------------------------------


def said(tiny: tuple[Any, Any], ids: list[int] | str, **settings: Any) -> str:
    """The answer of a model that says these ids, or the ids of this text."""
    model, tokenizer = tiny
    parrot = Parrot(model, tokenizer, tokenizer.encode(ids) if isinstance(ids, str) else ids)
    pieces = list(stream(parrot, tokenizer, "x", **settings))
    assert all(pieces)
    return "".join(pieces)


def test_an_end_token_stops_and_is_not_in_the_text(tiny):
    _, tokenizer = tiny
    blue = tokenizer.encode("Blue.")
    assert said(tiny, [*blue, tokenizer.eos_id, *tokenizer.encode("more")]) == "Blue."
    assert said(tiny, [tokenizer.eos_id, *blue]) == ""


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["### Instruction:"], "The fox jumps.\n\n"),
        (["\n\n", "fox"], "The "),
        (["o"], "The f"),
        ("o", "The f"),
        (["absent"], "The fox jumps.\n\n### Instruction:\nWhat"),
        ([], "The fox jumps.\n\n### Instruction:\nWhat"),
        (["fox jumps", "jumps"], "The "),  # complete at once: the one that begins first
    ],
)
def test_a_stop_text_ends_the_answer_where_it_begins(tiny, stop, wanted):
    assert said(tiny, "The fox jumps.\n\n### Instruction:\nWhat", stop=stop) == wanted


def test_a_character_of_several_tokens_is_whole_in_the_text(tiny):
    assert len(tiny[1].encode("猫")) == 3
    assert said(tiny, "猫 Zoë") == "猫 Zoë"


# ---- pieces ------------------------------------------------------------------------------------


def sentencepiece_folder(folder: Path) -> Path:
    """Llama 2's kind: spaces before words, and tokens for single bytes."""
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, llama31: Any, smollm2: Any) -> list[Any]:
    import llama_models

    home = tmp_path_factory.mktemp("tokenizers")
    folder = sentencepiece_folder(home / "spm")
    return [
        load_tokenizer(write_tokenizer(home / "bpe")),
        load_tokenizer(folder),
        llama_2_json(folder, home / "json"),
        load_tokenizer(Path(llama_models.__file__).parent / "llama3"),
        llama31,
        smollm2[1],
    ]


def llama_2_json(folder: Path, target: Path) -> Any:
    """The same pieces as a `tokenizer.json` with Llama 2's decoder."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    target.mkdir()
    backend.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return load_tokenizer(target)


SAID = [
    "the \U0001f9ff fox\n\n  two  spaces",
    "猫 Zoë \U0001f469\u200d\U0001f680!",
    " \t lazy",
    "\ufffd a",
]


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    pieces = Pieces(tokenizer)
    return [*(pieces.add(i) for i in ids), pieces.end()]


def test_pieces_join_to_the_text_of_all_tokens(tokenizers):
    """Of texts, of tokens at random, and of those that make up characters and spaces."""
    draw = np.random.default_rng(0)
    for tokenizer in tokenizers:
        odd = sorted({i for text in SAID for i in tokenizer.encode(text)})
        odd += [tokenizer.eos_id, *sorted(Pieces(tokenizer)._bytes)[::5]]
        for n in range(300):
            ids = draw.choice(odd, 12).tolist() if n % 2 else None
            ids = ids or draw.integers(0, tokenizer.vocab_size - 12, 12).tolist()
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids), (tokenizer, ids)
        for text in SAID:
            ids = tokenizer.encode(text)
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_pieces_come_early_and_never_show_half_a_character(tokenizers):
    for tokenizer in tokenizers:
        text = "the fox jumps over the lazy dog"
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, ids)
        assert pieces[-1] == "" and sum(map(bool, pieces)) > len(ids) // 2
        said = pieces_of(tokenizer, tokenizer.encode("x " + "\U0001f680\U0001f9ff" * 3))
        assert not any("\ufffd" in piece for piece in said)


def test_the_work_for_a_token_does_not_grow_with_the_text(tokenizers):
    for tokenizer in tokenizers:
        ids, sizes = tokenizer.encode("the fox jumps. " * 60), list[int]()

        def decode(window: list[int], tokenizer: Any = tokenizer) -> str:
            sizes.append(len(window))  # noqa: B023
            return tokenizer.decode(window)

        pieces: Any = Pieces(tokenizer)
        pieces._decode = decode
        for i in ids:
            pieces.add(i)
        assert max(sizes) <= 8 and sum(sizes) < 6 * len(ids)


@pytest.mark.parametrize("stop", [["\n\n###"], ["jumps", "ps.\n"], ["W", "What"], ["zz"], ["e f"]])
def test_a_stream_never_shows_a_stop_text_not_even_its_beginning(tiny, stop):
    model, tokenizer = tiny
    text = "The fox jumps.\n\n## \U0001f680 ### Instruction:\nWhat"
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    whole = text[: min(ends)[1] if ends else None]
    shown = ""
    for piece in stream(
        Parrot(model, tokenizer, tokenizer.encode(text)), tokenizer, "x", stop=stop
    ):
        shown += piece
        assert piece and whole.startswith(shown)
    assert shown == whole


# ---- cache and speed ---------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_a_prompt_cache_changes_nothing_but_the_work(tiny, penalty):
    model, tokenizer = tiny
    cache = PromptCache()
    how: Any = {"temperature": 0.0, "repetition_penalty": penalty, "max_new_tokens": 12}
    first = "the quick brown fox jumps over"
    for prompt, least in ((first, 0), (first + " it", 7), (first, 7), (first, 7), ("dog", 0)):
        made = stream(model, tokenizer, prompt, prompt_cache=cache, **how)
        assert "".join(made) == generate(model, tokenizer, prompt, **how)
        assert made.speed.cached_tokens >= least
        assert made.speed.prompt_tokens == len(prompt_ids(tokenizer, prompt))
        assert cache.ids[: made.speed.prompt_tokens] == prompt_ids(tokenizer, prompt)


def test_a_prompt_cache_begins_anew_for_other_weights(tmp_path):
    model, tokenizer = mq.load(write_model(tmp_path / "model"))
    cache, how = PromptCache(), {"max_new_tokens": 9, "temperature": 0.0}
    assert generate(model, tokenizer, "the fox", prompt_cache=cache, **how)
    mq.add_lora(model, mq.LoraConfig(r=4))
    for seed in (1, 2):  # as after a step of training
        randomise_lora(model, seed, scale=0.5)
        made = stream(model, tokenizer, "the fox", prompt_cache=cache, **how)
        assert "".join(made) == generate(model, tokenizer, "the fox", **how)
        assert made.speed.cached_tokens == 0
    with mq.disabled(model):
        assert cache.common(model, prompt_ids(tokenizer, "the fox")) == 0
    assert cache.common(model, prompt_ids(tokenizer, "the fox")) > 0


def test_an_exception_within_leaves_an_empty_cache(tiny, monkeypatch):
    model, tokenizer = tiny
    cache = PromptCache()
    generate(model, tokenizer, "the fox", max_new_tokens=4, prompt_cache=cache)
    made = stream(model, tokenizer, "the fox jumps", max_new_tokens=50, prompt_cache=cache)
    next(made)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(made)
    assert cache.ids == []


def test_kv_bits_that_cannot_be_are_refused(tiny):
    with pytest.raises(mq.ConfigError, match="kv_bits must be one of 2, 4, 8, or None; got 3"):
        generate(*tiny, "x", kv_bits=3)
    with pytest.raises(mq.ConfigError, match="that 32 divides; this model's is 16"):
        generate(*tiny, "x", kv_bits=4)


def test_speed_counts_what_was_done(tiny):
    made = stream(*tiny, "the fox", max_new_tokens=9, temperature=0, repetition_penalty=1)
    assert made.speed.new_tokens == 0
    list(made)
    speed = made.speed
    assert speed.prompt_tokens == len(prompt_ids(tiny[1], "the fox"))
    assert len(made.ids) <= speed.new_tokens <= 9
    assert speed.prompt_tokens_per_second > 0 and speed.tokens_per_second > 0
    assert speed.peak_memory_bytes > 0


def test_a_seed_gives_one_text_in_every_process(tiny):
    model, tokenizer = tiny
    code = (
        "import sys, mlx_qlora as mq\n"
        "from mlx_qlora.infer.generate import generate\n"
        "made = generate(*mq.load(sys.argv[1]), 'the fox', max_new_tokens=24, seed=11)\n"
        "sys.stdout.buffer.write(made.encode())"
    )
    command = [sys.executable, "-c", code, str(tokenizer.source)]
    told = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[2])
    assert told.stdout.decode() == generate(model, tokenizer, "the fox", max_new_tokens=24, seed=11)


# ---- prompts -----------------------------------------------------------------------------------


def test_a_prompt_gets_exactly_one_bos(tiny):
    _, tokenizer = tiny
    for text in ("the fox", "<|bos|>the fox"):
        ids = prompt_ids(tokenizer, text)
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1


def test_token_ids_are_taken_as_they_are(tiny):
    model, tokenizer = tiny
    ids = prompt_ids(tokenizer, "the fox")
    assert prompt_ids(tokenizer, ids) == ids
    assert generate(model, tokenizer, ids, seed=1) == generate(model, tokenizer, "the fox", seed=1)


def test_messages_are_rendered_with_the_chat_template(tiny):
    _, tokenizer = tiny
    messages = [{"role": "user", "content": "Hi"}]
    ids = prompt_ids(tokenizer, messages)
    assert tokenizer.decode(ids) == "<|bos|><|user|>Hi<|eos|><|assistant|>"


def test_messages_are_read_as_in_rows(tiny):
    model, tokenizer = tiny
    expected = prompt_ids(tokenizer, [{"role": "user", "content": "Hi?"}])
    for message in (
        {"role": "user", "content": [{"type": "text", "text": "Hi?"}]},
        {"role": "user", "content": "Hi?", "weight": 1, "name": None},
        {"from": "human", "value": "Hi?"},
        {"role": "user", "content": "Hi?", "refusal": None, "function_call": None, "loss": 0.3},
    ):
        assert prompt_ids(tokenizer, [message]) == expected
    empty = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    empty += [{"role": "document", "content": "b"}]  # a role that a template may know
    assert "<|document|>b" in tokenizer.decode(prompt_ids(tokenizer, empty))
    for ids in ((5, 6), np.array([5, 6]), [np.int64(5), 6]):
        assert generate(model, tokenizer, ids, max_new_tokens=2, **GREEDY) == generate(
            model, tokenizer, [5, 6], max_new_tokens=2, **GREEDY
        )
    for wrong in ([[5, 6]], np.array([[5, 6]]), [None]):
        with pytest.raises(mq.ConfigError, match="text, messages or token ids, not a list of"):
            prompt_ids(tokenizer, wrong)
    with pytest.raises(mq.DataError, match=r"part 0 of messages\[0\] is of type 'image_url'"):
        prompt_ids(tokenizer, [{"role": "user", "content": [{"type": "image_url"}]}])


def test_messages_without_a_template_are_refused(tiny):
    plain = dataclasses.replace(tiny[1], chat_template=None)
    with pytest.raises(mq.TokenizerError, match="no chat template"):
        prompt_ids(plain, [{"role": "user", "content": "Hi"}])


def test_an_empty_prompt_is_refused_where_no_bos_stands_in(smollm2):
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
        ({"stop": [""]}, "stop must hold no empty text; got ['']"),
        ({"seed": -1}, "seed must be in [0, 2**64); got -1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_rule(tiny, how, words):
    with pytest.raises(mq.ConfigError) as caught:
        generate(*tiny, "x", **how)
    assert str(caught.value) == words


# ---- settings ----------------------------------------------------------------------------------


def test_the_keywords_are_the_fields_of_the_config_and_a_few_more():
    fields = {field.name: field.type for field in dataclasses.fields(GenerationConfig)}
    keywords = GenerationSettings.__annotations__
    assert {name: keywords[name] for name in fields} == fields
    assert keywords.keys() - fields == {"seed", "stop"}
    more = StreamSettings.__annotations__.keys() - keywords.keys()
    assert more == {"kv_bits", "prompt_cache"}


def test_settings_are_keywords_and_an_unknown_one_names_the_nearest(tiny):
    misspelt: Any = {"temprature": 0.0}
    asks: list[tuple[Any, Any]] = [(generate, "x"), (stream, "x"), (mq.generate_batch, ["x"])]
    for ask, prompt in asks:
        message = "unknown keyword 'temprature'; did you mean 'temperature'?"
        with pytest.raises(mq.ConfigError, match=re.escape(message)):
            ask(*tiny, prompt, **misspelt)
        with pytest.raises(TypeError, match="positional"):
            ask(*tiny, prompt, 12)
    only_one_prompt: Any = {"kv_bits": 4}
    with pytest.raises(mq.ConfigError, match=r"'kv_bits'; supported: temperature, .* batch_size"):
        mq.generate_batch(*tiny, ["x"], **only_one_prompt)
