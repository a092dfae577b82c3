"""The report of a run: one HTML page."""

import html
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_qlora import __version__
from mlx_qlora.adapters.push import VLLM_RANKS
from mlx_qlora.after.advice import LITTLE, Advice, advise
from mlx_qlora.after.plots import (
    PNG_HINT,
    STYLE,
    Plot,
    can_draw_png,
    figures,
    number,
    plots_of,
    sampled,
    svg_file,
    write_png,
)
from mlx_qlora.after.samples import is_other
from mlx_qlora.before.plan import Plan
from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.data.examples import DataReport
from mlx_qlora.folders import staged
from mlx_qlora.infer.evaluate import Scores
from mlx_qlora.train.loop import TrainResult

# ---- facts ---------------------------------------------------------------------------------------


Evaluation = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Facts:
    """What a report is made from; see `page.write_report` for the first eight.

    Attributes:
        record: of `training_args.json`; empty if the folder has none.
        adapter: of `adapter_config.json`; empty if the folder has none.
    """

    result: TrainResult
    config: RunConfig
    scores: dict[str, Scores]
    samples: Sequence[dict[str, str]]
    data: Sequence[DataReport]
    rows: Mapping[str, int]
    plan: Plan | None
    evaluation: Evaluation
    record: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)

    @property
    def advice(self) -> list[Advice]:
        """What the history says."""
        ends_with_best = self.config.checkpointing.load_best_model_at_end
        return advise(self.result.log_history, ends_with_best)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records up to the step whose weights the adapter has."""
        best, records = self.result.best_step, self.result.log_history
        if best is None or not self.config.checkpointing.load_best_model_at_end:
            return records
        return [record for record in records if record["step"] <= best]

    @property
    def plots(self) -> list[Plot]:
        """The plots of the history."""
        planned = self.plan.total_bytes if self.plan else None
        training = self.config.training
        return plots_of(
            self.result.log_history, training.warmup_steps, self.result.best_step, planned
        )

    @property
    def folder(self) -> str:
        """The output folder, so that a command finds it from anywhere."""
        return str(self.result.output_dir.absolute())

    @property
    def base(self) -> str:
        """The original base: a hub repository, or a folder."""
        named = self.config.model.base_model_name_or_path or self.config.model.source
        return str(self.adapter.get("base_model_name_or_path") or named or "BASE_MODEL")

    def count(self, key: str) -> int:
        """How many records of the history have a key."""
        return sum(key in record for record in self.result.log_history)


def in_folder(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the output folder; empty if there is no such file, or it is damaged."""
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):  # the page is about the run; it stands without them
        return {}


def evaluation_of(scores: dict[str, Scores]) -> Evaluation:
    """The table of scores before and after, as an evaluation without intervals."""
    if "before" not in scores or "after" not in scores:
        return {}
    before, after = scores["before"], scores["after"]
    pairs = {
        "loss (nats per token)": (before.loss, after.loss),
        "perplexity": (before.perplexity, after.perplexity),
        "token accuracy": (before.token_accuracy, after.token_accuracy),
    }
    return {
        name: {"base": base, "tuned": tuned, "difference": tuned - base, "n": after.n_tokens}
        for name, (base, tuned) in pairs.items()
    }


