"""Writes docs/fields.md from the fields' own declarations, and the names in docs/migration.md.

Run as: make docs        (or: python docs/make_fields.py)
"""

import dataclasses
import re
import typing
from pathlib import Path

from mlx_qlora.config import SECTIONS
from mlx_qlora.fields import type_name
from mlx_qlora.names import ALIASES, INSTEAD, MEANINGS, PRESETS

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- (\w+): made by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)


def page() -> str:
    """The page as Markdown."""
    lines = [
        "# Fields",
        "",
        "After this page you know every setting of a run, and how to write it:",
        "`learning_rate: 2e-4` below `training:` in YAML, `training.learning_rate=2e-4` or",
        "`--learning-rate 2e-4` on the command line, and",
        "`TrainingConfig(learning_rate=2e-4)` in Python. In brackets: what it may be; the default.",
        "Made by `make docs` from the declarations; do not edit.",
    ]
    for section, config in SECTIONS.items():
        hints = typing.get_type_hints(config)
        lines += ["", f"## {section}", "", (config.__doc__ or "").split("\n")[0], ""]
        for field in dataclasses.fields(config):
            choices = field.metadata["choices"]
            kind = ", ".join(map(str, choices)) if choices else type_name(hints[field.name])
            default = getattr(config(), field.name)
            shown = "null" if default is None else f"{default}"
            help = field.metadata["help"].replace("[", "\\[")  # or Markdown sees a link
            lines.append(f"- `{field.name}` ({kind}; {shown}): {help}")
    return "\n".join(lines) + "\n"


def names() -> str:
    """What other trainers call a field, as Markdown; names that mean the same share a row."""
    lines = ["Fields here, and their names elsewhere, with the same values:", ""]
    lines += [f"- `{field}`: {_code(words.split())}" for field, words in ALIASES.items()]
    lines += ["", "Names elsewhere whose values are others here:", ""]
    rows = _grouped({word: _values(field, values) for word, (field, values) in MEANINGS.items()})
    lines += [f"- {_code(words)} ({values})" for values, words in rows.items()]
    lines += ["", "Names that are refused, and what to use:", ""]
    lines += [f"- {_code(words)}: {use}" for use, words in _grouped(INSTEAD).items()]
    return "\n".join(lines) + "\n"


def _values(field: str, meanings: dict[str, object]) -> str:
    """What each value of another trainer's name is here."""
    ours = {
        v: "nothing to set" if m is ... else f"`{field}={_yaml(m)}`" for v, m in meanings.items()
    }
    return "; ".join(f"{_code(values)}: {here}" for here, values in _grouped(ours).items())


def _grouped(items: dict[str, str]) -> dict[str, list[str]]:
    """Value -> the keys that have it."""
    groups: dict[str, list[str]] = {}
    for key, value in items.items():
        groups.setdefault(value, []).append(key)
    return groups


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def presets() -> str:
    """The presets as Markdown."""
    lines = ["| `--preset` | For | Sets |", "|---|---|---|"]
    for name, (about, fields) in PRESETS.items():
        shown = ", ".join(f"`{field}`" for field in fields.split())
        lines.append(f"| `{name}` | {about} | {shown} |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """A page with its blocks as they are today."""
    made = {"names": names, "presets": presets}
    return BLOCK.sub(lambda found: f"{found[1]}\n{made[found[2]]()}\n{found[3]}", text)


def _yaml(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    )


if __name__ == "__main__":
    (DOCS / "fields.md").write_text(page(), encoding="utf-8")
    for path in (DOCS / "migration.md", DOCS / "how-to" / "choose-settings.md"):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    print("wrote the fields, the names of other trainers and the presets")
