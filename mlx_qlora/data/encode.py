"""Text becomes ids and labels, in as many processes as help."""

import functools
import itertools
import json
import platform
import subprocess
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlx_qlora import device
from mlx_qlora.data.chats import Segments, Template
from mlx_qlora.data.formats import parse
from mlx_qlora.data.marks import row_weight, with_marks
from mlx_qlora.data.preferences import ANSWERS, JUDGEMENTS, PAIRS, read_judgement, read_pair
from mlx_qlora.data.rows import SYSTEM, Chat, Pair, Said, read_row, unread_fields, with_system
from mlx_qlora.data.store import Stored, TokenStore, hash64
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError

# ---- text -> ids ---------------------------------------------------------------------------------

TAIL = 16  # characters of context that an answer is tokenised after


@dataclass(frozen=True)
class Encoded:
    """One row in ids."""

    ids: np.ndarray  # (n,) int32
    learned: np.ndarray  # (n,) bool; whether an id is supervised as the next token
    context: int  # ids before the first answer
    weights: np.ndarray  # (n,) float32, of the ids as labels
    cut: int = 0  # ids that truncation removed
    starts: tuple[int, ...] = ()  # of documents after the first, where a row is several

    def part(self, which: Any, context: int, cut: int) -> "Encoded":
        """Some of the ids, of which the first is never learned."""
        learned, weights = self.learned[which], self.weights[which]
        learned[:1], weights[:1] = False, 0
        return Encoded(self.ids[which], learned, context, weights, cut)


def joined(parts: list[Encoded]) -> Encoded:
    """Documents of one row, end to end."""
    arrays = zip(*((part.ids, part.learned, part.weights) for part in parts))
    ids, learned, weights = map(np.concatenate, arrays)
    starts, cut = np.cumsum([len(part.ids) for part in parts[:-1]]), sum(p.cut for p in parts)
    return Encoded(ids, learned, parts[0].context, weights, cut, tuple(starts.tolist()))


def encode_rows(
    tokenizer: Tokenizer, rows: list[Segments], prompt_weight: float = 0.0
) -> list[Encoded]:
    """Token ids of rows, with one BOS if the model expects one and an end after the answer.

    The token that ends a turn is learned. After the last answer there is always one: the model's
    EOS if the template wrote none. Text after an end (a line break) is context, or left out. As
    labels the ids of context weigh `prompt_weight`, those of an answer what its segment does.
    """
    rows = [[segment for segment in segments if segment[0]] for segments in rows]
    texts = []
    for segments in rows:
        before = ""
        for text, _ in segments:
            texts.append(before + text)
            before = texts[-1][-TAIL:]
    ids = iter(tokenizer.encode_batch(texts))
    return [_assemble(tokenizer, segments, ids, prompt_weight) for segments in rows]


