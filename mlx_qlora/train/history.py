"""What a run's records say of its validations; they are dicts as `metrics.jsonl` has them."""

import math
from typing import Any


def best_eval(history: list[dict[str, Any]]) -> tuple[int, float] | None:
    """(step, loss) of the best validation; the first of equals."""
    evals = [(r["eval_loss"], r["step"]) for r in history if "eval_loss" in r]
    finite = [pair for pair in evals if math.isfinite(pair[0])]
    return min(finite)[::-1] if finite else None


def was_validated(history: list[dict[str, Any]], step: int) -> bool:
    """Whether there was a validation after this step."""
    return any(record["step"] == step and "eval_loss" in record for record in history)


def validations_since_best(history: list[dict[str, Any]]) -> int:
    """How many validations came after the best one; 0 if none had a finite loss."""
    best, steps = best_eval(history), [r["step"] for r in history if "eval_loss" in r]
    return steps[::-1].index(best[0]) if best else 0
