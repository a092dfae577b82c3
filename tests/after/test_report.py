"""The report: what it says, that it is self-contained, and that hostile text stays text."""

import ast
import errno
import html
import json
import math
import queue
import random
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.report import HOSTILE, SAMPLE, SCORES, Page, history, result_in, written
from support.tiny_folder import write_model, write_random_model, write_rows, write_tokenizer
from support.training import at_step, fine_tune, stop, train_run

import mlx_qlora as mq
from mlx_qlora.after import observer, screen
from mlx_qlora.after.advice import Advice, learned
from mlx_qlora.after.answer_metrics import LOWER, paired_row
from mlx_qlora.after.observer import prompt_flags
from mlx_qlora.after.plots import Line, Plot, in_kernel, plots_of, svg_file, thin, ticks
from mlx_qlora.after.report import Report, next_commands, write_report
from mlx_qlora.cli import main as cli
from mlx_qlora.config import RunConfig, build
from mlx_qlora.data.chats import alpaca_prompt
from mlx_qlora.data.read import read_examples
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import ProcessError
from mlx_qlora.loading import with_model
from mlx_qlora.train.checkpoint import RunState
from mlx_qlora.train.signals import Interrupted

# ---- the page ------------------------------------------------------------------------------------


def test_the_page_is_balanced_self_contained_and_keeps_hostile_text_as_text(tmp_path):
    text = written(tmp_path)
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "link", "object", "form"}
    assert page.links and all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert not any(word in text.replace("http-equiv", "") for word in ("url(", "@import", "http"))
    assert page.text.count(HOSTILE) >= 4  # the prompt, the answer, the data, the model
    policies = [known.get("content") or "" for tag, known in page.tags if tag == "meta"]
    assert any(policy.startswith("default-src 'none'; ") for policy in policies)


def test_the_page_answers_five_questions_from_the_figures_and_shows_no_refused_row(tmp_path):
    text = Page(written(tmp_path)).text
    for said in (
        "Yes: the loss fell by 33%, the answers are nearer", "3.0000 → 2.0000 (-33.3%)",
        "Only 2 validations",
        "1 of 1 sampled answers differ", "0 before, 1 after", "25.0% → 50.0%",
        "1.0 minutes", "Peak memory 2.00 GB (planned 1.60 GB)",
        "of the process 2.10 GB (planned 1.80 GB)", "measured process 2.10 GB",
        "102 tokens per second", "measured / planned 1.25", "reached 102 while training",
        "learning rate 0.0001",
        "5 0.05 1.4", "20 0.2 1.1 2.175", "40 0.4 1.05 2.15 1e-4 1.5 101.5",
        "on 99 tokens held out of training, before and after; perplexity 20.09 → 7.389",
        "12 read, 10 kept, 2 refused", "3, 7",
    ):  # fmt: skip
        assert said in text, said
    assert "SECRET" not in text


def test_the_table_of_the_history_has_small_rates_and_both_losses_of_a_step(tmp_path):
    records = []
    for step in range(1, 101):
        records.append({"step": step, "loss": 2 - step / 100, "learning_rate": 1.5e-6})
        records.append({"step": step, "eval_loss": 3 - step / 100})
    records[-2] |= {"learning_rate": 4e-7, "grad_norm": math.inf}
    heads, rows, n_steps = Report(result_in(tmp_path, records), RunConfig()).history_table()
    assert heads == ["step", "loss", "eval loss", "learning rate", "grad norm"]
    assert (len(rows), n_steps) == (20, 100)
    assert all(row[1] and row[2] for row in rows), "training and validation in every row"
    assert {row[3] for row in rows[:-1]} == {"1.5e-6"}
    assert rows[-1] == ["100", "1", "2", "4e-7", "inf"]


