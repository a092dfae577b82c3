"""The command line: the only place that prints errors and exits."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0 is done, 2 the user's input is wrong, 1 `doctor` found an error, 128 + n signal n.
    """
    try:
        code = _command(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, and not when Python ends: it may be a pipe that has broken
        return code
    except KeyboardInterrupt as stop:
        if str(stop):  # a run that saved what it had says so
            print(f"mlx-qlora: {stop}", file=sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except BrokenPipeError:  # whoever read us has seen enough, as `head` has
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _command(argv: Sequence[str]) -> int:
    # Imported here, where Ctrl-C is expected: it takes a moment, MLX's part of it above all.
    from mlx_qlora.arguments import parse
    from mlx_qlora.errors import UserError

    try:
        args = parse(argv)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "mlx":
            raise
        fix = "pip install --upgrade --force-reinstall mlx mlx-lm"
        print(f"mlx-qlora: MLX cannot be loaded ({error}): {fix}", file=sys.stderr)
        return 2
    as_json = getattr(args, "json", False)
    from mlx_qlora.commands import run_command
    from mlx_qlora.processes import tells

    try:
        found = run_command(args)
    except UserError as error:
        if tells(error):
            print(f"mlx-qlora: {error}", file=sys.stderr)
        if as_json and tells(error):
            _print_json({"error": str(error), "kind": type(error).__name__})
        return 2
    if as_json and found is not None:
        _print_json(found)
    return 0 if found is None or found.get("ok", True) else 1


def train_main() -> int:
    """`python -m mlx_qlora.train ...` is `mlx-qlora train ...`."""
    return main(["train", *sys.argv[1:]])


def _print_json(found: Any) -> None:
    """One object; what is not a number is null, which JSON has no other word for."""
    print(json.dumps(_plain(found), ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value - value != 0:  # NaN or infinite
        return None
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(main())
