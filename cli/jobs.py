"""The loop over pictures: which of them this process does, what it finds done, and what becomes of the rest."""

import errno
import gc
import inspect
import io
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import typer
from filelock import FileLock, Timeout

from .. import __version__
from .errors import INTERRUPTED, UNEXPECTED, fail, sentence
from .manifest import Manifest
from .options import in_cli_words
from .outputs import STREAM, Job
from .video import is_video

if TYPE_CHECKING:
    from ..imaging import Picture, PictureWriter
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline
    from ..pipelines.tiling import TilesDone
    from .progress import Display

TERMINATED = 143
"""Exit code after SIGTERM, as shells have it."""
_WAIT = 0.3
"""Seconds until results that other jobs were making are looked at again."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Of file systems that know no locks."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the terminal was closed: what Ctrl-C is, from elsewhere."""


@dataclass(frozen=True)
class Settings:
    """What the options of one run come to; the dicts hold only what was given."""

    model: str
    loading: dict[str, Any]
    calling: dict[str, Any]
    writing: dict[str, Any]
    seed: int | None = None
    resume: bool = False
    allow_large: bool = False
    debug: bool = False
    stdout: BinaryIO | None = None
    stdout_format: str = "png"


@dataclass(frozen=True)
class Launch:
    """This process among those that `accelerate launch` or `torchrun` started."""

    rank: int
    processes: int
    local_rank: int


def launch() -> Launch | None:
    """What the launcher says in the environment; None where this process was not launched by one."""
    try:
        # LOCAL_RANK is set by launchers alone; some clusters set the other two for every program.
        found = Launch(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError):
        return None
    return found if found.processes > 1 else None


def share(jobs: list[Job], shard: str | None, launched: Launch | None) -> list[Job]:
    """The jobs of this shard, and of these the ones of this process: every n-th, so that each job is in one share.

    Args:
        jobs: all of them, in an order that is the same for every shard.
        shard: `i/n` with 1 <= i <= n; None for all.

    Raises:
        ValueError: for a shard that is none.
    """
    if shard is not None:
        numbers = re.fullmatch(r"(\d+)/(\d+)", shard)
        if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
            raise ValueError(f"--shard is of the form i/n with i from 1 to n, such as 2/8, not {shard!r}.")
        jobs = jobs[int(numbers[1]) - 1 :: int(numbers[2])]
    return jobs if launched is None else jobs[launched.rank :: launched.processes]


def check_writable(jobs: Iterable[Job]) -> None:
    """Try out the folders that results go to.

    Raises:
        ValueError: nothing can be written there.
    """
    probed = set()
    for folder in {job.output.parent for job in jobs if job.output != STREAM}:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if existing not in probed:
            probed.add(existing)
            try:
                tempfile.TemporaryFile(dir=existing).close()
            except OSError as error:
                raise ValueError(
                    f"cannot write into {existing} ({error.strerror}); choose a folder with -o."
                ) from error


