"""A row becomes a prompt and the response to learn.

The two Alpaca forms below are Stanford's without its preamble; a row without `input` leaves the
whole Input block out.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mlx_qlora.errors import DataError


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """What stands before the response, in training and when asking the tuned model."""
    block = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"


def alpaca_row(row: Any) -> tuple[str, str]:
    """(prompt, response) of an instruction / input / output row.

    Raises:
        DataError: the reason for which the row cannot be used.
    """
    instruction, output = text_of(row, "instruction"), text_of(row, "output")
    return alpaca_prompt(instruction, text_of(row, "input", optional=True)), output


def completion_row(row: Any) -> tuple[str, str]:
    """(prompt, response) of a prompt / completion row, both taken as they are."""
    return text_of(row, "prompt"), text_of(row, "completion")


def text_row(row: Any) -> tuple[str, str]:
    """A text row has no prompt: all of it is learned."""
    return "", text_of(row, "text")


FORMATS: dict[str, Callable[[Any], tuple[str, str]]] = {
    "alpaca": alpaca_row,
    "prompt_completion": completion_row,
    "text": text_row,
}


def detect_format(row: Mapping[str, Any]) -> str:
    """The format whose fields a row has.

    Raises:
        DataError: it has those of none.
    """
    fields = row.keys()
    if fields & {"instruction", "output"}:
        return "alpaca"
    if fields & {"prompt", "completion"}:
        return "prompt_completion"
    if "text" in fields:
        return "text"
    raise DataError("has the fields of no format: instruction, output; prompt, completion; text")


def text_of(row: Any, field: str, optional: bool = False) -> str:
    """A field that must be text.

    Raises:
        DataError: the row is no object, or the field is missing, empty or of another type.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"not an object but {type(row).__name__}")
    value = row.get(field)
    if optional and value is None:
        return ""
    if field not in row:
        raise DataError(f"field {field!r} is missing")
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be a string, not {type(value).__name__}")
    if not optional and not value.strip():
        raise DataError(f"field {field!r} is empty")
    return value
