"""The tree of every dense decoder: Llama's (Touvron et al. 2023; Grattafiori et al. 2024).

What other families do differently are facts of `LlamaConfig`, which `families` reads.

The names are the checkpoint's, so the key map from file to tree is the identity, and a LoRA
weight's tree path is its key in a PEFT adapter. The tree keeps mlx-lm's model protocol
(`model(tokens, cache=...)`, `model.layers`, `make_cache`), so mlx-lm can generate with it.

Axes: B batch, T tokens, D hidden, H heads, K key-value heads, Hd head size, F MLP size,
V vocabulary.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.cpu.attention import Reach
from mlx_qlora.device import mlx_lm
from mlx_qlora.errors import DataError
from mlx_qlora.model.attention import Cached, Documents
from mlx_qlora.model.dropout import position_words
from mlx_qlora.model.families import AFTER_ROPE, ALL_HEADS, HEAD, LlamaConfig
from mlx_qlora.model.linears import Linears
from mlx_qlora.model.quantize import Embedding, Linear
from mlx_qlora.model.rope import Rope
from mlx_qlora.model.streaming import LayerReader
from mlx_qlora.model.swiglu import swiglu

T = TypeVar("T")


Context = Documents | Cached  # what the tokens of a forward attend to
Keys = Sequence[mx.array | None]  # of the seven linears of a layer
NO_KEYS: Keys = [None] * 7
Pieces = Generator[tuple[str, mx.array], list[mx.array], mx.array]
# The linears of a layer that read the same input, and their places among the keys.
KEYS_OF = {"qkv": slice(0, 3), "o": slice(3, 4), "gate_up": slice(4, 6), "down": slice(6, 7)}
# Where they are, their names, and that of the one that may stand for several.
LINEARS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    "o": ("self_attn", ("o_proj",), ""),
    "gate_up": ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
    "down": ("mlp", ("down_proj",), ""),
}


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset), over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    Gemma stores its weights less 1; the others have no offset.
    """

    def __init__(self, d: int, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = mx.ones((d,))
        self._eps, self._offset = config.rms_norm_eps, config.norm_offset

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., d) -> (..., d)."""
        weight = self.weight
        if self._offset:  # in float32: 16 bits would lose most of a small weight beside the 1
            weight = (weight.astype(mx.float32) + self._offset).astype(x.dtype)
        return mx.fast.rms_norm(x, weight, self._eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (Ainslie et al. 2023) and RoPE."""

    def __init__(self, config: LlamaConfig, layer: int, rope: Rope | None) -> None:
        super().__init__()
        D, Hd, bias = config.hidden_size, config.head_dim, config.attention_bias
        q_size, k_size = config.num_attention_heads * Hd, config.num_key_value_heads * Hd
        scale = Hd**-0.5 if config.attention_scale is None else config.attention_scale
        self.reach = Reach(scale, config.window(layer), config.attention_softcap)
        self._config, self._rope, self._ends = config, rope, [q_size, q_size + k_size]
        if config.fused_qkv:
            self.qkv_proj = Linear(D, q_size + 2 * k_size, bias)
        else:
            self.q_proj = Linear(D, q_size, bias)
            self.k_proj = Linear(D, k_size, bias)
            self.v_proj = Linear(D, k_size, bias)
        self.o_proj = Linear(q_size, D, config.output_bias)
        if config.head_norms:
            sizes = (q_size, k_size) if config.head_norms == ALL_HEADS else (Hd, Hd)
            for name, size in zip(config.head_norm_names, sizes):
                self[name] = RMSNorm(size, config)

    def rotate(
        self, q: mx.array, k: mx.array, v: mx.array, context: Context
    ) -> tuple[mx.array, mx.array, mx.array]:
        """q (..., H * Hd), k, v (..., K * Hd) -> q (..., H, Hd), k (..., K, Hd), rotated, and v."""
        kind = self._config.head_norms
        heads = *q.shape[:-1], -1, self._config.head_dim
        if kind == ALL_HEADS:
            q, k = self._normalised(q, k)
        q, k, v = q.reshape(heads), k.reshape(heads), v.reshape(heads)
        if kind == HEAD:
            q, k = self._normalised(q, k)
        if self._rope is not None:
            q, k = context.rotate(q, self._rope), context.rotate(k, self._rope)
        if kind == AFTER_ROPE:
            q, k = self._normalised(q, k)
        return q, k, v

    def _normalised(self, q: mx.array, k: mx.array) -> tuple[mx.array, mx.array]:
        of_q, of_k = self._config.head_norm_names
        return self[of_q](q), self[of_k](k)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        if config.fused_gate_up:
            self.gate_up_proj = Linear(D, 2 * F, config.mlp_bias)
        else:
            self.gate_proj = Linear(D, F, config.mlp_bias)
            self.up_proj = Linear(D, F, config.mlp_bias)
        self.down_proj = Linear(F, D, config.mlp_bias)


