"""The state of a run on disk, and back.

A checkpoint is written beside its place and renamed into it, so a reader finds a whole one or
none. It holds tensors as safetensors and everything else as JSON; there is no pickle. Each file
has its checksum in `resume_state.json`, which begins with its own.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora.adapters.peft import adapter_tensors, peft_config, write_peft
from mlx_qlora.data.batches import Batches
from mlx_qlora.errors import ConfigError, listing, option, require
from mlx_qlora.folders import disk_errors, staged
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.train.config import TrainingConfig
from mlx_qlora.train.optim import AdamW

# ---- the history ---------------------------------------------------------------------------------


def best_eval(history: list[dict[str, Any]]) -> tuple[int, float] | None:
    """(step, loss) of the best validation; the first of equals."""
    evals = [(r["eval_loss"], r["step"]) for r in history if "eval_loss" in r]
    finite = [pair for pair in evals if math.isfinite(pair[0])]
    return min(finite)[::-1] if finite else None


def was_validated(history: list[dict[str, Any]], step: int) -> bool:
    """Whether there was a validation after this step."""
    return any(record["step"] == step and "eval_loss" in record for record in history)


def validations_since_best(history: list[dict[str, Any]]) -> int:
    """How many validations came after the best one; 0 if none had a finite loss."""
    best, steps = best_eval(history), [r["step"] for r in history if "eval_loss" in r]
    return steps[::-1].index(best[0]) if best else 0


# ---- trainer_state.json --------------------------------------------------------------------------


TRAIN_KEYS = ("loss", "grad_norm", "learning_rate", "epoch", "step")


EVAL_KEYS = ("eval_loss", "eval_runtime", "epoch", "step")


def trainer_state(
    state: "RunState",
    training: TrainingConfig,
    checkpointing: "CheckpointingConfig",
    logging_steps: int,
    batches: Batches,
) -> dict[str, Any]:
    """Exactly the keys that transformers' `TrainerState` accepts, and records as it writes them."""
    best = best_eval(state.log_history)
    folder = Path(checkpointing.output_dir) / f"checkpoint-{best[0]}" if best else None
    if folder and best and best[0] != state.step and not folder.exists():
        folder = None  # its step was validated, and not saved
    records = []
    for record in state.log_history:
        keys = EVAL_KEYS if "eval_loss" in record else TRAIN_KEYS
        if all(key in record for key in keys):
            records.append({key: record[key] for key in keys})
    return {
        "best_global_step": best[0] if best else None,
        "best_metric": best[1] if best else None,
        "best_model_checkpoint": str(folder) if folder else None,
        "epoch": batches.epoch(state.step * training.gradient_accumulation_steps),
        "eval_steps": checkpointing.eval_steps,
        "global_step": state.step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": records,
        "logging_steps": logging_steps,
        "max_steps": training.total_steps(batches),
        "num_input_tokens_seen": state.tokens,
        "num_train_epochs": math.ceil(batches.epoch(training.micro_batches(batches))),
        "save_steps": checkpointing.save_steps,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": training.rows,
        "trial_name": None,
        "trial_params": None,
    }


MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}  # torch's names -> ours


STATE = "resume_state.json"


@dataclass(frozen=True)
class CheckpointingConfig:
    """Where a run leaves its files, and when."""

    output_dir: str = option("outputs", "folder for the adapter, the record and the checkpoints")
    save_steps: int = option(500, "write a checkpoint every this many steps")
    eval_steps: int = option(500, "measure the validation loss every this many steps")
    save_total_limit: int = option(
        3, "how many checkpoints are kept: the newest ones, and the best besides"
    )
    load_best_model_at_end: bool = option(
        False, "end with the weights of the best validation loss; each best one is saved"
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many validations without a better loss; null never does"
    )
    resume_from_checkpoint: str = option(
        "auto", "auto goes on from the newest checkpoint of the same run; none; or a folder"
    )

    def __post_init__(self) -> None:
        for name in ("save_steps", "eval_steps", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"checkpointing.{name}", "be at least 1", value)
        require(bool(self.output_dir), "checkpointing.output_dir", "name a folder", "nothing")
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))


