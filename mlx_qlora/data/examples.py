"""Rows become examples: token ids, and which of them are learned.

Every row is either kept as it will be trained or refused with its line and the reason.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.data.formats import read_rows
from mlx_qlora.data.template import FORMATS, detect_format
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, DataError, listing
from mlx_qlora.fields import check_choices, option, require


@dataclass(frozen=True)
class DataConfig:
    """Where the rows are and how they become tokens and labels."""

    path: str | None = option(None, "JSONL, JSON or CSV file of rows, also gzipped")
    validation_path: str | None = option(None, "validation rows; null takes them from `split`")
    test_path: str | None = option(None, "test rows; null takes them from `split`")
    format: str = option(
        "auto",
        "the fields of a row: instruction, input, output; prompt, completion; or text",
        choices=("auto", *FORMATS),
    )
    split: list[float] = option(
        [0.8, 0.1, 0.1], "shares of `path` that are trained, validated and tested"
    )
    train_on: str = option(
        "response", "learn the response alone, or all tokens", choices=("response", "all")
    )
    max_length: int = option(2048, "most tokens in a row; longer rows are refused by line")

    def __post_init__(self) -> None:
        check_choices("data", self)
        require(self.max_length >= 2, "data.max_length", "be at least 2", self.max_length)
        shares = self.split
        legal = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
        require(legal and shares[0] > 0, "data.split", "be three shares that sum to 1", shares)


@dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Attributes:
        tokens: (n,) int32.
        learned: (n,) bool; whether a token is supervised when it stands as the next one.
        line: where the row came from, counted from 1.
        digest: a hash of the prompt and the response, for splitting.
    """

    tokens: np.ndarray
    learned: np.ndarray
    line: int
    digest: bytes

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class DataReport:
    """What became of the rows: how many were read and kept, and why others were refused."""

    source: str
    format: str = "auto"
    read: int = 0
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        share = self.supervised / max(self.tokens, 1)
        text = (
            f"{self.source} ({self.format}): {self.read:,} rows read, {self.kept:,} kept, "
            f"{len(self.refused):,} refused; {self.tokens:,} tokens, {share:.0%} supervised"
        )
        if self.refused:
            text += "\n" + listing([f"line {line}: {why}" for line, why in self.refused], most=5)
        return text


class Examples(Sequence[Example]):
    """The kept rows of one source, in its order, with the report of how they were read."""

    def __init__(self, examples: Iterable[Example], report: DataReport) -> None:
        self._examples = list(examples)
        self.report = report

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self._examples[index], self.report)
        return self._examples[index]

    @property
    def digest(self) -> str:
        """A hash of what would be trained: all tokens and labels, in order."""
        hashed = hashlib.sha256()
        for example in self._examples:
            hashed.update(np.int64(len(example)).tobytes())
            hashed.update(example.tokens.tobytes() + example.learned.tobytes())
        return hashed.hexdigest()

    def split(self, shares: Sequence[float], seed: int = 0) -> list["Examples"]:
        """Divides by a hash of (seed, content) of each row.

        Adding rows to a file does not move the others between the parts, and copies of a row land
        in the same part; the shares are therefore met only on average.
        """
        borders = np.cumsum(shares)
        parts: list[list[Example]] = [[] for _ in shares]
        for example in self._examples:
            hashed = hashlib.sha256(f"{seed}:".encode() + example.digest).digest()
            where = int.from_bytes(hashed[:8], "big") / 2**64
            parts[min(int(np.searchsorted(borders, where, "right")), len(shares) - 1)].append(
                example
            )
        return [Examples(part, self.report) for part in parts]


def read_examples(
    source: str | Path | Iterable[Mapping[str, Any]], tokenizer: Tokenizer, config: DataConfig
) -> Examples:
    """Reads, renders and tokenises all rows of one source.

    Args:
        source: the path of a JSONL, JSON or CSV file, or rows as dicts.
        tokenizer: the model's.
        config: template, lengths and what is learned.

    Returns:
        The kept rows; `.report` says what was refused and why, by line.

    Raises:
        DataError: the file is missing or empty, or no row of it can be used.
    """
    if isinstance(source, (str, Path)):
        report = DataReport(str(source), config.format)
        rows = read_rows(Path(source).expanduser())
    else:
        report = DataReport("rows", config.format)
        rows = enumerate(source, 1)

    kept = []
    for line, row in rows:
        report.read += 1
        try:
            if isinstance(row, DataError):
                raise row
            if report.format == "auto" and isinstance(row, Mapping):
                report.format = detect_format(row)  # one format to a file: the first row's
            form = "alpaca" if report.format == "auto" else report.format
            prompt, response = FORMATS[form](row)
            example = _tokenize(prompt, response, line, tokenizer, config)
        except DataError as reason:
            report.refused.append((line, str(reason)))
            continue
        kept.append(example)
        report.tokens += len(example)
        report.supervised += int(example.learned.sum())
    report.kept = len(kept)
    if not kept:
        raise DataError(f"no usable row in {report}")
    return Examples(kept, report)


def _tokenize(
    prompt: str, response: str, line: int, tokenizer: Tokenizer, config: DataConfig
) -> Example:
    context, answer = encode_pair(tokenizer, prompt, response)
    n = len(context) + len(answer)
    if n > config.max_length:
        raise DataError(f"{n} tokens, longer than max_length {config.max_length}")
    tokens = np.array(context + answer, np.int32)
    learned = np.ones(n, bool)
    if config.train_on == "response":
        learned[: len(context)] = False
    learned[0] = False  # nothing stands before the first token to predict it from
    # The texts alone: rows that differ only in an id are copies, and must not part in `split`.
    content = json.dumps([prompt, response]).encode()
    digest = hashlib.sha256(content).digest()
    return Example(tokens, learned, line, digest)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, with exactly one BOS if the model expects one."""
    ids = tokenizer.encode(prompt)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return ids


def encode_pair(tokenizer: Tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the response with its end-of-sequence token.

    The two are tokenised in one go, and divided where the prompt alone ends. Where a token would
    straddle that border they are tokenised apart, because the prompt alone is what the tuned
    model will be asked with.
    """
    context = encode_prompt(tokenizer, prompt)
    whole = encode_prompt(tokenizer, prompt + response)
    if whole[: len(context)] == context:
        answer = whole[len(context) :]
    else:
        answer = tokenizer.encode(response)
    return context, [*answer, tokenizer.eos_id]


def train_validation_test(
    config: DataConfig, tokenizer: Tokenizer, seed: int
) -> tuple[Examples, Examples | None, Examples | None]:
    """The three parts of a run's data: files where they are named, `split` for the others.

    Raises:
        ConfigError: no training file is named.
        DataError: a file cannot be used, or nothing is left to train on.
    """
    if config.path is None:
        raise ConfigError("data.path is missing; name a JSONL file with --data FILE")
    whole = read_examples(config.path, tokenizer, config)
    shares = list(config.split)
    for part, path in ((1, config.validation_path), (2, config.test_path)):
        if path is not None:
            shares[part] = 0.0  # a file of its own: this part of `split` is trained instead
    shares[0] = 1.0 - shares[1] - shares[2]
    train, validation, test = whole.split(shares, seed)
    if not len(train):
        raise DataError(
            f"{config.path}: no row is left to train on; raise data.split's first share"
        )
    if config.validation_path is not None:
        validation = read_examples(config.validation_path, tokenizer, config)
    if config.test_path is not None:
        test = read_examples(config.test_path, tokenizer, config)
    return train, validation if len(validation) else None, test if len(test) else None
