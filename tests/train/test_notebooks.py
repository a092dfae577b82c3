"""A notebook: cells that are run again, what they show, and what they say of the result."""

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.tiny_folder import write_model
from support.training import PUBLIC, Finished, assert_same, at_step, make_examples, settings, stop

import mlx_qlora as mq
from mlx_qlora.after import observer, screen
from mlx_qlora.errors import ConfigError
from mlx_qlora.tree import flat

SHAPE: dict[str, Any] = {
    **{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", **SHAPE)


class Notebook:
    """One model and its tokenizer, and a cell that trains it."""

    def __init__(self, folder: Path, **how: Any) -> None:
        self.model, self.tokenizer = mq.load(folder, **how)

    def run(self, out: Path, *, validated: bool = True, **fields: Any) -> Finished:
        printed = io.StringIO()
        result = mq.fine_tune(
            self.model,
            self.tokenizer,
            make_examples(),
            make_examples(6, seed=9) if validated else None,
            settings(out, **{**PUBLIC, **fields}),
            console=Console(file=printed, width=300),
        )
        return Finished(out, self.model, result, printed.getvalue())

    def weights(self) -> dict[str, bytes]:
        weights = flat(self.model.trainable_parameters())
        return {name: np.array(weight).tobytes() for name, weight in weights.items()}


KINDS: list[dict[str, Any]] = [
    {},
    {"use_dora": True, "init_lora_weights": "gaussian"},
    {"init_lora_weights": "pissa"},  # which takes its part off a dense base
    {"load_best_model_at_end": True},
    {"kl_weight": 0.1, "lora_dropout": 0.0},  # measured against the model as the run began
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_cell_that_is_run_again_finds_the_run_finished(folder, tmp_path, fields):
    notebook = Notebook(folder)
    first = notebook.run(tmp_path / "out", **fields)
    adapter, weights = (first.out / ADAPTER).read_bytes(), notebook.weights()
    again = notebook.run(first.out, **fields)
    assert f"step {first.result.steps} was the last one" in again.printed
    assert "pass mq.load(adapter=" in again.printed and "--adapter" not in again.printed
    assert (again.out / ADAPTER).read_bytes() == adapter
    assert notebook.weights() == weights
    assert again.result.eval_loss == first.result.eval_loss


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_cell_that_was_interrupted_goes_on_without_a_changed_bit(folder, tmp_path, fields):
    whole, notebook = Notebook(folder).run(tmp_path / "whole", **fields), Notebook(folder)
    for step in (2, 5):
        with at_step(step, stop), pytest.raises(KeyboardInterrupt, match="same command continues"):
            notebook.run(tmp_path / "out", **fields)
    assert_same(notebook.run(tmp_path / "out", **fields), whole)


def test_an_attached_adapter_that_is_trained_on_is_found_again_too(folder, tmp_path):
    Notebook(folder).run(tmp_path / "first", max_steps=4)
    attached = [Notebook(folder, adapter=tmp_path / "first") for _ in range(2)]
    whole = attached[0].run(tmp_path / "whole")
    with at_step(3, stop), pytest.raises(KeyboardInterrupt):
        attached[1].run(tmp_path / "out")
    assert_same(attached[1].run(tmp_path / "out"), whole)


def test_none_and_a_removed_folder_begin_again_and_another_folder_trains_on(folder, tmp_path):
    notebook, out = Notebook(folder), tmp_path / "out"
    first = (notebook.run(out).out / ADAPTER).read_bytes()
    again = notebook.run(out, resume_from_checkpoint="none")
    assert (out / ADAPTER).read_bytes() == first
    assert "model     begins as it did before it was trained in this folder" in again.printed
    other = notebook.run(out, resume_from_checkpoint="none", seed=1)
    assert (out / ADAPTER).read_bytes() != first
    assert_same(other, Notebook(folder).run(tmp_path / "seed", seed=1))
    out.rename(tmp_path / "gone")
    notebook.run(out)
    assert (out / ADAPTER).read_bytes() == first
    on = notebook.run(tmp_path / "on")
    fresh = Notebook(folder, adapter=out).run(tmp_path / "fresh")
    assert (on.out / ADAPTER).read_bytes() == (fresh.out / ADAPTER).read_bytes() != first
    assert "begins as it did" not in on.printed


def test_what_is_refused_leaves_the_model_as_it_was_trained(folder, tmp_path):
    notebook = Notebook(folder)
    notebook.run(tmp_path / "out")
    trained = notebook.weights()
    with pytest.raises(ConfigError, match=r"made from another config:\n.*learning_rate"):
        notebook.run(tmp_path / "out", learning_rate=3e-3)
    with pytest.raises(ConfigError, match=r"r is 2 in the adapter that the model has.*again$"):
        notebook.run(tmp_path / "out", r=8)
    assert notebook.weights() == trained
    notebook.run(tmp_path / "out")
    assert notebook.weights() == trained


# ---- what a cell shows, and what it says ---------------------------------------------------------


def test_a_cell_shows_each_step_and_not_only_those_that_are_logged(folder, tmp_path, monkeypatch):
    notes, seen = [], threading.Event()

    def show(self: Any, note: str) -> None:
        notes.append(note)
        if note.startswith("Step 3 of 8") and "loss " in note:
            seen.set()

    monkeypatch.setattr(observer, "in_kernel", lambda: True)
    monkeypatch.setattr(observer.Observer, "_show_cell", show)
    monkeypatch.setattr(screen, "EVERY", 0.01)
    with at_step(3, lambda _: seen.wait(30)):
        Notebook(folder).run(tmp_path / "out", validated=False, logging_steps=10)
    assert seen.is_set(), notes


def test_the_result_compares_the_held_out_rows_before_and_after(folder, tmp_path):
    notebook = Notebook(folder)
    run = notebook.run(tmp_path / "out")
    examples = make_examples(6, seed=9)
    after = mq.evaluate(run.model, notebook.tokenizer, examples).loss
    with mq.disabled(run.model):
        before = mq.evaluate(run.model, notebook.tokenizer, examples).loss
    scores = run.result.test_scores
    assert scores["before"].loss == pytest.approx(before, rel=1e-6)
    assert scores["after"].loss == pytest.approx(after, rel=1e-6)
    html = run.result.html
    assert f"{before:.4f} → {after:.4f}" in html and "before and after" in html
    assert "No row was held out" not in html
    assert "(mean of 2 steps)" in html, "of steps 7 and 8: a record comes after every third step"


def test_without_held_out_rows_nothing_is_said_of_validations_or_of_the_beginning(folder, tmp_path):
    run = Notebook(folder).run(
        tmp_path / "out", validated=False, eval_steps="auto", learning_rate=0.1
    )
    assert "a validation" not in run.printed
    assert "from step 3 to step 8" in run.result.html
    assert "Before the training it was not measured." in run.result.html


def test_what_to_do_next_is_said_in_python_and_can_be_run(folder, tmp_path):
    run = Notebook(folder, quantize=mq.QuantConfig(8, 32)).run(tmp_path / "out")
    ask, load = run.printed.partition("next      ")[2].strip().splitlines()
    assert "mlx-qlora" not in ask + load
    names: dict[str, Any] = {"mq": mq}
    exec(load.strip(), names)
    assert isinstance(eval(ask, names), str)
    weights = [flat(model.trainable_parameters()) for model in (run.model, names["model"])]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_mistake_is_the_line_of_the_cell_and_one_message(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("import mlx_qlora as mq\n\nx = mq.load('nowhere/at/all')")
    assert capsys.readouterr().out.splitlines() == [
        "line 3: x = mq.load('nowhere/at/all')",
        "SourceError: no such file or folder: nowhere/at/all",
    ]


def test_remedies_in_python_leave_paths_and_rows_as_they_are():
    """Of a message only our own phrases are Python's; whatever a path holds, it stays."""
    for text in ("no such file: a--adapter /b", "unknown role '--model x'", "my--output-dir/x"):
        assert str(ConfigError(text)) == text
    told = "To train it longer pass --adapter my run's, and another --output-dir"
    wanted = 'To train it longer pass mq.load(adapter="my run\'s"), and another output_dir'
    assert str(ConfigError(told)) == wanted
    assert str(ConfigError("name an adapter with --adapter DIR")).endswith("mq.load(adapter='DIR')")
