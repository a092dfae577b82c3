"""Writes each example as a notebook, X.py as notebooks/X.ipynb, with the outputs of a run.

Run as: python examples/make_notebooks.py [--all] [NAME ...]

The scripts are the source. A notebook whose code is its script's keeps its outputs; any other one
is run, which takes minutes. With --all each one is run again, with names only those.
"""

import argparse
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parent
NOTEBOOKS = EXAMPLES / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LIMIT = 3600  # seconds for a cell


def scripts() -> list[Path]:
    """The examples: scripts in jupytext's percent format, which begin with a cell."""
    found = sorted(EXAMPLES.glob("*.py"))
    return [path for path in found if path.read_text(encoding="utf-8").startswith("# %%")]


def place_of(script: Path) -> Path:
    """Where a script's notebook lies."""
    return NOTEBOOKS / f"{script.stem}.ipynb"


def notebook_of(script: Path) -> NotebookNode:
    """A script as its notebook, without outputs.

    Raises:
        nbformat.ValidationError: what came out is no notebook.
    """
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    notebook.nbformat, notebook.nbformat_minor = 4, 5  # from 4.5 on cells have ids
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"{script.stem}-{number}"  # jupytext's are random
    nbformat.validate(notebook)
    return notebook


def code(notebook: NotebookNode) -> list[tuple[str, str]]:
    """What a notebook says without its outputs: kind and text of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def run(notebook: NotebookNode, folder: Path, **environment: str) -> None:
    """Run a notebook in a folder, as Jupyter does, and keep its outputs in it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails, an `assert` of its included.
    """
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=where)
    # tqdm would have ipywidgets for its bars, which draw downloads alone.
    quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env={**os.environ, **quiet, **environment})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it was run
        for output in cell.get("outputs", []):
            texts = output if output.output_type == "stream" else output.data
            for kind, text in texts.items():  # without what is of this machine
                if isinstance(text, str):
                    text = text.replace(f"{folder}/", "")
                    texts[kind] = text.replace(sysconfig.get_path("purelib"), "site-packages")


def write(names: list[str], anew: bool = False) -> list[Path]:
    """Bring the notebooks up to date, and remove those whose script is gone."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for old in {*NOTEBOOKS.glob("*.ipynb")} - {*map(place_of, scripts())}:
        old.unlink()
    written = []
    for script in scripts():
        notebook, place = notebook_of(script), place_of(script)
        is_current = place.exists() and code(nbformat.read(place, 4)) == code(notebook)
        if (names and script.stem not in names) or (is_current and not anew):
            continue
        with tempfile.TemporaryDirectory() as folder:
            beside = Path(folder, "examples", "notebooks")  # as far as a cell can tell
            beside.mkdir(parents=True)
            for file in EXAMPLES.iterdir():
                if file.is_file():
                    (beside.parent / file.name).symlink_to(file.resolve())
            run(notebook, beside, PYTHONPATH=os.pathsep.join([str(EXAMPLES.parent), *sys.path]))
        place.write_text(nbformat.writes(notebook, indent=1).rstrip("\n") + "\n", encoding="utf-8")
        written.append(place)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    for path in write(args.names, args.all or bool(args.names)):
        print(path)
