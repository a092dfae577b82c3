"""What a dense decoder does differently from Llama, as facts that one tree reads.

A family is a `model_type` of Hugging Face's `config.json`, and a function of a few lines that reads
the facts from it. Everything that a config may say and the tree would compute differently is
refused; what is not in a config is what transformers takes for it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_qlora.errors import WeightsError, listing
from mlx_qlora.model.rope import RopeConfig, rope_from_hf

# The norms of a layer by the places where they are: before and after attention, before and after
# the MLP. None where there is none.
Norms = tuple[str | None, str | None, str | None, str | None]
PRE: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
POST: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
GEMMA: Norms = (PRE[0], POST[1], "pre_feedforward_layernorm", POST[3])
GLM: Norms = (PRE[0], "post_self_attn_layernorm", PRE[2], "post_mlp_layernorm")
# Norms of queries and keys: of each head before RoPE, of each head after it, or of all heads.
HEAD, AFTER_ROPE, ALL_HEADS = "head", "after rope", "all heads"
ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "gelu"),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a dense decoder, and where it differs from Llama.

    Field names are those of Hugging Face's `config.json` where it has them.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    model_type: str = "llama"
    output_bias: bool = False  # of o
    fused_qkv: bool = False  # one matrix makes q, k and v
    fused_gate_up: bool = False
    norms: Norms = PRE
    norm_offset: float = 0.0  # added to the weights of every norm
    head_norms: str = ""  # HEAD, AFTER_ROPE, ALL_HEADS, or none
    head_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    hidden_act: str = "silu"  # or gelu, in its approximation by tanh
    windows: tuple[int | None, ...] = ()  # of each layer, in tokens; empty means none
    rope_of_windows: RopeConfig | None = None  # of layers with a window; None is as the others
    unrotated: tuple[int, ...] = ()  # numbers of the layers without RoPE
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a sublayer adds
    attention_scale: float | None = None  # of scores; None is 1 / sqrt(head_dim)
    logits_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Reads a `config.json`; a WeightsError lists all that this tree would do differently."""
        return _read(config)

    def window(self, layer: int) -> int | None:
        """How many keys a query of a layer sees, its own included; None for all before it."""
        return self.windows[layer] if self.windows else None


# ---- reading -------------------------------------------------------------------------------------


