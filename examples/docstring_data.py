"""Makes the demo's data set from this machine's own Python: function source -> docstring.

Run as: python examples/docstring_data.py docstrings.jsonl

Every function of the standard library that has a docstring becomes a row: the source without its
docstring is the input, the docstring's first sentence is the output. Nothing is downloaded, and
the same Python makes the same file.
"""

import ast
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Write a one-sentence docstring for this Python function."
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring on one line, or None if there is none worth learning."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    is_prose = re.match(r"[A-Z][a-z]+ ", sentence) and sentence.endswith(".")
    return sentence if is_prose and 15 <= len(sentence) <= 80 else None


def without_docstring(source: str, function: FunctionNode) -> str:
    """The function's own lines, dedented, less the lines of its docstring."""
    lines = source.splitlines()
    docstring = function.body[0]
    kept = [
        line
        for number, line in enumerate(lines[: function.end_lineno], 1)
        if number >= function.lineno
        and not docstring.lineno <= number <= (docstring.end_lineno or 0)
    ]
    return "\n".join(line[function.col_offset :] for line in kept)


def rows(longest_source: int = 4000) -> Iterator[dict[str, str]]:
    """Yields instruction / input / output rows, in the order of the library's files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, FunctionNode) or len(node.body) < 2:
                continue
            sentence = first_sentence(ast.get_docstring(node) or "")
            code = without_docstring(source, node) if sentence else ""
            if sentence and len(code) <= longest_source and code not in seen:
                seen.add(code)
                yield {"instruction": INSTRUCTION, "input": code, "output": sentence}


def write(path: Path) -> int:
    """Writes all rows as JSONL; returns how many there are."""
    made = list(rows())
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return len(made)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} rows")
