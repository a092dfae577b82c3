"""What is said of a run's history: of typical ones, and of ones made to a shape."""

import dataclasses
import math
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_folder import write_model
from support.training import fine_tune

from mlx_qlora.after.advice import advise, learned
from mlx_qlora.config import SECTIONS
from mlx_qlora.train.config import TrainingConfig

History = list[dict[str, Any]]


def history(losses: list[float], evals: list[float] | None = None, every: int = 10) -> History:
    """Logged every `every` steps, and validated at even distances up to the last one."""
    records = [
        {"step": every * i, "epoch": 0.1 * i, "loss": loss, "grad_norm": 1.0}
        for i, loss in enumerate(losses, 1)
    ]
    last = every * len(losses)
    for i, loss in enumerate(evals or [], 1):
        records.append(validation(last * i // len(evals or []), loss))
    return sorted(records, key=lambda record: (record["step"], "eval_loss" in record))


def validation(step: int, loss: float, ours: float = 0.03, theirs: float = 0.02) -> dict[str, Any]:
    figures = {"eval_repetition": ours, "eval_reference_repetition": theirs}
    return {"step": step, "epoch": 0.0, "eval_loss": loss, **figures}


def skipped(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 0.0, "skipped": "loss nan, gradient norm nan", "rows": ["a:1"]}


def kinds(found: History) -> list[str]:
    return [advice.kind for advice in advise(found)]


# Each as such runs look: noisy, and with one trouble at most.
HEALTHY = history(
    [2.91, 2.30, 2.05, 1.93, 1.88, 1.79, 1.81, 1.72, 1.74, 1.69, 1.66, 1.68, 1.63, 1.65, 1.62],
    [1.95, 1.80, 1.74, 1.71, 1.70],
)
OVERFITTED = history(
    [2.62, 2.11, 1.84, 1.60, 1.31, 1.10, 0.86, 0.67, 0.48, 0.39, 0.27, 0.22, 0.17, 0.15, 0.14],
    [1.98, 1.87, 1.96, 2.21, 2.38],
)
UNDERFITTED = history(
    [2.91, 2.95, 2.89, 2.93, 2.88, 2.94, 2.90, 2.87, 2.92, 2.89, 2.91, 2.88, 2.93, 2.86, 2.90],
    [2.93, 2.92, 2.92, 2.91, 2.91],
)
DIVERGED = history(
    [2.91, 2.34, 2.10, 1.97, 1.90, 1.96, 2.41, 3.85, 5.62, 6.90, 7.43, 7.21, 7.60, 7.35, 7.48],
    [2.02, 1.93, 5.90, 7.30, 7.41],
)
REPEATING = [*HEALTHY[:-1], validation(150, 1.70, ours=0.41, theirs=0.02)]


@pytest.mark.parametrize(
    ("found", "kind", "finding", "remedies"),
    [
        (
            OVERFITTED,
            "overfitting",
            "the validation loss was best at step 60 (1.870) and is 2.380 at step 150",
            ["end with step 60", "checkpointing.load_best_model_at_end=true", "lora.lora_dropout"],
        ),
        (
            UNDERFITTED,
            "underfitting",
            "the loss barely fell, from 2.917 to 2.897",
            ["raise training.learning_rate", "lora.r", "`mlx-qlora inspect`"],
        ),
        (
            DIVERGED,
            "divergence",
            "the loss rose from 1.943 at its best to 7.477 at the end",
            ["lower training.learning_rate", "raise training.warmup_steps"],
        ),
        (
            REPEATING,
            "repetition",
            "41% of the model's first choices repeat the token before them, where the references "
            "have 2%",
            ["lower training.learning_rate", "generation.repetition_penalty"],
        ),
    ],
)
def test_each_trouble_is_named_with_its_figures_and_its_remedy(found, kind, finding, remedies):
    (advice,) = advise(found)
    assert advice.kind == kind
    assert advice.finding.startswith(finding)
    assert all(remedy in advice.remedy for remedy in remedies), advice.remedy
    assert str(advice) == f"{kind}: {advice.finding}; {advice.remedy}"


def test_a_run_of_less_than_a_pass_is_told_to_see_all_rows_first():
    (advice,) = advise([{**record, "epoch": 0.2} for record in UNDERFITTED])
    assert advice.remedy == (
        "train for a whole pass first (training.num_train_epochs=1), as the run has seen 20% of "
        "the rows"
    )


def test_skipped_steps_are_a_divergence_whose_rows_are_in_the_metrics():
    (advice,) = advise([*HEALTHY, skipped(50), skipped(51)])
    assert advice.kind == "divergence"
    assert advice.finding.endswith("was not finite: 2")
    assert "rows named in metrics.jsonl" in advice.remedy


def test_one_skipped_step_in_a_thousand_is_no_divergence():
    healthy = history([3.0 - 0.002 * i for i in range(1000)])
    assert not any("1 steps were" in str(advice) for advice in advise([*healthy, skipped(500)]))


FALL_AND_CLIMB = history([3.0, 2.4, 2.0, 1.6, 1.5, 1.4, 1.6, 2.2, 2.8, 3.1])
FLAT_WITH_A_SKIP = [*history([3.0, 2.99, 3.0, 2.99, 2.98, 3.0]), skipped(30)]
FLAT_AND_OVERFITTED = history([2.00, 2.00, 1.99, 1.99, 1.98, 1.97, 1.97, 1.96], [1.9, 1.95, 2.0])


@pytest.mark.parametrize("found", [FALL_AND_CLIMB, FLAT_WITH_A_SKIP, FLAT_AND_OVERFITTED])
def test_advice_does_not_contradict_itself(found):
    advice = " ".join(map(str, advise(found)))
    rate = "raise training.learning_rate" in advice and "lower training.learning_rate" in advice
    steps = "train for more steps" in advice and "train for fewer steps" in advice
    rank = "raise lora.r" in advice and "lower lora.r" in advice
    assert not (rate or steps or rank)


def test_a_run_that_ends_with_its_best_weights_is_not_told_to():
    (advice,) = advise(OVERFITTED, ends_with_best=True)
    assert advice.finding == advise(OVERFITTED)[0].finding
    assert advice.remedy.startswith("the weights of step 60 are kept; for better ones raise lora.")
    assert "load_best" not in advice.remedy and "fewer steps" not in advice.remedy
    stammers_later = [*OVERFITTED[:-1], validation(150, 2.38, ours=0.5)]
    assert kinds(stammers_later) == ["overfitting", "repetition"]
    assert [each.kind for each in advise(stammers_later, ends_with_best=True)] == ["overfitting"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_validation_that_is_no_number_is_neither_the_best_nor_the_last(wrong):
    falling = [2.0 - 0.1 * i for i in range(15)]
    assert kinds(history(falling, [wrong, 1.9, 1.8, 1.7])) == ["length"]
    assert kinds(history(falling, [wrong, 1.9, 1.7, 1.8])) == ["overfitting"]
    assert kinds(history(falling, [1.9, 1.7, 1.8, wrong])) == ["overfitting"]
    assert advise(history(falling, [1.9, 1.8, wrong, wrong])) == []
    assert advise([*HEALTHY, validation(151, wrong, ours=0.9)]) == []


def test_a_validation_loss_that_still_falls_at_the_end_asks_for_more_steps():
    falling = [2.9 - 0.05 * i for i in range(15)]
    (advice,) = advise(history(falling, [2.9, 2.8, 2.7, 2.6, 2.5, 2.4]))
    assert advice.kind == "length" and "2.700 at step 75 to 2.400 at step 150" in advice.finding
    assert advise(history(falling, [2.9, 2.6, 2.45, 2.41, 2.40, 2.4])) == []
    assert advise(history(falling, [2.9, 2.4])) == []  # of two nobody knows


def test_every_field_that_a_remedy_names_exists():
    unfinished = history([2.9 - 0.05 * i for i in range(15)], [2.9, 2.8, 2.7, 2.6])
    runs = OVERFITTED, UNDERFITTED, DIVERGED, REPEATING, [skipped(1)], unfinished
    told = [*map(advise, runs)]
    for (advice,) in told:
        named = re.findall(r"\b([a-z]+)\.([a-z_]+)", advice.remedy.replace("metrics.jsonl", ""))
        assert named, advice.remedy
        for section, field in named:
            assert field in {f.name for f in dataclasses.fields(SECTIONS[section])}


def test_a_healthy_run_is_told_nothing():
    assert advise(HEALTHY) == []
    assert advise([r for r in HEALTHY if "loss" in r]) == []  # no validation set


@pytest.mark.parametrize("found", [OVERFITTED, UNDERFITTED, DIVERGED])
def test_short_histories_are_told_nothing(found):
    losses = [record for record in found if "loss" in record]
    evals = [record for record in found if "eval_loss" in record]
    assert advise(losses[-4:]) == []
    assert advise(losses[:4] + evals[:2]) == []
    assert advise(evals) == []
    assert advise([]) == []


def test_losses_that_are_no_numbers_count_for_nothing():
    assert advise(history([math.nan, 3.0, math.inf, 2.0, 1.9, 1.8])) == []


def test_the_most_urgent_advice_comes_first():
    found = [*OVERFITTED[:-1], validation(150, 2.38, ours=0.5), skipped(3)]
    assert kinds(found) == ["divergence", "overfitting", "repetition"]


@pytest.mark.parametrize(("last", "said"), [(1.029, ["underfitting"]), (0.96, [])])
def test_a_loss_must_fall_by_three_hundredths(last, said):
    assert kinds(history([1.0 + (last - 1.0) * i / 9 for i in range(10)])) == said


@pytest.mark.parametrize(("last", "said"), [(2.03, []), (2.05, ["overfitting"])])
def test_a_validation_loss_may_rise_by_two_hundredths(last, said):
    falling = [2.0 - 0.1 * i for i in range(15)]
    assert kinds(history(falling, [2.4, 2.0, last])) == said
    assert kinds(history(falling, [0.2, 0.038, 0.062])) == [], "near 0 that is a word or two"


@pytest.mark.parametrize(("ours", "said"), [(0.3, []), (0.32, ["repetition"])])
def test_a_tenth_more_repetition_than_in_the_references_is_too_much(ours, said):
    assert kinds([*HEALTHY, validation(151, 1.69, ours=ours, theirs=0.21)]) == said


def test_repetition_that_the_training_made_less_is_not_its_fault():
    falling = [validation(10, 2.0, ours=0.9), *HEALTHY, validation(151, 1.69, ours=0.5)]
    assert kinds(falling) == []
    assert kinds([*falling[1:-1], falling[-1]]) == ["repetition"]


def test_a_model_that_still_learns_is_not_told_to_train_less():
    """One of random weights says the same word again and again, and its loss falls and falls."""
    evals = [(step, 11.9 - 0.02 * step) for step in (6, 12, 18, 24, 30)]
    history = [validation(step, loss, ours=0.97) for step, loss in evals]
    assert kinds(history) == []
    assert kinds([*history, validation(36, 11.5, ours=0.97)]) == ["repetition"]


def test_the_last_validation_decides_whether_a_model_repeats_itself():
    assert kinds([validation(10, 2.0, ours=0.9), *HEALTHY]) == []


# ---- made to a shape ---------------------------------------------------------------------------

unhurried = settings(deadline=None)
SHAPES = {
    "seed": st.integers(0, 10**6),
    "n": st.integers(10, 200),
    "start": st.floats(1.5, 8.0),
    "noise": st.floats(0.0, 0.01),
}


def curve(n: int, noise: float, seed: int, shape: Any) -> list[float]:
    """shape(t), t from 0 to 1, with a relative noise."""
    draw = random.Random(seed)
    return [shape(i / (n - 1)) * (1 + draw.uniform(-noise, noise)) for i in range(n)]


@unhurried
@given(fall=st.floats(0.1, 0.9), **SHAPES)
def test_runs_that_go_on_falling_are_healthy(seed, n, start, noise, fall):
    def shape(t: float) -> float:
        return start * (1 - fall * (1 - math.exp(-5 * t)))

    evals = curve(8, noise, seed + 1, lambda t: 1.1 * shape(0.1 + 0.9 * t))
    assert advise(history(curve(n, noise, seed, shape), evals)) == []


@unhurried
@given(fall=st.floats(0.3, 0.9), rise=st.floats(0.1, 1.0), **SHAPES)
def test_validation_that_turns_while_training_falls_is_overfitting(
    seed, n, start, noise, fall, rise
):
    losses = curve(n, noise, seed, lambda t: start * (1 - fall * t))
    evals = curve(9, noise, seed + 1, lambda t: start * (1 + rise * (2 * t - 1) ** 2))
    assert kinds(history(losses, evals)) == ["overfitting"]


@unhurried
@given(fall=st.floats(-0.3, 0.01), **SHAPES)
def test_runs_that_stay_where_they_are_are_underfitted(seed, n, start, noise, fall):
    assert kinds(history(curve(n, noise, seed, lambda t: start * (1 - fall * t)))) == [
        "underfitting"
    ]


@unhurried
@given(times=st.floats(3.0, 10.0), turn=st.floats(0.3, 0.7), **SHAPES)
def test_runs_that_climb_far_above_their_best_diverge(seed, n, start, noise, times, turn):
    def shape(t: float) -> float:
        return start if t < turn else start * times

    assert kinds(history(curve(n, noise, seed, shape))) == ["divergence"]


# ---- what was asked for ------------------------------------------------------------------------


def test_an_unfinished_warmup_and_less_than_a_pass_are_told():
    training = TrainingConfig(learning_rate=2e-4, num_train_epochs=0.35, warmup_steps=100)
    records = [{"step": 30, "epoch": 0.35, "loss": 2.0, "learning_rate": 6e-5}]
    warmup, length = advise(records, training=training)
    assert (warmup.kind, length.kind) == ("warmup", "length")
    assert "warmup of 100 steps was not over at step 30" in warmup.finding
    assert "reached 6e-05 of 0.0002" in warmup.finding
    assert "only 35% of the rows" in length.finding
    steps = TrainingConfig(max_steps=30, warmup_steps=3)  # as asked for
    assert advise(records, training=steps) == []
    one = TrainingConfig(max_steps=1, warmup_steps=1)  # a tenth of one step, rounded up
    assert advise([records[0] | {"step": 1, "epoch": 1.0}], training=one) == []


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [
        ([0.1, 0.3], "Yes: it prefers the chosen answers"),
        ([0.3], "Yes: it prefers the chosen answers"),
        ([-0.1, 0.2], "Yes: it prefers the chosen answers"),
        ([0.3, 0.3], "It preferred the chosen answers from the first figure on"),
        ([0.1, -0.1], "No preference shown"),
    ],
)
def test_a_preference_that_was_there_before_is_not_learned(margins, verdict):
    names = "eval_rewards/margins", "eval_rewards/accuracies"
    records = [{"step": i, **dict(zip(names, (m, 0.8)))} for i, m in enumerate(margins)]
    answer = learned(records, {}, [])
    assert answer.verdict == verdict


# ---- in a run ----------------------------------------------------------------------------------


def test_advice_is_printed_at_the_end_of_a_run(tmp_path):
    how = {"max_steps": 30, "learning_rate": 1e-9, "lora_dropout": 0.0, "logging_steps": 1}
    run = fine_tune(write_model(tmp_path / "model"), tmp_path / "out", **how)
    lines = run.printed.splitlines()
    (done,) = (i for i, line in enumerate(lines) if line.startswith("done "))
    (advice,) = (i for i, line in enumerate(lines) if line.startswith("advice "))
    assert done < advice
    assert lines[advice].startswith("advice    underfitting: the loss barely fell, from ")
