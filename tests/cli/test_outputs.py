"""Which file each picture is written to, decided without running anything."""

import os
from pathlib import Path

import pytest

from tsdsr.cli.jobs import Launch, launch, share
from tsdsr.cli.outputs import STREAM, Job, Source, collect, plan

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
    jobs = plan(collect(inputs), output, file_format, lambda: factor, SUPPORTED)
    return {job.source.name: job.output for job in jobs}


# Inputs


def test_files_and_folders_each_picture_once_in_the_order_given(folder):
    root = folder("b.png", "photos/10.png", "photos/2.png", "photos/notes.txt", "photos/deep/3.png")
    sources = collect([root / "b.png", root / "photos", root / "photos" / "2.png", root / "b.png"])
    assert sources == [
        Source(root / "b.png"),
        Source(root / "photos" / "2.png"),
        Source(root / "photos" / "10.png", Path("10.png")),
        Source(root / "photos" / "deep" / "3.png", Path("deep/3.png")),
    ]


def test_a_file_is_taken_whatever_it_is_called(folder):
    root = folder("photo.unknown")
    assert collect([root / "photo.unknown"]) == [Source(root / "photo.unknown")]


def test_missing_input_and_empty_folder(folder):
    root = folder("photos/notes.txt", "a.png")
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        collect([root / "a.png", root / "none.png"])
    with pytest.raises(ValueError, match=r"no pictures in .*photos"):
        collect([root / "photos"])


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

    sources = collect([root / "photo.jpg"])
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
    jobs = plan(collect([root / "one", root / "two"]), f"{root}/out", None, lambda: 4, SUPPORTED)
    assert {job.source.relative_to(root).as_posix(): job.output for job in jobs} == {
        "one/a.jpg": root / "out" / "one" / "a.jpg.png",
        "two/a.jpg": root / "out" / "two" / "a.jpg.png",
        "two/b.jpg": root / "out" / "b.png",
    }


def test_folders_of_one_name_keep_their_parents(folder):
    root = folder("x/day/a.jpg", "y/day/a.jpg")
    jobs = plan(collect([root / "x/day", root / "y/day"]), f"{root}/out", None, lambda: 4, SUPPORTED)
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


# Folders within folders


def names(sources):
    return [source.relative.as_posix() for source in sources]


def test_subfolders_keep_their_structure_unless_told_not_to(folder):
    root = folder(
        "in/2.png", "in/10.png", "in/b/1.png", "in/a/1.png", "in/a/deep/1.jpg", "in/.hidden/1.png", "in/.1.png"
    )
    assert names(collect([root / "in"])) == ["2.png", "10.png", "a/1.png", "a/deep/1.jpg", "b/1.png"]
    assert names(collect([root / "in"], recursive=False)) == ["2.png", "10.png"]
    jobs = plan(collect([root / "in"]), f"{root}/out", None, lambda: 4, SUPPORTED)
    assert [job.output.relative_to(root / "out").as_posix() for job in jobs] == [
        *("2.png", "10.png", "a/1.png", "a/deep/1.png", "b/1.png")
    ]


def test_two_folders_with_the_same_subfolders(folder):
    root = folder("x/day/a.jpg", "y/day/a.jpg")
    jobs = plan(collect([root / "x", root / "y"]), f"{root}/out", None, lambda: 4, SUPPORTED)
    assert [job.output.relative_to(root / "out").as_posix() for job in jobs] == ["x/day/a.jpg.png", "y/day/a.jpg.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_loops_of_links_end(folder):
    root = folder("in/a/1.png", "in/b/2.png", "elsewhere/3.png")
    for link, target in (("a/up", ".."), ("a/self", "."), ("b/a", "../a"), ("c", "../elsewhere"), ("gone", "nowhere")):
        (root / "in" / link).symlink_to(target)
    assert sorted(source.path.resolve().name for source in collect([root / "in"])) == ["1.png", "2.png", "3.png"]
    assert names(collect([f"{root}/in/**/*.png"])) == ["a/1.png", "b/2.png"]


def test_the_folder_of_results_is_not_searched(folder):
    root = folder("in/a.jpg", "in/out/a.jpg", "in/out/old.png", "in/outer/b.png")
    assert names(collect([root / "in"], skip=f"{root}/in/out/")) == ["a.jpg", "outer/b.png"]
    # An input that lies in the folder of results is one all the same.
    assert names(collect([root / "in" / "outer"], skip=f"{root}/in")) == ["b.png"]
    assert names(collect([root / "in" / "out" / "old.png"], skip=f"{root}/in/out")) == ["old.png"]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jpg", ["2.jpg", "10.jpg"]),
        ("?.jpg", ["2.jpg"]),
        ("**/*.jpg", ["2.jpg", "10.jpg", "a/3.jpg", "a/deep/4.jpg"]),
        ("[ab]/*", ["a/3.jpg", "a/deep/4.jpg", "b/5.png"]),  # folders that match count whole
        ("*", ["2.jpg", "10.jpg", "a/3.jpg", "a/deep/4.jpg", "b/5.png"]),
        ("**", ["2.jpg", "10.jpg", "a/3.jpg", "a/deep/4.jpg", "b/5.png"]),
    ],
)
def test_patterns(folder, pattern, found):
    files = ("2.jpg", "10.jpg", "a/3.jpg", "a/deep/4.jpg", "b/5.png", "a/notes.txt", ".6.jpg", ".h/7.jpg")
    root = folder(*(f"in/{name}" for name in files))
    assert names(collect([f"{root}/in/{pattern}"])) == found
    assert all(path.is_relative_to(root / "out") for path in planned([f"{root}/in/{pattern}"], f"{root}/out").values())


