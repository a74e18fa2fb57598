"""What is measured on: results, small pictures and ground truths of one name each, in folders or degraded here."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..imaging import find_images, read

Degrade = Callable[[Tensor, torch.Generator, int], Tensor]
"""`(hq (1, 3, H, W), generator, scale) -> lq (1, 3, H / scale, W / scale)`, both 0..1."""


@dataclass(frozen=True)
class Layout:
    """How a benchmark set lies on disk.

    Attributes:
        title: what the papers call it.
        folders: names that its folder goes by.
        lr, hr: names that the folders of small pictures and of ground truths go by, within it.
        pairs: how many the published figures are averages of; None where they are of no one number.
    """

    title: str
    folders: tuple[str, ...]
    lr: tuple[str, ...] = ("test_LR", "lq", "LR")
    hr: tuple[str, ...] = ("test_HR", "gt", "HR")
    pairs: int | None = None


# Folder names of the StableSR test sets and of common copies of them.
LAYOUTS = {
    "realsr": Layout("RealSR", ("RealSR", "RealSRVal_crop128", "realsr"), pairs=100),
    "drealsr": Layout("DRealSR", ("DRealSR", "DrealSRVal_crop128", "DRealSRVal_crop128", "drealsr"), pairs=93),
    "div2k-val": Layout("DIV2K-Val", ("DIV2K-Val", "DIV2K_V2_val", "DIV2K_val", "div2k-val"), pairs=3000),
    "set5": Layout("Set5", ("Set5", "set5"), lr=("LR_bicubic_x4", "LR"), hr=("HR", "gt"), pairs=5),
    "set14": Layout("Set14", ("Set14", "set14"), lr=("LR_bicubic_x4", "LR"), hr=("HR", "gt"), pairs=14),
}


@dataclass(frozen=True)
class Case:
    """The files of one name; None for what there is not."""

    name: str
    sr: Path | None = None
    lr: Path | None = None
    hr: Path | None = None


@dataclass(frozen=True)
class Sample:
    """The pictures of one name, (1, 3, H, W), RGB, 0..1, with the levels that the files hold."""

    name: str
    sr: Tensor | None = None
    lr: Tensor | None = None
    hr: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """A set of pictures, read one at a time.

    Attributes:
        cases: in natural order of their names.
        title: what the papers call the set; empty for any other.
        degrade: makes the small pictures of the ground truths, where there are no files of them.
        seed: of that.
        scale: how many times smaller these are.
        crop_size: only the centre of each ground truth, at most so many pixels a side; 0 for all of it.
    """

    cases: list[Case]
    title: str = ""
    degrade: Degrade | None = None
    seed: int = 0
    scale: int = 4
    crop_size: int = 0

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Sample]:
        return (self.load(case) for case in self.cases)

    def load(self, case: Case) -> Sample:
        """Read the pictures of one name, and degrade where that is asked for.

        Raises:
            UnreadableImageError: if a file is no whole picture.
            ValueError: if result, small picture and ground truth do not fit each other.
        """
        sr, lr, hr = (None if path is None else read_tensor(path) for path in (case.sr, case.lr, case.hr))
        if self.degrade is not None and hr is not None:
            hr = self._cut(hr, case)
            # Of its own number alone: a picture is damaged alike, whatever other pictures there are.
            key = hashlib.sha256(f"{self.seed} {case.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            lr = eight_bit(self.degrade(hr, generator, self.scale))
        if sr is not None and hr is not None and sr.shape != hr.shape:
            raise ValueError(
                f"{case.sr} is {_size(sr)} pixels and its ground truth {case.hr} {_size(hr)}; both must be of one size."
            )
        # One factor within a pixel of the small picture, because its sides were rounded.
        if (
            lr is not None
            and hr is not None
            and (abs(lr.shape[-1] * hr.shape[-2] - hr.shape[-1] * lr.shape[-2]) >= hr.shape[-2])
        ):
            raise ValueError(
                f"{case.lr} is {_size(lr)} pixels and its ground truth {case.hr} {_size(hr)}; "
                "one must be the other, enlarged by one factor."
            )
        return Sample(case.name, sr, lr, hr)

    def _cut(self, hr: Tensor, case: Case) -> Tensor:
        """The centre, with sides that are multiples of the scale."""
        height, width = (
            min(side, self.crop_size or side) // self.scale * self.scale for side in (hr.shape[-2], hr.shape[-1])
        )
        if not height or not width:
            raise ValueError(f"{case.hr} is {_size(hr)} pixels, too small to be reduced {self.scale} times.")
        top, left = (hr.shape[-2] - height) // 2, (hr.shape[-1] - width) // 2
        return hr[..., top : top + height, left : left + width]


class Checksum:
    """SHA-256 of names and pixels, the same whatever file format they are kept in."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._empty = True

    def add(self, name: str, picture: Tensor | None) -> None:
        """Take in the next picture (1, 3, H, W), if there is one, at 8 bits."""
        if picture is None:
            return
        self._empty = False
        levels = (picture[0] * 255).round().byte().permute(1, 2, 0).contiguous()
        self._hash.update(f"{name} {tuple(levels.shape)} ".encode())
        self._hash.update(levels.numpy().tobytes())

    def __str__(self) -> str:
        return "" if self._empty else self._hash.hexdigest()


