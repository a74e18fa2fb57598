"""Films: frames out of a file and into another, with all else it holds, through PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import heapq
import importlib
import io
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

VIDEO_OUTPUT_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
"""Suffixes of films that can be written."""

_MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
SEGMENT_FRAMES = 100
"""How many frames are encoded into one file while a film is made."""
# Back from the frame that is wanted: frames right after a keyframe may still need what was before it.
_SEEK_BACK = 10
_AHEAD_PIXELS = 300_000_000
# x265 and SVT-AV1 write beyond their buffers, or fail, where a side is much shorter.
_LEAST_DEEP = 64
# Luma weights of red and blue by the code of the matrix in ITU-T H.273.
_MATRICES = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    5: (0.299, 0.114),  # BT.601, 625 lines
    6: (0.299, 0.114),  # BT.601, 525 lines
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020, non-constant luminance
}
_UNSPECIFIED = 2
_HDR = {16: "PQ", 18: "HLG"}
# What FFmpeg itself writes into the file.
_OWN_METADATA = {"major_brand", "minor_version", "compatible_brands", "encoder"}


@dataclass(frozen=True)
class Colours:
    """How the numbers of frames are meant, in the codes of ITU-T H.273.

    Attributes:
        matrix: between RGB and YCbCr; 0 for RGB itself.
        full: Y is 0..255 rather than 16..235.
        primaries, transfer: what red, green and blue are, and their curve. Neither is converted.
    """

    matrix: int
    full: bool
    primaries: int
    transfer: int

    @classmethod
    def of(cls, frame: Any) -> Colours:
        """Those of an `av.VideoFrame`. What is not said is taken as players take it, by the size: BT.709 from 720
        lines or 1280 columns on, BT.601 below; 16..235 unless the pixel format says otherwise.
        """
        name, height, matrix = frame.format.name, frame.height, frame.colorspace
        if _is_rgb(frame.format):
            matrix = 0
        elif matrix in (0, _UNSPECIFIED):
            matrix = 1 if height >= 720 or frame.width >= 1280 else 5 if height == 576 else 6
        elif matrix not in _MATRICES:
            raise ValueError(
                f"colours with the matrix {matrix} of ITU-T H.273 are not supported; convert the film to BT.709 first."
            )
        primaries, transfer = frame.color_primaries, frame.color_trc
        if primaries == _UNSPECIFIED:
            primaries = 9 if matrix == 9 else {576: 5, 480: 6, 486: 6}.get(height, 1)
        full = matrix == 0 or name.startswith("yuvj") or frame.color_range == 2
        return cls(
            matrix=matrix,
            full=full or (name.startswith("gray") and frame.color_range != 1),
            primaries=primaries,
            transfer=transfer if transfer != _UNSPECIFIED else 14 if matrix == 9 else 1,
        )

    def of_result(self, height: int, width: int) -> Colours:
        """Those of an enlargement: BT.709's matrix where a player that reads no tags would take it for that."""
        large = height >= 720 or width >= 1280
        matrix = 9 if self.matrix == 9 else 1 if large else self.matrix or 6
        return replace(self, matrix=matrix, full=self.full and self.matrix != 0)

    def weights(self) -> np.ndarray:
        """Luma weights of red, green and blue."""
        red, blue = _MATRICES[self.matrix]
        return np.array([red, 1 - red - blue, blue], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class FilmFrame:
    """One frame, upright.

    Attributes:
        pixels: uint16 (H, W, 3), RGB over the full range, with the film's own primaries and curve.
        pts: when it is shown, in the film's `time_base`; strictly rising.
        duration: how long, in the same unit.
    """

    pixels: np.ndarray
    pts: int
    duration: int

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """float32 (bottom - top, W, 3), 0..1."""
        return self.pixels[top:bottom].astype(np.float32) / np.float32(65535)


class Film:
    """A film to read. Its picture is the first video stream that is no cover.

    Attributes:
        height, width: of its frames, upright.
        colours: of its first frame.
        deep: it has more than 8 bits a channel.
        time_base: seconds that timestamps count.
        rate: frames a second, on average.
        aspect: width of a pixel over its height.
        count: how many frames the file says it has, or its duration comes to; None if it says neither.
        seconds: how long the file says it lasts; None if it does not.
        start: of the whole file's timestamps, in seconds.
        remarks: sentences about what will not be as one may expect.
        regular: every frame so far had a timestamp of its own, later than the one before.
        damaged: how many packets could not be decoded so far.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            ValueError: PyAV is not installed, or this is no film that can be read.
            OSError: the file cannot be opened.
        """
        self.path = Path(path)
        self.regular, self.damaged = True, 0
        with _opened(self.path) as container:
            stream = self._video(container)
            first = next(self._raw_frames(container, stream), None)
            if first is None:
                raise ValueError(f"{self.path} holds no frame that can be decoded.")
            try:
                self.colours = Colours.of(first)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from error
            self._coded_size = first.height, first.width
            self.height, self.width = _upright(np.empty(self._coded_size, bool), first).shape
            self.deep = max(component.bits for component in first.format.components) > 8
            self.time_base = Fraction(stream.time_base)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.aspect = 1 / aspect if _orientation(first)[0] else aspect
            known = [Fraction(container.duration, 10**6)] if container.duration else []
            known += [stream.duration * self.time_base] if stream.duration else []
            self.seconds = float(min(known)) if known else None
            self.count = stream.frames or (round(self.seconds * self.rate) if self.seconds else None)
            self.start = Fraction(container.start_time or 0, 10**6)
            self.remarks = self._remarks(first, sum(not _is_cover(stream) for stream in container.streams.video))

    def _remarks(self, first: Any, videos: int) -> list[str]:
        remarks = []
        if self.colours.transfer in _HDR:
            remarks.append(
                f"{self.path} is HDR ({_HDR[self.colours.transfer]}): its values are enlarged and tagged as they are,"
                " although models learn from SDR, and metadata of the mastering display is not kept."
            )
        if first.interlaced_frame:
            remarks.append(f"{self.path} is interlaced; its combs are enlarged unless it is deinterlaced first.")
        if any(component.is_alpha for component in first.format.components):
            remarks.append(f"{self.path} has transparency, which is not kept.")
        if videos > 1:
            remarks.append(f"{self.path} has {videos} video streams, of which the first is kept.")
        return remarks

    def frames(self, start: int = 0, pts: int | None = None) -> Iterator[FilmFrame]:
        """The frames from number `start` on, one at a time. As players do, packets that cannot be decoded are left out.

        Args:
            start: how many to leave out.
            pts: timestamp of the first one wanted, by which it is found without decoding all before it.

        Raises:
            ValueError: a frame has another size than the first.
            OSError: the file cannot be read on.
        """
        if start and pts is not None:
            frames = self._decoded(pts)
            found = next((frame for frame in frames if frame.pts >= pts), None)
            if found is not None and found.pts == pts:
                yield found
                yield from frames
                return
        yield from itertools.islice(self._decoded(None), start, None)

    def _decoded(self, pts: int | None) -> Iterator[FilmFrame]:
        """All frames, or those from some way before `pts` on."""
        self.regular, self.damaged = True, 0
        step = max(1, round(1 / (self.rate * self.time_base)))
        last: FilmFrame | None = None
        with _opened(self.path) as container:
            stream = self._video(container)
            if pts is not None:
                back = pts - round(_SEEK_BACK / self.time_base)
                if back > (stream.start_time or 0):
                    container.seek(back, stream=stream)
            for frame in self._raw_frames(container, stream):
                if (frame.height, frame.width) != self._coded_size:
                    height, width = self._coded_size
                    raise ValueError(
                        f"{self.path} changes its size from {width}x{height} to {frame.width}x{frame.height}; "
                        "cut it there and upscale the parts."
                    )
                time = frame.pts
                if time is None or (last is not None and time <= last.pts):
                    self.regular = False
                    time = 0 if last is None else last.pts + (last.duration if time is None else 1)
                pixels = np.ascontiguousarray(_upright(_rgb(frame, Colours.of(frame)), frame))
                last = FilmFrame(pixels, time, frame.duration or step)
                yield last

    def _video(self, container: Any) -> Any:
        videos = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not videos:
            raise ValueError(f"{self.path} holds no moving pictures.")
        videos[0].thread_type = "AUTO"
        return videos[0]

    def _raw_frames(self, container: Any, stream: Any) -> Iterator[Any]:
        from av.error import FFmpegError

        packets = container.demux(stream)
        packet: Any = ...
        while packet is not None:
            try:
                packet = next(packets, None)
            except FFmpegError as error:
                if isinstance(error, OSError):
                    raise
                packet = None  # the file is cut off
                self.damaged += 1
            if packet is None or (packet.size == 0 and packet.pts is not None):
                continue  # Theora repeats a frame by a packet without content
            try:
                yield from packet.decode()
            except FFmpegError:
                self.damaged += 1


class FilmWriter:
    """Writes an enlarged film in segments that outlive an interruption; a context manager.

    For every frame `begin(frame)`, then `write(rows)` from top to bottom, then `end()`. Segments lie in the folder
    `.{name}.segments` beside the result, each under its name once it is whole. Leaving without an error joins them,
    with sound, subtitles, covers, chapters and metadata of the source as they are, to the file under its final name,
    and removes the folder; with an error the finished segments stay.

    * Picture: H.264 in .mp4, .m4v, .mov and .mkv, VP9 in .webm; of sources with more than 8 bits H.265 and AV1 with 10,
      from 64 pixels a side on.
      Chroma has half the resolution. H.264 and H.265 cannot hold that with an odd side, and keep all of it there.
    * Timestamps, shape of a pixel, primaries, curve and range are the source's.

    Attributes:
        done: how many frames the finished segments hold.
        last: timestamp of the last of them, None where they cannot be told apart by it.
        notes: what was given to `end` with the last of them.
        remarks: sentences about what of the source does not fit into the result.
    """

    def __init__(
        self,
        film: Film,
        path: str | Path,
        size: tuple[int, int],
        *,
        quality: int = 95,
        settings: Any = None,
        resume: bool = False,
        segment_frames: int = SEGMENT_FRAMES,
    ) -> None:
        """
        Args:
            film: the source.
            path: the result, in an existing folder; its suffix is one of `VIDEO_OUTPUT_SUFFIXES`.
            size: height and width of the result.
            quality: 1..100; 95 is H.264's constant rate factor 16, and two less are one more of it.
            settings: what else the result depends on, as JSON can hold it.
            resume: go on after the segments that are there, if `settings`, the source and these arguments are the same.
            segment_frames: frames of a segment.

        Raises:
            ValueError: the suffix is another, sound or the shape of pixels does not fit into such a file, or the
                codec is not there or cannot hold pictures of this size.
            OSError: the folder cannot be written.
        """
        self.film, self.path, self.size = film, Path(path), size
        suffix = self.path.suffix.lower()
        if suffix not in VIDEO_OUTPUT_SUFFIXES:
            known = ", ".join(VIDEO_OUTPUT_SUFFIXES)
            raise ValueError(f"{path} has no suffix of a film that can be written; use one of {known}.")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be within 1..100, not {quality}.")
        if self.path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
        self._muxer = _MUXERS[suffix]
        if self._muxer == "webm" and film.aspect != 1:
            raise ValueError(
                f"{film.path} has pixels that are not square, which PyAV cannot say in .webm: name a result that ends"
                " with .mp4 or .mkv."
            )
        self._codec, self._pixel_format, self._options = _encoder(self._muxer, film.deep, size, quality)
        self._colours = film.colours.of_result(*size)
        self.remarks: list[str] = []
        self._kept = self._streams_that_fit()
        self._check_encoder()
        self._folder = self.path.with_name(f".{self.path.name}.segments")
        self._segment_frames = segment_frames
        self._segment: _Segment | None = None

        status = film.path.stat()
        plan = {
            "source": [str(film.path.resolve()), status.st_size, status.st_mtime_ns],
            "result": [*size, self._codec, self._pixel_format, self._options],
            "segment_frames": segment_frames,
            "settings": settings,
        }
        self._plan = json.dumps(plan, indent=1)
        self._segments: list[dict[str, Any]] = []
        plan_file = self._folder / "settings.json"
        if resume and plan_file.is_file() and plan_file.read_text(encoding="utf-8") == self._plan:
            while (finished := self._file(len(self._segments))).is_file():
                self._segments.append(json.loads(finished.with_suffix(".json").read_text(encoding="utf-8")))
        else:
            self.restart()

    def restart(self) -> None:
        """Give up the segments that are there."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._segments = []
        _write_whole(self._folder / "settings.json", self._plan)

    @property
    def done(self) -> int:
        return sum(len(segment["pts"]) for segment in self._segments)

    @property
    def last(self) -> int | None:
        return self._segments[-1]["pts"][-1] if self._segments and self._segments[-1]["regular"] else None

    @property
    def notes(self) -> Any:
        return self._segments[-1]["notes"] if self._segments else None

    def __enter__(self) -> FilmWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._segment is not None:
                self._segment.close()
            return
        if self._segment is not None:
            self._finish_segment()
        if not self._segments:
            raise ValueError(f"{self.film.path} holds no frame that can be decoded.")
        with _writing(self.path):
            self._join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self, frame: FilmFrame) -> None:
        """The next frame of the source is to come, enlarged."""
        if self._segment is None:
            part = self._file(len(self._segments)).with_suffix(".nut.part")
            self._segment = _Segment(part, self._add_video, self._colours)
        self._segment.begin(frame, self.size, self._pixel_format)

    def write(self, rows: np.ndarray) -> None:
        """The next rows of the frame: float32 (n, W, 3), 0..1; values outside are clipped."""
        assert self._segment is not None
        self._segment.write(rows)

    def end(self, notes: Any = None) -> None:
        """The frame is whole.

        Args:
            notes: kept with the segment that this frame ends, for whoever goes on after it, as JSON can hold it.
        """
        assert self._segment is not None
        with _writing(self.path):
            self._segment.end()
        self._segment.notes = notes
        if len(self._segment.pts) == self._segment_frames:
            self._finish_segment()

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.nut"

    def _finish_segment(self) -> None:
        segment, self._segment = self._segment, None
        assert segment is not None
        with _writing(self.path):
            segment.flush()
        about = {
            "pts": segment.pts,
            "end": segment.until,
            "order": segment.order,
            "regular": self.film.regular,
            "notes": segment.notes,
        }
        finished = self._file(len(self._segments))
        _write_whole(finished.with_suffix(".json"), json.dumps(about))
        os.replace(segment.path, finished)
        self._segments.append(about)

    def _add_video(self, container: Any) -> Any:
        """The stream that is encoded."""
        options = dict(self._options)
        if self._codec == "libx264" and _has_avx512():
            # x264 of 2025 (core 165) encodes the same frames to other bits from run to run where its macroblock tree is
            # computed with AVX-512; a film that was interrupted is to end as one that was not.
            options["x264-params"] = "asm=avx2"
        try:
            stream = container.add_stream(self._codec, rate=self.film.rate, options=options)
        except ValueError as error:  # the codec is unknown
            raise ValueError(f"this PyAV has no {self._codec}, which {self.path} needs.") from error
        stream.height, stream.width = self.size
        stream.pix_fmt = self._pixel_format
        # One tick a frame: codecs note this rate, and the file's timestamps are those of the source anyway.
        context = stream.codec_context
        context.time_base = 1 / self.film.rate
        context.sample_aspect_ratio = self.film.aspect
        context.colorspace, context.color_range = self._colours.matrix, 2 if self._colours.full else 1
        context.color_primaries, context.color_trc = self._colours.primaries, self._colours.transfer
        return stream

    def _check_encoder(self) -> None:
        """A codec that refuses says so now, not after the first frame has been enlarged."""
        av = _av()
        height, width = self.size
        try:
            with av.open(io.BytesIO(), "w", format="nut") as container:
                self._add_video(container)
                container.start_encoding()
        except av.error.FFmpegError as error:
            raise ValueError(
                f"{self.path} is not written because {self._codec} cannot encode {width}x{height} pixels: choose a"
                " smaller --upscale."
            ) from error

    def _streams_that_fit(self) -> list[int]:
        """Indices of the source's other streams that can be copied into the result."""
        av = _av()
        kept = []
        with _opened(self.film.path) as source:
            for stream in source.streams:
                if stream.type not in ("audio", "subtitle", "attachment") and not _is_cover(stream):
                    continue
                try:
                    with av.open(io.BytesIO(), "w", format=self._muxer) as container:
                        _copy_stream(container, stream)
                        container.start_encoding()
                except (ValueError, av.error.FFmpegError) as error:
                    kind = "cover" if _is_cover(stream) else {"audio": "sound"}.get(stream.type, stream.type)
                    codec = stream.codec_context.name if stream.codec_context else "unknown"
                    sentence = f"the {kind} ({codec}) of {self.film.path} does not fit into {self.path.suffix}"
                    if stream.type == "audio":
                        mend = "name a result that ends with .mkv."
                        if self._muxer == "matroska":
                            mend = f"convert it first: ffmpeg -i {self.film.path.name} -c copy -c:a flac converted.mkv."
                        raise ValueError(f"{sentence}: {mend}") from error
                    self.remarks.append(f"{sentence} and is left out.")
                else:
                    kept.append(stream.index)
        return kept

    def _join(self) -> None:
        av = _av()
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.part")
        options = {"movflags": "+faststart"} if self._muxer in ("mp4", "mov") else {}
        try:
            with (
                _opened(self.film.path) as source,
                av.open(f"file:{temporary}", "w", format=self._muxer, options=options) as result,
            ):
                for key, value in source.metadata.items():
                    if key.lower() not in _OWN_METADATA:
                        result.metadata[key] = value
                # The encoder again, which gives the file the headers that all segments share.
                video = self._add_video(result)
                video.time_base = self.film.time_base
                if self._codec == "libx265" and self._muxer != "matroska":
                    video.codec_tag = "hvc1"  # what Apple's players look for
                copies = {index: _copy_stream(result, source.streams[index]) for index in self._kept}
                chapters = source.chapters()
                for chapter in chapters:
                    shift = round(self.film.start / chapter["time_base"])
                    chapter["start"], chapter["end"] = chapter["start"] - shift, chapter["end"] - shift
                result.set_chapters(chapters)
                packets = heapq.merge(
                    self._video_packets(video),
                    self._other_packets(source, copies),
                    key=lambda packet: packet.dts * packet.time_base,
                )
                for packet in packets:
                    result.mux(packet)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _video_packets(self, stream: Any) -> Iterator[Any]:
        """Of all segments, as if they were one.

        Encoders make up the decoding times of the first frames, which would run into the segment before. Here they are
        the times of presentation, as many frames earlier as it takes.
        """
        shift = round(self.film.start / self.film.time_base)
        shown = [pts - shift for segment in self._segments for pts in segment["pts"]]
        ends = iter([*shown[1:], self._segments[-1]["end"] - shift])
        early = max(place - frame for segment in self._segments for place, frame in enumerate(segment["order"]))
        step = max(1, round(1 / (self.film.rate * self.film.time_base)))
        decoded = itertools.chain((shown[0] - step * number for number in range(early, 0, -1)), shown)
        for number, segment in enumerate(self._segments):
            spans = [(pts - shift, next(ends)) for pts in segment["pts"]]
            with _opened(self._file(number)) as container:
                packets = [packet for packet in container.demux(video=0) if packet.size]
            if len(packets) != len(spans):
                raise ValueError(f"{self._file(number)} is damaged: upscale the film anew, without --resume.")
            for packet, frame in zip(packets, segment["order"], strict=True):
                packet.time_base, packet.dts = self.film.time_base, next(decoded)
                packet.pts, until = spans[frame]
                packet.duration = until - packet.pts
                packet.stream = stream
                yield packet

    def _other_packets(self, source: Any, copies: dict[int, Any]) -> Iterator[Any]:
        wanted = [source.streams[index] for index in copies if source.streams[index].type != "attachment"]
        if not wanted:
            return
        for packet in source.demux(wanted):
            if packet.size == 0:
                continue
            if packet.dts is None:  # a cover has no time at all
                packet.dts = packet.pts or 0
            shift = round(self.film.start / packet.time_base)
            packet.dts -= shift
            packet.pts = packet.dts if packet.pts is None else packet.pts - shift
            packet.stream = copies[packet.stream.index]
            yield packet


class _Segment:
    """Some frames, encoded into a file of their own."""

    def __init__(self, path: Path, add_video: Callable[[Any], Any], colours: Colours) -> None:
        self.path = path
        # NUT keeps timestamps of any time base as they are.
        self._container = _av().open(f"file:{path}", "w", format="nut")
        self._stream = add_video(self._container)
        self._colours = colours
        self._canvas: _Canvas | None = None
        self.pts: list[int] = []
        self.until = 0
        self.notes: Any = None
        self.order: list[int] = []

    def begin(self, frame: FilmFrame, size: tuple[int, int], pixel_format: str) -> None:
        self._canvas = _Canvas(size, pixel_format, self._colours)
        self.pts.append(frame.pts)
        self.until = frame.pts + frame.duration

    def write(self, rows: np.ndarray) -> None:
        assert self._canvas is not None
        self._canvas.write(rows)

    def end(self) -> None:
        assert self._canvas is not None
        frame = self._canvas.finished()
        frame.pts, frame.time_base = len(self.pts) - 1, self._stream.codec_context.time_base
        self._mux(self._stream.encode(frame))
        self._canvas = None

    def flush(self) -> None:
        self._mux(self._stream.encode(None))
        self.close()

    def close(self) -> None:
        self._container.close()

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            self.order.append(packet.pts)
            self._container.mux(packet)


class _Canvas:
    """A frame of the result that fills up row by row."""

    def __init__(self, size: tuple[int, int], pixel_format: str, colours: Colours) -> None:
        self._frame = _av().VideoFrame(size[1], size[0], pixel_format)
        self._colours = colours
        self._bits = self._frame.format.components[0].bits
        self._chroma = np.empty((2, *size), np.float32)
        self._filled = 0

    def write(self, rows: np.ndarray) -> None:
        height, width = self._chroma.shape[1:]
        bottom = self._filled + len(rows)
        if rows.shape[1:] != (width, 3) or bottom > height:
            raise ValueError(
                f"rows must be (n, {width}, 3) and {height} in all, not {rows.shape} after {self._filled}."
            )
        rows = np.clip(rows, 0, 1)
        red, green, blue = self._colours.weights()
        luma = rows @ np.array([red, green, blue], np.float32)
        self._chroma[0, self._filled : bottom] = (rows[..., 2] - luma) / (2 * (1 - blue))
        self._chroma[1, self._filled : bottom] = (rows[..., 0] - luma) / (2 * (1 - red))
        scale, zero = _coding(self._bits, self._colours.full, chroma=False)
        plane = _plane(self._frame, 0, self._bits)
        plane[self._filled : bottom] = np.rint(luma * scale + zero)
        self._filled = bottom

    def finished(self) -> Any:
        """The `av.VideoFrame`."""
        if self._filled != self._chroma.shape[1]:
            raise ValueError(f"{self._filled} of {self._chroma.shape[1]} rows of a frame were written.")
        scale, zero = _coding(self._bits, self._colours.full, chroma=True)
        for index in (1, 2):
            plane = _plane(self._frame, index, self._bits)
            chroma = _reduced(self._chroma[index - 1], plane.shape)
            plane[:] = np.clip(np.rint(chroma * scale + zero), 0, 2**self._bits - 1)
        context = self._colours
        self._frame.colorspace, self._frame.color_range = context.matrix, 2 if context.full else 1
        return self._frame


def _coding(bits: int, full: bool, chroma: bool) -> tuple[float, float]:
    """What to multiply by and to add, from Y of 0..1 or Cb and Cr of -0.5..0.5 to numbers of that many bits."""
    unit = 2 ** (bits - 8)
    scale = 2**bits - 1 if full else (224 if chroma else 219) * unit
    return scale, 128 * unit if chroma else 0 if full else 16 * unit


def _plane(frame: Any, index: int, bits: int) -> np.ndarray:
    """A plane of an `av.VideoFrame` as an array that shares its memory."""
    plane = frame.planes[index]
    values = np.frombuffer(plane, np.uint8 if bits <= 8 else np.dtype("<u2"))
    return values.reshape(plane.height, -1)[:, : plane.width]


def _rgb(frame: Any, colours: Colours) -> np.ndarray:
    """uint16 (H, W, 3), full range, of an `av.VideoFrame`."""
    pixel_format = frame.format
    bits = max(component.bits for component in pixel_format.components)
    planar = len({component.plane for component in pixel_format.components}) == len(pixel_format.components)
    planar = planar and not pixel_format.is_big_endian and not pixel_format.is_bit_stream
    if colours.matrix == 0 and not (planar and pixel_format.name.startswith("gbr") and bits <= 16):
        array = frame.reformat(format="rgb24" if bits <= 8 else "rgb48le").to_ndarray()
        return array.astype(np.uint16) * 257 if array.dtype == np.uint8 else array
    if colours.matrix != 0 and not planar:
        # The same numbers in planes.
        luma, *chroma = pixel_format.components
        ratio = (round(luma.width / chroma[0].width), round(luma.height / chroma[0].height)) if chroma else (0, 0)
        sampling = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (4, 1): "411", (4, 4): "410", (1, 2): "440"}[ratio]
        frame = frame.reformat(format=f"yuv{sampling}p" if bits <= 8 else f"yuv{sampling}p{bits}le")
    planes = [_plane(frame, index, bits) for index in range(min(3, len(frame.planes)))]
    if colours.matrix == 0:
        rgb = np.stack([planes[2], planes[0], planes[1]], axis=2) / np.float32(2**bits - 1)
    else:
        scale, zero = _coding(bits, colours.full, chroma=False)
        y = (planes[0].astype(np.float32) - np.float32(zero)) / np.float32(scale)
        if len(planes) == 1:
            rgb = np.repeat(y[..., None], 3, axis=2)
        else:
            scale, zero = _coding(bits, colours.full, chroma=True)
            cb, cr = (
                (_enlarged(plane.astype(np.float32), y.shape) - np.float32(zero)) / np.float32(scale)
                for plane in planes[1:]
            )
            red, green, blue = colours.weights()
            r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
            rgb = np.stack([r, (y - red * r - blue * b) / green, b], axis=2)
    return np.rint(np.clip(rgb, 0, 1) * np.float32(65535)).astype(np.uint16)


