"""No field is accepted and ignored: each one is changed, and a run is seen to differ by it.

CASES says for every field to which value it is changed, which observations of a run must differ by
that, which must stay the same, and what else must be set for the field to matter.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
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
from support.training import train_run

from mlx_qlora import cli
from mlx_qlora.config import SECTIONS
from mlx_qlora.data import encode
from mlx_qlora.errors import UserError
from mlx_qlora.model import quantize
from mlx_qlora.train import engine, memory
from mlx_qlora.train.optim import SCHEDULES
from mlx_qlora.train.step import Step

FIELDS = [f"{s}.{f.name}" for s, config in SECTIONS.items() for f in dataclasses.fields(config)]
Values = dict[str, Any]

# A run without a case's own values. All rows are trained on: validation and answers take time.
BASE: Values = {
    "model.source": "{model}",
    "model.bits": 4,
    "data.path": "{rows}",
    "data.max_length": 64,
    "data.split": [1.0, 0.0, 0.0],
    "data.cache_dir": None,
    "lora.r": 4,
    "lora.lora_dropout": 0.1,
    "training.max_steps": 4,
    "training.warmup_steps": 1,
    "training.learning_rate": 1e-2,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 1,
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
        value: what the field is set to; {names} are files of `places`.
        differs: names of observations that must differ, separated by spaces; see `observed`.
        same: names of those that must not.
        base: other fields that make it matter, also set in the run that it is compared with.
        error: what the change must be refused with; the other run must not be.
        again: both runs are done in a folder where the run without the change ended before.
    """

    value: Any
    differs: str = ""
    same: str = ""
    base: Values = field(default_factory=dict)
    error: str = ""
    again: bool = False


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    """A question and its answer."""
    said = {"user": row["instruction"], "assistant": row["output"]}
    return [{"role": role, "content": content} for role, content in said.items()]


# ---- the table ---------------------------------------------------------------------------------

VALIDATED = {"data.split": [0.9, 0.1, 0.0]}
TESTED = {"data.split": [0.8, 0.1, 0.1]}
WORSE = {"data.validation_path": "{against}", "checkpointing.eval_steps": 1}
WORSE["training.learning_rate"] = 0.5  # the first validation is the best, the next is worse
SPOILT = {"data.path": "{spoilt}"}  # one row of it cannot be used
SHORT = {"data.max_length": 24}
EPOCHS = {"training.max_steps": None, "training.num_train_epochs": 0.5}
DPO = {"data.path": "{pairs}", "training.objective": "dpo"}
SIMPO = DPO | {"training.objective": "simpo"}
KTO = {"data.path": "{judged}", "training.objective": "kto"}
SAMPLED = {
    "generation.temperature": 1.0,
    "generation.top_k": 0,
    "generation.top_p": 1.0,
    "generation.repetition_penalty": 1.0,
    "generation.max_new_tokens": 16,
}

