"""A command that is killed and given again ends bit for bit as one that was left alone.

Run as: python benchmarks/crash.py --kills 50 --seed 0

Each trial is a real command in a process of its own (forked from one that has imported
everything), on a tiny model that this file makes: a run of 18 steps with dropout, accumulation,
validation and the best weights at the end; the same, going on from a run that was killed in its
middle; two processes of it; a sweep; a merge and three exports over older ones. The process gets
SIGKILL, the same command is given again, one to three times in a row, and then it is left alone.
Half of the trials are killed at a random moment. The others kill themselves at a call that changes
the disk: before a file is opened for writing, before it is flushed, before a rename, before
something is removed, or with half of a safetensors file written.

The claim that is asserted, of every trial: a run went on from its newest checkpoint; what was
there of an older export was there until the new one was; every file that holds no times is, byte
for byte, that of the command that was left alone, and so is every recorded loss; and no other files
are left. With `--results FILE` a trial that is in the file is not made again. What was handed to
the system outlives a process, so this says nothing of power cuts.
"""

import argparse
import fcntl
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import forked

Done = forked.Done
STEPS, SAVE_STEPS, EVAL_STEPS = 18, 2, 3
RANDOM = "random moment"
LATEST = 1200  # seconds that a trial may take: the machine may be busy
CALLS = ("open", "half a file", "fsync", "rename", "remove")
# No two runs have these in common; of reports and plots it is only seen that they are there.
TIMINGS = "tokens_per_second", "peak_memory_bytes", "process_memory_bytes", "eval_runtime"
TIMINGS += "seconds", "checksums"
TIMED = (".html", ".svg", "rank-1.log")


def main() -> None:
    """Kills commands, prints a table and a JSON line, and asserts the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", default=50, type=int, help="trials")
    parser.add_argument("--seed", default=0, type=int, help="draws the moments")
    parser.add_argument("--jobs", default=2, type=int, help="trials at the same time")
    parser.add_argument("--only", default=",".join(CASES), help="commands, with commas between")
    parser.add_argument("--results", type=Path, help="file of trials, to go on from")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    began = time.perf_counter()
    forked.warm()
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        cases = [LeftAlone(Path(folder), name) for name in args.only.split(",")]
        trials = run_trials(cases, args.kills, args.seed, args.jobs, args.results)
    show(trials)
    results = {
        "processes_killed": sum(len(trial.killed) for trial in trials),
        "identical": sum(not trial.problems for trial in trials),
        "tidy": sum(not trial.problems + trial.litter for trial in trials),
        "seconds": round(time.perf_counter() - began, 1),
    }
    from mlx_qlora import device

    about = {**vars(args), "results": str(args.results)}
    print(json.dumps({"benchmark": "crash", **about, **device.facts(), **results}))
    for claim in ("identical", "tidy"):
        assert results[claim] == args.kills, f"{results[claim]} of {args.kills} are {claim}"


# ---- what is run -------------------------------------------------------------------------------


def in_memory() -> str | None:
    """A folder that is kept in memory, if there is one with room: syncing takes no time there."""
    place = "/dev/shm"
    has_room = os.path.isdir(place) and shutil.disk_usage(place).free > 4 << 30
    return place if has_room else None


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
        *("training.warmup_steps=2", "training.gradient_accumulation_steps=2"),
        *("lora.r=4", "lora.lora_dropout=0.1"),
        *("data.split=[0.8, 0.2, 0.0]", "logging.logging_steps=2"),
        *(f"checkpointing.save_steps={SAVE_STEPS}", f"checkpointing.eval_steps={EVAL_STEPS}"),
        *("checkpointing.save_total_limit=2", "checkpointing.load_best_model_at_end=true"),
    ]


def sweep(inputs: Path, place: Path) -> list[str]:
    """Two learning rates and two ranks, of which the better halves go on."""
    return [
        *("sweep", "--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl")),
        *("--output-dir", str(place / "out"), f"data.cache_dir={place / 'cache'}"),
        *("--steps", "4", "--rungs", "2", "--learning-rates", "1e-6,2e-2", "--ranks", "2,4"),
        *("--batch-size", "2", "--max-length", "128", "data.split=[0.7, 0.3, 0.0]"),
        "checkpointing.save_steps=1",
    ]


def adapter(*words: str) -> Callable[[Path, Path], list[str]]:
    """A command on the adapter that a run has left beside the inputs."""
    return functools.partial(_on_adapter, words)


def _on_adapter(words: tuple[str, ...], inputs: Path, place: Path) -> list[str]:
    opened = ["--model", str(inputs / "model"), "--adapter", str(inputs / "adapter")]
    return [*words, *opened, "--output-dir", str(place / "out")]


@dataclass(frozen=True)
class Case:
    """A command, and the one that has left what is there before it, if there is any."""

    words: Callable[[Path, Path], list[str]]
    before: Callable[[Path, Path], list[str]] | None = None
    on_adapter: bool = True  # whether it wants one
    is_run: bool = False  # whether it goes on from checkpoints
    killed_at: str = "out/checkpoint-12"  # the rename that `before` is killed at, if it is a run
    is_whole: bool = False  # whether it replaces its folder as a whole
    processes: int = 1


CASES = {
    "train": Case(command, on_adapter=False, is_run=True),
    "resume": Case(command, command, on_adapter=False, is_run=True),  # killed half-way
    "two": Case(command, on_adapter=False, is_run=True, processes=2),
    "sweep": Case(sweep, on_adapter=False),
    "merge": Case(adapter("merge", "--save-dtype", "float32"), adapter("merge"), is_whole=True),
    "portable": Case(
        adapter("export", "--portable"), adapter("export", "--portable"), is_whole=True
    ),
    "peft": Case(adapter("export"), adapter("export")),
    "gguf": Case(adapter("export", "--gguf-model"), adapter("export", "--gguf-model")),
}


# ---- killing it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        kind: RANDOM, or one of CALLS.
        at: for RANDOM, the share of the time that the command takes; otherwise which of the
            process's calls of that kind, from 1, or the path that it is about.
        victim: of several processes: 0, 1, or 2 for both.
    """

    kind: str
    at: float | str
    victim: int = 0


