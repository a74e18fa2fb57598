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
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The pipeline folder to write.", show_default=False)
    ],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="DIR", help="Stable Diffusion 3 in diffusers folders.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option("--lora", metavar="DIR", help="The published LoRA folder of TSD-SR.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option("--embeddings", metavar="DIR", help="The published prompt embeddings.")
    ] = None,
    tinysr: Annotated[
        Path | None, typer.Option("--tinysr", metavar="DIR", help="TinySR's release, instead of --base and --lora.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format of the weights (default: their own).")] = None,
    keep_lora: Annotated[bool, typer.Option("--keep-lora", help="Keep the LoRA apart instead of merging it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn the published weights of TSD-SR or TinySR into a folder for `tsdsr upscale --model` and `from_pretrained`.

    TSD-SR takes --base, --lora and --embeddings; TinySR takes --tinysr, with --embeddings where its dataset/default
    lies elsewhere.
    """
    with one_sentence(debug):
        kind = dtype.value if dtype else None
        if tinysr is not None:
            needless = {"--base": base is not None, "--lora": lora is not None, "--keep-lora": keep_lora}
            if any(needless.values()):
                names = " and ".join(name for name, given in needless.items() if given)
                raise ValueError(f"--tinysr names a whole release, so {names} must be left out.")
            from ..checkpoints.tinysr import convert_tinysr

            written = convert_tinysr(tinysr, output, embeddings=embeddings, dtype=kind, overwrite=overwrite)
        elif base is None or lora is None or embeddings is None:
            needed = {"--base": base, "--lora": lora, "--embeddings": embeddings}
            names = " and ".join(name for name, path in needed.items() if path is None)
            raise ValueError(f"{names} must be given to convert TSD-SR, or --tinysr to convert TinySR.")
        else:
            from ..checkpoints.convert import convert_tsdsr

            written = convert_tsdsr(
                base, lora, embeddings, output, dtype=kind, keep_lora=keep_lora, overwrite=overwrite
            )
        typer.echo(f"Wrote {written}")
