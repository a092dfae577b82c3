"""The two forms of a prompt, byte for byte, and every reason to refuse a row."""

from collections import UserDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.data.template import (
    alpaca_prompt,
    alpaca_row,
    completion_row,
    detect_format,
    text_row,
)
from mlx_qlora.errors import DataError

WITH = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
WITHOUT = "### Instruction:\n{instruction}\n\n### Response:\n{output}"


def fill(form: str, **texts: str) -> str:
    """Fills a form in one pass, so that texts which hold `{input}` stay as they are."""
    parts = []
    for piece in form.replace("}", "{").split("{"):
        parts.append(texts.get(piece, piece))
    return "".join(parts)


@given(st.text(), st.text(min_size=1), st.text())
def test_a_row_is_exactly_one_of_the_two_forms(instruction: str, input: str, output: str) -> None:
    instruction, output = "x" + instruction, "y" + output
    row = {"instruction": instruction, "input": input, "output": output}
    assert "".join(alpaca_row(row)) == fill(WITH, **row)
    row = {"instruction": instruction, "output": output}
    assert "".join(alpaca_row(row)) == fill(WITHOUT, **row)


@pytest.mark.parametrize(
    "text", ["{input}", "{}", "{0}", "{{", "%s", "$x", "{instruction!r}", "\\n"]
)
def test_braces_and_other_marks_are_text(text: str) -> None:
    row = {"instruction": text, "input": text, "output": text}
    prompt, response = alpaca_row(row)
    assert prompt == f"### Instruction:\n{text}\n\n### Input:\n{text}\n\n### Response:\n"
    assert response == text


@pytest.mark.parametrize("input", ["", None, ...])
def test_a_row_without_input_leaves_the_whole_block_out(input: Any) -> None:
    row = {"instruction": "Say hi.", "input": input, "output": "Hi."}
    if input is ...:
        del row["input"]
    assert alpaca_row(row) == ("### Instruction:\nSay hi.\n\n### Response:\n", "Hi.")


def test_the_prompt_of_training_is_the_prompt_of_asking() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert alpaca_row(row)[0] == alpaca_prompt("Add.", "1 2")
    assert alpaca_prompt("Add.") == "### Instruction:\nAdd.\n\n### Response:\n"


def test_whitespace_is_kept_and_other_fields_are_ignored() -> None:
    row = UserDict(instruction=" a\n", input=" ", output="\tb ", id=7)
    assert alpaca_row(row) == (
        "### Instruction:\n a\n\n\n### Input:\n \n\n### Response:\n",
        "\tb ",
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "not an object but list"),
        ("text", "not an object but str"),
        (None, "not an object but NoneType"),
        ({}, "field 'instruction' is missing"),
        ({"output": "b"}, "field 'instruction' is missing"),
        ({"instruction": "a"}, "field 'output' is missing"),
        ({"instruction": 1, "output": "b"}, "field 'instruction' must be a string, not int"),
        ({"instruction": "a", "output": None}, "field 'output' must be a string, not NoneType"),
        (
            {"instruction": "a", "input": ["x"], "output": "b"},
            "field 'input' must be a string, not list",
        ),
        ({"instruction": " \n", "output": "b"}, "field 'instruction' is empty"),
        ({"instruction": "a", "output": ""}, "field 'output' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        alpaca_row(row)
    assert str(caught.value) == words


# ---- other rows --------------------------------------------------------------------------------


def test_prompt_and_completion_are_taken_as_they_are() -> None:
    assert completion_row({"prompt": " a ", "completion": "b\n"}) == (" a ", "b\n")
    assert text_row({"text": "all of it"}) == ("", "all of it")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca"),
        ({"output": "b"}, "alpaca"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "prompt_completion"),
        ({"text": "c", "meta": 1}, "text"),
    ],
)
def test_the_fields_tell_the_format(row: dict[str, object], expected: str) -> None:
    assert detect_format(row) == expected


def test_a_row_of_no_format_says_which_there_are() -> None:
    with pytest.raises(DataError, match="instruction, output; prompt, completion; text"):
        detect_format({"question": "a"})
