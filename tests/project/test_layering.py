"""Each group imports only those below, lazy imports included, and nothing goes in a circle."""

import ast
import functools
import importlib
from pathlib import Path

import mlx_qlora

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlx_qlora"

# From the ground up. Modules of one group may import each other, but not in a circle.
ORDER = [
    {"errors", "progress", "tree", "readers", "folders", "names", "fields"},
    {"device", "distributed"},
    {"cpu"},
    {"model"},
    {"data"},
    {"adapters"},
    {"train"},
    {"infer"},
    {"config", "loading", "measured", "record", "run"},
    {"before"},
    {"after"},
    {"sweep"},
    {"cli", "commands", "exports", "__main__", "train.__main__"},
]
# The core reaches what surrounds it at one place, when a run has something to show.
LATE = {("run", "after.observer")}


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name below the package -> file, without the package's own __init__."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Names below the package that a file imports, wherever in the file it does.

    What is imported for annotations alone (`if TYPE_CHECKING:`) is no dependency.
    """
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_qlora"):
            assert node.level == 0, f"{path}: write imports out, from mlx_qlora"
            base = (node.module or "").removeprefix("mlx_qlora").lstrip(".")
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {name if name in modules() else base or name for name in names}
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("mlx_qlora.")]
            found |= {name.removeprefix("mlx_qlora.") for name in names}
    return found - {"__version__"}


def group(name: str) -> int:
    for candidate in (name, name.split(".")[0]):
        for number, names in enumerate(ORDER):
            if candidate in names:
                return number
    raise AssertionError(f"{name} is in no group: add it to ORDER")


def test_every_module_imports_only_its_own_group_and_those_below():
    wrong = [
        f"{name} (group {group(name)}) imports {target} (group {group(target)})"
        for name, path in modules().items()
        for target in imports(path)
        if group(target) > group(name) and (name, target) not in LATE
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other_even_in_a_long_circle():
    graph = {name: imports(path) & modules().keys() for name, path in modules().items()}
    for name, target in LATE:
        graph[name].remove(target)
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_heavy_packages_are_imported_only_inside_functions():
    heavy = {"mlx_lm", "huggingface_hub", "tiktoken", "sentencepiece", "tokenizers", "jinja2"}
    heavy |= {"pyarrow", "datasets", "loky", "gguf", "matplotlib", "IPython"}
    heavy |= {"rouge_score", "sacrebleu", "tensorboard", "wandb", "shtab"}
    never = {"torch", "transformers", "peft"}
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                roots = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            else:
                continue
            assert not roots & never, f"{name} imports {roots & never}: an oracle, not a dependency"
            if node in tree.body and name != "data.templates":  # itself imported in functions
                assert not roots & heavy, f"{name} imports {roots & heavy} at its top"


def test_no_module_hides_a_public_name():
    """`import mlx_qlora.NAME` sets that attribute of the package, whatever stood there."""
    assert not set(mlx_qlora.__all__) & {name.split(".")[0] for name in modules()}


def test_there_is_no_drawer_for_odds_and_ends():
    forbidden = {"utils", "util", "common", "helpers", "misc", "base"}
    assert not {name.split(".")[-1] for name in modules()} & forbidden


def test_no_test_imports_another_test():
    tests = Path(__file__).parents[1]
    names = {path.stem for path in tests.rglob("test_*.py")}
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            tails = {name.split(".")[-1] for name in imported}
            assert not tails & names, f"{path.name} imports {tails & names}: see tests/support"


def test_what_benchmarks_and_examples_import_is_there():
    """Nothing else looks at them between two releases."""
    files = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    missing = [
        f"{path.name}: {node.module}.{alias.name}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_qlora")
        for alias in node.names
        if f"{node.module}.{alias.name}".removeprefix("mlx_qlora.") not in modules()
        and not hasattr(importlib.import_module(node.module or ""), alias.name)
    ]
    assert len(files) > 20 and not missing, "\n".join(missing)
