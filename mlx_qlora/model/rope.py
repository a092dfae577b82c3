"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and how long contexts stretch it.

Feature pair i of a head turns by `position / period[i]` radians, with period[i] = theta^(2i / Hd).
A model that was trained on short contexts reads longer ones where its slow pairs turn more slowly.
Every kind is what transformers computes at every length, in both spellings of a `config.json`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import WeightsError

OLD_LENGTH = "original_max_position_embeddings"
# The parameters of each kind: those that it must have, and those that it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),  # positions are divided by the factor
    "dynamic": (("factor",), ()),  # theta grows with the length (NTK, /u/emozilla)
    "alpha": (("alpha", "factor"), ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", OLD_LENGTH), ()),
    # Peng et al. 2023 (arXiv 2309.00071)
    "yarn": (
        ("factor", OLD_LENGTH),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    # Ding et al. 2024 (arXiv 2402.13753)
    "longrope": (("short_factor", "long_factor", OLD_LENGTH), ("attention_factor", "factor")),
}
OTHER_NAMES = {"su": "longrope", "mrope": "default"}
LISTS = ("short_factor", "long_factor")
FLOATS = ("factor", "low_freq_factor", "high_freq_factor")
OFF_BY_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class RopeConfig:
    """What decides the periods; each kind reads some of the fields, by Hugging Face's names."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0  # how much longer the stretched context is
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are stretched fully
    high_freq_factor: float = 4.0  # those below original / high not at all
    original_max_position_embeddings: int = 8192  # tokens, before stretching
    beta_fast: float = 32.0  # yarn: pairs that turn more often in the old context stay
    beta_slow: float = 1.0  # those that turn less often are stretched fully
    truncate: bool = True  # yarn: the pairs between them are counted whole
    attention_factor: float = 1.0  # yarn, longrope: multiplies what is rotated
    short_factor: tuple[float, ...] = ()  # longrope: of each pair, up to the old length
    long_factor: tuple[float, ...] = ()  # beyond it
    max_position_embeddings: int = 0  # dynamic: the length beyond which theta grows
    rotary_share: float = 1.0  # of a head's features; those after it are left as they are
    interleaved: bool = False  # pairs are (2i, 2i + 1) instead of (i, i + Hd / 2)

    @property
    def by_length(self) -> bool:
        """Whether the periods depend on how long a document is."""
        return self.rope_type in ("dynamic", "longrope")


# ---- config.json ---------------------------------------------------------------------------------


def rope_from_hf(
    config: dict[str, Any],
    layers: str | None = None,
    theta: float = 10000.0,
    *,
    share: float = 1.0,
    interleaved: bool = False,
    parts: bool = False,
    alpha: bool = False,
) -> RopeConfig:
    """Read a `config.json`, in both spellings: `rope_scaling`, and v5's `rope_parameters`.

    A reader that knows only the first falls back to theta = 10000 on the second without a word,
    and every logit is slightly wrong.

    Args:
        layers: `full_attention` or `sliding_attention`, where each kind has parameters of its own.
        theta: where the config names none.
        share: of a head that is rotated, where the config names none.
        interleaved: which features are a pair.
        parts: whether the family rotates parts of a head at all.
        alpha: whether its `dynamic` may be a constant `alpha`, as Hunyuan's is.

    Raises:
        WeightsError: an unsupported kind, a missing, unknown or senseless parameter, or two
            spellings that contradict each other.
    """
    given = _both_spellings(config, layers)
    kind = given.pop("rope_type", "default")
    kind = OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else repr(kind)
    if kind == "dynamic" and alpha and given.get("alpha"):
        kind = "alpha"
    if kind not in KINDS:
        raise WeightsError(
            f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}"
        )
    theta, share = given.pop("rope_theta", theta), given.pop("partial_rotary_factor", share)
    given.pop("mrope_section", None)  # of text alone all three axes are the same
    # Of the first YaRN models: how they were made, and a factor that transformers does not read.
    given = {k: v for k, v in given.items() if k not in ("finetuned", "attn_factor")}
    # Where transformers takes zero for a parameter that is not given.
    given = {k: v for k, v in given.items() if k not in OFF_BY_ZERO or v != 0}
    positions = config.get("max_position_embeddings")
    needed, optional = KINDS[kind]
    is_used = kind == "dynamic" or (kind == "longrope" and given.get("factor") is None)
    is_used |= OLD_LENGTH in needed and OLD_LENGTH not in (*given, *config)
    if is_used and (type(positions) is not int or positions < 1):
        raise WeightsError(f"config.json: the {kind} rope scaling needs max_position_embeddings")
    if OLD_LENGTH in needed:  # also beside the parameters, which is then what counts
        given.setdefault(OLD_LENGTH, config.get(OLD_LENGTH, positions))
        if config.get(OLD_LENGTH, given[OLD_LENGTH]) != given[OLD_LENGTH]:
            raise WeightsError(f"config.json: {OLD_LENGTH} is given twice, with different values")
    given = {name: value for name, value in given.items() if value is not None}
    missing = [name for name in needed if name not in given]
    unknown = [name for name in given if name not in (*needed, *optional)]
    if missing or (unknown and kind != "default"):
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise WeightsError(f"config.json: the {kind} rope scaling {problem}")
    given = {name: given[name] for name in (*needed, *optional) if name in given}
    numbers = {"rope_theta": theta, "partial_rotary_factor": share} | given
    for name, value in numbers.items():
        several: list[Any] = [*value] if isinstance(value, list) and name in LISTS else [value]
        several = [None] if name in LISTS and not isinstance(value, list) else several
        for number in several:
            legal = name == "truncate" and isinstance(number, bool)
            if not (legal or (type(number) in (int, float) and 0 < number < math.inf)):
                raise WeightsError(f"config.json: {name} must be a positive number; got {value!r}")
    if theta <= 1:
        raise WeightsError(f"config.json: rope_theta must be above 1; got {theta!r}")
    if share > 1 or (share < 1 and not parts):
        raise WeightsError(f"config.json: partial_rotary_factor {share} is not supported")
    if given.get("factor", 1) < 1:
        raise WeightsError("config.json: factor, which stretches positions, must be at least 1")
    if kind == "llama3" and not given["high_freq_factor"] > given["low_freq_factor"]:
        raise WeightsError("config.json: high_freq_factor must be larger than low_freq_factor")
    if kind == "dynamic":
        given["max_position_embeddings"] = positions
    given |= {name: tuple(given[name]) for name in LISTS if name in given}
    given = _with_attention_factor(kind, given, positions)
    if kind == "alpha":  # theta is alpha^(Hd / (Hd - 2)) times as large: `Rope` knows Hd
        given = {"factor": given["alpha"]}
    return RopeConfig(float(theta), kind, rotary_share=share, interleaved=interleaved, **given)


def _both_spellings(config: dict[str, Any], layers: str | None) -> dict[str, Any]:
    """Parameter -> value, from wherever a config has it; `type` is `rope_type`."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any, where: str) -> None:
        name = "rope_type" if name == "type" else name
        if name in found and found[name] != value:
            raise WeightsError(
                f"config.json: {where} says {name} = {value!r}, and {found[name]!r} elsewhere"
            )
        found[name] = value

    new, old = (config.get(where) or {} for where in ("rope_parameters", "rope_scaling"))
    if layers is None and isinstance(new, dict) and isinstance(old, dict) and new and old:
        # transformers then reads the old one alone, whatever the new one says besides.
        lost = sorted(new.keys() - old.keys() - config.keys() - {"rope_type", "type"})
        if lost:
            raise WeightsError(f"config.json: rope_scaling lacks {', '.join(lost)}; add it")
    for where in ("rope_parameters", "rope_scaling"):
        entry = config.get(where)
        if not isinstance(entry, (dict, type(None))):
            raise WeightsError(f"config.json: {where} must be an object; got {entry!r}")
        nested = [key for key in entry or {} if key in LAYER_KINDS]
        if nested and layers is None:
            raise WeightsError(f"config.json: {where} has parameters for {', '.join(nested)}")
        if nested:
            for key in nested:
                if not isinstance((entry or {})[key], dict):
                    raise WeightsError(f"config.json: {where}.{key} must be an object")
            entry = (entry or {}).get(layers)
        elif layers is not None and entry and where == "rope_parameters":
            raise WeightsError(f"config.json: {where} lacks {' and '.join(LAYER_KINDS)}")
        elif layers == "sliding_attention":
            continue  # the old spelling stretches the other layers alone
        for name, value in (entry or {}).items():
            add(name, value, where)
    theta = "rope_theta"
    if layers == "sliding_attention" and "rope_local_base_freq" in config:
        add(theta, config["rope_local_base_freq"], "rope_local_base_freq")
    elif layers is None or "rope_local_base_freq" in config or layers == "full_attention":
        for name in (theta, "partial_rotary_factor"):
            if name in config:
                add(name, config[name], name)
    return found


def in_both_spellings(config: dict[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """The parameters of a legal `config.json` as every reader finds them."""
    share: dict[str, Any] = (
        {} if rope.rotary_share == 1 else {"partial_rotary_factor": rope.rotary_share}
    )

    def parameters(layers: str | None) -> dict[str, Any]:
        given = {k: v for k, v in _both_spellings(config, layers).items() if v is not None}
        kind = str(given.pop("rope_type", "default"))
        needed, optional = KINDS["alpha" if "alpha" in given else OTHER_NAMES.get(kind, kind)]
        kept = {name: given[name] for name in (*needed, *optional) if name in given}
        kept |= {name: float(kept[name]) for name in kept if name in FLOATS}
        more = {k: v for k, v in given.items() if k in ("rope_theta", "partial_rotary_factor")}
        # Some readers of these two know no other name.
        old = {"type": kind} if "alpha" in kept or "long_factor" in kept else {}
        return {"rope_type": kind, **old, **kept, "rope_theta": rope.theta, **share, **more}

    is_nested = any(key in (config.get("rope_parameters") or {}) for key in LAYER_KINDS)
    is_nested |= "rope_local_base_freq" in config
    kinds = {key: parameters(key) for key in (LAYER_KINDS if is_nested else (None,))}
    full, *local = kinds.values()
    share |= {"rope_local_base_freq": local[0]["rope_theta"]} if local else {}
    scaling = {k: v for k, v in full.items() if k != "rope_theta"}
    scaling = None if full["rope_type"] == "default" else scaling
    both = {"rope_theta": full["rope_theta"], "rope_scaling": scaling, **share}
    return both | {"rope_parameters": kinds if is_nested else full}


def _with_attention_factor(kind: str, given: dict[str, Any], positions: Any) -> dict[str, Any]:
    """With the factor of yarn and longrope that a config leaves to a formula."""
    if kind == "yarn":
        factor, own = given["factor"], given.pop("mscale", None)
        of_all = given.pop("mscale_all_dim", None)

        def scale(by: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

        usual = scale(own) / scale(of_all) if own and of_all else scale(1.0)
    elif kind == "longrope":
        old = given[OLD_LENGTH]
        factor = given.setdefault("factor", positions / old)
        usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    else:
        return given
    return {"attention_factor": usual} | given


# ---- periods -------------------------------------------------------------------------------------


class Rope:
    """The rotation of some layers' queries and keys.

    Attributes:
        d: features of a head that are rotated.
        periods: (d / 2,) float32, in tokens per radian: MLX's `freqs`.
    """

    def __init__(self, head_dim: int, config: RopeConfig) -> None:
        self.config, self.d = config, int(head_dim * config.rotary_share)
        self.periods = rope_periods(self.d, config)
        mx.eval(self.periods)  # a lazy array could only be computed in this thread

    @functools.lru_cache(maxsize=64)  # noqa: B019 - as long as the model, which has one or two
    def periods_at(self, length: int) -> mx.array:
        """The periods for a document of so many tokens; they may depend on it."""
        if not self.config.by_length:
            return self.periods
        periods = rope_periods(self.d, self.config, length)
        mx.eval(periods)
        return periods

    def angles(self, positions: mx.array, lengths: np.ndarray) -> tuple[mx.array, mx.array]:
        """Cosine and signed sine (N, 1, d) of positions (N,), each in a document of a length."""
        periods = self.periods
        if self.config.by_length:
            different, place = np.unique(lengths, return_inverse=True)
            table = mx.stack([self.periods_at(int(length)) for length in different])
            periods = table[mx.array(place.reshape(-1))][:, None]
        angles = positions[:, None, None] / periods
        cosine, sine = mx.cos(angles), mx.sin(angles)
        if self.config.attention_factor != 1:
            cosine, sine = (x * self.config.attention_factor for x in (cosine, sine))
        if self.config.interleaved:
            cosine, sine = mx.repeat(cosine, 2, -1), mx.stack([-sine, sine], -1).flatten(-2)
            return cosine, sine
        return mx.concatenate([cosine, cosine], -1), mx.concatenate([-sine, sine], -1)

    def rotate(self, x: mx.array, angles: tuple[mx.array, mx.array]) -> mx.array:
        """x (N, H, Hd) by angles."""
        cosine, sine = angles
        x, *rest = mx.split(x, [self.d], axis=-1) if self.d < x.shape[-1] else [x]
        # `split`, as the gradients of two slices would each fill a whole array with zeros.
        if self.config.interleaved:
            pairs = x.reshape(*x.shape[:-1], -1, 2)
            first, second = mx.split(pairs, 2, axis=-1)
            swapped = mx.concatenate([second, first], axis=-1).reshape(x.shape)
        else:
            first, second = mx.split(x, 2, axis=-1)
            swapped = mx.concatenate([second, first], axis=-1)
        rotated = (x * cosine + swapped * sine).astype(x.dtype)
        return mx.concatenate([rotated, *rest], axis=-1) if rest else rotated

    def by_kernel(self, x: mx.array, offset: Any, length: int = 0) -> mx.array:
        """x (B, H, T, Hd) with MLX's own kernel.

        `offset` is the position of the first token, one for all or one for each of B, and `length`
        that of the whole text.
        """
        periods, factor = self.periods_at(length), self.config.attention_factor
        if factor != 1 and self.d == x.shape[-1]:
            x = x * factor
        elif factor != 1:
            x, rest = mx.split(x, [self.d], axis=-1)
            x = mx.concatenate([x * factor, rest], axis=-1)
        how: Any = {"base": None, "scale": 1.0, "offset": offset, "freqs": periods}
        return mx.fast.rope(x, self.d, traditional=self.config.interleaved, **how)


def rope_periods(d: int, rope: RopeConfig, length: int = 0) -> mx.array:
    """The periods of all feature pairs (d / 2,) float32, for a document of so many tokens."""
    theta, exponents = rope.theta, mx.arange(0, d, 2, dtype=mx.float32) / d
    old = rope.original_max_position_embeddings
    if rope.rope_type == "alpha":
        theta *= rope.factor ** (d / (d - 2))
    elif rope.rope_type == "dynamic":
        longer = max(length, rope.max_position_embeddings) / rope.max_position_embeddings
        theta *= (rope.factor * longer - (rope.factor - 1)) ** (d / (d - 2))
    periods = theta**exponents
    if rope.rope_type == "linear":
        return periods * rope.factor
    if rope.rope_type == "longrope":
        return mx.array(rope.long_factor if length > old else rope.short_factor) * periods
    if rope.rope_type == "llama3":
        # Fast pairs stay, slow ones grow by `factor`; between them Llama 3.1 interpolates
        # frequencies, not periods, by how often a pair turns within the old context.
        turns = old / (2 * math.pi * periods)
        spread = rope.high_freq_factor - rope.low_freq_factor
        kept = mx.clip((turns - rope.low_freq_factor) / spread, 0, 1)
        return periods * (1 / (kept + (1 - kept) / rope.factor))
    if rope.rope_type == "yarn":
        # The pairs, as real numbers, that turn so often within the old context.
        turned = (old / (often * 2 * math.pi) for often in (rope.beta_fast, rope.beta_slow))
        low, high = (d * math.log(each) / (2 * math.log(rope.theta)) for each in turned)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        high += 0.001 * (low == high)
        kept = 1 - mx.clip((mx.arange(d // 2, dtype=mx.float32) - low) / (high - low), 0, 1)
        return 1 / (1 / (rope.factor * periods) * (1 - kept) + 1 / periods * kept)
    return periods
