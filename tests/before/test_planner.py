"""Plans made from headers alone, against what a model then really holds."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.models import make_hf_model, save_hf

import mlx_qlora as mq
from mlx_qlora import device
from mlx_qlora.before.plan import (
    FORWARD,
    Plan,
    elementwise_bytes,
    flops_per_token,
    plan,
    plan_checkpoint,
)
from mlx_qlora.config import RunConfig, build
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.device import Machine, machine, this_machine
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.weights import Checkpoint, load_model, open_checkpoint
from mlx_qlora.train.memory import LAYER, MLP, NOTHING, Footprint
from mlx_qlora.tree import flat

LLAMA = LlamaConfig(4096, 32, 32, 8, 128, 14336, 128256)  # 8B
LLAMA_1B = LlamaConfig(2048, 16, 32, 8, 64, 8192, 128256)
LLAMA_70B = LlamaConfig(8192, 80, 64, 8, 128, 28672, 128256)


@pytest.fixture(scope="module")
def checkpoint_files(tmp_path_factory):
    model = make_hf_model(hidden_size=256, intermediate_size=512, vocab_size=2048)
    folder = save_hf(model, tmp_path_factory.mktemp("plan") / "model")
    return ModelFiles(folder, str(folder), None, str(folder))


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("frozen_matmul", ["resident", "dequantize"])
def test_base_weights_are_predicted_to_the_byte_but_for_the_norms(
    checkpoint_files, bits, frozen_matmul, in_float32
):
    config = build({"model": {"bits": bits, "frozen_matmul": frozen_matmul}})
    predicted = plan_checkpoint(open_checkpoint(checkpoint_files), config)
    model = load_model(
        open_checkpoint(checkpoint_files), config.model.quantize(), mx.float32, frozen_matmul
    )
    held = sum(array.nbytes for array in flat(model.parameters()).values())
    held += sum(
        m._resident.nbytes for m in model.modules() if getattr(m, "_resident", None) is not None
    )
    promised = predicted.parts["base weights"] + predicted.parts.get("dequantised copy", 0)
    assert promised == pytest.approx(held, rel=0.01)
    assert ("dequantised copy" in predicted.parts) == (
        bits is not None and frozen_matmul == "resident"
    )


def test_llama_8b_counts_its_parameters_without_weights(checkpoint_files):
    assert plan_checkpoint(open_checkpoint(checkpoint_files), RunConfig()).trainable == 2 * 16 * (
        2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512)
    )


def small(bytes_: int, **other: Any) -> Machine:
    """A machine like this one, with less memory."""
    made = dataclasses.replace(this_machine(), name="small", working_set_bytes=bytes_, **other)
    vars(made)["flops"] = 1e11  # which is measured otherwise, and anew for each machine
    return made


@pytest.mark.cpu_route("its memory is chosen for what a CPU keeps of a layer in float32")
def test_what_does_not_fit_says_what_to_change(checkpoint_files):
    checkpoint = open_checkpoint(checkpoint_files)
    config = build({"training": {"gradient_checkpointing": False}, "data": {"max_length": 512}})
    predicted = plan_checkpoint(checkpoint, config, where=small(10_000_000))
    assert not predicted.fits
    assert "Largest part: activations; set training.gradient_checkpointing=true" in str(predicted)
    recomputed = build({"training": {"gradient_checkpointing": True}, "data": {"max_length": 512}})
    smaller = plan_checkpoint(checkpoint, recomputed, where=small(10_000_000))
    assert smaller.parts["activations"] < predicted.parts["activations"] / 4


@pytest.mark.parametrize("recompute", ["auto", True])
def test_a_context_that_is_too_long_is_told_one_that_fits(checkpoint_files, recompute):
    checkpoint, where = open_checkpoint(checkpoint_files), small(200 << 20)
    checkpoint.config["max_position_embeddings"] = 1 << 20
    training = {"gradient_checkpointing": recompute, "per_device_train_batch_size": 2}

    def planned(length: int) -> Plan:
        config = build({"training": training, "data": {"max_length": length}})
        return plan_checkpoint(checkpoint, config, where=where)

    too_long = planned(1 << 17)
    assert not too_long.fits and set(too_long.schedule.levels) == {LAYER}
    assert "gradient_checkpointing" not in too_long.advice, "that is what it does already"
    length = int(too_long.advice.partition("set data.max_length=")[2].rstrip("."))
    assert too_long.longest_context * 3 // 4 <= length <= too_long.longest_context
    assert planned(length).fits


def test_advice_names_what_helps_and_nothing_that_is_so_already(checkpoint_files):
    checkpoint = open_checkpoint(checkpoint_files)
    checkpoint.config["max_position_embeddings"] = 1 << 20

    def told(rows: int, length: int, memory: int) -> str:
        training = {"per_device_train_batch_size": rows, "gradient_checkpointing": True}
        config = build({"training": training, "data": {"max_length": length}})
        return plan_checkpoint(checkpoint, config, where=small(memory, cores=16)).advice

    alone = "Largest part: working arrays; lower training.per_device_train_batch_size."
    assert alone in told(256, 512, 64 << 20)
    assert told(1, 512, 1 << 20).endswith("choose a smaller model.")


@pytest.mark.cpu_route("its memory is chosen for what a CPU keeps of a layer in float32")
def test_auto_recomputes_more_the_less_memory_there_is(checkpoint_files):
    checkpoint = open_checkpoint(checkpoint_files)
    checkpoint.config["max_position_embeddings"] = 1 << 20
    config = build({"data": {"max_length": 2048}})
    plans = [plan_checkpoint(checkpoint, config, where=small(n << 20)) for n in (8000, 400, 200)]
    work = [sum(plan.schedule.levels) for plan in plans]
    assert work == sorted(work) and work[0] == 0 < work[-1]
    contexts = [plan.longest_context for plan in plans]
    assert contexts == sorted(contexts, reverse=True) and contexts[-1] < contexts[0]
    speeds = [plan.tokens_per_second for plan in plans]
    assert speeds[-1] < speeds[0]


def test_longest_context_fits_and_a_longer_one_does_not(checkpoint_files):
    checkpoint, where = open_checkpoint(checkpoint_files), small(400 << 20)
    assert plan_checkpoint(checkpoint, RunConfig(), where=where).longest_context == 512, "its own"
    checkpoint.config["max_position_embeddings"] = 1 << 20
    longest = plan_checkpoint(checkpoint, RunConfig(), where=where).longest_context
    alone = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    alone |= {"gradient_accumulation_steps": 1}

    def fits(T: int) -> bool:
        config = build({"training": alone, "data": {"max_length": T + 1}})
        return plan_checkpoint(checkpoint, config, where=where).fits

    assert fits(longest // 2048 * 2048) and not fits(longest + 16384)


@pytest.mark.parametrize(
    ("name", "kind", "gigabytes"),
    [
        ("m4-max-64", device.METAL, 51.5),
        ("M1-8", device.METAL, 5.7),
        ("Apple M1 Pro 16GB", device.METAL, 11.5),
        ("m4-max-64gb", device.METAL, 51.5),
        ("h100-80", device.CUDA, 81.6),
    ],
)
def test_machines_by_name(name, kind, gigabytes):
    found = machine(name)
    assert (found.device, found.device.compute_dtype) == (kind, mx.bfloat16)
    assert found.working_set_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert found.flops > 1e12


def test_a_cpu_waits_for_the_weights_of_a_micro_batch_and_a_gpu_does_not(monkeypatch):
    monkeypatch.setattr(device, "_measured_reading", lambda: 1e9)
    cpu, gpu = (small(1 << 30, device=kind) for kind in (device.CPU, device.CUDA))
    busy = [1e11 / (1e11 * each.device.matmul_share) for each in (cpu, gpu)]
    assert cpu.seconds(1e11, 500_000_000, 3e8) == pytest.approx(busy[0] + 0.5)
    assert gpu.seconds(1e11, 500_000_000, 3e8) == pytest.approx(busy[1] + 0.3)


def test_few_rows_are_expected_to_take_longer_on_a_cpu(checkpoint_files, monkeypatch):
    monkeypatch.setattr(device, "_measured_reading", lambda: 1e9)
    checkpoint = open_checkpoint(checkpoint_files)
    where = small(8 << 30, device=device.CPU)

    def seconds(rows: int, **training: bool) -> float:
        wanted = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, **training}
        config = build({"training": wanted, "data": {"max_length": 65}})
        return 64 * rows / plan_checkpoint(checkpoint, config, where=where).tokens_per_second

    one, two, three = (seconds(rows) for rows in (1, 2, 3))
    assert two - one == pytest.approx(three - two)  # what a row takes
    loaded = load_model(open_checkpoint(checkpoint_files), None, mx.float32)
    dense = sum(
        weight.size for path, weight in flat(loaded.parameters()).items() if "_proj" in path
    )
    head = loaded.config.vocab_size * loaded.config.hidden_size
    assert one - (two - one) == pytest.approx(2 * 4 * (dense + head) / 1e9)
    again = seconds(1, gradient_checkpointing=True) - seconds(2, gradient_checkpointing=True) / 2
    assert 2 * again == pytest.approx(4 * (3 * dense + 2 * head) / 1e9)


@pytest.mark.parametrize("name", ["m9-max-64", "m4-max-", "64", "m4 max 64 TB"])
def test_a_machine_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=r"--machine: .* is not CHIP-GB"):
        machine(name)


def test_a_chip_without_its_memory_is_told_how_to_write_it():
    with pytest.raises(ConfigError, match=r"did you mean m4-max-GB\?; chips: m1, "):
        machine("M4-max")
    assert {**device.APPLE, **device.NVIDIA}.keys() == device.BANDWIDTH.keys()


def test_flops_of_llama_8b_are_those_counted_by_hand():
    llama = LLAMA
    nothing = flops_per_token(llama, [NOTHING] * 32, [2048], 1.0)
    everything = flops_per_token(llama, [LAYER] * 32, [2048], 1.0)
    assert nothing == pytest.approx(32.2e9, rel=0.05)
    down_proj = 2 * 32 * 4096 * 14336  # is never computed again: nothing asks for its output
    assert everything == pytest.approx(46.7e9 - down_proj, rel=0.05)


def test_plan_by_source_shows_every_part_and_the_total(smollm2_files):
    predicted = plan("smollm2-135m")
    shown = str(predicted)
    for part in (*predicted.parts, "predicted peak", "this machine", "longest context"):
        assert part in shown
    assert "in a micro-batch, each of 2,048 tokens (data.max_length)" in shown
    assert predicted.trainable == 4_884_480
    assert predicted.total_bytes == sum(predicted.parts.values())
    assert mq.plan is plan


# ---- the rows of a run --------------------------------------------------------------------------


def rows_of(lengths: list[int]) -> Examples:
    """One more token than positions, as the last one is only a label."""
    tokens = [np.ones(n + 1, np.int32) for n in lengths]
    return Examples.of(Example(each, np.ones(len(each), bool)) for each in tokens)


def test_long_rows_among_many_short_ones_ask_for_memory_and_not_for_time(checkpoint_files):
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    config = build({"training": training, "data": {"max_length": 2048}})
    checkpoint, where = open_checkpoint(checkpoint_files), machine("m4-max-64")

    def planned(lengths: list[int]) -> Plan:
        return plan_checkpoint(checkpoint, config, rows_of(lengths), where, processes=4)

    mixed, long, short = (planned(n) for n in ([128] * 10_000 + [2047] * 16, [2047] * 8, [131] * 8))
    assert mixed.parts == long.parts and mixed.schedule == long.schedule
    assert mixed.tokens_per_second == pytest.approx(short.tokens_per_second, rel=0.01)
    assert mixed.scaling is not None and short.scaling is not None
    mean = (128 * 10_000 + 2047 * 16) / 10_016
    assert mixed.scaling.step_tokens == pytest.approx(4 * 8 * mean, rel=0.01)
    assert mixed.scaling.compute_seconds == pytest.approx(short.scaling.compute_seconds, rel=0.01)


# ---- GPUs ---------------------------------------------------------------------------------------


def weightless(llama: LlamaConfig) -> Checkpoint:
    """A Llama's config without files, which is enough for a plan."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_attention_heads": llama.num_attention_heads,
        "num_key_value_heads": llama.num_key_value_heads,
        "head_dim": llama.head_dim,
        "vocab_size": llama.vocab_size,
        "tie_word_embeddings": llama is LLAMA_1B,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 131072,
    }
    return Checkpoint(ModelFiles(Path(), "llama", None, "llama"), config, {}, {}, [])


