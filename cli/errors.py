"""How a command fails: one sentence on stderr and an exit code, a traceback only with `--debug`."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

BAD_INPUT = 2
"""Exit code for something the user can put right, the same that a wrong option has."""
UNEXPECTED = 1
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def sentence(error: BaseException) -> str:
    """What an exception says, on one line: `Permission denied: out.png`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str, code: int) -> NoReturn:
    """Say why on stderr and leave with an exit code."""
    typer.echo(f"tsdsr: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_sentence(debug: bool = False) -> Iterator[None]:
    """Turn what goes wrong inside into one sentence and an exit code; `debug` prints the traceback before it."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        fail("interrupted.", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, (ValueError, OSError, MemoryError)):
            fail(sentence(error), BAD_INPUT)
        hint = "" if debug else " Run again with --debug to see where."
        fail(f"unexpected {type(error).__name__}: {sentence(error)}{hint}", UNEXPECTED)
