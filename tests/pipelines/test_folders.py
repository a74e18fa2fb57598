"""Folders that are whole or not there."""

import os

import pytest
import torch
from safetensors.torch import save_file

from tsdsr.pipelines.folders import whole_folder


@pytest.fixture
def umask():
    """A function that sets the mask for the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_can_be_read_by_whom_the_system_lets(tmp_path, umask, mask, mode):
    umask(mask)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        save_file({"a": torch.zeros(2)}, folder / "inner" / "weights.safetensors")
        (folder / "run.sh").touch()
        (folder / "run.sh").chmod(0o700)
    assert (tmp_path / "out" / "inner" / "weights.safetensors").stat().st_mode & 0o777 == mode
    assert (tmp_path / "out" / "run.sh").stat().st_mode & 0o777 == mode | 0o700


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_is_only_linked_to_is_left_alone(tmp_path, umask):
    umask(0o022)
    (tmp_path / "mine").touch(mode=0o600)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "link").symlink_to(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600


def test_nothing_is_left_of_what_failed(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "new" / "out") as folder:
        (folder / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    for name in ("first", "second"):
        with whole_folder(out) as folder:
            (folder / name).touch()
    assert [path.name for path in out.iterdir()] == ["second"]
    with pytest.raises(KeyError), whole_folder(out):
        raise KeyError
    assert [path.name for path in out.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [out]
