"""The Llama tree (Touvron et al. 2023; Grattafiori et al. 2024), with Hugging Face's names.

The names are the checkpoint's, so the key map from file to tree is the identity, and a LoRA
weight's tree path is its key in a PEFT adapter. The tree keeps mlx-lm's model protocol
(`model(tokens, cache=...)`, `model.layers`, `make_cache`), so mlx-lm can generate with it.

Axes: B batch, T tokens, D hidden, H heads, K key-value heads, Hd head size, F MLP size,
V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import WeightsError, listing
from mlx_qlora.model.dropout import row_keys, split_keys
from mlx_qlora.model.quantize import Embedding, Linear
from mlx_qlora.model.rope import RopeConfig, rope_from_hf, rope_periods
from mlx_qlora.model.swiglu import swiglu

# MLX's fused attention has no gradient for this few queries on Metal; see `causal_mask`.
FEWEST_FUSED_QUERIES = 9


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

        Args:
            config: the file as a dict, in transformers v4's or v5's spelling.

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
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        if head_dim % 2:
            raise WeightsError(f"config.json: head_dim must be even for RoPE; got {head_dim}")
        return cls(
            **{name: config[name] for name in (*sizes, "vocab_size")},
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            rope=rope_from_hf(config),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
        )


def _unsupported(config: dict[str, Any]) -> list[str]:
    """Values that change the arithmetic and that this tree does not implement."""
    problems = []
    if config.get("model_type") != "llama":
        supported = "supported: 'llama' (Llama 2 and 3.x, TinyLlama, SmolLM2, ...)"
        problems.append(f"model_type is {config.get('model_type')!r}; {supported}")
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        problems.append(f"architectures is {architectures}; supported: ['LlamaForCausalLM']")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {config['hidden_act']!r}; supported: 'silu'")
    if config.get("attention_dropout"):
        problems.append(f"attention_dropout is {config['attention_dropout']}; supported: 0")
    return problems


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (Ainslie et al. 2023) and RoPE."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, Hd = config.hidden_size, config.head_dim
        self.H, self.K, self.Hd = config.num_attention_heads, config.num_key_value_heads, Hd
        bias = config.attention_bias
        self.q_proj = Linear(D, self.H * Hd, bias)
        self.k_proj = Linear(D, self.K * Hd, bias)
        self.v_proj = Linear(D, self.K * Hd, bias)
        self.o_proj = Linear(self.H * Hd, D, bias)
        self._rope_periods = rope_periods(Hd, config.rope)
        mx.eval(self._rope_periods)  # lazy, it could be computed in the thread that made it alone

    def __call__(self, x: mx.array, mask: Any, cache: Any, keys: list[Any]) -> mx.array:
        """x (B, T, D) -> (B, T, D); `keys` are the dropout keys of q, k, v and o."""
        B, T, _ = x.shape
        q = self.q_proj(x, keys[0]).reshape(B, T, self.H, self.Hd)
        k = self.k_proj(x, keys[1]).reshape(B, T, self.K, self.Hd)
        v = self.v_proj(x, keys[2]).reshape(B, T, self.K, self.Hd)
        if isinstance(mask, Stretches):
            out = self.attend_documents(q, k, v, mask)
        else:
            out = self.attend(q, k, v, mask, cache)
        return self.o_proj(out.reshape(B, T, -1), keys[3])

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        """q (B, T, H, Hd), k and v (B, T, K, Hd) -> (B, T, H, Hd)."""
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))  # (B, H, T, Hd), (B, K, T, Hd)
        offset = 0 if cache is None else cache.offset
        q, k = self.rotate(q, offset), self.rotate(k, offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return _attend(q, k, v, self.Hd**-0.5, mask, cache).swapaxes(1, 2)

    def attend_documents(
        self, q: mx.array, k: mx.array, v: mx.array, stretches: "Stretches"
    ) -> mx.array:
        """As `attend`, where rows hold several documents: each as if it stood alone.

        Positions start anew with each document, and no score between two of them is ever
        computed; a mask would have to be T x T.
        """
        # Split, not sliced: its gradient joins the parts again, a slice's fills a row with zeros.
        parts = [mx.split(part.flatten(0, 1), stretches.borders) for part in (q, k, v)]
        outs = []
        for is_document, *qkv in zip(stretches.documents, *parts):
            if is_document:
                q1, k1, v1 = (part[None] for part in qkv)
                outs.append(self.attend(q1, k1, v1, causal_mask(q1.shape[1]), None)[0])
            else:
                outs.append(mx.zeros_like(qkv[0]))  # padding: read by nobody, but a number
        return mx.concatenate(outs)

    def rotate(self, x: mx.array, offset: Any) -> mx.array:
        """RoPE in Hugging Face's layout: pair i is (i, i + Hd / 2), not (2i, 2i + 1)."""
        return mx.fast.rope(
            x,
            self.Hd,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._rope_periods,
        )


def _attend(q: mx.array, k: Any, v: Any, scale: float, mask: Any, cache: Any) -> mx.array:
    if hasattr(cache, "bits"):  # mlx-lm's quantised cache: k and v are packed triples
        from mlx_lm.models.base import scaled_dot_product_attention

        return scaled_dot_product_attention(q, k, v, cache=cache, scale=scale, mask=mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F, config.mlp_bias)
        self.up_proj = Linear(D, F, config.mlp_bias)
        self.down_proj = Linear(F, D, config.mlp_bias)

    def __call__(self, x: mx.array, keys: list[Any]) -> mx.array:
        """x (B, T, D) -> (B, T, D); `keys` are the dropout keys of gate, up and down."""
        gated = swiglu(self.gate_proj(x, keys[0]), self.up_proj(x, keys[1]))
        return self.down_proj(gated, keys[2])


