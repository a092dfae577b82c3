"""Writes docs/fields.md from the fields' own declarations.

Run as: make docs        (or: python docs/make_fields.py)
"""

import dataclasses
import typing
from pathlib import Path

from mlx_qlora.config import SECTIONS, type_name


def page() -> str:
    """The page as Markdown."""
    lines = [
        "# Fields",
        "",
        "Every field of a run: `learning_rate: 2e-4` below `training:` in YAML,",
        "`training.learning_rate=2e-4` on the command line, and",
        "`TrainingConfig(learning_rate=2e-4)` in Python.",
        "Made by `make docs` from the declarations; do not edit.",
    ]
    for section, config in SECTIONS.items():
        hints = typing.get_type_hints(config)
        lines += ["", f"## {section}", "", (config.__doc__ or "").split("\n")[0], ""]
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        for field in dataclasses.fields(config):
            choices = field.metadata["choices"]
            kind = ", ".join(map(str, choices)) if choices else type_name(hints[field.name])
            default = getattr(config(), field.name)
            shown = "null" if default is None else f"{default}"
            help = field.metadata["help"].replace("[", "\\[")  # or Markdown sees a link
            lines.append(f"| `{field.name}` | {kind} | {shown} | {help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = Path(__file__).parent / "fields.md"
    path.write_text(page(), encoding="utf-8")
    print(f"wrote {path}")
