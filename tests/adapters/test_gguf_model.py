"""A whole model as a GGUF file: what is in it, read by the `gguf` package and by our own reader."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from support import go_template
from support.adapters import adapted
from support.families import FAMILIES, write_family
from support.gguf_names import gguf_name, permuted
from support.models import our_logits, random_tokens
from support.npm_tokenizers import chat_tokenizer
from support.sayable import CONTEXT_OF_WINDOW, REFUSED, SAYABLE
from support.tiny_folder import write_random_model, write_tokenizer

import mlx_qlora as mq
from mlx_qlora.adapters.gguf_model import TYPES, save_gguf_model
from mlx_qlora.adapters.gguf_model import go_template as as_go_template
from mlx_qlora.data.gguf_tokenizer import _PROBE, gguf_tokenizer
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import AdapterError, ConfigError, TokenizerError, WeightsError
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers

TOKENS = random_tokens(2, 40)
HEADS = {"attn_q": 4, "attn_k": 2}  # of the tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """A tiny chat model with an adapter, and its tokenizer."""
    folder = write_random_model(tmp_path_factory.mktemp("tiny") / "model")
    return adapted(folder, LoraConfig(r=4, lora_alpha=16)), load_tokenizer(folder)


# ---- the weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_every_matrix_is_the_merged_one_in_the_package_s_own_packing(tiny, tmp_path, type):
    model, tokenizer = tiny
    written = save_gguf_model(model, tokenizer, tmp_path, type=type)
    assert written.file == tmp_path / f"model-{type}.gguf"
    assert written.bytes == written.file.stat().st_size and written.command is None
    merged = {name: np.array(layer.merged()) for name, layer in lora_layers(model)}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written.file).tensors}
    for name, weight in merged.items():
        stored = tensors[gguf_name(f"{name}.weight")]
        kind = stored.name.split(".")[2]
        weight = permuted(weight, HEADS[kind]) if kind in HEADS else weight
        assert stored.tensor_type == Type[type.upper()]
        np.testing.assert_array_equal(stored.data, quantize(weight, stored.tensor_type))
    head = Type.Q8_0 if type[:2] in ("q4", "q5") else Type[type.upper()]
    assert {tensors[f"{n}.weight"].tensor_type for n in ("token_embd", "output")} == {head}
    assert {t.tensor_type for n, t in tensors.items() if "norm" in n} == {Type.F32}


def test_our_own_reader_opens_it_and_computes_the_adapted_model(tiny, tmp_path):
    model, tokenizer = tiny
    logits = our_logits(model, TOKENS)
    back, again = mq.load(save_gguf_model(model, tokenizer, tmp_path, type="f32").file)
    assert np.abs(our_logits(back, TOKENS) - logits).max() < 1e-5 * logits.std()
    assert np.array_equal(our_logits(model, TOKENS), logits), "the model keeps its adapter"
    assert again.encode("What is it?<|eos|>") == tokenizer.encode("What is it?<|eos|>")
    small, _ = mq.load(save_gguf_model(model, tokenizer, tmp_path, type="q8_0").file)
    assert 0 < np.abs(our_logits(small, TOKENS) - logits).max() < 0.2 * logits.std()


def test_packed_weights_are_written_too_and_a_base_needs_no_adapter(tmp_path):
    folder = write_random_model(tmp_path / "model")
    model, tokenizer = mq.load(folder, mq.QuantConfig(4, 32))
    back, _ = mq.load(save_gguf_model(model, tokenizer, tmp_path / "g", type="f32").file)
    logits = our_logits(model, TOKENS)
    assert np.abs(our_logits(back, TOKENS) - logits).max() < 1e-5 * logits.std()


def test_columns_that_no_group_of_32_divides_are_kept_in_16_bits(tmp_path):
    folder = tmp_path / "model"
    write_family("qwen3", folder, hidden_size=48, intermediate_size=80)
    write_tokenizer(folder)
    model, tokenizer = mq.load(folder)
    written = save_gguf_model(model, tokenizer, tmp_path, type="q4_0")
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(written.file).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_down.weight"] == Type.F16
    assert kinds["blk.0.attn_output.weight"] == Type.Q4_0
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight + 7e4
    with pytest.raises(WeightsError, match=r"up_proj\.weight is too large for f16; .* bf16"):
        save_gguf_model(model, tokenizer, tmp_path, type="f16")


# ---- families ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_a_family_s_file_is_read_back_as_the_same_model(name, tmp_path):
    write_family(name, tmp_path, **SAYABLE.get(name, {}))
    write_tokenizer(tmp_path, bos=False)
    model, tokenizer = mq.load(tmp_path)
    back, _ = mq.load(save_gguf_model(model, tokenizer, tmp_path / "g", type="f32").file)
    tokens = TOKENS
    if name in CONTEXT_OF_WINDOW:  # see `as_llama_cpp_says`
        assert back.config.max_position_embeddings == 7
        tokens = TOKENS[:, :7]
    logits = our_logits(model, tokens)
    assert np.abs(our_logits(back, tokens) - logits).max() < 1e-5 * logits.std()


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused_by_name(name, tmp_path):
    family = name if name in FAMILIES else name.split("-")[0]
    write_family(family, tmp_path)
    write_tokenizer(tmp_path, bos=False)
    model, tokenizer = mq.load(tmp_path)
    with pytest.raises(WeightsError, match=REFUSED[name]):
        save_gguf_model(model, tokenizer, tmp_path / "g")
    assert not (tmp_path / "g").exists()


# ---- the tokenizer -----------------------------------------------------------------------------


def test_tokens_ends_and_templates_are_those_of_the_folder(tmp_path):
    folder = write_random_model(tmp_path / "model", vocab_size=320)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7, 9]}))
    model, tokenizer = mq.load(folder)
    file = save_gguf_model(model, tokenizer, tmp_path, "org/Base-1B").file
    _, back = mq.load(file)
    assert back.eos_ids == tokenizer.eos_ids == {1, 7, 9} and back.eos_id == tokenizer.eos_id
    assert (back.bos_id, back.adds_bos) == (tokenizer.bos_id, tokenizer.adds_bos)
    assert back.chat_template == tokenizer.chat_template and back.tool_template == "{{ tools }}"
    reader = gguf.GGUFReader(file)
    pairs = {key: field.contents() for key, field in reader.fields.items()}
    assert pairs["general.type"] == "model" and pairs["general.name"] == "Base-1B"
    assert pairs["general.base_model.0.repo_url"] == "https://huggingface.co/org/Base-1B"
    assert pairs["tokenizer.ggml.pre"] == "gpt-2"
    assert pairs["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


@pytest.mark.parametrize(
    ("chat", "pre"),
    [("llama3_1", "llama-bpe"), ("qwen3", "qwen2"), ("deepseek_v3", "hunyuan-dense")],
)
def test_real_tokenizers_are_known_by_how_they_cut_text_and_are_read_back(chat, pre):
    tokenizer = chat_tokenizer(chat)
    pairs = gguf_tokenizer(tokenizer, tokenizer.vocab_size)
    assert pairs["tokenizer.ggml.pre"] == pre
    types = {"tokenizer.ggml.token_type": np.array(pairs["tokenizer.ggml.token_type"])}
    back = load_tokenizer(Path("model.gguf"), pairs | types)
    for text in (_PROBE, "Hello 12345 world's", "<|im_start|>user<|eot_id|> </think>"):
        assert back.encode(text) == tokenizer.encode(text)


def test_rows_without_a_token_are_padded_and_tokens_without_a_row_are_left_out():
    tokenizer = chat_tokenizer("qwen3")
    pairs = gguf_tokenizer(tokenizer, 151936)
    assert pairs["tokenizer.ggml.tokens"][-1] == "[PAD151935]"
    assert pairs["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    few = gguf_tokenizer(tokenizer, 151643)
    assert len(few["tokenizer.ggml.tokens"]) == len(few["tokenizer.ggml.token_type"]) == 151643
    assert "tokenizer.ggml.eos_token_id" not in few


def changed(folder: Path, change: Any) -> Tokenizer:
    """The tiny tokenizer with another `tokenizer.json`."""
    path = write_tokenizer(folder) / "tokenizer.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    return load_tokenizer(folder)


def by_words(said: dict[str, Any]) -> None:
    said["pre_tokenizer"] = {"type": "Whitespace"}


def in_lower_case(said: dict[str, Any]) -> None:
    said["normalizer"] = {"type": "Lowercase"}


def whole_words(said: dict[str, Any]) -> None:
    said["model"]["ignore_merges"] = True
    said["model"]["vocab"]["never made"] = 320


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (by_words, "it splits text unlike any of llama-bpe, "),
        (in_lower_case, "its normalizer is Lowercase"),
        (whole_words, "it splits text as gpt-2, but"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(change, why, tmp_path):
    with pytest.raises(TokenizerError, match=f"llama.cpp does not support this tokenizer: {why}"):
        gguf_tokenizer(changed(tmp_path, change), 320)


def test_merges_that_make_every_word_may_be_skipped_or_not(tmp_path):
    def whole(said: dict[str, Any]) -> None:
        said["model"]["ignore_merges"] = True

    assert gguf_tokenizer(changed(tmp_path, whole), 320)["tokenizer.ggml.pre"] == "gpt-2"


def test_a_tiktoken_file_alone_is_not_enough(tmp_path):
    import llama_models

    place = Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"
    shutil.copyfile(place, tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json, .* write one with trans"):
        gguf_tokenizer(load_tokenizer(tmp_path), 128256)


# ---- Ollama ------------------------------------------------------------------------------------

CHATS = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
]


def chats() -> list[list[dict[str, str]]]:
    texts = ["Be brief.", "What is 2 + 2?", "4", "And\n\n3 + 3?", "6.", "Thanks"]
    return [[{"role": r, "content": t} for r, t in zip(roles, texts)] for roles in CHATS]


@pytest.mark.parametrize("chat", ["llama3", "qwen2_5", "gemma3", "smollm2"])
def test_ollama_writes_a_chat_as_the_tokenizer_does(chat, smollm2_files):
    if chat == "smollm2":
        _, tokenizer = mq.load("smollm2-135m")
    else:
        tokenizer = chat_tokenizer(chat)
    template = as_go_template(tokenizer)
    assert template is not None
    bos = tokenizer.special_tokens.get("bos_token", "") if tokenizer.adds_bos else ""
    for messages in chats():
        text = tokenizer.render_chat(messages, add_generation_prompt=True)
        assert go_template.render(template, messages) == text.removeprefix(bos)


@pytest.mark.parametrize(
    "source",
    [
        "{% if not messages[1] %}{{ raise_exception('two at least') }}{% endif %}",
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }} {{ m['content'] }}\n{% endfor %}",
        '{% for m in messages %}"""{{ m["content"] }}{% endfor %}',
        "{% for m in messages %}{{ '{{' }}{{ m['content'] }}{% endfor %}",
        None,
    ],
)
def test_a_template_that_go_cannot_say_is_left_to_the_file(source, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    if source is not None:
        tokenizer = tokenizer.with_chat_template(source)
    assert as_go_template(tokenizer) is None


def test_the_modelfile_names_the_file_its_template_and_what_ends_an_answer(tiny, tmp_path):
    model, tokenizer = tiny
    save_gguf_model(model, tokenizer, tmp_path, type="q4_0")
    save_gguf_model(model, tokenizer, tmp_path)  # ours is written again
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[1] == "FROM ./model-q8_0.gguf" and lines[2].startswith('TEMPLATE """{{ range')
    assert lines[3:] == ['PARAMETER stop "<|eos|>"']
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("Modelfile", "model-q4_0.gguf", "model-q8_0.gguf")
    ]
    (tmp_path / "Modelfile").write_text("FROM llama3.2\n")
    with pytest.raises(AdapterError, match=r"Modelfile exists, without these lines"):
        save_gguf_model(model, tokenizer, tmp_path)
    assert (tmp_path / "Modelfile").read_text() == "FROM llama3.2\n"


