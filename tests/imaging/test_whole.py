"""Whether a file is whole, of every format that can be written."""

import numpy as np
import pytest

from tsdsr.imaging import SUPPORTED_OUTPUT_SUFFIXES, Picture, write
from tsdsr.imaging.whole import is_whole


@pytest.fixture(scope="module")
def picture():
    return Picture(np.random.default_rng(0).random((20, 30, 3)))


@pytest.mark.parametrize("suffix", SUPPORTED_OUTPUT_SUFFIXES)
def test_whole_and_not(picture, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(picture, path)
    assert is_whole(path, (20, 30)) and is_whole(path)
    assert not is_whole(path, (30, 20)) and not is_whole(path, (20, 30), frames=2)
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:length])
        assert not is_whole(path, (20, 30)), length
        assert not is_whole(path), length


def test_what_is_no_picture_is_not_whole(tmp_path):
    assert not is_whole(tmp_path / "none.png", (1, 1)) and not is_whole(tmp_path, (1, 1))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0IEND\xaeB`\x82")
    assert not is_whole(tmp_path / "a.png", (1, 1))
