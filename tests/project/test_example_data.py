"""The example data says what is right: every calculation in it is worked out again.

A calculation is written as people write it: `$1,000 / 1.05^3 = $863.84`. Both sides are numbers,
with `$`, `%` and thousands separators; spaces stand around + - * / and none around ^.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_qlora.config import RunConfig, build, read_yaml, to_dict

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = r"\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?"
OPEN = r"(?:\(|ln\(|exp\(|-)*"
TERM = rf"{OPEN}{NUMBER}\)*(?:\^{OPEN}{NUMBER}\)*)*"
EXPRESSION = rf"{TERM}(?: [-+*/] {TERM})*"
EQUATION = re.compile(rf"(?<![\d.])({EXPRESSION}) = (\$?-?{NUMBER})")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
FUNCTIONS = {"ln": math.log, "exp": math.exp}


def value(text: str) -> float:
    """What an expression of the example data comes to."""
    plain = text.replace("$", "").replace(",", "").replace("^", "**")
    plain = re.sub(r"([\d.]+)%", r"(\1 / 100)", plain)
    return worked_out(ast.parse(plain, mode="eval").body)


def worked_out(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](worked_out(node.left), worked_out(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -worked_out(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return FUNCTIONS[node.func.id](*map(worked_out, node.args))
    assert isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
    return float(node.value)


def unit(stated: str) -> float:
    """One in the last digit that is shown."""
    digits = len(stated.rstrip("%").partition(".")[2])
    return 10.0**-digits / (100 if stated.endswith("%") else 1)


def is_right(expression: str, stated: float, last_digit: float) -> bool:
    return abs(value(expression) - stated) <= last_digit * (0.5 + 1e-6)


def equations(text: str) -> list[tuple[str, str]]:
    return EQUATION.findall(text)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text("utf-8").splitlines()]


def all_equations() -> Iterator[tuple[int, str, str]]:
    for line, row in enumerate(rows("finance.jsonl"), 1):
        for left, right in equations(row["output"]):
            yield line, left, right


# ---- the checker itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("it costs $1,000 / 1.05^3 = $863.84 now", True),
        ("it costs $1,000 / 1.05^3 = $863.85 now", False),
        ("a fall of 20 / 25 - 1 = -20%.", True),
        ("a fall of 20 / 25 - 1 = -21%.", False),
        ("(a) for (1 + 12% / 12)^12 - 1 = 12.68%, more", True),
        ("40 / 60 = 0.66", False),
        ("40 / 60 = 0.67", True),
        ("ln(1.05) = 4.88% and so on", True),
        ("$240,000 * 0.5% / (1 - 1.005^-360) = $1,438.92", True),
        ("1,000 - 10^2 * 2 = 800", True),
        ("1,000 - 10^2 * 2 = 80", False),
    ],
)
def test_the_checker_tells_right_from_wrong(text, right):
    ((expression, stated),) = equations(text)
    assert is_right(expression, value(stated), unit(stated)) == right


# ---- finance.jsonl -----------------------------------------------------------------------------


def test_finance_rows_are_many_and_whole():
    found = rows("finance.jsonl")
    assert len(found) >= 160
    for row in found:
        assert list(row) == ["instruction", "input", "output"]
        assert all(text == text.strip() for text in row.values())
        assert 12 <= len(row["instruction"]) <= 200
        assert len(row["input"]) <= 200
        assert 40 <= len(row["output"]) <= 500
        assert row["output"].endswith(".")
        sentences = len(re.findall(r"[.!?](?= [A-Z]|$)", row["output"]))
        assert 1 <= sentences <= 4, row["output"]


def test_no_two_finance_rows_are_alike():
    found = rows("finance.jsonl")
    for name in ("instruction", "output"):
        said = [re.sub(r"\W+", " ", row[name]).lower() for row in found]
        assert len(set(said)) == len(said)
    # Neither may one be another with other figures.
    for name in ("instruction", "output"):
        without = [re.sub(r"[\d\W]+", " ", row[name]).lower() for row in found]
        assert len(set(without)) == len(without)


def test_80_finance_rows_calculate_and_every_calculation_is_right():
    wrong = [
        f"line {line}: {left} = {value(left)}, not {right}"
        for line, left, right in all_equations()
        if not is_right(left, value(right), unit(right))
    ]
    assert not wrong, "\n".join(wrong)
    assert len({line for line, _, _ in all_equations()}) >= 80


def test_every_equals_sign_belongs_to_a_calculation_that_was_checked():
    for line, row in enumerate(rows("finance.jsonl"), 1):
        assert row["output"].count("=") == len(equations(row["output"])), (line, row["output"])
        assert "=" not in row["instruction"] + row["input"], line
        for left, _ in equations(row["output"]):
            assert re.search(r" [-+*/] |\^|ln|exp", left), (line, left)  # not "5 = 5"


def test_a_last_digit_that_is_wrong_by_one_would_be_found():
    for line, left, right in all_equations():
        for off in (-unit(right), unit(right)):
            assert not is_right(left, value(right) + off, unit(right)), (line, left, right)


# ---- chat_rows.jsonl ---------------------------------------------------------------------------


def test_chat_rows_are_40_dialogues_of_one_format():
    found = rows("chat_rows.jsonl")
    assert len(found) >= 40
    assert len({json.dumps(row) for row in found}) == len(found)
    questions = [row["messages"][1]["content"] for row in found]
    assert len(set(questions)) == len(questions)
    assert len({row["messages"][0]["content"] for row in found}) == 1
    for row in found:
        roles = [message["role"] for message in row["messages"]]
        assert roles[0] == "system"
        assert roles[1:] in (["user", "assistant"], ["user", "assistant"] * 2)
        for message in row["messages"][2::2]:
            answer = message["content"]
            assert re.fullmatch(r"Aye! [^\n]+\nDo this: [^\n]+\.", answer), answer
            assert len(answer) <= 220


# ---- llama31_8b.yaml ---------------------------------------------------------------------------


def test_the_settings_for_llama_are_the_defaults_as_the_file_says():
    written = to_dict(build(read_yaml(EXAMPLES / "llama31_8b.yaml")))
    written["model"]["source"] = None
    written["checkpointing"]["output_dir"] = "outputs"
    assert written == to_dict(RunConfig())
