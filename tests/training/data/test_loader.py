"""Micro-batches: what they hold depends on seed and number alone, and nothing that is damaged stops them."""

import itertools
import multiprocessing
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tsdsr.imaging import Picture, write
from tsdsr.training.data import BatchSettings, Folder, Pairs, degrade_batch, load_uint8, training_batches
from tsdsr.training.degradation import degrade

SETTINGS = BatchSettings(train_batch_size=3, resolution=32, seed=5)


def batches(source, settings=SETTINGS, stop=8, **more):
    return list(training_batches(source, settings, stop=stop, **more))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def test_what_a_batch_holds(folder):
    (folder / "p4.txt").write_text("four", encoding="utf-8")
    (batch,) = batches(Folder(folder), BatchSettings(10, resolution=32), stop=1)
    assert batch["hq"].shape == (10, 3, 32, 32) and batch["lq"].shape == (10, 3, 8, 8)
    assert batch["hq"].dtype == batch["lq"].dtype == torch.float32
    assert batch["index"] == 0 and batch["skipped"] == [] and batch["position"] is None
    assert sorted(batch["names"]) == [f"p{number}.png" for number in range(10)]
    assert batch["captions"] == ["four" if name == "p4.png" else None for name in batch["names"]]
    assert not {"hq_latents", "prompt_embeds", "pooled_prompt_embeds"} & batch.keys()
    for name, crop in zip(batch["names"], batch["hq"], strict=True):
        assert is_crop_of(crop, load_uint8(folder / name), flips=True)


def is_crop_of(crop, picture, flips):
    """Whether a crop (3, s, s), 0..1, stands somewhere in a picture (3, H, W) uint8."""
    crop, size = (crop * 255).round().byte(), crop.shape[-1]
    windows = picture.unfold(1, size, 1).unfold(2, size, 1)
    looks = [crop]
    if flips:
        looks = [torch.rot90(look, turns, (1, 2)) for look in (crop, crop.flip(2)) for turns in range(4)]
    return any((windows == look[:, None, None]).all(dim=-1).all(dim=-1).all(dim=0).any() for look in looks)


def test_crops_are_neither_flipped_nor_turned_where_not_asked(folder):
    (batch,) = batches(Folder(folder), BatchSettings(10, resolution=32, random_flip=False), stop=1)
    for name, crop in zip(batch["names"], batch["hq"], strict=True):
        assert is_crop_of(crop, load_uint8(folder / name), flips=False)


def test_workers_read_on_when_all_processes_of_a_job_are_asked_to_stop(folder):
    iterator = training_batches(Folder(folder), SETTINGS, stop=20, num_workers=2)
    found = [next(iterator), next(iterator)]  # one of each worker: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()
    assert_same(found + list(iterator), batches(Folder(folder), stop=20))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_does_not_matter(folder, num_workers):
    source = Folder(folder)
    assert_same(batches(source), batches(source, num_workers=num_workers))


def test_threads_of_this_process_do_not_matter_and_stay(folder):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen = []
        for batch in training_batches(Threads(folder), SETTINGS, stop=2):
            seen += batch["captions"]
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == ["1 threads"] * 6
    assert batches(Threads(folder), num_workers=1)[0]["captions"] == ["1 threads"] * 3


class Threads(Folder):
    """Says in the caption how many threads torch has where it is read."""

    def caption(self, index):
        return f"{torch.get_num_threads()} threads"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_start_in_the_middle(folder, num_workers):
    source = Folder(folder)
    assert_same(batches(source)[5:], batches(source, start=5, num_workers=num_workers))


def test_processes_share_what_one_sees(folder):
    source = Folder(folder)
    parts = [batches(source, rank=rank, world=2) for rank in (0, 1)]
    assert [[batch["index"] for batch in part] for part in parts] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert_same(batches(source), [batch for pair in zip(*parts, strict=True) for batch in pair])
    assert [batch["index"] for batch in batches(source, start=3, rank=0, world=2)] == [4, 6]


