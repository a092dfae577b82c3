"""`mlx-qlora inspect`: what would be trained, without training it; no weight is loaded."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from mlx_qlora.before.plan import settled
from mlx_qlora.config import RunConfig
from mlx_qlora.data.batches import IGNORE, Batch, Batches
from mlx_qlora.data.examples import DataReport, Examples
from mlx_qlora.data.read import check_lengths, train_validation_test
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import ConfigError, say
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.weights import read_config
from mlx_qlora.train.config import batches_of

# ---- views of the rows ---------------------------------------------------------------------------


BAR = 40  # characters of the longest bar


SUPERVISED, CONTEXT, PADDING, NOTE = "bold green", "default", "dim red", "dim cyan"


# Signs that a terminal would swallow or turn into spaces are shown as their Unicode pictures.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) != "\n"} | {127: 0x2421}


PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # some terminals act on these, too


def histogram(report: DataReport) -> str:
    """One line for each step of length, with a bar for how many rows have it."""
    most = max((n for _, _, n in report.histogram), default=1)
    shown = [(f"{low:,}-{high:,}", n) for low, high, n in report.histogram]
    wide = max((len(span) for span, _ in shown), default=0)
    return "\n".join(
        f"{span:>{wide}} {'█' * round(BAR * n / most) or '▏' * bool(n):<{BAR}} {n:>7,}"
        for span, n in shown
    )


def epoch(batches: Batches) -> str:
    """What one pass over the data is."""
    rows, real = batches.rows_per_epoch, int((batches.examples.lengths - 1).sum())
    kind = f"rows of {batches.width:,} positions" if batches.width else "rows of their own width"
    return (
        f"{real:,} tokens in {rows:,} {kind}, {batches.batch_size} to a batch; "
        f"{batches.useful_share:.1%} of the positions are used"
    )


def rows(batches: Batches, tokenizer: Tokenizer, count: int, colour: bool) -> RenderableType:
    """The first rows of the first batches, token by token as they are trained.

    Args:
        batches: of the run.
        tokenizer: to write ids as text again.
        count: how many rows.
        colour: False puts ⟦ ⟧ around what is supervised, where no colour can say it.
    """
    shown: list[Text] = []
    for number, batch in enumerate(batches):
        for b in range(batch.tokens.shape[0]):
            if len(shown) == count:
                return Group(*shown)
            title = f"batch {number + 1}, row {b + 1}"
            shown.append(_row(batch, b, tokenizer, title, colour))
    return Group(*shown)


def _row(batch: Batch, b: int, tokenizer: Tokenizer, title: str, colour: bool) -> Text:
    assert batch.documents is not None
    tokens, labels = np.array(batch.tokens[b]), np.array(batch.labels[b])
    text = Text()
    documents = [(d, p) for d, p in zip(batch.documents.tolist(), batch.places) if d[0] == b]
    used = sum(end - start for (_, start, end), _ in documents)
    text.append(f"{title}: {used} of {len(tokens)} positions used\n", NOTE)
    for (_, start, end), place in documents:
        inside = labels[start:end]
        n_learned = int((inside != IGNORE).sum())
        text.append(f"{place}: {end - start + 1} tokens, {n_learned} supervised\n", NOTE)
        # A label is the token to predict next: the document's own tokens are its first token,
        # and behind each position either that label or, where none is learned, the next input.
        following = np.append(tokens[start + 1 : end], IGNORE)
        ids = [int(tokens[start]), *np.where(inside != IGNORE, inside, following).tolist()]
        learned = [False, *(inside != IGNORE).tolist()]
        if ids[-1] == IGNORE:  # not learned, and no input: the batch does not hold it
            ids, learned = ids[:-1], learned[:-1]
        for is_learned, run in _runs(ids, learned):
            words = tokenizer.decode(run).translate(PICTURES)
            marked = words if colour or not is_learned else f"⟦{words}⟧"
            text.append(marked, SUPERVISED if is_learned else CONTEXT)
        text.append("\n")
    if used < len(tokens):
        text.append(f"{len(tokens) - used} x padding\n", PADDING)
    return text


def _runs(ids: list[int], learned: list[bool]) -> list[tuple[bool, list[int]]]:
    """Neighbours that are both learned, or both not, together: a character may span tokens."""
    runs: list[tuple[bool, list[int]]] = []
    for token, is_learned in zip(ids, learned):
        if runs and runs[-1][0] == is_learned:
            runs[-1][1].append(token)
        else:
            runs.append((is_learned, [token]))
    return runs


# ---- the command ---------------------------------------------------------------------------------


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
        say(console, f"lengths\n{histogram(report)}")
    sizes = [len(part or ()) for part in parts]
    say(console, "split     {:,} train, {:,} validation, {:,} test".format(*sizes))
    say(console, f"epoch     {epoch(batches)}")
    if show:
        console.print()
        colour = console.color_system is not None and not console.no_color
        console.print(rows(batches, tokenizer, show, colour), soft_wrap=True)
    return found