def test_verdicts_follow_the_history(tmp_path):
    """No test set: validation speaks, and overfitting, divergence and lack of figures are said."""
    alone = {"scores": {}, "samples": [], "data": [], "plan": None}
    falls = [{"step": s, "loss": 3 - s / 20} for s in range(5, 45, 5)]

    def said(evals, config=None):
        records = falls + [{"step": s, "eval_loss": loss} for s, loss in evals]
        records = sorted(records, key=lambda r: r["step"])
        return Page(written(tmp_path, records, config, **alone)).text

    over = said([(10, 3.0), (20, 2.0), (30, 2.2), (40, 2.5)])
    assert "Yes, since step 20" in over and "load_best_model_at_end=true" in over
    assert "Perhaps: the loss fell by 17%" in over and "No row was held out" in over
    best = {"checkpointing": {"load_best_model_at_end": True}}
    in_python = Page(written(tmp_path, text="Hi", **alone)).text
    assert "A run in Python answers none: call mq.generate" in in_python
    silent = written(tmp_path, samples=[{**SAMPLE, "after": " \n"}])
    assert "(nothing)" in Page(silent).text and "(nothing)" not in Page(written(tmp_path)).text
    kept = said([(10, 3.0), (20, 2.0), (30, 2.2), (40, 3.5)], config=build(best))
    assert "3.0000 → 2.0000 (-33.3%), from step 10 to step 20" in kept
    assert "Yes, since step 20" in kept and "load_best_model_at_end=true" not in kept
    at_once = said([(20, 2.0), (30, 2.2), (40, 2.5)], config=build(best))
    assert "Training loss: 2.7500 → 2.0000 (-27.3%), from step 5 to step 20" in at_once
    assert "No sign of it" in said([(10, 3.0), (20, 2.0), (30, 1.9)])
    assert "No, it got worse" in said([(10, 2.0), (40, 3.0)])
    assert "Barely" in said([(10, 2.0), (40, 2.01)])
    assert "There were no validation rows" in said([])
    explodes = [{"step": s, "loss": 1.0 if s < 30 else 9.0} for s in range(5, 45, 5)]
    assert "Training was unstable" in written(tmp_path, explodes, **alone)
    nothing = written(tmp_path, [], **alone)
    assert "Not known" in nothing and "Nothing was recorded" in nothing


# ---- plots ---------------------------------------------------------------------------------------


def test_thinning_keeps_every_extreme_and_the_ends():
    draw = random.Random(0)
    points = [(float(x), draw.gauss(0, 1)) for x in range(100_000)]
    points[61_803] = (61_803.0, 99.0)
    points[31_415] = (31_415.0, -99.0)
    thinned = thin(points, 200)
    assert len(thinned) <= 402 and set(thinned) <= set(points) and thinned == sorted(thinned)
    assert {points[0], points[-1], points[61_803], points[31_415]} <= set(thinned)
    kept = {x for x, _ in thinned}
    stretch = np.minimum(np.arange(100_000) / 99_999 * 200, 199).astype(int)
    ys = np.array([y for _, y in points])
    for bucket in range(200):  # the envelope of the thinned line is that of the whole one
        inside = np.flatnonzero(stretch == bucket)
        extremes = inside[ys[inside].argmin()], inside[ys[inside].argmax()]
        assert kept.issuperset(map(float, extremes)), bucket
    assert thin(points[:100], 200) == points[:100]


def test_a_run_of_100_000_steps_has_a_small_page(tmp_path):
    records = history(100_000, 1)
    records[777]["loss"] = 55.0
    records[778]["loss"] = math.nan
    text = written(tmp_path, records)
    assert len(text) < 250_000
    assert max(y for _, y in plots_of(records)[0].lines[0].points) == 55.0
    assert "nan" not in "".join(re.findall(r'points="([^"]*)"', text))


