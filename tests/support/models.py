"""Tiny real Llamas made by transformers, and what tests do with them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.model.weights import load_model, open_checkpoint

# Two layers, grouped heads, nothing a power of two that need not be one.
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# As its config.json says, but for RoPE.
LLAMA_31_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_hf_model(seed: int = 0, **changes: Any) -> Any:
    """A random transformers LlamaForCausalLM in float32; keywords change TINY."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():  # transformers' own init (std 0.02) hides errors below 1e-4
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.08 + (1.0 if weight.ndim == 1 else 0.0))
    return model


def save_hf(model: Any, folder: Path, **how: Any) -> Path:
    """Saves a transformers model as a folder of safetensors."""
    model.save_pretrained(folder, **how)
    return folder


def quantise_with_mlx_lm(source: Path, folder: Path, how: dict[str, Any]) -> Any:
    """Writes an MLX folder as `mlx_lm.convert` does; returns mlx-lm's model of that folder."""
    from mlx_lm import utils

    model, config = utils.load_model(source)
    model, config = utils.quantize_model(model, config, **how)
    utils.save_model(folder, model)
    utils.save_config(config, folder / "config.json")
    return utils.load_model(folder)[0]


def load_folder(
    path: Path,
    quantize: QuantConfig | None = None,
    matmul: str = "resident",
    dtype: mx.Dtype = mx.float32,
) -> LlamaForCausalLM:
    """Our model from a folder or GGUF file, without its tokenizer."""
    files = ModelFiles(path=path, hf_id=str(path), revision=None, source=str(path))
    return load_model(open_checkpoint(files), quantize, dtype, matmul)  # pyright: ignore


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of a transformers (or PEFT) model for (B, T) tokens."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def our_logits(model: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def random_tokens(B: int, T: int, vocab: int = TINY["vocab_size"], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (B, T)).astype(np.int32)


def randomise_lora(model: LlamaForCausalLM, seed: int = 1, scale: float = 0.05) -> None:
    """Gives lora_B values too: an adapter whose update is zero proves nothing."""
    from mlx.utils import tree_flatten, tree_unflatten

    leaves = tree_flatten(model.trainable_parameters())
    keys = mx.random.split(mx.random.key(seed), len(leaves))
    new = [(n, mx.random.normal(w.shape, key=k) * scale) for (n, w), k in zip(leaves, keys)]
    model.update(tree_unflatten(new))
    mx.eval(model.trainable_parameters())
