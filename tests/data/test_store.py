"""Rows of token ids in memory and on disk: whole, found damaged, or not there."""

import errno
import gc
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.limits import files_of_at_most
from support.tiny_folder import write_rows

from mlx_qlora import __version__
from mlx_qlora.data import read
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.store import (
    ROW,
    TOKEN,
    VERSION,
    TokenStore,
    cached,
    forget_unused,
    on_disk,
)
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError
from mlx_qlora.folders import TAG, new_staging

FILES = ["about.json", "rows.npy", "tokens.bin"]

Row = list[tuple[int, bool]]  # ids, and whether each is learned
ids = st.one_of(st.integers(0, 3), st.integers(0, 2**30 - 1))
some_rows = st.lists(st.lists(st.tuples(ids, st.booleans()), max_size=5), max_size=4)
some_pieces = st.lists(some_rows, max_size=4)


def pieces_of(content: list[list[Row]]) -> Iterator[TokenStore]:
    line = 0
    for some in content:
        tokens = [~i if learned else i for row in some for i, learned in row]
        rows, start = np.zeros(len(some), ROW), 0
        for about, row in zip(rows, some):
            line += 1
            about["start"], about["length"], about["line"] = start, len(row), line
            about["said"] = about["made"] = 2**64 - line
            start += len(row)
        yield TokenStore(np.array(list(zip(tokens, weights_of(tokens))), TOKEN), rows)


def weights_of(ids: Any) -> np.ndarray:
    """What ids weigh as labels."""
    return (np.array(ids) % 7).astype(np.float32)


def content_of(store: TokenStore) -> list[Row]:
    made = []
    for row in range(len(store.rows)):
        tokens, learned, weights, starts = store[row]
        assert starts == ()
        assert tokens.dtype == np.int32 and learned.dtype == bool and weights.dtype == np.float32
        stored = np.where(learned, ~tokens, tokens)
        assert weights.tolist() == weights_of(stored).tolist()
        made.append(list(zip(tokens.tolist(), learned.tolist())))
    return made


def write(entry: Path, content: list[list[Row]], **about: Any) -> TokenStore:
    return on_disk(entry, pieces_of(content), lambda: about)


SOME: list[list[Row]] = [[[(7, False), (0, True)], []], [[(5, True), (9, False), (3, True)]]]
SOME_ROWS = [row for piece in SOME for row in piece]


# ---- round trip --------------------------------------------------------------------------------


