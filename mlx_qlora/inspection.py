"""`mlx-qlora inspect`: what would be trained, without training it; no weight is loaded."""

from rich.console import Console

from mlx_qlora.config import RunConfig
from mlx_qlora.data import view
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.read import train_validation_test
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.weights import open_checkpoint
from mlx_qlora.planner import settled
from mlx_qlora.train.config import batches_of
from mlx_qlora.train.metrics import say


def inspect_data(config: RunConfig, console: Console, show: int = 0) -> Examples:
    """Reads the data of a run and prints the report, the split, the lengths and the batches.

    Args:
        config: of the run; its model names the tokenizer.
        console: where it is printed.
        show: how many rows to print as the model will see them.

    Returns:
        The examples to train on.

    Raises:
        UserError: the model or the data cannot be used; with `data.strict`, if any row cannot.
    """
    if config.model.source is None:
        raise ConfigError("model.source is missing; name the model of the run with --model SOURCE")
    checkpoint = open_checkpoint(resolve(config.model.source, config.model.revision))
    tokenizer = load_tokenizer(checkpoint.files.path, checkpoint.metadata)
    parts = train_validation_test(config.data, tokenizer, config.training.seed, console)
    train = parts[0]
    check_lengths(LlamaConfig.from_hf(checkpoint.config), *parts)

    for report in {id(part.report): part.report for part in parts if part}.values():
        say(console, f"data      {report}")
        say(console, f"lengths\n{view.histogram(report)}")
    sizes = [len(part or ()) for part in parts]
    say(console, "split     {:,} train, {:,} validation, {:,} test".format(*sizes))
    batches = batches_of(train, config.data, settled(config, train).training)
    say(console, f"epoch     {view.epoch(batches)}")
    if show:
        console.print()
        colour = console.color_system is not None and not console.no_color
        console.print(view.rows(batches, tokenizer, show, colour), soft_wrap=True)
    return train


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
