"""A source of rows becomes examples, and the three parts of a run.

Every row is either kept as it will be trained or refused with its line and the reason.
"""

import fnmatch
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_qlora.data.encode import TRUNCATION, Chunk, Recipe, chunks, default_workers, encode_chunks
from mlx_qlora.data.examples import (
    VERSION,
    DataReport,
    Examples,
    FileReport,
    Piece,
    cached,
    forget_unused,
    in_memory,
    on_disk,
    write_refused,
)
from mlx_qlora.data.files import (
    KINDS,
    RowFile,
    find_files,
    hub_dataset,
    parse,
    raw_rows,
    unit_of,
    user_path,
)
from mlx_qlora.data.rows import FORMATS, ROW_DATE, Template, detect_format
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, DataError, check_choices, option, require

PEEKED = 100  # rows that are looked at to find a file's format


@dataclass(frozen=True)
class DataConfig:
    """Where the rows are and how they become tokens and labels."""

    path: str | None = option(
        None,
        "rows: a JSONL, JSON, CSV or Parquet file (also .gz), a folder or a glob of them, or a "
        "data set on the hub as owner/name[/config][:split]",
    )
    validation_path: str | None = option(None, "validation rows; null takes them from `split`")
    test_path: str | None = option(None, "test rows; null takes them from `split`")
    split: list[float] = option(
        [0.8, 0.1, 0.1], "shares of `path` that are trained, validated and tested"
    )
    format: str = option(
        "auto", "the fields of a row; auto finds it for each file", choices=("auto", *FORMATS)
    )
    template: str = option(
        "auto",
        "how a row is written: alpaca, chat (the model's chat template), a file with a chat "
        "template; auto takes alpaca for instructions and chat for messages",
    )
    train_on: str = option(
        "response", "learn the response alone, or all tokens", choices=("response", "all")
    )
    max_length: int = option(2048, "most tokens in a row; also the width of packed rows")
    truncation: str = option(
        "left-context",
        "of longer rows: cut what stands before the first answer, cut the end (right), refuse "
        "them (drop), or stop (error)",
        choices=TRUNCATION,
    )
    packing: bool = option(True, "put several rows side by side, so that little is padded")
    shuffle: bool = option(True, "train in another order each epoch; false keeps the file's")
    strict: bool = option(False, "stop if any row is refused")
    refused_path: str | None = option(None, "write refused rows, with reasons, to this JSONL file")
    num_workers: int | None = option(
        None, "processes that tokenise; null takes the performance cores"
    )
    cache_dir: str | None = option(
        "auto",
        "folder that keeps the tokens of files for the next run, and may be deleted at any time; "
        "auto is ~/.cache/mlx-qlora, null keeps none",
    )

    def __post_init__(self) -> None:
        check_choices("data", self)
        require(self.max_length >= 2, "data.max_length", "be at least 2", self.max_length)
        shares = self.split
        legal = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
        require(legal and shares[0] > 0, "data.split", "be three shares that sum to 1", shares)
        workers = self.num_workers
        require(workers is None or workers >= 0, "data.num_workers", "be at least 0", workers)
        if self.template == "alpaca" and self.format in ("messages", "sharegpt"):
            raise ConfigError(
                f"data.template=alpaca cannot write rows of data.format={self.format}; "
                "set data.template=chat"
            )


def read_examples(
    source: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: DataConfig | None = None,
    *,
    console: Console | None = None,
) -> Examples:
    """Reads, renders and tokenises all rows of one source.

    Args:
        source: a path as `data.path` takes it, or rows as dicts. Of a folder that names its parts
            the training files are read.
        tokenizer: the model's.
        config: template, lengths and what is learned; its own paths are not read.
        console: where a progress bar goes if there is much to do; none if not given.

    Returns:
        The kept rows; `.report` says what was refused and why, by line.

    Raises:
        DataError: the source is missing, or no row of it can be used; with `strict`, if any
            cannot.
        ConfigError: a template that cannot be read, or that does not fit the rows.
    """
    config = config or DataConfig()
    if isinstance(source, (str, Path)):
        wanted = str(source), find_files(source)["train"]
    else:
        wanted = "rows", [RowFile("rows", "memory", list(source))]
    return _read_all([wanted], tokenizer, config, console)[0]


