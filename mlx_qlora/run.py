"""One run, from a config to a folder of results.

`fine_tune` is what a notebook calls; `run` is what the command line calls, and loads the model
and the data first.
"""

import dataclasses
from pathlib import Path

from rich.console import Console

from mlx_qlora import backend
from mlx_qlora.adapters.card import model_card, read_facts
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.peft import save_adapter
from mlx_qlora.config import RunConfig
from mlx_qlora.console import say, warn
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError
from mlx_qlora.infer.evaluate import Scores, evaluate_together
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.opening import open_run
from mlx_qlora.planner import settled
from mlx_qlora.preparation import Prepared, compared
from mlx_qlora.processes import processes
from mlx_qlora.record import write_record
from mlx_qlora.report import write_report
from mlx_qlora.report.drawing import PNG_HINT, can_draw_png
from mlx_qlora.report.notebook import live_plots
from mlx_qlora.report.samples import asked, questions, samples_of
from mlx_qlora.train.advice import advise
from mlx_qlora.train.checkpoint import (
    checkpoint_to_resume,
    disk_errors,
    locked,
    restore_set_aside,
)
from mlx_qlora.train.loop import train
from mlx_qlora.train.result import TrainResult


def run(config: RunConfig, console: Console) -> TrainResult:
    """Loads, plans, trains, and leaves an output folder.

    Raises:
        UserError: any of its kinds.
    """
    everyone = processes()
    opened = everyone.agree(lambda: open_run(config, console))
    model, tokenizer, test = everyone.agree(opened.load), opened.tokenizer, opened.test
    parts, config = (opened.train, opened.validation), opened.config
    recorded = compared(model, *parts, config).config  # before time is spent on answers
    rows, most = questions(test or opened.validation), config.generation.max_new_tokens
    told = []
    if everyone.is_first:
        _say_what_comes_first(console, len(rows), len(test or ()))
        told = asked(model, tokenizer, rows, most)
    before = score_of(model, tokenizer, test)
    result = fine_tune(model, tokenizer, *parts, config, console=console)
    after = score_of(model, tokenizer, test)
    if not everyone.is_first:
        return result
    if before and after:
        result.test_scores = {"before": before, "after": after}
        _print_scores(console, before, after)
    write_report(
        result,
        recorded,
        result.test_scores,
        samples_of(tokenizer, rows, told, asked(model, tokenizer, rows, most)),
        data=opened.reports,
        rows=opened.sizes,
        plan=opened.plan,
    )
    if not can_draw_png():
        say(console, f"report    {PNG_HINT}")
    return result


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    train_examples: Examples,
    validation: Examples | None = None,
    config: RunConfig | None = None,
    *,
    console: Console | None = None,
) -> TrainResult:
    """Trains a LoRA adapter on a model and leaves an output folder.

    Args:
        model: from `load`. Without LoRA layers it gets those of `config.lora`; with them (an
            adapter was attached) it goes on training those.
        tokenizer: the model's.
        train_examples: from `read_examples`.
        validation: to measure the loss on.
        config: everything else; the defaults if not given.
        console: where progress goes; standard error if not given.

    Returns:
        What the run was; the model now holds the trained adapter.

    Raises:
        DataError: nothing to train on.
        AdapterError: nothing says what the original base is.
        ConfigError: a target that matches nothing, or a checkpoint of another run to resume.
    """
    chosen, everyone = config or RunConfig(), processes()
    output = Path(chosen.checkpointing.output_dir)
    if console is None:
        console = everyone.agree(lambda: everyone.console(output, Console(stderr=True)))
    if not len(train_examples):
        raise DataError("there are no examples to train on")
    chosen = settled(chosen, train_examples)
    settled_rate = chosen.training.at_hidden_size(model.config.hidden_size)
    chosen = dataclasses.replace(chosen, training=settled_rate)
    tokenizer = with_template(tokenizer, train_examples)
    prepared = compared(model, train_examples, validation, chosen)
    config, base = prepared.config, prepared.base
    say(
        console,
        f"training  {trainable_count(model):,} parameters of {base} on "
        f"{backend.facts()['chip']} ({backend.backend().device})"
        + (f", process {everyone.rank} of {everyone.size}" if everyone.size > 1 else ""),
    )
    if not everyone.is_first:
        return _trained(model, train_examples, validation, prepared, console)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    with locked(output), disk_errors(output):
        # Again, now that no other run can be writing there.
        restore_set_aside(output)
        found = checkpoint_to_resume(config.checkpointing, prepared.state)
        prepared = dataclasses.replace(prepared, resumed=found[0], damaged=found[1])
        for damage in prepared.damaged:
            warn(console, f"{damage}: the checkpoint before it is used")
        write_record(output, config, prepared.state.fingerprint, train_examples)
        result = _train(model, tokenizer, train_examples, validation, prepared, console)
    say(console, _summary(result))
    for advice in advise(result.log_history, config.checkpointing.load_best_model_at_end):
        say(console, f"advice    {advice}")
    return result