def _assemble(
    tokenizer: Tokenizer, segments: Segments, encoded: Iterator[list[int]], prompt_weight: float
) -> Encoded:
    """One row from the ids of its segments; all but the first are encoded after a tail."""
    ids: list[int] = []
    spans: list[tuple[int, int, float]] = []  # of learned ids, with their weights
    before = ""
    for text, weight in segments:
        new = next(encoded)
        new = _without_tail(tokenizer, new, before, text) if before else _one_bos(tokenizer, new)
        if weight:
            # In a text without a prompt the BOS is not part of the answer.
            lead = int(not ids and tokenizer.adds_bos and new[:1] == [tokenizer.bos_id])
            end = _after_last_end(tokenizer, new) or len(new)
            spans.append((len(ids) + lead, len(ids) + end, weight))
        ids += new
        before = (before + text)[-TAIL:]
    context, stop = (spans[0][0], spans[-1][1]) if spans else (len(ids), 0)
    ids = ids[:stop]
    if ids and ids[-1] not in tokenizer.eos_ids:
        ids.append(tokenizer.eos_id)
        spans.append((stop, stop + 1, spans[-1][2] if spans else 1))
    learned, weights = np.zeros(len(ids), bool), np.full(len(ids), prompt_weight, np.float32)
    for start, end, weight in spans:
        learned[start:end], weights[start:end] = True, weight
    # There is nothing before the first token to predict it from.
    learned[:1], weights[:1] = False, 0
    return Encoded(np.array(ids, np.int32), learned, context, weights)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, with exactly one BOS if the model expects one."""
    return _one_bos(tokenizer, tokenizer.encode(prompt))


def _one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_id
    if not tokenizer.adds_bos or bos is None:
        return ids
    # A template's file may begin with a line break.
    begins = bos in ids and not tokenizer.decode(ids[: ids.index(bos)]).strip()
    return ids if begins else [bos, *ids]


def _without_tail(tokenizer: Tokenizer, joint: list[int], tail: str, text: str) -> list[int]:
    """Token ids of a text, from `joint`, those of the text after the tail of its context."""
    tail_ids = _encode_tail(tokenizer, tail)
    if joint[: len(tail_ids)] == tail_ids:
        return joint[len(tail_ids) :]
    # A token straddles the border. Almost none straddles a line break, so the text is tokenised
    # after one; on its own would be wrong, as a SentencePiece model begins a text with a space.
    break_ids, ids = _encode_tail(tokenizer, "\n"), tokenizer.encode("\n" + text)
    if ids[: len(break_ids)] == break_ids:
        return ids[len(break_ids) :]
    return tokenizer.encode(text)


@functools.lru_cache(maxsize=1024)  # most rows of a format end their context alike
def _encode_tail(tokenizer: Tokenizer, tail: str) -> list[int]:
    return tokenizer.encode(tail)


def _after_last_end(tokenizer: Tokenizer, ids: list[int]) -> int:
    """The place after the token that ends an answer, if only space follows it; else 0."""
    place = next((n for n in range(len(ids), 0, -1) if ids[n - 1] in tokenizer.eos_ids), 0)
    return place if place and not tokenizer.decode(ids[place:]).strip() else 0


TRUNCATION = ("left-context", "right", "drop", "error")


class TooLong(DataError):
    """A row is longer than `max_length`, and `truncation` is "error": nothing is trained."""


def fit(row: Encoded, tokenizer: Tokenizer, max_length: int, truncation: str) -> Encoded:
    """The row, cut to `max_length` if it is longer.

    "left-context" cuts what precedes the first answer, from its left but after the BOS, and never
    an answer; "right" cuts the end. A DataError if the row is refused, or nothing to learn is left.
    """
    n = len(row.ids)
    excess = n - max_length
    too_long = f"{n} tokens, longer than data.max_length={max_length}"
    if excess > 0 and truncation == "right":
        # Context after the last learned id would teach nothing.
        end = int(max(np.flatnonzero(row.learned[:max_length]), default=-1)) + 1
        row = row.part(slice(end), row.context, n - end)
    elif excess > 0 and truncation == "left-context":
        start = int(row.ids[0] == tokenizer.bos_id)
        if row.context - excess < max(start, 1):  # the first token of all is never learned
            raise DataError(
                f"{n} tokens, {n - row.context} of them from the first answer on, which leaves no "
                f"room in data.max_length={max_length}; raise it, or cut the end with "
                "data.truncation=right"
            )
        kept = np.r_[:start, start + excess : n]
        row = row.part(kept, row.context - excess, excess)
    elif excess > 0 and truncation == "error":
        raise TooLong(f"{too_long}; shorten it, or set data.truncation")
    elif excess > 0:
        raise DataError(too_long)
    if not row.learned.any():
        where = f" within data.max_length={max_length}" if row.cut else ""
        raise DataError(f"no supervised token{where}")
    return row


# ---- many rows, in many processes ----------------------------------------------------------------

CHUNK_BYTES = 1 << 20  # raw rows that a worker gets at once
CHUNK_ROWS = 4096
# This much is encoded here first: starting workers for less would take longer than the work.
BEFORE_WORKERS = 4 * CHUNK_BYTES
LONGEST_REASON = 600  # characters; what to do stands at the end
Refused = list[tuple[int, str]]  # (line, reason)


@dataclass
class Chunk:
    """Raw rows of one file that are encoded together, with their lines and rough size."""

    file: int  # its number in the report
    name: str
    form: str  # its format
    rows: list[tuple[int, Any]] = field(default_factory=list)
    size: int = 0  # bytes


def chunks(file: int, name: str, form: str, rows: Iterable[tuple[int, Any]]) -> Iterator[Chunk]:
    """Cuts the rows of a file into chunks of about CHUNK_BYTES."""
    chunk = Chunk(file, name, form)
    for line, raw in rows:
        chunk.rows.append((line, raw))
        chunk.size += len(raw) if isinstance(raw, bytes) else _rough_size(raw)
        if chunk.size >= CHUNK_BYTES or len(chunk.rows) >= CHUNK_ROWS:
            yield chunk
            chunk = Chunk(file, name, form)
    if chunk.rows:
        yield chunk


def _rough_size(row: Any) -> int:
    if isinstance(row, (dict, list)):
        return sum(map(_rough_size, row.values() if isinstance(row, dict) else row))
    return len(row) if isinstance(row, str) else 8


@dataclass(frozen=True)
class Encoder:
    """Makes ids and labels of raw rows: all that decides what becomes of a row."""

    tokenizer: Tokenizer
    template: Template
    train_on: str  # "response" or "all"
    max_length: int
    truncation: str  # one of TRUNCATION
    columns: dict[str, str] = field(default_factory=dict)  # our names of fields -> the rows'
    system: str | None = None  # the message that rows without one begin with
    prompt_weight: float = 0.0  # of what is no answer, as labels
    kind: str = ANSWERS  # of the rows, as `preferences` names them

    def encode(self, chunk: Chunk) -> tuple[TokenStore, Refused, Counter[str]]:
        """The rows that are kept, the others, and how often a field is not used.

        What is wrong with one row affects no other, unless `truncation` is "error".
        """
        written: list[tuple[int, int, list[Segments], set[str], float]] = []
        refused: Refused = []
        for line, raw in chunk.rows:
            try:
                written.append((line, *self._written(parse(raw), chunk.form)))
            except DataError as reason:
                refused.append((line, _one_line(reason)))
            except RecursionError:
                refused.append((line, "nested too deeply"))

        texts = [segments for _, _, documents, _, _ in written for segments in documents]
        learns_all = self.train_on == "all"
        prompt_weight = 1.0 if learns_all else self.prompt_weight
        encoded = iter(encode_rows(self.tokenizer, texts, prompt_weight))
        kept: list[Stored] = []
        unused = Counter[str]()
        for line, content, documents, unread, weight in written:
            parts = [next(encoded) for _ in documents]
            if learns_all:
                parts = [replace(part, learned=np.arange(len(part.ids)) > 0) for part in parts]
            try:
                fitted = (self.tokenizer, self.max_length, self.truncation)
                row = joined([fit(part, *fitted) for part in parts])
            except TooLong as reason:
                raise DataError(f"{chunk.name}:{line}: {reason}") from None
            except DataError as reason:
                refused.append((line, _one_line(reason)))
            else:
                weights = weight * row.weights
                if self.kind == PAIRS:  # of the rejected document the answer alone
                    rejected = np.arange(len(weights)) < row.starts[0]
                    weights = np.where(rejected & ~row.learned, 0, weights)
                arrays = row.ids, row.learned, weights, row.starts
                kept.append((*arrays, row.cut, chunk.file, line, content))
                unused.update(unread)
        forget_several_systems(unused)
        return TokenStore.of(kept), sorted(refused), unused

    def _written(self, row: Any, form: str) -> tuple[int, list[Segments], set[str], float]:
        """A hash of what a row says, its documents, fields that are not used, and its weight.

        The answers of a pair are one document each, the rejected one first; the weight of an answer
        that is judged to be a bad one is -1.
        """
        row, weight = with_marks(row, self.columns), 1.0
        if self.kind == PAIRS:
            sides, unread = read_pair(row, self.columns)
        elif self.kind == JUDGEMENTS:
            said, is_good, unread = read_judgement(row, form, self.columns)
            sides, weight = [said], 1.0 if is_good else -1.0
        else:
            sides = [read_row(row, form, self.columns)]
            unread = unread_fields(row, form, sides[0], self.columns)
            named = {*self.columns.values()}
            weight = row_weight({k: v for k, v in row.items() if k not in named})
        documents: list[Segments] = []
        for said in sides:
            if self.train_on == "all" and isinstance(said, Chat):
                turns = zip(said.messages, said.learned)
                if any(m["role"] == "assistant" and not learned for m, learned in turns):
                    why = "an answer is marked not to be learned; leave out data.train_on=all"
                    raise DataError(why)
            if isinstance(said, Chat) and said.messages[0]["role"] == "system":
                unread |= {"data.system", SYSTEM + said.messages[0]["content"]}
            said_to = with_system(said, self.system)
            texts, of_messages = self.template.documents(said_to, self.tokenizer)
            if isinstance(said_to, Pair) and self.template.source and self.template.name != "chat":
                ends = said_to.prompt[-1:], said_to.completion[:1]
                if all(ends) and not any(map(str.isspace, ends)):
                    unread.add("data.template")
            if self.kind != ANSWERS and len(texts) > 1:
                raise DataError(
                    "has several answers, which the chat template writes one by one; move all but "
                    "the last one into the prompt"
                )
            documents += texts
            unread |= of_messages
        content = b"".join(map(_content, sides)) + (b"bad" if weight < 0 else b"")
        return hash64(content), documents, unread, weight


def forget_several_systems(counted: Counter[str]) -> None:
    """Leaves a system message among what is counted if it is the only one: it may be all rows'."""
    systems = [mark for mark in counted if mark.startswith(SYSTEM)]
    if len(systems) > 1:
        for mark in systems:
            del counted[mark]


