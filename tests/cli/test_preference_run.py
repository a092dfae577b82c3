"""Runs that compare answers, by the command line: what they print, leave and lead on to."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_folder import write_model
from support.training import recorded

from mlx_qlora.cli import main


def call(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    place = tmp_path_factory.mktemp("run")
    model = write_model(place / "model", chat=True)
    rows = [
        {"prompt": f"What comes after {n}?", "chosen": f"{n + 1} does", "rejected": "A cat"}
        for n in range(60)
    ]
    data = place / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data, place / "outputs"


def train(run: tuple[Path, Path, Path], out: Path, *words: Any) -> int:
    model, data, _ = run
    about = ["--model", model, "--data", data, "--output-dir", out, "--max-steps", 4]
    about += ["model.bits=null", "model.base_model_name_or_path=org/base"]
    about += [
        "generation.max_new_tokens=2",
        "logging.logging_steps=2",
        "checkpointing.save_steps=2",
    ]
    return call("train", *about, *words)


def test_a_dpo_run_says_what_it_is_and_is_evaluated_on_its_pairs(run, capsys):
    _, data, out = run
    assert train(run, out, "--objective", "DPO", "data.prompt_loss_weight=0.5") == 0
    said = capsys.readouterr()
    text = said.out + said.err
    assert "prompt and answer are joined as they are" in text and "data.template=chat" in text
    assert "data.prompt_loss_weight=0.5 is not used: prompts are not learned" in text
    share = re.search(r"(\d+)% supervised", text)
    assert share and int(share[1]) < 60
    assert "loss of chosen answers" in text
    steps = [record for record in recorded(out) if "loss" in record]
    shown = re.findall(r"step \d/4  loss (\S+)  accuracy (\d+)%", text)
    wanted = [(f"{r['loss']:.4f}", f"{100 * r['rewards/accuracies']:.0f}") for r in steps]
    assert shown == wanted

    record = (out / "run.yaml").read_text()
    assert "objective: dpo" in record and "beta: 0.1" in record
    assert "fine-tuned by dpo</h1>" in (out / "report.html").read_text()
    card = (out / "README.md").read_text()
    assert "| `training.objective` | dpo |" in card and "| `training.beta` | 0.1 |" in card
    assert "| per example | first" in card and "lora_dropout" not in card

    assert call("evaluate", "--adapter", out, "--data", data, "--answers", 0) == 0
    said = capsys.readouterr().out
    assert "chosen answer likelier" in said and "reward of chosen higher" in said

    unfinished = shutil.copytree(out, out.with_name("unfinished"))
    (unfinished / "adapter_config.json").unlink()
    assert call("evaluate", "--adapter", unfinished, "--data", data, "--answers", 0) == 2
    error = capsys.readouterr().err
    assert "its run has not finished" in error and str(unfinished / "checkpoint-4") in error


def test_all_tokens_are_for_another_objective(run, tmp_path, capsys):
    assert train(run, tmp_path / "out", "training.objective=dpo", "data.train_on=all") == 2
    assert "as the others compare answers; leave it out\n" in capsys.readouterr().err


def test_labels_of_one_kind_are_counted_and_pointed_out(run, tmp_path, capsys):
    model, _, _ = run
    rows = [{"prompt": f"{n}? ", "completion": "yes", "label": True} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["inspect", data, "--model", model, "training.objective=kto"]
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert "; 12 labelled true, 0 false" in said and "joined as they are" not in said
    assert "but all 12 answers are labelled true" in said
