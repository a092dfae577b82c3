"""How a field of the config is declared, and what it may be; arguments of public functions.

Whoever makes a section, a YAML file or a line of Python, gets the same errors.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar, dataclass_transform

from mlx_qlora.errors import ConfigError, did_you_mean, require
from mlx_qlora.names import ARGUMENTS, FIELD_OF, INSTEAD

P = ParamSpec("P")
T = TypeVar("T")

# ---- sections ------------------------------------------------------------------------------------


def option(default: Any, help: str, *, choices: Iterable[Any] | None = None) -> Any:
    """Declare a field with its default, its one line of help and, if closed, its legal values."""
    metadata = {"help": help, "choices": tuple(choices) if choices is not None else None}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config_section(name: str) -> Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass that checks what it is given and lists its fields in help.

    Its own `__post_init__` comes afterwards. The section of all sections has no name.
    """

    def decorate(cls: type[T]) -> type[T]:
        own_check: Any = vars(cls).get("__post_init__", lambda self: None)

        def __post_init__(self: T) -> None:
            _check(name, self)
            own_check(self)

        config: Any = cls
        config.__post_init__ = __post_init__
        config = dataclasses.dataclass(frozen=True)(config)
        init, fields = config.__init__, {f.name: f for f in dataclasses.fields(config)}
        helps = [f"    {f.name}: {f.metadata['help']}" for f in fields.values() if f.metadata]
        config.__doc__ += "\n\nArgs:\n" * bool(helps) + "\n".join(helps)

        @functools.wraps(init)
        def __init__(self: T, *values: Any, **given: Any) -> None:
            for word in (word for word in given if word not in fields):
                places = {each: f"{name}.{each}".lstrip(".") for each in fields}
                for section in () if name else fields:  # it may be meant for one of its sections
                    inner = dataclasses.fields(_hints(config)[section])
                    places |= {field.name: f"{section}.{field.name}" for field in inner}
                hint = did_you_mean(word, (), FIELD_OF | INSTEAD | places)
                known = f"; {cls.__name__} has {', '.join(fields)}"
                raise ConfigError(f"unknown field {f'{name}.' * bool(name)}{word}{hint or known}")
            init(self, *values, **given)

        config.__init__ = __init__
        return config

    return decorate


_hints = functools.cache(typing.get_type_hints)


def _check(section: str, config: Any) -> None:
    """Put each value into its field as the field's type, and refuse one that is not legal."""
    for field in dataclasses.fields(config):
        place = f"{section}.{field.name}".lstrip(".")
        value = coerce(getattr(config, field.name), _hints(type(config))[field.name], place)
        if section:  # or a section, whose own values were looked at
            require("\0" not in str(value), place, "hold no NUL", value)
        if choices := field.metadata.get("choices"):
            value = value.lower() if isinstance(value, str) and value.lower() in choices else value
            rule = f"be one of {', '.join(map(repr, choices))}"
            require(value in choices, place, rule, value)
        object.__setattr__(config, field.name, value)


# ---- arguments -----------------------------------------------------------------------------------

RETURNED_BY = {"LlamaForCausalLM": "load", "Tokenizer": "load", "Examples": "read_examples"}


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """A public function that names an argument of ours which is not of its class."""
    signature = inspect.signature(function)
    classes = {
        name: _members(parameter.annotation)
        for name, parameter in signature.parameters.items()
        if all(
            member is type(None) or getattr(member, "__module__", "").startswith("mlx_qlora")
            for member in _members(parameter.annotation)
        )
    }

    @functools.wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **named).arguments
        except TypeError as error:
            words = (word for word in named if word not in signature.parameters)
            hint = did_you_mean(next(words, ""), signature.parameters, ARGUMENTS)
            hint = hint or f"; it takes {', '.join(signature.parameters)}"
            raise TypeError(f"{function.__name__}: {error}{hint}") from None
        for name, value in given.items():
            if not isinstance(value, classes.get(name, object)):
                what = f"{function.__name__}: {name} must be {a_value_of(classes[name][0])}"
                raise ConfigError(f"{what}; got {type(value).__name__}")
        return function(*args, **named)

    return call


# ---- types ---------------------------------------------------------------------------------------


def coerce(value: Any, annotation: Any, name: str) -> Any:
    """The value as its field's type; a ConfigError, naming the field, if it does not fit.

    YAML reads `2e-4` as a string (it wants 2.0e-4), so numbers may come as text; nothing else is
    converted.
    """
    for member in _members(annotation):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return _convert(value, member)
    raise ConfigError(f"{name} must be {a_value_of(annotation)}; got {value!r}")


def typed(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of values that a file holds, each of its field's type.

    Raises:
        TypeError, LookupError: a field is missing, or is none of the class; or it is no mapping.
        ConfigError: a value does not fit.
    """
    pairs = dict(values).items()
    return cls(**{name: coerce(value, _hints(cls)[name], name) for name, value in pairs})


def a_value_of(annotation: Any) -> str:
    """A type as messages say what a value must be."""
    kind = type_name(annotation)
    return {"int": "an ", "number": "a ", "list": "a ", "map": "a "}.get(kind.split()[0], "") + kind


def type_name(annotation: Any) -> str:
    """A type as `--help` and messages show it."""
    if len(members := _members(annotation)) > 1:
        return " or ".join(map(type_name, members))
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is list:
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        key, value = typing.get_args(annotation)
        return f"map of {type_name(key)} to {type_name(value)}"
    words = {int: "int", float: "number", bool: "true/false", str: "text"}
    if annotation in words:
        return words[annotation]
    if function := RETURNED_BY.get(annotation.__name__):
        return f"the {annotation.__name__} of {function}"
    return f"{annotation.__name__}(...)"


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _convert(value: Any, kind: Any) -> Any:
    """The value as a type that is no union; an error of Python's if it does not fit."""
    base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base is Any:
        return value
    if base is list and isinstance(value, (list, tuple)):
        return [_convert(item, inner[0]) for item in value]
    if base is dict and isinstance(value, dict):
        return {_convert(k, inner[0]): _convert(v, inner[1]) for k, v in value.items()}
    is_bool = isinstance(value, bool)  # which is an int to Python
    if base is float and not is_bool:
        number = float(value)
        # 32 stays 32: a resolved config must read back to the same text, and hash.
        return value if isinstance(value, int) else number
    if base is int and not is_bool and abs(operator.index(value)) < 1 << 53:
        return operator.index(value)  # of NumPy's, too
    if base is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, base) or base is int:
        raise TypeError(value)
    return value
