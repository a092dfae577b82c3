"""What a report is made from, collected once: the run's result and what stands in its folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_qlora.config import RunConfig
from mlx_qlora.data.summary import DataReport
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.planner import Plan
from mlx_qlora.report.lines import Plot, plots_of
from mlx_qlora.train.advice import Advice, advise
from mlx_qlora.train.result import TrainResult

Evaluation = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Facts:
    """What a report is made from; see `page.write_report` for the first eight.

    Attributes:
        record: of `training_args.json`; empty if the folder has none.
        adapter: of `adapter_config.json`; empty if the folder has none.
    """

    result: TrainResult
    config: RunConfig
    scores: dict[str, Scores]
    samples: Sequence[dict[str, str]]
    data: Sequence[DataReport]
    rows: Mapping[str, int]
    plan: Plan | None
    evaluation: Evaluation
    record: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)

    @property
    def advice(self) -> list[Advice]:
        """What the history says."""
        ends_with_best = self.config.checkpointing.load_best_model_at_end
        return advise(self.result.log_history, ends_with_best)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records up to the step whose weights the adapter has."""
        best, records = self.result.best_step, self.result.log_history
        if best is None or not self.config.checkpointing.load_best_model_at_end:
            return records
        return [record for record in records if record["step"] <= best]

    @property
    def plots(self) -> list[Plot]:
        """The plots of the history."""
        planned = self.plan.total_bytes if self.plan else None
        training = self.config.training
        return plots_of(
            self.result.log_history, training.warmup_steps, self.result.best_step, planned
        )

    @property
    def folder(self) -> str:
        """The output folder, so that a command finds it from anywhere."""
        return str(self.result.output_dir.absolute())

    @property
    def base(self) -> str:
        """The original base: a hub repository, or a folder."""
        named = self.config.model.base_model_name_or_path or self.config.model.source
        return str(self.adapter.get("base_model_name_or_path") or named or "BASE_MODEL")

    def count(self, key: str) -> int:
        """How many records of the history have a key."""
        return sum(key in record for record in self.result.log_history)


def in_folder(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the output folder; empty if there is no such file, or it is damaged."""
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):  # the page is about the run; it stands without them
        return {}


def evaluation_of(scores: dict[str, Scores]) -> Evaluation:
    """The table of scores before and after, as an evaluation without intervals."""
    if "before" not in scores or "after" not in scores:
        return {}
    before, after = scores["before"], scores["after"]
    pairs = {
        "loss (nats per token)": (before.loss, after.loss),
        "perplexity": (before.perplexity, after.perplexity),
        "token accuracy": (before.token_accuracy, after.token_accuracy),
    }
    return {
        name: {"base": base, "tuned": tuned, "difference": tuned - base, "n": after.n_tokens}
        for name, (base, tuned) in pairs.items()
    }
