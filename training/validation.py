"""How good a student is on photographs it never saw, measured on what the pipeline itself makes."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..imaging import Picture, find_images, write
from .config import ConfigError, reason
from .data import load_uint8
from .degradation import DegradationConfig, degrade

Pair = tuple[str, Tensor, Tensor]  # name, lq (1, 3, h, w) and hq (1, 3, H, W), 0..1


def luma(images: Tensor) -> Tensor:
    """Y of YCbCr (BT.601, 16..235) of pictures (B, 3, H, W) in 0..1: (B, H, W)."""
    weights = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return (images.clamp(0, 1) * weights).sum(1) + 16


def psnr_y(output: Tensor, target: Tensor) -> float:
    """PSNR in dB of the luma of pictures (B, 3, H, W) in 0..1, averaged over the batch."""
    return float((10 * torch.log10(255**2 / (luma(output) - luma(target)).square().mean((1, 2)))).mean())


def ssim_y(output: Tensor, target: Tensor) -> float:
    """SSIM of the luma, Gaussian window of 11 pixels with sigma 1.5 (Wang et al., 2004), averaged over the batch."""
    from skimage.metrics import structural_similarity

    pairs = zip(luma(output).cpu().numpy(), luma(target).cpu().numpy(), strict=True)
    values = [
        structural_similarity(
            a.astype(np.float64),
            b.astype(np.float64),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in pairs
    ]
    return float(np.mean(values))


def bicubic(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (B, 3, h, w) in 0..1 enlarged to `size`, clamped, as the pipeline begins."""
    return F.interpolate(lq, size=size, mode="bicubic").clamp(0, 1)


def eight_bit(images: Tensor) -> Tensor:
    """What a file would hold: clamped and rounded to 256 levels."""
    return (images.clamp(0, 1) * 255).round() / 255


def make_metrics(names: list[str], device: torch.device) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """Functions of output and target, (1, 3, H, W) in 0..1; other names than psnr_y and ssim_y are pyiqa's.

    Raises:
        ConfigError: for a metric that does not exist or cannot be had here.
    """
    own = {"psnr_y": psnr_y, "ssim_y": ssim_y}
    found: dict[str, Callable[[Tensor, Tensor], float]] = {}
    for name in names:
        if name in own:
            if name == "ssim_y" and importlib.util.find_spec("skimage") is None:
                raise ConfigError(
                    "The validation metric ssim_y needs scikit-image: pip install 'tsdsr[train]', or measure psnr_y."
                )
            found[name] = own[name]
            continue
        try:
            import pyiqa

            metric = pyiqa.create_metric(name, device=device)
        except Exception as error:  # of the import, of an unknown name, of weights that cannot be fetched
            raise ConfigError(
                f"The validation metric {name} cannot be made ({reason(error)}); psnr_y and ssim_y "
                "need no download, all others need pip install 'tsdsr[eval]' and their weights."
            ) from error
        found[name] = partial(_mean_of, metric, device)
    return found


def _mean_of(metric: Any, device: torch.device, output: Tensor, target: Tensor) -> float:
    return float(metric(output.to(device), target.to(device)).mean())


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
        """Mean of every metric, and the results (1, 3, H, W) in 0..1, of `upscale(lq, size)`."""
        results = [eight_bit(upscale(lq, (hq.shape[-2], hq.shape[-1])).float().cpu()) for _, lq, hq in self.pairs]
        means = {
            name: float(np.mean([metric(out, hq) for out, (_, _, hq) in zip(results, self.pairs, strict=True)]))
            for name, metric in self.metrics.items()
        }
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
