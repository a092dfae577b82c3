"""Stretches of text become ids and a mask by construction, here and in worker processes."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.limits import small_chunks
from support.tiny_folder import write_tokenizer

from mlx_qlora.data.chats import Segments, Template
from mlx_qlora.data.encode import (
    Chunk,
    Encoded,
    Encoder,
    TooLong,
    chunks,
    default_workers,
    encode_chunks,
    encode_prompt,
    encode_rows,
    fit,
)
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import DataError

NAMES = ["tiny", "tiny_without_bos", "smollm2", "llama31", "sentencepiece"]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, smollm2: tuple[Any, Tokenizer], llama31: Tokenizer
) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "tiny": load_tokenizer(write_tokenizer(folder / "tiny")),
        "tiny_without_bos": load_tokenizer(write_tokenizer(folder / "without", bos=False)),
        "smollm2": smollm2[1],
        "llama31": llama31,
        "sentencepiece": load_tokenizer(write_sentencepiece(folder / "sentencepiece")),
    }


@pytest.fixture(params=NAMES, scope="module")
def tokenizer(request: pytest.FixtureRequest, made: dict[str, Tokenizer]) -> Tokenizer:
    return made[request.param]


@pytest.fixture(scope="module")
def tiny(made: dict[str, Tokenizer]) -> Tokenizer:
    return made["tiny"]


def write_sentencepiece(folder: Path) -> Path:
    """As Llama 2's: BPE with byte fallback and a dummy prefix."""
    import sentencepiece

    folder.mkdir()
    corpus = folder / "corpus.txt"
    words = "the quick brown fox jumps over the lazy dog and the capital of France is Paris"
    corpus.write_text("\n".join(words[i:] for i in range(len(words))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


def encode(tokenizer: Tokenizer, segments: Segments) -> Encoded:
    return encode_rows(tokenizer, [segments])[0]


def bos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def learned_of(row: Encoded) -> list[int]:
    return row.ids[row.learned].tolist()


# SmolLM2 lacks control characters and the highest planes; U+2581 is SentencePiece's space.
characters = st.characters(
    min_codepoint=32,
    max_codepoint=0x1FFFF,
    exclude_categories=["Cs", "Cc"],
    exclude_characters="\u2581",
)
words = st.sampled_from(["the", " fox", " ", "Par", "is", "\n", "a", "12", "é", "日", ".", "  "])
some_text = st.one_of(
    st.lists(words, min_size=1).map("".join), st.text(characters, min_size=1)
).filter(lambda text: not re.search(r"<\|?/?\w+\|?>", text))  # which may spell a special token
rows = st.lists(st.tuples(some_text, st.booleans()), min_size=1, max_size=6)
slowly = settings(deadline=None, max_examples=60)


# ---- masks and ids by construction -------------------------------------------------------------


@slowly
@given(prompt=some_text, answer=some_text)
def test_a_prompt_has_the_ids_it_is_asked_with_and_the_rest_is_learned(
    tokenizer: Tokenizer, prompt: str, answer: str
) -> None:
    row = encode(tokenizer, [(prompt, False), (answer, True)])
    alone, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    context = encode_prompt(tokenizer, prompt)
    assert row.ids[: row.context].tolist() == context == bos(tokenizer) + alone
    assert row.learned.tolist() == [i >= len(context) for i in range(len(row.ids))]
    assert row.ids[-1] == tokenizer.eos_id and row.ids.dtype == np.int32
    if whole[: len(alone)] == alone:
        assert row.ids.tolist() == [*bos(tokenizer), *whole, tokenizer.eos_id]


@slowly
@given(segments=rows)
def test_the_text_of_a_row_is_kept_and_exactly_its_answers_are_learned(
    tokenizer: Tokenizer, segments: Segments
) -> None:
    row = encode(tokenizer, segments)
    if not any(learned for _, learned in segments):
        assert len(row.ids) == 0
        return
    while not segments[-1][1]:
        segments = segments[:-1]
    first = bos(tokenizer)
    assert row.ids[: len(first)].tolist() == first
    assert row.ids[-1] == tokenizer.eos_id and row.learned[-1]
    assert not row.learned[0]
    if segments[0][1]:
        assert row.context == len(first)
    if segments[0][1] and not first:  # nothing stands before its first id
        row.learned[0] = True
    got, before = [], ""
    for end in range(1, len(row.ids)):
        if row.learned[end] != row.learned[end - 1] or end == len(row.ids) - 1:
            whole = tokenizer.decode(row.ids[len(first) : end])
            got += [(whole[len(before) :], bool(row.learned[end - 1]))]
            before = whole
    assert [run for run in got if run[0]] == joined(segments)


def joined(segments: Segments) -> Segments:
    """Neighbours of one kind together."""
    made: Segments = []
    for text, learned in segments:
        if made and made[-1][1] == learned:
            text = made.pop()[0] + text
        made.append((text, learned))
    return made


def test_half_a_character_becomes_the_replacement_character(tiny: Tokenizer) -> None:
    segments = [("a\ud83d", False), ("\ude00b", True)]
    row = encode(tiny, segments)
    assert tiny.decode(row.ids[1:-1]) == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("tiny", "quick bro", "wn"),
        ("llama31", "Par", "is"),
        ("llama31", "1", "23"),
        ("smollm2", "Par", "is"),
        ("smollm2", "  ", "x"),
        ("tiny", "<|e", "os|>"),
    ],
)
def test_a_token_that_would_straddle_the_border_is_cut_there(
    made: dict[str, Tokenizer], name: str, prompt: str, answer: str
) -> None:
    tokenizer = made[name]
    before, behind = tokenizer.encode(prompt), tokenizer.encode(answer)
    assert tokenizer.encode(prompt + answer) != before + behind
    row = encode(tokenizer, [(prompt, False), (answer, True)])
    assert row.ids.tolist() == [*bos(tokenizer), *before, *behind, tokenizer.eos_id]
    assert learned_of(row) == [*behind, tokenizer.eos_id]


