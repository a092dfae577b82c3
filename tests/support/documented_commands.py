"""What README and docs tell a reader to type: found page by page, in order, and sorted.

A page's steps are its ```bash blocks, `$ ` lines of screens, ```python blocks, blocks with a
title="file" (which the reader saves under that name), and `mlx-qlora ...` in the running text.
"""

import functools
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(mlx-qlora [^`]+)`")
TITLE = re.compile(r'title="([^"]+)"')
OURS = re.compile(r"^(?:mlx-qlora|python -m mlx_qlora(?:\.train)?)(?: |$)")

# First words of commands that are not ours, and why a test does not run them.
NOT_RUN = {
    "mlx.launch": "starts processes on other machines; tests/train/test_processes.py runs it here",
    "mlx.distributed_config": "sets up the reader's machines",
    "cd": "the reader's folders",
    "cp": "the reader's files",
    "export": "set for the reader's shell; the tests give each command what it needs",
    "git": "fetches from the network",
    "source": "makes a shell use an environment that is not there in a test",
    "python3 -m venv": "makes an environment, which takes long and needs the network",
    "hf": "of huggingface_hub; logs in to the real hub or downloads from it",
    "wandb": "of wandb; logs in to a real account or uploads to it",
    "tensorboard": "a server that never ends",
    "jupyter": "a server that never ends",
    "vllm": "not installed: needs a GPU",
    "ollama": "not installed: is no Python package",
    "llama-cli": "not installed: is no Python package",
    "llama-server": "not installed: is no Python package",
    "sudo sysctl": "changes the reader's Mac",
    "sysctl": "of macOS",
    "mlx_lm.generate": "its names of models are the hub's; tests/adapters/test_mlx_lm.py",
    "mlx_lm.lora": "the other tool, in the guide that leaves it",
    "mlx_lm.fuse": "the other tool, in the guide that leaves it",
    "mlx_lm.server": "a server that never ends",
}


@dataclass(frozen=True)
class Step:
    """One thing that a page tells the reader to do.

    Attributes:
        kind: `shell`, `inline` (a command in running text), `python`, or `file`.
        text: the command, the code, or the file's content.
        line: of the page, from 1.
        name: of the file.
    """

    kind: str
    text: str
    line: int
    name: str = ""


def steps(page: str) -> list[Step]:
    """The steps of a page in the order in which they are read."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[Step] = []
    prose = text
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 2
        indent, info, body = len(fence[1]), fence[2].strip(), fence[3]
        body = "".join(row[indent:] for row in body.splitlines(keepends=True))
        found += _of_block(info, body, line)
        # Blanks keep the places of what is left, and so the line numbers.
        blank = re.sub(r"[^\n]", " ", fence[0])
        prose = prose[: fence.start()] + blank + prose[fence.end() :]
    for told in INLINE.finditer(prose):
        line = text.count("\n", 0, told.start()) + 1
        found.append(Step("inline", " ".join(told[1].split()), line))
    return sorted(found, key=lambda step: step.line)


def _of_block(info: str, body: str, line: int) -> list[Step]:
    title, language = TITLE.search(info), info.split(" ")[0].lower()
    if title:
        written = Step("file", body, line, title[1])
        return [written]
    if language == "python":
        return [Step("python", body, line)]
    if language == "bash":
        return _commands(body, line)
    rows = body.splitlines()
    return [
        Step("shell", row[2:].split(" #")[0].strip(), line + i)
        for i, row in enumerate(rows)
        if row.startswith("$ ")
    ]


def _commands(body: str, line: int) -> list[Step]:
    """The commands of a shell block: lines joined at backslashes, comments left out."""
    made, begun = [], ""
    for i, row in enumerate(body.splitlines()):
        if row.endswith("\\"):
            begun += row[:-1]
            continue
        command = _without_comment(begun + row)
        begun = ""
        if command:
            made.append(Step("shell", command, line + i))
    return made


def _without_comment(row: str) -> str:
    """Up to a # that begins a word outside of quotes."""
    quote = ""
    for i, letter in enumerate(row):
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        if letter == "#" and not quote and (i == 0 or row[i - 1].isspace()):
            return row[:i].strip()
    return row.strip()


@dataclass(frozen=True)
class Command:
    """A command of ours, taken apart as a shell would.

    Attributes:
        words: behind `mlx-qlora`, or behind `train` for `python -m mlx_qlora.train`.
        env: what stands before it, such as HF_HUB_OFFLINE=1.
        stdin: what is piped into it.
    """

    words: list[str]
    env: dict[str, str]
    stdin: str | None


def ours(text: str) -> Command | None:
    """A command of ours, or None if it is somebody else's."""
    stdin = None
    if piped := re.fullmatch(r"(?:printf|echo) ('[^']*'|\"[^\"]*\") \| (.*)", text):
        stdin, text = shlex.split(piped[1])[0].replace("\\n", "\n") + "\n", piped[2]
    env = {}
    while setting := re.match(r"([A-Z][A-Z0-9_]*)=(\S*) +", text):
        env[setting[1]], text = setting[2], text[setting.end() :]
    text = re.sub(r" > \S+$| &$", "", text)  # the shell's own
    if not (start := OURS.match(text)):
        return None
    words = shlex.split(text[start.end() :])
    return Command((["train"] if ".train" in start[0] else []) + words, env, stdin)


def is_a_name_only(text: str) -> bool:
    """Whether running text merely names a command, or shows its shape: no step for the reader."""
    words = shlex.split(text)
    shape = any(re.fullmatch(r"\.\.\.|…|[A-Z][A-Z/-]*|\[.*|.*\]", word) for word in words[1:])
    return len(words) == 2 or shape


@functools.cache
def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))


@functools.cache
def extras() -> set[str]:
    """The optional dependencies."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return set(tomllib.loads(text)["project"]["optional-dependencies"])
