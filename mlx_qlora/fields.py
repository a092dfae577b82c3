"""How a hyperparameter is declared: once, in the dataclass beside the code that reads it.

The YAML file, the command line's flags and `--help`, and the record of a run are all made from
these declarations; nothing else lists a field's name, type or default.
"""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from mlx_qlora.errors import ConfigError


def option(default: Any, help: str, *, choices: Iterable[Any] | None = None) -> Any:
    """Declares a field with its default, its one line of help and, if closed, its legal values."""
    metadata = {"help": help, "choices": tuple(choices) if choices is not None else None}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_choices(section: str, config: Any) -> None:
    """Refuses a value outside its field's legal set.

    Args:
        section: the name that the user knows the dataclass by, for example `training`.
        config: an instance of a dataclass whose fields were declared with `option`.

    Raises:
        ConfigError: naming field, value and legal values.
    """
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices is not None and value not in choices:
            legal = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"{section}.{field.name} must be one of {legal}; got {value!r}")


def require(holds: bool, field: str, rule: str, got: Any) -> None:
    """Raises a ConfigError `FIELD must RULE; got VALUE` unless the rule holds."""
    if not holds:
        raise ConfigError(f"{field} must {rule}; got {got!r}")