@pytest.mark.parametrize("prompt", ["is\n", "is ", "quick bro", "the capital of France is Pa", "("])
@pytest.mark.parametrize("answer", ["Paris", "wn", "ris", " Paris", "  is", "é"])
def test_an_answer_does_not_begin_with_the_space_of_a_text_of_its_own(
    made: dict[str, Tokenizer], prompt: str, answer: str
) -> None:
    tokenizer = made["sentencepiece"]
    row = encode(tokenizer, [(prompt, False), (answer, True)])
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    if whole[: len(before)] == before:
        behind = whole[len(before) :]
    else:  # a token straddles the border: the ids are those behind a line break
        behind = tokenizer.encode("\n" + answer)[len(tokenizer.encode("\n")) :]
    assert row.ids.tolist() == [*bos(tokenizer), *before, *behind, tokenizer.eos_id]
    assert learned_of(row) == [*behind, tokenizer.eos_id]
    assert tokenizer.decode(row.ids[1:-1]) == prompt + answer
    if not answer.startswith(" "):
        assert behind != tokenizer.encode(answer)


def test_behind_a_special_token_an_answer_is_a_text_of_its_own(made: dict[str, Tokenizer]) -> None:
    tokenizer = made["sentencepiece"]
    for answer in ("Paris", " Paris", "\nis"):
        row = encode(tokenizer, [("is</s>", False), (answer, True)])
        whole = tokenizer.encode(f"is</s>{answer}")
        assert row.ids.tolist() == [*bos(tokenizer), *whole, tokenizer.eos_id]
        assert learned_of(row) == [*tokenizer.encode(answer), tokenizer.eos_id]


# ---- beginnings and ends -----------------------------------------------------------------------


def shown(tokenizer: Tokenizer, segments: Segments) -> tuple[str, str]:
    """All of a row as text, and what of it is learned."""
    row = encode(tokenizer, segments)
    return tokenizer.decode(row.ids), tokenizer.decode(learned_of(row))