class DecoderLayer(nn.Module):
    """Two sentences: normalise, attend, add; normalise, mix, add.

    They are cut into pieces between which the training engine keeps what its backward needs
    (`train.engine.PIECES`): linears that read the same input, and what is between them. `keys` are
    the dropout words of the seven linears, each (N, 2) or None; a fused linear has the first words
    of those that it stands for.
    """

    def __init__(self, config: LlamaConfig, layer: int, rope: Rope | None) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, rope)
        self.mlp = MLP(config)
        self.act, self._norms, self._scale = config.hidden_act, config.norms, config.residual_scale
        for name in filter(None, config.norms):
            self[name] = RMSNorm(config.hidden_size, config)

    def __call__(self, x: mx.array, context: Context, keys: Keys = NO_KEYS) -> mx.array:
        """x (..., D) -> (..., D)."""

        def linears(name: str, read: mx.array) -> list[mx.array]:
            return self.linears(name)(read, keys[KEYS_OF[name]])

        return go_through(self.mix(go_through(self.attend(x, context), linears)), linears)

    def attend(self, x: mx.array, context: Context) -> Pieces:
        """x -> h (..., D), but asks for what linears make: to name and input results are sent."""
        q, k, v = yield "qkv", self.attention_norm(x)
        q, k, v = self.self_attn.rotate(q, k, v, context)
        heads = context.attend(q, k, v, self.self_attn.reach).flatten(-2)
        return self.add_attention(x, *(yield "o", heads))

    def mix(self, h: mx.array) -> Pieces:
        """h -> the layer's output (..., D); asks as `attend` does."""
        gate, up = yield "gate_up", self.mlp_norm(h)
        gated = swiglu(gate, up, act=self.act)
        return self.add_mlp(h, *(yield "down", gated))

    def linears(self, name: str) -> Linears:
        """The linears of a piece, qkv, o, gate_up or down: they read the same input."""
        place, names, fused = LINEARS[name]
        module, cuts = self[place], None
        if fused in module:
            names, cuts = (fused,), self.self_attn._ends if name == "qkv" else 2
        return Linears({f"{place}.{leaf}": module[leaf] for leaf in names}, cuts)

    def attention_norm(self, x: mx.array) -> mx.array:
        """x (..., D) -> what `qkv` reads (..., D)."""
        return self._normalised(0, x)

    def add_attention(self, x: mx.array, o: mx.array) -> mx.array:
        """x and what `o` gives (..., D) -> h (..., D)."""
        return self._added(x, self._normalised(1, o))

    def mlp_norm(self, h: mx.array) -> mx.array:
        """h (..., D) -> what `gate_up` reads (..., D)."""
        return self._normalised(2, h)

    def add_mlp(self, h: mx.array, down: mx.array) -> mx.array:
        """h and what `down` gives (..., D) -> y (..., D)."""
        return self._added(h, self._normalised(3, down))

    def _normalised(self, place: int, x: mx.array) -> mx.array:
        """x by the norm of one of the four places (`families.Norms`), if there is one."""
        name = self._norms[place]
        return x if name is None else self[name](x)

    def _added(self, x: mx.array, new: mx.array) -> mx.array:
        return x + (new if self._scale == 1 else new * self._scale)


def go_through(
    pieces: Pieces, linears: Callable[[str, mx.array], list[mx.array]], until: str = ""
) -> mx.array:
    """What a half of a layer ends with, or what its linears called `until` read (..., D)."""
    try:
        name, read = next(pieces)
        while name != until:
            name, read = pieces.send(linears(name, read))
    except StopIteration as done:
        return done.value
    return read


