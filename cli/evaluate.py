"""`tsdsr evaluate`: how good a model is, next to the published figures."""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import one_sentence
from .options import (
    ColorFix,
    DebugOption,
    DegridOption,
    DeviceOption,
    DtypeOption,
    FidelityOption,
    GrainOption,
    ProcessSizeOption,
    SamplePosteriorOption,
    TileOverlapOption,
    TileSizeOption,
    given,
    value,
)

if TYPE_CHECKING:
    from ..evaluation.published import Published
    from ..evaluation.results import Evaluation
    from ..evaluation.sets import Degrade, Pairs


class Degradation(str, Enum):
    """Ways to make small pictures of ground truths."""

    realesrgan = "realesrgan"
    bicubic = "bicubic"


def evaluate(
    sr: Annotated[Path | None, typer.Option(metavar="DIR", help="Results to measure.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="What makes them: `embedded`, a pipeline folder, a Hub id, or `bicubic`, `lanczos`, `nearest`.",
        ),
    ] = None,
    lr: Annotated[Path | None, typer.Option(metavar="DIR", help="Small pictures for --model.")] = None,
    hr: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Ground truths; without them only what needs none.")
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option("--set", metavar="NAME", help="Benchmark: realsr, drealsr, div2k-val, set5, set14."),
    ] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where it lies, in StableSR's layout.")] = None,
    degrade: Annotated[
        Degradation | None, typer.Option(help="Make the small pictures of the ground truths.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that, and of models that draw.")] = 0,
    scale: Annotated[int, typer.Option(min=1, help="How many times smaller --degrade makes them.")] = 4,
    crop_size: Annotated[
        int, typer.Option(min=0, help="Degrade only the centre of each ground truth, so many pixels a side; 0: all.")
    ] = 0,
    held_aside: Annotated[
        int, typer.Option(min=0, help="Only the photographs of --hr that training with this number held aside.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many pictures; 0: all.")] = 0,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="NAME...", help="Default: the papers' and all --list names."),
    ] = None,
    crop_border: Annotated[
        int, typer.Option(min=0, help="Leave out so many pixels at each side; the papers' tables leave out none.")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All figures, for machines.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="A line a picture.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="A report, one file.")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", metavar="FILE...", help="Earlier --json files to put in the same table."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="What to call these results (default: the model or folder).")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the model's results, in DIR/sr.")] = None,
    upscale: Annotated[float | None, typer.Option("--upscale", "-s", help="Factor, where there is no --hr.")] = None,
    lora: Annotated[
        list[Path] | None, typer.Option("--lora", metavar="DIR...", help="LoRA over the model; two for --fidelity.")
    ] = None,
    fidelity: FidelityOption = None,
    color_fix: Annotated[
        ColorFix | None, typer.Option(help="Which colours to give results; the papers' tables have adain.")
    ] = None,
    degrid: DegridOption = None,
    grain: GrainOption = None,
    tile_size: TileSizeOption = None,
    tile_overlap: TileOverlapOption = None,
    process_size: ProcessSizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    sample_posterior: SamplePosteriorOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    fetch: Annotated[
        list[str] | None, typer.Option("--fetch", metavar="NAME...", help="Only download the weights of metrics.")
    ] = None,
    list_metrics: Annotated[bool, typer.Option("--list", help="Only say which metrics there are.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure results, or a model's, against ground truths, next to the published figures."""
    with one_sentence(debug):
        if fetch:
            _fetch(fetch)
            return
        if list_metrics:
            _list()
            return
        _check(sr, model, lr, hr, benchmark, root, degrade, held_aside)
        outputs = [path for path in (json_file, csv_file, html_file) if path is not None]
        for path in outputs:
            if path.exists() and not overwrite:
                raise ValueError(f"{path} exists: --overwrite replaces it.")
            if path.is_dir():
                raise ValueError(f"{path} is a folder; name a file.")
        if model is None or "/" not in model or Path(model).exists():
            # Read by huggingface_hub when it is first imported: what is here needs no network.
            os.environ["HF_HUB_OFFLINE"] = "1"

        from diffusers.utils.logging import disable_progress_bar

        from ..evaluation.evaluate import DEFAULT_METRICS, choose_metrics, pictures_of
        from ..evaluation.evaluate import evaluate as run
        from ..evaluation.published import published_results
        from ..evaluation.report import write_report
        from ..evaluation.results import Evaluation, write_text
        from ..evaluation.upscalers import make_upscaler
        from ..pipelines.loading import choose_device
        from .progress import counting_bar

        disable_progress_bar()  # of loading, which is written to log files too
        earlier = [(path, _read(Evaluation.from_json, path)) for path in beside or []]
        pairs = _pairs(sr, lr, hr, benchmark, root, degrade, seed, scale, crop_size, held_aside, limit)
        target = choose_device(device or "auto")
        has_hr = any(case.hr for case in pairs.cases)
        choice = choose_metrics(metrics or DEFAULT_METRICS, target, has_hr)
        loading = given(lora=lora, dtype=value(dtype), device=device)
        calling = given(
            fidelity=fidelity,
            color_fix=value(color_fix),
            degrid=degrid,
            grain=grain,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            process_size=process_size,
            sample_posterior=sample_posterior,
        )
        upscaler = model and make_upscaler(model, seed=seed, loading=loading, calling=calling)
        shown = {"lora": [str(path) for path in lora]} if lora else {}
        settings: dict[str, Any] = {
            "label": label or model or (sr.name if sr else ""),
            "command": shlex.join(["tsdsr", *sys.argv[1:]]),
            **given(model=model, sr=_text(sr), lr=_text(lr), hr=_text(hr)),
            **given(set=pairs.title or None, root=_text(root), degrade=value(degrade), limit=limit or None),
            **({"scale": scale, "crop_size": crop_size, "seed": seed} if degrade else {}),
            **given(held_aside=held_aside or None),
            **({**loading, **calling, **shown, "seed": seed} if model else {}),
        }
        with ExitStack() as stack:
            folder = save or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bar = stack.enter_context(counting_bar())
            task = bar.add_task("", total=None)
            evaluation = run(
                pairs,
                choice,
                folder,
                upscaler or None,
                **given(upscale=upscale),
                crop_border=crop_border,
                device=target,
                settings=settings,
                progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
            )
            bar.stop()
            rows = published_results(pairs.title)
            if json_file:
                write_text(json_file, evaluation.to_json())
            if csv_file:
                write_text(csv_file, evaluation.to_csv())
            _print(evaluation, [found for _, found in earlier], rows)
            if html_file:
                named = [(found.label or path.stem, found) for path, found in earlier]
                write_report(html_file, evaluation, lambda name: pictures_of(pairs, folder, name), rows, named)
        for path in outputs:
            typer.echo(f"wrote {path}")


def _check(
    sr: Path | None,
    model: str | None,
    lr: Path | None,
    hr: Path | None,
    benchmark: str | None,
    root: Path | None,
    degrade: Degradation | None,
    held_aside: int,
) -> None:
    """Which of the options go together."""
    if (sr is None) == (model is None):
        raise ValueError("give either --sr, a folder of results, or --model, which makes them.")
    if held_aside and hr is None:
        raise ValueError("--held-aside chooses among the photographs of --hr: give that folder.")
    if benchmark is not None and root is not None:
        if lr or hr or degrade:
            raise ValueError("--root has the set's own --lr and --hr; leave these and --degrade out.")
        return
    if benchmark is not None and hr is None:
        raise ValueError("--set needs --root, the folder that the set lies in, or folders with --lr and --hr.")
    if root is not None:
        raise ValueError("--root is where a --set lies: name one of realsr, drealsr, div2k-val, set5, set14.")
    if degrade is not None:
        if hr is None or lr is not None or sr is not None:
            raise ValueError("--degrade makes the small pictures of --hr for --model; leave --lr and --sr out.")
    elif model is not None and lr is None:
        raise ValueError("--model needs --lr, the small pictures, or --hr with --degrade, which makes them.")


def _pairs(
    sr: Path | None,
    lr: Path | None,
    hr: Path | None,
    benchmark: str | None,
    root: Path | None,
    degrade: Degradation | None,
    seed: int,
    scale: int,
    crop_size: int,
    held_aside: int,
    limit: int,
) -> "Pairs":
    from dataclasses import replace

    from ..evaluation.sets import Pairs, benchmark_set, layout, match, only

    if benchmark is not None and root is not None:
        pairs = benchmark_set(benchmark, root, sr)
    else:
        pairs = Pairs(match(sr=sr, lr=lr, hr=hr), layout(benchmark).title if benchmark else "")
    if degrade is not None:
        pairs = replace(pairs, degrade=_degradation(degrade), seed=seed, scale=scale, crop_size=crop_size)
    if held_aside and hr is not None:
        from ..training.data import split_photographs

        pairs = only(pairs, split_photographs(hr, held_aside)[1])
    return replace(pairs, cases=pairs.cases[: limit or None])


def _degradation(kind: Degradation) -> "Degrade":
    import torch.nn.functional as F

    from ..training.degradation import DegradationConfig, degrade

    if kind is Degradation.bicubic:
        return lambda hq, _, scale: F.interpolate(
            hq, size=(hq.shape[-2] // scale, hq.shape[-1] // scale), mode="bicubic", antialias=True
        )
    return lambda hq, generator, scale: degrade(hq, generator, DegradationConfig(scale=scale))


def _read(parse: "Callable[[str], Evaluation]", path: Path) -> "Evaluation":
    try:
        return parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be put beside: {error}") from error


def _fetch(names: list[str]) -> None:
    from ..evaluation.learned import fetch
    from ..evaluation.metrics import METRICS

    for name in names:
        if name in METRICS:
            typer.echo(f"{name} needs no weights")
            continue
        for file, checksum in fetch(name).items():
            typer.echo(f"{name}: {file}  sha256 {checksum}")


def _list() -> None:
    from ..evaluation.learned import learned_names
    from ..evaluation.metrics import METRICS

    for metric in METRICS.values():
        typer.echo(f"{metric.name:14s} {metric.kind:15s} {metric.about}")
    others = [name for name in learned_names() if name not in METRICS]
    typer.echo(f"with trained weights, through pyiqa: {', '.join(others)}")


def _print(evaluation: "Evaluation", earlier: "list[Evaluation]", published: "list[Published]") -> None:
    """The figures, then those that papers have too beside theirs, then what is missing and why."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..evaluation.published import table_columns
    from ..evaluation.sets import LAYOUTS

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    truth = evaluation.ground_truth.get("average", {})
    goal = {"higher": "higher is better", "lower": "lower is better", "one": "1 is best"}

    def figure(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    table = Table(title=Text(f"{evaluation.label}: {len(evaluation.images)} pictures"), title_justify="left")
    table.add_column("metric")
    for other in (evaluation, *earlier):
        table.add_column(Text(other.label), justify="right")
    if truth:
        table.add_column("ground truth", justify="right")
    table.add_column("")
    for column in evaluation.columns:
        cells = [figure(other.average.get(column.name), column.digits) for other in (evaluation, *earlier)]
        cells += [figure(truth[column.name], column.digits) if column.name in truth else ""] if truth else []
        table.add_row(" ".join(filter(None, (column.title, column.unit))), *cells, goal[column.better])
    if "seconds" in evaluation.average:
        cells = [figure(other.average.get("seconds"), 2) for other in (evaluation, *earlier)]
        table.add_row("seconds a picture", *cells, *[""] * bool(truth), evaluation.settings["device"])
    console.print(table)

    columns = [
        column
        for column in table_columns([evaluation, *earlier], published)
        if any(column.name in row.average for row in published)
    ]
    if columns:
        table = Table(title=f"beside published figures for {published[0].dataset}", title_justify="left")
        table.add_column("method")
        table.add_column("steps", justify="right")
        for column in columns:
            table.add_column(column.title, justify="right")
        table.add_column("source")
        for row in published:
            figures = [figure(row.average.get(column.name), column.digits) for column in columns]
            table.add_row(row.method, str(row.steps), *figures, row.source)
        for other in (*earlier, evaluation):
            figures = [figure(other.average.get(column.name), column.digits) for column in columns]
            table.add_row(Text(other.label), "", *figures, "measured", style="bold" if other is evaluation else "")
        console.print(table)
        (expected,) = (known.pairs for known in LAYOUTS.values() if known.title == published[0].dataset)
        if expected != len(evaluation.images):
            typer.echo(f"The published figures are of {expected} pictures, these of {len(evaluation.images)}.")
    for metric in evaluation.unavailable:
        typer.echo(
            f"{metric.name} is unavailable: {metric.reason}" + (f"; run: {metric.fetch}" if metric.fetch else ".")
        )
    for name, reason in evaluation.settings["undefined"].items():
        count = sum(image.get(name, 0) is None for image in evaluation.images)  # none of them for a metric of the set
        where = f" for {count} of {len(evaluation.images)} pictures" if count else ""
        typer.echo(f"{name} has no value{where}: {reason}")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