# ---- usage ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """One tool.

    Attributes:
        tool: its name.
        code: to be copied.
        note: what to know, if anything.
    """

    tool: str
    code: str
    note: str = ""


def usages(facts: Facts) -> list[Usage]:
    """For each tool that opens the adapter, what to type."""
    return [_here(facts), _peft(facts), _mlx_lm(facts), _vllm(facts), _llama_cpp(facts)]


def _here(facts: Facts) -> Usage:
    folder = shlex.quote(facts.folder)
    merge = f"mlx-qlora merge --adapter {folder} --output-dir merged"
    note = "merge makes a model that needs no adapter any more."
    return Usage("mlx-qlora", f"{ask_command(facts)}\n{merge}", note)


def _peft(facts: Facts) -> Usage:
    folder = json.dumps(facts.folder, ensure_ascii=False)
    code = (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({folder})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder})"
    )
    return Usage("PEFT", code, f"Fetches {facts.base}.")


def _mlx_lm(facts: Facts) -> Usage:
    base, folder = shlex.quote(facts.base), shlex.quote(f"{facts.folder}/mlx")
    code = f'mlx_lm.generate --model {base} --adapter-path {folder} --prompt "Hello"'
    return Usage("mlx-lm", code, "On a Mac.")


def _vllm(facts: Facts) -> Usage:
    adapter, folder = facts.adapter, facts.folder
    if adapter.get("use_dora"):
        code = f"{_merge(facts)}\nvllm serve merged"
        return Usage("vLLM", code, "vLLM computes no DoRA, so the adapter is merged first.")
    before, note = "", "Serves it as the model named tuned."
    if not _is_plain(facts):
        before = (
            f"mlx-qlora export --adapter {shlex.quote(folder)} --output-dir portable --portable\n"
        )
        folder, note = "portable", f"vLLM takes one rank and one scale: --portable. {note}"
    rank = max([adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()])
    enough = [known for known in VLLM_RANKS if known >= rank]
    if not enough:
        code = f"{_merge(facts)}\nvllm serve merged"
        return Usage("vLLM", code, f"vLLM takes no rank of {rank}, so the adapter is merged first.")
    flags = f"--max-lora-rank {enough[0]} --lora-modules {shlex.quote(f'tuned={folder}')}"
    code = f"{before}vllm serve {shlex.quote(facts.base)} --enable-lora {flags}"
    return Usage("vLLM", code, note)


def _llama_cpp(facts: Facts) -> Usage:
    if facts.adapter.get("use_dora"):
        convert = "python convert_hf_to_gguf.py merged --outfile model.gguf --outtype f16"
        note = (
            "llama.cpp computes no DoRA, so the adapter is merged; convert in llama.cpp's folder."
        )
        return Usage("llama.cpp, Ollama", f"{_merge(facts)}\n{convert}", note)
    code = (
        f"mlx-qlora export --adapter {shlex.quote(facts.folder)} --output-dir gguf --gguf\n"
        'llama-cli -m BASE.gguf --lora gguf/adapter.gguf -p "Hello"\n'
        "ollama create tuned -f gguf/Modelfile"
    )
    note = "BASE.gguf is the trained model as GGUF; the Modelfile names it in its line FROM."
    return Usage("llama.cpp, Ollama", code, note)


def _merge(facts: Facts) -> str:
    return f"mlx-qlora merge --adapter {shlex.quote(facts.folder)} --output-dir merged"


def _is_plain(facts: Facts) -> bool:
    return not any(facts.adapter.get(k) for k in ("use_rslora", "rank_pattern", "alpha_pattern"))


# ---- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One question and what the figures say.

    Attributes:
        question: as a person asks it.
        verdict: the answer, short.
        why: the figures behind it.
        tone: good, bad, note, or nothing where there is nothing to judge.
        code: a command, if that is the answer.
    """

    question: str
    verdict: str
    why: str
    tone: str = ""
    code: str = ""


def answers(facts: Facts) -> list[Answer]:
    """All five, in the order in which they are asked."""
    return [learned(facts), overfitting(facts), changed(facts), cost(facts), use(facts)]


def learned(facts: Facts) -> Answer:
    """From the test set if there is one, else from validation, else from the training loss."""
    question = "Did it learn?"
    if any(advice.kind == "divergence" for advice in facts.advice):
        found = next(a.finding for a in facts.advice if a.kind == "divergence")
        return Answer(question, "Training was unstable", f"{_sentence(found)}", "bad")
    what, first, last, where = _evidence(facts)
    if not (math.isfinite(first) and math.isfinite(last) and first > 0):
        return Answer(question, "Not known", "Too few figures were recorded to compare.", "note")
    change = (last - first) / first
    why = f"{what}: {first:.4f} → {last:.4f} ({change:+.1%}), {where}."
    if change > LITTLE:
        return Answer(question, "No, it got worse", why, "bad")
    if change > -LITTLE:
        return Answer(question, "Hardly", why, "note")
    return Answer(question, f"Yes: the loss fell by {-change:.0%}", why, "good")


