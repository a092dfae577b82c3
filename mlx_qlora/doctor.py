"""`mlx-qlora doctor`: what this machine is, what it lacks for a run, and the command that mends it.

Each check reports what it finds as lines, and whatever goes wrong in it becomes a line, too. The
network is asked for a few seconds at most; nothing is downloaded and nothing on disk is changed.
"""

import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from rich.console import Console
from rich.text import Text

from mlx_qlora.checks import access, machine, setting
from mlx_qlora.checks.finding import Finding
from mlx_qlora.model.lora import LoraConfig

MACHINE = {
    "python": machine.python,
    "system": machine.system,
    "mlx": machine.mlx,
    "chip": machine.chip,
    "wired limit": machine.wired_limit,
    "blas": machine.blas_library,
    "matmul": machine.matmul,
}
COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
MARGIN = 9 + 13  # columns of the state and the name


def doctor(
    console: Console,
    source: str | None = None,
    revision: str | None = None,
    output_dir: str = "outputs",
    lora: LoraConfig | None = None,
    save_total_limit: int = 3,
) -> list[Finding]:
    """Examines the machine, and the model if one is named, and prints what is found as it is.

    Args:
        console: where it is printed.
        source: as for `load`; never downloaded.
        revision: a branch, tag or commit of a hub repository.
        output_dir: where a run would leave its files.
        lora: what a run would train, which decides how large its checkpoints are.
        save_total_limit: how many checkpoints it would keep.
    """
    findings = []
    for finding in examine(source, revision, output_dir, lora, save_total_limit):
        findings.append(finding)
        _print(console, finding)
    return findings


def examine(
    source: str | None = None,
    revision: str | None = None,
    output_dir: str = "outputs",
    lora: LoraConfig | None = None,
    save_total_limit: int = 3,
) -> Iterator[Finding]:
    """What `doctor` prints, one by one. Raises nothing: a check that breaks is a finding, too."""
    for name, check in MACHINE.items():
        yield from _guarded(name, check)
    away: list[Exception] = []
    needs = access.Needs(lora=lora or LoraConfig())
    yield from _guarded("hub", partial(access.the_hub, away))
    if source is not None:
        yield from _guarded("model", partial(access.model, source, revision, away, needs))
    yield from _guarded("disk", partial(access.disks, needs, output_dir, save_total_limit))
    yield from _guarded("packages", setting.packages)
    yield from _guarded("environment", setting.environment)


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the findings say it
            found = [*check()]
    except Exception as error:  # a check must not keep the others from being made
        text = f"could not be checked ({type(error).__name__}: {error})"
        found = [Finding(name, "warning", text)]
    yield from found


def _print(console: Console, finding: Finding) -> None:
    """A line of the table; its fix stands alone and is never wrapped, so that it can be pasted."""
    width = console.width - MARGIN if console.is_terminal else sys.maxsize
    lines = textwrap.wrap(
        finding.text, max(width, 20), break_long_words=False, break_on_hyphens=False
    )
    row = Text(f"{finding.state:<9}", COLOURS[finding.state])
    row.append(f"{finding.name:<13}", "bold")
    row.append(("\n" + " " * MARGIN).join(lines), "default")
    if finding.fix:
        row.append(f"\n{'':<{MARGIN}}{finding.fix}", "cyan")
    console.print(row, soft_wrap=True, highlight=False)
