"""What README and docs say is what the code does: every command of every page is run."""

import dataclasses
import functools
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.documented_commands import (
    NOT_RUN,
    PAGES,
    ROOT,
    Command,
    Step,
    extras,
    is_a_name_only,
    make_targets,
    ours,
    steps,
)
from support.tiny_folder import write_random_model, write_rows

import mlx_qlora as mq
from mlx_qlora import cli
from mlx_qlora.cli import COMMANDS
from mlx_qlora.model import hub

# Behind every command: a tiny model for a moment, whatever the page says for a real one.
SHORT = ["data.num_workers=0", "generation.max_new_tokens=4"]
SHORT_RUN = ["training.warmup_steps=1", "checkpointing.eval_steps=2"]
# Advice for one situation each: nobody follows such a page from its beginning to its end, so no
# run of it finds the checkpoints of another. How-tos, the tutorial and README are followed.
INDEPENDENT = {
    *("docs/troubleshooting.md", "docs/migration.md", "docs/performance.md"),
    *(page for page in PAGES if page.startswith("docs/concepts/")),
}
OF_OTHERS = {  # a Python block that imports one of these is compiled and not run
    "peft": "opens the base on the hub; tests/adapters/test_peft.py does it",
    "transformers": "opens a model of the hub; tests/adapters/test_merge.py does it",
    "mlx_lm": "opens a model of the hub; tests/adapters/test_mlx_lm.py opens our files with it",
    "vllm": "needs a GPU and is not installed",
    "wandb": "needs an account",
}


def test_the_field_reference_is_current():
    page = runpy.run_path(str(ROOT / "docs" / "make_fields.py"))["page"]()
    assert (ROOT / "docs" / "fields.md").read_text(encoding="utf-8") == page, "run `make docs`"


@pytest.mark.parametrize("page", ["migration.md", "how-to/choose-settings.md"])
def test_the_names_of_other_trainers_and_the_presets_are_current(page):
    filled = runpy.run_path(str(ROOT / "docs" / "make_fields.py"))["filled"]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert "<!-- end -->" in text and filled(text) == text, "run `make docs`"


def test_the_predictions_for_macs_are_what_the_planner_says_today():
    filled = runpy.run_path(str(ROOT / "docs" / "make_machines.py"))["filled"]
    text = (ROOT / "docs" / "how-to" / "on-your-mac.md").read_text(encoding="utf-8")
    assert text.count("<!-- end -->") == 2 and filled(text) == text, "run `make docs`"


def test_the_references_are_current():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    for name, page in (("cli", made["cli_page"]()), ("python", made["python_page"]())):
        path = ROOT / "docs" / "reference" / f"{name}.md"
        assert path.read_text(encoding="utf-8") == page, "run `make docs`"


def test_the_screens_are_what_the_command_prints_today():
    page = runpy.run_path(str(ROOT / "docs" / "make_screens.py"))["page"]
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert "3 refused" in text
    assert page(text) == text, "run `make docs`"


def test_the_picture_of_the_house_is_current_and_names_every_module():
    picture = runpy.run_path(str(ROOT / "docs" / "make_figures.py"))["architecture"]()
    path = ROOT / "docs" / "figures" / "architecture.svg"
    assert path.read_text(encoding="utf-8") == picture, "run `make docs`"
    shown = set(re.findall(r"[\w.]+", re.sub("<[^>]*>", " ", picture)))
    for module in (ROOT / "mlx_qlora").rglob("*.py"):
        if module.stem not in ("__init__", "_version", "__main__"):
            assert module.stem in shown


@pytest.mark.parametrize(
    "most, pages", [(700, PAGES[:1]), (18_000, [page for page in PAGES[1:] if "log" not in page])]
)
def test_the_words_can_be_read_in_an_hour(most, pages):
    """The marks of a table's columns and of lists are no words; the log is one."""
    words = [w for page in pages for w in (ROOT / page).read_text(encoding="utf-8").split()]
    assert 0 < len([word for word in words if re.search(r"\w", word)]) <= most


@pytest.mark.parametrize("page", [p for p in PAGES[1:] if not p.startswith("docs/log")])
def test_a_page_begins_with_what_one_can_do_after_it(page):
    first = (ROOT / page).read_text(encoding="utf-8").split("\n\n")[1]
    assert re.search(r"\b(you|your|yours)\b", first, re.IGNORECASE), first


