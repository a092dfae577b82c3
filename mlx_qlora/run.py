"""One run, from a config to a folder of results.

`fine_tune` is what a notebook calls; `run` is what the command line calls, and loads the model
and the data first.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora import backend
from mlx_qlora._version import __version__
from mlx_qlora.adapters.card import model_card, read_facts
from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.load import load_adapter, read_adapter_config
from mlx_qlora.adapters.peft import (
    adapter_tensors,
    original_base,
    save_adapter,
)
from mlx_qlora.config import RunConfig, to_dict, to_yaml
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import train_validation_test
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.infer.evaluate import Scores, evaluate
from mlx_qlora.inspection import check_lengths
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import add_lora, lora_layers, trainable_count
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.model.weights import load_model, open_checkpoint
from mlx_qlora.planner import plan_checkpoint, settled
from mlx_qlora.report import write_report
from mlx_qlora.report.drawing import PNG_HINT, can_draw_png
from mlx_qlora.report.notebook import live_plots
from mlx_qlora.report.samples import asked, questions, samples_of
from mlx_qlora.train.advice import advise
from mlx_qlora.train.checkpoint import (
    RunState,
    checkpoint_to_resume,
    disk_errors,
    is_ours,
    locked,
    restore_set_aside,
)
from mlx_qlora.train.loop import TrainResult, train
from mlx_qlora.train.metrics import say


def run(config: RunConfig, console: Console) -> TrainResult:
    """Loads, plans, trains, and leaves an output folder.

    What can be wrong with the input is found cheapest first: the output folder, the model's
    files, the adapter, the data, the plan. Only then is the model loaded.

    Raises:
        UserError: any of its kinds.
    """
    if config.model.source is None:
        raise ConfigError("model.source is missing; name a model with --model SOURCE")
    check_output(Path(config.checkpointing.output_dir))
    checkpoint = open_checkpoint(resolve(config.model.source, config.model.revision))
    if config.model.base_model_name_or_path is None:
        original_base(checkpoint.files)
    if config.model.adapter is not None:
        read_adapter_config(Path(config.model.adapter).expanduser())
    tokenizer = load_tokenizer(checkpoint.files.path, checkpoint.metadata)
    seed = config.training.seed
    examples, validation, test = train_validation_test(config.data, tokenizer, seed, console)

    parts = [part for part in (examples, validation, test) if part]
    for report in {id(part.report): part.report for part in parts}.values():
        say(console, f"data      {report}")
    check_lengths(LlamaConfig.from_hf(checkpoint.config), examples, validation, test)
    sizes = [len(part or ()) for part in (examples, validation, test)]
    say(console, "          {:,} train, {:,} validation, {:,} test".format(*sizes))
    width = LlamaConfig.from_hf(checkpoint.config).hidden_size
    config = settled(config, examples)
    config = dataclasses.replace(config, training=config.training.at_hidden_size(width))
    predicted = plan_checkpoint(checkpoint, config, examples)
    say(console, f"plan\n{_indent(str(predicted))}")

    model = load_model(
        checkpoint,
        config.model.quantize(),
        backend.compute_dtype(config.model.dtype),
        config.model.frozen_matmul,
    )
    if config.model.adapter is not None:
        load_adapter(model, config.model.adapter)
    recorded = prepare(model, examples, validation, config).config
    rows, most = questions(test or validation), config.generation.max_new_tokens
    told = asked(model, tokenizer, rows, most)
    before = evaluate(model, tokenizer, test) if test else None
    result = fine_tune(model, tokenizer, examples, validation, config, console=console)
    scores = {}
    if test and before:
        scores = {"before": before, "after": evaluate(model, tokenizer, test)}
        _print_scores(console, before, scores["after"])
    write_report(
        result,
        recorded,
        scores,
        samples_of(tokenizer, rows, told, asked(model, tokenizer, rows, most)),
        data=list({id(part.report): part.report for part in parts}.values()),
        rows=dict(zip(("train", "validation", "test"), sizes)),
        plan=predicted,
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
    config = config or RunConfig()
    console = console or Console(stderr=True)
    if not len(train_examples):
        raise DataError("there are no examples to train on")
    config = settled(config, train_examples)
    settled_rate = config.training.at_hidden_size(model.config.hidden_size)
    config = dataclasses.replace(config, training=settled_rate)
    tokenizer = with_template(tokenizer, train_examples)
    prepared = prepare(model, train_examples, validation, config)
    config, base = prepared.config, prepared.base
    say(
        console,
        f"training  {trainable_count(model):,} parameters of {base} on "
        f"{backend.facts()['chip']} ({backend.backend().device})",
    )
    output = Path(config.checkpointing.output_dir)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    with locked(output), disk_errors(output):
        # Again, now that no other run can be writing there.
        restore_set_aside(output)
        found = checkpoint_to_resume(config.checkpointing, prepared.state)
        prepared = dataclasses.replace(prepared, resumed=found[0], damaged=found[1])
        for damage in prepared.damaged:
            say(console, f"warning   {damage}: the checkpoint before it is used")
        write_record(output, config, prepared.state.fingerprint, train_examples)
        result = _train(model, tokenizer, train_examples, validation, prepared, console)
    say(console, _summary(result))
    for advice in advise(result.log_history):
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
        result = train(
            model,
            train_examples,
            validation,
            config.data,
            config.training,
            config.checkpointing,
            config.logging,
            base,
            prepared.state,
            prepared.resumed,
            console,
        )
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


def _summary(result: TrainResult) -> str:
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
    check_output(Path(config.checkpointing.output_dir))
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
        named = dataclasses.replace(config.model, source=str(source.source))
        config = dataclasses.replace(config, model=named)

    digest = hashlib.sha256(base.encode())
    for name, matrix in model.named_modules():
        if isinstance(matrix, FrozenMatrix):
            digest.update(f"{name} {matrix.shape} {matrix.quant} {matrix.dtype}".encode())
    digest.update(sample_of(source.path) if source is not None else b"")
    for weight in adapter_tensors(model).values():
        digest.update(weight.tobytes())
    decides = deciding_values(config)
    fingerprint = {
        "config": _hash(json.dumps(decides, sort_keys=True)),
        "data": _hash(examples.digest + (validation.digest if validation else "")),
        "model": digest.hexdigest(),
    }
    state = RunState(fingerprint=fingerprint, config=decides)
    resumed, damaged = checkpoint_to_resume(config.checkpointing, state)
    return Prepared(config, base, state, resumed, damaged)


def write_record(
    output: Path, config: RunConfig, fingerprint: dict[str, str], examples: Examples
) -> None:
    """Writes `run.yaml` and `training_args.json`: what is needed to repeat the run."""
    names = ("mlx", "mlx-lm", "numpy", "safetensors", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = {
        "config": to_dict(config),
        "versions": {"mlx-qlora": __version__, "python": platform.python_version(), **versions},
        "machine": backend.facts(),
        "fingerprint": fingerprint,
        "data": {"rows": len(examples), "tokens": int(examples.lengths.sum())},
    }
    with staged(output) as staging:
        (staging / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
        text = json.dumps(record, indent=2) + "\n"
        (staging / "training_args.json").write_text(text, encoding="utf-8")


def deciding_values(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What decides the weights; where files go and how often, and what memory asks for, do not."""
    decides = {k: v for k, v in to_dict(config).items() if k in ("model", "lora", "training")}
    for name in ("gradient_checkpointing", "compile", "max_skipped_steps"):
        del decides["training"][name]
    for name in ("source", "revision", "adapter"):  # where it lies; what it is, is hashed
        del decides["model"][name]
    data = to_dict(config)["data"]  # which rows there are is told by the hash of the data
    return {**decides, "data": {name: data[name] for name in ("packing", "max_length", "shuffle")}}


