"""Base against adapter: paired figures, the sentences about them, and the command."""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.models import our_logits, random_tokens, randomise_lora
from support.tiny_folder import write_model, write_rows

import mlx_qlora as mq
from mlx_qlora.after import answer_metrics as on
from mlx_qlora.after.answer_metrics import Question, questions
from mlx_qlora.after.bootstrap import ratio_interval
from mlx_qlora.after.evaluation import (
    Comparison,
    Performance,
    compare,
    evaluate_run,
    measure,
)
from mlx_qlora.cli import main
from mlx_qlora.config import RunConfig, build, to_yaml
from mlx_qlora.data.read import train_validation_test
from mlx_qlora.infer.evaluate import score_examples
from mlx_qlora.train.score import RowScores

TOKENS = random_tokens(1, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "test.jsonl", 24)


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run leaves it, with run.yaml."""
    out = tmp_path_factory.mktemp("adapter") / "outputs"
    model, _ = mq.load(folder)
    mq.add_lora(model, mq.LoraConfig(r=4))
    randomise_lora(model)
    mq.save_adapter(model, out, base_model_name_or_path=str(folder))
    config = {"model": {"source": str(folder), "bits": None}, "data": {"template": "alpaca"}}
    (out / "run.yaml").write_text(to_yaml(build(config)))
    return out


def made_up(seed: int = 0, n: int = 60, gain: float = 0.1) -> tuple[Performance, Performance]:
    """Scores of two models that find the same rows hard."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, 60, n)
    nats = tokens * random.gamma(2, 1, n)
    better = nats - tokens * gain * random.gamma(4, 0.25, n)
    hits = random.binomial(tokens, 0.4)
    more = np.minimum(hits + random.binomial(2, 0.5, n), tokens)
    kl = nats - better
    base, tuned = RowScores(nats, hits, tokens, 0 * kl), RowScores(better, more, tokens, kl)
    return Performance(base), Performance(tuned)


def test_figures_are_weighted_by_tokens_and_paired():
    base, tuned = made_up()
    found = compare(base, tuned, [])
    nats, tokens = base.scores.nats, base.scores.tokens
    loss, perplexity = found["loss"], found["perplexity"]
    assert loss.tuned and loss.change and perplexity.change
    assert loss.base.estimate == pytest.approx(nats.sum() / tokens.sum())
    assert loss.change == ratio_interval(tuned.scores.nats - nats, tokens)
    unpaired = math.hypot(loss.base.high - loss.base.low, loss.tuned.high - loss.tuned.low)
    assert loss.change.high - loss.change.low < 0.3 * unpaired
    assert perplexity.base.estimate == pytest.approx(np.exp(loss.base.estimate))
    assert perplexity.change.low == pytest.approx(np.exp(loss.change.low) - 1)
    assert found["token_accuracy"].base.estimate == base.scores.hits.sum() / tokens.sum()
    kl = found["kl"]
    assert kl.base.estimate == 0 and kl.tuned == kl.change == ratio_interval(
        tuned.scores.kl, tokens
    )
    assert kl.verdict == "rose" and kl.cells()[0] == "KL from the base"
    assert (found.n_examples, found.n_tokens, found.n_answers) == (60, tokens.sum(), 0)


def test_a_verdict_says_better_only_where_the_interval_leaves_out_0():
    base, tuned = made_up()
    better = compare(base, tuned, [])
    assert better["loss"].verdict == "better"
    assert re.fullmatch(r"on these .* is better than its base: .* \d+\.\d% lower", better.sentence)
    worse = compare(tuned, base, [])
    assert worse["loss"].verdict == "worse" and worse.sentence.endswith("% higher")
    noise = np.random.default_rng(0).normal(0, 1, 60)
    shaken = replace(base.scores, nats=base.scores.nats + noise)
    found = compare(base, Performance(shaken), [])
    assert found["loss"].verdict == "no change shown"
    assert found.sentence.startswith("no difference shown on these 60 rows: its loss is ")
    assert compare(base, base, []).sentence.endswith("its loss is the same")
    nothing = replace(base, scores=replace(base.scores, nats=0 * base.scores.nats))
    assert compare(nothing, tuned, []).sentence.endswith("its loss is higher")
    assert found["token_accuracy"].verdict == "no difference"
    assert compare(*made_up(n=5), [])["loss"].verdict == "too few rows"


