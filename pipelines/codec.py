"""The VAE over pictures of any size: whole where that fits, else strip by strip with the same result.

Up to `EXACT` squared pixels, group norms take their statistics over the whole picture and attention sees all of it, as
if the VAE had run at once. Above, the norms of its fine maps take theirs from windows, which are the same for all
strips, and attention sees an even sample of pixels; the rest is exact still.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory import (
    EXACT,
    STREAMED,
    fitting_side,
    free_memory,
    kept_bytes_per_pixel,
    strips_of,
    vae_bytes_per_pixel,
)
from .precision import InFloat32, Precision
from .strips import Rows, Work

# Windows in which a large picture's statistics are measured: how many, one below the other, their height and width in
# pixels, and how much of their height is left out at each side. Wide ones, because most pictures change from top to
# bottom more than across.
WINDOWS, WINDOW, MARGIN = 8, (192, 2688), 1 / 8
# Coarser maps than this, in pixels, are kept whole for their statistics in large pictures too.
KEPT = 1024 * 1024
# Pixels that each pixel of a large picture attends to.
MOST_KEYS = 2**14


@dataclass(frozen=True)
class CodecPlan:
    """How the VAE goes over one picture.

    Attributes:
        strips: in how many; 1 for the whole at once.
        sampled: whether group norms and attention see a sample.
        in_file: whether what is kept of the whole picture lies in a temporary file rather than in memory.
    """

    strips: int
    sampled: bool
    in_file: bool


def needs(vae: Any) -> tuple[list[int], int, bool]:
    """Widths of its maps from the finest on, bytes of a number, and whether all of its layers are local."""
    widths = getattr(vae.config, "block_out_channels", None) or vae.config.decoder_block_out_channels
    local = not any(isinstance(module, nn.GroupNorm) for module in vae.modules())
    return list(widths), next(vae.parameters()).element_size(), local


def plan_codec(
    vae: Any, height: int, width: int, vae_tile_size: int, multiple: int, device: torch.device, keep_colors: bool
) -> CodecPlan:
    """The plan for a picture of this many pixels, with the memory that is free now.

    Args:
        vae_tile_size: strips have at most this many pixels squared.
        multiple: strips are at least this high.
        keep_colors: whether the decoded picture is read twice.
    """
    widths, itemsize, local = needs(vae)
    side = min(vae_tile_size, STREAMED) if local else vae_tile_size
    side = fitting_side(side, free_memory(device), vae_bytes_per_pixel(widths, itemsize, local))
    strips = 1 if height * width <= side * side else strips_of(height, width, side, multiple)
    if strips > 1:
        latent_rows = height // multiple
        strips = -(-latent_rows // -(-latent_rows // strips))
    sampled = not local and height * width > EXACT * EXACT
    kept = 12.0 * keep_colors * height * width
    if sampled:
        kept += kept_bytes_per_pixel(widths[::-1], itemsize) * KEPT
    elif not local:
        kept += kept_bytes_per_pixel(widths, itemsize) * height * width
    room = free_memory("cpu") or 0.0
    return CodecPlan(strips, sampled, in_file=kept > room / 2)


def sample_windows(x: Tensor | Rows, height: int, width: int) -> Tensor:
    """`WINDOWS` windows of a map (1, C, H, W), spread evenly over its height and its width: (n, C, height, width)."""
    height, width = min(height, x.shape[-2]), min(width, x.shape[-1])
    count = max(1, min(WINDOWS, x.shape[-2] // height))
    down, across = x.shape[-2] - height, x.shape[-1] - width
    windows = []
    for number in range(count):
        top = down * number // max(1, count - 1)
        # From one side to the other by the golden ratio, which leaves no part out.
        left = int(across * ((0.5 + number * 0.618034) % 1))
        rows = x.rows(top, top + height) if isinstance(x, Rows) else x[..., top : top + height, :]
        windows.append(rows[..., left : left + width].clone())
    return torch.cat(windows)


def run_in_strips(
    stage: str,
    network: Callable[[Rows], Rows],
    x: Rows,
    plan: CodecPlan,
    windows: Callable[[], Tensor],
    precision: Precision,
    on_strip: Callable[[int, int, Tensor], None],
) -> Rows:
    """One half of the VAE over a map.

    Args:
        stage: its name.
        network: calls it.
        x: what it reads.
        plan: how.
        windows: gives samples of `x` (n, C, h, w), where the plan wants them.
        precision: whether the half is redone in float32.
        on_strip: called with (top, bottom, rows) of each strip of the result.

    Raises:
        Overflowed: while the result is read, where it holds NaN or Inf.
    """
    mode = InFloat32() if stage in precision.redone else None
    most_keys = MOST_KEYS if plan.sampled else None
    work = Work(plan.strips, in_file=plan.in_file, most_keys=most_keys)

    def read(top: int, bottom: int) -> Tensor:
        with mode.paused() if mode else nullcontext():
            return x.read(top, bottom)

    measured = Work(plan.strips, margin=MARGIN, most_keys=most_keys)
    try:
        # Compiled networks are made for tensors.
        with torch.compiler.set_stance("force_eager"):
            result = network(Rows(x.shape, x.dtype, x.device, read, [x], work=work))
            if plan.sampled and work.sees_whole_map:
                sample = network(Rows.of(windows(), measured))
                _measure(work, measured, sample, mode)
    finally:
        # They hold on to the maps, which hold on to them: memory must be free at once where there was too little.
        work.measures.clear()
        measured.measures.clear()
    step = work.step(result.shape[-2])

    def compute(top: int, bottom: int) -> Tensor:
        parts = []
        for start in range(top, bottom, step):
            stop = min(start + step, bottom)
            with mode or nullcontext():
                part = result.read(start, stop)
            precision.check(stage, part)
            on_strip(start, stop, part)
            parts.append(part)
        return torch.cat(parts, dim=-2)

    return Rows(result.shape, result.dtype, result.device, compute, [result], kept=True, align=step)


def _measure(work: Work, measured: Work, sample: Rows, mode: InFloat32 | None) -> None:
    """Statistics of the fine maps of `work`, of a large picture, from windows of it, whose result `sample` is."""
    with mode or nullcontext():
        # What comes before the first fine map is measured on the picture, so that the windows see it too.
        for index, (pixels, measure) in enumerate(work.measures):
            if pixels > KEPT:
                break
            work.statistics[index] = measured.statistics[index] = measure()
        measured.attended[:] = work.attended
        sample.whole()
    for index, (pixels, _) in enumerate(work.measures):
        if pixels > KEPT:
            work.statistics[index] = measured.statistics[index]