@pytest.mark.parametrize("rows", [[2047], [511] * 4, [127] * 16])
@pytest.mark.parametrize(("name", "llama"), [("m1-8", LLAMA), ("m4-pro-24", LLAMA_70B)])
def test_gradients_are_in_what_a_plan_may_fill(name, llama, rows):
    made = plan_checkpoint(weightless(llama), RunConfig(), rows_of(rows), machine(name))
    assert made.residency == "streamed"
    assert made.total_bytes <= 0.85 * made.memory_bytes


def test_a_base_that_would_fill_all_memory_is_streamed():
    config = build({"data": {"max_length": 256}, "training": {"gradient_checkpointing": True}})
    made = plan_checkpoint(weightless(LLAMA), config, rows_of([255]), machine("m1-8"))
    assert made.residencies["resident"]["total_bytes"] > 0.85 * made.memory_bytes
    assert made.residency == "streamed"
    assert "tokens/s, chosen" in next(x for x in str(made).split("\n") if x.startswith("streamed"))


@pytest.mark.parametrize(("name", "llama"), [("m1-8", LLAMA), ("m4-24", LLAMA_70B)])
def test_a_resident_base_that_does_not_fit_is_advised_to_be_streamed(name, llama):
    config = build({"model": {"residency": "resident"}})
    made = plan_checkpoint(weightless(llama), config, None, machine(name))
    assert not made.fits and "GB; set model.residency=auto" in str(made)
    assert ("none fits" in str(made)) == (made.longest_context == 0)