def _evidence(facts: Facts) -> tuple[str, float, float, str]:
    """The name of the best loss there is, its first and last value, and what they are of."""
    if {"before", "after"} <= facts.scores.keys():
        before, after = facts.scores["before"], facts.scores["after"]
        rows = f"on {after.n_tokens:,} tokens that were not trained, before and after"
        return "Test loss", before.loss, after.loss, rows
    for key, what in (("eval_loss", "Validation loss"), ("loss", "Training loss")):
        found = [(r["step"], r[key]) for r in facts.history if key in r]
        if len(found) > 1:
            (a, first), (b, last) = found[0], found[-1]
            return what, first, last, f"from step {a:,} to step {b:,}"
    return "Training loss", math.nan, math.nan, ""


def overfitting(facts: Facts) -> Answer:
    """What `advise` finds, and how far the last validation is above the best."""
    question = "Is it overfitting?"
    evals = [
        (r["step"], r["eval_loss"])
        for r in facts.result.log_history
        if "eval_loss" in r and math.isfinite(r["eval_loss"])
    ]
    found = [advice for advice in facts.advice if advice.kind == "overfitting"]
    if found:
        verdict = f"Yes, since step {facts.result.best_step:,}" if facts.result.best_step else "Yes"
        return Answer(question, verdict, _sentence(found[0].finding), "bad")
    if not evals:
        why = "There was no validation set: give data.validation_path, or a share in data.split."
        return Answer(question, "Not known", why, "note")
    last, (best_step, best) = evals[-1][1], min(evals, key=lambda pair: pair[1])
    train = [r["loss"] for r in facts.result.log_history if "loss" in r]
    gap = f" Training loss {train[-1]:.4f}." if train else ""
    if len(evals) < 3:
        many = "1 validation" if len(evals) == 1 else f"{len(evals)} validations"
        why = f"Only {many}; lower checkpointing.eval_steps. Validation loss {last:.4f}.{gap}"
        return Answer(question, "Too early to tell", why, "note")
    if last < best * 1.001:
        return Answer(
            question,
            "No sign of it",
            f"Validation loss ended at its best, {last:.4f}.{gap}",
            "good",
        )
    above = f"Validation loss ends at {last:.4f}, {last / best - 1:.1%} above its best"
    return Answer(question, "No sign of it", f"{above} (step {best_step:,}).{gap}", "good")


def changed(facts: Facts) -> Answer:
    """How many sampled answers differ, and how the token accuracy moved."""
    question = "What changed in the answers?"
    pairs = [(s["before"], s["after"], s.get("reference", "")) for s in facts.samples if _paired(s)]
    why = ""
    if {"before", "after"} <= facts.scores.keys():
        before, after = facts.scores["before"], facts.scores["after"]
        why = (
            f"Test tokens that are the model's first choice: {before.token_accuracy:.1%} → "
            f"{after.token_accuracy:.1%}."
        )
    if not pairs:
        return Answer(question, "No samples", why or "No row was held out to ask for.")
    differ = sum(is_other(before, after) for before, after, _ in pairs)
    exact = [sum(said[i].strip() == said[2].strip() for said in pairs) for i in (0, 1)]
    equal = f"Equal to the reference: {exact[0]} before, {exact[1]} after."
    verdict = f"{differ} of {len(pairs)} sampled answers differ"
    return Answer(question, verdict, f"{equal} {why}".strip(), "" if differ else "note")


