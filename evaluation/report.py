"""An evaluation as one HTML page that needs nothing but itself."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..imaging import data_uri, resize
from .metrics.metric import Column
from .published import Published, table_columns
from .results import Evaluation, Pictures, Values, write_text
from .sets import LAYOUTS

CASES = 8  # pictures shown, so that the page stays below 15 MB
WINDOW = 768  # pixels a side: of larger pictures a part is shown


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    pictures: Callable[[str], Pictures],
    published: Sequence[Published] = (),
    beside: Sequence[tuple[str, Evaluation]] = (),
) -> None:
    """Write the page: figures beside those of others, distributions, best and worst pictures, how to repeat it.

    Args:
        path: the HTML file; it is whole or not there.
        evaluation: what was found.
        pictures: the pictures of one name; called for the few that are shown.
        published: rows of the same set.
        beside: earlier evaluations of the same set and what to call them.

    Raises:
        OSError: if the file cannot be written.
    """
    columns = table_columns([evaluation, *(run for _, run in beside)], published)
    write_text(
        Path(path),
        render(
            "report.html.jinja",
            evaluation=evaluation,
            columns=columns,
            rows=_rows(evaluation, columns, published, beside),
            distributions=[found for column in evaluation.columns if (found := _distribution(column, evaluation))],
            cases=_cases(evaluation, pictures),
            pairs=next(
                (known.pairs for known in LAYOUTS.values() if known.title in {row.dataset for row in published}), 0
            ),
            settings=flat(evaluation.settings),
            data=_data(evaluation, published, beside),
        ),
    )


def render(template: str, **values: Any) -> str:
    """A page of this folder's templates; whatever is put into it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(**values)