def _train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    train_examples: Examples,
    validation: Examples | None,
    prepared: Prepared,
    console: Console,
) -> TrainResult:
    """Trains, and leaves the adapter, the tokenizer and the report."""
    config, base = prepared.config, prepared.base
    output = Path(config.checkpointing.output_dir)
    with live_plots(output / "metrics.jsonl", config.training.warmup_steps):
        result = _trained(model, train_examples, validation, prepared, console)
    save_adapter(model, output, base)
    tokenizer.save(output)
    reports = [part.report for part in (train_examples, validation) if part]
    sizes = {"train": len(train_examples), "validation": len(validation or ())}
    known = list({id(report): report for report in reports}.values())
    write_report(result, config, {}, data=known, rows=sizes)
    with staged(output) as staging:  # now that there are figures to tell
        card = model_card(read_facts(output))
        (staging / "README.md").write_text(card, encoding="utf-8")
    return result


def _trained(
    model: LlamaForCausalLM,
    train_examples: Examples,
    validation: Examples | None,
    prepared: Prepared,
    console: Console,
) -> TrainResult:
    """Trains, which is all that processes behind the first one do."""
    config = prepared.config
    return train(
        model,
        train_examples,
        validation,
        config.data,
        config.training,
        config.checkpointing,
        config.logging,
        prepared.base,
        prepared.state,
        prepared.resumed,
        console,
    )


def _summary(result: TrainResult) -> str:
    if not result.tokens_per_second:  # a finished run was started again
        return f"done      step {result.steps} was the last one; adapter in {result.output_dir}"
    return (
        f"done      {result.seconds / 60:.1f} min, {result.tokens_per_second:,.0f} tokens/s, peak "
        f"{result.peak_memory_bytes / 1e9:.2f} GB; adapter in {result.output_dir}"
    )


def with_template(tokenizer: Tokenizer, examples: Examples) -> Tokenizer:
    """The tokenizer with the chat template that the data is written by: it is saved with it."""
    source = examples.report.chat_template
    return tokenizer if source is None else tokenizer.with_chat_template(source)


def score_of(model: LlamaForCausalLM, tokenizer: Tokenizer, test: Examples | None) -> Scores | None:
    """The scores on the test rows, shared out over the processes; None without such rows."""
    return evaluate_together(model, tokenizer, test, processes()) if test else None


def _say_what_comes_first(console: Console, asked_rows: int, scored_rows: int) -> None:
    if asked_rows or scored_rows:
        scored = f", {scored_rows:,} are scored" if scored_rows else ""
        say(console, f"before    {asked_rows} held-out rows are answered{scored}")


def _print_scores(console: Console, before: Scores, after: Scores) -> None:
    change = (after.loss - before.loss) / before.loss
    say(
        console,
        f"test      loss {before.loss:.4f} -> {after.loss:.4f} ({change:+.1%}), perplexity "
        f"{before.perplexity:.2f} -> {after.perplexity:.2f}, token accuracy "
        f"{before.token_accuracy:.1%} -> {after.token_accuracy:.1%} ({after.n_tokens:,} tokens)",
    )
