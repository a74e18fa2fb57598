"""Where a pipeline folder may be written."""

from collections.abc import Iterable
from pathlib import Path

from ..models.errors import CheckpointError


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raises a `CheckpointError` where a pipeline folder must not be written."""
    for path in inputs:
        # Replacing the output must not take an input with it.
        if path.exists() and path.resolve().is_relative_to(output):
            raise CheckpointError(f"{output} is or contains the input {path}; choose another output folder.")
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} exists and is not a folder; choose another output folder.")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{output} exists and is not empty; choose another output folder or allow overwriting."
            )
        if not (output / "model_index.json").is_file():
            raise CheckpointError(
                f"{output} holds something other than a pipeline (no model_index.json) and is not overwritten; choose"
                " another output folder."
            )
