"""Films on the command line: a result beside the source, and what an interruption leaves."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

from tsdsr.cli import video  # noqa: E402
from tsdsr.imaging.video import VIDEO_OUTPUT_SUFFIXES, Film  # noqa: E402

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8}


def save(path, frames=12, noise=128, codec="libx264", sound=True, seed=0):
    """A film of 12x10 pixels, 25 frames a second, with a tone: one picture under noise below so many levels."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "4"})
        stream.height, stream.width, stream.pix_fmt = 10, 12, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        tone = container.add_stream("aac", rate=48000) if sound else None
        still = rng.integers(60, 120, (10, 12, 3))
        for number in range(frames):
            pixels = still + (rng.integers(0, noise, still.shape) if noise else 0)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tone is not None:
            for start in range(0, frames * 1920, 1024):
                wave = np.sin(np.arange(start, start + 1024, dtype=np.float32) * 0.05)
                frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
                frame.sample_rate, frame.pts = 48000, start
                container.mux(tone.encode(frame))
            container.mux(tone.encode(None))
    return path


def pixels(path):
    return [frame.pixels for frame in Film(path).frames()]


def packets(path):
    with av.open(str(path)) as container:
        return [(packet.stream.type, packet.pts, bytes(packet)) for packet in container.demux() if packet.size]


def test_films_are_known_by_their_suffix():
    assert video.is_video(Path("a/Film.MP4")) and not video.is_video(Path("film.png"))
    assert video.output_suffix(Path("film.MOV")) == ".mov" and video.output_suffix(Path("film.avi")) == ".mkv"
    assert video.OUTPUT_SUFFIXES == VIDEO_OUTPUT_SUFFIXES and set(VIDEO_OUTPUT_SUFFIXES) < video.SUFFIXES


def test_a_film_lies_beside_its_source(tmp_path, upscale, files):
    source = save(tmp_path / "film.mp4")
    result = upscale(source, "--manifest", tmp_path / "done.jsonl")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == ["done.jsonl", "film.mp4", "film_x4.mp4"]
    assert "film_x4.mp4 (48x40, 12 frames" in result.stdout
    made = Film(tmp_path / "film_x4.mp4")
    assert (made.height, made.width, made.rate) == (40, 48, 25)
    assert [frame.pts for frame in made.frames()] == [frame.pts for frame in Film(source).frames()]
    sound = [data for kind, _, data in packets(source) if kind == "audio"]
    assert sound and sound == [data for kind, _, data in packets(tmp_path / "film_x4.mp4") if kind == "audio"]
    facts = json.loads((tmp_path / "done.jsonl").read_text())
    assert (facts["status"], facts["frames"], facts["output_size"]) == ("done", 12, [48, 40])


def test_every_frame_is_what_the_picture_alone_would_be(tmp_path, upscale, make_pipeline):
    source = save(tmp_path / "film.mkv", codec="ffv1", frames=3)
    assert upscale(source, "--quality", "100").exit_code == 0
    pipeline = make_pipeline("tiny")
    for frame, enlarged in zip(Film(source).frames(), pixels(tmp_path / "film_x4.mkv"), strict=True):
        alone = pipeline(image=frame.rows(0, frame.height), output_type="np", **SMALL).images[0]
        # The film has half the chroma, so its luma is compared.
        weights = np.array([0.299, 0.587, 0.114])
        assert np.abs(255 * alone @ weights - enlarged / 257 @ weights).mean() < 3


def test_a_still_film_does_not_flicker(tmp_path, upscale):
    save(tmp_path / "film.mkv", noise=0, codec="ffv1")
    result = upscale(tmp_path / "film.mkv")
    assert "flicker 0.00" in result.stdout, result.output


