"""Folders, their captions, and pairs."""

import pickle

import pytest
import torch

from tsdsr.training.data import Folder, Pairs, UnreadableImage, load_uint8


def test_folder(folder):
    source = Folder(folder)
    assert len(source) == 10 and source.name(3) == "p3.png"
    example = source[3]
    assert example.name == "p3.png" and example.hq.dtype == torch.uint8 and example.hq.shape == (3, 46, 49)
    assert torch.equal(example.hq, load_uint8(folder / "p3.png"))
    assert example.lq is None and example.caption is None
    assert [Folder(folder, [folder / "p7.png"]).name(0)] == ["p7.png"]


def test_photographs_are_kept_as_far_as_there_is_room(folder):
    expected = [Folder(folder)[index] for index in range(3)]
    source = Folder(folder, kept_bytes=expected[0].hq.nbytes + expected[1].hq.nbytes)
    for index in (0, 1, 2, 0):
        assert torch.equal(source[index].hq, expected[index].hq)
    for path in source.paths:
        path.unlink()
    for index in (0, 1):
        assert source[index].name == expected[index].name and torch.equal(source[index].hq, expected[index].hq)
    with pytest.raises(UnreadableImage):
        source[2]


def test_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="nowhere cannot be listed"):
        Folder(tmp_path / "nowhere")


def test_unreadable_pictures_are_named(folder):
    whole = (folder / "p0.png").read_bytes()
    (folder / "p0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "p1.png").write_bytes(b"")
    (folder / "p2.png").write_bytes(b"no picture at all")
    for number in range(3):
        with pytest.raises(UnreadableImage, match=rf"p{number}\.png") as caught:
            Folder(folder)[number]
        assert caught.value.name == f"p{number}.png"
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (copy.name, str(copy)) == (caught.value.name, str(caught.value))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "p0.png", "text": "a red house"}\n\n{"file_name": "p1.png", "text": null}\n'),
        ("metadata.csv", 'file_name,text\np0.png,a red house\n"p1.png",\n'),
    ],
)
def test_captions(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    (folder / "p0.txt").write_text("not this one", encoding="utf-8")
    (folder / "p2.txt").write_text(" ein grünes Tor\n", encoding="utf-8")
    source = Folder(folder)
    assert [source[i].caption for i in range(4)] == ["a red house", None, "ein grünes Tor", None]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "p0.png", "text": "x"}\n{"file_name"', "Line 2 of .*jsonl is not JSON"),
        ("metadata.jsonl", '{"text": "x"}', "must have a file_name"),
        ("metadata.jsonl", '["p0.png"]', "must have a file_name"),
        ("metadata.csv", "file_name,caption\np0.png,x\n", "has no captions.*field text"),
    ],
)
def test_captions_that_cannot_be_understood(folder, name, text, message):
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Folder(folder)


@pytest.fixture
def pairs(tmp_path, save):
    for number in range(6):
        save(tmp_path / "hq" / f"p{number}.png", 40, 48)
        save(tmp_path / "lq" / f"p{number}.webp", 10, 12)
    return tmp_path / "lq", tmp_path / "hq"


def test_pairs(pairs):
    (pairs[1] / "p5.txt").write_text("a caption", encoding="utf-8")
    source = Pairs(*pairs)
    assert len(source) == 6 and source.name(5) == "p5.png"
    example = source[5]
    assert example.caption == "a caption"
    assert torch.equal(example.hq, load_uint8(pairs[1] / "p5.png"))
    assert torch.equal(example.lq, load_uint8(pairs[0] / "p5.webp"))


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_partner(pairs, side):
    lonely = sorted(pairs[1 - side].iterdir())[2]
    sorted(pairs[side].iterdir())[2].unlink()
    with pytest.raises(ValueError, match=rf"{pairs[side]} holds no partner of {lonely.name};"):
        Pairs(*pairs)


def test_pairs_of_one_stem(pairs, save):
    save(pairs[0] / "p1.png", 10, 12)
    with pytest.raises(ValueError, match=r"holds both p1.* keep one"):
        Pairs(*pairs)


def test_pairs_of_wrong_sizes(pairs, save):
    with pytest.raises(ValueError, match=r"p0\.png is 12x10 and 48x40 pixels; the second must be 2 times the first"):
        Pairs(*pairs, scale=2)
    save(pairs[0] / "p3.webp", 10, 13)
    source = Pairs(*pairs)
    with pytest.raises(ValueError, match=r"p3\.png is 13x10 and 48x40 pixels") as caught:
        source[3]
    assert not isinstance(caught.value, UnreadableImage)


def test_a_damaged_half_of_a_pair(pairs):
    (pairs[0] / "p0.webp").write_bytes(b"damaged")
    with pytest.raises(UnreadableImage) as caught:
        Pairs(*pairs)[0]
    assert caught.value.name == "p0.webp"
