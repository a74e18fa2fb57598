"""`tsdsr prepare`: photographs in, shards for training out, with everything encoded that training would encode anew."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_sentence


class Dtype(str, Enum):
    """Number formats that latents and embeddings are stored in."""

    fp16 = "fp16"
    fp32 = "fp32"


def prepare(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Photographs; captions in metadata.jsonl, metadata.csv or NAME.txt."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the shards.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="Base to encode with: a diffusers folder or Hub id.")
    ],
    resolution: Annotated[int | None, typer.Option(help="Side of the crops, in pixels.")] = None,
    crops: Annotated[int | None, typer.Option(help="Crops of each photograph.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of their places.")] = None,
    samples_per_shard: Annotated[int | None, typer.Option(help="Crops in a shard.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format of latents and embeddings.")] = None,
    use_shift_factor: Annotated[
        bool | None,
        typer.Option(help="Take the VAE's shift factor off the latents (default: as the model says, else not)."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Crops that are encoded at once.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Processes that read and cut.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")] = None,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="Also store degraded pictures and what the model makes of them (`compress`)."),
    ] = False,
    scale: Annotated[int | None, typer.Option(help="With --targets: how much smaller they are.")] = None,
    part: Annotated[
        int | None, typer.Option(help="Number of this process, from 0, where several share the work.")
    ] = None,
    parts: Annotated[int | None, typer.Option(help="How many processes share the work.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Encode photographs and captions once, before training. Started again, it goes on where it was."""
    options: dict[str, Any] = {
        "resolution": resolution,
        "crops": crops,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "dtype": dtype.value if dtype else None,
        "use_shift_factor": use_shift_factor,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
        "part": part,
        "parts": parts,
        "targets": targets or None,
        "scale": scale,
    }
    with one_sentence(debug):
        if model == "embedded" or Path(model).exists():
            # Read by huggingface_hub when it is first imported: a model that is here needs no network.
            os.environ["HF_HUB_OFFLINE"] = "1"
        from diffusers.utils.logging import disable_progress_bar

        from ..training.data.prepare import prepare as prepare_folder
        from .progress import counting_bar

        disable_progress_bar()  # of loading, which is written to log files too
        with counting_bar() as bar:
            task = bar.add_task("photographs", total=None)
            result = prepare_folder(
                model,
                folder,
                output,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                **{name: value for name, value in options.items() if value is not None},
            )
        for _, reason in result.skipped:
            typer.echo(f"skipped: {reason}", err=True)
        if result.skipped:
            typer.echo(f"{len(result.skipped)} photographs were skipped.", err=True)
        if result.captions and not result.embedded:
            typer.echo("The model has no text encoders: captions are kept as text.", err=True)
        if result.kept:
            typer.echo(f"kept {result.kept} shards that were whole")
        rate = f", {result.images_per_second:.1f} images/s" if result.samples else ""
        typer.echo(f"Wrote {result.samples} samples in {result.shards} shards to {output}{rate}")
