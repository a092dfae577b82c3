"""Paths become files of rows; Parquet and data sets on the hub become rows."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.dataset_server import DatasetHub
from support.tiny_folder import write_tokenizer

from mlx_qlora.data.files import RowFile, find_files, hub_dataset, read_rows
from mlx_qlora.data.read import DataConfig, read_examples, train_validation_test
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import DataError

ROOT = Path(__file__).parents[2]
ENDINGS = ".jsonl, .ndjson, .json, .csv, .parquet"
REMEDY = "rename or remove them, or name the files one by one (data.path, data.test_path, ...)"


def write(folder: Path, *names: str, content: bytes = b"{}") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names(path: Path | str, relative_to: Path) -> dict[str, list[str]]:
    return {
        part: [str(Path(file.path).relative_to(relative_to)) for file in files]
        for part, files in find_files(path).items()
    }


def refusal(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        find_files(path)
    return str(caught.value)


# ---- files, folders, patterns ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "compressed"),
    [
        ("a.jsonl", "jsonl", False),
        ("a.b.ndjson", "ndjson", False),
        ("a.JSON", "json", False),
        ("a.csv", "csv", False),
        ("a.parquet", "parquet", False),
        ("a.jsonl.gz", "jsonl", True),
        ("a.v2.Json.GZ", "json", True),
        ("a.parquet.gz", "parquet", True),
        ("[a]*.csv", "csv", False),
    ],
)
def test_a_file_is_for_training_and_of_the_kind_that_its_ending_says(
    tmp_path: Path, name: str, kind: str, compressed: bool
) -> None:
    path = write(tmp_path, name, content=b"12345") / name
    file = RowFile(str(path), kind, path, compressed)
    assert find_files(path) == {"train": [file], "validation": [], "test": []}
    assert file.size == 5


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.txt", ".txt"), ("a", "no"), ("a.gz", ".gz"), ("a.tar.gz", ".tar.gz"), ("jsonl", "no")],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, ending: str) -> None:
    path = write(tmp_path, name) / name
    reason = f"data file {path}: {ending} ending; known: {ENDINGS}, each also .gz"
    assert refusal(path) == reason


def test_an_empty_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", content=b"") / "a.jsonl"
    reason = f"data file {path} is empty; write the rows to it again"
    assert refusal(path) == refusal(tmp_path) == reason
    path = tmp_path / "b.jsonl"
    reason = f"data file {path} is missing; give the path of a file or folder of rows"
    assert refusal(path) == reason


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "rows/a.csv")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/rows/a.csv", "~/rows", "~/rows/*.csv"):
        assert names(path, tmp_path)["train"] == ["rows/a.csv"]


def test_a_folder_is_searched_through_in_order_and_without_what_is_hidden(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a/z.csv", "a/b/c.json.gz", "d.parquet")
    write(tmp_path, ".h.jsonl", "a/.cache/x.jsonl", "README.md", "a/x.txt", content=b"")
    found = ["a/b/c.json.gz", "a/z.csv", "b.jsonl", "d.parquet"]
    assert names(tmp_path, tmp_path) == {"train": found, "validation": [], "test": []}


def test_a_folder_inside_a_hidden_one_is_not_hidden_itself(tmp_path: Path) -> None:
    write(tmp_path, ".cache/rows/a.csv")
    assert names(tmp_path / ".cache" / "rows", tmp_path)["train"] == [".cache/rows/a.csv"]


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "README.md", ".hidden.jsonl")
    reason = f"data folder {tmp_path} holds no file of rows; known endings: {ENDINGS}"
    assert refusal(tmp_path) == reason


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (["train.jsonl"], ["valid.jsonl"], ["test.jsonl"]),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/validation-00000-of-00001.parquet"],
            ["data/test-00000-of-00001.parquet"],
        ),
        (["Training_en.csv", "train.fr.csv"], ["dev.csv", "val-1.csv"], []),
        (["train/a.csv", "train/b/c.csv"], ["dev/a.csv"], ["test/a.csv"]),
        (["de/Train/a.csv", "en/train-1/a.csv"], ["en/validation/x/a.csv"], ["en/test_1/a.csv"]),
        (["data/a/train.csv"], ["data/a/val.csv"], ["data/test/a/b.csv"]),
    ],
)
def test_a_folder_that_names_its_parts_is_taken_by_them(
    tmp_path: Path, train: list[str], validation: list[str], test: list[str]
) -> None:
    write(tmp_path, *train, *validation, *test)
    parts = {"train": train, "validation": validation, "test": test}
    assert names(tmp_path, tmp_path) == parts


def test_a_name_that_only_begins_like_a_part_is_none(tmp_path: Path) -> None:
    found = ["testimonials.csv", "tests/a.csv", "trainer.csv", "values.csv"]
    write(tmp_path, *found)
    assert names(tmp_path, tmp_path) == {"train": found, "validation": [], "test": []}


def test_a_name_above_the_folder_says_nothing_of_its_files(tmp_path: Path) -> None:
    write(tmp_path, "test/a.csv", "test/b.csv")
    assert names(tmp_path / "test", tmp_path)["train"] == ["test/a.csv", "test/b.csv"]


def test_files_that_are_for_nothing_beside_named_parts_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", *(f"more-{i}.csv" for i in range(7)))
    assert refusal(tmp_path) == (
        f"data folder {tmp_path} has files whose names say what they are for, and others that are "
        "for nothing:\n"
        + "".join(f"  {tmp_path}/more-{i}.csv\n" for i in range(5))
        + f"  ... and 2 more\n{REMEDY}"
    )
    (tmp_path / "train.csv").rename(tmp_path / "test.csv")
    assert "for, and others that are for nothing:\n" in refusal(tmp_path)


@pytest.mark.parametrize(
    "found", [["test.jsonl", "valid.jsonl"], ["test/a.csv"], ["a/dev-1.csv", "b/test/train0.csv"]]
)
def test_a_folder_with_named_parts_but_none_to_train_on_is_refused(
    tmp_path: Path, found: list[str]
) -> None:
    write(tmp_path, *found)
    assert refusal(tmp_path) == (
        f"data folder {tmp_path} has files whose names say what they are for, and none to train "
        "on:\n" + "".join(f"  {tmp_path}/{name}\n" for name in found) + REMEDY
    )


def test_the_parts_of_a_folder_are_the_parts_of_a_run(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    for name, n in [("train", 5), ("valid", 3), ("test", 2)]:
        rows = (json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(n))
        write(tmp_path / "rows", f"{name}.jsonl", content="".join(rows).encode())
    config = DataConfig(path=str(tmp_path / "rows"), cache_dir=None)
    parts = train_validation_test(config, tokenizer, seed=0)
    assert [len(part) for part in parts if part is not None] == [5, 3, 2]
    assert len(read_examples(tmp_path / "rows", tokenizer, config)) == 5


def test_a_pattern_matches_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", "test.csv", "c/d/train.jsonl", "c/x.txt")
    (tmp_path / "folder.jsonl").mkdir()
    for pattern, found in [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[b-z].json?", ["b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "c/d/train.jsonl"]),
        ("t*", ["test.csv"]),
    ]:
        parts = {"train": found, "validation": [], "test": []}
        assert names(tmp_path / pattern, tmp_path) == parts
    nothing = f"{tmp_path}/*.csv.gz"
    assert refusal(nothing) == f"data {nothing} matches no file; correct the pattern"
    assert refusal(tmp_path / "c/*.t*").startswith(f"data file {tmp_path}/c/x.txt: .txt ending")


def test_the_hash_of_a_file_is_that_of_its_kind_and_bytes(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "b.jsonl", "a.json", content=b"x" * 3_000_000)
    write(tmp_path, "c.jsonl", content=b"x" * 2_999_999 + b"y")
    write(tmp_path, "a.jsonl.gz", content=b"x" * 3_000_000)
    a, b, c, other_kind, compressed = (
        find_files(tmp_path / name)["train"][0].content_hash()
        for name in ("a.jsonl", "b.jsonl", "c.jsonl", "a.json", "a.jsonl.gz")
    )
    assert a == b and len({a, c, other_kind, compressed}) == 4


# ---- lines and rows ----------------------------------------------------------------------------


def content_of(name: str, texts: list[str]) -> bytes:
    """The content of a file with one row for each text."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": text} for text in texts]
    if name.startswith("array"):
        content = b"\xef\xbb\xbf \n" + json.dumps(rows, indent=1).encode()
    elif ".csv" in name:
        content = "\n".join(["text", *(f'"{text}"' for text in texts)]).encode()
    elif ".parquet" in name:
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
        content = stream.getvalue()
    else:
        content = "\n\n".join(map(json.dumps, rows)).encode()
    return gzip.compress(content) if name.endswith(".gz") else content


