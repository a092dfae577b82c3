"""Print every message of the program, as the source has it, to be read in a row.

Run as: python docs/list_messages.py [FOLDER OR FILE ...]

A message is a string with words in it that is no docstring: what an error, a warning or a line
says, the help of an option, and the pieces that these are put together of. `{...}` stands for what
is filled in.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
WORDS = re.compile(r"[A-Za-z]{2,}[,;:.]? +\S*[A-Za-z]{2,}")
# What is called with a string -> what the string is.
KINDS = {
    "option": "help",
    "add_argument": "help",
    "say": "line",
    "print": "line",
    "warn": "warning",
}
KINDS |= {"require": "error", "doing": "progress"}


class Message(NamedTuple):
    """A string of the program: where it stands, what kind it is, what it says."""

    file: str
    line: int
    kind: str
    text: str


def messages(paths: list[Path]) -> list[Message]:
    """The messages of Python files and of all such files in folders, in the order of the source."""
    files = [f for path in paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return [message for file in files for message in _in_file(file)]


def _in_file(file: Path) -> Iterator[Message]:
    name = str(file.resolve().relative_to(ROOT))
    for line, kind, text in _below(ast.parse(file.read_text(encoding="utf-8")), "text"):
        if WORDS.search(text):
            yield Message(name, line, kind, text)


def _below(node: ast.AST, kind: str) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    text = _text(node)
    if text is not None:
        yield node.lineno, kind, text  # type: ignore[attr-defined]
    if isinstance(node, ast.Raise):
        kind = "error"
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2].lstrip("_")
        kind = "error" if called.endswith("Error") else KINDS.get(called, kind)
    for child in ast.iter_child_nodes(node):
        if text is None or not isinstance(child, ast.Constant):
            yield from _below(child, kind)


def _text(node: ast.AST) -> str | None:
    """What a string says, with what is filled in as `{...}`; strings that are added are one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [
            v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}"  # type: ignore[attr-defined]
            for v in node.values
        ]
        return "".join(map(str, parts))
    return None


if __name__ == "__main__":
    for message in messages([Path(name) for name in sys.argv[1:]] or [ROOT / "mlx_qlora"]):
        print(f"{message.file}:{message.line}: {message.kind}: {message.text!r}")