def test_ticks_are_round_and_within():
    assert ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]
    for low, high in ((0.0, 2.1e-4), (-3.2, 7.9), (1e9, 1.0001e9), (2.0, 2.02)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7 and low <= found[0] and found[-1] <= high + 1e-9


def test_plots_are_files_too(tmp_path):
    written(tmp_path)
    names = {plot.name for plot in plots_of([])}
    assert {path.stem for path in (tmp_path / "plots").glob("*.svg")} == names
    for path in (tmp_path / "plots").glob("*.svg"):
        assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    loss = ET.parse(tmp_path / "plots" / "loss.svg")
    drawn = [e for e in loss.iter() if e.tag.endswith("polyline")]
    xs = [float(point.split(",")[0]) for point in drawn[0].attrib["points"].split()]
    assert len(drawn) == 2 and xs == [125 * i for i in range(1, 9)]
    text = "".join(loss.getroot().itertext())
    assert all(words in text for words in ("best: step 20", "warmup", "training", "validation"))


def test_a_logarithmic_axis_has_the_points_own_ticks_and_error_bars_reach_both_ways():
    line = Line(HOSTILE, [(1e-4, 2.0), (1e-3, 1.0), (1e-2, 3.0)], errors=[0.5, 0.25, 0.5])
    root = ET.fromstring(svg_file(Plot("x", "T", "u", [line, line], axis="rate", log=True)))
    drawn = {kind: [e for e in root.iter() if e.tag.endswith(kind)] for kind in ("circle", "line")}
    xs = [float(dot.attrib["cx"].rstrip("%")) for dot in drawn["circle"][:3]]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.02), "a decade is a decade"
    bars = [e.attrib for e in drawn["line"] if e.attrib["class"] == "stroke0"]
    heights = [float(bar["y1"]) - float(bar["y2"]) for bar in bars]
    assert heights == pytest.approx([2 * heights[1], heights[1], 2 * heights[1]], abs=0.2)
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"1e-4", "0.001", "0.01"} <= set(texts) and texts.count(HOSTILE) == 2
    assert "rate 0.001: " + HOSTILE + " 1" in "".join(root.itertext())


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_in_both_themes(dark):
    """WCAG 2.2, 1.4.3: at least 4.5 to 1 with every ground that text stands on."""
    styles = Path(screen.__file__).with_name("plot.css").read_text()
    theme = styles.split("prefers-color-scheme: dark")[dark]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
    for ink in ("ink", "quiet", "a", "b", "c", "good", "bad", "note"):
        for ground in ("page", "card", "wash"):
            pair = sorted(_luminance(colours[name]) for name in (ink, ground))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, ground)


# ---- commands ------------------------------------------------------------------------------------


def commands(folder: Path, adapter: dict[str, object]) -> dict[str, str]:
    config = build({"model": {"source": "smollm2-135m"}})
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    report = Report(result_in(folder, []), config)
    return usages(report)


def usages(report: Report) -> dict[str, str]:
    """What the page says to type in each tool."""
    page = report.page().partition("Use the adapter</h2>")[2].partition("</section>")[0]
    card = r'<h3>([^<]*)</h3><p class="quiet">[^<]*</p><pre class="code">([^<]*)</pre>'
    return {tool: html.unescape(code) for tool, code in re.findall(card, page)}


def test_commands_are_what_the_tools_take(tmp_path, capsys):
    folder = tmp_path / "my out"
    codes = commands(folder, {"base_model_name_or_path": "org/base", "r": 20})
    ast.parse(codes["PEFT"])
    assert f'from_pretrained("{folder}")' in codes["PEFT"]
    assert shlex.split(codes["mlx-lm"])[:5] == [
        "mlx_lm.generate", "--model", "org/base", "--adapter-path", f"{folder}/mlx",
    ]  # fmt: skip
    words = shlex.split(codes["vLLM"])
    assert words[words.index("--max-lora-rank") + 1] == "32" and f"tuned={folder}" in words
    ours = [line for code in codes.values() for line in code.splitlines() if line[:4] == "mlx-"]
    assert len(ours) == 3
    for line in ours:  # our own parser takes them, and the adapter's folder arrives whole
        assert cli([*shlex.split(line)[1:], "--print-config"]) == 0
        assert f"adapter: {folder}" in capsys.readouterr().out


def test_the_question_is_put_to_the_base_as_the_run_loaded_it(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "model: {source: smollm2-135m, bits: 8, dtype: float32}\ngeneration: {temperature: 0.25}\n"
    )
    ask, merge = commands(tmp_path, {})["mlx-qlora"].splitlines()
    assert "--model" not in ask + merge
    base = {"base_model_name_or_path": "org/base"}  # of a model that Python has loaded
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    report = Report(result_in(tmp_path, []), RunConfig())
    assert report.question == ask.replace("--adapter", "--model org/base --adapter")
    assert cli([*shlex.split(ask)[1:], "--print-config"]) == 0
    assert f"adapter: {tmp_path}" in capsys.readouterr().out
    asked = with_model(build({"model": {"adapter": str(tmp_path)}}))
    assert (asked.model.source, asked.model.bits) == ("smollm2-135m", 8)


