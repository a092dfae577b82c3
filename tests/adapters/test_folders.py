"""A folder is written whole or not at all, and never over files of others."""

import errno
import json
import os
from pathlib import Path

import pytest

from mlx_qlora.errors import ConfigError, TrainingError
from mlx_qlora.folders import (
    ADAPTER_FOLDER,
    MERGED_FOLDER,
    MLX_LM,
    check_writable,
    disk_errors,
    is_merged,
    staged,
)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> text of every file, hidden ones included."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_text() for f in files}


def test_a_new_folder_appears_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with staged(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_text("1")
        (staging / "b").write_text("2")
        assert not target.exists()
    assert contents(tmp_path) == {"new/folder/sub/a": "1", "new/folder/b": "2"}


def test_into_an_existing_folder_files_are_replaced_and_others_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "mlx").mkdir(parents=True)
    for name in ("a", "mine", "mlx/a", "mlx/mine"):
        (target / name).write_text("old")
    with staged(target) as staging:
        (staging / "mlx").mkdir()
        (staging / "a").write_text("new")
        (staging / "mlx" / "a").write_text("new")
        (staging / "mlx" / "c").write_text("new")
    assert contents(tmp_path) == {
        **{"out/a": "new", "out/mlx/a": "new", "out/mlx/c": "new"},
        **{"out/mine": "old", "out/mlx/mine": "old"},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_reader_who_holds_the_old_file_open_keeps_reading_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with (target / "a").open() as reader:
        with staged(target) as staging:
            (staging / "a").write_text("new, and longer")
        assert reader.read() == "old"


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_changes_nothing_and_leaves_nothing(
    tmp_path: Path, exists: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "a").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(error), staged(target) as staging:
        (staging / "a").write_text("half")
        raise error
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([target] if exists else [])


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_folder_and_files_have_the_permissions_that_the_umask_grants(
    tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        with staged(tmp_path / "out") as staging:
            (staging / "mlx").mkdir()
            (staging / "mlx" / "a").write_text("1")
        assert os.umask(umask) == umask  # reading it has not changed it
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "out" / "mlx").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "out" / "mlx" / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_existing_folder_is_staged_inside_itself(tmp_path: Path) -> None:
    """Its parent may be another disk: a rename across disks fails after all the work is done."""
    folder = tmp_path / "mount"
    folder.mkdir()
    with staged(folder) as staging:
        assert staging.parent == folder
        (staging / "a").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_replace_swaps_the_whole_folder_and_a_failure_keeps_the_old(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(OSError), staged(folder, replace=True) as staging:
        (staging / "new").write_text("new")
        raise OSError("disk full")
    assert [path.name for path in folder.iterdir()] == ["old"]
    with staged(folder, replace=True) as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


# ---- whose files a folder holds ----------------------------------------------------------------

HEADER = "---\ntags:\n- lora\n- mlx-qlora\n---\n"
CARD = HEADER + "\nA LoRA adapter of rank 4 for `x`, trained with mlx-qlora 1.\n"
RECORD = json.dumps({"versions": {"mlx-qlora": "1"}})
MERGED = "A LoRA adapter and `x`, merged by mlx-qlora 1 in float32.\n"
OURS = '{"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {}}'


@pytest.mark.parametrize(
    ("files", "names", "foreign"),
    [
        ({}, ADAPTER_FOLDER, None),
        ({"notes.txt": "mine"}, ADAPTER_FOLDER, None),
        ({"README.md": CARD, "adapter_config.json": "{}", "mlx/x": ""}, ADAPTER_FOLDER, None),
        ({"README.md": CARD, "run.yaml": ""}, ["run.yaml"], "run.yaml"),  # no adapter's file
        ({"training_args.json": RECORD, "run.yaml": ""}, ["run.yaml"], None),
        ({"training_args.json": RECORD, "README.md": "mine"}, ADAPTER_FOLDER, "README.md"),
        ({"training_args.json": "[" * 99_999, "run.yaml": ""}, ["run.yaml"], "run.yaml"),
        ({"README.md": "# mlx-qlora is good"}, ADAPTER_FOLDER, "README.md"),
        ({"README.md": MERGED, "adapter_config.json": "{}"}, ADAPTER_FOLDER, "README.md"),
        ({"adapter_config.json": "{}"}, ADAPTER_FOLDER, "adapter_config.json"),
        ({"adapter_config.json": OURS, "adapters.safetensors": ""}, MLX_LM, None),
        ({"adapter_config.json": OURS[:-1] + ', "seed": 0}'}, MLX_LM, "adapter_config.json"),
    ],
)
def test_a_file_is_overwritten_if_our_record_or_our_card_vouches_for_it(
    tmp_path: Path, files: dict[str, str], names: list[str], foreign: str | None
) -> None:
    write(tmp_path / "out", files)
    if foreign is None:
        check_writable(tmp_path / "out", names)
    else:
        with pytest.raises(ConfigError, match=f"folder: .*/{foreign}.* is not known to be from"):
            check_writable(tmp_path / "out", names)


@pytest.mark.parametrize(
    ("files", "names", "foreign"),
    [
        ({"README.md": MERGED, "model-1.safetensors": "", ".DS_Store": ""}, MERGED_FOLDER, None),
        ({"README.md": MERGED, "model.gguf": "", "z": ""}, MERGED_FOLDER, r"model.gguf \(and 1 mo"),
        ({"README.md": MERGED, "tokenizer_old/a": ""}, MERGED_FOLDER, "tokenizer_old/a"),
        ({"config.json": "{}"}, MERGED_FOLDER, "config.json"),
    ],
)
def test_a_folder_is_replaced_as_a_whole_if_all_of_it_is_ours(
    tmp_path: Path, files: dict[str, str], names: list[str], foreign: str | None
) -> None:
    write(tmp_path / "out", files)
    if foreign is None:
        check_writable(tmp_path / "out", names, whole=True, is_ours=is_merged)
    else:
        with pytest.raises(ConfigError, match=f"{foreign}.* and would be deleted"):
            check_writable(tmp_path / "out", names, whole=True, is_ours=is_merged)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("code", "is_full"), [("ENOSPC", 1), ("EDQUOT", 1), ("EFBIG", 1), ("EACCES", 0), ("EROFS", 0)]
)
def test_room_is_asked_for_where_there_is_none(tmp_path: Path, code: str, is_full: int) -> None:
    with pytest.raises(TrainingError) as caught, disk_errors(tmp_path):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "file")
    assert str(caught.value).count("free some space") == is_full