def test_answers_are_compared_by_every_metric():
    asked = [Question(f"q{i}", f"it is {i}.", 4, "x:1") for i in range(12)]
    scores = made_up(n=12)
    base = Performance(scores[0].scores, tuple("no idea" for _ in asked))
    tuned = Performance(
        scores[1].scores, tuple(q.reference if i else "-" for i, q in enumerate(asked))
    )
    found = compare(base, tuned, asked)
    exact = found["exact_match"]
    assert exact.tuned and exact.change
    assert exact.base.estimate == 0 and exact.tuned.estimate == pytest.approx(11 / 12)
    wanted = np.mean([on.chrf("no idea", q.reference) for q in asked])
    assert found["chrf"].base.estimate == pytest.approx(wanted)
    console = Console(file=io.StringIO(), width=80)
    console.print(found)
    shown = said_to(console)
    assert all(shown.count(row.name) == 1 for row in found.rows), "each figure once"
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    assert re.search(r"answers word for word +0 +0.9167 +\+0\.\d+ to \+\d\S* +better", shown)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_answers_are_compared_without_the_extra_packages_by_what_is_there(
    folder, rows, monkeypatch
):
    on.scorers.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    console = quiet()
    found = evaluated(config_of(source=str(folder)), console, str(rows), 2, 2)
    on.scorers.cache_clear()
    names = {row["metric"] for row in found["comparison"]["metrics"]}
    assert "exact_match" in names and not names & {"rouge_l", "chrf"}
    assert "without ROUGE-L and chrF; run: pip install 'mlx-qlora[evaluate]'" in said_to(console)


def compared(model: Any, *how: Any) -> tuple[Comparison, Performance, Performance]:
    """As `evaluate_run` does."""
    with mq.disabled(model):
        base = measure(model, *how, 6)
    tuned = measure(model, *how, 6)
    return compare(base, tuned, how[-1]), base, tuned


def test_the_base_is_the_model_without_its_adapter_and_the_adapter_stays_on(folder, adapter, rows):
    model, tokenizer = mq.load(folder, adapter=adapter)
    before = our_logits(model, TOKENS)
    examples = mq.read_examples(rows, tokenizer)
    asked = questions(examples, tokenizer)[:3]
    found, base, tuned = compared(model, tokenizer, examples, asked)
    assert np.array_equal(our_logits(model, TOKENS), before)
    plain, _ = mq.load(folder)
    alone = measure(plain, tokenizer, examples, asked, 6)
    assert np.array_equal(alone.scores.nats, base.scores.nats) and alone.answers == base.answers
    greedy: Any = {"max_new_tokens": 6, "temperature": 0.0, "repetition_penalty": 1.0}
    assert list(tuned.answers) == [mq.generate(model, tokenizer, q.prompt, **greedy) for q in asked]
    own = score_examples(model, tokenizer, examples)
    assert np.array_equal(own.nats, tuned.scores.nats)
    again, _, _ = compared(model, tokenizer, examples, asked)
    assert again == found


# ---- the command -------------------------------------------------------------------------------


def config_of(**model: Any) -> RunConfig:
    return build({"model": {"bits": None, **model}, "generation": {"max_new_tokens": 5}})


def evaluated(config: RunConfig, console: Console, data: str | None = None, *rest: Any, **how: Any):
    return evaluate_run(
        replace(config, data=replace(config.data, path=data)), console, *rest, **how
    )


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def said_to(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_s_adapter_is_evaluated_by_its_folder_alone(adapter, rows, tmp_path):
    console, out = quiet(), tmp_path / "new" / "scores.json"
    config = config_of(adapter=str(adapter))
    found = evaluated(config, console, limit=12, n_answers=3, output=str(out), data=str(rows))
    said = said_to(console)
    assert "12 of 24, drawn with seed 0" in said and "3 questions of 12" in said
    assert "answers word for word" in said and said.count("was forgotten") == 1
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(found))
    assert written["rows_scored"] == 12 and len(written["samples"]) == 3
    assert set(written["samples"][0]) == {"place", "prompt", "reference", "base", "tuned"}
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]
    again = evaluated(config, quiet(), limit=12, n_answers=3, data=str(rows))
    assert again == found


