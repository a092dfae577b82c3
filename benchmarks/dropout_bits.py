"""Dropout's hash draws like chance: its bits are balanced, and no two draws know of each other.

Run as: python benchmarks/dropout_bits.py --draws 100000000

Each figure is a standard score, which chance leaves within 5: how far the number of inputs that are
dropped, or dropped together with another one, is from what independent draws would give. Together
with: the next column, the next position, another example, the same example a pass later, another
linear, the same linear of the next layer. Two chi-square tests count the bytes behind the masks,
and pairs of neighbours.
"""

import argparse
import json

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.model.dropout import RANGE, draws, mask, position_words
from mlx_qlora.train.step import dropout_keys

COLUMNS, POSITIONS, LINEARS, EXAMPLES = 1024, 32, 14, 4  # of a block; a pass has 1,000 examples


def main() -> None:
    """Prints the scores and a JSON line, and asserts that all are within 5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", default=10**8, type=int, help="inputs that are drawn")
    parser.add_argument("--dropout", default=0.1, type=float)
    args = parser.parse_args()
    figures = scores(args.draws, args.dropout)
    for name, z in figures.items():
        print(f"{name:20} {z:+.2f}")
    rounded = {name: round(z, 2) for name, z in figures.items()}
    print(json.dumps({"benchmark": "dropout_bits", **vars(args), **device.facts(), **rounded}))
    worst = max(figures, key=lambda name: abs(figures[name]))
    assert abs(figures[worst]) < 5, f"{worst}: {figures[worst]:.1f} standard deviations"


def scores(n: int, dropout: float) -> dict[str, float]:
    """Name -> standard score of what is counted in at least so many draws."""
    dropped: dict[str, list[int]] = {}  # name -> how many are dropped, of how many
    numbers, pairs = np.zeros(RANGE, np.int64), np.zeros(RANGE**2, np.int64)
    block = 0
    while block * LINEARS * EXAMPLES * POSITIONS * COLUMNS < n:
        masks, words = _block(block, dropout)
        for name, (a, b) in _neighbours(masks).items():
            count = dropped.setdefault(name, [0, 0])
            count[0] += int((a & b).sum())
            count[1] += a.size
        numbers += np.bincount(words.reshape(-1), minlength=RANGE)
        both = words[..., :-1] * RANGE + words[..., 1:]
        pairs += np.bincount(both.reshape(-1), minlength=RANGE**2)
        block += 1
    figures = {}
    for name, (k, of) in dropped.items():
        p = dropout if name == "dropped" else dropout**2
        figures[name] = (k - of * p) / (of * p * (1 - p)) ** 0.5
    for name, counts in {"bytes": numbers, "neighbouring bytes": pairs}.items():
        mean, free = counts.sum() / len(counts), len(counts) - 1
        chi_square = ((counts - mean) ** 2 / mean).sum()
        figures[name] = (chi_square - free) / (2 * free) ** 0.5
    return figures


def _block(block: int, dropout: float) -> tuple[np.ndarray, np.ndarray]:
    """Bool (LINEARS, EXAMPLES, POSITIONS, COLUMNS), what is dropped; and the bytes drawn."""
    first = 2 * block
    examples = (first, first + 1, first + 1000, first + 1001)  # two, and the same a pass later
    row, position = (mx.array(a.reshape(-1)) for a in np.indices((EXAMPLES, POSITIONS), np.int32))
    words = mx.concatenate(position_words(dropout_keys(0, examples), row, position, LINEARS))
    shape = LINEARS, EXAMPLES, POSITIONS, COLUMNS
    kept = np.array(mask(words, dropout, COLUMNS, mx.uint8)).reshape(shape)
    return kept == 0, np.array(draws(words[:, :1], COLUMNS)).astype(np.int64).reshape(shape)


def _neighbours(masks: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    layer = LINEARS // 2
    return {
        "dropped": (masks, masks),
        "next column": (masks[..., :-1], masks[..., 1:]),
        "next position": (masks[:, :, :-1], masks[:, :, 1:]),
        "another example": (masks[:, :-1:2], masks[:, 1::2]),
        "a pass later": (masks[:, :2], masks[:, 2:]),
        "next linear": (masks[:-1], masks[1:]),
        "next layer": (masks[:layer], masks[layer:]),
    }


if __name__ == "__main__":
    main()
