"""The whole of an evaluation: pictures in, figures out."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..imaging import Picture, write
from .learned import learned_metric, versions
from .metrics import METRICS
from .metrics.metric import Metric
from .published import PAPERS
from .results import Evaluation, Pictures, Unavailable, Values, mean
from .sets import Checksum, Pairs, Sample, eight_bit, read_tensor
from .upscalers import Upscaler, default_upscale

# The columns of the papers' tables, then what needs no weights.
DEFAULT_METRICS = tuple(dict.fromkeys((*PAPERS, *METRICS)))


@dataclass(frozen=True)
class Choice:
    """Metrics that were asked for: those that are here, those that are not, and the files of weights they read."""

    metrics: list[Metric]
    unavailable: list[Unavailable]
    weights: dict[str, dict[str, str]]


def choose_metrics(names: Sequence[str], device: torch.device, has_hr: bool) -> Choice:
    """Metrics by their names: ours, else pyiqa's.

    Raises:
        ValueError: for an unknown name.
    """
    found: list[Metric] = []
    unavailable: list[Unavailable] = []
    weights: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(names):
        entry: Metric | Unavailable
        if name in METRICS:
            entry = METRICS[name]
        else:
            made = learned_metric(name, device)
            if isinstance(made, tuple):
                entry, files = made
                weights[name] = files
            else:
                entry = made
        if isinstance(entry, Metric) and entry.kind != "no-reference" and not has_hr:
            entry = Unavailable(name, "it compares with a ground truth: give the folder of those with --hr")
        if isinstance(entry, Unavailable):
            unavailable.append(entry)
        else:
            found.append(entry)
    return Choice(found, unavailable, weights)


def evaluate(
    pairs: Pairs,
    choice: Choice,
    folder: Path,
    upscaler: Upscaler | None = None,
    *,
    upscale: float | None = None,
    crop_border: int = 0,
    device: torch.device | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Evaluation:
    """Measure results on a set.

    Args:
        pairs: the set; its results come from `upscaler` where it has none.
        choice: the metrics.
        folder: results of `upscaler` are written to it as `sr/NAME.png`, small pictures that were made here as
            `lr/NAME.png`.
        upscaler: makes results of the small pictures, of the size of the ground truth.
        upscale: the factor where there is no ground truth; by default the pipeline's.
        crop_border: pixels at each side of results and ground truths that metrics of single pictures do not see.
        device: of the metrics.
        settings: what else says how this was done.
        progress: told the name of each picture, how many are finished and how many there are.

    Raises:
        ValueError: if pictures do not fit each other, or a picture is no picture.
    """
    device = device or torch.device("cpu")
    of_set = [metric for metric in choice.metrics if metric.kind == "set"]
    of_one = [metric for metric in choice.metrics if metric.kind != "set"]
    alone = [metric for metric in of_one if metric.kind == "no-reference"]  # measured on the ground truths too
    images: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []
    undefined: dict[str, str] = {}
    sums = {"hr": Checksum(), "lr": Checksum()}

    def values(metrics: Sequence[Metric], sr: Tensor | Path, hr: Tensor | Path | None) -> Values:
        found: Values = {}
        for metric in metrics:
            try:
                found[metric.name] = metric.measure(sr, None if metric.kind == "no-reference" else hr)
            except ValueError as error:  # too small for it, too flat
                found[metric.name] = None
                undefined.setdefault(metric.name, str(error))
        return found

    # A metric of the whole set reads all that is in a folder, so it gets two of its own.
    with TemporaryDirectory() as whole:
        set_sr, set_hr = Path(whole, "sr"), Path(whole, "hr")
        for number, sample in enumerate(pairs):
            progress(sample.name, number, len(pairs))
            sums["hr"].add(sample.name, sample.hr)
            sums["lr"].add(sample.name, sample.lr)
            sr, seconds = sample.sr, {}
            if upscaler is not None:
                sr, seconds["seconds"] = _run(upscaler, sample, upscale)
                _write(folder / "sr", sample.name, sr)
                if pairs.degrade is not None:
                    _write(folder / "lr", sample.name, sample.lr)
            if sr is None:
                raise ValueError(f"There is no result for {sample.name}: give a folder of results or a model.")
            if of_set:
                _write(set_sr, sample.name, sr)
                _write(set_hr, sample.name, sample.hr)
            sr = _inside(sr, crop_border, sample.name).to(device)
            hr = None if sample.hr is None else _inside(sample.hr, crop_border, sample.name).to(device)
            images.append({"name": sample.name, **values(of_one, sr, hr), **seconds})
            if hr is not None:
                truths.append({"name": sample.name, **values(alone, hr, None)})
        of_whole = values(of_set, set_sr, set_hr)
    progress("", len(pairs), len(pairs))

    average = {metric.name: mean([image[metric.name] for image in images]) for metric in of_one} | of_whole
    if upscaler is not None:
        # The first of several pictures also sets things up.
        average["seconds"] = median([image["seconds"] for image in images][len(images) > 1 :])
    truth_average = {metric.name: mean([truth[metric.name] for truth in truths]) for metric in alone if truths}
    return Evaluation(
        average=average,
        images=images,
        settings={
            **(settings or {}),
            "pictures": len(images),
            "protocol": "PSNR and SSIM of the Y of YCbCr (BT.601), results at 8 bits",
            "crop_border": crop_border,
            "checksum_hr": str(sums["hr"]),
            "checksum_lr": str(sums["lr"]),
            "undefined": undefined,
            "versions": {"python": platform.python_version(), **versions()},
            "weights": choice.weights,
            "device": _device_name(device),
        },
        columns=[metric.column for metric in choice.metrics],
        unavailable=choice.unavailable,
        ground_truth={"average": truth_average, "images": truths} if truths and alone else {},
    )


def pictures_of(pairs: Pairs, folder: Path, name: str) -> Pictures:
    """The pictures of one name, for a report on an evaluation that was made with this set and folder."""
    (case,) = (case for case in pairs.cases if case.name == name)
    sample = pairs.load(case)
    sr = read_tensor(folder / "sr" / f"{name}.png") if sample.sr is None else sample.sr
    shown = {"sr": sr, "lq": sample.lr, "hr": sample.hr}
    return Pictures(**{role: p[0].permute(1, 2, 0).numpy() for role, p in shown.items() if p is not None})


def _run(upscaler: Upscaler, sample: Sample, upscale: float | None) -> tuple[Tensor, float]:
    """The result at 8 bits and the seconds it took."""
    if sample.lr is None:
        raise ValueError(f"There is no small picture for {sample.name}: give a folder of those, or a degradation.")
    if sample.hr is not None:
        size = (sample.hr.shape[-2], sample.hr.shape[-1])
    else:
        upscale = upscale or default_upscale()
        size = (round(upscale * sample.lr.shape[-2]), round(upscale * sample.lr.shape[-1]))
    begun = time.perf_counter()
    result = upscaler(sample.lr, size)
    return eight_bit(result), time.perf_counter() - begun


def _inside(picture: Tensor, border: int, name: str) -> Tensor:
    if 2 * border >= min(picture.shape[-2:]):
        raise ValueError(
            f"{name} has {picture.shape[-1]}x{picture.shape[-2]} pixels: a border of {border} leaves none."
        )
    return picture[..., border : picture.shape[-2] - border, border : picture.shape[-1] - border]


def _write(folder: Path, name: str, picture: Tensor | None) -> None:
    if picture is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write(Picture(picture[0].permute(1, 2, 0).numpy()), folder / f"{name}.png")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
