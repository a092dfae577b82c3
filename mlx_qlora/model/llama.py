"""The Llama tree (Touvron et al. 2023; Grattafiori et al. 2024), with Hugging Face's names.

The names are the checkpoint's, so the key map from file to tree is the identity, and a LoRA
weight's tree path is its key in a PEFT adapter. The tree keeps mlx-lm's model protocol
(`model(tokens, cache=...)`, `model.layers`, `make_cache`), so mlx-lm can generate with it.

Axes: B batch, T tokens, D hidden, H heads, K key-value heads, Hd head size, F MLP size,
V vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.cpu.exponentials import sigmoid
from mlx_qlora.device import Device, current
from mlx_qlora.errors import WeightsError, listing
from mlx_qlora.model.attention import Cached, Documents
from mlx_qlora.model.dropout import position_words
from mlx_qlora.model.quantize import Embedding, Linear
from mlx_qlora.model.rope import RopeConfig, rope_from_hf, rope_periods


def swiglu(
    gate: mx.array, up: mx.array, s: mx.array | None = None, compiled: bool = False
) -> mx.array:
    """gate, up (..., F) -> silu(gate) * up (..., F), in their dtype.

    `s` is sigmoid(gate), if it is known; `compiled` computes in one kernel, whatever the shapes,
    and is for whoever takes the derivative by `swiglu_vjp`.
    """
    if compiled:
        return _compiled(current())[0](gate, up)
    # The sigmoid's share of the derivative is in the gate's: its own would count twice, and is
    # not a number where an exponential has no end.
    return _with_gradient(gate, up, mx.stop_gradient(sigmoid(gate)) if s is None else s)


def swiglu_vjp(
    gate: mx.array, up: mx.array, dy: mx.array, s: mx.array | None = None, compiled: bool = False
) -> tuple[mx.array, mx.array]:
    """The gradients of gate and up; arguments as in `swiglu`.

    A function of its own because MLX compiles nothing within `mx.vjp`.
    """
    if compiled:
        return _compiled(current())[1](gate, up, dy)
    return _backward(gate, up, dy, sigmoid(gate) if s is None else s)


def _forward(gate: mx.array, up: mx.array, s: mx.array) -> mx.array:
    return gate * s * up


def _backward(gate: mx.array, up: mx.array, dy: mx.array, s: mx.array) -> tuple[mx.array, mx.array]:
    dys = dy * s
    return dys * up * (1 + gate * (1 - s)), dys * gate


_with_gradient: Any = mx.custom_function(_forward)
_with_gradient.vjp(lambda xs, dy, _: (*_backward(xs[0], xs[1], dy, xs[2]), mx.zeros_like(xs[2])))


@functools.cache
def _compiled(here: Device) -> tuple[Any, Any]:
    """SwiGLU and its backward, compiled; a trace keeps the exponentials of the device it met."""
    # Shapeless is safe here: nothing but elementwise operations, and no shape is looked at.
    forward = mx.compile(lambda gate, up: _forward(gate, up, sigmoid(gate)), shapeless=True)
    backward = mx.compile(
        lambda gate, up, dy: _backward(gate, up, dy, sigmoid(gate)), shapeless=True
    )
    return forward, backward


# ---- the tree ------------------------------------------------------------------------------------

Context = Documents | Cached  # what the tokens of a forward attend to
Keys = Sequence[mx.array | None]  # of the seven linears of a layer
NO_KEYS: Keys = [None] * 7


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of one Llama; field names as in Hugging Face's `config.json`."""

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
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Reads a `config.json`, and refuses what this tree would compute differently.

        Raises:
            WeightsError: another architecture, or missing or unsupported values; lists them all.
        """
        problems = _unsupported(config)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        derivable = [n for n in ("num_key_value_heads", "head_dim") if config.get(n) is not None]
        for name in (*sizes, "vocab_size", *derivable):
            if not isinstance(config.get(name), int) or config[name] < 1:
                problems.append(f"{name} must be a positive integer; got {config.get(name)!r}")
        eps = config.get("rms_norm_eps", 1e-6)
        if not isinstance(eps, (int, float)) or not eps > 0:
            problems.append(f"rms_norm_eps must be a positive number; got {eps!r}")
        if problems:
            raise WeightsError(f"config.json describes no Llama we can run:\n{listing(problems)}")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise WeightsError(
                f"config.json: num_attention_heads ({heads}) must be a multiple of "
                f"num_key_value_heads ({kv_heads})"
            )
        optional = ("tie_word_embeddings", "attention_bias", "mlp_bias", "max_position_embeddings")
        stated = [name for name in optional if name in config]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        if head_dim % 2:
            raise WeightsError(f"config.json: head_dim must be even for RoPE; got {head_dim}")
        return cls(
            **{name: config[name] for name in (*sizes, "vocab_size", *stated)},
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            rope=rope_from_hf(config),
        )


def _unsupported(config: dict[str, Any]) -> list[str]:
    """Values that change the arithmetic and that this tree does not implement."""
    ours = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_dropout": 0}
    problems = [
        f"{name} is {config[name]!r}; supported: {value!r}"
        for name, value in ours.items()
        if (config.get(name) or value) != value
    ]
    if config.get("model_type") != "llama":
        family = "supported: 'llama' (Llama 2 and 3.x, TinyLlama, SmolLM2, ...)"
        problems.insert(0, f"model_type is {config.get('model_type')!r}; {family}")
    return problems


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (Ainslie et al. 2023) and RoPE."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.Hd, D, bias = config.head_dim, config.hidden_size, config.attention_bias
        q_size = config.num_attention_heads * self.Hd
        k_size = config.num_key_value_heads * self.Hd
        self.q_proj = Linear(D, q_size, bias)
        self.k_proj = Linear(D, k_size, bias)
        self.v_proj = Linear(D, k_size, bias)
        self.o_proj = Linear(q_size, D, bias)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F, config.mlp_bias)
        self.up_proj = Linear(D, F, config.mlp_bias)
        self.down_proj = Linear(F, D, config.mlp_bias)


class DecoderLayer(nn.Module):
    """Two sentences: normalise, attend, add; normalise, mix, add.

    They are cut into pieces between which the training engine keeps what its backward needs
    (`train.engine.PIECES`). `keys` are the dropout words of the seven linears, each (N, 1) or None.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, context: Context, keys: Keys = NO_KEYS) -> mx.array:
        """x (..., D) -> (..., D)."""
        q, k, v = self.project(x, context, keys)
        h = self.add_attention(x, context.attend(q, k, v), keys)
        gate, up = self.widen(h, keys)
        return self.add_mlp(h, swiglu(gate, up), keys)

    def project(
        self, x: mx.array, context: Context, keys: Keys
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x (..., D) -> q (..., H, Hd) and k (..., K, Hd), rotated, and v (..., K, Hd)."""
        attention, x = self.self_attn, self.input_layernorm(x)
        heads = *x.shape[:-1], -1, attention.Hd
        q = attention.q_proj(x, keys[0]).reshape(heads)
        k = attention.k_proj(x, keys[1]).reshape(heads)
        v = attention.v_proj(x, keys[2]).reshape(heads)
        return context.rotate(q), context.rotate(k), v

    def add_attention(self, x: mx.array, heads: mx.array, keys: Keys) -> mx.array:
        """x (..., D) and heads (..., H, Hd) -> h (..., D)."""
        return x + self.self_attn.o_proj(heads.flatten(-2), keys[3])

    def widen(self, h: mx.array, keys: Keys) -> tuple[mx.array, mx.array]:
        """h (..., D) -> gate and up (..., F)."""
        x = self.post_attention_layernorm(h)
        return self.mlp.gate_proj(x, keys[4]), self.mlp.up_proj(x, keys[5])

    def add_mlp(self, h: mx.array, gated: mx.array, keys: Keys) -> mx.array:
        """h (..., D) and silu(gate) * up (..., F) -> y (..., D)."""
        return h + self.mlp.down_proj(gated, keys[6])


class LlamaModel(nn.Module):
    """Embedding, layers, final norm: token ids to hidden states."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rope_periods = rope_periods(config.head_dim, config.rope)
        mx.eval(self._rope_periods)  # a lazy array could only be computed in this thread

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        dropout_key: mx.array | None = None,
        documents: np.ndarray | None = None,
    ) -> mx.array:
        """Tokens (B, T) int -> hidden states (B, T, D); arguments as in `LlamaForCausalLM`."""
        if cache is not None:
            mask = cache[0].make_mask(tokens.shape[1], return_array=False, window_size=None)
            h = self.embed_tokens(tokens)
            for layer, of_layer in zip(self.layers, cache):
                h = layer(h, Cached(mask, of_layer, self._rope_periods))
            return self.norm(h)

        B, T = tokens.shape
        if documents is None:  # each row is one
            documents = np.array([(b, 0, T) for b in range(B)], np.int32)
        context = self.documents(documents, B * T, T)
        keys = self.dropout_keys(dropout_key, B, context)
        return self.hidden(tokens.reshape(-1), context, keys).reshape(B, T, -1)

    def hidden(
        self, tokens: mx.array, documents: Documents, keys: list[Keys] | None = None
    ) -> mx.array:
        """Tokens (N,) of documents, end to end -> (N, D); no keys mean no dropout."""
        h = self.embed_tokens(tokens)
        for layer, of_layer in zip(self.layers, keys or [NO_KEYS] * len(self.layers)):
            h = layer(h, documents, of_layer)
        return self.norm(h)

    def documents(
        self, documents: np.ndarray, N: int | None = None, T: int | None = None
    ) -> Documents:
        """What `Documents.of` makes of them, for this model."""
        return Documents.of(documents, self._rope_periods, N, T)

    def dropout_keys(self, key: mx.array | None, B: int, documents: Documents) -> list[Keys]:
        """For each layer the words (N, 1) that its seven linears draw their dropout from.

        `key` is one (2,) for a batch of B rows, or one for each row (B, 2); None means no dropout.
        """
        n = len(self.layers)
        if key is None:
            return [NO_KEYS] * n
        keys = mx.random.split(key, B) if key.ndim == 1 else key
        words = position_words(keys, documents.row, documents.column, 7 * n)
        return [words[7 * layer : 7 * layer + 7] for layer in range(n)]


