"""`tsdsr upscale`: files and folders in, upscaled pictures out."""

import inspect
import os
import time
import traceback
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..pipelines.memory import is_out_of_memory
from .errors import INTERRUPTED, UNEXPECTED, fail, one_sentence, sentence
from .outputs import Job, collect, plan

if TYPE_CHECKING:
    from ..imaging import Picture
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline
    from .progress import Display


class ColorFix(str, Enum):
    """Colour corrections of the pipeline."""

    wavelet = "wavelet"
    adain = "adain"
    lab = "lab"
    none = "none"


class Dtype(str, Enum):
    """Number formats a model can run in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Format(str, Enum):
    """File formats of results; `same` is that of the picture, or png where that cannot be written."""

    png = "png"
    jpg = "jpg"
    webp = "webp"
    tif = "tif"
    same = "same"


@dataclass(frozen=True)
class Settings:
    """What the options of one run come to; the dicts hold only what was given."""

    model: str
    loading: dict[str, Any]
    calling: dict[str, Any]
    writing: dict[str, Any]
    seed: int | None = None
    allow_large: bool = False
    debug: bool = False


class _Refusal(ValueError):
    """What the pipeline says to an argument, as it would for every picture."""


def upscale(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Pictures, and folders of pictures.", show_default=False)
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="OUT", help="Folder, or file for one picture (default: beside it)."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="`embedded`, a pipeline folder, or a Hub id.")
    ] = "embedded",
    prompt_embeddings: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Another prompt than the model's own, as `tsdsr embed` writes it."),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option("--lora", metavar="DIR", help="LoRA over the model, published or trained; two for --fidelity."),
    ] = None,
    fidelity: Annotated[
        float | None, typer.Option(help="Mix of two LoRAs, from 0, the first (realism), to 1, the second (fidelity).")
    ] = None,
    upscale: Annotated[
        float | None, typer.Option("--upscale", "-s", help="Factor, 1 or more; may be a fraction.")
    ] = None,
    color_fix: Annotated[ColorFix | None, typer.Option(help="Which colours to give the result.")] = None,
    tile_size: Annotated[int | None, typer.Option(help="Side of a tile, in pixels of the result.")] = None,
    tile_overlap: Annotated[int | None, typer.Option(help="How far tiles overlap, in pixels of the result.")] = None,
    tile_batch_size: Annotated[int | None, typer.Option(help="Tiles that run at once.")] = None,
    process_size: Annotated[int | None, typer.Option(help="Smaller pictures are worked on at this size.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to run in.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")] = None,
    sample_posterior: Annotated[
        bool | None,
        typer.Option(help="Draw from the encoder's posterior, as the published code does, or take its mode."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of that draw.")] = None,
    file_format: Annotated[
        Format | None, typer.Option("--format", help="File format of results (default: OUT's, or png).")
    ] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Quality of jpg and webp.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace results that exist.")] = False,
    allow_large: Annotated[bool, typer.Option("--allow-large", help="Read pictures of any number of pixels.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Upscale pictures. Options left out have the defaults of the pipeline."""
    settings = Settings(
        model=model,
        loading=_given(prompt_embeddings=prompt_embeddings, lora=lora, dtype=_value(dtype), device=device),
        calling=_given(
            upscale=upscale,
            fidelity=fidelity,
            color_fix=_value(color_fix),
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            tile_batch_size=tile_batch_size,
            process_size=process_size,
            sample_posterior=sample_posterior,
        ),
        writing=_given(quality=quality),
        seed=seed,
        allow_large=allow_large,
        debug=debug,
    )
    with one_sentence(debug):
        from ..imaging import SUPPORTED_OUTPUT_SUFFIXES, find_images

        if lora and len(lora) > 1 and fidelity is None:
            raise ValueError("two LoRAs are mixed: say how with --fidelity, from 0 to 1, or name one.")
        sources = collect(inputs, find_images)
        factor = _pipeline_default if upscale is None else lambda: upscale
        jobs = plan(sources, output, _value(file_format), factor, SUPPORTED_OUTPUT_SUFFIXES)
        todo = [job for job in jobs if overwrite or not job.output.resolve().exists()]
        for job in jobs:
            if job not in todo:
                typer.echo(f"kept {job.output} (--overwrite replaces it)")
        if todo:
            from .progress import Display

            with Display(len(todo)) as display:
                run(todo, settings, display)


