"""What a run starts from: everything that can be wrong is found before a weight is loaded."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora import backend
from mlx_qlora.adapters.load import is_mlx_lm, load_adapter, read_adapter_config
from mlx_qlora.adapters.ownership import (
    ADAPTER_FOLDER,
    RECORD,
    check_names,
    check_place,
    is_run,
    not_ours,
)
from mlx_qlora.adapters.peft import original_base
from mlx_qlora.config import RunConfig
from mlx_qlora.console import say
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import train_validation_test
from mlx_qlora.data.summary import DataReport
from mlx_qlora.data.tokenizer import SHIPPED, Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.inspection import check_lengths
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import ALL_SEVEN, LoraConfig
from mlx_qlora.model.weights import Checkpoint, load_model, open_checkpoint
from mlx_qlora.planner import Plan, plan_checkpoint, settled
from mlx_qlora.processes import processes
from mlx_qlora.report.lines import plots_of
from mlx_qlora.train.checkpoint import is_ours
from mlx_qlora.train.tracking import require_trackers

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
        dtype = backend.compute_dtype(chosen.dtype)
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
    check_place(output, OUTPUT)
    if foreign := [path for path in output.glob("checkpoint-*") if not is_ours(path)]:
        raise not_ours(foreign[0], OUTPUT)
    check_names(output, WRITTEN, OUTPUT)
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
