"""Which size to work at, and one network call over overlapping tiles with a single blend.

Pure functions of sizes and tensors; the pipeline calls them, they know nothing of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .strips import Rows


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
        inputs: what the network was given, (tiles, C, h, w); None for a strip of a large picture, which a VAE works on
            row by row.
        outputs: what came of that, (tiles, D, h', w'), each tile by itself, before it is blended with others; for
            "step" not the prediction, whose meaning differs between networks, but where the one step leads with it.
    """

    stage: str
    done: int
    total: int
    size: tuple[int, int]
    boxes: list[tuple[int, int, int, int]]
    inputs: Tensor | None
    outputs: Tensor


class TileProgress:
    """Counts a picture's tiles and tells of them.

    Args:
        total: how many there will be.
        size: height and width of the padded working picture in pixels.
        bar: diffusers' progress bar.
        callback: see `TilesDone`.
    """

    def __init__(self, total: int, size: tuple[int, int], bar: Any, callback: Callable[[TilesDone], None] | None):
        self._total, self._size, self._bar, self._callback, self._done = total, size, bar, callback, 0

    def tell(
        self,
        stage: str,
        boxes: list[tuple[int, int, int, int]],
        inputs: Tensor | None,
        outputs: Callable[[], Tensor],
    ) -> None:
        """Tiles, or a strip, that are done; `outputs` is asked for where somebody listens."""
        self._done += len(boxes)
        self._bar.update(len(boxes))
        if self._done == self._total:
            self._bar.close()
        if self._callback is not None:
            self._callback(TilesDone(stage, self._done, self._total, self._size, boxes, inputs, outputs()))


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


def pad_to_multiple(images: Tensor | Rows, multiple: int) -> Tensor | Rows:
    """Pad (B, C, H, W) at the right and the bottom to multiples of `multiple`: mirrored, repeated where too small."""
    height, width = images.shape[-2:]
    for pad, side, edges in (
        (-width % multiple, width, lambda p: (0, p, 0, 0)),
        (-height % multiple, height, lambda p: (0, 0, 0, p)),
    ):
        if pad:
            images = F.pad(images, edges(pad), mode="reflect" if pad < side else "replicate")
    return images


def reduce_bicubic(images: Tensor | Rows, size: tuple[int, int]) -> Tensor | Rows:
    """Resize (B, C, H, W) in 0..1 with the antialiased bicubic filter, as Pillow does it for the published procedure.

    First across, then down, clamped after each: overshoot of the first pass does not reach the second.
    """
    across = F.interpolate(images, size=(images.shape[-2], size[1]), mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(across, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def tile_starts(length: int, tile: int, overlap: int, grain: int = 1) -> list[int]:
    """Where tiles begin along a side: as few as overlap by at least `overlap`, spread evenly from border to border.

    Args:
        length: of the side; like `tile` and `overlap` a multiple of `grain`.
        tile: side of a tile.
        overlap: of neighbours at least, smaller than `tile`.
        grain: tiles begin at multiples of this.
    """
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // (tile - overlap))
    return [round(step * (length - tile) / steps / grain) * grain for step in range(steps + 1)]


def gaussian_weights(length: int) -> Tensor:
    """Gaussian of variance 0.01 in units of the tile's side `length`, centred on the tile.

    The published weights are centred half a latent pixel too low; these are not.
    """
    offset = (torch.arange(length, dtype=torch.float32) - (length - 1) / 2) / length
    return torch.exp(-offset.square() / (2 * 0.01))


@dataclass(frozen=True)
class TilePlan:
    """Overlapping tiles of one size over a map.

    Attributes:
        size: height and width of the map.
        tile: height and width of a tile.
        tops, lefts: where tiles begin.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    tops: list[int]
    lefts: list[int]

    @classmethod
    def even(cls, size: tuple[int, int], tile: int, overlap: int, grain: int = 1) -> "TilePlan":
        """Tiles of side `tile` at most, spread evenly (`tile_starts`) over both sides."""
        return cls(
            size,
            (min(tile, size[0]), min(tile, size[1])),
            tile_starts(size[0], tile, overlap, grain),
            tile_starts(size[1], tile, overlap, grain),
        )

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(top, left) of every tile, row by row."""
        return [(top, left) for top in self.tops for left in self.lefts]

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """How much each tile counts along the height and along the width; over a pixel's tiles they sum to one."""
        return _sum_to_one(self.size[0], self.tile[0], self.tops), _sum_to_one(self.size[1], self.tile[1], self.lefts)


def _sum_to_one(length: int, tile: int, starts: list[int]) -> list[Tensor]:
    weights, total = gaussian_weights(tile), torch.zeros(length)
    for start in starts:
        total[start : start + tile] += weights
    return [weights / total[start : start + tile] for start in starts]


def run_tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor | Rows,
    plan: TilePlan,
    batch_size: int = 1,
    on_tiles_done: Callable[[list[tuple[int, int]], Tensor, Tensor], None] | None = None,
) -> Tensor | Rows:
    """Apply `function` to the tiles of `x` and blend the results.

    Args:
        function: maps (b, C, h, w) to the same shape.
        x: (B, C, H, W). Of a map that is worked on by rows only those of the tiles in work are held.
        plan: where tiles lie.
        batch_size: tiles of one call of `function`.
        on_tiles_done: called after each call of `function` with the (top, left) of its tiles, what `function` was
            given, and what it returned.

    Returns:
        (B, C, H, W), blended in float32, in the dtype of `x`; worked on by rows where `x` is.
    """
    corners = plan.corners
    if len(corners) == 1 and isinstance(x, Tensor):
        result = function(x)
        if on_tiles_done:
            on_tiles_done(corners, x, result)
        return result
    source = Rows.of(x) if isinstance(x, Tensor) else x
    batch, channels = source.shape[:2]
    height, width = plan.size
    tile_height, tile_width = plan.tile
    down, across = plan.weights()
    done = 0
    # Rows from `start` on to which tiles in work have added.
    start, total = 0, torch.zeros(batch, channels, 0, width, device=source.device)

    def first_open() -> int:
        """The first row to which a tile is yet to add."""
        return corners[done][0] if done < len(corners) else height

    def compute(top: int, bottom: int) -> Tensor:
        nonlocal done, start, total
        while first_open() < bottom:
            group = corners[done : done + batch_size]
            first, last = group[0][0], group[-1][0] + tile_height
            band = source.read(first, last)
            tiles = torch.cat(
                [band[..., y - first : y - first + tile_height, left : left + tile_width] for y, left in group]
            )
            outputs = function(tiles)
            missing = last - start - total.shape[-2]
            if missing > 0:
                total = torch.cat([total, total.new_zeros(batch, channels, missing, width)], dim=-2)
            for (y, left), output in zip(group, outputs.split(batch), strict=True):
                weights = torch.outer(down[plan.tops.index(y)], across[plan.lefts.index(left)]).to(total.device)
                total[..., y - start : y - start + tile_height, left : left + tile_width] += output * weights
            done += len(group)
            if on_tiles_done:
                on_tiles_done(group, tiles, outputs)
        result = total[..., top - start : bottom - start, :].to(source.dtype)
        start, total = bottom, total[..., bottom - start :, :].clone()
        return result

    blended = Rows(
        source.shape, source.dtype, source.device, compute, [source], reach=lambda _: first_open(), kept=True
    )
    return blended.whole() if isinstance(x, Tensor) else blended
