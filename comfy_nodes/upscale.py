"""The upscalers: one that asks for little, and one whose tiles can be set."""

from typing import Any

from comfy_api.latest import io

from ..pipelines.color import COLOR_FIXES
from ..pipelines.memory import Tiles
from .schema import CATEGORY, Model, advanced, pipeline_defaults

LARGEST_SIDE = 65536


def _inputs() -> list[io.Input]:
    defaults = pipeline_defaults()
    return [
        Model.Input("model", tooltip="From TSD-SR Loader."),
        io.Image.Input("image", tooltip="The pictures to enlarge. An alpha channel is enlarged too and rejoined."),
        io.Float.Input(
            "upscale",
            default=float(defaults["upscale"]),
            min=1.0,
            max=16.0,
            step=0.1,
            round=0.001,
            tooltip="Factor of both sides. The models are made for 4; other factors work as well.",
        ),
        io.Combo.Input(
            "color_fix",
            options=[*COLOR_FIXES, "none"],
            default=defaults["color_fix"],
            tooltip="Keeps the colours of the input. wavelet: its coarse colours under the new details (safest). "
            "adain: its mean and contrast per RGB channel. lab: the same in CIELAB. none: what the model made.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,
            tooltip="Only used with sample_posterior; without it, the result is always the same.",
        ),
    ]


def _more_inputs() -> list[io.Input]:
    defaults = pipeline_defaults()
    return [
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Enlarged to the size of the result and handed on; any size, empty ones allowed.",
        ),
        advanced(
            io.Int.Input(
                "width",
                optional=True,
                default=0,
                min=0,
                max=LARGEST_SIDE,
                tooltip="Width of the result in pixels instead of upscale; 0: from height, or by upscale.",
            )
        ),
        advanced(
            io.Int.Input(
                "height",
                optional=True,
                default=0,
                min=0,
                max=LARGEST_SIDE,
                tooltip="Height of the result in pixels instead of upscale; 0: from width, or by upscale.",
            )
        ),
        advanced(
            io.Float.Input(
                "lora_strength",
                optional=True,
                default=1.0,
                min=0.0,
                max=2.0,
                step=0.05,
                tooltip="Strength of the TSD-SR LoRA; 0 is the plain base model. Has an effect where the loader did "
                "not merge the LoRA.",
            )
        ),
        advanced(
            io.Int.Input(
                "process_size",
                optional=True,
                default=defaults["process_size"],
                min=0,
                max=4096,
                step=16,
                tooltip="Results with a shorter side than this, in pixels, are worked on at this size and reduced "
                "afterwards, as published. 0: never.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "sample_posterior",
                optional=True,
                default=defaults["sample_posterior"],
                tooltip="Draw the encoder's latents by seed, as the published code does, instead of taking the most "
                "likely ones.",
            )
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output(display_name="image", tooltip="The enlarged pictures, in full float precision."),
        io.Mask.Output(
            display_name="mask", tooltip="The enlarged mask; without one, the transparency of the pictures, or zeros."
        ),
    ]


def _run(
    tiles: dict[str, int],
    *,
    model: Any,
    image: Any,
    upscale: float,
    color_fix: str,
    seed: int,
    mask: Any = None,
    width: int = 0,
    height: int = 0,
    lora_strength: float = 1.0,
    **options: Any,
) -> io.NodeOutput:
    """What both upscalers do; `options` and `tiles` that were left out have the pipeline's defaults."""
    from .hosting import upscale_batch

    defaults = pipeline_defaults()
    return io.NodeOutput(
        *upscale_batch(
            model,
            image,
            mask,
            Tiles(**{name: tiles.get(name, defaults[name]) for name in Tiles.__dataclass_fields__}),
            lora_strength,
            seed,
            upscale=upscale,
            color_fix=color_fix,
            width=width or None,
            height=height or None,
            **{name: options.get(name, defaults[name]) for name in ("process_size", "sample_posterior")},
        )
    )


class TSDSRUpscale(io.ComfyNode):
    """IMAGE -> IMAGE in one step, with the pipeline's own tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TSDSRUpscale",
            display_name="TSD-SR Upscale",
            category=CATEGORY,
            description="Enlarges photographs with one diffusion step. Large results are tiled as needed; TSD-SR Tiled "
            "Upscale lets you choose the tiles.",
            inputs=[*_inputs(), *_more_inputs()],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return _run({}, **inputs)


class TSDSRTiledUpscale(io.ComfyNode):
    """The same with tiles of one's own, for any size and little memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = pipeline_defaults()
        tiles = [
            io.Int.Input(
                "tile_size",
                default=defaults["tile_size"],
                min=64,
                max=4096,
                step=16,
                tooltip="Side of the transformer's tiles, in pixels of the result. 512 is what the models were trained "
                "at.",
            ),
            io.Int.Input(
                "tile_overlap",
                default=defaults["tile_overlap"],
                min=0,
                max=1024,
                step=16,
                tooltip="How far neighbouring tiles overlap, in pixels of the result; more is smoother and slower. "
                "Must be smaller than the tiles.",
            ),
            io.Int.Input(
                "tile_batch_size",
                default=defaults["tile_batch_size"],
                min=1,
                max=64,
                tooltip="Tiles that run at once: faster on a large GPU, for more memory. Is halved where memory runs "
                "out.",
            ),
            advanced(
                io.Int.Input(
                    "vae_tile_size",
                    optional=True,
                    default=defaults["vae_tile_size"],
                    min=256,
                    max=8192,
                    step=64,
                    tooltip="Larger pictures go through the VAE in strips of as many pixels as a square of this side. "
                    "Strips need less memory and do not change the result; they begin smaller where memory is short.",
                )
            ),
        ]
        return io.Schema(
            node_id="TSDSRTiledUpscale",
            display_name="TSD-SR Tiled Upscale",
            category=CATEGORY,
            description="Enlarges photographs of any size tile by tile, with one diffusion step for each tile and one "
            "blend and colour correction for the whole picture.",
            inputs=[*_inputs(), *tiles, *_more_inputs()],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, tile_size=None, tile_overlap=None) -> bool | str:
        # Linked inputs are not known yet; the pipeline checks them when it runs.
        if isinstance(tile_size, int) and isinstance(tile_overlap, int) and tile_overlap > tile_size - 16:
            return f"tile_overlap must be at least 16 px smaller than tile_size ({tile_size}), not {tile_overlap}."
        return True

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return _run({name: inputs.pop(name) for name in Tiles.__dataclass_fields__ if name in inputs}, **inputs)
