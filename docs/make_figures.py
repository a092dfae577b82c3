"""Draws docs/figures/*.svg: what the planner, the schedule and the masks of this code really are.

Run as: make docs        (or: python docs/make_figures.py)

The files are written by hand rather than by matplotlib, so that text stays text and one file is
readable on a light page and on a dark one: each figure brings its own ground and follows the
reader's `prefers-color-scheme`.
"""

import ast
import runpy
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from mlx_qlora.before.plan import Plan, flops_per_token, plan_checkpoint
from mlx_qlora.config import build
from mlx_qlora.device import APPLE, machine
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.weights import Checkpoint
from mlx_qlora.train.optim import SCHEDULES, learning_rate

FIGURES = Path(__file__).parent / "figures"

# config.json of meta-llama/Llama-3.1-8B, as far as sizes depend on it.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}

STYLE = """
 text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
 .small { font-size: 11px } .end { text-anchor: end } .middle { text-anchor: middle }
 .bold { font-weight: bold } .faint { opacity: .65 }
 .mono { font-family: ui-monospace, Menlo, Consolas, monospace }
 .ground { fill: #ffffff; stroke: #d0d7de } .line { stroke: #8c959f; fill: none }
 .cell { fill: #eef1f4 } .limit { stroke: #cf222e; stroke-width: 2 }
 .a { fill: #8c959f } .b { fill: #2f6fb7 } .c { fill: #2e8b57 } .d { fill: #d9822b }
 .e { fill: #8957c7 }
 .stroke-b { stroke: #2f6fb7; fill: none; stroke-width: 2 }
 .stroke-c { stroke: #2e8b57; fill: none; stroke-width: 2 }
 .stroke-d { stroke: #d9822b; fill: none; stroke-width: 2 }
 @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .ground { fill: #161b22; stroke: #30363d } .line { stroke: #6e7681 }
  .cell { fill: #262c36 } .a { fill: #57606a }
 }
"""


# ---- pieces of a drawing -----------------------------------------------------------------------


def card(width: int, height: int, title: str, body: Sequence[str]) -> str:
    """One SVG with a ground of its own."""
    ground = f'class="ground" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f"<rect {ground}/>",
            *body,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words whose baseline begins (or ends, or has its middle) at a point."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"/>'
    )


def line(x: float, y: float, x2: float, y2: float, kind: str = "line") -> str:
    """A straight line."""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def legend(x: float, y: float, items: Sequence[tuple[str, str]]) -> list[str]:
    """Colours and what they stand for, side by side."""
    body = []
    for kind, words in items:
        body += [box(x, y - 10, 11, 11, kind), text(x + 16, y, words)]
        x += 48 + 7 * len(words)
    return body


# ---- the figures -------------------------------------------------------------------------------

PARTS = {
    "base weights": "a",
    "adapter and AdamW": "b",
    "gradients": "c",
    "activations": "d",
    "working arrays": "e",
}
RUNS = [
    ("m1-16", "M1, 16 GB", {}),
    ("m4-pro-24", "M4 Pro, 24 GB", {}),
    ("m4-max-64", "M4 Max, 64 GB", {}),
    ("m4-max-64", "the same, all recomputed", {"training": {"gradient_checkpointing": True}}),
    ("m4-max-64", "the same, 16-bit base", {"model": {"bits": None}}),
]


def plan_of(chip: str, values: dict[str, dict[str, object]]) -> Plan:
    """The plan for Llama 3.1 8B on a machine, from its config alone."""
    files = ModelFiles(Path(), "meta-llama/Llama-3.1-8B", None, "meta-llama/Llama-3.1-8B")
    checkpoint = Checkpoint(files, LLAMA_31_8B, {}, {}, [])
    return plan_checkpoint(checkpoint, build(values), where=machine(chip))


