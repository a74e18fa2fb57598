"""Training and validation photographs: random crops, turned and mirrored, degraded on the fly."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...imaging import find_images, read
from ..degradation import DegradationConfig, degrade


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


class DegradedBatches(Dataset):
    """Item `i` is the whole batch of step `i`: {"lq": (B, 3, s/4, s/4), "hq": (B, 3, s, s)}, float32 in 0..1.

    The content of a batch depends on (seed, i) alone, so a resumed run sees what an unbroken one would have seen.

    Args:
        images: decoded photographs, (3, H, W) uint8.
        sizes: crop side s in pixels -> (probability, batch size).
        steps: number of batches.
        seed: of all draws.
        mild_probability: share of the batches that `DegradationConfig.mild` damages, instead of the published ranges.
    """

    def __init__(
        self,
        images: list[Tensor],
        sizes: dict[int, tuple[float, int]],
        steps: int,
        seed: int,
        mild_probability: float = 0.0,
    ):
        self.images, self.sizes, self.steps, self.seed = images, sizes, steps, seed
        self.mild_probability = mild_probability

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        probabilities = torch.tensor([p for p, _ in self.sizes.values()])
        size, (_, batch) = list(self.sizes.items())[int(torch.multinomial(probabilities, 1, generator=generator))]

        def draw(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        crops = []
        for _ in range(batch):
            image = self.images[draw(len(self.images))]
            top, left = draw(image.shape[1] - size + 1), draw(image.shape[2] - size + 1)
            crop = image[:, top : top + size, left : left + size]
            if draw(2):
                crop = crop.flip(2)
            crops.append(torch.rot90(crop, draw(4), (1, 2)))
        hq = torch.stack(crops).float() / 255
        mild = float(torch.rand((), generator=generator)) < self.mild_probability
        return {"lq": degrade(hq, generator, DegradationConfig.mild() if mild else DegradationConfig()), "hq": hq}
