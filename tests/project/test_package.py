"""What pip puts on a bare machine: wheel, sdist, commands, types, and what an import costs.

The venv is fresh and sees the wheel and the packages that the wheel itself asks for, nothing else:
no checkout, no torch. Those packages are links into this environment's, because pip needs a
minute and a network to fetch half a gigabyte of them again; a package that the wheel forgot to
ask for is missing there as it would be for a user.
"""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.numpy import save_file
from support.models import TINY
from support.tiny_folder import write_rows, write_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
IMPORT_SECONDS = 0.3
# On this many steps of a random model nothing is learned; that the run ends is what counts.
SHORT = ["--max-steps", "2", "training.warmup_steps=1", "data.num_workers=0"]
SHORT += ["data.max_length=64", "generation.max_new_tokens=4", "checkpointing.eval_steps=2"]

SCRIPT = '''"""What somebody writes who tunes a model from Python."""

from pathlib import Path

import mlx_qlora as mq


def tuned(source: str, rows: Path, output: Path) -> mq.TrainResult:
    model, tokenizer = mq.load(source, quantize=mq.QuantConfig(bits=4, group_size=64))
    examples = mq.read_examples(rows, tokenizer, mq.DataConfig(max_length=64, num_workers=0))
    train, validation, test = examples.split([0.8, 0.1, 0.1])
    config = mq.RunConfig(
        model=mq.ModelConfig(base_model_name_or_path="some/model"),
        lora=mq.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        training=mq.TrainingConfig(max_steps=2, warmup_steps=1, learning_rate=1e-3),
        checkpointing=mq.CheckpointingConfig(output_dir=str(output)),
        logging=mq.LoggingConfig(logging_steps=1),
    )
    result = mq.fine_tune(model, tokenizer, train, validation, config)
    scores = mq.evaluate(model, tokenizer, test)
    loss: float = scores.loss
    supervised: int = scores.n_tokens
    text: str = mq.generate(model, tokenizer, "Name three primes.", max_new_tokens=4)
    chat: str = mq.generate(
        model, tokenizer, [{"role": "user", "content": "Hello"}], max_new_tokens=4, seed=0
    )
    print(loss, supervised, text, chat)
    return result


def told(result: mq.TrainResult) -> str:
    folder: Path = result.output_dir
    steps: int = result.steps
    losses: list[float] = [result.train_loss]
    if result.eval_loss is not None:
        losses.append(result.eval_loss)
    figures: tuple[float, float, int] = (
        result.seconds, result.tokens_per_second, result.peak_memory_bytes
    )
    best: int | None = result.best_step
    return f"{folder} {steps} {losses} {figures} {best} {len(result.log_history)}"


if __name__ == "__main__":
    try:
        print(told(tuned("model", Path("rows.jsonl"), Path("from-python"))))
    except mq.UserError as error:
        raise SystemExit(f"sorry: {error}") from error
'''


# ---- what is built -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`sdist`; `wheel`, made from the sdist; `direct`, the wheel made from the sources."""
    place = tmp_path_factory.mktemp("built")
    # Of a copy, for setuptools leaves its folders beside the sources.
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site")
    sources = Path(shutil.copytree(ROOT, place / "sources", ignore=unwanted))
    build = [sys.executable, "-m", "build", "--no-isolation", str(sources), "--outdir"]
    told([*build, str(place / "both")])
    told([*build, str(place / "direct"), "--wheel"])
    return {
        "sdist": only(place / "both", "*.tar.gz"),
        "wheel": only(place / "both", "*.whl"),
        "direct": only(place / "direct", "*.whl"),
    }


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def told(words: list[str], cwd: Path | None = None, code: int = 0, stdin: str = "") -> str:
    """What a command prints on both streams; it must end with `code`."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=bare(),
        input=stdin,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout[-3000:]}"
    return done.stdout


def bare() -> dict[str, str]:
    """This environment without what leads Python to the checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def metadata(wheel: Path) -> Message:
    files = contents(wheel)
    (name,) = [name for name in files if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(files[name])


def test_the_wheel_holds_the_library_and_nothing_else(built: dict[str, Path]):
    names = set(contents(built["wheel"]))
    inside = {name for name in names if not re.match(r"mlx_qlora-[\d.]+\.dist-info/", name)}
    tree = [path.relative_to(ROOT) for path in (ROOT / "mlx_qlora").rglob("*") if path.is_file()]
    ours = {str(path) for path in tree if "__pycache__" not in path.parts}
    assert inside == ours
    assert "mlx_qlora/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_makes_the_same_wheel(built: dict[str, Path]):
    assert contents(built["wheel"]) == contents(built["direct"])
    with tarfile.open(built["sdist"]) as file:
        parts = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "mlx_qlora/py.typed"} <= parts