def _paired(sample: dict[str, str]) -> bool:
    return {"before", "after"} <= sample.keys()


def cost(facts: Facts) -> Answer:
    """Time, speed, and memory beside the plan."""
    result = facts.result
    peak = f"Peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    if facts.plan:
        peak += f" (planned {facts.plan.total_bytes / 1e9:.2f} GB)"
    why = f"{peak}; {result.steps:,} steps at {result.tokens_per_second:,.0f} tokens per second"
    early = ", stopped early." if result.stopped_early else "."
    return Answer("What did it cost?", duration(result.seconds), why + early)


def use(facts: Facts) -> Answer:
    """The shortest command that asks the tuned model."""
    why = "The adapter is in PEFT's format. Other tools: see below."
    return Answer("How do I use it?", "Ask it something", why, code=ask_command(facts))


def ask_command(facts: Facts) -> str:
    """`mlx-qlora generate` for this folder.

    The folder's own run.yaml says how the base was loaded: its revision, bits and dtype. A model
    that is named would be loaded without them, so one is named only where no run.yaml names it.
    """
    source, model = facts.config.model.source, ""
    if source is None or not (facts.result.output_dir / "run.yaml").is_file():
        model = f"--model {shlex.quote(str(source or facts.base))} "
    return f'mlx-qlora generate {model}--adapter {shlex.quote(facts.folder)} --prompt "Hello"'


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


# ---- tables --------------------------------------------------------------------------------------


RECORDS = 24  # of the history, as a table


COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second")


def esc(value: object) -> str:
    """Text as HTML shows it; nothing of it is markup."""
    return html.escape(str(value))


