"""What a user can get wrong.

Every error below carries one message that names the file, line or field and the remedy.
The command line prints it without a traceback and exits with 2; anything else that is
raised is our bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The root of all errors that the user's input, and not our code, has caused.

    Attributes:
        is_shared: whether all processes of a run know it, so that only the first one says it.
    """

    is_shared = False


class ConfigError(UserError):
    """A field is unknown, of the wrong type or out of range, or two fields exclude each other."""


class SourceError(UserError):
    """A model cannot be found or fetched: no such folder, a gated or missing repository."""


class WeightsError(UserError):
    """A model's files are damaged, incomplete, or of an architecture we do not support."""


class TokenizerError(UserError):
    """A model's tokenizer or chat template is missing, damaged or cannot express the request."""


class DataError(UserError):
    """A data file is missing or empty, or a row cannot be used."""


class TrainingError(UserError):
    """A run cannot go on: it has diverged."""


class ProcessError(UserError):
    """A run of several processes cannot go on: one is gone, too slow, or unlike the others."""

    def __init__(self, message: str, is_shared: bool = False) -> None:
        super().__init__(message)
        self.is_shared = is_shared


class AdapterError(UserError):
    """An adapter is damaged, incomplete, or belongs to another model."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def listing(problems: list[str], most: int = 20) -> str:
    """Joins problems into indented lines, so that one error reports all of them."""
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)
