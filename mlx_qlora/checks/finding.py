"""What a check says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: `warning` works, but slowly or not in every case; `error` does not work.
        text: what was found.
        fix: a command to paste; beside `ok`, one that is worth knowing. None where there is none.
    """

    name: str
    state: Literal["ok", "warning", "error"]
    text: str
    fix: str | None = None
