"""Stretches of text become token ids, and which of them are learned.

Context and answers are tokenised apart, so that what stands before an answer has exactly the ids
that the tuned model will be asked with; an answer is tokenised behind the last characters of its
context, so that it has the ids of a continuation.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_qlora.data.template import Segments
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError

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