def test_folders_of_a_pattern_without_their_subfolders(folder):
    root = folder("in/a/3.jpg", "in/a/deep/4.jpg", "in/5.png")
    assert names(collect([f"{root}/in/*"], recursive=False)) == ["5.png", "a/3.jpg"]


def test_a_name_with_brackets_is_a_name_where_there_is_such_a_file(folder):
    root = folder("a[1].png", "a1.png")
    assert collect([root / "a[1].png"]) == [Source(root / "a[1].png")]
    (root / "a[1].png").unlink()
    assert names(collect([root / "a[1].png"])) == ["a1.png"]


def test_a_pattern_that_matches_nothing(folder):
    root = folder("a.png")
    with pytest.raises(ValueError, match=r"no pictures in .*\*\.jpg"):
        collect([f"{root}/*.jpg"])


# stdin and stdout


def test_stdin_and_stdout(folder, monkeypatch):
    root = folder("a.png", "b.png", "film.mp4", "-")
    stdin = collect(["-"])
    assert stdin == [Source(STREAM)]

    def jobs(sources, output):
        return plan(sources, output, None, lambda: 4, SUPPORTED)

    assert jobs(stdin, None) == jobs(stdin, "-") == [Job(STREAM, STREAM)]
    assert jobs(stdin, f"{root}/c.jpg") == [Job(STREAM, root / "c.jpg")]
    assert jobs(collect([root / "a.png"]), "-") == [Job(root / "a.png", STREAM)]
    with pytest.raises(ValueError, match=r"stdin has no name.*new/photo\.png"):
        jobs(stdin, f"{root}/new/")
    with pytest.raises(ValueError, match="only one picture goes to stdout"):
        jobs(collect([root / "a.png", root / "b.png"]), "-")
    with pytest.raises(ValueError, match="a film does not go to stdout"):
        jobs(collect([root / "film.mp4"]), "-")
    with pytest.raises(ValueError, match="upscaled alone"):
        collect(["-", root / "a.png"])
    monkeypatch.chdir(root)
    assert collect(["./-"]) == [Source(root / "-")]


# Films


def test_films_keep_their_container_where_it_can_be_written(folder):
    root = folder("in/a.mp4", "in/b.avi", "in/c.png")
    assert planned([root / "in"], f"{root}/out", "jpg") == {
        "a.mp4": root / "out" / "a.mp4",
        "b.avi": root / "out" / "b.mkv",
        "c.png": root / "out" / "c.jpg",
    }
    assert planned([root / "in" / "a.mp4"]) == {"a.mp4": root / "in" / "a_x4.mp4"}
    assert planned([root / "in" / "a.mp4"], f"{root}/b.mkv") == {"a.mp4": root / "b.mkv"}
    with pytest.raises(ValueError, match=r"cannot write .*b\.png.*\.mkv"):
        planned([root / "in" / "a.mp4"], f"{root}/b.png")
    with pytest.raises(ValueError, match=r"cannot write .*b\.mp4.*\.png"):
        planned([root / "in" / "c.png"], f"{root}/b.mp4")


def test_a_format_that_cannot_be_written_here(folder):
    root = folder("a.png")
    with pytest.raises(ValueError, match="exr cannot be written here"):
        planned([root / "a.png"], None, "exr")


# Shares


def test_every_job_is_in_one_share():
    jobs = [Job(Path(f"{number}.png"), Path(f"out/{number}.png")) for number in range(23)]
    assert share(jobs, None, None) == jobs
    for shards in (1, 2, 5, 30):
        for processes in (1, 3):
            shares = [
                share(jobs, f"{shard}/{shards}", Launch(rank, processes, 0))
                for shard in range(1, shards + 1)
                for rank in range(processes)
            ]
            assert sorted((job for part in shares for job in part), key=jobs.index) == jobs
            assert max(map(len, shares)) - min(map(len, shares)) <= 2


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_shards_that_are_none(shard):
    with pytest.raises(ValueError, match="--shard is of the form i/n"):
        share([], shard, None)


def test_processes_of_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launch() is None
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch() is None  # what some clusters set for every program
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launch() == Launch(5, 8, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch() is None
