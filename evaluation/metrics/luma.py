"""What the metrics look at: pictures that fit together, and their luma in 8-bit levels, in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MATRIX = torch.tensor([[299, 587, 114], [595.9, -274.6, -321.3], [211.5, -522.7, 311.2]], dtype=torch.float64) / 1000
"""RGB -> YIQ, the rows for Y, I and Q."""


def check(sr: Tensor, hr: Tensor | None = None, least: int = 1) -> None:
    """Nothing, for pictures that can be measured.

    Raises:
        ValueError: if `sr` is not (1, 3, H, W), has a side shorter than `least`, or `hr` is of another size.
    """
    if sr.ndim != 4 or sr.shape[:2] != (1, 3):
        raise ValueError(f"A metric takes one picture (1, 3, height, width), not {tuple(sr.shape)}.")
    if hr is not None and sr.shape != hr.shape:
        raise ValueError(
            f"The result is {_size(sr)} and the ground truth is {tuple(hr.shape) if hr.ndim != 4 else _size(hr)}; "
            "a metric compares pictures of one size."
        )
    if min(sr.shape[2:]) < least:
        raise ValueError(f"The picture is {_size(sr)}; this metric needs at least {least}x{least} pixels.")


def _size(picture: Tensor) -> str:
    return f"{picture.shape[3]}x{picture.shape[2]}"


def yiq(picture: Tensor) -> Tensor:
    """(1, 3, H, W) of 0..1 -> Y, I, Q (1, 3, H, W), float64, in levels: Y is 0..255."""
    return torch.einsum("yc,bchw->byhw", MATRIX.to(picture.device), levels(picture))


def luma(picture: Tensor) -> Tensor:
    """(1, 3, H, W) of 0..1 -> Y of BT.601 (1, 1, H, W), float64, 0..255."""
    return yiq(picture)[:, :1]


def studio_luma(picture: Tensor) -> Tensor:
    """(1, 3, H, W) of 0..1 -> Y of YCbCr as MATLAB has it, BT.601 (1, 1, H, W), float64, 16..235."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=picture.device) / 255
    return 16 + torch.einsum("c,bchw->bhw", weights, levels(picture))[:, None]


def levels(picture: Tensor) -> Tensor:
    """0..1 -> 0..255, float64; on the CPU where the device (MPS) has none."""
    return (picture.cpu() if picture.device.type == "mps" else picture).double() * 255


def filtered(x: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    """(N, C, H, W) correlated with a column of weights and a row of weights, without borders.

    Returns:
        (N, C, H - len(rows) + 1, W - len(columns) + 1).
    """
    for dim, weights in ((2, rows), (3, columns)):
        length = x.shape[dim] - len(weights) + 1
        result = torch.zeros_like(x.narrow(dim, 0, length))
        for start, weight in enumerate(weights):
            result.add_(x.narrow(dim, start, length), alpha=weight)
        x = result
    return x


def gaussian(size: int, sigma: float) -> list[float]:
    """Weights of a window, with the sum 1."""
    weights = [math.exp(-(((position - (size - 1) / 2) / sigma) ** 2) / 2) for position in range(size)]
    return [weight / sum(weights) for weight in weights]


def gradients(y: Tensor, weights: Sequence[float]) -> Tensor:
    """Magnitude of the gradient (1, 1, H - 2, W - 2) of (1, 1, H, W); `weights` of the 3 neighbours along an edge."""
    difference = (-1, 0, 1)
    return torch.hypot(filtered(y, weights, difference), filtered(y, difference, weights))
