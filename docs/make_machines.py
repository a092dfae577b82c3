"""Writes the tables of docs/how-to/on-your-mac.md: what the planner predicts for each Mac.

Run as: make docs        (or: python docs/make_machines.py)
"""

import re
from collections.abc import Callable
from pathlib import Path

from mlx_qlora.before.plan import Plan, plan_checkpoint
from mlx_qlora.config import build
from mlx_qlora.device import machine
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.weights import Checkpoint

PAGE = Path(__file__).parent / "how-to" / "on-your-mac.md"
BLOCK = re.compile(r"(<!-- (\w+): made by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)
MACHINES = (
    *("m1-8", "m1-16", "m1-max-32", "m2-16", "m3-16", "m3-max-64", "m3-ultra-96"),
    *("m4-16", "m4-pro-24", "m4-max-64", "m5-16", "m5-max-64"),
)
ROWS, LENGTH = 16, 512

# Of each config.json what sizes depend on: layers, hidden, MLP, heads, head size, tied.
MODELS = {
    "Llama 3.2 1B": (16, 2048, 8192, 32, 64, True),
    "Llama 3.2 3B": (28, 3072, 8192, 24, 128, True),
    "Llama 3.1 8B": (32, 4096, 14336, 32, 128, False),
}
VOCABULARY = 128256


def plan_of(name: str, model: str) -> Plan:
    """The plan for a model on a machine, from its config alone."""
    layers, hidden, mlp, heads, head_dim, tied = MODELS[model]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": tied,
    }
    training = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
    settings = build({"training": training, "data": {"max_length": LENGTH + 1}})
    checkpoint = Checkpoint(ModelFiles(Path(), model, None, model), config, {}, {}, [])
    return plan_checkpoint(checkpoint, settings, where=machine(name))


def speed(name: str, model: str, plan: Plan) -> str:
    """Tokens a second while it trains."""
    return f"{plan.tokens_per_second:,.0f}"


def memory(name: str, model: str, plan: Plan) -> str:
    """The predicted peak."""
    return f"{plan.total_bytes / 1e9:.1f}"


TABLES: dict[str, Callable[[str, str, Plan], str]] = {
    "speed": speed,
    "memory": memory,
}


def table(cell: Callable[[str, str, Plan], str]) -> str:
    """One of the tables as Markdown."""
    with_limit = cell is memory
    heads = ["Mac", *MODELS, *(["macOS gives"] if with_limit else [])]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name in MACHINES:
        plans = {model: plan_of(name, model) for model in MODELS}
        cells = [cell(name, model, plan) if plan.fits else "-" for model, plan in plans.items()]
        if with_limit:
            cells.append(f"{plans['Llama 3.2 1B'].memory_bytes / 1e9:.1f}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """The page with its tables as they are today."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table(TABLES[found[2]])}\n{found[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the tables of {PAGE}")
