"""Films: what of them is read, what is written, and that an interruption changes nothing."""

import itertools
import json
import os
import socket
import struct
import sys
from fractions import Fraction

import numpy as np
import psutil
import pytest

av = pytest.importorskip("av")

from tsdsr.imaging.video import Colours, Film, FilmWriter  # noqa: E402

WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
MATRIX_AT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def add_frame(stream, container, planes, pts, deep=False):
    """Encode one frame of three planes of integers."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, stream.pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=True):
        array = np.frombuffer(plane, np.uint16 if deep else np.uint8).reshape(plane.height, -1)
        array[:, : values.shape[1]] = values
    frame.pts, frame.time_base = pts, Fraction(1, 25)
    container.mux(stream.encode(frame))


def save(path, planes, codec="ffv1", pixel_format="yuv444p", matrix=2, full=None, others=2, pts=None, options=None):
    """A film of frames that are given as planes of Y, Cb and Cr; 25 ticks a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = planes[0][0].shape
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = matrix, others, others
        if full is not None:
            context.color_range = 2 if full else 1
        for number, frame in enumerate(planes):
            add_frame(stream, container, frame, number if pts is None else pts[number], pixel_format.endswith("10le"))
        container.mux(stream.encode(None))
    return path


def random_planes(count, height=24, width=32, seed=0):
    """Smooth noise that changes from frame to frame, limited range, 4:2:0."""
    rng = np.random.default_rng(seed)

    def smooth(rows, columns):
        small = rng.integers(40, 200, (3, 4)).astype(np.float32)
        return np.kron(small, np.ones((-(-rows // 3), -(-columns // 4))))[:rows, :columns].astype(np.uint8)

    half = (height + 1) // 2, (width + 1) // 2
    return [(smooth(height, width), smooth(*half), smooth(*half)) for _ in range(count)]


@pytest.fixture
def film(tmp_path):
    """A function that saves a film with sound: `film(name, frames=12, rate=25)`; B-frames, several keyframes."""

    def make(name="film.mp4", frames=12, audio="aac", tracks=1, subtitles=False):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"g": "5", "bf": "2", "crf": "10"})
            stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
            sounds = [container.add_stream(audio, rate=48000) for _ in range(tracks)]
            for language, sound in zip(("deu", "eng"), sounds, strict=False):
                sound.metadata["language"] = language
            container.metadata["title"] = "A film"
            container.set_chapters(
                [{"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {"title": "one"}}]
            )
            for number, planes in enumerate(random_planes(frames)):
                add_frame(stream, container, planes, number)
            container.mux(stream.encode(None))
            for pitch, sound in enumerate(sounds, 1):
                size = sound.codec_context.frame_size or 1024
                for start in range(0, frames * 1920, size):
                    tone = np.sin(np.arange(start, start + size, dtype=np.float32) * 0.05 * pitch)[None]
                    layout = sound.codec_context.format.name
                    frame = av.AudioFrame.from_ndarray(np.repeat(tone, 2, 0), format="fltp", layout="stereo")
                    frame.sample_rate, frame.pts = 48000, start
                    for ready in av.AudioResampler(layout, "stereo", 48000).resample(frame):
                        container.mux(sound.encode(ready))
                container.mux(sound.encode(None))
        return path

    return make


def write(source, path, factor=2, stop=None, **options):
    """Each pixel repeated; `stop` frames and then an error."""
    source = source if isinstance(source, Film) else Film(source)
    size = round(factor * source.height), round(factor * source.width)
    with FilmWriter(source, path, size, segment_frames=5, **options) as writer:
        for frame in itertools.islice(source.frames(writer.done, writer.last if writer.done else None), 0, None):
            if writer.done and frame.pts == writer.last:
                continue
            if stop is not None and len(writer._segments) * 5 >= stop:
                raise InterruptedError
            writer.begin(frame)
            rows = frame.rows(0, frame.height)[np.arange(size[0]) * frame.height // size[0]]
            rows = rows[:, np.arange(size[1]) * frame.width // size[1]]
            for top in (0, 7, 8):  # strips of any height
                writer.write(rows[top : {0: 7, 7: 8}.get(top)])
            writer.end({"seen": frame.pts})
    return path


def pixels(path):
    return [frame.pixels for frame in Film(path).frames()]


def times(path):
    film = Film(path)
    return [float(frame.pts * film.time_base) for frame in film.frames()]


def packets(path, kind):
    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        found = {stream.index: [] for stream in streams}
        for packet in container.demux(streams):
            if packet.size:
                found[packet.stream.index].append((bytes(packet), float(packet.pts * packet.time_base)))
        return list(found.values())


# Reading


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_colours_are_read_by_matrix_and_range(tmp_path, matrix, full, bits):
    unit, top = 2 ** (bits - 8), 2**bits - 1
    rng = np.random.default_rng(0)
    y, cb, cr = (rng.integers(low * unit, high * unit, (8, 16)) for low, high in ((90, 160), (110, 146), (110, 146)))
    name = save(
        tmp_path / "film.mkv", [(y, cb, cr)], pixel_format="yuv444p" + ("10le" if bits == 10 else ""),
        matrix=matrix, full=full, others=1,
    )  # fmt: skip
    film = Film(name)
    assert film.colours == Colours(matrix, full, 1, 1) and film.deep == (bits == 10)
    red, blue = WEIGHTS[matrix]
    y = y / top if full else (y - 16 * unit) / (219 * unit)
    cb, cr = ((c - 128 * unit) / (top if full else 224 * unit) for c in (cb, cr))
    r, b = y + (2 - 2 * red) * cr, y + (2 - 2 * blue) * cb
    expected = np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=2)
    [frame] = film.frames()
    assert (frame.height, frame.width) == (8, 16)
    assert np.abs(frame.rows(0, 8) - expected.clip(0, 1)).max() < 2e-5
    assert frame.rows(2, 5).dtype == np.float32 and frame.rows(2, 5).flags.c_contiguous
    assert np.array_equal(frame.rows(2, 5), frame.rows(0, 8)[2:5])


@pytest.mark.parametrize(("height", "width", "expected"), [(24, 32, 6), (576, 720, 5), (720, 1280, 1), (48, 1280, 1)])
def test_what_is_not_said_is_taken_as_players_take_it(tmp_path, height, width, expected):
    planes = [tuple(np.full((height, width), 128, np.uint8) for _ in range(3))]
    colours = Film(save(tmp_path / "film.mkv", planes)).colours
    assert colours.matrix == expected and not colours.full
    assert colours.primaries == {576: 5}.get(height, 1)


def test_chroma_lies_where_it_is_said_to_lie(tmp_path):
    # A ramp of 4 a pixel: a sample of chroma belongs to the left one of two pixels, and between two rows.
    height, width = 16, 32
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    cb, cr = (64 + 4 * columns)[::2, ::2], ((64 + 4 * rows)[::2, ::2] + (64 + 4 * rows)[1::2, ::2]) / 2
    source = save(
        tmp_path / "film.mkv",
        [(np.full((height, width), 128, np.uint8), cb.astype(np.uint8), cr.astype(np.uint8))],
        pixel_format="yuv420p",
        matrix=6,
    )
    [frame] = Film(source).frames()
    rgb = frame.rows(0, height).astype(np.float64)
    luma = rgb @ (0.299, 0.587, 0.114)
    read = [128 + 224 * (rgb[..., channel] - luma) / scale for channel, scale in ((2, 1.772), (0, 1.402))]
    inside = slice(4, -4)
    assert np.abs(read[0] - (64 + 4 * columns))[inside, inside].max() < 0.3
    assert np.abs(read[1] - (64 + 4 * rows))[inside, inside].max() < 0.3
    # and comes back to where it was
    write(source, tmp_path / "same.mkv", factor=1, quality=100)
    with av.open(str(tmp_path / "same.mkv")) as container:
        again = next(container.decode(video=0)).to_ndarray()
    written = again[height:].reshape(2, height // 2, width // 2).astype(float)
    assert np.abs(written - np.stack([cb, cr]))[:, 2:-2, 2:-2].max() <= 2


@pytest.mark.parametrize("pixel_format", ["nv12", "yuyv422", "gbrp10le", "bgr0", "gray", "pal8", "yuva420p", "rgb24"])
def test_other_layouts_hold_the_same_picture(tmp_path, pixel_format):
    colour = np.full((8, 16, 3), (130, 130, 130) if pixel_format == "gray" else (200, 120, 40), np.uint8)
    codec = {"bgr0": "ffv1", "gbrp10le": "ffv1", "gray": "ffv1", "yuva420p": "ffv1", "pal8": "qtrle"}
    with av.open(str(tmp_path / "film.mov" if pixel_format == "pal8" else tmp_path / "film.nut"), "w") as container:
        stream = container.add_stream(codec.get(pixel_format, "rawvideo"), rate=25)
        stream.height, stream.width = 8, 16
        stream.pix_fmt = "rgb24" if pixel_format == "pal8" else pixel_format
        container.mux(stream.encode(av.VideoFrame.from_ndarray(colour, format="rgb24")))
        container.mux(stream.encode(None))
    [path] = tmp_path.iterdir()
    film = Film(path)
    [frame] = film.frames()
    assert np.abs(255 * frame.rows(0, 8) - colour).max() < 3, pixel_format
    assert any("transparency" in remark for remark in film.remarks) == (pixel_format == "yuva420p")


def test_ten_bits_are_read_without_a_step_over_eight(tmp_path):
    ramp = np.tile(np.arange(400, 528, dtype=np.uint16), (32, 1))
    grey = np.full_like(ramp, 512)
    source = save(tmp_path / "film.mkv", [(ramp, grey, grey)], pixel_format="yuv444p10le")
    [frame] = Film(source).frames()
    assert len(np.unique(frame.pixels[0, :, 1])) == 128
    write(source, tmp_path / "result.mp4", quality=100)
    with av.open(str(tmp_path / "result.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.format.name) == ("hevc", "yuv420p10le")
        assert stream.codec_tag == "hvc1"
        plane = next(container.decode(stream)).planes[0]
    luma = np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width]
    assert len(np.unique(luma)) > 64 and np.abs(luma - np.repeat(ramp[0], 2).astype(int)).max() <= 8


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_are_upright(film, tmp_path, degrees, mirrored):
    path = film()
    plain = pixels(path)[0]
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]  # clockwise, y downwards
    a, b, c, d = cos, sin, -sin, cos
    if mirrored:
        a, c = -a, -c
    data = path.read_bytes()
    identity = struct.pack(">9i", *MATRIX_AT)
    turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))  # the movie's own matrix comes before, and is left alone
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])
    expected = np.rot90(plain, -degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    shown = Film(path)
    assert np.array_equal(next(shown.frames()).pixels, expected)
    assert (shown.height, shown.width) == expected.shape[:2]
    write(path, tmp_path / "result.mp4")
    assert Film(tmp_path / "result.mp4").height == 2 * shown.height


def test_a_frame_is_found_again_by_its_time(film, monkeypatch):
    path = film(frames=400)
    source = Film(path)
    every = [(frame.pts, frame.pixels) for frame in source.frames()]
    assert source.regular and len(every) == source.count == 400
    decoded = []
    raw = Film._raw_frames
    monkeypatch.setattr(Film, "_raw_frames", lambda *args: (decoded.append(1) or frame for frame in raw(*args)))
    for start in (1, 399):
        decoded.clear()
        again = list(source.frames(start, every[start][0]))
        assert [frame.pts for frame in again] == [pts for pts, _ in every[start:]]
        assert all(np.array_equal(frame.pixels, one) for frame, (_, one) in zip(again, every[start:], strict=True))
    assert len(decoded) < 300  # of the last: 10 seconds and what follows
    # A time that no frame has: found by counting.
    assert next(source.frames(300, every[300][0] + 1)).pts == every[300][0]


def test_timestamps_that_are_missing_or_fall_are_mended(film, monkeypatch):
    source = Film(film())
    raw = Film._raw_frames

    def broken(*args):
        for number, frame in enumerate(raw(*args)):
            if number in (3, 4):
                frame.pts = None
            if number == 7:
                frame.pts = 10
            yield frame

    monkeypatch.setattr(Film, "_raw_frames", broken)
    found = [frame.pts for frame in source.frames()]
    assert all(before < after for before, after in itertools.pairwise(found)) and len(found) == 12
    assert found[3:5] == [3 * 512, 4 * 512] and not source.regular


# What is not a film


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, film, one_sentence):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(20000))
    whole = film().read_bytes()
    (tmp_path / "headless.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("empty.mp4", "noise.mkv", "headless.mp4"):
        with pytest.raises(ValueError) as error:
            Film(tmp_path / name)
        one_sentence(error.value, name, "not a film")
    with pytest.raises(FileNotFoundError):
        Film(tmp_path / "absent.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with pytest.raises(ValueError) as error:
        Film(tmp_path / "sound.mp4")
    one_sentence(error.value, "sound.mp4", "no moving pictures")


def test_a_film_that_is_cut_off_gives_what_is_there(tmp_path, film):
    whole = film("film.mkv", frames=60)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    cut = pixels(tmp_path / "cut.mkv")
    assert 20 < len(cut) < 60
    for one, other in zip(cut[:-3], pixels(whole), strict=False):
        assert np.array_equal(one, other)
    write(tmp_path / "cut.mkv", tmp_path / "result.mkv")
    assert len(pixels(tmp_path / "result.mkv")) == len(cut)


def test_packets_that_cannot_be_decoded_are_left_out(tmp_path):
    planes = random_planes(12)
    path = save(tmp_path / "film.avi", planes, codec="mjpeg", pixel_format="yuvj420p")
    data = bytearray(path.read_bytes())
    at = [index for index in range(len(data)) if data[index : index + 2] == b"\xff\xd8"][6]
    data[at : at + 600] = bytes(600)
    path.write_bytes(data)
    source = Film(path)
    assert len(list(source.frames())) == 11 and source.damaged == 1


def test_a_playlist_opens_no_connection(tmp_path, one_sentence):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "film.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}\n#EXT-X-ENDLIST\n")
        with pytest.raises(ValueError) as error:
            Film(tmp_path / "film.mp4")
        one_sentence(error.value, "film.mp4")
        with pytest.raises(TimeoutError):
            server.accept()


def test_films_that_change_their_size_are_refused(tmp_path, one_sentence):
    parts = [save(tmp_path / f"{side}.ts", random_planes(3, side, side), "mpeg2video", "yuv420p") for side in (32, 64)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(ValueError) as error:
        list(Film(tmp_path / "both.ts").frames())
    one_sentence(error.value, "32x32", "64x64")


def test_films_need_pyav(monkeypatch, tmp_path, one_sentence):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError) as error:
        Film(tmp_path / "film.mp4")
    one_sentence(error.value, "pip install 'tsdsr[video]'")


# Writing


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.mov"])
def test_all_else_of_the_file_is_kept(film, tmp_path, name):
    source = film(name, tracks=2)
    result = write(source, tmp_path / ("result" + source.suffix))
    assert np.allclose(times(result), times(source), atol=1e-6)
    before, after = packets(source, "audio"), packets(result, "audio")
    assert len(after) == 2
    for track_before, track_after in zip(before, after, strict=True):
        assert [data for data, _ in track_after] == [data for data, _ in track_before]
        assert np.allclose([pts for _, pts in track_after], [pts for _, pts in track_before], atol=1e-6)
    with av.open(str(result)) as container:
        assert container.metadata["title"] == "A film"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["one"]
        with av.open(str(source)) as original:
            languages = [stream.language for stream in original.streams.audio]
        assert "eng" in languages and [stream.language for stream in container.streams.audio] == languages
        assert container.streams.video[0].average_rate == 25
    enlarged = pixels(result)
    for one, other in zip(pixels(source), enlarged, strict=True):
        assert np.abs(one.repeat(2, 0).repeat(2, 1).astype(float) - other)[2:-2, 2:-2].mean() / 257 < 6
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, result.name])


