"""What a metric is."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Column:
    """What is said of a metric where its values are shown.

    Attributes:
        name: as it is typed and written to files, such as "psnr".
        title: head of its column, such as "PSNR-Y".
        kind: "full-reference" looks at result and ground truth, "no-reference" at the result alone, "set" at all
            results and all ground truths together.
        better: where the good end is; "one" stands for ratios to the ground truth.
        about: what it measures, in one line, with the source.
        unit: such as "dB"; empty for none.
        digits: behind the point, where it is printed.
    """

    name: str
    title: str
    kind: Literal["full-reference", "no-reference", "set"]
    better: Literal["higher", "lower", "one"]
    about: str
    unit: str = ""
    digits: int = 4


@dataclass(frozen=True, kw_only=True)
class Metric(Column):
    """One number that says something about a picture, or about a set of them.

    Attributes:
        measure: `(sr, hr) -> float` of pictures (1, 3, H, W), RGB, 0..1; "no-reference" takes None as `hr`. For "set"
            `(folder of results, folder of ground truths) -> float`.
    """

    measure: Callable[..., float]

    @property
    def column(self) -> Column:
        """What is said of it, without the function."""
        return Column(**{field.name: getattr(self, field.name) for field in fields(Column)})