def test_what_to_do_next_is_three_commands_that_our_parser_takes(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {source: smollm2-135m}\n")
    config = build({"model": {"source": "smollm2-135m"}})
    report = Report(result_in(tmp_path, []), config, ask=["--instruction", "it's a\n'question'"])
    for chats in (True, False):
        found = next_commands(report, chats)
        assert [words[1] for words in found] == ["generate", *["chat"] * chats, "export"]
        for words in found:
            assert cli([*words[1:], "--print-config"]) == 0
            assert f"adapter: {tmp_path}" in capsys.readouterr().out
    assert "it's a\n'question'" in shlex.split(usages(report)["mlx-qlora"].partition("\nmlx-")[0])


def test_commands_fit_what_the_adapter_is(tmp_path):
    dora = commands(tmp_path, {"r": 8, "use_dora": True})
    assert "--enable-lora" not in dora["vLLM"] and "vllm serve merged" in dora["vLLM"]
    assert "--gguf-model" in dora["llama.cpp, Ollama"]
    pattern = commands(tmp_path, {"r": 8, "rank_pattern": {"q_proj": 40}})["vLLM"]
    assert "--portable" in pattern and "tuned=portable" in pattern and "rank 64" in pattern
    assert "--enable-lora" not in commands(tmp_path, {"r": 1024})["vLLM"]


# ---- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_becomes_the_flags_that_write_it_as_the_rows_were_written(tmp_path, chat):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat=chat))
    ask = ["--instruction", "count", "--input", "1\n2"]
    assert prompt_flags(alpaca_prompt("count", "1\n2"), tokenizer) == ask
    assert prompt_flags("<|bos|>" + alpaca_prompt("count"), tokenizer) == ask[:2]
    raw = ["--raw"] * chat
    assert prompt_flags("<|bos|>Once upon", tokenizer) == [*raw, "--prompt", "Once upon"]
    told = f"Be brief.\n\n{alpaca_prompt('count')}"
    assert prompt_flags(f"<|bos|>{told}", tokenizer) == [*raw, "--prompt", told]
    if chat:
        messages = [{"role": "user", "content": "Hello there"}]
        prompt = tokenizer.render_chat(messages, add_generation_prompt=True)
        assert prompt_flags(prompt, tokenizer) == ["--prompt", "Hello there"]
        assert prompt_flags(f"<|bos|>{prompt}", tokenizer) == ["--prompt", "Hello there"]


def test_a_chat_whose_form_begins_with_the_bos_becomes_a_short_prompt(smollm2):
    """Of SmolLM2 `<|im_start|>` is both, and the template writes a system message of its own."""
    model, tokenizer = smollm2
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    rows = read_examples([{"messages": turns}], tokenizer)
    inputs = SimpleNamespace(
        **{"config": build({}), "tokenizer": tokenizer, "train": rows, "checkpoint": None},
        **{"validation": None, "test": None, "state": RunState()},
    )
    seen: Any = observer.Observer(model, inputs, Console(quiet=True), None)
    assert seen._own_prompt() == (turns[:1], ["--prompt", "Hello?"])


def test_verdicts_are_earned_by_a_loss_beyond_noise_and_by_nearer_answers():
    """The loss fell by a third in all of these."""
    rows, draw = np.full(20, 60.0), np.random.default_rng(0)
    sure = paired_row("loss", LOWER, [rows, rows - draw.normal(20, 5, 20)], np.full(20, 20))
    noise = paired_row("loss", LOWER, [rows, rows - draw.normal(20, 200, 20)], np.full(20, 20))
    near = [{"reference": "a red car", "before": "who knows", "after": "a red cat"}]
    far = [{"reference": "a red car", "before": "a red cat", "after": "who knows"}]

    def verdict(loss, samples, *advice):
        return learned(history(40), SCORES, advice, samples, loss)

    falls = Advice("length", "it was still falling", "train for more steps")
    yet = [{"reference": "a red car", "before": "who knows", "after": "I read of red wine"}]
    unfinished = verdict(sure, yet, falls)
    assert unfinished.verdict.endswith("the answers are nearer, and far from the references yet")
    assert unfinished.tone == "note" and unfinished.why.endswith("Train for more steps.")
    assert verdict(sure, yet).tone == verdict(sure, near, falls).tone == "good"

    assert verdict(sure, near).verdict.startswith("Yes, in form: the loss fell by 33%")
    assert verdict(sure, near).why.endswith("Check the facts in them.")
    equal = [{**near[0], "after": "a red car\n"}]
    assert verdict(sure, [*near, *equal]).verdict.startswith("Yes: the loss fell by 33%")
    assert (verdict(sure, near).tone, verdict(sure, far).tone) == ("good", "note")
    assert verdict(sure, far).verdict.endswith("the answers are no nearer")
    as_near = verdict(sure, [{key: "a red car" for key in near[0]}])
    assert as_near.verdict.endswith("the answers were near before") and "More" not in as_near.why
    assert verdict(noise, near).verdict.startswith("Perhaps:")
    assert verdict(noise, near).why.endswith("With 20 rows that may be chance.")
    seven = paired_row("loss", LOWER, [rows[:7], rows[:7] - 20], np.full(7, 20))
    assert verdict(seven, near).why.endswith("chance; an interval needs 8 or more.")
    assert verdict(sure, []).verdict == "By the loss, yes: it fell by 33%"
    assert "No answers were compared" in verdict(sure, []).why


# ---- a whole run ---------------------------------------------------------------------------------


def test_a_whole_run_shows_data_plan_scores_and_samples(tmp_path):
    """The command line's own run, on a tiny model: everything in the page is of this run."""
    write_model(tmp_path / "model")
    values = {
        "model": {"source": str(tmp_path / "model"), "bits": None},
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 60)), "max_length": 64,
                 "split": [0.8, 0.1, 0.1]},
        "training": {"max_steps": 8, "warmup_steps": 2, "learning_rate": 1e-2,
                     "gradient_accumulation_steps": 1},
        "checkpointing": {"output_dir": str(tmp_path / "out"), "eval_steps": 2},
        "logging": {"logging_steps": 1},
        "generation": {"max_new_tokens": 8},
    }  # fmt: skip
    result = train_run(values)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    record = json.loads((tmp_path / "out" / "training_args.json").read_text())
    for said in (
        "60 read, 60 kept, 0 refused", "base weights", "planned peak", "Loss on held-out rows",
        "### Response:", "Before training", "After training", "first choice",
        "What did it forget?", "was forgotten", "On the built-in texts", "On the held-out answers",
        "Fingerprint", record["fingerprint"]["data"],
    ):  # fmt: skip
        assert said in page.text, said
    assert sum(tag == "article" for tag, _ in page.tags) == 3
    assert len(re.findall(r"Reference on [012] Before", page.text)) == 3  # as `write_rows` does
    for record in result.log_history:
        if "eval_loss" in record:
            assert f"{record['eval_loss']:.4g}" in page.text
    shown = result._repr_html_() or ""
    assert "Did it learn?" in Page(shown).text and shown.count("<polyline") >= 6


