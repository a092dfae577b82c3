"""A run that is killed and started again ends bit for bit as one that was left alone.

Run as: python benchmarks/crash.py --kills 50 --seed 0

Each trial is the real command in a process of its own, on a tiny model that this file makes: 36
steps with dropout, accumulation, validation and the best weights at the end. The process
gets SIGKILL, the same command is given again, one to three times in a row, and then it is left
alone. Half of the trials are killed at a random moment. The others kill themselves at a call that
changes the disk: before a file is opened for writing, before it is flushed, before a rename, before
something is removed, or with half of a safetensors file written.

The claim that is asserted, of every trial: it went on from its newest checkpoint; the adapter, the
checkpoints' weights and moments and every recorded loss are those of the run that was left alone;
and no other files are left. What was handed to the system outlives a process, so this says nothing
of power cuts.
"""

import argparse
import fcntl
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_STEPS, EVAL_STEPS = 36, 4, 6
RANDOM = "random moment"
CALLS = ("open", "half a file", "fsync", "rename", "remove")
SAME_BYTES = ("adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json")
TIMINGS = "tokens_per_second", "peak_memory_bytes", "process_memory_bytes", "eval_runtime"


def main() -> None:
    """Kills runs, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", default=50, type=int, help="trials")
    parser.add_argument("--seed", default=0, type=int, help="draws the moments")
    parser.add_argument("--jobs", default=2, type=int, help="trials at the same time")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        left_alone = LeftAlone(Path(folder))
        trials = run_trials(left_alone, draw_moments(left_alone, args.kills, args.seed), args.jobs)
    show(trials)
    results = {
        "processes_killed": sum(len(trial.killed) for trial in trials),
        "identical": sum(not trial.problems for trial in trials),
        "tidy": sum(not trial.problems + trial.litter for trial in trials),
        "seconds": round(time.perf_counter() - began, 1),
    }
    from mlx_qlora import device

    print(json.dumps({"benchmark": "crash", **vars(args), **device.facts(), **results}))
    for claim in ("identical", "tidy"):
        assert results[claim] == args.kills, f"{results[claim]} of {args.kills} runs are {claim}"


# ---- what is run -------------------------------------------------------------------------------


def make_inputs(folder: Path) -> Path:
    """A Llama of two layers with random weights, a tokenizer of bytes, and 60 rows."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    (folder / "model").mkdir(parents=True)
    D, F, V = 64, 128, 258  # hidden size, MLP size, vocabulary
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": F, "vocab_size": V, "max_position_embeddings": 128},
        **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True},
    }
    (folder / "model" / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens": (V, D), "norm": (D,)}
    for layer in ("layers.0", "layers.1"):
        for name, shape in {"q": (D, D), "k": (D // 2, D), "v": (D // 2, D), "o": (D, D)}.items():
            shapes[f"{layer}.self_attn.{name}_proj"] = shape
        for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
            shapes[f"{layer}.mlp.{name}_proj"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}"] = (D,)
    draw = np.random.default_rng(0)
    weights = {
        f"model.{name}.weight": (
            np.ones(shape) if len(shape) == 1 else draw.normal(0, 0.08, shape)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})

    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    vocabulary = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, []))
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(special))
    number = random.Random(0)
    rows = [{"text": f"count {number.randrange(10**6)} on {i % 3}"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(inputs: Path, place: Path) -> list[str]:
    """The words of the command; its output and its cache are folders in `place`."""
    return [
        *("train", "--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl")),
        *("--output-dir", str(place / "out"), f"data.cache_dir={place / 'cache'}"),
        *("--max-steps", str(STEPS), "--batch-size", "2", "--max-length", "128"),
        *("--learning-rate", "0.02", "training.lr_scheduler_type=constant_with_warmup"),
        *("training.warmup_steps=4", "training.gradient_accumulation_steps=2"),
        *("lora.r=4", "lora.lora_dropout=0.1"),
        *("data.split=[0.8, 0.2, 0.0]", "logging.logging_steps=3"),
        *(f"checkpointing.save_steps={SAVE_STEPS}", f"checkpointing.eval_steps={EVAL_STEPS}"),
        *("checkpointing.save_total_limit=2", "checkpointing.load_best_model_at_end=true"),
    ]


def start(words: list[str], how: list[str] | None = None) -> subprocess.Popen[str]:
    """A process of the command; `how` is what Python runs, the command line if not given.

    One thread each: more would only make a tiny model slower.
    """
    return subprocess.Popen(
        [sys.executable, *(how or ["-m", "mlx_qlora"]), *words],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- killing it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        kind: RANDOM, or one of CALLS.
        at: for RANDOM, lines of progress to wait for and, as a fraction, how much of the time
            between two of them; otherwise which of the process's calls of that kind, from 1, or
            the path that it is about.
    """

    kind: str
    at: float | str


class LeftAlone:
    """A run that nobody kills: what the others are compared with, and what can befall them.

    It is made twice, the second time with its calls counted, as in a process that kills itself;
    once if they are not wanted.

    Attributes:
        inputs: with the model and the rows.
        out: the output folder.
        calls: (kind, path) of every call that changes the disk, in order.
        lines: of progress.
        startup: seconds until the first of them.
        pace: seconds between two of them.
    """

    def __init__(self, folder: Path, counted: bool = True) -> None:
        self.folder = folder
        self.inputs = make_inputs(folder / "inputs")
        self.out = folder / "alone" / "out"
        began, times = time.perf_counter(), []
        process = start(command(self.inputs, folder / "alone"))
        for line in process.stdout:
            if line.startswith("step "):
                times.append(time.perf_counter() - began)
        _, said = process.communicate()
        assert process.returncode == 0, said
        self.lines = len(times)
        self.startup, self.pace = times[0], (times[-1] - times[0]) / (len(times) - 1)

        if counted:
            self.calls = self._count()

    def _count(self) -> list[tuple[str, str]]:
        place = self.folder / "counted"
        process = start(command(self.inputs, place), killing(place, None))
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert not differences(self.out, place / "out"), "two runs are not the same"
        return [tuple(call) for call in json.loads((place / "calls.json").read_text())]

    def how_many(self, kind: str) -> int:
        """Calls of one kind."""
        return sum(call == kind for call, _ in self.calls)

    def moment(self, kind: str, path: str, then: int = 0) -> Moment:
        """Just before a call, or before that so many calls later."""
        number = self.calls.index((kind, path)) + then
        kind = self.calls[number][0]
        return Moment(kind, sum(call == kind for call, _ in self.calls[: number + 1]))


def draw_moments(alone: LeftAlone, trials: int, seed: int) -> list[list[Moment]]:
    """For each trial the moments at which its processes are killed, one after another."""
    draw = random.Random(seed)

    def moment(number: int) -> Moment:
        if number % 2 == 0:
            return Moment(RANDOM, draw.uniform(0, alone.lines + 1))
        kind = draw.choice(CALLS)
        return Moment(kind, draw.randint(1, alone.how_many(kind)))

    return [[moment(number) for _ in range(draw.choice((1, 1, 2, 3)))] for number in range(trials)]


@dataclass
class Trial:
    """A run that was killed until it came to its end.

    Attributes:
        moments: at which its processes were to be killed.
        killed: those at which one was; a later process may have too little left to do.
        problems: what is not as in the run that was left alone.
        litter: what lies in the output folder besides.
    """

    moments: list[Moment]
    killed: list[Moment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)


def run_trials(alone: LeftAlone, drawn: list[list[Moment]], jobs: int = 2) -> list[Trial]:
    """Runs every trial in a folder of its own."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda n: run_trial(alone, f"trial-{n}", drawn[n]), range(len(drawn))))


def run_trial(alone: LeftAlone, name: str, moments: list[Moment]) -> Trial:
    """The same command again and again, until a process comes to its end."""
    place, trial = alone.folder / name, Trial(moments)
    for moment in [*moments, None]:
        newest = newest_checkpoint(place / "out")
        code, printed, said = run_process(alone, place, moment)
        if code == 0:
            break
        if code != -signal.SIGKILL or moment is None:
            trial.problems.append(f"exit code {code}: {said.strip()}")
            return trial
        trial.killed.append(moment)
    if not trial.killed and moments[0].kind == RANDOM:  # it came too late
        shutil.rmtree(place)
        return run_trial(alone, name, [Moment(RANDOM, moments[0].at / 2)])
    trial.problems = differences(alone.out, place / "out")
    if not trial.killed:
        trial.problems.append("no process was killed")
    if newest is not None and f"continuing from {newest}\n" not in printed:
        trial.problems.append(f"it did not go on from {newest}")
    trial.litter = sorted(names(place / "out") - names(alone.out))
    return trial


def run_process(alone: LeftAlone, place: Path, moment: Moment | None) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one process that is perhaps killed."""
    at_random = moment is None or moment.kind == RANDOM
    how = None if at_random else killing(place, moment)
    process, read = start(command(alone.inputs, place), how), ""
    if moment is not None and at_random:
        for _ in range(int(moment.at)):
            while line := process.stdout.readline():
                read += line
                if line.startswith("step "):
                    break
        time.sleep(moment.at % 1 * (alone.pace if moment.at >= 1 else alone.startup))
        process.kill()
    printed, said = process.communicate()
    return process.returncode, read + printed, said


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint that a process has to go on from."""
    found = [path for path in out.glob("checkpoint-*") if (path / "resume_state.json").exists()]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


# ---- in the process that kills itself ----------------------------------------------------------


def killing(place: Path, moment: Moment | None) -> list[str]:
    """What Python runs to be killed at one of its calls; None only counts them."""
    kind, at = (moment.kind, moment.at) if moment else ("none", 0)
    return [__file__, "child", str(place), kind, str(at)]


def child(place: str, kind: str, at: str, *words: str) -> None:
    """The command line, with a look at every call that changes something in `place`.

    Python tells its audit hooks of a call just before it is made, whoever makes it.
    """
    import safetensors.numpy

    calls: list[tuple[str, str]] = []
    removing, opened = False, ""
    full_flush = getattr(fcntl, "F_FULLFSYNC", "none")  # what macOS has for fsync

    def is_the_one(call: str, path: str) -> bool:
        path = re.sub(r"-\w{8}\.tmp", ".tmp", path)  # without what is drawn at random
        calls.append((call, path.removeprefix(place + os.sep)))
        return call == kind and at in (calls[-1][1], str(sum(name == kind for name, _ in calls)))

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, details: tuple) -> None:
        nonlocal removing, opened
        path = str(details[0]) if details else ""
        here = path.startswith(place)
        if event == "shutil.rmtree":
            removing = here  # what it removes it names without the folder
        elif event == "open" and here:
            opened = path
            if details[2] & (os.O_WRONLY | os.O_RDWR) and is_the_one("open", path):
                die()
        elif event == "fcntl.fcntl" and details[1] == full_flush:
            if is_the_one("fsync", opened):
                die()
        elif event == "os.rename" and here:
            if is_the_one("rename", str(details[1])):
                die()
        elif event in ("os.remove", "os.rmdir") and (here or removing):
            if is_the_one("remove", path):
                die()

    def save_half(tensors, filename, *more, **how) -> None:
        whole_save(tensors, filename, *more, **how)
        if is_the_one("half a file", str(filename)):
            os.truncate(filename, os.path.getsize(filename) // 2)
            die()

    def flush(descriptor: int) -> None:
        if is_the_one("fsync", opened):
            die()
        whole_flush(descriptor)

    whole_save, whole_flush = safetensors.numpy.save_file, os.fsync
    safetensors.numpy.save_file, os.fsync = save_half, flush
    sys.addaudithook(watch)
    sys.argv, sys.path[0] = ["mlx-qlora", *words], str(ROOT)
    try:
        runpy.run_module("mlx_qlora", run_name="__main__")
    finally:
        done = json.dumps(calls)
        (Path(place) / "calls.json").write_text(done)


# ---- comparing it ------------------------------------------------------------------------------


def differences(expected: Path, got: Path) -> list[str]:
    """What an output folder lacks, or holds in another form."""
    found = []
    for name in sorted(names(expected)):
        if not (got / name).exists():
            found.append(f"{name} is missing")
        elif name.endswith((".safetensors", *SAME_BYTES)):
            if (got / name).read_bytes() != (expected / name).read_bytes():
                found.append(f"{name} differs")
        elif name == "metrics.jsonl" and figures(got) != figures(expected):
            found.append(f"{name} differs")
    return found


def names(folder: Path) -> set[str]:
    """Every file and folder below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def figures(folder: Path) -> list[dict[str, object]]:
    """The records of `metrics.jsonl`, without what no two runs have in common."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def show(trials: list[Trial]) -> None:
    """Prints what went wrong, and the table."""
    from rich.console import Console
    from rich.table import Table

    for number, trial in enumerate(trials):
        for problem in [*trial.problems, *(f"{name} is left behind" for name in trial.litter)]:
            print(f"trial {number}, killed at {trial.killed}: {problem}")
    table = Table(title=f"runs of {STEPS} steps, killed and started again")
    for column in ("first killed at", "trials", "processes killed", "identical", "tidy"):
        table.add_column(column, justify="left" if "first" in column else "right")
    for kind in (RANDOM, *CALLS, None):
        some = [trial for trial in trials if kind in (None, trial.moments[0].kind)]
        counts = (
            len(some),
            sum(len(trial.killed) for trial in some),
            sum(not trial.problems for trial in some),
            sum(not trial.problems + trial.litter for trial in some),
        )
        table.add_row(kind or "all", *map(str, counts))
    Console().print(table)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
