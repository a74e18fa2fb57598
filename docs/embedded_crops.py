"""Draws embedded/crops.jpg: the centres of photographs that training held aside, damaged, enlarged in three ways.

python docs/embedded_crops.py PHOTOGRAPHS PREVIOUS embedded/crops.jpg

PREVIOUS is the folder of an earlier model.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from tsdsr import load_pipeline
from tsdsr.imaging import LabelledPicture, draw_rows, read, write
from tsdsr.training.degradation import DegradationConfig, degrade
from tsdsr.training.validation import bicubic

# CC0, public domain, Unsplash, and (443 to 495) FarmBot's documentation, MIT.
NAMES = [0, 11, 21, 34, 44, 56, 139, 191, 401, 443, 453, 463, 474, 484, 495, 505, 516, 526]
MILD = [44, 191]  # once more, damaged mildly
SIDE = 256


def centre(picture: torch.Tensor) -> np.ndarray:
    rgb = picture[0].permute(1, 2, 0).float().numpy()
    top, left = ((edge - SIDE) // 2 for edge in rgb.shape[:2])
    return rgb[top : top + SIDE, left : left + SIDE].clip(0, 1)


def main(photographs: str, previous: str, target: str) -> None:
    models = {"version 0": load_pipeline(previous), "this model": load_pipeline("embedded")}
    cells = []
    for name, mild in [*((name, False) for name in NAMES), *((name, True) for name in MILD)]:
        hq = torch.from_numpy(read(Path(photographs) / f"tr_{name:04d}_00.webp").rgb).permute(2, 0, 1)[None]
        config = DegradationConfig.mild() if mild else DegradationConfig()
        lq = degrade(hq, torch.Generator().manual_seed(name), config)
        found = {"bicubic": bicubic(lq, (hq.shape[-2], hq.shape[-1]))}
        found |= {label: model(lq, output_type="pt").images for label, model in models.items()}
        found["photograph"] = hq
        cells.append([LabelledPicture(label, "", centre(picture)) for label, picture in found.items()])
    rows = [[*left, *right] for left, right in zip(cells[::2], cells[1::2], strict=True)]
    write(draw_rows("Held aside from training, damaged as in training", rows), Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