@settings(deadline=None)
@given(some_pieces)
def test_what_is_stored_comes_back(content: list[list[Row]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder) / "new" / "entry"
        stores = [on_disk(None, pieces_of(content), lambda: {"a": [1]})]
        stores += [write(entry, content, a=[1]), cached(entry)]
        assert sorted(os.listdir(entry)) == FILES and os.listdir(entry.parent) == ["entry"]
    rows = [row for piece in content for row in piece]
    starts = np.cumsum([0, *map(len, rows)])[:-1].tolist()
    for store in stores:
        assert store is not None and content_of(store) == rows
        assert store.rows["line"].tolist() == [i + 1 for i in range(len(rows))]
        assert store.rows["start"].tolist() == starts
        assert store.rows["said"].tolist() == [2**64 - i - 1 for i in range(len(rows))]
    assert [store.about for store in stores if store] == 3 * [{"a": [1]}]


def test_what_is_known_of_the_pieces_is_asked_when_all_are_written(tmp_path: Path) -> None:
    about: dict[str, Any] = {}

    def pieces() -> Iterator[TokenStore]:
        yield from pieces_of(SOME)
        about["n"] = 3

    assert on_disk(tmp_path / "entry", pieces(), lambda: about).about == {"n": 3}


def test_a_store_goes_on_when_its_files_are_removed(tmp_path: Path) -> None:
    store = write(tmp_path / "entry", SOME)
    shutil.rmtree(tmp_path / "entry")
    assert content_of(store) == SOME_ROWS


# ---- at the same time --------------------------------------------------------------------------


def test_threads_that_make_the_same_entry_at_once_all_get_it(tmp_path: Path) -> None:
    n = 8
    together = threading.Barrier(n)
    made: list[list[Row]] = []

    def pieces() -> Iterator[TokenStore]:
        yield from pieces_of(SOME)
        together.wait(30)

    def make() -> None:
        made.append(content_of(on_disk(tmp_path / "entry", pieces(), dict)))

    threads = [threading.Thread(target=make) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [SOME_ROWS] * n
    assert os.listdir(tmp_path) == ["entry"]
    again = cached(tmp_path / "entry")
    assert again is not None and content_of(again) == SOME_ROWS


def test_an_entry_that_appears_while_a_damaged_one_is_read_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, read_text = tmp_path / "entry", Path.read_text
    write(entry, SOME)
    (entry / "about.json").write_text("{")

    def late(path: Path, *how: Any, **more: Any) -> str:
        text = read_text(path, *how, **more)
        if text == "{":  # the other run finds the damage, too, and mends it at once
            shutil.rmtree(entry)
            write(entry, SOME)
        return text

    monkeypatch.setattr(Path, "read_text", late)
    store = cached(entry)
    assert store is not None and content_of(store) == SOME_ROWS
    assert os.listdir(tmp_path) == ["entry"]


def test_an_entry_that_another_run_made_meanwhile_is_taken(tmp_path: Path) -> None:
    entry = tmp_path / "entry"

    def pieces() -> Iterator[TokenStore]:
        yield from pieces_of(SOME)
        write(entry, SOME, made="theirs")

    store = on_disk(entry, pieces(), lambda: {"made": "mine"})
    assert store.about == {"made": "theirs"} and content_of(store) == SOME_ROWS
    assert os.listdir(tmp_path) == ["entry"]


def test_a_damaged_entry_that_appears_meanwhile_gives_way(tmp_path: Path) -> None:
    entry = tmp_path / "entry"

    def pieces() -> Iterator[TokenStore]:
        yield from pieces_of(SOME)
        entry.mkdir()
        (entry / "about.json").write_text("{")

    store = on_disk(entry, pieces(), lambda: {"made": "mine"})
    assert content_of(store) == SOME_ROWS and os.listdir(tmp_path) == ["entry"]
    again = cached(entry)
    assert again is not None and again.about == {"made": "mine"}


def test_what_stands_in_the_place_of_an_entry_and_stays_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "mine.txt").touch()

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        store = write(entry, SOME, a=1)
    assert content_of(store) == SOME_ROWS and store.about == {"a": 1}
    assert os.listdir(entry) == ["mine.txt"]
    del store
    gc.collect()
    assert os.listdir(tmp_path) == ["entry"]


def test_an_entry_that_cannot_be_touched_serves_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "entry", SOME)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "utime", refuse)
    for _ in range(2):
        store = cached(tmp_path / "entry")
        assert store is not None and content_of(store) == SOME_ROWS