def figure(value: object) -> str:
    """A number for a table cell, or what stands in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def facts_table(rows: Mapping[str, object]) -> str:
    """Names and what they are."""
    body = "".join(
        f'<tr><th scope="row">{esc(k)}</th><td>{esc(v)}</td></tr>' for k, v in rows.items()
    )
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def columns_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    first, *others = heads
    head = f'<th scope="col">{esc(first)}</th>'
    head += "".join(f'<th scope="col" class="num">{esc(h)}</th>' for h in others)
    body = ""
    for name, *cells in rows:
        body += f'<tr><th scope="row">{esc(name)}</th>'
        body += "".join(f'<td class="num">{esc(cell)}</td>' for cell in cells) + "</tr>"
    # Scrolled by keyboard too, where it is wider than the screen.
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def evaluation_table(evaluation: Evaluation) -> str:
    """Metric by metric, before and after, with the interval of the difference where it is known."""
    has_interval = any("low" in found for found in evaluation.values())
    heads = ["", "before", "after", "difference"]
    heads += ["interval"] if has_interval else []
    rows = []
    for metric, found in evaluation.items():
        change = found.get("difference")
        row = [metric, figure(found.get("base")), figure(found.get("tuned"))]
        row.append("–" if change is None else f"{change:+.4g}")
        if has_interval:
            known = "low" in found and "high" in found
            row.append(f"{found['low']:+.4g} to {found['high']:+.4g}" if known else "–")
        rows.append([*row, figure(found.get("n"))])
    return columns_table([*heads, "n"], rows)


def memory_table(facts: Facts) -> str:
    """Planned by part against the measured peak, each with a bar; nothing without a plan."""
    plan, peak = facts.plan, facts.result.peak_memory_bytes
    if plan is None:
        return ""
    largest = max(plan.total_bytes, peak, 1)

    def row(name: str, size: int, kind: str = "", total: bool = False) -> str:
        group = "sum" if total else ""
        bar = f'<span class="bar {kind}" style="width:{size / largest:.1%}"></span>'
        return (
            f'<tr class="{group}">'
            f'<th scope="row">{esc(name)}</th><td class="num">{size / 1e9:.2f} GB</td>'
            f'<td class="bars" aria-hidden="true">{bar}</td></tr>'
        )

    rows = [row(name, size) for name, size in plan.parts.items()]
    rows += [row("planned peak", plan.total_bytes, total=True)]
    rows += [row("measured peak", peak, "other", total=True)]
    where = f"{plan.memory_bytes / 1e9:.1f} GB of memory on {plan.machine}"
    ratio = f"measured / planned {peak / plan.total_bytes:.2f}" if plan.total_bytes else ""
    return (
        f"<table><tbody>{''.join(rows)}</tbody></table>"
        f'<p class="quiet">{esc(where)}; {esc(ratio)}. Expected speed '
        f"{plan.tokens_per_second:,.0f} tokens/s, "
        f"reached {facts.result.tokens_per_second:,.0f}.</p>"
    )


def data_card(report: DataReport) -> str:
    """What became of the rows of one source: figures alone, and not a word of a row."""
    refused = len(report.refused)
    share = report.supervised / max(report.tokens, 1)
    rows: dict[str, object] = {
        "rows": f"{report.read:,} read, {report.kept:,} kept, {refused:,} refused",
        "format, template": f"{report.format}, {report.template}",
        "tokens": f"{report.tokens:,}, of which {share:.0%} are learned",
        "longest row": f"{report.longest:,} tokens",
        "cut to max_length": f"{report.truncated:,}",
        "say the same as an earlier row": f"{report.duplicates:,}",
    }
    if report.leaked:
        rows["are among the training rows, too"] = f"{report.leaked:,}"
    if refused:  # their reasons may quote the row
        places = ", ".join(f"{line:,}" for line, _ in report.refused[:5])
        more = f" and {refused - 5:,} more" if refused > 5 else ""
        rows["refused lines"] = f"{places}{more}; mlx-qlora inspect gives the reasons"
    return (
        f'<div class="card"><h3>{esc(report.source)}</h3>{facts_table(rows)}'
        f"{_histogram(report)}</div>"
    )


def _histogram(report: DataReport) -> str:
    most = max((count for _, _, count in report.histogram), default=0)
    if not most:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{low:,}–{high:,}</th><td class="num">{count:,}</td>'
        f'<td class="bars" aria-hidden="true"><span class="bar" style="width:{count / most:.1%}">'
        "</span></td></tr>"
        for low, high, count in report.histogram
    )
    head = (
        '<tr><th scope="col">tokens</th><th scope="col" class="num">rows</th>'
        '<td class="bars"></td></tr>'
    )
    return (
        "<details><summary>Lengths of the rows</summary>"
        f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></details>"
    )


def history_table(history: list[dict[str, Any]]) -> str:
    """The records as figures: all steps of a short history, every n-th of a long one."""
    steps: dict[int, dict[str, Any]] = {}
    for record in history:  # training and validation of a step are one row, and stay together
        if "loss" in record or "eval_loss" in record:
            steps[record["step"]] = steps.get(record["step"], {}) | record
    shown = sampled(list(steps.values()), RECORDS)
    heads = [name for name in COLUMNS if any(name in record for record in shown)]
    rows = [[figure(record[n]) if n in record else "" for n in heads] for record in shown]
    if not rows:
        return ""
    note = f"{len(shown):,} of {len(steps):,} logged steps; metrics.jsonl has all."
    table = columns_table([head.replace("_", " ") for head in heads], rows)
    return (
        f"<details><summary>These figures as a table</summary>{table}"
        f'<p class="quiet">{note}</p></details>'
    )


def record_tables(facts: Facts) -> str:
    """Versions, machine and fingerprints, as the run itself wrote them down."""
    record = facts.record
    parts = {
        "Versions": record.get("versions") or {"mlx-qlora": __version__},
        "Machine": record.get("machine") or {},
        "Fingerprint": record.get("fingerprint") or {},
    }
    return "".join(
        f'<div class="card"><h3>{name}</h3>{facts_table(_readable(rows))}</div>'
        for name, rows in parts.items()
        if rows
    )


def _readable(rows: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("_", " "): figure(value) for name, value in rows.items()}


# ---- the page ------------------------------------------------------------------------------------


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


HEADINGS = {
    "prompt": "Prompt",
    "reference": "Reference",
    "before": "Before training",
    "after": "After training",
}


def write_report(
    result: TrainResult,
    config: RunConfig,
    scores: dict[str, Scores],
    samples: Sequence[dict[str, str]] = (),
    *,
    data: Sequence[DataReport] = (),
    rows: Mapping[str, int] | None = None,
    plan: Plan | None = None,
    evaluation: Evaluation | None = None,
) -> Path:
    """Writes `report.html` and `plots/` into the run's output folder, and tells the result.

    `plots/` gets SVG files, and PNG files too where matplotlib is installed. A notebook that shows
    the result shows what was written last.

    Args:
        result: the finished run.
        config: as it was resolved.
        scores: "before" and "after", of the test set, if there was one.
        samples: dicts of heading -> text: prompt, reference, before, after.
        data: what became of the rows of each source.
        rows: part (train, validation, test) -> how many rows it has.
        plan: the prediction, to compare with what was measured.
        evaluation: metric -> base, tuned, difference, and where known low and high (the interval
            of the difference) and n; made from `scores` if not given.

    Returns:
        The path of the report.
    """
    facts = Facts(
        result,
        config,
        scores,
        samples,
        data,
        rows or {},
        plan,
        evaluation_of(scores) if evaluation is None else evaluation,
        in_folder(result.output_dir, "training_args.json"),
        in_folder(result.output_dir, "adapter_config.json"),
    )
    with staged(result.output_dir) as staging:
        (staging / "plots").mkdir()
        for plot in facts.plots:
            file = staging / "plots" / f"{plot.name}.svg"
            file.write_text(svg_file(plot), encoding="utf-8")
            if can_draw_png():
                write_png(plot, file.with_suffix(".png"))
        (staging / "report.html").write_text(page(facts), encoding="utf-8")
    result.html = fragment(facts)
    return result.output_dir / "report.html"


def page(facts: Facts) -> str:
    """The whole page."""
    name = title(facts)
    sections = {
        "Loss and speed": _plots(facts),
        "Memory": memory_table(facts) and f'<div class="card">{memory_table(facts)}</div>',
        "Data": _data(facts),
        "Before and after": "".join(
            sample_card(number, sample) for number, sample in enumerate(facts.samples, 1)
        ),
        "Evaluation": _evaluation(facts),
        "Use the adapter": _usage(facts),
        "The full record": _record(facts),
    }
    sections = {head: body for head, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(head)}">{head}</a>' for head in sections)
    body = "".join(
        f'<section aria-labelledby="{_anchor(head)}"><h2 id="{_anchor(head)}">{head}</h2>{part}'
        "</section>"
        for head, part in sections.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{esc(name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<style>{STYLE}</style></head>
<body class="mq"><main><header><h1>{esc(name)}</h1><p class="quiet">{esc(subtitle(facts))}</p>
<nav aria-label="sections">{links}</nav></header>
{summary(facts)}
{body}</main>
<footer>Written by mlx-qlora {__version__}. {_png_note()}</footer></body></html>
"""


