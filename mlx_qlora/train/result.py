"""What a finished run was."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the history, as JSON has them."""
        figures = dataclasses.asdict(self)
        return {k: v for k, v in figures.items() if k not in ("log_history", "html")}

    def _repr_html_(self) -> str | None:
        """The summary and the plots in a notebook; None lets it show the text."""
        return self.html or None
