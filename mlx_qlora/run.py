"""One run, from a config to an output folder.

`open_inputs` is the one door of commands: what is wrong is found there, before a weight is loaded.
`run` and `fine_tune` then go the same way: `Inputs.prepare` gives the model its LoRA layers,
`begun` takes the output folder, `train` trains, and `after` writes the report.
"""

import dataclasses
import importlib.metadata
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mlx_qlora import __version__, device
from mlx_qlora.adapters.options import read_adapter_config
from mlx_qlora.adapters.origin import original_base, seal
from mlx_qlora.adapters.peft import load_adapter, write_adapter
from mlx_qlora.adapters.push import model_card, read_facts
from mlx_qlora.config import RunConfig, check_needs, explained, settle, without_effect
from mlx_qlora.data.examples import DataReport, Examples
from mlx_qlora.data.preferences import KIND_OF, check_kind
from mlx_qlora.data.read import (
    DataConfig,
    check_examples,
    read_without_split,
    train_validation_test,
)
from mlx_qlora.data.tokenizer import SHIPPED, Tokenizer, load_tokenizer
from mlx_qlora.distributed import processes
from mlx_qlora.errors import ConfigError, DataError, as_called, say, warn
from mlx_qlora.fields import checked
from mlx_qlora.folders import (
    ADAPTER_FOLDER,
    CARD,
    RECORD,
    check_writable,
    disk_errors,
    locked,
    remove_leftovers,
    staged,
    user_path,
    write_whole,
)
from mlx_qlora.loading import (
    as_loaded,
    as_taught,
    by_taught_columns,
    check_lora,
    with_model,
    with_tokenizer_of,
)
from mlx_qlora.measured import as_measured, as_measured_for
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import (
    PLAIN,
    LoraConfig,
    LoRALinear,
    add_lora,
    drawn,
    lora_layers,
    trainable_count,
)
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.model.weights import (
    Checkpoint,
    load_model,
    open_checkpoint,
    packed_size,
)
from mlx_qlora.record import deciding_values, fingerprint_of, write_record
from mlx_qlora.train.checkpoint import (
    NAMES,
    RunState,
    check_is_there,
    checkpoint_to_resume,
    is_ours,
    last_checkpoint,
    named_checkpoint,
)
from mlx_qlora.train.loop import TrainResult, train
from mlx_qlora.train.metrics import require_trackers
from mlx_qlora.tree import bound, flat, nested

if TYPE_CHECKING:
    from mlx_qlora.before.plan import Plan

OUTPUT = "checkpointing.output_dir"
PLOTS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "rewards")
MOST_SHOWN = 200  # tokens of a row that may be its system message
# What a run writes into its folder; docs/reference/output-folder.md explains it.
WRITTEN = (*ADAPTER_FOLDER, *SHIPPED, "run.yaml", RECORD, "metrics.jsonl", "report.html")
WRITTEN += tuple(f"plots/{name}.svg" for name in PLOTS)

