"""What several processes hand over: the model against a ring in NumPy, and against a real one."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support.models import LLAMA_31_8B
from support.ring import ends, start

from mlx_qlora import cli
from mlx_qlora.before.plan import Scaling, plan, plan_checkpoint
from mlx_qlora.config import build
from mlx_qlora.device import machine
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.hub import ModelFiles
from mlx_qlora.model.weights import Checkpoint

# A step of one process: the gradients of the layers come one after the other, as in the engine.
STEP = """
import json, sys
import mlx.core as mx
from mlx_qlora.distributed import processes
from mlx_qlora.train.allreduce import GradientAllReduce

own, (count, rows) = processes(), map(int, sys.argv[1:])
shapes = {f"layers.{i}": (rows, 16) for i in range(count)}
grads = {name: mx.full(shape, own.rank + 1.0) for name, shape in shapes.items()}
mx.eval(grads)
ring = GradientAllReduce(shapes, own)
mx.clear_cache()
mx.reset_peak_memory()
before, done = mx.get_active_memory(), set()
for name in reversed(shapes):
    done.add(name)
    ring.reduce(grads, done)
total, *_ = ring.wait(grads, mx.array(1.0), (1, 1, 1), None)
mx.eval(total)
print(json.dumps({
    "sent": own.sent_bytes,
    "buckets": len(ring.buckets),
    "added": mx.get_peak_memory() - before,
    "sum": total["layers.0"][0, 0].item(),
}))
"""


def ring_all_reduce(arrays: list[np.ndarray]) -> tuple[list[np.ndarray], list[int], int]:
    """The sums, what each process has sent, in bytes, and the hops: the algorithm, step by step."""
    N = len(arrays)
    parts = [np.array_split(array.copy(), N) for array in arrays]
    sent, hops = [0] * N, 0
    for adds in (True, False):
        for turn in range(N - 1):
            which = [(rank - turn + (not adds)) % N for rank in range(N)]
            flying = [parts[rank][which[rank]].copy() for rank in range(N)]
            for rank, part in enumerate(flying):
                beside, at = parts[(rank + 1) % N], which[rank]
                beside[at] = beside[at] + part if adds else part
                sent[rank] += part.nbytes
            hops += 1
    return [np.concatenate(own) for own in parts], sent, hops


@pytest.mark.parametrize("N", [2, 3, 4, 8])
def test_bytes_on_the_wire_and_hops_are_those_of_a_ring(N):
    draw = np.random.default_rng(N)
    arrays = [draw.integers(-9, 9, 840).astype(np.float32) for _ in range(N)]
    sums, sent, hops = ring_all_reduce(arrays)
    assert all((own == np.sum(arrays, axis=0)).all() for own in sums)
    scaling = Scaling.of(N, 840, 1000, 1.0)
    assert set(sent) == {scaling.wire_bytes}
    assert hops == 2 * (N - 1)


@pytest.mark.parametrize(("count", "rows"), [(40, 16384), (3, 1024)])
def test_two_real_processes_hand_over_what_is_planned(tmp_path, count, rows):
    scaling = Scaling.of(2, count * rows * 16, 1000, 1.0)
    script = tmp_path / "step.py"
    script.write_text(STEP)
    found = ends(start(2, lambda rank: [str(script), str(count), str(rows)], tmp_path), 60)
    for code, out, err in found:
        assert code == 0, err
        told = json.loads(out)
        assert told["sum"] == 3.0
        assert 0 < told["sent"] - scaling.handed_bytes < 100, "the counts and the loss besides"
        assert scaling.messages - 2 - 1 <= told["buckets"] <= scaling.messages - 2
        assert told["added"] == pytest.approx(scaling.added_bytes, rel=0.15)
        assert told["added"] <= scaling.added_bytes + 4096


def test_one_process_hands_over_nothing():
    alone = Scaling.of(1, 41_943_040, 1000, 2.0)
    assert (alone.handed_bytes, alone.wire_bytes, alone.added_bytes, alone.messages) == (0, 0, 0, 0)


# ---- in a plan -----------------------------------------------------------------------------------


def test_a_plan_of_several_processes_adds_the_sums_and_nothing_else():
    name = "meta-llama/Llama-3.1-8B"
    checkpoint = Checkpoint(ModelFiles(Path(), name, None, name), LLAMA_31_8B, {}, {}, [])
    config = build({"training": {"per_device_train_batch_size": 18}})
    where = machine("m4-pro-24")  # whose memory bounds the context
    alone = plan_checkpoint(checkpoint, config, where=where)
    one, four = (plan_checkpoint(checkpoint, config, where=where, processes=n) for n in (1, 4))
    assert alone.scaling is None and alone.to_dict()["scaling"] is None
    assert dataclasses.replace(one, scaling=None) == alone
    assert four.scaling is not None
    assert four.parts == alone.parts | {"all-reduce": four.scaling.added_bytes}
    assert four.scaling.added_bytes == 2 * 4 * 41_943_040
    assert four.longest_context < alone.longest_context
    told = four.to_dict()["scaling"]
    assert told["wire_bytes"] == 1.5 * told["handed_bytes"] == 1.5 * 4 * 41_943_040
    # 2,048 positions in each of 18 rows, 4 processes.
    assert told["step_tokens"] == 2048 * 18 * 4
    assert told["compute_seconds"] == pytest.approx(2048 * 18 / alone.tokens_per_second)


@pytest.mark.parametrize("wrong", [0, -2, 2.5, True, "2"])
def test_a_number_that_no_launcher_could_start_is_refused_first(wrong):
    with pytest.raises(ConfigError, match="--processes must be a whole number of at least 1; got"):
        plan("no such model", processes=wrong)


def test_the_command_line_plans_for_several(smollm2_files, capsys):
    words = ["plan", "--model", "smollm2-135m", "--machine", "m4-max-64", "--processes", "2"]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["scaling"]
    assert (told["processes"], told["handed_bytes"]) == (2, 4 * 4_884_480)
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "0.020 GB a step" in shown and "7 messages" in shown
    assert cli.main([*words[:-1], "0"]) == 2
    assert "--processes must be a whole number of at least 1; got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main([*words[:-1], "two"])
    assert stop.value.code == 2
