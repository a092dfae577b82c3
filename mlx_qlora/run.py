"""One run, from a config to a folder of results.

`fine_tune` is what a notebook calls; `run` is what the command line calls, and loads the model
and the data first.
"""

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora import backend
from mlx_qlora._version import __version__
from mlx_qlora.adapters.card import model_card, read_facts
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.peft import original_base, save_adapter
from mlx_qlora.config import RunConfig
from mlx_qlora.console import say, warn
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError
from mlx_qlora.infer.evaluate import Scores, evaluate_together
from mlx_qlora.inspection import check_lengths
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import add_lora, lora_layers, trainable_count
from mlx_qlora.opening import check_output, open_run
from mlx_qlora.planner import settled
from mlx_qlora.processes import processes
from mlx_qlora.record import deciding_values, fingerprint_of, write_record
from mlx_qlora.report import write_report
from mlx_qlora.report.drawing import PNG_HINT, can_draw_png
from mlx_qlora.report.notebook import live_plots
from mlx_qlora.report.samples import asked, questions, samples_of
from mlx_qlora.source import ModelConfig
from mlx_qlora.train.advice import advise
from mlx_qlora.train.checkpoint import (
    RunState,
    checkpoint_to_resume,
    disk_errors,
    locked,
    restore_set_aside,
)
from mlx_qlora.train.loop import train
from mlx_qlora.train.result import TrainResult
from mlx_qlora.train.tracking import require_trackers


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
    prepared: "Prepared",
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
    prepared: "Prepared",
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


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: nothing about it is in doubt, and nothing has been written.

    Attributes:
        config: with what the model itself says in the place of what the user left out.
        base: the original Hugging Face repository.
        state: of a run that has not begun, with the hashes of what decides the weights.
        resumed: the checkpoint to go on from, or None.
        damaged: what is wrong with newer checkpoints, which are passed over.
    """

    config: RunConfig
    base: str
    state: RunState
    resumed: Path | None
    damaged: list[str]


def prepare(
    model: LlamaForCausalLM, examples: Examples, validation: Examples | None, config: RunConfig
) -> Prepared:
    """Gives the model its LoRA layers, and checks what only now can be checked.

    Raises:
        AdapterError: nothing says what the original base is.
        ConfigError: a target that matches nothing, rows longer than the model's context, a
            checkpoint of another run to resume, or an output folder with files of others that a
            run would overwrite.
    """
    if processes().is_first:
        check_output(Path(config.checkpointing.output_dir))
        require_trackers([*config.logging.report_to])
    check_lengths(model.config, examples, validation)
    source = getattr(model, "source", None)
    base = config.model.base_model_name_or_path or original_base(source)
    if not lora_layers(model):
        add_lora(model, config.lora, config.training.seed)
    else:  # the record shall say what is trained, and that is the attached adapter
        # An adapter's file does not carry LoRA+'s ratio, which is of the training alone.
        ratio = config.lora.loraplus_lr_ratio
        model.lora_config = dataclasses.replace(model.lora_config, loraplus_lr_ratio=ratio)
        config = dataclasses.replace(config, lora=model.lora_config)
    if config.model.source is None and source is not None:
        config = dataclasses.replace(config, model=as_loaded(config.model, model))

    decides = deciding_values(config)
    fingerprint = fingerprint_of(model, examples, validation, config, base)
    state = RunState(fingerprint=fingerprint, config=decides)
    if not processes().is_first:  # which need not see the output folder
        return Prepared(config, base, state, None, [])
    resumed, damaged = checkpoint_to_resume(config.checkpointing, state)
    return Prepared(config, base, state, resumed, damaged)


def as_loaded(chosen: ModelConfig, model: LlamaForCausalLM) -> ModelConfig:
    """With what `load` was told of a model: the record shall open that one, and no other."""
    files, quant, dtype = model.source, model.quantized_to, model.model.norm.weight.dtype
    packing = {"bits": None} if quant is None else dataclasses.asdict(quant)
    auto = dtype == backend.compute_dtype("auto")
    return dataclasses.replace(
        chosen,
        source=str(files.source),
        revision=files.revision,
        dtype="auto" if auto else str(dtype).rpartition(".")[2],
        **packing,
    )


def compared(
    model: LlamaForCausalLM, examples: Examples, validation: Examples | None, config: RunConfig
) -> Prepared:
    """`prepare` in every process of the run, which have to be alike.

    Raises:
        UserError: as `prepare`; or ProcessError, naming what differs and where.
    """
    everyone = processes()
    prepared = everyone.agree(lambda: prepare(model, examples, validation, config))
    everyone.must_equal(facts_of(prepared))
    return prepared


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """What all processes of a run must have alike: what they learn, and when they meet."""
    state, training = prepared.state, prepared.config.training
    fields = {f"{section}.{k}": v for section, of in state.config.items() for k, v in of.items()}
    meetings = dataclasses.asdict(prepared.config.checkpointing)
    for name in ("output_dir", "save_total_limit", "resume_from_checkpoint"):  # of the first alone
        del meetings[name]
    versions = {"mlx-qlora": __version__, "MLX": importlib.metadata.version("mlx")}
    return {
        **versions,
        "training.per_device_train_batch_size": training.rows,
        "training.gradient_accumulation_steps": training.gradient_accumulation_steps,
        "training.max_skipped_steps": training.max_skipped_steps,
        **{f"checkpointing.{name}": value for name, value in meetings.items()},
        **fields,
        "the hash of the rows": state.fingerprint["data"][:12],
        "the hash of the model": state.fingerprint["model"][:12],
    }


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