def check_ids(
    ids: Any, rows: int, where: str = "tokens", text: Callable[[list[int]], str] | None = None
) -> None:
    """Raise a DataError for ids that the embedding has no row for: MLX would read beyond it.

    The message names `where` the ids are, and what `text` makes of the first such id.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise DataError(f"{where}: token ids must be whole numbers")
    if (bad := ids[(ids < 0) | (ids >= rows)]).size:
        token = int(bad.flat[0])
        shown = f" ({text([token])})" if text and token >= 0 else ""
        raise DataError(
            f"{where}: token {token}{shown} is not in the model's embedding, which has {rows} "
            f"rows (0 to {rows - 1}); leave the token out, or give the model a row for it (in "
            "transformers: resize_token_embeddings(len(tokenizer)), then save_pretrained)"
        )


# First layer's cache -> single tokens that followed others there and were not looked at yet.
_unchecked: WeakKeyDictionary[Any, list[mx.array]] = WeakKeyDictionary()


class LlamaModel(nn.Module):
    """Embedding, layers, final norm: token ids to hidden states."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self._config, rope = config, Rope(config.head_dim, config.rope)
        of_windows = config.rope_of_windows
        local = rope if of_windows is None else Rope(config.head_dim, of_windows)
        self.layers = [
            DecoderLayer(config, i, None if i in config.unrotated else local if window else rope)
            for i, window in enumerate(map(config.window, range(config.num_hidden_layers)))
        ]
        self.norm = RMSNorm(config.hidden_size, config)
        self.reader: LayerReader | None = None  # of streamed layers

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        dropout_key: mx.array | None = None,
        documents: np.ndarray | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Tokens (B, T) int -> hidden states (B, T, D); arguments as in `LlamaForCausalLM`."""
        rows = input_embeddings
        B, T = tokens.shape if rows is None else rows.shape[:2]
        if rows is None and not self._is_checked(tokens, cache):
            rows = self._rows_or_nan(tokens)
        if cache is not None:
            caches, masks = cache, dict[int | None, Any]()
            how = {"return_array": self._config.attention_softcap is not None}

            def step(i: int, h: mx.array) -> mx.array:
                layer, of_layer = self.layers[i], caches[i]
                window = layer.self_attn.reach.window
                if window not in masks:
                    masks[window] = of_layer.make_mask(T, window_size=window, **how)
                return layer(h, Cached(masks[window], of_layer))

            return self.normalised(self.through(step, self.embed(tokens, rows)))

        if documents is None:  # each row is one
            documents = np.array([(b, 0, T) for b in range(B)], np.int32)
        context = Documents.of(documents, B * T, T)
        keys = self.dropout_keys(dropout_key, B, context)
        h = self.embed(tokens.reshape(-1), rows if rows is None else rows.flatten(0, 1))
        h = self.through(lambda i, h: self.layers[i](h, context, keys[i]), h)
        return self.normalised(h).reshape(B, T, -1)

    def through(self, step: Callable[[int, T], T], x: T) -> T:
        """What the last layer leaves, by a step that takes a layer's number and its input.

        Streamed, a layer is computed before the next but one is read.
        """
        for i in range(len(self.layers)):
            if self.reader is None:
                x = step(i, x)
                continue
            with self.reader.layer(i):
                y = step(i, x)
                mx.async_eval(y)
            mx.eval(x)
            self.reader.ahead(i + 1)
            x = y
        return x

    def _is_checked(self, tokens: mx.array, cache: list[Any] | None) -> bool:
        """Check that tokens have rows in the embedding; False if that has to wait.

        A token that MLX traces has no value. One that a sampler draws is not computed yet, and
        waiting for it would cost time: where single tokens follow one another each is looked at
        two calls later, when whoever drew it has read it.
        """
        earlier = _unchecked.pop(cache[0], None) if cache else None
        is_single = tokens.shape[1] == 1
        follows = is_single and earlier is not None
        waiting = [*(earlier or []), tokens]
        kept = waiting[-2:] if follows else []
        for ids in waiting[: len(waiting) - len(kept)]:
            try:
                values = np.array(ids)
            except ValueError:  # traced
                return False
            check_ids(values, self._config.vocab_size)
        if cache and is_single:
            _unchecked[cache[0]] = kept
        return not follows

    def _rows_or_nan(self, tokens: mx.array) -> mx.array:
        """Tokens (B, T) int -> rows of the embedding (B, T, D), NaN where it has none."""
        ids = mx.minimum(tokens.astype(mx.uint32), self._config.vocab_size - 1)
        return mx.where((ids == tokens)[..., None], self.embed_tokens(ids), mx.nan)

    def embed(self, tokens: mx.array, rows: mx.array | None = None) -> mx.array:
        """Tokens (...) int, or rows of the embedding (..., D) -> what the first layer reads."""
        h, scale = self.embed_tokens(tokens) if rows is None else rows, self._config.embedding_scale
        return h if scale == 1 else h * mx.array(scale, h.dtype)

    def normalised(self, h: mx.array) -> mx.array:
        """The last layer's output (..., D) as the head reads it."""
        h, scale = self.norm(h), self._config.logits_scale  # a factor of the logits, where D is
        return h if scale == 1 else h * scale

    def dropout_keys(self, key: mx.array | None, B: int, documents: Documents) -> list[Keys]:
        """For each layer the words (N, 2) that its seven linears draw their dropout from.

        `key` is one (2,) for a batch of B rows, or one for each row (B, 2); None means no dropout.
        """
        n = len(self.layers)
        if key is None:
            return [NO_KEYS] * n
        keys = mx.random.split(key, B) if key.ndim == 1 else key
        words = position_words(keys, documents.row, documents.column, 7 * n)
        return [words[7 * layer : 7 * layer + 7] for layer in range(n)]


