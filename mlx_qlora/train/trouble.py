"""Steps that are not like the others: what is said of them, and what is kept."""

import statistics

from rich.console import Console

from mlx_qlora.console import warn
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.metrics import Metrics
from mlx_qlora.train.outcome import Outcome, StepError

# A step's loss this many times above the median of the last ones, and this far above their usual
# spread, is called a spike.
SPIKE, SPREADS, REMEMBERED = 1.5, 8.0, 20


def note_skipped(
    state: RunState, outcome: Outcome, epoch: float, most: int, metrics: Metrics, console: Console
) -> None:
    """Keeps which rows made a step that moved nothing.

    Args:
        state: of the run; the step is counted there.
        outcome: of the step.
        epoch: where in the data it was.
        most: `max_skipped_steps`: so many in a row end the run.
        metrics: where it is recorded.
        console: where it is said.

    Raises:
        StepError: there were so many.
    """
    state.skipped_in_a_row += 1
    what = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}"
    rows = list(outcome.suspects)
    record = {"step": state.step, "epoch": round(epoch, 4), "skipped": what, "rows": rows}
    state.log_history.append(metrics.event(record))
    shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    warn(console, f"step {state.step}: {what}: skipped. Rows: {shown}")
    if state.skipped_in_a_row >= most:
        raise StepError(
            f"step {state.step}: {what}: {state.skipped_in_a_row} steps in a row have moved "
            "nothing (training.max_skipped_steps); lower training.learning_rate, or look at "
            f"these rows: {shown}",
            again=False,
        )


def note_loss(
    state: RunState, outcome: Outcome, epoch: float, metrics: Metrics, console: Console
) -> None:
    """Remembers a step's loss, and says so where it is far above the last ones."""
    state.skipped_in_a_row, recent = 0, state.recent_losses
    state.recent_losses = [*recent, outcome.loss][-REMEMBERED:]
    if len(recent) < REMEMBERED // 2:
        return
    usual = statistics.median(recent)
    spread = statistics.median(abs(loss - usual) for loss in recent)
    if outcome.loss > max(SPIKE * usual, usual + SPREADS * spread):
        record = {"step": state.step, "epoch": round(epoch, 4), "spike": outcome.loss}
        state.log_history.append(metrics.event({**record, "usual": usual}))
        warn(
            console,
            f"step {state.step}: loss {outcome.loss:.3f}, where {usual:.3f} was usual; if this "
            "happens often, lower training.learning_rate",
        )
