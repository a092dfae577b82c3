"""Models of known shapes with random weights, to time and size what no disk here holds."""

from dataclasses import asdict
from typing import Any

import mlx.core as mx

from mlx_qlora import device
from mlx_qlora.device import FrozenMatmul, frozen_matmul
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.quantize import FrozenMatrix, QuantConfig, pack

SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings"),
)
SHAPES: dict[str, tuple[Any, ...]] = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 64, 4864, 151936, True),
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, True),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256, True),
    "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192, 128256, True),
    "llama-3.1-8b": (4096, 32, 32, 8, 128, 14336, 128256, False),
}
QUANT = QuantConfig(bits=4, group_size=64)


def config(name: str, layers: int | None = None) -> LlamaConfig:
    """The sizes of a shape, with as many of its layers as are wanted."""
    sizes = dict(zip(SIZES, SHAPES[name]))
    return LlamaConfig(**{**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]})


def build(
    name: str, layers: int | None = None, matmul: FrozenMatmul | None = None
) -> LlamaForCausalLM:
    """A frozen model of 4-bit random weights, quantised one matrix after the other.

    Args:
        name: one of SHAPES.
        layers: how many; all that the shape has, if not given.
        matmul: how packed matrices are multiplied; as the device wants it, if not given.

    Returns:
        The model, evaluated, in the device's compute dtype.
    """
    return build_from(config(name, layers), matmul)


def build_from(sizes: LlamaConfig, matmul: FrozenMatmul | None = None) -> LlamaForCausalLM:
    """As `build`, of any sizes."""
    model = LlamaForCausalLM(sizes)
    model.hf_config = {"model_type": "llama", **asdict(model.config)}
    dtype = device.current().compute_dtype
    modules = sorted(model.named_modules())
    size = sum(module.weight.size for _, module in modules if isinstance(module, FrozenMatrix))
    chosen = frozen_matmul(matmul or "auto", size * dtype.size)
    for i, (path, module) in enumerate(modules):
        if isinstance(module, FrozenMatrix):
            _fill(module, mx.random.key(i), dtype, chosen)
        elif path.endswith("norm"):
            module.weight = module.weight.astype(dtype)
    model.freeze()
    mx.eval(model.parameters())
    return model


def _fill(matrix: FrozenMatrix, key: mx.array, dtype: mx.Dtype, matmul: FrozenMatmul) -> None:
    """Random numbers, such that activations stay about as large as they are."""
    rows, columns = matrix.shape
    parts = pack(mx.random.normal((rows, columns), scale=columns**-0.5, key=key), QUANT)
    for name, part in zip(("weight", "scales", "biases"), parts):
        matrix[name] = part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part
    matrix.quant, matrix.dtype, matrix.matmul = QUANT, dtype, matmul
    mx.eval(matrix.packed())
    matrix.make_resident()