# Samples of chroma lie on the left one of the pixels they belong to, and between rows, which is what MPEG-2, H.264 and
# H.265 have where a film does not say otherwise. Pillow's box says where in the picture resizing begins; what is
# outside is the border repeated.
def _enlarged(chroma: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Chroma (h, w) at the size of luma, float32."""
    height, width = chroma.shape
    ratios = round(size[0] / height), round(size[1] / width)
    if ratios == (1, 1):
        return chroma
    left = 1 + 0.5 - 0.5 / ratios[1]
    padded = Image.fromarray(np.pad(chroma, ((0, 0), (1, 1)), mode="edge"))
    whole = padded.resize(
        (width * ratios[1], height * ratios[0]), Image.Resampling.BICUBIC, (left, 0, left + width, height)
    )
    return np.asarray(whole)[: size[0], : size[1]]


def _reduced(chroma: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Chroma of every pixel (H, W) at half the resolution or as it is, float32."""
    height, width = chroma.shape
    if size == chroma.shape:
        return chroma
    ratio = round(width / size[1])
    left = 2 - (ratio - 1) / 2
    rows, columns = size[0] * ratio - height, size[1] * ratio - width
    padded = Image.fromarray(np.pad(chroma, ((0, rows), (2, columns + 2)), mode="edge"))
    small = padded.resize(
        (size[1], size[0]), Image.Resampling.BICUBIC, (left, 0, left + size[1] * ratio, size[0] * ratio)
    )
    return np.asarray(small)


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Whether to swap rows and columns of a frame, and then to reverse its rows, and its columns, to see it upright."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    (a, b), (c, d) = np.frombuffer(matrix, np.int32)[:9].reshape(3, 3)[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    swap, rows, columns = _orientation(frame)
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def _encoder(muxer: str, deep: bool, size: tuple[int, int], quality: int) -> tuple[str, str, dict[str, str]]:
    """Codec, pixel format, and options of the codec."""
    deep = deep and min(size) >= _LEAST_DEEP
    factor = min(51.0, (127 - quality) / 2)
    # Codecs hold as many frames to look ahead, uncompressed; 8K has nine of 50 MB.
    ahead = max(4, min(25, _AHEAD_PIXELS // (size[0] * size[1])))
    if muxer == "webm":
        crf = str(round(factor * 63 / 51))
        if deep:
            os.environ.setdefault("SVT_LOG", "1")  # errors alone
            return "libsvtav1", "yuv420p10le", {"crf": crf, "preset": "8", "svtav1-params": f"lookahead={ahead}"}
        speed = {"deadline": "good", "cpu-used": "2", "row-mt": "1"}
        return "libvpx-vp9", "yuv420p", {"crf": crf, "b": "0", "lag-in-frames": str(ahead), **speed}
    pixel_format = ("yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p") + ("10le" if deep else "")
    if deep:
        parameters = f"log-level=none:rc-lookahead={ahead}:bframes=3"
        return "libx265", pixel_format, {"crf": str(factor), "preset": "medium", "x265-params": parameters}
    return "libx264", pixel_format, {"crf": str(factor), "preset": "medium", "rc-lookahead": str(ahead)}


def _has_avx512() -> bool:
    """Whether numpy finds AVX-512 (and with it AVX2) in this processor; False where it does not say."""
    try:
        found = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
    except (ImportError, AttributeError):
        return False
    return bool(found.get("AVX512F"))


def _copy_stream(container: Any, template: Any) -> Any:
    if template.type == "attachment":
        return container.add_attachment(template.name or "attachment", template.mimetype or "", template.data)
    stream = container.add_stream_from_template(template)
    stream.metadata.update(template.metadata)
    stream.disposition = template.disposition
    return stream


def _is_cover(stream: Any) -> bool:
    return stream.type == "video" and bool(stream.disposition & type(stream.disposition).attached_pic)


def _is_rgb(pixel_format: Any) -> bool:
    return pixel_format.is_rgb or pixel_format.has_palette


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An `av` container to read; a local file alone, whatever its name or content says."""
    av = _av()
    try:
        container = av.open(f"file:{path}", metadata_errors="replace", options={"protocol_whitelist": "file"})
    except OSError:
        raise
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is not a film that can be read.") from error
    with container:
        yield container


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What FFmpeg says, as an `OSError` that names the file."""
    try:
        yield
    except OSError:
        raise
    except _av().error.FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _av() -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise ValueError("films need PyAV: pip install 'tsdsr[video]'.") from error
    return av