def number(value: float | None, digits: int) -> str:
    """As it is printed; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as lines: {"versions": {"torch": "2.6"}} -> {"versions.torch": "2.6"}."""
    lines: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            lines |= flat(value, f"{prefix}{name}.")
        else:
            lines[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return lines


def busiest(values: np.ndarray, height: int, width: int, stride: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of `values` (H, W) in windows of this size: tops, lefts and means (tops, lefts) of a grid of them."""
    sums = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    tops, lefts = (
        np.unique([*range(0, total - side, stride), total - side])
        for total, side in zip(values.shape, (height, width), strict=True)
    )
    y, x = tops[:, None], lefts[None]
    box = sums[y + height, x + width] - sums[y, x + width] - sums[y + height, x] + sums[y, x]
    return tops, lefts, box / (height * width)


def distance_to_good(column: Column, value: float) -> float:
    """Smaller is better, whichever end of the column is the good one."""
    return {"higher": -value, "lower": value, "one": abs(value - 1)}[column.better]


def _rows(
    evaluation: Evaluation,
    columns: list[Column],
    published: Sequence[Published],
    beside: Sequence[tuple[str, Evaluation]],
) -> list[dict[str, Any]]:
    """One for each evaluation, the ground truth and each published method: what the table says of it."""
    rows: list[dict[str, Any]] = []

    def add(kind: str, label: str, average: Values | dict[str, float], **more: Any) -> None:
        rows.append({"kind": kind, "label": label, "average": average, "steps": None, "seconds": None, **more})

    runs = [("this run", evaluation.label, evaluation), *(("earlier run", label, run) for label, run in beside)]
    for kind, label, run in runs:
        add(
            kind,
            label or kind,
            run.average,
            seconds=run.average.get("seconds"),
            steps=run.settings.get("steps"),
            source="measured",
        )
    if truth := evaluation.ground_truth.get("average"):
        add("ground truth", "Ground truth", truth, source="measured")
    for method in published:
        add(
            "published",
            method.method,
            method.average,
            steps=method.steps,
            seconds=method.seconds,
            source=method.source,
        )
    for column in columns:
        # The ground truth is no competitor.
        found = {
            index: distance_to_good(column, value)
            for index, row in enumerate(rows)
            if row["kind"] != "ground truth" and (value := row["average"].get(column.name)) is not None
        }
        for index, distance in found.items():
            rows[index].setdefault("best", set())
            if len(found) > 1 and distance == min(found.values()):
                rows[index]["best"].add(column.name)
    return [{"best": set(), **row} for row in rows]


def _distribution(column: Column, evaluation: Evaluation) -> dict[str, Any] | None:
    """A histogram over the pictures, with that of the ground truth, both as shares; None for a metric of sets."""
    values = _defined(evaluation.images, column.name)
    truth = _defined(evaluation.ground_truth.get("images", []), column.name)
    if column.kind == "set" or not len(values):
        return None
    low, high = min([*values, *truth]), max([*values, *truth])
    if low == high:
        low, high = low - max(abs(low) / 10, 10.0**-column.digits), high + max(abs(high) / 10, 10.0**-column.digits)
    bins = min(max(math.ceil(2 * math.sqrt(len(values))), 9), 41) | 1  # odd: one value alone stands in the middle
    edges = np.linspace(low, high, bins + 1)
    counts, truth_counts = (np.histogram(found, edges)[0] for found in (values, truth))
    top = max(counts.max() / len(values), truth_counts.max() / max(len(truth), 1))

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    return {
        "column": column,
        "count": len(values),
        "low": low,
        "high": high,
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "truth_mean": float(truth.mean()) if len(truth) else None,
        "mean_at": place(values.mean()),
        "median_at": place(float(np.median(values))),
        "bars": [
            {"from": edges[i], "to": edges[i + 1], "count": int(counts[i]), "height": 100 * share / top, "truth": other}
            for i, (share, other) in enumerate(
                zip(counts / len(values), 100 * truth_counts / max(len(truth), 1) / top, strict=True)
            )
        ],
    }


def _defined(images: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([image[name] for image in images if image.get(name) is not None], dtype=np.float64)


def _cases(evaluation: Evaluation, pictures: Callable[[str], Pictures]) -> list[dict[str, Any]]:
    """The worst and best pictures by the first metric of fidelity and the first of perception, or all few."""
    firsts = {column.kind: column for column in reversed(evaluation.columns) if column.kind != "set"}
    metrics = [firsts[kind] for kind in ("full-reference", "no-reference") if kind in firsts]
    why: dict[str, list[str]] = {}
    for column in metrics:
        valued = [image for image in evaluation.images if image.get(column.name) is not None]
        order = np.argsort([distance_to_good(column, image[column.name]) for image in valued], kind="stable")
        ranked = [valued[index] for index in order]
        each = min(CASES // (2 * len(metrics)), len(ranked) // 2)
        for word, found in (("worst", ranked[::-1]), ("best", ranked)):
            for place, image in enumerate(found[:each], start=1):
                rank = "" if place == 1 else f"{place}{'nd' if place == 2 else 'rd' if place == 3 else 'th'} "
                why.setdefault(image["name"], []).append(f"{rank}{word} {column.title}")
    if len(evaluation.images) <= CASES:
        why = {image["name"]: why.get(image["name"], []) for image in evaluation.images}
    by_name = {image["name"]: image for image in evaluation.images}
    return [_case(by_name[name], reasons, evaluation, pictures(name)) for name, reasons in why.items()]


def _case(image: dict[str, Any], why: list[str], evaluation: Evaluation, shown: Pictures) -> dict[str, Any]:
    height, width = shown.sr.shape[:2]
    layers = [(evaluation.label or "result", shown.sr)]
    if shown.lq is not None:
        layers.insert(0, ("input, bicubic", resize(shown.lq, (width, height))))
    if shown.hr is not None and shown.hr.shape == shown.sr.shape:
        layers.append(("ground truth", shown.hr))
    part = ""
    if max(height, width) > WINDOW:
        size = min(height, WINDOW), min(width, WINDOW)
        other = layers[-1][1] if shown.hr is not None else layers[0][1]
        tops, lefts, means = busiest(np.abs(shown.sr - other).mean(axis=2), *size)
        row, column = np.unravel_index(means.argmax(), means.shape)
        top, left = int(tops[row]), int(lefts[column])
        layers = [(name, rgb[top : top + size[0], left : left + size[1]]) for name, rgb in layers]
        part = f"{size[1]}x{size[0]} of {width}x{height} pixels, from {left}, {top}: where it differs most"
        height, width = size
    return {
        "name": image["name"],
        "why": why,
        "figures": [(column, image.get(column.name)) for column in evaluation.columns if column.kind != "set"],
        "layers": [(name, data_uri(rgb)) for name, rgb in layers],
        "width": width,
        "height": height,
        "part": part,
    }


def _data(
    evaluation: Evaluation, published: Sequence[Published], beside: Sequence[tuple[str, Evaluation]]
) -> dict[str, Any]:
    """What the page's script draws: every picture's values, and the averages that are points among them."""
    columns: list[dict[str, Any]] = [
        {"name": c.name, "title": c.title, "unit": c.unit, "digits": c.digits, "better": c.better, "kind": c.kind}
        for c in evaluation.columns
        if c.kind != "set"
    ]
    if "seconds" in evaluation.average:
        columns.append(
            {"name": "seconds", "title": "Time", "unit": "s", "digits": 3, "better": "lower", "kind": "time"}
        )

    def rounded(values: dict[str, Any]) -> list[float | None]:
        found = [(values.get(column["name"]), column["digits"]) for column in columns]
        return [None if value is None else round(value, digits + 1) for value, digits in found]

    averages: list[tuple[str, str, dict[str, Any]]] = [
        ("run", evaluation.label or "this run", evaluation.average),
        *(("beside", label, run.average) for label, run in beside),
        *(("published", f"{row.method}, {row.steps} step{'s' * (row.steps > 1)}", row.average) for row in published),
    ]
    return {
        "columns": columns,
        "names": [image["name"] for image in evaluation.images],
        "values": [rounded(image) for image in evaluation.images],
        "averages": [{"kind": kind, "label": label, "values": rounded(values)} for kind, label, values in averages],
    }
