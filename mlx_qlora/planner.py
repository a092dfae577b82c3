"""What a run will need, before it starts: bytes by part, how it will be computed, and how fast.

The figures come from the headers of the model's files and from the config; no weight is loaded.
The peak is the base plus the larger of two moments: the backward's beginning, when all that the
forward kept is there, and the optimiser's update. `benchmarks/memory.py` compares with what a run
then takes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.adapters.load import read_adapter_config
from mlx_qlora.config import RunConfig
from mlx_qlora.data.batches import padded_width
from mlx_qlora.data.examples import Examples
from mlx_qlora.estimates import (
    base_bytes,
    bytes_read,
    documents_of,
    flops_per_token,
    itemsize_of,
    longest_context,
    trainable,
)
from mlx_qlora.machines import Machine, machine, this_machine
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.weights import Checkpoint, open_checkpoint
from mlx_qlora.scaling import Scaling, check_processes
from mlx_qlora.train.memory import (
    AT_ONCE,
    EXPONENTIALS,
    LAYER,
    MLP,
    Schedule,
    activation_bytes,
    adapter_bytes,
    budget_for,
    check_recompute,
    schedule,
    step_bytes,
    update_bytes,
)

LEVEL_NAMES = {EXPONENTIALS: "exponentials", MLP: "MLP", LAYER: "whole layers"}


@dataclass(frozen=True)
class Plan:
    """Predicted peak memory of a run, by part, in bytes, and how it will be computed.

    Attributes:
        parts: name -> bytes; their sum is `total_bytes`.
        memory_bytes: what the machine can give.
        machine: its name.
        trainable: how many numbers are trained.
        schedule: how a micro-batch is computed.
        longest_context: the longest document that could be trained, everything recomputed.
        tokens_per_second: to be expected, from the machine's matmul rate.
        advice: what to change, if it does not fit.
        scaling: of several processes, if their number is known.
    """

    parts: dict[str, int]
    memory_bytes: int
    machine: str
    trainable: int
    schedule: Schedule
    longest_context: int
    tokens_per_second: float
    advice: str
    scaling: Scaling | None = None

    @property
    def total_bytes(self) -> int:
        """The predicted peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the prediction stays within the machine's memory."""
        return self.total_bytes <= self.memory_bytes

    @property
    def recomputed_layers(self) -> int:
        """Layers of which the backward computes matmuls again."""
        return sum(level >= MLP for level in self.schedule.levels)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it; sizes in bytes."""
        return {
            "parts": self.parts,
            "total_bytes": self.total_bytes,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "machine": self.machine,
            "trainable_parameters": self.trainable,
            "recomputed_layers": self.recomputed_layers,
            "waves": self.schedule.waves,
            "longest_context": self.longest_context,
            "tokens_per_second": self.tokens_per_second,
            "advice": self.advice,
            "scaling": self.scaling and self.scaling.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{name:<22}{size / 1e9:8.2f} GB" for name, size in self.parts.items()]
        lines.append(f"{'predicted peak':<22}{self.total_bytes / 1e9:8.2f} GB")
        lines.append(f"{'memory':<22}{self.memory_bytes / 1e9:8.2f} GB, {self.machine}")
        lines.append(f"{'trainable parameters':<22}{self.trainable:,}")
        lines.append(f"{'recomputed':<22}{self._recomputed()}")
        if self.schedule.waves > 1:
            lines.append(f"{'micro-batch':<22}computed in {self.schedule.waves} parts")
        lines.append(f"{'longest context':<22}{self.longest_context:,} tokens")
        lines.append(f"{'expected speed':<22}about {self.tokens_per_second:,.0f} tokens/s")
        if self.scaling is not None:
            lines.append(str(self.scaling))
        return "\n".join([*lines, self.advice] if self.advice else lines)

    def _recomputed(self) -> str:
        levels = self.schedule.levels
        counts = {level: levels.count(level) for level in LEVEL_NAMES}
        shown = [f"{LEVEL_NAMES[level]} of {n} layers" for level, n in counts.items() if n]
        return ", ".join(shown) or "nothing"


def plan(
    source: str,
    config: RunConfig | None = None,
    machine_name: str | None = None,
    processes: int | None = None,
) -> Plan:
    """Predicts what fine-tuning a model with this config needs.

    Args:
        source: as for `load`. Of a hub repository that is not in the cache, only the headers of
            its weights are fetched.
        config: of the run; the defaults if not given.
        machine_name: another machine than this one, as CHIP-GB, for example `m4-max-64`.
        processes: how many train together, each on a machine of its own; a plan of one process
            says nothing about others if it is not given.

    Raises:
        SourceError: the source cannot be found or fetched.
        WeightsError: its files are damaged or of an unsupported architecture.
        ConfigError: a target that matches nothing, an unknown machine, or a wrong number of
            processes.
    """
    check_processes(processes)
    where = machine(machine_name)
    config = settled(config or RunConfig(), where=where)
    checkpoint = open_checkpoint(resolve(source, config.model.revision, weights=False))
    return plan_checkpoint(checkpoint, config, where=where, processes=processes)


def settled(
    config: RunConfig, examples: Examples | None = None, where: Machine | None = None
) -> RunConfig:
    """The config with a number of rows, where it leaves that to the machine.

    More than keeps the device busy would gain no speed, and take longer to stop. Memory is no
    matter here: a micro-batch that is too large is computed in parts anyway.
    """
    longest = config.data.max_length
    if examples is not None:
        longest = min(longest, int(examples.lengths.max()))
        longest = longest if config.data.packing else int(examples.lengths.mean())
    most = AT_ONCE[(where or this_machine()).device] // max(longest, 1)
    return dataclasses.replace(config, training=config.training.at_once(most))


def plan_checkpoint(
    checkpoint: Checkpoint,
    config: RunConfig,
    examples: Examples | None = None,
    where: Machine | None = None,
    processes: int | None = None,
) -> Plan:
    """The plan for opened files, and for the examples of a run if they are known."""
    where = where or this_machine()
    config = settled(config, examples, where)
    llama = LlamaConfig.from_hf(checkpoint.config)
    model = LlamaForCausalLM(llama)  # lazy zeros: shapes without memory
    itemsize = itemsize_of(config, where)
    base, resident = base_bytes(model, checkpoint, config, where)
    adapter = config.model.adapter
    lora = read_adapter_config(Path(adapter).expanduser()) if adapter else config.lora
    trained = trainable(model, lora)

    training = config.training
    levels = check_recompute(training.recompute, llama.num_hidden_layers)
    largest, usual, supervised = documents_of(config, examples)
    standing = base + resident + adapter_bytes(trained)

    def scheduled(lengths: list[int]) -> Schedule:
        budget = budget_for(llama, lengths, itemsize, standing, where)
        return schedule(llama, lengths, itemsize, levels, budget, where)

    how = scheduled(largest)
    kept, work = activation_bytes(llama, how, largest, itemsize, where)
    accumulation = training.gradient_accumulation_steps
    step = step_bytes(trained, how.waves, accumulation > 1)
    usually, tokens = scheduled(usual), sum(usual)
    flops = tokens * flops_per_token(llama, usually.levels, usual, supervised)
    read = usually.waves * bytes_read(llama, usually.levels, itemsize)
    seconds = where.seconds(flops, read)  # of a micro-batch
    of_step = tokens * accumulation, seconds * accumulation
    scaling = Scaling(processes, trained, *of_step) if processes else None
    sums = scaling.sums_bytes if scaling else 0
    update = update_bytes(trained, where)
    parts = {"base weights": base} | ({"dequantised copy": resident} if resident else {})
    parts["adapter and AdamW"] = adapter_bytes(trained)
    backward = {"gradients": step, "activations": kept, "working arrays": work}
    backward |= {"sums under way": sums} if sums else {}
    parts |= backward if sum(backward.values()) >= update else {"optimiser's update": update}
    dense = config.model.bits is None and not checkpoint.packing
    longest = longest_context(llama, itemsize, standing + step + sums, where)
    fits = sum(parts.values()) <= where.working_set_bytes
    return Plan(
        parts,
        where.working_set_bytes,
        where.name,
        trained,
        how,
        longest,
        tokens / seconds,
        "" if fits else _advice(parts, dense, how.levels, longest, max(largest)),
        scaling,
    )


def _advice(
    parts: dict[str, int], dense: bool, levels: list[int], longest: int, document: int
) -> str:
    """What to change; `longest` is the longest context, `document` the longest there is."""
    smaller = f"{'quantise with model.bits=4, or ' * dense}choose a smaller model"
    remedies = {
        "activations": "",
        "working arrays": "",
        "base weights": smaller,
        "dequantised copy": "set model.frozen_matmul=dequantize",
    }
    largest = max(parts, key=lambda name: parts[name])
    remedy = remedies.get(largest, "lower lora.r")
    # Nothing of a micro-batch is in memory while the optimiser's update is at its peak.
    less = "" if "optimiser's update" in parts else _less_at_once(levels, longest, document)
    told = ", or ".join(filter(None, (remedy, less))) or smaller
    return f"This will not fit. Largest part: {largest}; {told}."


def _less_at_once(levels: list[int], longest: int, document: int) -> str:
    """How a micro-batch keeps less in memory; nothing where no document of any use would fit."""
    if not longest:
        return ""
    fields = []
    if any(level != LAYER for level in levels):
        fields.append("training.gradient_checkpointing=true")
    if longest < document:
        width = next(n for n in range(longest, 0, -64) if padded_width(n) <= longest)
        fields.append(f"data.max_length={width}")
    if fields:
        return f"set {' and '.join(fields)}"
    return "lower training.per_device_train_batch_size"