@pytest.mark.parametrize(
    ("name", "unit", "number"),
    [
        ("lines.jsonl", "line", 3),
        ("lines.ndjson.gz", "line", 3),
        ("lines.json", "line", 3),
        ("lines.json.gz", "line", 3),
        ("table.csv", "line", 3),
        ("table.csv.gz", "line", 3),
        ("array.json", "row", 2),
        ("array.json.gz", "row", 2),
        ("table.parquet", "row", 2),
        ("table.parquet.gz", "row", 2),
    ],
)
def test_rows_that_have_no_lines_of_their_own_are_counted(
    tmp_path: Path, name: str, unit: str, number: int
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    write(tmp_path / "rows", name, content=content_of(name, ["a", "", "c"]))
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    for cached in (False, True):
        report = read_examples(tmp_path / "rows" / name, tokenizer, config).report
        assert report.cached == cached and [file.unit for file in report.files] == [unit]
        assert report.refusals() == f"  {unit} {number}: field 'text' is empty"
    write(tmp_path / "rows", "good.jsonl", content=b'{"text": "d"}')
    report = read_examples(tmp_path / "rows", tokenizer, config).report
    place = f"{tmp_path / 'rows' / name}, {unit} {number}"
    assert report.refusals() == f"  {place}: field 'text' is empty"


def test_rows_in_memory_are_counted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    rows = [{"text": "a"}, {"text": ""}, {"text": None}]
    report = read_examples(rows, tokenizer).report
    assert [file.unit for file in report.files] == ["row"]
    assert report.refusals() == (
        "  row 2: field 'text' is empty\n  row 3: field 'text' must be a string, not NoneType"
    )


# ---- names of data sets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", "owner/name||"),
        ("some-org/My_Data.v1", "some-org/My_Data.v1||"),
        ("owner/name/config", "owner/name|config|"),
        ("owner/name:validation", "owner/name||validation"),
        ("owner/name/config:train+test", "owner/name|config|train+test"),
        ("owner/name:train[:10%]", "owner/name||train[:10%]"),
    ],
)
def test_a_data_set_is_named_by_owner_name_config_and_split(name: str, parts: str) -> None:
    assert find_files(name) == {
        "train": [RowFile(name, "hub", parts)],
        "validation": [],
        "test": [],
    }


