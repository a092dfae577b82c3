"""A GGUF file -> a Hugging Face style config and tensors with Hugging Face names and layout.

`mx.load` reads Q4_0, Q4_1 and Q8_0 straight into MLX's affine 4 and 8 bit layout with groups of
32. Three differences from a Hugging Face checkpoint remain, and are undone here:

1. names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`;
2. the rows of q and k are permuted for llama.cpp's RoPE, which turns pairs (2i, 2i + 1);
3. Llama 3.1's RoPE scaling is a tensor of factors, `rope_freqs.weight`, instead of parameters.
"""

import math
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from mlx_qlora.errors import WeightsError, listing
from mlx_qlora.model.rope import RopeConfig, rope_periods
from mlx_qlora.tree import number

# ggml's type numbers -> (name, bytes per block, weights per block); the ones that MLX reads.
SUPPORTED_TYPES = {
    0: ("F32", 4, 1),
    1: ("F16", 2, 1),
    2: ("Q4_0", 18, 32),
    3: ("Q4_1", 20, 32),
    8: ("Q8_0", 34, 32),
}
OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
STRING, ARRAY = 8, 9  # metadata types; the scalars with their struct codes:
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, Any]]:
    """Read a GGUF file of architecture llama.

    Returns:
        What its `config.json` would say; the tensors, a packed matrix as `.weight`, `.scales` and
        `.biases`; and the file's own key-value pairs, tokenizer included.

    Raises:
        WeightsError: not a GGUF file, truncated, another architecture, or a tensor type that MLX
            would not read as it is (the message names types and tensors).
    """
    _check_tensors(path)
    try:
        file: Any = mx.load(str(path), return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({error}); download it again") from None
    loaded, metadata = file
    factors = loaded.pop("rope_freqs.weight", None)
    config = _hf_config(path, metadata, tied="output.weight" not in loaded)
    last = f"blk.{config['num_hidden_layers'] - 1}.attn_norm.weight"
    if last not in loaded:
        raise WeightsError(f"{path} is incomplete: {last} is missing; download it again")
    if factors is not None:
        config["rope_scaling"] = _llama3_scaling(path, factors, config["rope_theta"])

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name in list(loaded):
        hf_name, array = _hf_name(path, name), loaded.pop(name)
        module = hf_name.split(".")[-2]
        tensors[hf_name] = _undo_permute(array, heads[module]) if module in heads else array
    return config, tensors, metadata


# ---- the header: types and sizes, before anything is loaded --------------------------------------


def _check_tensors(path: Path) -> None:
    """Refuse damaged files, which MLX would map into memory and crash on, and unknown types."""
    try:
        with path.open("rb") as file:
            tensors, data_start = _read_header(file)
    except (struct.error, ValueError, TypeError, OverflowError, KeyError, MemoryError, OSError):
        raise WeightsError(f"{path} is damaged or truncated; download it again") from None
    if tensors is None:
        raise WeightsError(f"{path} is not a GGUF file (version 2 or 3)")
    problems = [
        f"{name}: {OTHER_TYPES.get(kind, f'type {kind}')}"
        for name, _, kind, _ in tensors
        if kind not in SUPPORTED_TYPES
    ]
    if problems:
        supported = ", ".join(name for name, _, _ in SUPPORTED_TYPES.values())
        raise WeightsError(
            f"{path} has tensors of types we do not read (supported: {supported}). Use another "
            f"quantisation of the model, or its safetensors:\n{listing(problems, most=5)}"
        )
    for name, shape, kind, offset in tensors:
        _, block_bytes, block_weights = SUPPORTED_TYPES[kind]
        if not shape or not all(shape) or shape[0] % block_weights:
            raise WeightsError(f"{path} is damaged: {name} has shape {shape}; download it again")
        end = data_start + offset + math.prod(shape) // block_weights * block_bytes
        if end > path.stat().st_size:
            raise WeightsError(
                f"{path} is truncated: {name} ends at byte {end} of {path.stat().st_size}; "
                "download it again"
            )


def _read_header(file: BinaryIO) -> tuple[list[tuple[str, list[int], int, int]] | None, int]:
    """The (name, shape, type, offset) of every tensor, and where the data begins.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def number(code: str) -> Any:
        return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

    def text() -> str:
        return file.read(number("Q")).decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:  # only stepped over: mx.load reads it
            inner, length = number("I"), number("Q")
            if inner != STRING:
                file.seek(struct.calcsize(SCALARS[inner]) * length, 1)
            else:
                for _ in range(length):
                    file.seek(number("Q"), 1)
            return None
        return number(SCALARS[kind])

    if file.read(4) != b"GGUF" or number("I") not in (2, 3):
        return None, 0
    tensor_count, pair_count = number("Q"), number("Q")
    pairs = {}
    for _ in range(pair_count):
        key = text()
        pairs[key] = value(number("I"))
    tensors = []
    for _ in range(tensor_count):
        name = text()
        shape = [number("Q") for _ in range(number("I"))]
        tensors.append((name, shape, number("I"), number("Q")))
    alignment = pairs.get("general.alignment") or 32
    return tensors, -(-file.tell() // alignment) * alignment


# ---- GGUF's terms -> Hugging Face's --------------------------------------------------------------


def _hf_config(path: Path, metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise WeightsError(f"{path}: architecture {architecture!r} is not supported; only 'llama'")

    def read(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise WeightsError(f"{path}: the metadata lacks llama.{key}")
        return value.item() if isinstance(value, mx.array) else value

    if read("expert_count", 0):
        raise WeightsError(f"{path}: mixture-of-experts models are not supported")
    scaling = read("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise WeightsError(f"{path}: rope scaling {scaling!r} is not supported")

    def count(key: str, default: Any = None) -> int:
        value = read(key, default)
        if not isinstance(value, int) or not 1 <= value < 2**31:
            raise WeightsError(f"{path}: llama.{key} must be a positive integer; got {value!r}")
        return value

    if "tokenizer.ggml.tokens" not in metadata:
        raise WeightsError(f"{path}: the metadata lacks tokenizer.ggml.tokens")
    heads = count("attention.head_count")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": count("embedding_length"),
        "num_hidden_layers": count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": count("attention.key_length", count("embedding_length") // heads),
        "intermediate_size": count("feed_forward_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "rope_theta": read("rope.freq_base", 10000.0),
        "max_position_embeddings": read("context_length"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": read("rope.scaling.factor")}
    return config


def _llama3_scaling(path: Path, factors: mx.array, theta: float) -> dict[str, Any]:
    """The parameters behind a tensor of factors: its largest is `factor`, the rest is checked."""
    scaling = {
        "rope_type": "llama3",
        "factor": number(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head_dim = 2 * factors.size
    plain = rope_periods(head_dim, RopeConfig(theta))
    stretched = rope_periods(head_dim, RopeConfig(theta, **scaling))
    if mx.allclose(stretched / plain, factors, rtol=1e-4).item():
        return scaling
    raise WeightsError(f"{path}: rope_freqs.weight is no Llama 3 scaling that we know")


def _hf_name(path: Path, name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{leaf}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{leaf}"
    raise WeightsError(f"{path}: tensor {name!r} belongs to no Llama")


def _undo_permute(rows: mx.array, heads: int) -> mx.array:
    """Rows (2i, 2i + 1) of each head go back to (i, i + Hd / 2); whole, be they packed or not."""
    if rows.shape[0] % (2 * heads):
        return rows  # no shape of this model, as the loader is about to say
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def source_repository(metadata: dict[str, Any]) -> str | None:
    """The repository that a file was made from, where its metadata says so."""
    keys = ("general.base_model.0.repo_url", "general.source.repo_url", "general.source.url")
    urls = " ".join(str(metadata.get(key)) for key in keys)
    found = re.search(r"huggingface\.co/([\w.-]+/[\w.-]+)", urls)
    return found[1] if found else None