@dataclass(frozen=True)
class Stretches:
    """Where documents and padding alternate in the flattened (B * T,) positions of a batch.

    Attributes:
        borders: positions at which a stretch ends and the next one begins.
        documents: for each stretch, whether it is a document.
    """

    borders: list[int]
    documents: list[bool]

    @classmethod
    def of(cls, documents: np.ndarray, B: int, T: int) -> "Stretches":
        """From (N, 3) of row, start and end, in order."""
        starts, kinds, at = [], [], 0
        for row, start, end in documents.tolist():
            if row * T + start > at:
                starts, kinds = [*starts, at], [*kinds, False]
            starts, kinds = [*starts, row * T + start], [*kinds, True]
            at = row * T + end
        if at < B * T:
            starts, kinds = [*starts, at], [*kinds, False]
        return cls(starts[1:], kinds)


class DecoderLayer(nn.Module):
    """Two sentences: normalise, attend, add; normalise, mix, add."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: Any, cache: Any = None, dropout_key: mx.array | None = None
    ) -> mx.array:
        """x (B, T, D) -> (B, T, D); a row's dropout key (B, 2) serves the layer's seven linears."""
        keys = [None] * 7 if dropout_key is None else split_keys(dropout_key, 7)
        h = x + self.self_attn(self.input_layernorm(x), mask, cache, keys[:4])
        return h + self.mlp(self.post_attention_layernorm(h), keys[4:])


class LlamaModel(nn.Module):
    """Embedding, layers, final norm: token ids to hidden states."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        dropout_key: mx.array | None = None,
        recompute: int = 0,
        documents: np.ndarray | None = None,
    ) -> mx.array:
        """Tokens (B, T) int -> hidden states (B, T, D); arguments as in `LlamaForCausalLM`."""
        n = len(self.layers)
        caches = cache or [None] * n
        keys: list[Any] = [None] * n
        if dropout_key is not None:
            keys = split_keys(row_keys(dropout_key, tokens.shape[0]), n)
        if documents is None:
            mask = causal_mask(tokens.shape[1], caches[0])
        else:
            mask = Stretches.of(documents, *tokens.shape)

        h = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            forward = recomputed(layer) if i < recompute else layer
            h = forward(h, mask, caches[i], keys[i])
        return self.norm(h)


class LlamaForCausalLM(nn.Module):
    """A Llama with its output head; the head is the embedding where the config ties them.

    Args:
        config: the sizes. Weights are zeros that cost no memory until a loader fills them.

    Attributes:
        hf_config: the `config.json` that the loader read, as a dict.
        source: the loader's record of where the weights came from (a `hub.ModelFiles`).
        lora_config: the `LoraConfig` of the LoRA layers, once `add_lora` has put them in.
    """

    hf_config: dict[str, Any]
    source: Any
    lora_config: Any

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
        recompute: int = 0,
        documents: np.ndarray | None = None,
    ) -> mx.array:
        """The logits of every position.

        Args:
            tokens: (B, T) int, right-padded if rows differ in length.
            cache: one mlx-lm cache per layer, while generating.
            dropout_key: draws the LoRA dropout masks: one (2,) for the batch, or one for each
                row (B, 2); None turns dropout off.
            recompute: how many layers forget their activations in the forward and compute them
                again in the backward. The result does not depend on it.
            documents: (N, 3) int of row, start and end, in order, where rows hold several
                documents: each is attended to as if it stood alone, its positions from 0 on.

        Returns:
            (B, T, V), in the compute dtype.
        """
        return self.logits(self.model(tokens, cache, dropout_key, recompute, documents))

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


def causal_mask(T: int, cache: Any = None) -> Any:
    """The mask for T new tokens: the word "causal" where possible, because it costs no memory.

    An array mask makes the backward build T x T scores on every backend. Right padding needs
    none: a real token never looks to its right, and padding carries no label. Only for a handful
    of queries without a cache is an array used, as Metal's fused backward refuses those.
    """
    if cache is not None:
        return cache.make_mask(T, return_array=False, window_size=None)
    if T < FEWEST_FUSED_QUERIES:
        return mx.tril(mx.ones((T, T), dtype=mx.bool_))
    return "causal"


def recomputed(layer: DecoderLayer) -> Any:
    """The layer, computed again in the backward instead of keeping its activations.

    The dropout key is an argument, so the second run draws the first run's masks: a layer that
    called `mx.random` without a key would differentiate another function than it computed.
    """
    trainable = layer.trainable_parameters()

    def forward(x: mx.array, mask: Any, cache: Any, key: mx.array | None) -> mx.array:
        def run(x: mx.array, weights: dict[str, Any]) -> mx.array:
            before = layer.trainable_parameters()
            layer.update(weights)
            try:
                return layer(x, mask, cache, key)
            finally:
                layer.update(before)

        # Weights are arguments, not captures: mx.checkpoint has gradients for arguments alone.
        return mx.checkpoint(run)(x, trainable)

    return forward
