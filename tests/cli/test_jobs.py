"""Going on after an interruption, the manifest, locks, streams, and pictures of several frames."""

import io
import json
import os
import sys
import threading
import time

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tsdsr.cli.jobs import _is_disk_full, _locked
from tsdsr.cli.manifest import Manifest


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def photos(photo, tmp_path):
    """A folder of three pictures."""
    for name in ("1.png", "2.jpg", "deep/3.png"):
        photo(tmp_path / "in" / name)
    return tmp_path / "in"


# Going on


@pytest.mark.parametrize("with_manifest", [False, True])
def test_resume_keeps_what_is_whole_and_makes_the_rest(upscale, photos, files, tmp_path, with_manifest):
    out, manifest = tmp_path / "out", tmp_path / "m.jsonl"
    arguments = [photos, "-o", out, *(["--manifest", manifest] if with_manifest else [])]
    assert upscale(*arguments).exit_code == 0
    whole = {name: (out / name).read_bytes() for name in files(out)}
    assert set(whole) == {"1.png", "2.png", "deep/3.png"}

    result = upscale(*arguments, "--resume")
    assert result.exit_code == 0 and result.stdout == "kept 3 of 3 results, which are whole.\n"

    (out / "1.png").write_bytes(whole["1.png"][:-20])  # cut short
    Image.new("RGB", (5, 5)).save(out / "2.png")  # of another size
    (out / "deep" / "3.png").unlink()
    result = upscale(*arguments, "--resume")
    assert result.exit_code == 0 and result.stdout.count(" -> ") == 3 and "kept" not in result.stdout
    assert {name: (out / name).read_bytes() for name in files(out)} == whole

    (out / "2.png").write_bytes(b"")
    result = upscale(*arguments, "--resume")
    assert result.stdout.splitlines()[0].startswith(f"[2/3] {photos / '2.jpg'} -> ")
    assert result.stdout.splitlines()[1:] == ["kept 2 of 3 results, which are whole."]
    # By its name alone it would have been kept.
    (out / "2.png").write_bytes(b"")
    assert upscale(*arguments).stdout.count("(--overwrite replaces it)") == 3


def test_resume_makes_anew_what_was_made_otherwise(upscale, photo, photos, tmp_path):
    """Which the manifest alone can tell."""
    arguments = [photos, "-o", tmp_path / "out", "--manifest", tmp_path / "m.jsonl"]
    assert upscale(*arguments).exit_code == 0
    assert upscale(*arguments, "--resume", "--color-fix", "none").stdout.count(" -> ") == 3
    assert upscale(*arguments, "--resume", "--color-fix", "none").stdout.startswith("kept 3 of 3")
    # The default, typed.
    assert upscale(*arguments, "--resume", "--color-fix", "wavelet").stdout.count(" -> ") == 3
    assert upscale(*arguments, "--resume").stdout.startswith("kept 3 of 3")
    # The same pixels, but another file.
    photo(photos / "1.png")
    os.utime(photos / "1.png", (1, 1))
    assert upscale(*arguments, "--resume").stdout.count(" -> ") == 1


def test_resume_and_overwrite_exclude_each_other(upscale, photos, assert_refused):
    assert_refused(upscale(photos, "--resume", "--overwrite"), "--resume", "--overwrite")


# Manifest


def test_what_the_manifest_says(upscale, photos, tmp_path):
    (photos / "0.png").write_bytes(b"no picture")
    (tmp_path / "out").mkdir()
    result = upscale(photos, "-o", tmp_path / "out", "--manifest", tmp_path / "new" / "m.jsonl", "--seed", 3, "-s", 2)
    assert result.exit_code == 1
    failed, first, *_ = found = records(tmp_path / "new" / "m.jsonl")
    assert [record["status"] for record in found] == ["failed", "done", "done", "done"]
    assert failed["input"] == str(photos / "0.png") and str(photos / "0.png") in failed["error"]
    assert first["input"] == str(photos / "1.png") and first["output"] == str(tmp_path / "out" / "1.png")
    assert (first["input_size"], first["output_size"], first["frames"]) == ([12, 10], [24, 20], 1)
    assert first["seconds"] > 0 and "error" not in first
    settings = first["settings"]
    assert settings["upscale"] == 2 and settings["seed"] == 3 and settings["process_size"] == 32
    assert settings["color_fix"] == "wavelet" and settings["version"] and settings["model"].endswith("tiny")
    assert os.listdir(tmp_path / "new") == ["m.jsonl"]

    # A result that was made before there was a manifest is added once.
    for _ in range(2):
        upscale(photos, "-o", tmp_path / "out", "--manifest", tmp_path / "other.jsonl", "--resume", "-s", 2)
    assert [r["status"] for r in records(tmp_path / "other.jsonl")] == ["failed", "kept", "kept", "kept", "failed"]


