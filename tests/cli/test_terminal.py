"""No string of a stranger's file, name or model reaches a terminal as more than text."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from support.command_line import call, shell
from support.tiny_folder import write_random_model

from mlx_qlora.after.screen import Screen
from mlx_qlora.before.doctor import Finding, show
from mlx_qlora.errors import ConfigError, UserError, say, visible
from mlx_qlora.progress import doing

CLIPBOARD, CLEAR, TURNED = "\x1b]52;c;cm0gLXJm\x07", "\x9b2J", "\u202egnp.exe\u2066"
HOSTILE = CLIPBOARD + CLEAR + TURNED


def assert_harmless(text: str) -> None:
    assert text and not any(sign in text for sign in "\x1b\x07\x9b\u202e\u2066\x00"), ascii(text)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    write_random_model(folder)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    return folder


def strange_tensor(base: Path) -> list[Any]:
    tensors = load_file(base / "model.safetensors")
    tensors[f"model.{HOSTILE}.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, base / "model.safetensors")
    return ["generate", "--model", base, "--prompt", "x"]


def strange_shard(base: Path) -> list[Any]:
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": f"{HOSTILE}x.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["generate", "--model", base, "--prompt", "x"]


def strange_record(base: Path) -> list[Any]:
    adapter = base.parent / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "run.yaml").write_text(f"model:\n  source: {json.dumps(HOSTILE + '/nope')}\n")
    return ["generate", "--adapter", adapter, "--prompt", "x"]


def strange_template(base: Path) -> list[Any]:
    (base / "chat_template.jinja").write_text(f"{{{{ raise_exception({json.dumps(HOSTILE)}) }}}}")
    return ["generate", "--model", base, "--prompt", "x"]


def strange_row_file(base: Path) -> list[Any]:
    name = f"{CLIPBOARD}{TURNED}.jsonl"
    shutil.copy("rows.jsonl", name)
    return ["inspect", "--model", base, "--data", name]


def strange_field(base: Path) -> list[Any]:
    row = {"prompt": "a", "completion": "b", HOSTILE: "what is not used"}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 30)
    return ["inspect", "--model", base, "--data", "rows.jsonl"]


def strange_model_type(base: Path) -> list[Any]:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": HOSTILE}))
    return ["plan", "--model", base]


def strange_adapter(base: Path) -> list[Any]:
    adapter = base.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": HOSTILE}))
    shutil.copy(base / "model.safetensors", adapter / "adapter_model.safetensors")
    return ["generate", "--model", base, "--adapter", adapter, "--prompt", "x"]


def strange_config(base: Path) -> list[Any]:
    Path("c.yaml").write_text(f"model:\n  {json.dumps(HOSTILE)}: 1\n")
    return ["train", "--model", base, "--config", "c.yaml"]


def strange_flag(base: Path) -> list[Any]:
    return ["inspect", "--model", base, f"--{HOSTILE}"]  # as a shell makes of a name and a *


def strange_word(base: Path) -> list[Any]:
    return ["cache", HOSTILE]


MEMBERS = [
    strange_flag,
    strange_word,
    strange_tensor,
    strange_shard,
    strange_record,
    strange_template,
    strange_row_file,
]
MEMBERS += [strange_field, strange_model_type, strange_adapter, strange_config]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_what_a_file_says_is_shown_and_not_obeyed(
    member: Any, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(*member(base))
    out, err = capsys.readouterr()
    assert code == (0 if member in (strange_row_file, strange_field) else 2)
    assert_harmless(out + err)
    assert "52;c;cm0gLXJm" in out + err, "the name is there, spelled out"


def test_a_run_over_a_file_whose_name_is_not_utf8_ends(base: Path) -> None:
    name = os.fsencode(base.parent) + b"/\xff\xfe.jsonl"
    with open(name, "wb") as file:
        file.write(Path("rows.jsonl").read_bytes())
    words = ["--data", os.fsdecode(name), "--output-dir", "out", "training.max_steps=1"]
    assert call("train", "--model", base, *words, "generation.max_new_tokens=2") == 0
    assert r"\udcff\udcfe.jsonl" in Path("out/report.html").read_text(encoding="utf-8")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, r"\x1b]52"), (io.StringIO, "\x1b]52")])
def test_a_terminal_is_told_what_a_model_writes_and_a_file_gets_it(
    stream: Any, shown: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer:
        speed = None

        def __iter__(self) -> Any:
            return iter(["hello ", CLIPBOARD])

    monkeypatch.setattr("mlx_qlora.infer.generate.stream", lambda *_, **__: Answer())
    monkeypatch.setattr("mlx_qlora.commands.asdict", lambda _: {}, raising=False)
    monkeypatch.setattr(sys, "stdout", written := stream())
    try:
        call("generate", "--model", base, "--prompt", "x", "--raw")
    finally:
        monkeypatch.undo()
    assert written.getvalue().startswith(f"hello {shown}")


def test_each_door_spells_out() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    say(console, HOSTILE)
    show(console, Finding("error", "name", f"text {HOSTILE}", f"fix {HOSTILE}"))
    written = console.file.getvalue()  # pyright: ignore
    assert_harmless(written)
    assert written.count("52;c;cm0gLXJm") == 3
    with doing(f"reading {HOSTILE}", 3, "rows"):
        screen = Screen(console)
        screen.tick()  # which moves the cursor itself
        screen.clear()
    line = console.file.getvalue().removeprefix(written)  # pyright: ignore
    assert "52;c;cm0gLXJm" in line
    assert "\x1b]" not in line and "\x9b" not in line and "\u202e" not in line
    for kind in (UserError, ConfigError):
        assert_harmless(str(kind(HOSTILE)))


# ---- what the environment says -------------------------------------------------------------------

AWAY = "http://user:hunter2@127.0.0.1:9"
ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "a password in the hub's address": ({"HF_ENDPOINT": AWAY}, "http://***@127.0.0.1:9 cannot be"),
    "a password with an @": (
        {"HF_ENDPOINT": "http://user:hunter2@hunter2@127.0.0.1:9"},
        "http://***@127.0.0.1:9 cannot be reached",
    ),
    "a password of a proxy": ({"ALL_PROXY": f"x{AWAY}"}, "://***@127.0.0.1:9"),
    "SOCKS without its package": (
        {"ALL_PROXY": "socks5://user:hunter2@127.0.0.1:9"},
        'pip install "httpx[socks]" and write socks5:// in ALL_PROXY, or unset it',
    ),
    "SOCKS of no version": ({"all_proxy": "socks://127.0.0.1:9/"}, 'pip install "httpx[socks]"'),
    "a password with a slash": (
        {"HF_ENDPOINT": "http://user:hunter2/hunter2@127.0.0.1:9"},
        "HF_ENDPOINT is no address such as http://host:8080; correct or unset it",
    ),
    "an address without http": (
        {"HF_ENDPOINT": "user:hunter2@127.0.0.1:9"},
        "HF_ENDPOINT is no address",
    ),
    "a token in the address": (
        {"HF_ENDPOINT": "http://127.0.0.1:9/?token=hunter2"},
        "HF_ENDPOINT is no address",
    ),
    "a slash in a proxy's": (
        {"HTTP_PROXY": "http://user:hunter2/hunter2@127.0.0.1:9"},
        "HTTP_PROXY is no address",
    ),
    "half of an address": ({"https_proxy": "http://user:hunter2@[::1"}, "https_proxy is no addr"),
    "a token beyond ASCII": ({"HF_TOKEN": "hf_\xe4"}, "correct or unset"),
    "a timeout by a word": (
        {"HF_HUB_DOWNLOAD_TIMEOUT": "abc"},
        "HF_HUB_DOWNLOAD_TIMEOUT must be a whole number of seconds; got 'abc'",
    ),
    "another by a word": ({"HF_HUB_ETAG_TIMEOUT": "1.5"}, "HF_HUB_ETAG_TIMEOUT must be a whole"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_the_environment_causes_is_one_line_without_a_password(
    name: str, tmp_path: Path
) -> None:
    variables, said = ENVIRONMENTS[name]
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env = inherited | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": ""}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9"} | variables
    words = ["-m", "mlx_qlora", "generate", "--model", "some/repo", "--prompt", "x"]
    ended = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert ended.returncode == 2 and said in ended.stderr, ended.stderr
    assert ended.stderr.startswith("mlx-qlora: ") and ended.stderr.count("\n") == 1
    assert "hunter2" not in ended.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "--data", "rows.jsonl"],
        ["generate", "--prompt", "x", "generation.max_new_tokens=2"],
        ["plan", "--json"],
        ["train", "--help"],
    ],
    ids=" ".join,
)
def test_output_that_cannot_be_written_is_one_line(words: list[str], base: Path) -> None:
    command = [sys.executable, "-m", "mlx_qlora", *words, "--model", str(base)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "mlx-qlora: standard output cannot be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("words", [["generate", "--model", "nowhere", "--prompt", "x"], ["--no"]])
def test_an_error_that_cannot_be_written_is_an_error_all_the_same(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-m", "mlx_qlora", *words], stderr=full)
    assert ended.returncode == 2


@pytest.mark.parametrize("closed", [">&-", ">&- <&-", "2>&-"])
@pytest.mark.parametrize("words", ["plan", "plan --json", "train --print-config"])
def test_a_stream_that_is_closed_is_as_one_that_nobody_reads(
    words: str, closed: str, base: Path
) -> None:
    ended = shell(f"$us {words} --model {base} {closed}")
    assert ended.returncode == 0 and not ended.stderr
    assert bool(ended.stdout) == (closed == "2>&-")


def test_an_error_that_nobody_reads_is_no_answer(base: Path) -> None:
    ended = shell("$us generate --model nowhere --prompt x 2>&-")
    assert (ended.returncode, ended.stdout) == (2, b"")


def test_no_file_of_ours_takes_the_place_of_a_closed_stream(base: Path) -> None:
    words = "training.max_steps=1 lora.r=2 generation.max_new_tokens=1 model.bits=null"
    line = f"$us train --model {base} --data rows.jsonl --output-dir out {words} >&- 2>&- <&-"
    assert shell(line).returncode == 0
    assert not any(b"training " in path.read_bytes() for path in Path("out").glob("*.jsonl"))


def test_output_that_is_not_utf8_shows_what_it_can(base: Path) -> None:
    words = [sys.executable, "-m", "mlx_qlora", "inspect", "--model", base, "--data", "rows.jsonl"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(words, env=env, capture_output=True)
    assert ended.returncode == 0 and rb"\u2588" in ended.stdout and not ended.stderr


def test_a_line_that_quotes_megabytes_is_cut() -> None:
    cut = str(UserError("a" * 10**7 + "c\nb"))
    assert len(cut) == 2007 and cut.endswith("ac\nb") and cut.count("a ... a") == 1


def test_text_of_all_scripts_stays_as_it_is() -> None:
    for text in ("a\tb\nc", "שלום עולם", "नमस्ते", "👩‍👩‍👧 e\u0301", "\u200e\u200f"):
        assert visible(text) == text
    assert visible("\r\x00\x7f\ud800") == r"\r\x00\x7f\ud800"
