"""Every family of dense decoders as a tiny model of transformers', longer than its windows."""

import copy
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD, WINDOW = 16, 7  # tokens before RoPE is stretched, and of a window; tests have 40
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": OLD}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": OLD,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
}
ALPHA = {
    **{"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1},
    **{"mscale": 1.0, "mscale_all_dim": 1.0},
}
# What a family's config says besides the sizes. What follows a hyphen is a case of it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3},
    "llama-yarn": {"rope_scaling": YARN, "attention_bias": True, "mlp_bias": True},
    "llama-dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": OLD,
    },
    "llama-gelu": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 24},
    "mistral-window": {"sliding_window": WINDOW},
    "ministral": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "qwen2": {"rope_theta": 1e6, "rope_scaling": YARN},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015,
        "logits_scaling": 8.0,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "rope_scaling": YARN},
    "seed_oss": {"head_dim": 16},
    "exaone4": {
        "sliding_window": WINDOW,
        "sliding_window_pattern": "LLLG",
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "exaone4-whole": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "hunyuan_v1_dense": {"rope_scaling": ALPHA, "head_dim": 16},
    "cwm": {"sliding_window": WINDOW, "head_dim": 16},
    "phi3": {"sliding_window": WINDOW},
    "phi3-long": {
        "rope_scaling": LONG,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": OLD,
    },
    "gemma2": {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window_pattern": 2,
    },
    "glm4": {"head_dim": 16},
}


def make_family(name: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' model of a family, float32, with random weights; every 1-D weight is moved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = copy.deepcopy({**SIZES, **FAMILIES[name], **changes})  # transformers changes them
    config = AutoConfig.for_model(name.split("-")[0], **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn_like(weight)
            weight.copy_(weight + 0.2 * drawn if weight.ndim == 1 else 0.1 * drawn)
    return model


def write_family(name: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Saves such a model as a folder, and returns it."""
    model = make_family(name, seed, **changes)
    model.save_pretrained(folder)
    return model
