"""What the figures of a run say: advice by stated rules, and answers to the questions people ask.

The rules look at means over stretches: the loss of one batch says little.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_qlora.after.answer_metrics import Row, style_similarity
from mlx_qlora.after.bootstrap import FEWEST as FEWEST_ROWS
from mlx_qlora.after.forgetting import Forgetting
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.train.checkpoint import best_eval
from mlx_qlora.train.config import TrainingConfig

# ---- advice --------------------------------------------------------------------------------------

History = list[dict[str, Any]]  # the records of `metrics.jsonl`
FEWEST = 5  # logged losses, or 3 validations, before anything is said
SHORT = 30  # steps: before that, a stretch of losses says more of its rows than of the run
RISE = 0.02  # of the validation loss above its best, while the training loss falls
LEAST_RISE = 0.03  # of it, nats: a loss near 0 moves by its half from one batch to the next
LITTLE = 0.03  # fall of the loss over a whole run
LITTLE_NEARER = 0.05  # likeness of the answers: a word in common gives a few percent
EXPLODED = 1.5  # times the best stretch
FALLS, STEEP = 0.03, 0.25  # of the validation loss, and of its whole fall, in a run's second half
FAR, NEAR = 0.5, 0.85  # likeness of the answers to the references
PREFERS = 0.6  # share of held-out pairs in which the chosen answer has the higher reward
STUTTER = 0.10  # more repeated first choices than the references have


@dataclass(frozen=True)
class Advice:
    """One thing that a history shows."""

    kind: str  # overfitting, underfitting, divergence, repetition, warmup or length
    finding: str  # what is seen, with its figures
    remedy: str  # what to change

    def __str__(self) -> str:
        return f"{self.kind}: {self.finding}; {self.remedy}"


def advise(
    history: History, ends_with_best: bool = False, training: TrainingConfig | None = None
) -> list[Advice]:
    """Apply all rules to a history of a run, and return the most urgent advice first.

    `ends_with_best` says that the run ended with the weights of its best validation.
    """
    best = best_eval(history) if ends_with_best else None
    kept = [r for r in history if best is None or r["step"] <= best[0]]
    surer = [*diverged(history), *overfitted(history, ends_with_best), *repeats_itself(kept)]
    # Underfitting's remedies are the opposite of the others'.
    advice = surer or [*underfitted(history)] or [*unfinished(history)]
    return [*advice, *(cut_short(history, training) if training and history else ())]


def cut_short(history: History, training: TrainingConfig) -> Iterator[Advice]:
    """The warmup took the whole run, or it was less than a pass."""
    step, epoch = history[-1]["step"], history[-1].get("epoch", 1.0)
    warmup = training.warmup_steps or 0
    if 1 < step <= warmup:
        reached = f"{training.peak * step / warmup:.2g} of {training.peak:.2g}"
        finding = f"the warmup of {warmup:,} steps was not over at step {step:,}, the last one"
        finding += f", and the learning rate reached {reached}"
        remedy = "train longer, or leave training.warmup_steps out, for a tenth of the run"
        yield Advice("warmup", finding, remedy)
    if epoch < 1 and training.max_steps is None:
        remedy = "set training.num_train_epochs=3"
        yield Advice("length", f"only {epoch:.0%} of the rows were trained on", remedy)


def diverged(history: History) -> Iterator[Advice]:
    """The loss of the last fifth is EXPLODED times that of the best fifth, or not finite."""
    fifths = _fifths(history)
    if skipped := sum("skipped" in record for record in history):
        finding = f"steps skipped because their loss or gradient was not finite: {skipped}"
        remedy = "look at the rows named in metrics.jsonl, or lower training.learning_rate"
        yield Advice("divergence", finding, remedy)
    elif fifths and fifths[-1] > EXPLODED * min(fifths):
        finding = f"the loss rose from {min(fifths):.3f} at its best to {fifths[-1]:.3f} at the end"
        remedy = "lower training.learning_rate (to a third), or raise training.warmup_steps"
        yield Advice("divergence", finding, remedy)


def overfitted(history: History, ends_with_best: bool) -> Iterator[Advice]:
    """The validation loss ends RISE above its best, while the training loss keeps falling."""
    evals = [(r["step"], r["eval_loss"]) for r in _validations(history)]
    if len(evals) < 3:
        return
    best_step, best = min(evals, key=lambda item: item[1])
    last_step, last = evals[-1]
    before = [r["loss"] for r in history if "loss" in r and r["step"] <= best_step]
    after = [r["loss"] for r in history if "loss" in r and r["step"] > best_step]
    if last <= max(best * (1 + RISE), best + LEAST_RISE) or not before or not after:
        return
    if statistics.mean(after[-FEWEST:]) >= statistics.mean(before[-FEWEST:]):
        return
    remedy = "raise lora.lora_dropout, lower lora.r, or add data"
    if ends_with_best:
        remedy = f"the weights of step {best_step} are kept; for better ones {remedy}"
    else:
        at_best = f"end with step {best_step} (checkpointing.load_best_model_at_end=true)"
        remedy = f"{at_best}, train for fewer steps, {remedy}"
    finding = (
        f"the validation loss was best at step {best_step} ({best:.3f}) and is {last:.3f} at step "
        f"{last_step}, while the training loss kept falling"
    )
    yield Advice("overfitting", finding, remedy)


def underfitted(history: History) -> Iterator[Advice]:
    """The training loss of the last fifth is less than LITTLE below that of the first."""
    fifths = _fifths(history)
    if not fifths or not fifths[0] * (1 - LITTLE) <= fifths[-1] <= EXPLODED * fifths[0]:
        return
    finding = f"the loss barely fell, from {fifths[0]:.3f} to {fifths[-1]:.3f}"
    remedy = (
        "raise training.learning_rate (to three times), train for more steps, or raise lora.r; and "
        "look at the data with `mlx-qlora inspect`"
    )
    if (epoch := max(record.get("epoch", 1.0) for record in history)) < 1:
        seen = f"as the run has seen {epoch:.0%} of the rows"
        remedy = f"train for a whole pass first (training.num_train_epochs=1), {seen}"
    yield Advice("underfitting", finding, remedy)


def unfinished(history: History) -> Iterator[Advice]:
    """The validation loss falls on, and fell by FALLS in the second half."""
    if not _falls_on(history):
        return
    _, (step, middle), (last_step, last) = _halves(history)
    if middle - last > FALLS * middle:
        finding = f"the validation loss was still falling, from {middle:.3f} at step {step} to "
        finding += f"{last:.3f} at step {last_step}, the last one"
        remedy = "train for more steps, or raise training.learning_rate (to three times)"
        yield Advice("length", finding, remedy)


def _falls_on(history: History) -> bool:
    """Whether STEEP of the validation loss's fall, which has not ended, is in the second half."""
    losses = [loss for _, loss in _halves(history)]
    return bool(losses) and losses[1] - losses[2] > STEEP * (losses[0] - losses[2])