@pytest.mark.parametrize(
    ("name", "llama", "microseconds"),
    # Matmuls at the measured rate and what packed weights and emulated bfloat16 add to them (a
    # middle), LoRA's tiles, elementwise traffic, launches: docs/log.md has the arithmetic.
    [
        ("m4-max-64", LLAMA, 2142 * 1.175 + 30 + 79.6e6 / 464e3 + 10),
        ("m1-8", LLAMA_1B, 2100 * 1.3 + 30 + 22.0e6 / 54e3 + 20),
        ("h100-80", LLAMA, 45 + 2 + 79.6e6 / 2.9e6 + 20),
    ],
)
def test_the_speed_of_a_gpu_is_that_of_matmuls_and_of_what_moves_between_them(
    name, llama, microseconds
):
    rows = rows_of([99] * 200)
    made = plan_checkpoint(weightless(llama), RunConfig(), rows, machine(name))
    assert 1e6 / made.tokens_per_second == pytest.approx(microseconds, rel=0.10)


def test_elementwise_traffic_is_that_of_the_graph():
    """Of 8B and 1B, counted by hand; dropout's is 14 bytes for each input of a LoRA weight."""
    for llama, megabytes, dropped in ((LLAMA, 62.5, 17.4), (LLAMA_1B, 17.4, 4.6)):
        nothing = [NOTHING] * llama.num_hidden_layers
        without = elementwise_bytes(llama, nothing, 2, dropout=False)
        assert without / 1e6 == pytest.approx(megabytes, rel=0.01)
        added = elementwise_bytes(llama, nothing, 2, dropout=True) - without
        assert added / 1e6 == pytest.approx(dropped, rel=0.01)
    levels = [elementwise_bytes(LLAMA, [level] * 32, 2, True) for level in (NOTHING, MLP, LAYER)]
    assert levels == sorted(levels) and levels[2] == pytest.approx(1.36 * levels[0])


