"""The same crops of a picture, as several models and interpolations show them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..imaging import COLORS, Crops, data_uri, find_images, resize
from ..pipelines.loading import find_model
from .metrics import METRICS
from .report import busiest, render
from .results import write_text
from .sets import eight_bit, read_tensor
from .upscalers import INTERPOLATIONS, default_upscale, make_upscaler

OVERVIEW = 512  # pixels a side, at most
STAGE = 640  # pixels a side, about, of the crop under the divider
FIRST = "bicubic"
"""What every comparison begins with."""

Box = tuple[int, int, int]
"""x, y and side of a crop, in pixels of the small picture."""


def compare(
    source: str | Path,
    models: Sequence[str],
    *,
    labels: Sequence[str] = (),
    hr: str | Path | None = None,
    boxes: Sequence[Box] = (),
    crops: int = 3,
    crop_size: int = 64,
    upscale: float | None = None,
    seed: int | None = None,
    loading: dict[str, Any] | None = None,
    calling: dict[str, Any] | None = None,
    progress: Callable[[str, str, float], None] = lambda label, name, seconds: None,
) -> list[Crops]:
    """Enlarge whole pictures with one method after another, of which one at a time is in memory, and keep the crops.

    Args:
        source: a picture, or a folder of them.
        models: as `make_upscaler` takes them. The bicubic interpolation comes first, whether or not it is named.
        labels: of the models, in their order; by default their names.
        hr: ground truth, a file or a folder with the same names; it comes last, and PSNR-Y stands below each label.
        boxes: crops of every picture; by default those with the most structure.
        crops: how many of these, at most.
        crop_size: their side, in pixels of the small picture.
        upscale: factor; by default the pipeline's.
        seed: of the draw from the encoder's posterior, for each picture anew.
        loading: further arguments of `load_pipeline`.
        calling: further arguments of the pipeline's call.
        progress: called with label, name of the picture and seconds whenever a picture was enlarged.

    Raises:
        ValueError: for a name that is no model, crops outside of a picture, a ground truth that is missing or of
            another size, a file that is no picture, and what the pipeline refuses.
        OSError: for a Hub id that cannot be found or reached.
    """
    if upscale is None:
        upscale = default_upscale()
    if not 1 <= upscale < float("inf"):
        raise ValueError(f"The factor must be a number of at least 1, not {upscale:g}.")
    named = methods(models, labels)
    for model in named:
        if model not in INTERPOLATIONS:
            find_model(model)

    pairs = _pairs(Path(source), None if hr is None else Path(hr))
    pictures = {path: read_tensor(path) for path in pairs}
    sizes, truths = {}, {}
    for path, lq in pictures.items():
        height, width = sizes[path] = (round(upscale * lq.shape[-2]), round(upscale * lq.shape[-1]))
        if truth := pairs[path]:
            truths[path] = read_tensor(truth)
            if truths[path].shape[-2:] != (height, width):
                raise ValueError(
                    f"{truth} is {truths[path].shape[-1]}x{truths[path].shape[-2]} pixels, but {path}, enlarged "
                    f"{upscale:g} times, is {width}x{height}; name the ground truth of that size or another factor."
                )
    places = {path: _places(path, _array(lq), boxes, crops, crop_size) for path, lq in pictures.items()}

    cells: dict[Path, list[list[np.ndarray]]] = {path: [[] for _ in places[path]] for path in pictures}
    notes: dict[Path, list[str]] = {path: [] for path in pictures}
    for model, label in named.items():
        upscaler = make_upscaler(model, seed=seed, loading=loading, calling=calling)
        for path, lq in pictures.items():
            begun = time.perf_counter()
            sr = eight_bit(upscaler(lq, sizes[path]))
            seconds = time.perf_counter() - begun
            _cut(sr, places[path], upscale, cells[path])
            notes[path].append(f"PSNR-Y {METRICS['psnr'].measure(sr, truths[path]):.2f} dB" if path in truths else "")
            progress(label, path.name, seconds)
        del upscaler  # before the next is loaded
    for path, truth in truths.items():
        _cut(truth, places[path], upscale, cells[path])
        notes[path].append("")
    shown = [*named.values(), *(["ground truth"] if truths else [])]
    return [
        Crops(path.name, _array(lq), places[path], shown, notes[path], cells[path]) for path, lq in pictures.items()
    ]


def methods(models: Sequence[str], labels: Sequence[str] = ()) -> dict[str, str]:
    """Model -> label, bicubic first. Without labels: as short as tells them apart, `runs/a/pipeline` -> `a/pipeline`.

    Raises:
        ValueError: if a model or label is there twice, or if there are not as many labels as models.
    """
    if labels and len(labels) != len(models):
        raise ValueError(f"There are {len(models)} models but {len(labels)} labels; give one for each, in their order.")
    for kind, given in (("model", models), ("label", labels)):
        if twice := [name for name in given if list(given).count(name) > 1]:
            raise ValueError(f"The {kind} {twice[0]} is there twice; name each once.")
    found = dict(zip(models, labels or _short(models), strict=True))
    return {FIRST: found.get(FIRST, f"{FIRST} (input)"), **found}


def _short(models: Sequence[str]) -> list[str]:
    """Folders by the end of their path, with as much of it as no other has; other names whole."""
    parts = [Path(model).resolve().parts if Path(model).is_dir() else (model,) for model in models]
    short = []
    for own in parts:
        others = [other for other in parts if other is not own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        short.append("/".join(own[-length:]))
    return short


def structure_boxes(rgb: np.ndarray, count: int, side: int) -> list[Box]:
    """The crops of a picture (H, W, 3), at most `count`, with the most structure, away from each other.

    Structure is the mean of the square root of the gradient: fine texture counts for more than one strong edge. What is
    close to a crop that was chosen counts for less. They overlap, by half at most, only where there is no room beside.
    """
    height, width = rgb.shape[:2]
    side = min(side, height, width)
    grey = rgb.mean(axis=2)
    down, right = np.abs(np.diff(grey, axis=0, append=grey[-1:])), np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    gradient = np.sqrt(down + right)
    tops, lefts, worth = busiest(gradient, side, side, stride=max(1, side // 8))
    worth = worth + 1e-9  # a picture without any structure has crops as well
    boxes: list[Box] = []
    for apart in (side, side // 2):  # they overlap only where there is no room for them side by side
        while len(boxes) < count:
            left = worth.copy()
            for x, y, _ in boxes:
                away = np.maximum(np.abs(tops[:, None] - y), np.abs(lefts[None] - x))
                left *= np.where(away < apart, 0, np.minimum(1, away / (max(height, width) / 2)))
            if left.max() == 0:
                break
            row, column = np.unravel_index(left.argmax(), left.shape)
            boxes.append((int(lefts[column]), int(tops[row]), side))
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def write_page(path: str | Path, pictures: Sequence[Crops]) -> None:
    """The comparison as one HTML page that needs nothing but itself; whole or not there."""
    sections = []
    for crops in pictures:
        height, width = crops.overview.shape[:2]
        scale = min(1, OVERVIEW / max(height, width))
        overview = resize(crops.overview, (max(1, round(width * scale)), max(1, round(height * scale))))
        side = crops.cells[0][0].shape[0]
        zoom = max(1, round(STAGE / side))
        sections.append(
            {
                "crops": crops,
                "width": width,
                "height": height,
                "overview": data_uri(overview),
                "rows": [[data_uri(cell) for cell in row] for row in crops.cells],
                "sides": [row[0].shape[0] for row in crops.cells],
                "zoom": zoom,
                "zooms": [zoom, 2 * zoom, 4 * zoom],
            }
        )
    write_text(Path(path), render("compare.html.jinja", sections=sections, colors=COLORS))


def _pairs(source: Path, hr: Path | None) -> dict[Path, Path | None]:
    """Pictures and their ground truths, of which there may be more."""
    if not source.exists():
        raise ValueError(f"{source} does not exist.")
    pictures = find_images(source) if source.is_dir() else [source]
    if not pictures:
        raise ValueError(f"{source} holds no pictures.")
    if hr is None:
        return dict.fromkeys(pictures)
    if hr.is_file() and not source.is_dir():
        return {source: hr}
    if not hr.is_dir():
        raise ValueError(f"{hr} is not a folder of ground truths.")
    partners = {path.stem: path for path in find_images(hr)}
    for path in pictures:
        if path.stem not in partners:
            raise ValueError(f"{hr} has no picture named {path.stem}, the ground truth of {path}.")
    return {path: partners[path.stem] for path in pictures}


def _places(path: Path, rgb: np.ndarray, boxes: Sequence[Box], crops: int, crop_size: int) -> list[Box]:
    height, width = rgb.shape[:2]
    for x, y, side in boxes:
        if min(x, y) < 0 or side < 1 or x + side > width or y + side > height:
            raise ValueError(f"The crop {x},{y},{side} is not within {path}, which is {width}x{height} pixels.")
    return list(boxes) or structure_boxes(rgb, crops, crop_size)


def _cut(picture: Tensor, boxes: Sequence[Box], upscale: float, rows: list[list[np.ndarray]]) -> None:
    """Append the crops of an enlarged picture to the rows of its boxes."""
    rgb = _array(picture)
    height, width = rgb.shape[:2]
    for (x, y, side), row in zip(boxes, rows, strict=True):
        side = min(max(1, round(side * upscale)), height, width)
        left, top = min(round(x * upscale), width - side), min(round(y * upscale), height - side)
        row.append(rgb[top : top + side, left : left + side].copy())  # the rest need not stay in memory


def _array(picture: Tensor) -> np.ndarray:
    return picture[0].permute(1, 2, 0).numpy()
