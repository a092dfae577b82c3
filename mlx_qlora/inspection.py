"""`mlx-qlora inspect`: what would be trained, without training it; no weight is loaded."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mlx_qlora.config import RunConfig
from mlx_qlora.console import say
from mlx_qlora.data import view
from mlx_qlora.data.batches import Batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import train_validation_test
from mlx_qlora.data.summary import DataReport
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.weights import read_config
from mlx_qlora.planner import settled
from mlx_qlora.train.config import batches_of


@dataclass(frozen=True)
class Inspected:
    """What a run would train on.

    Attributes:
        train, validation, test: the rows.
        batches: of the rows to train on.
    """

    train: Examples
    validation: Examples | None
    test: Examples | None
    batches: Batches

    @property
    def reports(self) -> list[DataReport]:
        """What became of the rows, one for each source."""
        parts = [part for part in (self.train, self.validation, self.test) if part]
        return list({id(part.report): part.report for part in parts}.values())

    def to_dict(self) -> dict[str, Any]:
        """Reports with every refusal, the split and the epoch, as JSON has it."""
        parts = (self.train, self.validation, self.test)
        return {
            "sources": [
                {**dataclasses.asdict(report), "read": report.read, "kept": report.kept}
                for report in self.reports
            ],
            "rows": dict(zip(("train", "validation", "test"), (len(p or ()) for p in parts))),
            "rows_per_epoch": self.batches.rows_per_epoch,
            "positions_per_row": self.batches.width,
            "useful_share": self.batches.useful_share,
        }


def inspect_data(config: RunConfig, console: Console, show: int = 0) -> Inspected:
    """Reads the data of a run and prints the report, the split, the lengths and the batches.

    Args:
        config: of the run; its model names the tokenizer.
        console: where it is printed.
        show: how many rows to print as the model will see them.

    Returns:
        The rows, and the batches that they make.

    Raises:
        UserError: the model or the data cannot be used; with `data.strict`, if any row cannot.
    """
    if config.model.source is None:
        raise ConfigError("model.source is missing; name the model of the run with --model SOURCE")
    files = resolve(config.model.source, config.model.revision, weights=False)
    hf_config, metadata = read_config(files)
    tokenizer = load_tokenizer(files.path, metadata)
    parts = train_validation_test(config.data, tokenizer, config.training.seed, console)
    train = parts[0]
    check_lengths(LlamaConfig.from_hf(hf_config), *parts)

    batches = batches_of(train, config.data, settled(config, train).training)
    found = Inspected(*parts, batches)
    for report in found.reports:
        say(console, f"data      {report}")
        say(console, f"lengths\n{view.histogram(report)}")
    sizes = [len(part or ()) for part in parts]
    say(console, "split     {:,} train, {:,} validation, {:,} test".format(*sizes))
    say(console, f"epoch     {view.epoch(batches)}")
    if show:
        console.print()
        colour = console.color_system is not None and not console.no_color
        console.print(view.rows(batches, tokenizer, show, colour), soft_wrap=True)
    return found


def check_lengths(llama: LlamaConfig, *parts: Examples | None) -> None:
    """Refuses rows that are longer than the model has positions for.

    Raises:
        ConfigError: naming the length, the limit and the field that keeps such rows out.
    """
    longest = max(int(part.lengths.max()) for part in parts if part)
    most = llama.max_position_embeddings
    if longest > most:
        raise ConfigError(
            f"data.max_length lets in a row of {longest} tokens, and the model was made for "
            f"{most}; set data.max_length={most}"
        )