def memory() -> str:
    """Predicted peaks of Llama 3.1 8B, part by part, and what each machine can give."""
    left, scale = 190, 9.2  # pixels for a gigabyte
    body = []
    for i, (chip, label, values) in enumerate(RUNS):
        plan, y, x = plan_of(chip, values), 62 + 40 * i, float(left)
        body.append(text(left - 10, y + 16, label, "end"))
        for name, size in plan.parts.items():
            body.append(box(x, y, size / 1e9 * scale, 24, PARTS[name]))
            x += size / 1e9 * scale
        limit = left + plan.memory_bytes / 1e9 * scale
        beside = limit if limit - x < 60 else x  # of the two, so that the line crosses no number
        body.append(text(beside + 6, y + 16, f"peak {plan.total_bytes / 1e9:.1f} GB"))
        body.append(line(limit, y - 5, limit, y + 29, "limit"))
    bottom = 62 + 40 * len(RUNS)
    for gigabytes in range(0, 51, 10):
        x = left + gigabytes * scale
        body.append(text(x, bottom + 14, f"{gigabytes} GB", "small middle"))
    body += legend(20, 28, [(kind, name) for name, kind in PARTS.items()])
    body.append(text(20, bottom + 36, "red: what the machine gives to one program", "small"))
    return card(720, bottom + 50, "Predicted peak memory of Llama 3.1 8B, part by part", body)


def lora() -> str:
    """A frozen matrix, and the two thin ones beside it."""
    body = [
        text(20, 108, "x"),
        line(34, 104, 80, 104),
        line(56, 104, 56, 222),
        line(56, 222, 96, 222),
        box(80, 40, 130, 130, "a"),
        text(145, 100, "W, frozen", "middle"),
        text(145, 118, "4 bits a number", "small middle"),
        box(96, 208, 100, 28, "b"),
        text(146, 255, "A: r x 4,096", "small middle"),
        line(196, 222, 236, 222),
        box(236, 172, 28, 100, "c"),
        text(250, 290, "B: 4,096 x r, begins at 0", "small middle"),
        line(264, 222, 330, 222),
        text(297, 214, "x alpha / r", "small middle"),
        line(330, 222, 330, 104),
        line(210, 104, 380, 104),
        text(392, 108, "y = W x + (alpha / r) B A x"),
        text(392, 140, "frozen: 4,096 x 4,096 = 16,777,216 numbers", "small"),
        text(392, 158, "trained: 16 x (4,096 + 4,096) = 131,072, for r = 16", "small"),
        text(392, 176, "that is 0.8 % of the matrix", "small"),
    ]
    return card(720, 306, "A frozen matrix W and the two thin matrices A and B beside it", body)


DOCUMENTS = [(5, 2), (4, 2), (6, 3)]  # positions, and how many of them are learned


def packing() -> str:
    """Which token of documents that lie end to end attends to which, and which are learned."""
    cell, left, top = 17, 20, 54
    body = legend(left, 28, [("b", "may be looked at"), ("c", "learned"), ("a", "padding")])
    start = 0
    for number, (n, answers) in enumerate(DOCUMENTS):
        for row in range(start, start + n):
            for column in range(start, row + 1):
                body.append(box(left + column * cell, top + row * cell, cell - 2, cell - 2, "b"))
            learned = row >= start + n - answers
            body.append(
                box(left + 18 * cell, top + row * cell, 34, cell - 2, "c" if learned else "cell")
            )
        middle = top + (start + n / 2) * cell
        body.append(text(left + 21.5 * cell, middle, f"document {number + 1}: {n} positions,"))
        body.append(
            text(left + 21.5 * cell, middle + 16, f"{answers} of them learn the next token")
        )
        start += n
    for row in range(start, start + 2):
        body.append(box(left + 18 * cell, top + row * cell, 34, cell - 2, "a"))
    body.append(text(left + 21.5 * cell, top + (start + 1.2) * cell, "never computed at all"))
    bottom = top + (start + 2) * cell
    body.append(text(left, bottom + 16, "One axis of the engine, position by position.", "small"))
    return card(720, bottom + 30, "Attention and labels of three documents end to end", body)


def schedule() -> str:
    """The learning rate of every step, for the three schedules and the default numbers."""
    left, top, width, height, steps, peak = 70, 50, 560, 150, 1000, 2e-4
    kinds = dict(zip(SCHEDULES, ("stroke-b", "stroke-d", "stroke-c")))
    body = [
        line(left, top + height, left + width, top + height),
        line(left, top, left, top + height),
    ]
    for name, kind in kinds.items():
        points = " ".join(
            f"{left + width * step / steps:.1f},"
            f"{top + height * (1 - learning_rate(step, peak, 100, steps, name) / peak):.1f}"
            for step in range(1, steps + 1, 3)
        )
        body.append(f'<polyline points="{points}" class="{kind}"/>')
    for step in (1, 100, 500, 1000):
        body.append(text(left + width * step / steps, top + height + 18, str(step), "small middle"))
    body += [
        text(left - 8, top + 5, "2e-4", "small end"),
        text(left - 8, top + height, "0", "small end"),
    ]
    colours = [(kind.removeprefix("stroke-"), name) for name, kind in kinds.items()]
    body += legend(left, 28, colours)
    body.append(text(left, top + height + 38, "optimiser step, with the defaults", "small"))
    return card(720, top + height + 52, "The learning rate over a run of 1,000 steps", body)


