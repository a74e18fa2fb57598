"""Which file each picture is written to: decided before anything runs, so that no two pictures share a name."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

import typer

from .video import OUTPUT_SUFFIXES as FILM_SUFFIXES
from .video import is_video, output_suffix

STREAM = Path("-")
"""As a source stdin, as an output stdout. A file of this name is given as `./-`; its path is absolute here."""


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


def collect(inputs: Sequence[str | Path], recursive: bool = True, skip: str | None = None) -> list[Source]:
    """All pictures and films that files, folders and patterns name, each once, in the order given.

    Args:
        inputs: names. What exists under a name is meant by it; `*`, `?`, `[...]` and `**` count in other names. The
            string `-` stands for stdin.
        recursive: whether folders are searched with their subfolders.
        skip: the folder of results, which is not searched where it lies below an input.

    Raises:
        ValueError: if an input does not exist, if there is no picture at all, or if stdin is not the only input.
    """
    sources: dict[str, Source] = {}
    results = None if skip is None else os.path.realpath(skip)

    def add(found: list[Path], base: Path) -> None:
        below = os.path.join(os.path.realpath(base), "")
        for path in found:
            real = os.path.realpath(path)
            if results is None or not results.startswith(below) or not real.startswith(results + os.sep):
                sources.setdefault(real, Source(path, path.relative_to(base)))

    for text in inputs:
        if text == "-":
            if len(inputs) > 1:
                raise ValueError("`-`, a picture from stdin, is upscaled alone: leave the other inputs out.")
            return [Source(STREAM)]
        path = Path(text) if Path(text) != STREAM else Path(text).absolute()
        if path.is_dir():
            add(_found(path, recursive), path)
        elif path.exists():
            # A file that is named itself stays one, even where a folder holds it too.
            known = sources.get(os.path.realpath(path))
            sources[os.path.realpath(path)] = Source(path if known is None else known.path)
        elif has_magic(os.fspath(path)):
            add(*_expanded(path, recursive))
        else:
            raise ValueError(f"{path} does not exist.")
    if not sources:
        raise ValueError(f"no pictures in {', '.join(map(str, inputs))}.")
    return list(sources.values())


def _found(folder: Path, recursive: bool) -> list[Path]:
    """Pictures and films of a folder in natural order, then those of its subfolders; hidden ones are left out."""
    from ..imaging import UnreadableImageError, find_images

    found: list[Path] = []
    entered = set()
    waiting = [folder]
    while waiting:
        present = waiting.pop()
        if _identity(present) in entered:
            continue  # a link back
        entered.add(_identity(present))
        try:
            pictures = find_images(present)
            others = [path for path in present.iterdir() if not path.name.startswith(".")]
        except (OSError, UnreadableImageError) as error:
            if present == folder:
                raise
            typer.echo(f"skipped {present}: {error}", err=True)
            continue
        found += sorted([*pictures, *filter(_is_film, others)], key=_natural_key)
        if recursive:
            waiting += sorted(filter(Path.is_dir, others), key=_natural_key, reverse=True)
    return found


def _is_film(path: Path) -> bool:
    return is_video(path) and path.is_file()


def _expanded(pattern: Path, recursive: bool) -> tuple[list[Path], Path]:
    """The pictures that match a pattern or lie in folders that do, and the folder before its first wildcard."""
    fixed = next(number for number, part in enumerate(pattern.parts) if has_magic(part))
    base = Path(*pattern.parts[:fixed])
    # pathlib does not follow links for `**`, so that loops of links end; unlike a shell it finds hidden files.
    matches = {
        path
        for path in base.glob(os.path.join(*pattern.parts[fixed:]))
        if not any(part.startswith(".") for part in path.relative_to(base).parts)
    }
    folders = {path for path in matches if path.is_dir()}
    found = {picture for folder in folders for picture in _found(folder, recursive)}
    for folder in {path.parent for path in matches - folders}:
        found.update(matches.intersection(_found(folder, False)))
    return sorted(found, key=_natural_key), base


def _natural_key(path: Path) -> tuple[list[list[str | int]], Path]:
    """Sorts by folder, then 2.png before 10.png."""
    parts = [re.split(r"(\d+)", part.casefold()) for part in path.parts]
    return [[int(text) if odd % 2 else text for odd, text in enumerate(part)] for part in parts], path


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
    picture (from an earlier run) is not upscaled again. Films keep their container where it can be written.

    Args:
        sources: the pictures.
        output: file or folder, `-` for stdout, None for a result beside its picture (of stdin: stdout).
        file_format: suffix without the dot, `same` for that of the picture, None for that of `output` or else png.
        factor: gives the upscale factor; only called when a name needs it.
        supported: suffixes with their dot that pictures can be written with.

    Raises:
        ValueError: if `output` does not fit the pictures, if a picture would be overwritten, or for a format that
            cannot be written here.
    """
    if file_format not in (None, "same") and f".{file_format}" not in supported:
        raise ValueError(f"{file_format} cannot be written here; choose one of {', '.join(sorted(supported))}.")
    from_stream = sources[0].path == STREAM
    if output == "-" or (output is None and from_stream):
        if len(sources) > 1:
            raise ValueError("only one picture goes to stdout: name a folder with -o.")
        if is_video(sources[0].path):
            raise ValueError("a film does not go to stdout: name a file with -o.")
        return [Job(sources[0].path, STREAM)]
    single_file = _as_file(sources, output, file_format, supported)
    if from_stream and single_file is None:
        named = Path(str(output), "photo.png")
        raise ValueError(f"a picture from stdin has no name: give its result one, such as -o {named}.")
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
        if path.exists() or suffix in (*supported, *FILM_SUFFIXES):
            raise ValueError(f"{output} is a file name, and the results of several pictures or a folder need a folder.")
        return None
    if not suffix and not path.exists():
        return None
    film = is_video(sources[0].path)
    if suffix not in (FILM_SUFFIXES if film else supported):
        known = ", ".join(sorted(FILM_SUFFIXES if film else supported))
        raise ValueError(
            f"cannot write {output}: the suffix must be one of {known} (a folder's name ends with a slash)."
        )
    if not film and file_format not in (None, "same") and _kind(f".{file_format}") != _kind(suffix):
        raise ValueError(f"{output} is not a {file_format} file: leave out --format or change the name.")
    return path


