"""What README and docs say is what the code does."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

import mlx_qlora as mq
from mlx_qlora import cli
from mlx_qlora.config import to_yaml

ROOT = Path(__file__).parent.parent


def test_the_field_reference_is_current():
    page = runpy.run_path(str(ROOT / "docs" / "make_fields.py"))["page"]()
    assert (ROOT / "docs" / "fields.md").read_text(encoding="utf-8") == page, "run `make docs`"


def test_the_screens_are_what_the_command_prints_today():
    page = runpy.run_path(str(ROOT / "docs" / "make_screens.py"))["page"]
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert "3 refused" in text
    assert page(text) == text, "run `make docs`"


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "mlx_qlora").rglob("*.py"):
        if path.stem not in ("__init__", "_version"):
            assert path.stem in text, f"docs/architecture.md does not name {path.stem}"


PAGES = ["README.md", "docs/adapters.md", "docs/judging.md"]


def code_blocks(language: str) -> list[str]:
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    return [
        block
        for text in texts
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


def readme_commands() -> list[str]:
    """Of the blocks in README and docs, and in the tables of docs; dots stand for words."""
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES[1:])
    lines += [line for line in re.findall(r"`(mlx-qlora [^`]*)`", text) if "..." not in line]
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = [shlex.split(c)[1] for c in readme_commands() if c.startswith("make ")]
    assert "demo" in targets and "test" in targets
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), target


@pytest.mark.parametrize("command", [c for c in readme_commands() if "mlx" in c.split()[0]])
def test_every_mlx_qlora_command_in_the_readme_parses(command, capsys, tmp_path, monkeypatch):
    """Resolved, not run: flags, fields and values are all real."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(to_yaml(mq.RunConfig()))
    words = shlex.split(command)
    assert words[0] == "mlx-qlora", command
    assert cli.main([*words[1:], "--print-config"]) == 0, capsys.readouterr().err


def test_the_python_in_the_readme_names_only_what_exists():
    for block in code_blocks("python"):
        compile(block, "README.md", "exec")
        for name in re.findall(r"\bmq\.(\w+)", block):
            assert hasattr(mq, name), name
