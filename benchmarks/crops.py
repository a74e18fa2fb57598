"""Crops of photographs, damaged and enlarged by several models, beside one another."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tsdsr.imaging import LabelledPicture, read
from tsdsr.pipelines.pipeline_tsdsr import TSDSRPipeline
from tsdsr.training.degradation import DegradationConfig, degrade
from tsdsr.training.validation import bicubic

SIDE = 256


def centre(picture: Tensor, side: int = SIDE) -> np.ndarray:
    """The middle of a picture (1, 3, H, W), 0..1, as (side, side, 3), or all of one that is smaller."""
    rgb = picture[0].permute(1, 2, 0).float().numpy()
    top, left = (max(0, edge - side) // 2 for edge in rgb.shape[:2])
    return rgb[top : top + side, left : left + side].clip(0, 1)


def crop_row(
    photograph: Path, seed: int, models: Mapping[str, TSDSRPipeline], mild: bool = False, side: int = SIDE
) -> list[LabelledPicture]:
    """Centres of a photograph that was damaged with `seed` as in training: bicubic, of each model, and itself."""
    hq = torch.from_numpy(read(photograph).rgb).permute(2, 0, 1)[None]
    lq = degrade(hq, torch.Generator().manual_seed(seed), DegradationConfig.mild() if mild else DegradationConfig())
    found = {"bicubic": bicubic(lq, (hq.shape[-2], hq.shape[-1]))}
    found |= {label: model(lq, output_type="pt").images for label, model in models.items()}
    found["photograph"] = hq
    return [LabelledPicture(label, "", centre(picture, side)) for label, picture in found.items()]