def test_frames_keep_their_times(tmp_path):
    pts = [3, 4, 9, 10, 30, 31, 32, 60, 61, 90, 91]
    source = save(tmp_path / "film.mkv", random_planes(11), pixel_format="yuv420p", pts=pts)
    assert np.allclose(times(source), np.array(pts) / 25, atol=1e-3)
    for suffix in (".mp4", ".mkv"):
        result = write(source, tmp_path / f"result{suffix}")
        # The file begins with its first frame, as FFmpeg has it.
        assert np.allclose(np.subtract(times(result), times(result)[0]), np.subtract(times(source), times(source)[0]))
    with av.open(str(tmp_path / "result.mp4")) as container:
        decoding = [packet.dts for packet in container.demux(video=0) if packet.size]
    assert decoding == sorted(set(decoding))


def test_sound_and_picture_stay_together_where_the_clock_does_not_begin_at_zero(film, tmp_path):
    with av.open(str(film())) as source, av.open(str(tmp_path / "film.ts"), "w") as container:
        streams = {stream.index: container.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.dts += round(2 / packet.time_base)
                packet.pts += round(2 / packet.time_base)
                packet.stream = streams[packet.stream.index]
                container.mux(packet)
    source = tmp_path / "film.ts"
    result = write(source, tmp_path / "result.mkv")
    assert times(source)[0] >= 2 > times(result)[0]
    apart = [times(path)[0] - packets(path, "audio")[0][0][1] for path in (source, result)]
    assert abs(apart[0] - apart[1]) < 2e-3
    # Without the seven bytes before each packet that only streams such as .ts have.
    assert [data[7:] for data, _ in packets(source, "audio")[0]] == [data for data, _ in packets(result, "audio")[0]]


@pytest.mark.parametrize(
    ("suffix", "pixel_format", "size", "expected"),
    [
        (".mp4", "yuv420p", (24, 32), ("h264", "yuv420p")),
        (".mov", "yuv420p", (25, 32), ("h264", "yuv444p")),
        (".mkv", "yuv420p10le", (64, 65), ("hevc", "yuv444p10le")),
        (".mkv", "yuv420p10le", (24, 34), ("h264", "yuv420p")),
        (".webm", "yuv420p", (25, 33), ("vp9", "yuv420p")),
        (".webm", "yuv420p10le", (64, 64), ("av1", "yuv420p10le")),
    ],
)
def test_codec_and_size(tmp_path, suffix, pixel_format, size, expected):
    planes = [tuple(p.astype(np.uint16) * 4 for p in frame) if "10" in pixel_format else frame
              for frame in random_planes(2, *size)]  # fmt: skip
    source = save(tmp_path / "film.mkv", planes, pixel_format=pixel_format, matrix=1, others=1, full=True)
    result = write(source, tmp_path / f"result{suffix}", factor=1)
    with av.open(str(result)) as container:
        stream = container.streams.video[0]
        name = {"libdav1d": "av1"}.get(stream.codec_context.name, stream.codec_context.name)
        assert (name, stream.format.name.replace("yuvj", "yuv")) == expected
    again = Film(result)
    assert (again.height, again.width) == size
    assert again.colours == Colours(1, True, 1, 1)
    for one, other in zip(pixels(source), pixels(result), strict=True):
        assert np.abs(one.astype(float) - other).mean() / 257 < 8


def test_the_shape_of_pixels_and_the_tags_are_kept(tmp_path, one_sentence):
    source = tmp_path / "film.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
        context = stream.codec_context
        context.sample_aspect_ratio = Fraction(4, 3)
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 9, 9, 18, 1
        for number, planes in enumerate(random_planes(2)):
            add_frame(stream, container, planes, number)
        container.mux(stream.encode(None))
    film = Film(source)
    assert film.aspect == Fraction(4, 3) and film.rate == Fraction(30000, 1001)
    assert [remark for remark in film.remarks if "HLG" in remark]
    for suffix in (".mp4", ".mkv"):
        result = Film(write(source, tmp_path / f"result{suffix}"))
        assert result.aspect == Fraction(4, 3), suffix
        assert result.colours == film.colours == Colours(9, False, 9, 18)
    with pytest.raises(ValueError) as error:
        write(source, tmp_path / "result.webm")
    one_sentence(error.value, "film.mp4", "square", ".webm")


def test_a_large_result_has_the_matrix_that_players_expect(tmp_path):
    source = save(tmp_path / "film.mkv", random_planes(1, 24, 320), pixel_format="yuv420p")
    film, result = Film(source), Film(write(source, tmp_path / "result.mp4", factor=4))
    assert (
        film.colours.matrix == 6 and result.colours.matrix == 1 and result.colours.primaries == film.colours.primaries
    )
    grey = np.abs(pixels(source)[0].mean((0, 1)) - pixels(tmp_path / "result.mp4")[0].mean((0, 1)))
    assert (grey / 257 < 1.5).all()


def test_quality_decides_the_size(film, tmp_path):
    source = film()
    sizes = [write(source, tmp_path / f"{q}.mp4", quality=q).stat().st_size for q in (40, 80, 100)]
    assert sizes[0] < sizes[1] < sizes[2]
    with pytest.raises(ValueError, match=r"1\.\.100"):
        write(source, tmp_path / "x.mp4", quality=0)


def test_what_cannot_be_written_is_said_before_anything_is_done(film, tmp_path, one_sentence):
    source = Film(film())
    for name, size, words in (
        ("result.avi", (48, 64), (".avi", ".mkv")),
        ("result.webm", (48, 64), ("sound", "aac", ".webm", ".mkv")),
        ("result.mp4", (48, 40000), ("libx264", "40000x48")),
    ):
        with pytest.raises(ValueError) as error:
            FilmWriter(source, tmp_path / name, size)
        one_sentence(error.value, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_names_are_names_and_nothing_else(film, tmp_path, monkeypatch):
    path = film("film.mp4")
    monkeypatch.chdir(tmp_path)
    for name in ("http:film.mp4", "ein Film ü.mp4", "50%d.mp4", "-film.mp4"):
        path.rename(tmp_path / name)
        path = tmp_path / name
        assert len(pixels(write(name, f"pipe:{name}"))) == 12
        assert not list(tmp_path.glob(".*"))


# Interruptions


def test_an_interrupted_film_goes_on_to_the_same_end(film, tmp_path):
    source = film(frames=23)
    whole = write(source, tmp_path / "whole.mp4")
    result = tmp_path / "result.mp4"
    with pytest.raises(InterruptedError):
        write(source, result, stop=10)
    folder = tmp_path / ".result.mp4.segments"
    assert not result.exists() and len(list(folder.glob("*.nut"))) == 2
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.nut"))]
    writer = FilmWriter(Film(source), result, (48, 64), segment_frames=5, resume=True)
    assert (writer.done, writer.last, writer.notes) == (10, 9 * 512, {"seen": 9 * 512})
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.nut"))] == stamps
    write(source, result, resume=True)
    assert not folder.exists()
    assert np.array_equal(pixels(result), pixels(whole)) and times(result) == times(whole)
    assert packets(result, "audio") == packets(whole, "audio")
    assert packets(result, "video") == packets(whole, "video")


def test_segments_of_other_settings_are_not_gone_on_from(film, tmp_path):
    source, result = film(frames=12), tmp_path / "result.mp4"

    def left(**options):
        return FilmWriter(Film(source), result, (48, 64), segment_frames=5, **{"resume": True, **options}).done

    def begin():
        with pytest.raises(InterruptedError):
            write(source, result, stop=5, settings={"upscale": 2})
        assert left(settings={"upscale": 2}) == 5

    for change in ({"settings": {"upscale": 3}}, {"quality": 50}, {"resume": False}):
        begin()
        assert left(**{"settings": {"upscale": 2}, **change}) == 0
    begin()
    os.utime(source, ns=(1, 1))
    assert left(settings={"upscale": 2}) == 0


def test_a_damaged_segment_is_noticed(film, tmp_path, one_sentence):
    source, result = film(), tmp_path / "result.mp4"
    with pytest.raises(InterruptedError):
        write(source, result, stop=10)
    about = tmp_path / ".result.mp4.segments" / "000001.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"pts": [*range(2560, 6000, 512)]}))
    with pytest.raises(ValueError) as error:
        write(source, result, resume=True)
    one_sentence(error.value, "000001.nut", "--resume")
    assert not result.exists() and not list(tmp_path.glob("*.part"))


def test_memory_does_not_grow_with_the_film(tmp_path):
    rng = np.random.default_rng(0)
    noise = [tuple(rng.integers(16, 235, (288 // k, 352 // k), dtype=np.uint8) for k in (1, 2, 2)) for _ in range(5)]
    used = []
    for count in (20, 20, 220):
        frames = list(itertools.islice(itertools.cycle(noise), count))
        name = tmp_path / f"{count}.mkv"
        source = save(name, frames, codec="mpeg4", pixel_format="yuv420p", options={"qscale": "2"})
        write(source, tmp_path / "result.mkv", factor=1, quality=50)
        used.append(psutil.Process().memory_info().rss)
    # 200 frames more are 120 MB of pixels.
    assert used[2] - used[1] < 50e6