def test_metal_s_attention_gradient_needs_scratch_for_its_largest_group():
    metal = machine("m4-max-64")
    other = dataclasses.replace(
        metal, device=dataclasses.replace(metal.device, attention_scratch=0)
    )

    def added(lengths: list[int]) -> int:
        footprints = [Footprint(LLAMA, lengths, 2, where) for where in (metal, other)]
        with_it, without = (footprint.working(NOTHING, 1) for footprint in footprints)
        return with_it - without

    block = 6.4 * 32 * 1024**2
    assert added([1024] * 6) == pytest.approx(6 * block)
    assert added([8192]) == pytest.approx(block), "a block of it at once"
    assert added([1024] * 100) == pytest.approx(16 * block), "of 16,384 positions at once"
    assert added([100] * 60) == pytest.approx(60 * 6.4 * 32 * 100**2, rel=0.01)
    # In more chunks there is less of it, so that nothing has to be computed again.
    made = plan_checkpoint(weightless(LLAMA_1B), RunConfig(), where=machine("m1-8"))
    assert made.fits and made.schedule.n_chunks == 18 and set(made.schedule.levels) == {NOTHING}


def test_the_cache_of_freed_buffers_is_told_and_gives_way():
    config = build({"model": {"residency": "resident"}})

    def made(where: Machine) -> Plan:
        return plan_checkpoint(weightless(LLAMA), config, where=where)

    roomy, tight, cpu = made(machine("m4-max-64")), made(machine("m1-16")), made(small(64 << 30))
    assert roomy.cache_bytes == roomy.memory_bytes // 8 == roomy.to_dict()["cache_bytes"]
    assert "cache                     6.44 GB more, if there is room" in str(roomy)
    for each in (roomy, tight):
        assert each.fits and 0 < each.cache_bytes <= each.memory_bytes - each.total_bytes
    temporary = cpu.parts["activations"] + cpu.parts["working arrays"]
    assert cpu.cache_bytes == pytest.approx(device.CPU.cache_share * temporary, rel=1e-6)
    besides = device.PROCESS_BYTES + device.HEAP_BYTES  # as its matrices are dequantised in turn
    besides += device.TOKEN_BYTES * LLAMA.vocab_size
    assert cpu.process_bytes == besides + cpu.total_bytes + cpu.cache_bytes // 2
    assert f"process              {cpu.process_bytes / 1e9:9.2f} GB" in str(cpu)
    assert made(machine("m1-8")).cache_bytes == 0, "of what does not fit nothing is kept"
    cuda = made(machine("h100-80"))
    assert cuda.process_bytes == 0 and "process" not in str(cuda), "its memory is its own"