@pytest.mark.parametrize("init", ["true", "pissa", "adapter"])
def test_what_it_was_before_is_found_afterwards_however_the_adapter_began(tmp_path, init):
    write_random_model(tmp_path / "model")

    def trained(name, **more):
        values = {
            "model": {"source": str(tmp_path / "model"), "bits": None},
            "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 60)), "max_length": 64},
            "training": {"max_steps": 6, "learning_rate": 1e-2},
            "checkpointing": {"output_dir": str(tmp_path / name)},
            "generation": {"max_new_tokens": 4},
        }
        for section, fields in more.items():
            values.setdefault(section, {}).update(fields)
        return train_run(values)

    more = {"lora": {"init_lora_weights": "pissa"}} if init == "pissa" else {}
    first = trained("first", **more)
    began, ended = (first.test_scores[when].loss for when in ("before", "after"))
    model, tokenizer = mq.load(tmp_path / "model")
    rows = mq.read_examples(tmp_path / "rows.jsonl", tokenizer, mq.DataConfig(max_length=64))
    assert ended < 0.9 * began and began == pytest.approx(
        mq.evaluate(model, tokenizer, rows).loss, rel=0.05
    )
    if init == "adapter":
        again = trained("again", model={"adapter": str(tmp_path / "first")})
        assert again.test_scores["before"].loss == pytest.approx(ended, rel=1e-5)