def limits() -> str:
    """Tokens per second that no trainer of Llama 3.1 8B can pass, chip by chip."""
    llama = LlamaConfig.from_hf(LLAMA_31_8B)
    layers = llama.num_hidden_layers
    once, again = (flops_per_token(llama, [level] * layers, [2048], 1.0) for level in (0, 3))
    chips = ["m1", "m1-max", "m2-ultra", "m3-max", "m4", "m4-pro", "m4-max", "m3-ultra", "m5-max"]
    left, scale = 110, 0.29
    body = legend(20, 28, [("b", "nothing recomputed"), ("d", "everything recomputed")])
    for i, chip in enumerate(chips):
        y, rate = 48 + 30 * i, APPLE[chip] * 1e12
        body.append(text(left - 10, y + 16, chip, "end mono"))
        for row, (kind, flops) in enumerate((("b", once), ("d", again))):
            body.append(box(left, y + 11 * row, rate / flops * scale, 10, kind))
        x = left + rate / once * scale
        body.append(text(x + 6, y + 15, f"{rate / once:,.0f} / {rate / again:,.0f}", "small"))
    bottom = 48 + 30 * len(chips)
    claim = left + 1300 * scale
    body += [
        line(claim, 42, claim, bottom, "limit"),
        text(claim - 5, bottom + 15, "1,300 tokens/s", "small end"),
        text(20, bottom + 34, "matmul rate of the chip / operations of a token", "small"),
    ]
    return card(720, bottom + 46, "Upper limits of training speed, tokens per second", body)


LAYERING = Path(__file__).parents[1] / "tests" / "project" / "test_layering.py"
NAMED = {  # groups that are no package
    "errors": "errors, fields and their names elsewhere, progress, trees of arrays, folders",
    "device": "what this machine is; the processes of a run",
    "run": "sections put together, a source loaded, one run from config to output folder",
    "cli": "arguments, commands, exit codes",
}


def architecture() -> str:
    """The groups of modules, what each is for, and how often it imports which others."""
    layering = runpy.run_path(str(LAYERING))
    modules, group = layering["modules"](), layering["group"]
    titles = []
    for order in layering["ORDER"]:
        (title,) = order if len(order) == 1 else order & set(NAMED)
        titles.append(title)
    inside: dict[str, list[str]] = {title: [] for title in titles}
    links = {title: Counter[str]() for title in titles}
    about = dict(NAMED)
    for name, path in modules.items():
        title = titles[group(name)]
        if path.name == "__init__.py":
            about[title] = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
            continue
        inside[title].append(name.removeprefix(f"{title}."))
        for target in sorted(layering["imports"](path)):
            if titles[group(target)] != title:
                links[title][titles[group(target)]] += 1
    body, y = [], 16
    for title in reversed(titles):
        lines = textwrap.wrap("  ".join(sorted(inside[title])), 96)
        height = 36 + 15 * (len(lines) + bool(links[title]))
        body += [box(16, y, 688, height, "cell"), text(28, y + 20, title, "mono bold")]
        body.append(text(110, y + 20, about[title]))
        for line_of in lines:
            y += 15
            body.append(text(28, y + 22, line_of, "small mono"))
        if links[title]:
            y += 15
            parts = [f"{other} {n}" for other, n in links[title].most_common()]
            body.append(text(28, y + 22, f"imports  {', '.join(parts)}", "small faint"))
        y += 44
    rule = "A group imports only those below it; run reaches after once, when there is a report."
    body.append(text(16, y + 10, rule, "small"))
    return card(720, y + 22, "The groups of modules of mlx_qlora and what they import", body)


DRAWN: dict[str, Callable[[], str]] = {
    "architecture": architecture,
    "memory-8b": memory,
    "lora": lora,
    "packing": packing,
    "schedule": schedule,
    "limits": limits,
}


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (FIGURES / f"{name}.svg").write_text(draw(), encoding="utf-8")
