"""The `tsdsr` command. Each module holds one command: it parses, calls one function and prints."""

import gc
import logging
import os
from typing import Annotated

import typer

from .. import __version__
from . import bake, compare, compress, convert, embed, evaluate, info, prepare, push, upscale
from .several import SeveralValues

app = typer.Typer(
    name="tsdsr",
    help="Upscale real photographs with one step of a diffusion model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in plain text: importing what draws boxes would take half of its time
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("upscale")(upscale.upscale)
app.command("convert")(convert.convert)
app.command("bake")(bake.bake)
app.command("info")(info.info)
app.command("prepare")(prepare.prepare)
app.command("embed")(embed.embed)
app.command("compress", add_help_option=False, context_settings=compress.SETTINGS)(compress.compress)
app.command("push")(push.push)
app.command("evaluate", cls=SeveralValues)(evaluate.evaluate)
app.command("compare", cls=SeveralValues)(compare.compare)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tsdsr {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Upscale real photographs with one step of a diffusion model."""


def main() -> None:
    """The entry point of the `tsdsr` script."""
    # Read when these libraries are first imported: their remarks are for programmers, what matters is raised.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # torchao, where it is installed, speaks on import of what it lacks and of what torch has since deprecated.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Read by torch when it first takes memory: large pages (Linux), because most of a convolution's output is new to
    # the process, and to clear that page by page takes a tenth of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    finally:
        gc.freeze()  # the process ends: what is left is not worth a search for garbage, which takes a second and more