# ---- what a run starts from ----------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, in which nothing was found wrong."""

    config: RunConfig  # settled: a number wherever the user left one to the machine
    tokenizer: Tokenizer  # with the chat template that the rows are written by
    llama: LlamaConfig
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    checkpoint: Checkpoint | None = None  # if the weights are to be loaded from files
    # Known once the model is prepared: the original Hugging Face repository, and the state of a run
    # that has not begun, with the hashes of what decides the weights.
    base: str = ""
    state: RunState = field(default_factory=RunState)
    begins: "Beginning | None" = None
    resumed: Path | None = None  # the checkpoint to go on from, once the output folder is taken

    def __post_init__(self) -> None:
        template = self.train.report.chat_template  # the user's own, saved beside the adapter
        if template is not None:
            own = self.tokenizer.with_chat_template(template)
            object.__setattr__(self, "tokenizer", own)

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.config.checkpointing.output_dir)

    @property
    def reports(self) -> list[DataReport]:
        """What became of the rows, one report for each source."""
        parts = [part for part in (self.train, self.validation, self.test) if part]
        return list({id(part.report): part.report for part in parts}.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Rows in each part."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(part or ()) for name, part in parts.items()}

    def load(self) -> LlamaForCausalLM:
        """Load the model, with the adapter that training goes on with, if there is one."""
        assert self.checkpoint is not None
        chosen = self.config.model
        dtype = device.compute_dtype(chosen.dtype)
        how = chosen.frozen_matmul, chosen.residency
        with device.small_cache():
            model = load_model(self.checkpoint, chosen.quantize(), dtype, *how)
        if chosen.adapter is not None:
            load_adapter(model, chosen.adapter)
        return model

    def prepare(self, model: LlamaForCausalLM) -> "Inputs":
        """Give the model its LoRA layers, and hash what decides the weights.

        Layers that were trained in this output folder before count as they were before that. An
        AdapterError if nothing says what the original base is.
        """
        config, source = self.config, model.source
        base = config.model.base_model_name_or_path or original_base(source)
        seed, former = config.training.seed, model.beginning
        start: dict[str, Any] | int | None = None
        if former is not None and former.is_of(model, self.output):
            ratio = config.lora.loraplus_lr_ratio
            start = seed if isinstance(former.start, int) else former.start
            config = replace(config, lora=replace(former.lora, loraplus_lr_ratio=ratio))
        elif not lora_layers(model):
            add_lora(model, config.lora, seed)
            start = seed if config.lora.init_lora_weights in PLAIN else None
        else:  # the record has to say what is trained, and that is the attached adapter
            # An adapter's file does not carry LoRA+'s ratio, which concerns training alone.
            ratio = config.lora.loraplus_lr_ratio
            model.lora_config = replace(model.lora_config, loraplus_lr_ratio=ratio)
            config = replace(config, lora=model.lora_config)
        if config.model.source is None and source is not None:
            config = replace(config, model=as_loaded(config.model, model))
        start = flat(model.trainable_parameters()) if start is None else start
        begins = Beginning(self.output.absolute(), config.lora, lora_layers(model)[0][1], start)
        with bound(model, begins.weights(model)):
            fingerprint = fingerprint_of(model, self, config, base)
        state = RunState(fingerprint=fingerprint, config=deciding_values(config))
        return replace(self, config=config, base=base, state=state, begins=begins)

    def to_resume(self, console: Console) -> "Inputs":
        """Find the checkpoint to go on from, and warn of damaged ones that are passed over."""
        defaults = deciding_values(RunConfig())
        path, state, damaged = checkpoint_to_resume(self.config.checkpointing, self.state, defaults)
        for damage in damaged:
            warn(console, f"{damage}; the checkpoint before it is used")
        return replace(self, resumed=path, state=state)

    def shared_facts(self) -> dict[str, Any]:
        """What all processes of a run must have alike: what they learn, and when they meet."""
        state, training = self.state, self.config.training
        decides = {f"{s}.{k}": v for s, fields in state.config.items() for k, v in fields.items()}
        meetings = dataclasses.asdict(self.config.checkpointing)
        for name in ("output_dir", "save_total_limit", "resume_from_checkpoint"):
            del meetings[name]  # they concern the first process alone
        return {
            "mlx-qlora": __version__,
            "MLX": importlib.metadata.version("mlx"),
            "training.per_device_train_batch_size": training.rows,
            "training.gradient_accumulation_steps": training.accumulation,
            "training.max_skipped_steps": training.max_skipped_steps,
            **{f"checkpointing.{name}": value for name, value in meetings.items()},
            **decides,
            "the hash of the rows": state.fingerprint["data"][:12],
            "the hash of the model": state.fingerprint["model"][:12],
        }


@dataclass(frozen=True, eq=False)
class Beginning:
    """How a model's LoRA layers began a run, for the same run once more in the same process."""

    output: Path
    lora: LoraConfig
    layer: LoRALinear  # the first one, which tells whether the model has the same ones still
    start: dict[str, Any] | int  # their weights, or the seed that draws them

    def is_of(self, model: LlamaForCausalLM, output: Path) -> bool:
        """Whether it is that of a run in this folder, which trained the layers that there are."""
        layers = lora_layers(model)
        return output.absolute() == self.output and bool(layers) and layers[0][1] is self.layer

    def weights(self, model: LlamaForCausalLM) -> dict[str, Any]:
        """The path and the array of each weight."""
        return drawn(model, self.start) if isinstance(self.start, int) else self.start


def open_files(config: RunConfig, weights: bool = True) -> Checkpoint:
    """The files of the config's model; without `weights`, those not here yet stay on the hub."""
    return open_checkpoint(resolve(source_of(config), config.model.revision, weights=weights))


def source_of(config: RunConfig) -> str:
    """`model.source`, which has to be there."""
    if config.model.source is None:
        raise ConfigError("model.source is missing; name a model with --model SOURCE")
    return config.model.source


def open_inputs(
    config: RunConfig,
    console: Console,
    *,
    writes: bool = True,
    weights: bool = True,
    split: bool = True,
) -> Inputs:
    """Open what a command starts from: the model's files, its tokenizer and the rows.

    What can be wrong is found cheapest first: the output folder and trackers, the model's files,
    the adapter, the rows. No weight is loaded.

    Args:
        writes: whether a run will write to the output folder, which is then checked.
        weights: False for a look at the rows alone: those on the hub stay there.
        split: False reads all of `data.path` as `train`, written as the adapter was taught.
    """
    asked = config
    if not split or config.model.adapter is not None:
        config = with_model(config)
    if asked.model.source is None and writes:
        packed = f"bits={config.model.bits}, group_size={config.model.group_size}"
        say(console, f"model     {source_of(config)}, {packed}: as in the adapter's run")
    source_of(config)  # before anything is read
    if not processes().is_first:  # one of them writes the refused rows
        config = replace(config, data=replace(config.data, refused_path=None))
    elif writes:
        check_output(Path(config.checkpointing.output_dir), config.model.adapter)
        named_checkpoint(config.checkpointing)
        require_trackers([*config.logging.report_to])
    checkpoint = open_files(config, weights)
    files = checkpoint.files
    if writes and config.model.base_model_name_or_path is None:
        original_base(files)
    if writes and config.model.adapter is not None:
        trained = read_adapter_config(user_path(config.model.adapter))
        check_lora(config.lora, trained, config.model.adapter)
    tokenizer = load_tokenizer(files.path, checkpoint.metadata)
    tokenizer = with_tokenizer_of(config.model.adapter, tokenizer)
    validation = test = None
    if split:
        seed, kind = config.training.seed, KIND_OF[config.training.objective]
        if not config.training.learns_prompts:  # nor are they counted as if they were
            config = replace(config, data=replace(config.data, prompt_loss_weight=0.0))
        parts = train_validation_test(config.data, tokenizer, seed, kind)
        train, validation, test = parts
    else:
        plain, config = config.training, as_taught(config)
        # As answers, unless the objective is given; then as what the adapter was taught.
        kinds = dict.fromkeys(KIND_OF[each.objective] for each in (plain, config.training))

        def read(data: DataConfig) -> Examples:
            for kind in [*kinds][:-1]:
                with suppress(DataError):
                    return read_without_split(data, tokenizer, kind)
            return read_without_split(data, tokenizer, [*kinds][-1])

        train = by_taught_columns(config, read)
    llama = LlamaConfig.from_hf(checkpoint.config)
    check_examples(tokenizer, llama, train, validation, test)
    if writes:
        quantize = config.model.quantize()
        numbers = packed_size(LlamaForCausalLM(llama), checkpoint, quantize)
        packing = packing_of(checkpoint, quantize)
        config = as_measured(config, llama, packing, numbers, console)
    settled = settle(config, llama, train)
    inputs = Inputs(settled, tokenizer, llama, train, validation, test, checkpoint)
    for report in inputs.reports:
        say(console, f"data      {report}")
    if writes:
        check_needs(config, validation)
    # Who only looks at rows, or at a model, may give a run's whole config file.
    matters = ("",) if writes else ("data.", "training.", *["model."] * weights)
    for line in without_effect(asked, inputs):
        if line.startswith(matters):
            warn(console, line)
    if split:
        parts = "split     {train:,} train, {validation:,} validation, {test:,} test"
        if train.report.duplicates and not (config.data.validation_path or config.data.test_path):
            parts += "; copies of a row stay together"
        say(console, parts.format(**inputs.sizes))
        for line in explained(config, settled, train, validation):
            say(console, line)
        are_chats = train.report.own_systems == 0 and train.report.format != "alpaca"
        system = tokenizer.own_system if are_chats else ""
        first = tokenizer.decode(train[0].tokens[:MOST_SHOWN].tolist())
        if system and system in first:
            say(
                console, f"system    {system!r}, by the chat template; data.system=TEXT replaces it"
            )
        learned = train[0].tokens[train[0].learned][:MOST_SHOWN].tolist()
        if "<think>\n\n</think>" in tokenizer.decode(learned):
            text = "an empty <think> is learned before answers, as the chat template writes it"
            say(console, f"thinking  {text}")
    return inputs


def packing_of(checkpoint: Checkpoint, quantize: QuantConfig | None) -> QuantConfig | None:
    """How most matrices of the layers are packed, or will be; None for dense ones."""
    return checkpoint.packing.get("model.layers.0.mlp.down_proj") or quantize


def check_output(output: Path, adapter: str | None = None) -> None:
    """Refuse an output folder that cannot be written to, or holds files of others or `adapter`."""
    check_writable(output, WRITTEN, OUTPUT)
    checkpoints = [path.name for path in output.glob("checkpoint-*")]
    check_writable(output, checkpoints, OUTPUT, is_ours=is_ours)
    same = adapter is not None and output.resolve() == user_path(adapter).resolve()
    if same:
        raise ConfigError(
            f"{OUTPUT}: {output} holds the adapter that training continues from, which would be "
            "overwritten; choose another folder with --output-dir"
        )


# ---- the run -------------------------------------------------------------------------------------


def run(inputs: Inputs, console: Console, plan: "Plan | None" = None) -> TrainResult:
    """Train on opened inputs and leave an output folder; the report compares with the plan."""
    model = processes().agree(inputs.load)
    return _run(model, inputs, console, plan)


@checked
def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    train_examples: Examples,
    validation: Examples | None = None,
    config: RunConfig | None = None,
    *,
    console: Console | None = None,
) -> TrainResult:
    """Train a LoRA adapter on a model and leave an output folder; the model then holds it.

    Args:
        model: from `load`. Without LoRA layers it gets those of `config.lora`; with them (it was
            trained before, or an adapter was attached) it goes on training those. In the output
            folder of its last run it begins, or continues, as that run did.
        tokenizer: from `load`, as `read_examples` had it; a copy is kept with the adapter.
        train_examples: from `read_examples`.
        validation: rows that are not trained, whose loss is measured at every
            `checkpointing.eval_steps`, and before and after for the result.
        console: where progress goes; standard error if not given.

    Raises:
        DataError: nothing to train on.
        AdapterError: nothing says what the original base is.
        ConfigError: a target that matches nothing, or a checkpoint of another run to resume.
    """
    config, everyone = config or RunConfig(), processes()
    output = Path(config.checkpointing.output_dir)
    if console is None:
        console = everyone.agree(lambda: everyone.console(output, Console(stderr=True)))
    if not len(train_examples):
        raise DataError("there are no examples to train on")

    def opened() -> Inputs:
        if everyone.is_first:
            check_output(output)
            require_trackers([*config.logging.report_to])
        for examples in filter(None, (train_examples, validation)):
            check_kind(examples.report.kind, config.training.objective)
        if lora_layers(model):
            check_lora(config.lora, model.lora_config)
        check_examples(tokenizer, model.config, train_examples, validation)
        chosen = as_measured_for(model, config, console)
        settled = settle(chosen, model.config, train_examples)
        as_built = replace(config, lora=model.lora_config) if lora_layers(model) else config
        for line in explained(as_built, settled, train_examples, validation):
            say(console, line)
        check_needs(config, validation)
        inputs = Inputs(settled, tokenizer, model.config, train_examples, validation)
        for line in without_effect(config, inputs):
            warn(console, line)
        return inputs

    return _run(model, everyone.agree(opened), console)


