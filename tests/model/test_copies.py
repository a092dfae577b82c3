"""Copies of a model, by copy.deepcopy and by pickle, and what its parts say of themselves."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.adapters import adapted
from support.families import FAMILIES, write_family
from support.models import load_folder, our_logits, random_tokens
from support.tiny_folder import write_rows

import mlx_qlora as mq
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.tree import flat

TOKENS = random_tokens(1, 12)
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def two_adapters(base: Path) -> LlamaForCausalLM:
    model = mq.add_lora(load_folder(base), mq.LoraConfig(r=2))
    mq.switch(model, None)
    return mq.switch(model, "default")


MODELS: dict[str, Callable[[Path], Any]] = {
    "plain": load_folder,
    "bfloat16": lambda base: load_folder(base, dtype=mx.bfloat16),
    "4 bits": lambda base: load_folder(base, QuantConfig(4, 32), "quantized"),
    "4 bits, kept dense": lambda base: load_folder(base, QuantConfig(4, 32)),
    "LoRA": adapted,
    "DoRA": lambda base: adapted(base, mq.LoraConfig(r=2, use_dora=True)),
    "PiSSA": lambda base: adapted(base, mq.LoraConfig(r=2, init_lora_weights="pissa")),
    "adapters beside each other": two_adapters,
    "merged": lambda base: mq.merge(adapted(base)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_of_a_model_computes_the_same_and_shares_nothing(
    hf_tiny: tuple[Any, Path], kind: str, how: str
) -> None:
    model = MODELS[kind](hf_tiny[1])
    before = our_logits(model, TOKENS)
    copied = COPIES[how](model)
    np.testing.assert_array_equal(our_logits(copied, TOKENS), before)
    assert repr(copied) == repr(model)
    assert flat(copied.trainable_parameters()).keys() == flat(model.trainable_parameters()).keys()
    copied.model.norm.weight = copied.model.norm.weight * 2
    np.testing.assert_array_equal(our_logits(model, TOKENS), before)


def family_model(tmp_path: Path, family: str) -> LlamaForCausalLM:
    write_family(family, tmp_path / "model")
    return load_folder(tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_copied_and_pickled(tmp_path: Path, family: str) -> None:
    model = family_model(tmp_path, family)
    for how in COPIES.values():
        np.testing.assert_array_equal(our_logits(how(model), TOKENS), our_logits(model, TOKENS))


def test_linears_embeddings_and_examples_say_what_they_hold(
    chat_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = mq.load(chat_folder, QuantConfig(4, 32))
    assert repr(model.model.embed_tokens) == ("Embedding(320 x 64, float32, 4 bits, groups of 32)")
    mq.add_lora(model, mq.LoraConfig(r=4, lora_alpha=8, target_modules=["k_proj"]))
    shown = repr(model.layers[0].self_attn.k_proj)
    assert shown.startswith("LoRALinear(r=4, scale=2, dropout=0.1")
    assert "Linear(32 x 64, float32, 4 bits, groups of 32)" in shown
    assert repr(load_folder(chat_folder).lm_head) == "Linear(320 x 64, float32)"
    rows = mq.read_examples(write_rows(tmp_path / "rows.jsonl", 12), tokenizer, mq.DataConfig())
    tokens = int(rows[:5].lengths.sum())
    assert repr(rows[:5]).startswith(
        f"Examples(5 of {tmp_path / 'rows.jsonl'}, {tokens:,} tokens, "
    )
    assert repr(rows[:0]).endswith("0 tokens, 0% learned)")