_JSON = json.JSONEncoder(sort_keys=True, default=str)


def _content(said: Said) -> bytes:
    """What a row says and no more: rows that differ only in an id are copies of each other."""
    try:
        fields = {k: v for k, v in vars(said).items() if k != "options" or v is not None}
        said_as = [type(said).__name__, fields]
        encoded = _JSON.encode(said_as)
        if "\\ud" in encoded:  # of a character beyond 16 bits, or half of one
            json.dumps(said_as, default=str, ensure_ascii=False).encode()
        return encoded.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"holds {half!r}, half of a character; write it whole") from None
    except (TypeError, ValueError) as error:  # names that are not text, numbers of many digits
        raise DataError(f"cannot be written as JSON: {error}") from None


def _one_line(reason: Exception) -> str:
    """A reason without what a row, or a template, may have put into it: line breaks, escapes."""
    text = " ".join(Exception.__str__(reason).split())  # not yet spelled out
    text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def default_workers() -> int:
    """The performance cores: a Mac's slow ones would hold up the others' chunks."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if answer.strip().isdigit():
            return int(answer)
    return device.own_cores()


def encode_chunks(
    chunks: Iterator[Chunk], encoder: Encoder, n_workers: int
) -> Iterator[tuple[Chunk, TokenStore, Refused, Counter[str]]]:
    """Encodes chunks, in their order, reading only a few of them ahead.

    With 0 or 1 workers, and while there is little to do, the work is done in this process.
    """
    done = 0
    for chunk in chunks:
        yield chunk, *encoder.encode(chunk)
        done += chunk.size
        if n_workers > 1 and done >= BEFORE_WORKERS:
            break
    else:
        return
    import loky

    # Threads of a worker would only compete with the other workers.
    env = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
    ahead: deque[Any] = deque()
    with loky.ProcessPoolExecutor(n_workers, initializer=_begin, initargs=(encoder,), env=env) as p:
        try:
            while True:
                for chunk in itertools.islice(chunks, 2 * n_workers + 1 - len(ahead)):
                    ahead.append((chunk, p.submit(_encode_there, chunk)))
                if not ahead:
                    return
                chunk, future = ahead.popleft()
                yield chunk, *future.result()
        except loky.BrokenProcessPool:
            raise DataError(
                "a process that tokenises was killed, probably because memory ran out; set "
                f"data.num_workers=0, or to fewer than {n_workers}"
            ) from None
        finally:
            for _, future in ahead:
                future.cancel()


_encoder: Encoder  # a worker's own, set once when it starts


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_there(chunk: Chunk) -> tuple[TokenStore, Refused, Counter[str]]:
    return _encoder.encode(chunk)