def run(jobs: list[Job], settings: Settings, display: "Display") -> None:
    """Do the jobs in order. One that fails is reported and skipped, or ends the command where it is the only one.

    Raises:
        ValueError, OSError: the only picture cannot be read or written, the model cannot be loaded, or the pipeline
            refuses an argument (which it would for every picture).
        typer.Exit: with 1 if pictures were skipped, with 130 after Ctrl-C.
    """
    from ..imaging import UnreadableImageError, read

    pipeline: TSDSRPipeline | None = None
    written = skipped = 0
    try:
        for job in jobs:
            problem: Exception
            try:
                display.begin(f"reading {job.source.name}")
                picture = read(job.source, allow_large=settings.allow_large)
            except UnreadableImageError as error:
                problem = _in_cli_words(error)
            else:
                if pipeline is None:
                    display.begin("loading the model")
                    pipeline = _load(settings)
                try:
                    line = _upscale_one(pipeline, picture, job, settings, display)
                except Exception as error:
                    if isinstance(error, _Refusal) and not written:
                        raise
                    problem = _in_cli_words(error)
                else:
                    written += 1
                    display.end(line)
                    continue
            if len(jobs) == 1:
                raise problem
            skipped += 1
            if settings.debug:
                traceback.print_exception(problem)
            display.end(f"skipped {job.source}: {sentence(problem)}", failed=True)
    except KeyboardInterrupt:
        kept = f" {written} of {len(jobs)} pictures are finished and kept." if len(jobs) > 1 else ""
        fail(f"interrupted.{kept}", INTERRUPTED)
    if skipped:
        fail(f"{skipped} of {len(jobs)} pictures were skipped.", UNEXPECTED)


def _load(settings: Settings) -> "TSDSRPipeline":
    if settings.model == "embedded" or Path(settings.model).exists():
        # Read by huggingface_hub when it is first imported: a model that is here needs no network.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from diffusers.utils.logging import disable_progress_bar

    from ..pipelines.loading import load_pipeline

    disable_progress_bar()  # of loading, which is written to log files too
    pipeline = load_pipeline(settings.model, **settings.loading)
    pipeline.set_progress_bar_config(disable=True)  # the command has its own
    return pipeline


def _upscale_one(
    pipeline: "TSDSRPipeline", picture: "Picture", job: Job, settings: Settings, display: "Display"
) -> str:
    """Upscale and write one picture; returns the line that says so."""
    import torch

    from ..imaging import write

    display.begin(job.source.name)
    start = time.perf_counter()
    calling = dict(settings.calling)
    if settings.seed is not None:
        # A generator a picture: its result does not depend on which pictures came before.
        calling["generator"] = torch.Generator("cpu").manual_seed(settings.seed)
    try:
        result = pipeline(
            image=picture.rgb,
            output_type="np",
            tile_callback=lambda event: display.tiles(event.done, event.total),
            **calling,
        ).images[0]
    except ValueError as error:
        raise _Refusal(str(error)) from error
    finished = picture.with_rgb(result)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    write(finished, job.output, **settings.writing)
    seconds = time.perf_counter() - start
    return f"{job.source} -> {job.output} ({finished.width}x{finished.height}, {seconds:.1f} s)"


def _pipeline_default() -> float:
    """The factor that the pipeline has where none is given, for the names of results."""
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline

    return inspect.signature(TSDSRPipeline.__call__).parameters["upscale"].default


def _in_cli_words(error: Exception) -> Exception:
    """The same problem, with the mend said as an option of this command."""
    if isinstance(error, ValueError) and "allow_large=True" in str(error):
        return ValueError(str(error).replace("allow_large=True", "--allow-large"))
    if is_out_of_memory(error):
        return MemoryError("not enough memory; try a smaller --tile-size or --tile-batch-size, or --device cpu.")
    return error


def _value(choice: Enum | None) -> str | None:
    return None if choice is None else choice.value


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep the defaults of what is called."""
    return {name: value for name, value in options.items() if value is not None}
