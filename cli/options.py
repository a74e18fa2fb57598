"""Options that several commands have, and how what was typed becomes arguments."""

from enum import Enum
from typing import Annotated, Any

import typer

from ..pipelines.memory import is_out_of_memory


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


UpscaleOption = Annotated[float | None, typer.Option("--upscale", "-s", help="Factor, 1 or more; may be a fraction.")]
ColorFixOption = Annotated[ColorFix | None, typer.Option(help="Which colours to give the result.")]
DegridOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=255,
        help="Most to take off a grid of patches, in levels of 255 (default: the model's own).",
    ),
]
GrainOption = Annotated[
    float | None, typer.Option(min=0, max=255, help="Grain to add, in levels of 255 (default: the model's own).")
]
TileSizeOption = Annotated[int | None, typer.Option(help="Side of a tile, in pixels of the result.")]
TileOverlapOption = Annotated[int | None, typer.Option(help="How far tiles overlap, in pixels of the result.")]
TileBatchSizeOption = Annotated[int | None, typer.Option(help="Tiles that run at once.")]
VaeTileSizeOption = Annotated[
    int | None, typer.Option(help="The VAE takes no more pixels at once than a square of this side has.")
]
ProcessSizeOption = Annotated[int | None, typer.Option(help="Smaller pictures are worked on at this size.")]
FidelityOption = Annotated[
    float | None, typer.Option(help="Mix of two LoRAs, from 0, the first (realism), to 1, the second (fidelity).")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Number format to run in.")]
DeviceOption = Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")]
SamplePosteriorOption = Annotated[
    bool | None,
    typer.Option(help="Draw from the encoder's posterior, as the published code does, or take its mode."),
]
SeedOption = Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of that draw.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def value(choice: Enum | None) -> str | None:
    """What a choice stands for, None where none was made."""
    return None if choice is None else choice.value


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep the defaults of what is called."""
    return {name: setting for name, setting in options.items() if setting is not None}


def in_cli_words(error: Exception) -> Exception:
    """The same problem, with the mend said as an option of the command."""
    if isinstance(error, ValueError) and "allow_large=True" in str(error):
        return ValueError(str(error).replace("allow_large=True", "--allow-large"))
    if is_out_of_memory(error):
        return MemoryError(
            "not enough memory; try a smaller --tile-size, --vae-tile-size or --tile-batch-size, or --device cpu."
        )
    return error