def test_folders_hold_films_too(tmp_path, upscale, photo, files):
    save(tmp_path / "in" / "a.avi", frames=2, sound=False, codec="mpeg4")
    photo(tmp_path / "in" / "b.png")
    result = upscale(tmp_path / "in", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == ["a.mkv", "b.png"]


def test_what_is_no_film_ends_in_one_sentence(tmp_path, upscale, assert_refused, files):
    (tmp_path / "film.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert_refused(upscale(tmp_path / "film.mp4"), "film.mp4", "not a film")
    save(tmp_path / "other.mkv")
    assert_refused(upscale(tmp_path / "other.mkv", "-o", tmp_path / "other.webm"), "aac", ".webm", ".mkv")
    assert files(tmp_path) == ["film.mp4", "other.mkv"]


def test_a_film_that_is_cut_off_is_said_to_be(tmp_path, upscale, caplog):
    whole = save(tmp_path / "whole.mkv", frames=100, sound=False, codec="mpeg4")
    (tmp_path / "film.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    with caplog.at_level(logging.WARNING, "tsdsr"):
        result = upscale(tmp_path / "film.mkv")
    assert result.exit_code == 0, result.output
    said = [record.getMessage() for record in caplog.records if "film.mkv" in record.getMessage()]
    assert len(said) == 1 and "ends after" in said[0] and "4.0" in said[0]


class Shown:
    """What upscale_video asks of a display."""

    def __init__(self):
        self.frames = []

    def begin(self, what):
        pass

    def frame(self, number, frames):
        self.frames.append(number)

    def tiles(self, done, total):
        pass


def run(pipeline, source, output, resume=False, display=None, **calling):
    return video.upscale_video(
        pipeline,
        source,
        output,
        calling=SMALL | calling,
        seed=0,
        resume=resume,
        writing={"quality": 90, "lossless": True},
        display=display or Shown(),
        segment_frames=5,
    )


# What a killed run did: `upscale_video` in a process of its own, which says when a segment is finished.
KILLED = """
import sys
from pathlib import Path
import tests_of_video as tests
from tsdsr.pipelines.loading import load_pipeline
pipeline = load_pipeline(sys.argv[1], device="cpu")
pipeline.set_progress_bar_config(disable=True)
tests.run(pipeline, Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_killed_film_goes_on_to_the_same_end(tmp_path, model, files):
    from tsdsr.pipelines.loading import load_pipeline

    pipeline = load_pipeline(str(model), device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    source = save(tmp_path / "film.mp4", frames=30, noise=6)
    whole = run(pipeline, source, tmp_path / "whole.mp4")

    (tmp_path / "tests_of_video.py").symlink_to(__file__)
    segments = tmp_path / ".result.mp4.segments"
    arguments = [sys.executable, "-c", KILLED, str(model), str(source), str(tmp_path / "result.mp4")]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(segments.glob("*.nut"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = 5 * len(list(segments.glob("*.nut")))
    assert not (tmp_path / "result.mp4").exists() and 15 <= done < 30

    display = Shown()
    resumed = run(pipeline, source, tmp_path / "result.mp4", resume=True, display=display)
    # The last finished frame is made once more, to compare and to measure flicker from.
    assert display.frames == [*range(done, 31)]
    assert packets(tmp_path / "result.mp4") == packets(tmp_path / "whole.mp4")
    assert all(map(np.array_equal, pixels(tmp_path / "result.mp4"), pixels(tmp_path / "whole.mp4")))
    assert resumed["flicker"] > 0 and resumed["still"] > 0.5
    assert resumed.keys() == whole.keys()
    assert all(np.allclose(resumed[name], whole[name], rtol=1e-9) for name in whole)
    assert [name for name in files(tmp_path) if ".part" in name or "segments" in name] == []


def test_another_model_begins_anew(tmp_path, make_pipeline, caplog):
    source = save(tmp_path / "film.mp4", frames=12)

    class Interrupted(Shown):
        def frame(self, number, frames):
            super().frame(number, frames)
            if number == 8:
                raise KeyboardInterrupt

    pipeline, other = make_pipeline("tiny"), make_pipeline("tiny")
    import torch

    torch.manual_seed(5)
    for weight in other.vae.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    for changed, calling, begins in (
        (other, {}, [5, 1]),
        (pipeline, {"color_fix": "none"}, [1]),
        (pipeline, {}, [5, 6]),
    ):
        with pytest.raises(KeyboardInterrupt):
            run(pipeline, source, tmp_path / "result.mp4", display=Interrupted())
        display = Shown()
        with caplog.at_level(logging.WARNING, "tsdsr"):
            run(changed, source, tmp_path / "result.mp4", resume=True, display=display, **calling)
        assert display.frames[: len(begins)] == begins and display.frames[-1] == 12
        assert ("anew" in caplog.text) == (changed is other)
        caplog.clear()
        (tmp_path / "result.mp4").unlink()


def test_damaged_packets_are_said(tmp_path, make_pipeline, caplog):
    source = save(tmp_path / "film.avi", sound=False, codec="mjpeg")
    data = bytearray(source.read_bytes())
    at = [index for index in range(len(data)) if data[index : index + 2] == b"\xff\xd8"][6]
    data[at : at + 400] = bytes(400)
    source.write_bytes(data)
    with caplog.at_level(logging.WARNING, "tsdsr"):
        made = run(make_pipeline("tiny"), source, tmp_path / "result.mkv")
    assert made["damaged"] == 1 and made["frames"] < 12
    assert "1 of its packets" in caplog.text