def _run(
    model: LlamaForCausalLM, inputs: Inputs, console: Console, plan: "Plan | None" = None
) -> TrainResult:
    """Prepare, train, save, report. Processes other than the first one only train and score."""
    from mlx_qlora.after.observer import Observer

    everyone = processes()
    inputs = everyone.agree(lambda: inputs.prepare(model))
    everyone.must_equal(inputs.shared_facts())
    output = inputs.output
    with disk_errors(output, lambda: last_checkpoint(output)), ExitStack() as stack:
        inputs = everyone.agree(lambda: begun(inputs, console, stack))
        former, model.beginning = model.beginning, inputs.begins
        if inputs.resumed is None and former is not None and former.is_of(model, output):
            say(console, "model     begins as it did before it was trained in this folder")
        assert inputs.begins is not None
        model.update(nested(inputs.begins.weights(model)))
        observer = Observer(model, inputs, console, plan)
        stack.push(observer.ended)
        others = f", process {everyone.rank} of {everyone.size}" if everyone.size > 1 else ""
        say(
            console,
            f"training  {trainable_count(model):,} parameters of {inputs.base} on "
            f"{device.facts()['chip']} ({device.current().kind}){others}",
        )
        with observer.watching():
            result = train(model, inputs, console)
        if everyone.is_first:
            check_is_there(output)
            write_adapter(model, output, inputs.base, {})
            seal(output)
            with staged(output) as staging:  # or it would be written through a link
                inputs.tokenizer.save(staging)
            say(console, _summary(result))
        try:
            observer.after(result)
        except KeyboardInterrupt as stop:
            kept = f"the adapter in {output} is complete, and the same command scores it"
            stop.args = (f"stopped while the run was scored; {kept}",)
            raise
        if everyone.is_first:
            # Last: it shows figures of the run.
            write_whole(output / CARD, model_card(read_facts(output)))
    return result


def begun(inputs: Inputs, console: Console, stack: ExitStack) -> Inputs:
    """Take the output folder: lock it, find the checkpoint to go on from, write the record.

    All of it in the first process; the others need not even see the folder.
    """
    if processes().is_first:
        inputs.output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(inputs.output))
        remove_leftovers(inputs.output, NAMES)
        inputs = inputs.to_resume(console)
        write_record(inputs)
    return inputs


def _summary(result: TrainResult) -> str:
    if not result.tokens_per_second:  # a finished run was started again
        folder = result.output_dir
        longer = as_called(f"to train it longer pass --adapter {folder}, and another --output-dir")
        return f"done      step {result.steps} was the last one; adapter in {folder}; {longer}"
    return (
        f"done      {result.seconds / 60:.1f} min, {result.tokens_per_second:,.0f} tokens/s, peak "
        f"{result.peak_memory_bytes / 1e9:.2f} GB, the process "
        f"{result.process_memory_bytes / 1e9:.2f} GB; adapter in {result.output_dir}"
    )