@pytest.mark.parametrize(
    ("training", "forwards", "holds"),
    [
        ({"kl_weight": 0.1}, 1, True),
        ({"objective": "kto"}, 2, False),
        ({"objective": "dpo"}, 0, False),
    ],
)
def test_another_model_in_a_step_takes_time_and_its_hidden_states_memory(training, forwards, holds):
    where = machine("m4-max-64")
    plain, made = (
        plan_checkpoint(weightless(LLAMA), build({"training": fields}), where=where)
        for fields in ({}, training)
    )
    ratio = plain.tokens_per_second / made.tokens_per_second
    assert ratio == pytest.approx(1 + FORWARD * forwards)
    assert made.parts["activations"] >= plain.parts["activations"]
    assert (made.parts["activations"] != plain.parts["activations"]) == holds
    lengths, levels = [512] * 6, [NOTHING] * LLAMA.num_hidden_layers
    without, footprint = (Footprint(LLAMA, lengths, 2, where, has_base=b) for b in (False, True))
    more = footprint.kept(levels, 1) - without.kept(levels, 1)
    assert more == 6 * 512 * LLAMA.hidden_size * (2 + 4)


# ---- a base in memory or on the disk ------------------------------------------------------------

LLAMA_3B = LlamaConfig(3072, 28, 24, 8, 128, 8192, 128256)


