"""How fast a frozen 4-bit matrix is multiplied, forward and back, in each of the three ways.

Run as: python benchmarks/frozen_matmul.py --shape llama-3.1-8b

For each shape of matrix in a model, and for some numbers of tokens: `quantized` reads the packed
weight in the kernel, `dequantize` makes a dense copy for each product, `resident` has it already.
What `model.frozen_matmul: auto` takes is asserted to be no slower than the others by more than
TOLERATED over a layer, at the number of tokens that a training wave has.
"""

import argparse
import time
from typing import Any

import measure
import mlx.core as mx
import shapes

from mlx_qlora import device
from mlx_qlora.device import frozen_matmul
from mlx_qlora.model.quantize import FrozenMatrix

WAYS = ("quantized", "dequantize", "resident")
TOLERATED = 1.25


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=list(shapes.SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    llama = shapes.config(args.shape)
    layer = shapes.build(args.shape, layers=1, matmul="quantized").layers[0]
    matrices = [m for m in layer.modules() if isinstance(m, FrozenMatrix)]
    results: dict[str, Any] = {}
    for tokens in args.tokens:
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.rounds + 1):
            for way in WAYS:
                found[way].append(seconds(matrices, way, tokens))
        results[str(tokens)] = {way: measure.spread(found[way][1:]) for way in WAYS}
    rows = [
        [tokens, *(measure.shown(found[way], 5) for way in WAYS)]
        for tokens, found in results.items()
    ]
    title = f"a layer of {args.shape}, forward and back, seconds (hidden {llama.hidden_size})"
    measure.show(title, ["tokens", *WAYS], rows)
    most = {way: results[str(args.tokens[-1])][way]["median"] for way in WAYS}
    title = f"{args.shape}, {args.tokens[-1]} tokens"
    plot = measure.bars("frozen_matmul", title, "seconds a layer", most)
    measure.finish("frozen_matmul", vars(args), results, plot)
    chosen = frozen_matmul("auto")
    assert most[chosen] <= TOLERATED * min(most.values()), f"{chosen} is not the one to take"


def seconds(matrices: list[FrozenMatrix], way: str, tokens: int) -> float:
    """Of the products of a layer with x, and of those with the gradient of their results."""
    dtype = device.current().compute_dtype
    for matrix in matrices:
        matrix.matmul, matrix._resident = way, None  # pyright: ignore
        matrix.make_resident()
    inputs = [mx.random.normal((tokens, m.shape[1])).astype(dtype) for m in matrices]
    mx.eval(inputs)
    start = time.perf_counter()
    for matrix, x in zip(matrices, inputs):
        mx.eval(mx.vjp(matrix.multiply, [x], [matrix.multiply(x)])[1])
    mx.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