def process_of(
    words: list[str],
    place: Path | None = None,
    moment: Moment | None = None,
    environ: dict[str, str] | None = None,
) -> forked.Forked:
    """A process of a command; with a `place` its calls there are watched."""
    watched = functools.partial(watch, str(place), moment) if place else None
    return forked.Forked(words, watched, environ)


def end_of(words: list[str], place: Path | None = None, moment: Moment | None = None) -> Done:
    """How that process ends."""
    return process_of(words, place, moment).wait()


class LeftAlone:
    """A command that nobody kills: what the others are compared with, and what can befall them.

    Attributes:
        inputs: with the model, the rows and an adapter.
        place: of its output and its cache; `out` is the output.
        before: what is there before it, or None.
        calls: (kind, path) of every call that changes the disk, in order.
        seconds: that it takes.
    """

    def __init__(self, folder: Path, name: str = "train", case: Case | None = None) -> None:
        self.name, self.case = name, case or CASES[name]
        self.folder = folder / name
        self.inputs, self.before = folder / "inputs", None
        if not self.inputs.is_dir():
            make_inputs(self.inputs)
        if self.case.on_adapter and not (self.inputs / "adapter").is_dir():
            done = process_of(command(self.inputs, folder / "first")).wait()
            assert done.code == 0, done
            shutil.copytree(folder / "first" / "out", self.inputs / "adapter")
        if self.case.before is not None:
            earlier, self.before = self.folder / "earlier", self.folder / "earlier" / "out"
            moment = Moment("rename", self.case.killed_at) if self.case.is_run else None
            earlier.mkdir(parents=True)
            done = process_of(self.case.before(self.inputs, earlier), earlier, moment).wait()
            assert done.code == (-signal.SIGKILL if moment else 0), done
        self.place = self.begin("alone")
        began, calls = time.perf_counter(), self.place / "cache" / "calls.json"
        for done in self.end(self.run(self.place, counted=True)):
            assert done.code == 0, done
        self.seconds = time.perf_counter() - began
        self.out = self.place / "out"
        self.calls = [tuple(call) for call in json.loads(calls.read_text())]

    def begin(self, name: str) -> Path:
        """A place for the command, with what is there before it."""
        place = self.folder / name
        (place / "cache").mkdir(parents=True)
        if self.before is not None:
            shutil.copytree(self.before, place / "out")
        return place

    def run(
        self, place: Path, moment: Moment | None = None, counted: bool = False
    ) -> list[forked.Forked]:
        """The command's processes, of which one may kill itself."""
        n = self.case.processes
        environs: list[dict[str, str]] = [{}]
        if n > 1:
            hosts = place / "cache" / "hosts.json"
            hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
            environs = [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(n)]
        counted = counted or (moment is not None and moment.kind != RANDOM)
        words = self.case.words(self.inputs, place)
        return [
            process_of(words, place if counted and rank == 0 else None, moment, environ)
            for rank, environ in enumerate(environs)
        ]

    @staticmethod
    def end(processes: list[forked.Forked]) -> list[Done]:
        """Waits for all of them; ends one that waits for another to begin which is gone.

        As a launcher does: MLX's ring knows of no peer that it has not met.
        """
        until = time.monotonic() + LATEST
        while not all(each.ended() for each in processes) and time.monotonic() < until:
            if any(each.ended() for each in processes):
                for each in processes:
                    if "waiting for the other processes to begin" in each.said():
                        each.kill()
            time.sleep(0.002)
        return [process.wait(0) for process in processes]

    def how_many(self, kind: str) -> int:
        """Calls of one kind."""
        return sum(call == kind for call, _ in self.calls)

    def moment(self, kind: str, path: str, then: int = 0) -> Moment:
        """Just before a call, or before that so many calls later."""
        number = self.calls.index((kind, path)) + then
        kind = self.calls[number][0]
        return Moment(kind, sum(call == kind for call, _ in self.calls[: number + 1]))

    def draw(self, number: int, seed: int) -> list[Moment]:
        """The moments at which a trial's processes are killed, one after another."""
        draw = random.Random(f"{seed} {number} {self.name}")

        def moment() -> Moment:
            victim = draw.randrange(3) if self.case.processes > 1 else 0
            kind = draw.choice([kind for kind in CALLS if self.how_many(kind)])
            if draw.random() < 0.5:
                return Moment(RANDOM, draw.random(), victim)
            return Moment(kind, draw.randint(1, self.how_many(kind)))

        return [moment() for _ in range(draw.choice((1, 1, 2, 3)))]


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Trial:
    """A command that was killed until it came to its end.

    Attributes:
        case: its name.
        moments: at which its processes were to be killed.
        killed: those at which one was; a later process may have too little left to do.
        problems: what is not as of the command that was left alone.
        litter: what lies beside and in the output folder besides.
    """

    case: str
    moments: list[Moment]
    killed: list[Moment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)


