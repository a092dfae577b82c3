"""`mlx-qlora train --dry-run`: all that a run does before its first step."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora import __version__, device
from mlx_qlora.adapters.peft import (
    adapter_tensors,
    is_mlx_lm,
    load_adapter,
    original_base,
    read_adapter_config,
    save_adapter,
)
from mlx_qlora.adapters.push import model_card, read_facts
from mlx_qlora.after.advice import advise
from mlx_qlora.after.plots import PNG_HINT, can_draw_png, live_plots, plots_of
from mlx_qlora.after.report import write_report
from mlx_qlora.after.samples import asked, questions, samples_of
from mlx_qlora.before import inspect
from mlx_qlora.before.plan import Plan, plan_checkpoint, settled
from mlx_qlora.config import ModelConfig, RunConfig, to_dict, to_yaml
from mlx_qlora.data.examples import DataReport, Examples
from mlx_qlora.data.read import check_lengths, train_validation_test
from mlx_qlora.data.tokenizer import SHIPPED, Tokenizer, load_tokenizer
from mlx_qlora.distributed import processes
from mlx_qlora.errors import ConfigError, DataError, say, warn
from mlx_qlora.folders import (
    ADAPTER_FOLDER,
    RECORD,
    check_writable,
    disk_errors,
    is_run,
    locked,
    staged,
)
from mlx_qlora.infer.evaluate import Scores, evaluate_distributed
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import ALL_SEVEN, LoraConfig, add_lora, lora_layers, trainable_count
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.model.weights import Checkpoint, load_model, open_checkpoint
from mlx_qlora.train.checkpoint import (
    RunState,
    checkpoint_to_resume,
    is_ours,
    last_checkpoint,
    restore_set_aside,
)
from mlx_qlora.train.config import batches_of
from mlx_qlora.train.loop import TrainResult, course_of, train
from mlx_qlora.train.metrics import require_trackers
from mlx_qlora.train.score import score

# ---- the record of a run -------------------------------------------------------------------------


def fingerprint_of(
    model: LlamaForCausalLM,
    examples: Examples,
    validation: Examples | None,
    config: RunConfig,
    base: str,
) -> dict[str, str]:
    """Hashes of what decides the weights: two runs with the same ones end alike.

    Args:
        model: with its LoRA layers as they begin.
        examples: to train on.
        validation: to measure on, which decides early stopping and the best weights.
        config: of the run.
        base: the original repository.
    """
    digest = hashlib.sha256(base.encode())
    for name, matrix in model.named_modules():
        if isinstance(matrix, FrozenMatrix):
            digest.update(f"{name} {matrix.shape} {matrix.quant} {matrix.dtype}".encode())
    source = getattr(model, "source", None)
    digest.update(sample_of(source.path) if source is not None else b"")
    for weight in adapter_tensors(model).values():
        digest.update(weight.tobytes())
    return {
        "config": _hash(json.dumps(deciding_values(config), sort_keys=True)),
        "data": _hash(examples.digest + (validation.digest if validation else "")),
        "model": digest.hexdigest(),
    }


def write_record(
    output: Path, config: RunConfig, fingerprint: dict[str, str], examples: Examples
) -> None:
    """Writes `run.yaml` and `training_args.json`: what is needed to repeat the run."""
    names = ("mlx", "mlx-lm", "numpy", "safetensors", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = {
        "config": to_dict(config),
        "versions": {"mlx-qlora": __version__, "python": platform.python_version(), **versions},
        "machine": device.facts(),
        "fingerprint": fingerprint,
        "data": {"rows": len(examples), "tokens": int(examples.lengths.sum())},
    }
    with staged(output) as staging:  # first: by this one a folder is known to be ours
        text = json.dumps(record, indent=2) + "\n"
        (staging / "training_args.json").write_text(text, encoding="utf-8")
    with staged(output) as staging:
        (staging / "run.yaml").write_text(to_yaml(config), encoding="utf-8")


def deciding_values(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What decides the weights; where files go and how often, and what memory asks for, do not."""
    decides = {k: v for k, v in to_dict(config).items() if k in ("model", "lora", "training")}
    training = decides["training"]
    for name in ("gradient_checkpointing", "compile", "max_skipped_steps"):
        del training[name]
    # How a step's rows are divided among micro-batches and processes is not what it learns.
    rows = training.pop("per_device_train_batch_size") * training.pop("gradient_accumulation_steps")
    training["rows_per_step"] = rows * processes().size
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


