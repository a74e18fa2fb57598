"""`tsdsr convert`: a published checkpoint in, one pipeline folder out."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_sentence


class Dtype(str, Enum):
    """Number formats a checkpoint can be written in."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def convert(
    base: Annotated[Path, typer.Option("--base", metavar="DIR", help="Stable Diffusion 3 in diffusers folders.")],
    lora: Annotated[Path, typer.Option("--lora", metavar="DIR", help="The published LoRA folder.")],
    embeddings: Annotated[Path, typer.Option("--embeddings", metavar="DIR", help="The published prompt embeddings.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The pipeline folder to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Number format of the weights (default: the base's own).")] = None,
    keep_lora: Annotated[bool, typer.Option("--keep-lora", help="Keep the LoRA apart instead of merging it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn the published TSD-SR weights into a folder for `tsdsr upscale --model` and `from_pretrained`."""
    with one_sentence(debug):
        from ..checkpoints.convert import convert_tsdsr

        written = convert_tsdsr(
            base,
            lora,
            embeddings,
            output,
            dtype=dtype.value if dtype else None,
            keep_lora=keep_lora,
            overwrite=overwrite,
        )
        typer.echo(f"Wrote {written}")
