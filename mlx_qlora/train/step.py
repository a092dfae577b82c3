"""One optimiser step, and steps that are skipped."""

import gc
import math
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_qlora import device
from mlx_qlora.data.batches import Batch, halves
from mlx_qlora.distributed import Processes
from mlx_qlora.errors import TrainingError, warn
from mlx_qlora.train.allreduce import Counts, GradientAllReduce
from mlx_qlora.train.engine import Engine
from mlx_qlora.train.optim import AdamW
from mlx_qlora.train.signals import Interruption
from mlx_qlora.tree import number

# ---- the result of a step ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one step was.

    Attributes:
        loss: mean nats per supervised token.
        grad_norm: of the gradient, before clipping.
        tokens: real tokens that were gone through, by all processes.
        rows: of the stream that were gone through, by all processes.
        signum: of a signal that another process has had; None for none, or with one process.
        suspects: the rows of the micro-batches whose loss is not finite, or of all if each loss
            is but the gradient is not.
    """

    loss: float
    grad_norm: float
    tokens: int
    rows: int = 0
    signum: int | None = None
    suspects: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the weights have moved."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepError(TrainingError):
    """A step cannot be taken, or too many were in vain.

    Attributes:
        again: whether another attempt may succeed: it was the device's doing, not the numbers'.
    """

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again


# ---- the step ------------------------------------------------------------------------------------


class Update:
    """Takes optimiser steps.

    Args:
        engine: differentiates.
        optimizer: holds the weights and moves them.
        seed: of the run, for the dropout.
        interruption: looked at after each micro-batch; a signal gives the step up.
        console: where it is said that micro-batches were halved.
        processes: that share the step; every one of them has to take it.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: AdamW,
        seed: int,
        interruption: Interruption,
        console: Console,
        processes: Processes | None = None,
    ) -> None:
        self.engine, self.optimizer, self.seed = engine, optimizer, seed
        self.interruption, self.console = interruption, console
        self.all_reduce = None
        if processes is not None and processes.size > 1:
            self.all_reduce = GradientAllReduce(optimizer.shapes, processes)
        self.parts = 1  # a micro-batch is computed in so many

    def step(self, micro_batches: list[Batch], rate: float) -> Outcome | None:
        """One step, or None if it was given up; then nothing has moved.

        Raises:
            StepError: a single row does not fit into memory, or the device gave up.
            ProcessError: another process is gone, or has not come in time.
        """
        if self.all_reduce is not None:
            self.all_reduce.begin()
        while True:
            try:
                found = self._gradients(micro_batches)
                break
            except (RuntimeError, MemoryError) as error:
                reason = _reason(error)
            # Outside of the handler, whose traceback would keep the arrays of the step alive.
            self.shrink(max(batch.tokens.shape[0] for batch in micro_batches), reason)
        return None if found is None else self._outcome(found, rate)

    def _gradients(self, micro_batches: list[Batch]) -> "Gradients | None":
        """What this process's rows say; None if a signal came meanwhile."""
        weights = self.optimizer.named(self.optimizer.weights)
        total, nats = None, mx.array(0.0)
        own = Counts(0, 0, sum(len(batch.rows) for batch in micro_batches))
        losses: list[tuple[Batch, mx.array]] = []
        pieces = [split(whole, self.parts) for whole in micro_batches]
        for some in pieces:
            for batch in some:
                keys = dropout_keys(self.seed, batch.rows)
                told = self.all_reduce if batch is pieces[-1][-1] else None
                loss, n_tokens, total = self.engine(weights, batch, keys, total, told)
                nats = nats + loss
                own = own.with_more(n_tokens, batch.real_tokens)
                losses.append((batch, loss))
                mx.eval(total, nats)  # or the graphs of all micro-batches would be alive at once
            if self.interruption.signum is not None:
                return None
        assert total is not None
        return Gradients(total, nats, own, losses)

    def _outcome(self, found: "Gradients", rate: float) -> Outcome:
        """Sums over the processes, and moves the weights."""
        total, nats, counts, own_finite = found.total, found.nats, found.counts, True
        found.total = {}  # a sum over processes takes their place
        if self.all_reduce is not None:
            own_finite = bool(mx.stack([mx.isfinite(g).all() for g in total.values()]).all())
            counts = replace(counts, signum=self.interruption.came)
            try:
                total, nats, counts = self.all_reduce.wait(total, nats, counts)
            except RuntimeError as error:
                raise _gave_up(_reason(error)) from None
        norm = self._move(total, nats, counts.supervised, rate)

        mean = number(nats) / max(counts.supervised, 1)
        outcome = Outcome(mean, number(norm), counts.tokens, counts.rows, counts.signum)
        if outcome.finite:
            return outcome
        self.optimizer.step -= 1  # AdamW counts updates, and this was none
        return replace(outcome, suspects=found.suspects(self.all_reduce is None, own_finite))

    def _move(
        self, total: dict[str, mx.array], nats: mx.array, supervised: int, rate: float
    ) -> mx.array:
        """Moves the weights; returns the gradient's norm.

        Where memory ends, all that is only kept in stock is given back, and it is tried once more.
        Fewer rows would not help here, and what was summed over processes is not sent again.
        """
        optimizer, is_last = self.optimizer, False
        before = optimizer.weights, optimizer.mean, optimizer.square, optimizer.step
        while True:
            try:
                norm = optimizer.update(total, supervised, rate, nats)
                mx.eval(optimizer.weights, optimizer.mean, optimizer.square, norm)
                return norm
            except (RuntimeError, MemoryError) as error:
                optimizer.weights, optimizer.mean, optimizer.square, optimizer.step = before
                reason = _reason(error)
            if not device.is_out_of_memory(reason):
                raise _gave_up(reason)
            if is_last:
                words = f"out of memory while the weights are moved; lower lora.r ({reason})"
                raise StepError(words, again=True)
            is_last = True
            gc.collect()
            mx.clear_cache()

    def shrink(self, rows: int, reason: str) -> None:
        """Halves what is computed at once, if that can help.

        Raises:
            StepError: it cannot.
        """
        if not device.is_out_of_memory(reason):
            raise _gave_up(reason)
        gc.collect()
        mx.clear_cache()
        if self.parts >= rows:
            raise StepError(
                "out of memory with a single row; lower data.max_length, set "
                f"training.gradient_checkpointing=true, or lower lora.r ({reason})",
                again=True,
            )
        self.parts *= 2
        warn(
            self.console,
            f"out of memory: of {rows} rows at most {-(-rows // self.parts)} are computed at once "
            "from here on; the result is the same",
        )