@pytest.mark.parametrize(
    "name",
    [
        "name",
        "owner/name.jsonl",
        "owner/name.csv.gz",
        "a/b/c/d",
        "/owner/name",
        "owner/name:",
        "owner/na me",
        "owner/name/config:train:test/x",
    ],
)
def test_other_names_are_missing_files(name: str) -> None:
    reason = f"data file {name} is missing; give the path of a file or folder of rows"
    assert refusal(name) == reason


def test_a_folder_goes_before_a_data_set_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "owner/name/a.csv")
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_files("owner/name")["train"]] == ["owner/name/a.csv"]


# ---- Parquet -----------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, Any]], **how: Any) -> RowFile:
    import pyarrow
    import pyarrow.parquet

    plain = path.with_suffix("") if path.suffix == ".gz" else path
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain, **how)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return RowFile(path.name, "parquet", path, path.suffix == ".gz")


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_rows_of_parquet_are_counted_from_one_and_have_no_nulls(tmp_path: Path, name: str) -> None:
    rows = [
        {"n": i, "text": f"é {i}", "turns": [{"a": "b"}] * (i % 3), "more": {"x": {}, "y": [0]}}
        for i in range(3000)
    ]
    table = [{**row, "turns": [{**turn, "c": None} for turn in row["turns"]]} for row in rows]
    for i, row in enumerate(rows):
        if i % 5 == 0:  # fields that the other rows of the table do not have
            row["id"] = table[i]["id"] = "1"
            table[i]["turns"] = [{"a": "b", "c": [{"d": 1, "e": "f"}, {"d": 2}]}]
            row["turns"] = table[i]["turns"]
            table[i]["more"] = row["more"] = {"x": {"z": True}, "y": []}
    file = write_parquet(tmp_path / name, table, row_group_size=700)
    assert list(read_rows(file)) == list(enumerate(rows, 1))


