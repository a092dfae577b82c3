"""What a run's history says about the run: stated rules, and for each a remedy.

The rules look at means over stretches and not at single steps, because the loss of one batch
says little. Each is a function of the history, and of which of its weights the run ended with, so
that it can be tried on recorded ones.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from mlx_qlora.train.checkpoint import best_eval

History = list[dict[str, Any]]


FEWEST = 5  # logged losses, or 3 validations, before anything is said


SHORT = 30  # steps: before that, a stretch of losses says more of its rows than of the run


RISE = 0.02  # of the validation loss above its best, while the training loss falls


LITTLE = 0.03  # fall of the loss over a whole run


EXPLODED = 1.5  # times the best stretch


STUTTER = 0.10  # more repeated first choices than the references have


@dataclass(frozen=True)
class Advice:
    """One thing that a history shows.

    Attributes:
        kind: overfitting, underfitting, divergence or repetition.
        finding: what is seen, with its figures.
        remedy: what to change.
    """

    kind: str
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.finding}; {self.remedy}"


def advise(history: History, ends_with_best: bool = False) -> list[Advice]:
    """All advice that a history gives, the most urgent first.

    Args:
        history: the records of `metrics.jsonl`.
        ends_with_best: whether the run ended with the weights of its best validation.
    """
    rules = [
        diverged(history),
        overfitted(history, ends_with_best),
        repeats_itself(_until_best(history) if ends_with_best else history),
    ]
    found = [advice for advice in rules if advice is not None]
    # Its remedies are the opposite of the others', which are the surer ones.
    hardly = None if found else underfitted(history)
    return [hardly] if hardly else found


def diverged(history: History) -> Advice | None:
    """The loss of the last fifth is EXPLODED times that of the best fifth, or no number."""
    losses = _losses(history)
    skipped = sum("skipped" in record for record in history)
    if skipped:
        return Advice(
            "divergence",
            f"steps skipped because their loss or gradient was no number: {skipped}",
            "look at the rows named in metrics.jsonl, or lower training.learning_rate",
        )
    if len(losses) < FEWEST or history[-1]["step"] < SHORT:
        return None
    fifths = _fifths(losses)
    best, last = min(fifths), fifths[-1]
    if last <= EXPLODED * best:
        return None
    return Advice(
        "divergence",
        f"the loss rose from {best:.3f} at its best to {last:.3f} at the end",
        "lower training.learning_rate (to a third), raise training.warmup_steps",
    )


def overfitted(history: History, ends_with_best: bool = False) -> Advice | None:
    """The validation loss ends RISE above its best, while the training loss goes on falling."""
    evals = [(r["step"], r["eval_loss"]) for r in _validations(history)]
    if len(evals) < 3:
        return None
    best_step, best = min(evals, key=lambda item: item[1])
    last_step, last = evals[-1]
    before = [r["loss"] for r in history if "loss" in r and r["step"] <= best_step]
    after = [r["loss"] for r in history if "loss" in r and r["step"] > best_step]
    if last <= best * (1 + RISE) or not before or not after:
        return None
    if statistics.mean(after[-FEWEST:]) >= statistics.mean(before[-FEWEST:]):
        return None
    remedy = "raise lora.lora_dropout, lower lora.r, or add data"
    if ends_with_best:
        remedy = f"the weights of step {best_step} are kept; for better ones {remedy}"
    else:
        at_best = f"end with step {best_step} (checkpointing.load_best_model_at_end=true)"
        remedy = f"{at_best}, train for fewer steps, {remedy}"
    return Advice(
        "overfitting",
        f"the validation loss was best at step {best_step} ({best:.3f}) and is {last:.3f} at step "
        f"{last_step}, while the training loss went on falling",
        remedy,
    )


def underfitted(history: History) -> Advice | None:
    """The training loss of the last fifth is less than LITTLE below that of the first."""
    losses = _losses(history)
    if len(losses) < FEWEST or history[-1]["step"] < SHORT:
        return None
    first, *_, last = _fifths(losses)
    if last < first * (1 - LITTLE) or last > EXPLODED * first:
        return None
    return Advice(
        "underfitting",
        f"the loss hardly fell, from {first:.3f} to {last:.3f}",
        "raise training.learning_rate (to three times), train for more steps, or raise lora.r; and "
        "look at the data with `mlx-qlora inspect`",
    )


def repeats_itself(history: History) -> Advice | None:
    """The model's first choices repeat the one before STUTTER more often than the references."""
    evals = [r for r in _validations(history) if "eval_repetition" in r]
    if not evals:
        return None
    ours, theirs = evals[-1]["eval_repetition"], evals[-1]["eval_reference_repetition"]
    if ours <= theirs + STUTTER:
        return None
    return Advice(
        "repetition",
        f"{ours:.0%} of the model's first choices repeat the token before them, where the "
        f"references have {theirs:.0%}",
        "train for fewer steps, lower training.learning_rate, and look for rows that repeat "
        "themselves; when generating, raise generation.repetition_penalty",
    )


def _losses(history: History) -> list[float]:
    return [r["loss"] for r in history if "loss" in r and math.isfinite(r["loss"])]


def _validations(history: History) -> History:
    """Those that found a loss: of a model that computes NaN, nothing else is said either."""
    return [r for r in history if "eval_loss" in r and math.isfinite(r["eval_loss"])]


def _until_best(history: History) -> History:
    best = best_eval(history)
    return [r for r in history if best is None or r["step"] <= best[0]]


def _fifths(losses: list[float]) -> list[float]:
    """The mean of each fifth of a run."""
    n = len(losses)
    return [statistics.mean(losses[i * n // 5 : (i + 1) * n // 5]) for i in range(5)]