def run(
    jobs: list[Job],
    settings: Settings,
    display: "Display",
    before: Mapping[Path, list[int] | None],
    manifest: Manifest | None = None,
) -> None:
    """Do the jobs in order. One that fails is reported and skipped, or ends the command where it is the only one.

    A result that another job holds the lock of is come back to. Processes of a launcher end together.

    Args:
        before: `stamp` of every result when these jobs were chosen; what changes from then on, another job makes.

    Raises:
        ValueError, OSError: the only picture cannot be read or written, the model cannot be loaded, the pipeline
            refuses an argument (which it would for every picture), or the disk is full.
        typer.Exit: with 1 if pictures were skipped, with 130 after Ctrl-C, 143 after SIGTERM.
    """
    work = _Work(jobs, settings, display, before, manifest)
    try:
        _sweep(job.output for job in jobs)
        waiting = jobs
        while waiting:
            locked = [job for job in waiting if not work.do(job)]
            if locked:
                display.begin("waiting for another job")
                time.sleep(_WAIT)
            waiting = locked
    except _Stop as stop:
        assert stop.__cause__ is not None
        raise stop.__cause__ from None
    except KeyboardInterrupt as stop:
        word, code = ("terminated", TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
        fail(f"{word}.{work.finished()}", code)
    finally:
        _sweep(job.output for job in jobs)
    if work.kept:
        typer.echo(f"{display.prefix}kept {work.kept} of {len(jobs)} results, which are whole.")
    if launch() is not None:
        _wait_for_others()
    if work.skipped:
        fail(f"{work.skipped} of {len(jobs)} pictures were skipped.", UNEXPECTED)


def _wait_for_others() -> None:
    """Launchers end all processes when one ends with an error, which is to stop nobody's pictures."""
    import torch.distributed as dist

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)  # Python's own handlers wait for torch to return
    with suppress(Exception):  # a launcher without a meeting point
        dist.init_process_group("gloo", timeout=timedelta(days=365))
        dist.barrier()


class _Stop(Exception):
    """What every further picture would meet as well; its cause is what to say."""


