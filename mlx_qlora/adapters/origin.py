"""Which base an adapter belongs to: its name for others, and a hash that knows it again."""

import json
import warnings
from pathlib import Path

from mlx_qlora.errors import AdapterError, AdapterWarning, UserError
from mlx_qlora.folders import BASE, PEFT, RECORD, sha256, write_whole
from mlx_qlora.model.hub import BUILT_IN, HUB_ID, ModelFiles, sample_of
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.readers import card_text, json_value

CONFIRM = "model.base_model_name_or_path=org/name"


def original_base(source: ModelFiles | None) -> str:
    """The Hugging Face repository that a model's files are a copy of, or their folder.

    An AdapterError if they say nothing, an AdapterWarning if it may be the model's parent.
    """
    if source is None or source.hf_id is None:
        what = source.source if source else "this model"
        raise AdapterError(
            f"the Hugging Face repository of {what} is unknown, and a PEFT adapter names it; pass "
            f"{CONFIRM} (in Python: save_adapter(model, folder, base_model_name_or_path=...))"
        )
    base, hint = source.hf_id, json_value(source.path / "config.json", "_name_or_path")
    card, is_gguf = source.path / "README.md", source.path.suffix.lower() == ".gguf"
    is_hint = base == hint != source.source  # and no card says so, too
    is_hint = is_hint and base not in card_text(card)
    if is_hint or (is_gguf and source.source not in BUILT_IN):
        note = f"{source.source} says that it was made from {base}, which the adapter names as its "
        note += f"base; if the weights were trained since then, pass {CONFIRM}"
    elif isinstance(hint, str) and HUB_ID.fullmatch(hint) and base == str(source.path):
        note = f"the adapter names {base} as its base, whose config.json says {hint}; if the "
        note += f"weights are that repository's own, pass {CONFIRM.replace('org/name', hint)}"
    else:
        return base
    warnings.warn(note, AdapterWarning, stacklevel=1)
    return base


def run_of(adapter: Path) -> Path:
    """The folder with the record and tokenizer of an adapter: a run has several adapters."""
    place = adapter.resolve()  # of "." and of links
    is_part = place.name == "mlx" or place.name.startswith("checkpoint-")
    return place.parent if is_part and (place.parent / RECORD).is_file() else adapter


def base_hash(model: LlamaForCausalLM) -> dict[str, str]:
    """The hash of a model's files; empty of a merged model, or where they are gone."""
    if model.source is None or model.is_merged:
        return {}
    try:
        return {BASE: sample_of(model.source.path, names=False).hex()}
    except (OSError, UserError):
        return {}


SUM = "sha256"  # of the adapter's tensors, in the record of the run that wrote them


def seal(folder: Path) -> None:
    """Add the checksum of a run's finished adapter to its record, which PEFT does not read."""
    record = json_value(folder / RECORD) | {SUM: sha256(folder / PEFT[1])}
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def check_whole(folder: Path) -> None:
    """Raise an AdapterError if the tensors of a run's adapter are not those that it wrote."""
    file, written = folder / PEFT[1], json_value(folder / RECORD, SUM)
    if written and file.is_file() and sha256(file) != written:
        raise AdapterError(
            f"{file} has changed since the run wrote it (another checksum); copy it again, or that "
            f"of a checkpoint, or delete {SUM} in {RECORD} if you have changed it yourself"
        )


def check_base(source: ModelFiles | None, adapter: Path, metadata: dict[str, str]) -> None:
    """Warn if an adapter's file, or the record of its run, says that it is of other weights."""
    record = run_of(adapter) / RECORD
    trained_on = metadata.get(BASE) or json_value(record, "fingerprint", BASE)
    if source and trained_on and trained_on != sample_of(source.path, names=False).hex():
        named = json_value(record, "config", "model", "source")
        named = named or json_value(adapter / PEFT[0], "base_model_name_or_path") or "not named"
        warnings.warn(
            f"{adapter} was trained on other weights ({named}) than those of {source.source}; use "
            "it only if they are the same model in another precision or format",
            AdapterWarning,
            stacklevel=1,
        )
