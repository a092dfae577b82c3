"""Every example runs as its notebook, and the notebooks are those of the scripts.

`test_demo.py` is about the demo, `tests/data/test_examples.py` about the class `Examples`.
"""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import make_notebooks  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[2]
SCRIPTS = make_notebooks.scripts()
EACH = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
# What these claim is true of the whole SmolLM2 alone; the others hold on its first layers, too.
WHOLE_MODEL = {"chat_data", "export", "own_loop", "quick_start"}
ENOUGH_ROWS = {"finance.jsonl": 24, "chat_rows.jsonl": 26}  # for what the examples claim


def test_the_examples_are_found_and_the_demo_is_not_one_of_them():
    names = {script.stem for script in SCRIPTS}
    assert names >= {"own_rows", "quick_start", "llama31_8b", "resume", "export", "own_loop"}
    assert not names & {"demo", "docstring_data", "make_notebooks"}


@EACH
def test_an_example_has_a_head_and_checks_its_claim(script):
    cells = jupytext.read(script, fmt="py:percent").cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert any(isinstance(node, ast.Assert) for node in tree.body), "no assert that always runs"
    shared = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert any(a.name == "mlx_qlora" and a.asname == "mq" for node in shared for a in node.names)


def test_the_readme_names_each_example_and_no_other():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    linked = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target}
    missing = [target for target in linked if not (ROOT / "examples" / target).exists()]
    assert not missing
    assert {script.name for script in SCRIPTS} <= linked


# ---- notebooks ---------------------------------------------------------------------------------


def stored(script: Path) -> Any:
    return nbformat.read(make_notebooks.place_of(script), as_version=4)


@EACH
def test_a_notebook_is_its_script(script):
    again = "run: make notebooks"
    assert make_notebooks.place_of(script).is_file(), again
    expected = make_notebooks.notebook_of(script)
    assert make_notebooks.code(stored(script)) == make_notebooks.code(expected), again
    assert [cell.id for cell in stored(script).cells] == [cell.id for cell in expected.cells]


@EACH
def test_a_notebook_opens_with_what_it_shows_and_how_long_it_takes(script):
    head, *rest = stored(script).cells[0].source.split("\n")
    assert re.fullmatch(r"# [^#]+\.|# [^#]+\?", head) or ":" in head
    assert re.search(r"Takes .* on two CPU cores", " ".join(rest))


@EACH
def test_a_stored_notebook_was_run_to_its_end_without_errors_and_warnings(script):
    cells = [cell for cell in stored(script).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    shows_its_result(outputs)
    text = "".join(json.dumps(output) for output in outputs)
    assert not re.search(r"warning|Traceback|stderr", text, re.IGNORECASE)
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "a path of the machine it ran on"


def shows_its_result(outputs: list[Any]) -> None:
    """A run's summary as the value of a cell, and a plot that followed the run."""
    results = [output.data for output in outputs if output.output_type == "execute_result"]
    runs = [data for data in results if data["text/plain"].startswith("TrainResult(")]
    assert runs, "no cell ends in a result"
    assert all('class="mq cell"' in data.get("text/html", "") for data in runs)
    live = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("<svg" in data.get("text/html", "") for data in live) >= len(runs)


def test_every_notebook_has_its_script():
    assert {path.stem for path in make_notebooks.NOTEBOOKS.glob("*.ipynb")} == {
        script.stem for script in SCRIPTS
    }


def test_writing_again_changes_no_byte_and_removes_what_has_no_script(tmp_path, monkeypatch):
    examples = tmp_path / "examples"
    (examples / "notebooks").mkdir(parents=True)
    (examples / "one.py").write_text('# %% [markdown]\n"""# One.\n\nText."""\n\n# %%\nx = 1\nx\n')
    (examples / "two.py").write_text('"""No example."""\n')
    (examples / "notebooks" / "gone.ipynb").write_text("{}")
    monkeypatch.setattr(make_notebooks, "EXAMPLES", examples)
    monkeypatch.setattr(make_notebooks, "NOTEBOOKS", examples / "notebooks")
    (place,) = make_notebooks.write([])
    first = place.read_bytes()
    assert make_notebooks.write([]) == [] and place.read_bytes() == first
    assert [path.name for path in place.parent.iterdir()] == ["one.ipynb"]
    cells: Any = nbformat.read(place, as_version=4).cells
    assert [cell.source for cell in cells] == ["# One.\n\nText.", "x = 1\nx"]
    assert cells[1].outputs[0].data["text/plain"] == "1" and cells[0].id != cells[1].id
    (examples / "one.py").write_text('# %% [markdown]\n"""# One."""\n\n# %%\nassert False\n')
    with pytest.raises(CellExecutionError):
        make_notebooks.write([])
    assert place.read_bytes() == first, "a notebook whose code fails is left as it was"


# ---- runs --------------------------------------------------------------------------------------


@pytest.mark.slow
@EACH
def test_an_example_runs_as_its_notebook_and_shows_its_result(script, tmp_path, short_smollm2):
    """In its folder, as Jupyter starts it; `test_a_notebook_is_its_script` has the same cells."""
    found_in = os.environ["PYTHONPATH"]
    if script.stem not in WHOLE_MODEL:
        found_in = os.pathsep.join([str(short_smollm2), found_in])
    notebook = make_notebooks.notebook_of(script)
    place = tmp_path / "examples" / "notebooks"
    place.mkdir(parents=True)
    for path in (ROOT / "examples").iterdir():
        if path.is_file() and path.suffix != ".py":
            shutil.copy(path, place.parent)
    for name, enough in ENOUGH_ROWS.items():
        rows = (place.parent / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (place.parent / name).write_text("".join(rows[:enough]), encoding="utf-8")
    make_notebooks.run(notebook, place, PYTHONPATH=found_in, XDG_CACHE_HOME=str(tmp_path / "cache"))
    shows_its_result([output for cell in notebook.cells for output in cell.get("outputs", [])])
    assert [path.name for path in place.iterdir()] == ["outputs"]
    assert {path.name for path in place.glob("outputs/*")} <= {script.stem}


@pytest.mark.parametrize(
    "script",
    [s for s in SCRIPTS if "HERE" in s.read_text(encoding="utf-8")],
    ids=lambda script: script.stem,
)
def test_a_script_finds_the_files_beside_it_from_any_folder(script, tmp_path, monkeypatch):
    """Of a notebook only its folder is known, of a script only __file__."""
    cells = [c for c in jupytext.read(script, fmt="py:percent").cells if c.cell_type == "code"]
    names: dict[str, Any] = {"__file__": str(script)}
    monkeypatch.chdir(tmp_path)
    exec(compile(cells[0].source, script, "exec"), names)
    assert names["HERE"] == script.parent
    used = re.findall(r'HERE / "([^"]+)"', script.read_text(encoding="utf-8"))
    assert used and all((names["HERE"] / file).is_file() for file in used)