def test_a_torn_last_line_is_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"status": "done", "output": "/a"}\nnot ours\n{"status": "do')
    with Manifest(path) as manifest:
        assert manifest.done() == {"/a": {"status": "done", "output": "/a"}}
        manifest.append({"status": "done", "output": os.fsdecode(b"/b\xff\xc3\xa4")})
        assert set(manifest.done()) == {"/a", os.fsdecode(b"/b\xff\xc3\xa4")}
    lines = path.read_bytes().split(b"\n")
    assert lines[1] == b"not ours" and lines[3:] == [b""] and "ä".encode() in lines[2]
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_lines_of_several_writers_do_not_mix(tmp_path):
    def write(number):
        with Manifest(tmp_path / "m.jsonl") as manifest:
            for _ in range(20):
                manifest.append({"status": "done", "output": str(number) * 5000})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [record["output"] for record in records(tmp_path / "m.jsonl")]
    assert sorted(found) == sorted(str(number) * 5000 for number in range(4) for _ in range(20))


def test_a_manifest_that_cannot_be_written(upscale, photos, assert_refused, tmp_path):
    assert_refused(upscale(photos, "--manifest", tmp_path), tmp_path)
    (tmp_path / "file").touch()
    assert_refused(upscale(photos, "--manifest", tmp_path / "file" / "m.jsonl"), "file")


# Shards


def test_shards_make_every_picture_once(upscale, photos, files, tmp_path):
    for shard in ("1/2", "2/2"):
        result = upscale(photos, "-o", tmp_path / "out", "--shard", shard, "--manifest", tmp_path / "m.jsonl")
        assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == ["1.png", "2.png", "deep/3.png"]
    assert len(records(tmp_path / "m.jsonl")) == 3
    # One with nothing to do, and one that is none.
    assert upscale(photos, "-o", tmp_path / "out", "--shard", "7/9").output == ""
    assert upscale(photos, "--shard", "3/2").exit_code == 2


# Locks


@pytest.mark.parametrize("finishes", [True, False])
def test_a_result_that_another_job_is_making_is_come_back_to(upscale, photos, files, tmp_path, finishes):
    out = tmp_path / "out"
    out.mkdir()
    lock = FileLock(out / ".1.png.lock")
    lock.acquire()

    def end():
        while not (out / "deep" / "3.png").exists():
            time.sleep(0.01)
        if finishes:
            Image.new("RGB", (48, 40)).save(out / "1.png")
        os.unlink(lock.lock_file)
        lock.release()

    other = threading.Thread(target=end)
    other.start()
    result = upscale(photos, "-o", out)
    other.join()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"[1/3] {photos / '2.jpg'} -> ")
    last = f"kept {out / '1.png'} (another job made it)" if finishes else f"{photos / '1.png'} -> {out / '1.png'} ("
    assert lines[2].startswith(f"[3/3] {last}")
    assert files(out) == ["1.png", "2.png", "deep/3.png"]


def test_a_result_that_appears_before_the_first_picture_begins(upscale, photos, files, tmp_path, monkeypatch):
    """Another job may be quicker than this one's start; with or without --overwrite its result is new."""
    from tsdsr.cli import upscale as command

    result = tmp_path / "out" / "1.png"

    def make(jobs):
        result.parent.mkdir(exist_ok=True)
        Image.new("RGB", (1, 1)).save(result)

    monkeypatch.setattr(command, "check_writable", make)
    for more in ((), ("--overwrite",)):
        time.sleep(0.01)  # so that the second is another file than the first
        run = upscale(photos, "-o", tmp_path / "out", *more)
        assert run.exit_code == 0, run.output
        assert f"kept {result} (another job made it)" in run.output
        with Image.open(result) as kept:
            assert kept.size == (1, 1)


