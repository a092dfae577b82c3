"""Every family against transformers, PEFT and mlx-lm, through one tree."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.families import FAMILIES, WINDOW, make_family, write_family
from support.gradients import gap
from support.models import load_folder, our_logits, random_tokens, randomise_lora, torch_logits

import mlx_qlora as mq
from mlx_qlora.adapters.peft import save_adapter
from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.errors import WeightsError
from mlx_qlora.model import families
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.train.engine import loss_and_grads
from mlx_qlora.tree import flat

T, CLOSE = 40, 1e-5
TOKENS = random_tokens(2, T, seed=3)
# What mlx-lm computes otherwise, or has no model for.
NOT_IN_MLX_LM = {
    "ministral": "no such model",
    "cwm": "no such model",
    "llama-gelu": "it computes silu whatever hidden_act says",
    "olmo3": "it stretches the RoPE of layers with a window, too",
}
NO_WINDOW_IN_MLX_LM = ("mistral-window", "qwen2-window", "phi3", "gemma2")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> SimpleNamespace:
    """A family's name, transformers' model and its folder."""
    folder = tmp_path_factory.mktemp("family") / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = write_family(request.param, folder)
    return SimpleNamespace(name=request.param, hf=hf, folder=folder)


def adapted(folder: Path, **fields: Any) -> Any:
    model = load_folder(folder)
    add_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **fields}))
    randomise_lora(model)
    return model


def a_batch() -> Batch:
    """Two rows, three documents, the longest beyond every window; some labels are not learned."""
    labels = np.concatenate([TOKENS[:, 1:], TOKENS[:, :1]], axis=1)
    documents = np.array([(0, 0, T - 1), (1, 0, 9), (1, 9, T - 1)], np.int32)
    labels[0, :5] = labels[1, 8] = labels[:, T - 1] = IGNORE
    return Batch(mx.array(TOKENS), mx.array(labels), documents)


# ---- forward -----------------------------------------------------------------------------------


def test_logits_and_cached_decoding_are_those_of_transformers(family):
    theirs, model = torch_logits(family.hf, TOKENS), load_folder(family.folder)
    spread = theirs.std()
    assert np.abs(our_logits(model, TOKENS) - theirs).max() < CLOSE * spread

    import torch

    cache, ours, outs = model.make_cache(), [], []
    # Dynamic RoPE remembers the longest text: theirs must not have seen this one.
    fresh, known = make_family(family.name), None
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, T))]:
        ours.append(np.array(model(mx.array(TOKENS[:, start:end]), cache)))
        with torch.no_grad():
            new = torch.from_numpy(TOKENS[:, start:end]).long()
            result = fresh(new, cache=known, use_cache=True)
        known = result.cache
        outs.append(result.logits.numpy())
    both = (np.concatenate(each, axis=1) for each in (ours, outs))
    assert np.abs(np.subtract(*both)).max() < CLOSE * spread


def test_what_a_family_does_differently_is_seen_by_the_comparison():
    """The control: each fact of a config, taken away, moves the logits."""
    for name, fact in (
        ("granite", {"residual_scale": 1.0}),
        ("qwen3", {"head_norms": ""}),
        ("smollm3", {"unrotated": ()}),
        ("olmo3", {"windows": ()}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma3_text", {"rope_of_windows": None}),
    ):
        config = make_family(name).config.to_dict()
        assert getattr(families.LlamaConfig.from_hf(config), next(iter(fact))) != fact


# ---- adapters ----------------------------------------------------------------------------------


def test_lora_gradients_are_peft_s_and_the_adapter_opens_there_without_a_warning(family, tmp_path):
    import torch
    from peft import PeftModel

    # Dynamic RoPE remembers the longest text of a model: this one has seen none.
    hf, model, batch = make_family(family.name), adapted(family.folder), a_batch()
    save_adapter(model, tmp_path / "a", "org/base")
    loss, _, grads = loss_and_grads(model, batch, recompute="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # transformers' of its own names
        theirs = PeftModel.from_pretrained(hf, tmp_path / "a", is_trainable=True)
    total, labels = torch.zeros(()), np.array(batch.labels)
    for row, start, end in batch.documents.tolist():
        tokens = torch.from_numpy(TOKENS[row : row + 1, start:end]).long()
        wanted = torch.from_numpy(labels[row, start:end]).long()
        logits = theirs(tokens).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=CLOSE)
    ours = flat(grads)
    wanted = {n: w.grad.numpy() for n, w in theirs.named_parameters() if w.grad is not None}
    assert len(wanted) == len(ours)
    for name, exact in wanted.items():
        path = name.removeprefix("base_model.model.").replace(".default", "")
        assert np.abs(np.array(ours[path]) - exact).max() < 1e-4 * np.abs(exact).max(), path


def test_every_way_to_compute_gradients_is_the_same(family, use_device):
    """Recomputed, compiled, packed, and on the route of a GPU."""
    model, batch = adapted(family.folder, lora_dropout=0.2), a_batch()
    key = mx.random.key(4)
    loss, _, grads = loss_and_grads(model, batch, key, "none")
    for recompute in (1, "all"):
        again = loss_and_grads(model, batch, key, recompute)
        assert again[0].item() == pytest.approx(loss.item(), rel=1e-6)
        assert gap(grads, again[2]) < CLOSE
    from mlx_qlora import device

    use_device(device.METAL, dtype="float32")
    fused = loss_and_grads(model, batch, key, "none")
    assert fused[0].item() == pytest.approx(loss.item(), rel=1e-5)
    assert gap(grads, fused[2]) < 1e-4


def test_dora_trains_and_a_merge_computes_the_same(family, tmp_path):
    model = adapted(family.folder, use_dora=True)
    grads = loss_and_grads(model, a_batch(), recompute="none")[2]
    assert all(float(mx.abs(g).max()) > 0 for name, g in flat(grads).items() if "lora_B" in name)
    logits = our_logits(model, TOKENS)
    mq.merge(model)
    assert np.abs(our_logits(model, TOKENS) - logits).max() < CLOSE * logits.std()


def test_packed_weights_compute_what_they_stand_for(family):
    quant = mq.QuantConfig(8, 32)
    packed = load_folder(family.folder, quant, "quantized")
    dense = load_folder(family.folder, quant, "resident")
    logits = our_logits(dense, TOKENS)
    assert np.abs(our_logits(packed, TOKENS) - logits).max() < 2 * CLOSE * logits.std()


# ---- other readers -----------------------------------------------------------------------------


def test_a_merged_folder_is_the_same_model_to_transformers_and_mlx_lm(family, tmp_path):
    from mlx_lm import utils
    from support.tiny_folder import write_tokenizer
    from transformers import AutoModelForCausalLM

    from mlx_qlora.data.tokenizer import load_tokenizer

    model = adapted(family.folder)
    logits = our_logits(model, TOKENS)
    write_tokenizer(family.folder)
    tokenizer = load_tokenizer(family.folder)
    mq.save_merged(model, tokenizer, tmp_path / "merged", dtype="float32")
    again = load_folder(tmp_path / "merged")
    assert np.abs(our_logits(again, TOKENS) - logits).max() < CLOSE * logits.std()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="float32", attn_implementation="eager"
    ).eval()
    assert np.abs(torch_logits(theirs, TOKENS) - logits).max() < CLOSE * logits.std()
    if family.name in NOT_IN_MLX_LM:
        return
    mlx_lm = utils.load_model(tmp_path / "merged")[0]
    mlx_lm.set_dtype(mx.float32)
    n = WINDOW if family.name in NO_WINDOW_IN_MLX_LM else T
    found = np.array(mlx_lm(mx.array(TOKENS[:, :n])))
    assert np.abs(found - logits[:, :n]).max() < CLOSE * logits.std()


# ---- what is refused ---------------------------------------------------------------------------

REFUSED = {
    "mixture of experts": {"model_type": "mixtral", "num_local_experts": 8},
    "GatedDeltaNet": {"model_type": "qwen3_5"},
    "embeddings in each layer": {"model_type": "gemma4_text"},
    "attention sinks": {"model_type": "gpt_oss"},
    "an MLP without a gate": {"model_type": "nemotron"},
    "an encoder, which": {"model_type": "bert"},
    "its text part, 'gemma3_text', can be tuned alone": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text"},
        "vision_config": {},
    },
    "an unknown architecture": {"model_type": "brand_new"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_no_family_describes_is_refused_in_a_sentence_that_says_what_it_is(why):
    with pytest.raises(WeightsError) as raised:
        families.LlamaConfig.from_hf(REFUSED[why])
    message = str(raised.value)
    assert why in message and "\n" not in message


def test_a_window_is_not_forgotten_by_the_cache(tmp_path):
    """mlx-lm's rotating cache holds no more keys than the window has."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    write_family("ministral", tmp_path)
    kinds = [type(cache) for cache in load_folder(tmp_path).make_cache()]
    assert kinds == [KVCache, RotatingKVCache] * 2
    assert load_folder(tmp_path).make_cache()[1].max_size == WINDOW