@dataclass
class _Work:
    jobs: list[Job]
    settings: Settings
    display: "Display"
    before: Mapping[Path, list[int] | None]
    manifest: Manifest | None
    written: int = 0
    kept: int = 0
    skipped: int = 0
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.manifest is not None and self.settings.resume:
            self.known = self.manifest.done()

    def finished(self) -> str:
        """A sentence for the end of another."""
        count = len(self.jobs)
        return f" {self.written + self.kept} of {count} pictures are finished and kept." if count > 1 else ""

    def do(self, job: Job) -> bool:
        """Deal with one picture; False where another job is making its result.

        Raises:
            _Stop: there is no use in going on.
            Exception: what the only picture failed by.
        """
        if self.settings.resume and job.output != STREAM and self._is_finished(job):
            self.kept += 1
            self.display.keep()
            if os.path.abspath(job.output) not in self.known:
                self._record(job, "kept")
            return True
        with ExitStack() as stack:
            try:
                if job.output != STREAM:
                    stack.enter_context(_locked(job.output))
                if stamp(job.output) not in (None, self.before[job.output]):
                    self.display.end(f"kept {job.output} (another job made it)")
                    return True
                made = self._film(job) if is_video(job.source) else self._picture(job)
            except Timeout:
                return False
            except _Stop:
                raise
            except Exception as error:
                self._failed(job, error)
                return True
            self.written += 1
            self._record(job, "done", **made)
        size = "x".join(map(str, made["output_size"]))
        frames = f", {made['frames']} frames" if made["frames"] > 1 else ""
        more = f", flicker {made['flicker']:.2f}" if made.get("flicker") is not None else ""
        self.display.end(f"{job.source} -> {job.output} ({size}{frames}, {made['seconds']:.1f} s{more})")
        return True

    def _failed(self, job: Job, error: Exception) -> None:
        if _is_disk_full(error):
            place, mend = f"the disk of {job.output}", "make room, then go on with --resume"
            if job.output == STREAM:
                place, mend = "the disk that stdout leads to", "make room"
            raise _Stop from OSError(f"{place} is full: {mend}.{self.finished()}")
        if isinstance(error, BrokenPipeError) and job.output == STREAM:
            raise _Stop from OSError("stdout was closed before the picture was there.")
        problem = in_cli_words(error)
        self._record(job, "failed", error=sentence(problem))
        if len(self.jobs) == 1 and launch() is None:
            raise problem
        self.skipped += 1
        if self.settings.debug:
            traceback.print_exception(problem)
        self.display.end(f"skipped {job.source}: {sentence(problem)}", failed=True)

    def _record(self, job: Job, status: str, **facts: Any) -> None:
        if self.manifest is None:
            return
        self.manifest.append(
            {
                "status": status,
                "input": os.path.abspath(job.source) if job.source != STREAM else "-",
                "output": os.path.abspath(job.output) if job.output != STREAM else "-",
                **facts,
                **({"output_stamp": stamp(job.output), "settings": self._arguments} if status == "done" else {}),
            }
        )

    def _is_finished(self, job: Job) -> bool:
        """Whether the result is there and whole, and if the manifest knows it, made alike of the same file."""
        from ..imaging import UnreadableImageError, open_frames
        from ..imaging.whole import is_whole

        if self.before[job.output] is None and stamp(job.output) is None:
            return False
        known = self.known.get(os.path.abspath(job.output), {})
        if known.get("status") == "done":
            if (known.get("settings"), known.get("input_stamp")) != (self._arguments, stamp(job.source)):
                return False
            if known.get("output_stamp") == stamp(job.output):
                return is_video(job.source) or is_whole(job.output)
        if is_video(job.source):
            return True  # a film appears under its name only when it is whole
        try:
            with open_frames(job.source, allow_large=self.settings.allow_large) as frames:
                return is_whole(job.output, self._enlarged(frames.height, frames.width), len(frames))
        except UnreadableImageError:
            return False

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        """All that decides what a result looks like, as JSON."""
        self.display.begin("starting")
        defaults = pipeline_defaults()
        names = (
            *("upscale", "fidelity", "process_size", "color_fix", "degrid", "grain", "tile_size", "tile_overlap"),
            *("tile_batch_size", "vae_tile_size", "sample_posterior"),
        )
        loading = {name: value for name, value in self.settings.loading.items() if name != "device"}
        return {
            "version": __version__,
            "model": self.settings.model,
            **{name: [*map(str, value)] if isinstance(value, list) else str(value) for name, value in loading.items()},
            **{name: self.settings.calling.get(name, defaults[name].default) for name in names},
            **self.settings.writing,
            "seed": self.settings.seed,
        }

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        """The size of a result, as `TSDSRPipeline.__call__` has it."""
        factor = self._arguments["upscale"]
        return round(factor * height), round(factor * width)

    @cached_property
    def _pipeline(self) -> "TSDSRPipeline":
        self.display.begin("loading the model")
        try:
            return _load(self.settings)
        except Exception as error:
            raise _Stop from in_cli_words(error)

    def _picture(self, job: Job) -> dict[str, Any]:
        from ..imaging import create, open_frames

        self.display.begin(f"reading {job.source.name}")
        start, found = time.perf_counter(), stamp(job.source)
        source = io.BytesIO(sys.stdin.buffer.read()) if job.source == STREAM else job.source
        target: Path | BinaryIO = job.output
        writing = self.settings.writing
        if job.output == STREAM and self.settings.stdout is not None:
            target, writing = self.settings.stdout, {"format": self.settings.stdout_format, **writing}
        with open_frames(source, allow_large=self.settings.allow_large) as frames:
            with ExitStack() as stack:
                for number, picture in enumerate(frames, 1):
                    if number == 1:
                        # When it is known to be a picture; and no picture's time is what is loaded once for all.
                        paused = time.perf_counter()
                        size = self._enlarged(frames.height, frames.width)
                        writer = stack.enter_context(create(frames, target, size, **writing))
                        pipeline = self._pipeline
                        self.display.begin(job.source.name)
                        start += time.perf_counter() - paused
                    self.display.frame(number, len(frames))
                    writer.begin(picture, self._enlarged(picture.height, picture.width))
                    self._upscale(pipeline, picture, writer)
            if not isinstance(target, Path):
                target.flush()
            return {
                "input_stamp": found,
                "input_size": [frames.width, frames.height],
                "output_size": [size[1], size[0]],
                "frames": len(frames),
                "seconds": round(time.perf_counter() - start, 3),
            }

    def _upscale(self, pipeline: "TSDSRPipeline", picture: "Picture", writer: "PictureWriter") -> None:
        import torch

        calling, ran = dict(self.settings.calling), False
        if self.settings.seed is not None:
            # A generator a picture: its result does not depend on which pictures came before.
            calling["generator"] = torch.Generator("cpu").manual_seed(self.settings.seed)

        def show(event: "TilesDone") -> None:
            nonlocal ran
            ran = True
            self.display.tiles(event.done, event.total)

        try:
            pipeline(image=picture, rows_callback=lambda rows, top: writer.write(rows), tile_callback=show, **calling)
        except ValueError as error:
            if not ran and not self.written:
                raise _Stop from error
            raise

    def _film(self, job: Job) -> dict[str, Any]:
        from .video import upscale_video

        found = stamp(job.source)
        pipeline = self._pipeline
        self.display.begin(job.source.name)
        start = time.perf_counter()
        made = upscale_video(
            pipeline,
            job.source,
            job.output,
            calling=self.settings.calling,
            seed=self.settings.seed,
            resume=self.settings.resume,
            writing=self.settings.writing,
            display=self.display,
            debug=self.settings.debug,
        )
        return {"input_stamp": found, **made, "seconds": round(time.perf_counter() - start, 3)}


