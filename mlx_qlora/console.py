"""Lines for a person: plain ones where nobody has a terminal."""

import errno

from rich.console import Console


class Terminal(Console):
    """Rich's console, which would end the program with 1 where nobody reads what it prints."""

    def on_broken_pipe(self) -> None:
        """Leaves it to the command line.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError(errno.EPIPE, "nobody reads what is printed")


def say(console: Console, text: str) -> None:
    """Prints a line as it is: not wrapped at 80 columns where nobody has a terminal."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Prints a warning, which a quiet console lets through to standard error."""
    if console.quiet:
        console = Console(stderr=True)
    say(console, f"warning   {text}")
