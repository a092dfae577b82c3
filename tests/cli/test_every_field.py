"""No field is accepted and ignored: each one is changed, and a run is seen to differ by it.

CASES says, for every field of every section, to which value it is changed, what else must be set
for it to matter, and which part of a run must differ by it. The run without the change is done
twice, and that part must then be the same: what differs by chance would prove nothing.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import loky
import mlx.core as mx
import numpy as np
import pytest
import wandb
from rich.console import Console
from safetensors.numpy import load_file
from support.tiny_folder import write_model, write_rows

from mlx_qlora import cli
from mlx_qlora.config import SECTIONS, build
from mlx_qlora.data import encode
from mlx_qlora.errors import UserError
from mlx_qlora.model import quantize
from mlx_qlora.run import run
from mlx_qlora.train import engine
from mlx_qlora.train.optim import SCHEDULES
from mlx_qlora.train.step import Update

FIELDS = [f"{s}.{f.name}" for s, config in SECTIONS.items() for f in dataclasses.fields(config)]
Values = dict[str, Any]

# What all runs are but for a case's own values; {names} are those of `places`.
BASE: Values = {
    "model.source": "{model}",
    "model.bits": 4,
    "data.path": "{rows}",
    "data.max_length": 64,
    "data.cache_dir": None,
    "lora.r": 4,
    "lora.lora_dropout": 0.1,
    "training.max_steps": 4,
    "training.warmup_steps": 1,
    "training.learning_rate": 1e-2,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "checkpointing.output_dir": "out",
    "checkpointing.save_steps": 2,
    "checkpointing.eval_steps": 2,
    "logging.logging_steps": 1,
    "generation.max_new_tokens": 1,
}


@dataclass(frozen=True)
class Case:
    """One change of one field.

    Attributes:
        value: what the field is set to.
        differs: names of what must differ; see `observed`.
        same: names of what the change must leave alone.
        base: other fields that make it matter, also set in the run that it is compared with.
        error: what the change must be refused with; the other run must not be.
        again: both runs are done in a folder where the run without the change ended before.
        chunk: bytes of rows that a process gets at once, instead of what the library sets.
    """

    value: Any
    differs: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    base: Values = field(default_factory=dict)
    error: str = ""
    again: bool = False
    chunk: int = encode.CHUNK_BYTES


# ---- the table ----------------------------------------------------------------------------------

ADAPTER, SHAPES, BATCHES, FILES, RATES = (
    ("adapter",),
    ("shapes",),
    ("batches",),
    ("files",),
    ("rates",),
)
TRAINED = ("batches", "adapter")
WORSE = {"data.validation_path": "{against}", "checkpointing.eval_steps": 1}
WORSE["training.learning_rate"] = 0.1  # the best validation is the first, the next is worse
SPOILT = {"data.path": "{spoilt}"}  # one row of it cannot be used
ALONE = {"data.split": [1.0, 0.0, 0.0]}
LONG = {"data.max_length": 24}
OVERFLOWS = {"training.learning_rate": 1e30, "training.max_steps": 8}
EPOCHS = {"training.max_steps": None, "training.num_train_epochs": 0.5}
ANY_TOKEN = {
    "generation.temperature": 1.0,
    "generation.top_k": 0,
    "generation.top_p": 1.0,
    "generation.repetition_penalty": 1.0,
    "generation.max_new_tokens": 16,
}

CASES: dict[str, list[Case]] = {
    "model.source": [Case("{other}", ADAPTER, BATCHES)],
    "model.revision": [
        Case("v2", ADAPTER, BATCHES, {"model.source": "org/tiny"}),
        Case("v2", error="model.revision is for hub repositories only"),
    ],
    "model.adapter": [
        Case("{adapter}", ("shapes", "adapter"), BATCHES, {"lora.r": 16}),
        Case("{adapter}", error="lora.r is 2 in .*, which is trained on as it is, and not 4"),
    ],
    "model.base_model_name_or_path": [Case("org/name", ("base",), TRAINED)],
    "model.bits": [
        Case(8, ("packed", "adapter"), BATCHES),
        Case(None, ("packed", "adapter"), BATCHES),
    ],
    "model.group_size": [Case(32, ("packed", "adapter"), BATCHES)],
    "model.mode": [Case("mxfp4", ("packed", "adapter"), BATCHES, {"model.group_size": 32})],
    "model.dtype": [Case("float16", ("dtype", "adapter"), BATCHES)],
    "model.frozen_matmul": [
        Case(how, ("resident", "products"), ("batches", "losses"), {"model.frozen_matmul": was})
        for was, how in (("resident", "quantized"), ("resident", "dequantize"))
    ]
    + [Case("quantized", ("products",), ("losses",), {"model.frozen_matmul": "dequantize"})],
    "lora.r": [Case(8, SHAPES, BATCHES)],
    "lora.lora_alpha": [Case(64, ("adapter", "losses"), ("batches", "shapes"))],
    "lora.lora_dropout": [Case(0.5, ADAPTER, BATCHES), Case(0.0, ADAPTER, BATCHES)],
    "lora.target_modules": [
        Case(["q_proj", "v_proj"], SHAPES, BATCHES),
        Case(r".*layers\.1\.mlp\.up_proj", SHAPES, BATCHES),
    ],
    "lora.layers_to_transform": [Case([1], SHAPES, BATCHES)],
    "lora.bias": [Case("all", error="lora.bias must be one of 'none'")],
    "lora.use_rslora": [Case(True, ADAPTER, ("batches", "shapes"))],
    "lora.use_dora": [Case(True, SHAPES, BATCHES)],
    "lora.init_lora_weights": [
        Case(begin, ADAPTER, BATCHES) for begin in ("gaussian", "pissa", "olora", "loftq")
    ],
    "lora.rank_pattern": [Case({"q_proj": 2}, SHAPES, BATCHES)],
    "lora.alpha_pattern": [Case({"q_proj": 2.0}, ADAPTER, ("batches", "shapes"))],
    "lora.loraplus_lr_ratio": [Case(16.0, ADAPTER, ("batches", "rates"))],
    "data.path": [Case("{more}", BATCHES)],
    "data.validation_path": [Case("{more}", ("validated",), TRAINED, ALONE)],
    "data.test_path": [Case("{more}", ("tested",), TRAINED, ALONE)],
    "data.split": [Case([0.5, 0.3, 0.2], ("batches", "validated", "tested"))],
    "data.format": [Case("text", BATCHES, (), {"data.path": "{both}"})],
    "data.template": [
        Case("chat", BATCHES, (), {"model.source": "{chat}"}),
        Case("{template}", ("batches", "files")),
    ],
    "data.train_on": [Case("all", BATCHES)],
    "data.max_length": [Case(24, BATCHES)],
    "data.truncation": [
        Case("right", BATCHES, (), LONG | {"data.train_on": "all"}),
        Case("drop", BATCHES, (), {"data.path": "{uneven}", "data.max_length": 42}),
        Case("error", (), (), LONG, error="rows.jsonl:1: "),
    ],
    "data.packing": [Case(False, BATCHES)],
    "data.shuffle": [Case(False, BATCHES)],
    "data.strict": [Case(True, (), (), SPOILT, error="data.strict: .* has 1 rows")],
    "data.refused_path": [Case("refused.jsonl", FILES, TRAINED, SPOILT)],
    "data.num_workers": [
        Case(3, ("processes",), TRAINED, {"data.num_workers": 0}, chunk=200),
        Case(2, ("processes",), TRAINED, {"data.num_workers": 3}, chunk=200),
    ],
    "data.cache_dir": [Case("cache", FILES, TRAINED)],
    "training.learning_rate": [
        Case(3e-3, ("adapter", "rates"), BATCHES),
        Case("auto", ("adapter", "rates"), BATCHES),
    ],
    "training.lr_scheduler_type": [
        Case(name, ("adapter", "rates"), BATCHES) for name in SCHEDULES if name != "cosine"
    ],
    "training.warmup_steps": [Case(3, ("adapter", "rates"), BATCHES)],
    "training.max_steps": [Case(3, ("rates", "adapter", "files"))],
    "training.num_train_epochs": [Case(1.0, RATES, (), EPOCHS)],
    "training.per_device_train_batch_size": [Case(3, BATCHES), Case("auto", BATCHES)],
    "training.gradient_accumulation_steps": [Case(1, BATCHES)],
    "training.max_grad_norm": [Case(1e-3, ADAPTER, BATCHES), Case(None, ADAPTER, BATCHES)],
    "training.weight_decay": [Case(0.5, ADAPTER, ("batches", "rates"))],
    "training.adam_beta1": [Case(0.5, ADAPTER, BATCHES)],
    "training.adam_beta2": [Case(0.5, ADAPTER, BATCHES)],
    "training.adam_epsilon": [Case(1e-2, ADAPTER, BATCHES)],
    "training.gradient_checkpointing": [
        Case(
            how, ("recomputed",), ("batches", "losses"), {"training.gradient_checkpointing": False}
        )
        for how in (True, 1)
    ],
    "training.compile": [
        Case(True, ("compiled",), ("batches", "losses"), {"training.compile": False})
    ],
    "training.max_skipped_steps": [Case(2, ("error",), (), OVERFLOWS)],
    "training.seed": [Case(1, ("batches", "adapter"))],
    "checkpointing.output_dir": [Case("elsewhere", FILES, TRAINED)],
    "checkpointing.save_steps": [Case(1, FILES, TRAINED)],
    "checkpointing.eval_steps": [Case(1, ("validated",), TRAINED)],
    "checkpointing.save_total_limit": [Case(1, FILES, TRAINED, {"data.split": [0.9, 0.0, 0.1]})],
    "checkpointing.load_best_model_at_end": [Case(True, ADAPTER, ("batches", "validated"), WORSE)],
    "checkpointing.early_stopping_patience": [Case(1, ("rates", "validated"), (), WORSE)],
    "checkpointing.resume_from_checkpoint": [
        Case("none", BATCHES, ADAPTER, again=True),  # auto has nothing left to train
        Case("out/checkpoint-2", BATCHES, ADAPTER, again=True),
    ],
    "logging.logging_steps": [Case(2, ("metrics",), TRAINED)],
    "logging.report_to": [
        Case("tensorboard", FILES, TRAINED),
        Case("wandb", ("project",), TRAINED),
    ],
    "logging.run_name": [Case("a name", FILES, TRAINED, {"logging.report_to": "tensorboard"})],
    "logging.project": [Case("mine", ("project",), TRAINED, {"logging.report_to": "wandb"})],
    "generation.temperature": [Case(0.0, ("text",), (), ANY_TOKEN)],
    "generation.top_p": [Case(0.05, ("text",), (), ANY_TOKEN)],
    "generation.top_k": [Case(1, ("text",), (), ANY_TOKEN)],
    "generation.repetition_penalty": [Case(50.0, ("text",), (), ANY_TOKEN)],
    "generation.max_new_tokens": [Case(3, ("text",), (), ANY_TOKEN)],
}
LISTED = [
    pytest.param(name, case, id=f"{name}={case.value}"[:60])
    for name in FIELDS
    for case in CASES.get(name, [])
]


# ---- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_case(name):
    assert CASES.get(name), f"say in CASES what {name} changes in a run"


@pytest.mark.parametrize(("name", "case"), LISTED)
def test_a_field_changes_what_it_promises(runs, name, case):
    before = runs.twice(case)
    after = runs.once(case, {name: case.value})
    if case.error:
        assert before["error"] == ""
        assert re.search(case.error, after["error"]), after["error"]
        return
    for part in case.differs:
        assert not alike(before[part], after[part], part), f"{name} changes nothing of {part}"
    for part in case.same:
        assert alike(before[part], after[part], part), f"{name} changes {part}"
    if "error" not in case.differs:
        assert before["error"] == after["error"] == ""


def alike(a: Any, b: Any, part: str) -> bool:
    """Whether two observations agree; losses as far as the order of a sum goes."""
    if part != "losses":
        return a == b
    return len(a) == len(b) > 0 and bool(np.allclose(a, b, rtol=1e-4))


# ---- runs, and what is seen of them -------------------------------------------------------------


class Runs:
    """Does runs, each in a folder of its own, and keeps what was seen of those without a change."""

    def __init__(self, folder: Path, places: dict[str, str]) -> None:
        self.folder, self.places, self.number = folder, places, 0
        self.kept: dict[str, dict[str, Any]] = {}

    def twice(self, case: Case) -> dict[str, Any]:
        """What is seen without the change, once it was seen to be the same again."""
        key = json.dumps([case.base, case.again, case.chunk])
        if key not in self.kept:
            first, second = self.once(case, {}), self.once(case, {})
            assert {part for part in first if first[part] != second[part]} == set()
            self.kept[key] = first
        return self.kept[key]

    def once(self, case: Case, change: Values) -> dict[str, Any]:
        """What is seen of one run."""
        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        base = BASE | case.base
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("WANDB_MODE", "disabled")  # what it was given is seen, nothing is sent
            patch.setattr(encode, "CHUNK_BYTES", case.chunk)
            patch.setattr(encode, "BEFORE_WORKERS", 4 * case.chunk)
            if any(name.startswith("generation.") for name in case.base):
                seen = generated(self.resolved(base | change))
            else:
                if case.again:
                    observed(self.resolved(base), patch)
                seen = observed(self.resolved(base | change), patch)
        shutil.rmtree(folder)
        return seen

    def resolved(self, values: Values) -> dict[str, dict[str, Any]]:
        """section -> field -> value, with the paths in their places."""
        made: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            if isinstance(value, str) and value.startswith("{"):
                value = self.places[value.strip("{}")]
            made.setdefault(section, {})[key] = value
        return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs on tiny models and rows that are written once."""
    at = tmp_path_factory.mktemp("places")
    model = write_model(at / "model", intermediate_size=128)
    other = write_model(at / "other", intermediate_size=128, seed=5)
    chat = write_model(at / "chat", intermediate_size=128, chat=True)
    rows = write_rows(at / "rows.jsonl", 30)
    more = at / "more.jsonl"
    parsed = [json.loads(line) for line in rows.read_text().splitlines()]
    write_lines(more, [row | {"input": f"{row['input']} more"} for row in parsed])
    spoilt, both = at / "spoilt.jsonl", at / "both.jsonl"
    write_lines(spoilt, [*parsed, {"instruction": "count", "output": ""}])
    write_lines(both, [row | {"text": f"a text {i}"} for i, row in enumerate(parsed)])
    uneven, against = at / "uneven.jsonl", at / "against.jsonl"
    write_lines(
        uneven, [row | {"input": row["input"] * (1 + i % 2)} for i, row in enumerate(parsed)]
    )
    write_lines(against, [row | {"output": "zyxwv"} for row in parsed[:4]])
    template = at / "own.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    named = {"model": model, "other": other, "chat": chat, "rows": rows, "more": more}
    named |= {
        "against": against,
        "uneven": uneven,
        "spoilt": spoilt,
        "both": both,
        "template": template,
        "adapter": at / "adapter",
    }
    made = Runs(tmp_path_factory.mktemp("runs"), {k: str(v) for k, v in named.items()})
    versions = {None: model, "v2": other}

    def download(repo: str, revision: str | None = None, **_: Any) -> str:
        return str(versions[revision])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", download)
        # They take most of a run's time here, and no field is about them.
        patch.setattr("mlx_qlora.run.write_report", lambda *args, **how: None)
        patch.setattr(os, "fsync", lambda file: None)
        first = BASE | {"lora.r": 2, "checkpointing.output_dir": str(at / "adapter")}
        run(build(made.resolved(first)), Console(quiet=True))
        yield made


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def observed(values: dict[str, dict[str, Any]], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Does a run in the current folder; what was seen on the way, and what it left."""
    steps: list[tuple[Update, list[Any], float]] = []
    levels: list[list[int]] = []
    processes: list[int] = []
    products: Counter[str] = Counter()
    projects: list[str] = []
    real_step, real_schedule, real_pool = Update.step, engine.schedule, loky.ProcessPoolExecutor
    real_init = wandb.init

    def step(self: Update, share: list[Any], rate: float) -> Any:
        steps.append((self, share, rate))
        return real_step(self, share, rate)

    def schedule(*args: Any) -> Any:
        made = real_schedule(*args)
        levels.append(made.levels)
        return made

    def pool(n: int, **how: Any) -> Any:
        processes.append(n)
        return real_pool(n, **how)

    def init(**how: Any) -> Any:
        projects.append(how["project"])
        return real_init(**how)

    with patch.context() as inner:
        inner.setattr(wandb, "init", init)
        inner.setattr(Update, "step", step)
        inner.setattr(engine, "schedule", schedule)
        inner.setattr(loky, "ProcessPoolExecutor", pool)
        for name in ("_quantized_matmul", "_dense_product"):
            inner.setattr(quantize, name, counted(getattr(quantize, name), products))
        printed, error = io.StringIO(), ""
        try:
            run(build(values), Console(file=printed, width=160))
        except UserError as raised:
            error = str(raised)
    return {
        "error": error,
        "batches": [[(b.tokens.tolist(), b.labels.tolist()) for b in s] for _, s, _ in steps],
        "rates": [rate for _, _, rate in steps],
        "recomputed": levels,
        "processes": processes,
        "products": dict(products),
        "project": projects,
        **(seen_of_the_model(steps[0][0].engine) if steps else {}),
        **seen_on_disk(Path(values["checkpointing"]["output_dir"])),
        "tested": re.findall(r"test +loss .*", printed.getvalue()),
    }


def counted(function: Any, calls: Counter[str]) -> Any:
    """The function, which now counts its calls under its name."""

    def wrapped(*args: Any, **how: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **how)

    return wrapped


def seen_of_the_model(seen: engine.Engine) -> dict[str, Any]:
    """How the model lies in memory, and how it is computed."""
    matrices = [m for m in seen.model.modules() if isinstance(m, quantize.FrozenMatrix)]
    return {
        "packed": sum(array.nbytes for m in matrices for array in m.packed()),
        "resident": sum(m.resident_bytes for m in matrices),
        "dtype": str(seen.model(mx.array([[1]])).dtype),
        "compiled": seen.compiled,
    }


def seen_on_disk(output: Path) -> dict[str, Any]:
    """Adapter, metrics without what a clock says, and the names of all files."""
    adapter, weights, records = output / "adapter_config.json", {}, []
    if adapter.is_file():
        weights = load_file(output / "adapter_model.safetensors")
    if (output / "metrics.jsonl").is_file():
        lines = (output / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
    clock = ("tokens_per_second", "peak_memory_bytes", "eval_runtime")
    records = [{k: v for k, v in record.items() if k not in clock} for record in records]
    # TensorBoard puts the time, the machine and the process into a name.
    names = (re.sub(r"tfevents\..*", "tfevents", str(p)) for p in Path().rglob("*") if p.is_file())
    return {
        "adapter": {name: array.tobytes() for name, array in weights.items()},
        "shapes": {name: array.shape for name, array in weights.items()},
        "base": json.loads(adapter.read_text())["base_model_name_or_path"] if weights else "",
        "metrics": records,
        "losses": [record["loss"] for record in records if "loss" in record],
        "validated": [record for record in records if "eval_loss" in record],
        "files": sorted(names),
    }


def generated(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `mlx-qlora generate` says on the command line."""
    fields = [f"{s}.{k}={v}" for s in ("model", "generation") for k, v in values[s].items()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["generate", "--prompt", "count", "--seed", "3", *fields])
    return {"text": out.getvalue(), "error": err.getvalue() if code else ""}
