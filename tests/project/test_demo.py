"""The demo's data: real rows, the same every time. The demo itself is `make demo`."""

import ast
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import docstring_data


@pytest.fixture(scope="module")
def rows():
    return list(docstring_data.rows())


def test_there_are_thousands_of_rows_and_none_shows_its_answer(rows):
    assert len(rows) > 3_000
    for row in rows:
        assert row["output"] not in row["input"]
        assert row["instruction"] == docstring_data.INSTRUCTION
        assert 15 <= len(row["output"]) <= 160
        assert row["output"].endswith(".")


def test_inputs_are_python_functions_without_their_docstring(rows):
    for row in rows[::50]:
        (function,) = ast.parse(row["input"]).body
        assert isinstance(function, docstring_data.FunctionNode)
        assert ast.get_docstring(function) != row["output"]


def test_the_same_python_makes_the_same_file(rows):
    assert list(islice(docstring_data.rows(), 300)) == rows[:300]


def test_first_sentence_of_a_docstring():
    first = docstring_data.first_sentence
    assert first("Return the answer.  Then more.\n\nDetails.") == "Return the answer."
    assert first("Return the\n    answer.") == "Return the answer."
    assert first("x.y(z) -> int") is None
    assert first("Return the answer without a stop") is None
