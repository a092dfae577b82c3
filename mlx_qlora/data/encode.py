"""Text becomes ids and labels, in as many processes as help."""

import functools
import json
import platform
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_qlora import device
from mlx_qlora.data.examples import ROW, Piece, hash64
from mlx_qlora.data.files import parse
from mlx_qlora.data.rows import Said, Segments, Template, read_row
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError

# ---- text -> ids ---------------------------------------------------------------------------------


TRUNCATION = ("left-context", "right", "drop", "error")


# Characters of context that an answer is tokenised behind.
TAIL = 16


class TooLong(DataError):
    """A row is longer than it may be, and nothing shall be trained then."""


@dataclass(frozen=True)
class Encoded:
    """One row in ids.

    Attributes:
        ids: (n,) int32.
        learned: (n,) bool; whether an id is supervised when it stands as the next one.
        context: how many ids stand before the first answer.
        cut: how many ids were cut off.
    """

    ids: np.ndarray
    learned: np.ndarray
    context: int
    cut: int = 0


def encode_rows(tokenizer: Tokenizer, rows: list[Segments]) -> list[Encoded]:
    """Token ids of rows, with one BOS if the model expects one and an end after the answer.

    The token that ends a turn is learned. After the last answer there is always one: the model's
    EOS if the template wrote none. What a template writes behind it (a line break) is context,
    and behind the last one it is left out.
    """
    texts = []
    for segments in rows:
        before = ""
        for text, _ in filter(_has_text, segments):
            texts.append(before + text)
            before = (before + text)[-TAIL:]
    encoded = iter(tokenizer.encode_batch(texts))
    return [_assemble(tokenizer, list(filter(_has_text, row)), encoded) for row in rows]


def _has_text(segment: tuple[str, bool]) -> bool:
    return bool(segment[0])


def _assemble(tokenizer: Tokenizer, segments: Segments, encoded: Iterator[list[int]]) -> Encoded:
    """One row, of the ids of its stretches; all but the first are encoded behind a tail."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []  # of learned ids
    before = ""
    for text, is_answer in segments:
        new = next(encoded)
        new = _without_tail(tokenizer, new, before, text) if before else _one_bos(tokenizer, new)
        if is_answer:
            # A text without a prompt: its BOS is nobody's answer.
            lead = int(not ids and tokenizer.adds_bos and new[:1] == [tokenizer.bos_id])
            end = _after_last_end(tokenizer, new) or len(new)
            spans.append((len(ids) + lead, len(ids) + end))
        ids += new
        before = (before + text)[-TAIL:]
    context, stop = (spans[0][0], spans[-1][1]) if spans else (len(ids), 0)
    ids = ids[:stop]
    if ids and ids[-1] not in tokenizer.eos_ids:
        ids.append(tokenizer.eos_id)
        spans.append((stop, stop + 1))
    learned = np.zeros(len(ids), bool)
    for start, end in spans:
        learned[start:end] = True
    learned[:1] = False  # nothing stands before the first token to predict it from
    return Encoded(np.array(ids, np.int32), learned, context)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, with exactly one BOS if the model expects one."""
    return _one_bos(tokenizer, tokenizer.encode(prompt))


def _one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *ids]
    return ids


def _without_tail(tokenizer: Tokenizer, joint: list[int], tail: str, text: str) -> list[int]:
    """Token ids of a text, from those of it behind the tail of what stands before it.

    Where one token would straddle the border between the two, the text is tokenised behind a
    line break instead, which hardly a token straddles. Alone would be wrong: a SentencePiece
    model opens a text of its own with a space.
    """
    for before, ids in ((tail, joint), ("\n", None)):
        behind = _encode_tail(tokenizer, before)
        ids = tokenizer.encode(before + text) if ids is None else ids
        if ids[: len(behind)] == behind:
            return ids[len(behind) :]
    return tokenizer.encode(text)


@functools.lru_cache(maxsize=1024)  # most rows of a format end their context alike
def _encode_tail(tokenizer: Tokenizer, tail: str) -> list[int]:
    return tokenizer.encode(tail)


def _after_last_end(tokenizer: Tokenizer, ids: list[int]) -> int:
    """The place behind the token that ends an answer, if only space follows it; else 0."""
    if tokenizer.eos_ids.isdisjoint(ids):
        return 0
    for place in range(len(ids), 0, -1):
        if ids[place - 1] in tokenizer.eos_ids:
            return place if not tokenizer.decode(ids[place:]).strip() else 0
    return 0


def fit(row: Encoded, tokenizer: Tokenizer, max_length: int, truncation: str) -> Encoded:
    """The row, cut to `max_length` if it is longer.

    "left-context" cuts what stands before the first answer, from its left but behind the BOS, and
    never an answer; "right" cuts the end.

    Raises:
        TooLong: it is longer, and `truncation` is "error".
        DataError: nothing to learn is left, or the row is to be refused.
    """
    n = len(row.ids)
    excess = n - max_length
    if excess > 0 and truncation == "right":
        # Context behind the last learned id would teach nothing.
        end = max(np.flatnonzero(row.learned[:max_length]), default=-1) + 1
        row = Encoded(row.ids[:end], row.learned[:end], row.context, n - end)
    elif excess > 0 and truncation == "left-context":
        start = int(row.ids[0] == tokenizer.bos_id)
        if row.context - excess < max(start, 1):  # the first token of all is never learned
            raise DataError(
                f"{n} tokens, of which {n - row.context} from the first answer on: longer than "
                f"max_length {max_length}; truncation=right would cut the end"
            )
        kept = np.r_[:start, start + excess : n]
        learned = row.learned[kept]
        learned[0] = False
        row = Encoded(row.ids[kept], learned, row.context - excess, excess)
    elif excess > 0:
        kind = TooLong if truncation == "error" else DataError
        remedy = "; shorten it, or set data.truncation" * (kind is TooLong)
        raise kind(f"{n} tokens, longer than max_length {max_length}{remedy}")
    if not row.learned.any():
        where = f" within max_length {max_length}" if row.cut else ""
        raise DataError(f"no supervised token{where}")
    return row


# ---- many rows -----------------------------------------------------------------------------------


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
    return device.own_cores()


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
