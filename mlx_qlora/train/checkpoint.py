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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_qlora import __version__
from mlx_qlora.adapters.peft import adapter_tensors, peft_config, write_peft
from mlx_qlora.data.batches import Batches
from mlx_qlora.errors import ConfigError, listing, require
from mlx_qlora.fields import config_section, option, typed
from mlx_qlora.folders import PEFT, RECORD, disk_errors, remove, sha256, staged, written_by
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.readers import json_value, parse_json, read_text, reading
from mlx_qlora.train.config import NUMERICS
from mlx_qlora.train.optim import AdamW

if TYPE_CHECKING:
    from mlx_qlora.config import RunConfig

MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}  # torch's names -> ours
STATE = "resume_state.json"
NAMES = r"checkpoint-\d+"
MOST_STATE = 1 << 28  # bytes; a record in its history has some 300, in 13 values
# Of `trainer_state.json`'s records, as transformers writes them.
TRAIN_KEYS = ("loss", "grad_norm", "learning_rate", "epoch", "step")
EVAL_KEYS = ("eval_loss", "eval_runtime", "epoch", "step")


PARTS, MOST_STEPS = 6, 500  # a run is validated and saved so often, and at least that often
AUTO_EVERY = f"a sixth of the run, at most {MOST_STEPS} steps"


