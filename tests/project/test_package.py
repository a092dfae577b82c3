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
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import packaging.metadata
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from support.tiny_folder import write_random_model, write_rows

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


def described(result: mq.TrainResult) -> str:
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
        print(described(tuned("model", Path("rows.jsonl"), Path("from-python"))))
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
    printed([*build, str(place / "both")])
    printed([*build, str(place / "direct"), "--wheel"])
    return {
        "sdist": only(place / "both", "*.tar.gz"),
        "wheel": only(place / "both", "*.whl"),
        "direct": only(place / "direct", "*.whl"),
    }


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def printed(words: list[str], cwd: Path | None = None) -> str:
    """What a command that succeeds prints on both streams."""
    done = subprocess.run(
        words, cwd=cwd, env=bare(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout[-3000:]}"
    return done.stdout


def bare() -> dict[str, str]:
    """This environment without what leads Python to the checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def raw(wheel: Path) -> bytes:
    files = contents(wheel)
    (name,) = [name for name in files if name.endswith(".dist-info/METADATA")]
    return files[name]


def metadata(wheel: Path) -> Message:
    return email.message_from_bytes(raw(wheel))


def test_the_wheel_holds_the_library_and_nothing_else(built):
    names = set(contents(built["wheel"]))
    inside = {name for name in names if not re.match(r"mlx_qlora-[\d.]+\.dist-info/", name)}
    tree = [path.relative_to(ROOT) for path in (ROOT / "mlx_qlora").rglob("*") if path.is_file()]
    ours = {str(path) for path in tree if "__pycache__" not in path.parts}
    assert inside == ours
    assert "mlx_qlora/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_makes_the_same_wheel(built):
    assert contents(built["wheel"]) == contents(built["direct"])
    with tarfile.open(built["sdist"]) as file:
        parts = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "mlx_qlora/py.typed"} <= parts


def test_the_metadata_says_what_pip_and_the_index_need(built):
    fields, version = metadata(built["wheel"]), built["wheel"].name.split("-")[1]
    assert fields["Version"] == version and fields["Requires-Python"] == ">=3.11"
    assert fields["License-Expression"] == "Apache-2.0" and fields["Summary"]
    shown = fields.get_payload(decode=True)
    assert isinstance(shown, bytes)
    assert shown.decode() == (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_metadata_is_what_the_index_accepts(built):
    for kind in ("wheel", "direct"):
        packaging.metadata.Metadata.from_email(raw(built[kind]), validate=True)
    fields = metadata(built["wheel"])
    assert fields["Description-Content-Type"] == "text/markdown"
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{fields['Version']}]" in notes, "a version has its release notes"


def test_no_extra_repeats_another():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = {"": project["dependencies"], **project["optional-dependencies"]}
    named = {extra: [Requirement(text) for text in texts] for extra, texts in parts.items()}
    asked = [r.name for texts in named.values() for r in texts if r.name != "mlx-qlora"]
    assert {name for name in asked if asked.count(name) > 1} == {"mlx"}, "one MLX for each system"
    within = {extra for texts in named.values() for r in texts for extra in r.extras}
    assert within - {"cpu", "cuda13", "python"} <= set(parts)


def promised() -> list[str]:
    """The versions of Python that the classifiers name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r"Python :: (3\.\d+)", text)


def test_every_dependency_installs_on_the_promised_pythons(built):
    own = SpecifierSet(metadata(built["wheel"])["Requires-Python"])
    assert promised()[0] in own and "3.10" not in own
    for name in asked_for(built["wheel"]):
        needs = SpecifierSet(importlib.metadata.metadata(name)["Requires-Python"] or "")
        assert [v for v in promised() if v not in needs] == [], name