def test_a_file_of_others_is_kept(tiny, tmp_path):
    model, tokenizer = tiny
    (tmp_path / "model-q8_0.gguf").write_bytes(b"GGUF of mine")
    with pytest.raises(ConfigError, match=r"model-q8_0\.gguf is not known to be from mlx-qlora"):
        save_gguf_model(model, tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"type must be one of q8_0, .*q4_k_m.*; got 'q4'"):
        save_gguf_model(model, tokenizer, tmp_path, type="q4")
    assert (tmp_path / "model-q8_0.gguf").read_bytes() == b"GGUF of mine"


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ConfigError, match=r"needs [\d,]+ bytes, and .* has 1,000 free"):
        save_gguf_model(*tiny, tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_dense_matrix_is_in_memory_at_a_time(tmp_path):
    folder = write_random_model(tmp_path / "model", num_hidden_layers=8)
    model, tokenizer = mq.load(folder, mq.QuantConfig(4, 32))
    add_lora(model, LoraConfig(r=2))
    file = save_gguf_model(model, tokenizer, tmp_path / "g", type="f32").file  # all is loaded now
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    save_gguf_model(model, tokenizer, tmp_path / "g", type="f32")
    of_numpy, largest = tracemalloc.get_traced_memory()[1], 320 * 64 * 4
    tracemalloc.stop()
    assert file.stat().st_size > 20 * largest
    assert mx.get_peak_memory() - before < 5 * largest and of_numpy < 9 * largest


def test_dequantised_it_is_what_the_package_reads(tiny, tmp_path):
    model, tokenizer = tiny
    file = save_gguf_model(model, tokenizer, tmp_path, type="bf16").file
    back, _ = mq.load(file)
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    ours = np.array(back.model.layers[1].mlp.up_proj.weight.astype(mx.float32))
    np.testing.assert_array_equal(ours, dequantize(tensor.data, tensor.tensor_type))
