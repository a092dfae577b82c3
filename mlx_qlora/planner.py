"""What a run will need, before it starts: predicted bytes by part, and what to change to fit.

The figures come from the headers of the model's files and from the config; no weight is loaded.
"""

from dataclasses import dataclass
from pathlib import Path

from mlx_qlora import backend
from mlx_qlora.adapters.peft import read_peft_config
from mlx_qlora.config import RunConfig
from mlx_qlora.data.batches import packed_width, padded_width
from mlx_qlora.data.examples import Examples
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, trainable_count
from mlx_qlora.model.quantize import FrozenMatrix
from mlx_qlora.model.weights import Checkpoint, open_checkpoint
from mlx_qlora.train.memory import NOTHING, check_recompute, kept_bytes, schedule

FLOAT32 = 4


@dataclass(frozen=True)
class Plan:
    """Predicted peak memory of a run, by part, in bytes.

    Attributes:
        parts: name -> bytes; their sum is `total_bytes`.
        memory_bytes: what the machine can give.
        trainable: how many numbers are trained.
        recomputed_layers: how many layers are computed again in the backward.
        advice: what to change, if it does not fit.
    """

    parts: dict[str, int]
    memory_bytes: int
    trainable: int
    recomputed_layers: int
    advice: str

    @property
    def total_bytes(self) -> int:
        """The predicted peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the prediction stays within the machine's memory."""
        return self.total_bytes <= self.memory_bytes

    def __str__(self) -> str:
        lines = [f"{name:<22}{size / 1e9:8.2f} GB" for name, size in self.parts.items()]
        lines.append(f"{'predicted peak':<22}{self.total_bytes / 1e9:8.2f} GB")
        lines.append(f"{'this machine has':<22}{self.memory_bytes / 1e9:8.2f} GB")
        lines.append(f"trainable parameters  {self.trainable:,}")
        return "\n".join([*lines, self.advice] if self.advice else lines)


def plan(source: str, config: RunConfig | None = None) -> Plan:
    """Predicts what fine-tuning a model with this config needs.

    Args:
        source: as for `load`. A hub repository is fetched if it is not in the cache yet.
        config: of the run; the defaults if not given.

    Raises:
        SourceError: the source cannot be found or fetched.
        WeightsError: its files are damaged or of an unsupported architecture.
        ConfigError: a target that matches nothing.
    """
    config = config or RunConfig()
    return plan_checkpoint(open_checkpoint(resolve(source, config.model.revision)), config)


def plan_checkpoint(
    checkpoint: Checkpoint, config: RunConfig, examples: Examples | None = None
) -> Plan:
    """The plan for opened files, and for the examples of a run if they are known."""
    llama = LlamaConfig.from_hf(checkpoint.config)
    model = LlamaForCausalLM(llama)  # lazy zeros: shapes without memory
    base, resident = _base_bytes(model, checkpoint, config)
    adapter = config.model.adapter
    lora = read_peft_config(Path(adapter).expanduser()) if adapter else config.lora
    trainable = _trainable(model, lora)

    training = config.training
    T = _width(config, examples)
    tokens = training.per_device_train_batch_size * T
    itemsize = backend.compute_dtype(config.model.dtype).size
    levels = check_recompute(training.recompute, llama.num_hidden_layers)
    lengths = [T] * training.per_device_train_batch_size
    how = schedule(llama, lengths, itemsize, levels, backend.facts()["working_set_bytes"] / 2)
    recomputed = sum(level != NOTHING for level in how.levels)
    kept = kept_bytes(llama, how.levels, lengths, how.waves, itemsize)
    inputs = 0
    supervised = tokens if config.data.train_on == "all" else tokens // 4
    parts = {"base weights": base}
    if resident:
        parts["dequantised copy"] = resident
    parts |= {
        "adapter": trainable * FLOAT32,
        "AdamW moments": 2 * trainable * FLOAT32,
        "gradients": 2 * trainable * FLOAT32,
        "activations": kept + inputs,
        "logits": 3 * supervised * llama.vocab_size * FLOAT32,
    }
    memory = backend.facts()["working_set_bytes"]
    advice = ""
    if sum(parts.values()) > memory:
        advice = _advice(parts)
    return Plan(parts, memory, trainable, recomputed, advice)


def _width(config: RunConfig, examples: Examples | None) -> int:
    """T, the positions of a row."""
    if examples is None:
        return padded_width(config.data.max_length - 1)
    lengths = examples.lengths
    if not config.data.packing:
        return padded_width(int(lengths.max()) - 1)
    most = max(config.data.max_length, int(lengths.max()))
    return packed_width(lengths, config.training.per_device_train_batch_size, most)


def _base_bytes(
    model: LlamaForCausalLM, checkpoint: Checkpoint, config: RunConfig
) -> tuple[int, int]:
    """Bytes of the frozen weights as they will be kept, and of dequantised copies of them."""
    itemsize = backend.compute_dtype(config.model.dtype).size
    keeps_copy = backend.frozen_matmul(config.model.frozen_matmul) == "resident"
    quantize = config.model.quantize()
    base = resident = 0
    for path, module in model.named_modules():
        if not isinstance(module, FrozenMatrix):
            continue
        quant = checkpoint.packing.get(path) or quantize
        size = module.weight.size
        if quant is None:
            base += size * itemsize
            continue
        scale_bytes = 2 * itemsize if quant.mode == "affine" else 1
        base += size * quant.bits // 8 + size // quant.group_size * scale_bytes
        resident += size * itemsize if keeps_copy else 0
    return base, resident


def _trainable(model: LlamaForCausalLM, lora: LoraConfig) -> int:
    try:
        return trainable_count(add_lora(model, lora))
    except ConfigError as error:
        raise ConfigError(f"the plan cannot be made: {error}") from None


def _advice(parts: dict[str, int]) -> str:
    largest = max(parts, key=lambda name: parts[name])
    remedies = {
        "activations": "lower training.per_device_train_batch_size or data.max_length, or set "
        "training.gradient_checkpointing=true",
        "logits": "lower training.per_device_train_batch_size or data.max_length",
        "base weights": "quantise with model.bits=4, or choose a smaller model",
        "dequantised copy": "set model.frozen_matmul=dequantize",
    }
    remedy = remedies.get(largest, "lower lora.r")
    return f"This will not fit. Largest part: {largest}; {remedy}."
