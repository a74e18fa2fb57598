"""Which file each picture is written to: decided before anything runs, so that no two pictures share a name."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One picture to upscale: its file, and its path within the folder it was found in (None if named itself)."""

    path: Path
    found_as: Path | None = None

    @property
    def relative(self) -> Path:
        """Where the result goes within an output folder."""
        return self.found_as or Path(self.path.name)


@dataclass(frozen=True)
class Job:
    """Read `source`, upscale, write `output`."""

    source: Path
    output: Path


def collect(inputs: Iterable[Path], find_images: Callable[[Path], list[Path]]) -> list[Source]:
    """All pictures that files and folders name, each once, in the order given.

    Raises:
        ValueError: if an input does not exist, or if there is no picture at all.
    """
    inputs = list(inputs)
    sources: dict[Path, Source] = {}
    for path in inputs:
        if path.is_dir():
            for found in find_images(path):
                sources.setdefault(found.resolve(), Source(found, found.relative_to(path)))
        elif path.exists():
            # A file that is named itself stays one, even where a folder holds it too.
            known = sources.get(path.resolve())
            sources[path.resolve()] = Source(path, None) if known is None else Source(known.path, None)
        else:
            raise ValueError(f"{path} does not exist.")
    if not sources:
        raise ValueError(f"no pictures in {', '.join(map(str, inputs))}.")
    return list(sources.values())


def plan(
    sources: list[Source],
    output: str | None,
    file_format: str | None,
    factor: Callable[[], float],
    supported: Collection[str],
) -> list[Job]:
    """One job a picture.

    Without `output` a result lies beside its picture with the factor in its name: `photo.jpg` -> `photo_x4.png`. With
    an output folder it keeps its name, and its place below a folder that was given: `photo.png`. Where two results
    would get one name, all of them keep the whole name of their picture, `photo.jpg.png`; where that is not enough,
    as many of their folders as it takes, `b/photo.jpg.png`. A file of a folder that is itself the result of another
    picture (from an earlier run) is not upscaled again.

    Args:
        sources: the pictures.
        output: file or folder, None for a result beside its picture.
        file_format: suffix without the dot, `same` for that of the picture, None for that of `output` or else png.
        factor: gives the upscale factor; only called when a name needs it.
        supported: suffixes with their dot that can be written.

    Raises:
        ValueError: if `output` does not fit the pictures, or if a picture would be overwritten.
    """
    single_file = _as_file(sources, output, file_format, supported)
    if single_file is not None:
        jobs = [Job(sources[0].path, single_file)]
    else:
        tag = f"_x{factor():g}" if output is None else ""
        jobs = _in_folders(sources, None if output is None else Path(output), file_format, tag, supported)
        while results := _results_of_others(sources, jobs):
            sources = [source for source in sources if source.path not in results]
            jobs = _in_folders(sources, None if output is None else Path(output), file_format, tag, supported)
    _refuse_inputs(jobs)
    return jobs


def _as_file(
    sources: list[Source], output: str | None, file_format: str | None, supported: Collection[str]
) -> Path | None:
    """`output` if it names a file, None if it names a folder."""
    if output is None or output.endswith(("/", os.sep)) or Path(output).is_dir():
        return None
    path = Path(output)
    suffix = path.suffix.lower()
    one_picture = len(sources) == 1 and sources[0].found_as is None
    if not one_picture:
        if path.exists() or suffix in supported:
            raise ValueError(f"{output} is a file name, and the results of several pictures or a folder need a folder.")
        return None
    if not suffix and not path.exists():
        return None
    if suffix not in supported:
        known = ", ".join(sorted(supported))
        raise ValueError(
            f"cannot write {output}: the suffix must be one of {known} (a folder's name ends with a slash)."
        )
    if file_format not in (None, "same") and _kind(f".{file_format}") != _kind(suffix):
        raise ValueError(f"{output} is not a {file_format} file: leave out --format or change the name.")
    return path


def _kind(suffix: str) -> str:
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)


def _in_folders(
    sources: list[Source], folder: Path | None, file_format: str | None, tag: str, supported: Collection[str]
) -> list[Job]:
    """Results beside the pictures (`folder` None) or below a folder, under names that differ also without case."""

    def name(source: Source, level: int) -> Path:
        relative = source.relative if folder is not None else source.path
        suffix = source.path.suffix.lower() if file_format == "same" else f".{file_format or 'png'}"
        suffix = suffix if suffix in supported else ".png"
        file_name = (relative.stem if level == 0 else relative.name) + tag + suffix
        if folder is None:
            return source.path.with_name(file_name)
        parents = source.path.resolve().parts[1:-1]
        above = Path(*parents[max(0, len(parents) - level + 1) :]) if level > 1 else relative.parent
        return folder / above / file_name

    levels = [0] * len(sources)
    deepest = max(len(source.path.resolve().parts) for source in sources) + 1
    while True:
        outputs = [name(source, level) for source, level in zip(sources, levels, strict=True)]
        keys = [str(output).casefold() for output in outputs]
        count = Counter(keys)
        shared = [i for i, key in enumerate(keys) if count[key] > 1 and levels[i] < deepest]
        if not shared:
            break
        for i in shared:
            levels[i] += 1
    # Only names that differ in nothing but their case are left: a number tells them apart.
    used: set[str] = set()
    for i, output in enumerate(outputs):
        number = 1
        while str(outputs[i]).casefold() in used or (number > 1 and str(outputs[i]).casefold() in keys):
            number += 1
            outputs[i] = output.with_name(f"{output.stem}-{number}{output.suffix}")
        used.add(str(outputs[i]).casefold())
    return [Job(source.path, output) for source, output in zip(sources, outputs, strict=True)]


def _results_of_others(sources: list[Source], jobs: list[Job]) -> set[Path]:
    """Pictures found in folders that are the planned results of other pictures."""
    writer_of = {job.output.resolve(): job.source for job in jobs}
    results = set()
    for source in sources:
        writer = writer_of.get(source.path.resolve())
        if source.found_as is not None and writer is not None and writer != source.path:
            results.add(source.path)
    return results


def _refuse_inputs(jobs: list[Job]) -> None:
    inputs = {_identity(job.source) for job in jobs}
    for job in jobs:
        # Resolved, because `new/../a.png` is only there once `new` has been made.
        output = job.output.resolve()
        if output.exists() and _identity(output) in inputs:
            raise ValueError(
                f"{job.output} is one of the pictures to upscale and is never overwritten: choose another -o."
            )


def _identity(path: Path) -> tuple[int, int]:
    """The file itself, whatever the name it is reached by."""
    status = path.stat()
    return status.st_dev, status.st_ino
