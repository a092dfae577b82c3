"""What a run's report shows besides its metrics: held-out rows before the training and after it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from mlx_qlora.after.advice import advise
from mlx_qlora.after.plots import PNG_HINT, can_draw_png, live_plots
from mlx_qlora.after.report import write_report
from mlx_qlora.after.samples import asked, questions, samples_of
from mlx_qlora.before.plan import Plan
from mlx_qlora.distributed import processes
from mlx_qlora.errors import say
from mlx_qlora.infer.evaluate import Scores, evaluate_distributed
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.run import Inputs
from mlx_qlora.train.loop import TrainResult


class Observer:
    """Looks at a model before and after its training, and writes the report.

    The first process asks and writes; the scores on the test rows are shared out over all.

    Args:
        n_questions: held-out rows to answer; 0 asks none.
        plan: the prediction, if one was made.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        inputs: Inputs,
        console: Console,
        n_questions: int,
        plan: Plan | None,
    ) -> None:
        self.model, self.inputs, self.console, self.plan = model, inputs, console, plan
        self.processes = processes()
        held_out = inputs.test or inputs.validation
        self.questions = questions(held_out, n_questions) if n_questions else []
        self.answers: list[str] = []
        self.score: Scores | None = None

    def before(self) -> None:
        """Answer the questions and score the test rows with the model as it begins."""
        n_test = len(self.inputs.test or ())
        if self.processes.is_first and (self.questions or n_test):
            scored = f", {n_test:,} are scored" if n_test else ""
            n_rows = len(self.questions)
            say(self.console, f"before    {n_rows} held-out rows are answered{scored}")
        self.answers, self.score = self._look()

    @contextmanager
    def live_plots(self) -> Iterator[None]:
        """Plots that grow in a notebook while the model trains."""
        if not self.processes.is_first:
            yield
            return
        warmup = self.inputs.config.training.warmup_steps
        with live_plots(self.inputs.output / "metrics.jsonl", warmup):
            yield

    def after(self, result: TrainResult) -> None:
        """Look again, and write the report with both answers and scores."""
        config = self.inputs.config
        ends_with_best = config.checkpointing.load_best_model_at_end
        if self.processes.is_first:
            for advice in advise(result.log_history, ends_with_best):
                say(self.console, f"advice    {advice}")
        answers, score = self._look()
        if not self.processes.is_first:
            return
        if self.score and score:
            result.test_scores = {"before": self.score, "after": score}
            self._say_scores(self.score, score)
        write_report(
            result,
            config,
            result.test_scores,
            samples_of(self.inputs.tokenizer, self.questions, self.answers, answers),
            data=self.inputs.reports,
            rows=self.inputs.sizes,
            plan=self.plan,
        )
        if not can_draw_png():
            say(self.console, f"report    {PNG_HINT}")

    def _look(self) -> tuple[list[str], Scores | None]:
        """The answers to the questions, in the first process, and the score on the test rows."""
        model, tokenizer, test = self.model, self.inputs.tokenizer, self.inputs.test
        most = self.inputs.config.generation.max_new_tokens
        first = self.processes.is_first
        answers = asked(model, tokenizer, self.questions, most) if first else []
        score = evaluate_distributed(model, tokenizer, test, self.processes) if test else None
        return answers, score

    def _say_scores(self, before: Scores, after: Scores) -> None:
        change = (after.loss - before.loss) / before.loss
        say(
            self.console,
            f"test      loss {before.loss:.4f} -> {after.loss:.4f} ({change:+.1%}), perplexity "
            f"{before.perplexity:.2f} -> {after.perplexity:.2f}, token accuracy "
            f"{before.token_accuracy:.1%} -> {after.token_accuracy:.1%} "
            f"({after.n_tokens:,} tokens)",
        )
