"""What a step keeps in memory, and how much of it has to be computed again for it to fit."""

from mlx_qlora import backend
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM

# How much of a layer the backward computes again; what is kept stands in `engine`.
NOTHING, MLP, LAYER = 0, 1, 2
Recompute = int | str | list[int]  # how many layers, "none", "all", "auto", or each layer's level


def check_recompute(recompute: Recompute, n_layers: int) -> list[int] | str:
    """The level of each layer, or "auto".

    Raises:
        ConfigError: neither a known word nor a number of layers that exists.
    """
    if isinstance(recompute, list):
        assert len(recompute) == n_layers and set(recompute) <= {NOTHING, MLP, LAYER}
        return recompute
    words = {"none": 0, "all": n_layers}
    layers = words.get(recompute) if isinstance(recompute, str) else recompute
    if recompute == "auto":
        return "auto"
    if isinstance(layers, int) and 0 <= layers <= n_layers:
        return [LAYER] * layers + [NOTHING] * (n_layers - layers)
    raise ConfigError(
        f"recompute must be none, all, auto, or a number of layers from 0 to {n_layers}; "
        f"got {recompute!r}"
    )


def kept_bytes(config: LlamaConfig, level: int, itemsize: int) -> int:
    """What a layer keeps of one position for its backward, in bytes."""
    D, F, Hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    kept = D
    if level <= MLP:
        kept += 2 * H * Hd + 2 * K * Hd + D  # q and heads, k and v, h
    if level == NOTHING:
        kept += 2 * F
    return kept * itemsize


def levels_for(model: LlamaForCausalLM, positions: int) -> list[int]:
    """Levels with which a batch of so many positions fits beside what is in memory now."""
    import mlx.core as mx

    free = backend.facts()["working_set_bytes"] - mx.get_active_memory()
    itemsize = model.model.embed_tokens.dtype.size
    return choose_levels(model.config, positions, itemsize, free // 2)


def choose_levels(config: LlamaConfig, positions: int, itemsize: int, budget: int) -> list[int]:
    """The levels that keep within a budget of bytes and compute as little as possible again.

    The MLP first: for a layer it frees the most, and its matmuls need no attention before them.
    """
    n = config.num_hidden_layers
    sizes = [positions * kept_bytes(config, level, itemsize) for level in (NOTHING, MLP, LAYER)]
    levels, used = [NOTHING] * n, n * sizes[NOTHING]
    for level in (MLP, LAYER):
        for i in range(n):
            if used <= budget:
                return levels
            used += sizes[level] - sizes[levels[i]]
            levels[i] = level
    return levels
