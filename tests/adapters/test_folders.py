"""A folder is written whole or not at all."""

import os
from pathlib import Path

import pytest

from mlx_qlora.folders import staged


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


def test_an_empty_existing_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert contents(tmp_path) == {"out/a": "1"}


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
