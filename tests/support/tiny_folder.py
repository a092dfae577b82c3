"""A whole tiny model folder, rows for it, and SmolLM2 in transformers, for several test files."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from support.models import LLAMA3_ROPE, TINY, make_hf_model, save_hf

from mlx_qlora.model.hub import resolve

CORPUS = [
    "### Instruction:\nName a colour.\n\n### Response:\nBlue.",
    "### Input:\nthe quick brown fox jumps over the lazy dog",
    "What is the capital of France? The capital of France is Paris.",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path, *, bos: bool = True, chat: bool = False) -> Path:
    """A byte-level BPE of 320 ids, such as TINY's models have, trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|eos|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<|bos|>"} if bos else {}
    config |= {"chat_template": CHAT} if chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_model(folder: Path, *, chat: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A whole tiny model as the hub has it: config, safetensors and tokenizer."""
    save_hf(make_hf_model(seed, **{"rope_parameters": LLAMA3_ROPE, **changes}), folder)
    # The hub's Llamas, and mlx-lm, know transformers v4's spelling of RoPE.
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(config))
    return write_tokenizer(folder, chat=chat)


def write_random_model(folder: Path, **changes: Any) -> Path:
    """A whole tiny chat model whose widths groups of 64 divide.

    Written without torch, whose import takes longer than all that a test does with the model.
    """
    write_tokenizer(folder, chat=True)
    config = {**TINY, "intermediate_size": 192, "rope_theta": 1e4, "model_type": "llama"}
    config |= {"architectures": ["LlamaForCausalLM"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    D, F, K, V = 64, 192, 32, config["vocab_size"]
    layer = {f"self_attn.{name}_proj": (D, D) for name in "qo"}
    layer |= {f"self_attn.{name}_proj": (K, D) for name in "kv"}
    layer |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    layer |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head": (V, D)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    draw = np.random.default_rng(0)
    weights = {
        f"{name}.weight": (draw.normal(size=shape) * 0.08 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def hf_smollm2(path: Path | None = None) -> Any:
    """SmolLM2, or another GGUF, as transformers dequantises it, in float32; takes seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    path = path or resolve("smollm2-135m").path
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def write_rows(path: Path, n: int) -> Path:
    """Alpaca rows, all different, with an easy answer."""
    draw = random.Random(0)
    rows = [
        {"instruction": "count", "input": str(draw.randrange(10**6)), "output": f"on {i % 3}"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