def fragment(facts: Facts) -> str:
    """Summary and plots, for a notebook's cell."""
    report = facts.result.output_dir / "report.html"
    return (
        f'<div class="mq"><style>{STYLE}</style><div style="padding:1rem">'
        f"<h3>{esc(title(facts))}</h3><p class='quiet'>{esc(subtitle(facts))}</p>"
        f"{summary(facts)}<div style='height:1rem'></div>{figures(facts.plots)}"
        f"<p class='quiet'>The whole report: {esc(report)}</p></div></div>"
    )


def title(facts: Facts) -> str:
    """What the run was, in a few words."""
    return f"{Path(facts.base).name}, fine-tuned"


def subtitle(facts: Facts) -> str:
    """The settings that tell runs apart."""
    lora, model = facts.config.lora, facts.config.model
    kind = "DoRA" if lora.use_dora else "LoRA"
    weights = f"{model.bits}-bit weights" if model.bits else "the file's own precision"
    rate = f"learning rate {facts.config.training.learning_rate:g}"
    return f"{kind} of rank {lora.r} on {weights}, {facts.result.steps:,} steps, {rate}"


def summary(facts: Facts) -> str:
    """The five answers, and the advice."""
    cards = "".join(_answer_card(answer) for answer in answers(facts))
    advice = "".join(
        f'<div class="card advice"><h3>Advice: {esc(found.kind)}</h3>'
        f"<p>{esc(found.finding)}.</p><p><b>What to change:</b> {esc(found.remedy)}.</p></div>"
        for found in facts.advice
    )
    return f'<section class="answers" aria-label="summary">{cards}</section>{advice}'


