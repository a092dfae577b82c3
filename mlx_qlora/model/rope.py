"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with Llama 3.1's frequency scaling.

Feature pair i of a head turns by `position / period[i]` radians, with period[i] = theta^(2i / Hd).
Llama 3.1 stretches the slow pairs so that a model trained on 8,192 tokens reads 131,072.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_qlora.errors import WeightsError

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NEEDED = {"default": (), "linear": ("factor",), "llama3": LLAMA3}  # parameters of each rope type


@dataclass(frozen=True)
class RopeConfig:
    """The base of the periods and how they are stretched; the last three are llama3's."""

    theta: float = 10000.0
    rope_type: str = "default"  # or `linear` (positions divided by `factor`) or `llama3`
    factor: float = 1.0  # how much longer the stretched context is
    low_freq_factor: float = 1.0  # wavelengths above original / low are stretched fully
    high_freq_factor: float = 4.0  # those below original / high not at all
    original_max_position_embeddings: int = 8192  # tokens, before stretching


def rope_from_hf(config: dict[str, Any]) -> RopeConfig:
    """Read a `config.json`, in both spellings: `rope_scaling`, and v5's `rope_parameters`.

    A reader that knows only the first falls back to theta = 10000 on the second without a word,
    and every logit is slightly wrong.

    Raises:
        WeightsError: an unsupported rope type, or a missing, unknown or senseless parameter.
    """
    given: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise WeightsError(f"config.json: {name} must be an object; got {config[name]!r}")
        given.update(config.get(name) or {})
    rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if rope_type not in NEEDED:
        raise WeightsError(
            f"config.json: rope_type {rope_type!r} is not supported; supported: {', '.join(NEEDED)}"
        )
    needed = NEEDED[rope_type]
    missing = [name for name in needed if given.get(name) is None]
    unknown = [name for name in given if name not in needed and given[name] is not None]
    if missing or (unknown and rope_type != "default"):
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise WeightsError(f"config.json: the {rope_type} rope scaling {problem}")
    numbers = {"rope_theta": theta, **{name: given[name] for name in needed}}
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or not number > 0:
            raise WeightsError(f"config.json: {name} must be a positive number; got {number!r}")
    if rope_type == "llama3" and not given["high_freq_factor"] > given["low_freq_factor"]:
        raise WeightsError("config.json: high_freq_factor must be larger than low_freq_factor")
    return RopeConfig(float(theta), rope_type, **{name: given[name] for name in needed})


def rope_periods(head_dim: int, rope: RopeConfig) -> mx.array:
    """The periods of all feature pairs (Hd / 2,) float32, in tokens per radian: MLX's `freqs`."""
    periods = rope.theta ** (mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim)
    if rope.rope_type == "linear":
        return periods * rope.factor
    if rope.rope_type == "llama3":
        # Fast pairs stay, slow ones grow by `factor`; between them Llama 3.1 interpolates
        # frequencies, not periods, by how often a pair turns within the old context.
        turns = rope.original_max_position_embeddings / (2 * math.pi * periods)
        spread = rope.high_freq_factor - rope.low_freq_factor
        kept = mx.clip((turns - rope.low_freq_factor) / spread, 0, 1)
        return periods * (1 / (kept + (1 - kept) / rope.factor))
    return periods
