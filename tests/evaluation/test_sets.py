"""Which pictures belong together, and what is read of them."""

import numpy as np
import pytest
import torch

from tsdsr.evaluation.sets import LAYOUTS, Case, Checksum, Pairs, benchmark_set, match, only, read_tensor
from tsdsr.imaging import Picture, write
from tsdsr.training.degradation import degrade


def save(path, height=8, width=8, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)
    return write(Picture(rgb), path)


def folder(path, *names, size=(8, 8)):
    for seed, name in enumerate(names):
        save(path / name, *size, seed=seed)
    return path


def test_pictures_are_matched_by_name_whatever_their_suffix(tmp_path):
    sr = folder(tmp_path / "sr", "b 10.png", "b 2.jpg", "ä.webp")
    hr = folder(tmp_path / "hr", "ä.png", "b 2.png", "b 10.tif")
    cases = match(sr=sr, hr=hr)
    assert [case.name for case in cases] == ["b 2", "b 10", "ä"]  # in natural order
    assert cases[1] == Case("b 10", sr=sr / "b 10.png", hr=hr / "b 10.tif")
    # Two single files need no common name.
    (single,) = match(sr=sr / "b 2.jpg", hr=hr / "b 10.tif")
    assert single == Case("b 2", sr=sr / "b 2.jpg", hr=hr / "b 10.tif")


