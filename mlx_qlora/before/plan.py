"""What a run will need, before it starts: bytes by part, how it will be computed, and how fast.

By the files' headers and the config. The peak is the base plus the larger of two moments: the
backward's beginning, when all that the forward kept is there, and the optimiser's update.
`benchmarks/memory.py` compares with what a run then takes.
"""

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mlx_qlora import device
from mlx_qlora.adapters.options import for_this_model
from mlx_qlora.adapters.push import render
from mlx_qlora.config import RunConfig, settle
from mlx_qlora.data.batches import padded_width
from mlx_qlora.data.examples import Examples
from mlx_qlora.device import Machine, machine, this_machine
from mlx_qlora.distributed import processes as processes_of_run
from mlx_qlora.errors import ConfigError, duration
from mlx_qlora.folders import user_path
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, target_paths
from mlx_qlora.model.weights import Checkpoint, frozen_bytes, packed_size
from mlx_qlora.run import Inputs, open_files
from mlx_qlora.train import memory
from mlx_qlora.train.allreduce import MOST_BUCKETS, SMALLEST_BUCKET
from mlx_qlora.train.config import RunLength, batches_of

FULL = 0.85  # of the memory: the rest is for other programs
FORWARD = 0.5  # of a step's time that scoring the same rows takes: frozen weights have no gradient
# Objectives whose every example is scored once before the run, and forwards of one more model or
# more examples in each step.
REFERRED, FORWARDS_OF_STEP = ("dpo", "kto"), {"kto": 2}
# Of a layer's elementwise operations, counted in the graph of a step on Metal (docs/log.md): how
# often they move a number of the hidden states, q, k and v, one of the MLP's, and one that dropout
# may drop; and the forward's share of it.
HIDDEN_MOVED, MLP_MOVED, DROPPED_MOVED, FORWARD_MOVED = 19, 54.5, 7, 0.36

# ---- estimates -----------------------------------------------------------------------------------


def flops_per_token(
    llama: LlamaConfig, levels: list[int], lengths: list[int], supervised: float
) -> float:
    """Multiplications and additions of a step, per position; the head at supervised ones alone.

    Two for each weight forward and two back, two more where the backward computes it again.
    """
    attention, mlp = weights_of_layer(llama)
    typical = sum(n * n for n in lengths) / max(sum(lengths), 1)
    # q @ k and p @ v, half of T each
    scores = llama.num_attention_heads * llama.head_dim * typical
    total = 4.0 * llama.vocab_size * llama.hidden_size * supervised
    for level in levels:
        total += 4 * (attention + mlp) + 2 * scores * 3.5
        total += 2 * (2 / 3) * mlp if level >= memory.MLP else 0
        total += 2 * attention + 2 * scores if level == memory.LAYER else 0
    return total


def bytes_read(llama: LlamaConfig, levels: list[int], itemsize: int) -> int:
    """Bytes of dense weights that a micro-batch takes from memory, forward, back and recomputed."""
    of_layer = sum(weights_of_layer(llama))
    passes = sum(3 if level == memory.LAYER else 2 for level in levels)
    return itemsize * (passes * of_layer + 2 * llama.vocab_size * llama.hidden_size)


def elementwise_bytes(llama: LlamaConfig, levels: list[int], itemsize: int, dropout: bool) -> float:
    """Bytes that all but the matmuls of a step read and write in the layers, per position."""
    D, F, H = llama.hidden_size, llama.intermediate_size, llama.num_attention_heads
    q, k = H * llama.head_dim, llama.num_key_value_heads * llama.head_dim
    mlp = MLP_MOVED * F
    layer = mlp + HIDDEN_MOVED * (D + q + 2 * k) + dropout * DROPPED_MOVED * (5 * D + q + F)
    again = {memory.MLP: FORWARD_MOVED * mlp, memory.LAYER: FORWARD_MOVED * layer}
    return itemsize * sum(layer + again.get(level, 0) for level in levels)


def weights_of_layer(llama: LlamaConfig) -> tuple[int, int]:
    """Frozen weights in the linears of one layer's attention, and in those of its MLP."""
    D, F = llama.hidden_size, llama.intermediate_size
    heads = 2 * llama.num_attention_heads + 2 * llama.num_key_value_heads
    return D * llama.head_dim * heads, 3 * D * F