def test_messages_in_the_tables_are_the_programs():
    """Of each quoted message what stands between its dots and numbers is a piece of one of ours."""
    listed = runpy.run_path(str(ROOT / "docs" / "list_messages.py"))["messages"]()
    ours = "\n".join(re.sub(r"\{[^}]*\}", "|", message.text) for message in listed)
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) > 10
    for quote in quoted:
        for piece in re.split(r"\.\.\.|\d+|'\w+'|messages\[.*", quote):
            assert piece.strip(" :(),") in ours, quote


def of_kind(*kinds: str) -> list[tuple[str, Step]]:
    return [(page, step) for page in PAGES for step in steps(page) if step.kind in kinds]


def test_the_collector_finds_what_a_reader_finds():
    commands = [step.text for page, step in of_kind("shell") if page == "README.md"]
    assert {"make demo", "make test"} <= {*commands}
    (generate,) = [c for c in commands if c.startswith("mlx-qlora generate")]
    assert shlex.split(generate)[-2:] == ["--prompt", "What does a P/E of 25 mean?"]
    assert all("#" not in command for command in commands)
    (joined,) = [
        s.text
        for p, s in of_kind("shell")
        if p == "docs/scaling.md" and "hosts.json" in s.text and "config" in s.text
    ]
    assert "--auto-setup --output-hostfile" in " ".join(joined.split())
    assert any(page == "docs/judging.md" for page, _ in of_kind("inline"))


def test_python_in_the_docs_compiles_and_names_only_what_exists():
    blocks = of_kind("python")
    assert len(blocks) > 2
    for page, step in blocks:
        compile(step.text, f"{page}:{step.line}", "exec")
        for name in re.findall(r"\bmq\.(\w+)", step.text):
            assert hasattr(mq, name), f"{page}:{step.line}: mq.{name}"


def test_commands_of_others_exist_or_are_known():
    """Targets, scripts with their flags, extras; for the rest NOT_RUN has the reason."""
    wrong, saved = [], {(page, step.name) for page, step in of_kind("file")}
    for page, step in of_kind("shell"):
        if ours(step.text) is not None or (page, step.text.split(" ")[-1]) in saved:
            continue  # a test below runs it
        if fault := fault_of(step.text, extras()):
            wrong.append(f"{page}:{step.line}: {step.text}: {fault}")
    assert not wrong, "\n".join(wrong)


def fault_of(text: str, known: set[str]) -> str | None:
    """What is wrong with a command that is not ours; None if nothing is."""
    while re.match(r"[A-Z][A-Z0-9_]*=\S* ", text):
        text = text.split(" ", 1)[1]
    words = shlex.split(text)
    if words[0] == "make":
        return None if set(words[1:]) <= make_targets() else "no such target"
    if words[:2] in (["pip", "install"], ["uv", "pip"]) or words[1:4] == ["-m", "pip", "install"]:
        asked = {e for part in re.findall(r"\[([\w,-]+)\]", text) for e in part.split(",")}
        return f"no such extra: {sorted(asked - known)}" if asked - known else None
    if words[0] == "python" and re.match(r"(benchmarks|examples|docs)/", words[1]):
        return script_fault(words[1], tuple(w for w in words[2:] if w.startswith("-")))
    is_known = any(text == head or text.startswith(head + " ") for head in NOT_RUN)
    return None if is_known else "neither ours nor in NOT_RUN"


@functools.cache
def script_fault(script: str, flags: tuple[str, ...]) -> str | None:
    if not (ROOT / script).is_file():
        return "no such script"
    if not flags:
        return None
    asked = [sys.executable, str(ROOT / script), "--help"]
    told = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    missing = [flag for flag in flags if flag.split("=")[0] not in told.stdout]
    return f"no such flag: {missing}" if told.returncode or missing else None