def test_what_has_no_partner_is_refused(tmp_path, one_sentence):
    sr = folder(tmp_path / "sr", "a.png", "b.png")
    hr = folder(tmp_path / "hr", "a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
    with pytest.raises(ValueError) as refused:
        match(sr=sr, hr=hr)
    one_sentence(refused.value, sr, "c, d, e and 1 more", hr, "4 of 6")
    with pytest.raises(ValueError) as refused:
        match(sr=hr, hr=sr)
    one_sentence(refused.value, sr, "no picture named c", "rename or remove")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
    for path, words in ((empty, "holds no pictures"), (tmp_path / "absent", "is not a folder")):
        with pytest.raises(ValueError) as refused:
            match(sr=path, hr=hr)
        one_sentence(refused.value, path, words)
    save(sr / "a.jpg")
    with pytest.raises(ValueError) as refused:
        match(sr=sr, hr=hr)
    one_sentence(refused.value, "a.jpg", "a.png", "keep one")


@pytest.mark.parametrize(
    "name, where",
    [
        ("realsr", "RealSRVal_crop128"),
        ("drealsr", "DrealSRVal_crop128"),
        ("set5", "Set5"),
        ("realsr", "."),
        ("div2k-val", "DIV2K_V2_val"),
    ],
)
def test_benchmark_sets(tmp_path, name, where):
    layout = LAYOUTS[name]
    folder(tmp_path / where / layout.lr[-1], "a.png", "b.png", size=(4, 4))
    folder(tmp_path / where / layout.hr[-1], "a.png", "b.png", size=(16, 16))
    sr = folder(tmp_path / "sr", "a.png", "b.png", size=(16, 16))
    pairs = benchmark_set(name, tmp_path, sr)
    assert pairs.title == layout.title and len(pairs) == 2
    first = next(iter(pairs))
    assert first.name == "a" and first.lr.shape == (1, 3, 4, 4) and first.sr.shape == first.hr.shape == (1, 3, 16, 16)


def test_a_set_that_is_not_there(tmp_path, one_sentence):
    with pytest.raises(ValueError) as refused:
        benchmark_set("realsr", tmp_path)
    one_sentence(refused.value, tmp_path, "RealSR/test_LR", "RealSR/test_HR")
    with pytest.raises(ValueError) as refused:
        benchmark_set("urban100", tmp_path)
    one_sentence(refused.value, "urban100", "realsr, drealsr")


def test_sizes_have_to_fit(tmp_path, one_sentence):
    big, small = save(tmp_path / "big.png", 16, 12), save(tmp_path / "small.png", 4, 3)
    other, odd = save(tmp_path / "other.png", 16, 13), save(tmp_path / "odd.png", 4, 4)
    rounded = save(tmp_path / "rounded.png", 17, 15)  # of 4x3 enlarged, with sides that a factor of 4 leaves over
    assert Pairs([]).load(Case("x", lr=small, hr=rounded)).hr.shape == (1, 3, 17, 15)
    with pytest.raises(ValueError) as refused:
        Pairs([]).load(Case("x", sr=other, hr=big))
    one_sentence(refused.value, other, "13x16", big, "12x16", "one size")
    with pytest.raises(ValueError) as refused:
        Pairs([]).load(Case("x", lr=odd, hr=big))
    one_sentence(refused.value, odd, "4x4", "12x16", "one factor")


def published(hq, generator, scale):
    return degrade(hq, generator)


def test_degraded_sets_are_the_same_every_time(tmp_path):
    hr = folder(tmp_path / "hr", "a.png", "b.png", "c.png", size=(34, 47))
    whole = Pairs(match(hr=hr), degrade=published)
    samples = list(whole)
    assert samples[0].lr.shape == (1, 3, 8, 11) and samples[0].hr.shape == (1, 3, 32, 44)
    sharp = read_tensor(hr / "a.png")
    assert torch.equal(samples[0].hr, sharp[..., 1:33, 1:45])  # the centre
    # A picture is damaged alike where others are left out, and not like any other.
    alone = Pairs(match(hr=hr)[1:2], degrade=published)
    assert torch.equal(next(iter(alone)).lr, samples[1].lr)
    assert not torch.equal(samples[0].lr, next(iter(Pairs(whole.cases, degrade=published, seed=1))).lr)
    save(hr / "b.png", 34, 47, seed=0)  # the pixels of a
    again = list(Pairs(whole.cases, degrade=published))
    assert torch.equal(again[0].lr, samples[0].lr) and not torch.equal(again[1].lr, again[0].lr)
    assert torch.equal(samples[0].lr * 255, (samples[0].lr * 255).round())
    cut = next(iter(Pairs(whole.cases, degrade=published, crop_size=18)))
    assert cut.hr.shape == (1, 3, 16, 16) and torch.equal(cut.hr, sharp[..., 9:25, 15:31])


def test_too_small_to_be_reduced(tmp_path, one_sentence):
    tiny = save(tmp_path / "tiny.png", 3, 40)
    with pytest.raises(ValueError) as refused:
        Pairs([], degrade=published).load(Case("tiny", hr=tiny))
    one_sentence(refused.value, tiny, "40x3", "4 times")


def test_the_checksum_is_of_names_and_pixels(tmp_path):
    def checksum(*pictures):
        found = Checksum()
        for name, picture in pictures:
            found.add(name, picture)
        return str(found)

    png, webp = (read_tensor(save(tmp_path / f"a.{suffix}", seed=1)) for suffix in ("png", "tif"))
    assert checksum(("a", png)) == checksum(("a", webp)) == checksum(("a", png), ("b", None))
    assert len(checksum(("a", png))) == 64 and checksum(("a", None)) == ""
    changed = png.clone()
    changed[0, 1, 2, 3] = (changed[0, 1, 2, 3] + 0.5) % 1
    others = [
        checksum(("b", png)),
        checksum(("a", changed)),
        checksum(("a", png.transpose(2, 3))),
        checksum(("a", png), ("b", png)),
    ]
    assert len({checksum(("a", png)), *others}) == 5


def test_only_some_photographs(tmp_path):
    hr = folder(tmp_path / "hr", "a.png", "b.png", "c.png")
    kept = only(Pairs(match(hr=hr), title="X"), [hr / "c.png", hr / "a.png"])
    assert [case.name for case in kept.cases] == ["a", "c"] and kept.title == "X"
