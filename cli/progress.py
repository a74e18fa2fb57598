"""Bars over pictures and over the tiles of the present picture: on a terminal only, elsewhere the lines are enough."""

import sys
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def counting_bar() -> Progress:
    """A bar on stderr with how many are done and the time left; on a terminal only."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


class Display:
    """Lines about finished pictures on stdout, about skipped ones on stderr, bars on stderr below them."""

    def __init__(self, pictures: int) -> None:
        """Args:
        pictures: how many pictures will be worked on.
        """
        self.pictures = pictures
        self.finished = 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            redirect_stdout=sys.stdout.isatty(),
            transient=True,
        )
        self._overall = self._progress.add_task("pictures", total=pictures, visible=pictures > 1)
        self._present = self._progress.add_task("", total=None)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Show what is being worked on, its length not known yet."""
        self._progress.reset(self._present, description=what, total=None)

    def tiles(self, done: int, total: int) -> None:
        """Tiles finished of the present picture."""
        self._progress.update(self._present, completed=done, total=total)

    def end(self, line: str, failed: bool = False) -> None:
        """One picture is dealt with; say how."""
        self.finished += 1
        count = f"[{self.finished}/{self.pictures}] " if self.pictures > 1 else ""
        typer.echo(count + line, err=failed)
        self._progress.update(self._overall, completed=self.finished)
