"""The little of Go's `text/template` that our Modelfiles use, to see what Ollama would write."""

import re
from typing import Any

TESTS = {
    'eq .Role "system"': lambda chat, i: chat[i]["role"] == "system",
    'eq .Role "assistant"': lambda chat, i: chat[i]["role"] == "assistant",
    "eq $i 0": lambda chat, i: i == 0,
    "eq (len (slice $.Messages $i)) 1": lambda chat, i: len(chat[i:]) == 1,
}


def render(template: str, chat: list[dict[str, str]]) -> str:
    """The text of a chat; anything else than these few actions is an error."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)  # text, action, text, ...
    tree, rest = _parse(parts, 0)
    assert rest == len(parts)
    return _run(tree, chat, -1)


def _parse(parts: list[str], at: int) -> tuple[list[Any], int]:
    """Nodes up to the action that ends them, and where that is."""
    nodes: list[Any] = []
    while at < len(parts):
        if at % 2 == 0:
            nodes.append(parts[at])
        elif parts[at] in ("end", "else"):
            return nodes, at
        elif parts[at] == ".Content":
            nodes.append((".Content", None, None))
        else:
            inside, at_end = _parse(parts, at + 1)
            otherwise: list[Any] = []
            if parts[at_end] == "else":
                otherwise, at_end = _parse(parts, at_end + 1)
            nodes.append((parts[at], inside, otherwise))
            at = at_end
        at += 1
    return nodes, at


def _run(nodes: list[Any], chat: list[dict[str, str]], i: int) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif node[0] == ".Content":
            text += chat[i]["content"]
        elif node[0] == "range $i, $_ := .Messages":
            text += "".join(_run(node[1], chat, n) for n in range(len(chat)))
        else:
            assert node[0].startswith("if ")
            holds = TESTS[node[0].removeprefix("if ")](chat, i)
            text += _run(node[1] if holds else node[2], chat, i)
    return text
