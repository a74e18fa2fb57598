"""`tsdsr bake`: a model in, the same with everything constant worked out."""

from pathlib import Path
from typing import Annotated

import typer

from .convert import Dtype
from .errors import one_sentence


def bake(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="embedded, a pipeline folder, or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The pipeline folder to write.")],
    lora: Annotated[
        list[Path] | None,
        typer.Option("--lora", metavar="PATH", help="A LoRA to add to the weights; twice for a mix (--fidelity)."),
    ] = None,
    fidelity: Annotated[
        float | None, typer.Option("--fidelity", help="Mix of two LoRAs, from 0, the first alone, to 1.")
    ] = None,
    prompt_embeddings: Annotated[
        Path | None, typer.Option("--prompt-embeddings", metavar="DIR", help="Another prompt, from `tsdsr embed`.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number format of the weights (default: the transformer's own).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Work out everything in a model that does not depend on the picture: smaller, faster, the same results."""
    with one_sentence(debug):
        from diffusers.utils.logging import disable_progress_bar

        from ..checkpoints.bake import bake_model

        disable_progress_bar()  # of loading, which is written to log files too
        written = bake_model(
            model,
            output,
            lora=lora or (),
            fidelity=fidelity,
            prompt_embeddings=prompt_embeddings,
            dtype=dtype.value if dtype else None,
            overwrite=overwrite,
        )
        typer.echo(f"Wrote {written}")
