"""The parts of the page that are figures in tables: evaluation, memory, data, the record."""

import html
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_qlora._version import __version__
from mlx_qlora.data.summary import DataReport
from mlx_qlora.report.facts import Evaluation, Facts
from mlx_qlora.report.lines import number, sampled

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