@config_section("checkpointing")
class CheckpointingConfig:
    """Where a run leaves its files, and when."""

    output_dir: str = option("outputs", "folder for the adapter, report and checkpoints")
    save_steps: int | str = option("auto", f"steps between checkpoints. auto: {AUTO_EVERY}")
    eval_steps: int | str = option("auto", f"steps between validations. auto: {AUTO_EVERY}")
    save_total_limit: int = option(3, "checkpoints to keep: the newest ones, and the best besides")
    load_best_model_at_end: bool = option(
        False, "end with the weights of the best validation loss, each of which is saved"
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many validations without a better loss. null never does"
    )
    resume_from_checkpoint: str | bool = option(
        "auto",
        "auto (or true), none (or false), or the folder of a checkpoint to continue from. auto: "
        "the newest one of the same run",
    )

    def __post_init__(self) -> None:
        for name in ("save_steps", "eval_steps", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, name)
            legal = value in (None, "auto") or (isinstance(value, int) and value >= 1)
            rule = "be at least 1" + ", or auto" * name.endswith("_steps")
            require(legal, f"checkpointing.{name}", rule, value)
        if isinstance(self.resume_from_checkpoint, bool):  # transformers' spelling
            which = "auto" if self.resume_from_checkpoint else "none"
            object.__setattr__(self, "resume_from_checkpoint", which)
        for name in ("output_dir", "resume_from_checkpoint"):
            place = os.path.expanduser(getattr(self, name))
            is_path = place and place[0] != "~"  # that of nobody
            require(is_path, f"checkpointing.{name}", "name a folder", place or "nothing")
            object.__setattr__(self, name, place)

    def for_steps(self, steps: int) -> "CheckpointingConfig":
        """With numbers in the place of `auto`, for a run of so many steps."""
        every = min(-(-steps // PARTS), MOST_STEPS)
        names = ("save_steps", "eval_steps")
        return replace(self, **{name: every for name in names if getattr(self, name) == "auto"})


@dataclass
class RunState:
    """Everything about a run but its weights and moments.

    Order and dropout are drawn from the config's seed and the numbers of the rows, so there is no
    state of a random generator.
    """

    step: int = 0  # optimiser steps done
    updates: int = 0  # of them, those that moved the weights: AdamW's own count
    rows: int = 0  # of the stream that were consumed; the next batch begins there
    tokens: int = 0  # real ones that were trained
    # Name -> hash of the config, the data and the model, and the version of the numerics; a run
    # goes on only from its own. Then the values behind the config's hash, to show what differs.
    fingerprint: dict[str, str] = field(default_factory=dict)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)  # of `metrics.jsonl`
    # Of the steps since the last logged record, whose mean is the next one's.
    open_losses: list[float] = field(default_factory=list)
    open_grad_norm: float = 0.0  # of the last of those steps
    open_metrics: dict[str, list[float]] = field(default_factory=dict)  # of the objective
    recent_losses: list[float] = field(default_factory=list)  # against which a spike is measured
    skipped_in_a_row: int = 0  # steps just before this one that moved nothing


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


# ---- out -----------------------------------------------------------------------------------------


def save_checkpoint(
    model: LlamaForCausalLM,
    optimizer: AdamW,
    state: RunState,
    base: str,
    config: "RunConfig",
    batches: Batches,
) -> Path:
    """Writes `checkpoint-<step>` and removes what `save_total_limit` no longer covers.

    A TrainingError if the disk does not take it; what was there before is then as it was.
    """
    output = Path(config.checkpointing.output_dir)
    folder = output / f"checkpoint-{state.step}"
    moments = {
        f"{name}.{theirs}": np.array(array)
        for theirs, ours in MOMENTS.items()
        for name, array in optimizer.named(getattr(optimizer, ours)).items()
    }
    with disk_errors(output, lambda: last_checkpoint(output)):
        check_is_there(output)
        with staged(folder, replace=True) as staging:
            write_peft(staging, adapter_tensors(model), peft_config(model, base), {})
            save_file(moments, staging / "optimizer.safetensors")
            text = json.dumps(trainer_state(state, config, batches), indent=2) + "\n"
            (staging / "trainer_state.json").write_text(text, encoding="utf-8")
            _write_state(staging, state)
        rotate(output, state, config.checkpointing.save_total_limit)
    return folder


def _write_state(folder: Path, state: RunState) -> None:
    """Writes `resume_state.json`: its first line is the checksum of all that follows."""
    checksums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    body = json.dumps({"checksums": checksums, **asdict(state)}, indent=2)[1:] + "\n"
    first = hashlib.sha256(body.encode()).hexdigest()
    (folder / STATE).write_text(f'{{"sha256": "{first}",{body}', encoding="utf-8")


def check_is_there(output: Path) -> None:
    """Raise a FileNotFoundError if somebody has removed the folder of a run."""
    if not output.is_dir():
        raise FileNotFoundError(2, "it was removed during the run", str(output))


def trainer_state(state: RunState, config: "RunConfig", batches: Batches) -> dict[str, Any]:
    """Exactly the keys that transformers' `TrainerState` accepts, and records as it writes them."""
    training = config.training
    best_step, best_loss = best_eval(state.log_history) or (None, None)
    best = Path(config.checkpointing.output_dir) / f"checkpoint-{best_step}"
    was_saved = best_step == state.step or best.exists()  # and not only validated
    pairs = ((r, EVAL_KEYS if "eval_loss" in r else TRAIN_KEYS) for r in state.log_history)
    records = [{key: r[key] for key in keys} for r, keys in pairs if r.keys() >= set(keys)]
    return {
        "best_global_step": best_step,
        "best_metric": best_loss,
        "best_model_checkpoint": str(best) if was_saved else None,
        "epoch": batches.epoch(state.step * training.accumulation),
        "eval_steps": config.checkpointing.eval_steps,
        "global_step": state.step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": records,
        "logging_steps": config.logging.logging_steps,
        "max_steps": training.total_steps(batches),
        "num_input_tokens_seen": state.tokens,
        "num_train_epochs": math.ceil(batches.epoch(training.micro_batches(batches))),
        "save_steps": config.checkpointing.save_steps,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": training.rows,
        "trial_name": None,
        "trial_params": None,
    }


def rotate(output: Path, state: RunState, limit: int) -> None:
    """Removes all but the newest checkpoints and the best of those that there are."""
    saved = checkpoints(output)
    steps = {step_of(path) for path in saved}
    best = best_eval([r for r in state.log_history if r["step"] in steps])
    for path in saved[:-limit]:
        if best is None or step_of(path) != best[0]:
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a checkpoint, which a run that is killed meanwhile leaves under another name.

    Of one that is a link, moved to another disk, only the link is ours to remove.
    """
    gone = path.with_name(f".{path.name}-_discard.tmp")
    remove(gone)
    path.rename(gone)
    remove(gone)


# ---- what there is -------------------------------------------------------------------------------


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first."""
    ours = filter(is_ours, output.glob("checkpoint-*"))
    return sorted((p for p in ours if re.fullmatch(NAMES, p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The optimiser step of a checkpoint."""
    return int(path.name.removeprefix("checkpoint-"))


def is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint that this library wrote."""
    return (path / STATE).is_file()


def last_checkpoint(
    output: Path, fact: str = "is complete, and the same command continues from it"
) -> str:
    """What there is to go on from, for messages: the newest checkpoint and a fact about it."""
    saved = checkpoints(output)
    return f"{saved[-1]} {fact}" if saved else "No checkpoint was written yet"


def discard_after(output: Path, step: int) -> None:
    """Removes the checkpoints that a run which goes on from `step` will write again.

    Otherwise those of an abandoned run would count as the newest, be kept in the place of this
    run's, and be resumed.
    """
    for path in checkpoints(output):
        if step_of(path) > step:
            _discard(path)


def values_before(config: CheckpointingConfig, section: str) -> dict[str, Any]:
    """The deciding values of a section in the run that is to go on; not yet verified, or empty."""
    wanted = str(config.resume_from_checkpoint)
    saved = checkpoints(Path(config.output_dir)) if wanted == "auto" else [Path(wanted)]
    configs = (json_value(path / STATE, "config", most=MOST_STATE) for path in reversed(saved))
    found = (config.get(section) for config in configs if isinstance(config, dict))
    return next((values for values in found if isinstance(values, dict)), {})


# ---- which one to go on from ---------------------------------------------------------------------


def named_checkpoint(config: CheckpointingConfig) -> Path | None:
    """The folder that a config names to go on from, if any; a ConfigError if that is none."""
    wanted = str(config.resume_from_checkpoint)
    if wanted in ("auto", "none"):
        return None
    if not is_ours(path := Path(wanted)):
        raise ConfigError(
            f"checkpointing.resume_from_checkpoint: {path} is no checkpoint; name a folder "
            "checkpoint-N of a run, or auto for the newest"
        )
    return path


def checkpoint_to_resume(
    config: CheckpointingConfig, state: RunState, defaults: dict[str, Any]
) -> tuple[Path | None, RunState, list[str]]:
    """The checkpoint that the config asks for, every file of it hashed once, and its state.

    None is step 0; the last value is what is wrong with newer ones, which are passed over. `state`
    is that of the run that is to begin; `defaults` are those of the fields that decide the
    weights, as `state.config` has them. A ConfigError for a checkpoint that is damaged, if no other
    is whole, or of another config, data, model or numerics.
    """
    if config.resume_from_checkpoint == "none":
        return None, state, []
    damaged, named = [], named_checkpoint(config)
    for path in [named] if named else reversed(checkpoints(Path(config.output_dir))):
        try:
            saved = read_state(path)
        except ConfigError as error:
            if named:
                raise
            damaged.append(str(error))
            continue
        return path, _same_run(path, saved, state, defaults), damaged
    if damaged:
        raise ConfigError(
            f"every checkpoint of {config.output_dir} is damaged:\n{listing(damaged)}\n"
            "to start from the beginning pass checkpointing.resume_from_checkpoint=none"
        )
    return None, state, []


def _same_run(
    path: Path, saved: dict[str, Any], state: RunState, defaults: dict[str, Any]
) -> RunState:
    """The state of a checkpoint, if it is of the run that is to begin."""
    theirs = saved["fingerprint"]
    numerics, reason = theirs.get("numerics", "1"), ""
    if numerics != str(NUMERICS):
        reason = f"was trained with version {numerics} of the numerics, and this mlx-qlora has "
        reason += f"version {NUMERICS}, whose results differ"
    elif unknown := list(_unknown(saved, state)):
        reason = f"is of a later mlx-qlora: {__version__} does not know its {', '.join(unknown)}"
    if reason:
        record = path.parent / RECORD
        raise ConfigError(
            f"{path} {reason}; finish the run with the mlx-qlora that began it "
            f"({written_by(path.parent) or 'named'} in {record}), or begin a new run with its "
            f"adapter: --adapter {path} and another --output-dir"
        )
    differences = list(_differences(saved["config"], state.config, defaults))
    if any(re.match(r"training\.(max_steps|num_train_epochs)", line) for line in differences):
        derived = r"training\.(warmup_steps|per_device_train_batch_size x)"
        differences = [
            line + ", which follows unless it was set" * bool(re.match(derived, line))
            for line in sorted(differences, key=lambda line: bool(re.match(derived, line)))
        ]
    changed = [name for name in state.fingerprint if name not in ("numerics", "base")]
    changed = [name for name in changed if theirs.get(name) != state.fingerprint[name]]
    if "config" in changed and saved["config"] and not differences:
        changed.remove("config")  # hashed over fewer fields, whose values are the same
    if changed:
        raise ConfigError(
            f"{path} was made from another {' and '.join(changed)}"
            + (f":\n{listing(differences)}\n" if differences else ". ")
            + "To continue it, give the values at the left. " * (changed == ["config"])
            + "With another --output-dir a new run begins, or, with --adapter "
            f"{path.parent if (path.parent / PEFT[0]).exists() else path} besides, that adapter is "
            "trained further; checkpointing.resume_from_checkpoint=none begins again here"
        )
    return replace(RunState(**saved), fingerprint=state.fingerprint, config=state.config)


def _unknown(saved: dict[str, Any], ours: RunState) -> Iterator[str]:
    """What a later version has put into its state, and into the config that decides the weights."""
    yield from saved.keys() - vars(ours).keys()
    for section, fields in saved["config"].items():
        known = ours.config.get(section, {})
        yield from (f"{section}.{k}" for k, v in fields.items() if k not in known and v is not None)


def _differences(
    theirs: dict[str, Any], ours: dict[str, Any], defaults: dict[str, Any]
) -> Iterator[str]:
    """Deciding fields whose values differ; one that a checkpoint lacks has today's default."""
    for section, fields in ours.items():
        saved, then = theirs.get(section, {}), defaults.get(section, {})
        for name in {**fields, **saved}:
            before, now = saved.get(name, then.get(name)), fields.get(name)
            if before != now:
                yield f"{section}.{name}: {before} -> {now}"


# ---- in ------------------------------------------------------------------------------------------


def read_state(path: Path) -> dict[str, Any]:
    """The content of `resume_state.json`, after every checksum of the checkpoint was compared.

    Fields of a later version are in it as they are. A ConfigError names the file that is damaged or
    missing.
    """
    try:
        text = read_text(path / STATE, MOST_STATE)
        first = re.match(r'\{"sha256": "([0-9a-f]{64})",', text)
        if first is None or hashlib.sha256(text[first.end() :].encode()).hexdigest() != first[1]:
            raise ConfigError(f"{path / STATE} is damaged")
        saved = parse_json(text, MOST_STATE)
        for name, checksum in saved.pop("checksums").items():
            if os.sep in name or sha256(path / name) != checksum:
                raise ConfigError(f"{path / name} is damaged")
        del saved["sha256"]
        later = {name: saved.pop(name) for name in saved.keys() - vars(RunState()).keys()}
        state = typed(RunState, saved)
        is_named = re.fullmatch(NAMES, path.name) is not None
        if not _is_possible(state) or (is_named and step_of(path) != state.step):
            raise ValueError("its numbers are not those of a run")
        return vars(state) | later
    except ConfigError as error:
        at_fault = "" if str(error).startswith(f"{path}") else f"{path / STATE} is damaged: "
        raise ConfigError(f"{at_fault}{error}") from None
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is missing") from None
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path / STATE} cannot be read: {error}") from None


def _is_possible(state: RunState) -> bool:
    """Whether a run could have counted and logged so; all that reads a history relies on it."""
    counts = state.updates, state.step - state.updates, state.rows, state.tokens
    windows = state.open_losses, state.recent_losses, *state.open_metrics.values()
    figures = [r[name] for r in state.log_history for name in r.keys() - {"skipped", "rows"}]
    are_whole = all(state.open_metrics.values()) and max(map(len, windows)) <= state.step
    are_whole = are_whole and min(*counts, state.skipped_in_a_row) >= 0
    are_whole = are_whole and all(isinstance(figure, (int, float)) for figure in figures)
    return are_whole and all(0 <= record["step"] <= state.step for record in state.log_history)


def load_tensors(
    path: Path, model: LlamaForCausalLM, optimizer: AdamW, updates: int | None = None
) -> None:
    """Puts a checkpoint's weights back, bit for bit; its files were hashed before (`read_state`).

    After so many `updates` its moments, too.
    """

    def whole(file: str, form: str) -> mx.array:
        tensors, shapes = load_file(path / file), optimizer.shapes.items()
        parts = (_checked(tensors, form.format(name), shape) for name, shape in shapes)
        return mx.array(np.concatenate([part.reshape(-1) for part in parts]))

    with reading(path, ConfigError):
        # Adapters of PiSSA and OLoRA have twice the rank, and what is trained is the first half.
        optimizer.weights = whole("adapter_model.safetensors", "base_model.model.{}")
        if updates is not None:
            for theirs, ours in MOMENTS.items():
                setattr(optimizer, ours, whole("optimizer.safetensors", f"{{}}.{theirs}"))
            optimizer.step = updates
        model.update(optimizer.tree())


def _checked(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor, or its first part of this shape; a ValueError if no run has such numbers."""
    array = tensors[name][tuple(slice(n) for n in shape)]
    least = 0 if name.endswith(".exp_avg_sq") else -math.inf
    are_numbers = bool((array >= least).all() and np.isfinite(array).all())
    if array.dtype != np.float32 or array.shape != shape or not are_numbers:
        raise ValueError(f"{name} is not what a run keeps in it")
    return array
