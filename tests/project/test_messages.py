"""What the program says has one style, which `docs/list_messages.py` prints to be read."""

import functools
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LISTED: Any = runpy.run_path(str(ROOT / "docs" / "list_messages.py"))
list_messages = functools.cache(LISTED["messages"])

VERBS = "run|set|choose|pass|give|name|merge|load|use|delete|unset|free|write|ask|convert|download"
VERBS += "|correct|shorten|leave|remove|fetch|save|call|rename|split|wait|lower|raise"
# Rule -> (of which kinds of messages, what breaks it, a message that does).
RULES = {
    "the field's words": (
        "error|warning|help|line|text",
        r"\b(waves?|climbs?|descents?|troubles?|anew|judged?|befell|typed|passed over)\b"
        r"|\b(stands? in|is no matter|in the place of|for want of|goes on from)\b",
        'raise ValueError(f"{name} is passed over")',
    ),
    "no `we`": (
        "error|warning|help|line|text",
        r"\b([Ww]e|[Uu]s|[Oo]urs?)\b(?![-'])",
        'raise ValueError("a type that we do not read")',
    ),
    "a remedy after `; `": (
        "error|warning",
        rf"(?<!; run): ({VERBS}) \w",
        'raise ValueError("there is no model: name one with --model")',
    ),
    "no full stop at the end": (
        "error|warning",
        r"\w\.$",
        'raise ValueError("The file is missing.")',
    ),
}


def broken(rule: str, path: Path) -> list[str]:
    kinds, pattern, _ = RULES[rule]
    return [
        f"{message.file}:{message.line}: {message.text}"
        for message in list_messages(path)
        if re.fullmatch(kinds, message.kind)
        and re.search(pattern, re.sub(r"\{.*?\}", "{}", message.text))
    ]


@pytest.mark.parametrize("rule", RULES)
def test_messages_keep_a_rule(rule: str) -> None:
    assert broken(rule, ROOT / "mlx_qlora") == []


@pytest.mark.parametrize("rule", RULES)
def test_the_control_breaks_a_rule(rule: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f'"""We do."""\n{RULES[rule][2]}\n')
    assert len(broken(rule, tmp_path)) == 1


def test_a_message_is_listed_with_what_it_is(tmp_path: Path) -> None:
    code = '''"""A docstring is no message."""
raise ConfigError(
    f"{field} must be a number; " "got 'x y'"
)
r: int = option(4, "rank of the adapter")
say(console, f"{'no label'}done")
NAMES = "output_dir save_total_limit"
'''
    (tmp_path / "code.py").write_text(code)
    assert [message[1:] for message in list_messages(tmp_path / "code.py")] == [
        (3, "error", "{field} must be a number; got 'x y'"),
        (5, "help", "rank of the adapter"),
        (6, "line", "{'no label'}done"),
        (6, "line", "no label"),
    ]
