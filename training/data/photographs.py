"""Photographs as files: which belong together, and what they hold."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...imaging import find_images, read


def photograph_of(path: Path) -> str:
    """The photograph a crop was cut from: `tr_0012_01.webp` -> `tr_0012`. Other names are their own photographs."""
    parts = path.stem.rsplit("_", 1)
    return parts[0] if len(parts) == 2 and parts[1].isdigit() else path.stem


def split_photographs(folder: Path, validation_photographs: int) -> tuple[list[Path], list[Path]]:
    """Files to train on, and one file of each of `validation_photographs` photographs spread evenly over the folder.

    The split is by photograph, never by crop: no photograph is on both sides.

    Raises:
        ValueError: if the folder holds too few photographs.
    """
    groups: dict[str, list[Path]] = {}
    for path in find_images(folder):
        groups.setdefault(photograph_of(path), []).append(path)
    names = sorted(groups)
    if len(names) <= validation_photographs:
        raise ValueError(f"{folder} holds {len(names)} photographs; more than {validation_photographs} are needed.")
    held = {names[i * len(names) // validation_photographs] for i in range(validation_photographs)}
    train = [path for name in names if name not in held for path in groups[name]]
    return train, [groups[name][0] for name in sorted(held)]


def load_uint8(source: Path | BinaryIO) -> Tensor:
    """A picture as (3, H, W) uint8.

    Raises:
        UnreadableImageError: if it is no whole picture.
    """
    return torch.from_numpy(np.round(read(source).rgb * 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
