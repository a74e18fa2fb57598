"""How good a student is on photographs it never saw, measured on what the pipeline itself makes."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.learned import learned_metric
from ..evaluation.metrics import METRICS
from ..evaluation.metrics.metric import Metric
from ..evaluation.results import Unavailable
from ..evaluation.sets import eight_bit
from ..imaging import Picture, find_images, write
from .config import ConfigError
from .data import load_uint8
from .degradation import DegradationConfig, degrade

Pair = tuple[str, Tensor, Tensor]  # name, lq (1, 3, h, w) and hq (1, 3, H, W), 0..1


def psnr_y(output: Tensor, target: Tensor) -> float:
    """PSNR of the luma in dB of pictures (B, 3, H, W) in 0..1, averaged over the batch."""
    pairs = zip(output.split(1), target.split(1), strict=True)
    return float(np.mean([METRICS["psnr"].measure(one, other) for one, other in pairs]))


def bicubic(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (B, 3, h, w) in 0..1 enlarged to `size`, clamped, as the pipeline begins."""
    return F.interpolate(lq, size=size, mode="bicubic").clamp(0, 1)


def make_metrics(names: list[str], device: torch.device) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """Functions of output and target, (1, 3, H, W) in 0..1, by their names in `tsdsr evaluate`, or psnr_y and ssim_y.

    Raises:
        ConfigError: for a metric that does not exist, cannot be had here or is one of whole sets.
    """
    found: dict[str, Callable[[Tensor, Tensor], float]] = {}
    for name in names:
        metric: Metric | Unavailable | tuple[Metric, Any]
        try:
            metric = METRICS.get(name.removesuffix("_y")) or learned_metric(name, device)
        except ValueError as error:
            raise ConfigError(f"The validation metric {name} does not exist; see `tsdsr evaluate --list`.") from error
        if isinstance(metric, Unavailable):
            raise ConfigError(
                f"The validation metric {name} is unavailable: {metric.reason}; psnr_y and ssim_y need no download, "
                f"this one needs {metric.fetch}."
            )
        if isinstance(metric, tuple):
            metric = metric[0]
        if metric.kind == "set":
            raise ConfigError(f"The validation metric {name} compares whole sets; measure it with `tsdsr evaluate`.")
        found[name] = metric.measure
    return found


def crop_centre(image: Tensor, size: int, multiple: int) -> Tensor:
    """The centre of (3, H, W), no more than `size` pixels on a side, both sides multiples of `multiple`."""
    height, width = (min(side, size) // multiple * multiple for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def validation_pairs(paths: list[Path], lq_dir: Path | None, size: int, scale: int, seed: int) -> list[Pair]:
    """Sharp photographs with their partners, or their centres with the degradation drawn from `seed`: always the same.

    Raises:
        ConfigError: if a photograph has no partner in `lq_dir`, one of another size than `scale` asks for, or is
            smaller than one LQ pixel.
    """
    partners = {path.stem: path for path in find_images(lq_dir)} if lq_dir else {}
    pairs = []
    for index, path in enumerate(paths):
        hq = load_uint8(path)
        if lq_dir:
            if path.stem not in partners:
                raise ConfigError(f"{lq_dir} holds no picture named {path.stem}, but {path.parent} does.")
            lq = load_uint8(partners[path.stem])[None].float() / 255
            height, width = lq.shape[-2:]
            if hq.shape[1:] != (scale * height, scale * width):
                raise ConfigError(
                    f"{path} is {hq.shape[2]}x{hq.shape[1]} pixels and its partner {width}x{height}; it must be "
                    f"{scale} times as large (scale)."
                )
            pairs.append((path.stem, lq, hq[None].float() / 255))
            continue
        hq = crop_centre(hq, size, scale)
        if not hq.numel():
            raise ConfigError(f"{path} is too small to be reduced {scale} times.")
        sharp = hq[None].float() / 255
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        pairs.append((path.stem, degrade(sharp, generator, DegradationConfig(scale=scale)), sharp))
    return pairs


@dataclass
class Validation:
    """A fixed set of pairs and what is measured on them."""

    pairs: list[Pair]
    metrics: dict[str, Callable[[Tensor, Tensor], float]]

    @torch.no_grad()
    def run(self, upscale: Callable[[Tensor, tuple[int, int]], Tensor]) -> tuple[dict[str, float], list[Tensor]]:
        """Mean of every metric, and the results (1, 3, H, W) in 0..1, of `upscale(lq, size)`.

        Pictures that a metric is not defined for, such as flat ones for NIQE, are left out of its mean.
        """
        results = [eight_bit(upscale(lq, (hq.shape[-2], hq.shape[-1])).float().cpu()) for _, lq, hq in self.pairs]
        means = {}
        for name, metric in self.metrics.items():
            values = []
            for out, (_, _, hq) in zip(results, self.pairs, strict=True):
                with suppress(ValueError):
                    values.append(metric(out, hq))
            if values:
                means[name] = float(np.mean(values))
        return means, results

    def with_pipeline(self, pipeline: Any) -> tuple[dict[str, float], list[Tensor]]:
        """`run` of a pipeline, without colour correction: what the student itself makes."""

        def upscale(lq: Tensor, size: tuple[int, int]) -> Tensor:
            arguments = {"height": size[0], "width": size[1], "process_size": 0, "color_fix": "none"}
            return pipeline(lq, **arguments, output_type="pt").images

        return self.run(upscale)

    def sheet(self, results: list[Tensor], rows: int = 8) -> Tensor:
        """LQ (enlarged by repetition), student, HQ side by side, one photograph a row: (3, H, W) in 0..1."""
        lines = []
        for (_, lq, hq), result in list(zip(self.pairs, results, strict=True))[:rows]:
            nearest = F.interpolate(lq, size=hq.shape[-2:], mode="nearest")
            lines.append(torch.cat([nearest, result, hq], dim=3)[0])
        width = max(line.shape[2] for line in lines)
        return torch.cat([F.pad(line, (0, width - line.shape[2])) for line in lines], dim=1)


def save_sheet(sheet: Tensor, path: Path) -> None:
    """Write a sheet as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(Picture(sheet.permute(1, 2, 0).numpy()), path)
