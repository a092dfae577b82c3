"""Print every message of the program, as the source has it, to be read in a row.

Run as: python docs/list_messages.py [FOLDER OR FILE ...]

A message is a string with words in it that is no docstring: what an error, a warning or a line
says, the help of an option, and the pieces that these are put together of. `{...}` stands for what
is filled in. `tests/project/test_messages.py` holds the style: what is wrong first, after a `; `
the remedy; fields and options as they are typed.
"""

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "mlx_qlora"
WORDS = re.compile(r"[A-Za-z]{2,}[,;:.]? +\S*[A-Za-z]{2,}")
NAMES = re.compile(r"(?=.*_)[a-z0-9_ ]+")  # such as a list of fields
# What is called with a string -> what the string is.
KINDS = {"option": "help", "add_argument": "help", "say": "line", "print": "line"}
KINDS |= {"warn": "warning", "require": "error"}


class Message(NamedTuple):
    """A string of the program: where it stands, what kind it is, what it says."""

    file: str
    line: int
    kind: str
    text: str


def messages(path: Path = PACKAGE) -> list[Message]:
    """The messages of a Python file, or of all in a folder, in the order of the source."""
    found = []
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        for line, kind, text in _below(ast.parse(file.read_text(encoding="utf-8")), "text"):
            if WORDS.search(text) and not NAMES.fullmatch(text):
                found.append(Message(os.path.relpath(file), line, kind, text))
    return found


def _below(node: ast.AST, kind: str) -> Iterator[tuple[int, str, str]]:
    """Line, kind and text of every string below a node, without docstrings."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Raise):
        kind = "error"
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2]
        kind = "error" if called.endswith("Error") else KINDS.get(called, kind)
    text = None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
            if isinstance(part, (ast.Constant, ast.FormattedValue))
        )
    if text is not None:
        yield node.lineno, kind, text
    for child in ast.iter_child_nodes(node):
        if text is None or not isinstance(child, ast.Constant):
            yield from _below(child, kind)


if __name__ == "__main__":
    for place in [Path(word) for word in sys.argv[1:]] or [PACKAGE]:
        for message in messages(place):
            print(f"{message.file}:{message.line}: {message.kind}: {message.text!r}")
