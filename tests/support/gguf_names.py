"""How llama.cpp names a Llama's tensors and orders the rows of q and k."""

import re

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that Hugging Face calls `name`."""
    stem, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}.{leaf}" if layer else f"{NAMES[stem]}.{leaf}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * Hd, ...) of q or k in llama.cpp's order.

    Its RoPE rotates neighbours (2i, 2i + 1), so its row 2i is i and 2i + 1 is i + Hd / 2.
    """
    rows, size = [], len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            rows += [head * size + i, head * size + i + size // 2]
    return weight[rows]


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permuted`."""
    order = permuted(np.arange(len(weight)), heads)
    back = np.empty_like(weight)
    back[order] = weight
    return back
