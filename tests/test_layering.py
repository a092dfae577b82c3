"""Each floor imports only those below, lazy imports included, and nothing goes in a circle."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mlx_qlora"

# From the ground up. Files of one floor may import each other, but not in a circle.
FLOORS = [
    {"_version", "errors", "fields", "tree", "console"},
    {"blas"},
    {"backend"},
    {"machines", "processes"},
    {"model.exponentials"},
    {"model.attention"},
    {"model.documents"},
    {"model"},
    {"data"},
    {"adapters"},
    {"source"},
    {"train.memory", "train.loss"},
    {"train.parts", "train.slots"},
    {"train.walk"},
    {"train.optim"},
    {"train.interruption", "train.gradient_sum"},
    {"train.engine", "train.score"},
    {"train"},
    {"infer"},
    {"config"},
    {"scaling", "estimates", "planner", "report", "inspection", "delivery", "judging"},
    {"checks", "doctor"},
    {"opening", "record"},
    {"preparation"},
    {"run"},
    {"sweep", "dry_run"},
    {"arguments"},
    {"typed"},
    {"commands"},
    {"cli"},
    {"__main__", "train.__main__"},  # doors: `python -m mlx_qlora` and `python -m mlx_qlora.train`
]


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
    """Names below the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_qlora"):
            assert node.level == 0, f"{path}: write imports out, from mlx_qlora"
            base = (node.module or "").removeprefix("mlx_qlora").lstrip(".")
            if base:
                found.add(base)
            else:
                found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("mlx_qlora.")]
            found |= {name.removeprefix("mlx_qlora.") for name in names}
    return found - {"__version__"}


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if name in names:
            return number
    for number, names in enumerate(FLOORS):
        if name.split(".")[0] in names:
            return number
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS")


def test_every_module_imports_only_its_own_floor_and_those_below():
    wrong = [
        f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        for name, path in modules().items()
        for target in imports(path)
        if floor(target) > floor(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other_even_in_a_long_circle():
    graph = {name: imports(path) & modules().keys() for name, path in modules().items()}
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
            if node in tree.body:
                assert not roots & heavy, f"{name} imports {roots & heavy} at its top"


def test_there_is_no_drawer_for_odds_and_ends():
    forbidden = {"utils", "util", "common", "helpers", "misc", "base"}
    assert not {name.split(".")[-1] for name in modules()} & forbidden
