"""What a finished run was."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.train.history import best_eval


@dataclass
class TrainResult:
    """What a finished run was.

    Attributes:
        output_dir: where its files are.
        steps: optimiser steps of the whole run.
        train_loss: mean nats per supervised token over the last log window.
        eval_loss: the last validation loss, if there was a validation set; the best one, if the
            run ended with the best weights.
        log_history: every logged record, in order.
        seconds: wall time of this process's part, validation and checkpoints included.
        tokens_per_second: real tokens trained per second of that time.
        peak_memory_bytes: MLX's peak.
        best_step: step of the best validation loss, if there was one.
        stopped_early: whether patience ended the run before its last step.
        test_scores: of the test rows, "before" and "after"; empty where there were none.
        html: what a notebook shows, once a report was written; see `mlx_qlora.report`.
    """

    output_dir: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    log_history: list[dict[str, Any]] = field(repr=False)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    best_step: int | None = None
    stopped_early: bool = False
    test_scores: dict[str, Any] = field(default_factory=dict)
    html: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(
        cls,
        output: Path,
        history: list[dict[str, Any]],
        step: int,
        total_steps: int,
        ends_with_best: bool,
        seconds: float,
        tokens: int,
    ) -> "TrainResult":
        """What a run was that has just ended.

        Args:
            output: its folder.
            history: its records.
            step: the last one.
            total_steps: that it would have gone on to.
            ends_with_best: whether its weights are those of the best validation, if there is one.
            seconds: wall time of this process's part.
            tokens: real ones, trained in that time.
        """
        best = best_eval(history)
        losses, evals = ([r[key] for r in history if key in r] for key in ("loss", "eval_loss"))
        eval_loss = evals[-1] if evals else None
        return cls(
            output_dir=output,
            steps=step,
            train_loss=losses[-1] if losses else float("nan"),
            eval_loss=best[1] if best and ends_with_best else eval_loss,
            log_history=history,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            best_step=best[0] if best else None,
            stopped_early=step < total_steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the history, as JSON has them."""
        figures = dataclasses.asdict(self)
        return {k: v for k, v in figures.items() if k not in ("log_history", "html")}

    def _repr_html_(self) -> str | None:
        """The summary and the plots in a notebook; None lets it show the text."""
        return self.html or None
