"""Examples become batches, in an order that is a function of (seed, epoch) and nothing else.

Any batch of a run can be made again from its index, without replaying the ones before it; that
is what resuming rests on. Rows form one stream, epoch after epoch, of which a batch is the next
few: so the same rows make up a step, however many micro-batches and processes share it.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.errors import DataError, require

# ---- documents that share a row ------------------------------------------------------------------

PACKING_WINDOW = 4096  # documents that are packed together; which ones is drawn


def pack(lengths: np.ndarray, width: int, random: np.random.Generator) -> list[np.ndarray]:
    """Puts each of n documents into one row of `width` positions; returns the indices of each."""
    shuffled = random.permutation(len(lengths))
    # Windows of equal size: a small last one would be packed badly.
    windows = np.array_split(shuffled, max(1, round(len(shuffled) / PACKING_WINDOW)))
    return [row for window in windows for row in _best_fit(window, lengths, width)]


def _best_fit(window: np.ndarray, lengths: np.ndarray, width: int) -> list[np.ndarray]:
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # free positions -> rows
    # Bit f is set where a row has f free positions: the least f >= n is found without a search.
    free_sizes = 0
    for index in window[np.argsort(-lengths[window], kind="stable")].tolist():
        n = int(lengths[index])
        fitting = free_sizes >> n
        if fitting:
            free = n + (fitting & -fitting).bit_length() - 1
            row = with_room[free].pop()
            if not with_room[free]:
                free_sizes ^= 1 << free
            rows[row].append(index)
        else:
            free, row = width, len(rows)
            rows.append([index])
        if free - n:
            with_room[free - n].append(row)
            free_sizes |= 1 << (free - n)
    return [np.array(row) for row in rows]


# ---- batches -------------------------------------------------------------------------------------

IGNORE = -100  # a label that is not learned; the value that Hugging Face and torch use
WINDOW = 32  # batches within which unpacked rows are sorted by length
AHEAD = 2  # batches that are laid out while the device works


@dataclass(frozen=True)
class Batch:
    """What one forward and backward sees. Nobody downstream shifts or re-derives a mask.

    Attributes:
        tokens: (B, T) int32; right-padded.
        labels: (B, T) int32; labels[b, t] is the token to predict after tokens[b, t], or IGNORE.
        documents: (N, 3) int32 on the host: row, start and end of each document; positions
            outside all of them are padding. Not given, every row is one document.
        places: file and line of each document, for messages.
        rows: the number of each row in the run's stream, from which its dropout is drawn.
    """

    tokens: mx.array
    labels: mx.array
    documents: np.ndarray | None = None
    places: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @functools.cached_property
    def real_tokens(self) -> int:
        """Positions that are not padding."""
        if self.documents is None:
            return self.tokens.size
        return int((self.documents[:, 2] - self.documents[:, 1]).sum())


def make_batches(
    examples: Examples,
    batch_size: int = 6,
    seed: int = 0,
    shuffle: bool = True,
    packing: bool = True,
    max_length: int | None = None,
    *,
    epochs: float | None = None,
    rank: int = 0,
    world_size: int = 1,
    rows_per_step: int | None = None,
) -> "Batches":
    """Batches in a resumable, seeded order.

    Args:
        batch_size: B, rows per batch of each process.
        seed: decides what is packed together and the order.
        shuffle: False keeps the examples' own order, for evaluation.
        packing: several examples share a row of `max_length`; False gives each a row of its own,
            as wide as the longest of its batch.
        max_length: most tokens of an example, for packing; the longest one's if not given.
        epochs: passes after which the batches end, the last one with the rows that are left; None
            never ends.
        rank: of this process, which gets every `world_size`-th row of the stream.
        rows_per_step: rows of an optimiser step, over its micro-batches and all processes. Runs
            with the same number take the same rows in each step, however they are divided.

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
    rows_per_step = rows_per_step or batch_size * world_size
    if not len(examples):
        raise DataError("there are no examples to make batches of")
    longest = int(examples.lengths.max())
    limit = longest if max_length is None else max_length
    require(limit >= longest, "max_length", f"hold the longest example, {longest}", max_length)
    width = packed_width(examples.lengths, rows_per_step, limit) if packing else None
    sharing = rank, world_size, rows_per_step
    return Batches(examples, batch_size, seed, shuffle, width, epochs, *sharing)


