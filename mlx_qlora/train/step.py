"""A batch becomes gradients.

`Engine` is the one way to differentiate: the training loop, `loss_and_grads` and the tests use
it alike. It takes the trainable weights as arguments and leaves the model as it found it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_qlora import backend
from mlx_qlora.data.batches import Batch
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.train.loss import supervised_targets, token_losses
from mlx_qlora.tree import flat, number

Recompute = int | str  # "none", "all", "auto", or how many layers


def loss_and_grads(
    model: LlamaForCausalLM,
    batch: Batch,
    dropout_key: mx.array | None = None,
    recompute: Recompute = "auto",
) -> tuple[mx.array, int, dict[str, Any]]:
    """The loss of one batch and its gradients, for use in a loop of your own.

    Args:
        model: with LoRA layers.
        batch: tokens and labels.
        dropout_key: `mx.random.key(...)` that draws the dropout masks, or one key for each row
            (B, 2): rows with the same keys have the same gradients however they are batched.
            None turns dropout off.
        recompute: which layers are computed again in the backward instead of keeping their
            activations: "none", "all", "auto" (as memory asks), or how many. The result does not
            depend on it.

    Returns:
        loss_sum: float32 scalar, the sum of nats over supervised tokens.
        n_tokens: how many tokens are supervised; divide once, by the sum over the whole step.
        grads: tree of d(loss_sum) / d(LoRA weight), float32, shaped as
            `model.trainable_parameters()`.

    Raises:
        ConfigError: the model has nothing to train, or `recompute` is none of the above.
    """
    engine = Engine(model, recompute, compiled=False)
    return engine(model.trainable_parameters(), batch, dropout_key)


class Engine:
    """Differentiates a model's loss with respect to its LoRA weights.

    Args:
        model: with LoRA layers.
        recompute: as in `loss_and_grads`.
        compiled: fuse elementwise operations with `mx.compile`; one graph per batch shape.
    """

    def __init__(
        self, model: LlamaForCausalLM, recompute: Recompute = "auto", compiled: bool = True
    ) -> None:
        if not flat(model.trainable_parameters()):
            raise ConfigError("the model has nothing to train; call add_lora(model, ...) first")
        self.model = model
        self.recompute = check_recompute(recompute, len(model.layers))
        self._compiled: dict[int, Any] = {}
        self._compile = compiled

    def __call__(
        self, weights: dict[str, Any], batch: Batch, dropout_key: mx.array | None = None
    ) -> tuple[mx.array, int, dict[str, Any]]:
        """(loss_sum, n_tokens, grads) at the given LoRA weights; lazy until evaluated."""
        positions, targets, n_tokens = supervised_targets(batch)
        layers = self.recompute
        if layers == "auto":
            B, T = batch.tokens.shape
            itemsize = self.model.model.embed_tokens.dtype.size
            layers = layers_to_recompute(self.model.config, B, T, itemsize)
        differentiate = self._function(int(layers), batch.documents if batch.packed else None)
        loss, grads = differentiate(weights, batch.tokens, positions, targets, dropout_key)
        return loss, n_tokens, grads

    def _function(self, layers: int, documents: np.ndarray | None) -> Any:
        """The gradient function for a number of recomputed layers, compiled once.

        Packed rows are not compiled: hardly two batches have documents of the same lengths, so
        each would be a graph of its own.
        """

        def loss_sum(weights: Any, tokens: Any, positions: Any, targets: Any, key: Any) -> Any:
            with bound(self.model, weights):
                hidden = self.model.model(tokens, None, key, layers, documents)
                nats, _ = token_losses(self.model, hidden, positions, targets)
            return nats.sum()

        differentiate = mx.value_and_grad(loss_sum)
        if documents is not None or not self._compile:
            return differentiate
        return self._compiled.setdefault(layers, mx.compile(differentiate))


class bound:
    """Lends a model other trainable weights, tracers included, and takes them back after.

    Without the second half a traced function would leave its tracers in the module.
    """

    def __init__(self, model: LlamaForCausalLM, weights: dict[str, Any]) -> None:
        self.model = model
        self.weights = weights

    def __enter__(self) -> None:
        self.before = self.model.trainable_parameters()
        self.model.update(self.weights)

    def __exit__(self, *_: Any) -> None:
        self.model.update(self.before)


def add_grads(total: dict[str, Any] | None, grads: dict[str, Any]) -> dict[str, Any]:
    """The sum over micro-batches; plain addition, because gradients are of sums."""
    return grads if total is None else tree_map(mx.add, total, grads)


@dataclass
class Score:
    """Sums over the supervised tokens of some batches.

    Attributes:
        nats: of the targets.
        hits: targets that were the model's first choice.
        tokens: how many targets there are.
        pairs: targets whose predecessor is a target of the same document, too.
        repeated: pairs of which the model's first choices are the same token.
        repeated_targets: pairs that are the same token in the data.
    """

    nats: float = 0.0
    hits: int = 0
    tokens: int = 0
    pairs: int = 0
    repeated: int = 0
    repeated_targets: int = 0


def score(model: LlamaForCausalLM, batches: Iterable[Batch]) -> Score:
    """Scores a model on batches, without dropout."""
    total = Score()
    for batch in batches:
        positions, targets, n = supervised_targets(batch)
        documents = batch.documents if batch.packed else None
        hidden = model.model(batch.tokens, documents=documents)
        losses, choices = token_losses(model, hidden, positions, targets)
        total.nats += number(losses.sum())
        at, chosen, wanted = (np.array(values)[:n] for values in (positions, choices, targets))
        follows = np.diff(at) == 1
        total.hits += int((chosen == wanted).sum())
        total.tokens += n
        total.pairs += int(follows.sum())
        total.repeated += int((follows & (chosen[1:] == chosen[:-1])).sum())
        total.repeated_targets += int((follows & (wanted[1:] == wanted[:-1])).sum())
    return total


# ---- recompute ---------------------------------------------------------------------------------


def check_recompute(recompute: Recompute, n_layers: int) -> int | str:
    """A number of layers, or "auto".

    Raises:
        ConfigError: neither a known word nor a number of layers that exists.
    """
    words = {"none": 0, "all": n_layers, "auto": "auto"}
    if isinstance(recompute, str) and recompute in words:
        return words[recompute]
    if isinstance(recompute, int) and 0 <= recompute <= n_layers:
        return recompute
    raise ConfigError(
        f"recompute must be none, all, auto, or a number of layers from 0 to {n_layers}; "
        f"got {recompute!r}"
    )


def layers_to_recompute(config: LlamaConfig, B: int, T: int, itemsize: int) -> int:
    """How many layers must be recomputed for the others' activations to fit in half of memory."""
    budget = backend.facts()["working_set_bytes"] / 2
    kept = int(budget // activation_bytes(config, B, T, itemsize))
    return max(0, config.num_hidden_layers - kept)


def activation_bytes(config: LlamaConfig, B: int, T: int, itemsize: int) -> int:
    """What one layer keeps for its backward, in bytes.

    Two norms and the residual in and out (4 D), queries and attention output (2 H Hd), keys and
    values (2 K Hd), and gate, its sigmoid, up and the product (4 F), for each token; and, where no
    fused kernel avoids them, attention scores and probabilities, T x T per head.
    """
    D, F, Hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    device = backend.backend().device
    unfused = device == "cpu" or (device == "cuda" and T % 128 != 0)
    scores = 2 * H * T if unfused else 0
    return B * T * itemsize * (4 * D + 2 * H * Hd + 2 * K * Hd + 4 * F + scores)