def documents_of(
    config: RunConfig, examples: Examples | None
) -> tuple[list[int], list[int], float]:
    """Lengths of the largest and of a usual micro-batch's documents, and the share of supervision.

    The first decides memory, the second speed.
    """
    rows = config.training.rows
    supervised = 1.0 if config.data.train_on == "all" else 0.25
    if examples is None:
        full = [padded_width(config.data.max_length - 1)] * rows
        return full, full, supervised
    documents, largest = examples.document_lengths, memory.largest_micro_batch(examples, rows)
    usual = np.sort(np.repeat(documents[:, 1] - 1, documents[:, 0]))
    # The means of equal parts, as many as a micro-batch has documents, have the mean of all.
    parts = np.array_split(usual, min(round(rows * len(usual) / len(documents)), len(usual)))
    return largest, [round(float(part.mean())) for part in parts], supervised


def trainable(model: LlamaForCausalLM, lora: LoraConfig) -> int:
    """How many numbers a run trains; the model may be one without weights."""
    modules, total = dict(model.named_modules()), 0
    for path in target_paths(model, lora):
        rows, columns = modules[path].shape
        total += lora.rank_of(path) * (rows + columns) + (rows if lora.use_dora else 0)
    return total


def longest_context(llama: LlamaConfig, itemsize: int, standing: int, where: Machine) -> int:
    """The longest document that the model has positions for and that fits; a multiple of 64.

    Alone, and with everything recomputed. A layer's attention to it is a single kernel, which must
    end before the system's watchdog does that.
    """
    all_layers = memory.Schedule(1, [memory.LAYER] * llama.num_hidden_layers)
    per_pair = 2 * llama.num_attention_heads * llama.head_dim  # q @ k and p @ v, half of T each
    in_time = math.sqrt(where.device.dispatch_seconds * where.matmul_rate / per_pair)

    def need(length: int) -> int:
        alone = memory.Footprint(llama, [length], itemsize, where)
        return standing + sum(alone.highest(all_layers))

    lengths = range(64, int(min(llama.max_position_embeddings, in_time)) + 1, 64)
    return 64 * bisect_right(lengths, where.working_set_bytes, key=need)


# ---- several processes ---------------------------------------------------------------------------

SMALL_SUMS = 2  # messages besides the buckets: the counts of a step, and its loss


