"""What a kill, a full disk, a second job and the like do to `tsdsr upscale`: nothing that another run does not mend."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that they start at once")

OPTIONS = ("--process-size", "32", "--tile-size", "64", "--tile-overlap", "16", "--device", "cpu")

# Imports once what takes long, and runs the command in a child of its own as often as it is asked to.
SERVER = """
import ctypes, json, os, resource, signal, sys, time
import torch, diffusers, tsdsr.imaging, tsdsr.cli
import tsdsr.pipelines.loading

def child(log, arguments, environment={}, limit=None, mount=None):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    if mount:  # a small disk, in a namespace of its own
        libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
        if libc.unshare(0x10000000 | 0x20000):  # CLONE_NEWUSER, CLONE_NEWNS
            os._exit(99)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        if libc.mount(b"tmpfs", mount[0].encode(), b"tmpfs", 0, mount[1].encode()):
            os._exit(99)
    if limit:
        resource.setrlimit(getattr(resource, limit[0]), (limit[1], limit[1]))
    os.environ.update(environment)
    sys.argv = ["tsdsr", *arguments]
    # A job in the background of a shell is started with Ctrl-C switched off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        tsdsr.cli.main()
    except SystemExit as left:
        if mount:
            print(sorted(os.listdir(mount[0])))
        sys.stdout.flush()
        os._exit(left.code or 0)

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "start" in request:
        pid = os.fork()
        if pid == 0:
            try:
                child(**request["start"])
            finally:
                os._exit(98)
        print(pid, flush=True)
    else:
        end = time.monotonic() + 60
        done = 0
        while not done and time.monotonic() < end:
            done, status = os.waitpid(request["wait"], os.WNOHANG)
            time.sleep(0.005)
        if not done:
            os.kill(request["wait"], signal.SIGKILL)
            done, status = os.waitpid(request["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Run:
    """The command in a process of its own."""

    def __init__(self, server, log, arguments, **more):
        self.server, self.log = server, log
        start = {"log": str(log), "arguments": ["upscale", *map(str, arguments), *OPTIONS], **more}
        self.pid = self.ask(start=start)

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """The exit code, or minus the number of the signal that killed it."""
        return self.ask(wait=self.pid)

    def output(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()  # at once; its children have ended


@pytest.fixture
def start(server, tmp_path):
    """Function that starts the command; options of `child` above may follow."""
    return lambda *arguments, **more: Run(server, tmp_path / f"log{time.monotonic_ns()}", arguments, **more)


@pytest.fixture(scope="module")
def folder(photo, tmp_path_factory):
    """Six pictures, one of them in a subfolder, one of another format."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(5):
        photo(root / f"{number}.png", 12 + number, 12)
    photo(root / "deep" / "5.jpg")
    return root


@pytest.fixture(scope="module")
def undisturbed(server, folder, tmp_path_factory):
    """Results of a run that nothing happened to, and the seconds it took."""
    out = tmp_path_factory.mktemp("undisturbed")
    begin = time.monotonic()
    run = Run(server, out / "log", [folder, "-o", out / "out"])
    assert run.wait() == 0, run.output()
    return out / "out", time.monotonic() - begin


def assert_same(folder, expected, files):
    assert files(folder) == files(expected)  # hidden ones too: nothing is left over
    for name in files(expected):
        assert np.array_equal(np.asarray(Image.open(folder / name)), np.asarray(Image.open(expected / name))), name


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_until(happened):
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_killed_at_any_moment_and_resumed(start, folder, undisturbed, files, tmp_path):
    expected, seconds = undisturbed
    draw = random.Random(0)
    out, manifest = tmp_path / "out", tmp_path / "manifest.jsonl"
    arguments = (folder, "-o", out, "--resume", "--manifest", manifest)
    for _ in range(5):
        run = start(*arguments)
        time.sleep(draw.uniform(0, seconds))
        run.signal(signal.SIGKILL)
        assert run.wait() in (-signal.SIGKILL, 0), run.output()
    # And surely in the middle of writing.
    for name in ("0.png", "deep/5.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).unlink(missing_ok=True)
    run = start(*arguments)
    wait_until(lambda: any(name.endswith(".part") for name in files(out)))
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert any(name.endswith((".part", ".lock")) for name in files(out))

    before = len(records(manifest))
    run = start(*arguments)
    assert run.wait() == 0, run.output()
    assert_same(out, expected, files)
    kept = 6 - run.output().count(" -> ")
    # On a slow machine all kills may have come before the first result.
    assert f"kept {kept} of 6" in run.output() if kept else "kept" not in run.output()
    done = [record["output"] for record in records(manifest) if record["status"] == "done"]
    again = {str(out / "0.png"), str(out / "deep" / "5.png")}
    assert all(done.count(output) <= 1 + (output in again) for output in done)
    assert {record["output"] for record in records(manifest)} == {str(out / name) for name in files(expected)}
    assert len(records(manifest)) == before + run.output().count(" -> ") + sum(
        record["status"] == "kept" for record in records(manifest)[before:]
    )
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize(("number", "word", "code"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)])
def test_signals_keep_what_is_finished(start, photo, files, tmp_path, number, word, code):
    """In the middle of a picture that would take a minute."""
    photo(tmp_path / "in" / "0.png")
    photo(tmp_path / "in" / "1.png", 500, 500)
    out = tmp_path / "out"
    run = start(tmp_path / "in", "-o", out)
    wait_until((out / ".1.png.lock").exists)
    run.signal(getattr(signal, number))
    assert run.wait() == code, run.output()
    assert run.output().endswith(f"tsdsr: {word}. 1 of 2 pictures are finished and kept.\n")
    assert files(out) == ["0.png"]


def test_two_jobs_on_one_folder_share_the_work(start, folder, undisturbed, files, tmp_path):
    out, manifest = tmp_path / "out", tmp_path / "manifest.jsonl"
    runs = [start(folder, "-o", out, "--manifest", manifest) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.output() for run in runs]
    assert_same(out, undisturbed[0], files)
    done = [record["output"] for record in records(manifest)]
    assert len(done) == len(set(done)) == 6
    for run in runs:
        assert run.output().count(" -> ") + run.output().count("kept ") == 6


def test_launched_processes_share_the_work(start, files, tmp_path, photo):
    """As `accelerate launch` and `torchrun` start them. Those end all where one fails, so it waits for the others."""
    out, manifest = tmp_path / "out", tmp_path / "manifest.jsonl"
    for number, side in enumerate((60, 12, 60, 12, 12)):
        photo(tmp_path / "in" / f"{number}.png", side, side)
    (tmp_path / "in" / "3.png").write_bytes(b"not a picture")
    runs = [
        start(
            *(tmp_path / "in", "-o", out, "--manifest", manifest),
            environment={
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)},
            },
        )
        for rank in range(2)
    ]
    assert runs[1].wait() == 1, runs[1].output()
    assert files(out) == ["0.png", "1.png", "2.png", "4.png"]
    assert runs[0].wait() == 0, runs[0].output()
    assert sorted(record["status"] for record in records(manifest)) == ["done"] * 4 + ["failed"]
    for rank, run in enumerate(runs):
        lines = [line for line in run.output().splitlines() if " -> " in line]
        assert len(lines) == 3 - 2 * rank and all(line.startswith(f"{rank}: [") for line in lines)


def test_a_full_disk_stops_the_job(start, folder, tmp_path, photo):
    disk = tmp_path / "disk"
    disk.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for number in range(6):
        Image.fromarray(noise).save(tmp_path / "in" / f"{number}.png") if number else photo(tmp_path / "in" / "0.png")
    run = start(tmp_path / "in", "-o", disk, mount=(str(disk), "size=100k"))
    code = run.wait()
    if code == 99:
        pytest.skip("this system mounts no disk for a test")
    assert code == 2, run.output()
    *lines, sentence, left = run.output().splitlines()
    finished = sum(" -> " in line for line in lines)
    assert 0 < finished < 6 and len(lines) == finished
    assert sentence.startswith(f"tsdsr: the disk of {disk}/{finished}.png is full: ")
    assert sentence.endswith(f" {finished} of 6 pictures are finished and kept.")
    assert left == str([f"{number}.png" for number in range(finished)])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_file_that_may_not_grow_is_skipped(start, photo, files, tmp_path, suffix):
    """The limit of a file system, or of the user: the real writer meets a real EFBIG."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(noise).save(tmp_path / "in" / "1.png")
    photo(tmp_path / "in" / "2.png")
    run = start(tmp_path / "in", "-o", tmp_path / "out", "--format", suffix, limit=("RLIMIT_FSIZE", 5000))
    assert run.wait() == 1, run.output()
    assert f"skipped {tmp_path}/in/1.png: " in run.output() and "too large" in run.output()
    assert "Traceback" not in run.output()
    assert files(tmp_path / "out") == [f"2.{suffix}"]


def test_a_folder_that_cannot_be_written_to(start, folder):
    """Not even by root; and it is said before a model is loaded."""
    run = start(folder, "-o", "/proc/results", "--model", "/nowhere")
    assert run.wait() == 2
    assert run.output().startswith("tsdsr: cannot write into /proc (") and run.output().count("\n") == 1


def test_a_picture_that_disappears_is_skipped(start, files, photo, tmp_path):
    for number, side in enumerate((12, 60, 12)):
        photo(tmp_path / "in" / f"{number}.png", side, side)
    run = start(tmp_path / "in", "-o", tmp_path / "out")
    wait_until((tmp_path / "out").exists)
    (tmp_path / "in" / "2.png").unlink()
    assert run.wait() == 1, run.output()
    assert f"skipped {tmp_path}/in/2.png: " in run.output() and "does not exist" in run.output()
    assert files(tmp_path / "out") == ["0.png", "1.png"]
