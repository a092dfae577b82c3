"""Writes the tables of docs/scaling.md from the planner's model, and draws figures/scaling.svg.

Run as: make docs        (or: python docs/make_scaling.py)
"""

import re
from pathlib import Path

from make_figures import FIGURES, LLAMA_31_8B, card, legend, line, text

from mlx_qlora.before.plan import LINKS, Link, Plan, plan_checkpoint
from mlx_qlora.config import build
from mlx_qlora.device import machine
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.weights import Checkpoint

PAGE = Path(__file__).parent / "scaling.md"
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# On which machine each link is looked at: the GPU's own link would tell nothing about a Mac.
MACHINES = {"Thunderbolt 5": "m4-max-64", "10 GbE": "m4-max-64", "NVLink (H100)": "h100-80"}
SIZES = {
    "8B": LLAMA_31_8B,
    "70B": {
        **LLAMA_31_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
BFLOAT16 = 2  # bytes of an activation


def checkpoint(size: str) -> Checkpoint:
    """Llama 3.1 of a size, from its config alone."""
    name = f"meta-llama/Llama-3.1-{size}"
    return Checkpoint(ModelFiles(Path(), name, None, name), SIZES[size], {}, {}, [])


def planned(size: str, chip: str, processes: int, rows: int = 6, accumulation: int = 3) -> Plan:
    """The plan with the defaults, but for the rows of a step."""
    training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    config = build({"training": training})
    return plan_checkpoint(checkpoint(size), config, where=machine(chip), processes=processes)


def links() -> list[str]:
    """What is assumed of each link."""
    lines = [
        "| link | nominal, one way | share assumed | counted on | a hop |",
        "|---|---|---|---|---|",
    ]
    for link in LINKS:
        nominal, counted = link.nominal / 1e9, link.bandwidth / 1e9
        lines.append(
            f"| {link.name} | {nominal:g} GB/s | {link.share:.2f} | {counted:.3g} GB/s | "
            f"{link.latency * 1e3:g} ms |"
        )
    return lines


def several(rows: int = 6, accumulation: int = 3) -> list[str]:
    """Efficiency and speed of Llama 3.1 8B by the number of processes."""
    heads = [f"{link.name}, {MACHINES[link.name]}" for link in LINKS]
    lines = [f"| processes | rows a step | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for N in COUNTS:
        cells = []
        for link in LINKS:
            found = expected("8B", link, N, rows, accumulation)
            cells.append(f"{found[0]:.4f}; {found[1]:,.0f} tokens/s")
        lines.append(f"| {N} | {rows * accumulation * N:,} | {' | '.join(cells)} |")
    return lines


def smallest() -> list[str]:
    """The same with one row a step in each process: the least that there is to compute."""
    return several(rows=1, accumulation=1)


def expected(
    size: str, link: Link, processes: int, rows: int = 6, accumulation: int = 3
) -> tuple[float, float]:
    """(efficiency, tokens/s of all)."""
    scaling = planned(size, MACHINES[link.name], processes, rows, accumulation).scaling
    assert scaling is not None
    found = scaling.over(link)
    return found.efficiency, found.tokens_per_second


def seventy() -> list[str]:
    """Llama 3.1 70B in 4 bits on one machine, part by part, and half of each."""
    plan = planned("70B", "m4-max-64", 1)
    lines = ["| part | one machine | each of two, cut in half |", "|---|---|---|"]
    for name, size in [*plan.parts.items(), ("predicted peak", plan.total_bytes)]:
        lines.append(f"| {name} | {size / 1e9:.2f} GB | {size / 2e9:.2f} GB |")
    lines.append(f"| memory of an M4 Max, 64 GB | {plan.memory_bytes / 1e9:.2f} GB | the same |")
    return lines


def cuts() -> list[str]:
    """What a token costs on the wire where 70B is cut over two machines, by the model."""
    sizes, plan = SIZES["70B"], planned("70B", "m4-max-64", 1)
    hidden, layers = int(str(sizes["hidden_size"])), int(str(sizes["num_hidden_layers"]))
    block, tokens = hidden * BFLOAT16, 2048
    compute = tokens / plan.tokens_per_second / 2
    lines = [
        "| cut | messages of a micro-batch | bytes of a token, each | Thunderbolt 5 | 10 GbE |",
        "|---|---|---|---|---|",
    ]
    # In the recomputed forward, the sums of a tensor split have to be made again.
    for name, messages, hops, sent in (
        ("within layers", 6 * layers, 2, 6 * layers),
        ("between layers", 2, 1, 1),  # one up from the first machine, one down from the second
    ):
        cells = []
        for link in LINKS[:2]:
            seconds = messages * (tokens * block / link.bandwidth + hops * link.latency)
            cells.append(f"{seconds:.2f} s, {seconds / compute:.2%}")
        lines.append(f"| {name} | {messages} | {sent * block:,} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The shares are of the computing of {tokens:,} tokens on two machines, {compute:.0f} s.",
    ]
    return lines


TABLES = {
    "links": links,
    "several": several,
    "smallest": smallest,
    "seventy": seventy,
    "cuts": cuts,
}


def with_tables(page: str) -> str:
    """A page with its tables written anew between their marks.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, made in TABLES.items():
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"no place for {name}")
        table = "\n".join(["", *made(), "", ""])
        page = place.sub(lambda found, table=table: found[1] + table + found[2], page)
    return page


def figure() -> str:
    """Efficiency by the number of processes, one line for each link."""
    left, top, width, height, lowest = 70, 50, 560, 170, 0.8
    kinds = ("b", "d", "c")
    body = [
        line(left, top + height, left + width, top + height),
        line(left, top, left, top + height),
    ]
    for kind, link in zip(kinds, LINKS):
        points = []
        for i, N in enumerate(COUNTS):
            share = expected("8B", link, N)[0]
            below = min((1 - share) / (1 - lowest), 1.0)
            points.append(f"{left + width * i / (len(COUNTS) - 1):.1f},{top + height * below:.1f}")
        body.append(f'<polyline points="{" ".join(points)}" class="stroke-{kind}"/>')
    for i, N in enumerate(COUNTS):
        x = left + width * i / (len(COUNTS) - 1)
        body.append(text(x, top + height + 18, str(N), "small middle"))
    for share in (1.0, 0.9, lowest):
        y = top + height * (1 - share) / (1 - lowest)
        body.append(text(left - 8, y + 4, f"{share:.0%}", "small end"))
    colours = [(kind, f"{x.name}, {MACHINES[x.name]}") for kind, x in zip(kinds, LINKS)]
    body += legend(20, 28, colours)
    told = "processes; share of a step that is computing, by a model that hides no sending"
    body.append(text(left, top + height + 40, told, "small"))
    title = "Scaling efficiency of Llama 3.1 8B by a model, not measured"
    return card(720, top + height + 54, title, body)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    (FIGURES / "scaling.svg").write_text(figure(), encoding="utf-8")
    print(f"wrote {PAGE} and {FIGURES / 'scaling.svg'}")