def test_every_photograph_comes_once_an_epoch(folder):
    names = [name for batch in batches(Folder(folder), stop=10) for name in batch["names"]]
    epochs = [names[i : i + 10] for i in (0, 10, 20)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_larger_than_the_source(folder):
    (batch,) = batches(Folder(folder), BatchSettings(25, resolution=32), stop=1)
    assert sorted(Counter(batch["names"]).values()) == [2] * 5 + [3] * 5


MIXED = BatchSettings(4, resolution=32, seed=3, other_resolutions={40: (0.25, 1), 16: (0.5, 6)})


def test_crops_of_other_sizes(folder):
    found = Counter(tuple(batch["hq"].shape) for batch in batches(Folder(folder), MIXED, stop=200))
    assert set(found) == {(4, 3, 32, 32), (1, 3, 40, 40), (6, 3, 16, 16)}
    # Within four standard deviations of the shares.
    assert abs(found[1, 3, 40, 40] - 50) < 25 and abs(found[6, 3, 16, 16] - 100) < 29
    assert MIXED.resolutions == [32, 40, 16]


@pytest.mark.parametrize("more", [{"num_workers": 2}, {"start": 5}])
def test_sizes_depend_on_seed_and_number(folder, more):
    source = Folder(folder)
    assert_same(batches(source, MIXED)[more.get("start", 0) :], batches(source, MIXED, **more))
    other = batches(source, replace(MIXED, seed=4), stop=30)
    assert [b["hq"].shape for b in batches(source, MIXED, stop=30)] != [b["hq"].shape for b in other]


def test_the_same_damage_on_the_device_for_all_sizes(folder):
    source = Folder(folder)
    worker, device = batches(source, MIXED), batches(source, replace(MIXED, degrade_on="device"))
    for one, other in zip(worker, device, strict=True):
        assert torch.equal(one["lq"], degrade_batch(other["hq"], other["index"], MIXED))


@pytest.mark.parametrize("entry", [(0.5,), (0, 2), (0.5, 0), (0.5, 1.5), 0.5, ("a", 2), (1.5, 1)])
def test_other_resolutions_that_cannot_be_used(entry):
    with pytest.raises(ValueError, match="other_resolutions"):
        BatchSettings(4, resolution=32, other_resolutions={64: entry})


@pytest.mark.parametrize("side", [30, 0, -4, "64"])
def test_other_sides_that_cannot_be_used(side):
    with pytest.raises(ValueError, match="multiples of the scale"):
        BatchSettings(4, resolution=32, other_resolutions={side: (0.5, 2)})


def test_another_seed_is_another_run(folder):
    first, other = (batches(Folder(folder), BatchSettings(3, resolution=32, seed=seed), stop=4) for seed in (5, 6))
    assert not any(torch.equal(one["hq"], two["hq"]) for one, two in zip(first, other, strict=True))


def test_crops_and_damage_differ_between_epochs(folder):
    source = Folder(folder, [folder / "p9.png"])
    one, two = batches(source, BatchSettings(1, resolution=32, random_flip=False), stop=2)
    assert not torch.equal(one["hq"], two["hq"])
    whole = BatchSettings(1, resolution=40, random_flip=False)
    source = Folder(folder, [folder / "p0.png"])
    assert not torch.equal(*(batch["lq"] for batch in batches(source, whole, stop=2)))


def test_without_an_end(folder):
    endless = training_batches(Folder(folder), SETTINGS, stop=None, start=4)
    assert [batch["index"] for batch in itertools.islice(endless, 9)] == list(range(4, 13))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_random_generators_of_the_process_stay_untouched(folder, num_workers):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batches(Folder(folder), num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_they_do_not_matter_either(folder):
    once = batches(Folder(folder), stop=3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert_same(once, batches(Folder(folder), stop=3))


def damage(folder):
    whole = (folder / "p1.png").read_bytes()
    (folder / "p1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "p2.png").write_bytes(b"\x89PNG damaged")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pictures_that_cannot_be_used_are_skipped_and_named(folder, save, num_workers):
    damage(folder)
    save(folder / "p3.png", 20, 48)
    found = batches(Folder(folder), stop=10, num_workers=num_workers)
    assert all(batch["hq"].shape[0] == 3 for batch in found)
    used = {name for batch in found for name in batch["names"]}
    assert used == {f"p{number}.png" for number in (0, *range(4, 10))}
    skipped = [entry for batch in found for entry in batch["skipped"]]
    reasons = dict(skipped)
    assert reasons.keys() == {"p1.png", "p2.png", "p3.png"}
    assert all(isinstance(entry, tuple) and entry[0] in entry[1] for entry in skipped)
    assert "48x20 pixels, smaller than crops of 32x32" in reasons["p3.png"]
    for batch in found:
        assert len(dict(batch["skipped"])) == len(batch["skipped"])
    # The replacements, too, depend on seed and number alone.
    assert_same(found[6:], batches(Folder(folder), start=6, stop=10))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_can_be_read(folder, num_workers):
    for path in folder.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"none of the pictures can be used.*p\d\.png.*p\d\.png") as caught:
        batches(Folder(folder), num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_one_good_picture_of_ten_is_enough(folder):
    for path in folder.iterdir():
        if path.name != "p6.png":
            path.write_bytes(b"damaged")
    assert {name for batch in batches(Folder(folder), stop=2) for name in batch["names"]} == {"p6.png"}


def test_degraded_on_the_device(folder):
    source = Folder(folder)
    on_device = BatchSettings(3, resolution=32, seed=5, degrade_on="device")
    for ours, theirs in zip(batches(source), batches(source, on_device), strict=True):
        assert torch.equal(ours["hq"], theirs["hq"]) and "lq" not in theirs
        assert torch.equal(ours["lq"], degrade_batch(theirs["hq"], theirs["index"], on_device))
    assert not torch.equal(degrade_batch(ours["hq"], 3, on_device), degrade_batch(ours["hq"], 4, on_device))


def test_the_share_of_mild_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tsdsr.training.data.loader.degrade",
        lambda hq, generator, config: seen.append(config) or degrade(hq, generator),
    )
    for index in range(60):
        degrade_batch(torch.rand(1, 3, 8, 8), index, BatchSettings(1, resolution=8, scale=2, mild_degradation=0.5))
    mild = [config.final_sinc_probability < 0.5 for config in seen]
    assert 15 < sum(mild) < 45 and {config.scale for config in seen} == {2}


def test_pairs_are_cut_at_one_place(tmp_path, save):
    for number in range(5):
        save(tmp_path / "lq" / f"p{number}.png", 12, 14, seed=number)
        low = load_uint8(tmp_path / "lq" / f"p{number}.png")
        pixels = low.repeat_interleave(4, 1).repeat_interleave(4, 2).permute(1, 2, 0).float().numpy() / 255
        (tmp_path / "hq").mkdir(exist_ok=True)
        write(Picture(pixels), tmp_path / "hq" / f"p{number}.png")
    settings = BatchSettings(5, resolution=32, degrade_on="device")
    places = set()
    for batch in batches(Pairs(tmp_path / "lq", tmp_path / "hq"), settings, stop=6):
        assert torch.equal(batch["hq"], batch["lq"].repeat_interleave(4, 2).repeat_interleave(4, 3))
        places |= {float(pixel) for pixel in batch["lq"][:, 0, 0, 0]}
    assert len(places) > 15


def test_pairs_that_do_not_fit_end_the_run(tmp_path, save):
    for number in range(3):
        save(tmp_path / "hq" / f"p{number}.png", 40, 48)
        save(tmp_path / "lq" / f"p{number}.png", 10, 12 + number)
    source = Pairs(tmp_path / "lq", tmp_path / "hq")
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match=r"^The pair p\d.png is 1\dx10 and 48x40 pixels"):
            batches(source, num_workers=num_workers)
    with pytest.raises(ValueError, match="must be 2 times the first"):
        batches(Pairs(tmp_path / "lq", tmp_path / "hq"), BatchSettings(1, resolution=32, scale=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size must be at least 1"),
        ({"resolution": 30}, "multiple of the scale 4, not 30"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"mild_degradation": 1.5}, "within 0..1"),
        ({"degrade_on": "gpu"}, "worker or device, not 'gpu'"),
    ],
)
def test_settings_that_cannot_be_used(options, message):
    with pytest.raises(ValueError, match=message):
        BatchSettings(**{"train_batch_size": 1, **options})


def test_arguments_that_cannot_be_used(folder):
    source = Folder(folder)
    with pytest.raises(ValueError, match=r"rank must be within 0..1, not 2"):
        training_batches(source, SETTINGS, stop=1, rank=2, world=2)
    with pytest.raises(ValueError, match="at least 0"):
        training_batches(source, SETTINGS, stop=1, start=-1)