# ---- every command of ours, run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for rows of the default length."""
    folder = tmp_path_factory.mktemp("docs") / "model"
    return write_random_model(folder, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def in_place(tiny: Path):
    """Every name of a model means the tiny one; it keeps the name as its original repository."""
    with pytest.MonkeyPatch.context() as patch:
        names = {name: entry[-1] for name, entry in hub.BUILT_IN.items()}

        def stand_in(
            name: str, revision: str | None = None, weights: bool = True
        ) -> hub.ModelFiles:
            return hub.ModelFiles(tiny, names.get(name, name), revision, name)

        patch.setattr(hub, "_from_package", stand_in)
        patch.setattr(hub, "_from_hub", stand_in)
        yield


@pytest.fixture(scope="module")
def trained(in_place: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, for pages that begin after training."""
    place = tmp_path_factory.mktemp("trained")
    rows = write_rows(place / "rows.jsonl", 40)
    words = ["train", "--model", "smollm2-135m", "--data", str(rows), "--max-steps", "2"]
    words += ["--output-dir", str(place / "outputs"), *SHORT, *SHORT_RUN]
    assert cli.main(words) == 0
    return place / "outputs"


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader who has rows, a run.yaml and this repository's examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)  # LM Studio's is below it
    Path("data").mkdir()
    for name, count in (
        ("rows", 140),
        ("test", 20),
        ("validation", 12),
        ("data/train", 40),
        ("data/valid", 12),
    ):
        write_rows(tmp_path / f"{name}.jsonl", count)
    Path("general.txt").write_text("The quick brown fox.\n\nWhat is the capital?\n" * 20)
    Path("run.yaml").write_text(
        "model: {source: smollm2-135m}\ndata: {path: rows.jsonl}\n"
        "checkpointing: {output_dir: outputs-of-yaml}\n"
    )
    shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("outputs"))
    return tmp_path


WITH_STEPS = [page for page in PAGES if any(s.kind != "file" for s in steps(page))]


@pytest.mark.parametrize("page", WITH_STEPS)
def test_every_command_of_a_page_does_what_it_says(page, sandbox, trained, monkeypatch, capsys):
    """In the order of the page, in one folder: exit code 0 from each."""
    reader = Reader(trained, monkeypatch, page)
    faults = []
    for step in steps(page):
        fault = reader.does(step)
        shown = capsys.readouterr()
        if fault:
            said = (shown.err.strip() or shown.out.strip())[-600:]
            faults.append(f"{page}:{step.line}: {step.text[:300]}\n  {fault}\n  {said}")
    assert not faults, "\n".join(faults)


class Reader:
    """Somebody who does a page's steps; remembers what is there already."""

    def __init__(self, trained: Path, patch: pytest.MonkeyPatch, page: str = "") -> None:
        self.page = page
        self.trained = trained
        self.patch = patch
        self.has_trained = False
        self.done: set[str] = set()
        self.names: dict[str, Any] = {"__name__": "__docs__"}

    def does(self, step: Step) -> str | None:
        """Does a step; returns what went wrong."""
        if step.kind == "file":
            Path(step.name).parent.mkdir(parents=True, exist_ok=True)
            Path(step.name).write_text(step.text, encoding="utf-8")
            return None
        if step.kind == "python":
            return self.runs_python(step.text)
        if step.kind == "inline" and is_a_name_only(step.text):
            known = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["commands"]()
            name = shlex.split(step.text)[1]
            is_known = name in known or name.startswith("-") or name in ("...", "COMMAND")
            return None if is_known else f"there is no command {name}"
        command = ours(step.text)
        if command is None:
            made = re.fullmatch(r"(?:python |python3 )(\w+\.py)", step.text)
            return self.runs_python(Path(made[1]).read_text()) if made else None
        if step.kind == "inline" and step.text in self.done:
            return None
        self.done.add(step.text)
        if self.page in INDEPENDENT and command.words[:1] == ["train"]:
            for checkpoint in Path().glob("*/checkpoint-*"):
                shutil.rmtree(checkpoint)
        return self.runs(command)

    def runs(self, command: Command) -> str | None:
        words = list(command.words)
        if words[0] == "push" and "--dry-run" not in words:  # tests/adapters/test_push.py uploads
            words.append("--dry-run")
        for name, value in command.env.items():
            self.patch.setenv(name, value)
        if words[:1] == ["train"] and "--print-config" not in words:
            self.has_trained = True
        for folder in folders_of(words):
            self.finds(folder)
        if takes_fields(words) and (fault := call([*words, "--print-config"], "")):
            return f"as written: {fault}"
        if {"--self-test", "--tune"} & {*words}:  # tests/before/test_self_test.py runs them
            return None
        said = command.stdin or "Hello\n/quit\n"
        return call(shortened(words), said)

    def finds(self, folder: str) -> None:
        """A page that does not train begins with a trained adapter; one that does makes its own."""
        if folder == "adapters" and not Path(folder).exists():  # mlx-lm's default, of its own runs
            shutil.copytree(self.trained / "mlx", folder)
        if not self.has_trained and not Path(folder).exists():
            shutil.copytree(self.trained, folder)

    def runs_python(self, code: str) -> str | None:
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE))
        if imported & set(OF_OTHERS):
            return None
        for folder in re.findall(r"\"((?:outputs|adapter)[\w-]*)\"", code):
            if "output_dir" not in code:
                self.finds(folder)
        for name in ("fine_tune", "generate", "stream", "generate_batch"):
            self.patch.setattr(mq, name, short_of(name))
        try:
            exec(compile(code, "docs", "exec"), self.names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None


def takes_fields(words: list[str]) -> bool:
    return words[0] in COMMANDS and bool(COMMANDS[words[0]].reads)


def call(words: list[str], stdin: str) -> str | None:
    """Runs a command in this process; returns what went wrong.

    `doctor` may find something wrong with the machine that runs the tests: 1 is its answer then.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main(words)
        except SystemExit as stop:  # --version, --help, and what argparse refuses
            code = stop.code
    fine = (0, 1) if words[0] == "doctor" else (0,)
    return None if code in fine else f"exit code {code}"


def shortened(words: list[str]) -> list[str]:
    """The same command, but over in a moment."""
    words = list(words)
    if not takes_fields(words):
        return words
    for i, word in enumerate(words):
        if word == "--steps":
            words[i + 1] = "4"
        if word == "--answers" and words[i + 1] != "0":
            words[i + 1] = "4"
    about = COMMANDS[words[0]]
    places = [re.split("[.=]", field)[:2] for field in SHORT]
    words += [field for field, (s, name) in zip(SHORT, places) if name in about.fields(s)]
    if words[0] not in ("train", "sweep"):
        return words
    words += SHORT_RUN
    if words[0] == "sweep" and "--steps" not in words:
        words += ["--steps", "4"]
    if "num_train_epochs" not in " ".join(words) and not epochs_in_file(words):
        words += ["training.max_steps=2"]
    return words


def epochs_in_file(words: list[str]) -> bool:
    if "--config" not in words:
        return False
    values = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text()) or {}
    return values.get("training", {}).get("num_train_epochs") is not None


def folders_of(words: list[str]) -> list[str]:
    """The adapters that a command is given."""
    found = [words[i + 1] for i, word in enumerate(words) if word == "--adapter"]
    found += [word.split("=", 1)[1] for word in words if word.startswith("model.adapter=")]
    if words[0] == "push":
        found += words[1:2]
    return found


def short_of(name: str) -> Any:
    """A public function that stops after a few tokens, or a few steps."""
    home = importlib.import_module(mq._HOME[name])
    real = getattr(home, name)

    @functools.wraps(real)
    def short(*args: Any, **named: Any) -> Any:
        if name != "fine_tune":
            return real(*args, **{**named, "max_new_tokens": 6})
        given = [*args, *([None] * (5 - len(args)))]
        config = given[4] or named.pop("config", None) or mq.RunConfig()
        few = dataclasses.replace(
            config.training, max_steps=2, num_train_epochs=None, warmup_steps=1
        )
        given[3] = given[3] or named.pop("validation", None)
        given[4] = dataclasses.replace(config, training=few)
        return real(*given, **named)

    return short


def test_the_reader_notices_a_wrong_page(sandbox, trained, monkeypatch):
    """The control: what is wrong in a page is found, and not passed over."""
    reader = Reader(trained, monkeypatch)
    assert reader.does(Step("shell", "mlx-qlora plan --model smollm2-135m --bathc 8", 1))
    assert reader.does(Step("shell", "mlx-qlora plan --model smollm2-135m lora.rnk=8", 1))
    assert reader.does(Step("shell", "mlx-qlora inspect nowhere.jsonl --model smollm2-135m", 1))
    assert reader.does(Step("inline", "mlx-qlora tarin", 1))
    assert reader.does(Step("python", "mq.nothing", 1))
    known = {"gguf"}
    assert fault_of("make nothing", known) and fault_of("pip install 'mlx-qlora[nope]'", known)
    assert fault_of("python benchmarks/nothing.py", known) and fault_of("curl x", known)
    assert fault_of("pip install 'mlx-qlora[gguf]'", known) is None


def test_what_a_page_trains_is_what_its_next_command_reads(sandbox, trained, monkeypatch):
    """A page that trains into one folder and evaluates another is wrong."""
    reader = Reader(trained, monkeypatch)
    train = "mlx-qlora train --model smollm2-135m --data rows.jsonl --output-dir first"
    assert reader.does(Step("shell", train, 1)) is None
    trained_on = json.loads(Path("first/adapter_config.json").read_text())
    assert trained_on["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    ask = "mlx-qlora evaluate --adapter second --data test.jsonl --answers 0"
    assert reader.does(Step("shell", ask, 2))
    assert reader.does(Step("shell", ask.replace("second", "first"), 3)) is None
