"""Streams: parquet files and webdataset archives, resumed exactly where they were."""

import copy
import io
import json
import sys
import tarfile
from collections import Counter

import pytest
import torch

from tsdsr.imaging import read
from tsdsr.training.data import BatchSettings, Streamed, load_uint8, training_batches

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [train]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [train]")
datasets = pytest.importorskip("datasets", reason="needs the extra [train]")

SETTINGS = BatchSettings(train_batch_size=2, resolution=16, seed=3, degrade_on="device")
FILES, ROWS = 4, 7


@pytest.fixture
def pictures(tmp_path, save):
    """Files of 28 pictures."""
    return [save(tmp_path / "pictures" / f"p{number:02d}.png", 20, 22) for number in range(FILES * ROWS)]


def write_parquet(folder, pictures, files=FILES, column="image"):
    folder.mkdir(exist_ok=True)
    for number in range(files):
        rows = [
            {
                column: {"bytes": path.read_bytes(), "path": path.name},
                "small": {"bytes": path.read_bytes(), "path": path.name},
                "caption": f"picture {path.stem}",
                "label": 3,
            }
            for path in pictures[number::files]
        ]
        features = datasets.Features(
            {
                column: datasets.Image(),
                "small": datasets.Image(),
                "caption": datasets.Value("string"),
                "label": datasets.Value("int64"),
            }
        )
        table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
        parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=3)
    return str(folder / "*.parquet")


