"""What makes a result of a small picture: a model, or interpolation to compare it with."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..imaging import RESAMPLING, resize

Upscaler = Callable[[Tensor, tuple[int, int]], Tensor]
"""`(lq (1, 3, h, w), (H, W)) -> (1, 3, H, W)`, RGB, 0..1, on the CPU."""

INTERPOLATIONS = tuple(RESAMPLING)


def make_upscaler(
    model: str, *, seed: int | None = None, loading: dict[str, Any] | None = None, calling: dict[str, Any] | None = None
) -> Upscaler:
    """A model, loaded and ready.

    Args:
        model: one of INTERPOLATIONS (Pillow's, in float), or what `load_pipeline` takes.
        seed: for each picture anew, where the model draws.
        loading: more arguments of `load_pipeline`.
        calling: more arguments of the pipeline's call.

    Raises:
        ValueError, OSError: as `load_pipeline`.
    """
    if model in INTERPOLATIONS:

        def interpolate(lq: Tensor, size: tuple[int, int]) -> Tensor:
            enlarged = resize(lq[0].permute(1, 2, 0).numpy(), (size[1], size[0]), model)
            return torch.from_numpy(enlarged).permute(2, 0, 1)[None]

        return interpolate

    from ..pipelines.loading import load_pipeline

    pipeline = load_pipeline(model, **loading or {})
    pipeline.set_progress_bar_config(disable=True)

    def upscale(lq: Tensor, size: tuple[int, int]) -> Tensor:
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        result = pipeline(lq, height=size[0], width=size[1], generator=generator, output_type="pt", **calling or {})
        return result.images.float().cpu()

    return upscale


def default_upscale() -> float:
    """The factor that the pipeline has where none is given."""
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline

    return float(inspect.signature(TSDSRPipeline.__call__).parameters["upscale"].default)
