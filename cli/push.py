"""`tsdsr push`: a model into a repository of the Hugging Face Hub, or into the folder that would be uploaded."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_sentence


def push(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="`embedded`, a pipeline folder or a LoRA folder.", show_default=False),
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name, or a name in your account.", show_default=False)
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--no-private", help="Visibility, if the repository is made now.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder and upload nothing.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where --dry-run writes it (default: ./OWNER--NAME)."),
    ] = None,
    include_code: Annotated[
        bool, typer.Option("--include-code", help="Add the pipeline's code, so that diffusers alone can run it.")
    ] = False,
    sample: Annotated[
        list[Path] | None,
        typer.Option("--sample", metavar="PHOTO", help="Photograph to show before and after; may be repeated."),
    ] = None,
    no_sample: Annotated[bool, typer.Option("--no-sample", help="Make no such picture.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Message of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it exists.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Publish a model on the Hugging Face Hub, with a model card and pictures of what it does."""
    with one_sentence(debug):
        if no_sample and sample:
            raise ValueError("--sample and --no-sample exclude each other; leave one out.")
        if (output or overwrite) and not dry_run:
            raise ValueError("--output and --overwrite are for --dry-run; add it, or leave them out.")
        if model != "embedded" and not Path(model).is_dir():
            raise ValueError(f"The model folder {model} does not exist; check the path, or write `embedded`.")
        missing = next((photo for photo in sample or () if not photo.is_file()), None)
        if missing:
            raise ValueError(f"The photograph {missing} does not exist; check the path.")
        if dry_run:
            # Read by huggingface_hub when it is first imported: nothing here needs a network.
            os.environ["HF_HUB_OFFLINE"] = "1"
        from huggingface_hub import get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(
                f"{repo_id!r} is no name for a repository; write owner/name, of letters, digits, '-', '_' and '.'."
            ) from error
        if not dry_run and get_token() is None:
            raise ValueError("You are not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN.")

        from diffusers.utils.logging import disable_progress_bar

        from ..pipelines import hub
        from ..pipelines.loading import EMBEDDED

        disable_progress_bar()  # of loading, which is written to log files too
        source = EMBEDDED if model == "embedded" else Path(model)
        samples = () if no_sample else sample
        if dry_run:
            folder = output or Path(repo_id.replace("/", "--"))
            if folder.exists() and not overwrite:
                raise ValueError(f"{folder} exists; name another with --output, or replace it with --overwrite.")
            files = hub.prepare_repository(
                source, folder, repo_id, include_code=include_code, samples=samples, overwrite=overwrite
            )
            for name in files:
                typer.echo(f"{(folder / name).stat().st_size:>14,}  {name}")
            typer.echo(f"Wrote {folder}; nothing was uploaded.")
            return
        repo_id = hub.full_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "repository")
            hub.prepare_repository(source, folder, repo_id, include_code=include_code, samples=samples)
            address = hub.push(folder, repo_id, private=private, commit_message=message, create_pr=create_pr)
        typer.echo(f"Uploaded to {address}")
