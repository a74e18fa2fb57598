"""`tsdsr compare`, from pictures on disk to a sheet on disk."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def compare(tsdsr, small_tiles):
    """Function that runs the command with options that make the tiny pipeline quick."""

    def run(source, *arguments):
        return tsdsr("compare", source, *small_tiles, *arguments)

    return run


@pytest.mark.parametrize("models", [("--models", "lanczos", "MODEL"), ("--models", "lanczos", "-m", "MODEL")])
@pytest.mark.parametrize("suffix", ["png", "jpg", "html"])
def test_sheet(compare, model, photo, files, tmp_path, models, suffix):
    source, output = photo(tmp_path / "in" / "a.png"), tmp_path / "new" / f"sheet.{suffix}"
    named = [str(model) if word == "MODEL" else word for word in models]
    result = compare(source, *named, "-o", output, "--labels", "L", "ours", "--crop", "0,0,8", "--crop", "4,2,8")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["bicubic (input)", "L", "ours"]
    assert lines[-1] == f"wrote {output}" and result.stderr == ""
    assert files(tmp_path / "new") == [f"sheet.{suffix}"]
    if suffix == "html":
        assert ">ours<" in output.read_text(encoding="utf-8")
    else:
        with Image.open(output) as sheet:
            assert sheet.width == 4 * (256 + 8) + 8  # overview and three methods


def test_a_folder_with_ground_truth(compare, photo, tmp_path):
    """One part below another, the last column being the ground truth itself."""
    for name in ("a.png", "b.png"):
        photo(tmp_path / "lq" / name)
        photo(tmp_path / "hr" / name, 48, 40)
    sizes = []
    for source, more in ((tmp_path / "lq" / "a.png", ()), (tmp_path / "lq", ("--hr", tmp_path / "hr"))):
        output = tmp_path / "sheet.png"
        result = compare(source, "--models", "bicubic", *more, "-o", output, "--crops", 1, "--overwrite")
        assert result.exit_code == 0, result.output
        with Image.open(output) as sheet:
            sizes.append(sheet.size)
            last = np.asarray(sheet)[57:, -200]
    assert sizes[1][1] == 2 * sizes[0][1] and sizes[1][0] > sizes[0][0]
    assert (last == (200, 40, 40)).all(axis=1).any() or (last == (40, 40, 200)).all(axis=1).any()


def test_existing_output_is_kept(compare, photo, tmp_path, assert_refused):
    source, output = photo(tmp_path / "a.png"), tmp_path / "sheet.png"
    output.write_text("mine")
    assert_refused(compare(source, "--models", "nearest", "-o", output), output, "--overwrite")
    assert output.read_text() == "mine"
    result = compare(source, "--models", "nearest", "-o", output, "--overwrite", "--crop-size", 4)
    assert result.exit_code == 0, result.output
    assert output.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-o", "sheet.xyz"), ("sheet.xyz", ".html", ".png")),
        (("-o", "sheet"), ("sheet", "suffix")),
        (("--crop", "1,2"), ("1,2", "X,Y,SIZE")),
        (("--crop", "1,2,-3"), ("1,2,-3", "X,Y,SIZE")),
        (("--crop", "8,8,8"), ("8,8,8", "12x10")),
        (("--models", "./absent"), ("absent", "does not exist")),
        (("--labels", "one", "two", "three"), ("1 models", "3 labels")),
        (("--hr", "absent"), ("absent", "not a folder")),
    ],
)
def test_refusals(compare, photo, files, assert_refused, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "a.png")
    # The last of an option that takes one value counts; models add up, so theirs is given once.
    models = () if "--models" in options else ("--models", "nearest")
    assert_refused(compare("a.png", *models, "-o", "sheet.png", *options), *words)
    assert files(tmp_path) == ["a.png"]


def test_what_the_pipeline_refuses(compare, model, photo, files, tmp_path):
    result = compare(photo(tmp_path / "a.png"), "--models", model, "--tile-size", 1, "-o", tmp_path / "b.png")
    assert result.exit_code == 2
    assert result.stderr.startswith("tsdsr: `tile_size` must be") and len(result.stderr.splitlines()) == 1
    assert files(tmp_path) == ["a.png"]


def test_help_does_not_say_what_is_not_there(tsdsr):
    text = tsdsr("compare", "--help").stdout
    for option in ("--models", "--labels", "--hr", "--crop ", "--crops", "--crop-size", "--output", "--overwrite"):
        assert option in text