@dataclass
class Fields:
    """The fields of a `config.json`, and what is wrong with those that were read."""

    config: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer; without a default it must be there."""
        value = self.config.get(name, default)
        most = MOST_LAYERS if name == LAYERS else (1 << 31) - 1
        if type(value) is not int or not 1 <= value <= most:
            limit = f" of at most {most:,}" * (type(value) is int and value > most)
            self.problems.append(f"{name} must be a positive integer{limit}; got {value!r}")
            return 1
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        optional: bool = False,
        kinds: tuple[type, ...] = (int, float),
    ) -> Any:
        """A positive number; `optional` allows null."""
        value = self.config.get(name, default)
        if optional and value is None:
            return None
        if optional and type(value) in kinds and value < 1:  # no model's; it would need float64
            self.problems.append(f"{name} must be at least 1; got {value!r}")
        if type(value) not in kinds or not 0 < value < float("inf"):
            self.problems.append(f"{name} must be a positive number; got {value!r}")
            return 1.0
        return value

    def maybe(self, name: str, *kinds: type) -> None:
        """The field may be left out or null, and else is of one of some types."""
        if type(value := self.config.get(name)) not in (*kinds, type(None)):
            shown = " or ".join(kind.__name__ for kind in kinds)
            self.problems.append(f"{name} must be {shown} or null; got {value!r}")

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.config.get(name, default)
        if type(value) is not bool:
            self.problems.append(f"{name} must be true or false; got {value!r}")
        return value is True

    def must_be(self, name: str, *values: Any) -> None:
        """The field is one of some values, the first of which it has where it is not there."""
        value = self.config.get(name, values[0])
        if not any(value == each and type(value) is type(each) for each in values):
            shown = " or ".join(map(repr, values))
            self.problems.append(f"{name} is {value!r}; supported: {shown}")

    def layer_types(self, usual: Callable[[int], bool]) -> list[bool]:
        """Whether each layer has a window, by `layer_types` or, without it, by its number."""
        n, types = self.count("num_hidden_layers"), self.config.get("layer_types")
        if types is None:
            return [usual(i) for i in range(min(n, 1 << 16))]
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or any(str(kind) not in known for kind in types):
            self.problems.append(f"layer_types may hold {' and '.join(known)}; got {types!r}")
            return [False] * n
        if len(types) != n:
            self.problems.append(f"layer_types has {len(types)} entries for {n} layers")
        return [known[str(kind)] for kind in types]

    def windows(
        self, usual: Callable[[int], bool], size: Any, layer_types: bool = True
    ) -> tuple[int | None, ...]:
        """The window of each layer; `size` is `sliding_window`, None for none at all."""
        types = self.layer_types(usual) if layer_types else [usual(0)] * self.count(LAYERS)
        if not any(types):
            return ()
        if type(size) is not int or size < 1:
            self.problems.append(f"sliding_window must be a positive integer; got {size!r}")
            return ()
        return tuple(size if slides else None for slides in types)

    def rope(self, layers: str | None = None, theta: float = 10000.0, **how: Any) -> RopeConfig:
        """The parameters of RoPE; see `rope_from_hf`."""
        try:
            return rope_from_hf(self.config, layers, theta, **how)
        except WeightsError as error:
            self.problems.append(str(error).removeprefix("config.json: "))
            return RopeConfig()


LAYERS = "num_hidden_layers"
MOST_LAYERS = 10_000  # so many modules are built in seconds
MAY_LACK_HEAD_DIM = ("llama", "mistral", "seed_oss")  # null is as if left out
NEED_KV_HEADS = ("mistral", "ministral", "exaone4", "cwm", "gemma2", "gemma3_text", "glm4")
WHOLE_NUMBERS = ("sliding_window", "no_rope_layer_interval")
Facts = dict[str, Any]  # fields of a LlamaConfig


@dataclass(frozen=True)
class Family:
    """A `model_type`: what may be left out of its config, and what is read from it."""

    model_class: str  # of transformers
    facts: Callable[[Fields], Facts]
    eps: float = 1e-6
    kv_heads: bool = True  # whether num_key_value_heads may be left out
    head_dim: int | None = None  # where it is left out; None is hidden_size / heads
    tied: bool = False
    whole_heads: bool = False  # hidden_size must be a multiple of the heads, whatever head_dim is
    activation: str = "hidden_act"  # the field
    act: str = "silu"


def _read(config: dict[str, Any]) -> LlamaConfig:
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise WeightsError(f"config.json: {refusal(config)}")
    fields = Fields(config)
    names = ("hidden_size", LAYERS, "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = {name: fields.count(name) for name in names}
    heads = sizes["num_attention_heads"]
    kv_heads = heads if family.kv_heads else None
    if config.get("num_key_value_heads", 0) is not None or kind in NEED_KV_HEADS:
        kv_heads = fields.count("num_key_value_heads", kv_heads)
    head_dim = family.head_dim or sizes["hidden_size"] // heads
    if config.get("head_dim", 0) is not None or kind not in MAY_LACK_HEAD_DIM:
        head_dim = fields.count("head_dim", head_dim or 1)
    fields.must_be("is_causal", True, None)
    for name in WHOLE_NUMBERS:
        fields.maybe(name, int)
    if heads % (kv_heads or heads):
        fields.problems.append(
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
        )
    if family.whole_heads and sizes["hidden_size"] % heads:
        fields.problems.append(f"hidden_size must be a multiple of {heads} heads")
    if (config.get("architectures") or [family.model_class]) != [family.model_class]:
        named = config["architectures"]
        fields.problems.append(f"architectures is {named}; supported: {[family.model_class]}")
    act = config.get(family.activation, family.act)
    if not isinstance(act, str) or act not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        fields.problems.append(f"{family.activation} is {act!r}; supported: {known}")
    facts: Facts = {
        "num_key_value_heads": kv_heads or heads,
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps", family.eps, kinds=(float,)),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", family.tied),
        "max_position_embeddings": fields.count("max_position_embeddings", 2048),
        "hidden_act": ACTIVATIONS.get(str(act), "silu"),
        **sizes,
        "model_type": kind,
        **family.facts(fields),
    }
    if "rope" not in facts:
        facts["rope"] = fields.rope()
    rotated = int(head_dim * facts["rope"].rotary_share)
    if rotated % 2 or (rotated == 2 and facts["rope"].rope_type in ("dynamic", "alpha")):
        fields.problems.append(f"head_dim must be even for RoPE; got {head_dim}")
    if head_dim * heads >= 1 << 31:
        fields.problems.append(f"head_dim {head_dim:,} is too large for a matrix")
    for name in ("short_factor", "long_factor"):
        n, is_long = len(getattr(facts["rope"], name)), facts["rope"].rope_type == "longrope"
        if is_long and n != rotated // 2:
            fields.problems.append(f"{name} must hold {rotated // 2} numbers; got {n}")
    if fields.problems:
        message = "config.json describes a model that is not supported"
        raise WeightsError(f"{message}:\n{listing(fields.problems)}")
    return LlamaConfig(**facts)


# ---- the families --------------------------------------------------------------------------------


def _biases(c: Fields) -> Facts:
    """One flag for the biases of all four projections."""
    bias = c.flag("attention_bias")
    return {"attention_bias": bias, "output_bias": bias}


def _llama(c: Fields) -> Facts:
    c.must_be("attention_dropout", 0.0, 0, None)
    return {**_biases(c), "mlp_bias": c.flag("mlp_bias")}


def _mistral(c: Fields) -> Facts:
    is_new, size = c.config["model_type"] == "ministral", c.config.get("sliding_window", 4096)
    if is_new:
        c.count("head_dim")
    return {"windows": c.windows(lambda i: size is not None, size, layer_types=is_new)}


def _qwen(c: Fields) -> Facts:
    is_third = c.config["model_type"] == "qwen3"
    first = c.config.get("max_window_layers", 28)
    if type(first) is not int:
        c.problems.append(f"max_window_layers must be a whole number; got {first!r}")
        return {}
    size = c.config.get("sliding_window", 4096) if c.flag("use_sliding_window") else None
    windows = c.windows(lambda i: size is not None and i >= first, size)
    own = {"head_norms": HEAD, **_biases(c)} if is_third else {"attention_bias": True}
    return {**own, "windows": windows}


def _smollm3(c: Fields) -> Facts:
    n, every = c.count(LAYERS), c.count("no_rope_layer_interval", 4)
    rotated = c.config.get("no_rope_layers")
    if rotated is None:
        rotated = [(i + 1) % every for i in range(n)]
    if (
        not isinstance(rotated, list)
        or len(rotated) < n
        or any(type(r) is not int for r in rotated)
    ):
        c.problems.append(f"no_rope_layers must have an entry for each layer; got {rotated!r}")
        rotated = [1] * n
    slides, size = c.flag("use_sliding_window"), c.config.get("sliding_window")
    windows = c.windows(lambda i: slides and size is not None and not rotated[i], size)
    if windows and not slides:
        c.problems.append("layer_types has sliding_attention, but use_sliding_window is false")
    unrotated = tuple(i for i in range(n) if not rotated[i])
    rope = c.rope(theta=2000000.0)
    return {**_llama(c), "unrotated": unrotated, "windows": windows, "rope": rope}


def _granite(c: Fields) -> Facts:
    return {
        **_llama(c),
        "embedding_scale": c.number("embedding_multiplier", 1.0),
        "residual_scale": c.number("residual_multiplier", 1.0),
        "attention_scale": c.number("attention_multiplier", 1.0),
        "logits_scale": 1 / c.number("logits_scaling", 1.0),
    }


def _olmo2(c: Fields) -> Facts:
    return {**_biases(c), "norms": POST, "head_norms": ALL_HEADS}


def _olmo3(c: Fields) -> Facts:
    windows = c.windows(lambda i: (i + 1) % 4 != 0, c.config.get("sliding_window", 4096))
    ropes = (c.rope(layers, 500000.0) for layers in ("full_attention", "sliding_attention"))
    return {**_olmo2(c), "windows": windows, **dict(zip(("rope", "rope_of_windows"), ropes))}


def _seed_oss(c: Fields) -> Facts:
    return {
        "attention_bias": c.flag("attention_bias", True),
        "output_bias": c.flag("attention_out_bias"),
        "mlp_bias": c.flag("mlp_bias"),
    }


def _exaone4(c: Fields) -> Facts:
    size = c.config.get("sliding_window", 4096)
    every = c.config.get("sliding_window_pattern", 4)
    c.maybe("sliding_window_pattern", int, str)
    if c.config.get("layer_types") is None and (type(every) is not int or every < 1 or not size):
        c.problems.append(f"sliding_window_pattern {every!r} needs layer_types beside it")
        every = 4
    windows = c.windows(lambda i: (i + 1) % every != 0, size)
    # Where there are windows, the layers that see everything are not rotated.
    whole = (i for i in range(c.count(LAYERS)) if not (windows and windows[i]))
    unrotated = () if size is None else tuple(whole)
    return {"norms": POST, "head_norms": HEAD, "windows": windows, "unrotated": unrotated}


def _hunyuan(c: Fields) -> Facts:
    names = "query_layernorm", "key_layernorm"
    c.count("head_dim")
    rope = c.rope(alpha=True)
    return {**_biases(c), "head_norms": AFTER_ROPE, "head_norm_names": names, "rope": rope}


CWM_ROPE = {"rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
CWM_ROPE |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}


def _cwm(c: Fields) -> Facts:
    if c.config.get("rope_parameters") is None and not c.config.get("rope_scaling"):
        c.config = {**c.config, "rope_parameters": CWM_ROPE}
    windows = c.windows(lambda i: i % 4 != 0, c.config.get("sliding_window", 8192))
    return {"mlp_bias": c.flag("mlp_bias"), "windows": windows, "rope": c.rope(theta=1000000.0)}


def _phi3(c: Fields) -> Facts:
    size = c.config.get("sliding_window")
    for name in ("resid_pdrop", "embd_pdrop"):
        c.must_be(name, 0.0, 0)
    old = {"original_max_position_embeddings": 4096}
    c.config = old | c.config
    c.count("original_max_position_embeddings")
    scaling = c.config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type", scaling.get("rope_type")) == "yarn":
        kind = {"type": "longrope", "rope_type": "longrope"}  # as early Phi-3 configs mean it
        c.config = {**c.config, "rope_scaling": scaling | kind}
    rope = c.rope(parts=True)
    if rope.rope_type not in ("default", "longrope"):
        c.problems.append(f"rope_type is {rope.rope_type!r}; supported: 'default' or 'longrope'")
    return {
        "fused_qkv": True,
        "fused_gate_up": True,
        "windows": c.windows(lambda i: size is not None, size, layer_types=False),
        "rope": rope,
    }


def _gemma2(c: Fields) -> Facts:
    c.must_be("use_bidirectional_attention", None, False)
    return {
        **_biases(c),
        "norms": GEMMA,
        "norm_offset": 1.0,
        "embedding_scale": c.count("hidden_size") ** 0.5,
        "attention_scale": c.count("query_pre_attn_scalar", 256) ** -0.5,
        "windows": c.windows(lambda i: i % 2 == 0, c.config.get("sliding_window", 4096)),
        "attention_softcap": c.number("attn_logit_softcapping", 50.0, True, (float,)),
        "logits_softcap": c.number("final_logit_softcapping", 30.0, True, (float,)),
    }


def _gemma3(c: Fields) -> Facts:
    c.must_be("attn_logit_softcapping", None)
    every = c.count("sliding_window_pattern", 6)
    windows = c.windows(lambda i: (i + 1) % every != 0, c.config.get("sliding_window", 4096))
    return {
        **_gemma2(c),
        "attention_softcap": None,
        "logits_softcap": c.number("final_logit_softcapping", None, True, (float,)),
        "head_norms": HEAD,
        "windows": windows,
        "rope": c.rope("full_attention", 1000000.0),
        "rope_of_windows": c.rope("sliding_attention", 10000.0),
    }


def _glm4(c: Fields) -> Facts:
    return {
        "attention_bias": c.flag("attention_bias", True),
        "fused_gate_up": True,
        "norms": GLM,
        "rope": c.rope(share=0.5, interleaved=True, parts=True),
    }


LIKE_GEMMA: dict[str, Any] = {"kv_heads": False, "head_dim": 256, "tied": True}
LIKE_GEMMA |= {"activation": "hidden_activation", "act": "gelu_pytorch_tanh", "whole_heads": True}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, whole_heads=True),
    "mistral": Family("MistralForCausalLM", _mistral, kv_heads=False),
    "ministral": Family("MinistralForCausalLM", _mistral, kv_heads=False),
    "qwen2": Family("Qwen2ForCausalLM", _qwen, kv_heads=False),
    "qwen3": Family("Qwen3ForCausalLM", _qwen, kv_heads=False, head_dim=128),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, kv_heads=False, tied=True),
    "granite": Family("GraniteForCausalLM", _granite),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, 1e-5),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3, 1e-5),
    "seed_oss": Family("SeedOssForCausalLM", _seed_oss, kv_heads=False, head_dim=128),
    "exaone4": Family("Exaone4ForCausalLM", _exaone4, 1e-5, kv_heads=False),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM", _hunyuan, 1e-5),
    "cwm": Family("CwmForCausalLM", _cwm, 1e-5, False, 128, whole_heads=True),
    "phi3": Family("Phi3ForCausalLM", _phi3, 1e-5),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, **LIKE_GEMMA),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, **LIKE_GEMMA),
    "glm4": Family("Glm4ForCausalLM", _glm4, 1.5625e-7, kv_heads=False, head_dim=128),
}
SUPPORTED = (
    "dense decoders: Llama, Mistral, Ministral, Qwen2.5, Qwen3, SmolLM2 and 3, Granite, OLMo 2 "
    "and 3, Seed-OSS, EXAONE 4, Hunyuan, CWM, Phi-3 and 4-mini, Gemma 2 and 3 (text), GLM-4"
)

# ---- what is refused, and why --------------------------------------------------------------------

OTHERS = {
    "qwen3_next|qwen3_5|kimi_linear": "with linear attention (GatedDeltaNet)",
    "gemma3n|gemma4": "with embeddings in each layer and shared keys",
    "gpt_oss": "a mixture of experts with attention sinks",
    "arcee|nemotron|apertus": "with an MLP without a gate",
    "mamba|falcon_mamba|jamba|bamba|lfm2|recurrent_gemma|rwkv|zamba": "layers without attention",
    "bert|roberta|modernbert|deberta|xlm|distilbert|electra": "an encoder, which generates no text",
    "t5|mt5|bart|mbart|whisper|pegasus": "an encoder and a decoder",
    "gemma": "the first Gemma",
    "phi|gpt2|gpt_neox|opt|bloom|falcon|gptj|starcoder2|stablelm": "with other layers than Llama's",
}


def refusal(config: dict[str, Any]) -> str:
    """What a model is that no family describes, and why it is not run."""
    kind = config.get("model_type")
    text = config.get("text_config")
    if isinstance(text, dict):
        inner = text.get("model_type")
        if isinstance(inner, str) and inner in FAMILIES:
            return (
                f"{kind!r} sees images; its text part, {inner!r}, can be tuned alone; load it with "
                "transformers, save its language model (`model.model.language_model` with its "
                "lm_head) in a separate folder, and name that folder"
            )
        return f"{kind!r} sees images, and its text part {inner!r} is not supported either"
    if any("expert" in name and value for name, value in config.items()) or "moe" in str(kind):
        why = "a mixture of experts"
    else:
        reasons = (why for kinds, why in OTHERS.items() if re.match(f"({kinds})(_|$)", str(kind)))
        why = next(reasons, "an unknown architecture")
    return f"model_type is {kind!r}, {why}; supported: {SUPPORTED}"