def _kind(suffix: str) -> str:
    return {".jpeg": ".jpg", ".tiff": ".tif", ".apng": ".png"}.get(suffix, suffix)


def _in_folders(
    sources: list[Source], folder: Path | None, file_format: str | None, tag: str, supported: Collection[str]
) -> list[Job]:
    """Results beside the pictures (`folder` None) or below a folder, under names that differ also without case."""

    def name(source: Source, level: int) -> Path:
        relative = source.relative if folder is not None else source.path
        suffix = source.path.suffix.lower() if file_format == "same" else f".{file_format or 'png'}"
        suffix = suffix if suffix in supported else ".png"
        suffix = output_suffix(source.path) if is_video(source.path) else suffix
        file_name = (relative.stem if level == 0 else relative.name) + tag + suffix
        if folder is None:
            return source.path.with_name(file_name)
        if level < 2:
            return folder / relative.parent / file_name
        parents = source.path.resolve().parts[1:-1]
        return folder / Path(*parents[-(len(relative.parts) + level - 2) :]) / file_name

    levels = [0] * len(sources)
    outputs = [name(source, 0) for source in sources]
    while True:
        keys = [_as_one_name(output) for output in outputs]
        count = Counter(keys)
        shared = [i for i, key in enumerate(keys) if count[key] > 1]
        # Where no folder is left to add, these names stay as they are.
        changed = False
        for i in shared:
            levels[i] += 1
            longer = name(sources[i], levels[i])
            changed |= longer != outputs[i] or levels[i] < 3
            outputs[i] = longer
        if not changed:
            break
    # Only names that differ in nothing but their case are left: a number tells them apart.
    used: set[str] = set()
    for i, output in enumerate(outputs):
        number, key = 1, _as_one_name(output)
        while key in used or (number > 1 and key in count):
            number += 1
            outputs[i] = output.with_name(f"{output.stem}-{number}{output.suffix}")
            key = _as_one_name(outputs[i])
        used.add(key)
    return [Job(source.path, output) for source, output in zip(sources, outputs, strict=True)]


def _as_one_name(path: Path) -> str:
    """Equal for names that are one file where a file system ignores case and the composition of accents."""
    return unicodedata.normalize("NFC", str(path).casefold())


def _results_of_others(sources: list[Source], jobs: list[Job]) -> set[Path]:
    """Pictures found in folders that are the planned results of other pictures."""
    writer_of = {os.path.realpath(job.output): job.source for job in jobs}
    results = set()
    for source in sources:
        if source.found_as is not None:
            writer = writer_of.get(os.path.realpath(source.path), source.path)
            if writer != source.path:
                results.add(source.path)
    return results


def _refuse_inputs(jobs: list[Job]) -> None:
    inputs = {_identity(job.source) for job in jobs} - {None}
    for job in jobs:
        # The real path, because `new/../a.png` is only there once `new` has been made.
        if _identity(os.path.realpath(job.output)) in inputs:
            raise ValueError(
                f"{job.output} is one of the pictures to upscale and is never overwritten: choose another -o."
            )


def _identity(path: str | Path) -> tuple[int, int] | None:
    """The file itself, whatever the name it is reached by; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
