"""What a run shows of itself: table, page and notebook while it goes on, the report at its end."""

import math
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_qlora import device, progress
from mlx_qlora.adapters.peft import note_on_mlx_lm
from mlx_qlora.adapters.several import untrained
from mlx_qlora.after.advice import advise
from mlx_qlora.after.answer_metrics import LOWER, paired_row, questions
from mlx_qlora.after.evaluation import kl_row, measure
from mlx_qlora.after.forgetting import forgetting
from mlx_qlora.after.plots import in_kernel, render
from mlx_qlora.after.report import Report, next_commands, write_report
from mlx_qlora.after.screen import HEAD, LABEL, drawn, folded, shown, table_row
from mlx_qlora.before.plan import FORWARD, Plan
from mlx_qlora.data.chats import MARK
from mlx_qlora.data.rows import system_message
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.distributed import processes
from mlx_qlora.errors import duration, say, visible
from mlx_qlora.folders import write_whole
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.infer.generate import Prompt
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.run import Inputs
from mlx_qlora.train.checkpoint import last_checkpoint
from mlx_qlora.train.loop import TrainResult
from mlx_qlora.train.preferences import good_answers
from mlx_qlora.train.signals import Interrupted

PAGE_EVERY = 5.0  # seconds between two versions of the page
CELL_EVERY = 1.0  # and of a notebook's cell, which shows each step of a slow run
ANSWERED = 0.5  # of the time in which a row is scored: a token of all answers
ROWS = 12  # of the table in a notebook
N_QUESTIONS = 3  # held-out rows that are answered before and after
CANDIDATES = 20  # held-out rows, of which some are answered, and one's prompt is in a command
MOST_TOKENS = 1536  # of a row that is answered; longer ones take too long to read


