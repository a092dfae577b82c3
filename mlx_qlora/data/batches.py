"""Examples become batches, in an order that is a function of (seed, epoch) and nothing else.

Any batch of a run can be made again from its index, without replaying the ones before it; that
is what resuming rests on.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.errors import DataError
from mlx_qlora.fields import require

IGNORE = -100  # a label that is not learned; the value that Hugging Face and torch use

# Rows of similar length share a batch: examples are sorted within windows of this many batches.
WINDOW = 32


@dataclass(frozen=True)
class Batch:
    """What one forward and backward sees. Nobody downstream shifts or re-derives a mask.

    Attributes:
        tokens: (B, T) int32; right-padded.
        labels: (B, T) int32; labels[b, t] is the token to predict after tokens[b, t], or IGNORE.
        documents: (N, 3) int32 on the host: row, start and end of each document; what lies
            outside all of them is padding. Not given, every row is one document.
        lines: the source line of each document, to name rows in messages.
    """

    tokens: mx.array
    labels: mx.array
    documents: np.ndarray | None = None
    lines: tuple[int, ...] = ()

    @functools.cached_property
    def real_tokens(self) -> int:
        """Positions that are not padding."""
        if self.documents is None:
            return self.tokens.size
        return int((self.documents[:, 2] - self.documents[:, 1]).sum())


def make_batches(
    examples: Examples, batch_size: int = 6, seed: int = 0, shuffle: bool = True
) -> "Batches":
    """Batches in a resumable, seeded order.

    Args:
        examples: what to train on.
        batch_size: B, rows per batch; the last batch of an epoch may have fewer and is kept.
        seed: decides the order.
        shuffle: False keeps the examples' own order, for evaluation.

    Raises:
        ConfigError: a batch size below 1.
        DataError: no examples.
    """
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    if not len(examples):
        raise DataError("there are no examples to make batches of")
    return Batches(examples, batch_size, seed, shuffle)


class Batches:
    """All batches of a run: `batches[i]` for any i >= 0; `len` is the batches of one epoch."""

    def __init__(self, examples: Examples, batch_size: int, seed: int, shuffle: bool) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._epoch_order = functools.lru_cache(maxsize=2)(self._order)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the first epoch."""
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """The batch at a global index; index // len is the epoch."""
        epoch, position = divmod(index, len(self))
        return collate([self.examples[i] for i in self._epoch_order(epoch)[position]])

    def _order(self, epoch: int) -> list[np.ndarray]:
        """Which examples make up each batch of an epoch.

        Shuffled, then sorted by length within windows so that little is padded, then the batches
        shuffled, so that lengths do not come in waves.
        """
        n, B = len(self.examples), self.batch_size
        if not self.shuffle:
            return [np.arange(start, min(start + B, n)) for start in range(0, n, B)]
        random = np.random.default_rng([self.seed, epoch])
        lengths = np.array([len(example) for example in self.examples])
        shuffled = random.permutation(n)
        batches = []
        for start in range(0, n, WINDOW * B):
            window = shuffled[start : start + WINDOW * B]
            window = window[np.argsort(lengths[window], kind="stable")]
            batches += [window[i : i + B] for i in range(0, len(window), B)]
        return [batches[i] for i in random.permutation(len(batches))]


def collate(examples: list[Example]) -> Batch:
    """Puts one example in each row, right-padded to a width from a small fixed set."""
    T = padded_width(max(len(example) for example in examples) - 1)
    tokens = np.zeros((len(examples), T), np.int32)
    labels = np.full((len(examples), T), IGNORE, np.int32)
    documents = np.zeros((len(examples), 3), np.int32)
    for row, example in enumerate(examples):
        n = len(example) - 1  # the last token is only a label: nothing is predicted after it
        tokens[row, :n] = example.tokens[:-1]
        labels[row, :n] = np.where(example.learned[1:], example.tokens[1:], IGNORE)
        documents[row] = row, 0, n
    lines = tuple(example.line for example in examples)
    return Batch(mx.array(tokens), mx.array(labels), documents, lines)


def padded_width(n: int) -> int:
    """The smallest width >= n that is a multiple of an eighth of the power of two above it.

    A multiple of 64, too. Each width compiles a graph of its own, and Metal cannot hold thousands
    of them; this set grows with the logarithm of the length, and wastes less than 64 tokens or a
    fifth of the width, whichever is more.
    """
    step = max(64, (1 << max(n - 1, 1).bit_length()) // 8)
    return -(-n // step) * step