# ---- damage ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_any_bit_that_changes_is_found(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder) / "entry"
        write(entry, SOME, files=[{"name": "é", "refused": [[1, "field 'a' is missing"]]}])
        content = bytearray((entry / name).read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        (entry / name).write_bytes(content)
        assert cached(entry) is None
        assert os.listdir(folder) == []


def change(name: str, how: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda entry: (entry / name).write_bytes(how((entry / name).read_bytes()))


def change_about(how: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def changed(content: bytes) -> bytes:
        about = json.loads(content)
        return json.dumps(how(about)).encode()

    return change("about.json", changed)


DAMAGE = {
    **{f"{name} is missing": lambda entry, name=name: (entry / name).unlink() for name in FILES},
    **{f"{name} is empty": change(name, lambda _: b"") for name in FILES},
    **{f"{name} is cut": change(name, lambda content: content[:-1]) for name in FILES},
    **{f"{name} is longer": change(name, lambda content: content + b"\0") for name in FILES},
    "about.json is no UTF-8": change("about.json", lambda content: b"\xff" + content),
    "about.json is a list": change_about(lambda about: [about]),
    "another version": change_about(lambda about: {**about, "version": about["version"] + "0"}),
    "no version": change_about(lambda about: {k: about[k] for k in ("checksums", "about")}),
    "no checksums": change_about(lambda about: {k: about[k] for k in ("version", "about")}),
    "nothing known": change_about(lambda about: {k: about[k] for k in ("version", "checksums")}),
    "another line is known": change_about(
        lambda about: {**about, "about": about["about"].replace('"read": 20', '"read": 21')}
    ),
    "what is known is no text": change_about(
        lambda about: {**about, "about": json.loads(about["about"])}
    ),
    "a checksum less": change_about(
        lambda about: {
            **about,
            "checksums": {k: v for k, v in about["checksums"].items() if k != "about"},
        }
    ),
    "other checksums": change_about(
        lambda about: {**about, "checksums": {name: 0 for name in about["checksums"]}}
    ),
    "the folder is empty": lambda entry: [(entry / name).unlink() for name in FILES],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_removed_and_made_again(
    tokenizer: Tokenizer, tmp_path: Path, damage: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 20)
    config = DataConfig(cache_dir=str(tmp_path), prompt_loss_weight=0.5)
    digest = read_examples(path, tokenizer, config).digest
    (entry,) = (tmp_path / "tokens").iterdir()
    for check in (lambda: cached(entry), lambda: read_examples(path, tokenizer, config)):
        before = [(entry / name).read_bytes() for name in FILES]
        DAMAGE[damage](entry)
        assert [(entry / n).read_bytes() for n in FILES if (entry / n).exists()] != before
        made = check()
        assert made is None or (made.digest == digest and not made.report.cached)
        assert entry.exists() == (made is not None)
        again = read_examples(path, tokenizer, config)
        assert again.report.cached == (made is not None)
        del made
        assert again.digest == digest and [example.line for example in again] == list(range(1, 21))
        del again


def test_entries_of_another_version_are_not_looked_for(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(VERSION, str) and VERSION.endswith(f", mlx-qlora {__version__}")
    path, config = write_rows(tmp_path / "rows.jsonl", 3), DataConfig(cache_dir=str(tmp_path))
    read_examples(path, tokenizer, config)
    (entry,) = (tmp_path / "tokens").iterdir()
    assert json.loads((entry / "about.json").read_text())["version"] == VERSION
    with monkeypatch.context() as patch:
        patch.setattr(read, "VERSION", VERSION + "0")
        assert not read_examples(path, tokenizer, config).report.cached
    assert len(os.listdir(tmp_path / "tokens")) == 2
    assert read_examples(path, tokenizer, config).report.cached


def test_no_entry_is_none(tmp_path: Path) -> None:
    assert cached(tmp_path / "entry") is None
    assert cached(tmp_path / "none" / "entry") is None


# ---- age ---------------------------------------------------------------------------------------


def test_what_was_not_used_for_long_is_removed(tmp_path: Path) -> None:
    days = {"today": 0, "29": 29, "31": 31}
    for name, age in days.items():
        write(tmp_path / name, SOME)
        os.utime(tmp_path / name, 2 * (time.time() - age * 86_400,))
    (tmp_path / "mine.txt").touch()
    os.utime(tmp_path / "mine.txt", (0, 0))
    forget_unused(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["29", "mine.txt", "today"]
    forget_unused(tmp_path / "none")


def test_using_an_entry_makes_it_young_again(tmp_path: Path) -> None:
    write(tmp_path / "old", SOME)
    os.utime(tmp_path / "old", 2 * (time.time() - 31 * 86_400,))
    assert cached(tmp_path / "old") is not None
    forget_unused(tmp_path)
    assert os.listdir(tmp_path) == ["old"]


# ---- what cannot be written --------------------------------------------------------------------


def test_a_full_disk_names_the_field_and_leaves_nothing(tmp_path: Path) -> None:
    entry = tmp_path / "cache" / "entry"
    with files_of_at_most(100_000), pytest.raises(DataError) as caught:
        write(entry, [[[(1, True)] * 50_000]])
    assert str(caught.value) == (
        f"the tokens cannot be written to {entry}: {os.strerror(errno.EFBIG)}; free some space "
        "there, or set data.cache_dir to another folder"
    )
    assert os.listdir(entry.parent) == []


def test_a_place_that_can_hold_no_folder_names_the_field(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3)
    with pytest.raises(DataError) as caught:
        read_examples(path, tokenizer, DataConfig(cache_dir=str(path)))
    assert str(caught.value) == (
        f"the tokens cannot be written to {path}/tokens: {os.strerror(errno.ENOTDIR)}; free some "
        "space there, or set data.cache_dir to another folder"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
@pytest.mark.parametrize("is_kept", [True, False])
def test_rows_that_fail_leave_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    is_kept: bool,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def pieces() -> Iterator[TokenStore]:
        yield from pieces_of(SOME)
        raise error("no more")

    with pytest.raises(error, match="no more"):
        on_disk(tmp_path / "entry" if is_kept else None, pieces(), dict)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_was_writing_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for folder in (tmp_path / "entry", None):
        if not (writer := os.fork()):

            def pieces() -> Any:
                yield from pieces_of(SOME)
                os.kill(os.getpid(), signal.SIGKILL)

            on_disk(folder, pieces(), dict)
        os.waitpid(writer, 0)  # and not another child of this process
        (dead,) = tmp_path.iterdir()
        living, lock = new_staging(tmp_path, TAG)
        on_disk(tmp_path / "entry", pieces_of(SOME), dict)
        assert not dead.exists() and sorted(os.listdir(tmp_path)) == [living.name, "entry"]
        os.close(lock)
        shutil.rmtree(living)
        shutil.rmtree(tmp_path / "entry")


@pytest.mark.parametrize("name", [*FILES])
def test_what_is_no_file_is_no_entry(name: str, tmp_path: Path) -> None:
    write(tmp_path / "entry", SOME)
    (tmp_path / "entry" / name).unlink()
    os.mkfifo(tmp_path / "entry" / name)
    assert cached(tmp_path / "entry") is None and os.listdir(tmp_path) == []


def test_an_entry_that_nests_is_none(tmp_path: Path) -> None:
    write(tmp_path / "entry", SOME)
    (tmp_path / "entry" / "about.json").write_text("[" * 100_000)
    assert cached(tmp_path / "entry") is None and os.listdir(tmp_path) == []


def test_a_link_in_the_place_of_an_entry_is_removed_and_not_followed(tmp_path: Path) -> None:
    (away := tmp_path / "away").mkdir()
    (away / "mine").touch()
    (home := tmp_path / "tokens").mkdir()
    (home / "entry").symlink_to(away)
    assert cached(home / "entry") is None
    assert os.listdir(home) == [] and os.listdir(away) == ["mine"]


# ---- without a cache ---------------------------------------------------------------------------


def test_files_that_no_cache_keeps_have_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = on_disk(None, pieces_of(SOME), dict)
    assert os.listdir(tmp_path) == [], "so that nothing can be left of them"
    assert content_of(store) == SOME_ROWS


def test_a_slice_keeps_the_files_of_its_examples(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 20)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    examples = read_examples(path, tokenizer, DataConfig(cache_dir=None))
    last, digest = examples[15:], examples[15:].digest
    del examples
    gc.collect()
    assert [example.line for example in last] == [16, 17, 18, 19, 20] and last.digest == digest
    del last
    gc.collect()
    assert os.listdir(tmp_path / "temporary") == []


def test_a_store_closes_its_file_when_it_is_forgotten(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/dev/fd"))

    gc.collect()
    before = open_files()
    stores = [write(tmp_path / str(i), SOME) for i in range(20)]
    assert open_files() >= before + 20
    del stores
    gc.collect()
    assert open_files() == before
