"""The report of a run: one HTML page that says whether it learned, and shows everything it was."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qlora import __version__
from mlx_qlora.adapters.push import VLLM_RANKS
from mlx_qlora.after import advice
from mlx_qlora.after.advice import Advice, Answer
from mlx_qlora.after.answer_metrics import Row
from mlx_qlora.after.forgetting import Forgetting
from mlx_qlora.after.plots import Plot, in_kernel, number, plots_of, render, svg_file
from mlx_qlora.before.plan import Plan
from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.data.examples import DataReport
from mlx_qlora.folders import PEFT, RECORD, staged
from mlx_qlora.infer.generate import Prompt
from mlx_qlora.readers import json_value
from mlx_qlora.train.loop import TrainResult


def write_report(report: "Report") -> Path:
    """Write `report.html` and `plots/`, and what a notebook shows of the result."""
    folder = report.result.output_dir
    path = folder / "report.html"
    with staged(folder) as staging:
        (staging / "plots").mkdir()
        for plot in report.plots:
            (staging / "plots" / f"{plot.name}.svg").write_text(svg_file(plot), "utf-8")
        (staging / path.name).write_text(report.page(), "utf-8", "backslashreplace")
    note = f"The whole report: {path}"
    plots = [] if in_kernel() else report.plots
    report.result.html = render("cell.html", report=report, plots=plots, table=None, note=note)
    return path


# ---- the report ----------------------------------------------------------------------------------

RECORDS = 24  # of the history, as a table
SPEED = "tokens_per_second"
COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", SPEED)
COLUMNS += ("rewards/accuracies", "rewards/margins", "eval_rewards/accuracies")
COLUMNS += ("eval_rewards/margins", "kl")


@dataclass(frozen=True)
class Report:
    """What page.html shows: a run, and what follows from its advice."""

    result: TrainResult
    config: RunConfig
    samples: Sequence[dict[str, str]] = ()  # each: prompt, reference, before, after
    data: Sequence[DataReport] = ()  # what became of the rows of each source
    rows: Mapping[str, int] = field(default_factory=dict)  # train, validation, test -> how many
    plan: Plan | None = None
    loss: Row | None = None  # of the held-out rows, before and after
    ask: Sequence[str] = ("--prompt", "Hello")  # flags of `generate` for a prompt like the rows'
    text: Prompt = ""  # that prompt itself, of a run in Python
    status: str = ""  # of a run under way or broken off; empty at its end
    mlx_lm: str = ""  # what mlx-lm would misread
    forgetting: Forgetting | None = None  # of general text
    kl: Row | None = None  # KL(tuned || base) of the held-out answers
    reloads: bool = False  # whether the page loads itself again, as it will have changed

    def page(self) -> str:
        """The HTML."""
        more = {"yaml": to_yaml(self.config), "version": __version__, "vllm_ranks": VLLM_RANKS}
        return render("page.html", report=self, figure=figure, **more)

    @property
    def title(self) -> str:
        """What the run was, in a few words."""
        objective = self.config.training.objective
        return f"{Path(self.base).name}, fine-tuned{f' by {objective}' * (objective != 'sft')}"

    @cached_property
    def record(self) -> dict[str, Any]:
        """Of `training_args.json`; empty if the folder has none."""
        return json_value(self.result.output_dir / RECORD)

    @cached_property
    def adapter(self) -> dict[str, Any]:
        """Of `adapter_config.json`; empty if the folder has none."""
        return json_value(self.result.output_dir / PEFT[0])

    @property
    def base(self) -> str:
        """The original base: a hub repository, or a folder."""
        named = self.config.model.base_model_name_or_path or self.config.model.source
        return str(self.adapter.get("base_model_name_or_path") or named or "BASE_MODEL")

    @property
    def folder(self) -> str:
        """The output folder, so that a command finds it from anywhere."""
        return str(self.result.output_dir.absolute())

    @cached_property
    def advice(self) -> list[Advice]:
        """What the history says."""
        ends_with_best = self.config.checkpointing.load_best_model_at_end
        return advice.advise(self.result.log_history, ends_with_best, self.config.training)

    @property
    def answers(self) -> list[Answer]:
        """Whether it learned, and whether too much."""
        result, kept = self.result, self.result.log_history
        best = result.best_step
        if best is not None and self.config.checkpointing.load_best_model_at_end:
            kept = [record for record in kept if record["step"] <= best]
        return [
            advice.learned(kept, result.test_scores, self.advice, self.samples, self.loss),
            advice.overfitting(result.log_history, best, self.advice),
        ]

    @property
    def forgot(self) -> Answer | None:
        """How much of general text was forgotten, if that was measured."""
        return advice.forgot(self.forgetting, self.kl) if self.forgetting and self.kl else None

    @property
    def speed(self) -> float:
        """Tokens per second of the training itself, without validations, as a plan has it."""
        of_steps = [r[SPEED] for r in self.result.log_history if SPEED in r]
        return statistics.fmean(of_steps or [self.result.tokens_per_second])

    @property
    def question(self) -> str:
        """The command, or the call, that asks the adapter something."""
        if self.text:
            return self.calls[0]
        return shlex.join([*command(self, "generate", self.folder), *GREEDY, *self.ask])

    @property
    def calls(self) -> list[str]:
        """What to do with a new adapter in Python; nothing after a command."""
        if not self.text:
            return []
        chosen, given = self.config.model, {"adapter": str(self.result.output_dir)}
        given |= {"revision": chosen.revision} if chosen.revision else {}
        packing = f", mq.{chosen.quantize()}" * (chosen.bits is not None)
        words = packing + "".join(f", {name}={value!r}" for name, value in given.items())
        return [
            f"mq.generate(model, tokenizer, {self.text!r})",
            f"model, tokenizer = mq.load({chosen.source or self.base!r}{words})  # later",
        ]

    @cached_property
    def plots(self) -> list[Plot]:
        """The plots of the history."""
        planned = self.plan.total_bytes if self.plan else None
        warmup, best = self.config.training.warmup_steps or 0, self.result.best_step
        return plots_of(self.result.log_history, warmup, best, planned)

    def history_table(self) -> tuple[list[str], list[list[str]], int]:
        """Heads and rows of a short history, or of every n-th step of a long one; all its steps."""
        steps: dict[int, dict[str, Any]] = {}
        for record in self.result.log_history:  # training and validation of a step are one row
            if "loss" in record or "eval_loss" in record:
                steps[record["step"]] = steps.get(record["step"], {}) | record
        every = max(1, math.ceil(len(steps) / RECORDS))
        shown = [*steps.values()][::-1][::every][::-1]  # the last one is always among them
        names = [name for name in COLUMNS if any(name in record for record in shown)]
        rows = [[figure(record[n]) if n in record else "" for n in names] for record in shown]
        return [name.replace("_", " ") for name in names], rows, len(steps)


def figure(value: object) -> str:
    """A number for a table cell; a dash for None, other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


GREEDY = ("--temperature", "0")  # as the report's own answers


# ---- use the adapter -----------------------------------------------------------------------------


def command(report: Report, name: str, folder: str) -> list[str]:
    """The beginning of a command of ours that opens the adapter.

    A model that is named would be loaded without what run.yaml says of it: revision, bits and
    dtype.
    """
    source = report.config.model.source
    named = source is not None and (report.result.output_dir / "run.yaml").is_file()
    model = [] if named else ["--model", str(source or report.base)]
    return ["mlx-qlora", name, *model, "--adapter", folder]


def next_commands(report: Report, chats: bool) -> list[list[str]]:
    """What to do with a new adapter: ask it, talk to it if it `chats`, take it elsewhere."""
    folder = str(report.result.output_dir)
    export = ["--output-dir", f"{folder}-gguf", "--gguf-model"]
    return [
        [*command(report, "generate", folder), *GREEDY, *report.ask],
        *([command(report, "chat", folder)] if chats else []),
        [*command(report, "export", folder), *export],
    ]