def _read_all(
    wanted: list[tuple[str, list[RowFile]]],
    tokenizer: Tokenizer,
    config: DataConfig,
    console: Console | None,
) -> list[Examples]:
    """Examples of each (name, files); what was refused of all of them is written to one file."""
    refused_path = None
    if config.refused_path is not None:
        refused_path = user_path(config.refused_path, "data.refused_path")
        _spare_the_data(refused_path, wanted)
    made = [_read_files(name, files, tokenizer, config, console) for name, files in wanted]
    if refused_path is not None:
        write_refused(refused_path, [(m.report, files) for m, (_, files) in zip(made, wanted)])
    for examples in made:
        _check_kept(examples.report, config)
    return made


def _read_files(
    source: str,
    files: list[RowFile],
    tokenizer: Tokenizer,
    config: DataConfig,
    console: Console | None,
) -> Examples:
    report = DataReport(source)
    recipe = _recipe(config, tokenizer, report)
    in_files = all(file.kind != "memory" for file in files)
    entry = store = None
    if config.cache_dir is not None and in_files:
        key = _cache_key(files, tokenizer, recipe, config)
        entry = cache_folder(config.cache_dir) / "tokens" / key
        store = cached(entry)
    report.cached = store is not None
    if store is None:
        with _Bar(console, sum(file.size for file in files)) as bar:
            pieces = _pieces(files, report, tokenizer, recipe, config, bar)
            about: dict[str, Any] = {}
            told = _then_tell(pieces, report, about)
            store = on_disk(entry, told, about) if in_files else in_memory(told)
        if entry is not None:
            forget_unused(entry.parent)
    else:
        report.restore(store.about)
        for told, file in zip(report.files, files):  # the same content may lie elsewhere today
            told.name = file.name
    report.measure(store)
    return Examples(store, report)


def cache_folder(name: str) -> Path:
    """The folder that `data.cache_dir` names."""
    if name != "auto":
        return user_path(name, "data.cache_dir")
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-qlora"


def _recipe(config: DataConfig, tokenizer: Tokenizer, report: DataReport) -> Recipe:
    name, source = config.template, tokenizer.chat_template
    if name not in ("auto", "alpaca", "chat"):
        name = "chat"
        source = report.chat_template = read_template(config.template)
    elif name == "chat" and source is None:
        raise ConfigError(
            "data.template=chat, but the model has no chat template; name a file with one"
        )
    report.template = config.template
    return Recipe(Template(name, source), config.train_on, config.max_length, config.truncation)


