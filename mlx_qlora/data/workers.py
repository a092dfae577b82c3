"""Raw rows become pieces of token ids, in several processes where there is enough to do.

Threads would not help: parsing, rendering and tiktoken hold Python's lock. Workers are fresh
processes that import nothing of the caller's, so a script needs no `__main__` guard.
"""

import json
import platform
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_qlora import backend
from mlx_qlora.data.encode import Encoded, TooLong, encode_rows, fit
from mlx_qlora.data.formats import parse
from mlx_qlora.data.rows import Said, read_row
from mlx_qlora.data.store import ROW, Piece, hash64
from mlx_qlora.data.template import Segments, Template
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError

CHUNK_BYTES = 1 << 20  # of raw rows that a worker gets at once
CHUNK_ROWS = 4096
LONGEST_REASON = 300  # characters
# So much is done here first: starting workers for less would take longer than the work.
BEFORE_WORKERS = 4 * CHUNK_BYTES


@dataclass(frozen=True)
class Recipe:
    """All that decides, besides the tokenizer, what becomes of a row.

    Attributes:
        template: how it is written.
        train_on: "response" or "all".
        max_length: most ids in a row.
        truncation: what happens to a longer one.
    """

    template: Template
    train_on: str
    max_length: int
    truncation: str


@dataclass
class Chunk:
    """Raw rows of one file, on their way to a worker."""

    file: int
    name: str
    form: str
    rows: list[tuple[int, Any]]
    size: int


@dataclass
class Made:
    """What became of a chunk.

    Attributes:
        piece: the rows that are kept.
        refused: (line, reason) of the others.
        chunk: where they came from, without the rows.
    """

    piece: Piece
    refused: list[tuple[int, str]]
    chunk: Chunk
    read: int


def default_workers() -> int:
    """The performance cores: the slow ones of a Mac would hold up the others' chunks."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.stdout.strip().isdigit():
            return int(asked.stdout)
    return backend.own_cores()


def chunks(file: int, name: str, form: str, rows: Iterable[tuple[int, Any]]) -> Iterator[Chunk]:
    """Cuts the rows of a file into chunks of about CHUNK_BYTES."""
    chunk = Chunk(file, name, form, [], 0)
    for line, raw in rows:
        chunk.rows.append((line, raw))
        chunk.size += len(raw) if isinstance(raw, bytes) else _rough_size(raw)
        if chunk.size >= CHUNK_BYTES or len(chunk.rows) >= CHUNK_ROWS:
            yield chunk
            chunk = Chunk(file, name, form, [], 0)
    if chunk.rows:
        yield chunk


def _rough_size(row: Any) -> int:
    if isinstance(row, dict):
        return sum(map(_rough_size, row.values()))
    if isinstance(row, list):
        return sum(map(_rough_size, row))
    return len(row) if isinstance(row, str) else 8


def encode_chunks(
    work: Iterator[Chunk], tokenizer: Tokenizer, recipe: Recipe, n_workers: int
) -> Iterator[Made]:
    """Encodes chunks, in their order.

    Args:
        work: read only a few chunks ahead.
        tokenizer: sent to each worker once.
        recipe: what to make of a row.
        n_workers: processes; 0 or 1 does the work here.
    """
    done = 0
    for chunk in work:
        yield encode_chunk(chunk, tokenizer, recipe)
        done += chunk.size
        if n_workers > 1 and done >= BEFORE_WORKERS:
            break
    else:
        return
    import loky

    # A worker is one of many: its own threads would only be in the others' way.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
    ahead: deque[Any] = deque()
    pool = loky.ProcessPoolExecutor(
        n_workers, initializer=_begin, initargs=(tokenizer, recipe), env=quiet
    )
    with pool:
        try:
            for chunk in work:
                ahead.append(pool.submit(_encode_there, chunk))
                if len(ahead) > 2 * n_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except loky.BrokenProcessPool:
            raise DataError(
                "a process that tokenises was killed, probably for want of memory; set "
                "data.num_workers=0, or a smaller number than "
                f"{n_workers}"
            ) from None
        finally:
            for future in ahead:
                future.cancel()


_mine: tuple[Tokenizer, Recipe]  # a worker's own, set once when it starts


def _begin(tokenizer: Tokenizer, recipe: Recipe) -> None:
    global _mine
    _mine = tokenizer, recipe


def _encode_there(chunk: Chunk) -> Made:
    return encode_chunk(chunk, *_mine)


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, recipe: Recipe) -> Made:
    """Makes ids of the rows of a chunk; what is wrong with one row keeps to that row.

    Raises:
        DataError: a row is too long, and `truncation` is "error".
    """
    written: list[tuple[int, int, Segments]] = []
    refused: list[tuple[int, str]] = []
    for line, raw in chunk.rows:
        try:
            said = read_row(parse(raw), chunk.form)
            segments = recipe.template.segments(said, tokenizer)
            written.append((line, hash64(_content(said)), segments))
        except DataError as reason:
            refused.append((line, _one_line(reason)))
        except RecursionError:
            refused.append((line, "nested too deeply"))

    encoded = encode_rows(tokenizer, [segments for _, _, segments in written])
    tokens, rows, start = [np.zeros(0, np.int32)], [], 0
    for (line, content, _), row in zip(written, encoded):
        try:
            row = _fitted(row, tokenizer, recipe)
        except TooLong as reason:
            raise DataError(f"{chunk.name}:{line}: {reason}") from None
        except DataError as reason:
            refused.append((line, _one_line(reason)))
            continue
        stored = np.where(row.learned, ~row.ids, row.ids)
        supervised = int(np.count_nonzero(row.learned))
        about = (start, len(stored), supervised, row.cut, chunk.file, line)
        rows.append((*about, content, hash64(stored.tobytes())))
        tokens.append(stored)
        start += len(stored)
    told = Chunk(chunk.file, chunk.name, chunk.form, [], chunk.size)
    piece = Piece(np.concatenate(tokens), np.array(rows, ROW))
    return Made(piece, sorted(refused), told, len(chunk.rows))


def _fitted(row: Encoded, tokenizer: Tokenizer, recipe: Recipe) -> Encoded:
    if recipe.train_on == "all":
        row = replace(row, learned=np.arange(len(row.ids)) > 0)
    return fit(row, tokenizer, recipe.max_length, recipe.truncation)


_ENCODER = json.JSONEncoder(sort_keys=True, default=str)


def _content(said: Said) -> bytes:
    """What a row says and no more: rows that differ only in an id are copies of each other."""
    try:
        return _ENCODER.encode([type(said).__name__, vars(said)]).encode()
    except (TypeError, ValueError) as error:  # names that are no text, numbers of many digits
        raise DataError(f"holds what JSON cannot: {error}") from None


def _one_line(reason: Exception) -> str:
    """A reason without what a row, or a template, may have put into it: line breaks, escapes."""
    text = " ".join(str(reason).split())
    text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
