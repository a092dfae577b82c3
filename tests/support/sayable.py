"""Which of the families of `families` llama.cpp computes as they are, and what it needs for it."""

from typing import Any

# What llama.cpp has in its code, and what our reader knows of Llama 3's scaling.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SAYABLE: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 6,
        "num_hidden_layers": 6,
    },
    "exaone4": {
        "num_hidden_layers": 64,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16,
    },
}
# Family, or case of it -> what the error says.
REFUSED = {
    "llama-dynamic": r"rope = .*'dynamic'",
    "llama-gelu": r"hidden_act = 'gelu'; it would compute with 'silu'",
    "exaone4-short": r"windows = \(7, 7, 7, None\); it would compute with \(\)",
    "gemma2-scale": r"attention_scale = ",
}
CONTEXT_OF_WINDOW = {"mistral-window", "ministral", "qwen2-window", "cwm", "phi3"}
