"""Batches for a trainer, the same for the same seed whatever the number of workers, processes and interruptions."""

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..degradation import DegradationConfig, degrade
from ..draws import CROPS, DEGRADATION, ORDER, SIZES, draws
from .sources import Example, Streamed, UnreadableImage, check_pair


@dataclass(frozen=True)
class BatchSettings:
    """What batches are like.

    Args:
        train_batch_size: samples of a micro-batch.
        resolution: side of the sharp crops, pixels; a multiple of `scale`.
        other_resolutions: sides of the crops of some batches, each with (share of the batches, samples of one).
        scale: how many times smaller the degraded pictures are.
        seed: of all draws; 0 or more.
        random_flip: mirror and turn by quarters at random. Prepared latents never are.
        mild_degradation: share of the batches, 0..1, that `DegradationConfig.mild` damages, instead of the published
            ranges.
        degrade_on: "worker", or "device": batches then come without `lq`, which `degrade_batch` makes where it is run.

    Raises:
        ValueError: for a value that cannot be used.
    """

    train_batch_size: int
    resolution: int = 512
    scale: int = 4
    seed: int = 0
    random_flip: bool = True
    mild_degradation: float = 0.0
    degrade_on: str = "worker"
    other_resolutions: Mapping[int, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "resolution", "scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.resolution % self.scale:
            raise ValueError(f"resolution must be a multiple of the scale {self.scale}, not {self.resolution}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}.")
        if not 0 <= self.mild_degradation <= 1:
            raise ValueError(f"mild_degradation must be within 0..1, not {self.mild_degradation}.")
        if self.degrade_on not in ("worker", "device"):
            raise ValueError(f"degrade_on must be worker or device, not {self.degrade_on!r}.")
        self._check_other_resolutions()

    def _check_other_resolutions(self) -> None:
        shares = 0.0
        for side, entry in self.other_resolutions.items():
            try:
                share, samples = entry
                usable = side >= 1 and not side % self.scale and share > 0 and samples >= 1 and samples == int(samples)
            except (TypeError, ValueError):
                usable = False
            if not usable:
                raise ValueError(
                    "other_resolutions must hold sides of crops, multiples of the scale, each with the share of the "
                    f"batches and the number of samples in one, such as 256: [0.1, 2], not {side}: {entry}."
                )
            shares += share
        if shares > 1:
            raise ValueError(f"The shares of other_resolutions must not exceed 1 in sum, not {shares:g}.")

    @property
    def resolutions(self) -> list[int]:
        """All sides of crops."""
        return [self.resolution, *self.other_resolutions]

    def of_batch(self, m: int) -> "BatchSettings":
        """The settings of micro-batch m, whose crops have one side."""
        if not self.other_resolutions:
            return self
        place = float(torch.rand((), generator=draws(self.seed, SIZES, m)))
        found = self.resolution, self.train_batch_size
        for side, (share, samples) in self.other_resolutions.items():
            if 0 <= place < share:
                found = side, samples
            place -= share
        return replace(self, resolution=found[0], train_batch_size=found[1], other_resolutions={})


class MapStyle(Protocol):
    """A source whose examples can be read in any order: `Folder`, `Pairs`, `PreparedShards`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def training_batches(
    source: MapStyle | Streamed,
    settings: BatchSettings,
    *,
    start: int = 0,
    stop: int | None,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    position: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Micro-batches number `start` to `stop - 1`, of which this process gets every `world`-th.

    What micro-batch m of a map-style source holds depends on (seed, m) alone: a run that is resumed sees what an
    unbroken one sees, and two processes together see what one sees in twice as many micro-batches. Every photograph
    comes once an epoch, if all crops have one size. Of a stream the same holds for as long as the numbers of workers
    and processes stay the same and `position` is given. The global random generators are neither read nor moved.

    Pictures that cannot be read, or are smaller than a crop, are replaced: in a map-style source by others drawn from
    the micro-batch's own generator, in a stream by the next.

    Args:
        source: where photographs come from.
        settings: what batches are like.
        start: number of the first micro-batch.
        stop: number after the last one; None never ends.
        rank: number of this process; it gets the micro-batches m with m % world == rank.
        world: number of processes.
        num_workers: processes that read, cut and degrade, each with one thread; 0 does it in this one.
        position: of a stream that is resumed: what the last micro-batch that was used came with, in a process of the
            same rank. None for the other sources.

    Yields:
        hq: (B, 3, s, s), float32, 0..1.
        lq: (B, 3, s / scale, s / scale), float32, 0..1; absent where `degrade_on` is "device", unless the source has
            ready pairs or was prepared with targets.
        index: m.
        names: file names or keys, B of them.
        captions: strings or None, B of them.
        hq_latents, lq_latents, teacher_latents (B, C, h, w), prompt_embeds (B, tokens, width), pooled_prompt_embeds
            (B, width): as they were stored, where every example has them.
        skipped: (name, reason) of every picture that was passed over on the way to this micro-batch.
        position: None, or for a stream what `position` has to be to go on after this micro-batch; as JSON has it.

    Raises:
        ValueError: at once for arguments that cannot be used; while iterating, if (almost) nothing in the source can
            be read, or if the sizes of a pair do not agree.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank must be within 0..{world - 1}, not {rank}.")
    if start < 0 or num_workers < 0:
        raise ValueError(f"start and num_workers must be at least 0, not {start} and {num_workers}.")
    numbers = _Numbers(start + (rank - start) % world, stop, world)
    dataset: _StreamBatches | _MapBatches
    if isinstance(source, Streamed):
        readers = max(1, num_workers)
        states, turn = _unpack(position, rank, world, readers)
        dataset = _StreamBatches(source, settings, numbers, rank, world, states, turn)
        return _follow(_loader(dataset, None, num_workers), rank, world, states, turn)
    dataset = _MapBatches(source, settings)
    return _checked(_loader(dataset, numbers, num_workers))


def degrade_batch(hq: Tensor, index: int, settings: BatchSettings) -> Tensor:
    """The degraded pictures of one micro-batch: what a worker makes of it, on whatever device `hq` is.

    Args:
        hq: (B, 3, s, s), float32, 0..1: the whole micro-batch, as it came.
        index: its number m, which with the seed decides all draws.
        settings: what batches are like.

    Returns:
        (B, 3, s / scale, s / scale), values k / 255 in 0..1, dtype and device of `hq`.
    """
    generator = draws(settings.seed, DEGRADATION, index)
    mild = float(torch.rand((), generator=generator)) < settings.mild_degradation
    config = DegradationConfig.mild() if mild else DegradationConfig()
    return degrade(hq, generator, replace(config, scale=settings.scale))


def draw(high: int, generator: torch.Generator) -> int:
    """A whole number from 0 to `high` - 1."""
    return int(torch.randint(high, (), generator=generator))


@dataclass(frozen=True)
class _Numbers:
    """The numbers first, first + step, ... below stop, or without end."""

    first: int
    stop: int | None
    step: int

    def __iter__(self) -> Iterator[int]:
        if self.stop is None:
            return itertools.count(self.first, self.step)
        return iter(range(self.first, self.stop, self.step))


class _MapBatches(Dataset):
    """Item m is micro-batch m, or the error that it met: an exception would lose its message on the way out of a
    worker."""

    def __init__(self, source: MapStyle, settings: BatchSettings):
        if len(source) < 1:
            raise ValueError("The source holds no photographs.")
        self.source, self.settings = source, settings
        self._orders: dict[int, Tensor] = {}

    def __getitem__(self, m: int) -> dict[str, Any] | ValueError:
        first = m * self.settings.train_batch_size

        def read(slot: int, again: bool, generator: torch.Generator) -> Example:
            return self.source[draw(len(self.source), generator) if again else self._photograph(first + slot)]

        return _make_batch(read, m, self.settings.of_batch(m))

    def _photograph(self, sample: int) -> int:
        """The photograph that a sample is of: the samples run through a permutation an epoch."""
        epoch, place = divmod(sample, len(self.source))
        if epoch not in self._orders:
            order = torch.randperm(len(self.source), generator=draws(self.settings.seed, ORDER, epoch))
            # A batch may reach from one epoch into the next.
            self._orders = {key: kept for key, kept in self._orders.items() if key == epoch - 1} | {epoch: order}
        return int(self._orders[epoch][place])


class _StreamBatches(IterableDataset):
    """The micro-batches of a stream, worker by worker in turn, each with what its worker has consumed so far.

    Args:
        states: epoch and number of consumed samples, by reader. A reader is a worker's part of the stream; workers are
            numbered anew when a run is resumed, readers are not.
        turn: the reader of the first micro-batch.
    """

    def __init__(
        self,
        source: Streamed,
        settings: BatchSettings,
        numbers: _Numbers,
        rank: int,
        world: int,
        states: list[list[int]],
        turn: int,
    ):
        self.source, self.settings, self.numbers = source, settings, numbers
        self.rank, self.world, self.states, self.turn = rank, world, states, turn

    def __iter__(self) -> Iterator[tuple[list[int], dict[str, Any]] | ValueError]:
        worker = get_worker_info()
        readers, number = len(self.states), 0 if worker is None else worker.id
        reader = (self.turn + number) % readers
        state = list(self.states[reader])
        examples = self._examples(self.rank * readers + reader, self.world * readers, state)
        for m in itertools.islice(self.numbers, number, None, readers):
            batch = _make_batch(lambda *_: next(examples)(), m, self.settings.of_batch(m))
            if isinstance(batch, ValueError):
                yield batch
                return
            yield list(state), batch

    def _examples(self, part: int, parts: int, state: list[int]) -> Iterator[Callable[[], Example]]:
        """The samples of one part, epoch after epoch, each as a function that decodes it. `state` is moved along."""
        while True:
            epoch, consumed = state
            rows = self.source.rows(part, parts, seed=self.settings.seed, epoch=epoch, skip=consumed)
            for number, row in enumerate(rows, consumed):
                state[1] = number + 1
                yield partial(self.source.example, row, f"sample {number} of epoch {epoch}")
            if not state[1]:
                raise ValueError(
                    f"The stream has fewer samples than there are readers ({parts}: processes times workers); use "
                    "fewer workers."
                )
            state[:] = epoch + 1, 0


def _unpack(position: dict[str, Any] | None, rank: int, world: int, readers: int) -> tuple[list[list[int]], int]:
    """The states and the turn that a position holds; those of a beginning for None."""
    if position is None:
        return [[0, 0] for _ in range(readers)], 0
    was = position["world"], len(position["readers"])
    if was != (world, readers):
        raise ValueError(
            f"The stream was read by {was[0]} processes with {was[1]} workers each, and is to go on with {world} and "
            f"{readers}; its position only fits the same numbers."
        )
    if position["rank"] != rank:
        raise ValueError(f"This position of the stream is that of process {position['rank']}, not of process {rank}.")
    return [list(state) for state in position["readers"]], position["turn"]


def _make_batch(
    read: Callable[[int, bool, torch.Generator], Example], m: int, settings: BatchSettings
) -> dict[str, Any] | ValueError:
    """Micro-batch m, or why there is none.

    Args:
        read: an example for a slot of the batch; (slot, whether the one before could not be used, generator).
    """
    generator = draws(settings.seed, CROPS, m)
    crops: list[Example] = []
    skipped: dict[str, str] = {}
    failures = 0
    # Of sources that are nine tenths unreadable, fewer than one batch in 10000 meets as many.
    most_failures = 100 + 20 * settings.train_batch_size
    try:
        for slot in range(settings.train_batch_size):
            again = False
            while len(crops) == slot:
                try:
                    crops.append(_cut(read(slot, again, generator), generator, settings))
                except UnreadableImage as error:
                    skipped[error.name] = str(error)
                    again, failures = True, failures + 1
                    if failures > most_failures:
                        some = " ".join(list(skipped.values())[:3])
                        raise ValueError(f"(Almost) none of the pictures can be used: {some}") from None
    except ValueError as error:
        return error
    hq = torch.stack([crop.hq for crop in crops]).float() / 255
    batch: dict[str, Any] = {
        "hq": hq,
        "index": m,
        "names": [crop.name for crop in crops],
        "captions": [crop.caption for crop in crops],
        "skipped": list(skipped.items()),
        "position": None,
    }
    for name in ("hq_latents", "lq_latents", "teacher_latents", "prompt_embeds", "pooled_prompt_embeds", "lq"):
        tensors = [getattr(crop, name) for crop in crops]
        if all(tensor is not None for tensor in tensors):
            batch[name] = torch.stack(tensors)
    if "lq" in batch:
        batch["lq"] = batch["lq"].float() / 255
    elif settings.degrade_on == "worker":
        batch["lq"] = degrade_batch(hq, m, settings)
    return batch


def _cut(example: Example, generator: torch.Generator, settings: BatchSettings) -> Example:
    """The same example as a random crop, mirrored and turned; an `UnreadableImage` where it is too small for one."""
    check_pair(example, settings.scale)
    size, scale = settings.resolution, settings.scale
    height, width = example.hq.shape[1:]
    if example.hq_latents is not None:
        if (height, width) != (size, size):
            raise ValueError(
                f"{example.name} was prepared as {width}x{height} pixels; set the resolution to that, not to {size}."
            )
        return example
    if min(height, width) < size:
        raise UnreadableImage(
            example.name, f"{example.name} is {width}x{height} pixels, smaller than crops of {size}x{size}."
        )
    # Crops of a pair begin where a pixel of the small picture does.
    step = 1 if example.lq is None else scale
    top, left = (draw((side - size) // step + 1, generator) for side in (height, width))
    mirrored, turns = (draw(2, generator), draw(4, generator)) if settings.random_flip else (0, 0)

    def cut(picture: Tensor, top: int, left: int, size: int) -> Tensor:
        crop = picture[:, top : top + size, left : left + size]
        return torch.rot90(crop.flip(2) if mirrored else crop, turns, (1, 2))

    hq = cut(example.hq, step * top, step * left, size)
    lq = None if example.lq is None else cut(example.lq, top, left, size // scale)
    return replace(example, hq=hq, lq=lq)


def _loader(dataset: Dataset, numbers: _Numbers | None, num_workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,  # the items are batches
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # The loader seeds its workers with a number from this generator instead of the global one. They do not use it.
        generator=torch.Generator(),
        worker_init_fn=_ignore_sigterm,
    )


def _ignore_sigterm(worker: int) -> None:
    """Who stops a job asks all of its processes to; the trainer goes on to the end of its step, for which it reads."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item


def _checked(loader: DataLoader) -> Iterator[Any]:
    """The items of a loader, one that is an error raised."""
    iterator = iter(loader)
    while True:
        # In this process as in a worker: sums of several threads differ from those of one in the last digit.
        with one_thread(loader.num_workers == 0):
            item = next(iterator, None)
        if item is None:
            return
        if isinstance(item, ValueError):
            try:
                raise item
            finally:
                # The error's traceback holds this frame. Workers that only a collection of garbage ends take seconds.
                del item, iterator
        yield item


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Torch computes with one thread inside the block, if wanted."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(before)


def _follow(loader: DataLoader, rank: int, world: int, states: list[list[int]], turn: int) -> Iterator[dict[str, Any]]:
    """The batches of a stream, each with the position after it."""
    for state, batch in _checked(loader):
        states[turn] = state
        turn = (turn + 1) % len(states)
        yield batch | {
            "position": {"world": world, "rank": rank, "readers": [list(state) for state in states], "turn": turn}
        }