@dataclass
class Gradients:
    """What one process has found in a step.

    Attributes:
        total: sums over supervised tokens, by name.
        nats: their loss, summed.
        counts: of what it went through.
        losses: of each batch.
    """

    total: dict[str, mx.array]
    nats: mx.array
    counts: Counts
    losses: list[tuple[Batch, mx.array]]

    def suspects(self, alone: bool, finite: bool) -> tuple[str, ...]:
        """The rows that may have made a step's numbers infinite or none.

        Args:
            alone: whether no other process shared the step.
            finite: whether these gradients are.
        """
        bad = [batch for batch, loss in self.losses if not math.isfinite(number(loss))]
        if bad or alone or not finite:
            batches = bad or [batch for batch, _ in self.losses]
            return tuple(place for batch in batches for place in batch.places)
        return ("rows of another process: see its rank-*.log",)


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in at least `parts` batches of fewer rows, as far as it has rows."""
    made = [batch]
    while len(made) < parts and any(part.tokens.shape[0] > 1 for part in made):
        made = [
            half for part in made for half in (halves(part) if part.tokens.shape[0] > 1 else [part])
        ]
    return made


def _reason(error: Exception) -> str:
    return str(error) or "out of memory"  # Python's own MemoryError has no words


def _gave_up(reason: str) -> StepError:
    return StepError(f"the device gave up: {reason}{device.hint(reason)}", again=True)


def dropout_keys(seed: int, rows: tuple[int, ...]) -> mx.array:
    """(B, 2): the key of each row, from nothing but the run's seed and the row's number."""
    states = [np.random.SeedSequence([seed, row]).generate_state(2) for row in rows or (0,)]
    return mx.array(np.stack(states).astype(np.uint32))