def _halves(history: History) -> list[tuple[int, float]]:
    """Step and loss of the first, middle and last validation, where the last is the best of 3."""
    evals = [(record["step"], record["eval_loss"]) for record in _validations(history)]
    if len(evals) < 3 or evals[-1][1] > min(loss for _, loss in evals):
        return []
    middle = min(evals, key=lambda each: (abs(2 * each[0] - evals[-1][0]), -each[0]))
    return [evals[0], middle, evals[-1]]


def repeats_itself(history: History) -> Iterator[Advice]:
    """The model's first choices repeat the one before STUTTER more often than the references."""
    validations = [r for r in _validations(history) if "eval_repetition" in r]
    for last in validations[-1:]:
        ours, theirs = last["eval_repetition"], last["eval_reference_repetition"]
        # Where it repeated itself more at the first validation, training is not the cause; nor was
        # it trained for too long while it still learns.
        rose = ours >= validations[0]["eval_repetition"] and not _falls_on(history)
        if ours > theirs + STUTTER and rose:
            finding = f"{ours:.0%} of the model's first choices repeat the token before them, "
            finding += f"where the references have {theirs:.0%}"
            remedy = "train for fewer steps, lower training.learning_rate, and look for rows that "
            remedy += "repeat themselves; when generating, raise generation.repetition_penalty"
            yield Advice("repetition", finding, remedy)