@dataclass
class RunState:
    """Everything about a run but its weights and moments.

    Attributes:
        step: optimiser steps done.
        updates: of them, those that moved the weights: AdamW's own count.
        rows: rows of the stream that were consumed; the next batch begins there. Order and
            dropout are drawn from the config's seed and these numbers, so there is no other
            state of a random generator.
        tokens: real tokens that were trained.
        fingerprint: name -> hash of the config, the data and the model; a run goes on only from
            its own.
        config: the values behind the config's hash, to show what differs.
        log_history: every record of `metrics.jsonl`.
        open_losses: of the steps since the last logged record, whose mean is the next one's.
        open_grad_norm: the last one of those steps.
        recent_losses: of the last steps, against which a spike is measured.
        skipped_in_a_row: steps just before this one that moved nothing.
    """

    step: int = 0
    updates: int = 0
    rows: int = 0
    tokens: int = 0
    fingerprint: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    open_losses: list[float] = field(default_factory=list)
    open_grad_norm: float = 0.0
    recent_losses: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0


# ---- out ---------------------------------------------------------------------------------------
def save_checkpoint(
    model: LlamaForCausalLM,
    optimizer: AdamW,
    state: RunState,
    trainer_state: dict[str, Any],
    base: str,
    config: CheckpointingConfig,
) -> Path:
    """Writes `checkpoint-<step>` and removes what `save_total_limit` no longer covers.

    Raises:
        TrainingError: the disk is full, read-only, or the output folder is gone; what was there
            before is as it was.
    """
    output = Path(config.output_dir)
    folder = output / f"checkpoint-{state.step}"
    moments = {
        f"{name}.{theirs}": np.array(array)
        for theirs, ours in MOMENTS.items()
        for name, array in optimizer.named(getattr(optimizer, ours)).items()
    }
    with disk_errors(output, lambda: last_checkpoint(output)):
        if not output.is_dir():
            raise FileNotFoundError(2, "it was removed during the run", str(output))
        with staged(folder, replace=True) as staging:
            write_peft(staging, adapter_tensors(model), peft_config(model, base))
            save_file(moments, staging / "optimizer.safetensors")
            text = json.dumps(trainer_state, indent=2) + "\n"
            (staging / "trainer_state.json").write_text(text, encoding="utf-8")
            _write_state(staging, state)
        rotate(output, state, config.save_total_limit)
    return folder


def _write_state(folder: Path, state: RunState) -> None:
    """Writes `resume_state.json`: its first line is the checksum of all that follows."""
    checksums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    body = json.dumps({"checksums": checksums, **asdict(state)}, indent=2)[1:] + "\n"
    own = hashlib.sha256(body.encode()).hexdigest()
    (folder / STATE).write_text(f'{{"sha256": "{own}",{body}', encoding="utf-8")


def rotate(output: Path, state: RunState, limit: int) -> None:
    """Removes all but the newest checkpoints and the best of those that there are."""
    found = checkpoints(output)
    steps = {step_of(path) for path in found}
    best = best_eval([r for r in state.log_history if r["step"] in steps])
    for path in found[:-limit]:
        if best is None or step_of(path) != best[0]:
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a checkpoint, which a run that is killed meanwhile leaves under another name."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def last_checkpoint(output: Path) -> str:
    """What there is to go on from, for messages about the disk."""
    saved = checkpoints(output)
    if not saved:
        return "No checkpoint was written yet"
    return f"{saved[-1]} is whole, and the same command goes on from it"


# ---- what there is -----------------------------------------------------------------------------
def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first."""
    found = filter(is_ours, output.glob("checkpoint-*"))
    return sorted((p for p in found if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The optimiser step of a checkpoint."""
    return int(path.name.removeprefix("checkpoint-"))