class Observer:
    """Shows a run while it goes on, by following its history, and writes the report.

    The base is frozen, so that what the model said and scored before its training is found after
    it, without the adapter. The first process asks and writes; the held-out rows are scored by all.
    A run in Python answers none of them, and does not ask what was forgotten.
    """

    def __init__(
        self, model: LlamaForCausalLM, inputs: Inputs, console: Console, plan: Plan | None
    ) -> None:
        self.model, self.inputs, self.console, self.plan = model, inputs, console, plan
        self.processes = processes()
        held_out = inputs.test or inputs.validation
        self.held_out = good_answers(held_out) if held_out else None
        self.in_python = inputs.checkpoint is None  # and the model was there already
        rows = [] if self.in_python else (self.held_out or ())[:CANDIDATES]
        rows = [row for row in rows if len(row) <= MOST_TOKENS]
        self.questions = questions(rows, inputs.tokenizer)[:N_QUESTIONS]
        # Beyond twice the longest reference an answer is wrong however it ends.
        longest = max((question.tokens for question in self.questions), default=0)
        self.limit = min(inputs.config.generation.max_new_tokens, 2 * longest + 16)
        self.untrained = untrained(model)

        self.history = inputs.state.log_history  # grows while the run goes on
        self.task: progress.Task | None = None  # the training, once it has begun
        self.first_step, self.next_page = inputs.state.step, 0.0
        self.n_read, self.has_head, self.last_eval = 0, False, math.nan  # of the history
        self.cell: Any = None  # of a notebook
        self.next_cell = 0.0
        self.at, self.began = "", 0.0  # the step, in words; when the watching did

    # ---- while it trains -------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show what is trained within, in the first process."""
        self.began = progress.now()
        with shown(self.console) as screen:
            screen.follower = self.follow if self.processes.is_first else screen.follower
            try:
                yield
            finally:
                screen.tick()
                screen.follower = lambda: None
                screen.clear()  # waits for what its thread may be showing

    def ended(self, _: object, error: BaseException | None, __: object) -> None:
        """Leave no page that loads itself again where the run has ended without its report."""
        with suppress(Exception):  # the run's own error is the one to see
            if error is not None and self.task is not None:
                output, why = self.inputs.output, str(error)
                (output / "report.html").unlink(missing_ok=True)  # which makes room on a full disk
                scored = self.task.done >= self.task.total and isinstance(error, KeyboardInterrupt)
                if not scored and not isinstance(error, Interrupted):
                    why = f"stopped. {last_checkpoint(output, 'is the last checkpoint')}"
                self._write_page(f"{self.at}: {why}", reloads=False)

    def follow(self) -> None:
        """Look once at what is new, and show it."""
        if self.task is None:
            task = progress.latest.get("training")
            if task is None or task.began < self.began:
                return
            self.task, task.beyond = task, self.beyond
        new = self.history[self.n_read :]
        self.n_read += len(new)
        for record in new if self.console.is_terminal else ():
            if record["step"] > self.first_step and {"loss", "eval_loss"} & record.keys():
                if not self.has_head:
                    say(self.console, HEAD)
                    self.has_head = True
                say(self.console, drawn(table_row(record, self.last_eval), self.console))
            self.last_eval = record.get("eval_loss", self.last_eval)
        self.at = status = f"Step {self.task.done:,.0f} of {self.task.total:,.0f}"
        if (left := self.task.seconds_left) == left and self.task.done < self.task.total:
            status += f", about {duration(left)} to go"
        if in_kernel() and (new or progress.now() >= self.next_cell):
            self._show_cell(", ".join([status, *self.task.figures]))
        if progress.now() >= self.next_page and progress.tasks():
            self._write_page(status, reloads=True)

    def beyond(self) -> float:
        """Seconds of what is left besides the steps: validations, and the report's scores."""
        assert self.task is not None
        config, validation = self.inputs.config, self.inputs.validation
        in_step = config.training.rows * config.training.accumulation * self.processes.size
        row = FORWARD * self.task.pace / in_step
        times = [r["eval_runtime"] for r in self.history if "eval_runtime" in r]
        left = 0.0
        if validation:
            if times:
                row = statistics.fmean(times) / len(validation)
            every = int(config.checkpointing.eval_steps)
            total, done = self.task.total, self.task.done
            n_left = math.ceil(total / every) - done // every if done < total else 0
            left = n_left * row * len(validation)
        inner = [task.seconds_left for task in progress.tasks() if task is not self.task]
        left += math.fsum(seconds for seconds in inner if seconds == seconds)
        answers = ANSWERED * self.limit if self.questions else 0
        # Before and after, and without the training once more, to tell how far apart both are.
        return left + row * (3 * len(self.held_out or ()) + 2 * answers)

    def _so_far(self, status: str, reloads: bool) -> Report:
        assert self.task is not None
        records = [*self.history]
        names = "peak_memory_bytes", "process_memory_bytes"
        mlx, process = (max((r.get(name, 0) for r in records), default=0) for name in names)
        seconds = progress.now() - self.task.began
        steps, output = int(self.task.done), self.inputs.output
        result = TrainResult(output, steps, math.nan, None, records, seconds, 0.0, mlx, process)
        about = self.inputs.reports, self.inputs.sizes, self.plan
        return Report(result, self.inputs.config, (), *about, status=status, reloads=reloads)

    def _write_page(self, status: str, reloads: bool) -> None:
        self.next_page, output = progress.now() + PAGE_EVERY, self.inputs.output
        written = f"written {datetime.now():%Y-%m-%d %H:%M:%S}"
        page = self._so_far(f"{status} ({written})", reloads).page()
        with suppress(OSError):  # the run itself says what is wrong with its folder
            if output.is_dir():
                write_whole(output / "report.html", page)

    def _show_cell(self, status: str) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        self.next_cell = progress.now() + CELL_EVERY
        report = self._so_far(status, reloads=False)
        heads, rows, _ = report.history_table()
        table = (heads, rows[-ROWS:]) if rows else None
        html = render("cell.html", report=report, plots=report.plots[:1], table=table, note=status)
        if self.cell is None:
            self.cell = display(HTML(html), display_id=True)
        else:
            self.cell.update(HTML(html))

    # ---- afterwards ------------------------------------------------------------------------------

    def after(self, result: TrainResult) -> None:
        """Answer and score with the adapter and without its training, and write the report."""
        config, console, tokenizer = self.inputs.config, self.console, self.inputs.tokenizer
        ends_with_best = config.checkpointing.load_best_model_at_end
        if self.processes.is_first:
            for advice in advise(result.log_history, ends_with_best, config.training):
                say(console, f"advice    {advice}")
            if self.held_out:
                answers = " and answers" * bool(self.questions)
                when = "before and after training; Ctrl-C leaves it for later"
                say(console, f"scoring   held-out rows{answers}, {when}")
        asked = self.questions if self.processes.is_first else []
        before = after = None
        if rows := self.held_out:
            of = self.model, tokenizer, rows, asked, self.limit
            with shown(console), self.untrained():
                before = measure(*of)
            with shown(console):
                after = measure(*of, self.untrained)
        if not self.processes.is_first:
            return
        loss, samples, kl, general = None, [], None, None
        if before and after:
            nats = [before.scores.nats, after.scores.nats]
            loss = paired_row("loss", LOWER, nats, after.scores.tokens)
            samples = [
                {"prompt": row.prompt, "reference": row.reference, "before": old, "after": new}
                for row, old, new in zip(self.questions, before.answers, after.answers)
            ]
            if not self.in_python:
                went_on = config.model.adapter is not None
                with shown(console):
                    on = "the built-in texts" + ", since the adapter it began with," * went_on
                    how: Any = {"source": on, "base": self.untrained}
                    general = forgetting(self.model, self.inputs.tokenizer, **how)
            kl = kl_row(after.scores)
            old, new = Scores.of(before.scores), Scores.of(after.scores)
            result.test_scores = {"before": old, "after": new}
            name, change = "test" if self.inputs.test else "held out", new.loss / old.loss - 1
            good = {"sft": "", "kto": " of good answers"}
            of = good.get(config.training.objective, " of chosen answers")
            of += " (unweighted)" * any(row.weights is not None for row in self.held_out or ())
            say(
                console,
                f"{name:<{LABEL}}loss{of} {old.loss:.4f} -> {new.loss:.4f} ({change:+.1%}), "
                f"perplexity {old.perplexity:.2f} -> {new.perplexity:.2f}, token accuracy "
                f"{old.token_accuracy:.1%} -> {new.token_accuracy:.1%} ({new.n_tokens:,} tokens)",
            )
        # Scores and answers included, and what was trained in earlier processes.
        peaks = {"peak_memory_bytes": mx.get_peak_memory()}
        peaks["process_memory_bytes"] = device.process_memory_bytes()
        for name, peak in peaks.items():
            earlier = (record.get(name, 0) for record in result.log_history)
            setattr(result, name, max([peak, *earlier]))
        about = self.inputs.reports, self.inputs.sizes, self.plan, loss
        prompt, ask = self._own_prompt()
        more: Any = {"mlx_lm": note_on_mlx_lm(self.model), "forgetting": general, "kl": kl}
        more |= {"ask": ask, "text": prompt if self.in_python else ""}
        report = Report(result, config, samples, *about, **more)
        say(console, f"report    {write_report(report)}")
        self.task = None  # the page stays as it is, whatever comes
        label, width = "next", console.width - LABEL if console.is_terminal else 10**6
        commands = next_commands(report, tokenizer.chat_template is not None)
        for line in report.calls or [folded(words, width, LABEL) for words in commands]:
            # As it is: a line break within a prompt would be another prompt.
            line = visible(f"{label:<{LABEL}}{line}")
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            label = ""

    def _own_prompt(self) -> tuple[Prompt, list[str]]:
        """A prompt of the user's, short and best of one line, and `generate`'s flags for it."""
        tokenizer, system = self.inputs.tokenizer, self.inputs.config.data.system
        rows = (self.held_out or self.inputs.train)[:CANDIDATES]
        prompts = [question.prompt for question in questions(rows, tokenizer)] or ["Hello"]
        asks = [(prompt_flags(prompt, tokenizer, system), prompt) for prompt in prompts]
        ask, prompt = min(asks, key=lambda ask: (any("\n" in x for x in ask[0]), len(str(ask[0]))))
        if ask[0] == "--prompt" and tokenizer.chat_template is not None:
            return [*system_message(system), {"role": "user", "content": ask[1]}], ask
        return prompt, ask


# ---- a prompt on the command line ----------------------------------------------------------------

ALPACA = re.compile(
    r"### Instruction:\n(.*?)\n\n(?:### Input:\n(.*?)\n\n)?### Response:\n", re.DOTALL
)


def prompt_flags(prompt: str, tokenizer: Tokenizer, system: str | None = None) -> list[str]:
    """`generate`'s flags for a row up to its answer; it begins with `system` by itself."""
    bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
    text = prompt.removeprefix(bos)  # which the model may want, the chat template write, or both
    if found := ALPACA.fullmatch(text):
        return ["--instruction", found[1], *(["--input", found[2]] if found[2] else [])]
    if tokenizer.chat_template is not None:
        messages = [*system_message(system), {"role": "user", "content": MARK}]
        start, _, end = tokenizer.render_chat(messages, add_generation_prompt=True).partition(MARK)
        start = start.removeprefix(bos)
        if text.startswith(start) and text.endswith(end):
            return ["--prompt", text[len(start) : len(text) - len(end)]]
    raw = [] if tokenizer.chat_template is None else ["--raw"]
    return [*raw, "--prompt", text if tokenizer.adds_bos else prompt]