def _validations(history: History) -> History:
    """Those with a finite loss: of a model that computes NaN, nothing else is said either."""
    return [r for r in history if "eval_loss" in r and math.isfinite(r["eval_loss"])]


def _fifths(history: History) -> list[float]:
    """The mean training loss of each fifth of a run; empty where the run was too short."""
    losses = [r["loss"] for r in history if "loss" in r and math.isfinite(r["loss"])]
    n = len(losses)
    if n < FEWEST or history[-1]["step"] < SHORT:
        return []
    return [statistics.mean(losses[i * n // 5 : (i + 1) * n // 5]) for i in range(5)]


# ---- questions -----------------------------------------------------------------------------------


class Answer(NamedTuple):
    """One question about a run, and what the figures say."""

    question: str
    verdict: str
    why: str  # the figures behind it
    tone: str = ""  # good, bad, note, or nothing where there is nothing to judge


def learned(
    history: History,
    scores: Mapping[str, Scores],
    advice: Sequence[Advice],
    samples: Sequence[Mapping[str, str]] = (),
    loss: Row | None = None,
) -> Answer:
    """Whether `history`, which ends with the step whose weights the adapter has, shows learning.

    By the held-out rows if they were scored, else by validation, else by training. It takes two
    things: a held-out `loss` that fell by more than chance moves it, and answers nearer to the
    references.
    """
    question = "Did it learn?"
    for item in advice:
        if item.kind == "divergence":
            return Answer(question, "Training was unstable", _sentence(item.finding), "bad")
    if (answer := preferred(history)) is not None:
        return answer
    name, first, last, where = _evidence(history, scores)
    if not (math.isfinite(first) and math.isfinite(last) and first > 0):
        return Answer(question, "Not known", "Too few figures were recorded to compare.", "note")
    change = (last - first) / first
    is_before = {"before", "after"} <= scores.keys()
    why = f"{name}: {first:.4f} → {last:.4f} ({change:+.1%}), {where}."
    why += " Before the training it was not measured." * (not is_before)
    if change > LITTLE:
        return Answer(question, "No, it got worse", why, "bad")
    if change > -LITTLE:
        return Answer(question, "Barely", why, "note")
    # Not 100 %, which would say that nothing is left to learn.
    fell = f"the loss fell by {min(-change, 0.99):.0%}"
    if not is_before:
        return Answer(question, f"Perhaps: {fell} {where}", why, "note")
    if loss is not None and loss.verdict != "better":
        few = f"with {(n := loss.base.n)} rows that may be chance"
        few += f"; an interval needs {FEWEST_ROWS} or more" * (n < FEWEST_ROWS)
        return Answer(question, f"Perhaps: {fell}", f"{why} {_sentence(few)}", "note")
    if loss is None or not samples:
        verdict = f"By the loss, yes: it fell by {min(-change, 0.99):.0%}"
        return Answer(question, verdict, f"{why} No answers were compared.", "note")
    before, after = (
        statistics.fmean(style_similarity(sample[key], sample["reference"]) for sample in samples)
        for key in ("before", "after")
    )
    n = f"{len(samples)} sampled answers" if len(samples) > 1 else "the sampled answer"
    why += f" Likeness in letters of {n} to the references: {before:.0%} → {after:.0%}."
    if after < before + LITTLE_NEARER:
        if before > NEAR:
            return Answer(question, f"In part: {fell}, the answers were near before", why, "note")
        why += " More steps, or more rows, may bring them nearer."
        return Answer(question, f"In part: {fell}, the answers are no nearer", why, "note")
    for item in advice if after < FAR else ():
        if item.kind in ("underfitting", "length"):
            why += f" {_sentence(item.finding)} {_sentence(item.remedy)}"
            nearer = "the answers are nearer, and far from the references yet"
            return Answer(question, f"In part: {fell}, {nearer}", why, "note")
    if not any(sample["after"].strip() == sample["reference"].strip() for sample in samples):
        nearer = f"Yes, in form: {fell}, the answers are nearer, none is the reference"
        return Answer(question, nearer, f"{why} Check the facts in them.", "good")
    return Answer(question, f"Yes: {fell}, the answers are nearer", why, "good")


def preferred(history: History) -> Answer | None:
    """Judge by the rewards of chosen and rejected answers; None for a run that compared none."""
    margins = [r for r in history if "eval_rewards/margins" in r]
    prefix, where = ("eval_", "held-out") if margins else ("", "training")
    margins = margins or [r for r in history if "rewards/margins" in r]
    if not margins:
        return None
    first, last = (record[f"{prefix}rewards/margins"] for record in (margins[0], margins[-1]))
    share = margins[-1].get(f"{prefix}rewards/accuracies")
    why = f"Reward of chosen answers above that of rejected ones, on {where} rows: {first:.3f} "
    why += f"(step {margins[0]['step']:,}) → {last:.3f}."
    if share is not None:
        why += f" It is higher in {share:.0%} of the pairs."
    if last > 0 and (share is None or share > PREFERS):
        if len(margins) > 1 and 0 < last <= first * (1 + LITTLE):
            verdict = "It preferred the chosen answers from the first figure on"
            return Answer("Did it learn?", verdict, why, "note")
        return Answer("Did it learn?", "Yes: it prefers the chosen answers", why, "good")
    return Answer("Did it learn?", "No preference shown", why, "note")


def _evidence(history: History, scores: Mapping[str, Scores]) -> tuple[str, float, float, str]:
    """The name of the best loss there is, its first and last value, and what they are of."""
    if {"before", "after"} <= scores.keys():
        before, after = scores["before"], scores["after"]
        where = f"on {after.n_tokens:,} tokens held out of training, before and after; perplexity "
        where += f"{before.perplexity:.4g} → {after.perplexity:.4g}"
        return "Loss on held-out rows", before.loss, after.loss, where
    for key, name in (("eval_loss", "Validation loss"), ("loss", "Training loss")):
        losses = [(r["step"], r[key]) for r in history if key in r]
        if len(losses) > 1:
            (start, first), (end, last) = losses[0], losses[-1]
            return name, first, last, f"from step {start:,} to step {end:,}"
    return "Training loss", math.nan, math.nan, ""


def overfitting(history: History, best_step: int | None, advice: Sequence[Advice]) -> Answer:
    """What `advise` finds, and how far the last validation is above the best."""
    question = "Is it overfitting?"
    for item in advice:
        if item.kind == "overfitting":
            verdict = f"Yes, since step {best_step:,}" if best_step else "Yes"
            return Answer(question, verdict, _sentence(item.finding), "bad")
    evals = _validations(history)
    if not evals:
        why = "There were no validation rows; set data.validation_path, or a share in data.split."
        return Answer(question, "Not known", why, "note")
    last, best = evals[-1]["eval_loss"], min(evals, key=lambda record: record["eval_loss"])
    losses = [(r["step"], r["loss"]) for r in history if "loss" in r]
    (before, _), (step, loss) = [(0, 0.0), *losses][-2:] if losses else [(0, 0.0)] * 2
    of = f" (mean of {step - before} steps)" * (step - before > 1)
    training = f" Training loss {loss:.4f}{of}." * bool(losses)
    if len(evals) < 3:
        many = "1 validation" if len(evals) == 1 else f"{len(evals)} validations"
        why = f"Only {many}; lower checkpointing.eval_steps. Validation loss {last:.4f}.{training}"
        return Answer(question, "Too early to tell", why, "note")
    above = last / best["eval_loss"] - 1
    why = f"Validation loss ended at its best, {last:.4f}.{training}"
    if above >= 0.001:
        at_best = f"{above:.1%} above its best (step {best['step']:,})"
        why = f"Validation loss ends at {last:.4f}, {at_best}.{training}"
    return Answer(question, "No sign of it", why, "good")


def forgot(general: Forgetting, kl: Row) -> Answer:
    """How much of general text was forgotten, and how far the answers are from the base's."""
    _, _, estimate, ends, _ = kl.cells()
    answers = ", ".join(filter(None, (f"on the held-out answers KL is {estimate}", ends)))
    why, tone = f"{_sentence(general.figures)} {_sentence(answers)}", "good"
    if not general.verdict.startswith("little was"):
        why += " A lower rate, fewer steps or a higher training.kl_weight keep more."
        tone = "bad" if general.verdict.startswith("much") else "note"
    return Answer("What did it forget?", _sentence(general.verdict)[:-1], why, tone)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
