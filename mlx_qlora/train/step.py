"""One optimiser step: `Step.__call__` is all of it, from micro-batches to new weights."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn, TypeVar

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_qlora import device
from mlx_qlora.data.batches import Batch, halves
from mlx_qlora.distributed import processes
from mlx_qlora.errors import TrainingError, warn
from mlx_qlora.train.allreduce import GradientAllReduce
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.preferences import Preferences
from mlx_qlora.train.signals import StopSignal
from mlx_qlora.tree import number

T = TypeVar("T")
PIECE_CHUNKS = 4  # chunks that the engine computes before a signal is looked at


@dataclass(frozen=True)
class StepResult:
    """What one step was, of all processes."""

    loss: float  # mean nats per supervised token, or of the objective per example
    grad_norm: float  # before clipping
    tokens: int  # real ones in its rows
    rows: int = 0  # of the stream
    signum: int | None = None  # of a signal that any of several processes received
    metrics: dict[str, float] = field(default_factory=dict)  # of the objective's own
    # Of a step that moved nothing, the rows of this process whose loss is not finite; all of its
    # rows if each loss is finite but the gradient is not.
    suspects: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the weights have moved."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepError(TrainingError):
    """A step cannot be taken, or too many in a row were skipped."""

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again  # whether another attempt may succeed: the device failed, not numbers


class Step:
    """Takes optimiser steps, each of them shared by the processes of the run.

    A signal to `stop`, which is looked at after each micro-batch, abandons a step. The seed is that
    of the dropout. With `preferences`, answers are compared, and there is no dropout.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: AdamW,
        seed: int,
        stop: StopSignal,
        console: Console,
        preferences: Preferences | None = None,
    ) -> None:
        self.preferences = preferences
        self.engine, self.optimizer, self.seed = engine, optimizer, seed
        self.stop, self.console = stop, console
        self.all_reduce = None
        if processes().size > 1:
            self.all_reduce = GradientAllReduce(optimizer.shapes, processes())
        self.n_splits = 1  # a micro-batch is computed in at least so many pieces

    def __call__(self, micro_batches: list[Batch], rate: float) -> StepResult | None:
        """One step at this learning rate; None if a signal abandoned it, and nothing has moved.

        A StepError if a single row does not fit into memory, or the device gives up.
        """
        optimizer, all_reduce, preferences = self.optimizer, self.all_reduce, self.preferences
        losses: list[tuple[Batch, mx.array]] = []
        weigh = None
        if preferences is not None:
            weigh = preferences.weigh
            count = partial(preferences.count, micro_batches, self.pieces)
            preferences.begin(self.retried(micro_batches, count))

        def forward_backward() -> tuple[dict[str, mx.array], mx.array, float]:
            weights = optimizer.named(optimizer.weights)
            pieces = [piece for batch in micro_batches for piece in self.split(batch)]
            grads, nats, n_tokens = {}, mx.array(0.0), 0
            losses.clear()
            if preferences is not None:
                preferences.reset()
            for piece in pieces:
                keys = dropout_keys(self.seed, piece.rows) if preferences is None else None
                hook = all_reduce if piece is pieces[-1] else None  # gradients go out from there
                loss, n, grads = self.engine(weights, piece, keys, grads, hook, weigh)
                nats, n_tokens = nats + loss, n_tokens + n
                losses.append((piece, loss))
                mx.eval(grads, nats)  # or the graphs of all micro-batches would be alive at once
                if self.stop.signum is not None:
                    break
            return grads, nats, n_tokens

        if all_reduce is not None:
            all_reduce.begin()
        grads, nats, n = self.retried(micro_batches, forward_backward)
        if self.stop.signum is not None:
            return None
        tokens = sum(batch.real_tokens for batch in micro_batches)
        rows = sum(len(batch.rows) for batch in micro_batches)
        signum, elsewhere = None, False
        if all_reduce is not None:
            counts = n, tokens, rows
            elsewhere = bool(mx.stack([mx.isfinite(grad).all() for grad in grads.values()]).all())
            grads, nats, (n, tokens, rows), signum = retried(
                lambda: all_reduce.wait(grads, nats, counts, self.stop.received), give_up
            )
        # The one division, by the tokens supervised in the step; then clipping and AdamW.
        norm = retried(lambda: optimizer.update(grads, n, rate, nats), only_once)
        loss, *kl = [total / (n or 1) for total in np.array(nats).reshape(-1).tolist()]
        metrics = preferences.metrics() if preferences is not None else dict(zip(["kl"], kl))
        result = StepResult(loss, number(norm), tokens, rows, signum, metrics)
        if n and result.grad_norm == 0 and all_reduce is None:
            # Metal may lose work without an error (mlx#3979), and what it should have written is 0.
            # A gradient may be 0, too: of small numbers in float16, of queries that see one key.
            again = forward_backward()[0].values()
            is_lost = result.loss == 0 and self.engine.dtype != mx.float16
            if is_lost or any(grad.any().item() for grad in again):
                give_up(f"the gradient of {n} tokens is exactly 0, at a loss of {result.loss:.3g}")
            warn(self.console, f"nothing to learn in a step: the gradient of {n} tokens is 0")
        return result if result.finite else replace(result, suspects=suspects(losses, elsewhere))

    def retried(self, batches: list[Batch], work: Callable[[], T]) -> T:
        """Computes something of some batches, fewer of their rows at once where memory ends."""
        return retried(work, lambda reason, _: self.split_more(batches, reason))

    def pieces(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The pieces of some batches."""
        return (piece for batch in batches for piece in self.split(batch))

    def split(self, batch: Batch) -> list[Batch]:
        """The pieces of a micro-batch: small enough for memory, and for a signal to be heard."""
        at_once = PIECE_CHUNKS * device.current().chunk_positions
        return split(batch, max(self.n_splits, -(-batch.real_tokens // at_once)))

    def split_more(self, micro_batches: list[Batch], reason: str) -> None:
        """Halves the rows of these micro-batches that are computed at once, if they are several."""
        pieces = [self.split(batch) for batch in micro_batches]
        most = max(len(piece.tokens) for of_batch in pieces for piece in of_batch)
        if most == 1:
            raise StepError(
                "out of memory with a single row; lower data.max_length, set "
                f"training.gradient_checkpointing=true, or lower lora.r ({reason})",
                again=True,
            )
        self.n_splits = 2 * max(map(len, pieces))
        rows = max(len(batch.tokens) for batch in micro_batches)
        warn(
            self.console,
            f"out of memory: from now on at most {-(-most // 2)} of {rows} rows are computed at "
            "once; the result is the same",
        )


# ---- where memory ends ---------------------------------------------------------------------------


def retried(work: Callable[[], T], make_room: Callable[[str, int], None]) -> T:
    """Does some work, and does it again as often as memory ends and room can be made.

    The work leaves nothing behind if it fails. `make_room` is given the error's words and how often
    that happened. Any other error of the device is a StepError.
    """
    failures = 0
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            reason = str(error) or "out of memory"  # Python's own MemoryError has no words
        # Outside of the handler, whose traceback would keep the arrays of the step alive.
        if not device.is_out_of_memory(reason):
            give_up(reason)
        gc.collect()
        mx.clear_cache()
        failures += 1
        make_room(reason, failures)


def only_once(reason: str, failures: int) -> None:
    """Makes no more room than `retried` does, for the update: fewer rows would not help there."""
    if failures > 1:
        words = f"out of memory while the weights are updated; lower lora.r ({reason})"
        raise StepError(words, again=True)


def give_up(reason: str, _: int = 1) -> NoReturn:
    """Ends the run: the device failed, or what other processes have counted cannot be repeated."""
    raise StepError(f"the device failed: {reason}{device.hint(reason)}", again=True)


def split(batch: Batch, n: int) -> list[Batch]:
    """A batch in at least `n` pieces of fewer rows, as far as it has rows."""
    pieces = [batch]
    while len(pieces) < n and any(len(piece.tokens) > 1 for piece in pieces):
        cut = [halves(piece) if len(piece.tokens) > 1 else [piece] for piece in pieces]
        pieces = [half for both in cut for half in both]
    return pieces


# ---- rows of a step ------------------------------------------------------------------------------


def suspects(losses: list[tuple[Batch, mx.array]], elsewhere: bool) -> tuple[str, ...]:
    """The rows that may have made a step infinite or no number.

    `elsewhere`: whether there are other processes and the gradients of this one are finite.
    """
    spoilt = [batch for batch, loss in losses if not math.isfinite(number(loss.sum()))]
    if elsewhere and not spoilt:
        return ("rows of another process; see its rank-*.log",)
    return tuple(place for batch in spoilt or (b for b, _ in losses) for place in batch.places)


def dropout_keys(seed: int, rows: tuple[int, ...]) -> mx.array:
    """(B, 2): the key of each row, from nothing but the run's seed and the row's number."""
    states = [np.random.SeedSequence([seed, row]).generate_state(2) for row in rows or (0,)]
    return mx.array(np.stack(states).astype(np.uint32))
