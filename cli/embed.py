"""`tsdsr embed`: a prompt in, its embeddings out, so that no text encoder is needed to upscale with it."""

import os
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_sentence


class Dtype(str, Enum):
    """Number formats that embeddings are stored in."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def embed(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='Any text, also none: "".', show_default=False)],
    base: Annotated[
        str, typer.Option("--base", metavar="NAME", help="SD3 or SD2 with text encoders: a diffusers folder or Hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write.")],
    dtype: Annotated[Dtype, typer.Option(help="Number format of the embeddings.")] = Dtype.fp32,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which files of the base to read, such as fp16.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the embeddings in OUT.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Embed a prompt, for `tsdsr upscale --prompt-embeddings` and `from_pretrained`."""
    with one_sentence(debug):
        if base == "embedded" or Path(base).exists():
            # Read by huggingface_hub when it is first imported: a base that is here needs no network.
            os.environ["HF_HUB_OFFLINE"] = "1"
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from ..pipelines.folders import whole_folder
        from ..pipelines.loading import DTYPES, choose_device, holds_prompt
        from ..pipelines.text import TruncatedPromptWarning, embed_prompt

        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()  # of loading, which is written to log files too
        output = output.resolve()
        if output.exists() and not holds_prompt(output):
            raise ValueError(f"{output} exists and holds no prompt embeddings; choose another folder.")
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists; choose another folder, or replace it with --overwrite.")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TruncatedPromptWarning)
            embedded = embed_prompt(
                prompt, base, variant=variant, device=choose_device(device), dtype=DTYPES[dtype.value]
            )
        for warning in caught:
            if issubclass(warning.category, TruncatedPromptWarning):
                typer.echo(warning.message, err=True)
        with whole_folder(output) as folder:
            embedded.save_pretrained(folder)
        sizes = embedded.config
        pooled = f" and a pooled vector of {sizes.pooled_embed_dim}" if sizes.pooled_embed_dim else ""
        typer.echo(f"Wrote {sizes.sequence_length} tokens of {sizes.embed_dim} numbers{pooled} to {output}")
        typer.echo(f"To upscale with it: tsdsr upscale --prompt-embeddings {output} --model MODEL INPUT, or in Python")
        typer.echo(
            f"TSDSRPipeline.from_pretrained(MODEL, prompt_embeddings=PromptEmbeddings.from_pretrained({str(output)!r}))"
        )