CASES: dict[str, list[Case]] = {
    "model.source": [Case("{other}", "adapter", "batches")],
    "model.revision": [
        Case("v2", "adapter", "batches", {"model.source": "org/tiny"}),
        Case("v2", error="leave out model.revision"),
    ],
    "model.adapter": [
        Case("{adapter}", "shapes adapter", "batches", {"lora.r": 16}),
        Case("{adapter}", error="lora.r is 2 in the adapter .*, and cannot be changed to 4"),
    ],
    "model.base_model_name_or_path": [Case("org/name", "base", "batches adapter")],
    "model.bits": [Case(bits, "packed adapter", "batches") for bits in (8, None)],
    "model.group_size": [Case(32, "packed adapter", "batches")],
    "model.mode": [Case("mxfp4", "packed adapter", "batches", {"model.group_size": 32})],
    "model.dtype": [Case("float16", "dtype adapter", "batches")],
    "model.frozen_matmul": [
        Case("quantized", "resident products", "losses", {"model.frozen_matmul": "resident"}),
        Case("dequantize", "resident", "losses", {"model.frozen_matmul": "resident"}),
        Case("quantized", "products", "losses", {"model.frozen_matmul": "dequantize"}),
    ],
    "model.residency": [
        Case("streamed", "in_memory", "batches adapter", {"model.frozen_matmul": "dequantize"})
    ],
    "lora.r": [Case(8, "shapes", "batches")],
    "lora.lora_alpha": [Case(64, "adapter losses", "batches shapes")],
    "lora.lora_dropout": [Case(p, "adapter", "batches") for p in (0.5, 0.0)],
    "lora.target_modules": [
        Case(["q_proj", "v_proj"], "shapes", "batches"),
        Case(r".*layers\.1\.mlp\.up_proj", "shapes", "batches"),
    ],
    "lora.layers_to_transform": [Case([1], "shapes", "batches")],
    "lora.bias": [Case("all", error="lora.bias must be one of 'none'")],
    "lora.use_rslora": [Case(True, "adapter", "batches shapes")],
    "lora.use_dora": [Case(True, "shapes", "batches")],
    "lora.init_lora_weights": [
        Case(begin, "adapter", "batches") for begin in ("gaussian", "pissa", "olora", "loftq")
    ],
    "lora.rank_pattern": [Case({"q_proj": 2}, "shapes", "batches")],
    "lora.alpha_pattern": [Case({"q_proj": 2.0}, "adapter", "batches shapes")],
    "lora.loraplus_lr_ratio": [Case(16.0, "adapter", "batches rates")],
    "data.path": [Case("{more}", "batches")],
    "data.validation_path": [Case("{more}", "validated", "batches adapter")],
    "data.test_path": [Case("{more}", "tested", "batches adapter")],
    "data.split": [Case([0.5, 0.3, 0.2], "batches validated tested", base=TESTED)],
    "data.columns": [
        Case({"instruction": "input", "input": "instruction"}, "batches"),
        Case({"instruction": "question"}, error="no usable row in"),
    ],
    "data.system": [Case("Be brief.", "batches", base={"model.source": "{chat}"})],
    "data.format": [Case("text", "batches", base={"data.path": "{both}"})],
    "data.template": [
        Case("chat", "batches", base={"model.source": "{chat}"}),
        Case("{template}", "batches files"),
        Case("alpaca-preamble", "batches", base={"data.template": "alpaca"}),
    ],
    "data.history": [
        Case("as_asked", "batches", base={"model.source": "{chat}", "data.path": "{chats}"})
    ],
    "data.train_on": [Case("all", "batches")],
    "data.prompt_loss_weight": [Case(0.1, "batches adapter")],
    "data.max_length": [Case(24, "batches")],
    "data.truncation": [
        Case("right", "batches", base=SHORT | {"data.train_on": "all"}),
        Case("drop", "batches", base={"data.path": "{uneven}", "data.max_length": 42}),
        Case("error", base=SHORT, error="rows.jsonl:1: "),
    ],
    "data.packing": [Case(False, "", "batches adapter")],
    "data.shuffle": [Case(False, "batches")],
    "data.strict": [Case(True, base=SPOILT, error="data.strict: .* has 1 rows")],
    "data.max_refused": [Case(0, base=SPOILT, error="3% of the rows of .* cannot be used")],
    "data.refused_path": [Case("refused.jsonl", "files", "batches adapter", SPOILT)],
    "data.num_workers": [
        Case(3, "processes", "batches adapter", {"data.num_workers": 0}),
        Case(2, "processes", "batches adapter", {"data.num_workers": 3}),
    ],
    "data.cache_dir": [Case("cache", "files", "batches adapter")],
    "training.learning_rate": [Case(rate, "adapter rates", "batches") for rate in (3e-3, "auto")],
    "training.lr_scheduler_type": [
        Case(name, "adapter rates", "batches") for name in SCHEDULES if name != "cosine"
    ],
    "training.warmup_ratio": [
        Case(0.9, "adapter rates", "batches", {"training.warmup_steps": None})
    ],
    "training.warmup_steps": [Case(3, "adapter rates", "batches")],
    "training.max_steps": [Case(3, "adapter rates files")],
    "training.num_train_epochs": [Case(1.0, "rates", base=EPOCHS)],
    "training.per_device_train_batch_size": [Case(n, "batches") for n in (3, "auto")],
    "training.gradient_accumulation_steps": [Case(2, "batches")],
    "training.max_grad_norm": [Case(norm, "adapter", "batches") for norm in (1e-3, None)],
    "training.weight_decay": [Case(0.5, "adapter", "batches rates")],
    "training.adam_beta1": [Case(0.5, "adapter", "batches")],
    "training.adam_beta2": [Case(0.5, "adapter", "batches")],
    "training.adam_epsilon": [Case(1e-2, "adapter", "batches")],
    "training.gradient_checkpointing": [
        Case(level, "recomputed", "batches losses", {"training.gradient_checkpointing": False})
        for level in (True, 1)
    ],
    "training.compile": [Case(True, "compiled", "batches losses", {"training.compile": False})],
    "training.max_skipped_steps": [
        Case(2, "error", base={"training.learning_rate": 1e30, "training.max_steps": 8})
    ],
    "training.seed": [Case(1, "batches adapter")],
    "training.objective": [
        *(Case(name, "adapter", "batches", DPO) for name in ("orpo", "simpo")),
        Case(
            "kto",
            error="no usable row in .*'label' is missing",
        ),
        Case(
            "dpo",
            error="has no 'chosen' and no 'rejected'; set training.objective=sft",
        ),
    ],
    "training.beta": [Case(0.5, "adapter", "batches", base) for base in (DPO, KTO)],
    "training.label_smoothing": [Case(0.3, "adapter", "batches", DPO)],
    "training.rpo_alpha": [Case(1.0, "adapter", "batches", base) for base in (DPO, SIMPO)],
    "training.simpo_gamma": [Case(0.0, "adapter", "batches", SIMPO)],
    "training.desirable_weight": [Case(3.0, "adapter", "batches", KTO)],
    "training.kl_weight": [Case(1.0, "adapter", "batches")],
    "training.undesirable_weight": [Case(3.0, "adapter", "batches", KTO)],
    "checkpointing.output_dir": [Case("elsewhere", "files", "batches adapter")],
    "checkpointing.save_steps": [Case(1, "files", "batches adapter")],
    "checkpointing.eval_steps": [Case(1, "validated", "batches adapter", VALIDATED)],
    "checkpointing.save_total_limit": [Case(1, "files", "batches adapter")],
    "checkpointing.load_best_model_at_end": [Case(True, "adapter", "batches validated", WORSE)],
    "checkpointing.early_stopping_patience": [Case(1, "rates validated", base=WORSE)],
    "checkpointing.resume_from_checkpoint": [
        Case("none", "batches", "adapter", again=True),  # auto has nothing left to train
        Case(False, "batches", "adapter", again=True),
        Case("out/checkpoint-2", "batches", "adapter", again=True),
    ],
    "logging.logging_steps": [Case(2, "metrics", "batches adapter")],
    "logging.report_to": [
        Case("tensorboard", "files", "batches adapter"),
        Case("wandb", "project", "batches adapter"),
    ],
    "logging.run_name": [
        Case("a name", "files", "batches adapter", {"logging.report_to": "tensorboard"})
    ],
    "logging.project": [Case("mine", "project", "batches adapter", {"logging.report_to": "wandb"})],
    "generation.temperature": [Case(0.0, "text", base=SAMPLED)],
    "generation.top_p": [Case(0.05, "text", base=SAMPLED)],
    "generation.top_k": [Case(1, "text", base=SAMPLED)],
    "generation.repetition_penalty": [Case(50.0, "text", base=SAMPLED)],
    "generation.max_new_tokens": [Case(3, "text", base=SAMPLED)],
}
LISTED = [
    pytest.param(name, case, id=f"{name}={case.value}"[:60])
    for name, cases in CASES.items()
    for case in cases
]


