"""Five questions that a person has about a run, answered in words from its figures."""

import math
import shlex
from dataclasses import dataclass

from mlx_qlora.report.facts import Facts
from mlx_qlora.report.samples import is_other
from mlx_qlora.train.advice import LITTLE


@dataclass(frozen=True)
class Answer:
    """One question and what the figures say.

    Attributes:
        question: as a person asks it.
        verdict: the answer, short.
        why: the figures behind it.
        tone: good, bad, note, or nothing where there is nothing to judge.
        code: a command, if that is the answer.
    """

    question: str
    verdict: str
    why: str
    tone: str = ""
    code: str = ""


def answers(facts: Facts) -> list[Answer]:
    """All five, in the order in which they are asked."""
    return [learned(facts), overfitting(facts), changed(facts), cost(facts), use(facts)]


def learned(facts: Facts) -> Answer:
    """From the test set if there is one, else from validation, else from the training loss."""
    question = "Did it learn?"
    if any(advice.kind == "divergence" for advice in facts.advice):
        found = next(a.finding for a in facts.advice if a.kind == "divergence")
        return Answer(question, "Training was unstable", f"{_sentence(found)}", "bad")
    what, first, last, where = _evidence(facts)
    if not (math.isfinite(first) and math.isfinite(last) and first > 0):
        return Answer(question, "Not known", "Too few figures were recorded to compare.", "note")
    change = (last - first) / first
    why = f"{what}: {first:.4f} → {last:.4f} ({change:+.1%}), {where}."
    if change > LITTLE:
        return Answer(question, "No, it got worse", why, "bad")
    if change > -LITTLE:
        return Answer(question, "Hardly", why, "note")
    return Answer(question, f"Yes: the loss fell by {-change:.0%}", why, "good")


def _evidence(facts: Facts) -> tuple[str, float, float, str]:
    """The name of the best loss there is, its first and last value, and what they are of."""
    if {"before", "after"} <= facts.scores.keys():
        before, after = facts.scores["before"], facts.scores["after"]
        rows = f"on {after.n_tokens:,} tokens that were not trained, before and after"
        return "Test loss", before.loss, after.loss, rows
    for key, what in (("eval_loss", "Validation loss"), ("loss", "Training loss")):
        found = [(r["step"], r[key]) for r in facts.history if key in r]
        if len(found) > 1:
            (a, first), (b, last) = found[0], found[-1]
            return what, first, last, f"from step {a:,} to step {b:,}"
    return "Training loss", math.nan, math.nan, ""


def overfitting(facts: Facts) -> Answer:
    """What `advise` finds, and how far the last validation is above the best."""
    question = "Is it overfitting?"
    evals = [
        (r["step"], r["eval_loss"])
        for r in facts.result.log_history
        if "eval_loss" in r and math.isfinite(r["eval_loss"])
    ]
    found = [advice for advice in facts.advice if advice.kind == "overfitting"]
    if found:
        verdict = f"Yes, since step {facts.result.best_step:,}" if facts.result.best_step else "Yes"
        return Answer(question, verdict, _sentence(found[0].finding), "bad")
    if not evals:
        why = "There was no validation set: give data.validation_path, or a share in data.split."
        return Answer(question, "Not known", why, "note")
    last, (best_step, best) = evals[-1][1], min(evals, key=lambda pair: pair[1])
    train = [r["loss"] for r in facts.result.log_history if "loss" in r]
    gap = f" Training loss {train[-1]:.4f}." if train else ""
    if len(evals) < 3:
        many = "1 validation" if len(evals) == 1 else f"{len(evals)} validations"
        why = f"Only {many}; lower checkpointing.eval_steps. Validation loss {last:.4f}.{gap}"
        return Answer(question, "Too early to tell", why, "note")
    if last < best * 1.001:
        return Answer(
            question,
            "No sign of it",
            f"Validation loss ended at its best, {last:.4f}.{gap}",
            "good",
        )
    above = f"Validation loss ends at {last:.4f}, {last / best - 1:.1%} above its best"
    return Answer(question, "No sign of it", f"{above} (step {best_step:,}).{gap}", "good")


def changed(facts: Facts) -> Answer:
    """How many sampled answers differ, and how the token accuracy moved."""
    question = "What changed in the answers?"
    pairs = [(s["before"], s["after"], s.get("reference", "")) for s in facts.samples if _paired(s)]
    why = ""
    if {"before", "after"} <= facts.scores.keys():
        before, after = facts.scores["before"], facts.scores["after"]
        why = (
            f"Test tokens that are the model's first choice: {before.token_accuracy:.1%} → "
            f"{after.token_accuracy:.1%}."
        )
    if not pairs:
        return Answer(question, "No samples", why or "No row was held out to ask for.")
    differ = sum(is_other(before, after) for before, after, _ in pairs)
    exact = [sum(said[i].strip() == said[2].strip() for said in pairs) for i in (0, 1)]
    equal = f"Equal to the reference: {exact[0]} before, {exact[1]} after."
    verdict = f"{differ} of {len(pairs)} sampled answers differ"
    return Answer(question, verdict, f"{equal} {why}".strip(), "" if differ else "note")


def _paired(sample: dict[str, str]) -> bool:
    return {"before", "after"} <= sample.keys()


def cost(facts: Facts) -> Answer:
    """Time, speed, and memory beside the plan."""
    result = facts.result
    peak = f"Peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    if facts.plan:
        peak += f" (planned {facts.plan.total_bytes / 1e9:.2f} GB)"
    why = f"{peak}; {result.steps:,} steps at {result.tokens_per_second:,.0f} tokens per second"
    early = ", stopped early." if result.stopped_early else "."
    return Answer("What did it cost?", duration(result.seconds), why + early)


def use(facts: Facts) -> Answer:
    """The shortest command that asks the tuned model."""
    why = "The adapter is in PEFT's format. Other tools: see below."
    return Answer("How do I use it?", "Ask it something", why, code=ask_command(facts))


def ask_command(facts: Facts) -> str:
    """`mlx-qlora generate` for this folder.

    The folder's own run.yaml says how the base was loaded: its revision, bits and dtype. A model
    that is named would be loaded without them, so one is named only where no run.yaml names it.
    """
    source, model = facts.config.model.source, ""
    if source is None or not (facts.result.output_dir / "run.yaml").is_file():
        model = f"--model {shlex.quote(str(source or facts.base))} "
    return f'mlx-qlora generate {model}--adapter {shlex.quote(facts.folder)} --prompt "Hello"'


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
