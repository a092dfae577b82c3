"""What other trainers call a field, what their values mean here, and presets, by names.toml."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ConfigError


def _by_word(table: Mapping[str, Any]) -> dict[str, Any]:
    """Word -> value of a table in which words of one value share a key."""
    return {word: value for words, value in table.items() for word in words.split()}


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_MEANT = {"as it is": ..., "null": None}
ALIASES: dict[str, str] = _TABLES["aliases"]  # field -> words
# Word -> its field, and what its values mean; ... leaves the field as it is.
MEANINGS: dict[str, tuple[str, dict[str, Any]]] = {
    word: (field, {value: _MEANT.get(meant, meant) for value, meant in _by_word(values).items()})
    for word, (field, values) in _by_word(_TABLES["meanings"]).items()
}
REMARKS, INSTEAD, ARGUMENTS = (_by_word(_TABLES[x]) for x in ("remarks", "instead", "arguments"))
PROGRAMS: dict[str, str] = _TABLES["programs"]
PRESETS: dict[str, list[str]] = _TABLES["presets"]  # name -> what it is for, and its fields
COMPARE = ("dpo", "orpo", "simpo", "kto")
ADAPTER_KINDS = ("lora", "qlora", "dora")  # what Axolotl's `adapter` may be
FIELD_OF = {word: field for field, words in ALIASES.items() for word in words.split()}
FIELD_OF |= {word: field for word, (field, _) in MEANINGS.items()}


def whose(words: Iterable[str]) -> str:
    """What to say of a config file with these names if it is another trainer's, or nothing."""
    words = list(words)
    shared = {name: len({*own.split()} & {*words}) for name, own in PROGRAMS.items()}
    name = max(shared, key=lambda each: shared[each])
    if shared[name] < 2:
        return ""
    known = [f"{word} is {FIELD_OF[word]}" for word in words if word in FIELD_OF][:6]
    return (
        f"\nthis looks like a config of {name}{': ' * bool(known)}{', '.join(known)}; leave out or "
        'rename what has no equal here (in the docs, see "Coming from another trainer")'
    )


def translate(word: str, value: Any) -> tuple[Any, str]:
    """The value of `FIELD_OF[word]`, ... if it stays as it is, and a note that says so."""
    field, remark = FIELD_OF[word], REMARKS.get(word, "")
    if word not in MEANINGS:
        return value, f"{word} is {field}{remark}"
    meanings, shown = MEANINGS[word][1], str(value)
    shown = shown.lower() if isinstance(value, bool) else shown
    if value is None:  # "fp16:" with nothing behind it
        return ..., f"{word} has no effect"
    if word == "lora_target" and shown not in meanings:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        return names, f"{word} is {field}"
    if shown not in meanings:
        raise ConfigError(f"{word} may be {' or '.join(meanings)} here; got {value!r}{remark}")
    value = meanings[shown]
    meaning = "has no effect" if value is ... else f"is {field}={value}"
    return value, f"{word}={shown} {meaning}{remark}"


# Who sets one of these decides the other, too.
TOGETHER = {"training.max_steps", "training.num_train_epochs"}, {"lora.r", "lora.lora_alpha"}


def preset(name: str, given: set[str]) -> tuple[list[str], str]:
    """The `section.field=value` of a preset that are not given, and a line that says so."""
    about, fields = PRESETS[name]
    given = given.union(*(pair for pair in TOGETHER if given & pair))
    used = [field for field in fields.split() if field.partition("=")[0] not in given]
    if "model.adapter" in given:  # its shape is what it is
        used = [field for field in used if not field.startswith("lora.")]
    return used, f"preset {name}, {about}: {', '.join(used)}"