def test_a_bad_row_of_parquet_is_refused_by_its_number(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}, {"text": "c"}])
    examples = read_examples(tmp_path / "a.parquet", tokenizer, DataConfig(cache_dir=None))
    assert [example.line for example in examples] == [1, 3]
    assert examples.report.refused == [(2, "field 'text' is missing")]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    content = Path(whole.path).read_bytes()
    zipped = gzip.compress(content)
    for damaged, compressed in [
        (b"no table", False),
        (content[:-9], False),
        (content, True),
        (zipped[:-12], True),
        (zipped[:20] + b"\0" * 30, True),
    ]:
        (tmp_path / "b.parquet").write_bytes(damaged)
        file = RowFile("b.parquet", "parquet", tmp_path / "b.parquet", compressed)
        with pytest.raises(DataError, match=r"^data file b\.parquet is damaged: "):
            list(read_rows(file))


def test_damage_far_into_parquet_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = [{"text": f"{i:0100}"} for i in range(4096)]
    how = {"row_group_size": 1024, "compression": "gzip", "use_dictionary": False}
    file = write_parquet(tmp_path / "a.parquet", rows, **how)
    third = pyarrow.parquet.ParquetFile(file.path).metadata.row_group(2).column(0)
    content = bytearray(Path(file.path).read_bytes())
    middle = third.data_page_offset + third.total_compressed_size // 2
    content[middle : middle + 50] = bytes(50)
    Path(file.path).write_bytes(content)
    got = []
    with pytest.raises(DataError, match=r"^data file a\.parquet is damaged after row 2048: "):
        for _, row in read_rows(file):
            got.append(row)
    assert got == rows[:2048]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert str(caught.value) == "a.parquet needs pyarrow: pip install 'mlx-qlora[parquet]'"


# ---- data sets on the hub ----------------------------------------------------------------------

CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: validation, path: valid.jsonl}
- config_name: small
  data_files: small/train.jsonl
