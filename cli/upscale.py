"""`tsdsr upscale`: pictures, folders and films in, upscaled ones out."""

import io
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .errors import fail, one_sentence
from .jobs import TERMINATED, Settings, Terminated, check_writable, launch, pipeline_defaults, run, share, stamp
from .manifest import Manifest
from .options import (
    ColorFixOption,
    DebugOption,
    DegridOption,
    DeviceOption,
    DtypeOption,
    FidelityOption,
    GrainOption,
    ProcessSizeOption,
    SamplePosteriorOption,
    SeedOption,
    TileBatchSizeOption,
    TileOverlapOption,
    TileSizeOption,
    UpscaleOption,
    VaeTileSizeOption,
    given,
    value,
)
from .outputs import STREAM, Job, collect, plan


class Format(str, Enum):
    """File formats of results; `same` is that of the picture, or png where that cannot be written."""

    png = "png"
    jpg = "jpg"
    webp = "webp"
    avif = "avif"
    heic = "heic"
    tif = "tif"
    gif = "gif"
    bmp = "bmp"
    exr = "exr"
    same = "same"


class Subsampling(str, Enum):
    """How finely JPEG keeps colours."""

    full = "4:4:4"
    halved = "4:2:2"
    quartered = "4:2:0"


def upscale(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Pictures, films, folders of them, patterns such as 'photos/**/*.jpg'; - for stdin.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Folder, or file for one picture, or - for stdout (default: beside it).",
        ),
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
    fidelity: FidelityOption = None,
    upscale: UpscaleOption = None,
    color_fix: ColorFixOption = None,
    degrid: DegridOption = None,
    grain: GrainOption = None,
    tile_size: TileSizeOption = None,
    tile_overlap: TileOverlapOption = None,
    tile_batch_size: TileBatchSizeOption = None,
    vae_tile_size: VaeTileSizeOption = None,
    process_size: ProcessSizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    sample_posterior: SamplePosteriorOption = None,
    seed: SeedOption = None,
    file_format: Annotated[
        Format | None, typer.Option("--format", help="File format of results (default: OUT's, or png).")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Quality of jpg, webp, avif, heic and films.")
    ] = None,
    subsampling: Annotated[Subsampling | None, typer.Option(help="How finely jpg keeps colours.")] = None,
    lossless: Annotated[bool | None, typer.Option(help="Whether webp keeps every pixel.")] = None,
    recursive: Annotated[bool, typer.Option(help="Whether folders are searched with their subfolders.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace results that exist.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep results that are whole, and make those that are not.")
    ] = False,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add a line of JSON for each picture to a file.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only the I-th of N equal shares, for several machines.")
    ] = None,
    allow_large: Annotated[bool, typer.Option("--allow-large", help="Read pictures of any number of pixels.")] = False,
    debug: DebugOption = False,
) -> None:
    """Upscale pictures. Options left out have the defaults of the pipeline."""
    settings = Settings(
        model=model,
        loading=given(prompt_embeddings=prompt_embeddings, lora=lora, dtype=value(dtype), device=device),
        calling=given(
            upscale=upscale,
            fidelity=fidelity,
            color_fix=value(color_fix),
            degrid=degrid,
            grain=grain,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            tile_batch_size=tile_batch_size,
            vae_tile_size=vae_tile_size,
            process_size=process_size,
            sample_posterior=sample_posterior,
        ),
        writing=given(quality=quality, subsampling=value(subsampling), lossless=lossless),
        seed=seed,
        resume=resume,
        allow_large=allow_large,
        debug=debug,
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal or log has no letters for
    with one_sentence(debug), _signals_as_interrupts(), ExitStack() as stack:
        from ..imaging import SUPPORTED_OUTPUT_SUFFIXES

        if lora and len(lora) > 1 and fidelity is None:
            raise ValueError("two LoRAs are mixed: say how with --fidelity, from 0 to 1, or name one.")
        if upscale is not None and not 1 <= upscale < math.inf:
            raise ValueError(f"--upscale must be a number of at least 1, not {upscale:g}.")
        if resume and overwrite:
            raise ValueError("--resume keeps what is whole and --overwrite replaces it: choose one.")
        sources = collect(inputs, recursive, skip=output)
        factor = _pipeline_default if upscale is None else lambda: upscale
        launched = launch()
        every = plan(sources, output, value(file_format), factor, SUPPORTED_OUTPUT_SUFFIXES)
        jobs = share(every, shard, launched)
        if jobs and jobs[0].output == STREAM:
            if sys.stdout.isatty():
                raise ValueError("a picture is nothing for a terminal: name a file with -o, or lead stdout elsewhere.")
            settings = replace(settings, stdout=sys.stdout.buffer, stdout_format=_stdout_format(jobs[0], file_format))
            stack.enter_context(redirect_stdout(sys.stderr))
        if jobs and jobs[0].source == STREAM and sys.stdin.isatty():
            raise ValueError("no picture comes from stdin, which is a terminal: name a file, or lead one there.")
        process = None if launched is None else launched.rank
        prefix = "" if process is None else f"{process}: "
        todo, before = [], {job.output: stamp(job.output) for job in jobs}
        for job in jobs:
            if overwrite or resume or job.output == STREAM or before[job.output] is None:
                todo.append(job)
            else:
                typer.echo(f"{prefix}kept {job.output} (--overwrite replaces it)")
        check_writable(todo)
        records = None if manifest is None else stack.enter_context(Manifest(manifest))
        if todo or launched is not None:
            from .progress import Display

            with Display(len(todo), process) as display:
                run(todo, settings, display, before, records)


def _stdout_format(job: Job, file_format: Format | None) -> str:
    if file_format is not Format.same:
        return value(file_format) or "png"
    if job.source == STREAM:
        raise ValueError("--format same goes by the picture's name, and one from stdin has none: name the format.")
    from ..imaging import SUPPORTED_OUTPUT_SUFFIXES

    suffix = job.source.suffix.lower()
    return suffix.lstrip(".") if suffix in SUPPORTED_OUTPUT_SUFFIXES else "png"


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """What ends the process from elsewhere is met as Ctrl-C is: with what is begun cleared away."""

    def terminate(*_: object) -> NoReturn:
        raise Terminated

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python allows handlers there alone
    # What is ignored stays so, SIGHUP under nohup.
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, terminate)
    try:
        yield
    except Terminated:
        fail("terminated.", TERMINATED)
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _pipeline_default() -> float:
    """The factor that the pipeline has where none is given, for the names of results."""
    return pipeline_defaults()["upscale"].default
