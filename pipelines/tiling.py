"""Which size to work at, and one network call over overlapping tiles with a single blend.

Pure functions of sizes and tensors; the pipeline calls them, they know nothing of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TilesDone:
    """What `tile_callback` of the pipeline receives after each network call.

    Attributes:
        stage: "encode" (pixels -1..1 to unscaled latents), "step" (scaled latents to those of the result) or "decode"
            (unscaled latents to pixels about -1..1).
        done: tiles of this picture that are finished, over all three stages.
        total: how many there will be.
        size: height and width of the padded working picture in pixels.
        boxes: (top, left, height, width) of each tile of this call, in pixels of that picture.
        inputs: what the network was given, (tiles, C, h, w).
        outputs: what came of that, (tiles, D, h', w'), each tile by itself, before it is blended with others; for
            "step" not the prediction, whose meaning differs between networks, but where the one step leads with it.
    """

    stage: str
    done: int
    total: int
    size: tuple[int, int]
    boxes: list[tuple[int, int, int, int]]
    inputs: Tensor
    outputs: Tensor


def working_size(
    size: tuple[int, int], target: tuple[int, int], upscale: float | None, process_size: int
) -> tuple[int, int]:
    """Height and width in pixels at which the networks run (published `test/test_tsdsr.py`, small-picture rule).

    The target itself, unless its short side is under `process_size`: then the picture is enlarged until the short
    side reaches it, and the result is reduced to the target afterwards. Strips are enlarged only while the long side
    stays within four times `process_size`, where the published rule would ask for pictures of any length.

    Args:
        size: height and width of the input.
        target: height and width of the result.
        upscale: the factor between them, None where they were asked for separately.
        process_size: pixels; 0 switches the rule off.
    """
    short, long = min(target), max(target)
    if short >= process_size:
        return target
    limit = max(1.0, 4 * process_size / long)
    if upscale is None or process_size < upscale:
        factor = min(process_size / short, limit)
        return max(1, int(target[0] * factor)), max(1, int(target[1] * factor))
    # The published rule truncates the enlarged input, not the result.
    factor = max(1.0, min((process_size // upscale) / min(size), limit))
    return round(int(size[0] * factor) * upscale), round(int(size[1] * factor) * upscale)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the right and the bottom to multiples of `multiple`: mirrored, repeated where too small."""
    height, width = images.shape[-2:]
    for pad, side, edges in (
        (-width % multiple, width, lambda p: (0, p, 0, 0)),
        (-height % multiple, height, lambda p: (0, 0, 0, p)),
    ):
        if pad:
            images = F.pad(images, edges(pad), mode="reflect" if pad < side else "replicate")
    return images


def reduce_bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) in 0..1 with the antialiased bicubic filter, as Pillow does it for the published procedure.

    First across, then down, clamped after each: overshoot of the first pass does not reach the second.
    """
    across = F.interpolate(images, size=(images.shape[-2], size[1]), mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(across, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: steps of `tile - overlap`, the last tile flush with the border."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def gaussian_weights(height: int, width: int) -> Tensor:
    """Separable Gaussian of shape (height, width), variance 0.01 in units of the tile's side, centred on the tile.

    The published weights are centred half a latent pixel too low; these are not.
    """
    sides = []
    for length in (height, width):
        offset = (torch.arange(length, dtype=torch.float32) - (length - 1) / 2) / length
        sides.append(torch.exp(-offset.square() / (2 * 0.01)))
    return torch.outer(*sides)


def count_tiles(height: int, width: int, tile: int, overlap: int) -> int:
    """How many tiles `run_tiled` will run."""
    return len(tile_starts(height, tile, overlap)) * len(tile_starts(width, tile, overlap))


def run_tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    batch_size: int = 1,
    scale: Fraction = Fraction(1),
    on_tiles_done: Callable[[list[tuple[int, int]], Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Apply `function` to overlapping tiles of `x` and blend the results with Gaussian weights that sum to one.

    Args:
        function: maps (b, C, h, w) to (b, D, h * scale, w * scale).
        x: (B, C, H, W). Sides that are not longer than `tile` are not cut.
        tile: side of a tile, in pixels of `x`.
        overlap: of neighbouring tiles, in pixels of `x`, smaller than `tile`.
        batch_size: tiles of one call of `function`.
        scale: size of the result over size of `x`; tiles must begin at whole pixels of the result.
        on_tiles_done: called after each call of `function` with the (top, left) of its tiles in `x`, what `function`
            was given, and what it returned.

    Returns:
        (B, D, H * scale, W * scale), blended in float32, in the dtype that `function` returns.
    """
    batch, _, height, width = x.shape
    tile_height, tile_width = min(tile, height), min(tile, width)
    corners = [(top, left) for top in tile_starts(height, tile, overlap) for left in tile_starts(width, tile, overlap)]
    if len(corners) == 1:
        result = function(x)
        if on_tiles_done:
            on_tiles_done(corners, x, result)
        return result
    total: Any = None
    for first in range(0, len(corners), batch_size):
        group = corners[first : first + batch_size]
        tiles = torch.cat([x[:, :, top : top + tile_height, left : left + tile_width] for top, left in group])
        outputs = function(tiles)
        if total is None:
            weights = gaussian_weights(*outputs.shape[-2:]).to(outputs.device)
            shape = (batch, outputs.shape[1], int(height * scale), int(width * scale))
            total = torch.zeros(shape, device=outputs.device)
            weight_sum = torch.zeros(shape[-2:], device=outputs.device)
        for (top, left), output in zip(group, outputs.split(batch), strict=True):
            rows = slice(int(top * scale), int(top * scale) + output.shape[-2])
            columns = slice(int(left * scale), int(left * scale) + output.shape[-1])
            total[:, :, rows, columns] += output * weights
            weight_sum[rows, columns] += weights
        if on_tiles_done:
            on_tiles_done(group, tiles, outputs)
    return (total / weight_sum).to(outputs.dtype)
