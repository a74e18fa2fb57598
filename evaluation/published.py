"""The figures of the papers, as rows beside our own."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from .metrics.metric import Column
from .results import Evaluation

DATASETS = ("RealSR", "DRealSR", "DIV2K-Val")
"""Sets that the papers have figures for."""

# Columns of published_results.csv -> names of metrics, in the papers' order. Their MANIQA has the weights of PIPAL.
_METRICS = {
    "psnr": "psnr",
    "ssim": "ssim",
    "lpips": "lpips",
    "dists": "dists",
    "fid": "fid",
    "niqe": "niqe",
    "musiq": "musiq",
    "maniqa": "maniqa-pipal",
    "clipiqa": "clipiqa",
}

PAPERS = tuple(_METRICS.values())
"""The metrics of the papers' tables, in their order."""

LEARNED = {
    column.name: column
    for column in (
        Column("lpips", "LPIPS", "full-reference", "lower", "Distance of AlexNet features, Zhang et al. 2018"),
        Column("dists", "DISTS", "full-reference", "lower", "Structure and texture of VGG features, Ding et al. 2020"),
        Column("fid", "FID", "set", "lower", "Distance of the sets' Inception features, Heusel et al. 2017", digits=2),
        Column(
            "musiq", "MUSIQ", "no-reference", "higher", "Transformer trained on KonIQ-10k, Ke et al. 2021", digits=2
        ),
        Column("maniqa-pipal", "MANIQA", "no-reference", "higher", "Transformer trained on PIPAL, Yang et al. 2022"),
        Column("clipiqa", "CLIPIQA", "no-reference", "higher", "CLIP: good photo or bad photo, Wang et al. 2023"),
    )
}
"""Those of the papers' metrics that need trained weights. They measured with pyiqa's defaults."""


@dataclass(frozen=True)
class Published:
    """One row of a paper's table.

    Attributes:
        dataset: one of DATASETS.
        method: such as "OSEDiff".
        steps: of the diffusion.
        average: metric -> figure.
        source: where it is printed.
        seconds: for one 512x512 picture on an A100, None where no paper says.
    """

    dataset: str
    method: str
    steps: int
    average: dict[str, float]
    source: str
    seconds: float | None = None


def published_results(dataset: str) -> list[Published]:
    """The rows of a set, one of DATASETS, fewest steps first; none for another set."""
    seconds = {(row["method"], row["steps"]): float(row["seconds_512x512_A100"]) for row in _rows("inference_seconds")}
    return [
        Published(
            dataset,
            row["method"],
            int(row["steps"]),
            {name: float(row[column]) for column, name in _METRICS.items() if row[column]},
            row["source"],
            seconds.get((row["method"], row["steps"])),
        )
        for row in sorted(_rows("results"), key=lambda row: (int(row["steps"]), row["method"]))
        if row["dataset"] == dataset
    ]


def table_columns(runs: Sequence[Evaluation], published: Sequence[Published]) -> list[Column]:
    """What a table of evaluations beside published rows shows, the papers' columns first, in their order.

    A metric that was asked for and is unavailable has a column where a paper has figures for it.
    """
    found = {column.name: column for run in runs for column in run.columns}
    asked = {metric.name for run in runs for metric in run.unavailable}
    for name, column in LEARNED.items():
        if name in asked and any(name in row.average for row in published):
            found.setdefault(name, column)
    return sorted(found.values(), key=lambda column: (*PAPERS, column.name).index(column.name))


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (resources.files(__package__) / f"published_{name}.csv").open(encoding="utf-8") as lines:
        yield from csv.DictReader(lines)
