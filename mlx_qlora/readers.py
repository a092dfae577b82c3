"""Small files of strangers: text, JSON and YAML, within limits; or one error that names them."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_qlora.errors import UserError

# A JSON text takes thirty times as much in memory at worst, and the reader of YAML takes seconds.
MOST_JSON, MOST_YAML = 1 << 24, 1 << 18
MOST_LEVELS, BYTES_PER_VALUE, MOST_DIGITS = 64, 16, 100


@contextmanager
def reading(path: Path, error: type[UserError]) -> Iterator[None]:
    """Turn whatever a stranger's file makes of those who read it into one `error` that names it.

    What is commonly wrong has a message of its own, a UserError, which passes.
    """
    try:
        yield
    except BaseException as problem:
        of_rust = type(problem).__name__ == "PanicException"  # which is no Exception
        if isinstance(problem, UserError) or not (of_rust or isinstance(problem, Exception)):
            raise
        reason = str(problem) or type(problem).__name__
        raise error(f"{path} cannot be read ({reason}); fetch or write it again") from problem


def read_text(path: Path, most: int = MOST_JSON, errors: str = "strict") -> str:
    """The text of a small file; a ValueError if it is no UTF-8, or is not small."""
    if path.exists() and not path.is_file():  # a pipe, for instance, into which nobody writes
        raise ValueError("it is no file")
    with path.open("rb") as file:
        text = file.read(min(path.stat().st_size, most) + 1)  # Python allocates what is asked for
    if len(text) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return text.decode("utf-8", errors)


def card_text(path: Path) -> str:
    """The text of a model card, or of another file by hand; empty if there is none of its size."""
    with suppress(OSError, ValueError):
        return read_text(path, errors="replace")
    return ""


def parse_json(text: str | bytes, most: int = MOST_JSON) -> Any:
    """The value of a JSON text; a ValueError if it is none, or beyond any real file's limits.

    A text of `most` bytes has few values for its length.
    """
    try:
        value = json.loads(text, parse_int=lambda digits: int(_check_digits(digits)))
        _check_size(value, most=most // BYTES_PER_VALUE)
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str, loader: Any = None) -> Any:
    """As `parse_json`, for YAML; what it says by aliases counts as if it were written out."""
    import yaml

    if len(text) > MOST_YAML:
        raise ValueError(f"it is longer than {MOST_YAML:,} characters")
    opened = 0
    for sign in re.findall(r"[\[\]{}]", text):  # which PyYAML takes seconds for
        opened += 1 if sign in "[{" else -1
        if opened > 4 * MOST_LEVELS:  # some may stand in texts
            raise ValueError("it is nested too deeply")
    try:
        reader = (loader or yaml.SafeLoader)(text)
        node = reader.get_single_node()
        _check_size(node)
        return None if node is None else reader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, LookupError, AttributeError, TypeError) as error:  # such as !!int ""
        place = getattr(error, "problem_mark", None)
        where = f" in line {place.line + 1}, column {place.column + 1}" if place else ""
        raise ValueError(f"{getattr(error, 'problem', None) or error}{where}") from None


def _check_digits(digits: str) -> str:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return digits


def _check_size(value: Any, levels: int = MOST_LEVELS, most: int = 1 << 20) -> int:
    """How many values a value of JSON, or a node of YAML, holds."""
    inner = getattr(value, "value", value)
    if str(getattr(value, "tag", "")).endswith(":int"):
        _check_digits(inner)
    inner = inner.values() if isinstance(inner, dict) else inner
    if isinstance(inner, (str, int, float, type(None))):
        return 1
    if not levels:
        raise ValueError("it is nested too deeply")
    n = 1
    for each in inner if isinstance(inner, Iterable) else ():
        n += _check_size(each, levels - 1, most - n)
        if n > most:
            raise ValueError("it holds too many values")
    return n


def card_header(path: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty if there is none that can be read."""
    text = card_text(path)
    try:
        return dict(parse_yaml(text[3:].split("\n---", 1)[0])) if text[:3] == "---" else {}
    except (TypeError, ValueError):  # people write it by hand
        return {}


def json_value(path: Path, *names: str, most: int = MOST_JSON) -> Any:
    """The object in a JSON file, or what it says within objects of these names.

    Without names {} if the file is missing or damaged, with names None if it says nothing there.
    """
    try:
        value: Any = dict(parse_json(read_text(path, most), most))
    except (OSError, TypeError, ValueError):
        value = {}
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def read_object(path: Path, error: type[UserError], most: int = MOST_JSON) -> dict[str, Any]:
    """The object in a stranger's JSON or YAML file; an `error` names a file that holds none."""
    with reading(path, error):
        text = read_text(path, most)
        value = parse_yaml(text) if path.suffix == ".yaml" else parse_json(text, most)
        if not isinstance(value, dict):
            raise TypeError(f"it holds no names with values, but a {type(value).__name__}")
        return value