# ---- the tests ---------------------------------------------------------------------------------


def test_every_field_has_a_case():
    assert CASES.keys() == set(FIELDS), "say in CASES what a field changes in a run"


def test_a_run_without_a_change_is_the_same_again(runs):
    """The control: what differs by chance would prove nothing of a field."""
    case = Case(None, base=TESTED)
    first, second = runs.once(case, {}), runs.once(case, {})
    assert first == second and first["error"] == ""
    assert all(first[part] for part in ("batches", "adapter", "validated", "tested", "losses"))


@pytest.mark.filterwarnings("ignore::mlx_qlora.errors.StreamedWarning")
@pytest.mark.parametrize(("name", "case"), LISTED)
def test_a_field_changes_what_it_promises(runs, name, case):
    before, after = runs.unchanged(case), runs.once(case, {name: case.value})
    if case.error:
        assert before["error"] == ""
        assert re.search(case.error, after["error"], re.DOTALL), after["error"]
        return
    for part in case.differs.split():
        assert not alike(before[part], after[part], part), f"{name} changes nothing of {part}"
    for part in case.same.split():
        assert alike(before[part], after[part], part), f"{name} changes {part}"
    if "error" not in case.differs:
        assert before["error"] == after["error"] == ""


def alike(a: Any, b: Any, part: str) -> bool:
    """Whether two observations agree; losses as far as the order of a sum goes."""
    if part != "losses":
        return a == b
    return len(a) == len(b) > 0 and bool(np.allclose(a, b, rtol=1e-4))


