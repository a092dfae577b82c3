"""What a user can get wrong, and lines for a person; everything imports this file."""

import difflib
import itertools
import os
import re
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


# Our own phrases with a flag, and what the flag is in Python; a path among them may hold anything.
IN_PYTHON = {
    r"\b(another|with) --output-dir\b": r"\1 output_dir",
    r"\b(with|the hub:) --model (?=SOURCE|smollm2)": r"\1 source=",
    r"\b(with|pass|its adapter:) --adapter (DIR|.+?)(?= besides,|,? and another|, or|$)": (
        lambda found: f"{found[1]} mq.load(adapter={found[2]!r})"
    ),
    r"\bwithout --adapter$": "without adapter",
}
PAIR = r"[\w ]+: [\w -]+"
COLUMNS = re.compile(rf"data\.columns='\{{({PAIR}(?:, {PAIR})*)\}}' data\.template=chat")


class UserError(ValueError):
    """The root of all errors that the user's input, and not our code, has caused."""

    is_shared = False  # whether all processes have it, so that only the first one prints it
    in_command = False  # whether a command line shows them

    def __str__(self) -> str:
        return as_called(shown(super().__str__()))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows, by IPython's protocol: the caller's line and the message."""
        frames, ours = traceback.extract_tb(self.__traceback__), os.path.dirname(__file__)
        outside = itertools.takewhile(lambda frame: not frame.filename.startswith(ours), frames)
        *_, call = (None, *outside)
        line = [f"line {call.lineno}: {call.line}"] if call else []
        return [*line, f"{type(self).__name__}: {self}"]


def as_called(text: str) -> str:
    """A remedy with flags, which a caller in Python knows as arguments."""
    if UserError.in_command:
        return text
    for flag, name in IN_PYTHON.items():
        text = re.sub(flag, name, text)
    return COLUMNS.sub(_columns, text)


def _columns(proposal: re.Match[str]) -> str:
    columns = dict(pair.split(": ") for pair in proposal[1].split(", "))
    return f"mq.DataConfig(columns={columns}, template='chat')"


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


class DataWarning(UserWarning):
    """Rows that were refused, or fields of them that are not used."""


class PromptWarning(UserWarning):
    """A chat model is given a text that is no chat, and goes on with it."""


class AdapterWarning(UserWarning):
    """What a user should know of an adapter that is loaded all the same."""


class StreamedWarning(AdapterWarning):
    """A model is loaded that is not in memory, and is slow at something."""


def did_you_mean(word: str, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """Return `"; did you mean X?"` for the known name that is most like a word, or an empty string.

    `others` are other spellings, each with what it stands for, which is shown in its place.
    """
    shown = {**(others or {}), **{name: repr(name) for name in known}}
    some = [*shown][:1000]  # a stranger's file may have a million
    nearest = [word] if word in shown else difflib.get_close_matches(word, some, n=1)
    return f"; did you mean {shown[nearest[0]]}?" if nearest else ""


def listing(problems: list[str], most: int = 20, unit: str = "") -> str:
    """Join problems into indented lines, so that one error reports all of them."""
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more {unit}".rstrip())
    return "\n".join(lines)


def require(holds: bool, field: str, rule: str, got: Any) -> None:
    """Raise a ConfigError `FIELD must RULE; got VALUE` unless the rule holds."""
    if not holds:
        raise ConfigError(f"{field} must {rule}; got {got!r}")


PATIENCE = 10.0  # seconds that nothing is said while something is waited for

# ---- lines for a person --------------------------------------------------------------------------


# What a terminal acts on, or shows in another order; and halves of characters, which no file holds.
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text with its control characters spelled out; line breaks and tabs stay."""
    return UNSHOWN.sub(lambda character: repr(character[0])[1:-1], text)


def in_page(value: Any) -> Any:
    """What Jinja writes for a value into a page: text with its control characters spelled out."""
    return visible(value) if type(value) is str else value


LONGEST = 2000  # characters of a line that may quote a file
CREDENTIALS = re.compile(r"(?<=://)[^\s/]+@")  # in the address of a proxy, or of another hub


def shown(text: str) -> str:
    """A message, which may quote a stranger's file or an address with a password, for a person."""
    half = LONGEST // 2  # the reason is at the end, after a name that may be long
    lines = text.split("\n")
    cut = (x if len(x) <= LONGEST else f"{x[:half]} ... {x[-half:]}" for x in lines)
    return CREDENTIALS.sub("***@", visible("\n".join(cut)))


def say(console: "Console", text: str) -> None:
    """Print a line: as it is where there is no terminal, else folded between words."""
    text = shown(text)
    if console.is_terminal:
        text = "\n".join(fold(line, console.width) for line in text.split("\n"))
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def write_out(text: str, end: str = "\n") -> None:
    """Print what is not ours: a terminal would act on it, and a file gets it as it is."""
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


def fold(line: str, width: int) -> str:
    """A line in lines of fewer characters, below what follows its label; no word is broken."""
    if len(line) < width:
        return line
    label = re.match(r"\S+(?: \S+)? {2,}| *", line)
    indent = label.end() if label else 0
    words = textwrap.TextWrapper(
        width - 1, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return words.fill(line)


def warn(console: "Console", text: str) -> None:
    """Print a warning; from a quiet console it goes to standard error."""
    if console.quiet:
        from rich.console import Console

        console = Console(stderr=True)
    say(console, f"warning   {text}")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on standard error what is waited for within, once that takes longer than `PATIENCE`."""
    line = visible(f"mlx-qlora: waiting for {what}\n")
    timer = threading.Timer(PATIENCE, lambda: sys.stderr.write(line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} minutes"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days"


def size(n_bytes: float) -> str:
    """A number of bytes in GB, the one unit for them; 1 GB is 10^9 bytes."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 5e6 else "under 0.01 GB"
