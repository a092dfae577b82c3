"""A source of rows becomes examples, and the three parts of a run.

Every row is either kept as it will be trained or refused with its line and the reason.
"""

import contextlib
import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mlx_qlora.data.chats import ALPACA, CANNOT_WRITE, NAMED, NO_TEMPLATE, ROW_DATE, Template
from mlx_qlora.data.encode import (
    TRUNCATION,
    Chunk,
    Encoder,
    chunks,
    default_workers,
    encode_chunks,
    forget_several_systems,
)
from mlx_qlora.data.examples import DataReport, Examples, FileReport
from mlx_qlora.data.files import find_files
from mlx_qlora.data.formats import RowFile, Rows, in_memory, parse, raw_rows
from mlx_qlora.data.preferences import ANSWERS, KIND_OF, PAIRS
from mlx_qlora.data.rows import ABSENT, COLUMNS, FORMATS, OPTIONAL_COLUMNS, SYSTEM, detect_format
from mlx_qlora.data.store import VERSION, TokenStore, cached, forget_unused, on_disk
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, DataError, DataWarning, did_you_mean, require
from mlx_qlora.fields import checked, config_section, option
from mlx_qlora.folders import staged, user_cache, user_path
from mlx_qlora.model.llama import LlamaConfig, check_ids
from mlx_qlora.progress import doing
from mlx_qlora.readers import read_text

PEEKED = 100  # rows that are looked at to find a file's format
# Held-out rows by default. Fewer say little, more take longer than they are worth; below
# FEWEST_TO_TEST a test would take rows that the training needs.
FEWEST_HELD_OUT, MOST_HELD_OUT, FEWEST_TO_TEST = 8, 500, 200


@config_section("data")
class DataConfig:
    """Where the rows are and how they become tokens and labels."""

    path: str | None = option(
        None,
        "rows: file, folder, glob, or hub data set. JSONL, JSON, CSV or Parquet, also .gz; on the "
        "hub owner/name[/config][:split]",
    )
    validation_path: str | None = option(None, "validation rows; null takes them from `split`")
    test_path: str | None = option(None, "test rows; null takes them from `split`")
    split: list[float] | str = option(
        "auto",
        "shares of `path` to train, validate and test on, such as [0.8, 0.1, 0.1]. auto: a tenth "
        f"to validate ({FEWEST_HELD_OUT} to {MOST_HELD_OUT} rows); from {FEWEST_TO_TEST} rows on, "
        "another tenth to test",
    )
    format: str = option(
        "auto", "which fields rows have. auto finds out for each file", choices=("auto", *FORMATS)
    )
    columns: dict[str, str] = option(
        {},
        "the rows' names for fields, where they differ, such as {instruction: question, output: "
        f"answer}}; of {', '.join(COLUMNS)}",
    )
    system: str | None = option(
        None,
        "system message for rows without one. Instructions are then written as chats, too",
    )
    template: str = option(
        "auto",
        "how a row is written: alpaca, alpaca-preamble (with Stanford's introductory sentence), "
        "chat (the model's chat template), or a file with a chat template. auto takes alpaca for "
        "instructions and chat for messages",
    )
    history: str = option(
        "auto",
        "chats with several answers: one text of all turns (joint), or one for each, written "
        "as the model is asked for it (as_asked). auto is joint where the template allows it",
        choices=("auto", "joint", "as_asked"),
    )
    train_on: str = option(
        "response", "learn the response alone, or all tokens", choices=("response", "all")
    )
    prompt_loss_weight: float = option(
        0.0,
        "weight of prompt tokens in the loss, where those of the response have 1. 0.01 to 0.1 may "
        "help where responses are short",
    )
    max_length: int = option(
        2048, "most tokens in a row. Raise it if `inspect` says that rows are cut; it takes memory"
    )
    truncation: str = option(
        "left-context",
        "longer rows: cut what is before the first answer (left-context), cut the end (right), "
        "refuse them (drop), or stop (error)",
        choices=TRUNCATION,
    )
    packing: bool = option(
        True, "has no effect: rows are always computed end to end, without padding"
    )
    shuffle: bool = option(True, "train in another order each epoch; false keeps the file's")
    strict: bool = option(False, "stop if any row is refused, or has a field that is not used")
    max_refused: float = option(0.5, "stop if a larger share of the rows is refused")
    refused_path: str | None = option(None, "write refused rows, with reasons, to this JSONL file")
    num_workers: int | None = option(
        None, "processes that tokenise. null: one for each performance core"
    )
    cache_dir: str | None = option(
        "auto",
        "folder that keeps tokens of files for the next run; it may be deleted at any time. auto "
        "is ~/.cache/mlx-qlora, null keeps none",
    )

    def __post_init__(self) -> None:
        rule, turned = f"name some of {', '.join(COLUMNS)}", {v: k for k, v in self.columns.items()}
        if turned.keys() <= COLUMNS.keys():
            rule = f"name fields first: {turned}"
        require(self.columns.keys() <= COLUMNS.keys(), "data.columns", rule, self.columns)
        require(self.system != "", "data.system", "not be empty", self.system)
        require(self.max_length >= 2, "data.max_length", "be at least 2", self.max_length)
        if self.split != "auto":
            shares = [] if isinstance(self.split, str) else [*self.split, 0.0][:3]
            legal = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
            rule = "be auto, or shares of train, validation and test that sum to 1"
            require(legal and shares[0] > 0, "data.split", rule, self.split)
            object.__setattr__(self, "split", shares)
        shares = "be a share from 0 to 1"
        require(0 <= self.max_refused <= 1, "data.max_refused", shares, self.max_refused)
        weight = self.prompt_loss_weight
        rule = "be at least 0, and finite"
        require(0 <= weight < math.inf, "data.prompt_loss_weight", rule, weight)
        if weight and self.train_on == "all":
            raise ConfigError(
                "data.train_on=all gives prompts a weight of 1, and data.prompt_loss_weight is "
                f"{weight:g}; leave one of them out"
            )
        workers = self.num_workers
        require(workers is None or workers >= 0, "data.num_workers", "be at least 0", workers)
        if self.template in ALPACA and self.format in ("messages", "sharegpt"):
            raise ConfigError(f"data.template={self.template} {CANNOT_WRITE}")


