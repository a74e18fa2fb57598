"""`tsdsr upscale` on films: frame by frame, with all else that the file holds."""

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ..imaging.video import FilmFrame
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline
    from .progress import Display

SUFFIXES = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"))
"""Of files that are taken for films, in lower case."""
OUTPUT_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
"""Of films that can be written."""
# Of 255: the same frame enlarged again differs by no more, on devices that do not repeat themselves exactly.
_SAME = 2.0

logger = logging.getLogger("tsdsr")


def is_video(path: Path) -> bool:
    """Whether a file is taken for a film, by its suffix."""
    return path.suffix.lower() in SUFFIXES


def output_suffix(path: Path) -> str:
    """The suffix of a film's result: its own where that can be written, else .mkv, which holds nearly everything."""
    suffix = path.suffix.lower()
    return suffix if suffix in OUTPUT_SUFFIXES else ".mkv"


def upscale_video(
    pipeline: "TSDSRPipeline",
    source: Path,
    output: Path,
    *,
    calling: dict[str, Any],
    seed: int | None,
    resume: bool,
    writing: dict[str, Any],
    display: "Display",
    debug: bool = False,
    segment_frames: int | None = None,
) -> dict[str, Any]:
    """Upscale a film, every frame with the same settings and seed. Frames that are finished outlive an interruption.

    Args:
        pipeline: what enlarges.
        source, output: the films; `output` appears when it is whole.
        calling: arguments of the pipeline.
        seed: of each frame's draw from the encoder's posterior.
        resume: go on with what an interrupted run left, if source, settings and model are the same.
        writing: `quality`; what else it holds is for pictures.
        display: shows how far it is.
        debug: nothing more is said of films.
        segment_frames: how many frames may be lost by an interruption.

    Returns:
        What a manifest holds of it: `input_size` and `output_size` (width, height), `frames`, `damaged` (packets that
        could not be decoded), `flicker` and `source_flicker` in levels of 255, `flicker_ratio`, `still` (see
        `evaluation.metrics.flicker`).

    Raises:
        ValueError, OSError: the film cannot be read or written, in one sentence.
    """
    import numpy as np
    import torch

    from ..evaluation.metrics.flicker import Flicker
    from ..imaging.picture import luma
    from ..imaging.video import SEGMENT_FRAMES, Film, FilmWriter

    film = Film(source)
    factor = calling.get("upscale", inspect.signature(type(pipeline).__call__).parameters["upscale"].default)
    size = (round(factor * film.height), round(factor * film.width))

    def enlarge(frame: "FilmFrame", writer: FilmWriter | None) -> "np.ndarray":
        """Luma of the result in levels (H, W); its rows go to the writer."""
        generator = {} if seed is None else {"generator": torch.Generator("cpu").manual_seed(seed)}
        levels = np.empty(size, np.float32)

        def take(rows: "np.ndarray", top: int) -> None:
            levels[top : top + len(rows)] = 255 * luma(rows)
            if writer is not None:
                writer.write(rows)

        def show(event: Any) -> None:
            display.tiles(event.done, event.total)

        pipeline(image=frame, rows_callback=take, tile_callback=show, **generator, **calling)
        return levels

    def source_luma(frame: "FilmFrame") -> "np.ndarray":
        return 255 * luma(frame.rows(0, frame.height))

    output.parent.mkdir(parents=True, exist_ok=True)
    with FilmWriter(
        film,
        output,
        size,
        settings={"calling": calling, "seed": seed},
        resume=resume,
        segment_frames=segment_frames or SEGMENT_FRAMES,
        **{name: value for name, value in writing.items() if name == "quality"},
    ) as writer:
        for remark in film.remarks + writer.remarks:
            logger.warning(remark)
        flicker, frames = Flicker(), film.frames()
        if writer.done:
            # The last finished frame once more: what follows is compared with it, and if it does not come out the same
            # then the model is another.
            again = film.frames(writer.done - 1, writer.last)
            last = next(again)
            display.frame(writer.done, film.count or 0)
            levels = enlarge(last, None)
            if np.abs(_sample(levels) - writer.notes["sample"]).max() <= _SAME:
                flicker, frames = Flicker(writer.notes["flicker"]), again
                flicker.add(source_luma(last), levels)
            else:
                logger.warning(f"{source} is upscaled anew: its frames come out otherwise than before.")
                writer.restart()
        count, end = writer.done, film.start
        for frame in frames:
            count += 1
            display.frame(count, film.count or 0)
            writer.begin(frame)
            levels = enlarge(frame, writer)
            flicker.add(source_luma(frame), levels)
            end = (frame.pts + frame.duration) * film.time_base
            writer.end({"flicker": flicker.state, "sample": _sample(levels).tolist()})
        display.begin(f"joining {output.name}")

    seconds = float(end - film.start)
    if film.seconds is not None and seconds < film.seconds - 1:
        logger.warning(f"the picture of {source} ends after {seconds:.1f} of {film.seconds:.1f} s.")
    if film.damaged:
        logger.warning(f"{source} is damaged: {film.damaged} of its packets could not be decoded and are left out.")
    values = flicker.values()
    return {
        "input_size": [film.width, film.height],
        "output_size": [size[1], size[0]],
        "frames": count,
        "damaged": film.damaged,
        "flicker": values["flicker"],
        "source_flicker": values["source"],
        "flicker_ratio": values["ratio"],
        "still": values["still"],
    }


def _sample(levels: "np.ndarray") -> "np.ndarray":
    """Some pixels of a frame by which it can be told from others."""
    height, width = levels.shape
    return levels[:: max(1, height // 16), :: max(1, width // 16)]
