"""Which file each picture is written to, decided without running anything."""

import os
from pathlib import Path

import pytest

from tsdsr.cli.outputs import Job, Source, collect, plan
from tsdsr.imaging import find_images

SUPPORTED = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@pytest.fixture
def folder(tmp_path):
    """Function that makes empty files below a folder, which is enough to plan with."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def planned(inputs, output=None, file_format=None, factor=4.0):
    """Name of each picture -> path of its result."""
    jobs = plan(collect(inputs, find_images), output, file_format, lambda: factor, SUPPORTED)
    return {job.source.name: job.output for job in jobs}


# Inputs


def test_files_and_folders_each_picture_once_in_the_order_given(folder):
    root = folder("b.png", "photos/10.png", "photos/2.png", "photos/notes.txt", "photos/deep/3.png")
    sources = collect([root / "b.png", root / "photos", root / "photos" / "2.png", root / "b.png"], find_images)
    assert sources == [
        Source(root / "b.png"),
        Source(root / "photos" / "2.png"),
        Source(root / "photos" / "10.png", Path("10.png")),
    ]


def test_a_file_is_taken_whatever_it_is_called(folder):
    root = folder("photo.unknown")
    assert collect([root / "photo.unknown"], find_images) == [Source(root / "photo.unknown")]


def test_missing_input_and_empty_folder(folder):
    root = folder("photos/notes.txt", "a.png")
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        collect([root / "a.png", root / "none.png"], find_images)
    with pytest.raises(ValueError, match=r"no pictures in .*photos"):
        collect([root / "photos"], find_images)


# Beside the picture


@pytest.mark.parametrize(("factor", "name"), [(4, "photo_x4.png"), (2.0, "photo_x2.png"), (1.5, "photo_x1.5.png")])
def test_default_name(folder, factor, name):
    root = folder("photo.jpg")
    assert planned([root / "photo.jpg"], factor=factor) == {"photo.jpg": root / name}


def test_default_names_of_a_folder(folder):
    root = folder("photos/a.jpg", "photos/b.v2.png")
    assert planned([root / "photos"]) == {
        "a.jpg": root / "photos" / "a_x4.png",
        "b.v2.png": root / "photos" / "b.v2_x4.png",
    }


def test_the_factor_is_asked_for_only_where_a_name_has_it(folder):
    root = folder("photo.jpg")

    def unknown():
        raise AssertionError("not needed")

    sources = collect([root / "photo.jpg"], find_images)
    assert plan(sources, "out/", None, unknown, SUPPORTED) == [Job(root / "photo.jpg", Path("out/photo.png"))]
    with pytest.raises(AssertionError, match="not needed"):
        plan(sources, None, None, unknown, SUPPORTED)


# Output folder


def test_output_folder_by_slash_by_existence_and_by_having_no_suffix(folder):
    root = folder("photo.jpg", "existing.d/other.txt")
    for output in (f"{root}/new.d/", f"{root}/existing.d", f"{root}/new"):
        assert planned([root / "photo.jpg"], output) == {"photo.jpg": Path(output) / "photo.png"}


def test_folder_in_folder_out(folder):
    root = folder("photos/a.jpg", "photos/b.png", "c.tif")
    assert planned([root / "photos", root / "c.tif"], f"{root}/out") == {
        "a.jpg": root / "out" / "a.png",
        "b.png": root / "out" / "b.png",
        "c.tif": root / "out" / "c.png",
    }


# Collisions


def test_pictures_that_differ_in_their_suffix_keep_it(folder):
    root = folder("a.jpg", "a.png", "b.jpg")
    assert planned([root], f"{root}/out") == {
        "a.jpg": root / "out" / "a.jpg.png",
        "a.png": root / "out" / "a.png.png",
        "b.jpg": root / "out" / "b.png",
    }
    assert planned([root])["a.jpg"] == root / "a.jpg_x4.png"


def test_pictures_that_differ_in_their_folder_keep_it(folder):
    root = folder("one/a.jpg", "two/a.jpg", "two/b.jpg")
    jobs = plan(collect([root / "one", root / "two"], find_images), f"{root}/out", None, lambda: 4, SUPPORTED)
    assert {job.source.relative_to(root).as_posix(): job.output for job in jobs} == {
        "one/a.jpg": root / "out" / "one" / "a.jpg.png",
        "two/a.jpg": root / "out" / "two" / "a.jpg.png",
        "two/b.jpg": root / "out" / "b.png",
    }


def test_folders_of_one_name_keep_their_parents(folder):
    root = folder("x/day/a.jpg", "y/day/a.jpg")
    jobs = plan(collect([root / "x/day", root / "y/day"], find_images), f"{root}/out", None, lambda: 4, SUPPORTED)
    assert [job.output.relative_to(root / "out").as_posix() for job in jobs] == ["x/day/a.jpg.png", "y/day/a.jpg.png"]


def test_names_that_differ_only_in_case_get_numbers(folder):
    """Where a file system ignores case they would be one file."""
    root = folder("a.JPG", "A.jpg", "a.jpg")
    if len(list(root.iterdir())) < 3:
        pytest.skip("this file system ignores case")
    for output in (None, f"{root}/out"):
        names = [str(path).casefold() for path in planned([root], output).values()]
        assert len(set(names)) == 3


def test_a_name_that_is_already_that_of_another_result(folder):
    """a.jpg and a.png have to become a.jpg.png and a.png.png, but a.jpg.tif wants the first of these."""
    root = folder("a.jpg", "a.png", "a.jpg.tif")
    outputs = planned([root], f"{root}/out")
    assert len({str(path).casefold() for path in outputs.values()}) == 3
    assert all(path.is_relative_to(root / "out") for path in outputs.values())


# Earlier results


def test_results_of_an_earlier_run_are_not_upscaled_again(folder):
    root = folder("a.jpg", "b.png")
    first = planned([root])
    folder(*(path.name for path in first.values()))
    assert planned([root]) == first == {"a.jpg": root / "a_x4.png", "b.png": root / "b_x4.png"}


def test_results_of_colliding_names_are_not_upscaled_again(folder):
    root = folder("a.jpg", "a.png")
    first = planned([root])
    folder(*(path.name for path in first.values()))
    assert planned([root]) == first


def test_a_result_that_is_named_itself_is_a_picture_like_any_other(folder):
    root = folder("a.jpg", "a_x4.png")
    assert planned([root / "a_x4.png"]) == {"a_x4.png": root / "a_x4_x4.png"}


# Never an input overwritten


def test_a_picture_is_never_its_own_result(folder):
    root = folder("a.png", "b.png")
    with pytest.raises(ValueError, match="never overwritten"):
        planned([root / "a.png"], f"{root}/a.png")
    with pytest.raises(ValueError, match="never overwritten"):
        planned([root], f"{root}")
    # The folder is made before the result is written; then both are one file.
    with pytest.raises(ValueError, match="never overwritten"):
        planned([root / "a.png"], f"{root}/new/../a.png")


def test_a_picture_is_never_the_result_of_another(folder):
    root = folder("a.jpg", "a_x4.png")
    with pytest.raises(ValueError, match=r"a_x4\.png is one of the pictures"):
        planned([root / "a.jpg", root / "a_x4.png"])


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_picture_is_known_under_every_name(folder):
    root = folder("a.png", "out/other.txt")
    (root / "out" / "a.png").symlink_to(root / "a.png")
    with pytest.raises(ValueError, match="never overwritten"):
        planned([root / "a.png"], f"{root}/out")
    (root / "out" / "a.png").unlink()
    os.link(root / "a.png", root / "out" / "a.png")
    with pytest.raises(ValueError, match="never overwritten"):
        planned([root / "a.png"], f"{root}/out")


# Formats


@pytest.mark.parametrize(
    ("file_format", "name"), [(None, "a.png"), ("png", "a.png"), ("jpg", "a.jpg"), ("webp", "a.webp"), ("tif", "a.tif")]
)
def test_format(folder, file_format, name):
    root = folder("a.gif")
    assert planned([root / "a.gif"], f"{root}/out", file_format) == {"a.gif": root / "out" / name}


def test_format_same_is_that_of_the_picture_or_png(folder):
    root = folder("a.JPEG", "b.tiff", "c.gif")
    assert planned([root], f"{root}/out", "same") == {
        "a.JPEG": root / "out" / "a.jpeg",
        "b.tiff": root / "out" / "b.tiff",
        "c.gif": root / "out" / "c.png",
    }


def test_output_file_decides_the_format(folder):
    root = folder("a.png")
    for name, file_format in (("b.jpg", None), ("b.jpeg", "jpg"), ("b.TIFF", "tif"), ("b.webp", "same")):
        assert planned([root / "a.png"], f"{root}/{name}", file_format) == {"a.png": root / name}
    with pytest.raises(ValueError, match=r"b\.jpg is not a png file"):
        planned([root / "a.png"], f"{root}/b.jpg", "png")


# File or folder


def test_several_pictures_or_a_folder_need_a_folder(folder):
    root = folder("a.png", "b.png", "photos/c.png", "occupied")
    for inputs in ([root / "a.png", root / "b.png"], [root / "photos"]):
        for output in ("out.png", "occupied"):
            with pytest.raises(ValueError, match=f"{output} is a file name.*folder"):
                planned(inputs, f"{root}/{output}")


@pytest.mark.parametrize("name", ["out.gif", "out.xyz", "occupied"])
def test_a_file_that_cannot_be_written(folder, name):
    root = folder("a.png", "occupied")
    with pytest.raises(ValueError, match=rf"cannot write .*{name}.*\.png"):
        planned([root / "a.png"], f"{root}/{name}")