@checked
def read_examples(
    source: str | Path | Iterable[Mapping[str, Any]] | Mapping[str, Any],
    tokenizer: Tokenizer,
    config: DataConfig | None = None,
    *,
    objective: str = "sft",
    console: Console | None = None,
) -> Examples:
    """Reads, renders and tokenises all rows of one source.

    Args:
        source: a path as `data.path` takes it, or rows: dicts, columns of one length, a
            `datasets.Dataset`, or a table of pyarrow, pandas or polars. Of a folder that names its
            parts the training files are read.
        config: template, lengths and what is learned; its own paths are not read.
        objective: of the training: dpo, orpo and simpo read pairs of answers, kto judged ones.
        console: says what is done while it is done; what is refused or not used is no warning then.

    Returns:
        The kept rows; `.report` says what was refused and why, by line, or by row from 1 on.

    Raises:
        DataError: the source is missing, or no row of it can be used; with `strict`, if any
            cannot.
        ConfigError: a template that cannot be read, or that does not fit the rows.

    Warns:
        DataWarning: the report, of rows that are refused and fields that are not used.
    """
    config = config or DataConfig()
    if isinstance(source, (str, Path)):
        name, files = str(source), find_files(source)["train"]
    else:
        name, files = "rows", [in_memory(source)]
    rule = f"be one of {', '.join(map(repr, KIND_OF))}"
    require(objective in KIND_OF, "objective", rule, objective)
    with console.status("tokenising") if console else contextlib.nullcontext():
        examples = _read_all([(name, files)], tokenizer, config, KIND_OF[objective])[0]
    report = examples.report
    if console is None and (report.refused or report.unread):
        in_memory_too = any(file.unit == "row" and file.refused for file in report.files)
        about = "\n  rows are counted from 1" * in_memory_too
        warnings.warn(f"{report}{about}", DataWarning, stacklevel=3)  # above `checked`
    return examples


