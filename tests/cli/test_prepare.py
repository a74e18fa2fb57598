"""`tsdsr prepare`: photographs in, shards out."""

import json

import pytest


@pytest.fixture
def photographs(tmp_path, photo):
    for number in range(3):
        photo(tmp_path / "in" / f"p{number}.png", 20 + number, 18)
    return tmp_path / "in"


@pytest.fixture
def prepare(tsdsr, model, photographs, tmp_path):
    """Function that runs the command over three photographs."""

    def run(*arguments):
        common = ("--resolution", "16", "--num-workers", "0")
        return tsdsr("prepare", photographs, "-o", tmp_path / "out", "-m", model, *common, *arguments)

    return run


def test_prepare(prepare, tmp_path, files):
    result = prepare("--crops", "2", "--samples-per-shard", "4", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Wrote 6 samples in 2 shards to {tmp_path / 'out'}, ")
    assert result.stdout.endswith(" images/s\n") and result.stderr == ""
    assert files(tmp_path / "out") == [
        "dataset.json",
        *(f"shard-0000{number}.{kind}" for number in (0, 1) for kind in ("json", "tar")),
    ]
    settings = json.loads((tmp_path / "out" / "dataset.json").read_text())["settings"]
    assert (settings["crops"], settings["dtype"], settings["samples_per_shard"]) == (2, "fp32", 4)
    again = prepare("--crops", "2", "--samples-per-shard", "4", "--dtype", "fp32")
    assert again.exit_code == 0
    assert again.stdout == f"kept 2 shards that were whole\nWrote 0 samples in 0 shards to {tmp_path / 'out'}\n"


def test_parts(prepare, tmp_path, files):
    for part in (1, 0):
        assert prepare("--samples-per-shard", "1", "--part", part, "--parts", "2").exit_code == 0
    assert sum(name.endswith(".tar") for name in files(tmp_path / "out")) == 3


def test_skipped_photographs_are_named(prepare, photographs):
    (photographs / "p1.png").write_bytes(b"damaged")
    (photographs / "p0.txt").write_text("a caption")
    result = prepare()
    assert result.exit_code == 0 and result.stdout.startswith("Wrote 2 samples in 1 shards")
    lines = result.stderr.splitlines()
    assert len(lines) == 3 and lines[0].startswith("skipped: ") and "p1.png" in lines[0]
    assert lines[1] == "1 photographs were skipped."
    assert lines[2] == "The model has no text encoders: captions are kept as text."


def test_refusals(prepare, tsdsr, model, photographs, tmp_path, assert_refused):
    assert prepare().exit_code == 0
    assert_refused(prepare("--seed", "1"), "was prepared with other settings (seed 0, not 1)")
    common = ("--resolution", "16", "-o", tmp_path / "other")
    assert_refused(tsdsr("prepare", tmp_path / "nowhere", "-m", model, *common), "nowhere", "cannot be listed")
    assert_refused(tsdsr("prepare", photographs, "-m", tmp_path / "nothing", *common), "neither a folder nor a Hub id")
    assert_refused(tsdsr("prepare", photographs, "-m", tmp_path, *common), "no model_index.json")
    assert_refused(tsdsr("prepare", photographs, "-m", model, "--crops", "0", *common), "crops must be at least 1")
    for path in photographs.iterdir():
        path.write_bytes(b"damaged")
    assert_refused(tsdsr("prepare", photographs, "-m", model, *common), "None of the photographs in")


def test_options_are_checked(prepare):
    result = prepare("--dtype", "fp8")
    assert result.exit_code == 2 and "fp8" in result.stderr