def test_what_a_kill_left_is_swept_up(upscale, photo, files, tmp_path):
    long = "n" * 240 + ".png"
    for name in ("a.png", long):
        photo(tmp_path / "in" / name)
    out = tmp_path / "out"
    out.mkdir()
    hexadecimal = "0123456789abcdef" * 2
    left = [f".a.png.{hexadecimal}.part", ".a.png.lock", f".{long[:210]}.{hexadecimal}.part"]
    # Of another result, of nobody, and one that is still being written.
    others = [f".b.png.{hexadecimal}.part", ".a.png.part", ".c.png.lock"]
    for name in left + others:
        (out / name).touch()
    result = upscale(tmp_path / "in", "-o", out)
    assert result.exit_code == 0, result.output
    assert files(out) == sorted([*others, "a.png", long])


# Names


def test_names_that_the_terminal_has_no_letters_for(model, small_tiles, photo, tmp_path):
    from typer.testing import CliRunner

    from tsdsr.cli import app

    arguments = [
        "upscale",
        "--model",
        model,
        *small_tiles,
        photo(tmp_path / "\u00e4 \u3042.png"),
        "-o",
        f"{tmp_path}/out/",
    ]
    result = CliRunner(charset="latin-1").invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "\u00e4 \\u3042.png -> " in result.stdout and (tmp_path / "out" / "\u00e4 \u3042.png").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_that_are_no_unicode(upscale, photo, tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    photo(tmp_path / "in" / "a.png").rename(tmp_path / "in" / name)
    arguments = (tmp_path / "in", "-o", tmp_path / "out", "--manifest", tmp_path / "m.jsonl")
    assert upscale(*arguments).exit_code == 0
    assert os.listdir(tmp_path / "out") == [name]
    assert upscale(*arguments, "--resume").stdout.startswith("kept 1 of 1")


# stdin and stdout


@pytest.fixture
def piped(model, small_tiles):
    """Function that runs the command with bytes on stdin."""
    from typer.testing import CliRunner

    from tsdsr.cli import app

    def run(data, *arguments):
        words = ["upscale", "--model", model, *small_tiles, *arguments]
        return CliRunner().invoke(app, list(map(str, words)), input=data)

    return run


@pytest.mark.parametrize(("arguments", "kind"), [((), "PNG"), (("--format", "jpg"), "JPEG"), (("-o", "-"), "PNG")])
def test_through_a_pipe(upscale, piped, photo, tmp_path, arguments, kind):
    path = photo(tmp_path / "a.png")
    result = piped(path.read_bytes(), "-", *arguments)
    assert result.exit_code == 0, result.stderr
    image = Image.open(io.BytesIO(result.stdout_bytes))
    assert (image.format, image.size) == (kind, (48, 40))
    assert result.stderr.startswith("- -> - (48x40, ") and os.listdir(tmp_path) == ["a.png"]
    if kind == "PNG":
        upscale(path, "-o", tmp_path / "b.png")
        assert result.stdout_bytes == (tmp_path / "b.png").read_bytes()


def test_stdin_to_a_file_and_a_file_to_stdout(piped, photo, tmp_path):
    path = photo(tmp_path / "a.jpg")
    assert piped(path.read_bytes(), "-", "-o", tmp_path / "b.webp").exit_code == 0
    assert Image.open(tmp_path / "b.webp").size == (48, 40)
    result = piped(b"", path, "-o", "-", "--format", "same")
    assert Image.open(io.BytesIO(result.stdout_bytes)).format == "JPEG"


def test_pipes_that_cannot_be(piped, upscale, photo, assert_refused, tmp_path):
    a, b = photo(tmp_path / "a.png"), photo(tmp_path / "b.png")
    assert_refused(piped(b"", "-"), "empty")
    assert_refused(piped(b"no picture", "-"), "not an image")
    assert_refused(piped(a.read_bytes(), "-", "--format", "same"), "--format same")
    assert_refused(upscale(a, b, "-o", "-"), "one picture")
    assert_refused(upscale("-", a), "alone")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


# Several frames


def test_frames_stay_together(upscale, tmp_path):
    frames = [Image.new("RGB", (12, 10), color) for color in ((200, 40, 40), (40, 200, 40), (40, 40, 200))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 200, 300], loop=0)
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=frames[1:])
    arguments = (tmp_path / "a.gif", tmp_path / "b.tif", "-o", tmp_path / "out", "--format", "same")
    result = upscale(*arguments, "--manifest", tmp_path / "m.jsonl")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("(48x40, 3 frames, ") == 2
    assert [record["frames"] for record in records(tmp_path / "m.jsonl")] == [3, 3]
    for name in ("a.gif", "b.tif"):
        with Image.open(tmp_path / "out" / name) as image:
            assert (image.n_frames, image.size) == (3, (48, 40))
            for number in range(3):
                image.seek(number)
                assert np.asarray(image.convert("RGB")).mean(axis=(0, 1)).argmax() == number
    assert upscale(*arguments, "--resume").stdout == "kept 2 of 2 results, which are whole.\n"
    frames[0].save(tmp_path / "out" / "b.tif", save_all=True, append_images=frames[1:2])
    assert upscale(*arguments, "--resume").stdout.count(" -> ") == 1