# ---- inputs --------------------------------------------------------------------------------------


OUTPUT = "checkpointing.output_dir"


# What a run writes into its folder; docs/reference/output-folder.md explains it.
WRITTEN = (*ADAPTER_FOLDER, *SHIPPED, "run.yaml", RECORD, "metrics.jsonl", "report.html")


WRITTEN += tuple(f"plots/{plot.name}.{kind}" for plot in plots_of([]) for kind in ("svg", "png"))


@dataclass(frozen=True)
class Opened:
    """The input of a run, in which nothing was found wrong; no weight is loaded yet.

    Attributes:
        config: with the values that were left to the machine.
        checkpoint: the model's files.
        tokenizer: the model's.
        train, validation, test: the rows.
        plan: what it will need.
    """

    config: RunConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    train: Examples
    validation: Examples | None
    test: Examples | None
    plan: Plan

    @property
    def reports(self) -> list[DataReport]:
        """What became of the rows, one for each source."""
        parts = [part for part in (self.train, self.validation, self.test) if part]
        return list({id(part.report): part.report for part in parts}.values())

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows each part has."""
        parts = (self.train, self.validation, self.test)
        return dict(zip(("train", "validation", "test"), (len(part or ()) for part in parts)))

    def load(self) -> LlamaForCausalLM:
        """The model, with the adapter that training goes on with, if there is one."""
        chosen = self.config.model
        dtype = device.compute_dtype(chosen.dtype)
        model = load_model(self.checkpoint, chosen.quantize(), dtype, chosen.frozen_matmul)
        if chosen.adapter is not None:
            load_adapter(model, chosen.adapter)
        return model


def open_run(config: RunConfig, console: Console) -> Opened:
    """Reads what a run starts from, and says it.

    What can be wrong with the input is found cheapest first: the output folder, the model's
    files, the adapter, the data, the plan. Only then is the model loaded.

    Raises:
        UserError: any of its kinds.
    """
    source = config.model.source
    if source is None:
        raise ConfigError("model.source is missing; name a model with --model SOURCE")
    if processes().is_first:
        check_output(Path(config.checkpointing.output_dir), config.model.adapter)
        require_trackers([*config.logging.report_to])
    else:  # one of them writes the refused rows
        told_by_first = dataclasses.replace(config.data, refused_path=None)
        config = dataclasses.replace(config, data=told_by_first)
    checkpoint = open_checkpoint(resolve(source, config.model.revision))
    if config.model.base_model_name_or_path is None:
        original_base(checkpoint.files)
    if config.model.adapter is not None:
        trained = read_adapter_config(Path(config.model.adapter).expanduser())
        check_lora(config.lora, trained, config.model.adapter)
    tokenizer = load_tokenizer(checkpoint.files.path, checkpoint.metadata)
    parts = train_validation_test(config.data, tokenizer, config.training.seed, console)
    llama = LlamaConfig.from_hf(checkpoint.config)
    config = settled(config, parts[0])
    config = dataclasses.replace(config, training=config.training.at_hidden_size(llama.hidden_size))
    several = processes().size if processes().size > 1 else None
    predicted = plan_checkpoint(checkpoint, config, parts[0], processes=several)
    opened = Opened(config, checkpoint, tokenizer, *parts, predicted)
    for report in opened.reports:
        say(console, f"data      {report}")
    check_lengths(llama, *parts)
    say(
        console,
        "          {train:,} train, {validation:,} validation, {test:,} test".format(
            **opened.sizes
        ),
    )
    say(console, f"plan\n{_indent(str(predicted))}")
    return opened


def check_output(output: Path, adapter: str | None = None) -> None:
    """Refuses an output folder that cannot be written to, or that holds files of others.

    Args:
        output: the folder.
        adapter: that training goes on from.

    Raises:
        ConfigError: naming the folder, and the file that a run would overwrite.
    """
    check_writable(output, WRITTEN, OUTPUT)
    checkpoints = [path.name for path in output.glob("checkpoint-*")]
    check_writable(output, checkpoints, OUTPUT, is_ours=is_ours)
    if adapter is None or is_run(output):
        return
    if output.resolve() == Path(adapter).expanduser().resolve():
        raise ConfigError(
            f"{OUTPUT}: {output} holds the adapter that training goes on from, which would be "
            "overwritten; choose another folder with --output-dir"
        )


def check_lora(asked: LoraConfig, trained: LoraConfig, adapter: str) -> None:
    """Refuses values for an adapter's shape that are not those of the adapter to train on.

    A value that is the default may be there because nobody said anything, so it is passed over.

    Args:
        asked: of the config.
        trained: of the adapter.
        adapter: its folder.

    Raises:
        ConfigError: naming the first field, its value in the adapter and the one asked for.
    """
    default, untold = LoraConfig(), {"loraplus_lr_ratio", "init_lora_weights"}  # no file says them
    if is_mlx_lm(Path(adapter).expanduser()):  # which lists every matrix, and scale x rank
        untold |= {"target_modules", "layers_to_transform", "lora_alpha"}
    for name in (field.name for field in dataclasses.fields(LoraConfig)):
        if name in untold:
            continue
        wanted, has = getattr(asked, name), getattr(trained, name)
        if wanted != getattr(default, name) and _meaning(wanted) != _meaning(has):
            raise ConfigError(
                f"lora.{name} is {has!r} in {adapter}, which is trained on as it is, and not "
                f"{wanted!r}: leave lora.{name} out, or train a new adapter without --adapter"
            )


def _meaning(value: Any) -> Any:
    """A value in one spelling: targets have no order, and an empty list of layers means all."""
    if value == "all-linear":
        value = ALL_SEVEN
    return set(value) if isinstance(value, list) and value else value or None


def _indent(text: str) -> str:
    return "\n".join(f"          {line}" for line in text.splitlines())


# ---- before the first step -----------------------------------------------------------------------


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
    auto = dtype == device.compute_dtype("auto")
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


# ---- the run -------------------------------------------------------------------------------------


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
        f"{device.facts()['chip']} ({device.current().kind})"
        + (f", process {everyone.rank} of {everyone.size}" if everyone.size > 1 else ""),
    )
    if not everyone.is_first:
        return _trained(model, train_examples, validation, prepared, console)
    with disk_errors(output, lambda: last_checkpoint(output)):
        output.mkdir(parents=True, exist_ok=True)
    with locked(output), disk_errors(output, lambda: last_checkpoint(output)):
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
    return evaluate_distributed(model, tokenizer, test, processes()) if test else None


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


# ---- the dry run ---------------------------------------------------------------------------------


def dry_run(config: RunConfig, console: Console) -> dict[str, Any]:
    """All that `run` does before its first step, and the first batch; only tokens are cached.

    Returns:
        The plan, how many rows there are, the first batch's figures, and where a run would go
        on from.

    Raises:
        UserError: any of its kinds.
    """
    unrefused = dataclasses.replace(config.data, refused_path=None)  # which is the run's to write
    opened = open_run(dataclasses.replace(config, data=unrefused), console)
    model = opened.load()
    prepared = prepare(model, opened.train, opened.validation, opened.config)
    config = prepared.config
    for damage in prepared.damaged:
        warn(console, f"{damage}: the checkpoint before it is used")
    batches = batches_of(opened.train, config.data, config.training)
    first = next(iter(batches))
    found = score(model, [first])
    figures = {
        "rows": first.tokens.shape[0],
        "positions": first.tokens.shape[1],
        "documents": len(first.places),
        "supervised_tokens": found.tokens,
        "loss": found.nats / found.tokens,
    }
    colour = console.color_system is not None and not console.no_color
    console.print(inspect.rows(batches, opened.tokenizer, 1, colour), soft_wrap=True)
    say(
        console,
        "batch     {rows} rows of {positions:,} positions, {documents} documents, "
        "{supervised_tokens:,} tokens to learn; the model's loss on them is {loss:.4f}".format(
            **figures
        ),
    )
    course = course_of(config.training, batches, len(opened.train))
    seconds = (
        course.passes * float((opened.train.lengths - 1).sum()) / opened.plan.tokens_per_second
    )
    say(console, f"course    {course}, about {seconds / 60:,.0f} min at the planned speed")
    for warning in course.warnings:
        warn(console, warning)
    resumed = None if prepared.resumed is None else str(prepared.resumed)
    onward = "" if resumed is None else f", going on from {resumed}"
    say(
        console,
        f"dry run   {trainable_count(model):,} parameters would be trained for {course.steps:,} "
        f"steps{onward}; nothing was trained, and nothing but the token cache was written",
    )
    about = {"plan": opened.plan.to_dict(), "rows": opened.sizes, "first_batch": figures}
    return {
        **about,
        "steps": course.steps,
        "passes": course.passes,
        "warnings": course.warnings,
        "resume_from_checkpoint": resumed,
    }
