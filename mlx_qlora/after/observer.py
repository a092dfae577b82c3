"""What a run's report shows besides its metrics: held-out rows before the training and after it."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
from rich.console import Console

from mlx_qlora.after.advice import CUT, advise
from mlx_qlora.after.plots import PNG_HINT, can_draw_png, live_plots
from mlx_qlora.after.report import Report, write_report
from mlx_qlora.before.plan import Plan
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.distributed import processes
from mlx_qlora.errors import say
from mlx_qlora.infer.evaluate import Scores, evaluate_distributed
from mlx_qlora.infer.tokens import GenerationConfig, generate_tokens
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.run import Inputs
from mlx_qlora.train.loop import TrainResult


class Observer:
    """Looks at a model before and after its training, and writes the report.

    The first process asks and writes; the scores on the test rows are shared out over all.
    `n_questions` held-out rows are answered, 0 asks none.
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

    def live_plots(self) -> AbstractContextManager[None]:
        """Plots that grow in a notebook while the model trains."""
        if not self.processes.is_first:
            return nullcontext()
        warmup = self.inputs.config.training.warmup_steps
        return live_plots(self.inputs.output / "metrics.jsonl", warmup)

    def after(self, result: TrainResult) -> None:
        """Look again, and write the report with both answers and scores."""
        config = self.inputs.config
        ends_with_best = config.checkpointing.load_best_model_at_end
        if self.processes.is_first:
            for advice in advise(result.log_history, ends_with_best):
                say(self.console, f"advice    {advice}")
        before = self.score
        answers, after = self._look()
        if not self.processes.is_first:
            return
        if before and after:
            result.test_scores = {"before": before, "after": after}
            change = (after.loss - before.loss) / before.loss
            say(
                self.console,
                f"test      loss {before.loss:.4f} -> {after.loss:.4f} ({change:+.1%}), perplexity "
                f"{before.perplexity:.2f} -> {after.perplexity:.2f}, token accuracy "
                f"{before.token_accuracy:.1%} -> {after.token_accuracy:.1%} "
                f"({after.n_tokens:,} tokens)",
            )
        decode, end_ids = self.inputs.tokenizer.decode, self.inputs.tokenizer.eos_ids
        samples = [
            {
                "prompt": decode(row.prompt),
                "reference": decode(i for i in row.reference if i not in end_ids),
                "before": old,
                "after": new,
            }
            for row, old, new in zip(self.questions, self.answers, answers)
        ]
        rows, plan = self.inputs.sizes, self.plan
        write_report(Report(result, config, samples, self.inputs.reports, rows, plan))
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


# ---- held-out rows -------------------------------------------------------------------------------

MOST_NEW = 128  # tokens of an answer
MOST_PROMPT = 1024  # tokens; longer ones take too long to read
SECONDS = 4.0  # for one answer; a cut one ends in CUT


class Question(NamedTuple):
    """A held-out row: the ids before its first learned token, and its first learned stretch."""

    prompt: list[int]
    reference: list[int]


def questions(held_out: Examples | None, most: int = 3) -> list[Question]:
    """The first rows that have a prompt of a fit length; none if nothing is held out."""
    chosen: list[Question] = []
    for example in held_out or ():
        learned = np.append(example.learned, False)
        start = int(learned.argmax())
        end = start + int((~learned[start:]).argmax())
        # With data.train_on=all a row begins with what is learned: nothing there asks.
        if 2 <= start <= MOST_PROMPT and learned[start]:
            tokens = example.tokens.tolist()
            chosen.append(Question(tokens[:start], tokens[start:end]))
        if len(chosen) == most:
            break
    return chosen


def asked(
    model: LlamaForCausalLM, tokenizer: Tokenizer, rows: list[Question], max_new_tokens: int
) -> list[str]:
    """The model's greedy answers, at most MOST_NEW tokens and about SECONDS each."""
    most = min(max_new_tokens, MOST_NEW)
    greedy = GenerationConfig(temperature=0.0, repetition_penalty=1.0, max_new_tokens=most)
    answers = []
    for row in rows:
        ids, ended, until = [], False, time.monotonic() + SECONDS
        for token in generate_tokens(model, row.prompt, greedy):
            if token in tokenizer.eos_ids:
                ended = True
                break
            ids.append(token)
            if time.monotonic() > until:
                break
        answers.append(tokenizer.decode(ids) + ("" if ended else CUT))
    return answers