# ---- runs --------------------------------------------------------------------------------------


class Runs:
    """Does runs, each in a folder of its own.

    Args:
        folder: for theirs.
        places: name -> path, for values that are written as {name}.
    """

    def __init__(self, folder: Path, places: dict[str, Path]) -> None:
        self.folder, self.places, self.number = folder, places, 0
        self.kept: dict[str, dict[str, Any]] = {}

    def unchanged(self, case: Case) -> dict[str, Any]:
        """What is seen without the change; cases of the same base share the run."""
        key = json.dumps([case.base, case.again])
        if key not in self.kept:
            self.kept[key] = self.once(case, {})
        return self.kept[key]

    def once(self, case: Case, change: Values) -> dict[str, Any]:
        """What is seen of one run, or of one answer for a field of generation."""
        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        values = self.by_section(BASE | case.base | change)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            if case.base is SAMPLED:
                seen = answered(values)
            else:
                if case.again:
                    observed(self.by_section(BASE | case.base))
                seen = observed(values)
        shutil.rmtree(folder)
        return seen

    def by_section(self, values: Values) -> dict[str, dict[str, Any]]:
        """section -> field -> value, with the paths in their places."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            if isinstance(value, str) and value.startswith("{"):
                value = str(self.places[value.strip("{}")])
            sections.setdefault(section, {})[key] = value
        return sections


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs on tiny models and rows that are written once."""
    at = tmp_path_factory.mktemp("places")
    places = {"rows": write_rows(at / "rows.jsonl", 30), "adapter": at / "adapter"}
    places |= {
        name: write_model(at / name, intermediate_size=128, **how)
        for name, how in {"model": {}, "other": {"seed": 5}, "chat": {"chat": True}}.items()
    }
    rows = [json.loads(line) for line in places["rows"].read_text().splitlines()]
    changed = {
        "more": [row | {"input": f"{row['input']} more"} for row in rows],
        "spoilt": [*rows, {"instruction": "count", "output": ""}],
        "both": [row | {"text": f"a text {i}"} for i, row in enumerate(rows)],
        "uneven": [row | {"input": row["input"] * (1 + i % 2)} for i, row in enumerate(rows)],
        "chats": [{"messages": [*turns(row), *turns(row)]} for row in rows],
        "against": [row | {"output": "zyxwv"} for row in rows[:4]],
        "judged": [row | {"label": i % 3 > 0} for i, row in enumerate(rows)],
        "pairs": [
            {"instruction": row["instruction"], "chosen": row["output"], "rejected": "zyxwv"}
            for row in rows
        ],
    }
    for name, those in changed.items():
        places[name] = at / f"{name}.jsonl"
        places[name].write_text("".join(json.dumps(row) + "\n" for row in those))
    places["template"] = at / "own.jinja"
    places["template"].write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")

    def download(repo: str, revision: str | None = None, **_: Any) -> str:
        return str(places["other" if revision == "v2" else "model"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", download)
        patch.setenv("WANDB_MODE", "disabled")  # what it was given is seen, nothing is sent
        patch.setattr(encode, "CHUNK_BYTES", 200)  # of rows for a worker, so that few are enough
        patch.setattr(encode, "BEFORE_WORKERS", 800)
        # They take most of a run's time here, and no field is about them.
        patch.setattr("mlx_qlora.after.observer.write_report", lambda *args, **how: None)
        # By the clock it is written during a run, or not.
        patch.setattr("mlx_qlora.after.observer.Observer._write_page", lambda *args, **how: None)
        patch.setattr(os, "fsync", lambda file: None)
        runs = Runs(tmp_path_factory.mktemp("runs"), places)
        first = BASE | {"lora.r": 2, "checkpointing.output_dir": str(places["adapter"])}
        train_run(runs.by_section(first))
        yield runs


# ---- what is seen of them ----------------------------------------------------------------------


def observed(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Does a run in the current folder; what was seen on the way, and what it left."""
    steps: list[tuple[Any, ...]] = []
    schedules: list[tuple[Any, ...]] = []
    pools: list[tuple[Any, ...]] = []
    projects: list[str] = []
    products: Counter[str] = Counter()
    printed, error = io.StringIO(), ""
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str, note: Callable[..., Any]) -> None:
            real = getattr(owner, name)

            def watched(*args: Any, **how: Any) -> Any:
                result = real(*args, **how)
                note(result, *args, **how)
                return result

            patch.setattr(owner, name, watched)

        watch(Step, "__call__", lambda _, *args: steps.append(args))
        watch(memory.Footprint, "schedule", lambda made, *_: schedules.append(made.levels))
        watch(loky, "ProcessPoolExecutor", lambda _, n, **how: pools.append(n))
        watch(wandb, "init", lambda _, **how: projects.append(how["project"]))
        for owner, name in ((mx, "quantized_matmul"), (quantize, "_dense_product")):
            watch(owner, name, lambda *_, name=name, **how: products.update([name]))
        try:
            train_run(values, Console(file=printed, width=160))
        except UserError as raised:
            error = str(raised)
    return {
        "error": error,
        "batches": [[(b.tokens.tolist(), b.labels.tolist()) for b in step[1]] for step in steps],
        "rates": [step[2] for step in steps],
        "recomputed": schedules,
        "processes": pools,
        "products": dict(products),
        "project": projects,
        **(seen_of_the_model(steps[0][0].engine) if steps else {}),
        **seen_on_disk(Path(values["checkpointing"]["output_dir"])),
        "tested": re.findall(r"test +loss .*", printed.getvalue()),
    }


def seen_of_the_model(seen: engine.Engine) -> dict[str, Any]:
    """How the model lies in memory, and how it is computed."""
    matrices = [m for m in seen.model.modules() if isinstance(m, quantize.FrozenMatrix)]
    return {
        "packed": sum(array.nbytes for m in matrices for array in m.packed()),
        "resident": sum(m.resident_bytes for m in matrices),
        "in_memory": sum(not m.is_away for m in matrices),
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
    clock = "tokens_per_second", "peak_memory_bytes", "process_memory_bytes", "eval_runtime"
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


def answered(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `mlx-qlora generate` says on the command line."""
    fields = [f"{s}.{k}={v}" for s in ("model", "generation") for k, v in values[s].items()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["generate", "--prompt", "count", "--seed", "3", *fields])
    return {"text": out.getvalue(), "error": err.getvalue() if code else ""}