def run_trials(
    cases: list[LeftAlone], n: int, seed: int, jobs: int = 2, results: Path | None = None
) -> list[Trial]:
    """So many trials, the commands in turn, each in a folder of its own."""
    trials: dict[int, Trial] = {}
    if results is not None and results.is_file():
        for record in map(json.loads, results.read_text().splitlines()):
            number, of_seed = record.pop("number"), record.pop("seed")
            same = of_seed == seed and record["case"] == cases[number % len(cases)].name
            if number < n and same and not record["problems"] + record["litter"]:
                for name in ("moments", "killed"):
                    record[name] = [Moment(**moment) for moment in record[name]]
                trials[number] = Trial(**record)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, context) as pool:
        left = [number for number in range(n) if number not in trials]
        alone = {number: cases[number % len(cases)] for number in left}
        futures = {
            pool.submit(run_trial, alone[i], f"trial-{i}", alone[i].draw(i, seed)): i for i in left
        }
        for future in as_completed(futures):
            number, trial = futures[future], future.result()
            trials[number] = trial
            if trial.problems or trial.litter:
                print(f"trial {number}: {trial}", flush=True)
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps({"number": number, "seed": seed, **asdict(trial)}) + "\n")
    return [trials[number] for number in sorted(trials)]


def run_trial(alone: LeftAlone, name: str, moments: list[Moment]) -> Trial:
    """The same command again and again, until a process comes to its end."""
    trial, place = Trial(alone.name, moments), alone.begin(name)
    newest, first = None, Done(0, "", "")
    for moment in [*moments, None]:
        newest = newest_checkpoint(place / "out") if alone.case.is_run else None
        processes = alone.run(place, moment)
        if moment is not None and moment.kind == RANDOM:
            until = time.perf_counter() + float(moment.at) * alone.seconds
            while time.perf_counter() < until and not all(each.ended() for each in processes):
                time.sleep(0.002)
            for rank in {0: [0], 1: [1], 2: [0, 1]}[moment.victim]:
                processes[rank].kill()
        try:
            first, *others = alone.end(processes)
        except AssertionError as late:
            trial.problems.append(str(late))
            return trial
        codes = [done.code for done in (first, *others)]
        if not any(codes):
            break
        if -signal.SIGKILL not in codes or moment is None:
            trial.problems.append(f"exit codes {codes}: {first.err.strip()}")
            return trial
        if others and 1 in codes:
            trial.problems.append(f"exit codes {codes}: {[done.err for done in (first, *others)]}")
        trial.killed.append(moment)
        if alone.case.is_whole and not is_old_or_new(alone, place):
            trial.problems.append(f"killed at {moment}, neither the old nor the new is there")
    if not trial.killed and moments[0].kind == RANDOM:  # it came too late
        shutil.rmtree(place)
        earlier = Moment(RANDOM, float(moments[0].at) / 2, moments[0].victim)
        return run_trial(alone, name, [earlier])
    trial.problems += differences(alone.place / "out", place / "out")
    if not trial.killed:
        trial.problems.append("no process was killed")
    if newest is not None and f"continuing from {newest}\n" not in first.out:
        trial.problems.append(f"it did not go on from {newest}")
    trial.litter = sorted(litter(place) - litter(alone.place))
    shutil.rmtree(place)
    return trial


