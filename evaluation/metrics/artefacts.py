"""What one-step models get wrong: soft or over-sharp edges, noise, grids of patches, seams of tiles. No weights.

All take pictures (1, 3, H, W), RGB, 0..1, and look at their luma (BT.601) in levels, 0..255.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .luma import check, filtered, gradients, luma


def edge_energy_ratio(sr: Tensor, hr: Tensor) -> float:
    """Gradient energy at the edges, over that of the ground truth: 1 is right, below soft, above over-sharpened.

    sum |grad sr|^2 / sum |grad hr|^2 over all pixels no more than 3 from an edge of `hr`. An edge is where the gradient
    (Sobel, in levels per pixel) is among the strongest tenth of `hr` and at least 1. The margin forgives edges that are
    moved a little; a step that is spread over n pixels has 1/n of the energy.

    Raises:
        ValueError: for several pictures, different sizes, less than 3x3 pixels, or a ground truth without edges.
    """
    check(sr, hr, least=3)
    ours, truth = (gradients(luma(picture), [0.125, 0.25, 0.125]) for picture in (sr, hr))
    strongest = truth.flatten().kthvalue(max(1, round(0.9 * truth.numel()))).values.clamp(min=1)
    edges = F.max_pool2d((truth >= strongest).double(), 7, stride=1, padding=3)
    if not edges.any():
        raise ValueError("The ground truth has no edges, so that the energy at its edges is not defined.")
    return float((edges * ours**2).sum() / (edges * truth**2).sum())


def noise_floor(sr: Tensor) -> float:
    """Standard deviation in levels where the picture is flattest; lower is cleaner. From 16x16 pixels.

    In each block of 16x16, what is left after a least-squares plane; of the blocks' deviations, the 5th percentile over
    0.927, which is where that of white noise lies. Blocks with black or white pixels, where noise is cut off, are left
    out unless there are no others. White noise of deviation s on flat parts gives about s; a smooth gradient gives 0,
    or 0.3 after rounding to 8 bits; a picture that is textured everywhere gives its weakest texture.

    Raises:
        ValueError: for several pictures, or one of less than 16x16 pixels.
    """
    check(sr, least=16)
    blocks = luma(sr)[0, 0].unfold(0, 16, 16).unfold(1, 16, 16).flatten(0, 1).flatten(1)
    unclipped = ((blocks > 0.5) & (blocks < 254.5)).all(1)
    blocks = blocks[unclipped] if unclipped.any() else blocks
    slope = torch.arange(16, dtype=blocks.dtype, device=blocks.device) - 7.5
    plane = torch.stack([torch.ones(256).to(slope), slope.repeat(16), slope.repeat_interleave(16)])
    plane = plane / plane.norm(dim=1, keepdim=True)  # orthogonal already
    left = blocks - blocks @ plane.T @ plane
    deviations = (left.square().sum(1) / (256 - 3)).sqrt()
    return float(deviations.quantile(0.05) / 0.927)


def grid_score(sr: Tensor, periods: Sequence[int] = (8, 16)) -> float:
    """How far a periodic grid stands out of the picture's spectrum: 1 is none, 2 twice as high as what is around it.

    One-step transformers tend to print the grid of their patches on the picture (16 pixels in SD3: 8 of the VAE, times
    patches of 2), decoders that of their latents (8 pixels). A pattern that repeats every p pixels has its energy at
    the frequencies (i / p, j / p). With P the power there, and B the power around it,

        score = max over p of sqrt(mean over (i, j) != (0, 0) of P / B).

    The luma is first divided by its local contrast, (y - mean) / (deviation + 1 level) over 17x17 pixels, so that flat
    parts, where grids are seen, count as much as texture. P is the mean over half-overlapping Hann windows of 16 of the
    longest period (256x256 pixels), so that neither crops nor flips change it much. B is what the median between this
    harmonic and the next says, along the row or the column of the spectrum, whichever is higher. Both are given 1e-4
    more: a hundredth of a level on flat parts does not count. Of the 100 ground truths of RealSR half are below 1.04
    and 95 below 1.13; with a grid of lines one level high half are above 2.3. Content that repeats
    strictly counts too, every 8 or 16 pixels or where it comes within a hundredth of a cycle per pixel of a harmonic.

    Args:
        sr: a picture.
        periods: in pixels.

    Raises:
        ValueError: for several pictures, or one with a side of less than 8 of the longest period (128 pixels).
    """
    base = math.lcm(*periods)
    check(sr, least=8 * base)
    y = luma(sr)
    box = [1 / 17] * 17
    padded = F.pad(y, (8, 8, 8, 8), mode="reflect")
    mean = filtered(padded, box, box)
    y = ((y - mean) / ((filtered(padded**2, box, box) - mean**2).clamp(min=0).sqrt() + 1))[0, 0]

    size = min(16 * base, *(side // base * base for side in y.shape))
    window = torch.hann_window(size, dtype=y.dtype, device=y.device)
    window = torch.outer(window, window) / window.square().sum()  # white noise of variance v has the power v
    power = torch.zeros_like(window)
    starts = [
        torch.linspace(0, side - size, math.ceil(2 * (side - size) / size) + 1).round().int().tolist()
        for side in y.shape
    ]
    for top in starts[0]:
        for left in starts[1]:
            power += torch.fft.fft2(window * y[top : top + size, left : left + size]).abs() ** 2
    windows = len(starts[0]) * len(starts[1])
    power /= windows

    gap = size // base  # from one harmonic to the next; a peak is 2 wide to either side
    around = [offset for offset in range(3 - gap, gap - 2) if abs(offset) > 2]
    along = [torch.stack([power.roll(offset, dim) for offset in around]).median(0).values for dim in (0, 1)]
    background = torch.maximum(*along) / (1 - 1 / (9 * windows)) ** 3  # median of a mean of exponentials -> its mean
    height = ((power + 1e-4) / (background + 1e-4))[::gap, ::gap]
    scores = []
    for period in periods:
        harmonics = height[:: base // period, :: base // period].flatten()[1:]
        scores.append(harmonics.mean().sqrt())
    return float(torch.stack(scores).max())


def seam_score(sr: Tensor, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> float:
    """How much the borders of tiles stand out of what is beside them: 1 is no seam.

    With x the mean luma of each piece of 32 pixels of a row (or column), the step between n - 1 and n, beyond what the
    steps on both sides foretell, is the third difference

        d[n] = |x[n + 1] - 3 x[n] + 3 x[n - 1] - x[n - 2]| / 2,

    which is a for a step of a levels. With given lines: the mean over their pieces of (d[n] + 0.5) / (r + 0.5), where r
    is the mean of d at n - 4 .. n - 2 and n + 2 .. n + 4. Blind: the same with r the largest of these; of each line the
    median of its pieces; of all lines the largest. So what counts is one pixel wide and crosses at least half of the
    picture; most edges of photographs are wider or shorter. Of the 100 ground truths of RealSR half are below 1.2
    and 4 above 2; with a step of 4 levels across them 57 are above 2, and half above 3.8 where the line is given.

    Args:
        sr: a picture.
        rows: indices n of rows such that a border lies between the rows n - 1 and n.
        columns: the same of columns.

    Raises:
        ValueError: for several pictures, one of less than 32x32 pixels, or a line less than 6 pixels from its borders.
    """
    check(sr, least=32)
    y = luma(sr)[0, 0]
    blind = rows is None and columns is None
    found = []
    for picture, lines in ((y, rows), (y.T, columns)):
        step = picture.unfold(1, 32, 32).mean(-1).diff(n=3, dim=0).abs() / 2
        around = step.unfold(0, 9, 1)  # of the lines 6 to height - 6
        here, beside = around[..., 4], around[..., [0, 1, 2, 6, 7, 8]]
        if blind:
            found.append(((here + 0.5) / (beside.amax(-1) + 0.5)).median(1).values)
        elif lines:
            last = len(here) + 5
            if min(lines) < 6 or max(lines) > last:
                raise ValueError(f"Borders of tiles lie between 6 and {last} in this picture, not at {[*lines]}.")
            ratios = (here + 0.5) / (beside.mean(-1) + 0.5)
            found.append(ratios[torch.as_tensor(lines) - 6].flatten())
    if not found:
        return 1.0
    ratios = torch.cat(found)
    return float(ratios.max() if blind else ratios.mean())