def test_the_page_of_a_run_that_was_stopped_says_so_and_does_not_load_itself_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(screen, "EVERY", 0.01)
    model = write_random_model(tmp_path / "model")
    with at_step(3, stop), pytest.raises(Interrupted):
        fine_tune(model, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    saved = tmp_path / "out" / "checkpoint-3"
    said = f"of 8: stopped by SIGTERM; saved {saved}. The same command continues from there"
    assert said in Page(text).text
    assert 'http-equiv="refresh"' not in text
    fine_tune(model, tmp_path / "out")
    assert "stopped" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("when", ["training", "scoring", "reporting", "after the report"])
@pytest.mark.parametrize("disk", ["free", "full"])
def test_a_run_that_ends_without_its_report_leaves_no_page_that_loads_itself_again(
    tmp_path, monkeypatch, when, disk
):
    monkeypatch.setattr(screen, "EVERY", 0.01)
    page, write = tmp_path / "out" / "report.html", observer.write_whole
    failed = ProcessError("process 1 is gone")

    def fail(*_):
        if when != "after the report":
            assert 'http-equiv="refresh"' in page.read_text(encoding="utf-8")
        monkeypatch.setattr(observer, "write_whole", full if disk == "full" else write)
        raise failed

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    values = {
        "model": {"source": str(write_random_model(tmp_path / "model")), "bits": None},
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 40)), "max_length": 64},
        "training": {"max_steps": 4},
        "checkpointing": {"output_dir": str(page.parent)},
        "generation": {"max_new_tokens": 4},
    }
    where = {"scoring": "measure", "reporting": "write_report"}.get(when, "next_commands")
    if when != "training":
        monkeypatch.setattr(observer, where, fail)
    with at_step(3, fail if when == "training" else lambda _: None), pytest.raises(ProcessError):
        train_run(values)
    if when == "after the report":
        assert "Did it learn?" in Page(page.read_text(encoding="utf-8")).text
    elif disk == "full":
        assert not page.exists()
    else:
        step = 3 if when == "training" else 4
        said = f"of 4: stopped. {page.parent}/checkpoint-{step} is the last checkpoint (written 20"
        assert said in Page(text := page.read_text(encoding="utf-8")).text
        assert 'http-equiv="refresh"' not in text


def test_a_page_says_that_the_scoring_was_stopped(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(observer, "measure", stop)
    monkeypatch.setattr(screen, "EVERY", 0.01)
    values = {
        "model": {"source": str(write_random_model(tmp_path / "model")), "bits": None},
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 40)), "max_length": 64},
        "training": {"max_steps": 4},
        "checkpointing": {"output_dir": str(tmp_path / "out")},
    }
    with pytest.raises(KeyboardInterrupt):
        train_run(values)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    said = f"of 4: stopped while the run was scored; the adapter in {tmp_path / 'out'} is complete"
    assert said in page
    assert "Did it learn?" in page and "Validation loss: " in page, "by what is known so far"


# ---- notebooks ---------------------------------------------------------------------------------


def test_a_result_without_a_report_shows_as_text(tmp_path):
    result = result_in(tmp_path, history(10))
    assert result._repr_html_() is None
    write_report(Report(result, RunConfig()))
    assert Page(result._repr_html_() or "").text.count("Loss") and "html" not in repr(result)


def test_outside_a_kernel_nothing_is_started():
    assert not in_kernel()


CELL = """
import mlx_qlora as mq
from mlx_qlora.config import build
model, tokenizer = mq.load("model")
rows = mq.read_examples("rows.jsonl", tokenizer)
config = build({"training": {"max_steps": 60}, "logging": {"logging_steps": 1},
                "model": {"base_model_name_or_path": "org/base"}})
mq.fine_tune(model, tokenizer, rows, rows[:9], config)
"""


def test_a_real_kernel_gets_one_live_table_and_plot_and_then_the_summary(tmp_path):
    write_random_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 20)
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.blocking_client()
    client.start_channels()
    shown, updates, said, result = [], [], "", ""
    try:
        client.wait_for_ready(timeout=30)
        client.execute(CELL)
        while True:
            message = client.get_iopub_msg(timeout=30)
            kind, content = message["msg_type"], message["content"]
            assert kind != "error", content
            if kind == "display_data" and "transient" in content and content["transient"]:
                shown.append(content)
            if kind == "update_display_data":
                updates.append(content)
            said += content["text"] if kind == "stream" else ""
            if kind == "execute_result":
                result = content["data"]["text/html"]
                break
    except queue.Empty:
        pytest.fail("the kernel said nothing for 30 seconds")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    identity = shown[0]["transient"]["display_id"]
    assert len(shown) == 1 and {u["transient"]["display_id"] for u in updates} == {identity}
    last = updates[-1]["data"]["text/html"]
    assert "<table" in last and last.count("<figure") == 1 and "validation" in last
    assert "Did it learn?" in result and "<figure" not in result  # the plot is there already
    assert "step 1/3" not in said