def test_two_spellings_that_contradict_each_other_are_an_error():
    config = make_family("qwen2").config.to_dict()
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert families.LlamaConfig.from_hf({**config, "rope_theta": 1e6}).rope.theta == 1e6
    with pytest.raises(WeightsError, match=r"rope_theta = 5\.0, and 1000000\.0 elsewhere"):
        families.LlamaConfig.from_hf({**config, "rope_theta": 5.0})


@pytest.mark.parametrize("name", ["ministral", "gemma2", "gemma3_text", "exaone4", "glm4"])
def test_text_is_the_same_alone_in_a_batch_and_after_a_prompt_cache(name, tmp_path):
    """Beyond the window, where a cache has forgotten the first tokens."""
    from support.tiny_folder import write_tokenizer

    write_family(name, tmp_path)
    write_tokenizer(tmp_path)
    model, tokenizer = mq.load(tmp_path, dtype="float32")
    prompts: list[Any] = [[5, 9, 4] * 6, [7, 8] * 4, [11, 3, 6, 2 + 9] * 5]
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    alone = [mq.generate(model, tokenizer, prompt, **how) for prompt in prompts]
    assert mq.generate_batch(model, tokenizer, prompts, batch_size=2, **how) == alone
    cache = mq.PromptCache()
    for i in (0, 1, 0, 2, 2):
        assert mq.generate(model, tokenizer, prompts[i], prompt_cache=cache, **how) == alone[i]
    if any(model.config.windows):
        with pytest.raises(mq.ConfigError, match="kv_bits"):
            mq.generate(model, tokenizer, prompts[0], kv_bits=8, **how)


def test_a_prompt_beyond_one_prefill_is_rotated_by_its_whole_length(tmp_path):
    """LongRoPE's factors depend on it; mlx-lm computes 2,048 tokens at a time."""
    from mlx_qlora.infer.tokens import PREFILL, GenerationConfig, generate_tokens

    long = {"original_max_position_embeddings": PREFILL + 50, "max_position_embeddings": 8192}
    hf = make_family("phi3-long", **long)
    hf.save_pretrained(tmp_path)
    model, prompt = load_folder(tmp_path), random_tokens(1, PREFILL + 200, seed=5)[0].tolist()
    greedy = GenerationConfig(temperature=0.0, repetition_penalty=1.0, max_new_tokens=2)
    first = next(generate_tokens(model, prompt, greedy))
    assert first == int(torch_logits(hf, np.array([prompt]))[0, -1].argmax())
    assert our_logits(model, np.array([prompt]))[0, -1].argmax() == first