@pytest.mark.parametrize("objective", ["dpo", "simpo", "kto"])
def test_an_adapter_is_scored_on_rows_as_its_run_read_them(
    folder, adapter, tmp_path, objective, capsys
):
    taught, path = shutil.copytree(adapter, tmp_path / "adapter"), tmp_path / "rows.jsonl"
    values = {"training": {"objective": objective}, "model": {"source": str(folder), "bits": None}}
    (taught / "run.yaml").write_text(to_yaml(build(values)))
    texts = [(f"{n} is ", "even " * (1 + n % 3), "odd") for n in range(9)]
    sides = [{"prompt": p, "completion": c} for p, c, _ in texts]
    others = [{"prompt": p, "completion": r} for p, _, r in texts]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
    if objective == "kto":
        rows = [
            r | {"label": x} for x, answers in ((True, sides), (False, others)) for r in answers
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "--adapter", str(taught), "--answers", "0", "--data"]
    assert main([*command, str(path), "--json"]) == 0
    figures = {m["metric"]: m for m in json.loads(capsys.readouterr().out)["comparison"]["metrics"]}

    model, tokenizer = mq.load(folder, adapter=taught)
    nats, margins = {}, {}
    for name in ("tuned", "base"):
        with mq.disabled(model) if name == "base" else contextlib.nullcontext():
            scores = [
                score_examples(model, tokenizer, mq.read_examples(x, tokenizer))
                for x in (sides, others)
            ]
        nats[name] = scores[0].nats.sum() / scores[0].tokens.sum()
        each = [s.nats / (s.tokens if objective == "simpo" else 1) for s in scores]
        margins[name] = each[1] - each[0]
    wanted = {"loss": nats}
    if objective != "kto":
        wanted["margin"] = {name: each.mean() for name, each in margins.items()}
        wanted["prefers_chosen"] = {name: (each > 0).mean() for name, each in margins.items()}
    if objective == "dpo":
        rose = (margins["tuned"] > margins["base"]).mean()
        wanted["reward_accuracy"] = {"base": 0.0, "tuned": rose}
    assert wanted.keys() == figures.keys() & {"loss", "margin", "prefers_chosen", "reward_accuracy"}
    for metric, models in wanted.items():
        for name, value in models.items():
            assert figures[metric][name]["estimate"] == pytest.approx(value, rel=1e-5, abs=1e-6)

    path.write_text("".join(json.dumps(row) + "\n" for row in sides))  # answers, as of any adapter
    assert main([*command, str(path)]) == 0
    assert "objective" not in capsys.readouterr().out
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = ["evaluate", "--model", str(folder), "--answers", "0", "--data", str(path)]
    assert main(alone) == 2 and "training.objective=" in capsys.readouterr().err
    alone += ["model.bits=null", f"training.objective={objective}"]
    assert main(alone) == 0


def test_a_base_alone_has_figures_and_no_change(folder, rows, tmp_path):
    console = quiet()
    found = evaluated(config_of(source=str(folder)), console, data=str(rows), n_answers=0)
    model, tokenizer = mq.load(folder)
    wanted = mq.evaluate(model, tokenizer, mq.read_examples(rows, tokenizer))
    comparison = found["comparison"]
    loss = next(row for row in comparison["metrics"] if row["metric"] == "loss")
    assert loss["base"]["estimate"] == pytest.approx(wanted.loss, abs=1e-5)
    assert loss["tuned"] is None and found["forgetting"] is None and not comparison["adapter"]
    assert re.search(r"^ +model +95 % sure *$", said_to(console), re.MULTILINE)
    assert comparison["n_answers"] == 0 and found["samples"] == []