def write_tar(folder, pictures, files=FILES):
    folder.mkdir(exist_ok=True)
    for number in range(files):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for path in pictures[number::files]:
                for name, data in (
                    (path.name, path.read_bytes()),
                    (f"{path.stem}.txt", f"picture {path.stem}".encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return [folder / f"part-{number}.tar" for number in range(files)]


@pytest.fixture(params=["parquet", "tar"])
def stream(request, tmp_path, pictures):
    if request.param == "parquet":
        return Streamed(
            data_files=write_parquet(tmp_path / "files", pictures), caption_column="caption", shuffle_buffer=4
        )
    return Streamed(data_files=write_tar(tmp_path / "files", pictures), caption_column="txt", shuffle_buffer=4)


def batches(source, stop, settings=SETTINGS, **more):
    return list(training_batches(source, settings, stop=stop, **more))


def assert_same(ours, theirs):
    assert [batch["names"] for batch in ours] == [batch["names"] for batch in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["hq"], other["hq"])
        assert {key: one[key] for key in ("index", "captions", "position", "skipped")} == {
            key: other[key] for key in ("index", "captions", "position", "skipped")
        }


def stems(found):
    """Stems of the pictures in batches: parquet names files, archives name keys."""
    return [name.removesuffix(".png") for batch in found for name in batch["names"]]


def test_what_a_batch_holds(stream):
    (batch,) = batches(stream, 1)
    assert batch["hq"].shape == (2, 3, 16, 16) and batch["hq"].dtype == torch.float32 and "lq" not in batch
    assert batch["captions"] == [f"picture {stem}" for stem in stems([batch])]
    json.dumps(batch["position"])


def test_whole_pictures(stream, pictures):
    settings = BatchSettings(2, resolution=20, random_flip=False, degrade_on="device")
    (batch,) = batches(stream, 1, settings)
    for stem, crop in zip(stems([batch]), batch["hq"], strict=True):
        (path,) = [path for path in pictures if path.stem == stem]
        whole = load_uint8(path).float() / 255
        assert any(torch.equal(whole[:, :, left : left + 20], crop) for left in range(3))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs(stream, num_workers):
    found = batches(stream, FILES * ROWS, num_workers=num_workers)
    counts = Counter(stems(found))
    assert set(counts.values()) == {2} and len(counts) == FILES * ROWS
    first, second = stems(found)[: FILES * ROWS], stems(found)[FILES * ROWS :]
    assert first != second and first != sorted(first)
    if not num_workers:
        assert sorted(first) == sorted(second)


def test_files_are_shuffled_too(tmp_path, pictures):
    stream = Streamed(data_files=write_tar(tmp_path / "files", pictures), shuffle_buffer=1)
    orders = []
    for epoch in range(3):
        stems = [row["__key__"] for row in stream.rows(0, 1, seed=0, epoch=epoch)]
        orders.append([int(stem[1:]) % FILES for stem in stems[::ROWS]])
        assert sorted(stems) == [path.stem for path in pictures]
    assert len({tuple(order) for order in orders}) > 1 and [*range(FILES)] not in orders[:1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_goes_on_exactly(stream, num_workers):
    unbroken = batches(stream, 30, num_workers=num_workers)
    for stop in (1, 7, 14, 20):
        position = json.loads(json.dumps(unbroken[stop - 1]["position"]))
        given = copy.deepcopy(position)
        resumed = batches(stream, 30, start=stop, num_workers=num_workers, position=position)
        assert_same(unbroken[stop:], resumed)
        assert position == given


def test_resuming_decodes_nothing_again(stream, monkeypatch):
    position = batches(stream, 5)[-1]["position"]
    decoded = []
    monkeypatch.setattr(
        "tsdsr.training.data.photographs.read", lambda source: decoded.append(source.name) or read(source)
    )
    batches(stream, 6, start=5, position=position)
    assert len(decoded) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_have_their_own_parts(stream, num_workers):
    parts = [batches(stream, 28, rank=rank, world=2, num_workers=num_workers) for rank in (0, 1)]
    assert [batch["index"] for batch in parts[1]] == list(range(1, 28, 2))
    # Three batches of each reader: none has begun its second epoch.
    assert not set(stems(parts[0][:6])) & set(stems(parts[1][:6]))
    assert set(Counter(stems(parts[0]) + stems(parts[1])).values()) == {2}
    resumed = batches(stream, 28, rank=1, world=2, start=10, num_workers=num_workers, position=parts[1][4]["position"])
    assert_same(parts[1][5:], resumed)


def test_fewer_files_than_readers(tmp_path, pictures):
    stream = Streamed(data_files=write_parquet(tmp_path / "files", pictures, files=1), shuffle_buffer=4)
    unbroken = batches(stream, 28, num_workers=2)
    assert set(Counter(stems(unbroken)).values()) == {2}
    assert_same(unbroken[9:], batches(stream, 28, start=9, num_workers=2, position=unbroken[8]["position"]))


def test_files_that_do_not_divide_by_the_readers(tmp_path, pictures):
    stream = Streamed(data_files=write_tar(tmp_path / "files", pictures, files=3), shuffle_buffer=4)
    unbroken = batches(stream, 30, num_workers=2)
    assert len(set(stems(unbroken))) == FILES * ROWS
    assert_same(unbroken[16:], batches(stream, 30, start=16, num_workers=2, position=unbroken[15]["position"]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_pictures_are_skipped(tmp_path, pictures, save, num_workers):
    pictures[3].write_bytes(pictures[3].read_bytes()[:200])
    pictures[9].write_bytes(b"damaged")
    save(pictures[17], 12, 30)
    stream = Streamed(data_files=write_tar(tmp_path / "files", pictures), shuffle_buffer=4)
    found = batches(stream, 30, num_workers=num_workers)
    reasons = dict(entry for batch in found for entry in batch["skipped"])
    assert reasons.keys() == {"p03", "p09", "p17"} and "30x12 pixels, smaller than crops of 16x16" in reasons["p17"]
    assert len(set(stems(found))) == FILES * ROWS - 3
    assert_same(found[11:], batches(stream, 30, start=11, num_workers=num_workers, position=found[10]["position"]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_can_be_read(tmp_path, pictures, num_workers):
    for path in pictures:
        path.write_bytes(b"damaged")
    stream = Streamed(data_files=write_tar(tmp_path / "files", pictures))
    with pytest.raises(ValueError, match=r"^\(Almost\) none of the pictures can be used: p\d\d"):
        batches(stream, 3, num_workers=num_workers)


def test_more_readers_than_samples(tmp_path, pictures):
    stream = Streamed(data_files=write_tar(tmp_path / "files", pictures[:1], files=1))
    with pytest.raises(ValueError, match="fewer samples than there are readers"):
        batches(stream, 3, rank=1, world=2)


def test_a_position_of_another_run(stream):
    position = batches(stream, 1, num_workers=2)[0]["position"]
    with pytest.raises(ValueError, match="1 processes with 2 workers each, and is to go on with 1 and 1"):
        training_batches(stream, SETTINGS, stop=3, start=1, position=position)
    with pytest.raises(ValueError, match="1 processes with 2 workers each, and is to go on with 2 and 2"):
        training_batches(stream, SETTINGS, stop=3, start=1, position=position, num_workers=2, world=2)
    position = batches(stream, 1, rank=0, world=2)[0]["position"]
    with pytest.raises(ValueError, match="that of process 0, not of process 1"):
        training_batches(stream, SETTINGS, stop=3, start=1, position=position, rank=1, world=2)


def test_the_random_generators_of_the_process_stay_untouched(stream):
    before = torch.get_rng_state()
    batches(stream, 3)
    batches(stream, 3, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_columns(tmp_path, pictures):
    files = write_parquet(tmp_path / "files", pictures, column="photo")
    with pytest.raises(ValueError, match="no column 'image'; it has photo, small, caption, label"):
        Streamed(data_files=files)
    with pytest.raises(ValueError, match="no column 'text'"):
        Streamed(data_files=files, image_column="photo", caption_column="text")
    pair = Streamed(data_files=files, image_column="photo", lq_column="small")
    (batch,) = batches(pair, 1, BatchSettings(2, resolution=16, scale=1))
    assert torch.equal(batch["hq"], batch["lq"])
    with pytest.raises(ValueError, match="must be 4 times the first"):
        batches(pair, 1)


def test_a_row_without_a_picture(tmp_path, pictures):
    (tmp_path / "files").mkdir()
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"image": {"bytes": pictures[0].read_bytes(), "path": None}}, {"image": None}]
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    parquet.write_table(table, tmp_path / "files" / "x.parquet")
    found = batches(Streamed(data_files=tmp_path / "files" / "x.parquet"), 3)
    skipped = [entry for batch in found for entry in batch["skipped"]]
    assert skipped and all(name.startswith("sample ") and "has no picture" in reason for name, reason in skipped)


def test_files_of_other_kinds(tmp_path):
    with pytest.raises(ValueError, match=r"must be either .parquet or .tar files, not a.parquet, b.tar"):
        Streamed(data_files=["a.parquet", "b.tar"])
    with pytest.raises(ValueError, match="Give the name of a data set, or data_files"):
        Streamed()
    with pytest.raises(OSError, match="nothing"):
        Streamed(data_files=str(tmp_path / "nothing.parquet"))


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "tsdsr\[train\]"'):
        Streamed(data_files="x.tar")
