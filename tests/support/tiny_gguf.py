"""A tiny GGUF file of llama's architecture, with the metadata that a test wants."""

from pathlib import Path
from typing import Any

import numpy as np


def write_tiny_gguf(path: Path, metadata: dict[str, Any] | None = None) -> Path:
    """One layer of random weights; metadata without a `general.` is the architecture's."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"embedding_length": 64, "block_count": 1, "feed_forward_length": 96}
    sizes |= {"context_length": 512, "attention.head_count": 4}
    values = {**sizes, "attention.layer_norm_rms_epsilon": 1e-5, **(metadata or {})}
    adders: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32}
    adders |= {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        adders[type(value)](key if key.startswith("general.") else f"llama.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(320)])
    shapes = {f"attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (64,))
    shapes |= dict.fromkeys(("token_embd", "output"), (320, 64))
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