def pipeline_defaults() -> Mapping[str, inspect.Parameter]:
    """The parameters of a call of the pipeline, by name, with what they are where nothing is given."""
    from .. import TSDSRPipeline

    gc.freeze()  # the modules stay: no round of the garbage collector need look at them
    return inspect.signature(TSDSRPipeline.__call__).parameters


def _load(settings: Settings) -> "TSDSRPipeline":
    if settings.model == "embedded" or Path(settings.model).exists():
        # Read by huggingface_hub when it is first imported: a model that is here needs no network.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from .. import load_pipeline  # before torch: by the package's own names all comes in the quickest way

    gc.freeze()
    import torch
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading, which is written to log files too
    loading, launched = dict(settings.loading), launch()
    if launched is not None and torch.cuda.is_available():
        loading.setdefault("device", f"cuda:{launched.local_rank}")
    pipeline = load_pipeline(settings.model, **loading)
    pipeline.set_progress_bar_config(disable=True)  # the command has its own
    return pipeline


def stamp(path: Path) -> list[int] | None:
    """What changes when a file does: bytes and time of change, in ns; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether that is what is behind an error of a library."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the lock of a result, in a folder that is made for it and removed again where it stays empty.

    The lock is a file beside the result; the system releases it with the death of the process.

    Raises:
        Timeout: another process holds it.
        OSError: there can be no folder or no file.
    """
    made = [path for path in (output.parent, *output.parent.parents) if not path.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.with_name(f".{_hidden(output.name)}.lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except (NotImplementedError, OSError) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
        yield
    finally:
        with suppress(NotImplementedError, OSError):
            lock.acquire(timeout=0)  # where a signal came between the making of the file and its locking
        if lock.is_locked:
            # While it is held, so that the file is not yet another's; where that cannot be, releasing removes it.
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release(force=True)
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _hidden(name: str) -> str:
    """What hidden files beside a result are named after: file systems allow 255 bytes, of which they need some."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 210 else encoded[:210].decode(errors="ignore")


def _sweep(outputs: Iterable[Path]) -> None:
    """Remove what a kill has left of these results: unfinished files, and locks that nobody holds."""
    names: dict[Path, set[str]] = defaultdict(set)
    for output in outputs:
        if output != STREAM:
            names[output.parent].add(_hidden(output.name))
    for folder, own in names.items():
        with suppress(OSError):
            for entry in os.listdir(folder):
                left = re.fullmatch(r"\.(.+)\.(?:[0-9a-f]{32}\.part|lock)", entry, re.DOTALL)
                if left and left[1] in own:
                    with suppress(OSError), _locked(folder / left[1]):
                        if entry.endswith(".part"):
                            os.unlink(folder / entry)
