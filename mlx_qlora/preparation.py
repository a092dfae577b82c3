"""A run that may begin: the model has its LoRA layers, and nothing about the run is in doubt."""

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora import backend
from mlx_qlora._version import __version__
from mlx_qlora.adapters.peft import original_base
from mlx_qlora.config import RunConfig
from mlx_qlora.data.examples import Examples
from mlx_qlora.inspection import check_lengths
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import add_lora, lora_layers
from mlx_qlora.opening import check_output
from mlx_qlora.processes import processes
from mlx_qlora.record import deciding_values, fingerprint_of
from mlx_qlora.source import ModelConfig
from mlx_qlora.train.checkpoint import RunState, checkpoint_to_resume
from mlx_qlora.train.tracking import require_trackers


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: nothing about it is in doubt, and nothing has been written.

    Attributes:
        config: with what the model itself says in the place of what the user left out.
        base: the original Hugging Face repository.
        state: of a run that has not begun, with the hashes of what decides the weights.
        resumed: the checkpoint to go on from, or None.
        damaged: what is wrong with newer checkpoints, which are passed over.
    """

    config: RunConfig
    base: str
    state: RunState
    resumed: Path | None
    damaged: list[str]


def prepare(
    model: LlamaForCausalLM, examples: Examples, validation: Examples | None, config: RunConfig
) -> Prepared:
    """Gives the model its LoRA layers, and checks what only now can be checked.

    Raises:
        AdapterError: nothing says what the original base is.
        ConfigError: a target that matches nothing, rows longer than the model's context, a
            checkpoint of another run to resume, or an output folder with files of others that a
            run would overwrite.
    """
    if processes().is_first:
        check_output(Path(config.checkpointing.output_dir))
        require_trackers([*config.logging.report_to])
    check_lengths(model.config, examples, validation)
    source = getattr(model, "source", None)
    base = config.model.base_model_name_or_path or original_base(source)
    if not lora_layers(model):
        add_lora(model, config.lora, config.training.seed)
    else:  # the record shall say what is trained, and that is the attached adapter
        # An adapter's file does not carry LoRA+'s ratio, which is of the training alone.
        ratio = config.lora.loraplus_lr_ratio
        model.lora_config = dataclasses.replace(model.lora_config, loraplus_lr_ratio=ratio)
        config = dataclasses.replace(config, lora=model.lora_config)
    if config.model.source is None and source is not None:
        config = dataclasses.replace(config, model=as_loaded(config.model, model))

    decides = deciding_values(config)
    fingerprint = fingerprint_of(model, examples, validation, config, base)
    state = RunState(fingerprint=fingerprint, config=decides)
    if not processes().is_first:  # which need not see the output folder
        return Prepared(config, base, state, None, [])
    resumed, damaged = checkpoint_to_resume(config.checkpointing, state)
    return Prepared(config, base, state, resumed, damaged)


def as_loaded(chosen: ModelConfig, model: LlamaForCausalLM) -> ModelConfig:
    """With what `load` was told of a model: the record shall open that one, and no other."""
    files, quant, dtype = model.source, model.quantized_to, model.model.norm.weight.dtype
    packing = {"bits": None} if quant is None else dataclasses.asdict(quant)
    auto = dtype == backend.compute_dtype("auto")
    return dataclasses.replace(
        chosen,
        source=str(files.source),
        revision=files.revision,
        dtype="auto" if auto else str(dtype).rpartition(".")[2],
        **packing,
    )


def compared(
    model: LlamaForCausalLM, examples: Examples, validation: Examples | None, config: RunConfig
) -> Prepared:
    """`prepare` in every process of the run, which have to be alike.

    Raises:
        UserError: as `prepare`; or ProcessError, naming what differs and where.
    """
    everyone = processes()
    prepared = everyone.agree(lambda: prepare(model, examples, validation, config))
    everyone.must_equal(facts_of(prepared))
    return prepared


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """What all processes of a run must have alike: what they learn, and when they meet."""
    state, training = prepared.state, prepared.config.training
    fields = {f"{section}.{k}": v for section, of in state.config.items() for k, v in of.items()}
    meetings = dataclasses.asdict(prepared.config.checkpointing)
    for name in ("output_dir", "save_total_limit", "resume_from_checkpoint"):  # of the first alone
        del meetings[name]
    versions = {"mlx-qlora": __version__, "MLX": importlib.metadata.version("mlx")}
    return {
        **versions,
        "training.per_device_train_batch_size": training.rows,
        "training.gradient_accumulation_steps": training.gradient_accumulation_steps,
        "training.max_skipped_steps": training.max_skipped_steps,
        **{f"checkpointing.{name}": value for name, value in meetings.items()},
        **fields,
        "the hash of the rows": state.fingerprint["data"][:12],
        "the hash of the model": state.fingerprint["model"][:12],
    }