class LlamaForCausalLM(nn.Module):
    """A decoder with its output head; the head is the embedding where the config ties them.

    Its weights are zeros that cost no memory until a loader fills them.
    """

    hf_config: dict[str, Any]  # the `config.json` that the loader read
    source: Any = None  # where the weights came from, a `hub.ModelFiles`
    quantized_to: Any  # the `QuantConfig` by which dense files were packed while loading, or None
    is_merged: bool = (
        False  # set where an adapter was folded into the weights, which left their files
    )
    frozen_matmul: str = ""  # as `load` was asked for it
    lora_config: Any  # the `LoraConfig` of the LoRA layers, once `add_lora` has put them in
    beginning: Any = None  # the `Beginning` of the last run that trained them

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.freeze()

    def __repr__(self) -> str:  # of MLX's own, a notebook would show every module
        source = self.source.source if self.source else self.config.model_type
        return f"LlamaForCausalLM({source}, {len(self.layers)} layers)"

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        *,
        dropout_key: mx.array | None = None,
        documents: np.ndarray | None = None,
    ) -> mx.array:
        """The logits (B, T, V) of every position, in the compute dtype.

        Args:
            tokens: (B, T) int, right-padded if rows differ in length.
            cache: one mlx-lm cache per layer, while generating.
            input_embeddings: (B, T, D), as `embed_tokens` returns them, in the place of tokens.
            dropout_key: draws the LoRA dropout masks: one (2,) for the batch, or one for each
                row (B, 2); None turns dropout off.
            documents: (N, 3) int of row, start and end, in order, where rows hold several
                documents: each is attended to as if it stood alone, its positions from 0 on.

        Raises:
            DataError: an id that the embedding has no row for.
        """
        return self.logits(self.model(tokens, cache, dropout_key, documents, input_embeddings))

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., D) -> logits (..., V)."""
        logits, cap = self.head.multiply(hidden), self.config.logits_softcap
        return logits if cap is None else cap * mx.tanh(logits / cap)

    @property
    def head(self) -> Embedding | Linear:
        """The output matrix (V, D): `lm_head`, or the embedding that it is tied to."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, where mlx-lm looks for them."""
        return self.model.layers

    @property
    def linears(self) -> list[tuple[str, Any]]:
        """(path, module) of every linear of the layers, in reading order."""
        return [
            (f"model.layers.{i}.{path}", module)
            for i, layer in enumerate(self.layers)
            for name in LINEARS
            for path, module in layer.linears(name).members.items()
        ]

    def make_cache(self) -> list[Any]:
        """One empty mlx-lm key-value cache per layer; those of windows hold no more than these."""
        cache = mlx_lm("models.cache")
        windows = (layer.self_attn.reach.window for layer in self.layers)
        return [cache.KVCache() if n is None else cache.RotatingKVCache(n) for n in windows]
