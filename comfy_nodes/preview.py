"""Progress with a picture: the finished tiles on the enlarged input, small enough to send after every tile."""

import time
from typing import Any

import comfy.utils
import torch
from comfy import model_management
from torch import Tensor

from ..pipelines.tiling import TilesDone
from .pictures import resized

# The longer side of a preview, in pixels, and the shortest time between two, in seconds.
LONGEST = 512
INTERVAL = 0.1


class Progress:
    """The progress bar of one node over all pictures of a batch."""

    def __init__(self, pictures: int):
        self._bar = comfy.utils.ProgressBar(pictures)
        self._pictures = pictures
        self._done = 0
        self._sent = 0.0

    def start(self, picture: Tensor) -> None:
        """The next picture, (1, 3, H, W) in 0..1; what was begun and not finished is begun anew."""
        ratio = LONGEST / max(picture.shape[-2:])
        size = (max(1, round(picture.shape[-2] * ratio)), max(1, round(picture.shape[-1] * ratio)))
        self._input = resized(picture.float().cpu(), size)[0]
        self._canvas = self._input.clone()

    def tiles_done(self, event: TilesDone) -> None:
        """The pipeline's `tile_callback`; ends the run where the user interrupts it.

        Raises:
            InterruptProcessingException: the host's own, if the user pressed Cancel.
        """
        model_management.throw_exception_if_processing_interrupted()
        last = event.done == event.total
        if event.stage != "encode":
            self._paint(event)
        preview = None
        if last or time.monotonic() - self._sent >= INTERVAL:
            preview = ("JPEG", _pil(self._canvas), LONGEST)
            self._sent = time.monotonic()
        self._bar.update_absolute(self._done * event.total + event.done, self._pictures * event.total, preview)
        if last:
            self._done += 1

    def _paint(self, event: TilesDone) -> None:
        height, width = self._canvas.shape[-2:]
        for index, (top, left, tile_height, tile_width) in enumerate(event.boxes):
            rows = slice(top * height // event.size[0], -(-(top + tile_height) * height // event.size[0]))
            columns = slice(left * width // event.size[1], -(-(left + tile_width) * width // event.size[1]))
            size = self._canvas[:, rows, columns].shape[-2:]
            if event.stage == "decode":
                rgb = event.outputs[index : index + 1].float().cpu() / 2 + 0.5
            else:
                shown = self._input[None, :, rows, columns]
                assert event.inputs is not None  # of tiles, which these are
                rgb = latents_to_rgb(event.inputs[index : index + 1], event.outputs[index : index + 1], shown)
            self._canvas[:, rows, columns] = resized(rgb.nan_to_num().clamp(0, 1), tuple(size))[0]


def latents_to_rgb(latents: Tensor, result: Tensor, picture: Tensor) -> Tensor:
    """A rough picture (1, 3, h, w), 0..1, of the latents `result` (1, C, h, w), without decoding them.

    The linear map from latents to colours is fitted on the input itself, whose latents `latents` (1, C, h, w) and
    colours `picture` (1, 3, H, W) are both known; so it serves any VAE.
    """
    latents, result = latents.float().cpu(), result.float().cpu()
    colours = resized(picture, (latents.shape[-2], latents.shape[-1])).flatten(2)[0].T

    def features(z: Tensor) -> Tensor:
        rows = z.flatten(2)[0].T
        return torch.cat([rows, torch.ones(rows.shape[0], 1)], dim=1)

    known = features(latents)
    # A little ridge, for flat pictures.
    gram = known.T @ known + 1e-2 * torch.eye(known.shape[1])
    weights = torch.linalg.solve(gram, known.T @ colours)
    return (features(result) @ weights).T.reshape(1, 3, *latents.shape[-2:]).clamp(0, 1)


def _pil(picture: Tensor) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor.numpy_to_pil(picture.movedim(0, -1).numpy())[0]