class LlamaForCausalLM(nn.Module):
    """A Llama with its output head; the head is the embedding where the config ties them.

    Its weights are zeros that cost no memory until a loader fills them.
    """

    hf_config: dict[str, Any]  # the `config.json` that the loader read
    source: Any  # where the weights came from, a `hub.ModelFiles`
    quantized_to: Any  # the `QuantConfig` by which dense files were packed while loading, or None
    lora_config: Any  # the `LoraConfig` of the LoRA layers, once `add_lora` has put them in

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.freeze()

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        *,
        dropout_key: mx.array | None = None,
        documents: np.ndarray | None = None,
    ) -> mx.array:
        """The logits (B, T, V) of every position, in the compute dtype.

        Args:
            tokens: (B, T) int, right-padded if rows differ in length.
            cache: one mlx-lm cache per layer, while generating.
            dropout_key: draws the LoRA dropout masks: one (2,) for the batch, or one for each
                row (B, 2); None turns dropout off.
            documents: (N, 3) int of row, start and end, in order, where rows hold several
                documents: each is attended to as if it stood alone, its positions from 0 on.
        """
        return self.logits(self.model(tokens, cache, dropout_key, documents))

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., D) -> logits (..., V)."""
        return self.head.multiply(hidden)

    @property
    def head(self) -> Embedding | Linear:
        """The output matrix (V, D): `lm_head`, or the embedding that it is tied to."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, where mlx-lm looks for them."""
        return self.model.layers

    def make_cache(self) -> list[Any]:
        """One empty mlx-lm key-value cache per layer."""
        from mlx_lm.models.cache import KVCache

        return [KVCache() for _ in self.layers]