def read_template(path: str) -> str:
    """The text of a file with a chat template.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return user_path(path, "data.template").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.template must be auto, alpaca, chat or a file with a chat template; {path!r} "
            f"cannot be read: {error}"
        ) from None


def _cache_key(
    files: list[RowFile], tokenizer: Tokenizer, recipe: Recipe, config: DataConfig
) -> str:
    contents = [
        str(getattr(hub_dataset(file), "_fingerprint", file.path))
        if file.kind == "hub"
        else file.content_hash()
        for file in files
    ]
    decides = (VERSION, ROW_DATE, recipe, config.format, tokenizer.special_tokens)
    text = repr((decides, tokenizer.fingerprint, contents))
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _pieces(
    files: list[RowFile],
    report: DataReport,
    tokenizer: Tokenizer,
    recipe: Recipe,
    config: DataConfig,
    bar: "_Bar",
) -> Iterator[Piece]:
    """The pieces of all files in order; the report is filled in on the way."""

    def work() -> Iterator[Chunk]:
        for number, file in enumerate(files):
            rows = raw_rows(file)
            peeked = list(islice(rows, PEEKED))
            form = config.format if config.format != "auto" else _format_of(peeked)
            if recipe.template.name == "alpaca" and form in ("messages", "sharegpt"):
                raise ConfigError(
                    f"{file.name} holds {form}, which data.template=alpaca cannot write; "
                    "set data.template=chat"
                )
            report.files.append(FileReport(file.name, form, unit_of(file)))
            yield from chunks(number, file.name, form, chain(peeked, rows))

    n_workers = default_workers() if config.num_workers is None else config.num_workers
    for made in encode_chunks(work(), tokenizer, recipe, n_workers):
        file = report.files[made.chunk.file]
        file.read += made.read
        file.kept += len(made.piece.rows)
        file.refused += made.refused
        bar.advance(made.chunk.size)
        yield made.piece


def _format_of(peeked: list[tuple[int, Any]]) -> str:
    """The format of the first row that has one; "auto" leaves it to each row."""
    for _, raw in peeked:
        try:
            row = parse(raw)
            if isinstance(row, Mapping):
                return detect_format(row)
        except DataError:
            continue
    return "auto"


def _then_tell(
    pieces: Iterator[Piece], report: DataReport, about: dict[str, Any]
) -> Iterator[Piece]:
    yield from pieces
    about.update(report.as_dict())


def _spare_the_data(refused: Path, wanted: list[tuple[str, list[RowFile]]]) -> None:
    """Refuses to write refused rows over the data, or where the next run would read them.

    Raises:
        ConfigError: naming the path.
    """
    place = refused.resolve()
    for name, files in wanted:
        if files[0].kind not in KINDS:
            continue
        paths = [Path(file.path).resolve() for file in files if isinstance(file.path, Path)]
        folder = Path(name).expanduser().resolve()
        inside = folder.is_dir() and folder in place.parents
        matched = fnmatch.fnmatch(place.name, folder.name) and place.parent == folder.parent
        if place in paths or inside or matched:
            raise ConfigError(
                f"data.refused_path: {refused} is among the rows of {name}; name another file"
            )


def _check_kept(report: DataReport, config: DataConfig) -> None:
    if not report.kept:
        empty = "" if report.read else ": it holds no row at all"
        raise DataError(f"no usable row in {report}{empty}")
    if config.strict and report.refused:
        raise DataError(
            f"data.strict: {report.source} has {len(report.refused):,} rows that cannot be used:\n"
            f"{report.refusals(20)}"
        )


class _Bar:
    """A progress bar by bytes, for what takes longer than a moment."""

    LEAST = 4 << 20

    def __init__(self, console: Console | None, size: int) -> None:
        shown = console is not None and console.is_terminal and size >= self.LEAST
        columns = (TextColumn("tokenising"), BarColumn(bar_width=20), TimeRemainingColumn())
        self._live = Progress(*columns, console=console, disable=not shown, transient=True)
        self._task = self._live.add_task("", total=size)

    def __enter__(self) -> "_Bar":
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def advance(self, size: int) -> None:
        """Some bytes of the files are done."""
        self._live.advance(self._task, size)


# ---- the parts of a run ------------------------------------------------------------------------
def train_validation_test(
    config: DataConfig, tokenizer: Tokenizer, seed: int, console: Console | None = None
) -> tuple[Examples, Examples | None, Examples | None]:
    """The three parts of a run's data: files where they are named, `split` for the others.

    Raises:
        ConfigError: no training file is named.
        DataError: a file cannot be used, or nothing is left to train on.
    """
    if config.path is None:
        raise ConfigError("data.path is missing; name a file of rows with --data FILE")
    found = find_files(config.path)
    named = {"validation": config.validation_path, "test": config.test_path}
    for part, path in named.items():
        if path is not None:
            found[part] = find_files(path)["train"]

    shares = list(config.split)
    for i, part in enumerate(named, 1):
        if found[part]:
            shares[i] = 0.0  # files of its own: this part of `split` is trained instead
    shares[0] = 1.0 - shares[1] - shares[2]
    wanted = {part: (config.path, files) for part, files in found.items() if files}
    wanted |= {part: (path, found[part]) for part, path in named.items() if path is not None}
    read = dict(zip(wanted, _read_all(list(wanted.values()), tokenizer, config, console)))

    parts = read["train"].split(shares, seed)
    if not len(parts[0]):
        raise DataError(
            f"{config.path}: no row is left to train on; raise data.split's first share"
        )
    for i, part in enumerate(named, 1):
        if part in read:
            parts[i] = read[part]
            parts[i].report.leaked = int(np.isin(parts[i].contents, parts[0].contents).sum())
    train, validation, test = (part if len(part) else None for part in parts)
    assert train is not None
    return train, validation, test