def test_a_format_for_one_picture_says_which_could_hold_all(upscale, assert_refused, tmp_path):
    frames = [Image.new("RGB", (12, 10), color) for color in ("red", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert_refused(upscale(tmp_path / "a.gif", "--format", "jpg"), "a_x4.jpg", "2 frames", ".gif")
    assert os.listdir(tmp_path) == ["a.gif"]


# Options that writing has


def test_options_of_formats_reach_the_file(upscale, photo, tmp_path):
    path = photo(tmp_path / "a.png", 30, 30)
    for subsampling, factors in (("4:4:4", (1, 1)), ("4:2:2", (2, 1)), ("4:2:0", (2, 2))):
        assert upscale(path, "-o", tmp_path / "b.jpg", "--subsampling", subsampling, "--overwrite").exit_code == 0
        with Image.open(tmp_path / "b.jpg") as image:
            assert image.layer[0][1:3] == factors
    upscale(path, "-o", tmp_path / "c.png")
    upscale(path, "-o", tmp_path / "c.webp", "--lossless")
    upscale(path, "-o", tmp_path / "d.webp", "--no-lossless")
    exact = np.asarray(Image.open(tmp_path / "c.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "c.webp").convert("RGB")), exact)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "d.webp").convert("RGB")), exact)


def test_tiles_of_the_vae_reach_the_pipeline(upscale, photo, assert_refused, tmp_path):
    assert_refused(upscale(photo(tmp_path / "a.png"), "--vae-tile-size", 3), "vae_tile_size")


def test_a_full_disk_is_known_behind_other_errors():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise ValueError("encoder error") from error
    except ValueError as error:
        assert _is_disk_full(error)
    assert not _is_disk_full(OSError(27, "File too large"))


def test_a_launched_process_takes_its_own_gpu(upscale, photos, assert_refused, monkeypatch):
    """Of which this machine would need two: that the second is asked for is seen by its absence."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "99")):
        monkeypatch.setenv(name, value)
    assert_refused(upscale(photos), "cuda:99")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no flocks")
def test_a_signal_while_a_lock_is_made_leaves_none(tmp_path, monkeypatch):
    import fcntl

    flock, calls = fcntl.flock, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            assert (tmp_path / "out" / ".0.png.lock").exists()
            raise KeyboardInterrupt
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt), _locked(tmp_path / "out" / "0.png"):
        raise AssertionError("never held")
    assert not (tmp_path / "out").exists()
    with _locked(tmp_path / "out" / "0.png"):
        assert (tmp_path / "out" / ".0.png.lock").exists()
    assert not (tmp_path / "out").exists()
