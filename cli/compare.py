"""`tsdsr compare`: the same crops of a picture as several models show them, on one sheet."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_sentence
from .options import (
    ColorFixOption,
    DebugOption,
    DegridOption,
    DeviceOption,
    DtypeOption,
    GrainOption,
    ProcessSizeOption,
    SamplePosteriorOption,
    SeedOption,
    TileBatchSizeOption,
    TileOverlapOption,
    TileSizeOption,
    UpscaleOption,
    given,
    in_cli_words,
    value,
)


def compare(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder of them.", show_default=False)],
    models: Annotated[
        list[str],
        typer.Option(
            "--models",
            "-m",
            metavar="NAME...",
            help="`embedded`, pipeline folders, Hub ids, `lanczos`, `nearest`; `bicubic` always comes first.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The sheet: .png, .webp, .jpg, or .html.", show_default=False
        ),
    ],
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="TEXT...", help="What to call the models, in their order."),
    ] = None,
    hr: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="Ground truth, of the same names: comes last, with PSNR.")
    ] = None,
    crop: Annotated[
        list[str] | None,
        typer.Option("--crop", metavar="X,Y,SIZE", help="A crop, in pixels of IN; may be given several times."),
    ] = None,
    crops: Annotated[int, typer.Option(min=1, help="Otherwise: how many to choose, where there is structure.")] = 3,
    crop_size: Annotated[int, typer.Option(min=1, help="Their side, in pixels of IN.")] = 64,
    upscale: UpscaleOption = None,
    color_fix: ColorFixOption = None,
    degrid: DegridOption = None,
    grain: GrainOption = None,
    tile_size: TileSizeOption = None,
    tile_overlap: TileOverlapOption = None,
    tile_batch_size: TileBatchSizeOption = None,
    process_size: ProcessSizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    sample_posterior: SamplePosteriorOption = None,
    seed: SeedOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show crops side by side, the small picture enlarged by bicubic interpolation first."""
    with one_sentence(debug):
        boxes = [_box(text) for text in crop or []]
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists; choose another name, or replace it with --overwrite.")
        from ..imaging import SUPPORTED_OUTPUT_SUFFIXES, draw_sheet, write

        page = output.suffix.lower() in (".html", ".htm")
        if output.is_dir() or not (page or output.suffix.lower() in SUPPORTED_OUTPUT_SUFFIXES):
            known = ", ".join((".html", *SUPPORTED_OUTPUT_SUFFIXES))
            raise ValueError(f"cannot write {output}: name a file whose suffix is one of {known}.")

        if all("/" not in model or Path(model).exists() for model in models):
            # Read by huggingface_hub when it is first imported: models that are here need no network.
            os.environ["HF_HUB_OFFLINE"] = "1"
        from diffusers.utils.logging import disable_progress_bar

        from ..evaluation.compare import compare as run
        from ..evaluation.compare import write_page

        disable_progress_bar()  # of loading, which is written to log files too
        try:
            found = run(
                source,
                models,
                labels=labels or (),
                hr=hr,
                boxes=boxes,
                crops=crops,
                crop_size=crop_size,
                upscale=upscale,
                seed=seed,
                loading=given(dtype=value(dtype), device=device),
                calling=given(
                    color_fix=value(color_fix),
                    degrid=degrid,
                    grain=grain,
                    tile_size=tile_size,
                    tile_overlap=tile_overlap,
                    tile_batch_size=tile_batch_size,
                    process_size=process_size,
                    sample_posterior=sample_posterior,
                ),
                progress=lambda label, name, seconds: typer.echo(f"{label}: {name} ({seconds:.1f} s)"),
            )
        except Exception as error:
            raise in_cli_words(error) from error
        output.parent.mkdir(parents=True, exist_ok=True)
        if page:
            write_page(output, found)
        else:
            write(draw_sheet(found), output)
        typer.echo(f"wrote {output}")


def _box(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise ValueError(f"the crop {text!r} is not of the form X,Y,SIZE, three whole numbers such as 40,25,64.")
    x, y, side = map(int, text.split(","))
    return x, y, side
