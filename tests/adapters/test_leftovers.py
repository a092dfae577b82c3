"""What a killed process leaves of a folder is removed by the next one, and nothing else is."""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.command_line import ROOT, contents

from mlx_qlora import folders
from mlx_qlora.adapters.merge import check_disk
from mlx_qlora.errors import ConfigError
from mlx_qlora.folders import (
    MLX_LM,
    TAG,
    check_writable,
    new_staging,
    remove_leftovers,
    staged,
    write_whole,
)

# Another process, in the middle of writing a folder.
WRITING = """
import sys, time
from pathlib import Path
from mlx_qlora.folders import staged
with staged(Path(sys.argv[1]), replace=sys.argv[2] == "replace") as staging:
    (staging / "half").write_text("half")
    print(staging, flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("how", ["replace", "merge", "new"])
def test_a_living_process_keeps_its_staging_and_a_killed_one_s_is_removed(tmp_path, how):
    target = tmp_path / "out"
    if how != "new":
        target.mkdir()
        (target / "old").write_text("old")
    words = [sys.executable, "-c", WRITING, str(target), how]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    staging = Path(process.stdout.readline().strip())
    assert staging.is_dir(), "it is at work"
    if how != "new":
        with staged(target, replace=how == "replace") as ours:
            (ours / "new").write_text("new")
    is_there = (staging / "half").is_file()
    process.kill()
    process.communicate()
    assert is_there, "it was taken from a process that lives"
    with staged(target, replace=how == "replace") as ours:
        (ours / "newer").write_text("newer")
    assert not staging.exists()
    assert not [name for name in names(tmp_path) if ".tmp" in name or ".old" in name]


# name -> (what lies in the folder, what is left of it)
LEFT = {
    "half of a folder": ([".out-abcdefgh.tmp/half"], []),
    "an old one without a new one": ([".out-abcdefgh.old/a"], ["out", "out/a"]),
    "an old one beside the new one": ([".out-abcdefgh.old/a", "out/b"], ["out", "out/b"]),
    "both halves": (
        [".out-abcdefgh.old/a", ".out-abcdefgh.tmp/half"], ["out", "out/a"]
    ),
    "of another folder": (
        [".other-abcdefgh.tmp/a"], [".other-abcdefgh.tmp", ".other-abcdefgh.tmp/a"]
    ),
    "somebody's own": (
        [".out-notes.tmp", ".out.old/a", "out-abcdefgh.tmp"],
        [".out-notes.tmp", ".out.old", ".out.old/a", "out-abcdefgh.tmp"],
    ),
    "a name with dots": ([".out-0_z9abcd.tmp/a", ".out.v2-abcdefgh.tmp/a"],
        [".out.v2-abcdefgh.tmp", ".out.v2-abcdefgh.tmp/a"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_a_leftover_and_what_is_not(tmp_path, name):
    files, left = LEFT[name]
    for path in (tmp_path / file for file in files):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    remove_leftovers(tmp_path / "out")
    assert names(tmp_path) == sorted(left)


def test_a_link_that_looks_like_a_leftover_is_not_followed(tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    (away / "mine").write_text("mine")
    (tmp_path / ".out-abcdefgh.tmp").symlink_to(away)
    with staged(tmp_path / "out", replace=True) as staging:
        (staging / "new").write_text("new")
    assert contents(tmp_path) == {"away/mine": b"mine", "out/new": b"new"}


def test_room_is_made_before_it_is_looked_for(tmp_path):
    (tmp_path / ".merged-abcdefgh.tmp").mkdir()
    (tmp_path / ".merged-abcdefgh.tmp" / "model.safetensors").write_bytes(bytes(99))
    check_disk(tmp_path / "merged", 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "loop"])
def test_whatever_a_link_points_to_it_is_replaced_and_not_followed(tmp_path, kind):
    """In the place of a file, of a folder within, and of a folder that is replaced."""
    out, away = tmp_path / "out", tmp_path / "away"
    out.mkdir()
    places = [out / "report.html", out / "plots", tmp_path / "checkpoint-1"]
    if kind == "folder":
        away.mkdir()
        (away / "loss.svg").write_text("mine")
    elif kind == "file":
        away.write_text("mine")
    for place in places:
        place.symlink_to(place if kind == "loop" else away)
    if kind != "folder":  # the place of a folder is refused there
        places.pop().unlink()
    write_whole(out / "report.html", "ours")
    with staged(out) as staging:
        (staging / "plots").mkdir()
        (staging / "plots" / "loss.svg").write_text("ours")
    with staged(tmp_path / "checkpoint-1", replace=True) as staging:
        (staging / "a").write_text("ours")
    assert not any(place.is_symlink() for place in places)
    mine = {"away/loss.svg": b"mine"} if kind == "folder" else {}
    mine |= {"away": b"mine"} if kind == "file" else {}
    ours = ("out/report.html", "out/plots/loss.svg", "checkpoint-1/a")
    assert contents(tmp_path) == mine | dict.fromkeys(ours, b"ours")


def test_a_staging_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Between its making and its lock another process may come."""
    open_, taken = os.open, []

    def late(path, *more):
        if str(path).endswith(".tmp") and not taken:
            taken.append(path)
            descriptor = open_(path, *more)
            os.rmdir(path)
            return descriptor
        return open_(path, *more)

    monkeypatch.setattr(os, "open", late)
    with staged(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
    assert taken and contents(tmp_path) == {"out/a": b"a"}
    assert time.time() - (tmp_path / "out").stat().st_mtime < 600


@pytest.mark.parametrize(
    "metadata", [{"format": "mlx", "base": "1f" * 32}, {"format": "mlx"}, None]
)
def test_tensors_whose_config_a_kill_took_are_ours_if_they_say_so(tmp_path, metadata):
    """An export for mlx-lm removes the config first, and has no card."""
    out = tmp_path / "out"
    out.mkdir()
    tensors = {"model.layers.0.self_attn.q_proj.lora_a": np.zeros((4, 2), np.float32)}
    save_file(tensors, out / "adapters.safetensors", metadata=metadata)
    if metadata and "base" in metadata:
        check_writable(out, MLX_LM)
    else:
        with pytest.raises(ConfigError, match=r"adapters\.safetensors is not known to be from"):
            check_writable(out, MLX_LM)


def test_whoever_removes_a_leftover_holds_its_lock_so_that_its_maker_notices(tmp_path, monkeypatch):
    """Two processes that begin at the same time: one has made its folder, and not yet locked it."""
    made = tempfile.mkdtemp(prefix=f".{TAG}-", suffix=".tmp", dir=tmp_path)
    remove, held = folders.remove, []

    def watched(path: Path) -> None:
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.append(str(path))
        os.close(lock)
        remove(path)

    monkeypatch.setattr(folders, "remove", watched)
    remove_leftovers(tmp_path)
    assert held == [made] and not list(tmp_path.iterdir())


def test_a_folder_that_is_removed_before_it_is_opened_is_made_again(tmp_path, monkeypatch):
    mkdtemp, made = tempfile.mkdtemp, []

    def removed_at_once(**where: str) -> str:
        made.append(mkdtemp(**where))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", removed_at_once)
    staging, lock = new_staging(tmp_path, TAG)
    os.close(lock)
    assert [str(staging)] == made[1:] and staging.is_dir()
