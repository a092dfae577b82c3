"""The state of a run on disk, and back.

A checkpoint is written beside its place and renamed into it, so a reader finds a whole one or
none. It holds tensors as safetensors and everything else as JSON; there is no pickle.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora.adapters.files import staged
from mlx_qlora.adapters.peft import adapter_tensors, peft_config, write_peft
from mlx_qlora.errors import ConfigError
from mlx_qlora.fields import option, require
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.optim import AdamW

MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}  # torch's names -> ours


@dataclass(frozen=True)
class CheckpointingConfig:
    """Where a run leaves its files, and when."""

    output_dir: str = option("outputs", "folder for the adapter, the record and the checkpoints")
    save_steps: int = option(500, "write a checkpoint every this many steps")
    eval_steps: int = option(500, "measure the validation loss every this many steps")
    save_total_limit: int = option(3, "how many checkpoints are kept; the newest ones")
    resume_from_checkpoint: str = option(
        "auto", "auto goes on from the newest checkpoint of the same run; none; or a folder"
    )

    def __post_init__(self) -> None:
        for name in ("save_steps", "eval_steps", "save_total_limit"):
            value = getattr(self, name)
            require(value >= 1, f"checkpointing.{name}", "be at least 1", value)
        require(bool(self.output_dir), "checkpointing.output_dir", "name a folder", "nothing")
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))


@dataclass
class RunState:
    """Everything about a run but its weights and moments.

    Attributes:
        step: optimiser steps done; with the config, it says which batch comes next.
        fingerprint: name -> hash of the config and of the data; a run goes on only from its own.
        log_history: what `trainer_state.json` shows, in Hugging Face's terms.
        open_losses: of the steps since the last logged record, whose mean is the next one's.
    """

    step: int = 0
    fingerprint: dict[str, str] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    open_losses: list[float] = field(default_factory=list)


def save_checkpoint(
    model: LlamaForCausalLM,
    optimizer: AdamW,
    state: RunState,
    trainer_state: dict[str, Any],
    base: str,
    config: CheckpointingConfig,
) -> Path:
    """Writes `checkpoint-<step>` and removes what `save_total_limit` no longer covers."""
    output = Path(config.output_dir)
    folder = output / f"checkpoint-{state.step}"
    moments = {
        f"{name}.{theirs}": np.array(array)
        for theirs, ours in MOMENTS.items()
        for name, array in optimizer.named(getattr(optimizer, ours)).items()
    }
    with staged(folder, replace=True) as staging:
        write_peft(staging, adapter_tensors(model), peft_config(model, base))
        save_file(moments, staging / "optimizer.safetensors")
        _write_json(staging / "trainer_state.json", trainer_state)
        _write_json(staging / "resume_state.json", asdict(state))
    for old in checkpoints(output)[: -config.save_total_limit]:
        shutil.rmtree(old)
    return folder


def forget_checkpoints_after(output: Path, step: int) -> None:
    """Removes the checkpoints that a run which goes on from `step` will write anew.

    Otherwise those of an abandoned run would count as the newest, be kept in the place of this
    run's, and be resumed.
    """
    for path in checkpoints(output):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first."""
    found = []
    for path in output.glob("checkpoint-*"):
        numbered = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if numbered and is_ours(path):
            found.append((int(numbered[1]), path))
    return [path for _, path in sorted(found)]


def is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint that this library wrote."""
    return (path / "resume_state.json").is_file()


def checkpoint_to_resume(config: CheckpointingConfig, fingerprint: dict[str, str]) -> Path | None:
    """The checkpoint that the config asks for, or None to start at step 0.

    Raises:
        ConfigError: a named folder that is no checkpoint, or a checkpoint that was made from
            another config or other data.
    """
    wanted = config.resume_from_checkpoint
    if wanted == "none":
        return None
    if wanted == "auto":
        found = checkpoints(Path(config.output_dir))
        if not found:
            return None
        path = found[-1]
    else:
        path = Path(wanted).expanduser()
        if not is_ours(path):
            raise ConfigError(f"checkpointing.resume_from_checkpoint: {path} is no checkpoint")
    try:
        theirs = dict(json.loads((path / "resume_state.json").read_text())["fingerprint"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged: resume_state.json; delete the folder") from None
    changed = [name for name in fingerprint if theirs.get(name) != fingerprint[name]]
    if changed:
        raise ConfigError(
            f"{path} was made from another {' and '.join(changed)}. To start anew pass "
            "checkpointing.resume_from_checkpoint=none, or choose another --output-dir"
        )
    return path


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: AdamW) -> RunState:
    """Puts a checkpoint's weights and moments back, bit for bit."""
    weights = load_file(path / "adapter_model.safetensors")
    moments = load_file(path / "optimizer.safetensors")
    optimizer.weights = _concatenate(
        weights[f"base_model.model.{name}"] for name in optimizer.shapes
    )
    for theirs, ours in MOMENTS.items():
        parts = (moments[f"{name}.{theirs}"] for name in optimizer.shapes)
        setattr(optimizer, ours, _concatenate(parts))
    saved = json.loads((path / "resume_state.json").read_text())
    optimizer.step = saved["step"]
    model.update(optimizer.tree())
    return RunState(**saved)


def _concatenate(parts: Any) -> mx.array:
    return mx.array(np.concatenate([part.reshape(-1) for part in parts]))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
