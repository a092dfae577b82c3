"""What can be wrong with a merge, found before anything is written."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.adapters.hf_weights import shapes
from mlx_qlora.adapters.ownership import check_not_here
from mlx_qlora.errors import ConfigError, WeightsError, listing
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.weights import FLOATS, Checkpoint
from mlx_qlora.tree import flat

MARK = "merged by mlx-qlora"  # in the README.md of every export: only such a folder is replaced
GENERATION = "generation_config.json"
WRITTEN = ("README.md", "config.json", GENERATION, "model*.safetensors")
WRITTEN += ("model.safetensors.index.json", "tokenizer*", "special_tokens_map.json")
WRITTEN += ("added_tokens.json", "chat_template.*", ".DS_Store")


def check_target(target: Path, sources: list[ModelFiles]) -> None:
    """Refuses a folder that holds anything but an older export, or that is read from.

    Raises:
        ConfigError: naming what would be deleted, or it is the current folder.
    """
    for files in sources:
        if target == files.path.resolve():
            raise ConfigError(f"{target} is what the weights are read from; choose another folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; give the name of a folder")
    names = sorted(path.name for path in target.iterdir())
    foreign = [n for n in names if not any(fnmatch.fnmatch(n, known) for known in WRITTEN)]
    card = target / "README.md"
    ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    if names and (foreign or not ours):
        holds = f" ({', '.join(foreign[:5])})" if foreign else ""
        raise ConfigError(
            f"{target} holds something else than an older export{holds}, which would be deleted; "
            "choose another folder, or empty this one"
        )
    check_not_here(target, "folder")


def check_disk(target: Path, needed: int) -> None:
    """Refuses a disk that has not so many bytes free.

    Raises:
        ConfigError: with both numbers.
    """
    there = next(place for place in target.parents if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ConfigError(
            f"the merged model needs {needed:,} bytes, and {there} has {free:,} free: free some, "
            "or choose a folder on a larger disk (an older export there stays until the end)"
        )


def check_base(model: LlamaForCausalLM, original: Checkpoint) -> None:
    """Refuses original weights that are quantised, or another model's.

    Raises:
        ConfigError: they are quantised.
        WeightsError: they differ; all differences are listed.
    """
    where = original.files.path
    if original.packing:
        raise ConfigError(
            f"base: {where} is quantised itself; give the original 16-bit model, or no base"
        )
    theirs, ours = LlamaConfig.from_hf(original.config), model.config
    problems = [
        f"config.json: {field} is {getattr(theirs, field)!r}; the model's is {value!r}"
        for field, value in vars(ours).items()
        # How long a context is allowed does not show in the weights.
        if field != "max_position_embeddings" and not _same(getattr(theirs, field), value)
    ]
    if not problems:
        expected = shapes(model)
        for name, shape in expected.items():
            info = original.found.get(name)
            if info is None:
                problems.append(f"{name} is missing")
            elif info.shape != shape or info.dtype not in FLOATS:
                problems.append(f"{name} is {info.dtype} {info.shape}; the model's is {shape}")
    problems = problems or _different_norms(model, original)
    if problems:
        raise WeightsError(f"base: {where} is another model:\n{listing(problems)}")


def _same(theirs: Any, ours: Any) -> bool:
    """Whether two values of a config agree; a GGUF has its numbers in float32."""
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return abs(theirs - ours) <= 1e-6 * abs(ours)
    if isinstance(ours, (int, str)):
        return theirs == ours
    return all(_same(getattr(theirs, field), value) for field, value in vars(ours).items())


def _different_norms(model: LlamaForCausalLM, original: Checkpoint) -> list[str]:
    """Norms are never quantised, so they tell two models of the same sizes apart."""
    arrays = {name: array for shard in original.shards for name, array in shard.items()}
    norms = {n: w for n, w in flat(model.parameters()).items() if n.endswith("norm.weight")}
    return [
        f"{name} has other values"
        for name, ours in norms.items()
        if not mx.allclose(ours.astype(mx.float32), arrays[name].astype(mx.float32), 1e-2, 1e-3)
    ]