@pytest.mark.parametrize(
    ("segments", "whole", "learned"),
    [
        ([("x", False), ("y", True)], "<bos>xy<eos>", "y<eos>"),
        ([("<bos>x", False), ("y", True)], "<bos>xy<eos>", "y<eos>"),
        ([("y", True)], "<bos>y<eos>", "y<eos>"),
        ([("<bos>y", True)], "<bos>y<eos>", "y<eos>"),
        ([("", False), ("y", True)], "<bos>y<eos>", "y<eos>"),
        ([("x", False), ("y<eos>", True)], "<bos>xy<eos>", "y<eos>"),
        ([("x", False), ("y<eos>\n ", True)], "<bos>xy<eos>", "y<eos>"),
        ([("x", False), ("y\n", True)], "<bos>xy\n<eos>", "y\n<eos>"),
        ([("x", False), ("y<eos>z", True)], "<bos>xy<eos>z<eos>", "y<eos>z<eos>"),
        ([("x", False), ("y<eos>z<eos>\n", True)], "<bos>xy<eos>z<eos>", "y<eos>z<eos>"),
        ([("x", False), ("y", True), ("z", False)], "<bos>xy<eos>", "y<eos>"),
        (
            [("x", False), ("y<eos>\n", True), ("z", False), ("w<eos>\n", True)],
            "<bos>xy<eos>\nzw<eos>",
            "y<eos>w<eos>",
        ),
        ([("x", False), ("y", True), ("z", False), ("w", True)], "<bos>xyzw<eos>", "yw<eos>"),
        ([("x", False), ("", True)], "", ""),
    ],
)
def test_a_row_has_one_beginning_and_a_learned_end(
    tiny: Tokenizer, segments: Segments, whole: str, learned: str
) -> None:
    def spelled(text: str) -> str:
        return text.replace("<bos>", "<|bos|>").replace("<eos>", "<|eos|>")

    written = [(spelled(text), is_learned) for text, is_learned in segments]
    assert shown(tiny, written) == (spelled(whole), spelled(learned))


def test_any_token_that_ends_a_turn_is_an_end(llama31: Tokenizer) -> None:
    for end in ("<|eot_id|>", "<|end_of_text|>"):
        assert shown(llama31, [("x", False), (f"y{end}", True)])[1] == f"y{end}"


def test_rows_of_a_batch_do_not_touch_each_other(tiny: Tokenizer) -> None:
    batch: list[Segments] = [
        [("x", False), ("", True)],
        [("a", True)],
        [("", False)],
        [("the", False), ("", False), (" fox", True), ("!", False), ("b", True)],
    ]
    together = encode_rows(tiny, batch)
    for row, segments in zip(together, batch):
        alone = encode(tiny, segments)
        assert row.ids.tolist() == alone.ids.tolist()
        assert row.learned.tolist() == alone.learned.tolist() and row.context == alone.context