def test_the_metadata_says_what_pip_and_the_index_need(built: dict[str, Path]):
    said, version = metadata(built["wheel"]), built["wheel"].name.split("-")[1]
    assert said["Version"] == version and said["Requires-Python"] == ">=3.10"
    assert said["License-Expression"] == "Apache-2.0" and said["Summary"]
    shown = said.get_payload(decode=True)
    assert isinstance(shown, bytes)
    assert shown.decode() == (ROOT / "README.md").read_text(encoding="utf-8")


# ---- what is installed ---------------------------------------------------------------------------


def asked_for(wheel: Path) -> set[str]:
    """The names of the distributions that a plain `pip install` of a wheel brings."""
    todo = [(text, "") for text in metadata(wheel).get_all("Requires-Dist", [])]
    seen: set[tuple[str, str]] = set()
    while todo:
        text, extra = todo.pop()
        asked = Requirement(text)
        if asked.marker and not asked.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(asked.name)
        for wanted in {"", *asked.extras} - {known for of, known in seen if of == name}:
            seen.add((name, wanted))
            todo += [(t, wanted) for t in importlib.metadata.requires(name) or ()]
    return {name for name, _ in seen}


def link_packages(names: set[str], folder: Path) -> None:
    """Links the top level of installed distributions, and their metadata, into a folder."""
    folder.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            target = Path(str(distribution.locate_file(top)))
            if not (folder / top).exists():
                (folder / top).symlink_to(target)


