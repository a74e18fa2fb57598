"""What an evaluation found, and its files."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .metrics.metric import Column

Values = dict[str, float | None]
"""Metric -> value; None where the metric is not defined for that picture."""


@dataclass(frozen=True)
class Unavailable:
    """A metric that was asked for and cannot be measured here.

    Attributes:
        name: the metric.
        reason: one sentence.
        fetch: the command that makes it available; empty where none does.
    """

    name: str
    reason: str
    fetch: str = ""


@dataclass
class Evaluation:
    """The figures of one model, or of one folder of results, on one set of pictures.

    Attributes:
        average: metric -> mean over the pictures (of those with a value); metrics of the whole set too.
        images: per picture, in order: {"name": ..., "psnr": ..., "seconds": ...}.
        settings: everything that is needed to repeat it, JSON values.
        columns: what was measured, in order.
        unavailable: what could not be.
        ground_truth: the no-reference metrics of the ground truth: {"average": {...}, "images": [{"name": ...}]}; empty
            without one.
    """

    average: Values
    images: list[dict[str, Any]]
    settings: dict[str, Any]
    columns: list[Column]
    unavailable: list[Unavailable] = field(default_factory=list)
    ground_truth: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What its row is called."""
        return self.settings.get("label", "")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """The evaluation that `to_json` wrote.

        Raises:
            ValueError: if the text is something else.
        """
        try:
            found = json.loads(text)
            found["columns"] = [Column(**column) for column in found["columns"]]
            found["unavailable"] = [Unavailable(**entry) for entry in found["unavailable"]]
            return cls(**found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("this is not a result of `tsdsr evaluate --json`.") from error

    def to_csv(self) -> str:
        """One line a picture, and a last one named "average"."""
        names = [column.name for column in self.columns]
        timed = ["seconds"] if any("seconds" in image for image in self.images) else []
        lines = io.StringIO()
        writer = csv.DictWriter(lines, ["name", *names, *timed], restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*self.images, {"name": "average", **self.average}])
        return lines.getvalue()


@dataclass(frozen=True)
class Pictures:
    """What a report shows of one picture: arrays (H, W, 3), float32, 0..1, each of its own size."""

    sr: np.ndarray
    lq: np.ndarray | None = None
    hr: np.ndarray | None = None


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is defined, None where nothing is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def write_text(path: Path, text: str) -> None:
    """A text file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
