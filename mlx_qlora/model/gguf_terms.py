"""llama.cpp's terms for a model, and Hugging Face's: names, metadata and the order of rows.

Each is said once and read in both directions: `model.gguf` reads files, `adapters.gguf_model`
writes them.
"""

import math
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import WeightsError
from mlx_qlora.model.families import LlamaConfig
from mlx_qlora.model.rope import LAYER_KINDS, RopeConfig, rope_periods
from mlx_qlora.tree import number

# model_type -> llama.cpp's architecture, and whether it permutes the rows of q and k.
ARCHITECTURES = {kind: (kind, True) for kind in ("llama", "granite", "smollm3")}
NOT_PERMUTED = ("qwen2", "qwen3", "olmo2", "seed_oss", "phi3", "gemma2", "glm4", "exaone4")
ARCHITECTURES |= {kind: (kind, False) for kind in NOT_PERMUTED}
ARCHITECTURES |= dict.fromkeys(("mistral", "ministral", "cwm"), ("llama", True))
ARCHITECTURES |= {"olmo3": ("olmo2", False), "gemma3_text": ("gemma3", False)}
ARCHITECTURES |= {"hunyuan_v1_dense": ("hunyuan-dense", False)}
# Key -> field of `config.json`; they are also those of a LlamaConfig.
SIZE_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Architectures that see everything before a token.
WITHOUT_WINDOWS = "llama qwen2 qwen3 smollm3 glm4 granite seed_oss hunyuan-dense".split()
GRANITE = {f"{key}_multiplier": f"{key}_scale" for key in ("embedding", "residual")}
GRANITE |= {"attention_multiplier": "attention.scale", "logits_scaling": "logit_scale"}
LAYER_NAMES = {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv")},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
NORM_PLACES = "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"  # of `families.Norms`
BIASES = {"attention_bias": "attn_q", "attention_out_bias": "attn_output", "mlp_bias": "ffn_up"}

# ---- GGUF's terms -> Hugging Face's --------------------------------------------------------------

FACTORS = "rope_freqs", "rope_factors_long", "rope_factors_short"
# Keys that decide nothing here, and values that are as if a key were left out; others are refused.
HARMLESS = {"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
HARMLESS |= {"tensor_data_layout", "pooling_type", "mm.tokens_per_image"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.yarn_beta_fast": (0, 32),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), (0, 1)),
    **{f"rope.scaling.{key}": (0, 1) for key in ("attn_factor", "yarn_attn_factor", "alpha")},
    **{f"rope.scaling.yarn_{key}": (0, 1) for key in ("beta_slow", "ext_factor", "log_multiplier")},
}


def config_of(
    path: Path, metadata: dict[str, Any], names: Collection[str], factors: dict[str, Any]
) -> dict[str, Any]:
    """What the `config.json` of a file would say, by its pairs and the names of its tensors."""
    arch = metadata.get("general.architecture")
    kind = next((kind for kind, (name, _) in ARCHITECTURES.items() if name == arch), None)
    if kind == "olmo2" and f"{arch}.attention.sliding_window" in metadata:
        kind = "olmo3"  # which llama.cpp gives no name of its own
    asked: set[str] = set()
    if kind is None:
        known = ", ".join(dict.fromkeys(name for name, _ in ARCHITECTURES.values()))
        raise WeightsError(f"{path}: architecture {arch!r} is not supported; supported: {known}")

    def read(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        asked.add(key)
        if value is None:
            raise WeightsError(f"{path}: {arch}.{key} is missing in the metadata")
        if isinstance(value, (mx.array, np.ndarray)):
            return value.item() if value.size == 1 and not value.ndim else value.tolist()
        return value

    def maybe(key: str) -> Any:
        return read(key) if f"{arch}.{key}" in metadata else None

    if (what := metadata.get("general.type", "model")) != "model":
        raise WeightsError(f"{path} is no model, but of type {what!r}; give the model's file")
    if read("expert_count", 0):
        raise WeightsError(f"{path}: mixture-of-experts models are not supported")

    def count(key: str, default: Any = None) -> int:
        value = read(key, default)
        if not isinstance(value, int) or not 1 <= value < 2**31:
            raise WeightsError(f"{path}: {arch}.{key} must be a positive integer; got {value!r}")
        return value

    if not isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        raise WeightsError(f"{path}: tokenizer.ggml.tokens is missing in the metadata")
    heads, hidden = count("attention.head_count"), count("embedding_length")
    usual = {"attention.head_count_kv": heads, "attention.key_length": hidden // heads}
    config = {
        "model_type": kind,
        **{field: count(key, usual.get(key)) for key, field in SIZE_KEYS.items()},
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "rope_theta": read("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in names,
    }
    for field, name in BIASES.items():
        if f"blk.0.{name}.bias" in names or kind in ("glm4", "seed_oss"):
            config[field] = f"blk.0.{name}.bias" in names
    if kind == "llama":
        config |= {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    head_dim = config["head_dim"]
    if (turned := count("rope.dimension_count", head_dim)) != head_dim:
        config["partial_rotary_factor"] = turned / head_dim
    config |= _of_family(kind, config, maybe)
    scaling = read("rope.scaling.type", "linear")
    factor = maybe("rope.scaling.factor") or maybe("rope.scale_linear")
    if scaling == "yarn":
        old = read("rope.scaling.original_context_length", config["max_position_embeddings"])
        config["rope_scaling"] = {
            **{"rope_type": "yarn", "factor": factor},
            "original_max_position_embeddings": old,
        }
    elif scaling not in ("linear", "longrope") and (scaling != "none" or factor not in (None, 1)):
        raise WeightsError(f"{path}: rope scaling {scaling!r} (by {factor}) is not supported")
    elif factor not in (None, 1.0):
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    short, long = (factors[f"rope_factors_{which}"] for which in ("short", "long"))
    if short is not None and long is not None:
        lists = {f"{n}_factor": x.tolist() for n, x in (("short", short), ("long", long))}
        given = {"attention_factor": maybe("rope.scaling.attn_factor")}
        given = {name: value for name, value in given.items() if value}
        old = read("rope.scaling.original_context_length")
        config |= {"rope_scaling": {"rope_type": "longrope", **lists, **given}}
        config |= {"original_max_position_embeddings": old}
    elif scaling == "yarn" and kind == "olmo3" and maybe("rope.scaling.attn_factor"):
        config["rope_scaling"]["attention_factor"] = maybe("rope.scaling.attn_factor")
    if count("attention.value_length", head_dim) != head_dim:
        raise WeightsError(f"{path}: values of another size than the keys are not supported")
    keys = {key.removeprefix(f"{arch}.") for key in metadata if key.startswith(f"{arch}.")}
    for key in sorted(keys - asked - HARMLESS):
        if (value := read(key)) not in NEUTRAL.get(key, (0,)):
            raise WeightsError(f"{path}: {arch}.{key} = {value!r} is not supported")
    if (freqs := factors["rope_freqs"]) is not None:
        config["rope_scaling"] = _llama3_scaling(path, freqs, config["rope_theta"])
    return config


def _of_family(kind: str, config: dict[str, Any], maybe: Any) -> dict[str, Any]:
    """The fields that a family has besides; what llama.cpp has in its code stands here."""
    if ARCHITECTURES[kind][0] in WITHOUT_WINDOWS:
        given: dict[str, Any] = {}
    else:  # Phi-4's file says 0 where there is none
        given = {"sliding_window": maybe("attention.sliding_window") or None}
    pattern = None
    if kind in ("gemma3_text", "olmo3", "exaone4"):
        pattern = maybe("attention.sliding_window_pattern")
    if kind == "exaone4":  # three of four, and in the 32B model alone
        n, has_windows = config["num_hidden_layers"], config["num_hidden_layers"] == 64
        pattern = [has_windows and (i + 1) % 4 != 0 for i in range(n)]
        given["sliding_window"] = (given["sliding_window"] or 4096) if has_windows else None
    if isinstance(pattern, list):
        given["layer_types"] = [LAYER_KINDS[bool(slides)] for slides in pattern]
    elif pattern is not None and kind == "gemma3_text":
        given["sliding_window_pattern"] = pattern
    # The largest Gemma 2 and 3 scale by the width of a head that they would have without head_dim.
    by_width = config["num_hidden_layers"] in (46, 62)
    width = config["hidden_size"] // config["num_attention_heads"]
    if kind.startswith("gemma"):
        given["query_pre_attn_scalar"] = width if by_width else config["head_dim"]
        given["attn_logit_softcapping"] = maybe("attn_logit_softcapping")
        given["final_logit_softcapping"] = maybe("final_logit_softcapping")
    if kind == "gemma3_text":
        given["rope_local_base_freq"] = maybe("rope.freq_base_swa") or 10000.0
        given.pop("attn_logit_softcapping")
    if kind == "olmo3" and config["rope_theta"] != 500000:  # there is one for all layers
        given["rope_local_base_freq"] = config["rope_theta"]
    if kind == "granite":
        given |= {field: maybe(key) for field, key in GRANITE.items()}
    kept_null = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    return {k: v for k, v in given.items() if v is not None or k in kept_null}


def _llama3_scaling(path: Path, factors: mx.array, theta: float) -> dict[str, Any]:
    """The parameters behind a tensor of factors, found in it and checked."""
    head_dim = 2 * factors.size
    plain = rope_periods(head_dim, RopeConfig(theta))
    scaling = {"rope_type": "llama3", "factor": number(factors.max())}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    # How often a pair between the two turns within the old context is how far it is stretched.
    all_of_it = 1 / scaling["factor"]
    turns = 1 + 3 * (1 / factors - all_of_it) / max(1 - all_of_it, 1e-9)
    between = (turns > 1.001) & (turns < 3.999)
    lengths = np.array(2 * math.pi * plain * turns)[np.array(between)]
    for old in (8192, *(round(float(length)) for length in lengths[:1])):
        scaling["original_max_position_embeddings"] = old
        stretched = rope_periods(head_dim, RopeConfig(theta, **scaling))
        if mx.allclose(stretched / plain, factors, rtol=1e-4).item():
            return scaling
    raise WeightsError(f"{path}: the scaling in rope_freqs.weight is not supported")


# ---- a config -> a file's pairs ------------------------------------------------------------------


def as_llama_cpp_says(llama: LlamaConfig) -> LlamaConfig:
    """The same model in a way for which llama.cpp has words.

    A stretching that is the same at every length becomes a theta. Windows that an architecture does
    not know go, and the context ends where they would begin to count.
    """
    rope = llama.rope
    if rope.rope_type == "alpha":
        d = int(llama.head_dim * rope.rotary_share)
        theta = rope.theta * rope.factor ** (d / (d - 2))
        rope = RopeConfig(theta, rotary_share=rope.rotary_share, interleaved=rope.interleaved)
    longest, windows = llama.max_position_embeddings, llama.windows
    architecture = ARCHITECTURES[llama.model_type][0]
    if windows and architecture in (*WITHOUT_WINDOWS, "phi3"):  # Phi-3's are read, and not used
        longest = min(longest, *(size for size in windows if size))
        windows = windows if architecture == "phi3" else ()
    return replace(llama, rope=rope, windows=windows, max_position_embeddings=longest)


def pairs_of(llama: LlamaConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file's pairs, without the architecture before each key, and its tensors of RoPE factors.

    What has no word is left out: whoever writes a file reads it with `config_of`, and compares.
    """
    rope, kind = llama.rope, llama.model_type
    d = int(llama.head_dim * rope.rotary_share)
    pairs: dict[str, Any] = {key: getattr(llama, field) for key, field in SIZE_KEYS.items()}
    pairs |= {"attention.value_length": llama.head_dim, "vocab_size": llama.vocab_size}
    pairs |= {"attention.layer_norm_rms_epsilon": llama.rms_norm_eps}
    pairs |= {"rope.freq_base": rope.theta, "rope.dimension_count": d}
    factors: dict[str, np.ndarray] = {}
    old = {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
    if rope.rope_type in ("linear", "yarn"):
        pairs |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
        pairs |= old if rope.rope_type == "yarn" else {}
    elif rope.rope_type == "llama3":
        plain = rope_periods(d, RopeConfig(rope.theta))
        factors["rope_freqs"] = np.array(rope_periods(d, rope) / plain)
    elif rope.rope_type == "longrope":
        pairs |= {"rope.scaling.attn_factor": rope.attention_factor, **old}
        for which in ("long", "short"):
            of_pairs = np.array(getattr(rope, f"{which}_factor"), np.float32)
            factors[f"rope_factors_{which}"] = of_pairs
    sizes = [size for size in llama.windows if size]
    if sizes or kind == "phi3":  # 0 tells Phi-4 from Phi-3
        pairs["attention.sliding_window"] = max(sizes, default=0)
    usual = tuple(
        sizes[0] if (i + 1) % 6 else None for i in range(len(llama.windows) * bool(sizes))
    )
    if sizes and (kind == "olmo3" or (kind == "gemma3_text" and llama.windows != usual)):
        pairs["attention.sliding_window_pattern"] = [size is not None for size in llama.windows]
    if kind == "gemma3_text" and llama.rope_of_windows is not None:
        pairs["rope.freq_base_swa"] = llama.rope_of_windows.theta
    if kind == "granite":
        scales = llama.embedding_scale, llama.residual_scale, llama.attention_scale
        pairs |= dict(zip(GRANITE.values(), (*scales, 1 / llama.logits_scale)))
    caps = {"attn": llama.attention_softcap, "final": llama.logits_softcap}
    pairs |= {f"{which}_logit_softcapping": cap for which, cap in caps.items() if cap is not None}
    return pairs, factors


# ---- names and order of tensors ------------------------------------------------------------------


def module_names(llama: LlamaConfig) -> dict[str, str]:
    """llama.cpp's names of modules -> Hugging Face's; those in a layer without its number."""
    names = TOP_NAMES | LAYER_NAMES
    names |= {ours: theirs for ours, theirs in zip(NORM_PLACES, llama.norms) if theirs}
    for letter, norm in zip("qk", llama.head_norm_names):
        names[f"attn_{letter}_norm"] = f"self_attn.{norm}"
    names |= {"ffn_up": "mlp.gate_up_proj"} if llama.fused_gate_up else {}
    if llama.model_type == "seed_oss":  # which llama.cpp calls by Hugging Face's misnomer
        names["post_attention_norm"] = "post_attention_layernorm"
    return names


def gguf_name(name: str, llama: LlamaConfig) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, leaf = name.rpartition(".")
    names = {theirs: ours for ours, theirs in module_names(llama).items()}
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{names[layer[2]]}.{leaf}" if layer else f"{names[stem]}.{leaf}"


def permute(rows: np.ndarray, name: str, llama: LlamaConfig) -> np.ndarray:
    """The rows of q and k, which `name` ends in, in llama.cpp's order; of others, as they are.

    Rows (i, i + Hd / 2) of each head become (2i, 2i + 1), the pairs that llama.cpp turns.
    """
    heads = {"q_proj": llama.num_attention_heads, "k_proj": llama.num_key_value_heads}
    n = heads.get(name.split(".")[-2])
    if n is None or not ARCHITECTURES[llama.model_type][1] or len(rows) % (2 * n):
        return rows  # the latter is no shape of this model
    halves = rows.reshape(n, 2, len(rows) // n // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
