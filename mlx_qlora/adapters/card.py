"""The model card of an adapter: what it is, how to use it, and how it came about.

Markdown with the YAML header that Hugging Face reads. It is made of figures and settings alone: no
row of the data, no path of this machine.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_qlora._version import __version__
from mlx_qlora.errors import SourceError
from mlx_qlora.model.hub import HUB_ID

# Settings that a card shows. Whatever may hold a path or a text of the user's is not among them.
SHOWN = {
    "model": ("bits", "group_size", "mode", "dtype"),
    "data": ("max_length", "truncation", "packing", "train_on", "shuffle"),
    "training": (
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed"),
    ),
}
LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "use_rslora")
LORA += ("use_dora", "rank_pattern", "alpha_pattern")
TAG = "mlx-qlora"
OUR_SENTENCE = re.compile(r"^A (?:LoRA|DoRA) adapter of rank .*, trained with mlx-qlora ", re.M)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True)
class Facts:
    """What a card is made from.

    Attributes:
        adapter: of `adapter_config.json`.
        record: of `training_args.json`; without it the settings of the run are left out.
        metrics: the records of `metrics.jsonl`.
        tokens_seen: of the whole training, with repeated epochs.
        plots: paths relative to the card.
        tokenizer: whether its files lie beside the adapter.
        mlx: whether the copy for mlx-lm does.
        license: as Hugging Face names it; None if nothing says.
        name: under which others find the adapter.
    """

    adapter: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    tokens_seen: int | None = None
    plots: list[str] = field(default_factory=list)
    tokenizer: bool = False
    mlx: bool = False
    license: str | None = None
    name: str = "path/to/this/folder"


def read_facts(folder: Path, name: str | None = None) -> Facts:
    """The facts of an output folder, a checkpoint, or any folder with a PEFT adapter.

    Args:
        folder: with `adapter_config.json`; all else may be missing.
        name: the repository on the hub that it goes to.

    Raises:
        SourceError: a file cannot be read.
    """
    seen = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        seen.append(_object(path).get("num_input_tokens_seen") or 0)
    header = _header(folder / "README.md")
    known = {} if name is None else {"name": name}
    return Facts(
        adapter=_object(folder / "adapter_config.json"),
        record=_object(folder / "training_args.json", {}) or _from_yaml(folder / "run.yaml"),
        metrics=read_metrics(folder / "metrics.jsonl"),
        tokens_seen=max(seen, default=0) or None,
        plots=sorted(
            f"plots/{path.name}"
            for path in folder.glob("plots/[!.]*.svg")
            if path.suffix in (".svg", ".png")
        ),
        tokenizer=any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model")),
        mlx=(folder / "mlx" / "adapters.safetensors").is_file(),
        license=header.get("license") if isinstance(header.get("license"), str) else None,
        **known,
    )


def is_our_card(path: Path) -> bool:
    """Whether a file is a card that `model_card` made: by its tag and its sentence, not a word."""
    tags = _header(path).get("tags")
    if not isinstance(tags, list) or TAG not in tags:
        return False
    return OUR_SENTENCE.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, their numbers alone; none if there is no such file.

    Raises:
        SourceError: a line is not a JSON object.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = dict(json.loads(line))
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"{path}, line {number} is no JSON object ({error}): delete the line"
            ) from None
        # A record of a skipped step names rows of the data.
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        records.append(numbers)
    return records


def _object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, OSError) as error:
        raise SourceError(f"{path} cannot be read as a JSON object: {error}") from None


def _from_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        return {"config": dict(yaml.safe_load(path.read_text(encoding="utf-8")))}
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise SourceError(f"{path} cannot be read as YAML: {error}") from None


def _header(path: Path) -> dict[str, Any]:
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        return dict(yaml.safe_load(text[3:].split("\n---", 1)[0])) if text[:3] == "---" else {}
    except (TypeError, ValueError, yaml.YAMLError):  # people write it by hand
        return {}


# ---- facts -> markdown -------------------------------------------------------------------------


def model_card(facts: Facts) -> str:
    """The card, as Markdown with a YAML header; what is not known is left out."""
    parts = [
        _yaml(facts),
        _summary(facts),
        _usage(facts),
        _settings(facts),
        _results(facts),
        _versions(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(facts: Facts) -> tuple[str, bool]:
    """The base's name, and whether it is a repository; of a local folder only the last part."""
    base = str(facts.adapter.get("base_model_name_or_path") or "the base model")
    is_repo = HUB_ID.fullmatch(base) is not None
    return (base if is_repo else Path(base).name), is_repo


def _yaml(facts: Facts) -> str:
    import yaml

    base, is_repo = _base(facts)
    header: dict[str, Any] = {"base_model": base} if is_repo else {}
    header |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    header |= {"license": facts.license} if facts.license else {}
    tags = [f"base_model:adapter:{base}"] if is_repo else []
    header["tags"] = [*tags, "lora", TAG]
    return f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---"