def is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint that this library wrote."""
    return (path / STATE).is_file()


def remove_leftovers(output: Path, step: int) -> None:
    """Removes what a run that goes on from `step` will write anew, and halves of a run that died.

    Otherwise the checkpoints of an abandoned run would count as the newest, be kept in the place
    of this run's, and be resumed.
    """
    for path in checkpoints(output):
        if step_of(path) > step:
            _discard(path)
    for path in (*output.glob(".checkpoint-*"), *output.glob(f".{output.name}-*")):
        if path.suffix in (".tmp", ".old", ".gone"):
            shutil.rmtree(path, ignore_errors=True)


def restore_set_aside(output: Path) -> None:
    """Puts back a checkpoint that was set aside for another one, if that never came."""
    for aside in output.glob(".checkpoint-*.old"):
        name = re.match(r"\.(checkpoint-\d+)-", aside.name)
        if name and not (output / name[1]).exists():
            aside.rename(output / name[1])


# ---- in ----------------------------------------------------------------------------------------
def read_state(path: Path) -> dict[str, Any]:
    """The content of `resume_state.json`, after every checksum of the checkpoint was compared.

    Raises:
        ConfigError: naming the file that is damaged or missing.
    """
    try:
        text = (path / STATE).read_bytes().decode()
        begun = re.match(r'\{"sha256": "([0-9a-f]{64})",', text)
        if begun is None or hashlib.sha256(text[begun.end() :].encode()).hexdigest() != begun[1]:
            raise ConfigError(f"{path / STATE} is damaged")
        saved = json.loads(text)
        for name, checksum in saved.pop("checksums").items():
            if sha256(path / name) != checksum:
                raise ConfigError(f"{path / name} is damaged")
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path / STATE} cannot be read: {error}") from None
    del saved["sha256"]
    return saved


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            hashed.update(piece)
    return hashed.hexdigest()


def checkpoint_to_resume(
    config: CheckpointingConfig, state: RunState
) -> tuple[Path | None, list[str]]:
    """The checkpoint that the config asks for, or None to start at step 0.

    Args:
        config: whose output folder is looked into.
        state: of the run that is to begin, with its fingerprint and config.

    Returns:
        The checkpoint, and what is wrong with newer ones that were passed over.

    Raises:
        ConfigError: a named folder that is no checkpoint or a damaged one, no whole checkpoint
            where there are some, or one that was made from another config, data or model.
    """
    wanted = config.resume_from_checkpoint
    if wanted == "none":
        return None, []
    if wanted != "auto":
        path = Path(wanted).expanduser()
        if not is_ours(path):
            raise ConfigError(f"checkpointing.resume_from_checkpoint: {path} is no checkpoint")
        _refuse_another_run(path, read_state(path), state)
        return path, []
    damaged = []
    for path in reversed(checkpoints(Path(config.output_dir))):
        try:
            saved = read_state(path)
        except ConfigError as error:
            damaged.append(str(error))
            continue
        _refuse_another_run(path, saved, state)
        return path, damaged
    if damaged:
        raise ConfigError(
            f"no checkpoint of {config.output_dir} is whole:\n{listing(damaged)}\n"
            "to start anew pass checkpointing.resume_from_checkpoint=none"
        )
    return None, []


def _refuse_another_run(path: Path, saved: dict[str, Any], state: RunState) -> None:
    theirs = saved.get("fingerprint", {})
    changed = [name for name in state.fingerprint if theirs.get(name) != state.fingerprint[name]]
    if changed:
        shown = [f"{name}: {old} -> {new}" for name, old, new in _differences(saved, state)]
        raise ConfigError(
            f"{path} was made from another {' and '.join(changed)}"
            + (f":\n{listing(shown)}\n" if shown else ". ")
            + "To start anew pass checkpointing.resume_from_checkpoint=none, or choose another "
            "--output-dir"
        )


def _differences(saved: dict[str, Any], state: RunState) -> Iterator[tuple[str, Any, Any]]:
    theirs = saved.get("config", {})
    for section, fields in state.config.items():
        for name, value in fields.items():
            before = theirs.get(section, {}).get(name)
            if before != value:
                yield f"{section}.{name}", before, value


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: AdamW) -> RunState:
    """Puts a checkpoint's weights and moments back, bit for bit."""
    state = RunState(**read_state(path))
    moments = load_file(path / "optimizer.safetensors")
    optimizer.weights = _concatenate(saved_weights(path, optimizer))
    for theirs, ours in MOMENTS.items():
        parts = (moments[f"{name}.{theirs}"] for name in optimizer.shapes)
        setattr(optimizer, ours, _concatenate(parts))
    optimizer.step = state.updates
    model.update(optimizer.tree())
    return state


def saved_weights(path: Path, optimizer: AdamW) -> Iterator[np.ndarray]:
    """The weights of a checkpoint, in the optimiser's order."""
    weights = load_file(path / "adapter_model.safetensors")
    # An adapter whose base made way for it is written with twice the rank; what is trained is
    # the first half.
    return (
        weights[f"base_model.model.{name}"][tuple(slice(n) for n in shape)]
        for name, shape in optimizer.shapes.items()
    )


def load_weights(path: Path, model: LlamaForCausalLM, optimizer: AdamW) -> None:
    """Puts a checkpoint's weights alone back into the model."""
    read_state(path)
    buffer = _concatenate(saved_weights(path, optimizer))
    model.update(optimizer.tree(buffer))


def _concatenate(parts: Any) -> mx.array:
    return mx.array(np.concatenate([part.reshape(-1) for part in parts]))