def test_a_prompt_gets_one_bos_if_the_model_expects_one(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("the fox")
    assert encode_prompt(tokenizer, "the fox") == bos(tokenizer) + plain
    if tokenizer.adds_bos:
        spelled = tokenizer.special_tokens["bos_token"] + "the fox"
        assert encode_prompt(tokenizer, spelled) == tokenizer.encode(spelled)
        assert encode_prompt(tokenizer, spelled).count(tokenizer.bos_id) == 1


# ---- lengths -----------------------------------------------------------------------------------


def cut_slowly(
    row: list[tuple[int, bool]], context: int, most: int, truncation: str
) -> list[tuple[int, bool]] | None:
    """The row within `most` ids, one id at a time; None if it is refused."""
    row = list(row)
    if len(row) > most and truncation in ("drop", "error"):
        return None
    if len(row) > most and truncation == "right":
        row = row[:most]
        while row and not row[-1][1]:  # context that no answer follows
            row.pop()
    while len(row) > most:
        if context <= 1:  # something must stand before the first id of the answer
            return None
        del row[int(row[0][0] == 0)]  # the oldest id behind the BOS, whose id is 0
        context -= 1
        row[0] = (row[0][0], False)
    return row if any(learned for _, learned in row) else None


@slowly
@given(
    has_bos=st.booleans(),
    before=st.lists(st.just(False), max_size=8),
    behind=st.lists(st.booleans(), max_size=8),
    most=st.integers(2, 18),
    truncation=st.sampled_from(["left-context", "right", "drop", "error"]),
)
def test_a_row_is_cut_as_one_would_by_hand(
    tiny: Tokenizer,
    has_bos: bool,
    before: list[bool],
    behind: list[bool],
    most: int,
    truncation: str,
) -> None:
    learned = [*([False] if has_bos else []), *before, True, *behind]
    learned[0] = False
    context = len(learned) - len(behind) - 1
    ids = [0 if has_bos and not i else 10 + i for i in range(len(learned))]
    wanted = cut_slowly(list(zip(ids, learned)), context, most, truncation)
    weights = np.array(learned, np.float32)
    row = Encoded(np.array(ids, np.int32), np.array(learned), context, weights)
    if wanted is None:
        with pytest.raises(DataError) as caught:
            fit(row, tiny, most, truncation)
        too_long = len(ids) > most and truncation == "error"
        assert isinstance(caught.value, TooLong) == too_long
        return
    got = fit(row, tiny, most, truncation)
    assert list(zip(got.ids.tolist(), got.learned.tolist())) == wanted
    assert got.cut == len(ids) - len(wanted)
    assert got.context == context - (got.cut if truncation == "left-context" else 0)


def row_of(context: int, answer: int) -> Encoded:
    n = context + answer
    learned = np.arange(n) >= context
    return Encoded(np.arange(10, 10 + n, dtype=np.int32), learned, context, learned * 1.0)


@pytest.mark.parametrize(
    ("truncation", "kind", "reason"),
    [
        (
            "left-context",
            DataError,
            "9 tokens, 6 of them from the first answer on, which leaves no room in "
            "data.max_length=5; raise it, or cut the end with data.truncation=right",
        ),
        ("drop", DataError, "9 tokens, longer than data.max_length=5"),
        (
            "error",
            TooLong,
            "9 tokens, longer than data.max_length=5; shorten it, or set data.truncation",
        ),
    ],
)
def test_a_row_that_cannot_be_cut_says_why(
    tiny: Tokenizer, truncation: str, kind: type[DataError], reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        fit(row_of(3, 6), tiny, 5, truncation)
    assert type(caught.value) is kind and str(caught.value) == reason


def test_a_row_without_anything_to_learn_says_so(tiny: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^no supervised token within data.max_length=3$"):
        fit(row_of(3, 2), tiny, 3, "right")
    with pytest.raises(DataError, match=r"^no supervised token$"):
        fit(row_of(3, 0), tiny, 5, "right")
    with pytest.raises(DataError, match=r"^no supervised token$"):
        fit(encode(tiny, [("x", False)]), tiny, 5, "left-context")


# ---- many rows, and worker processes ------------------------------------------------------------


def raw_rows(n: int) -> Iterator[tuple[int, bytes]]:
    """Every third is bad in a way of its own, every seventh is long."""
    for i in range(1, n + 1):
        answer = "is" * (130 if i % 7 == 0 else 1)
        good = b'{"prompt": "the fox %d", "completion": "%s"}' % (i, answer.encode())
        yield i, b'{"prompt": "%d", "x": 1}' % i if i % 3 == 0 else good


def encoder(tokenizer: Tokenizer, truncation: str = "drop", train_on: str = "response") -> Encoder:
    return Encoder(tokenizer, Template("auto", None), train_on, 60, truncation)


def work(n: int) -> Iterator[Chunk]:
    for file, name in enumerate(("a", "b")):
        yield from chunks(file, name, "prompt_completion", raw_rows(n))


@pytest.mark.parametrize("name", ["tiny", "sentencepiece", "smollm2"])
def test_workers_make_the_same_of_every_chunk_in_the_same_order(
    made: dict[str, Tokenizer], name: str
) -> None:
    with small_chunks(600):
        here = list(encode_chunks(work(100), encoder(made[name]), 0))
        there = list(encode_chunks(work(100), encoder(made[name]), 2))
    assert len(here) == len(there) > 10
    for (chunk, piece, *others), (same_chunk, same_piece, *same_others) in zip(here, there):
        assert (chunk, others) == (same_chunk, same_others)
        assert piece.tokens.tobytes() == same_piece.tokens.tobytes()
        assert piece.rows.tobytes() == same_piece.rows.tobytes()
        starts = np.cumsum([0, *piece.rows["length"]])
        assert [*piece.rows["start"], len(piece.tokens)] == starts.tolist()
    lines = [line for _, _, refused, _ in there for line, _ in refused]
    assert lines == 2 * [i for i in range(1, 101) if i % 3 == 0 or i % 7 == 0]


class TellsProcess(Template):
    """Refuses every row with the process that it is in."""

    def documents(self, said: Any, tokenizer: Tokenizer) -> tuple[list[Segments], set[str]]:
        raise DataError(str(os.getpid()))


def test_what_there_is_little_of_is_done_here_and_the_rest_by_workers(tiny: Tokenizer) -> None:
    telling = replace(encoder(tiny), template=TellsProcess("auto", None))
    here, rows = str(os.getpid()), [(i, b'{"text": "%d"}' % i) for i in range(200)]

    def processes(n_workers: int) -> list[str]:
        """Where each chunk was encoded."""
        done = encode_chunks(chunks(0, "a", "text", rows), telling, n_workers)
        return [refused[0][1] for _, _, refused, _ in done]

    assert processes(2) == [here]
    with small_chunks(600):
        for n_workers in (0, 1):
            assert set(processes(n_workers)) == {here}
        first, *rest = processes(2)
    assert first == here and len(rest) > 3 and here not in rest


def test_a_row_that_is_too_long_stops_the_workers_with_its_place(tiny: Tokenizer) -> None:
    rows = ((i, b'{"text": "%s"}' % (b"is" * (200 if i == 170 else 1))) for i in range(1, 300))
    with small_chunks(600), pytest.raises(DataError) as caught:
        list(encode_chunks(chunks(0, "a", "text", rows), encoder(tiny, "error"), 2))
    assert str(caught.value) == (
        "a:170: 202 tokens, longer than data.max_length=60; shorten it, or set data.truncation"
    )


def test_a_file_that_breaks_off_stops_the_workers(tiny: Tokenizer) -> None:
    def broken() -> Iterator[Chunk]:
        yield from work(30)
        raise DataError("damaged")

    with small_chunks(600), pytest.raises(DataError, match=r"^damaged$"):
        list(encode_chunks(broken(), encoder(tiny), 2))


def test_all_of_a_row_but_its_first_id_is_learned_if_asked(tiny: Tokenizer) -> None:
    everything = encoder(tiny, train_on="all")
    ((_, piece, *_),) = encode_chunks(chunks(0, "a", "auto", raw_rows(1)), everything, 0)
    stored = piece.tokens["id"]
    assert [bool(i < 0) for i in stored] == [False] + [True] * (len(stored) - 1)
    assert tiny.decode(np.where(stored < 0, ~stored, stored)) == "<|bos|>the fox 1is<|eos|>"


def test_chunks_end_at_a_size_or_a_number_of_rows() -> None:
    sizes = [4, 4, 4, 1, 1, 1, 1, 30, 2]
    rows = [(i, b"x" * size) for i, size in enumerate(sizes)]
    with small_chunks(10):
        made = list(chunks(2, "name", "text", iter(rows)))
    assert [[len(raw) for _, raw in chunk.rows] for chunk in made] == [
        [4, 4, 4],
        [1, 1, 1, 1, 30],
        [2],
    ]
    assert [chunk.size for chunk in made] == [12, 34, 2]
    assert [row for chunk in made for row in chunk.rows] == rows
    assert {(chunk.file, chunk.name, chunk.form) for chunk in made} == {(2, "name", "text")}
    assert list(chunks(0, "name", "text", iter([]))) == []
    many = list(chunks(0, "name", "text", ((i, b"{}") for i in range(10_000))))
    assert [len(chunk.rows) for chunk in many] == [4096, 4096, 1808]


def test_there_is_at_least_one_worker_and_no_more_than_cores() -> None:
    assert 1 <= default_workers() <= (os.cpu_count() or 1)
