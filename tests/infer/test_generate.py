"""Generated text against transformers: greedy token by token, and each step of sampling."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.models import random_tokens, randomise_lora, torch_logits
from support.tiny_folder import CORPUS, hf_smollm2, write_model, write_tokenizer

import mlx_qlora as mq
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.infer.generate import (
    GenerationConfig,
    Pieces,
    PromptCache,
    Sampler,
    Stream,
    _byte_tokens,
    batch_tokens,
    filtered,
    generate,
    generate_tokens,
    prompt_ids,
    repetition_processor,
    stream,
)

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "### Instruction:\nName three colours.\n\n### Response:\n",
    "Once upon a time, in a village by the sea,",
    "Photosynthesis is the process by which",
    "The three laws of motion say that",
    "import numpy as np\n\n",
    "Dear Sir or Madam,\n",
    "1, 2, 3, 4,",
    "Water boils at",
    "The best way to learn a language is",
    "In 1969,",
    "Shakespeare wrote",
    "A recipe for bread: first,",
    "The mitochondria",
    "SELECT name FROM",
    "Q: What is 7 times 8?\nA:",
    "La Tour Eiffel est",
    "My favourite animal is the",
    "To be, or not to be,",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return mq.load(write_model(tmp_path_factory.mktemp("generate") / "model", chat=True))


def logits(seed: int = 0, rows: int = 1, V: int = 300) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, V)) * 3).astype(np.float32)


# ---- greedy ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(smollm2: tuple[Any, Any]) -> None:
    """Each of our tokens is transformers' first choice after all before it: its greedy text.

    All prompts together, as that takes a quarter of the time; the first ones also alone.
    """
    model, tokenizer = smollm2
    how, ended = GenerationConfig(max_new_tokens=64, **GREEDY), set[int]()
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    made: list[list[int]] = [[] for _ in prompts]
    for i, token in batch_tokens(model, prompts, how, None, len(prompts), ended):
        if i not in ended:
            made[i].append(token)
            ended |= {i} if token in tokenizer.eos_ids else set()
    for prompt, new in zip(prompts, made):
        scores = torch_logits(hf_smollm2(), np.array([prompt + new[:-1]]))[0, len(prompt) - 1 :]
        assert new == scores.argmax(axis=-1).tolist(), tokenizer.decode(prompt)
        assert len(new) == 64 or new[-1] in tokenizer.eos_ids
    for prompt, new in zip(PROMPTS[:3], made):
        shown = [token for token in new if token not in tokenizer.eos_ids]
        assert generate(model, tokenizer, prompt, 64, **GREEDY) == tokenizer.decode(shown)


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
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))  # pyright: ignore
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
    found, may = np.bincount(drawn, minlength=12), wanted > 0
    assert not found[~may].any()
    expected = wanted[may] * len(drawn)
    chi_square = ((found[may] - expected) ** 2 / expected).sum()
    assert may.sum() >= 5 and chi_square < 3 * may.sum()  # far below one in a thousand


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 2.0])
def test_the_repetition_penalty_is_transformers_own(penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = [3, 7, 7, 3, 250, 0]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seen]),  # pyright: ignore
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
    monkeypatch.setattr("mlx_qlora.infer.generate.generate_tokens", lambda *_: (i for i in ids))


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


def test_pieces_join_to_the_text_of_all_tokens(tokenizers: list[Any]) -> None:
    """Of texts, of tokens at random, and of those that make up characters and spaces."""
    draw = np.random.default_rng(0)
    for tokenizer in tokenizers:
        odd = sorted({i for text in SAID for i in tokenizer.encode(text)})
        odd += [tokenizer.eos_id, *sorted(_byte_tokens(tokenizer))[::5]]
        for n in range(300):
            ids = draw.choice(odd, 12).tolist() if n % 2 else None
            ids = ids or draw.integers(0, tokenizer.vocab_size - 12, 12).tolist()
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids), (tokenizer, ids)
        for text in SAID:
            ids = tokenizer.encode(text)
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_pieces_come_early_and_never_show_half_a_character(tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        text = "the fox jumps over the lazy dog"
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, ids)
        assert pieces[-1] == "" and sum(map(bool, pieces)) > len(ids) // 2
        said = pieces_of(tokenizer, tokenizer.encode("x " + "\U0001f680\U0001f9ff" * 3))
        assert not any("\ufffd" in piece for piece in said)


def test_the_work_for_a_token_does_not_grow_with_the_text(tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        ids, decoded = tokenizer.encode("the fox jumps. " * 60), []
        watched = Watched(tokenizer.decode, decoded)
        pieces: Any = Pieces(tokenizer)
        pieces._decode = watched
        for i in ids:
            pieces.add(i)
        assert max(decoded) <= 8 and sum(decoded) < 6 * len(ids)


class Watched:
    """A decode that notes how many ids it gets."""

    def __init__(self, decode: Any, sizes: list[int]) -> None:
        self.decode, self.sizes = decode, sizes

    def __call__(self, ids: list[int]) -> str:
        self.sizes.append(len(ids))
        return self.decode(ids)


@pytest.mark.parametrize("stop", [["\n\n###"], ["jumps", "ps.\n"], ["W", "What"], ["zz"], ["e f"]])
def test_a_stream_joins_to_the_text_and_never_shows_a_stop_text(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, stop: list[str]
) -> None:
    model, tokenizer = tiny
    text = "The fox jumps.\n\n## \U0001f680 ### Instruction:\nWhat"
    scripted(monkeypatch, tokenizer.encode(text))
    whole = generate(model, tokenizer, "x", stop=stop)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert whole == text[: min(ends)[1] if ends else None]
    seen = ""
    for piece in stream(model, tokenizer, "x", stop=stop):
        assert piece
        seen += piece
        assert whole.startswith(seen)
    assert seen == whole


def test_a_stream_is_the_text_with_a_real_model(tiny: tuple[Any, Any]) -> None:
    for seed in range(4):
        pieces = list(stream(*tiny, "the fox", max_new_tokens=40, temperature=2.0, seed=seed))
        assert len(pieces) > 5
        assert "".join(pieces) == generate(*tiny, "the fox", 40, 2.0, seed=seed)


# ---- cache and speed ---------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_a_prompt_cache_changes_nothing_but_the_work(tiny: tuple[Any, Any], penalty: float) -> None:
    model, tokenizer = tiny
    cache = PromptCache()
    how: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": penalty}
    first = "the quick brown fox jumps over"
    for prompt, least in ((first, 0), (first + " it", 7), (first, 7), (first, 7), ("dog", 0)):
        made = stream(model, tokenizer, prompt, 12, prompt_cache=cache, **how)
        assert "".join(made) == generate(model, tokenizer, prompt, 12, **how)
        assert made.speed.cached_tokens >= least
        assert made.speed.prompt_tokens == len(prompt_ids(tokenizer, prompt))
        assert cache.ids[: made.speed.prompt_tokens] == prompt_ids(tokenizer, prompt)


def test_a_prompt_cache_begins_anew_for_other_weights(tmp_path: Path) -> None:
    model, tokenizer = mq.load(write_model(tmp_path / "model"))
    cache = PromptCache()
    assert generate(model, tokenizer, "the fox", 5, 0.0, prompt_cache=cache)
    mq.add_lora(model, mq.LoraConfig(r=4))
    for seed in (1, 2):  # as after a step of training
        randomise_lora(model, seed, scale=0.5)
        made = stream(model, tokenizer, "the fox", 9, 0.0, prompt_cache=cache)
        assert "".join(made) == generate(model, tokenizer, "the fox", 9, 0.0)
        assert made.speed.cached_tokens == 0
    with mq.disabled(model):
        assert cache.common(model, prompt_ids(tokenizer, "the fox")) == 0
    assert cache.common(model, prompt_ids(tokenizer, "the fox")) > 0


def test_an_exception_within_leaves_an_empty_cache(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    cache = PromptCache()
    generate(model, tokenizer, "the fox", 4, prompt_cache=cache)
    made = stream(model, tokenizer, "the fox jumps", 50, prompt_cache=cache)
    next(made)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(made)
    assert cache.ids == []


def test_a_quantised_cache_holds_nearly_the_same(tmp_path: Path) -> None:
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
        with pytest.raises(mq.ConfigError, match=f"made with kv_bits={bits}; got None"):
            generate(model, tokenizer, "x", prompt_cache=cache)


def test_kv_bits_that_cannot_be_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(mq.ConfigError, match="kv_bits must be one of 2, 4, 8, or None; got 3"):
        generate(*tiny, "x", kv_bits=3)
    with pytest.raises(mq.ConfigError, match="multiple of 32; this model's have 16"):
        generate(*tiny, "x", kv_bits=4)


def test_speed_counts_what_was_done(tiny: tuple[Any, Any]) -> None:
    made: Stream = stream(*tiny, "the fox", max_new_tokens=9, temperature=0, repetition_penalty=1)
    assert made.speed.new_tokens == 0
    list(made)
    speed = made.speed
    assert speed.prompt_tokens == len(prompt_ids(tiny[1], "the fox"))
    assert len(made.ids) <= speed.new_tokens <= 9
    assert speed.prompt_tokens_per_second > 0 and speed.tokens_per_second > 0
    assert speed.peak_memory_bytes > 0


def test_a_seed_gives_one_text_in_every_process(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    code = (
        "import sys, mlx_qlora as mq\n"
        "from mlx_qlora.infer.generate import generate\n"
        "made = generate(*mq.load(sys.argv[1]), 'the fox', 24, seed=11)\n"
        "sys.stdout.buffer.write(made.encode())"
    )
    command = [sys.executable, "-c", code, str(tokenizer.source)]
    told = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[2])
    assert told.stdout.decode() == generate(model, tokenizer, "the fox", 24, seed=11)


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
        ({"stop": [""]}, "stop must hold texts that are not empty; got ['']"),
        ({"seed": -1}, "seed must be in [0, 2**64); got -1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_rule(
    tiny: tuple[Any, Any], how: dict[str, Any], words: str
) -> None:
    with pytest.raises(mq.ConfigError) as caught:
        generate(*tiny, "x", **how)
    assert str(caught.value) == words