def read_without_split(config: DataConfig, tokenizer: Tokenizer, kind: str) -> Examples:
    """All training rows of `data.path`, as rows of a kind; errors as of `read_examples`."""
    files = find_files(config.path)["train"]
    return _read_all([(str(config.path), files)], tokenizer, config, kind)[0]


def _read_all(
    sources: list[tuple[str, list[RowFile]]], tokenizer: Tokenizer, config: DataConfig, kind: str
) -> list[Examples]:
    """Examples of each (name, files); the refused rows of all of them are written to one file."""
    refused_path = None
    if config.refused_path is not None:
        refused_path = user_path(config.refused_path, "data.refused_path")
        for name, files in sources:
            paths = [file.path.resolve() for file in files if isinstance(file.path, Path)]
            if refused_path.resolve() in paths:
                raise ConfigError(
                    f"data.refused_path: {refused_path} is among the rows of {name}; name another "
                    "file"
                )
    read = [_read_files(name, files, tokenizer, config, kind) for name, files in sources]
    if refused_path is not None:
        _write_refused(refused_path, [(e.report, files) for e, (_, files) in zip(read, sources)])
    for report in (examples.report for examples in read):
        if not report.kept:
            empty = "" if report.read else "; it has no rows"
            raise DataError(f"no usable row in {report}{empty}")
        if config.strict and report.refused:
            raise DataError(
                f"data.strict: {report.source} has {len(report.refused):,} rows that cannot be "
                f"used:\n{report.refusals(20)}"
            )
        if config.strict and report.unread:
            raise DataError(f"data.strict: {report.source}: {report.unread_fields()}")
    return read


def _read_files(
    source: str, files: list[RowFile], tokenizer: Tokenizer, config: DataConfig, kind: str
) -> Examples:
    report = DataReport(source, template=config.template, columns=config.columns, kind=kind)
    report.system, report.vocabulary = config.system, tokenizer.vocabulary
    report.truncation = config.truncation
    encoder = _encoder(config, tokenizer, report)
    entry = store = None
    if config.cache_dir is not None and all(file.kind != "memory" for file in files):
        folder = user_path(config.cache_dir, "data.cache_dir")
        folder = user_cache() if config.cache_dir == "auto" else folder
        entry = folder / "tokens" / _cache_key(files, encoder, config)
        store = cached(entry)
    if store is not None:
        report.cached = True
        report.restore(store.about, files)
    else:
        store = on_disk(entry, _pieces(files, report, encoder, config), report.as_dict)
        if entry is not None:
            forget_unused(entry.parent)
    report.measure(store)
    _take_out_marks(report)
    return Examples(store, report)


def _take_out_marks(report: DataReport) -> None:
    """Takes options that are not used from among the fields of rows that are not."""

    def count(mark: str) -> int:
        return sum(file.unread.pop(mark, 0) for file in report.files)

    def is_in_all(mark: str) -> bool:
        return count(mark) == report.kept > 0

    systems = {m for file in report.files for m in file.unread if m.startswith(SYSTEM)}
    for mark in systems:
        if is_in_all(mark):
            report.shared_system = mark.removeprefix(SYSTEM)
    report.own_systems = count("data.system")
    report.is_joined = is_in_all("data.template")
    for name in OPTIONAL_COLUMNS:
        if is_in_all(ABSENT + name):
            raise ConfigError(
                f"data.columns: no row of {report.source} has {report.columns[name]!r}, given "
                f"as {name}; correct the name, or leave it out"
            )


def own_template(config: DataConfig) -> str | None:
    """The text of the file that `data.template` names; None where it names a template by name."""
    if config.template in NAMED:
        return None
    try:
        return read_text(user_path(config.template, "data.template")).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.template must be auto, {', '.join(ALPACA)}, chat or a file with a template; "
            f"{config.template!r} cannot be read: {getattr(error, 'strerror', None) or error}"
            f"{did_you_mean(config.template, NAMED)}"
        ) from None