@pytest.fixture(scope="module")
def venv(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; returns the folder of its commands."""
    place = tmp_path_factory.mktemp("installed")
    told([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")])
    commands = place / "venv" / "bin"
    link_packages(asked_for(built["wheel"]), place / "packages")
    site = only(place / "venv" / "lib", "python*") / "site-packages"
    (site / "packages.pth").write_text(f"{place / 'packages'}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(commands / "python")]
    told([*pip, "install", "--quiet", "--no-index", "--no-deps", str(built["wheel"])])
    told([*pip, "check"])
    return commands


@pytest.fixture
def empty(venv: Path, tmp_path: Path) -> Path:
    """An empty folder, in which `import mlx_qlora` finds the wheel and nothing else."""
    where = "import importlib.util as u, mlx_qlora; "
    where += "print(mlx_qlora.__file__, u.find_spec('torch'), u.find_spec('pytest'))"
    found, *of_others = told([str(venv / "python"), "-c", where], tmp_path).split()
    assert Path(found).is_relative_to(venv.parent) and of_others == ["None", "None"]
    return tmp_path


@pytest.fixture
def with_model(empty: Path) -> Path:
    """The same folder with a tiny `model` and `rows.jsonl`."""
    write_tiny_model(empty / "model")
    write_rows(empty / "rows.jsonl", 40)
    return empty


def write_tiny_model(folder: Path) -> None:
    """A random Llama whose widths groups of 64 divide, without torch, whose import takes long."""
    write_tokenizer(folder, chat=True)
    config = {**TINY, "intermediate_size": 192, "rope_theta": 1e4, "model_type": "llama"}
    config |= {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    D, F, K, V = 64, 192, 32, TINY["vocab_size"]
    linears = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D)}
    linears |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D)}
    layer = {**linears, "mlp.down_proj": (D, F), "input_layernorm": (D,)}
    layer["post_attention_layernorm"] = (D,)
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    for i in range(TINY["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    draw = np.random.default_rng(0)
    weights = {
        f"{name}.weight": (draw.normal(size=shape) * 0.08 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_command_names_its_version_and_its_commands(venv: Path, empty: Path):
    command = str(venv / "mlx-qlora")
    said = told([command, "--version"], empty)
    assert re.fullmatch(r"mlx-qlora \d+\.\d+\.\d+\S*\n", said)
    shown = told([command, "--help"], empty)
    for name in ("train", "plan", "generate", "evaluate", "export", "push", "doctor"):
        assert re.search(rf"^    {name}\b", shown, re.MULTILINE), name
    assert list(empty.iterdir()) == []


def test_plan_and_train_run_from_the_wheel(venv: Path, with_model: Path):
    command = str(venv / "mlx-qlora")
    assert "predicted peak" in told([command, "plan", "--model", "model"], with_model)
    words = ["train", "--model", "model", "--data", "rows.jsonl", *SHORT]
    words += ["model.base_model_name_or_path=some/model"]
    said = told([command, *words, "--output-dir", "outputs"], with_model)
    assert "step 2/2" in said and "warning" not in said.lower()
    left = {path.name for path in (with_model / "outputs").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "report.html", "mlx"} <= left
    module = [str(venv / "python"), "-m", "mlx_qlora.train", "--print-config", *words[1:]]
    assert "learning_rate: 0.0002" in told(module, with_model)


def test_a_users_script_is_sound_to_pyright_and_runs(venv: Path, with_model: Path):
    script = with_model / "tune.py"
    script.write_text(SCRIPT)
    assert faults_of(script, venv) == []
    said = told([str(venv / "python"), "tune.py"], with_model)
    assert "from-python 2 [" in said


def test_pyright_finds_what_is_wrong_in_a_users_script(venv: Path, empty: Path):
    """The control: public names are no Any, or anything at all would be sound."""
    wrongs = {
        "result.train_loss]": ("result.trian_loss]", "trian_loss"),
        "max_length=64": ("max_lenght=64", "max_lenght"),
        "scores.n_tokens": ("scores.perplexity", '"float" is not assignable to "int"'),
        "learning_rate=1e-3": ("learning_rate=None", '"learning_rate"'),
        "split([0.8, 0.1, 0.1])": ("split(None)", '"shares"'),
    }
    text = SCRIPT
    for right, (wrong, _) in wrongs.items():
        assert right in text
        text = text.replace(right, wrong)
    script = empty / "tune.py"
    script.write_text(text)
    found = faults_of(script, venv)
    for right, (_, told_of) in wrongs.items():
        assert any(told_of in fault for fault in found), (right, found)


def faults_of(script: Path, venv: Path) -> list[str]:
    """The errors that pyright finds in a script, with the installed package's types."""
    rules = {"typeCheckingMode": "standard", "pythonVersion": "3.10"}
    # Beyond the standard: nothing of ours may be of unknown type to a user.
    rules |= dict.fromkeys(
        ("reportUnknownMemberType", "reportUnknownVariableType", "reportUnknownArgumentType"),
        "error",
    )
    (script.parent / "pyrightconfig.json").write_text(json.dumps(rules))
    words = [sys.executable, "-m", "pyright", "--pythonpath", str(venv / "python")]
    done = subprocess.run(
        [*words, "--outputjson", script.name],
        cwd=script.parent,
        env=bare(),
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["summary"]["filesAnalyzed"] == 1, done.stdout + done.stderr
    return [f"{found['rule']}: {found['message']}" for found in report["generalDiagnostics"]]


def test_an_import_is_quick_and_brings_nothing_heavy(venv: Path, empty: Path):
    code = (
        "import sys, time; begun = time.process_time(); import mlx_qlora; "
        "print(time.process_time() - begun, *sys.modules)"
    )
    seconds = []
    for _ in range(5):
        spent, *modules = told([str(venv / "python"), "-c", code], empty).split()
        seconds.append(float(spent))
        heavy = {"torch", "transformers", "mlx_lm", "matplotlib", "numpy", "mlx.core", "rich"}
        assert not heavy & set(modules)
    assert min(seconds) < IMPORT_SECONDS