def litter(place: Path) -> set[str]:
    """Every file and folder of a command's place but its cache."""
    return {name for name in names(place) if not name.startswith("cache")}


def is_old_or_new(alone: LeftAlone, place: Path) -> bool:
    """Whether a folder that is replaced is one or the other, or the old one is set aside."""
    assert alone.before is not None
    aside = sorted(place.glob(".out-*.old"))
    there = place / "out" if (place / "out").exists() or not aside else aside[0]
    return not differences(alone.before, there) or not differences(alone.place / "out", there)


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint that a process has to go on from."""
    found = [path for path in out.glob("checkpoint-*") if (path / "resume_state.json").exists()]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


# ---- in the process that kills itself ----------------------------------------------------------


def watch(place: str, moment: Moment | None) -> Callable[[], None]:
    """Looks at every call that changes something in `place`, and kills this process at one.

    Python tells its audit hooks of a call just before it is made, whoever makes it. What is
    returned writes down the calls.
    """
    import safetensors.numpy

    kind, at = (moment.kind, str(moment.at)) if moment else ("none", "0")
    calls: list[tuple[str, str]] = []
    removing, opened = False, ""
    full_flush = getattr(fcntl, "F_FULLFSYNC", "none")  # what macOS has for fsync

    def is_the_one(call: str, path: str) -> bool:
        path = re.sub(r"-\w{8}\.tmp", ".tmp", path)  # without what is drawn at random
        calls.append((call, path.removeprefix(place + os.sep)))
        return call == kind and at in (calls[-1][1], str(sum(name == kind for name, _ in calls)))

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch_call(event: str, details: tuple) -> None:
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
    for module in [*sys.modules.values()]:
        if getattr(module, "save_file", None) is whole_save:
            module.save_file = save_half
    os.fsync = flush
    sys.addaudithook(watch_call)

    def write_calls() -> None:
        done = json.dumps(calls)
        folder = Path(place) / "cache"
        folder.mkdir(exist_ok=True)
        (folder / "calls.json").write_text(done)

    return write_calls


# ---- comparing it ------------------------------------------------------------------------------


def differences(expected: Path, got: Path) -> list[str]:
    """What an output folder lacks, or holds in another form."""
    found = []
    for name in sorted(names(expected)):
        if not (got / name).exists():
            found.append(f"{name} is missing")
        elif (expected / name).is_file() and content(expected, name) != content(got, name):
            found.append(f"{name} differs")
    return found


def names(folder: Path) -> set[str]:
    """Every file and folder below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def content(folder: Path, name: str) -> object:
    """What a file holds, without times and the name of the place."""
    path = folder / name
    if name.endswith(TIMED):
        return None
    raw = path.read_bytes().replace(str(folder.parent).encode(), b"PLACE")
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in raw.splitlines()]
    if path.suffix == ".json":
        value = without_times(json.loads(raw))
        if path.name == "resume_state.json":
            del value["sha256"]
        return value
    return raw


def without_times(value: object) -> object:
    """A value of JSON without what no two runs have in common."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMINGS}
    return [*map(without_times, value)] if isinstance(value, list) else value


def figures(folder: Path) -> list[dict[str, object]]:
    """The records of `metrics.jsonl`, without what no two runs have in common."""
    return content(folder, "metrics.jsonl")


def show(trials: list[Trial]) -> None:
    """Prints what went wrong, and the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="commands that were killed and given again")
    for column in ("command", "trials", "processes killed", "identical", "tidy"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for name in (*dict.fromkeys(trial.case for trial in trials), None):
        some = [trial for trial in trials if name in (None, trial.case)]
        counts = (
            len(some),
            sum(len(trial.killed) for trial in some),
            sum(not trial.problems for trial in some),
            sum(not trial.problems + trial.litter for trial in some),
        )
        table.add_row(name or "all", *map(str, counts))
    Console().print(table)


if __name__ == "__main__":
    main()
