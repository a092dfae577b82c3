"""Examples become batches, in an order that is a function of (seed, epoch) and nothing else.

Any batch of a run can be made again from its index, without replaying the ones before it; that
is what resuming rests on. Examples form one stream, epoch after epoch, of which a batch is the next
few: so the same examples make up a step, however many micro-batches and processes share it.

Each example has a row of its own here, padded on the host alone: the engine computes documents end
to end, so that no padding is computed and short examples lose nothing by it.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.errors import DataError, require

IGNORE = -100  # a label that is not learned; the value that Hugging Face and torch use
AHEAD = 2  # batches that are laid out while the device works


@dataclass(frozen=True)
class Batch:
    """What one forward and backward sees. Nobody downstream shifts or re-derives a mask.

    Attributes:
        tokens: (B, T) int32; right-padded.
        labels: (B, T) int32; labels[b, t] is the token to predict after tokens[b, t], or IGNORE.
        documents: (N, 3) int32 on the host: row, start and end of each document; positions
            outside all of them are padding. None: every row is one.
        places: file and line of each document, for messages.
        rows: the number of each row in the run's stream, which its dropout is drawn from.
        weights: (B, T) float32 on the host, what each label weighs in the loss; None: all 1.
        answers: (B, T) bool on the host, which labels are of an answer; None: all.
        mismatched: for KTO, each row's prompt with the answer of another row of the step.
    """

    tokens: mx.array
    labels: mx.array
    documents: Any = None
    places: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    weights: np.ndarray | None = None
    answers: np.ndarray | None = None
    mismatched: "Batch | None" = None

    def __post_init__(self) -> None:
        if self.documents is None:
            B, T = self.tokens.shape
            rows = np.array([(b, 0, T) for b in range(B)], np.int32)
            object.__setattr__(self, "documents", rows)

    @functools.cached_property
    def document_of(self) -> np.ndarray:
        """(B * T,) int32: the number of the document that each position is in; -1 for padding."""
        numbers = np.full(self.tokens.shape, -1, np.int32)
        for number, (row, start, end) in enumerate(self.documents.tolist()):
            numbers[row, start:end] = number
        return numbers.reshape(-1)

    @functools.cached_property
    def real_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.documents[:, 2] - self.documents[:, 1]).sum())


def make_batches(
    examples: Examples,
    batch_size: int = 6,
    seed: int = 0,
    shuffle: bool = True,
    *,
    epochs: float | None = None,
    rank: int = 0,
    world_size: int = 1,
    mismatch_within: int = 0,
) -> "Batches":
    """Batches in a resumable, seeded order.

    Args:
        batch_size: B, examples per batch of each process.
        seed: decides the order.
        shuffle: False keeps the examples' own order, for evaluation.
        epochs: passes after which the batches end, the last one with the examples that are left;
            None never ends.
        rank: of this process, which gets every `world_size`-th example of the stream.
        mismatch_within: examples in a step, within which each gets the answer of the one before it
            as `Batch.mismatched`; 0 gives none.

    Raises:
        DataError: there are no examples.
        ConfigError: a value makes no sense.
    """
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    require(world_size >= 1, "world_size", "be at least 1", world_size)
    require(0 <= rank < world_size, "rank", f"be from 0 to {world_size - 1}", rank)
    legal = epochs is None or 0 < epochs < math.inf
    require(legal, "epochs", "be above 0 and finite", epochs)
    require(seed >= 0, "seed", "be at least 0", seed)
    if not len(examples):
        raise DataError("there are no examples to make batches of")
    shares = rank, world_size
    return Batches(examples, batch_size, seed, shuffle, epochs, *shares, mismatch_within)


def evaluation_batches(examples: Examples, batch_size: int | None = None) -> "Batches":
    """Examples in their own order; if no number is given, as many as keep the device busy."""
    at_once = device.current().chunk_positions // max(1, int(examples.lengths.mean()))
    size = max(1, at_once) if batch_size is None else batch_size
    return make_batches(examples, size, shuffle=False)


@dataclass(eq=False, repr=False)
class Batches:
    """A stream of batches, reachable at any index; see `make_batches`."""

    examples: Examples
    batch_size: int
    seed: int
    shuffle: bool
    epochs: float | None
    rank: int
    world_size: int
    mismatch_within: int = 0

    def __post_init__(self) -> None:
        self._end = self.stop = None  # examples, and batches, after which the stream ends
        if self.epochs is not None:
            self._end = max(1, round(self.epochs * len(self.examples)))
            self.stop = -(-self._end // self.step)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._order)

    @property
    def step(self) -> int:
        """Examples that one batch of every process takes from the stream."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.examples) // self.step)

    def __iter__(self) -> Iterator[Batch]:
        """Yields one pass over the examples, the last batch with the rows that are left."""
        return (self._batch(i, len(self.examples)) for i in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        """The batch at an index of the stream."""
        if index < 0 or (self.stop is not None and index >= self.stop):
            last = "no end" if self.stop is None else f"{self.stop} batches"
            raise IndexError(f"the stream has {last}; got index {index}")
        return self._batch(index, self._end)

    def epoch(self, index: int) -> float:
        """How many passes are done before the batch at an index."""
        rows = index * self.step if self._end is None else min(index * self.step, self._end)
        return rows / len(self.examples)

    def ahead(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches from `start` to `stop`, laid out while earlier ones are trained."""
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Future[Batch]] = deque()
            for index in range(start, stop):
                waiting.append(pool.submit(self._batch, index, self._end))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _batch(self, index: int, end: int | None) -> Batch:
        first = index * self.step
        last = first + self.step if end is None else min(first + self.step, end)
        numbers = range(first + self.rank, last, self.world_size)
        rows = [self.examples[i] for i in self.indices(numbers)]
        batch = collate(rows, numbers)
        if self.mismatch_within:
            others = self.indices([self._before(number, end) for number in numbers])
            pairs = zip(rows, (self.examples[i] for i in others))
            mismatched = [mismatch(row, other) for row, other in pairs]
            batch = replace(batch, mismatched=collate(mismatched, numbers))
        return batch

    def _before(self, number: int, end: int | None) -> int:
        """The example before one in its step, or the step's last one."""
        first = number - number % self.mismatch_within
        last = first + self.mismatch_within
        return number - 1 if number > first else (last if end is None else min(last, end)) - 1

    def indices(self, numbers: Iterable[int]) -> list[int]:
        """The places in `examples` of some numbers of the stream."""
        pairs = (divmod(number, len(self.examples)) for number in numbers)
        return [int(self._epoch_order(epoch)[place]) for epoch, place in pairs]

    def _order(self, epoch: int) -> np.ndarray:
        """The examples of an epoch in order, (n,)."""
        n = len(self.examples)
        if not self.shuffle:
            return np.arange(n)
        return np.random.default_rng([self.seed, epoch]).permutation(n)


def mismatch(example: Example, other: Example) -> Example:
    """The prompt of an example with the answer of another, cut to the longer one's length."""
    prompt, answer = (int(each.learned.argmax()) for each in (example, other))
    longest = max(len(example), len(other))
    tokens = np.concatenate([example.tokens[:prompt], other.tokens[answer:]])[:longest]
    learned = np.concatenate([np.zeros(prompt, bool), other.learned[answer:]])[:longest]
    return Example(tokens, learned, example.line, example.file)


def halves(batch: Batch) -> list[Batch]:
    """The upper and the lower rows of a batch of at least two, as two batches."""
    B, documents = len(batch.tokens), batch.documents
    parts = []
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        inside = (documents[:, 0] >= rows.start) & (documents[:, 0] < rows.stop)
        shifted = documents[inside] - np.array([rows.start, 0, 0], np.int32)
        places = tuple(itertools.compress(batch.places, inside))
        # On the host: who reads a slice of an MLX array waits for the device to make it.
        tokens, labels = (mx.array(np.array(x)[rows]) for x in (batch.tokens, batch.labels))
        about = shifted, places, batch.rows[rows]
        weights = None if batch.weights is None else batch.weights[rows]
        answers = None if batch.answers is None else batch.answers[rows]
        parts.append(Batch(tokens, labels, *about, weights, answers))
    return parts


def collate(rows: list[Example], numbers: Sequence[int] = ()) -> Batch:
    """Puts examples into rows, right-padded to the longest one; a row may be several documents.

    `numbers` are those of the rows in the stream. May be called in any thread.
    """
    T = padded_width(max((len(row) - 1 - len(row.starts) for row in rows), default=1))
    # No rows make one row of padding: a process that has nothing to do still takes part.
    tokens = np.zeros((max(1, len(rows)), T), np.int32)
    labels = np.full(tokens.shape, IGNORE, np.int32)
    documents, places = [], []
    weights, answers = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
    for b, row in enumerate(rows):
        start = 0
        for ids, learned, of_labels in row.documents:
            end = start + len(ids) - 1  # the last token is only a label
            tokens[b, start:end] = ids[:-1]
            weights[b, start:end], answers[b, start:end] = of_labels[1:], learned[1:]
            labels[b, start:end] = np.where(of_labels[1:] != 0, ids[1:], IGNORE)
            documents.append((b, start, end))
            places.append(row.place)
            start = end
    documents = np.array(documents, np.int32).reshape(-1, 3)
    weighted = any(row.weights is not None for row in rows)
    of_labels = (weights, answers) if weighted else (None, None)
    of_rows = documents, tuple(places), tuple(numbers)
    return Batch(mx.array(tokens), mx.array(labels), *of_rows, *of_labels)


def padded_width(n: int) -> int:
    """The smallest of a few lengths that is >= n; at most 6 % of it is padding, or 15 positions.

    Each length compiles a graph of its own, and Metal cannot hold thousands of them: there are 16
    from one power of two to the next.
    """
    step = max(16, (1 << max(n - 1, 1).bit_length()) // 32)
    return -(-n // step) * step