def test_the_wheel_compiles_without_a_warning_where_there_is_an_interpreter(built, tmp_path):
    names = [shutil.which(f"python{version}") for version in promised()]
    there = [name for name in names if name and not subprocess.call([name, "-c", ""])]
    with zipfile.ZipFile(built["wheel"]) as file:
        file.extractall(tmp_path)
    for python in {sys.executable, *there}:
        printed([python, "-W", "error", "-m", "compileall", "-f", "-q", str(tmp_path)])


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
    printed([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")])
    commands = place / "venv" / "bin"
    link_packages(asked_for(built["wheel"]), place / "packages")
    site = only(place / "venv" / "lib", "python*") / "site-packages"
    (site / "packages.pth").write_text(f"{place / 'packages'}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(commands / "python")]
    printed([*pip, "install", "--quiet", "--no-index", "--no-deps", str(built["wheel"])])
    printed([*pip, "check"])
    return commands


@pytest.fixture
def empty(venv: Path, tmp_path: Path) -> Path:
    """An empty folder, in which `import mlx_qlora` finds the wheel and nothing else."""
    where = "import importlib.util as u, mlx_qlora; "
    where += "print(mlx_qlora.__file__, u.find_spec('torch'), u.find_spec('pytest'))"
    file, *others = printed([str(venv / "python"), "-c", where], tmp_path).split()
    assert Path(file).is_relative_to(venv.parent) and others == ["None", "None"]
    return tmp_path


@pytest.fixture
def with_model(empty: Path) -> Path:
    """The same folder with a tiny `model` and `rows.jsonl`."""
    write_random_model(empty / "model")
    write_rows(empty / "rows.jsonl", 40)
    return empty


def test_the_command_names_its_version_and_its_commands(venv, empty):
    command = str(venv / "mlx-qlora")
    version = printed([command, "--version"], empty)
    assert re.fullmatch(r"mlx-qlora \d+\.\d+\.\d+\S*\n", version)
    shown = printed([command, "--help"], empty)
    for name in ("train", "plan", "generate", "evaluate", "export", "push", "doctor"):
        assert re.search(rf"^    {name}\b", shown, re.MULTILINE), name
    assert list(empty.iterdir()) == []


def test_plan_and_train_run_from_the_wheel(venv, with_model):
    command = str(venv / "mlx-qlora")
    assert "predicted peak" in printed([command, "plan", "--model", "model"], with_model)
    words = ["train", "--model", "model", "--data", "rows.jsonl", *SHORT]
    words += ["model.base_model_name_or_path=some/model"]
    shown = printed([command, *words, "--output-dir", "outputs"], with_model)
    assert "step 2/2" in shown and "warning" not in shown.lower()
    left = {path.name for path in (with_model / "outputs").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "report.html", "mlx"} <= left
    module = [str(venv / "python"), "-m", "mlx_qlora.train", "--print-config", *words[1:]]
    assert "learning_rate: 0.0002" in printed(module, with_model)


# ---- a user's script ---------------------------------------------------------------------------

# What is right in SCRIPT -> (what is wrong instead, what pyright must say of it).
WRONG = {
    "result.train_loss]": ("result.trian_loss]", "trian_loss"),
    "max_length=64": ("max_lenght=64", "max_lenght"),
    "scores.n_tokens": ("scores.perplexity", '"float" is not assignable to "int"'),
    "learning_rate=1e-3": ("learning_rate=None", '"learning_rate"'),
    "split([0.8, 0.1, 0.1])": ("split(None)", '"shares"'),
}


def test_a_users_script_runs(venv, with_model):
    (with_model / "tune.py").write_text(SCRIPT)
    shown = printed([str(venv / "python"), "tune.py"], with_model)
    assert "from-python 2 [" in shown


def test_a_users_script_is_sound_to_pyright_and_a_wrong_one_is_not(venv, empty):
    """The wrong one is the control: were public names Any, anything at all would be sound."""
    text = SCRIPT
    for right, (wrong, _) in WRONG.items():
        assert right in text
        text = text.replace(right, wrong)
    (empty / "right.py").write_text(SCRIPT)
    (empty / "wrong.py").write_text(text)
    errors = pyright(empty, venv)
    assert errors["right.py"] == []
    for right, (_, message) in WRONG.items():
        assert any(message in error for error in errors["wrong.py"]), (right, errors)


def pyright(folder: Path, venv: Path) -> dict[str, list[str]]:
    """The errors of each script of a folder, with the installed package's types."""
    rules = {"typeCheckingMode": "standard", "pythonVersion": "3.11"}
    # Beyond the standard: nothing of ours may be of unknown type to a user.
    rules |= dict.fromkeys(
        ("reportUnknownMemberType", "reportUnknownVariableType", "reportUnknownArgumentType"),
        "error",
    )
    (folder / "pyrightconfig.json").write_text(json.dumps(rules))
    words = [sys.executable, "-m", "pyright", "--pythonpath", str(venv / "python"), "--outputjson"]
    done = subprocess.run(words, cwd=folder, env=bare(), capture_output=True, text=True)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    scripts = [path.name for path in folder.glob("*.py")]
    assert report["summary"]["filesAnalyzed"] == len(scripts), done.stdout + done.stderr
    errors: dict[str, list[str]] = {name: [] for name in scripts}
    for found in report["generalDiagnostics"]:
        errors[Path(found["file"]).name].append(f"{found['rule']}: {found['message']}")
    return errors


# ---- the import --------------------------------------------------------------------------------


def test_an_import_is_quick_and_brings_nothing_heavy(venv, empty):
    code = (
        "import sys, time; begun = time.process_time(); import mlx_qlora; "
        "print(time.process_time() - begun, *sys.modules)"
    )
    seconds = []
    for _ in range(3):
        spent, *modules = printed([str(venv / "python"), "-c", code], empty).split()
        seconds.append(float(spent))
        heavy = {"torch", "transformers", "mlx_lm", "matplotlib", "numpy", "rich"}
        assert not heavy & set(modules)
    assert min(seconds) < IMPORT_SECONDS