def _encoder(config: DataConfig, tokenizer: Tokenizer, report: DataReport) -> Encoder:
    name, report.chat_template = config.template, own_template(config)
    if report.chat_template is not None:  # of rows with tools, too
        name, tokenizer = "chat", tokenizer.with_chat_template(report.chat_template)
    elif name == "chat" and tokenizer.chat_template is None:
        raise ConfigError(f"data.template=chat, but {NO_TEMPLATE}")
    template = Template(name, tokenizer.chat_template, config.history)
    if report.kind != ANSWERS and config.train_on == "all":
        raise ConfigError(
            "data.train_on=all is for training.objective=sft, as the others compare answers; "
            "leave it out"
        )
    settings = (config.train_on, config.max_length, config.truncation)
    more = config.columns, config.system, config.prompt_loss_weight, report.kind
    return Encoder(tokenizer, template, *settings, *more)


def _cache_key(files: list[RowFile], encoder: Encoder, config: DataConfig) -> str:
    """A hash of all that decides ids and labels: files, tokenizer, template, settings, code."""
    contents = [file.content_hash() for file in files]
    settings = (config.format, config.train_on, config.max_length, config.truncation)
    settings += (sorted(config.columns.items()), config.system)
    settings += (encoder.prompt_weight, encoder.kind)
    tokenizer = (encoder.tokenizer.fingerprint, encoder.tokenizer.special_tokens)
    tools = encoder.tokenizer.tool_template
    text = repr((VERSION, ROW_DATE, encoder.template, tools, settings, tokenizer, contents))
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _pieces(
    files: list[RowFile], report: DataReport, encoder: Encoder, config: DataConfig
) -> Iterator[TokenStore]:
    """The pieces of all files in order; the report is filled in on the way."""

    def all_chunks() -> Iterator[Chunk]:
        for number, file in enumerate(files):
            form = config.format
            if form == "auto":  # its first rows are read twice, as they may be too large to keep
                form = _format_of(islice(raw_rows(file), PEEKED), config.columns)
            if report.kind == PAIRS:
                form = "pairs"
            if (name := encoder.template.name) in ALPACA and form in ("messages", "sharegpt"):
                raise ConfigError(f"{file.name} holds {form}; data.template={name} {CANNOT_WRITE}")
            report.files.append(FileReport(file.name, form, file.unit))
            yield from chunks(number, file.name, form, raw_rows(file))

    n_workers = default_workers() if config.num_workers is None else config.num_workers
    with doing("tokenising", sum(file.size for file in files), "bytes") as task:
        for chunk, piece, refused, unread in encode_chunks(all_chunks(), encoder, n_workers):
            file = report.files[chunk.file]
            unread += Counter(file.unread)
            forget_several_systems(unread)
            file.unread = dict(unread)
            file.read += len(chunk.rows)
            file.kept += len(piece.rows)
            file.refused += refused
            task.advance(chunk.size)
            yield piece


def _format_of(rows: Rows, columns: Mapping[str, str]) -> str:
    """The format of the columns, or the first row, that tell one; "auto" leaves it to each row."""
    for row in chain([columns], (parse(raw) for _, raw in rows)):
        if isinstance(row, Mapping):
            with contextlib.suppress(DataError):
                return detect_format(row)
    return "auto"


# ---- refused rows in a file ----------------------------------------------------------------------


def _write_refused(path: Path, sources: list[tuple[DataReport, list[RowFile]]]) -> None:
    """Writes a JSONL file of refused rows, whole or not at all: place, reason, and the row."""
    try:
        # Files are read once more, as rows that cannot be used are not kept in memory.
        folder = path.parent.resolve(strict=True)
        with staged(folder) as staging, open(staging / path.name, "w", -1, "utf-8") as out:
            for report, files in sources:
                for file_report, file in zip(report.files, files):
                    reasons = dict(file_report.refused)
                    for line, raw in raw_rows(file) if reasons else ():
                        if line in reasons:
                            where = {"file": file.name, "line": line, "reason": reasons[line]}
                            out.write(json.dumps({**where, "row": _text(raw)}) + "\n")
    except OSError as error:
        raise DataError(f"data.refused_path: {path} cannot be written: {error.strerror}") from None