@dataclass(frozen=True)
class Scaling:
    """What a run of N processes adds to the plan of one; most figures are of an optimiser step."""

    processes: int
    # Of memory: the buckets and their sums are both there until the end (measured).
    added_bytes: int
    handed_bytes: int  # by each process to the collectives; some 52 bytes of counts besides
    wire_bytes: int  # that a process sends to its neighbour, without the headers of TCP
    messages: int  # sums, at most
    step_tokens: int  # of all processes
    compute_seconds: float

    @classmethod
    def of(cls, processes: int, trained: int, tokens: int, seconds: float) -> "Scaling":
        """By how many numbers are trained, and one process's tokens and seconds of a step."""
        handed = trained * memory.FLOAT32 if processes > 1 else 0
        wire = 2 * (processes - 1) * handed // processes
        bucket = max(SMALLEST_BUCKET, handed // MOST_BUCKETS)
        messages = -(-handed // bucket) + SMALL_SUMS if handed else 0
        return cls(processes, 2 * handed, handed, wire, messages, processes * tokens, seconds)


# ---- the plan ------------------------------------------------------------------------------------

LEVEL_NAMES = {memory.EXPONENTIALS: "exponentials", memory.MLP: "MLP", memory.LAYER: "whole layers"}


@dataclass(frozen=True)
class Plan:
    """Predicted peak memory of a run, and how it will be computed."""

    parts: dict[str, int]  # name -> bytes
    memory_bytes: int  # what the machine can give
    machine: str
    trainable: int
    schedule: memory.Schedule  # of a micro-batch
    longest_context: int  # tokens of the longest document that fits, everything recomputed
    tokens_per_second: float  # to be expected, from the machine's matmul rate
    advice: str  # what to change, if it does not fit
    scaling: Scaling | None = None  # of several processes, if their number is known
    process_bytes: int = 0  # the predicted peak of the process; 0: a GPU has a memory of its own
    cache_bytes: int = 0  # of freed buffers, which are kept beside the peak while there is room
    run_seconds: float | None = None  # of the whole run, validations included; None without rows
    residency: str = "resident"  # of the frozen weights, or streamed
    # Both, where the user leaves it to the plan: peak, process, whether it fits, tokens/s.
    residencies: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: str = ""  # of a micro-batch, in words, where no rows are known

    @property
    def total_bytes(self) -> int:
        """The predicted peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the prediction stays within the machine's memory."""
        return self.total_bytes <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it; sizes in bytes."""
        values = asdict(self)
        del values["schedule"], values["trainable"]
        return values | {
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "trainable_parameters": self.trainable,
            "recomputed_layers": sum(level >= memory.MLP for level in self.schedule.levels),
            "waves": self.schedule.n_chunks,
        }

    def __str__(self) -> str:
        values = {"plan": self, "levels": LEVEL_NAMES, "duration": duration}
        return render("before/plan.txt.jinja", **values).rstrip("\n")


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
        machine_name: another machine than this one, as CHIP-GB, for example `m4-max-64`.
        processes: how many train together, each on a machine of its own; a plan of one process
            says nothing about others if it is not given.

    Raises:
        SourceError: the source cannot be found or fetched.
        WeightsError: its files are damaged or of an unsupported architecture.
        ConfigError: a target that matches nothing, an unknown machine, or a wrong number of
            processes.
    """
    if processes is not None and (type(processes) is not int or processes < 1):
        raise ConfigError(
            f"--processes must be a whole number of at least 1; got {processes!r}; "
            "pass as many as `mlx.launch` will start"
        )
    config = config or RunConfig()
    config = replace(config, model=replace(config.model, source=source))
    checkpoint = open_files(config, weights=False)
    return plan_checkpoint(checkpoint, config, None, machine(machine_name), processes)


def plan_inputs(
    inputs: Inputs, machine_name: str | None = None, processes: int | None = None
) -> Plan:
    """The plan of a run whose rows are known; `machine_name` and `processes` as for `plan`."""
    assert inputs.checkpoint is not None
    n = processes or processes_of_run().size
    config = settle(inputs.config, inputs.llama, inputs.train, n)
    several = processes or (n if n > 1 else None)
    where = machine(machine_name)
    predicted = plan_checkpoint(inputs.checkpoint, config, inputs.train, where, several)
    training, checkpointing = config.training, config.checkpointing
    batches = batches_of(inputs.train, config.data, training, n)
    length = RunLength.of(training, batches)
    n_validations = -(-length.steps // int(checkpointing.eval_steps))
    before = FORWARD * min(length.passes, 1) * (training.objective in REFERRED)
    times = {
        inputs.train: length.passes + before,
        inputs.validation: n_validations * FORWARD,
        inputs.test: 3 * FORWARD,  # before, after, and how far apart both are
    }
    work = sum(rows.positions * times_read for rows, times_read in times.items() if rows)
    return replace(predicted, run_seconds=work / (predicted.tokens_per_second * n))


def plan_checkpoint(
    checkpoint: Checkpoint,
    config: RunConfig,
    examples: Examples | None = None,
    where: Machine | None = None,
    processes: int | None = None,
) -> Plan:
    """The plan for opened files and for rows, if they are known; full memory streams weights."""
    model, rest = config.model, (examples, where or this_machine(), processes)
    as_asked = _plan_as_it_is(checkpoint, config, *rest)
    is_full = as_asked.total_bytes > FULL * as_asked.memory_bytes
    if model.residency == "streamed" or (model.residency == "resident" and not is_full):
        return as_asked
    way = "auto" if model.frozen_matmul == "resident" else model.frozen_matmul
    model = replace(model, residency="streamed", frozen_matmul=way)
    streamed = _plan_as_it_is(checkpoint, replace(config, model=model), *rest)
    names = "total_bytes", "process_bytes", "fits", "tokens_per_second"
    both = {p.residency: {name: getattr(p, name) for name in names} for p in (as_asked, streamed)}
    if config.model.residency == "auto":
        helps = is_full and streamed.total_bytes < as_asked.total_bytes
        return replace(streamed if helps else as_asked, residencies=both)
    if as_asked.fits or not streamed.fits:
        return as_asked
    need = f"streamed, the run takes {streamed.total_bytes / 1e9:.2f} GB"
    return replace(as_asked, advice=f"This will not fit: {need}; set model.residency=auto.")


def _plan_as_it_is(
    checkpoint: Checkpoint,
    config: RunConfig,
    examples: Examples | None,
    where: Machine,
    processes: int | None,
) -> Plan:
    llama = LlamaConfig.from_hf(checkpoint.config)
    config = settle(config, llama, examples, processes)
    model = LlamaForCausalLM(llama)  # lazy zeros: shapes without memory
    with device.use(where.device):
        itemsize = device.compute_dtype(config.model.dtype).size
    quantize = config.model.quantize()
    streamed, n_layers = config.model.residency == "streamed", llama.num_hidden_layers
    # Bytes of the frozen weights as they are packed (streamed, of two layers), and of what is made
    # of them: a dense copy of all, or of the largest matrix while it is multiplied.
    base = frozen_bytes(model, checkpoint, quantize, itemsize, streamed)
    dense_bytes = itemsize * packed_size(model, checkpoint, quantize)
    way = device.frozen_matmul(config.model.frozen_matmul, dense_bytes, where, streamed)
    copy = dense_bytes if way == "resident" else 0
    copy_for_now = itemsize * weights_of_layer(llama)[1] // 3
    copy_for_now *= way == "dequantize" and dense_bytes > 0
    adapter = config.model.adapter
    lora = for_this_model(model, user_path(adapter))[0] if adapter else config.lora
    trained = trainable(model, lora)

    training = config.training
    levels = memory.check_recompute(training.recompute, n_layers)
    largest, usual, supervised = documents_of(config, examples)
    standing = base + copy + memory.adapter_bytes(trained)
    has_base = training.kl_weight > 0
    sizes = itemsize, where, streamed, copy_for_now > 0, has_base
    batches = [memory.Footprint(llama, lengths, *sizes) for lengths in (largest, usual)]
    chosen, usually = (b.schedule(levels, b.budget(standing), trained) for b in batches)
    kept, work = batches[0].highest(chosen)
    accumulation = training.accumulation
    step = memory.step_bytes(trained, chosen.n_chunks, accumulation > 1)
    tokens = sum(usual)
    flops = tokens * flops_per_token(llama, usually.levels, usual, supervised)
    read = usually.n_chunks * bytes_read(llama, usually.levels, itemsize)
    moved = tokens * elementwise_bytes(llama, usually.levels, itemsize, lora.lora_dropout > 0)
    seconds = where.seconds(flops, read, moved)  # of a micro-batch
    from_disk = base * n_layers // min(n_layers, 2) if streamed else 0  # meanwhile, each way
    seconds = max(seconds, usually.n_chunks * 2 * from_disk / device.DISK)
    seconds *= 1 + FORWARD * FORWARDS_OF_STEP.get(training.objective, int(has_base))
    of_step = tokens * accumulation, seconds * accumulation
    scaling = Scaling.of(processes, trained, *of_step) if processes else None
    sums = scaling.added_bytes if scaling else 0
    update = memory.update_bytes(trained, where)
    parts = {"base weights": base}
    parts |= {"dequantised copy": copy} if copy else {}
    parts["adapter and AdamW"] = memory.adapter_bytes(trained)
    backward = {"gradients": step, "activations": kept, "working arrays": work}
    backward |= {"all-reduce": sums} if sums else {}
    # Streamed, the next layer is not read before the widest matrices of this one are gone.
    in_use = max(0, copy_for_now - streamed * base // 2)
    backward |= {"dequantised in use": in_use} if in_use else {}
    parts |= backward if sum(backward.values()) >= update else {"optimiser's update": update}
    dense = config.model.bits is None and not checkpoint.packing
    longest = longest_context(llama, itemsize, standing + step + sums, where)
    limit, speed, advice = where.working_set_bytes, tokens / seconds, ""
    total = sum(parts.values())
    cache = min(where.cache_bytes(kept + work), device.SMALL_CACHE if streamed else limit)
    cache = max(0, min(cache, limit - total))  # MLX gives it back before memory ends
    if total > limit:
        advice = _advice(parts, dense, chosen.levels, longest, max(largest))
    # Fitted (benchmarks/memory.py): where most is in use, half of the cache is.
    in_turn = streamed or copy_for_now > 0
    besides = device.PROCESS_BYTES + device.TOKEN_BYTES * llama.vocab_size
    process = besides + device.HEAP_BYTES * in_turn + total + cache // 2
    process *= where.device.kind != "cuda"
    about = trained, chosen, longest, speed, advice, scaling, process, cache
    plan = Plan(parts, limit, where.name, *about)
    if examples is None:
        each = f"each of {config.data.max_length:,} tokens (data.max_length); --data FILE for yours"
        plan = replace(plan, documents=f"{training.rows} in a micro-batch, {each}")
    return replace(plan, residency="streamed") if streamed else plan


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
        "dequantised in use": smaller,
    }
    largest = max(parts, key=lambda name: parts[name])
    remedy = remedies.get(largest, "lower lora.r")
    # Nothing of a micro-batch is in memory while the optimiser's update is at its peak.
    less = "" if "optimiser's update" in parts else _less_at_once(levels, longest, document)
    advice = ", or ".join(filter(None, (remedy, less))) or smaller
    return f"This will not fit. Largest part: {largest}; {advice}."


def _less_at_once(levels: list[int], longest: int, document: int) -> str:
    """How a micro-batch keeps less in memory; nothing where no document of any use would fit."""
    if not longest:
        return ""
    fields = []
    if any(level != memory.LAYER for level in levels):
        fields.append("training.gradient_checkpointing=true")
    if longest < document:
        width = next(n for n in range(longest, 0, -64) if padded_width(n) <= longest)
        fields.append(f"data.max_length={width}")
    if fields:
        return f"set {' and '.join(fields)}"
    return "lower training.per_device_train_batch_size"
