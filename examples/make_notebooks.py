"""Writes each example as a notebook, without outputs: X.py becomes notebooks/X.ipynb.

Run as: python examples/make_notebooks.py

The scripts are the source. The same script gives the same bytes, so that a change of a notebook
in a diff is always a change of its example.
"""

from pathlib import Path

import jupytext
import nbformat

EXAMPLES = Path(__file__).parent
NOTEBOOKS = EXAMPLES / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def scripts() -> list[Path]:
    """The examples: scripts in jupytext's percent format, which begin with a cell."""
    found = sorted(EXAMPLES.glob("*.py"))
    return [path for path in found if path.read_text(encoding="utf-8").startswith("# %%")]


def place_of(script: Path) -> Path:
    """Where a script's notebook lies."""
    return NOTEBOOKS / f"{script.stem}.ipynb"


def notebook_of(script: Path) -> str:
    """A script as the text of its notebook.

    Raises:
        nbformat.ValidationError: what came out is no notebook.
    """
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    notebook.nbformat, notebook.nbformat_minor = 4, 5  # from 4.5 on cells have ids
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"{script.stem}-{number}"  # jupytext's are random
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


def write() -> list[Path]:
    """Writes all notebooks, and removes those whose script is gone."""
    NOTEBOOKS.mkdir(exist_ok=True)
    made = [place_of(script) for script in scripts()]
    for old in set(NOTEBOOKS.glob("*.ipynb")) - set(made):
        old.unlink()
    for script, place in zip(scripts(), made):
        place.write_text(notebook_of(script), encoding="utf-8")
    return made


if __name__ == "__main__":
    for path in write():
        print(path)
