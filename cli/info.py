"""`tsdsr info`: what a model folder or file is."""

import json
from typing import Annotated

import typer

from .errors import one_sentence


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or file, or `embedded`.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Say what a model is: family, sizes, number format, licence."""
    with one_sentence(debug):
        from ..checkpoints.info import describe

        facts = describe(model)
        if as_json:
            typer.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
            return

        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in facts.items():
            if value is not None:
                table.add_row(Text(name.replace("_", " "), style="bold"), Text(_readable(value)))
        Console().print(table)


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_readable(part)}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
