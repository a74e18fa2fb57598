"""Options that take several values."""

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from tsdsr.cli.several import SeveralValues

app = typer.Typer(add_completion=False)


@app.command(cls=SeveralValues)
def command(
    word: Annotated[str, typer.Argument()],
    names: Annotated[list[str] | None, typer.Option("--names", "-n")] = None,
    count: Annotated[int, typer.Option("--count")] = 1,
    loud: Annotated[bool, typer.Option("--loud")] = False,
) -> None:
    typer.echo(f"{word} {names} {count} {loud}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["in", "--names", "a", "b", "c"], "in ['a', 'b', 'c'] 1 False"),
        (["in", "--names", "a", "--names", "b"], "in ['a', 'b'] 1 False"),
        (["--names", "a", "b", "--count", "3", "in"], "in ['a', 'b'] 3 False"),
        (["in", "-n", "a", "b", "--loud"], "in ['a', 'b'] 1 True"),
        (["--names", "a", "b", "--", "in"], "in ['a', 'b'] 1 False"),
        (["in"], "in None 1 False"),
    ],
)
def test_words_up_to_the_next_option(words, expected):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and result.stdout.strip() == expected, result.output


@pytest.mark.parametrize("words", [["in", "--names"], ["--names", "a", "b"], ["in", "--count", "1", "2"]])
def test_what_is_still_refused(words):
    assert CliRunner().invoke(app, words).exit_code == 2
