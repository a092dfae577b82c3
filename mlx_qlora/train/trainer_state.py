"""`trainer_state.json`, which transformers and the tools around it read."""

import math
from pathlib import Path
from typing import Any

from mlx_qlora.data.batches import Batches
from mlx_qlora.train.checkpoint import CheckpointingConfig, RunState
from mlx_qlora.train.config import TrainingConfig
from mlx_qlora.train.history import best_eval

TRAIN_KEYS = ("loss", "grad_norm", "learning_rate", "epoch", "step")
EVAL_KEYS = ("eval_loss", "eval_runtime", "epoch", "step")


def trainer_state(
    state: RunState,
    training: TrainingConfig,
    checkpointing: CheckpointingConfig,
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