@pytest.mark.parametrize(
    ("name", "llama", "fits"),
    [
        ("m2-8", LLAMA_1B, {"resident": True, "streamed": True}),
        ("m2-8", LLAMA_3B, {"resident": True, "streamed": True}),
        ("m2-8", LLAMA, {"resident": False, "streamed": True}),
        ("m4-24", LLAMA_70B, {"resident": False, "streamed": True}),
    ],
)
def test_a_plan_shows_the_base_in_memory_and_on_the_disk(name, llama, fits):
    made = plan_checkpoint(weightless(llama), RunConfig(), where=machine(name))
    both = made.to_dict()["residencies"]
    assert {way: figures["fits"] for way, figures in both.items()} == fits
    assert made.residency == ("resident" if fits["resident"] else "streamed") and made.fits
    for way, figures in both.items():
        config = build({"model": {"residency": way}})
        alone = plan_checkpoint(weightless(llama), config, where=machine(name))
        assert {n: getattr(alone, n) for n in figures} == figures and not alone.residencies
        words = "fits" if alone.fits else "does not fit"
        line = f"{way:<22}{alone.total_bytes / 1e9:8.2f} GB, {words}, about "
        assert line in str(made) and line not in str(alone)


def test_a_streamed_base_is_no_faster_than_its_disk(monkeypatch):
    training = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
    model = {"residency": "streamed"}
    config = build({"model": model, "training": training, "data": {"max_length": 513}})

    def made(rate: float) -> Plan:
        monkeypatch.setattr(device, "DISK", rate)
        return plan_checkpoint(weightless(LLAMA), config, where=machine("m4-max-64"))

    slow, fast = made(1e6), made(1e12)
    layers = 32 * 218_103_808 * 4.5 / 8  # bytes; read forward and back by each chunk
    positions = 6 * 512 / slow.schedule.n_chunks
    assert slow.tokens_per_second == pytest.approx(positions / (2 * layers / 1e6), rel=0.01)
    assert fast.tokens_per_second > 100 * slow.tokens_per_second


def test_one_dense_matrix_is_counted_where_each_is_dequantised_in_its_turn(checkpoint_files):
    def parts(residency: str, way: str) -> dict[str, int]:
        config = build({"model": {"residency": residency, "frozen_matmul": way}})
        return plan_checkpoint(open_checkpoint(checkpoint_files), config).parts

    assert parts("resident", "dequantize")["dequantised in use"] == 4 * 256 * 512
    streamed = parts("streamed", "dequantize")
    layer_after = streamed["base weights"] // 2  # which is not there yet
    assert streamed["dequantised in use"] == 4 * 256 * 512 - layer_after
    for way in (("streamed", "quantized"), ("resident", "resident")):
        assert "dequantised in use" not in parts(*way)


def test_no_attention_to_the_longest_context_is_ended_by_the_watchdog():
    where = machine("m4-max-64")
    longest = plan_checkpoint(weightless(LLAMA), RunConfig(), where=where).longest_context
    seconds = 2 * 4096 * longest**2 / where.matmul_rate
    assert 1.9 < seconds <= 2
    patient = dataclasses.replace(where.device, dispatch_seconds=float("inf"))
    where = dataclasses.replace(where, device=patient)
    unbounded = plan_checkpoint(weightless(LLAMA), RunConfig(), where=where).longest_context
    assert unbounded > 1.3 * longest, "memory would do for more"
