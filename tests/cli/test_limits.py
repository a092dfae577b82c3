"""What the system does not grant is one message: open files, a home, a cache, a folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ROOT, call
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora import run

MAIN = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {}))\n"
MAIN += "from mlx_qlora.cli import main; sys.exit(main(sys.argv[1:]))"


def python(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, words)]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in 20 files and more."""
    folder = tmp_path_factory.mktemp("shards")
    model, tokenizer = mq.load(write_model(folder / "model"))
    mq.add_lora(model, mq.LoraConfig(r=2))
    mq.save_merged(model, tokenizer, folder / "shards", max_shard_bytes=1)
    assert len([*(folder / "shards").glob("*.safetensors")]) >= 20
    return folder / "shards"


def test_a_model_of_more_files_than_a_process_may_open(shards):
    """Each is open while something is read from it, and no longer."""
    words = ["generate", "--model", shards, "--prompt", "a", "generation.max_new_tokens=1"]
    done = python(MAIN.format(20, 20), *words, "model.bits=null")
    assert done.returncode == 0, done.stderr


def test_mlx_lm_is_imported_below_the_limit_that_it_asks_for():
    """It sets 2048 and 4096, which only root may where the hard limit is lower."""
    script = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))
def refused(*_):
    raise ValueError("not allowed to raise maximum limit")
resource.setrlimit = refused
from mlx_qlora import device
device.mlx_lm("models.cache").KVCache()
assert resource.setrlimit is refused
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = python(script)
    assert (done.returncode, done.stdout) == (0, "(512, 1024)\n"), done.stderr


def test_no_other_door_to_mlx_lm():
    """An import of its own would set the limits."""
    for path in (ROOT / "mlx_qlora").rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not [
            line for line in lines if line.strip().startswith(("from mlx_lm", "import mlx_lm"))
        ]


def no_home(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(os.path, "expanduser", lambda path: path)


def read_only_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("XDG_CACHE_HOME", "/proc/none")


def cache_is_a_file(patch: pytest.MonkeyPatch) -> None:
    Path("cache").write_text("mine")
    patch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))


def current_folder_is_gone(patch: pytest.MonkeyPatch) -> None:
    gone = Path("gone").absolute()
    gone.mkdir()
    patch.chdir(gone)
    gone.rmdir()


def removed_before_the_adapter(patch: pytest.MonkeyPatch) -> None:
    train = run.train

    def removing(*words):
        result = train(*words)
        shutil.rmtree("out")
        return result

    patch.setattr(run, "train", removing)


def no_more_files(patch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    patch.setattr(run, "train", refused)


def broken_disk_at_the_report(patch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "out/report.html")

    patch.setattr("mlx_qlora.after.observer.write_report", refused)


def broken_disk_at_the_card(patch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "out/README.md")

    patch.setattr(run, "model_card", refused)


# What is wrong -> what is said.
WRONG = {
    no_home: "set XDG_CACHE_HOME",
    read_only_cache: "set data.cache_dir to another folder",
    cache_is_a_file: "set data.cache_dir to another folder",
    current_folder_is_gone: "the current folder: No such file",
    removed_before_the_adapter: "it was removed during the run",
    no_more_files: "Too many open files; raise this shell's limit",
    broken_disk_at_the_report: "out/report.html: No space left on device; free some space",
    broken_disk_at_the_card: "out/README.md: Input/output error",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_is_not_granted_is_one_message(wrong, train, capsys, tmp_path, monkeypatch):
    words = [str(tmp_path / word) if word in ("rows.jsonl",) else word for word in train]
    wrong(monkeypatch)
    assert call(*words, "model.base_model_name_or_path=org/tiny") == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx-qlora: ") and error.count("mlx-qlora: ") == 1, error
    assert WRONG[wrong] in error and "Traceback" not in error
    if "broken_disk" in wrong.__name__:
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
        assert "checkpoint-2 is complete" in error


NOBODY = "~nobody-of-this-name/it"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", NOBODY],
        ["generate", "--adapter", NOBODY, "--prompt", "x"],
        ["train", "--model", "x", "--data", "x", "--output-dir", NOBODY],
        ["train", "--model", "x", "--data", "x", "--resume", NOBODY],
        ["inspect", "--model", "smollm2-135m", "--data", NOBODY],
        ["merge", "--model", "x", "--adapter", NOBODY, "--output-dir", NOBODY],
        ["export", "--model", "x", "--adapter", NOBODY, "--output-dir", NOBODY],
        ["push", NOBODY, "me/it"],
        ["doctor", "--self-test", "--report", NOBODY],
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_refused_at_once(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx-qlora: ") and error.count("\n") == 1, error
    assert NOBODY in error and not os.listdir(tmp_path)


@pytest.mark.parametrize("field", ["lora.r", "data.max_length", "training.max_steps"])
@pytest.mark.parametrize("number", ["9" * 25, f"-{'9' * 25}"])
def test_a_whole_number_beyond_all_is_refused(field, number, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("{}: {{{}: {}}}".format(*field.split("."), number))
    for words in (["--config", tmp_path / "c.yaml"], [f"{field}={number}"]):
        assert call("train", "--model", "x", *words, "--print-config") == 2
        assert f"{field} must be an int" in capsys.readouterr().err