def _text(raw: Any) -> Any:
    """A raw row as JSON can hold it; bytes that are no UTF-8 are escaped."""
    if isinstance(raw, bytes):
        return raw.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    if isinstance(raw, DataError):
        return None
    try:
        return json.loads(json.dumps(raw, default=str, allow_nan=False))
    except (TypeError, ValueError, RecursionError):  # what JSON cannot hold
        return repr(raw)[:10_000]


# ---- the parts of a run --------------------------------------------------------------------------


def train_validation_test(
    config: DataConfig, tokenizer: Tokenizer, seed: int, kind: str = ANSWERS
) -> tuple[Examples, Examples | None, Examples | None]:
    """The three parts of a run's data: files where they are named, `split` for the others.

    Its rows are of the `kind` that the run's objective reads; errors as of `read_examples`.
    """
    files_of = find_files(config.path)
    sources = {part: (str(config.path), files) for part, files in files_of.items() if files}
    named = {"validation": config.validation_path, "test": config.test_path}
    for part, path in named.items():
        if path is not None:
            sources[part] = path, find_files(path)["train"]
    read = dict(zip(sources, _read_all(list(sources.values()), tokenizer, config, kind)))
    for report in (examples.report for examples in read.values()):
        if (share := len(report.refused) / report.read) > config.max_refused:
            raise DataError(
                f"{share:.0%} of the rows of {report.source} cannot be used, and "
                f"data.max_refused={config.max_refused:g} is exceeded:\n{report.refusals()}"
            )

    train, *rest = _split(read["train"], config.split, [part in read for part in named], seed)
    if not len(train):
        raise DataError(
            f"{config.path}: no row is left to train on; set data.split=[1, 0, 0], or raise its "
            "first share"
        )
    for examples in (read[part] for part in named if part in read):
        examples.report.leaked = int(np.isin(examples.contents, train.contents).sum())
    parts = (read.get(part, share) for part, share in zip(named, rest))
    validation, test = (part if len(part) else None for part in parts)
    return train, validation, test


def _split(
    rows: Examples, split: list[float] | str, named: list[bool], seed: int
) -> list[Examples]:
    """Rows to train, validate and test on; none of a part that has files of its own (`named`)."""
    n, most_copies = len(rows), None
    if isinstance(split, str):
        if n < FEWEST_TO_TEST:
            held_out = 0 if named[0] else min(max(n // 10, FEWEST_HELD_OUT), n // 4)
            return [*rows.hold_out(held_out, seed), rows[:0]]
        # The same shares however a file grows, so that no trained row is held out later.
        share = min(0.1, MOST_HELD_OUT / n)
        split, most_copies = [1 - 2 * share, share, share], int(share * n) // 4
    shares = [0.0 if has_files else share for has_files, share in zip(named, split[1:])]
    return rows.split([1.0 - sum(shares), *shares], seed, most_copies)


def check_examples(tokenizer: Tokenizer, llama: LlamaConfig, *parts: Examples | None) -> None:
    """Refuse rows longer than the model's positions, or with a token that it has no row for."""
    for part in parts:
        if part and part.report.vocabulary not in ("", tokenizer.vocabulary):
            raise ConfigError(
                f"{part.report.source} was read with the tokenizer of another model; read it again "
                "with this one's"
            )
    longest = max(part.longest for part in parts if part)
    most = llama.max_position_embeddings
    if longest > most:
        raise ConfigError(
            f"a row has {longest} tokens, and the model was made for {most}; set "
            f"data.max_length={most}"
        )
    if tokenizer.vocab_size > llama.vocab_size:
        for example in chain.from_iterable(part or () for part in parts):
            check_ids(example.tokens, llama.vocab_size, example.place, tokenizer.decode)