def _summary(facts: Facts) -> str:
    adapter, (base, is_repo) = facts.adapter, _base(facts)
    kind = "DoRA" if adapter.get("use_dora") else "LoRA"
    link = f"[`{base}`](https://huggingface.co/{base})" if is_repo else f"`{base}`"
    model = facts.record.get("config", {}).get("model", {})
    bits = f", on {model['bits']}-bit weights" if model.get("bits") else ""
    title = f"# {facts.name.rpartition('/')[2]}\n\n" if HUB_ID.fullmatch(facts.name) else ""
    return (
        f"{title}A {kind} adapter of rank {adapter.get('r')} for {link}, trained with "
        f"mlx-qlora {facts.record.get('versions', {}).get('mlx-qlora', __version__)}{bits}."
    )


def _usage(facts: Facts) -> str:
    base, name = _base(facts)[0], facts.name
    code = [
        "## How to use it\n\nWith [PEFT](https://github.com/huggingface/peft):\n",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer\n",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name if facts.tokenizer else base}")',
        "```",
    ]
    if facts.mlx:
        fetched = HUB_ID.fullmatch(name) is not None
        folder = "adapter" if fetched else name
        code += ["\nWith [mlx-lm](https://github.com/ml-explore/mlx-lm), on a Mac:\n", "```sh"]
        code += [f'hf download {name} --include "mlx/*" --local-dir adapter'] if fetched else []
        code += [
            f'mlx_lm.generate --model {base} --adapter-path {folder}/mlx --prompt "Hello"',
            "```",
        ]
    return "\n".join([*code, *_vllm(facts)])


def _vllm(facts: Facts) -> list[str]:
    adapter, base = facts.adapter, _base(facts)[0]
    ranks = [adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()]
    enough = [rank for rank in VLLM_RANKS if rank >= max(ranks)]
    if adapter.get("use_dora") or adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        why = "DoRA" if adapter.get("use_dora") else "ranks or scales of their own"
        return [f"\nvLLM does not compute {why}: merge the adapter into the base for it."]
    if not enough:
        return []
    flags = f"--enable-lora --max-lora-rank {enough[0]} --lora-modules tuned={facts.name}"
    head = "\nWith [vLLM](https://github.com/vllm-project/vllm), as the model `tuned`:\n"
    return [head, "```sh", f"vllm serve {base} {flags}", "```"]


def _settings(facts: Facts) -> str:
    config = facts.record.get("config", {})
    rows = {f"lora.{name}": facts.adapter[name] for name in LORA if facts.adapter.get(name)}
    for section, names in SHOWN.items():
        values = config.get(section, {})
        rows |= {f"{section}.{n}": values[n] for n in names if values.get(n) is not None}
    table = [f"| `{name}` | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["## Hyperparameters\n", "| | |", "|---|---|", *table])


def _results(facts: Facts) -> str:
    losses = [_line(facts, "loss", "training loss"), _line(facts, "eval_loss", "validation loss")]
    lines = []
    if any(losses):
        lines += ["| nats per token | first | last | best |", "|---|---|---|---|"]
        lines += [line for line in losses if line]
    said = {}
    if accuracy := [r["eval_token_accuracy"] for r in facts.metrics if "eval_token_accuracy" in r]:
        said["validation token accuracy at the end"] = f"{accuracy[-1]:.1%}"
    if epochs := [r["epoch"] for r in facts.metrics if "epoch" in r]:
        said["epochs"] = f"{epochs[-1]:g}"
    if facts.tokens_seen:
        said["tokens trained on"] = f"{facts.tokens_seen:,}"
    for name, count in facts.record.get("data", {}).items():  # counts of rows and tokens
        if isinstance(count, int):
            said[f"data: {name}"] = f"{count:,}"
    if peak := [r["peak_memory_bytes"] for r in facts.metrics if "peak_memory_bytes" in r]:
        said["peak memory"] = f"{max(peak) / 1e9:.2f} GB"
    lines += [f"\n{'; '.join(f'{name} {value}' for name, value in said.items())}."] if said else []
    for plot in facts.plots:
        lines.append(f"\n![{Path(plot).stem.replace('_', ' ')}]({plot})")
    return "\n".join(["## Training\n", *lines]) if lines else ""


def _line(facts: Facts, key: str, label: str) -> str:
    """One row of the table of losses; empty if none was recorded."""
    points = [(record[key], record.get("step")) for record in facts.metrics if key in record]
    if not points:
        return ""
    chosen = (points[0], points[-1], min(points))
    return f"| {label} | " + " | ".join(f"{loss:.4f} (step {at})" for loss, at in chosen) + " |"


def _versions(facts: Facts) -> str:
    versions = facts.record.get("versions", {})
    listed = "\n".join(f"- {name} {_cell(version)}" for name, version in versions.items())
    return f"## Versions\n\n{listed}" if listed else ""


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