---
"""
DATA_SETS = {
    "owner/name": {
        "README.md": CARD,
        "train.jsonl": b'{"prompt": "a", "completion": "1"}\n{"prompt": "b"}\n'
        b'{"prompt": "c", "completion": "3"}\n',
        "valid.jsonl": b'{"prompt": "v", "completion": "9"}\n',
        "small/train.jsonl": b'{"instruction": "s", "output": "7"}\n',
    },
    "owner/bare": {
        "data/train-00000-of-00002.jsonl": b'{"text": "t 0"}\n',
        "data/train-00001-of-00002.jsonl": b'{"text": "t 1"}\n',
        "data/test-00000-of-00001.jsonl": b'{"text": "t 2"}\n',
    },
}
# Reads in a process of its own, because `datasets` reads its environment on import.
CHILD = """
import json, sys
from pathlib import Path
from mlx_qlora.data.read import read_examples
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import DataError
tokenizer = load_tokenizer(Path(sys.argv[1]))
for source in sys.argv[2:]:
    try:
        made = read_examples(source, tokenizer)
    except DataError as error:
        said = str(error)
    else:
        texts = [tokenizer.decode(e.tokens, skip_special_tokens=True) for e in made]
        report = made.report
        refusals = report.refusals()
        said = [[e.place for e in made], texts, refusals, report.format, report.cached]
    print("SAID " + json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[DatasetHub]:
    hub = DatasetHub(repos=DATA_SETS)
    server = hub.start()
    yield hub
    server.shutdown()
    server.server_close()


def read_away(home: Path, hub: DatasetHub, *sources: str, **environ: str) -> list[Any]:
    """What each source became on a machine with this home folder."""
    kept = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|.*(?i:proxy)", k)}
    kept |= {"HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home), "HF_ENDPOINT": hub.url}
    kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environ}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, write_tokenizer(home / "tiny"), *sources],
        env={**kept, "PYTHONPATH": str(ROOT)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(said) for said in re.findall("^SAID (.*)$", done.stdout, re.MULTILINE)]


def test_data_sets_are_read_by_split_and_config(hub: DatasetHub, tmp_path: Path) -> None:
    train, again, validation, both, small, bare = read_away(
        tmp_path,
        hub,
        "owner/name",
        "owner/name",
        "owner/name:validation",
        "owner/name/default:validation+train",
        "owner/name/small",
        "owner/bare",
    )
    refused = "  row {}: field 'completion' is missing"
    form = "prompt_completion"
    places = ["owner/name:1", "owner/name:3"]
    assert train == [places, ["a1", "c3"], refused.format(2), form, False]
    assert again == [places, ["a1", "c3"], refused.format(2), form, True]
    assert validation == [["owner/name:validation:1"], ["v9"], "", form, False]
    assert both[1:3] == [["v9", "a1", "c3"], refused.format(3)]
    text = "### Instruction:\ns\n\n### Response:\n7"
    assert small == [["owner/name/small:1"], [text], "", "alpaca", False]
    assert bare[1:] == [["t 0", "t 1"], "", "text", False]


def test_a_data_set_that_was_read_once_is_read_without_a_hub(
    hub: DatasetHub, tmp_path: Path
) -> None:
    sources = ("owner/name", "owner/name:validation")
    before = read_away(tmp_path, hub, *sources)
    asked = len(hub.log)
    after = read_away(tmp_path, hub, *sources, HF_HUB_OFFLINE="1")
    assert [said[:4] for said in after] == [said[:4] for said in before]
    assert len(hub.log) == asked


def test_what_the_hub_does_not_have_is_one_message(hub: DatasetHub, tmp_path: Path) -> None:
    said = read_away(tmp_path, hub, "owner/gone", "owner/name:gone", "owner/name/gone")
    for name, reason, message in zip(
        ["owner/gone", "owner/name:gone", "owner/name/gone"],
        ["Dataset 'owner/gone' doesn't exist on the Hub", 'Unknown split "gone"', "'gone' not fou"],
        said,
    ):
        begin = f"data {name} is no file, and the hub's data set of that name cannot be loaded: "
        assert message.startswith(begin) and reason in message and "\n" not in message


def test_without_a_network_a_data_set_is_one_message(hub: DatasetHub, tmp_path: Path) -> None:
    (said,) = read_away(tmp_path, hub, "owner/name", HF_HUB_OFFLINE="1")
    assert said == (
        "data owner/name is no file, and the hub's data set of that name cannot be loaded: "
        "Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"
    )


def test_without_datasets_the_hub_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        hub_dataset(find_files("owner/name")["train"][0])
    assert str(caught.value) == (
        "data owner/name is neither a file nor a folder. If it is a data set on the hub: "
        "pip install 'mlx-qlora[datasets]'"
    )
