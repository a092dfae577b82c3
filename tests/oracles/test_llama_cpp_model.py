"""llama.cpp itself opens a whole model that we have written, and computes and reads what we do."""

import unicodedata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.families import FAMILIES, write_family
from support.llama_cpp import ask, differences, llama_cpp, next_tokens, open_server, ours
from support.models import load_folder, randomise_lora
from support.npm_tokenizers import chat_tokenizer
from support.npm_tokenizers import folder as tokenizer_folder
from support.sayable import CONTEXT_OF_WINDOW, REFUSED, SAYABLE
from support.tiny_folder import write_random_model, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

import mlx_qlora as mq
from mlx_qlora.adapters.gguf_model import save_gguf_model
from mlx_qlora.data import gguf_tokenizer
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.model.weights import load_model, open_checkpoint

DRAW = np.random.default_rng(3)
PROMPTS = [DRAW.integers(3, 320, n).tolist() for n in (5, 23, 40)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_it_computes_our_probabilities_for_every_family(name, tmp_path):
    folder = tmp_path / "model"  # of whose name llama.cpp would think that it is a real Phi-3
    write_family(name, folder, **SAYABLE.get(name, {}))
    write_tokenizer(folder, bos=False)
    model, tokenizer = mq.load(folder)
    prompts = PROMPTS
    if name in CONTEXT_OF_WINDOW:
        prompts = [prompt[:5] for prompt in PROMPTS]
    if name == "phi3-long":  # llama.cpp goes by the length of the context, and not of the text
        prompts = PROMPTS[1:]
    file = save_gguf_model(model, tokenizer, tmp_path, type="f32").file
    theirs = list(llama_cpp(file, prompts))
    # It looks gelu up in a table of 16 bits.
    limit = 5e-3 if name.startswith("gemma") else 2e-5
    assert differences(theirs, ours(model, prompts)).max() < limit


# ---- the tokenizer -----------------------------------------------------------------------------

TEXTS = [
    *(gguf_tokenizer._PROBE, "Hello world", " leading", "a\n\n\nb\t\tc    d", "", "  ", "x" * 60),
    *("The café's 12345 naïve—résumé…", "def f(x):\n    return x**2  # ok\n", "你好，世界！12345"),
    *("مرحبا بالعالم", "<|im_start|>user\nHi<|im_end|>", "[INST] x [/INST]", "<think>\n\n</think>"),
    *("<start_of_turn>user\nhey<end_of_turn>\n", "🙂🙃👩‍👩‍👧‍👦", "antidisestablishmentarianism"),
]
ASKED = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 2?"},
]


def served(tokenizer: Tokenizer, folder: Path) -> Any:
    """llama.cpp with a random model of one layer and this tokenizer."""
    rows = tokenizer.vocab_size
    changes = {"num_hidden_layers": 1, "vocab_size": rows, "tie_word_embeddings": True}
    write_random_model(folder, **changes)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save(folder)
    model = load_folder(folder)
    return open_server(save_gguf_model(model, tokenizer, folder / "g", type="q4_0").file)


def assert_same_ids(server: Any, tokenizer: Tokenizer, texts: list[str] = TEXTS) -> None:
    for text in texts:
        how = {"content": text, "add_special": False, "parse_special": True}
        assert ask(server, "tokenize", **how)["tokens"] == tokenizer.encode(text), repr(text)


@pytest.mark.slow
@pytest.mark.parametrize("chat", ["llama3", "qwen3", "gemma3", "r1"])
def test_real_tokenizers_give_the_same_ids_and_the_same_chat(chat, tmp_path):
    tokenizer = chat_tokenizer(chat)
    server = served(tokenizer, tmp_path)
    assert_same_ids(server, tokenizer)
    text = tokenizer.render_chat(ASKED, add_generation_prompt=True)
    bos = tokenizer.special_tokens["bos_token"] if tokenizer.adds_bos else ""  # it adds it itself
    assert ask(server, "apply-template", messages=ASKED)["prompt"] == text.removeprefix(bos)


def test_sentencepiece_s_scores_are_found_again_in_the_merges(tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder("llama2"))
    assert_same_ids(served(tokenizer, tmp_path), tokenizer)


# Where llama.cpp cuts words at combining marks (of Hindi, Thai ...), which these take for letters.
WITHOUT_MARKS = {"tekken", "gpt-4o"}
NAMES = {gguf_tokenizer._CUTS[pre]: pre for pre in reversed(gguf_tokenizer._CUTS)}


@pytest.mark.parametrize("cut", NAMES)
def test_text_is_cut_as_llama_cpp_does_under_the_name_that_is_written(cut, tmp_path):
    """With merges that were learned from the very text, so that every cut shows."""
    backend = Backend(models.BPE(ignore_merges=NAMES[cut] in gguf_tokenizer._WHOLE_WORDS))
    backend.pre_tokenizer = gguf_tokenizer._pre_tokenizer(cut)
    backend.decoder = decoders.ByteLevel()
    how = {"vocab_size": 2000, "special_tokens": ["<|eos|>"], "show_progress": False}
    how["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(3 * TEXTS, trainers.BpeTrainer(**how))
    folder = write_tokenizer(tmp_path / "tokenizer", bos=False)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    pairs = gguf_tokenizer.gguf_tokenizer(tokenizer, tokenizer.vocab_size)
    assert pairs["tokenizer.ggml.pre"] == NAMES[cut]
    texts = TEXTS
    if cut in WITHOUT_MARKS:
        texts = ["".join(c for c in text if unicodedata.category(c)[0] != "M") for text in TEXTS]
    assert_same_ids(served(tokenizer, tmp_path / "model"), tokenizer, texts)


def test_whatever_ends_an_answer_here_ends_it_there(tmp_path):
    folder = write_random_model(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 270, 280]}')
    model, tokenizer = mq.load(folder)
    server = open_server(save_gguf_model(model, tokenizer, tmp_path).file)
    reasons = {}
    for token in (1, 270, 280, 300):
        how = {"prompt": [5, 6], "n_predict": 4, "logit_bias": [[token, 1000]]}
        reasons[token] = server.handle_completions(how)["choices"][0]["finish_reason"]
    assert reasons == {1: "stop", 270: "stop", 280: "stop", 300: "length"}


# ---- the real SmolLM2 --------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_with_an_adapter_is_ours_but_for_the_type_s_noise(smollm2_files, tmp_path):
    _, tokenizer = mq.load("smollm2-135m")
    model = load_model(open_checkpoint(smollm2_files), None, mx.float32, "resident")
    add_lora(model, LoraConfig(r=8, lora_alpha=16))
    randomise_lora(model, scale=0.015)
    questions = ("Name a fruit.", "What is the capital of France?", "Write a short poem.")
    chats = [[{"role": "user", "content": text}] for text in questions]
    prompts = [
        tokenizer.encode(tokenizer.render_chat(chat, add_generation_prompt=True)) for chat in chats
    ]
    mine = ours(model, prompts)
    file = save_gguf_model(model, tokenizer, tmp_path, type="q8_0").file
    server = open_server(file)
    for chat in chats:
        text = tokenizer.render_chat(chat, add_generation_prompt=True)
        assert ask(server, "apply-template", messages=chat)["prompt"] == text
    theirs = list(next_tokens(server, prompts, top=100))
    # Measured: 0.53 nats at most. It rounds activations to 8 bits before it multiplies; we do not.
    assert differences(theirs, mine).max() < 0.8
    for row, ours_of_it in zip(theirs, mine):
        assert ours_of_it.max() - ours_of_it[max(row, key=row.__getitem__)] < 0.1