def match(sr: Path | None = None, lr: Path | None = None, hr: Path | None = None) -> list[Case]:
    """The pictures of one name in each of these folders (or files), whatever their suffixes.

    Raises:
        ValueError: if a folder holds no picture, two pictures of one name, or one whose partner another lacks. Two
            single files need no common name.
    """
    given = {role: Path(path) for role, path in (("sr", sr), ("lr", lr), ("hr", hr)) if path is not None}
    if all(path.is_file() for path in given.values()):
        name = next(iter(given.values())).stem
        return [Case(name, **given)]
    found = {role: _by_name(path) for role, path in given.items()}
    names = {name: None for pictures in found.values() for name in pictures}
    for role, pictures in found.items():
        if lacking := [name for name in names if name not in pictures]:
            holder = next(path for other, path in given.items() if lacking[0] in found[other])
            raise ValueError(
                f"{given[role]} has no picture named {_some(lacking)}, but {holder} has "
                f"({len(lacking)} of {len(names)} names are not in both): pictures are matched by their names, without "
                "suffix, so rename or remove what has no partner."
            )
    return [Case(name, **{role: pictures[name] for role, pictures in found.items()}) for name in names]


def benchmark_set(name: str, root: Path, sr: Path | None = None) -> Pairs:
    """A benchmark set in the layout of the StableSR test sets.

    Args:
        name: one of LAYOUTS.
        root: the folder of the set, or one that holds it.
        sr: results for it, of the same names.

    Raises:
        ValueError: for an unknown name, and if the set is not there.
    """
    known = layout(name)
    for folder in (*(root / folder for folder in known.folders), root):
        lr, hr = (_first_folder(folder, names) for names in (known.lr, known.hr))
        if lr and hr:
            return Pairs(match(sr=sr, lr=lr, hr=hr), known.title)
    raise ValueError(
        f"{root} does not hold {known.title}: expected {known.folders[0]}/{known.lr[0]} and "
        f"{known.folders[0]}/{known.hr[0]} below it, or the two folders in it."
    )


def layout(name: str) -> Layout:
    """How a benchmark set lies on disk.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in LAYOUTS:
        raise ValueError(f"The set {name!r} is not known; choose one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def only(pairs: Pairs, files: Sequence[Path]) -> Pairs:
    """The part of a set whose ground truths are among these files."""
    kept = {path.resolve() for path in files}
    return replace(pairs, cases=[case for case in pairs.cases if case.hr and case.hr.resolve() in kept])


def read_tensor(path: Path) -> Tensor:
    """A picture as (1, 3, H, W), RGB, 0..1."""
    return torch.from_numpy(np.ascontiguousarray(read(path).rgb)).permute(2, 0, 1)[None]


def eight_bit(images: Tensor) -> Tensor:
    """What a file would hold: clamped and rounded to 256 levels."""
    return (images.clamp(0, 1) * 255).round() / 255


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give folders of pictures, or one picture for each.")
    found: dict[str, Path] = {}
    for path in find_images(folder):
        if path.stem in found:
            raise ValueError(f"{folder} holds both {found[path.stem].name} and {path.name}; keep one of them.")
        found[path.stem] = path
    if not found:
        raise ValueError(f"{folder} holds no pictures.")
    return found


def _first_folder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]}x{picture.shape[-2]}"