def test_rows_that_were_trained_on_are_counted_and_those_held_out_are_the_default(
    adapter, rows, tmp_path
):
    record = build({"model": {"source": str(adapter)}, "data": {"path": str(rows)}})
    taught = shutil.copytree(adapter, tmp_path / "adapter")
    (taught / "run.yaml").write_text(to_yaml(record))
    source = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = config_of(source=source, adapter=str(taught))
    tokenizer = mq.load(source)[1]
    train, held_out, _ = train_validation_test(record.data, tokenizer, record.training.seed)
    lines, new = rows.read_text().splitlines(keepends=True), '{"instruction": "?", "output": "!"}'
    copies = tmp_path / "copies.jsonl"  # under another name, in another order
    copies.write_text("".join(reversed(lines)) + new)
    for path, n in ((rows, len(lines)), (copies, len(lines) + 1)):
        console = quiet()
        evaluated(config, console, limit=8, n_answers=0, data=str(path))
        assert f"was trained on {len(train)} of these {n} rows" in said_to(console)

    console = quiet()
    found = evaluated(config, console, n_answers=0)
    assert f"rows      {len(held_out)} validation rows, on which" in said_to(console)
    assert "was trained on" not in said_to(console)
    assert found["comparison"]["n_examples"] == len(held_out) == found["rows"]
    gone = replace(record, data=replace(record.data, validation_path=str(tmp_path / "gone.jsonl")))
    (taught / "run.yaml").write_text(to_yaml(gone))  # which rows were trained on is not known
    with pytest.raises(mq.DataError, match=r"gone\.jsonl is missing"):
        evaluated(config, quiet(), n_answers=0)
    console = quiet()
    evaluated(config, console, limit=8, n_answers=0, data=str(rows))
    assert f"the adapter was trained on rows of {rows}" in said_to(console)
    record = replace(record, data=replace(record.data, split=[1, 0, 0]))
    (taught / "run.yaml").write_text(to_yaml(record))
    with pytest.raises(mq.DataError, match="the run held out no row of"):
        evaluated(config, quiet(), n_answers=0)
    (taught / "run.yaml").unlink()  # as of PEFT, and of a run in Python
    console = quiet()
    evaluated(config, console, limit=8, n_answers=0, data=str(rows))
    assert "which rows the adapter was trained on is not known here" in said_to(console)
    assert re.search(r"verdict   (on these rows|no difference shown)", said_to(console))


def test_what_is_wrong_is_found_before_a_weight_is_loaded(
    folder, adapter, rows, tmp_path, monkeypatch
):
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mlx_qlora.run.load_model", load)
    empty, note = tmp_path / "empty.jsonl", tmp_path / "note.txt"
    empty.write_text("")
    note.write_text("  \n\n ")
    base, tuned = config_of(source=str(folder)), config_of(adapter=str(adapter))
    data = str(rows)
    for config, how, error, message in [
        (base, {}, mq.ConfigError, "data.path is missing"),
        (base, {"data": str(tmp_path / "no.jsonl")}, mq.DataError, "no.jsonl"),
        (base, {"data": str(empty)}, mq.DataError, "empty.jsonl"),
        (base, {"data": data, "limit": 0}, mq.ConfigError, "--limit must be at least 1; got 0"),
        (base, {"data": data, "n_answers": -1}, mq.ConfigError, "n_answers must be at least 0"),
        (base, {"data": data, "general_text": str(note)}, mq.ConfigError, "name one with"),
        (tuned, {"data": data, "general_text": str(note)}, mq.ConfigError, "holds no text"),
        (tuned, {"data": data, "general_text": "no.txt"}, mq.ConfigError, "cannot be read as text"),
        (tuned, {"data": data, "output": str(tmp_path)}, mq.ConfigError, "--output"),
        (tuned, {"data": data, "output": f"{note}/x.json"}, mq.ConfigError, "--output"),
        (config_of(), {"data": data}, mq.ConfigError, "model.source is missing"),
        (config_of(adapter=str(tmp_path)), {"data": data}, mq.AdapterError, str(tmp_path)),
    ]:
        with pytest.raises(error, match=message):
            evaluated(config, quiet(), **how)