def _answer_card(answer: Answer) -> str:
    code = f'<pre class="code">{esc(answer.code)}</pre>' if answer.code else ""
    return (
        f'<div class="card {answer.tone}"><h2 class="question">{esc(answer.question)}</h2>'
        f'<p class="verdict">{esc(answer.verdict)}</p>'
        f'<p class="quiet">{esc(answer.why)}</p>{code}</div>'
    )


def _plots(facts: Facts) -> str:
    skipped, spikes = facts.count("skipped"), facts.count("spike")
    events = f"{skipped:,} steps were skipped, {spikes:,} had a loss far above the usual."
    note = f'<p class="quiet">{events}</p>' if skipped or spikes else ""
    return figures(facts.plots) + note + history_table(facts.result.log_history)


def _data(facts: Facts) -> str:
    if not facts.data:
        return ""
    parts = ", ".join(f"{count:,} {part}" for part, count in facts.rows.items())
    split = f'<p class="quiet">Rows: {esc(parts)}.</p>' if parts else ""
    return split + f'<div class="grid2">{"".join(map(data_card, facts.data))}</div>'


def sample_card(number: int, sample: dict[str, str]) -> str:
    """A prompt, and below it side by side what was and what should be said."""

    def said(key: str) -> str:
        head = HEADINGS.get(key, key)
        return (
            f'<div class="{key if key in HEADINGS else ""}"><h3>{esc(head)}</h3>'
            f'<pre class="said" tabindex="0">{esc(sample[key].strip())}</pre></div>'
        )

    order = [key for key in ("reference", "before", "after") if key in sample]
    order += [key for key in sample if key not in HEADINGS]
    prompt = said("prompt") if "prompt" in sample else ""
    columns = "".join(map(said, order))
    return (
        f'<article class="card sample" aria-label="sample {number}">{prompt}'
        f'<div class="grid3">{columns}</div></article>'
    )


def _evaluation(facts: Facts) -> str:
    if not facts.evaluation:
        return ""
    note = "On rows that were held out; before and after training, without dropout."
    return (
        f'<div class="card">{evaluation_table(facts.evaluation)}<p class="quiet">{note}</p></div>'
    )


def _usage(facts: Facts) -> str:
    cards = "".join(
        f'<div class="card"><h3>{esc(usage.tool)}</h3><p class="quiet">{esc(usage.note)}</p>'
        f'<pre class="code">{esc(usage.code)}</pre></div>'
        for usage in usages(facts)
    )
    return f'<div class="grid2">{cards}</div>'


def _record(facts: Facts) -> str:
    return (
        f'<div class="grid2">{record_tables(facts)}</div><details><summary>Configuration (run.yaml)'
        f'</summary><pre class="code">{esc(to_yaml(facts.config))}</pre></details>'
    )


def _png_note() -> str:
    return "" if can_draw_png() else esc(f"The {PNG_HINT}.")


def _anchor(head: str) -> str:
    return head.lower().replace(" ", "-")