def sample_of(path: Path) -> bytes:
    """A hash of the sizes of a model's weight files and of pieces all over them.

    Reading all of a large model would take longer than anybody waits.
    """
    hashed = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for piece in range(64):
                stream.seek(size * piece // 64)
                hashed.update(stream.read(1024))
    return hashed.digest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def with_template(tokenizer: Tokenizer, examples: Examples) -> Tokenizer:
    """The tokenizer with the chat template that the data is written by: it is saved with it."""
    source = examples.report.chat_template
    return tokenizer if source is None else tokenizer.with_chat_template(source)


def check_output(output: Path) -> None:
    """Refuses an output folder that cannot be written to, or that holds files of others.

    Raises:
        ConfigError: naming the folder, and the file that a run would overwrite.
    """
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "may not be written to" if there.is_dir() else "is a file"
        raise ConfigError(
            f"checkpointing.output_dir: {output} cannot be made: {there} {reason}; "
            "choose another with --output-dir"
        )
    card = output / "README.md"
    foreign = [path for path in output.glob("checkpoint-*") if not is_ours(path)]
    if card.is_file() and "mlx-qlora" not in card.read_text(encoding="utf-8", errors="replace"):
        foreign.append(card)
    if foreign:
        raise ConfigError(
            f"checkpointing.output_dir: {foreign[-1]} is not from mlx-qlora and would be "
            "overwritten; choose another folder with --output-dir"
        )


def _print_scores(console: Console, before: Scores, after: Scores) -> None:
    change = (after.loss - before.loss) / before.loss
    say(
        console,
        f"test      loss {before.loss:.4f} -> {after.loss:.4f} ({change:+.1%}), perplexity "
        f"{before.perplexity:.2f} -> {after.perplexity:.2f}, token accuracy "
        f"{before.token_accuracy:.1%} -> {after.token_accuracy:.1%} ({after.n_tokens:,} tokens)",
    )


def _indent(text: str) -> str:
    return "\n".join(f"          {line}" for line in text.splitlines())