@dataclass(eq=False, repr=False)
class Batches:
    """A stream of batches, reachable at any index; see `make_batches`."""

    examples: Examples
    batch_size: int
    seed: int
    shuffle: bool
    width: int | None  # positions of a packed row; None gives each example a row of its own
    epochs: float | None
    rank: int
    world_size: int
    rows_per_step: int

    def __post_init__(self) -> None:
        self._lengths = np.array(self.examples.lengths)
        # Documents of each row; packed once, as each epoch only shuffles the rows.
        self._packed: list[np.ndarray] | None = None
        positions = self._lengths - 1  # the last token of a document is only a label
        if self.width is not None and self.shuffle:
            self._packed = pack(positions, self.width, np.random.default_rng([self.seed, 0x9AC4]))
        elif self.width is not None:
            self._packed = _in_order(positions, self.width)
        # R, rows of one pass, over all processes.
        self.rows_per_epoch = len(self.examples if self._packed is None else self._packed)
        self._end = self.stop = None  # rows, and batches, after which the stream ends
        if self.epochs is not None:
            self._end = max(1, round(self.epochs * self.rows_per_epoch))
            self.stop = -(-self._end // self.step)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._order)

    @property
    def step(self) -> int:
        """Rows that one batch of every process takes from the stream."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-self.rows_per_epoch // self.step)

    def __iter__(self) -> Iterator[Batch]:
        """Yields one pass over the examples, the last batch with the rows that are left."""
        return (as_batch(self._layout(i, self.rows_per_epoch)) for i in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        """The batch at an index of the stream."""
        if index < 0 or (self.stop is not None and index >= self.stop):
            last = "no end" if self.stop is None else f"{self.stop} batches"
            raise IndexError(f"the stream has {last}; got index {index}")
        return as_batch(self._layout(index, self._end))

    def epoch(self, index: int) -> float:
        """How many passes are done before the batch at an index."""
        rows = index * self.step if self._end is None else min(index * self.step, self._end)
        return rows / self.rows_per_epoch

    def ahead(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches from `start` to `stop`, laid out while earlier ones are trained."""
        # The second thread reads and copies; MLX belongs to the thread that computes.
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Future[Layout]] = deque()
            for index in range(start, stop):
                waiting.append(pool.submit(self._layout, index, self._end))
                if len(waiting) > AHEAD:
                    yield as_batch(waiting.popleft().result())
            while waiting:
                yield as_batch(waiting.popleft().result())

    @functools.cached_property
    def useful_share(self) -> float:
        """Positions of a pass that are not padding, 0 to 1."""
        real = int((self._lengths - 1).sum())
        if self.width is not None:
            return real / (self.rows_per_epoch * self.width)
        rows = self._lengths[self._epoch_order(0)] - 1
        shares = [
            rows[first : first + self.step][rank :: self.world_size]
            for first in range(0, len(rows), self.step)
            for rank in range(self.world_size)
        ]
        return real / sum(len(rows) * padded_width(int(rows.max())) for rows in shares if len(rows))

    def _layout(self, index: int, end: int | None) -> "Layout":
        first = index * self.step
        last = first + self.step if end is None else min(first + self.step, end)
        numbers = range(first + self.rank, last, self.world_size)
        rows = []
        for number in numbers:
            epoch, place = divmod(number, self.rows_per_epoch)
            row = self._epoch_order(epoch)[place]
            documents = [row] if self._packed is None else self._packed[row]
            rows.append([self.examples[int(i)] for i in documents])
        return lay_out(rows, self.width, tuple(numbers))

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in order.

        Packed rows all have one width and are simply shuffled. Others are shuffled, then sorted by
        length within windows so that little is padded; then the steps are shuffled, so that
        lengths do not rise and fall in a pattern.
        """
        R, size = self.rows_per_epoch, self.rows_per_step
        if not self.shuffle:
            return np.arange(R)
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(R)
        if self._packed is not None:
            return shuffled
        # An epoch may begin within a step: its first rows complete the one that is open.
        lead = min(-(epoch * R) % size, R)
        rest, batches = shuffled[lead:], []
        for start in range(0, len(rest), WINDOW * size):
            window = rest[start : start + WINDOW * size]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        short = [batches.pop()] if batches and len(batches[-1]) < size else []
        mixed = [batches[i] for i in random.permutation(len(batches))]
        return np.concatenate([shuffled[:lead], *mixed, *short])


def _in_order(lengths: np.ndarray, width: int) -> list[np.ndarray]:
    """Rows of documents that are neighbours in the file too."""
    rows, first, used = [], 0, 0
    for i, n in enumerate(lengths.tolist()):
        if used + n > width:
            rows.append(np.arange(first, i))
            first, used = i, 0
        used += n
    return [*rows, np.arange(first, len(lengths))]


# The fields of a Batch, in its order, as numpy arrays.
Layout = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...], tuple[int, ...]]


def as_batch(layout: Layout) -> Batch:
    """Hands the arrays to MLX."""
    tokens, labels, documents, places, rows = layout
    return Batch(mx.array(tokens), mx.array(labels), documents, places, rows)


def collate(rows: list[list[Example]], width: int | None = None) -> Batch:
    """Puts documents side by side in rows, right-padded to `width` or to one from a small set."""
    return as_batch(lay_out(rows, width))


def halves(batch: Batch) -> list[Batch]:
    """The upper and the lower rows of a batch of at least two, as two batches."""
    B, T = batch.tokens.shape
    documents = batch.documents
    if documents is None:
        documents = np.array([(b, 0, T) for b in range(B)], np.int32)
    parts = []
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        inside = (documents[:, 0] >= rows.start) & (documents[:, 0] < rows.stop)
        shifted = documents[inside] - np.array([rows.start, 0, 0], np.int32)
        places = tuple(itertools.compress(batch.places, inside))
        tokens, labels = batch.tokens[rows], batch.labels[rows]
        parts.append(Batch(tokens, labels, shifted, places, batch.rows[rows]))
    return parts


def lay_out(rows: list[list[Example]], width: int | None, numbers: tuple[int, ...] = ()) -> Layout:
    """As `collate`, on the host; `numbers` are those of the rows in the stream."""
    used = [sum(len(example) - 1 for example in row) for row in rows]
    T = width or padded_width(max(used, default=1))
    # No rows make one row of padding: a process that has nothing to do still takes part.
    tokens = np.zeros((max(1, len(rows)), T), np.int32)
    labels = np.full(tokens.shape, IGNORE, np.int32)
    documents, places = [], []
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example) - 1  # the last token is only a label
            tokens[b, start:end] = example.tokens[:-1]
            labels[b, start:end] = np.where(example.learned[1:], example.tokens[1:], IGNORE)
            documents.append((b, start, end))
            places.append(example.place)
            start = end
    return tokens, labels, np.array(documents, np.int32).reshape(-1, 3), tuple(places), numbers


def packed_width(lengths: np.ndarray, rows: int, max_length: int) -> int:
    """The width of packed rows: `max_length`, or less if all examples would fill fewer rows.

    A small data set in few wide rows would be mostly padding.
    """
    positions = int((lengths - 1).sum())
    needed = max(int(lengths.max()) - 1, math.ceil(positions / rows))
    return padded_width(min(max_length - 1, needed))


def padded_width(n: int) -> int:
    """The smallest width >= n that is a multiple of 64 and of an eighth of the power of two above.

    Each width compiles a graph of its own, and Metal cannot hold thousands of them; this set grows
    with the logarithm of the length, and wastes less than 64 tokens or a fifth of the width,
    whichever is more.
    """
    step = max(64, (1 << max(n - 1, 1).bit_length()) // 8)
    return -(-n // step) * step
