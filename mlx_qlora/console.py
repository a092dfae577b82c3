"""Lines for a person: plain ones where nobody has a terminal."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints a line as it is: not wrapped at 80 columns where nobody has a terminal."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Prints a warning, which a quiet console lets through to standard error."""
    if console.quiet:
        console = Console(stderr=True)
    say(console, f"warning   {text}")
