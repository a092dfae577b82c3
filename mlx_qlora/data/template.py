"""A row becomes a prompt and the response to learn.

The two forms below are those of Stanford Alpaca without its preamble; a row without `input`
leaves the whole Input block out.
"""

from collections.abc import Mapping
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
    if not isinstance(row, Mapping):
        raise DataError(f"not an object but {type(row).__name__}")
    for field in ("instruction", "output"):
        if field not in row:
            raise DataError(f"field {field!r} is missing")
    for field in ("instruction", "input", "output"):
        value = row.get(field, "")
        if not isinstance(value, str) and not (field == "input" and value is None):
            raise DataError(f"field {field!r} must be a string, not {type(value).__name__}")
    for field in ("instruction", "output"):
        if not row[field].strip():
            raise DataError(f"field {field!r} is empty")
    return alpaca_prompt(row["instruction"], row.get("input") or ""), row["output"]
