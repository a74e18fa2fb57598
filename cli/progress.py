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

    def __init__(self, pictures: int, process: int | None = None) -> None:
        """Args:
        pictures: how many pictures will be worked on.
        process: number of this one among processes that share the work: it comes before each line, and there are no
            bars, which would overwrite those of the others.
        """
        self.pictures = pictures
        self.finished = 0
        self.prefix = "" if process is None else f"{process}: "
        self._what = ""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=process is not None or not sys.stderr.isatty(),
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
        self._what = what
        self._progress.reset(self._present, description=what, total=None)

    def frame(self, number: int, frames: int) -> None:
        """Show which frame of the present picture is worked on, from 1, of how many, 0 if unknown; tiles begin anew."""
        if frames != 1:
            what = f"{self._what}, frame {number}" + (f"/{frames}" if frames else "")
            self._progress.reset(self._present, description=what, total=None)

    def tiles(self, done: int, total: int) -> None:
        """Tiles finished of the present picture, or frame."""
        self._progress.update(self._present, completed=done, total=total)

    def end(self, line: str, failed: bool = False) -> None:
        """One picture is dealt with; say how."""
        self.keep()
        count = f"[{self.finished}/{self.pictures}] " if self.pictures > 1 else ""
        typer.echo(self.prefix + count + line, err=failed)

    def keep(self) -> None:
        """One picture needs nothing done, and no line."""
        self.finished += 1
        self._progress.update(self._overall, completed=self.finished)
